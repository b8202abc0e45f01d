"""log p_ref - log p_old along recorded states is the ratio of two laws.

A few tokens of three symbols: all completions can be written down. The exact
law of a sampler comes from the plain loop in NumPy (reference.sample), led to
each completion in turn.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from test_sampler import chi_square

from dmpo_jax import logprob, rng, sampler
from dmpo_jax.objectives import dmpo
from dmpo_jax.sampler import SampleConfig, orders

ROWS, PROMPT = 8000, (1, 2)
HOW = SampleConfig(length=3, block=3, steps=2, temperature=0.8, rank='max')
WIDE = dict(length=4, block=2, steps=4)
# Positions by what is revealed already: the law of the completion is recorded.
STATE = {
  'two a step': dict(temperature=0.6, rank_law='sampling'),
  'threshold, leftmost, EOS': dict(
    pick='threshold', threshold=0.6, fallback='leftmost', eos_stop=True
  ),
  'entropy': dict(pick='entropy', entropy_bound=0.9),
  'dual cache, EOS': dict(cache='dual', eos_stop=True, **WIDE),
  'prefix cache': dict(cache='prefix', pick='factor', factor=0.8, **WIDE),
}
# Drawn: exact given the order.
NOISE = {
  'random order': dict(pick='random_order'),
  'drawn positions': dict(steps=3, rank_temperature=0.5),
  # By the sampled tokens, with the log-prob of the order.
  'the rule of LLaDA, its order': dict(steps=3, rank='token', order_logp=True),
  'dynamic': dict(
    pick='dynamic',
    threshold=0.5,
    rank='token',
    order_logp=True,
    rank_law='sampling',
    length=4,
    block=4,
    steps=2,
  ),
}
TOKENS = {'the rule of LLaDA': dict(steps=3, rank='token')}
CASES = STATE | NOISE | TOKENS


def settings(name):
  return dataclasses.replace(HOW, **CASES[name])


@pytest.fixture(scope='module')
def model(tiny):
  return dataclasses.replace(tiny, vocab=4, mask_id=3, eos_id=2, pad_id=1)


@pytest.fixture(scope='module')
def policies(model, weights):
  """(old, ref): they differ by half a nat a completion; neither is sharp, so
  that all completions are seen."""
  tree = weights(model)['params']
  old = {'params': {**tree, 'head': 0.5 * tree['head']}}
  draw = np.random.default_rng(5)

  def moved(leaf):
    noise = 0.06 * draw.normal(size=leaf.shape)
    return leaf + jnp.asarray(noise, leaf.dtype)

  return old, jax.tree.map(moved, old)


@pytest.fixture(scope='module')
def rollouts(model, policies):
  """rollouts(name) -> (Rollouts, log p_ref, log p_old, the same from n = 1)."""

  @functools.cache
  def run(name):
    hp = settings(name)

    @jax.jit
    def call(old, ref):
      prompts = jnp.asarray([PROMPT] * ROWS)
      out = sampler.generate(model, old, prompts, rng.key_for(0, 'sample'), hp)
      along = lambda *some: logprob.trajectory_logp(
        model, ref, out, hp, logprob.Along(*(some or (0, None)), old)
      )
      u_R = rng.per_row(rng.key_for(0, 'score'), jnp.arange(ROWS), jax.random.uniform)
      some = along(1, u_R)
      return out, *along(), some

    return jax.device_get(call(*policies))

  return run


def law(cfg, params, hp):
  """{completion: log-prob} under the sampler, from the loop in NumPy."""
  found = {}
  symbols = range(cfg.vocab - 1)
  for wanted in itertools.product(symbols, repeat=hp.length):
    at = [0]

    def noise(step, wanted=wanted, at=at):
      block = at[0] // hp.block * hp.block
      gumbel = np.full((hp.block, cfg.vocab), -1e9)
      gumbel[range(hp.block), wanted[block : block + hp.block]] = 0
      return gumbel, np.zeros(hp.block)

    tokens, logp = led(cfg, params, hp, noise, at)
    found[tokens] = logp
  return found


def led(cfg, params, hp, noise, at):
  """One run of the plain loop, with `at` kept at the block it is in."""
  real = reference.Network.logits

  def logits(self, tokens, start, width):
    at[0] = start - len(PROMPT)
    return real(self, tokens, start, width)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(reference.Network, 'logits', logits)
    tokens, _, logp, _, _ = reference.sample(cfg, params, PROMPT, hp, noise)
  return tuple(map(int, tokens)), logp.sum()


def completions(out):
  return list(map(tuple, out.tokens[:, len(PROMPT) :].tolist()))


def reward(completion):
  """Something that no single token decides."""
  completion = np.asarray(completion)
  return (completion[..., 1:] == completion[..., :-1]).mean(-1)


@pytest.mark.parametrize('name', STATE)
def test_recorded_logp_is_the_law(name, model, policies, rollouts):
  """It sums to one over all completions, is what the enumeration says, and
  completions come as often as it says. So does p_ref along the states."""
  hp = settings(name)
  assert hp.order_from() == 'state'
  exact = law(model, policies[0], hp)
  assert abs(sum(np.exp(list(exact.values()))) - 1) < 1e-9
  out, ref, old, _ = rollouts(name)
  seen = completions(out)
  np.testing.assert_allclose(old, [exact[x] for x in seen], atol=2e-4)
  chi_square([seen.count(x) for x in exact], np.exp(list(exact.values())))
  other = dict(zip(seen, ref, strict=True))
  unseen = sum(np.exp(p) for x, p in exact.items() if x not in other)
  assert unseen < 2e-3
  assert abs(np.exp(list(other.values())).sum() - 1) < 0.01
  assert np.std(ref - old) > 0.2


@pytest.mark.parametrize('name', STATE | NOISE)
def test_weights_recover_the_target(name, rollouts):
  """Importance weights have mean one, and self-normalised ones give p*: of
  p_ref in the order of the policy, tilted by the reward."""
  out, ref, old, _ = rollouts(name)
  ratio = np.exp(ref - old)
  assert abs(ratio.mean() - 1) < 4 * ratio.std() / ROWS**0.5 < 0.1
  if name not in STATE:
    assert settings(name).order_from() == 'noise'
    return
  alpha, seen = 0.3, completions(out)
  r = reward(seen)
  names = sorted(set(seen))
  goal = dict(zip(seen, np.exp(ref + r / alpha), strict=True))
  goal = np.array([goal[x] for x in names]) / sum(goal.values())

  def distance(log_rnd):
    weight, _ = dmpo.target_weights(r[None], log_rnd[None], alpha)
    at = [names.index(x) for x in seen]
    return 0.5 * np.abs(np.bincount(at, weight[0]) - goal).sum()

  assert distance(ref - old) < 0.05 < 0.1 < distance(np.zeros(ROWS))


def test_weights_of_llada_s_rule_lack_a_term(rollouts):
  """Ranked by the sampled token the recorded log-probs are no law: over
  trajectories they sum to more than one, and the weights miss one."""
  name = 'the rule of LLaDA'
  assert settings(name).order_from() == 'tokens'
  out, ref, old, _ = rollouts(name)
  paths = zip(completions(out), map(tuple, out.order.tolist()), strict=True)
  assert np.exp(list(dict(zip(paths, old, strict=True)).values())).sum() > 1.5
  ratio = np.exp(ref - old)
  assert abs(ratio.mean() - 1) > 8 * ratio.std() / ROWS**0.5


@pytest.mark.parametrize('name', STATE | NOISE)
def test_some_states_are_unbiased(name, rollouts):
  """n = 1 of the states: log p_ref - log p_old of every completion has the
  mean of the whole sum; its exponential has not."""
  out, ref, old, some = rollouts(name)
  error = (some[0] - some[1]) - (ref - old)
  paths = np.unique(np.c_[out.tokens, out.order], axis=0, return_inverse=True)[
    1
  ].ravel()
  count = np.bincount(paths)
  mean = np.bincount(paths, error) / count
  spread = np.sqrt(np.bincount(paths, error**2) / count - mean**2)
  often = count >= 50
  assert often.sum() >= 8 and (spread[often] > 1e-3).any()
  within = 4.5 * spread[often] / count[often] ** 0.5 + 1e-4
  assert (np.abs(mean[often]) < within).all()


RULES = {
  'static': dict(pick='confidence', steps=2),
  'one': dict(pick='confidence', steps=4),
  'dynamic': dict(pick='dynamic', steps=2, threshold=0.4),
  'never': dict(pick='dynamic', steps=4, threshold=1.0),
  'best': dict(pick='threshold', threshold=0.5),
  'leftmost': dict(pick='threshold', threshold=0.5, fallback='leftmost'),
}


@pytest.mark.parametrize('name', RULES)
@pytest.mark.parametrize('rank_law', ['model', 'sampling'])
def test_the_order_has_the_chance_of_its_proposals(name, rank_law):
  """Against the sum over all 81 proposals of four positions; ties among them.

  Under the policy, and under a reference whose proposals the policy ranks.
  """
  hp = SampleConfig(
    **dict(length=4, block=4, steps=4, temperature=0.7, rank='token') | RULES[name],
    order_logp=True, rank_law=rank_law,
  )  # fmt: skip
  draw = np.random.default_rng(3)
  logits, ref = draw.normal(size=(2, 4, 3)) * 1.5
  logits[2] = logits[0]  # equal confidences
  logits[3] = [0, 9, 0]  # and one that counts as sure
  if name != 'one':
    logits[1] = [9.5, 0, 0]
  masked = np.array([True, True, name != 'one', True])
  q, q_ref = (np.exp(x / 0.7) / np.exp(x / 0.7).sum(-1, keepdims=True)
              for x in (logits, ref))  # fmt: skip
  judged = (
    q
    if rank_law == 'sampling'
    else np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  )
  x = np.array(list(itertools.product(range(3), repeat=4)))
  at = np.arange(4)
  wide = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), (81, *x.shape))
  mask = jnp.broadcast_to(jnp.asarray(masked), (81, 4))
  quota, share = sampler.picks.schedule(hp, mask, jnp.zeros(81, jnp.int32))
  sure = jnp.minimum(jnp.asarray(judged[at, x], jnp.float32), orders.SURE)
  look = sampler.picks.Look(wide(judged), sure, mask, quota, share, sure)
  take = sampler.picks.PICKS[hp.pick].rule(look, hp)
  placed = np.sum(np.where(take, orders.record(look, take, hp), 0), 1)
  limit = orders.limits(sure, take[:, None], (mask & ~take)[:, None], hp)[:, 0]
  law = wide(logits if rank_law == 'model' else np.log(q))
  other = np.sum(orders.below(wide(np.log(q_ref)), law, limit), 1)
  take = np.asarray(take)
  assert take.any(1).all() and not (take & ~masked).any()
  seen = np.where(take, x, -1)
  for law, found in ((q, placed), (q_ref, other)):
    chance = law[at, x]
    joint = np.where(masked, chance, 1 / 3).prod(1)  # what is not masked is no proposal
    total = np.array([joint[(seen == row).all(1)].sum() for row in seen])
    kept = np.where(take, np.log(chance), 0).sum(1)
    np.testing.assert_allclose(kept + found, np.log(total), atol=2e-5)


@pytest.mark.smoke
def test_what_decides_the_order():
  """Alone in its block, or kept whole, a proposal decides nothing."""

  def of(**fields):
    return dataclasses.replace(HOW, **fields).order_from()

  assert of(pick='wino') == 'hindsight'
  for pick in ('confidence', 'threshold', 'factor'):
    assert of(pick=pick, rank='token') == 'tokens'
    assert of(pick=pick, rank='token', block=1) == 'state'
    assert of(pick=pick, rank='token', temperature=0.0) == 'state'
    assert of(pick=pick) == 'state'
  assert of(rank='token', steps=1) == 'state'
  assert of(rank='token', steps=1, pick='factor') == 'tokens'
  assert of(rank='token', rank_temperature=0.1) == 'tokens'
  assert of(rank='token', steps=3, order_logp=True) == 'noise'
  luce = dict(pick='plackett_luce', rank_temperature=0.5)
  assert of(**luce) == 'noise' and of(**luce, rank='token') == 'tokens'
  for pick in ('margin', 'lowest_entropy', 'entropy'):
    assert of(pick=pick, rank='token') == 'state'
  assert of(pick='margin', rank_temperature=0.1) == 'noise'
  for pick in ('random', 'random_order', 'origin'):
    assert of(pick=pick, rank='token') == 'noise'
