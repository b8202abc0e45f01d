"""Targets beyond one reference: products of several, and one that moves."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiny_run import INNER, fail_at, interrupt, letters, rows, run, run_sft, same

from configs import base
from dmpo_jax import (
  build,
  check,
  export,
  logprob,
  mesh,
  model,
  optim,
  sampler,
  step,
  weights,
)
from dmpo_jax.objectives import dmpo

L, ROWS = 4, 4


# --- the product


@pytest.mark.parametrize('estimator', ['elbo', 'trajectory'])
def test_log_p_ref_is_the_weighted_sum(estimator, tiny, weights_of):
  """Of the base and of another model, under the same masks or states; p_old
  stays what it was."""
  cfg = tiny
  old = weights_of(cfg)
  ref, other = (jax.tree.map(lambda x, s=s: x * s, old) for s in (0.9, 0.7))
  hp = sampler.SampleConfig(L, L, L, 0.8, rank='max')
  how = logprob.LogprobConfig(estimator=estimator, states=2)
  prompts = jnp.asarray([[1, 2], [3, 2], [0, 4], [5, 1]])

  @jax.jit
  def score(references):
    out = sampler.generate(cfg, old, prompts, jax.random.key(3), hp)
    return step.score(
      old, ref, out, jnp.arange(ROWS), jnp.ones((ROWS, L), bool),
      jax.random.key(1), jax.random.key(2), references, cfg=cfg,
      objective=dmpo.OBJECTIVE, hp=dmpo.Config(), how=how, law=hp.law(),
      inner=1, weights=(0.25, 1.5)[:len(references)],
    )  # fmt: skip

  alone, both = score(()), score(({}, other))
  second = jax.jit(lambda: score.__wrapped__((other,)))()['ref'] / 0.25
  np.testing.assert_allclose(both['ref'], 0.25 * alone['ref'] + 1.5 * second, rtol=1e-5)
  assert np.abs(alone['ref'] - second).max() > 0.1
  same(both['old'], alone['old'])


# --- the moving reference


@pytest.mark.parametrize('mix', [1.0, 0.25])
def test_reference_follows(mix):
  """Every second update it is the parameters, or a mean with them; an update
  that was refused moves nothing."""
  optimizer = optim.make_optimizer(optim.Config(0.1, 0, clip=0.0), hold=True)
  state = step.init_state({'params': {'scale': jnp.ones(3)}}, optimizer)
  want = np.ones(3, np.float32)

  @jax.jit
  def update(state, slope):
    loss = lambda trainable, part: (
      jnp.sum(part * trainable['params']['scale'] ** 2), {})  # fmt: skip
    new, numbers = step.update(state, loss, slope[None], optimizer)
    return optim.follow(state, new, 2, mix), numbers

  for i, slope in enumerate((1.0, 1.0, np.nan, 1.0, 1.0)):
    state, _ = update(state, jnp.float32(slope))
    if i in (1, 4):  # the third was refused
      now = np.asarray(state.trainable['params']['scale'])
      want = mix * now + (1 - mix) * want
    got = optim.reference_of(state.opt_state)['params']['scale']
    np.testing.assert_allclose(got, want, rtol=1e-6)
    if mix == 1.0:
      same(np.asarray(got), want)
  assert int(state.step) == 4


def moving():
  c = tiny_run.tiny()
  c.update_from_flattened_dict({
    'lora.rank': 2, 'reference.of': ('moving',), 'reference.every': 2,
    'train.iterations': 3, 'checkpoint.every': 1, 'optim.lr': 0.05,
  })  # fmt: skip
  return c


@pytest.fixture(scope='module')
def built():
  parts = build.build(moving())
  return parts._replace(task=parts.task._replace(reward=letters))


@pytest.fixture(scope='module')
def base_params(built, tmp_path_factory):
  return run_sft(built, tmp_path_factory.mktemp('base'))


def test_a_run_with_adapters_moves_and_resumes(built, base_params, tmp_path):
  """Three updates a buffer, a copy every two: log p_ref = log p_old in the
  first and third buffer, not in the second. Stopped while it samples the
  second, whose reference is of the update before: the run ends the same."""
  params = run(built, tmp_path / 'whole', base_params)
  rl = rows(tmp_path / 'whole')['rl']
  gaps = [abs(row['logp_ref'] - row['logp_old']) for row in rl]
  assert INNER == 3 and gaps[0] == gaps[2] == 0 < 1e-4 < gaps[1]
  calls = []

  def sample(*args):
    calls.append(0)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return built.steps.sample(*args)

  broken = built._replace(steps=built.steps._replace(sample=sample))
  with pytest.raises(KeyboardInterrupt):
    run(broken, tmp_path / 'part', base_params)
  with pytest.raises(KeyboardInterrupt):  # and in the middle of a buffer
    run(fail_at(built, 2, interrupt), tmp_path / 'part', base_params)
  same(run(built, tmp_path / 'part', base_params), params)
  assert rows(tmp_path / 'part') == rows(tmp_path / 'whole')


# --- references that are read


@pytest.fixture
def read_references(tiny, weights_of, tmp_path):
  """(function of reference.of, folders): a policy with adapters of rank 2."""
  cfg = dataclasses.replace(tiny, lora_rank=2, lora_alpha=4.0)
  export.save_adapter(tmp_path / 'adapter', cfg, weights_of(cfg), 'owner/base')
  grid = mesh.make_mesh(8)

  def call(cfg=cfg, **fields):
    c = base.get_config()
    c.reference.update(fields)
    return build.make_references(c, cfg, '', grid)

  return call, tmp_path, cfg


def test_references_are_read(read_references, weights_of):
  call, folder, cfg = read_references
  assert call()() == ()
  found = call(of=('base', 'moving', str(folder / 'adapter')))()
  assert found[:2] == ({}, None)
  same(mesh.fetch(found[2]), {'lora': mesh.fetch(weights_of(cfg)['lora'])})


def checkpoint_at(folder, **changes):
  """A checkpoint of LLaDA's kind, and its ModelConfig."""
  from test_weights import CONFIGS, write

  path = str(write(folder, {**CONFIGS['llada'], **changes}))
  return path, model.ModelConfig(**weights.read_config(path))


def test_another_checkpoint(read_references, tmp_path):
  call, _, _ = read_references
  path, cfg = checkpoint_at(tmp_path / 'other')
  found = call(cfg, of=('base', path), weights=(1.0, 1.0))()
  same(mesh.fetch(found[1]), mesh.fetch(weights.read_params(path, cfg)))


def test_references_of_another_kind_are_refused(read_references, tmp_path):
  """Before anything is read, with what differs."""
  call, folder, cfg = read_references
  adapter = str(folder / 'adapter')
  with pytest.raises(ValueError, match='is an adapter: it needs lora.rank'):
    call(dataclasses.replace(cfg, lora_rank=0), of=(adapter,))
  with pytest.raises(ValueError, match='r = 2, but lora.rank = 3'):
    call(dataclasses.replace(cfg, lora_rank=3), of=(adapter,))()
  with pytest.raises(ValueError, match='is no directory'):
    call(of=('bse',))
  path, theirs = checkpoint_at(tmp_path / 'other')
  for name in ('vocab', 'layers', 'mlp'):
    ours = dataclasses.replace(theirs, **{name: getattr(theirs, name) * 2})
    with pytest.raises(ValueError, match=f'{name} = .*but the policy has'):
      call(ours, of=(path,))


@pytest.mark.parametrize('says, changes', [
  ('must hold a weight for each', {'reference.of': ('base', 'moving')}),
  ('must hold a weight for each', {
    'reference.of': (), 'reference.weights': ()}),
  ('must be > 0', {'reference.weights': (-1.0,)}),
  ('reference.mix = 0.0 must be in', {'reference.mix': 0.0}),
  ('reference.every = 0 must be >= 1', {'reference.every': 0}),
  ('lost in rounding', {
    'reference.of': ('moving',), 'reference.mix': 0.5,
    'model.param_dtype': 'bfloat16'}),
  ('fuse = True knows the base alone', {
    'reference.of': ('moving',), 'logprob.fuse': True, 'lora.rank': 2}),
  ('asks for no log p_ref', {
    'reference.of': ('moving',), 'objective.alpha': 0.0}),
])  # fmt: skip
@pytest.mark.smoke
def test_check(says, changes):
  c = base.get_config()
  c.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=says):
    check.config(c, 8)


def test_the_base_alone_changes_no_program():
  """The default asks for nothing: no tree in the optimizer's state, and the
  score program is the one without references."""
  c = base.get_config()
  state = jax.eval_shape(functools.partial(
    step.init_state, optimizer=build.optimizer_of(c)),
    {'params': {'scale': jnp.ones(3)}})  # fmt: skip
  assert 'reference' not in json.dumps(str(jax.tree.structure(state)))
