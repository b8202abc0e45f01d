"""Checkpoints: the best is kept, damage is skipped, a mesh may change."""

import errno
import os
import re
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny_run import (
  INNER,
  fail_at,
  interrupt,
  rows,
  run,
  same,
  saved_steps,
  scored,
  tiny,
  vary,
  watched,
)

from dmpo_jax import build, checkpoint, evaluate, mesh, resume, train

pytest_plugins = ('tiny_run',)
pytestmark = pytest.mark.usefixtures('plain_saves')


@pytest.mark.smoke
def test_state_and_meta_come_back(tmp_path, monkeypatch):
  """State and meta come back equal; the latest `keep` stay."""
  from dmpo_jax.types import TrainState

  grid = mesh.make_mesh()
  whole = mesh.replicated(grid)
  state = TrainState(
    *(
      mesh.put(x, whole)
      for x in (np.int32(3), np.arange(6.0, dtype=np.float32), np.ones(2, np.float32))
    )
  )
  state = state._replace(trainable={'params': state.trainable})
  shapes = lambda step: {'state': checkpoint.abstract(state)}
  with checkpoint.Manager(tmp_path) as manager:
    assert checkpoint.restore(manager, shapes) is None
    for step in (1, 2, 5):
      checkpoint.save(manager, step, {'state': state}, {'step': step})
    found = checkpoint.restore(manager, shapes)
    assert found.meta == {'step': 5} and set(found.trees) == {'state'}
    same(mesh.fetch(found.trees['state']), mesh.fetch(state))
    manager.wait_until_finished()
    assert sorted(manager.all_steps()) == [2, 5]
    # An error that says nothing of the files skips none of them.
    for error in (
      OSError(errno.EIO, 'a disk is away'),
      MemoryError(),
      ValueError("INTERNAL: Failed to read [os_error_code='5']"),
      RuntimeError('RESOURCE_EXHAUSTED: Out of memory'),
    ):

      def fail(*_, error=error):
        raise KeyError('which array it was') from error  # as Orbax does

      monkeypatch.setattr(checkpoint, 'read', fail)
      with pytest.raises(KeyError, match='which array'):
        checkpoint.restore(manager, shapes)


@pytest.mark.parametrize('every', [1, 100])
def test_best_is_kept_and_found(every, built, base_params, tmp_path, monkeypatch):
  """It is saved where no save was due, kept when it is no longer among the latest, and
  known after a kill."""
  part = vary(built, train={'iterations': 5}, checkpoint={'every': every, 'keep': 1})
  policies = []

  def watch(name, args):  # the policy after iteration 1 samples for iteration 2
    if name == 'sample':
      policies.append(mesh.fetch(args[0]))

  part = watched(part, watch)
  monkeypatch.setattr(evaluate, 'accuracy', scored(0.1, 0.1, 0.7, 0.7, 0.3, 0.3, 0.2))
  with pytest.raises(KeyboardInterrupt):
    run(fail_at(part, 4 * INNER, interrupt), tmp_path, base_params, kill=True)
  assert saved_steps(tmp_path) == ([6, 11] if every == 1 else [6])
  # Every 1: up to validation 4 is written, the kill is in iteration 3.
  monkeypatch.setattr(
    evaluate, 'accuracy', scored(*([0.2, 0.3] if every == 1 else [0.7, 0.2, 0.2, 0.3]))
  )
  run(part, tmp_path, base_params)
  assert saved_steps(tmp_path) == [6, 15]
  assert resume.best_validation(tmp_path, INNER, 15) == (6, 0.7)
  top = mesh.fetch(resume.latest(part, tmp_path, base_params, best=True))
  same(top, policies[2])
  last = mesh.fetch(resume.latest(part, tmp_path, base_params))
  assert not np.array_equal(jax.tree.leaves(top)[0], jax.tree.leaves(last)[0])


def test_best_may_be_the_start(built, base_params, tmp_path, monkeypatch):
  """Where nothing validates better, it is what training started from."""
  monkeypatch.setattr(evaluate, 'accuracy', scored(0.5, 0.5, 0.1))
  run(built, tmp_path, base_params)
  assert resume.best_validation(tmp_path, INNER, 6) == (0, 0.5)
  same(
    mesh.fetch(resume.latest(built, tmp_path, base_params, best=True)),
    mesh.fetch(base_params),
  )


@pytest.mark.parametrize('steps', [[], [3, 4]])
def test_best_without_a_validation_is_an_error(
  steps, built, base_params, stopped, tmp_path
):
  """Neither the latest nor the start passes for the best."""
  workdir = tmp_path / 'run'
  if steps:
    shutil.copytree(stopped, workdir)
    (workdir / 'metrics.jsonl').unlink()
  with pytest.raises(ValueError, match='--of=best: .*--of=latest'):
    resume.latest(built, str(workdir), base_params, best=True)


def test_best_that_is_gone_is_a_sentence(built, base_params, tmp_path, monkeypatch):
  """Nothing says to throw the run away: the latest is well."""
  monkeypatch.setattr(evaluate, 'accuracy', scored(0.1, 0.7, 0.2))
  run(built, tmp_path, base_params)
  resume.latest(built, tmp_path, base_params, best=True)
  truncate(tmp_path / 'rl' / '3')
  with pytest.raises(ValueError, match='(?s)rl can be used.*3: .*use --of=latest$'):
    resume.latest(built, tmp_path, base_params, best=True)
  shutil.rmtree(tmp_path / 'rl' / '3')
  with pytest.raises(ValueError, match='--of=best: .*rl/3.* is gone.*--of=latest'):
    resume.latest(built, tmp_path, base_params, best=True)
  resume.latest(built, tmp_path, base_params)


@pytest.mark.parametrize('harm', ['path', 'arrays'])
def test_first_checkpoint_is_read_back(harm, built, base_params, tmp_path, monkeypatch):
  """A run whose checkpoints cannot be read ends at the first, not after the last."""
  if harm == 'path':  # Orbax takes it for a pattern
    tmp_path = tmp_path / 'br[1]'
    tmp_path.mkdir()
  else:
    wait = checkpoint.Manager.wait_until_finished

    def waited(manager):
      wait(manager)
      for step in manager.all_steps():
        remove(tmp_path / 'rl' / str(step))

    monkeypatch.setattr(checkpoint.Manager, 'wait_until_finished', waited)
  with pytest.raises(ValueError, match='rl/1/state, the first checkpoint.*--workdir'):
    run(built, tmp_path, base_params)
  assert resume.saved_updates(tmp_path) == [1]


@pytest.mark.parametrize('minutes, steps', [(0.0, [6]), (1e-9, [1, 2, 3, 4, 5])])
def test_saves_by_time(minutes, steps, built, base_params, tmp_path):
  """checkpoint.every_minutes saves where the number of updates would not."""
  part = vary(
    built,
    checkpoint={'every': 100, 'keep': 9, 'every_minutes': minutes},
    eval={'every': 0},
  )
  if minutes:
    with pytest.raises(KeyboardInterrupt):
      run(fail_at(part, 6, interrupt), tmp_path, base_params)
  else:
    run(part, tmp_path, base_params)
  assert saved_steps(tmp_path) == steps


def pieces(step):
  """The files of a checkpoint that hold the arrays of its state."""
  return [p for p in (step / 'state').rglob('d/*') if p.is_file()]


def truncate(step):
  for path in pieces(step):
    os.truncate(path, path.stat().st_size // 2)


def remove(step):
  for path in pieces(step):
    path.unlink()


def zero(step):
  for path in pieces(step):
    size = path.stat().st_size
    with open(path, 'r+b') as f:
      f.seek(size // 2)
      f.write(bytes(size // 4))


def resave(step, change, meta=lambda meta: meta):
  """Writes the checkpoint again, whole, with other arrays or another meta."""
  folder, at = step.parent, int(step.name)
  names = {path.name for path in step.iterdir()} & {'state', 'batch'}
  items = {name: ocp.args.StandardRestore() for name in names}
  with ocp.CheckpointManager(folder) as manager:
    got = manager.restore(
      at, args=ocp.args.Composite(**items, meta=ocp.args.JsonRestore())
    )
  shutil.rmtree(step)
  trees = {name: got[name] for name in names}
  trees['state'] = change(trees['state'])
  items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
  with ocp.CheckpointManager(folder) as manager:
    new = ocp.args.JsonSave(meta(got.meta))
    manager.save(at, force=True, args=ocp.args.Composite(**items, meta=new))


def wider(state):
  kernel = state['trainable']['params']['embedding']
  state['trainable']['params']['embedding'] = np.zeros(
    (kernel.shape[0] + 8, *kernel.shape[1:]), np.float32
  )
  return state


def one_bit(state):
  """Flips a bit, as a disk may do. Orbax reads it without complaint."""
  kernel = np.array(state['trainable']['params']['embedding'])
  kernel.reshape(-1).view(np.uint32)[5] ^= 1
  state['trainable']['params']['embedding'] = kernel
  return state


def foreign(meta):
  return {**meta, 'config': {**meta['config'], 'optim.lr': 0.5}}


def empty(step):
  shutil.rmtree(step)
  step.mkdir()


DAMAGE = {
  'truncated': (truncate, 'Error|error'),
  'missing': (remove, 'Error|error'),
  'zeroed': (zero, 'Error|error'),
  'shape': (lambda step: resave(step, wider), 'shape'),
  'config': (
    lambda step: resave(step, lambda state: state, foreign),
    'another config .*optim.lr: 0.5 there, 0.001 here',
  ),
  'empty': (empty, 'was not found'),
  'one bit': (lambda step: resave(step, one_bit), "the bytes of 'state' are not those"),
}


@pytest.fixture(scope='module')
def stopped(built, base_params, tmp_path_factory):
  """The workdir of a run that was killed with the checkpoints 3 and 4."""
  workdir = tmp_path_factory.mktemp('stopped')
  with pytest.raises(KeyboardInterrupt):
    run(fail_at(built, 5, interrupt), workdir, base_params, kill=True)
  assert saved_steps(workdir) == [3, 4]
  return workdir


@pytest.mark.parametrize('kind', DAMAGE)
def test_damaged_checkpoint_is_skipped(
  kind, built, base_params, whole, stopped, tmp_path, monkeypatch
):
  """A warning names it, the one before is used, and it is moved aside; the run ends as
  the whole one."""
  workdir, warnings = tmp_path / 'run', []
  shutil.copytree(stopped, workdir)
  damage, words = DAMAGE[kind]
  damage(workdir / 'rl' / '4')
  monkeypatch.setattr(
    checkpoint.logging, 'warning', lambda text, *args: warnings.append(text % args)
  )
  same(run(built, workdir, base_params), whole[1])
  assert rows(workdir) == rows(whole[0])
  (text,) = [text for text in warnings if 'cannot be used' in text]
  assert re.search(f'rl/4 cannot .*({words})', text), text
  assert [p.name[:2] for p in (workdir / 'rl.damaged').iterdir()] == ['4-']


@pytest.mark.parametrize('kind', ['zeroed', 'config', 'one bit'])
def test_nothing_but_damage_is_an_error(kind, built, base_params, stopped, tmp_path):
  """The error lists each with its fault and says what to do; nothing is changed."""
  workdir = tmp_path / 'run'
  shutil.copytree(stopped, workdir)
  damage, words = DAMAGE[kind]
  for name in ('3', '4'):
    damage(workdir / 'rl' / name)
  before = (workdir / 'metrics.jsonl').read_text()
  with pytest.raises(
    ValueError,
    match=f'(?s)no checkpoint.*4: .*({words}).*3: .*back from a copy, or move',
  ):
    run(built, workdir, base_params)
  assert (workdir / 'metrics.jsonl').read_text() == before
  assert saved_steps(workdir) == [3, 4]


def test_lost_checkpoints_are_warned_of(
  built, base_params, whole, stopped, tmp_path, monkeypatch
):
  """With metrics but no checkpoint it warns, then begins from the start."""
  workdir, warnings = tmp_path / 'run', []
  shutil.copytree(stopped, workdir)
  shutil.rmtree(workdir / 'rl')
  monkeypatch.setattr(
    train.logging, 'warning', lambda text, *args: warnings.append(text % args)
  )
  same(run(built, workdir, base_params), whole[1])
  assert len(warnings) == 1 and 'from the start, and the 4 updates' in warnings[0]
  assert rows(workdir) == rows(whole[0])


@pytest.mark.smoke
def test_digest_sees_every_bit():
  """One bit of any element or two swapped elements change it; the mesh does not."""
  grid = mesh.make_mesh(2, 4)
  draw = np.random.default_rng(0)
  tree = {
    'a': draw.normal(size=(8, 4)).astype(np.float32),
    'b': draw.normal(size=(8,)).astype(jax.numpy.bfloat16),
    'c': draw.integers(0, 2, (8, 3)) > 0,
    'd': np.int32(5),
    'e': draw.integers(0, 16, (8, 2)).astype(jax.numpy.uint4),
  }
  digest = jax.jit(checkpoint.digest)
  value = int(digest(tree))
  by_row = {
    name: mesh.put(x, mesh.rows(grid) if x.shape else mesh.replicated(grid))
    for name, x in tree.items()
  }
  assert int(digest(by_row)) == value
  seen = {value}
  for name, at, bit in (('a', 0, 0), ('a', 31, 31), ('b', 7, 15), ('d', 0, 3)):
    other = {k: np.array(x) for k, x in tree.items()}
    flat = other[name].reshape(-1).view(np.uint8)
    flat[at * other[name].dtype.itemsize + bit // 8] ^= 1 << bit % 8
    seen.add(int(digest(other)))
  swapped = tree['a'].copy()
  swapped[[0, 1]] = swapped[[1, 0]]
  seen |= {
    int(digest({**tree, 'a': swapped})),
    int(digest({**tree, 'c': ~tree['c']})),
    int(digest({**tree, 'e': tree['e'][::-1]})),
  }
  assert len(seen) == 8


def test_restores_onto_another_mesh(built, stopped):
  """Eight replicas saved it; it is read where weights are split four ways."""
  c = tiny()
  c.mesh.fsdp = 4
  other = build.build(c)

  def restored(part):
    state = checkpoint.abstract(part.steps.start(part.steps.init()))
    prompt = build.problems(part, 'train').tokens.shape[1]
    shapes = {'state': state, 'batch': build.abstract_buffer(part, prompt).batch}
    with checkpoint.Manager(stopped / 'rl', 2, part.steps.digest) as manager:
      trees = checkpoint.restore(manager, lambda step: shapes).trees
    for got, want in zip(
      jax.tree.leaves(trees['state']), jax.tree.leaves(state), strict=True
    ):
      assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
    return trees

  found = restored(other)
  same(mesh.fetch(restored(built)), mesh.fetch(found))
  kernels = found['state'].trainable['params']['layers']['q']['kernel']
  assert not kernels.sharding.is_fully_replicated
