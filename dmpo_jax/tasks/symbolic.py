"""Whether two LaTeX answers are equal, asked of math-verify in a process apart.

A model can write what no computer algebra finishes (99**98**97), or what fills
the memory, and no limit set within Python stops that. So every question goes
to a pool of worker processes and is killed at its deadline while the others go
on. A question without an answer counts as unequal and is kept for `drain`.
"""

import atexit
import functools
import logging
import multiprocessing
import os
import re
import resource
import sys
import threading
import types

import pebble

MEMORY = 4 << 30  # bytes of address space of a worker
MAX_LENGTH = 300  # characters; longer answers are compared as strings alone
# No operation stands in these, nor between what they part.
SPACING = re.compile(
  r'\s|\\[!,:; ]|\\(?:left|right|quad|qquad)(?![a-zA-Z])'
  r'|\^\\circ|\^\{\\circ\}'
)
RELATION = re.compile(
  r'\\(?:leq?|geq?|neq?|in|cup|cap|to|text|mathrm)'
  r'(?![a-zA-Z])'
)
TIMES = re.compile(r'\\(?:cdot|times|ast)(?![a-zA-Z])')
# A number to a whole power is one; 2^{1/3} and e^{-1} are ways to write it.
OPERATION = re.compile(
  r'(?<=[0-9)\]}])\^\{?-?[0-9]+(?:\}|(?![0-9./]))|(?<![a-zA-Z])i\^|!'
  r'|(?<=[0-9a-zA-Z)\]}])(?:\+|-|\\pm|\\mp)'
  r'|(?<=[0-9)\]}])\*+(?:[(\[{]*[-+]?[.0-9]'
  r'|\\[dt]?frac(?:\{[0-9]+\}\{[0-9]+\}|[0-9][0-9]))'
  r'|\\(?:div|binom|sum|prod|int|lim|lfloor|lceil|gcd|bmod)(?![a-zA-Z])'
)
DECIMAL = re.compile(r'(?<![0-9])([0-9]*)\.([0-9]+)')
_state = {'pool': None, 'workers': 0, 'deadline': 3.0, 'failed': {}}
_lock = threading.Lock()


def configure(workers=0, deadline=3.0):
  """Sets the number of processes (0: one a core) and the seconds a question
  may take, from the next question on."""
  if (workers, deadline) != (_state['workers'], _state['deadline']):
    close()
    _state.update(workers=workers, deadline=deadline)
    _ask.cache_clear()  # another deadline, another verdict


def equal(left, right):
  """math-verify's verdict; False if it gives none in time. Thread-safe.

  What got no verdict is asked again only after a `drain`: a batch waits for it
  once, though its reward and its grade want it.
  """
  if max(len(left), len(right)) > MAX_LENGTH:
    return False
  if (left, right) in _state['failed']:
    return False
  try:
    return _ask(left, right)
  except _Unanswered as error:
    with _lock:
      _state['failed'][left, right] = str(error)
    return False


class _Unanswered(Exception):
  """No verdict. Raised, as what `_ask` returns is kept for ever: next time the
  machine may be less busy."""


@functools.lru_cache(maxsize=1 << 16)
def _ask(left, right):
  for again in (True, False):
    try:
      return (
        _pool().schedule(verify, (left, right), timeout=_state['deadline']).result()
      )
    except TimeoutError:
      raise _Unanswered('killed at its deadline') from None
    except Exception as error:  # a dead worker, a lost pool, math-verify's own
      if not again:
        raise _Unanswered(f'{type(error).__name__}: {error}') from error
      if not _pool().active:
        close()


def drain():
  """The questions that got no answer since the last call, as dicts."""
  with _lock:
    failed, _state['failed'] = _state['failed'], {}
  return [
    dict(answer=left, truth=right, reason=reason)
    for (left, right), reason in failed.items()
  ]


def _pool():
  with _lock:
    if _state['pool'] is None or not _state['pool'].active:
      context = _Context()
      # Loaded before the workers fork, so that a killed one is soon replaced.
      context.set_forkserver_preload(['dmpo_jax.tasks.symbolic', 'math_verify'])
      _state['pool'] = pebble.ProcessPool(
        _state['workers'] or os.cpu_count(), initializer=_confine, context=context
      )
    return _state['pool']


class _Process(multiprocessing.context.ForkServerProcess):
  """A worker that does not run the caller's script again.

  multiprocessing would import the main module, with all of jax, or without end
  where a script has no `if __name__ == '__main__'`; the workers need none of
  it.
  """

  @staticmethod
  def _Popen(process):
    main = sys.modules['__main__']
    sys.modules['__main__'] = types.ModuleType('__main__')
    try:
      return multiprocessing.context.ForkServerProcess._Popen(process)
    finally:
      sys.modules['__main__'] = main


class _Context(multiprocessing.context.ForkServerContext):
  Process = _Process


def close():
  """Ends the workers; the next question starts new ones."""
  with _lock:
    pool, _state['pool'] = _state['pool'], None
  if pool is not None:
    pool.stop()
    pool.join()


atexit.register(close)

# ---- in the worker


def _confine():
  """A worker is silent, and gets a MemoryError where it wants all memory."""
  logging.disable(logging.CRITICAL)
  _, most = resource.getrlimit(resource.RLIMIT_AS)
  limit = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
  resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def verify(left, right):
  """Whether `left` is what `right`, the truth, is; both without \\boxed.

  An operation that is left to do is no answer, where the truth has none:
  math-verify would pay 1+1 for 2. And decimals are exact, where the truth has
  none: it would look at six of them.
  """
  import math_verify  # half a second, and sympy: only here

  if not DECIMAL.search(right):
    left = DECIMAL.sub(
      lambda found: (
        rf'\frac{{{found[1]}{found[2]}}}'
        rf'{{1{"0" * len(found[2])}}}'
      ),
      left,
    )
  parsed = [
    math_verify.parse(
      f'${text}$',
      parsing_timeout=None,
      extraction_config=[math_verify.LatexExtractionConfig()],
    )
    for text in (right, left)
  ]
  if not all(parsed) or _operates(left) and not _operates(right):
    return False
  return bool(math_verify.verify(*parsed, timeout_seconds=None))


def _operates(text):
  """Whether there is an operation: '1+1', '2\\cdot3', '5!', 'x-1', not '-1'."""
  plain = RELATION.sub(',', TIMES.sub('*', SPACING.sub('', text)))
  return bool(OPERATION.search(plain))
