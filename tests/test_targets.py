"""References other than the base: products of several models, and a moving one."""

import dataclasses
import functools

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
  config,
  hf,
  logprob,
  mesh,
  model,
  optim,
  parts,
  sampler,
  score,
  step,
)
from dmpo_jax.objectives import OBJECTIVES, dmpo
from dmpo_jax.types import Sampled

L, ROWS = 4, 4


# --- the product


@pytest.mark.parametrize('estimator', ['elbo', 'trajectory'])
def test_log_p_ref_is_the_weighted_sum_over_references(estimator, tiny, weights_of):
  """The references share their masks or steps. log p_old does not depend on them."""
  old = weights_of(tiny)
  ref, other = (jax.tree.map(lambda x, s=s: x * s, old) for s in (0.9, 0.7))
  hp = sampler.SampleConfig(L, L, L, 0.8, rank='max')
  setup = step.Setup(
    tiny,
    dmpo.OBJECTIVE,
    dmpo.Config(),
    law=hp,
    logprob=logprob.LogprobConfig(estimator=estimator, states=2),
  )
  prompts = jnp.asarray([[1, 2], [3, 2], [0, 4], [5, 1]])

  @jax.jit
  def run(old, ref, other):
    out = sampler.generate(tiny, old, prompts, jax.random.key(3), hp)
    sampled = Sampled(out, jnp.ones((ROWS, L), bool), jnp.arange(ROWS))

    def scores(references, weights):
      who = score.policies(old, ref, references)
      keys = jax.random.key(1), jax.random.key(2)
      return score.score(
        who, sampled, *keys, dataclasses.replace(setup, weights=weights)
      )

    return (
      scores((), (1.0,)),
      scores((other,), (1.0,)),
      scores(({}, other), (0.25, 1.5)),
    )

  first, second, both = run(old, ref, other)
  want = 0.25 * first.logp_ref + 1.5 * second.logp_ref
  np.testing.assert_allclose(both.logp_ref, want, rtol=1e-5)
  assert np.abs(first.logp_ref - second.logp_ref).max() > 0.1
  same(both.logp_old, first.logp_old)


def test_losses_compare_with_the_mean_of_references(tiny, weights_of):
  """ELBOs under the loss's masks are mixed; log-probs of tokens are one reference's."""
  old = weights_of(tiny)
  base, other = (jax.tree.map(lambda x, s=s: x * s, old) for s in (0.9, 0.7))
  hp = sampler.SampleConfig(L, L, L, 0.8, rank='max')
  prompts = jnp.asarray([[1, 2], [3, 2], [0, 4], [5, 1]])

  @jax.jit
  def run(old, base, other):
    out = sampler.generate(tiny, old, prompts, jax.random.key(3), hp)
    sampled = Sampled(out, jnp.ones((ROWS, L), bool), jnp.arange(ROWS))

    def ref(name, references, frozen=base, **how):
      objective = OBJECTIVES[name]
      setup = step.Setup(tiny, objective, objective.Config(), law=hp, **how)
      who = score.policies(old, frozen, references)
      keys = jax.random.key(1), jax.random.key(2)
      return score.score(who, sampled, *keys, setup).ref

    return (
      ref('espo', ()).elbo,
      ref('espo', (other,)).elbo,
      ref('espo', ({}, other), weights=(0.25, 1.5)).elbo,
      ref('diffu_grpo', (other,)).logp,
      ref('diffu_grpo', (), frozen=other).logp,
    )

  first, second, product, tokens, plain = run(old, base, other)
  assert np.abs(first - second).max() > 0.5
  np.testing.assert_allclose(product, 0.25 * first + 1.5 * second, rtol=1e-5)
  same(tokens, plain)


def test_harmonic_mean_and_clip(tiny):
  """Each log-prob is clipped to what is near the first; then they are mixed."""
  first, second = np.random.default_rng(0).normal(-3, 2, (2, 8)).astype(np.float32)
  logps = [jnp.asarray(first), jnp.asarray(second)]
  setup = step.Setup(tiny, dmpo.OBJECTIVE, dmpo.Config(), weights=(0.25, 0.75))
  got = score.mixed(logps, dataclasses.replace(setup, mean='harmonic'))
  want = -np.log(0.25 * np.exp(-first) + 0.75 * np.exp(-second))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  near = np.clip(second, first - 0.5, first + 0.5)
  assert (near != second).any() and (near == second).any()
  got = score.mixed(logps, dataclasses.replace(setup, clip=0.5))
  np.testing.assert_allclose(got, 0.25 * first + 0.75 * near, rtol=1e-5)


def test_the_geometric_mean_has_the_exact_target(tiny):
  """p_ref exp(r / alpha) maximises E r - alpha sum of w KL(p || p_k).

  The harmonic mean does not. kl_ref is the weighted sum of the KLs.
  """
  rng, alpha, weights = np.random.default_rng(1), 0.3, np.array([0.7, 0.3])
  laws, reward = rng.dirichlet(np.ones(9), 2), rng.random(9)
  kl = lambda p, q: np.sum(p * np.log(p / q))
  setup = step.Setup(tiny, dmpo.OBJECTIVE, dmpo.Config(), weights=(0.7, 0.3))

  def value(p):
    return p @ reward - alpha * sum(
      w * kl(p, q) for w, q in zip(weights, laws, strict=True)
    )

  def ref(mean):
    logps = list(jnp.log(jnp.float32(laws)))
    return np.asarray(score.mixed(logps, dataclasses.replace(setup, mean=mean)))

  def target(mean):
    scaled = dmpo.target_weights(jnp.float32(reward[None]), ref(mean)[None], alpha)
    return np.asarray(scaled[0][0], np.float64)

  best = value(target('geometric'))
  assert best > value(target('harmonic')) + 0.003
  for _ in range(100):
    moved = target('geometric') * np.exp(0.1 * rng.normal(size=9))
    assert value(moved / moved.sum()) < best + 1e-6
  old = rng.dirichlet(np.ones(9))
  got = old @ (np.log(old) - ref('geometric'))
  assert got == pytest.approx(weights @ [kl(old, q) for q in laws], abs=1e-5)
  norm = np.exp(ref('geometric')).sum()
  assert got == pytest.approx(kl(old, np.exp(ref('geometric')) / norm) - np.log(norm))


# --- the moving reference


@pytest.mark.parametrize('mix', [1.0, 0.25])
def test_moving_reference_follows_every_second_update(mix):
  """It becomes the parameters, or a mean with them. A refused update moves nothing."""
  optimizer = optim.make_optimizer(optim.Config(0.1, 0, clip=0.0), hold=True)
  state = step.init_state({'params': {'scale': jnp.ones(3)}}, optimizer)
  want = np.ones(3, np.float32)

  @jax.jit
  def update(state, slope):
    def loss(trainable, part):
      return jnp.sum(part * trainable['params']['scale'] ** 2), {}

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


@pytest.mark.slow
def test_a_run_with_adapters_moves_and_resumes(built, base_params, tmp_path):
  """A buffer has three updates, and every second one copies the policy.

  So log p_ref = log p_old in the first and third buffer, not in the second. A run that
  is stopped while it samples the second ends the same.
  """
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
  """Returns (function of reference fields, folder, ModelConfig with adapters)."""
  cfg = dataclasses.replace(tiny, lora_rank=2, lora_alpha=4.0)
  hf.save_adapter(tmp_path / 'adapter', cfg, weights_of(cfg), 'owner/base')
  grid = mesh.make_mesh(8)

  def call(cfg=cfg, **fields):
    c = base.get_config()
    c.reference.update(fields)
    return parts.references(c, cfg, '', grid, lambda tree: tree)

  return call, tmp_path, cfg


def test_base_moving_and_adapter_are_read(read_references, weights_of):
  call, folder, cfg = read_references
  assert call()() == ()
  trees = call(of=('base', 'moving', str(folder / 'adapter')))()
  assert trees[:2] == ({}, None)
  same(mesh.fetch(trees[2]), {'lora': mesh.fetch(weights_of(cfg)['lora'])})


def checkpoint_at(folder, **changes):
  """Writes a checkpoint of LLaDA's kind; returns its path and ModelConfig."""
  from test_weights import CONFIGS, write

  path = str(write(folder, {**CONFIGS['llada'], **changes}))
  return path, model.ModelConfig(**hf.read_config(path))


def test_another_checkpoint_is_read(read_references, tmp_path):
  call, _, _ = read_references
  path, cfg = checkpoint_at(tmp_path / 'other')
  trees = call(cfg, of=('base', path), weights=(1.0, 1.0))()
  same(mesh.fetch(trees[1]), mesh.fetch(hf.read_params(path, cfg)))


def test_references_that_do_not_fit_the_policy_are_refused(read_references, tmp_path):
  """The error names the field that differs. Shapes are compared before a read."""
  call, folder, cfg = read_references
  adapter = str(folder / 'adapter')
  with pytest.raises(ValueError, match='is an adapter.*lora.rank'):
    call(dataclasses.replace(cfg, lora_rank=0), of=(adapter,))
  with pytest.raises(ValueError, match='lora.rank = 3'):
    call(dataclasses.replace(cfg, lora_rank=3), of=(adapter,))()
  with pytest.raises(ValueError, match='bse'):
    call(of=('bse',))
  path, theirs = checkpoint_at(tmp_path / 'other')
  for name in ('vocab', 'layers', 'mlp'):
    ours = dataclasses.replace(theirs, **{name: getattr(theirs, name) * 2})
    with pytest.raises(ValueError, match=f'{name} = .*but the policy has'):
      call(ours, of=(path,))


@pytest.mark.parametrize(
  'message, changes',
  [
    ('reference.weights = ', {'reference.of': ('base', 'moving')}),
    ('reference.weights = ', {'reference.of': (), 'reference.weights': ()}),
    ('reference.weights = ', {'reference.weights': (-1.0,)}),
    ('reference.mix = 0.0', {'reference.mix': 0.0}),
    ('reference.every = 0', {'reference.every': 0}),
    (
      'reference.mix = 0.5.*model.param_dtype = float32',
      {
        'reference.of': ('moving',),
        'reference.mix': 0.5,
        'model.param_dtype': 'bfloat16',
      },
    ),
    (
      r"logprob.fuse = True.*\('base',\)",
      {'reference.of': ('moving',), 'logprob.fuse': True, 'lora.rank': 2},
    ),
    (
      r"reference.of = \('moving',\): .*log p_ref",
      {'reference.of': ('moving',), 'objective.alpha': 0.0},
    ),
    (
      r'reference.weights = \(0.7, 0.7\).*add up to 1',
      {
        'reference.of': ('base', 'moving'),
        'reference.weights': (0.7, 0.7),
        'reference.mean': 'harmonic',
      },
    ),
    ('reference.mean = .*geometric', {'reference.mean': 'harmonical'}),
  ],
)
@pytest.mark.smoke
def test_impossible_references_are_refused(message, changes):
  """The error names the field and its value."""
  c = base.get_config()
  c.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    check.config(c, 8)


def test_which_references_an_objective_may_have():
  """Those that compare single tokens have one, of weight 1; others several."""
  two = {'reference.of': ('base', 'moving'), 'reference.weights': (0.5, 0.5)}
  one = {'reference.of': ('moving',)}

  def checked(name, fields):
    c = base.get_config()
    config.update(c, {'objective.name': name, **fields})
    check.config(c, 8)

  for name in ('vrpo', 'residual', 'espo', 'gdpo', 'dmpo'):
    checked(name, two)
  for name in ('diffu_grpo', 'gdsd', 'diffpo'):
    checked(name, one)
    for wrong in (two, {'reference.weights': (0.5,)}):
      with pytest.raises(ValueError, match='reference.of = .*weight 1'):
        checked(name, wrong)
  with pytest.raises(ValueError, match='reference.of = .*wd1 reads no log p_ref'):
    checked('wd1', one)


def test_the_base_alone_adds_no_tree_to_the_optimizer():
  """The default reference needs no copy of the parameters."""
  make = functools.partial(
    step.init_state, optimizer=build.optimizer_of(base.get_config())
  )
  state = jax.eval_shape(make, {'params': {'scale': jnp.ones(3)}})
  assert 'reference' not in str(jax.tree.structure(state))
