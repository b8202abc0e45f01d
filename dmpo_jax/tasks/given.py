"""Prompts that a caller has in memory, as a task; rewards.py calls their rewards."""

import hashlib
import json
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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


def own_task(examples: list[dict], held_out: list[dict]) -> Task:
  """Returns the Task of prompts that a caller has; it pays nothing itself."""

  def load(split, options):
    size = getattr(options, f'{split}_size')
    return examples if split == 'train' else held_out[: size or None]

  def target(example, style):
    if 'completion' not in example:
      raise ValueError('supervised training needs a column named completion')
    return example['completion']

  return Task(
    load=load,
    prompt=lambda example, style: example['prompt'],
    target=target,
    reward=lambda *_: {},
    grade=lambda *_: 0.0,
    record=lambda example: (example['prompt'], example),
  )


def named(functions: Sequence[Callable]) -> dict[str, Callable]:
  """Returns {name: function}, as metrics show them; ValueError if two have one name."""
  found = {getattr(fn, '__name__', type(fn).__name__): fn for fn in functions}
  if len(found) < len(functions):
    raise ValueError(
      f'two rewards have the same name, of {", ".join(found)}: rename one'
    )
  return found


def digest_of(examples: list[dict], rewards: Sequence[Callable]) -> str:
  """Returns a hash of prompts, columns and the code of the rewards."""
  codes = [code_of(getattr(fn, '__code__', type(fn).__name__)) for fn in rewards]
  text = json.dumps([examples, codes], default=repr)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def code_of(x: Any) -> Any:
  """Returns what a function computes, as text: its instructions, names and constants.

  Its source is not always there, such as in an interpreter.
  """
  if isinstance(x, types.CodeType):
    return [x.co_code.hex(), x.co_names, [code_of(part) for part in x.co_consts]]
  return sorted(map(repr, x)) if isinstance(x, frozenset) else repr(x)
