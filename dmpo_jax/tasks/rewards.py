"""Calls a user's reward functions: those of reward.file, or of the Python API.

A function has the signature of trl's GRPOTrainer: it takes lists, `prompts` and
`completions`, the problems' fields by name, and `completion_ids`, and returns a number
or None for each completion. It is called with those that it names, or with all if it
takes **kwargs. A class is instantiated once, so that it can hold a model. A function
may be async.

Each function runs in a process of its own, which has no accelerator and is killed at
the time limit, or in a thread of the trainer.
"""

import asyncio
import atexit
import concurrent.futures
import contextlib
import inspect
import math
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pebble

from dmpo_jax.tasks import userfile, workers

FIELD = 'reward.file'
LOADING = 600.0  # seconds in which a file must be imported and its class made
OWN = ('prompts', 'completions', 'completion_ids')
CPU = {'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': '', 'TPU_VISIBLE_CHIPS': ''}
# FILE.py:NAME -> what is called, in the process that calls. A function of the Python
# API has a name without a file.
_made: dict[str, Any] = {}


def specs(text: str) -> dict[str, str]:
  """Returns {name: FILE.py:NAME} of 'FILE.py:NAME,NAME,FILE.py:NAME'.

  ValueError if an item has no file, or two functions have the same name.
  """
  found, path = {}, ''
  for item in filter(None, map(str.strip, text.split(','))):
    spec = item if ':' in item or item.endswith('.py') else f'{path}:{item}'
    path, name = userfile.split(FIELD, spec)
    if name in found:
      raise ValueError(f'{FIELD} = {text!r} has two functions {name}: rename one')
    found[name] = f'{os.path.abspath(path)}:{name}'
  return found


def check(text: str) -> None:
  """Raises ValueError if a file cannot be read or lacks the function; runs nothing."""
  for spec in specs(text).values():
    userfile.check(FIELD, spec)


# --- where a function runs


def ready(spec: str) -> None:
  """Imports the file and makes what is called; ValueError if that fails."""
  if spec in _made:
    return
  made = userfile.load(FIELD, spec)
  try:
    made = made() if inspect.isclass(made) else made
  except Exception as error:
    path = os.path.realpath(userfile.split(FIELD, spec)[0])
    raise ValueError(f'{FIELD}: {userfile.described(error, path)}') from error
  if not callable(made):
    raise ValueError(f'{FIELD} = {spec}: a {type(made).__name__} cannot be called')
  _made[spec] = made


def call(
  spec: str,
  prompts: Sequence[str],
  completions: Sequence[str],
  columns: Mapping[str, Sequence],
  ids: Sequence | None,
) -> list[float | None]:
  """Returns the rewards of all rows; ValueError names the function and the row."""
  ready(spec)
  given = {
    **{name: list(x) for name, x in columns.items()},
    'prompts': list(prompts),
    'completions': list(completions),
    'completion_ids': ids,
  }
  given = _accepted(spec, _made[spec], given)
  rows = len(completions)
  try:
    return _numbers(spec, _answer(_made[spec], given), rows)
  except _Wrong as error:
    raise ValueError(str(error)) from None
  except Exception as error:
    # One row may be to blame: the first one on which the function fails so alone.
    said = _said(spec, error)
    for row in range(rows):
      one = {name: x and x[row : row + 1] for name, x in given.items()}
      try:
        _answer(_made[spec], one)
      except Exception as alone:
        if _said(spec, alone) == said:
          raise ValueError(f'{_at(spec, row)}: {said}') from alone
    raise ValueError(f'{_at(spec)}: {said} (all {rows} rows at once)') from error


class _Wrong(Exception):
  """A function's answer is no list of numbers; the sentence has the row."""


def _at(spec: str, row: int | None = None) -> str:
  where = f'{FIELD} = {spec}' if userfile.is_spec(spec) else f'the reward {spec}'
  return where + ('' if row is None else f', row {row}')


def _said(spec: str, error: BaseException) -> str:
  source = userfile.split(FIELD, spec)[0] if userfile.is_spec(spec) else ''
  source = source or getattr(getattr(_made[spec], '__code__', None), 'co_filename', '')
  return userfile.described(error, source and os.path.realpath(source))


def _accepted(spec: str, made: Any, given: dict[str, Any]) -> dict[str, Any]:
  """Returns the arguments that a function takes; ValueError if it needs others."""
  words = inspect.signature(made).parameters.values()
  if any(word.kind is word.VAR_KEYWORD for word in words):
    return given
  names = {word.name for word in words}
  needed = [word.name for word in words if word.default is word.empty]
  if missing := [name for name in needed if name not in given]:
    there = ', '.join(name for name in given)
    raise ValueError(f'{_at(spec)} takes {", ".join(missing)}; there are {there}')
  return {name: x for name, x in given.items() if name in names}


def _answer(made: Any, given: dict[str, Any]) -> Any:
  answer = made(**given)
  return asyncio.run(_awaited(answer)) if inspect.isawaitable(answer) else answer


async def _awaited(answer: Any) -> Any:
  return await answer


def _numbers(spec: str, answer: Any, rows: int) -> list[float | None]:
  """Returns a function's answer as floats; _Wrong if it is no number for each row."""
  answer = answer.tolist() if hasattr(answer, 'tolist') else answer
  if not isinstance(answer, list | tuple):
    kind = type(answer).__name__
    raise _Wrong(f'{_at(spec)} must return a list of {rows} numbers, it returns {kind}')
  if len(answer) != rows:
    raise _Wrong(f'{_at(spec)} returns {len(answer)} rewards of {rows} completions')
  found: list[float | None] = []
  for row, value in enumerate(answer):
    with contextlib.suppress(Exception):  # an array of one number, of any library
      value = value.item()
    if value is not None and not isinstance(value, bool | int | float):
      raise _Wrong(f'{_at(spec, row)}: {value!r} must be a number, or None')
    if value is not None and not math.isfinite(value):
      raise _Wrong(f'{_at(spec, row)}: {value} is not finite')
    found.append(None if value is None else float(value))
  return found


def _begin() -> None:
  """Hides the accelerator from a worker: it is the trainer's."""
  os.environ.update(CPU)


# --- the trainer's side


class Functions:
  """The functions of reward.file, each where it runs."""

  def __init__(self, text: str, seconds: float, process: str):
    self.specs, self.seconds, self.process = specs(text), seconds, process
    self.pools: dict[str, pebble.ProcessPool] = {}

  @classmethod
  def of(cls, functions: Mapping[str, Any], seconds: float) -> 'Functions':
    """Returns functions that the caller has in memory; they run in the trainer."""
    made = cls('', seconds, 'trainer')
    made.specs = {name: name for name in functions}
    _made.update(functions)
    return made

  def _start(self, spec: str, seconds: float, job: Any, *args: Any) -> Any:
    """Begins job(spec, *args); returns a future."""
    if self.process == 'worker':
      pool = self.pools.get(spec)
      if pool is None or not pool.active:
        pool = self.pools[spec] = workers.pool(1, _begin)
        atexit.register(pool.stop)
      return pool.schedule(job, (spec, *args), timeout=seconds)
    future: concurrent.futures.Future = concurrent.futures.Future()

    def run():
      try:
        future.set_result(job(spec, *args))
      except BaseException as error:
        future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future

  def _result(self, spec: str, seconds: float, future: Any) -> Any:
    limit = None if self.process == 'worker' else seconds  # pebble keeps a worker's
    try:
      return future.result(limit)
    except TimeoutError:
      field = 'reward.seconds' if seconds == self.seconds else 'the limit of loading'
      raise ValueError(
        f'{_at(spec)} has not ended after {seconds:g} seconds ({field})'
      ) from None
    except (pebble.ProcessExpired, concurrent.futures.CancelledError) as error:
      raise ValueError(f'{_at(spec)}: its process has ended ({error})') from error

  def ready(self) -> None:
    """Imports the files where they run; ValueError if one fails."""
    begun = {s: self._start(s, LOADING, ready) for s in self.specs.values()}
    for spec, future in begun.items():
      self._result(spec, LOADING, future)

  def __call__(
    self,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence],
    ids: Sequence | None = None,
  ) -> list[dict[str, float | None]]:
    """Returns {function: reward, or None} of each completion; they run side by side."""
    self.ready()  # again where a worker was lost
    given = (list(prompts), list(completions), dict(columns), ids)
    begun = {
      name: self._start(spec, self.seconds, call, *given)
      for name, spec in self.specs.items()
    }
    said = {
      name: self._result(self.specs[name], self.seconds, future)
      for name, future in begun.items()
    }
    return [{name: x[row] for name, x in said.items()} for row in range(len(given[1]))]


def columns_of(examples: Sequence[Mapping[str, Any]]) -> dict[str, list]:
  """Returns the problems' fields as lists; None where a problem lacks one."""
  names = dict.fromkeys(name for example in examples for name in example)
  return {
    name: [example.get(name) for example in examples]
    for name in names
    if name not in OWN
  }
