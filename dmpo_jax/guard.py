"""A run that is asked to stop, a run that hangs, and two runs in one workdir.

Exit codes: PREEMPTED (75) after SIGTERM, INTERRUPTED (130) after Ctrl-C: all is saved,
the same command resumes. STUCK
(76): no progress for too long; a file in the workdir names the place. COLLAPSED (77):
a rule of health.py is broken; all is saved, health.jsonl names the rule.
"""

import contextlib
import errno
import faulthandler
import fcntl
import itertools
import os
import select
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

PREEMPTED, STUCK, COLLAPSED, INTERRUPTED = 75, 76, 77, 130
CODES: dict[int, int] = {signal.SIGTERM: PREEMPTED, signal.SIGINT: INTERRUPTED}
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
  """Makes a workdir and holds its lock; raises ValueError if another process has it.

  The kernel releases the lock when the process exits, however it exits. A file system
  without locks gives no protection.
  """
  with contextlib.ExitStack() as stack:
    taken = False
    if jax.process_index() == 0:
      os.makedirs(workdir, exist_ok=True)
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
  """Tells after each update whether SIGTERM or Ctrl-C came.

  Use it as `with Preemption() as asked`. In one process both set a flag, which asked()
  returns. With at_once, or at a second Ctrl-C, they end the process: as `leave` does,
  or without more words where no Python code of the main thread runs (a device
  computes) for `patience` seconds. Under jax.distributed JAX has its own handler of
  SIGTERM, by which all processes stop at the same update; one from here would replace
  it.
  """

  def __init__(self, at_once: bool = False, patience: float = 20.0):
    self.at_once, self._patience = at_once, patience
    self.came, self._old, self._pipe = 0, {}, ()

  def __enter__(self) -> 'Preemption':
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and not jax.distributed.is_initialized():
      for number in CODES:  # a callback in C may have swallowed an outer one's exit
        outer = getattr(signal.getsignal(number), '__self__', None)
        if came := isinstance(outer, Preemption) and outer.came:
          leave(came)
      self._old = {number: signal.signal(number, self._note) for number in CODES}
      # Python's handlers wait for the main thread, the bytes of this pipe do not.
      read, write = os.pipe()
      os.set_blocking(write, False)
      self._pipe = write, signal.set_wakeup_fd(write, warn_on_full_buffer=False)
      threading.Thread(target=self._watch, args=(read,), daemon=True).start()
    return self

  def _note(self, number: int, _: Any) -> None:
    if not self.came and not self.at_once and number == signal.SIGINT:
      STDERR.write('\nCtrl-C: saving after this update; again: ends at once\n')
    self.came = number
    if self.at_once:
      leave(number)

  def _watch(self, read: int) -> None:
    """Ends the process where the main thread cannot."""
    came, count = 0, 0
    while True:
      wait = self._patience if came and self.at_once else None
      ready, _, _ = select.select([read], [], [], wait)
      byte = os.read(read, 1) if ready else None
      if byte == b'':  # __exit__ has closed the other end
        return os.close(read)
      number = byte[0] if byte else came
      if number in CODES:
        came, count = number, count + (number == signal.SIGINT)
        if byte is None or count > 1:
          os._exit(CODES[number])

  def __call__(self) -> bool:
    if jax.distributed.is_initialized():
      return multihost_utils.reached_preemption_sync_point(next(_asked))
    return bool(self.came)

  def check(self) -> None:
    """Leaves if asked to, where there is nothing to save."""
    if self():
      leave(self.came)

  def __exit__(self, kind: Any, *_: Any) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)
    if self._pipe:
      write, before = self._pipe
      signal.set_wakeup_fd(before)
      os.close(write)
    if self.came and kind is None:  # it came after the last update
      leave(self.came)


def leave(number: int = signal.SIGTERM) -> NoReturn:
  """Raises SystemExit with the signal's code, so that every `with` saves and closes."""
  what = 'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'
  logging.warning('%s: the same command resumes from what is saved', what)
  sys.exit(CODES.get(number, PREEMPTED))


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
