"""DMPO drives the policy to p_ref exp(r / alpha) / Z: enumerated, not assumed.

Four tokens of three symbols: all 81 completions and all 24 orders can be
written down, so the policy's distribution is known exactly. A block-causal model has
two blocks of two tokens, and the 4 orders that unmask the first block first.
"""

import dataclasses
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
PROMPT = 0  # a block of it; there is no EOS and no padding here


@dataclasses.dataclass(frozen=True)
class Family:
  cfg: model.ModelConfig
  how: sampler.SampleConfig
  orders: np.ndarray = dataclasses.field(compare=False)
  iterations: int  # until the target is reached
  left: float  # total variation that may be left

  @property
  def prompt(self):
    return self.cfg.block_causal or 1


FAMILIES = {
  'bidirectional': Family(CFG, HOW, ORDERS, 60, 0.05),
  'block_causal': Family(
    dataclasses.replace(CFG, block_causal=2),
    dataclasses.replace(HOW, block=2, cache='block'),
    ORDERS[(ORDERS[:, :2] < 2).all(axis=1)],
    200,
    0.03,
  ),
}


pytestmark = pytest.mark.slow


LONG = [pytest.param('block_causal', marks=pytest.mark.long)]


@pytest.fixture(scope='module', params=['bidirectional', *LONG])
def family(request):
  return FAMILIES[request.param]


def reward(completion):
  """Something that no single token decides: pairs of equal neighbours."""
  equal = completion[..., 1:] == completion[..., :-1]
  return equal.sum(-1) / (L - 1) + 0.5 * (completion[..., 0] == 2)


@functools.partial(jax.jit, static_argnums=0)
def conditionals(family, params):
  """(16, 81, L) log p(x_i | x outside S) for each set S of masks."""
  sets = jnp.array(list(itertools.product([False, True], repeat=L)))
  size = family.prompt
  tokens = jnp.concatenate([jnp.full((81, size), PROMPT), OUTPUTS], axis=1)

  def one(masked):
    seen = jnp.where(masked, CFG.mask_id, tokens[:, size:])
    seen = jnp.concatenate([tokens[:, :size], seen], axis=1)
    logits = model.full_logits(family.cfg, params, seen)[:, size:, :SYMBOLS]
    logp = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logp, tokens[:, size:, None], -1)[..., 0]

  return jax.lax.map(one, sets)


def distribution(family, params):
  """(81,) the law of random-order sampling: the mean over the orders."""
  logp = np.asarray(conditionals(family, params), np.float64)
  total = np.zeros(81)
  for order in family.orders:
    masked, path = [True] * L, np.zeros(81)
    for i in order:
      index = int(''.join('01'[m] for m in masked), 2)
      path += logp[index, :, i]
      masked[i] = False
    total += np.exp(path) / len(family.orders)
  return total


def tv(p, q):
  return 0.5 * np.abs(p - q).sum()


@pytest.fixture(scope='module')
def reference():
  return model.init(CFG, jax.random.key(1))


def train(family, reference, hp, iterations, flip=1.0, anchored=True, inner=4):
  """The trainer's own functions: sample, score, weigh, step.

  Many small updates: at three times the rate it stays 0.2 away.
  """
  optimizer = optim.make_optimizer(
    optim.Config(1e-3, 0, decay_steps=iterations * inner)
  )
  state = step.init_state(jax.tree.map(jnp.copy, reference), optimizer)
  cfg, how = family.cfg, family.how
  setup = step.Setup(cfg, dmpo.OBJECTIVE, hp, GROUP, inner, optimizer=optimizer)
  prompts = jnp.full((GROUP, family.prompt), PROMPT, jnp.int32)

  @jax.jit
  def iterate(state, it):
    row = it * GROUP + jnp.arange(GROUP)
    out = sampler.generate(
      cfg, state.trainable, prompts, rng.key_for(0, 'sample', it), how
    )
    ref, old = logprob.trajectory_logp(cfg, reference, out, how)
    r = flip * reward(out.tokens[:, -L:])
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


def target(family, reference, alpha):
  p = distribution(family, reference) * np.exp(reward(OUTPUTS) / alpha)
  return p / p.sum()


def test_enumeration_is_a_distribution(family, reference):
  assert distribution(family, reference).sum() == pytest.approx(1, abs=1e-5)


def fit(family, reference, iterations=0, **changes):
  hp = dmpo.Config(alpha=ALPHA, baseline='group', low=0.0, draws=2)
  steps = iterations or family.iterations
  return train(family, reference, hp, steps, **changes)[0]


def test_policy_becomes_the_target(family, reference):
  """Far from it at the start, within 0.05 (or 0.03) in total variation at the end."""
  goal = target(family, reference, ALPHA)
  assert tv(distribution(family, reference), goal) > 0.2
  assert tv(distribution(family, fit(family, reference)), goal) < family.left


@pytest.mark.long
@pytest.mark.parametrize('wrong', [{'flip': -1.0}, {'anchored': False}])
def test_it_needs_sign_and_reference(family, reference, wrong):
  """With the reward turned, or without log p_ref, it ends elsewhere."""
  goal = target(family, reference, ALPHA)
  assert tv(distribution(family, fit(family, reference, 15, **wrong)), goal) > 0.15
