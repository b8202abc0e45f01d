"""A run that is asked to stop, and a run that hangs: exit codes of their own.

PREEMPTED (75): SIGTERM; all is saved, the same command goes on. STUCK (76): no
progress for too long; a file in the workdir says where. COLLAPSED (77): a rule
of `health` is broken; all is saved, health.jsonl says which.
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

import jax
from absl import logging
from jax.experimental import multihost_utils

from dmpo_jax import mesh

PREEMPTED, STUCK, COLLAPSED = 75, 76, 77
_asked = itertools.count()  # over SFT and RL, as JAX wants: never back


def join(coordinator='', processes=0, process=0, heartbeat=100, patience=600):
  """Makes this process one of several; before jax looks for devices.

  coordinator: host:port of process 0; '' lets JAX find the cluster. patience:
  seconds to wait for all of them; heartbeat: seconds of silence after which
  one counts as dead and the others end. ValueError if there is no cluster, or
  the port is taken. If they do not come, the process ends with a sentence.
  """
  where = f'--coordinator={coordinator}' if coordinator else '--multihost=auto'
  if coordinator and process == 0:
    with socket.socket() as s:
      s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      try:
        s.bind(('', int(coordinator.rpartition(':')[2])))
      except OSError as error:  # the coordinator would crash
        raise ValueError(f'{where}: no port for process 0: {error}') from None
  explicit = dict(
    coordinator_address=coordinator,
    num_processes=processes,
    process_id=process,
    cluster_detection_method='deactivate',
  )
  # JAX's own timeout aborts the process with a stack of C++.
  alarm = threading.Timer(patience, _alone, (where, patience))
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
      f"{where}: {error} (auto is for Slurm's srun, TPU pods "
      'and Open MPI; else --coordinator, --processes, '
      '--process)'
    ) from None
  finally:
    alarm.cancel()


def _alone(where, patience):
  sys.__stderr__.write(
    f'error: {where}: the processes have not met within {patience} seconds: '
    'is each of them running, and is that port of process 0 open to them?\n'
  )
  sys.__stderr__.flush()
  os._exit(1)  # connecting cannot be interrupted


@contextlib.contextmanager
def alone(workdir):
  """`with alone(workdir)`: ValueError if another run is under way there.

  By a lock on workdir/lock, which goes when its process does, however that
  ends; a file system without locks lets everybody in.
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
        f'--workdir={workdir}: another process is training '
        'there: wait for its end, or name another workdir'
      )
    yield


class Preemption:
  """`with ... as asked`: after each update, asked() is whether to stop there.

  In one process SIGTERM sets a flag; at_once: it ends the process as `leave`
  does. Under jax.distributed JAX has a handler of its own, by which all
  processes stop at the same update; one from here would replace it.
  """

  def __init__(self, at_once=False):
    self._flag, self._at_once, self._old = False, at_once, None

  def __enter__(self):
    ours = threading.current_thread() is threading.main_thread()
    if ours and not jax.distributed.is_initialized():
      self._old = signal.signal(signal.SIGTERM, self._note)
    return self

  def _note(self, *_):
    self._flag = True
    if self._at_once:
      leave()

  def __call__(self):
    if jax.distributed.is_initialized():
      return multihost_utils.reached_preemption_sync_point(next(_asked))
    return self._flag

  def check(self):
    """Leaves if asked to: for where there is nothing to save."""
    if self():
      leave()

  def __exit__(self, kind, *_):
    if self._old is not None:
      signal.signal(signal.SIGTERM, self._old)
    if self._flag and kind is None:  # it came after the last update
      leave()


def leave():
  """SystemExit with PREEMPTED: what `with` has open is saved and closed."""
  logging.warning('SIGTERM: the same command goes on from the last checkpoint')
  sys.exit(PREEMPTED)


def collapsed(sentence):
  """SystemExit with COLLAPSED; the sentence goes to stderr."""
  print(f'error: {sentence}', file=sys.stderr)
  sys.exit(COLLAPSED)


class Watchdog:
  """Ends the process when `beat` was not called for `seconds`; 0 = never.

  The phase, the step and the stacks of all threads go to stderr and to the
  file `path` (which may be set later); the exit code is STUCK. Where not even
  this thread can run, faulthandler dumps the stacks to stderr after twice the
  time, and the code is 1.
  """

  def __init__(self, seconds, path=os.devnull):
    self.path, self._limit, self._over = path, seconds, threading.Event()
    self.beat('start', 0)

  def beat(self, phase, step):
    """Notes that the run lives, and in which phase and at which update."""
    self._last = time.monotonic(), phase, step

  def __enter__(self):
    if self._limit:
      self._thread = threading.Thread(target=self._watch, daemon=True)
      self._thread.start()
    return self

  def __exit__(self, *_):
    if self._limit:
      self._over.set()
      self._thread.join()
      faulthandler.cancel_dump_traceback_later()

  def _watch(self):
    while not self._over.is_set():
      # Armed anew each time: it goes off when this thread is held up, too.
      faulthandler.dump_traceback_later(2 * self._limit, exit=True, file=sys.__stderr__)
      self._over.wait(min(10, self._limit / 10))
      last, phase, step = self._last
      if not self._over.is_set() and time.monotonic() - last > self._limit:
        self._bark(phase, step)

  def _bark(self, phase, step):
    text = (
      f'error: no progress for {self._limit:g} seconds in {phase!r} at '
      f'update {step}; the same command goes on from the last '
      'checkpoint. The stacks of all threads:\n'
    )
    for file in (
      lambda: contextlib.nullcontext(sys.__stderr__),
      lambda: open(self.path, 'a'),
    ):
      with contextlib.suppress(OSError), file() as f:
        f.write(text)
        f.flush()
        faulthandler.dump_traceback(file=f, all_threads=True)
    os._exit(STUCK)  # sys.exit would wait for what hangs
