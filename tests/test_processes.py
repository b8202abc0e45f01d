"""Several processes on the loopback compute what one computes, and end.

The tests run real commands under jax.distributed with gloo. XLA_FLAGS splits the CPU of
each process, so that they always have a mesh of the same four devices.
"""

import functools
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from jax.experimental import multihost_utils

from configs import base
from dmpo_jax import (
  buffers,
  build,
  checkpoint,
  config,
  curriculum,
  guard,
  mesh,
  metrics,
  pairs,
  resume,
  weights,
)
from dmpo_jax import cli as main
from dmpo_jax.types import TrainState

ROOT = pathlib.Path(__file__).parents[1]
DEVICES, UPDATES = 4, 6
SLOW = pytest.mark.slow  # several processes
SETTINGS = {
  'model.width': 16,
  'model.layers': 1,
  'model.heads': 2,
  'model.kv_heads': 2,
  'model.mlp': 16,
  'data.train_size': 16,
  'data.validation_size': 6,
  'data.test_size': 6,
  'sampler.pick': 'threshold',
  'sampler.threshold': 0.1,
  'eval.sampler.pick': 'threshold',
  'eval.sampler.threshold': 0.1,
  'control.on': True,
  'curriculum.signal': 'objective',
  'curriculum.correct': True,
  'eval.batch': 4,
  'eval.every': 1,
  'sft.steps': 2,
  'sft.batch': 8,
  'objective.draws': 2,
  'logprob.draws': 2,
  'train.iterations': 3,
  'train.prompts': 2,
  'train.group': 4,
  'train.inner': 2,
  'train.microbatches': 1,
  'train.overlap': True,
  'mesh.fsdp': 2,
  'optim.lr': 1e-3,
  'checkpoint.every': 1,
  'checkpoint.keep': 9,
  'log.samples': 8,
  'log.rollouts': True,
}
# Experts on all devices; their choice is recorded, measured and replayed.
EXPERTS = {
  'model.preset': 'tiny_moe', 'model.layers': 2, 'model.mlp': 0,
  'model.attention_block': 4, 'objective.name': 'tracerl', 'mesh.fsdp': 1,
  'mesh.expert': 4, 'routing.replay': True, 'routing.measure': True,
  'routing.train': 'all', 'routing.load': 0.01, 'control.on': False,
  'sft.overlong': 'cut',
  **{
    f'{name}.{field}': x
    for name in ('sampler', 'eval.sampler')
    for field, x in dict(length=8, block=4, steps=8, cache='block').items()
  },
}  # fmt: skip
CONFIG = """
from configs import base
from dmpo_jax import config


def get_config():
  c = base.get_config()
  config.update(c, {0})
  return c
"""
# main.py with a reward that an untrained model earns; it prints how many it judged.
COMMAND = """
import atexit, sys
import jax
from absl import app
from dmpo_jax import cli as main
from dmpo_jax.tasks import TASKS

judged = []


def letters(text, example, protocol):
  judged.append(text)
  return {'letters': sum(map(str.isalpha, text)) / 16}


TASKS['sudoku'] = TASKS['sudoku']._replace(
    reward=letters, grade=lambda text, *_: float(sum(map(str.isalpha, text)) >= 8))
atexit.register(lambda: print('judged', len(judged), flush=True))
jax.config.config_with_absl()
app.run(main.start, flags_parser=main.parse)
"""


def free_port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


def python(path, args, devices, log):
  """Starts Python with so many devices; its output goes to `log`.

  The processes share a compilation cache.
  """
  xla = re.sub(
    'device_count=[0-9]+', f'device_count={devices}', os.environ['XLA_FLAGS']
  )
  with open(log, 'w') as f:
    return subprocess.Popen(
      [sys.executable, path, *args],
      stdout=f,
      stderr=subprocess.STDOUT,
      cwd=path.parent,
      env={
        'JAX_COMPILATION_CACHE_DIR': str(path.parent / 'programs'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        **os.environ,
        'PYTHONPATH': str(ROOT),
        'XLA_FLAGS': xla,
      },
    )


class Job:
  """The command in `count` processes, in the folder of its workdir."""

  def __init__(self, folder, name, count, *args):
    self.workdir = folder / name
    many = (
      []
      if count == 1
      else [f'--coordinator=localhost:{free_port()}', f'--processes={count}']
    )
    start = len(list(folder.glob('*.txt')))
    self.logs = [folder / f'{start + i}.txt' for i in range(count)]
    self.processes = [
      python(
        folder / 'command.py',
        [
          '--config=config.py',
          f'--workdir={name}',
          *many,
          *args,
          *([f'--process={i}'] if many else []),
        ],
        DEVICES // count,
        log,
      )
      for i, log in enumerate(self.logs)
    ]

  def when(self, phase, step, send, which):
    """Sends a signal to one process once metrics.jsonl has the step."""
    end = time.time() + 300
    while not any(
      (row['phase'], row['step']) == (phase, step) for row in metrics.read(self.workdir)
    ):
      assert self.processes[which].poll() is None, self.output()
      assert time.time() < end, self.output()
      time.sleep(0.02)
    self.processes[which].send_signal(send)
    return self

  def codes(self):
    """Returns the exit codes of all; none may hang."""
    try:
      return [process.wait(timeout=300) for process in self.processes]
    finally:
      for process in self.processes:
        process.kill()

  def output(self):
    return '\n'.join(log.read_text() for log in self.logs)

  def done(self):
    assert set(self.codes()) == {0}, self.output()
    return self


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('jobs')
  prepare(folder, SETTINGS)
  return folder


def prepare(folder, settings):
  (folder / 'config.py').write_text(CONFIG.format(settings))
  (folder / 'command.py').write_text(COMMAND)


@pytest.fixture(scope='module')
def one(folder):
  """One process, not interrupted."""
  return Job(folder, 'one', 1).done()


@pytest.fixture(scope='module')
def killed(folder):
  """Two processes, of which the second is killed in the middle of training."""
  return Job(folder, 'two', 2, '--heartbeat=10').when(
    'update', 3, signal.SIGKILL, 1
  )  # the first checkpoint is whole


@pytest.fixture(scope='module')
def two(folder, killed):
  """The same command again, to the end."""
  killed.codes()
  return Job(folder, 'two', 2).done()


@pytest.fixture(scope='module')
def asked(folder):
  """Four processes, of which one gets SIGTERM before training."""
  return Job(folder, 'four', 4).when('eval', 0, signal.SIGTERM, 2)


@pytest.fixture(scope='module')
def moved(folder, asked):
  """Resumes in one process from the checkpoint of four."""
  asked.codes()
  return Job(folder, 'four', 1).done()


def rows(workdir):
  """Returns {(phase, step): numbers} without times and compilations."""
  return {
    (row['phase'], row['step']): {
      name: x
      for name, x in row.items()
      if name not in ('phase', 'step') and not metrics.of_machine(name)
    }
    for row in metrics.read(workdir)
  }


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='module')
def parameters():
  """Returns (workdir, fields beside SETTINGS) -> final parameters, on the host."""

  @functools.cache
  def parts(*fields):
    c = base.get_config()
    config.update(c, {**SETTINGS, 'mesh.fsdp': 8, 'eval.batch': 8, **dict(fields)})
    built = build.build(c)
    return built, built.steps.init()

  def final(workdir, **fields):
    built, start = parts(*fields.items())
    return mesh.fetch(resume.latest(built, workdir, start))

  return final


def close(a, b, rtol=1e-4, atol=2e-5):
  """Metrics are differences of log-probs of some twenty nats, in float32."""
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b
  )


# --- the same numbers


@pytest.mark.slow
@pytest.mark.parametrize('name', ['two', pytest.param('moved', marks=pytest.mark.long)])
def test_processes_compute_what_one_computes(name, one, request, parameters):
  """Completions, rewards and grades are equal; numbers are up to rounding."""
  same_run(request.getfixturevalue(name), one, parameters)


@pytest.mark.long
def test_experts_on_two_processes_are_those_of_one(tmp_path, parameters):
  """Experts of all devices, the record of their choice, and its replay."""
  prepare(tmp_path, SETTINGS | EXPERTS)
  one, two = (Job(tmp_path, str(count), count).done() for count in (1, 2))
  own = EXPERTS | {'mesh.expert': 8, 'eval.batch': 8}
  same_run(two, one, lambda workdir: parameters(workdir, **own))
  found = rows(two.workdir)
  assert all(found['update', i]['expert_entropy'] > 0 for i in range(1, UPDATES + 1))
  assert all(found['rl', i]['routes_replayed'] < 1e-5 for i in range(3))


def same_run(many, one, parameters):
  """Asserts that two jobs computed the same."""
  for file in ('samples.jsonl', 'test_base.jsonl', 'test_final.jsonl', curriculum.FILE):
    assert lines(many.workdir / file) == lines(one.workdir / file)
  assert len(lines(one.workdir / 'samples.jsonl')) == 3 * 8
  drawn = lines(one.workdir / curriculum.FILE)  # by what the lines before say
  assert len(drawn) == 3 and sum(sum(line['passes']) for line in drawn) > 0
  saved = buffers.read(many.workdir), buffers.read(one.workdir)
  jax.tree.map(np.testing.assert_array_equal, *saved)
  got, want = rows(many.workdir), rows(one.workdir)
  assert {('sft', 2), ('rl', 2), ('update', UPDATES), ('eval', 3)} <= set(want)
  close(got, want)
  for phase, step in want:  # numbers of the host are the same to the bit
    if phase in ('rl', 'eval'):
      for number in (
        'reward',
        'accuracy',
        'length',
        'cut',
        'reward/letters',
        'tokens_per_step',
      ):
        assert got[phase, step].get(number) == want[phase, step].get(number)
  assert len({row['reward'] for row in want.values() if 'reward' in row}) > 1
  close(parameters(many.workdir), parameters(one.workdir), atol=1e-5)


@pytest.mark.long
def test_two_processes_train_on_the_pairs_of_one(folder, one, parameters):
  """The same pairs of saved rollouts, and the same numbers up to rounding, if one of
  them is killed, too."""
  own = {
    'path': ('one',), 'each': 4, 'epochs': 3, 'batch': 4, 'lr': 0.01, 'warmup': 0,
    'held_out': 0.3, 'every': 2, 'draws': 2, 'microbatches': 1,
  }  # fmt: skip
  fields = {f'pairs.{name}': value for name, value in own.items()}
  fields |= {'train.iterations': 1, 'sft.steps': 0}
  args = [f'--config.{name}={value}' for name, value in fields.items()]
  alone = Job(folder, 'pairs_one', 1, *args).done().workdir
  job = Job(folder, 'pairs_two', 2, '--heartbeat=10', *args)
  job.when('pairs', 2, signal.SIGKILL, 1).codes()
  again = Job(folder, 'pairs_two', 2, *args).done()
  assert 'pairs of saved rollouts' not in again.output()  # they are read
  for file in (pairs.FILE, 'samples.jsonl', 'test_final.jsonl'):
    assert lines(again.workdir / file) == lines(alone / file) != []
  got, want = rows(again.workdir), rows(alone)
  assert {('pairs', 3), ('held_out_pairs', 2), ('rl', 0)} <= set(want)
  assert want['held_out_pairs', 2]['margin'] != 0
  close(got, want)
  close(*(parameters(x, **fields) for x in (again.workdir, alone)), atol=1e-5)


@SLOW
def test_each_process_judges_its_share(one, two, killed):
  """A completion is judged in one process; only one process writes."""
  assert 'resuming at iteration' in two.output()
  counts = [int(re.search(r'judged (\d+)', log.read_text())[1]) for log in two.logs]
  assert counts[0] == counts[1] > 0
  texts = [log.read_text() for log in two.logs]
  assert 'accuracy' in texts[0] and 'accuracy' not in texts[1]


# --- how they end


@SLOW
def test_a_killed_process_ends_the_others(killed):
  """They exit by themselves, with a message; none hangs."""
  other, gone = killed.codes()
  assert gone == -signal.SIGKILL and other not in (0, guard.PREEMPTED)
  assert 'another task died' in killed.logs[0].read_text()


@SLOW
def test_sigterm_to_one_process_stops_all(asked, moved):
  """They stop at the same update, save, and exit with 75; one process resumes."""
  assert asked.codes() == [guard.PREEMPTED] * 4, asked.output()
  assert 'resuming at iteration' in moved.output(), moved.output()
  assert 'the same command resumes' in asked.output()


def test_orbax_does_not_ask_for_preemption(tmp_path, monkeypatch):
  """JAX stops at an equal count; Orbax' step numbers would miss it."""
  counts = []
  monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point', counts.append)
  state = TrainState(jnp.int32(3), {'params': jnp.zeros(2)}, {})
  with checkpoint.Manager(tmp_path, 1) as manager:
    checkpoint.save(manager, 3, {'state': state}, {})
  assert not counts and (tmp_path / '3').exists()


# --- evaluation and export


@pytest.mark.long
def test_evaluation_and_export(folder, one, two, parameters):
  """Cards and weights that two processes write are those of one process."""
  Job(folder, 'two', 2, '--mode=eval', '--out=cards').done()
  Job(folder, 'two', 2, '--mode=export', '--out=hf').done()
  (saved,) = (folder / 'cards').glob('*generations.json')
  saved = json.loads(saved.read_text())
  assert [item['generations'] for item in saved['generations']] == [
    row['completion'] for row in lines(one.workdir / 'test_final.jsonl')
  ]
  results = json.loads((one.workdir / 'results.json').read_text())
  assert saved['card']['accuracy'] == results['final']['accuracy']
  _, params = weights.load_hf(str(folder / 'hf'))
  jax.tree.map(np.testing.assert_array_equal, params, parameters(two.workdir))
  assert (folder / 'hf' / 'tokenizer.json').exists()


# --- flags


@pytest.fixture
def cluster(tmp_path, monkeypatch):
  """Returns main.cluster() for a command line."""
  (tmp_path / 'config.py').write_text(CONFIG.format(SETTINGS))

  def call(*args):
    saved = flagsaver.save_flag_values()
    argv = ['main.py', f'--config={tmp_path}/config.py', *args]
    monkeypatch.setattr(sys, 'argv', argv)
    try:
      main.parse(argv)
      return main.cluster()
    finally:
      flagsaver.restore_flag_values(saved)
      flags.FLAGS.unparse_flags()

  return call


HERE = ('--coordinator=host:1234', '--processes=2', '--process=0')


def test_flags_of_a_cluster(cluster):
  assert cluster() is None and cluster('--multihost=off') is None
  assert cluster('--multihost=auto', '--heartbeat=7') == {'heartbeat': 7}
  assert cluster(*HERE) == dict(
    coordinator='host:1234', processes=2, process=0, heartbeat=100
  )
  assert cluster('--coordinator=[::1]:80', *HERE[1:])['processes'] == 2


@pytest.mark.parametrize(
  'args, sentence',
  [
    (('--multihost=auto', HERE[0]), '--multihost=auto finds --coordinator'),
    (('--multihost=auto', '--process=0'), '--multihost=auto finds'),
    (HERE[:1], '--processes, --process missing'),
    (HERE[1:], '--coordinator missing'),
    (('--process=0',), '--coordinator, --processes missing'),
    (('--coordinator=host', *HERE[1:]), '--coordinator=host must be host:port'),
    (('--coordinator=:80', *HERE[1:]), '--coordinator=:80 must be host:port'),
    (('--coordinator=a:x', *HERE[1:]), 'must be host:port'),
    (('--coordinator=a:70000', *HERE[1:]), 'from 1 to 65535'),
    ((*HERE[:2], '--process=2'), '--process=2 must be in 0 to 1'),
    ((*HERE[:2], '--process=-1'), '--process=-1 must be in 0 to 1'),
    ((*HERE, '--heartbeat=0'), '--heartbeat=0 must be >= 1'),
    ((*HERE, '--mode=plan'), '--mode=plan is for one process'),
    (('--multihost=auto', '--mode=report'), '--mode=report is for one'),
  ],
)
def test_impossible_flags_are_refused(args, sentence, cluster):
  """Before anything is started, in a sentence that names the flag."""
  with pytest.raises(ValueError) as info:
    cluster(*args)
  assert sentence in str(info.value)


JOIN = """
import sys
from dmpo_jax import guard
try:
  guard.join(*(eval(arg) for arg in sys.argv[1:]), patience=2)
except ValueError as error:
  sys.exit(f'error: {error}')
"""


def test_processes_that_do_not_meet_are_an_error(tmp_path):
  """No cluster, no process 0, a process that is missing, a port that is taken."""
  (tmp_path / 'join.py').write_text(JOIN)
  with socket.socket() as s:
    s.bind(('', 0))
    s.listen()
    taken = f"'localhost:{s.getsockname()[1]}'"
    free = [f"'localhost:{free_port()}'" for _ in range(2)]
    cases = [
      ((), '--multihost=auto: '),
      ((free[0], '2', '1'), 'have not met'),
      ((free[1], '2', '0'), 'have not met within 2 seconds'),
      ((taken, '2', '0'), 'no port for process 0'),
    ]
    started = [
      python(tmp_path / 'join.py', args, 1, tmp_path / f'{i}.txt')
      for i, (args, _) in enumerate(cases)
    ]
    for i, (args, sentence) in enumerate(cases):
      assert started[i].wait(timeout=120) == 1
      text = (tmp_path / f'{i}.txt').read_text()
      assert sentence in text and text.startswith('error: --'), text
      if args:
        assert f'--coordinator={args[0][1:-1]}' in text


# --- rows, grades and damaged checkpoints


ROWS = """
import pathlib, sys
import jax, numpy as np
from configs import base
from dmpo_jax import build, checkpoint, grader, guard, mesh
from dmpo_jax.tasks import TASKS
from dmpo_jax.types import TrainState

guard.join(sys.argv[1], 2, int(sys.argv[2]))
me, got = jax.process_index(), {}
assert jax.device_count() == 4

# A process reads the rows that it holds; along a tensor axis the first one does.
x = np.arange(24).reshape(8, 3)
for shape, mine in (((2, 2, 1), np.arange(4 * me, 4 * me + 4)),
                    ((1, 2, 2), np.arange(4 * me, 4 * me + 4)),
                    ((1, 1, 4), np.arange(8 - 8 * me))):
  put = mesh.put(x, mesh.rows(mesh.make_mesh(*shape)))
  np.testing.assert_array_equal(mesh.my_rows(put), mine)
  np.testing.assert_array_equal(mesh.fetch(put), x)
for length in (0, 1, 100, 1000):  # of different lengths
  text = ['é"' * length * me, 0.1, None]
  assert mesh.gather(text)[me] == text and len(mesh.gather(text)) == 2
assert mesh.agree(me) and not mesh.agree(0)

# One grade of a row, whatever each host would say; failures of both.
task = TASKS['sudoku']._replace(
    reward=lambda text, *_: {'a': np.float32(me), 'b': 0.1},
    grade=lambda *_: me / 3)
mine = [1, 3] if me else [0, 2, 4]
graded = grader.judge(task, 'strict', [f't{i}' for i in mine], mine, {}, mine)
assert graded.texts == [f't{i}' for i in range(5)]
assert graded.grades == [0, 1 / 3, 0, 1 / 3, 0]
assert [t['a'] for t in graded.terms] == [0, 1, 0, 1, 0]
bad = task._replace(reward=lambda *_: {'a': float('nan') if me else 0.0})
try:
  grader.judge(bad, 'strict', ['x'], [0], {}, [me])
  raise AssertionError
except ValueError as error:  # on both, so that neither waits for the other
  assert 'not finite' in str(error)

# pmap and jit sample the same, and so does a model whose drafts the host refuses.
tokens = []
refused = {'draft.of': 'same', 'draft.rollouts': True, 'draft.gate': 'reward',
           'draft.judge': 'format', 'draft.bound': 2.0}
for fields in ({}, {'sampler.parallel': 'pmap'}, refused):
  c = base.get_config()
  c.update_from_flattened_dict({
      'model.width': 16, 'model.layers': 1, 'model.heads': 2,
      'model.kv_heads': 2, 'model.mlp': 16, **fields,
      'sampler.steps': 2, 'train.prompts': 4, 'train.group': 4,
      'eval.batch': 4})
  built = build.build(c)
  prompt = np.full((8, 4), 20, np.int32)
  rollouts, mask, *_ = built.steps.sample(
      built.steps.init(), prompt, prompt > 0, np.arange(8, dtype=np.int32))
  assert int(mesh.fetch(rollouts.forwards)) == 2
  tokens.append(mesh.fetch((rollouts.tokens, rollouts.confidence, mask)))
for other in tokens[1:]:
  jax.tree.map(np.testing.assert_array_equal, tokens[0], other)

# A checkpoint of which one process cannot read its part is skipped by both.
grid, folder = mesh.make_mesh(1, 4, 1), sys.argv[3]
whole, split = mesh.replicated(grid), jax.NamedSharding(grid, jax.P('fsdp'))


def state(step):
  return TrainState(mesh.put(np.int32(step), whole), {'params': mesh.put(
      np.arange(4096.0, dtype=np.float32) + step, split)}, {})


digest = build.Compiled(grid, checkpoint.digest)
with checkpoint.Manager(folder, 4, digest) as manager:
  for step in (1, 2, 3):
    checkpoint.save(manager, step, {'state': state(step)}, {})
  manager.wait_until_finished()
  if me == 0:  # the others' bytes, a bit of the largest file of step 2
    for file in pathlib.Path(folder).glob('3/state/ocdbt.process_1/d/*'):
      file.write_bytes(file.read_bytes()[:50])
    file = max(pathlib.Path(folder).glob('2/state/ocdbt.process_1/d/*'),
               key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
  mesh.agree(False)
  shapes = {'state': checkpoint.abstract(state(0))}
  found = checkpoint.restore(manager, lambda step: shapes).trees['state']
  assert int(found.step) == 1
  np.testing.assert_array_equal(mesh.fetch(found.trainable['params']),
                                np.arange(4096.0) + 1)
  checkpoint.set_aside(manager, 1)
  assert manager.all_steps() == [1]
  checkpoint.save(manager, 2, {'state': state(2)}, {})
with checkpoint.Manager(folder, 4) as manager:
  assert manager.all_steps() == [1, 2]
print('all is well')
"""


def test_parts_under_two_processes(tmp_path):
  """Rows a process reads, grades all of them know, checkpoints that are damaged."""
  (tmp_path / 'rows.py').write_text(ROWS)
  where = f'localhost:{free_port()}'
  started = [
    python(
      tmp_path / 'rows.py',
      [where, str(i), tmp_path / 'saved'],
      2,
      tmp_path / f'{i}.txt',
    )
    for i in range(2)
  ]
  codes = [process.wait(timeout=300) for process in started]
  texts = [(tmp_path / f'{i}.txt').read_text() for i in range(2)]
  assert codes == [0, 0], texts
  assert all('all is well' in text for text in texts)
