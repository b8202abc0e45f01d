"""A run that is asked to stop stops; one that hangs ends and says where.

The tests start processes of their own, for they are about how these end.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from marks import mostly_slow

from dmpo_jax import guard
from dmpo_jax.tools import provenance

ROOT = pathlib.Path(__file__).parents[1]


def python(code, *args, **variables):
  """Runs code in a process of its own."""
  return subprocess.run(
    [sys.executable, '-c', code, *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, 'PYTHONPATH': str(ROOT), **variables},
  )


# --- SIGTERM


def test_sigterm_ends_at_once_outside_of_the_loop():
  """Files are closed: it is an exception."""
  done = python("""
import os, signal, time
from dmpo_jax import guard
with guard.Preemption(at_once=True):
  try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
  finally:
    print('closed')
""")
  assert (done.returncode, done.stdout) == (guard.PREEMPTED, 'closed\n')
  assert 'the same command resumes' in done.stderr


def test_a_swallowed_exit_ends_the_next_phase_before_it_begins():
  """Python ignores exceptions in callbacks from C and in __del__."""
  done = python("""
import os, signal, time
from dmpo_jax import guard
class Last:
  def __del__(self):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
with guard.Preemption(at_once=True):
  Last()
  print('ignored', flush=True)
  with guard.Preemption():
    print('begun', flush=True)
""")
  assert (done.stdout, done.returncode) == ('ignored\n', guard.PREEMPTED)


@pytest.mark.parametrize('value', ['maybe', '2'])
def test_a_variable_that_jax_cannot_read_is_one_sentence(value):
  done = subprocess.run(
    [sys.executable, 'main.py', '-h'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env={**os.environ, 'JAX_ENABLE_X64': value},
  )
  assert done.returncode == 1
  assert done.stderr.startswith('error: ')
  assert 'JAX_ENABLE_X64' in done.stderr
  assert 'Traceback' not in done.stderr


def test_jax_handles_sigterm_of_several_processes():
  """Its own handler stays; ours would replace it."""
  done = python(
    """
import os, signal, socket, time
import jax
with socket.socket() as s:
  s.bind(('localhost', 0))
  port = s.getsockname()[1]
jax.distributed.initialize(f'localhost:{port}', 1, 0)
from dmpo_jax import guard
before = signal.getsignal(signal.SIGTERM)
with guard.Preemption(at_once=True):
  with guard.Preemption() as asked:
    assert signal.getsignal(signal.SIGTERM) is before
    answers = [asked()]
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(100):
      time.sleep(0.1)
      answers.append(asked())
      if answers[-1]:
        break
print(answers[0], answers[-1])
""",
    XLA_FLAGS='',
  )
  assert done.stdout == 'False True\n', done.stderr


ENDLESS = """
import os, signal, sys, threading, time
import jax
from dmpo_jax import guard
number, times, at_once = (int(x) for x in sys.argv[1:])

def send():
  for _ in range(times):
    time.sleep(1)
    os.kill(os.getpid(), number)

threading.Thread(target=send, daemon=True).start()
with guard.Preemption(at_once=bool(at_once), patience=1):
  half = jax.numpy.full(9, 0.5)
  loop = lambda x: jax.lax.while_loop(lambda x: x[0] < 1, jax.numpy.sin, x)
  jax.jit(loop)(half).block_until_ready()
"""


@pytest.mark.parametrize(
  'number, times, at_once, code',
  [
    (signal.SIGTERM, 1, 1, guard.PREEMPTED),
    (signal.SIGINT, 1, 1, guard.INTERRUPTED),
    (signal.SIGINT, 2, 0, guard.INTERRUPTED),  # the second Ctrl-C
  ],
)
def test_signals_end_an_endless_computation(number, times, at_once, code):
  """Python's own handlers would wait until the device is done."""
  done = python(ENDLESS, str(int(number)), str(times), str(at_once), XLA_FLAGS='')
  assert done.returncode == code, done.stderr


@pytest.mark.smoke
def test_sigterm_sets_a_flag_in_one_process(monkeypatch):
  """The handler of before is put back."""
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(SystemExit) as info, guard.Preemption() as asked:
    assert not asked()
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked()
  assert info.value.code == 75
  assert signal.getsignal(signal.SIGTERM) is before
  with guard.Preemption() as asked:  # the next one begins anew
    assert not asked()


# --- the watchdog


SLEEPING = """
import os, sys, time
import numpy as np
from dmpo_jax import checkpoint, curriculum, data, guard, metrics, rollout, types
from dmpo_jax.tasks import TASKS

def sleeps(*_):
  time.sleep(60)

where = sys.argv[2]
tokenizer = data.char_tokenizer()
task = TASKS['sudoku']._replace(reward=sleeps, threads=where == 'pool')
tokens, mask = np.full((4, 8), 5, np.int32), np.ones((4, 5), bool)
host = rollout.Fetched(tokens, np.zeros((4, 5), np.int32), np.int32(5), mask,
                       np.ones((4, 5)), np.arange(4), None)
chosen = curriculum.Chosen(np.zeros(2, np.int32))
drawn = rollout.Drawn(chosen, None, host, np.arange(4))
started = rollout.Started(0, 0, drawn, types.Scores())
problems = data.Problems([{}], tokens, mask)
collector = rollout.Collector(
    None, task, tokenizer, problems, {}, None, prompts=1, group=2, seed=0, bucket=0,
    protocol='strict', weights={}, stops=(1,), samples=1)
with guard.Watchdog(1.0, sys.argv[1]) as dog:
  clock = metrics.Clock(dog.beat)
  for clock.step in range(8):  # longer than the limit, but it makes progress
    with clock('update'):
      time.sleep(0.3)
  if where == 'data':
    data.permutation = sleeps
    collector.start({}, (), 0, clock=clock)
  elif where == 'checkpoint':  # a file system that takes no more
    os.rename = sleeps
    manager = checkpoint.Manager(sys.argv[1] + '.rl')
    state = types.TrainState(np.zeros(1), np.zeros(1), np.zeros(1))
    for step in (7, 8):  # the second waits for the first
      with clock('checkpoint'):
        checkpoint.save(manager, step, {'state': state}, {})
  collector.finish(started, clock)
"""
HANGS = {
  'pool': ('reward', 'grader.py'),
  'here': ('reward', 'grader.py'),
  'data': ('data', 'in indices_at'),
  'checkpoint': ('checkpoint', 'checkpoint.py'),
}


@pytest.mark.parametrize('where', mostly_slow(HANGS, ('data',)))
def test_watchdog_names_what_hangs(where, tmp_path):
  """A reward (in a thread or not), the reader, a save in the background: stderr and the
  file have phase, update and line; the exit code is 76."""
  done = python(SLEEPING, str(tmp_path / 'stuck.txt'), where)
  assert done.returncode == guard.STUCK == 76, done.stderr
  phase, line = HANGS[where]
  for text in (done.stderr, (tmp_path / 'stuck.txt').read_text()):
    assert f"no progress for 1 seconds in '{phase}' at update 7" in text
    assert 'in sleeps' in text and line in text
    assert text.count('Thread 0x') + text.count('Current thread') >= 2


def test_c_call_that_holds_the_interpreter_ends(tmp_path):
  """No Python thread can run: faulthandler ends the process."""
  done = python("""
import ctypes
from dmpo_jax import guard
with guard.Watchdog(0.5):
  ctypes.PyDLL(None).sleep(60)
""")
  assert done.returncode == 1 and 'Timeout' in done.stderr
  assert 'File "<string>", line 5' in done.stderr


def test_watchdog_spares_a_run_that_makes_progress(tmp_path):
  """So it does a run without a limit, and one that has ended."""
  done = python(
    """
import sys, time
from dmpo_jax import guard
with guard.Watchdog(0.5, sys.argv[1]) as dog:
  for step in range(10):
    time.sleep(0.1)
    dog.beat('update', step)
time.sleep(1.5)
with guard.Watchdog(0, sys.argv[1]):
  time.sleep(0.3)
""",
    str(tmp_path / 'stuck.txt'),
  )
  assert done.returncode == 0, done.stderr
  assert not list(tmp_path.iterdir())


# --- provenance


@pytest.fixture
def repository(tmp_path, monkeypatch):
  """A project of one file, committed, in which provenance thinks it lives."""
  root = tmp_path / 'project'
  (root / 'package' / 'tools').mkdir(parents=True)
  (root / 'package' / 'tools' / 'provenance.py').write_text('x = 1\n')
  monkeypatch.setattr(
    provenance, '__file__', str(root / 'package' / 'tools' / 'provenance.py')
  )
  for name in ('GIT_DIR', 'GIT_WORK_TREE', 'GIT_INDEX_FILE'):
    monkeypatch.delenv(name, raising=False)
  return root


def git(root, *args):
  subprocess.run(
    ('git', '-C', root, '-c', 'user.name=a', '-c', 'user.email=b', *args),
    check=True,
    capture_output=True,
  )


def test_code_is_known_to_the_line(repository):
  """Revision, what was changed since, and what git does not have."""
  assert provenance.code() == {}  # no repository
  git(repository, 'init', '-q')
  git(repository, 'add', '.')
  git(repository, 'commit', '-qm', 'one')
  clean = provenance.code()
  assert len(clean['revision']) == 40 and clean['diff'] == ''
  (repository / 'package' / 'tools' / 'provenance.py').write_text('x = 2\n')
  (repository / 'new.py').write_text('')
  dirty = provenance.code()
  assert '-x = 1\n+x = 2' in dirty['diff']
  assert dirty['untracked'] == ['new.py']
  assert dirty['revision'] == clean['revision']


def test_repository_around_the_project_is_not_its_own(repository):
  git(repository.parent, 'init', '-q')
  assert provenance.code() == {}


def test_no_git(repository, monkeypatch):
  monkeypatch.setenv('PATH', '')
  assert provenance.code() == {}


def test_every_start_is_recorded(tmp_path, monkeypatch):
  """A list that grows; a damaged one is kept beside the new one."""
  monkeypatch.setenv('LIBTPU_INIT_ARGS', '--xla_tpu_x=1')
  one = provenance.record({'optim.lr': 0.5}, {'seed': 3}, {'model.checkpoint a/b': 'x'})
  assert one['revisions'] == {'model.checkpoint a/b': 'x'}
  assert one['flags']['LIBTPU_INIT_ARGS'] == '--xla_tpu_x=1'
  assert one['overrides'] == {'optim.lr': 0.5} and one['seeds'] == {'seed': 3}
  assert one['device'] and one['devices'] == 8 and one['processes'] == 1
  assert {'python', 'jax', 'orbax-checkpoint'} <= one['versions'].keys()
  for _ in range(2):
    provenance.append(tmp_path, one)
  path = tmp_path / provenance.FILE
  assert json.loads(path.read_text()) == [one, one]
  path.write_text(path.read_text()[:50])
  provenance.append(tmp_path, one)
  assert json.loads(path.read_text()) == [one]
  assert len((tmp_path / 'provenance.json.damaged').read_text()) == 50


def test_changed_flags_are_warned_of(tmp_path, monkeypatch):
  """Those of JAX and XLA that may change a result; not where programs are kept."""
  warnings = []
  monkeypatch.setattr(
    provenance.logging, 'warning', lambda text, *args: warnings.append(text % args)
  )
  for value in ('high', 'high', 'low'):
    monkeypatch.setenv('JAX_DEFAULT_MATMUL_PRECISION', value)
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', value)
    provenance.append(tmp_path, provenance.record({}, {}))
    assert len(warnings) == (value == 'low')
  assert 'JAX_DEFAULT_MATMUL_PRECISION was high' in warnings[0]
