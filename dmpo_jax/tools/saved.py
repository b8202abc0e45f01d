"""Reads saved generations: JSON files in the format of the d1 and DMPO releases.

A file holds an object with a list `generations`. Each of its items has question,
generations (a text, or a list of k samples) and ground_truth. An item whose
ground_truth is null cannot be graded and is left out.
"""

import glob
import os
from typing import Any, NamedTuple

from dmpo_jax import files, grader
from dmpo_jax.tasks import answers
from dmpo_jax.types import Task

SETTINGS = ('gen_length', 'diffusion_steps', 'block_length')  # of one evaluation
REASONED = answers.PREFILL['eval'].replace('<', '</')


class Saved(NamedTuple):
  """The generations of one evaluation; n samples."""

  header: dict[str, Any]  # the first file's object
  rows: list[dict]  # n: 'text', and 'problem', which samples of a problem share
  examples: list[dict]  # n
  files: int
  skipped: int  # items without a truth


def read(task: Task, pattern: str) -> Saved:
  """Returns the generations of a file, or of all files that a pattern names.

  ValueError that names the file and what it lacks, or files of several evaluations.
  """
  files = [(path, read_file(path)) for path in paths_of(pattern)]
  first, header = files[0]
  rows, examples, skipped = [], [], 0
  for number, (path, saved) in enumerate(files):
    if differing := [x for x in SETTINGS if saved.get(x) != header.get(x)]:
      raise ValueError(
        f'--generations={pattern} names files of several evaluations: {differing[0]} '
        f'is {header.get(differing[0])} in {first}, {saved.get(differing[0])} in {path}'
      )
    for i, item in enumerate(saved['generations']):
      problem = f'{number}:{item.get("problem", i)}' if isinstance(item, dict) else ''
      example, texts = read_item(task, item, f'{path}: generation {i}')
      skipped += example is None
      for text in texts if example is not None else ():
        rows.append({'text': text, 'problem': problem})
        examples.append(example)
  if not rows:
    raise ValueError(f'{pattern}: every ground_truth is null, so nothing can be graded')
  return Saved(header, rows, examples, len(files), skipped)


def paths_of(pattern: str) -> list[str]:
  """Returns the file of that name, else the files that match; ValueError if none."""
  if os.path.isdir(pattern):
    raise ValueError(
      f'--generations={pattern} is a directory: name a file in it, or several by a '
      f"pattern such as '{os.path.join(pattern, '*_generations.json')}'"
    )
  if os.path.exists(pattern):
    return [pattern]
  found = sorted(path for path in glob.glob(pattern) if os.path.isfile(path))
  if not found:
    raise ValueError(f'--generations={pattern}: there is no such file')
  return found


def read_file(path: str) -> dict[str, Any]:
  """Returns the object in a file of generations; ValueError without a list of them."""
  saved = files.read_json(path)
  items = saved.get('generations') if isinstance(saved, dict) else None
  if not items or not isinstance(items, list):
    raise ValueError(f'{path}: no list of generations, or an empty one')
  return saved


def read_item(task: Task, item: Any, where: str) -> tuple[dict | None, list[str]]:
  """Returns (example, its samples); the example is None where the truth is null."""
  if not isinstance(item, dict):
    raise ValueError(f'{where} is no object with fields')
  lacks = [x for x in ('question', 'generations') if item.get(x) is None]
  if lacks := lacks + [x for x in ('ground_truth',) if x not in item]:
    raise ValueError(f'{where} has no {", ".join(lacks)}')
  texts = item['generations']
  texts = texts if isinstance(texts, list) else [texts]
  if not texts or not all(isinstance(x, str) for x in (item['question'], *texts)):
    raise ValueError(
      f'{where}: question must be a text, and generations a text or a list of texts'
    )
  if item['ground_truth'] is None:
    return None, texts
  try:
    return task.recall(item['question'], item['ground_truth']), texts
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from None


def judge_of(task: Task, card: dict[str, Any]) -> Task:
  """Returns the task as it judges saved texts.

  card: the results card in our own files, whose texts are what was graded. Others'
  files have none. Their texts run on in special tokens, which are cut, as ours were,
  but for the grades of 'paper': d1's parser has seen them. A text that closes a
  <reasoning> that it has not opened was prefilled.
  """
  if card:
    return grader.prefilled(task, answers.PREFILL.get(card.get('style', ''), ''))
  clean = answers.without_specials
  shown = lambda text, protocol: text if protocol == 'paper' else clean(text)

  def reward(text, example, protocol):
    text = clean(text)
    reasoning, closed, _ = text.partition(REASONED)
    begun = closed and answers.PREFILL['eval'] not in reasoning
    return task.reward(answers.PREFILL['eval'] * bool(begun) + text, example, protocol)

  return task._replace(
    reward=reward,
    grade=lambda text, e, protocol: task.grade(shown(text, protocol), e, protocol),
    answer=lambda text, e, protocol: task.answer(shown(text, protocol), e, protocol),
    extra=lambda text, example: task.extra(clean(text), example),
  )
