"""A whole run of seconds, for the tests of the loop: config, fixtures and helpers.

Test modules load it by `pytest_plugins`, so that all of them share its runs. They also
import from it before pytest can rewrite it: PYTEST_DONT_REWRITE avoids the warning.
"""

import json
import os
import signal

import jax
import numpy as np
import pytest

from configs import base
from dmpo_jax import build, mesh, metrics, train

INNER, ITERATIONS = 3, 2


def tiny():
  """A config of eight rows, for the eight devices of the tests."""
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
  """A reward that an untrained model earns; sudoku's would always be zero."""
  return {'letters': sum(map(str.isalpha, text)) / 16}


# --- runs


def run_sft(built, workdir, **session):
  """Trains the base model; returns its parameters."""
  with metrics.Writer(workdir) as writer:
    given = train.Session(built, str(workdir), writer, **session)
    return train.run('sft', given)[0]


def run(built, workdir, base_params, kill=False, phase='rl', **session):
  """Runs RL, or another phase; `kill` leaves the writer as a killed process would."""
  writer = metrics.Writer(workdir)
  given = train.Session(built, str(workdir), writer, **session)
  try:
    params, _ = train.run(phase, given, base_params)
  except BaseException:
    if not kill:
      writer.close()
    raise
  writer.close()
  return mesh.fetch(params)


@pytest.fixture(scope='module')
def plain_saves():
  """Switches off JAX's check for reused keys, which goes through every slice.

  Orbax takes hundreds of slices in a save: half of the time of these tests.
  """
  jax.config.update('jax_debug_key_reuse', False)
  yield
  jax.config.update('jax_debug_key_reuse', True)


@pytest.fixture(scope='session')
def built():
  """The compiled parts; `vary` changes what the loop alone reads."""
  parts = build.build(tiny())
  return parts._replace(task=parts.task._replace(reward=letters))


@pytest.fixture(scope='session')
def base_params(built, tmp_path_factory):
  """Parameters of the base model, after three supervised steps."""
  return run_sft(built, tmp_path_factory.mktemp('base'))


@pytest.fixture(scope='session')
def whole(built, base_params, tmp_path_factory):
  """(workdir, final parameters) of a run that nothing interrupts."""
  workdir = tmp_path_factory.mktemp('whole')
  return workdir, run(built, workdir, base_params)


@pytest.fixture(scope='session')
def early(built):
  """Three iterations with overlap, which save at the very end only."""
  return vary(
    built, train={'overlap': True, 'iterations': 3}, checkpoint={'every': 100}
  )


@pytest.fixture(scope='session')
def ahead(early, base_params, tmp_path_factory):
  """(workdir, final parameters) of `early`, not interrupted."""
  workdir = tmp_path_factory.mktemp('ahead')
  return workdir, run(early, workdir, base_params)


# --- changes of a run


def vary(built, **sections):
  """Returns the same compiled parts under a config that differs for the loop."""
  c = built.config.copy_and_resolve_references()
  for section, fields in sections.items():
    c[section].update(fields)
  return built._replace(config=c)


def fail_at(built, call, how):
  """Returns `built` whose `call`-th update is preceded by how(batch) -> batch."""
  calls = []

  def update(state, frozen, batch, inner):
    calls.append(inner)
    if len(calls) == call:
      batch = how(batch)
    return built.steps.update(state, frozen, batch, inner)

  return built._replace(steps=built.steps._replace(update=update))


def fail_sft_at(built, call, how):
  """Returns (`built` whose `call`-th supervised step is preceded by how(), calls)."""
  calls = []

  def step(*args):
    calls.append(0)
    if len(calls) == call:
      how()
    return built.steps.sft(*args)

  return built._replace(steps=built.steps._replace(sft=step)), calls


def watched(built, watch):
  """Returns `built` whose steps and rewards are preceded by watch(name, args)."""

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


def stop_at(name, call, how):
  """Returns a watch for `watched` that calls how() at the call-th part of a name."""
  calls = []

  def watch(here, _):
    calls.append(here)
    if here == name and calls.count(name) == call:
      how()

  watch.calls = calls
  return watch


def interrupt(batch=None):
  raise KeyboardInterrupt


def terminate(batch=None):
  os.kill(os.getpid(), signal.SIGTERM)
  return batch


def poison(batch):
  return batch._replace(weight=batch.weight * np.nan)


def scored(*accuracies):
  """Returns a stand-in for evaluate.accuracy that gives these, one after the other."""
  left = list(accuracies)
  return lambda *_: ({'accuracy': left.pop(0), 'reward': 0.0}, [])


# --- what a run leaves behind


def same(a, b):
  """Asserts that two trees are equal to the bit."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def rows(workdir):
  """Returns {phase: rows in order} without what the clock and the compiler say."""
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


def same_files(workdir, other):
  """Asserts equal lines in an equal order, but for what the clock says."""
  assert rows(workdir) == rows(other)
  assert samples(workdir) == samples(other)
  order = [
    [(r['phase'], r['step']) for r in metrics.read(folder)]
    for folder in (workdir, other)
  ]
  assert order[0] == order[1]


def same_run(params, workdir, other):
  """Asserts that a run ended as `other`, a pair (workdir, parameters)."""
  same(params, other[1])
  same_files(workdir, other[0])


def health_lines(workdir):
  path = workdir / 'health.jsonl'
  return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def saved_steps(workdir):
  return sorted(int(p.name) for p in (workdir / 'rl').iterdir())
