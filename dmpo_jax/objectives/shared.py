"""What objectives share: advantages, ratios, divergences, draws of masks.

Nothing here knows the model. Policy gradients put the advantage times the
row's scale into TrainBatch.weight and the scale alone into `positive`: what a
penalty is multiplied by.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmpo_jax import logprob, masking, rng
from dmpo_jax.types import Masks


@dataclasses.dataclass(frozen=True)
class Common:
  """Settings of every objective."""

  skip_equal: bool = False  # groups of equal rewards count for nothing
  elbo_coef: float = 0.0  # of the mean ELBO per token that is added; 0 = off
  elbo_draws: int = 2  # masks of that ELBO, pairs of complements


# --- advantages

ADVANTAGES = ('mean', 'loo', 'zscore')


def advantages(reward_BxG, kind):
  """(B, G) rewards less their group's: mean, loo (of the others), zscore."""
  group = reward_BxG.shape[1]
  # Equal rewards become zeros: the mean of eight times 0.1 is not 0.1 in
  # float32, and a z-score would make ones of what is left.
  reward_BxG = reward_BxG - reward_BxG[:, :1]
  centred = reward_BxG - jnp.mean(reward_BxG, axis=1, keepdims=True)
  if kind == 'loo':
    return centred * group / (group - 1)
  if kind == 'zscore':
    std = jnp.std(reward_BxG, axis=1, keepdims=True)
    return jnp.where(std > 0, centred / jnp.where(std > 0, std, 1.0), 0.0)
  return centred


def per_row(scored):
  """(B, G) scales by which a loss is a mean over completions."""
  return jnp.full_like(scored.reward, 1 / scored.reward.shape[1])


def per_token(scored):
  """(B, G) scales by which a loss is a mean over the batch's tokens."""
  length, live = scored.length, jnp.ones(scored.reward.shape[:1], bool)
  if scored.live is not None:
    live, length = scored.live, length * scored.live[:, None]
  scale = jnp.sum(live) / jnp.maximum(jnp.sum(length), 1)
  return jnp.broadcast_to(scale, scored.reward.shape)


def weigh(scored, kind, scale_BxG):
  """What `weigh` of a policy gradient returns, and metrics."""
  advantage = advantages(scored.reward, kind)
  return (
    advantage * scale_BxG,
    scale_BxG,
    {'advantage_abs': jnp.mean(jnp.abs(advantage))},
  )


def weigh_rows(scored, hp):
  """`weigh` for a mean over completions."""
  return weigh(scored, hp.advantage, per_row(scored))


def weigh_tokens(scored, hp):
  """`weigh` for a mean over the batch's tokens."""
  return weigh(scored, hp.advantage, per_token(scored))


# --- ratios and divergences


def surrogate(gap, weight, low, high):
  """min(rho w, clip(rho, 1 - low, 1 + high) w) of rho = exp(gap), elementwise.

  At a tie its gradient is that of rho w, so that low = high = 0 lets the first
  update through (ESPO's Countdown).
  """
  # A weight below zero has no upper bound: float32 must still hold exp.
  gap = jnp.minimum(gap, 20.0)
  ratio = jnp.exp(jax.lax.stop_gradient(gap))
  stopped = jnp.where(weight > 0, ratio > 1 + high, ratio < 1 - low)
  edge = jnp.where(weight > 0, 1 + high, 1 - low)
  return weight * jnp.where(stopped, edge, jnp.exp(jnp.where(stopped, 0.0, gap)))


KLS = ('k1', 'k2', 'k3', 'k3_ratio')


def kl(kind, now, ref, old=None):
  """Estimates of KL(now || ref) by log-probs of samples, elementwise.

  k1: the gap, with the gradient of the KL, which is gap times that of `now`
  (of the gap itself it would be zero on average); k2: half its square; k3:
  exp(-gap) + gap - 1; k3_ratio: k3 times exp(now - old) (AGRPO).
  """
  gap = now - ref
  if kind == 'k1':
    far = jax.lax.stop_gradient(gap)
    return far + far * (now - jax.lax.stop_gradient(now))
  if kind == 'k2':
    return gap**2 / 2
  # float32 must hold the exp of a long sequence's gap: a line from e^20 on.
  rise = jnp.exp(jnp.minimum(-gap, 20.0)) * (1 + jnp.maximum(-gap - 20.0, 0.0))
  value = rise + gap - 1
  if kind == 'k3':
    return value
  return value * jnp.exp(jnp.minimum(now - old, 20.0))


def like(x, y):
  """x with axes of size 1 behind, as many as y has more."""
  return x.reshape(x.shape + (1,) * (y.ndim - x.ndim))


def terms(now, old, batch, hp, ref=None):
  """-surrogate + beta KL, elementwise, of log-probs (R, ...)."""
  value = -surrogate(
    now - old, like(batch.weight, now), hp.clip, hp.clip_high or hp.clip
  )
  if hp.beta:
    value += hp.beta * like(batch.positive, now) * kl(hp.kl, now, ref, old)
  return value


def total(terms_RxKxL, masks, batch):
  """Counted terms times their draw's weight: a mean over draws, a sum over
  rows, per group."""
  counted = jnp.where(masks.counted, terms_RxKxL, 0.0)
  rows = jnp.mean(masks.weight * jnp.sum(counted, axis=-1), axis=1)
  return jnp.sum(rows) / batch.norm


def gap_metrics(now, old, counted, batch):
  """How far a policy is from the one that sampled, for each token counted."""
  size = jnp.maximum(jnp.sum(counted, axis=tuple(range(1, now.ndim))), 1)
  far = jnp.sum(jnp.abs(now - old) * counted, axis=tuple(range(1, now.ndim)))
  return {'ratio_log_abs': jnp.sum(far / size) / batch.total}


def no_reweigh(elbo_R, elbo_old_R, batch, group, hp):
  """Of objectives whose weights do not change between updates."""
  return batch.weight


def elbo_loss(logp_RxKxL, masks, batch, elbo_old_R, hp):
  """-sum of weight times ELBO, per group: the gradient of any function of the
  rows' ELBOs, where `reweigh` gives its derivatives."""
  elbo = logprob.seq_elbo(logp_RxKxL, masks.weight)
  return -jnp.sum(batch.weight * elbo) / batch.norm, {
    'elbo': jnp.sum(elbo) / batch.total
  }


# --- draws of masks


def draw_random(key, row_R, length, draws):
  """Independent masks of m ~ U{1..L} positions, weight L/m: an unbiased ELBO
  (LLaDA's, RADD's)."""

  def one(key):
    key_count, key_order = jax.random.split(key)
    count = jax.random.randint(key_count, (draws,), 1, length + 1)
    return masking.anywhere(key_order, count, length)

  masked = rng.per_row(key, row_R, one)
  return Masks(masked, length / jnp.sum(masked, axis=-1))


def draw_elbo(key, row_R, completion_RxL, hp):
  """Masks of an unbiased ELBO, by hp.masks: stratified (pairs) | random."""
  draw = {'stratified': masking.draw_stratified, 'random': draw_random}
  return draw[hp.masks](key, row_R, completion_RxL.shape[1], hp.draws)


# --- recorded steps

CHOICES = ('each', 'uniform', 'entropy', 'top')


def by_step(order_RxL, x_RxL):
  """(R, L) sums of x over the tokens of each step; steps are below L."""
  length = order_RxL.shape[1]
  at = jnp.where(order_RxL < 0, length, order_RxL)
  return jax.vmap(lambda at, x: jnp.zeros(length, x.dtype).at[at].add(x, mode='drop'))(
    at, x_RxL
  )


def choose_steps(key, row_R, wanted_RxT, entropy_RxT, choose, draws):
  """(step (R, K) int32, weight (R, K)) among a row's wanted steps.

  The mean over draws of weight * f(step) is that of f over all wanted steps:
  with `each` exactly where there are at most K of them, else from K strata;
  `uniform` always from strata; `entropy` in proportion to entropy_RxT, with
  importance weights (AGRPO); `top`, the K of most entropy, is the mean over
  those alone (biased). Weights are 0 where a row wants none.
  """
  if choose in ('each', 'top'):  # no step twice
    draws = min(draws, wanted_RxT.shape[1])
  count = jnp.sum(wanted_RxT, axis=1, keepdims=True)
  place = jnp.arange(draws)[None]
  first = jnp.argsort(~wanted_RxT, axis=1, stable=True)  # the wanted, in order
  each = draws / jnp.maximum(count, 1) * (place < count)
  if choose == 'top':
    score = jnp.where(wanted_RxT, entropy_RxT, -jnp.inf)
    best = jnp.argsort(-score, axis=1, stable=True)[:, :draws]
    return best, jnp.where(count <= draws, each, 1.0)
  u = (
    place + rng.per_row(key, row_R, lambda key: jax.random.uniform(key, (draws,)))
  ) / draws
  if choose == 'entropy':
    chance = jnp.where(wanted_RxT, jnp.maximum(entropy_RxT, 1e-6), 0.0)
    chance /= jnp.maximum(jnp.sum(chance, axis=1, keepdims=True), 1e-30)
    # To the right: u = 0 is not the first step's if that has no chance.
    step = jax.vmap(lambda total, u: jnp.searchsorted(total, u, 'right'))(
      jnp.cumsum(chance, axis=1), u
    )
    last = jnp.max(
      jnp.where(wanted_RxT, jnp.arange(wanted_RxT.shape[1])[None], 0),
      axis=1,
      keepdims=True,
    )
    step = jnp.minimum(step, last)  # the sum may be below one by rounding
    own = jnp.take_along_axis(chance, step, axis=1)
    return step, jnp.where(count > 0, 1 / jnp.maximum(count * own, 1e-30), 0.0)
  at = jnp.minimum(jnp.floor(u * count), jnp.maximum(count - 1, 0)).astype(jnp.int32)
  if choose == 'each':
    few = count <= draws
    at = jnp.where(few, jnp.minimum(place, wanted_RxT.shape[1] - 1), at)
    weight = jnp.where(few, each, 1.0)
  else:
    weight = jnp.broadcast_to((count > 0).astype(jnp.float32), at.shape)
  return jnp.take_along_axis(first, at, axis=1), weight


def draw_steps(key, row_R, record, wanted_RxT, hp, mean=False):
  """Masks of the states before `hp.draws` (0: all) of the wanted steps.

  What a step revealed is counted. mean: entropies of a step are averaged, not
  summed.
  """
  order = record['order']
  entropy = None
  if hp.choose in ('entropy', 'top'):
    entropy = by_step(order, record['entropy'])
    if mean:
      entropy /= jnp.maximum(by_step(order, jnp.ones_like(entropy)), 1)
  step, weight = choose_steps(
    key, row_R, wanted_RxT, entropy, hp.choose, hp.draws or order.shape[1]
  )
  order, step = order[:, None], step[..., None]
  masked = (order >= step) | (order < 0)
  return Masks(masked, weight, (order == step) & (weight > 0)[..., None])


def shown_steps(record, tokens_RxL):
  """(R, T) bool: steps that revealed one of the tokens."""
  return by_step(record['order'], tokens_RxL.astype(jnp.int32)) > 0


# --- what cannot be


def complain(hp, **allowed):
  """Complaints about fields: a tuple lists values, a function tests them."""
  found = []
  for name, rule in allowed.items():
    value = getattr(hp, name)
    if isinstance(rule, tuple) and value not in rule:
      found.append(f'objective.{name} = {value!r} must be one of {", ".join(rule)}')
    elif callable(rule) and (said := rule(value)):
      found.append(f'objective.{name} = {value} {said}')
  return found


def least(low):
  return lambda x: '' if x >= low else f'must be >= {low}'


def above(low):
  return lambda x: '' if x > low else f'must be > {low}'


def chance(x):
  return '' if 0 <= x < 1 else 'must be in [0, 1)'


def pairs(x):
  return (
    '' if x >= 2 and x % 2 == 0 else ('must be even: masks come with their complements')
  )


def ratio_rules(hp):
  """Complaints about the fields of `terms`."""
  return complain(
    hp, advantage=ADVANTAGES, clip=chance, clip_high=least(0), beta=least(0), kl=KLS
  )


def elbo_rules(hp):
  """Complaints about the fields of `draw_elbo`."""
  return complain(
    hp,
    masks=('stratified', 'random'),
    draws=pairs if hp.masks == 'stratified' else least(1),
  )
