"""What objectives share: settings, advantages, ratios, divergences, draws of masks.

Nothing here knows the model. A policy gradient puts the advantage times the row's
scale into TrainBatch.weight, and the scale alone into TrainBatch.own['scale'], by which
penalties are multiplied.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dmpo_jax import logprob, masking, rng, routing
from dmpo_jax.objectives import credit
from dmpo_jax.rng import AnyKey
from dmpo_jax.rules import (
  Rule,
  Section,
  chance,
  finite,
  least,
  one_of,
  pairs,
  without_effect,
)
from dmpo_jax.rules import above as above  # for the objectives
from dmpo_jax.rules import rates as rates
from dmpo_jax.types import (
  Array,
  BoolRL,
  Canvas,
  FloatBG,
  IntR,
  IntRL,
  Masks,
  Record,
  Scored,
  Text,
  TrainBatch,
  ViewLogp,
)

# --- settings

ADVANTAGES = ('mean', 'loo', 'zscore')
KLS = ('k1', 'k2', 'k3', 'k3_ratio')
CHOICES = ('each', 'uniform', 'entropy', 'top', 'first')


# The rule of a field's name, unless a Config's OWN replaces it.
RULES = {
  'advantage': one_of(*ADVANTAGES),
  'clip': chance,
  'clip_high': least(0),
  'beta': least(0),
  'kl': one_of(*KLS),
  'choose': one_of(*CHOICES),
  'draws': least(1),
  'mask_prompt': chance,
  'elbo_draws': pairs,
}


@dataclasses.dataclass(frozen=True)
class Settings(Section):
  """Base of every objective's Config: its fields are checked by RULES and its own."""

  NAME = 'objective'

  def number(self, x: float) -> str:
    return finite(x)

  def idle(self) -> dict[str, str]:
    own = vars(self)
    return super().idle() | without_effect(
      ('kl', own.get('beta', 1), 'objective.beta > 0'),
      ('elbo_draws', own.get('elbo_coef', 1), 'objective.elbo_coef other than 0'),
      ('skip_scale', own.get('skip_equal', 1), 'objective.skip_equal = True'),
    )

  def rules(self) -> dict[str, Rule]:
    return {**super().rules(), **RULES, **self.OWN}


@dataclasses.dataclass(frozen=True)
class Common(Settings):
  """Settings of every objective."""

  skip_equal: bool = False  # give groups of equal rewards no weight (DAPO)
  skip_scale: bool = True  # skip_equal: divide by the number of the other groups
  elbo_coef: float = 0.0  # of the rollouts' mean ELBO per token, added; 0 = off
  elbo_draws: int = 2  # masked copies of that ELBO, in complementary pairs


@dataclasses.dataclass(frozen=True)
class PolicyGradient(Settings):
  """Settings of objectives with clipped ratios."""

  advantage: str = 'mean'  # reward less: mean | loo (mean of the others) | zscore
  clip: float = 0.2  # ratios are clipped below at 1 - clip
  clip_high: float = 0.0  # ratios are clipped above at 1 + clip_high; 0 = as clip

  @property
  def bounds(self) -> tuple[float, float]:
    return self.clip, self.clip_high or self.clip


@dataclasses.dataclass(frozen=True)
class PenalisedGradient(PolicyGradient):
  """Settings of objectives with clipped ratios and a KL penalty."""

  beta: float = 0.0  # factor of the KL to the reference; 0 = off
  kl: str = 'k3'  # estimator of the KL: k1 | k2 | k3 | k3_ratio


@dataclasses.dataclass(frozen=True)
class StepCredit(Settings):
  """Settings of policy gradients along recorded steps: a step may have its own."""

  # prefix: reward less the mean of the others that were in the step's state
  advantage: str = 'mean'  # reward less: mean | loo | zscore | prefix
  credit_shrink: float = 2.0  # prefix: so many completions pull to the state before

  def rules(self) -> dict[str, Rule]:
    return super().rules() | {'advantage': one_of(*ADVANTAGES, 'prefix')}

  def idle(self) -> dict[str, str]:
    prefix = self.advantage == 'prefix'
    return super().idle() | without_effect(
      ('credit_shrink', prefix, 'objective.advantage = prefix')
    )


@dataclasses.dataclass(frozen=True)
class ElboMasks(Settings):
  """Settings of objectives whose masks `draw_elbo` draws."""

  masks: str = 'stratified'  # masks of the ELBO: stratified | random | order
  draws: int = 4  # masked copies of a completion per update

  def rules(self) -> dict[str, Rule]:
    draws = pairs if self.masks == 'stratified' else least(1)
    masks = one_of('stratified', 'random', 'order')
    return super().rules() | {'masks': masks, 'draws': draws}


@dataclasses.dataclass(frozen=True)
class StepDraws(Settings):
  """Settings of objectives whose masks `draw_steps` draws."""

  # Which steps stand for all: each | uniform | entropy | top | first.
  choose: str = 'entropy'
  draws: int = 24  # steps of a row per update; 0 with choose = each: all
  first: int = 4  # first: so many of the draws are the first steps, surely

  def rules(self) -> dict[str, Rule]:
    found = super().rules() | {'draws': least(0 if self.choose == 'each' else 1)}
    if self.choose == 'first':
      found['first'] = self.leaves_some
    return found

  def leaves_some(self, x: int) -> str:
    """The rule of `first`: later steps must have a chance, or they count nothing."""
    good = 1 <= x < self.draws
    return '' if good else f'must be in 1 to objective.draws - 1 = {self.draws - 1}'

  def idle(self) -> dict[str, str]:
    first = self.choose == 'first'
    return super().idle() | without_effect(('first', first, 'objective.choose = first'))


# --- advantages


def advantages(reward_BxG: FloatBG, kind: str) -> FloatBG:
  """Returns rewards less their group's: mean, loo (of the others), zscore."""
  group = reward_BxG.shape[1]
  # Equal rewards become zeros: the mean of eight times 0.1 is not 0.1 in float32,
  # and a z-score would make ones of the difference.
  reward_BxG = reward_BxG - reward_BxG[:, :1]
  centred = reward_BxG - jnp.mean(reward_BxG, axis=1, keepdims=True)
  if kind == 'loo':
    return centred * group / (group - 1)
  if kind == 'zscore':
    std = jnp.std(reward_BxG, axis=1, keepdims=True)
    return jnp.where(std > 0, centred / jnp.where(std > 0, std, 1.0), 0.0)
  return centred


def per_row(scored: Scored) -> FloatBG:
  """Returns the scales by which a loss is a mean over completions."""
  return jnp.full_like(scored.reward, 1 / scored.reward.shape[1])


def per_length(scored: Scored) -> FloatBG:
  """Returns the scales by which a loss is a mean over completions of token means."""
  return per_row(scored) / jnp.maximum(scored.length, 1)


def per_token(scored: Scored) -> FloatBG:
  """Returns the scales by which a loss is a mean over the batch's tokens."""
  length, live = scored.length, scored.live_of()
  if live is None:
    live = jnp.ones(scored.reward.shape[:1], bool)
  else:
    length = length * live[:, None]
  scale = jnp.sum(live) / jnp.maximum(jnp.sum(length), 1)
  return jnp.broadcast_to(scale, scored.reward.shape)


def weigh(scored: Scored, hp: Any, scale_BxG: FloatBG) -> tuple:
  """Returns what `weigh` of a policy gradient returns.

  With advantage = prefix own['credit'] has the weights of single tokens, and the row's
  are those of its first step.
  """
  own, kind = {'scale': scale_BxG}, hp.advantage
  if kind == 'prefix':
    kind = 'loo'
    tokens = credit.prefix_advantages(scored, scored.reward, hp.credit_shrink)
    own['credit'] = tokens * scale_BxG[..., None]
  advantage = advantages(scored.reward, kind)
  metrics = {'advantage_abs': jnp.mean(jnp.abs(advantage))}
  return advantage * scale_BxG, own, metrics


def weigh_rows(scored: Scored, hp: Any) -> tuple:
  """Weighs for a mean over completions."""
  return weigh(scored, hp, per_row(scored))


def weigh_tokens(scored: Scored, hp: Any) -> tuple:
  """Weighs for a mean over the batch's tokens."""
  return weigh(scored, hp, per_token(scored))


def weight_for(x: Array, batch: TrainBatch) -> Array:
  """Returns weights that broadcast to x (R, ...): credits where tokens have them."""
  credits = batch.own.get('credit')
  return like(batch.weight, x) if credits is None else credits[:, None]


# --- ratios and divergences


def surrogate(gap: Array, weight: Array, low: float, high: float) -> Array:
  """Returns min(rho w, clip(rho, 1 - low, 1 + high) w) of rho = exp(gap), elementwise.

  At a tie its gradient is that of rho w, so that low = high = 0 lets the first update
  through (ESPO's Countdown setting).
  """
  # A weight below zero has no upper bound: float32 must still hold exp.
  gap = jnp.minimum(gap, 20.0)
  ratio = jnp.exp(jax.lax.stop_gradient(gap))
  stopped = jnp.where(weight > 0, ratio > 1 + high, ratio < 1 - low)
  edge = jnp.where(weight > 0, 1 + high, 1 - low)
  free = jnp.exp(jnp.where(stopped, 0.0, gap))
  return weight * jnp.where(stopped, edge, free)


def kl(kind: str, now: Array, ref: Any, old: Any = None) -> Array:
  """Estimates KL(now || ref) from log-probs of samples, elementwise.

  k1: the gap, with the gradient of the KL, which is gap times that of `now` (the gap's
  own gradient is zero on average); k2: half its square; k3: exp(-gap) + gap - 1;
  k3_ratio: k3 times exp(now - old) (AGRPO).
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


def like(x: Array, y: Array) -> Array:
  """Returns x with as many trailing axes of size 1 as y has more."""
  return x.reshape(x.shape + (1,) * (y.ndim - x.ndim))


def terms(now: Array, old: Array, batch: TrainBatch, hp: Any, ref: Any = None) -> Array:
  """Returns -surrogate + beta KL, elementwise, of log-probs (R, ...)."""
  value = -surrogate(now - old, weight_for(now, batch), *hp.bounds)
  if hp.beta:
    scale = like(batch.own['scale'], now)
    value += hp.beta * scale * kl(hp.kl, now, ref, old)
  return value


def total(terms_RxKxL: Array, masks: Masks, batch: TrainBatch) -> Array:
  """Returns counted terms times their copy's weight: a mean over copies, a sum over
  rows, divided by the number of groups."""
  counted = jnp.where(masks.counted, terms_RxKxL, 0.0)
  rows = jnp.mean(logprob.copy_sums(counted, masks.weight), axis=1)
  return jnp.sum(rows) / batch.norm


def gap_metrics(now: Array, old: Array, counted: Array, batch: TrainBatch) -> dict:
  """Returns the mean |log ratio| to the policy that sampled, over counted tokens."""
  axes = tuple(range(1, now.ndim))
  size = jnp.maximum(jnp.sum(counted, axis=axes), 1)
  far = jnp.sum(jnp.abs(now - old) * counted, axis=axes)
  return {'ratio_log_abs': jnp.sum(far / size) / batch.total}


def token_loss(
  now: Array, old: Array, ref: Any, masks: Masks, batch: TrainBatch, hp: Any
) -> tuple:
  """Returns (sum of the counted tokens' terms over rows / norm, metrics)."""
  old = jnp.broadcast_to(old, now.shape)
  metrics = gap_metrics(now, old, masks.counted, batch)
  return total(terms(now, old, batch, hp, ref), masks, batch), metrics


def elbo_loss(now: ViewLogp, masks: Masks, batch: TrainBatch, hp: Any) -> tuple:
  """Returns -sum of weight times ELBO, per group, and metrics.

  This is the gradient of any function of the rows' ELBOs where `reweigh` gives its
  derivatives.
  """
  elbo = logprob.seq_elbo(now.logp, masks.weight)
  loss = -jnp.sum(batch.weight * elbo) / batch.norm
  return loss, {'elbo': jnp.sum(elbo) / batch.total}


# --- draws of masks


def draw_random(key: AnyKey, row_R: IntR, canvas: Canvas, draws: int) -> Masks:
  """Draws independent masks of m ~ U{1..L} positions, weight L / m (LLaDA's, RADD's).

  The ELBO under them is unbiased.
  """
  if canvas.block:
    return masking.draw_blocks(key, row_R, canvas, draws)
  length = canvas.length

  def of_row(key):
    key_count, key_order = jax.random.split(key)
    count = jax.random.randint(key_count, (draws,), 1, length + 1)
    return masking.anywhere(key_order, count, length)

  masked = rng.per_row(key, row_R, of_row)
  return masking.per_copy(masked, length / jnp.sum(masked, axis=-1))


def draw_elbo(key: AnyKey, row_R: IntR, text: Text, hp: Any) -> Masks:
  """Draws masks of an unbiased ELBO: hp.masks = stratified (pairs) | random | order."""
  draw = {
    'stratified': masking.draw_stratified, 'random': draw_random, 'order': draw_order
  }  # fmt: skip
  return draw[hp.masks](key, row_R, text.canvas, hp.draws)


# --- recorded steps


def by_step(order_RxL: IntRL, x_RxL: Array) -> Array:
  """Returns (R, L) sums of x over the tokens of each step; steps are below L."""
  length = order_RxL.shape[1]
  at = jnp.where(order_RxL < 0, length, order_RxL)
  return jax.vmap(lambda at, x: jnp.zeros(length, x.dtype).at[at].add(x, mode='drop'))(
    at, x_RxL
  )


# An estimator is a function (strata u (R, K), wanted (R, T), entropy (R, T) or None)
# -> (step (R, K) int32, weight (R, K)). Weights are 0 where a row wants no step.


def kth_wanted(wanted_RxT: BoolRL, at_RxK: Array) -> Array:
  """Returns the wanted steps of number at_RxK, counted from 0 in order of time."""
  first = jnp.argsort(~wanted_RxT, axis=1, stable=True)
  return jnp.take_along_axis(first, at_RxK, axis=1)


def from_strata(u_RxK: Array, wanted_RxT: BoolRL) -> Array:
  """Returns a number of a wanted step from each of K even strata."""
  count = jnp.sum(wanted_RxT, axis=1, keepdims=True)
  return jnp.minimum(jnp.floor(u_RxK * count), jnp.maximum(count - 1, 0)).astype(
    jnp.int32
  )


def every_weight(u_RxK: Array, wanted_RxT: BoolRL) -> tuple[Array, Array]:
  """Returns (few, weight) of visiting the wanted steps one by one.

  few: whether at most K are wanted. The first n of K copies then weigh K / n, so that
  the mean over copies is the mean over the n wanted steps.
  """
  draws = u_RxK.shape[1]
  count = jnp.sum(wanted_RxT, axis=1, keepdims=True)
  weight = draws / jnp.maximum(count, 1) * (jnp.arange(draws)[None] < count)
  return count <= draws, weight


def choose_uniform(u_RxK: Array, wanted_RxT: BoolRL, entropy: Any) -> tuple:
  """Chooses one step from each of K even strata of the wanted."""
  at = from_strata(u_RxK, wanted_RxT)
  any_wanted = jnp.any(wanted_RxT, axis=1, keepdims=True)
  weight = jnp.broadcast_to(any_wanted.astype(jnp.float32), at.shape)
  return kth_wanted(wanted_RxT, at), weight


def choose_each(u_RxK: Array, wanted_RxT: BoolRL, entropy: Any) -> tuple:
  """Chooses every wanted step where there are at most K, else as `choose_uniform`."""
  few, every = every_weight(u_RxK, wanted_RxT)
  last = wanted_RxT.shape[1] - 1
  in_turn = jnp.minimum(jnp.arange(u_RxK.shape[1])[None], last)
  at = jnp.where(few, in_turn, from_strata(u_RxK, wanted_RxT))
  return kth_wanted(wanted_RxT, at), jnp.where(few, every, 1.0)


def choose_top(u_RxK: Array, wanted_RxT: BoolRL, entropy_RxT: Any) -> tuple:
  """Chooses the K steps of most entropy: the mean over those alone, biased."""
  few, every = every_weight(u_RxK, wanted_RxT)
  score = jnp.where(wanted_RxT, entropy_RxT, -jnp.inf)
  best = jnp.argsort(-score, axis=1, stable=True)[:, : u_RxK.shape[1]]
  return best, jnp.where(few, every, 1.0)


def choose_entropy(u_RxK: Array, wanted_RxT: BoolRL, entropy_RxT: Any) -> tuple:
  """Chooses steps in proportion to their entropy, with importance weights (AGRPO).

  A step of chance p weighs 1 / (n p) for n wanted steps, so the mean stays unbiased.
  """
  count = jnp.sum(wanted_RxT, axis=1, keepdims=True)
  p = jnp.where(wanted_RxT, jnp.maximum(entropy_RxT, 1e-6), 0.0)
  p /= jnp.maximum(jnp.sum(p, axis=1, keepdims=True), 1e-30)
  # side = right: u = 0 must not choose a first step of chance 0.
  step = jax.vmap(lambda total, u: jnp.searchsorted(total, u, 'right'))(
    jnp.cumsum(p, axis=1), u_RxK
  )
  number = jnp.arange(wanted_RxT.shape[1])[None]
  last = jnp.max(jnp.where(wanted_RxT, number, 0), axis=1, keepdims=True)
  step = jnp.minimum(step, last)  # the sum may be below one by rounding
  own = jnp.take_along_axis(p, step, axis=1)
  return step, jnp.where(count > 0, 1 / jnp.maximum(count * own, 1e-30), 0.0)


def choose_first(
  key: AnyKey, row_R: IntR, wanted_RxT: BoolRL, first: int, draws: int
) -> tuple[Array, Array]:
  """Chooses the first steps surely, and the other draws at random from the rest.

  S-GRPO's rule (arXiv 2504.20834) made unbiased: k of the n - a later steps, drawn
  without replacement, weigh (n - a) / k of a first one. Returns as `choose_steps`.
  """
  steps, rest = wanted_RxT.shape[1], draws - first
  noise = rng.per_row(key, row_R, lambda key: jax.random.uniform(key, (steps,)))
  number = jnp.cumsum(wanted_RxT, axis=1) - 1
  rank = jnp.where(number < first, number - steps, noise)  # all below the noise
  rank = jnp.where(wanted_RxT, rank, 2.0)
  step = jnp.argsort(rank, axis=1, stable=True)[:, :draws]
  few, every = every_weight(step, wanted_RxT)
  count = jnp.sum(wanted_RxT, axis=1, keepdims=True)
  weight = jnp.where(jnp.arange(step.shape[1])[None] < first, 1, (count - first) / rest)
  return step, jnp.where(few, every, weight * step.shape[1] / jnp.maximum(count, 1))


CHOOSE = {
  'each': choose_each,
  'uniform': choose_uniform,
  'entropy': choose_entropy,
  'top': choose_top,
}


def choose_steps(
  key: AnyKey, row_R: IntR, wanted_RxT: BoolRL, entropy: Any, choose: str, draws: int
) -> tuple[Array, Array]:
  """Chooses K of a row's wanted steps: (step (R, K) int32, weight (R, K)).

  The mean over copies of weight * f(step) estimates that of f over all wanted steps,
  unbiased but for `top`.
  """
  if choose in ('each', 'top'):  # no step twice
    draws = min(draws, wanted_RxT.shape[1])
  offset = rng.per_row(key, row_R, lambda key: jax.random.uniform(key, (draws,)))
  u_RxK = (jnp.arange(draws)[None] + offset) / draws
  return CHOOSE[choose](u_RxK, wanted_RxT, entropy)


def draw_steps(
  key: AnyKey,
  row_R: IntR,
  record: Record,
  wanted_RxT: BoolRL,
  hp: Any,
  mean: bool = False,
) -> Masks:
  """Draws the states before `hp.draws` (0: all) of the wanted steps.

  The tokens that a step unmasked are counted. mean: a step's entropy is the mean over
  its tokens, not the sum.
  """
  order, entropy = record.order, None
  if hp.choose == 'first':
    step, weight = choose_first(key, row_R, wanted_RxT, hp.first, hp.draws)
    return masks_of_steps(order, step, weight)
  if hp.choose in ('entropy', 'top'):
    entropy = by_step(order, record.more['entropy'])
    if mean:
      entropy /= jnp.maximum(by_step(order, jnp.ones_like(entropy)), 1)
  step, weight = choose_steps(
    key, row_R, wanted_RxT, entropy, hp.choose, hp.draws or order.shape[1]
  )
  return masks_of_steps(order, step, weight)


def masks_of_steps(order_RxL: IntRL, step_RxK: Array, weight_RxK: Array) -> Masks:
  """Returns the states before the steps, in which the steps' tokens are counted."""
  order, step, weight = order_RxL[:, None], step_RxK[..., None], weight_RxK
  masked = (order >= step) | (order < 0)
  masks = masking.per_copy(masked, weight)
  return masks._replace(counted=(order == step) & (masks.weight > 0))


def recorded_rounds(order_RxL: IntRL, block: int, shrink: int = 1) -> tuple[IntRL, int]:
  """Returns each token's round (-1: it was never masked), and how many there can be.

  Rounds are those of a token's attention block, else (block 0) the row's steps. shrink:
  so many consecutive ones are one.
  """
  rounds = routing.rounds_of(order_RxL, block) if block else order_RxL
  rounds = jnp.where(rounds < 0, -1, rounds // shrink)
  return rounds, -(-(block or order_RxL.shape[1]) // shrink)


def draw_rounds(
  key: AnyKey, row_R: IntR, round_RxL: IntRL, counted_RxL: BoolRL, most: int, draws: int
) -> Masks:
  """Draws the states before `draws` (0: all) of the rounds, which read their tokens.

  Rounds are below `most`; a token of round -1 is never masked. The mean over copies of
  the weighted sum is the sum over the counted tokens: exact where a row has no more
  rounds than `draws`, else unbiased.
  """
  wanted = by_step(round_RxL, counted_RxL.astype(jnp.int32))[:, :most] > 0
  at, weight = choose_steps(key, row_R, wanted, None, 'each', draws or most)
  weight *= jnp.sum(wanted, axis=1, keepdims=True)
  round_RxKxL, at, weight = round_RxL[:, None], at[..., None], weight[..., None]
  now = (round_RxKxL == at) & counted_RxL[:, None] & (weight > 0)
  return Masks(round_RxKxL >= at, jnp.where(now, weight, 0.0), now)


def draw_order(key: AnyKey, row_R: IntR, canvas: Canvas, draws: int) -> Masks:
  """Draws one random order of a block's free tokens, and reads `draws` places of it.

  The ELBO under these masks is unbiased; with all places each token is read once.
  """
  order = masking.random_rounds(rng.substream(key, 'order'), row_R, canvas)
  most = canvas.block or canvas.length
  return draw_rounds(key, row_R, order, order >= 0, most, draws)


def shown_steps(record: Record, tokens_RxL: BoolRL) -> BoolRL:
  """Returns the steps that unmasked one of the tokens, (R, T)."""
  return by_step(record.order, tokens_RxL.astype(jnp.int32)) > 0


def counted_sums(x_RxKxL: Array, masks: Masks) -> Array:
  """Returns the sum over a copy's counted positions, (R, K)."""
  return jnp.sum(jnp.where(masks.counted, x_RxKxL, 0.0), axis=-1)


def weight_of_steps(batch: TrainBatch, masks: Masks) -> Array:
  """Returns the rows' weights, or their tokens' at each copy's step, (R, K)."""
  weight = weight_for(masks.counted, batch)
  if weight.shape[-1] > 1:  # a step's tokens have one weight
    size = jnp.maximum(jnp.sum(masks.counted, axis=-1), 1)
    return counted_sums(weight, masks) / size
  return jnp.broadcast_to(weight[..., 0], masks.counted.shape[:2])


def step_weight(masks: Masks) -> Array:
  """Returns the copies' weights, (R, K), of masks drawn by `draw_steps`."""
  return masks.weight[..., 0]
