"""Worker processes that can be killed at a deadline."""

import sys
import types
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess

import pebble

# Loaded before the workers fork, so that a killed worker is replaced quickly.
PRELOAD = ['dmpo_jax.tasks.symbolic', 'math_verify']


class _Process(ForkServerProcess):
  """A worker that does not run the caller's script again.

  multiprocessing would import the main module: with all of jax, or without end if a
  script has no `if __name__ == '__main__'`. The workers do not need it.
  """

  @staticmethod
  def _Popen(process_obj):
    main = sys.modules['__main__']
    sys.modules['__main__'] = types.ModuleType('__main__')
    try:
      return ForkServerProcess._Popen(process_obj)
    finally:
      sys.modules['__main__'] = main


class _Context(ForkServerContext):
  Process = _Process


def pool(count: int, begin: Callable, arguments: tuple = ()) -> pebble.ProcessPool:
  """Returns `count` processes; each calls begin(*arguments) before its first job."""
  server = _Context()
  server.set_forkserver_preload(PRELOAD)
  return pebble.ProcessPool(
    count, initializer=begin, initargs=arguments, context=server
  )
