"""A run that is asked to stop, a run that hangs, and two runs in one workdir.

Exit codes: PREEMPTED (75) after SIGTERM: all is saved, the same command resumes. STUCK
(76): no progress for too long; a file in the workdir names the place. COLLAPSED (77):
a rule of health.py is broken; all is saved, health.jsonl names the rule.
"""

import contextlib
import errno
import faulthandler
import fcntl
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from absl import logging
from jax.experimental import multihost_utils

from dmpo_jax import mesh

PREEMPTED, STUCK, COLLAPSED = 75, 76, 77
STDERR: Any = sys.__stderr__  # the process's own, whatever stands for sys.stderr
_asked = itertools.count()  # JAX wants a count that never falls, over all phases


def join(
  coordinator: str = '',
  processes: int = 0,
  process: int = 0,
  heartbeat: int = 100,
  patience: int = 600,
) -> None:
  """Makes this process one of several. Call it before jax looks for devices.

  coordinator: host:port of process 0; '' lets JAX find the cluster. heartbeat: seconds
  of silence after which a process counts as dead and the others end. patience: seconds
  to wait for all of them; then the process exits with a sentence. Raises ValueError if
  there is no cluster, or if the port is taken.
  """
  where = f'--coordinator={coordinator}' if coordinator else '--multihost=auto'
  if coordinator and process == 0:
    with socket.socket() as s:
      s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      try:
        s.bind(('', int(coordinator.rpartition(':')[2])))
      except OSError as error:  # JAX' coordinator would crash
        raise ValueError(f'{where}: no port for process 0: {error}') from None
  explicit: dict[str, Any] = dict(
    coordinator_address=coordinator,
    num_processes=processes,
    process_id=process,
    cluster_detection_method='deactivate',
  )
  # JAX's own timeout aborts the process with a C++ stack.
  alarm = threading.Timer(patience, _give_up, (where, patience))
  alarm.daemon = True
  alarm.start()
  try:
    jax.distributed.initialize(
      **explicit if coordinator else {},
      heartbeat_timeout_seconds=heartbeat,
      shutdown_timeout_seconds=heartbeat,
      initialization_timeout=patience + 60,
    )
  except (ValueError, RuntimeError) as error:
    raise ValueError(
      f"{where}: {error} (auto is for Slurm's srun, TPU pods and Open MPI; else give "
      '--coordinator, --processes and --process)'
    ) from None
  finally:
    alarm.cancel()


def _give_up(where: str, patience: int) -> NoReturn:
  STDERR.write(
    f'error: {where}: the processes have not met within {patience} seconds: '
    'is each of them running, and is that port of process 0 open to them?\n'
  )
  STDERR.flush()
  os._exit(1)  # connecting cannot be interrupted


@contextlib.contextmanager
def alone(workdir: str) -> Iterator[None]:
  """Holds a lock on workdir/lock; raises ValueError if another process has it.

  The kernel releases the lock when the process exits, however it exits. A file system
  without locks gives no protection.
  """
  with contextlib.ExitStack() as stack:
    taken = False
    if jax.process_index() == 0:
      file = stack.enter_context(open(os.path.join(workdir, 'lock'), 'w'))
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError as error:
        taken = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    if mesh.agree(taken):
      raise ValueError(
        f'--workdir={workdir}: another process is training there: wait for its end, '
        'or name another workdir'
      )
    yield


class Preemption:
  """Tells after each update whether SIGTERM came: `with Preemption() as asked`.

  In one process SIGTERM sets a flag, which asked() returns; with at_once it ends the
  process as `leave` does. Under jax.distributed JAX has its own handler, by which all
  processes stop at the same update; a handler from here would replace it.
  """

  def __init__(self, at_once: bool = False):
    self._flag, self._at_once, self._old = False, at_once, None

  def __enter__(self) -> 'Preemption':
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and not jax.distributed.is_initialized():
      self._old = signal.signal(signal.SIGTERM, self._note)
    return self

  def _note(self, *_: Any) -> None:
    self._flag = True
    if self._at_once:
      leave()

  def __call__(self) -> bool:
    if jax.distributed.is_initialized():
      return multihost_utils.reached_preemption_sync_point(next(_asked))
    return self._flag

  def check(self) -> None:
    """Leaves if asked to, where there is nothing to save."""
    if self():
      leave()

  def __exit__(self, kind: Any, *_: Any) -> None:
    if self._old is not None:
      signal.signal(signal.SIGTERM, self._old)
    if self._flag and kind is None:  # SIGTERM came after the last update
      leave()


def leave() -> NoReturn:
  """Raises SystemExit with PREEMPTED, so that every `with` saves and closes."""
  logging.warning('SIGTERM: the same command resumes from the last checkpoint')
  sys.exit(PREEMPTED)


def collapsed(sentence: str) -> NoReturn:
  """Writes a sentence to stderr; raises SystemExit with COLLAPSED."""
  print(f'error: {sentence}', file=sys.stderr)
  sys.exit(COLLAPSED)


class Watchdog:
  """Ends the process if `beat` is not called for `seconds`; 0 = never.

  It writes the phase, the update and the stacks of all threads to stderr and to the
  file `path`, which may be set later. The exit code is STUCK. faulthandler alone has
  neither that code nor the phase; it is the second guard, for a C call that does not
  let any Python thread run: after twice the time it dumps to stderr, with code 1.
  """

  def __init__(self, seconds: float, path: str = os.devnull):
    self.path, self._limit, self._over = path, seconds, threading.Event()
    self.beat('start', 0)

  def beat(self, phase: str, step: int) -> None:
    """Notes that the run makes progress, in this phase at this update."""
    self._last = time.monotonic(), phase, step

  def __enter__(self) -> 'Watchdog':
    if self._limit:
      self._thread = threading.Thread(target=self._watch, daemon=True)
      self._thread.start()
    return self

  def __exit__(self, *_: Any) -> None:
    if self._limit:
      self._over.set()
      self._thread.join()
      faulthandler.cancel_dump_traceback_later()

  def _watch(self) -> None:
    while not self._over.is_set():
      faulthandler.dump_traceback_later(2 * self._limit, exit=True, file=STDERR)
      self._over.wait(min(10, self._limit / 10))
      last, phase, step = self._last
      if not self._over.is_set() and time.monotonic() - last > self._limit:
        self._end(phase, step)

  def _end(self, phase: str, step: int) -> NoReturn:
    text = (
      f'error: no progress for {self._limit:g} seconds in {phase!r} at update {step}; '
      'the same command resumes from the last checkpoint. The stacks of all threads:\n'
    )
    for path in (STDERR.fileno(), self.path):
      with (
        contextlib.suppress(OSError),
        open(path, 'a', closefd=path == self.path) as f,
      ):
        f.write(text)
        f.flush()
        faulthandler.dump_traceback(file=f, all_threads=True)
    os._exit(STUCK)  # sys.exit would wait for what hangs
