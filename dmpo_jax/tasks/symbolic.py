"""Compares an answer with the truth, in a process that can be killed.

A model can write a term that no computer algebra finishes (99**98**97), or one that
fills the memory. No limit set within Python stops that. So every comparison goes to a
pool of worker processes and is killed at its deadline, while the others go on. A
comparison without a verdict counts as unequal and is reported by `drain`.
"""

import atexit
import contextlib
import functools
import importlib
import logging
import os
import re
import resource
import threading
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import pebble

from dmpo_jax.tasks import workers

MEMORY = 4 << 30  # bytes of address space of a worker
DIGITS = 500  # that numbers must share which are not rational
MAX_LENGTH = 300  # characters; longer answers are compared as strings only
DECIMAL = re.compile(r'(?<![0-9])([0-9]*)\.([0-9]+)')
UNIT = re.compile(r'(?<=[0-9])i(?![a-zA-Z])')  # math-verify: 3i and 3 i differ
_state = types.SimpleNamespace(
  pool=None, workers=0, deadline=3.0, failed={}, modules=[]
)
_lock = threading.Lock()


def configure(workers: int = 0, deadline: float = 3.0) -> None:
  """Sets the number of processes (0: one per core) and the seconds per comparison."""
  if (workers, deadline) != (_state.workers, _state.deadline):
    close()
    _state.workers, _state.deadline = workers, deadline
    _ask.cache_clear()  # another deadline may give another verdict


def prepare(module: str) -> None:
  """Lets the workers import a module before they are asked; it may take seconds."""
  if module not in _state.modules:
    close()
    _state.modules.append(module)


def equal(left: str, right: str) -> bool:
  """Returns math-verify's verdict; False if it gives none in time. Thread-safe."""
  if max(len(left), len(right)) > MAX_LENGTH:
    return False
  return bool(decide(verify, left, right))


def decide(check: Callable, answer: str, truth: str) -> float:
  """Returns check(answer, truth) of a worker; 0 if it gives none in time.

  check: a function of a module, which a worker can import. Thread-safe. A comparison
  without a verdict is tried again only after a `drain`. So a batch waits for it once,
  although its reward and its grade need it.
  """
  if (answer, truth) in _state.failed:
    return 0.0
  try:
    return _ask(check, answer, truth)
  except _Unanswered as error:
    with _lock:
      _state.failed[answer, truth] = str(error)
    return 0.0


class _Unanswered(Exception):
  """No verdict. An exception is not cached, and the machine may be less busy later."""


@functools.lru_cache(maxsize=1 << 16)
def _ask(check: Callable, answer: str, truth: str) -> float:
  reason = ''
  for _ in range(2):
    try:
      job = _pool().schedule(check, (answer, truth), timeout=_state.deadline)
      return job.result()
    except TimeoutError:
      raise _Unanswered('killed at its deadline') from None
    except Exception as error:  # a dead worker, a lost pool, math-verify's own
      reason = f'{type(error).__name__}: {error}'
      if not _pool().active:
        close()
  raise _Unanswered(reason)


def drain() -> list[dict]:
  """Returns the comparisons without a verdict since the last call, as dicts.

  Their keys are 'answer', 'truth' and 'reason'.
  """
  with _lock:
    failed, _state.failed = _state.failed, {}
  return [dict(answer=a, truth=b, reason=reason) for (a, b), reason in failed.items()]


def _pool() -> pebble.ProcessPool:
  with _lock:
    if _state.pool is None or not _state.pool.active:
      count = _state.workers or os.cpu_count() or 1
      _state.pool = workers.pool(count, _confine, (tuple(_state.modules),))
    return _state.pool


def close() -> None:
  """Ends the workers; the next comparison starts new ones."""
  with _lock:
    pool, _state.pool = _state.pool, None
  if pool is not None:
    pool.stop()
    pool.join()


atexit.register(close)

# ---- in the worker


def _confine(modules: tuple[str, ...]) -> None:
  """Silences a worker and limits its memory, so that it gets a MemoryError."""
  for name in modules:
    with contextlib.suppress(Exception):  # a comparison says what is wrong
      importlib.import_module(name)
  logging.disable(logging.CRITICAL)
  _, most = resource.getrlimit(resource.RLIMIT_AS)
  limit = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
  resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def verify(left: str, right: str) -> bool:
  """Returns whether `left` equals `right`, the truth; both without \\boxed.

  Numbers are exact, unlike math-verify's, which compares six digits of decimals and
  takes what is below 1e-15 for zero.
  """
  import math_verify  # half a second, and sympy: only here
  from math_verify import grader, parser

  no_limit: Any = None  # the pool has one
  form = parser.NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed='none'
  )
  latex = [math_verify.LatexExtractionConfig(normalization_config=form)]
  exact = lambda m: rf'\frac{{{m[1]}{m[2]}}}{{1{"0" * len(m[2])}}}'
  truth, answer = (
    math_verify.parse(f'${UNIT.sub(" i", text)}$', latex, parsing_timeout=no_limit)
    for text in (DECIMAL.sub(exact, side) for side in (right, left))
  )
  if not truth or not answer:
    return False
  with mock.patch.object(grader, 'sympy_numeric_eq', _numbers_equal):
    return bool(math_verify.verify(truth, answer, timeout_seconds=None))


def _numbers_equal(left: Any, right: Any, *_: int) -> bool:
  """Takes the place of math-verify's numeric comparison, which rounds."""
  import sympy

  if isinstance(left, sympy.MatrixBase) or isinstance(right, sympy.MatrixBase):
    left, right = left.doit(), right.doit()
    return left.shape == right.shape and all(
      map(_numbers_equal, left.flat(), right.flat())
    )
  left, right = (
    side.doit() if isinstance(side, sympy.Expr) else side for side in (left, right)
  )
  if left == right or left.is_Rational and right.is_Rational:
    return bool(left == right)
  if left.free_symbols or right.free_symbols:
    return False  # left to math-verify's symbolic comparison
  difference = (left - right).evalf(DIGITS, maxn=2 * DIGITS)
  size = abs(left.evalf(DIGITS)) + abs(right.evalf(DIGITS))
  return bool(abs(difference) < size * sympy.Float(10) ** (20 - DIGITS))
