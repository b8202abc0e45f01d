"""Prompts and reward functions that a caller has in memory, as a task.

A reward has the signature of trl's: fn(prompts, completions, **columns) -> list of
numbers, where each column of the prompts is a list.
"""

import hashlib
import inspect
import json
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dmpo_jax.types import Task


def examples_of(rows: Sequence, name: str) -> list[dict]:
  """Returns prompts as dicts; ValueError names the first row that is none."""
  if isinstance(rows, str) or not len(rows):
    raise ValueError(f'{name} must be a list of prompts, not {rows!r}')
  found = []
  for number, row in enumerate(rows):
    example = {'prompt': row} if isinstance(row, str) else row
    if not isinstance(example, Mapping) or not isinstance(example.get('prompt'), str):
      raise ValueError(
        f'row {number} of {name} must be a text, or a dict with a text named prompt; '
        f'it is {row!r}'
      )
    found.append(dict(example))
  return found


def own_task(
  examples: list[dict], held_out: list[dict], rewards: Sequence[Callable]
) -> Task:
  """Returns the Task of prompts that a caller has, with the caller's rewards."""

  def load(split, options):
    size = getattr(options, f'{split}_size')
    return examples if split == 'train' else held_out[: size or None]

  last: list = [None, {}]  # the grade is asked for after the reward of the same text

  def judge(text, example, protocol):
    if last[0] != (text, id(example)):
      terms = {name_of(fn): call_reward(fn, text, example) for fn in rewards}
      last[:] = (text, id(example)), terms
    return dict(last[1])

  def grade(text, example, protocol):
    return min(1.0, max(0.0, sum(judge(text, example, protocol).values())))

  def target(example, style):
    if 'completion' not in example:
      raise ValueError('supervised training needs a column named completion')
    return example['completion']

  return Task(
    load=load,
    prompt=lambda example, style: example['prompt'],
    target=target,
    reward=judge,
    grade=grade,
    extra=lambda text, example: {},
    record=lambda example: (example['prompt'], example),
  )


def name_of(fn: Callable) -> str:
  """Returns the name of a reward function, as metrics and tables show it."""
  return getattr(fn, '__name__', type(fn).__name__)


def call_reward(fn: Callable, text: str, example: dict) -> float:
  """Returns the reward of one completion; ValueError if it is no number.

  A function without **columns gets the columns that it names.
  """
  columns = {name: [value] for name, value in example.items() if name != 'prompt'}
  takes = inspect.signature(fn).parameters
  if not any(x.kind is x.VAR_KEYWORD for x in takes.values()):
    columns = {name: value for name, value in columns.items() if name in takes}
  where = f'the reward {name_of(fn)} of the prompt {example["prompt"][:80]!r}'
  try:
    found = fn(prompts=[example['prompt']], completions=[text], **columns)
  except Exception as error:
    raise ValueError(f'{where} failed: {type(error).__name__}: {error}') from error
  values = list(found) if isinstance(found, Sequence | np.ndarray) else [found]
  if len(values) != 1 or not isinstance(values[0], int | float | np.number):
    raise ValueError(
      f'{where} is {found!r}: it must be a list with one number for each completion'
    )
  return float(values[0])


def digest_of(examples: list[dict], rewards: Sequence[Callable]) -> str:
  """Returns a hash of prompts, columns and the code of the rewards."""
  codes = [code_of(getattr(fn, '__code__', name_of(fn))) for fn in rewards]
  text = json.dumps([examples, codes], default=repr)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def code_of(x: Any) -> Any:
  """Returns what a function computes, as text: its instructions, names and constants.

  Its source is not always there, such as in an interpreter.
  """
  if isinstance(x, types.CodeType):
    return [x.co_code.hex(), x.co_names, [code_of(part) for part in x.co_consts]]
  return sorted(map(repr, x)) if isinstance(x, frozenset) else repr(x)
