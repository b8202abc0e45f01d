"""DMPO drives the policy to p_ref exp(r / alpha) / Z: enumerated, not assumed.

Four tokens of three symbols: all 81 completions and all 24 orders can be
written down, so the policy's distribution is known exactly.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax import logprob, model, optim, rng, sampler, step
from dmpo_jax.objectives import dmpo
from dmpo_jax.types import Scored, TrainBatch, to_groups

L, SYMBOLS, ALPHA, GROUP = 4, 3, 0.7, 512
CFG = model.ModelConfig(
  vocab=4,
  mask_id=3,
  eos_id=-1,
  pad_id=-1,
  width=32,
  layers=2,
  heads=2,
  kv_heads=2,
  mlp=64,
  dtype='float32',
  remat='none',
)
OUTPUTS = np.array(list(itertools.product(range(SYMBOLS), repeat=L)), np.int32)
ORDERS = np.array(list(itertools.permutations(range(L))), np.int32)
HOW = sampler.SampleConfig(L, L, L, temperature=1.0, pick='random_order')
PROMPT = 0  # one token; there is no EOS and no padding here


def reward(completion):
  """Something that no single token decides: pairs of equal neighbours."""
  equal = completion[..., 1:] == completion[..., :-1]
  return equal.sum(-1) / (L - 1) + 0.5 * (completion[..., 0] == 2)


@jax.jit
def conditionals(params):
  """(16, 81, L) log p(x_i | x outside S) for each set S of masks."""
  sets = jnp.array(list(itertools.product([False, True], repeat=L)))
  tokens = jnp.concatenate([jnp.full((81, 1), PROMPT), OUTPUTS], axis=1)

  def one(masked):
    seen = jnp.where(masked, CFG.mask_id, tokens[:, 1:])
    seen = jnp.concatenate([tokens[:, :1], seen], axis=1)
    logits = model.full_logits(CFG, params, seen)[:, 1:, :SYMBOLS]
    logp = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0]

  return jax.lax.map(one, sets)


def distribution(params):
  """(81,) the law of random-order sampling: the mean over the 24 orders."""
  logp = np.asarray(conditionals(params), np.float64)
  total = np.zeros(81)
  for order in ORDERS:
    masked, path = [True] * L, np.zeros(81)
    for i in order:
      index = int(''.join('01'[m] for m in masked), 2)
      path += logp[index, :, i]
      masked[i] = False
    total += np.exp(path) / len(ORDERS)
  return total


def tv(p, q):
  return 0.5 * np.abs(p - q).sum()


@pytest.fixture(scope='module')
def reference():
  return model.init(CFG, jax.random.key(1))


def train(reference, hp, iterations, flip=1.0, anchored=True, inner=4):
  """The trainer's own functions: sample, score, weigh, step.

  Many small updates: at three times the rate it stays 0.2 away.
  """
  optimizer = optim.make_optimizer(
    optim.Config(1e-3, 0, decay_steps=iterations * inner)
  )
  state = step.init_state(jax.tree.map(jnp.copy, reference), optimizer)
  setup = step.Setup(CFG, dmpo.OBJECTIVE, hp, GROUP, inner, optimizer=optimizer)
  prompts = jnp.full((GROUP, 1), PROMPT, jnp.int32)

  @jax.jit
  def iterate(state, it):
    row = it * GROUP + jnp.arange(GROUP)
    out = sampler.generate(
      CFG, state.trainable, prompts, rng.key_for(0, 'sample', it), HOW
    )
    ref, old = logprob.trajectory_logp(CFG, reference, out, HOW.law())
    r = flip * reward(out.tokens[:, 1:])
    grouped = functools.partial(to_groups, group=GROUP)
    scored = Scored(grouped(r), None, grouped(old), grouped(ref if anchored else old))
    weight, own, metrics = dmpo.weigh(scored, hp)
    batch = TrainBatch(
      out.tokens,
      out.valid,
      jnp.ones((GROUP, L), bool),
      row,
      weight.ravel(),
      {name: x.ravel() for name, x in own.items()},
      jnp.float32(1),
      jnp.float32(GROUP),
    )
    for i in range(inner):
      state, _ = step.train_step(state, {}, batch, rng.key_for(0, 'mask'), i, setup)
    return state, metrics

  for it in range(iterations):
    state, metrics = iterate(state, it)
  return state.trainable, metrics


def target(reference, alpha):
  p = distribution(reference) * np.exp(reward(OUTPUTS) / alpha)
  return p / p.sum()


def test_enumeration_is_a_distribution(reference):
  assert distribution(reference).sum() == pytest.approx(1, abs=1e-5)


def fit(reference, iterations=60, **changes):
  hp = dmpo.Config(alpha=ALPHA, baseline='group', low=0.0, draws=2)
  return train(reference, hp, iterations, **changes)[0]


def test_policy_becomes_the_target(reference):
  """Far from it at the start, within 0.05 in total variation at the end."""
  goal = target(reference, ALPHA)
  assert tv(distribution(reference), goal) > 0.2
  assert tv(distribution(fit(reference)), goal) < 0.05


@pytest.mark.parametrize('wrong', [{'flip': -1.0}, {'anchored': False}])
def test_it_needs_sign_and_reference(reference, wrong):
  """With the reward turned, or without log p_ref, it ends elsewhere."""
  goal = target(reference, ALPHA)
  assert tv(distribution(fit(reference, 15, **wrong)), goal) > 0.15
