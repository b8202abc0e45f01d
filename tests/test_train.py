"""A whole tiny run, interrupted in every way that matters, and resumed."""

import errno
import functools
import json
import os
import re
import shutil
import signal
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import base
from dmpo_jax import (
  build,
  check,
  checkpoint,
  data,
  evaluate,
  guard,
  mesh,
  metrics,
  optim,
  resume,
  rng,
  rollout,
  step,
  train,
)
from dmpo_jax.phases import sft
from dmpo_jax.tasks import TASKS

INNER, ITERATIONS = 3, 2


def tiny():
  """A run of seconds: eight rows, for the eight devices of the tests."""
  c = base.get_config()
  changes = {
    'model.width': 16,
    'model.layers': 1,
    'model.heads': 2,
    'model.kv_heads': 2,
    'model.mlp': 16,
    'data.train_size': 16,
    'data.validation_size': 11,
    'data.test_size': 8,
    'sampler.steps': 4,
    'eval.sampler.steps': 4,
    'eval.batch': 8,
    'eval.every': 1,
    'sft.steps': 3,
    'sft.batch': 8,
    'objective.draws': 2,
    'logprob.draws': 2,
    'train.iterations': ITERATIONS,
    'train.prompts': 2,
    'train.group': 4,
    'train.inner': INNER,
    'train.microbatches': 1,
    'optim.lr': 1e-3,
    'checkpoint.every': 1,
    'log.samples': 2,
  }
  c.update_from_flattened_dict(changes)
  return c


def letters(text, example, protocol):
  """A reward that an untrained model earns: sudoku's would all be zero."""
  return {'letters': sum(map(str.isalpha, text)) / 16}


@pytest.fixture(scope='module', autouse=True)
def plain_saves():
  """JAX checks every slice for reused keys, one by one, and Orbax takes
  hundreds when it saves: half of this file's time."""
  jax.config.update('jax_debug_key_reuse', False)
  yield
  jax.config.update('jax_debug_key_reuse', True)


@pytest.fixture(scope='module')
def built():
  """Compiled once; what the loops alone read is changed by `vary`."""
  parts = build.build(tiny())
  return parts._replace(task=parts.task._replace(reward=letters))


def vary(built, **sections):
  """The same compiled parts under a config that differs for the loops."""
  c = built.config.copy_and_resolve_references()
  for section, fields in sections.items():
    c[section].update(fields)
  return built._replace(config=c)


def run(built, workdir, base_params, kill=False):
  """train.run; `kill` leaves the writer as a killed process would."""
  writer = metrics.Writer(workdir)
  try:
    params, _ = train.run(built, str(workdir), writer, base_params)
  except BaseException:
    if not kill:
      writer.close()
    raise
  writer.close()
  return mesh.fetch(params)


@pytest.fixture(scope='module')
def base_params(built, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('base')
  with metrics.Writer(workdir) as writer:
    params, seconds = sft.run(built, str(workdir), writer)
  assert seconds > 0
  rows = metrics.read(workdir)
  assert [(r['phase'], r['step']) for r in rows] == [('sft', i) for i in (1, 2, 3)]
  return params


@pytest.fixture(scope='module')
def whole(built, base_params, tmp_path_factory):
  """(workdir, final parameters) of the run that nothing interrupts."""
  workdir = tmp_path_factory.mktemp('whole')
  return workdir, run(built, workdir, base_params)


def same(a, b):
  """Equal to the bit."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def rows(workdir):
  """{phase: rows in order} without what the clock and the compiler say."""
  out = {}
  for row in metrics.read(workdir):
    kept = {
      k: v
      for k, v in row.items()
      if k not in ('time', 'compilations') and not k.startswith('seconds')
    }
    out.setdefault(row['phase'], []).append(kept)
  return out


def samples(workdir):
  with open(os.path.join(workdir, 'samples.jsonl')) as f:
    return [json.loads(line) for line in f]


def fail_at(built, call, how):
  """`built` whose `call`-th update is preceded by how(batch) -> batch."""
  calls = []

  def update(state, frozen, batch, *more):
    calls.append(more)
    if len(calls) == call:
      batch = how(batch)
    return built.steps.update(state, frozen, batch, *more)

  return built._replace(steps=built.steps._replace(update=update))


def interrupt(batch):
  raise KeyboardInterrupt


# --- a run


def test_base_model_is_trained(built, base_params):
  """Supervised steps change every matrix of the fresh model."""
  fresh = mesh.fetch(built.steps.init())
  moved = jax.tree.map(lambda a, b: (a != b).any(), fresh, mesh.fetch(base_params))
  assert all(jax.tree.leaves(moved))


def test_no_sft_is_the_fresh_model(built, tmp_path):
  """sft.steps = 0 gives the initial weights and writes nothing."""
  none = vary(built, sft={'steps': 0})
  params, seconds = sft.run(none, str(tmp_path), None)
  same(mesh.fetch(params), mesh.fetch(built.steps.init()))
  assert seconds == 0 and not list(tmp_path.iterdir())


def test_what_a_run_writes(whole, built):
  """Every iteration and update once, with the numbers that reports show."""
  workdir, params = whole
  found = rows(workdir)
  assert set(found) == {'rl', 'update', 'eval'}
  assert [r['step'] for r in found['rl']] == list(range(ITERATIONS))
  assert [r['step'] for r in found['update']] == list(range(1, ITERATIONS * INNER + 1))
  # eval.every = 1: before every iteration, and at the end.
  assert [r['step'] for r in found['eval']] == [0, 1, 2]
  for row in found['rl']:
    assert {
      'reward',
      'reward_std',
      'accuracy',
      'length',
      'forwards',
      'ess',
      'coef',
      'log_rnd_std',
      'logp_old',
      'logp_ref',
      'reward/letters',
      'tokens_per_step',
    } <= set(row)
    assert row['tokens_per_step'] == 4 and row['forwards'] == 4
    assert row['logp_old'] < 0
  # Before the first update the policy is the reference.
  assert found['rl'][0]['log_rnd_std'] == 0
  assert found['rl'][1]['log_rnd_std'] > 0
  for row in found['update']:
    assert row['finite'] == 1 and row['grad_norm'] > 0 and 'loss' in row
  for row in found['eval']:
    assert {'accuracy', 'reward', 'cell_accuracy', 'forwards'} <= set(row)
  timed = [r for r in metrics.read(workdir) if r['phase'] == 'rl']
  assert all(r['seconds/rollout'] > 0 for r in timed)
  assert timed[-1]['seconds/update'] > 0
  assert set(params) == {'params'}


def test_samples(whole, built):
  """log.samples per buffer, with what the reward saw and in which order."""
  found = samples(whole[0])
  assert [s['iteration'] for s in found] == [0, 0, 1, 1]
  assert [s['row'] for s in found] == [0, 1, 8, 9]
  for sample in found:
    assert sorted(set(sample['order'])) == [0, 1, 2, 3]
    assert len(sample['order']) == 16
    terms = built.task.reward(sample['completion'], sample['example'], 'strict')
    assert terms == sample['reward']
    assert sample['prompt'] == sample['example']['puzzle']


def test_training_moves_the_policy_only(whole, base_params):
  """All weights have changed; the reference they started from has not."""
  moved = jax.tree.map(lambda a, b: (a != b).any(), mesh.fetch(base_params), whole[1])
  assert all(jax.tree.leaves(moved))


def test_same_run_twice(built, base_params, whole, tmp_path):
  """The seed decides everything, and a finished run is not run again."""
  params = run(built, tmp_path, base_params)
  same(params, whole[1])
  assert rows(tmp_path) == rows(whole[0])
  never = fail_at(built, 1, interrupt)  # no update is left to be done
  same(run(never, tmp_path, base_params), params)
  assert rows(tmp_path) == rows(whole[0])
  assert samples(tmp_path) == samples(whole[0])


# --- interruptions


@pytest.mark.parametrize(
  'every, call, kill',
  [
    (1, 5, False),  # in the middle of a buffer, saved just before
    (2, 6, True),  # an update after the checkpoint is done again
    (3, 5, False),  # saved at the end of a buffer
    (4, 3, True),
  ],
)  # nothing saved: from the start
def test_resumes_to_the_bit(every, call, kill, built, base_params, whole, tmp_path):
  """Stopped before update `call`, the run ends as if it had not been.

  `kill`: the numbers that were still pending are lost.
  """
  part = vary(built, checkpoint={'every': every})
  with pytest.raises(KeyboardInterrupt):
    run(fail_at(part, call, interrupt), tmp_path, base_params, kill)
  saved = (call - 1) // every * every
  with checkpoint.open_manager(tmp_path / 'rl', 2) as manager:
    assert (manager.latest_step() or 0) == saved
  params = run(part, tmp_path, base_params)
  same(params, whole[1])
  assert rows(tmp_path) == rows(whole[0])
  assert samples(tmp_path) == samples(whole[0])


def test_resumes_from_a_rollout(built, base_params, whole, tmp_path):
  """Stopped while sampling, after validation: both are written once."""
  calls = []

  def sample(*args):
    calls.append(0)
    if len(calls) == 2:  # iteration 1 validates first
      raise KeyboardInterrupt
    return built.steps.sample(*args)

  broken = built._replace(steps=built.steps._replace(sample=sample))
  with pytest.raises(KeyboardInterrupt):
    run(broken, tmp_path, base_params)
  assert [r['step'] for r in rows(tmp_path)['eval']] == [0, 1]
  same(run(built, tmp_path, base_params), whole[1])
  assert rows(tmp_path) == rows(whole[0])
  assert samples(tmp_path) == samples(whole[0])


def test_supervised_training_resumes_to_the_bit(built, base_params, tmp_path):
  """Stopped before its last step; afterwards the result is only read."""
  calls = []

  def step(*args):
    calls.append(0)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return built.steps.sft(*args)

  broken = built._replace(steps=built.steps._replace(sft=step))
  with metrics.Writer(tmp_path) as writer:
    with pytest.raises(KeyboardInterrupt):
      sft.run(broken, str(tmp_path), writer)
  for _ in range(2):
    calls.clear()
    with metrics.Writer(tmp_path) as writer:
      params, _ = sft.run(broken, str(tmp_path), writer)
    same(mesh.fetch(params), mesh.fetch(base_params))
    assert [r['step'] for r in rows(tmp_path)['sft']] == [1, 2, 3]
  assert not calls  # the second time no step was taken


# --- the next buffer sampled ahead


@pytest.fixture(scope='module')
def early(built):
  """Three iterations with overlap; saved at the very end only."""
  return vary(
    built, train={'overlap': True, 'iterations': 3}, checkpoint={'every': 100}
  )


@pytest.fixture(scope='module')
def ahead(early, base_params, tmp_path_factory):
  """(workdir, final parameters) of `early`, not interrupted."""
  workdir = tmp_path_factory.mktemp('ahead')
  return workdir, run(early, workdir, base_params)


def same_files(workdir, other):
  """Equal lines in an equal order, but for what the clock says."""
  assert rows(workdir) == rows(other)
  assert samples(workdir) == samples(other)
  order = [
    [(r['phase'], r['step']) for r in metrics.read(folder)]
    for folder in (workdir, other)
  ]
  assert order[0] == order[1]


def watched(built, watch):
  """`built` whose steps and rewards are preceded by watch(name, args)."""

  def on(name, call):
    def watching(*args):
      watch(name, args)
      return call(*args)

    return watching

  steps = {
    name: on(name, getattr(built.steps, name))
    for name in ('sample', 'score', 'pack', 'update')
  }
  return built._replace(
    steps=built.steps._replace(**steps),
    task=built.task._replace(reward=on('reward', built.task.reward)),
  )


def test_compilations_are_counted(whole, ahead):
  """The first buffers compile; once all has been done, nothing is compiled."""
  counts = [
    [r['compilations'] for r in metrics.read(run[0]) if r['phase'] == 'rl']
    for run in (whole, ahead)
  ]
  assert counts[0][0] > 0 and counts[1][-1] == 0, counts


def test_policy_age(whole, ahead):
  """Updates behind: none without overlap, a buffer's with it, first none."""
  age = lambda run: [r['policy_age'] for r in rows(run[0])['rl']]
  assert age(whole) == [0, 0]
  assert age(ahead) == [0, INNER, INNER]
  # Until a buffer sampled ahead is used, the two runs are the same.
  for phase, count in (('rl', 1), ('eval', 2), ('update', INNER)):
    assert rows(ahead[0])[phase][:count] == rows(whole[0])[phase][:count]
  assert rows(ahead[0])['update'][INNER] != rows(whole[0])['update'][INNER]
  assert [s['iteration'] for s in samples(ahead[0])] == [0, 0, 1, 1, 2, 2]


def test_buffer_ahead_is_of_the_policy_before_the_updates(
  built, early, base_params, ahead, tmp_path
):
  """Its completions and its log-probs: replayed, from the base on."""
  packed, batches = [], []

  def watch(name, args):
    if name == 'pack':
      packed.append(args)
    if name == 'update':
      batches.append(args[2])

  params = run(watched(early, watch), tmp_path, base_params)
  same(params, ahead[1])
  problems = build.problems(built, 'train')
  state, scores = built.steps.start(base_params), []
  for it, (rollouts, completion, row, _, got) in enumerate(packed):
    prompts = data.prompts_at(problems, it, 2, 0)
    out, mask = built.steps.sample(
      state.trainable,
      np.repeat(prompts.tokens, 4, 0),
      np.repeat(prompts.valid, 4, 0),
      row,
    )
    scores.append(
      mesh.fetch(built.steps.score(state.trainable, base_params, out, row, mask))
    )
    same(mesh.fetch((out, mask)), mesh.fetch((rollouts, completion)))
    same(scores[it], mesh.fetch(got))
    for inner in range(INNER) if it else ():  # buffer 1 was before any update
      state, _ = built.steps.update(
        state, base_params, batches[(it - 1) * INNER], inner
      )
  # The control: a buffer later its log-probs are others.
  now = mesh.fetch(built.steps.score(state.trainable, base_params, out, row, mask))
  assert not np.array_equal(now['old'], scores[-1]['old'])
  for inner in range(INNER):
    state, _ = built.steps.update(state, base_params, batches[-1], inner)
  same(mesh.fetch(state.trainable), params)


def test_grading_ahead_waits_for_no_update(early, base_params, tmp_path, monkeypatch):
  """All updates of a buffer are under way before the next one is graded."""
  events, late = [], metrics.Writer.late
  note = lambda name, _=None: events.append(name)

  def noted(*args):  # the numbers of an update are fetched
    events.append('late')
    return late(*args)

  monkeypatch.setattr(metrics.Writer, 'late', noted)
  quiet = vary(early, eval={'every': 0}, train={'iterations': 2})
  run(watched(quiet, note), tmp_path, base_params)
  graded = ['reward'] * 8
  expected = (
    ['sample', 'score', *graded, 'pack', 'sample', 'score']
    + ['update'] * INNER
    + [*graded, 'pack']
    + ['late'] * INNER
    + ['update', 'late'] * INNER
  )
  assert events[: len(expected)] == expected  # then the last validation


@pytest.mark.parametrize(
  'every, call, kill',
  [
    *((place, place + 1, place % 2 == 0) for place in range(1, 9)),
    (2, 8, True),  # an update after the checkpoint is done again
    (5, 9, False),  # a buffer after it, too
    (100, 5, True),
  ],
)  # nothing saved: from the start
def test_overlap_resumes_to_the_bit(
  every, call, kill, early, base_params, ahead, tmp_path
):
  """Saved at every place; the policy of the buffer ahead is no more."""
  part = vary(early, checkpoint={'every': every})
  with pytest.raises(KeyboardInterrupt):
    run(fail_at(part, call, interrupt), tmp_path, base_params, kill)
  same(run(part, tmp_path, base_params), ahead[1])
  same_files(tmp_path, ahead[0])


@pytest.mark.parametrize(
  'name, call', [('sample', 3), ('score', 2), ('reward', 8 * 2 + 3), ('pack', 3)]
)
def test_overlap_resumes_from_a_rollout(
  name, call, early, base_params, ahead, tmp_path
):
  """Stopped while the buffer ahead is sampled, scored, graded or packed."""
  part, calls = vary(early, checkpoint={'every': 2}), []

  def watch(here, _):
    calls.append(here)
    if calls.count(name) == call and here == name:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run(watched(part, watch), tmp_path, base_params, kill=True)
  same(run(part, tmp_path, base_params), ahead[1])
  same_files(tmp_path, ahead[0])


def test_buffer_ahead_with_longer_prompts_resumes(early, base_params, tmp_path):
  """data.bucket: it comes back in its own shape, not in that of the other."""
  problems = build.problems(early, 'train')
  count, width = problems.tokens.shape
  valid = np.pad(problems.valid, ((0, 0), (4, 0)))
  valid[data.indices_at(1, 2, count, 0), 0] = True  # those of iteration 1
  longer = problems._replace(
    tokens=np.pad(problems.tokens, ((0, 0), (4, 0)), constant_values=9), valid=valid
  )
  part = vary(
    early, data={'bucket': 1}, checkpoint={'every': 2}, train={'iterations': 2}
  )
  part = part._replace(encoded={**part.encoded, 'train': longer})
  assert [resume.shapes_at(part, longer, it).tokens.shape[1] for it in (0, 1)] == [
    width + 16,
    width + 4 + 16,
  ]
  once = run(part, tmp_path / 'once', base_params)
  with pytest.raises(KeyboardInterrupt):
    run(fail_at(part, 3, interrupt), tmp_path / 'twice', base_params)
  same(run(part, tmp_path / 'twice', base_params), once)
  same_files(tmp_path / 'twice', tmp_path / 'once')


@pytest.mark.parametrize('every', [1, 100])
def test_poisoned_update_with_overlap(every, early, base_params, ahead, tmp_path):
  """The error and the batch are those of the update, not of a later one."""
  part = vary(early, checkpoint={'every': every})
  poison = lambda batch: batch._replace(weight=batch.weight * np.nan)
  with pytest.raises(FloatingPointError, match='not finite at update 5:'):
    run(fail_at(part, 5, poison), tmp_path, base_params)
  with np.load(tmp_path / 'failed' / 'update_5.npz') as failed:
    assert failed['row'].tolist() == list(range(8, 16))
  same(run(part, tmp_path, base_params), ahead[1])
  same_files(tmp_path, ahead[0])


# --- asked to stop, and hanging


@pytest.mark.parametrize(
  'name, call, saved',
  [
    ('update', 2, 2),  # within a buffer
    ('update', 3, 3),  # at the end of one: it is not validated any more
    ('reward', 30 + 3, 4),  # while a buffer is graded: after its first update
    ('update', 6, 6),  # the last one
    ('reward', 38 + 3, 6),
  ],
)  # the last validation: nothing is left to save
def test_sigterm_saves_and_resumes_to_the_bit(
  name, call, saved, built, base_params, whole, tmp_path
):
  """The exit code says so, the handler is put back, the next start goes on."""
  before, calls = signal.getsignal(signal.SIGTERM), []

  def watch(here, _):
    calls.append(here)
    if here == name and calls.count(name) == call:
      os.kill(os.getpid(), signal.SIGTERM)

  part = vary(built, checkpoint={'every': 100})
  with pytest.raises(SystemExit) as info:
    run(watched(part, watch), tmp_path, base_params)
  assert info.value.code == guard.PREEMPTED == 75
  assert signal.getsignal(signal.SIGTERM) is before
  assert saved_steps(tmp_path) == [saved]
  assert calls.count('update') == saved
  same(run(part, tmp_path, base_params), whole[1])
  same_files(tmp_path, whole[0])


def test_sigterm_before_the_best_validation(built, base_params, tmp_path, monkeypatch):
  """The next start validates what was saved, and writes down that it is the
  best, though it has nothing else to save."""

  def terminate(batch):
    os.kill(os.getpid(), signal.SIGTERM)
    return batch

  monkeypatch.setattr(evaluate, 'accuracy', scored(built, 0.1, 0.2))
  with pytest.raises(SystemExit, match='75'):
    run(fail_at(built, 6, terminate), tmp_path, base_params)
  assert meta_of(tmp_path, 6)['best'] == {'step': 3, 'accuracy': 0.2}
  monkeypatch.setattr(evaluate, 'accuracy', scored(built, 0.9))
  final = run(built, tmp_path, base_params)
  assert meta_of(tmp_path, 6)['best'] == {'step': 6, 'accuracy': 0.9}
  same(mesh.fetch(resume.latest(built, tmp_path, base_params, best=True)), final)


def test_sigterm_with_overlap(early, base_params, ahead, tmp_path):
  """The buffer that is sampled ahead is graded and saved, too."""

  def terminate(batch):
    os.kill(os.getpid(), signal.SIGTERM)
    return batch

  with pytest.raises(SystemExit, match='75'):
    run(fail_at(early, 4, terminate), tmp_path, base_params)
  assert saved_steps(tmp_path) == [4]
  same(run(early, tmp_path, base_params), ahead[1])
  same_files(tmp_path, ahead[0])


def test_sigterm_in_supervised_training(built, base_params, tmp_path):
  calls = []

  def step(*args):
    calls.append(0)
    if len(calls) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return built.steps.sft(*args)

  broken = vary(built, checkpoint={'every': 100})
  broken = broken._replace(steps=built.steps._replace(sft=step))
  with metrics.Writer(tmp_path) as writer:
    with pytest.raises(SystemExit, match='75'):
      sft.run(broken, str(tmp_path), writer)
    alone = functools.partial(guard.alone, str(tmp_path))
    with guard.alone(str(tmp_path)):  # another's: they would both save
      with pytest.raises(ValueError, match='another process is training'):
        sft.run(broken, str(tmp_path), writer, alone=alone)
    params, _ = sft.run(broken, str(tmp_path), writer, alone=alone)
    with guard.alone(str(tmp_path)):  # all is trained: it is only read
      sft.run(broken, str(tmp_path), writer, alone=alone)
  assert len(calls) == 3
  same(mesh.fetch(params), mesh.fetch(base_params))


def test_watchdog_is_told_of_every_phase(early, base_params, tmp_path, monkeypatch):
  """The last beat before each part that may hang names it, and the update."""
  told, seen = [], []
  beat = lambda phase, step: told.append((phase, step))

  def note(name, _=None):
    seen.append((name, *told[-1]))

  def noted(name, call):
    def noting(*args, **options):
      note(name)
      return call(*args, **options)

    return noting

  for module, name in (
    (data, 'prompts_at'),
    (checkpoint, 'save'),
    (checkpoint, 'restore'),
  ):
    monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
  part = watched(vary(early, train={'iterations': 2}, checkpoint={'every': 2}), note)
  with metrics.Writer(tmp_path) as writer:
    train.run(part, str(tmp_path), writer, base_params, beat)
  found = {name: {phase for n, phase, _ in seen if n == name} for name, *_ in seen}
  assert found == {
    'restore': {'checkpoint'},
    'save': {'checkpoint'},
    'prompts_at': {'data'},
    'sample': {'rollout'},
    'score': {'rollout'},
    'pack': {'rollout'},
    'reward': {'reward', 'evaluate'},
    'update': {'update'},
  }
  assert [step for n, _, step in seen if n == 'update'] == list(range(1, 7))
  assert [step for n, _, step in seen if n == 'save'] == [2, 4, 6]


# --- the best, and damage


def scored(built, *accuracies):
  """`built` that validates with these, one after the other."""
  left = list(accuracies)

  def accuracy(*_):
    return {'accuracy': left.pop(0), 'reward': 0.0}, []

  return accuracy


def saved_steps(workdir):
  return sorted(int(p.name) for p in (workdir / 'rl').iterdir())


def meta_of(workdir, step):
  return json.loads((workdir / 'rl' / str(step) / 'meta' / 'metadata').read_text())


@pytest.mark.parametrize('every', [1, 100])
def test_best_is_kept_and_found(every, built, base_params, tmp_path, monkeypatch):
  """Saved where no save was due, kept when the latest have moved on, and
  still known after a kill."""
  part = vary(built, train={'iterations': 5}, checkpoint={'every': every, 'keep': 1})
  seen = {}

  def watch(name, args):  # the policy after iteration 1: it samples for 2
    if name == 'sample':
      seen[len(seen)] = mesh.fetch(args[0])

  part = watched(part, watch)
  monkeypatch.setattr(
    evaluate, 'accuracy', scored(built, 0.1, 0.1, 0.7, 0.7, 0.3, 0.3, 0.2)
  )
  with pytest.raises(KeyboardInterrupt):
    run(fail_at(part, 4 * INNER, interrupt), tmp_path, base_params, kill=True)
  assert saved_steps(tmp_path) == ([6, 11] if every == 1 else [6])
  # Every 1: up to validation 4 is written, the kill is in iteration 3.
  monkeypatch.setattr(
    evaluate,
    'accuracy',
    scored(built, *([0.2, 0.3] if every == 1 else [0.7, 0.2, 0.2, 0.3])),
  )
  run(part, tmp_path, base_params)
  assert saved_steps(tmp_path) == [6, 15]
  assert meta_of(tmp_path, 15)['best'] == {'step': 6, 'accuracy': 0.7}
  top = mesh.fetch(resume.latest(part, tmp_path, base_params, best=True))
  same(top, seen[2])
  last = mesh.fetch(resume.latest(part, tmp_path, base_params))
  assert not np.array_equal(jax.tree.leaves(top)[0], jax.tree.leaves(last)[0])


def test_best_may_be_the_start(built, base_params, tmp_path, monkeypatch):
  """Nothing validates better: the best is what training started from."""
  monkeypatch.setattr(evaluate, 'accuracy', scored(built, 0.5, 0.5, 0.1))
  run(built, tmp_path, base_params)
  assert meta_of(tmp_path, 6)['best'] == {'step': 0, 'accuracy': 0.5}
  same(
    mesh.fetch(resume.latest(built, tmp_path, base_params, best=True)),
    mesh.fetch(base_params),
  )


@pytest.mark.parametrize('minutes, steps', [(0.0, [6]), (1e-9, [1, 2, 3, 4, 5])])
def test_saves_by_time(minutes, steps, built, base_params, tmp_path):
  """checkpoint.every_minutes, where the number of updates would not."""
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
  """Writes the checkpoint anew, whole, with other arrays or another meta."""
  folder, at = step.parent, int(step.name)
  with ocp.CheckpointManager(folder) as manager:
    got = manager.restore(
      at,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(),
        batch=ocp.args.StandardRestore(),
        meta=ocp.args.JsonRestore(),
      ),
    )
  shutil.rmtree(step)
  with ocp.CheckpointManager(folder) as manager:
    manager.save(
      at,
      force=True,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(change(got.state)),
        batch=ocp.args.StandardSave(got.batch),
        meta=ocp.args.JsonSave(meta(got.meta)),
      ),
    )


def wider(state):
  kernel = state['trainable']['params']['embedding']
  state['trainable']['params']['embedding'] = np.zeros(
    (kernel.shape[0] + 8, *kernel.shape[1:]), np.float32
  )
  return state


def one_bit(state):
  """What a disk may do in silence: Orbax reads it without a word."""
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
  """A run that was killed with the checkpoints 3 and 4."""
  workdir = tmp_path_factory.mktemp('stopped')
  with pytest.raises(KeyboardInterrupt):
    run(fail_at(built, 5, interrupt), workdir, base_params, kill=True)
  assert saved_steps(workdir) == [3, 4]
  return workdir


@pytest.mark.parametrize('kind', DAMAGE)
def test_damaged_checkpoint_is_skipped(
  kind, built, base_params, whole, stopped, tmp_path, monkeypatch
):
  """A warning that names it, the one before is used, and it stays on disk;
  the run ends as if nothing had happened."""
  workdir, said = tmp_path / 'run', []
  shutil.copytree(stopped, workdir)
  damage, words = DAMAGE[kind]
  damage(workdir / 'rl' / '4')
  monkeypatch.setattr(
    checkpoint.logging, 'warning', lambda text, *args: said.append(text % args)
  )
  same(run(built, workdir, base_params), whole[1])
  assert rows(workdir) == rows(whole[0])
  said = [text for text in said if 'cannot be used' in text]  # Orbax has more
  assert len(said) == 1 and re.search(f'rl/4 cannot .*({words})', said[0]), said
  assert [p.name[:2] for p in (workdir / 'rl.damaged').iterdir()] == ['4-']


@pytest.mark.parametrize('kind', DAMAGE)
def test_nothing_but_damage_is_an_error(kind, built, base_params, stopped, tmp_path):
  """It lists each with its fault and what to do; nothing is begun anew."""
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


def test_lost_checkpoints_are_not_lost_silently(
  built, base_params, whole, stopped, tmp_path, monkeypatch
):
  """No checkpoint left, but metrics: a warning, then from the start."""
  workdir, said = tmp_path / 'run', []
  shutil.copytree(stopped, workdir)
  shutil.rmtree(workdir / 'rl')
  monkeypatch.setattr(
    train.logging, 'warning', lambda text, *args: said.append(text % args)
  )
  same(run(built, workdir, base_params), whole[1])
  assert len(said) == 1 and 'from the start, and the 4 updates' in said[0]
  assert rows(workdir) == rows(whole[0])


@pytest.mark.smoke
def test_digest_sees_every_bit():
  """One bit of any element, two elements swapped, a leaf moved: all differ;
  the mesh that holds the arrays does not matter."""
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
  """Saved by eight replicas, read where weights are split four ways."""
  c = tiny()
  c.mesh.fsdp = 4
  other = build.build(c)

  def restored(part):
    state = checkpoint.abstract(part.steps.start(part.steps.init()))
    batch = resume.shapes_at(part, build.problems(part, 'train'), 1)
    with checkpoint.open_manager(stopped / 'rl', 2) as manager:
      found = checkpoint.restore(
        manager,
        state,
        lambda step: (batch, None),
        part.steps.digest,
        check.refuse(part.config, check.FREE),
      )
    for got, want in zip(
      jax.tree.leaves(found[0]), jax.tree.leaves(state), strict=True
    ):
      assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
    return found[:2]

  found = restored(other)
  same(mesh.fetch(restored(built)), mesh.fetch(found))
  kernels = found[0].trainable['params']['layers']['q']['kernel']
  assert not kernels.sharding.is_fully_replicated


# --- what is not finite


def test_poisoned_update_stops_the_run(built, base_params, whole, tmp_path):
  """The error names the update; batch kept, last checkpoint intact."""
  poison = lambda batch: batch._replace(weight=batch.weight * np.nan)  # noqa: E731
  with pytest.raises(FloatingPointError, match='update 5:.*optim.lr') as info:
    run(fail_at(built, 5, poison), tmp_path, base_params)
  path = tmp_path / 'failed' / 'update_5.npz'
  assert str(path) in str(info.value)
  with np.load(path) as failed:
    assert failed['tokens'].shape[0] == 8
    assert set(failed) == set(build.TrainBatch._fields) - {'extra'}
  with checkpoint.open_manager(tmp_path / 'rl', 2) as manager:
    assert manager.latest_step() == 4
  # Going on from there without the poison ends as the whole run did.
  same(run(built, tmp_path, base_params), whole[1])
  assert rows(tmp_path) == rows(whole[0])


def test_poisoned_supervised_step(built, tmp_path):
  """Supervised training stops in the same way, a step later, not at a save."""
  calls = []

  def step(state, *args):
    calls.append(0)
    state, numbers = built.steps.sft(state, *args)
    return state, {**numbers, 'finite': float(len(calls) > 1)}

  broken = vary(built, checkpoint={'every': 100})
  broken = broken._replace(steps=built.steps._replace(sft=step))
  with metrics.Writer(tmp_path) as writer:
    with pytest.raises(FloatingPointError, match='step 1: .*sft.lr'):
      sft.run(broken, str(tmp_path), writer)
  assert len(calls) == 2


def test_reward_that_is_not_finite(built, base_params, tmp_path):
  """A nan reward is an error with the completion, not a silent weight."""
  task = built.task._replace(reward=lambda *_: {'broken': float('nan')})
  with pytest.raises(ValueError, match="'broken': nan.*not finite"):
    run(vary(built, eval={'every': 0})._replace(task=task), tmp_path, base_params)


# --- a collapse


def faster(built, after=2 * INNER):
  """`built` whose learning rate is x 100 from that update on."""

  def update(state, frozen, batch, inner, scale):
    if int(state.step) >= after:
      scale = 100 * scale
    return built.steps.update(state, frozen, batch, inner, scale)

  return built._replace(steps=built.steps._replace(update=update))


def near(base_params):
  """In place of the validation: better the farther from the base, while it
  is in sight. So the best is the last one before the collapse."""

  def accuracy(built, params, *_):
    far = jax.tree.map(
      lambda a, b: np.abs(a - b).max(), mesh.fetch(params), mesh.fetch(base_params)
    )
    far = float(max(jax.tree.leaves(far)))
    return {'accuracy': far if far < 0.02 else 0.0, 'reward': 0.0}, []

  return accuracy


def ill(built, **health):
  """Six iterations whose policy leaves the reference in the third."""
  health = dict(action='rollback', patience=2, kl=5.0, lr_factor=0.01) | health
  return vary(built, train={'iterations': 6}, health=health)


def health_lines(workdir):
  path = workdir / 'health.jsonl'
  return (
    [json.loads(line) for line in path.read_text().splitlines()]
    if path.exists()
    else []
  )


@pytest.fixture(scope='module')
def rolled(built, base_params, tmp_path_factory):
  """(workdir, final parameters) of a run that collapses and is rolled back."""
  workdir = tmp_path_factory.mktemp('rolled')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluate, 'accuracy', near(base_params))
    return workdir, run(faster(ill(built)), workdir, base_params)


def test_collapse_is_rolled_back(rolled, built, base_params, tmp_path, monkeypatch):
  """Found two buffers after it began; from the best on with the smaller rate:
  what it then does is what that rate does from the beginning."""
  workdir, params = rolled
  (line,) = health_lines(workdir)
  values = line.pop('values')
  assert line == {
    'iteration': 4,
    'rule': 'kl',
    'threshold': 5.0,
    'action': 'rollback',
    'to_update': 6,
    'lr_scale': 0.01,
  }
  assert len(values) == 2 and min(values) > 5
  found = rows(workdir)
  assert [r['lr_scale'] for r in found['rl']] == [1, 1] + [0.01] * 4
  assert [r['step'] for r in found['rl']] == list(range(6))
  assert [r['step'] for r in found['update']] == list(range(1, 19))
  assert max(r['kl_ref'] for r in found['rl']) < 1
  assert meta_of(workdir, 18)['rollbacks'] == [line | {'values': values}]
  # The checkpoints of the collapse are there to be looked at.
  aside = {p.name.split('-')[0] for p in (workdir / 'rl.damaged').iterdir()}
  assert '15' in aside and not (workdir / 'rl.next').exists()
  monkeypatch.setattr(evaluate, 'accuracy', near(base_params))
  plain = vary(built, train={'iterations': 6}, eval={'every': 1})
  wanted = run(plain, tmp_path, base_params)  # 100 * 0.01 = 1
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, wanted)


def kill_at(monkeypatch, module, name, call):
  """Kills the run before the call-th call of a function, once."""
  real, calls = getattr(module, name), []

  def counted(*args, **options):
    calls.append(0)
    if len(calls) == call:
      monkeypatch.setattr(module, name, real)
      raise KeyboardInterrupt
    return real(*args, **options)

  monkeypatch.setattr(module, name, counted)


@pytest.mark.parametrize(
  'every, how',
  [
    (1, (checkpoint, 'settle', 2)),  # the new one is whole, the old ones there
    (1, (shutil, 'move', 4)),  # they are gone, the new one is not there
    (100, (train, 'loop', 2)),
  ],  # before the first update after it
  ids=lambda how: f'{how[1]} {how[2]}' if isinstance(how, tuple) else how,
)
def test_rollback_resumes_to_the_bit(
  every, how, built, base_params, rolled, tmp_path, monkeypatch
):
  """Killed within the rollback, or after it."""
  monkeypatch.setattr(evaluate, 'accuracy', near(base_params))
  part = faster(vary(ill(built), checkpoint={'every': every}))
  kill_at(monkeypatch, *how)
  with pytest.raises(KeyboardInterrupt):
    run(part, tmp_path, base_params, kill=True)
  same(run(part, tmp_path, base_params), rolled[1])
  same_files(tmp_path, rolled[0])
  assert health_lines(tmp_path) == health_lines(rolled[0])


def test_rollback_with_overlap(early, base_params, tmp_path, monkeypatch):
  """The buffer sampled ahead of the best comes back with it."""
  monkeypatch.setattr(evaluate, 'accuracy', near(base_params))
  part = faster(ill(early))
  once = run(part, tmp_path / 'once', base_params)
  (line,) = health_lines(tmp_path / 'once')
  assert (line['rule'], line['to_update']) == ('kl', 6)
  taken = (line['iteration'] + 1) * INNER
  with pytest.raises(KeyboardInterrupt):
    run(fail_at(part, taken + 2, interrupt), tmp_path / 'twice', base_params, kill=True)
  same(run(part, tmp_path / 'twice', base_params), once)
  same_files(tmp_path / 'twice', tmp_path / 'once')


def test_rollback_to_the_start(built, base_params, tmp_path):
  """Nothing has validated: a checkpoint of update 0 has the smaller rate."""
  part = vary(
    ill(faster(built, 0)),
    eval={'every': 0},
    train={'iterations': 3},
    checkpoint={'keep': 99},
  )
  same(
    run(part, tmp_path / 'once', base_params),
    run(
      vary(built, eval={'every': 0}, train={'iterations': 3}),
      tmp_path / 'plain',
      base_params,
    ),
  )
  (line,) = health_lines(tmp_path / 'once')
  assert (line['iteration'], line['to_update']) == (2, 0)
  assert meta_of(tmp_path / 'once', 0)['lr_scale'] == 0.01
  workdir = tmp_path / 'twice'
  with pytest.raises(KeyboardInterrupt):  # with nothing but update 0 saved
    run(
      fail_at(vary(part, checkpoint={'every': 100}), 10, interrupt),
      workdir,
      base_params,
      kill=True,
    )
  assert saved_steps(workdir) == [0]
  part = vary(part, checkpoint={'every': 100})
  same(run(part, workdir, base_params), run(part, workdir, base_params))
  same_files(workdir, tmp_path / 'once')


def test_no_rollback_is_left(built, base_params, tmp_path, monkeypatch, capsys):
  """One that does not help, then the run stops, and so does the next start;
  with another action it goes on from where it stopped."""
  monkeypatch.setattr(evaluate, 'accuracy', near(base_params))
  part, calls = ill(faster(built), rollbacks=1, lr_factor=1.0), []
  for _ in range(2):
    with pytest.raises(SystemExit) as info:
      run(watched(part, lambda name, _: calls.append(name)), tmp_path, base_params)
    assert info.value.code == guard.COLLAPSED == 77
    said = capsys.readouterr().err
    assert 'error: iteration 4, after 1 rollbacks: kl_ref is above' in said
    assert calls.count('update') == 15 + 9  # none at the second start
    assert [(r['action'], r['iteration']) for r in health_lines(tmp_path)] == [
      ('rollback', 4),
      ('stop', 4),
    ]
    assert saved_steps(tmp_path)[-1] == 15
  on = vary(part, health={'action': 'none'})
  run(on, tmp_path, base_params)
  assert rows(tmp_path)['rl'][-1]['step'] == 5


def test_stop(built, base_params, tmp_path, monkeypatch, capsys):
  """Saved where it stopped, with a sentence and a line."""
  monkeypatch.setattr(evaluate, 'accuracy', near(base_params))
  part = vary(ill(faster(built), action='stop'), checkpoint={'every': 100})
  with pytest.raises(SystemExit, match='77'):
    run(part, tmp_path, base_params)
  said = capsys.readouterr().err.splitlines()
  assert [line[:26] for line in said if 'error' in line] == [
    'error: iteration 4: kl_ref'
  ]
  (line,) = health_lines(tmp_path)
  assert (line['action'], line['rule']) == ('stop', 'kl')
  assert saved_steps(tmp_path) == [6, 15]  # the best, and all until now


def test_warning(built, base_params, tmp_path, monkeypatch):
  """Said once while it lasts, also by a run that is resumed; the metric
  counts the rules."""
  said = []
  monkeypatch.setattr(
    train.logging, 'warning', lambda text, *args: said.append(text % args)
  )
  part = vary(ill(faster(built), action='warn'), eval={'every': 0})
  once = run(part, tmp_path / 'once', base_params)
  (line,) = health_lines(tmp_path / 'once')
  assert (line['iteration'], line['action']) == (4, 'warn')
  assert len(said) == 1 and said[0].startswith('iteration 4: kl_ref is above')
  assert [r['ill'] for r in rows(tmp_path / 'once')['rl']] == [0] * 4 + [1] * 2
  workdir = tmp_path / 'twice'
  with pytest.raises(KeyboardInterrupt):
    run(fail_at(part, 17, interrupt), workdir, base_params, kill=True)
  same(run(part, workdir, base_params), once)
  same_files(workdir, tmp_path / 'once')
  assert health_lines(workdir) == [line]


@pytest.mark.parametrize('name', ['built', 'early'])
def test_nan_is_rolled_back(name, base_params, tmp_path, monkeypatch, request):
  """At once; the batch is kept, the run ends as one with the smaller rate."""
  monkeypatch.setattr(evaluate, 'accuracy', near(base_params))
  part = vary(
    request.getfixturevalue(name),
    train={'iterations': 3},
    health={'action': 'rollback'},
    checkpoint={'every': 1},
  )
  poison = lambda batch: batch._replace(weight=batch.weight * np.nan)
  run(fail_at(part, 5, poison), tmp_path, base_params)
  (line,) = health_lines(tmp_path)
  assert line == {
    'iteration': 1,
    'rule': 'finite',
    'values': ['nan', 'nan'],
    'action': 'rollback',
    'to_update': 3,
    'lr_scale': 0.5,
  }
  assert (tmp_path / 'failed' / 'update_5.npz').exists()
  assert [r['finite'] for r in rows(tmp_path)['update']] == [1] * 9
  stop = vary(part, health={'action': 'stop'})
  with pytest.raises(SystemExit, match='77'):
    run(fail_at(stop, 5, poison), tmp_path / 'stop', base_params)


def test_rate_is_scaled_without_another_program(built, base_params):
  """At 1 nothing changes; Adam's step follows the factor, its moments do
  not."""
  c = built.config
  problems = build.problems(built, 'train')
  started = rollout.start(
    built.steps, problems, base_params, base_params, 0, prompts=2, group=4, seed=0
  )
  reward = np.arange(8, dtype=np.float32).reshape(2, 4)
  batch, _ = built.steps.pack(
    started.rollouts, started.completion, started.row, reward, started.scores
  )

  def plain(state, frozen, batch, inner):
    return step.train_step(
      state,
      frozen,
      batch,
      rng.key_for(c.seed, 'mask'),
      inner,
      cfg=built.model,
      objective=built.objective,
      hp=built.hp,
      group=4,
      optimizer=optim.make_optimizer(**c.optim),
    )

  plain = build.compiled(built.mesh, plain)(
    built.steps.start(base_params), base_params, batch, np.int32(0)
  )
  scales = (), (1.0,), (0.25,), (3.0,)
  states = [built.steps.start(base_params) for _ in scales]
  build.compilations()
  new = [
    mesh.fetch(built.steps.update(state, base_params, batch, 0, *scale))
    for state, scale in zip(states, scales, strict=True)
  ]
  assert build.compilations()['compilations'] <= 1  # the update, if not yet
  # Another program, whose sums XLA may order otherwise.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7),
    new[0],
    mesh.fetch(plain),
  )
  same(new[1], new[0])
  before = mesh.fetch(base_params)
  for scale, other in zip((0.25, 3.0), new[2:], strict=True):
    same(other[0].opt_state, new[0][0].opt_state)
    jax.tree.map(
      lambda a, b, c, s=scale: np.testing.assert_allclose(
        a - c, s * (b - c), atol=1e-6
      ),
      other[0].trainable,
      new[0][0].trainable,
      before,
    )


# --- parts


@pytest.mark.smoke
def test_checkpoints(tmp_path, monkeypatch):
  """State, batch and place come back equal; the latest `keep` stay."""
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
  with checkpoint.open_manager(tmp_path, 2) as manager:
    assert checkpoint.restore(manager, checkpoint.abstract(state)) is None
    for step in (1, 2, 5):
      checkpoint.save(manager, step, state, None, {'step': step})
    got, batch, ahead, meta = checkpoint.restore(manager, checkpoint.abstract(state))
    assert batch is ahead is None and meta == {'step': 5}
    same(mesh.fetch(got), mesh.fetch(state))
    manager.wait_until_finished()
    assert sorted(manager.all_steps()) == [2, 5]
    # What says nothing of the files sets none of them aside.
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
        checkpoint.restore(manager, checkpoint.abstract(state))


@pytest.mark.smoke
def test_unmasking_metrics():
  """Forwards by how many tokens they reveal; what EOS has replaced (-1) is
  not revealed, and counts nowhere."""
  order = np.array([[0, 0, 0, 1, 2, 2], [0, 1, 3, 3, -1, -1]])
  sure = np.where(order < 0, 9.0, 0.5)
  found = rollout.unmasking_metrics(order, sure)
  shares = {name: found[f'tokens_per_forward/{name}'] for name in rollout.BINS}
  # Row 0: 3, 1, 2 tokens; row 1: 1, 1, 0, 2.
  want = {'0': 1, '1': 3, '2': 2, '3-4': 1, '5-8': 0, '9+': 0}
  assert {k: round(7 * x) for k, x in shares.items()} == want
  assert abs(found['tokens_per_step'] - 10 / 7) < 1e-12
  assert found['confidence'] == found['confidence_low'] == 0.5


@pytest.mark.smoke
def test_cut_counts_completions_without_eos():
  """At the end, before it or first: an EOS ends one; a prompt's does not."""
  tokenizer = data.char_tokenizer()
  tokens = np.full((4, 3 + 5), tokenizer.convert_tokens_to_ids('1'), np.int32)
  eos = tokenizer.eos_token_id
  tokens[0, 2] = tokens[1, 7] = tokens[2, 5] = tokens[3, 3] = eos
  mask = np.ones((4, 5), bool)
  task = TASKS['sudoku']._replace(reward=letters, grade=lambda *_: 0.0)
  steps = types.SimpleNamespace(pack=lambda *_: (None, {}))
  started = rollout.Started(
    0,
    0,
    np.zeros(2, np.int32),
    np.arange(4),
    None,
    mask,
    {},
    (tokens, np.zeros((4, 5), np.int32), np.int32(5), mask, np.ones((4, 5))),
    np.arange(4),
  )
  problems = data.Problems([{'puzzle': '1'}], tokens[:1, :3], None)
  _, numbers, _ = rollout.finish(
    steps,
    task,
    tokenizer,
    problems,
    started,
    group=2,
    protocol='strict',
    samples=1,
    weights={},
  )
  assert numbers['cut'] == 0.25


def test_evaluation_counts_every_problem_once(built, whole):
  """11 problems in batches of 8: the padding of the last does not count."""
  problems = build.problems(built, 'validation')
  params = jax.device_put(whole[1], mesh.replicated(built.mesh))
  numbers, found = evaluate.accuracy(built, params, problems)
  assert len(found) == len(problems.examples) == 11
  assert [s['example'] for s in found] == problems.examples
  grades = [built.task.grade(s['completion'], s['example'], 'strict') for s in found]
  rewards = [sum(s['reward'].values()) for s in found]
  assert numbers['accuracy'] == pytest.approx(np.mean(grades))
  assert numbers['reward'] == pytest.approx(np.mean(rewards))
  again, _ = evaluate.accuracy(built, params, problems)
  assert again == numbers
  # The last row of the run's own validation is of the same parameters.
  last = rows(whole[0])['eval'][-1]
  assert {k: last[k] for k in numbers} == numbers


def test_pmap_and_jit_sample_the_same(built, base_params):
  """sampler.parallel decides where rows are sampled, not what comes out."""
  c = tiny()
  c.sampler.parallel = 'pmap'
  other = build.build(c)
  problems = build.problems(built, 'train')
  prompts = data.prompts_at(problems, 0, 8, 0)
  args = (base_params, prompts.tokens, prompts.valid, np.arange(8, dtype=np.int32))
  one, two = (mesh.fetch(b.steps.sample(*args)) for b in (built, other))
  for name in ('tokens', 'valid', 'order', 'forwards'):
    same(getattr(one[0], name), getattr(two[0], name))
  same(one[1], two[1])
  np.testing.assert_allclose(one[0].logp, two[0].logp, rtol=1e-5, atol=1e-5)


def test_too_long_for_the_model(built):
  """Prompts and completions beyond the model's positions are refused."""
  small = built._replace(
    model=built.model.__class__(**{**vars(built.model), 'positions': 20})
  )
  with pytest.raises(ValueError, match='sampler.length = 16 exceed .* 20'):
    build.problems(small, 'train')


def test_golden(whole):
  """The loss of the last update of the tiny run."""
  assert rows(whole[0])['update'][-1]['loss'] == pytest.approx(0.413900, rel=1e-3)
