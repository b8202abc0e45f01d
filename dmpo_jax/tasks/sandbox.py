"""Runs programs that a model has written, each in a process that can do no harm.

`run` gives the verdicts of a program's tests. sandboxed.py is what runs in the process,
and says what a verdict is worth. The process has limits (CPU, memory, files,
processes), no standard streams, a clean environment, and is killed as a whole at its
deadline. How it is kept from the rest of the machine has three levels:

bwrap: bubblewrap's own namespaces: no network, no other process in sight, a read-only
  file system of the interpreter and the system's libraries alone, a private /tmp.
namespaces: the same by unshare(2), where the kernel allows it (Linux 5.12 or newer).
rlimits: limits alone. A program can read what this user can read, use the network, and
  kill this user's processes. A root process becomes another user first.

`auto` takes the first of bwrap and namespaces that works; rlimits must be asked for. No
level holds against a fault of the kernel.
"""

import contextlib
import functools
import json
import logging
import os
import pathlib
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

LEVELS = ('auto', 'bwrap', 'namespaces', 'rlimits')
DISK = 32 << 20  # bytes of the private /tmp
FILE = 16 << 20  # bytes of one file
PROCESSES = 16  # processes and threads of a program
PATIENCE = 3  # wall time of a program; in deadlines
SYSTEM = (
  '/usr', '/bin', '/lib', '/lib32', '/lib64', '/nix/store', '/etc/ld.so.cache',
)  # fmt: skip
DEVICES = tuple(f'/dev/{x}' for x in ('null', 'zero', 'full', 'random', 'urandom'))
USERS = 1_500_000_000  # the first of the users that root's programs become
ENVIRONMENT = {
  'PATH': '/usr/bin:/bin', 'HOME': '/tmp', 'LANG': 'C.UTF-8', 'OMP_NUM_THREADS': '1',
  'OPENBLAS_NUM_THREADS': '1', 'PYTHONHASHSEED': '0',  # verdicts can be repeated
}  # fmt: skip
TEXT = pathlib.Path(__file__).with_name('sandboxed.py').read_text(encoding='utf-8')
REMEDY = (
  '. Install bubblewrap (apt install bubblewrap), or allow user namespaces (sysctl '
  'kernel.apparmor_restrict_unprivileged_userns=0, or '
  'kernel.unprivileged_userns_clone=1). In a container that is isolated itself, '
  'reward.sandbox = rlimits does without: programs can then read what this user can '
  'read, and use the network'
)
PROBE = 'import colorsys\ndef after(n):\n  return n + 1\n'


class Suite(NamedTuple):
  """The tests of a problem."""

  tests: tuple[tuple[str, str], ...]  # (code, the function of it to call, or '')
  setup: str = ''  # code of the data set that comes before each
  entry: tuple[str, ...] = ()  # names that are the program's, whatever setup says


class Verdict(NamedTuple):
  """What became of a program; one that does not compile has passed nothing."""

  index: int  # of the first of its versions that compiles; -1: none does
  passed: tuple[bool, ...]  # for each test
  why: tuple[str | None, ...]  # what a test has raised

  def all(self) -> bool:
    """Returns whether there are tests, and all have passed."""
    return bool(self.passed) and all(self.passed)


_state = types.SimpleNamespace(
  sandbox='auto', python='', memory=512, workers=0, deadline=3.0,
  level='', slots=None, failed={}, gates={},
)  # fmt: skip
_lock = threading.Lock()


def configure(
  sandbox: str = 'auto',
  python: str = '',
  memory: int = 512,
  workers: int = 0,
  deadline: float = 3.0,
) -> None:
  """Sets how programs run; see config.Reward. workers: programs at once, 0 = cores."""
  new = dict(
    sandbox=sandbox, python=python, memory=memory, workers=workers, deadline=deadline
  )
  if any(getattr(_state, name) != value for name, value in new.items()):
    vars(_state).update(new, level='', slots=None)
    _ask.cache_clear()  # another deadline may give another verdict


def ready() -> str:
  """Returns the level that programs run at; ValueError if there is none.

  Tries each level once, with a small program.
  """
  with _lock:
    if _state.level:
      return _state.level
    auto, found = _state.sandbox == 'auto', {}
    for level in ('bwrap', 'namespaces') if auto else (_state.sandbox,):
      if not (problem := _problem(level)):
        logging.info('programs run at level %s', level)
        _state.level = level
        return level
      found[level] = problem
  said = '; '.join(f'{level}: {problem}' for level, problem in found.items())
  raise ValueError(
    f'reward.sandbox = {_state.sandbox}: programs that a model has written cannot run '
    f'here ({said}){REMEDY * (_state.sandbox != "rlimits")}'
  )


def _problem(level: str) -> str:
  """Returns why a level does not work here, or ''."""
  if level == 'bwrap' and not shutil.which('bwrap'):
    return 'bwrap is not installed'
  try:
    suite = Suite((('assert after(1) == 2', ''),))
    said, error = _run(level, (PROBE,), suite, False)
  except (OSError, ValueError, subprocess.SubprocessError) as failure:
    return str(failure)
  if said and said['passed'] == [True]:
    return ''
  why = said['why'] if said else error.strip().splitlines()[-1:]
  hint = ''
  if os.getuid() == 0 and level != 'namespaces':
    hint = (
      f'; can another user than root read {_python()[0][0]}? reward.python names '
      'another interpreter, such as /usr/bin/python3'
    )
  return f'{" ".join(map(str, why)) or "no answer"}{hint}'


def run(programs: Sequence[str], suite: Suite, joined: bool = False) -> Verdict:
  """Returns the verdicts of a suite on the first of `programs` that compiles.

  joined: the tests run in the program's own process; see sandboxed.py. Thread-safe;
  equal questions are answered once. A program without a verdict has passed nothing, is
  reported by `drain`, and is tried again only after that.
  """
  ready()
  question = tuple(programs), suite, joined
  none = Verdict(-1, (False,) * len(suite.tests), (None,) * len(suite.tests))
  with _lock:
    gate = _state.gates.setdefault(question, threading.Lock())
  try:
    with gate:
      return none if question in _state.failed else _ask(*question)
  except _Unanswered as error:
    with _lock:
      _state.failed[question] = str(error)
    return none
  finally:
    with _lock:
      _state.gates.pop(question, None)


def drain() -> list[dict]:
  """Returns the programs without a verdict since the last call, as dicts.

  Their keys are 'answer', 'truth' and 'reason', as symbolic.drain has them.
  """
  with _lock:
    failed, _state.failed = _state.failed, {}
  last = lambda question: question[0][-1]
  return [dict(answer=last(x), truth='', reason=why) for x, why in failed.items()]


def report(program: str, reason: str) -> None:
  """Adds a program to what `drain` returns."""
  with _lock:
    _state.failed[(program,), reason] = reason


class _Unanswered(Exception):
  """No verdict. An exception is not cached, and the machine may be less busy later."""


@functools.lru_cache(maxsize=1 << 14)
def _ask(programs: tuple[str, ...], suite: Suite, joined: bool) -> Verdict:
  for last in (False, True):
    try:
      said, error = _run(_state.level, programs, suite, joined)
      break
    except OSError as failure:  # of this machine: no memory, no processes
      if last:
        raise _Unanswered(f'could not be started: {failure}') from None
  if not said:
    raise _Unanswered(error.strip()[-200:] or 'killed at its deadline')
  return Verdict(said['index'], tuple(said['passed']), tuple(said['why']))


# ---- one program


def _run(
  level: str, programs: tuple[str, ...], suite: Suite, joined: bool
) -> tuple[dict | None, str]:
  """Returns (what the judge says, its errors); None where it says nothing."""
  nonce = secrets.token_hex(16)
  head = dict(programs=programs, tests=len(suite.tests), joined=joined)
  body = dict(nonce=nonce, setup=suite.setup, tests=suite.tests, entry=suite.entry)
  with _slot() as slot:
    argv, how = _command(level, slot)
    process: Any = subprocess.Popen(
      argv,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      cwd='/',
      env=ENVIRONMENT,
      start_new_session=True,
      **how,
    )
    try:
      limit = PATIENCE * _state.deadline + 2
      out, error = process.communicate(_framed(head) + _framed(body), limit)
    except subprocess.TimeoutExpired:
      return None, 'killed at its deadline'
    finally:
      with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
      process.communicate()
  try:
    said = json.loads(out)
    if said['nonce'] == nonce:
      return said, ''
  except (ValueError, KeyError, TypeError):
    pass
  return None, error.decode('utf-8', 'replace')


def _framed(item: Any) -> bytes:
  text = json.dumps(item).encode()
  return len(text).to_bytes(8, 'big') + text


@contextlib.contextmanager
def _slot() -> Iterator[int]:
  """Waits for one of the workers; yields its number."""
  with _lock_of_slots:
    if _state.slots is None:
      _state.slots = queue.LifoQueue()
      for number in range(_state.workers or os.cpu_count() or 1):
        _state.slots.put(number)
    slots = _state.slots
  number = slots.get()
  try:
    yield number
  finally:
    slots.put(number)


_lock_of_slots = threading.Lock()


@functools.lru_cache(maxsize=4)
def _interpreter(python: str) -> tuple[list[str], list[str]]:
  """Returns how to start an interpreter, and the directories that it needs.

  python: '' = the one that runs this, without installed packages.
  """
  start = [python] if python else [getattr(sys, '_base_executable', sys.executable)]
  start += ['-s', '-B', '-W', 'ignore'] + ([] if python else ['-S'])
  ask = (
    'import sys; print(sys.prefix, sys.base_prefix, sys.base_exec_prefix, sep="\\n")'
  )
  try:
    found = subprocess.run(
      [*start, '-c', ask], capture_output=True, text=True, timeout=60, check=True
    )
  except (OSError, subprocess.SubprocessError) as error:
    raise ValueError(f'reward.python = {start[0]!r} does not run: {error}') from None
  return start, sorted(set(found.stdout.split('\n')) - {''})


def _python() -> tuple[list[str], list[str]]:
  return _interpreter(_state.python)


def _command(level: str, slot: int) -> tuple[list[str], dict[str, Any]]:
  """Returns the command line of a judge, and how Popen starts it."""
  start, prefixes = _python()
  paths = [*SYSTEM, *(x for x in prefixes if not x.startswith('/usr')), *DEVICES]
  root = os.getuid() == 0
  user = USERS + os.getpid() % (1 << 20) * 256 + slot % 256 if root else 0
  settings = dict(
    level=level,
    wall=PATIENCE * _state.deadline,
    cpu=_state.deadline,
    memory=_state.memory << 20,
    disk=DISK,
    file=0 if level == 'rlimits' else FILE,
    processes=PROCESSES + (_threads() if level == 'rlimits' and not root else 0),
    uid=user,
    paths=paths,
  )
  command = [*start, '-c', TEXT, json.dumps(settings)]
  if level != 'bwrap':
    return command, {}
  how = dict(user=user, group=user, extra_groups=[]) if root else {}
  return [*_bwrap(paths), *command], how


def _threads() -> int:
  """Returns the number of this user's processes and threads, which a limit counts."""
  count = 0
  for task in pathlib.Path('/proc').glob('[0-9]*/task'):
    with contextlib.suppress(OSError):
      count += len(list(task.iterdir())) if task.stat().st_uid == os.getuid() else 0
  return count


@functools.cache
def _blocks_users() -> bool:
  """Returns whether this bwrap can forbid further user namespaces (0.8 or newer)."""
  bwrap = shutil.which('bwrap') or 'bwrap'
  said = subprocess.run([bwrap, '--help'], capture_output=True, text=True)
  return '--disable-userns' in said.stdout + said.stderr


def _bwrap(paths: Sequence[str]) -> list[str]:
  """Returns bubblewrap's part of a command line."""
  argv = [shutil.which('bwrap') or 'bwrap']
  argv += '--unshare-all --unshare-user --die-with-parent --new-session'.split()
  argv += '--cap-drop ALL --uid 65534 --gid 65534 --hostname sandbox'.split()
  argv += ['--disable-userns'] * _blocks_users()
  for path in paths:
    if os.path.islink(path) and path.count('/') == 1:
      argv += ['--symlink', os.readlink(path), path]
    elif os.path.exists(path):
      argv += ['--dev-bind' if path in DEVICES else '--ro-bind', path, path]
  argv += ['--size', str(DISK), '--tmpfs', '/tmp', '--remount-ro', '/']
  lower = 'echo 1000 > /proc/self/oom_score_adj; exec "$0" "$@"'
  return ['/bin/sh', '-c', lower, *argv, '--chdir', '/tmp', '--']
