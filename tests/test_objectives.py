"""The DMPO objective: weights, baselines and losses, against plain NumPy."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from batches import batch_of, elbos, text_of

from dmpo_jax import masking, model
from dmpo_jax.objectives import dmpo, shared
from dmpo_jax.types import Masks, Scored, ViewLogp, Wants

B, G, R, K, L = 3, 4, 12, 4, 6
TINY = model.ModelConfig(
  vocab=9,
  mask_id=8,
  eos_id=7,
  pad_id=7,
  width=16,
  layers=1,
  heads=2,
  kv_heads=2,
  mlp=16,
  dtype='float32',
  remat='none',
)


def close(a, b, tol=1e-5):
  np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


REWARD = np.random.default_rng(1).uniform(0, 2, (B, G)).astype(np.float32)
LOG_RND = draw(2, B, G)


def softmax(x):
  """In float64, along the last axis."""
  e = np.exp(np.asarray(x, np.float64) - np.max(x, -1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def reference_weights(reward, log_rnd, alpha, coef):
  """The release's formulas, one group at a time (c is that group's)."""
  plus, minus = [], []
  for b in range(len(reward)):
    c = np.broadcast_to(coef, len(reward))[b]
    if alpha:
      plus.append(softmax(c * (log_rnd[b] + reward[b] / alpha)))
      minus.append(softmax(c * (log_rnd[b] - reward[b] / alpha)))
    else:
      plus.append(softmax(c * reward[b]))
      minus.append(softmax(-c * reward[b]))
  return np.array(plus), np.array(minus)


def scored(reward=REWARD, log_rnd=LOG_RND):
  """A Scored whose log p_ref - log p_old is log_rnd."""
  old = draw(3, *reward.shape)
  return Scored(
    jnp.asarray(reward),
    jnp.full(reward.shape, L),
    jnp.asarray(old),
    jnp.asarray(old + log_rnd),
  )


def batch(weight_R, target_R, **fields):
  """A TrainBatch with what losses look at."""
  return batch_of(weight_R, {'target': target_R}, B, **fields)


def masks_and_logp(seed=0):
  """Random masks (one row of them empty) and log-probs, 0 where not masked."""
  rng = np.random.default_rng(seed)
  masked = rng.random((R, K, L)) < 0.5
  masked[0, 1] = False
  logp = np.where(masked, -rng.exponential(size=(R, K, L)), 0.0)
  count = masked.sum(-1)
  weight = L / np.maximum(count, 1)
  masks = Masks(jnp.asarray(masked), jnp.asarray(weight, jnp.float32)[..., None])
  return masks, jnp.asarray(logp, jnp.float32)


# --- target weights


@pytest.mark.smoke
@pytest.mark.parametrize('alpha', [0.0, 0.04, 0.7])
@pytest.mark.parametrize('coef', [1.0, 0.3, 'per group'])
def test_target_weights_follow_the_formulas(alpha, coef):
  """Both softmaxes, with one c for all or one per group."""
  coef = np.array([1.0, 0.5, 0.1], np.float32) if coef == 'per group' else coef
  got = dmpo.target_weights(REWARD, LOG_RND, alpha, coef)
  want = reference_weights(REWARD, LOG_RND, alpha, coef)
  for g, w in zip(got, want, strict=True):
    close(g, w, 2e-5)  # r/alpha reaches 50: float32 loses digits there
    close(np.sum(g, -1), np.ones(B))
    assert (np.asarray(g) >= 0).all()


def test_negative_alpha_is_refused():
  """alpha = -1, the release's broken mode, is an error that names it."""
  with pytest.raises(ValueError, match='alpha = -1.* >= 0'):
    dmpo.target_weights(REWARD, LOG_RND, -1.0)


def test_two_completions_are_a_sigmoid():
  """With G = 2 the first weight is sigmoid(c (d log_rnd + d r/alpha))."""
  reward, rnd = REWARD[:, :2], LOG_RND[:, :2]
  plus, minus = dmpo.target_weights(reward, rnd, 0.5, 0.8)
  for sign, got in ((1, plus), (-1, minus)):
    gap = 0.8 * (rnd[:, 0] - rnd[:, 1] + sign * (reward[:, 0] - reward[:, 1]) / 0.5)
    close(got[:, 0], 1 / (1 + np.exp(-gap)))


def test_better_rewards_weigh_more():
  """At equal log_rnd the weights are ordered as rewards, w- the other way."""
  for alpha in (0.0, 0.5):
    plus, minus = dmpo.target_weights(REWARD, np.zeros_like(LOG_RND), alpha)
    order = np.argsort(REWARD, -1)
    assert (np.diff(np.take_along_axis(np.asarray(plus), order, -1)) > 0).all()
    assert (np.diff(np.take_along_axis(np.asarray(minus), order, -1)) < 0).all()


def test_weights_ignore_what_a_group_shares():
  """A constant added to a group's rewards or log_rnd changes nothing."""
  shift = np.array([[5.0], [-3.0], [0.0]], np.float32)
  want = dmpo.target_weights(REWARD, LOG_RND, 0.5)
  for got in (
    dmpo.target_weights(REWARD + shift, LOG_RND, 0.5),
    dmpo.target_weights(REWARD, LOG_RND + shift, 0.5),
  ):
    close(got, want)


def test_alpha_zero_drops_log_rnd():
  """alpha = 0 weighs by the reward alone."""
  close(
    dmpo.target_weights(REWARD, LOG_RND, 0.0),
    dmpo.target_weights(REWARD, 9 * LOG_RND, 0.0),
  )


def test_a_group_does_not_see_the_others():
  """Weights, with c by ESS too, of a group alone and in a batch agree."""
  for hp in (dmpo.Config(alpha=0.5), dmpo.Config(alpha=0.5, ess=0.7)):
    whole, own, _ = dmpo.weigh(scored(), hp)
    for b in range(B):
      part = jax.tree.map(lambda x, b=b: x[b : b + 1], scored())
      weight, its, _ = dmpo.weigh(part, hp)
      close(whole[b : b + 1], weight)
      close(own['target'][b : b + 1], its['target'])


# --- effective size and c


def test_effective_size():
  """1 for equal weights, 1/G for a single one, and the formula between."""
  one = np.eye(G, dtype=np.float32)[:1]
  close(dmpo.effective_size(np.full((1, G), 1 / G, np.float32)), [1.0])
  close(dmpo.effective_size(one), [1 / G])
  weight = softmax(LOG_RND)
  close(
    dmpo.effective_size(jnp.asarray(weight, jnp.float32)),
    [1 / (G * (w**2).sum()) for w in weight],
  )


@pytest.mark.parametrize('alpha', [0.0, 0.3])
def test_adaptive_coef_hits_the_wanted_size(alpha):
  """Where it can be reached the effective size is the wanted one."""
  reward = REWARD * (8 if alpha == 0 else 1)
  for wanted in (0.65, 0.8):
    coef = dmpo.adaptive_coef(reward, LOG_RND, alpha, wanted)
    assert ((np.asarray(coef) > 0.011) & (np.asarray(coef) < 0.989)).all()
    size = dmpo.effective_size(dmpo.target_weights(reward, LOG_RND, alpha, coef)[0])
    close(size, np.full(B, wanted), 1e-3)


def test_adaptive_coef_matches_a_grid_search():
  """It minimises (ESS(c) - wanted)^2 over [0.01, 0.99], per group."""
  grid = np.linspace(0.01, 0.99, 4901)
  for wanted in (0.3, 0.7, 0.95):
    got = dmpo.adaptive_coef(REWARD, LOG_RND, 0.5, wanted)
    for b in range(B):
      weights = softmax(grid[:, None] * (LOG_RND[b] + REWARD[b] / 0.5))
      size = 1 / (G * (weights**2).sum(-1))
      assert float(got[b]) == pytest.approx(
        grid[np.argmin((size - wanted) ** 2)], abs=3e-4
      )


def test_adaptive_coef_stops_at_its_ends():
  """Too flat everywhere: 0.99; too sharp everywhere: 0.01."""
  flat = np.ones((1, G), np.float32)
  zero = np.zeros((1, G), np.float32)
  close(dmpo.adaptive_coef(flat, zero, 0.5, 0.7), [0.99])
  sharp = np.array([[0, 1e4, 0, 0]], np.float32)
  close(dmpo.adaptive_coef(sharp, zero, 0.5, 0.7), [0.01])


# --- baselines


@pytest.mark.parametrize('baseline', ['individual', 'group'])
def test_centred_weights_sum_to_zero(baseline):
  """At strength 1 a group's signed weights cancel; at 0.5 half is left."""
  hp = dmpo.Config(alpha=0.5, baseline=baseline)
  close(dmpo.weigh(scored(), hp)[0].sum(-1), np.zeros(B))
  hp = dataclasses.replace(hp, strength=0.5)
  close(dmpo.weigh(scored(), hp)[0].sum(-1), np.full(B, 0.5))


def test_baselines_follow_their_definitions():
  """weight = w - strength * (0 | 1/G | w-); positive = w whatever it is."""
  plus, minus = reference_weights(REWARD, LOG_RND, 0.5, 0.8)
  for baseline, strength in itertools.product(dmpo.BASELINES, (1.0, 0.3)):
    hp = dmpo.Config(alpha=0.5, coef=0.8, baseline=baseline, strength=strength)
    weight, own, _ = dmpo.weigh(scored(), hp)
    # 'model' is subtracted at every inner step (reweigh), not here.
    minus_what = {'group': 1 / G, 'individual': minus}.get(baseline, 0.0)
    close(weight, plus - strength * minus_what)
    close(own['target'], plus)


def test_where_the_signal_is_largest():
  """The expected push on the log-odds of a right answer, as docs/objectives.md says.

  Groups of eight with 0 to 8 right answers, weighted by their chance.
  """
  group, p = 8, np.linspace(0.005, 0.995, 199)
  right = np.arange(group)[None] < np.arange(group + 1)[:, None]
  reward = jnp.float32(right)
  count = right.sum(1)
  chance = np.array([math.comb(group, k) for k in count])
  chance = chance * p[:, None] ** count * (1 - p[:, None]) ** (group - count)
  zeros = jnp.zeros_like(reward)
  scored = Scored(reward, None, zeros, zeros)
  weights = {'mean': shared.advantages(reward, 'mean') / group}
  for baseline in ('none', 'group', 'individual'):
    weights[baseline] = dmpo.weigh(scored, dmpo.Config(baseline=baseline))[0]

  def push(weight_9xG):
    each = np.asarray(weight_9xG)[None] * (right[None] - p[:, None, None])
    return (chance * each.sum(2)).sum(1)

  alone = (1 - p) - (1 - p) ** group
  close(push(weights['mean']), p * (1 - p) * (group - 1) / group)
  close(push(weights['none']), alone)
  close(push(weights['group']), alone)
  close(push(weights['individual']), 1 - p**group - (1 - p) ** group)
  assert p[alone.argmax()] == pytest.approx(1 - group ** (-1 / (group - 1)), abs=0.004)


def test_equal_rewards_have_no_weight_under_individual():
  """Nothing to learn from a group whose rewards are all equal."""
  hp = dmpo.Config(alpha=0.04)
  equal = np.full((B, G), 0.25, np.float32)
  weight, own, metrics = dmpo.weigh(scored(equal), hp)
  close(weight, np.zeros((B, G)), 1e-6)
  close(own['target'], softmax(LOG_RND))
  assert float(metrics['weight_abs']) < 1e-5


def test_metrics_of_weighing():
  """ESS, c and the spread of log_rnd, as defined."""
  reward = REWARD.copy()
  reward[1] = 0.5
  hp = dmpo.Config(alpha=0.5, coef=0.7)
  weight, own, metrics = dmpo.weigh(scored(reward), hp)
  positive = np.asarray(own['target'])
  close(metrics['ess'], np.mean(1 / (G * (positive**2).sum(-1))))
  close(metrics['coef'], 0.7)
  close(metrics['log_rnd_std'], LOG_RND.std(-1).mean())
  close(metrics['weight_abs'], np.abs(weight).sum(-1).mean())


def test_coverage_scales_a_group_by_its_best():
  """exp((max r - best) / alpha), 1 where it is reached; sums stay zero."""
  reward = np.array(
    [[1.0, 0.2, 0.0, 0.5], [0.9, 0.1, 0.9, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32
  )
  plain = dmpo.Config(alpha=0.2)
  hp = dataclasses.replace(plain, best=1.0)
  scale = np.exp((reward.max(-1, keepdims=True) - 1.0) / 0.2)
  assert scale[0, 0] == 1 and 0.5 < scale[1, 0] < 0.7 and scale[2, 0] < 0.01
  weight, own, metrics = dmpo.weigh(scored(reward), hp)
  whole, sure, before = dmpo.weigh(scored(reward), plain)
  close(weight, whole * scale)
  close(own['target'], sure['target'] * scale)
  close(np.sum(weight, -1), np.zeros(B))
  close(metrics['coverage'], scale.mean())
  close(metrics['ess'], before['ess'])  # of the target's own weights
  # Of ddo both terms.
  ddo = dmpo.weigh(scored(reward), dataclasses.replace(hp, loss='ddo'))[0]
  close(ddo, np.broadcast_to(scale / G, (B, G)))
  # A best that is beaten scales nothing up.
  beaten = dmpo.weigh(scored(reward), dataclasses.replace(hp, best=0.5))[0]
  close(beaten[0], whole[0])


def test_coverage_reaches_the_model_baseline():
  """What is subtracted shrinks with the group, so that sums stay zero."""
  positive = (softmax(LOG_RND) * [[1.0], [0.3], [0.01]]).astype(np.float32)
  got = dmpo.reweigh(
    jnp.asarray(draw(4, R)),
    batch(np.zeros(R), positive.ravel(), old=elbos(draw(5, R))),
    G,
    dmpo.Config(baseline='model'),
  )
  close(np.reshape(got, (B, G)).sum(-1), np.zeros(B))


def test_reweigh_is_a_softmax_over_each_group():
  """The 'model' baseline is per group, not over the batch."""
  elbo, old = draw(4, R), draw(5, R)
  positive = softmax(LOG_RND).ravel().astype(np.float32)
  hp = dmpo.Config(baseline='model', strength=0.6)
  got = dmpo.reweigh(
    jnp.asarray(elbo), batch(np.zeros(R), positive, old=elbos(old)), G, hp
  )
  want = positive - 0.6 * softmax((elbo - old).reshape(B, G)).ravel()
  close(got, want)


def test_reweigh_stops_the_gradient():
  """The baseline is a constant of the loss."""
  positive = softmax(LOG_RND).ravel().astype(np.float32)
  grad = jax.grad(
    lambda elbo: jnp.sum(
      dmpo.reweigh(
        elbo,
        batch(np.zeros(R), positive, old=elbos(jnp.zeros(R))),
        G,
        dmpo.Config(baseline='model'),
      )
      * draw(6, R)
    )
  )(jnp.asarray(draw(4, R)))
  assert (np.asarray(grad) == 0).all()


def test_model_baseline_is_group_at_no_gap():
  """Where policy and old policy agree, 'model' subtracts 1/G."""
  elbo = jnp.asarray(draw(4, R))
  hp = dmpo.Config(alpha=0.5, baseline='model', strength=0.7)
  _, own, _ = dmpo.weigh(scored(), hp)
  rows = batch(np.zeros(R), own['target'].ravel(), old=elbos(elbo))
  got = dmpo.reweigh(elbo, rows, G, hp)
  hp = dataclasses.replace(hp, baseline='group')
  close(got, dmpo.weigh(scored(), hp)[0].ravel())


# --- losses


def loop_wdce(logp, masked, weight):
  """sum_r weight_r 1/K sum_k 1/m sum_masked -logp, without vectors."""
  total = 0.0
  for r, k in itertools.product(range(logp.shape[0]), range(logp.shape[1])):
    places = [i for i in range(logp.shape[2]) if masked[r, k, i]]
    if places:  # an empty draw contributes nothing
      nll = sum(-float(logp[r, k, i]) for i in places) / len(places)
      total += float(weight[r]) * nll / logp.shape[1]
  return total


@pytest.mark.smoke
def test_wdce_is_its_loop():
  """The loss, an empty draw included, and its division by the groups."""
  masks, logp = masks_and_logp()
  weight = draw(7, R)
  want = loop_wdce(np.asarray(logp), np.asarray(masks.masked), weight)
  close(dmpo.wdce(logp, masks, jnp.asarray(weight)), want)
  value, metrics = dmpo.loss(
    ViewLogp(logp), masks, batch(weight, weight), dmpo.Config()
  )
  close(value, want / B)
  close(metrics['nll'], -np.asarray(logp).sum() / (K * R))


def test_empty_draws_weigh_nothing():
  """Rows without a masked position: loss 0 and finite gradients."""
  empty = jnp.zeros((R, K, L), bool)
  masks = masking.per_copy(empty, jnp.ones((R, K)))

  def loss(logp):
    return dmpo.wdce(jnp.where(empty, logp, 0.0), masks, jnp.asarray(draw(7, R)))

  value, grad = jax.value_and_grad(loss)(jnp.asarray(draw(8, R, K, L)))
  assert float(value) == 0 and (np.asarray(grad) == 0).all()


def test_ddo_is_its_loop():
  """Two log-sigmoids of the gaps of the two halves of the draws."""
  masks, logp = masks_and_logp(1)
  positive, old = softmax(draw(9, R)).astype(np.float32), draw(10, R)
  hp = dmpo.Config(loss='ddo', ddo_alpha=0.6, ddo_beta=0.4, antithetic=False)
  # The last group counts less.
  share = np.repeat([0.25, 0.25, 0.05], G).astype(np.float32)
  lp, mw = np.asarray(logp, np.float64), np.asarray(masks.weight)[..., 0]
  total = 0.0
  for r in range(R):
    gap = []
    for half in (range(K // 2), range(K // 2, K)):
      halves = [mw[r, k] * lp[r, k].sum() for k in half]
      gap.append(np.mean(halves) - old[r])
    total -= positive[r] * np.log(1 / (1 + np.exp(-0.4 * gap[0])))
    total -= 0.6 * share[r] * np.log(1 / (1 + np.exp(0.4 * gap[1])))
  rows = batch(share, positive, old=elbos(old))
  value, _ = dmpo.loss(ViewLogp(logp), masks, rows, hp)
  close(value, total / B)


def test_draws_without_the_tail():
  """loss_tail=False: the same masks, but nothing after the first EOS."""
  completion = jnp.arange(L)[None] < jnp.arange(1, R + 1)[:, None] % L + 1
  key, row = jax.random.key(0), jnp.arange(R)
  with_tail = dmpo.draw(key, row, text_of(completion), dmpo.Config())
  without = dmpo.draw(key, row, text_of(completion), dmpo.Config(loss_tail=False))
  want = np.asarray(with_tail.masked) & np.asarray(completion)[:, None]
  np.testing.assert_array_equal(without.masked, want)
  np.testing.assert_array_equal(
    without.masked, masking.restrict(with_tail, completion).masked
  )
  # The loss then averages over those positions only.
  logp = jnp.where(without.masked, -1.5, 0.0)
  weight = draw(7, R)
  close(
    dmpo.wdce(logp, without, jnp.asarray(weight)),
    loop_wdce(np.asarray(logp), want, weight),
  )


def test_draws_are_the_settings():
  """draws, low, high and antithetic reach the masks."""
  key, row = jax.random.key(0), jnp.arange(64)
  completion = jnp.ones((64, 32), bool)
  masks = dmpo.draw(key, row, text_of(completion), dmpo.Config(draws=6))
  assert masks.masked.shape == (64, 6, 32)
  np.testing.assert_array_equal(masks.masked[:, 3:], ~masks.masked[:, :3])
  rate = np.asarray(
    dmpo.draw(
      key, row, text_of(completion), dmpo.Config(low=0.2, high=0.4, antithetic=False)
    ).masked
  ).mean()
  assert rate == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize('low, antithetic', [(0.0, True), (0.1, False)])
def test_masks_leave_the_loss_its_expectation(low, antithetic):
  """Of both kinds, over many rows: the enumerated expectation of 1/m times
  the masked sum; on (0, 1) that is the ELBO over L + 1. Even counts scatter
  less."""
  rows, length = 8000, 5
  table = -np.abs(draw(3, 2**length, length))
  subsets = reference.subsets(length)
  table *= subsets * subsets.sum(1, keepdims=True) ** 2  # less is seen: harder
  key, row = jax.random.key(0), jnp.arange(rows)
  completion = jnp.ones((rows, length), bool)
  want = -reference.bernoulli_elbo(
    table, low, 1.0, antithetic, lambda m, _: 1 / max(m, 1)
  )
  if not low:
    assert want == pytest.approx(-reference.exact_elbo(table) / (length + 1))
  deviation = {}
  for spread in (False, True):
    hp = dmpo.Config(low=low, spread=spread, antithetic=antithetic)
    masked = np.asarray(dmpo.draw(key, row, text_of(completion), hp).masked)
    logp = table[reference.index_of(masked)]
    value = -np.mean(logp.sum(-1) / np.maximum(masked.sum(-1), 1), -1)
    assert abs(value.mean() - want) < 4 * value.std() / rows**0.5
    deviation[spread] = value.std()
  assert deviation[True] < 0.99 * deviation[False]


# --- declarations


def test_wants():
  """Returns the log-probs that every kind of setting compares with."""
  sequence = ('old', 'ref')
  cases = {
    (): Wants(sequence, common_masks=False),
    (('alpha', 0.0),): Wants(common_masks=False),
    (('baseline', 'model'),): Wants(
      sequence, ('old',), common_masks=False, reweigh=True
    ),
    (('baseline', 'model'), ('common_masks', True)): Wants(
      sequence, ('old',), reweigh=True
    ),
    # DDO does not use the signed weight, so it needs no pass of the policy.
    (('loss', 'ddo'),): Wants(sequence, ('old',), common_masks=False),
    (('loss', 'ddo'), ('baseline', 'model')): Wants(
      sequence, ('old',), common_masks=False
    ),
  }
  for changes, wanted in cases.items():
    assert dmpo.wants(dmpo.Config(**dict(changes))) == wanted


@pytest.mark.parametrize(
  'field, changes',
  [
    ('alpha', dict(alpha=-1.0)),
    ('alpha', dict(alpha=float('nan'))),
    ('coef', dict(coef=0.0)),
    ('coef', dict(coef=1.5)),
    ('coef', dict(coef=-1.0, alpha=0.0)),
    ('ess', dict(ess=1.0)),
    ('ess', dict(ess=-0.1)),
    ('baseline', dict(baseline='mean')),
    ('loss', dict(loss='ppo')),
    ('draws', dict(draws=3)),
    ('draws', dict(draws=0, antithetic=False)),
    ('spread', dict(spread=True, draws=2)),
    ('spread', dict(spread=True, draws=1, antithetic=False)),
    ('low', dict(low=0.5, high=0.5)),
    ('high', dict(high=1.1)),
    ('best', dict(best=1.0, alpha=0.0)),
    ('antithetic', dict(loss='ddo')),
    ('spread', dict(loss='ddo', antithetic=False, spread=True)),
    ('loss', dict(loss='ddo', draws=3, antithetic=False)),
    ('common_masks', dict(loss='ddo', antithetic=False, common_masks=True)),
  ],
)
def test_problems_name_the_field(field, changes):
  """One sentence each, with the field by its name in the config."""
  found = dmpo.Config(**changes).problems()
  assert len(found) == 1 and f'objective.{field}' in found[0]


def test_defaults_are_possible():
  """The defaults and every baseline and loss with fitting draws have no problem."""
  assert dmpo.Config().problems() == []
  for baseline in dmpo.BASELINES:
    assert dmpo.Config(baseline=baseline).problems() == []
  assert dmpo.Config(loss='ddo', antithetic=False).problems() == []
