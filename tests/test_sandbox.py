"""Tests the sandbox: verdicts of programs, and programs that try to do harm.

The function f of a hostile program returns 2 only if its attack has worked, so the test
`assert f(1) == 2` passes only then.
"""

import concurrent.futures
import os
import pathlib
import socket
import sys
import time

import pytest

from dmpo_jax.tasks import sandbox

ASK = sandbox.Suite((('assert f(1) == 2', ''),))
GOOD = 'def f(x):\n  return x + 1\n'
# One value that is in the command line of this test's judges alone.
DEADLINE = 0.6 + os.getpid() % 10_000 / 1e6
ISOLATING = ('namespaces', 'bwrap')
SECRET = 'sandbox-secret-9251'

# name -> a program. {..} are facts of this process that an attacker could know.
HOSTILE = {
  'fork_bomb': 'import os\nwhile True: os.fork()',
  'thread_bomb': """
import threading, time
def f(x):
  for _ in range(500):
    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
  return 2""",
  'memory': """
def f(x):
  kept = []
  for _ in range(2000):
    kept.append(bytearray(1 << 20))
  return 2""",
  'memory_in_files': """
import os, mmap
def f(x):
  total = 0
  for n in range(1000):
    with open(f'/tmp/{{n}}', 'wb') as file:
      total += file.write(b'x' * (1 << 20))
  return 2""",
  'huge_file': """
import mmap, os
def f(x):
  fd = os.open('/tmp/x', os.O_RDWR | os.O_CREAT)
  os.ftruncate(fd, 1 << 32)
  mmap.mmap(fd, 1 << 32)[-1] = 1
  return 2""",
  'writes_outside': """
import os
def f(x):
  inside = {folder!r}, {repo!r}
  for folder in ('/', '/usr', '/etc', '/dev', '/home', '/var/tmp', *inside):
    for name in ('intruder', 'inside.txt'):
      try:
        open(os.path.join(folder, name), 'w').write('x')
        return 2
      except OSError: pass
  try:
    os.unlink({secret!r})
    return 2
  except OSError: pass""",
  'reads_files': """
import os, glob
def f(x):
  os.symlink({secret!r}, '/tmp/link')
  paths = [{secret!r}, '/tmp/link', '/tmp/../' + {secret!r}, '/etc/shadow', '/mnt',
    '/proc/self/environ', '/proc/1/environ', '/proc/{pid}/environ', '/proc/1/root/etc',
    '/proc/{pid}/cwd', {repo!r}, os.path.expanduser('~root/.bashrc'), '/dev/mem',
    '/dev/vda', '/dev/sda', '/dev/nvidia0', '/sys/kernel', '/run']
  for path in paths:
    try:
      (os.listdir if os.path.isdir(path) else open)(path)
      return 2
    except OSError: pass""",
  'environment': """
import os
def f(x):
  return 2 if {marker!r} in str(dict(os.environ)) or len(os.environ) > 12 else 0""",
  'sees_processes': """
import os
def f(x):
  try:
    os.kill({pid}, 0)
    return 2
  except OSError: pass
  return 2 if os.getpid() > 500 or os.path.exists('/proc/{pid}') else 0""",
  'kills_all': 'import os\nos.kill(-1, 9)',
  'kills_parents': """
import os, signal
for pid in (os.getppid(), 1, {pid}, {parent}):
  for number in (15, 19, 9):
    try: os.kill(pid, number)
    except OSError: pass
try: os.killpg(os.getpgid(os.getppid()), 9)
except OSError: pass""",
  'connects': """
import socket
def f(x):
  for family, address in ((socket.AF_INET, ('127.0.0.1', {port})),
      (socket.AF_INET, ('8.8.8.8', 53)), (socket.AF_UNIX, {abstract!r})):
    try:
      socket.socket(family).connect(address)
      return 2
    except OSError: pass
  try:
    socket.getaddrinfo('example.com', 80)
    return 2
  except OSError: pass
  socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))
  return 0""",
  'privileges': """
import ctypes, os
c = ctypes.CDLL(None)
def f(x):
  for call in (os.setuid, os.setgid):
    try:
      call(0)
      return 2
    except OSError: pass
  if c.unshare(0x10000000) == 0 or c.unshare(0x20000) == 0: return 2
  if c.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0: return 2
  if c.chroot(b'/tmp') == 0: return 2
  if c.ptrace(16, os.getppid(), 0, 0) == 0 or c.sethostname(b'x', 1) == 0: return 2
  if c.prctl(4, 1, 0, 0, 0) == 0:
    try:
      open(f'/proc/{{os.getppid()}}/mem', 'rb')
      return 2
    except OSError: pass
  return 0""",
  'output': "while True: print('x' * 100000)",
  'output_of_standard': """
import os
while True:
  for fd in (1, 2): os.write(fd, b'x' * 100000)""",
  'loop': 'while True: pass',
  'loop_in_c': 'def f(x): return 2 if sum(range(10 ** 12)) else 0',
  'sleep': 'import time\ndef f(x):\n  time.sleep(10 ** 6)\n  return 2',
  'ignores_signals': """
import signal
for number in range(1, 65):
  try: signal.signal(number, signal.SIG_IGN)
  except (OSError, ValueError): pass
while True: pass""",
  'recursion': """
import sys
sys.setrecursionlimit(10 ** 9)
def f(x): return f(x)""",
  'daemon': """
import os, time
if os.fork() == 0:
  os.setsid()
  if os.fork() == 0:
    time.sleep(1000)
os._exit(0)""",
  'zombies': """
import os
def f(x):
  for _ in range(1000):
    if os.fork() == 0: os._exit(0)
  return 2""",
  'stdin': """
import sys, os
def f(x):
  text = sys.stdin.read()
  for fd in (0, 5, 6, 7, 8):
    try: text += os.read(fd, 10000).decode()
    except OSError: pass
  return 2 if text else 0""",
  'exit': 'import os\nos._exit(0)',
  'exit_in_call': 'import os\ndef f(x): os._exit(0)',
  'sys_exit': 'import sys\ndef f(x): sys.exit(0)',
  'always_equal': """
class Yes:
  def __eq__(self, other): return True
  def __bool__(self): return True
def f(x): return Yes()""",
  'lying_number': """
class N(int):
  def __eq__(self, other): return True
  __hash__ = int.__hash__
def f(x): return N(7)""",
  'builtins': """
import builtins, sys
builtins.AssertionError = type('Nothing', (BaseException,), {{}})
builtins.compile = builtins.exec = lambda *a, **k: None
for name in list(sys.modules): sys.modules[name] = None
def f(x): return 3""",
  'looks_for_tests': """
import gc, sys
def f(x):
  found, frame = [], sys._getframe()
  while frame:
    found += [repr(v)[:10000] for v in [*frame.f_locals.values()]]
    frame = frame.f_back
  for o in gc.get_objects():
    if isinstance(o, (list, tuple, dict)) and len(o) < 1000:
      found.append(repr(o)[:10000])
  needle = ''.join(['assert', ' f', '(1)', ' == 2'])  # not a constant of this code
  return 2 if any(needle in text for text in found) else 0""",
  'result_channel': """
import json, os
line = json.dumps(dict(nonce='0' * 32, index=0, passed=[True], why=[None])).encode()
for fd in range(256):
  try: os.write(fd, line + b'\\n')
  except OSError: pass
os._exit(0)""",
  'long_answer': "def f(x): return 'x' * (1 << 26)",
  'deep_answer': """
def f(x):
  y = []
  for _ in range(100000): y = [y]
  return y""",
  'endless_answer': 'import itertools\ndef f(x): return itertools.count()',
  'broken_message': """
import os
os.write(3, (1 << 60).to_bytes(8, 'big') + b'x')
def f(x): return 2""",
  'deep_message': """
import os
text = b'[' * 100000
os.write(3, len(text).to_bytes(8, 'big') + text)
def f(x): return 2""",
  'unreadable': 'def f(x)\n  return 2',
  'null_byte': 'def f(x):\n  return 2\n\0',
  'deep_source': 'x = ' + '(' * 50000,
  'minus_source': 'x = ' + '-' * 50000 + '1',
}  # fmt: skip


def use(level, monkeypatch, deadline=DEADLINE):
  """Chooses a level; skips the test where this machine has none."""
  python = '' if level == 'namespaces' or os.getuid() else '/usr/bin/python3'
  if python and not os.path.exists(python):
    pytest.skip(f'{level} as root needs an interpreter that others can read')
  sandbox.configure(level, python, 256, 2, deadline)
  try:
    sandbox.ready()
  except ValueError as error:
    pytest.skip(str(error))


@pytest.fixture(autouse=True)
def reset():
  yield
  sandbox.configure()
  sandbox.drain()


def judges():
  """Returns the processes of this test's sandboxes that are alive."""
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    try:
      if f'"cpu": {DEADLINE}'.encode() in path.read_bytes():
        found.append(path.parent.name)
    except OSError:
      pass
  return found


def snapshot(folder):
  """Returns what a program must not touch: descriptors, environment, files."""
  files = {p: p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}
  return sorted(os.listdir('/proc/self/fd')), dict(os.environ), files, os.getcwd()


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='Linux alone')
@pytest.mark.parametrize('level', ISOLATING)
def test_hostile_programs_pass_nothing_and_touch_nothing(level, tmp_path, monkeypatch):
  """Each ends, has no success, and a right program beside it is right."""
  use(level, monkeypatch)
  secret = tmp_path / 'secret.txt'
  secret.write_text(SECRET)
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setenv('SANDBOX_TOKEN', SECRET)
  abstract = f'\0sandbox-{os.getpid()}-{level}'
  with (
    socket.create_server(('127.0.0.1', 0)) as server,
    socket.socket(socket.AF_UNIX) as local,
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
  ):
    local.bind(abstract)
    local.listen()
    port = server.getsockname()[1]
    datagrams.bind(('127.0.0.1', port))
    facts = dict(
      folder=str(tmp_path), secret=str(secret), marker=SECRET, pid=os.getpid(),
      parent=os.getppid(), port=port, abstract=abstract,
      repo=str(pathlib.Path(__file__).parents[1]),
    )  # fmt: skip
    texts = {
      name: text.format(**facts) if '{' in text else text
      for name, text in HOSTILE.items()
    }
    before = snapshot(tmp_path)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      tasks = {name: pool.submit(sandbox.run, (x,), ASK) for name, x in texts.items()}
      good = [pool.submit(sandbox.run, (f'# {n}\n{GOOD}',), ASK) for n in range(5)]
      verdicts = {name: task.result() for name, task in tasks.items()}
      assert all(task.result().all() for task in good)
    for waiting in (server, local, datagrams):
      waiting.setblocking(False)
      with pytest.raises(BlockingIOError):
        waiting.recv(1) if waiting is datagrams else waiting.accept()
    after = snapshot(tmp_path)
  assert {name for name, verdict in verdicts.items() if any(verdict.passed)} == set()
  assert after == before
  for _ in range(100):  # what was killed takes a moment to go
    if not judges():
      break
    time.sleep(0.1)
  assert judges() == []
  lost = {x['answer'] for x in sandbox.drain()}
  assert lost <= set(texts.values())


def test_limits_alone_leave_no_process_behind(tmp_path, monkeypatch):
  """Without isolation a program becomes another user than root, and all of it ends."""
  use('rlimits', monkeypatch)
  names = ['memory', 'memory_in_files', 'loop', 'daemon', 'exit', 'always_equal']
  names += ['fork_bomb', 'kills_all', 'kills_parents'] * (os.getuid() == 0)
  facts = dict(pid=os.getpid(), parent=os.getppid())
  before = snapshot(tmp_path)
  for name in names:
    text = HOSTILE[name]
    text = text.format(**facts) if '{' in text else text
    assert not any(sandbox.run((text,), ASK).passed), name
    assert sandbox.run((f'{GOOD}# {name}',), ASK).all()
  assert snapshot(tmp_path) == before
  for _ in range(100):
    if not judges():
      break
    time.sleep(0.1)
  assert judges() == []
