"""Tasks of the package reasoning-gym by name: data.task = gym:chain_sum.

Their scorer is both reward and grade. data.options are the fields of the data set's
config, such as 'min_terms=2, max_terms=3'. A hash of the question puts a problem in a
split (85 % train, 5 % validation, 10 % test), so splits share no question, whatever the
seed. Problem n of data.seed is row n % 500 of the data set of 500 rows whose seed is
1e7 * data.seed + n // 500 * 500: most of them draw row i with the seed plus i, so no
row is drawn twice. A problem holds this address, and its scorer makes it again.
"""

import difflib
import functools
import importlib
import json
from collections.abc import Iterator
from typing import Any

from dmpo_jax.rules import nearest
from dmpo_jax.tasks import answers, datasets, symbolic
from dmpo_jax.types import Task, TaskOptions

PACKAGE = 'reasoning_gym'
OPTIONS = {'generated': ('seed', 'options'), 'file': ()}
ROWS = 500  # of one data set; a few of them make all rows at once
APART = 10_000_000  # rows between two seeds
MISSES = 2000  # rows in a row without a new problem; then generation gives up
CHAT = """{question}

First think between <reasoning> and </reasoning>. Then write just the final answer \
between <answer> and </answer>."""
TEMPLATES = {'bare': '{question}', 'chat': CHAT}


def task_of(name: str, field: str) -> Task:
  """Returns the task gym:NAME; ValueError: no package, or no such data set."""
  try:
    importlib.import_module(PACKAGE)
  except ImportError as error:
    raise ValueError(
      f'{field} = gym:{name} needs the package reasoning-gym ({error}): pip install '
      "'dmpo_jax[gym]'"
    ) from error
  known = importlib.import_module(f'{PACKAGE}.factory').DATASETS
  if name not in known:
    near = ', '.join(difflib.get_close_matches(name, known, 3, 0.4)) or 'none near it'
    raise ValueError(
      f"{field} = 'gym:{name}': reasoning-gym has no such data set (of {len(known)}: "
      f'{near})'
    )
  symbolic.prepare(PACKAGE)
  return _task(name)


@functools.cache
def _task(name: str) -> Task:
  return Task(
    functools.partial(load, name), prompt, target,
    functools.partial(reward, name), functools.partial(grade, name),
    record=record, recall=functools.partial(recall, name),
    styles=tuple(TEMPLATES), terms=(name,), best=1.0, threads=True,
    options=OPTIONS,
  )  # fmt: skip


# --- problems


@functools.lru_cache(maxsize=64)
def dataset(name: str, options: str, seed: int) -> Any:
  """Returns a data set of the package; ValueError if its config is refused."""
  factory = importlib.import_module(f'{PACKAGE}.factory')
  wanted = TaskOptions(options=options).own()
  fields = set(factory.DATASETS[name][1].__dataclass_fields__) - {'seed', 'size'}
  for word in wanted:
    if wrong := nearest(f'data.options of gym:{name}', word, sorted(fields)):
      raise ValueError(wrong[0])
  try:
    return factory.create_dataset(name, seed=seed, size=ROWS, **wanted)
  except Exception as error:  # mostly assertions
    raise ValueError(
      f'data.options = {options!r}: gym:{name} refuses them: {type(error).__name__}: '
      f'{error}'
    ) from error


def entry(name: str, options: str, row: int) -> dict[str, Any]:
  """Returns the package's entry at an address: question, answer and metadata."""
  return dataset(name, options, row // ROWS * ROWS)[row % ROWS]


def _rows(name: str, options: TaskOptions) -> Iterator[dict]:
  row = APART * options.seed
  while True:
    found = entry(name, options.options, row)
    answer = found['answer']
    yield {
      'question': found['question'],
      'answer': None if answer is None else str(answer),
      'row': row,
      'options': options.options,
    }
    row += 1


def load(name: str, split: str, options: TaskOptions) -> list[dict]:
  """Returns examples {'question', 'answer', 'row', 'options'}, all questions distinct.

  ValueError for an unknown split, a wrong size, a path, and too few problems.
  """
  size = datasets.size_of(split, options)
  if options.path:
    raise ValueError(f"data.path = {options.path!r}: gym:{name} has no files, set ''")
  if size < 1:
    raise ValueError(f'data.{split}_size = {size} must be at least 1')
  found, misses = {}, 0
  for example in _rows(name, options):
    question = example['question']
    misses += 1
    if question not in found and datasets.split_by(question) == split:
      found[question], misses = example, 0
      if len(found) == size:
        break
    if misses == MISSES:
      raise ValueError(
        f'data.{split}_size = {size} is too large: gym:{name} has given only '
        f'{len(found)} problems with data.options = {options.options!r}'
      )
  return list(found.values())


def prompt(example: dict, style: str) -> str:
  """Returns the user's message; ValueError for an unknown style."""
  template = answers.choose('style', style, TEMPLATES)
  return template.replace('{question}', example['question'])


def target(example: dict, style: str) -> str:
  """Returns a correct completion; ValueError if the package gives no answer."""
  answers.choose('style', style, TEMPLATES)
  if example['answer'] is None:
    raise ValueError('this task of reasoning-gym has no answers to train on: sft.steps')
  answer = example['answer']
  return answer if style == 'bare' else f'<answer>\n{answer}\n</answer>'


# --- grades


def score(text: str, address: str) -> float:
  """Returns the package's score in [0, 1]; runs in a worker, for some hang."""
  name, options, row = json.loads(address)
  data = dataset(name, options, row // ROWS * ROWS)
  return min(1.0, max(0.0, float(data.score_answer(text, data[row % ROWS]))))


def reward(name: str, text: str, example: dict, protocol: str) -> dict[str, float]:
  """Returns {NAME: score}: of the last <answer>, else of the whole text."""
  answers.choose('protocol', protocol, answers.PROTOCOLS)
  address = json.dumps([name, example['options'], example['row']])
  return {name: symbolic.decide(score, answers.answer_or_text(text), address)}


def grade(name: str, text: str, example: dict, protocol: str) -> float:
  """Returns the same score."""
  return reward(name, text, example, protocol)[name]


def record(example: dict) -> tuple[str, list]:
  """Returns (question, [answer, row, options]), as generations are saved."""
  return example['question'], [example[x] for x in ('answer', 'row', 'options')]


def recall(name: str, question: str, truth: object) -> dict:
  """Returns the example of a saved generation; ValueError if it is another here."""
  if isinstance(truth, list) and len(truth) == 3:
    answer, row, options = truth
    if isinstance(row, int) and isinstance(options, str):
      if entry(name, options, row)['question'] == question:
        return dict(question=question, answer=answer, row=row, options=options)
  raise ValueError(
    f'ground_truth {truth!r} is no problem of gym:{name} of this version of '
    'reasoning-gym with this question'
  )
