"""The pick rules: which proposals of an unmasking step are kept.

A rule is a function (Look, SampleConfig) -> (R, W) bool. It returns a subset of
look.masked, with at least one position in every row that has one (unless the
schedule plans none). PICKS names the rules. Ties go to the lower position.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from dmpo_jax.sampler.config import SampleConfig, Sampler
from dmpo_jax.types import Array, BoolR, BoolRW, FloatR, FloatRW, FloatRWV, IntR, IntRW

FloatAny = Float[Array, '*rows']
FloatAnyW = Float[Array, '*rows W']
BoolAnyW = Bool[Array, '*rows W']


class Look(NamedTuple):
  """What a pick rule sees of one step: every position of each row's block."""

  prob: FloatRWV  # the law that rules judge by
  confidence: FloatRW  # probability of the proposal, or of the best token
  masked: BoolRW  # positions that are still masked
  quota: IntR  # tokens that the schedule plans for this step
  share: FloatR  # the same, as a share of the masked positions
  noise: FloatRW  # uniform on (0, 1)
  alone: BoolR | None = None  # rows that take their window's first token alone
  bound: FloatR | None = None  # each row's own Pick.bound; None: the settings'


@dataclasses.dataclass(frozen=True)
class Pick(Sampler):
  """A sampler that is a rule within the loops of unmask.py."""

  rule: Callable[[Look, SampleConfig], BoolRW]


def bound_of(look: Look, hp: SampleConfig) -> Array:
  """Returns the number of the rule: one for all rows, or (R, 1) of each its own."""
  if look.bound is None:
    return getattr(hp, PICKS[hp.pick].bound)
  return look.bound[:, None]


def schedule(
  hp: SampleConfig, masked_RxW: BoolRW, since_R: IntR
) -> tuple[IntR, FloatR]:
  """Returns (quota_R, share_R) of a row's step number `since_R` in its block.

  even: floor(W/n) tokens in each of a block's n steps, and one more in the
  first W mod n (LLaDA generate.py:22-41). nearest: the integer nearest to the masks
  left per step left, and at least one (dllm's schedule). dream: floor(m (1 - s/t)) of
  m masks, for times t from 1 to 1e-3; the last step takes all (Dream
  generation_utils.py).
  """
  steps = max(1, hp.steps // (hp.length // hp.block))
  at_R = jnp.minimum(since_R, steps - 1)
  masks_R = jnp.sum(masked_RxW, axis=1).astype(jnp.float32)
  if hp.schedule == 'dream':
    times = np.linspace(1, 1e-3, steps + 1, dtype=np.float32)
    shares = np.append(1 - times[1:-1] / times[:-2], np.float32(1))
    share_R = jnp.asarray(shares)[at_R]
    return jnp.floor(masks_R * share_R).astype(jnp.int32), share_R
  quota_R = hp.block // steps + (since_R < hp.block % steps)
  left_R = (steps - at_R).astype(jnp.float32)
  if hp.schedule == 'nearest':
    quota_R = jnp.maximum(jnp.round(masks_R / left_R), 1).astype(jnp.int32)
  return quota_R, 1 / left_R


def rank_of(score_RxW: FloatRW, masked_RxW: BoolRW) -> IntRW:
  """Returns ranks: 0 for the highest masked score; ties go to the lower position.

  A nan or -inf ranks last of the masked, not among the others: a step would take
  nothing.
  """
  least = jnp.finfo(jnp.float32).min
  score = jnp.where(jnp.isnan(score_RxW), least, jnp.maximum(score_RxW, least))
  score = jnp.where(masked_RxW, score, -jnp.inf)
  order = jnp.argsort(-score, axis=1, stable=True)
  return jnp.argsort(order, axis=1)


def by_rank(look: Look, score_RxW: FloatRW) -> BoolRW:
  """Takes the quota's best."""
  return look.masked & (rank_of(score_RxW, look.masked) < look.quota[:, None])


def by_score(look: Look, score_RxW: FloatRW, hp: SampleConfig) -> BoolRW:
  """Takes the quota's best; with rank_temperature T draws from softmax(score / T).

  It draws without replacement, by Gumbel top-k (Dream's alg_temp). The noise has
  2^23 values, so positions of chance < 1e-7 are drawn last.
  """
  if hp.rank_temperature:
    gumbel = -jnp.log(-jnp.log(jnp.maximum(look.noise, 1e-30)))
    score_RxW = score_RxW / hp.rank_temperature + gumbel
  return by_rank(look, score_RxW)


def entropy_of(prob_RxWxV: FloatRWV) -> FloatRW:
  """Returns the entropy of each position's law, in nats."""
  return -jnp.sum(jax.scipy.special.xlogy(prob_RxWxV, prob_RxWxV), axis=-1)


def log_confidence(look: Look) -> FloatRW:
  """Returns the score by which plackett_luce draws positions."""
  return jnp.log(jnp.maximum(look.confidence, 1e-30))


def pick_confidence(look: Look, hp: SampleConfig) -> BoolRW:
  """Takes the most confident: LLaDA's remasking (generate.py:94-115)."""
  return by_score(look, look.confidence, hp)


def pick_plackett_luce(look: Look, hp: SampleConfig) -> BoolRW:
  """Draws the quota without replacement, in proportion to confidence^(1/T).

  T is hp.rank_temperature: Plackett-Luce with scores log(confidence) / T. With
  rank = max the scores are a function of the state alone.
  """
  return by_score(look, log_confidence(look), hp)


def plackett_luce_logp(score: FloatAnyW, masked: BoolAnyW, taken: BoolAnyW) -> FloatAny:
  """Returns the log-prob of drawing the set `taken` from `masked`.

  The Gumbels added to the scores of the taken all exceed those of the rest: the
  integral over v in (0, 1) of prod_taken (1 - v^(w_i / w_rest)), w = exp(score).
  It is computed by the trapezoid rule in logit(v), which is exact to rounding
  for ratios within e^+-15. Returns 0 where all or none is taken.
  """
  rest = masked & ~taken
  lowest = jnp.where(rest, score, -1e30)
  mass = jax.nn.logsumexp(lowest, axis=-1, keepdims=True)
  ratio = jnp.where(taken, jnp.exp(jnp.clip(score - mass, -30, 30)), 1.0)
  y = jnp.linspace(-40.0, 40.0, 321)
  log_v = -jax.nn.softplus(-y)
  log_dv = log_v - jax.nn.softplus(y) + jnp.log(y[1] - y[0])
  beaten = -jnp.expm1(ratio[..., None] * jnp.expand_dims(log_v, range(ratio.ndim)))
  terms = jnp.where(taken[..., None], jnp.log(jnp.maximum(beaten, 1e-37)), 0.0)
  total = jnp.sum(terms, axis=-2)
  logp = jax.nn.logsumexp(
    total + jnp.expand_dims(log_dv, range(total.ndim - 1)), axis=-1
  )
  free = jnp.any(rest, axis=-1) & jnp.any(taken, axis=-1)
  return jnp.where(free, logp, 0.0)


def plackett_luce_problems(hp: SampleConfig) -> list[str]:
  """Refuses a temperature of 0, at which the draw has no density."""
  needed = (
    'sampler.pick = plackett_luce needs sampler.rank_temperature > 0: it draws '
    'positions in proportion to confidence^(1/rank_temperature)'
  )
  return [] if hp.rank_temperature else [needed]


def pick_margin(look: Look, hp: SampleConfig) -> BoolRW:
  """Ranks by the gap between the two best probabilities (Dream topk_margin)."""
  best = jax.lax.top_k(look.prob, 2)[0]
  return by_score(look, best[..., 0] - best[..., 1], hp)


def pick_lowest_entropy(look: Look, hp: SampleConfig) -> BoolRW:
  """Takes the quota, the lowest entropy first (Dream entropy)."""
  return by_score(look, -entropy_of(look.prob), hp)


def pick_random(look: Look, hp: SampleConfig) -> BoolRW:
  """Takes the quota anywhere in the block: LLaDA's random remasking."""
  return by_rank(look, look.noise)


def pick_random_order(look: Look, hp: SampleConfig) -> BoolRW:
  """Takes one token a step in random order: the exact any-order trajectory."""
  return by_rank(look._replace(quota=jnp.ones_like(look.quota)), look.noise)


def pick_origin(look: Look, hp: SampleConfig) -> BoolRW:
  """Takes each mask on its own, with the schedule's share as chance (Dream)."""
  return look.masked & (look.noise < look.share[:, None])


def pick_threshold(look: Look, hp: SampleConfig) -> BoolRW:
  """Takes all with confidence >= hp.threshold (Fast-dLLM).

  Where there is none it takes the most confident, or with fallback = leftmost
  the first mask (Fork-dLLM).
  """
  over = look.masked & (look.confidence >= bound_of(look, hp))
  score = look.confidence
  if hp.fallback == 'leftmost':
    score = jnp.zeros_like(score)  # ties go to the lowest position
  first = look.masked & (rank_of(score, look.masked) == 0)
  return jnp.where(jnp.any(over, axis=1, keepdims=True), over, first)


def pick_dynamic(look: Look, hp: SampleConfig) -> BoolRW:
  """Takes all with confidence >= hp.threshold if the quota is reached, else the best.

  SDAR's low_confidence_dynamic (generate.py:150-176).
  """
  over = look.masked & (look.confidence >= hp.threshold)
  enough = jnp.sum(over, axis=1) >= look.quota
  return jnp.where(enough[:, None], over, by_rank(look, look.confidence))


def pick_sequential(look: Look, hp: SampleConfig) -> BoolRW:
  """Takes the quota's first from the left: SDAR's sequential."""
  return by_rank(look, jnp.zeros_like(look.confidence))  # ties: the lower position


def longest_prefix(
  look: Look, score_RxW: FloatRW, accept: Callable[[FloatRW, IntRW], BoolRW]
) -> BoolRW:
  """Takes positions from the highest score on while `accept` holds; at least one.

  accept: (sorted scores (R, W), their ranks (1, W)) -> (R, W) bool.
  """
  rank = rank_of(score_RxW, look.masked)
  score = jnp.where(look.masked, score_RxW, -jnp.inf)
  ok = accept(-jnp.sort(-score, axis=1), jnp.arange(score.shape[1])[None])
  ok = ok.at[:, 0].set(True)
  count = jnp.sum(jnp.cumprod(ok, axis=1), axis=1, keepdims=True)
  return look.masked & (rank < count)


def pick_factor(look: Look, hp: SampleConfig) -> BoolRW:
  """Takes the longest prefix c_1 >= c_2 .. with c_j >= 1 - factor/(j+1)
  (Fast-dLLM)."""
  factor = bound_of(look, hp)
  return longest_prefix(look, look.confidence, lambda c, j: c >= 1 - factor / (j + 2))


def pick_entropy(look: Look, hp: SampleConfig) -> BoolRW:
  """Takes the longest prefix by entropy with sum - max <= bound (EB sampler)."""

  def accept(negative, rank):
    entropy = jnp.where(jnp.isfinite(negative), -negative, jnp.inf)
    return jnp.cumsum(entropy, axis=1) - entropy <= bound_of(look, hp)

  return longest_prefix(look, -entropy_of(look.prob), accept)


PICKS: dict[str, Pick] = {
  'confidence': Pick(
    pick_confidence, scheduled=True, scored=True, judged=True, reads=('order_logp',)
  ),
  'random': Pick(pick_random, scheduled=True, drawn=True),
  'random_order': Pick(pick_random_order, drawn=True),
  'threshold': Pick(
    pick_threshold,
    judged=True,
    reads=('threshold', 'fallback', 'order_logp'),
    bound='threshold',
  ),
  'factor': Pick(pick_factor, judged=True, reads=('factor',), bound='factor'),
  'dynamic': Pick(
    pick_dynamic, scheduled=True, judged=True, reads=('threshold', 'order_logp')
  ),
  'sequential': Pick(pick_sequential, scheduled=True),
  'margin': Pick(pick_margin, scheduled=True, scored=True),
  'entropy': Pick(
    pick_entropy, reads=('entropy_bound', 'rank_law'), bound='entropy_bound'
  ),
  'lowest_entropy': Pick(pick_lowest_entropy, scheduled=True, scored=True),
  'origin': Pick(pick_origin, scheduled=True, drawn=True),
  'plackett_luce': Pick(
    pick_plackett_luce,
    scheduled=True,
    scored=True,
    judged=True,
    drawn=True,
    problems=plackett_luce_problems,
  ),
}
