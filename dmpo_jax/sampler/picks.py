"""Which proposals of an unmasking step are kept: the pick rules.

A rule is a function (Look, SampleConfig) -> (R, W) bool, a subset of
look.masked with at least one position of every row that has one (but where its
schedule wants none). PICKS names them. Ties go to the lower position.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmpo_jax.types import Array


class Look(NamedTuple):
  """What a pick rule sees of one step; all of a block's window."""

  prob: Array  # (R, W, V) float32, the law that rules judge by
  confidence: Array  # (R, W) float32, of the proposal or of the best token
  masked: Array  # (R, W) bool, positions still masked
  quota: Array  # (R,) int32, what the schedule wants revealed now
  share: Array  # (R,) float32, the same as a share of what is masked
  noise: Array  # (R, W) float32, U(0, 1)


def schedule(hp, masked_RxW, since_R):
  """(quota_R int32, share_R float32) of a row's step `since_R` in its block.

  even: floor(W/n) tokens in each of a block's n steps, one more in the first
  W mod n (LLaDA generate.py:22-41). dream: floor(m (1 - s/t)) of m masks for
  times t from 1 to 1e-3, all in the last step (Dream generation_utils.py).
  """
  steps = max(1, hp.steps // (hp.length // hp.block))
  at_R = jnp.minimum(since_R, steps - 1)
  if hp.schedule == 'dream':
    times = np.linspace(1, 1e-3, steps + 1, dtype=np.float32)
    shares = np.append(1 - times[1:-1] / times[:-2], np.float32(1))
    share_R = jnp.asarray(shares)[at_R]
    masks_R = jnp.sum(masked_RxW, axis=1).astype(jnp.float32)
    return jnp.floor(masks_R * share_R).astype(jnp.int32), share_R
  quota_R = hp.block // steps + (since_R < hp.block % steps)
  return quota_R, 1 / (steps - at_R).astype(jnp.float32)


def rank_of(score_RxW, masked_RxW):
  """0 for the highest masked score; ties go to the lower position.

  A nan is the lowest of the masked: it must not hide them behind the others,
  or nothing would be taken and the sampler never end.
  """
  score = jnp.where(jnp.isnan(score_RxW), -1e30, score_RxW)
  score = jnp.where(masked_RxW, score, -jnp.inf)
  order = jnp.argsort(-score, axis=1, stable=True)
  return jnp.argsort(order, axis=1)


def by_rank(look, score_RxW):
  return look.masked & (rank_of(score_RxW, look.masked) < look.quota[:, None])


def by_score(look, score_RxW, hp):
  """The quota's best; with rank_temperature drawn from softmax(score / T).

  Without replacement, by Gumbel top-k (Dream's alg_temp).
  """
  if hp.rank_temperature:
    gumbel = -jnp.log(-jnp.log(jnp.maximum(look.noise, 1e-30)))
    score_RxW = score_RxW / hp.rank_temperature + gumbel
  return by_rank(look, score_RxW)


def entropy_of(prob):
  return -jnp.sum(jax.scipy.special.xlogy(prob, prob), axis=-1)


def pick_confidence(look, hp):
  """LLaDA's low-confidence remasking (generate.py:94-115)."""
  return by_score(look, look.confidence, hp)


def pick_plackett_luce(look, hp):
  """The quota without replacement, in proportion to confidence^(1/T).

  T is hp.rank_temperature: Plackett-Luce with scores log(confidence) / T. By
  the state alone with rank = max.
  """
  gumbel = -jnp.log(-jnp.log(jnp.maximum(look.noise, 1e-30)))
  score = jnp.log(jnp.maximum(look.confidence, 1e-30)) / hp.rank_temperature
  return by_rank(look, score + gumbel)


def plackett_luce_logp(score, masked, taken):
  """Log-prob that `taken` is what is drawn from `masked`, whatever the order.

  Arrays (..., W). Gumbels added to the scores of the taken all exceed those of
  the rest: the integral over v in (0, 1) of prod_taken (1 - v^(w_i / w_rest)),
  w = exp(score), by the trapezoid rule in logit(v), which is exact to
  rounding for ratios within e^+-15. 0 where all or none is taken.
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


def pick_margin(look, hp):
  """By the gap between the two best probabilities (Dream topk_margin)."""
  best = jax.lax.top_k(look.prob, 2)[0]
  return by_score(look, best[..., 0] - best[..., 1], hp)


def pick_lowest_entropy(look, hp):
  """The schedule's number, the most certain first (Dream entropy)."""
  return by_score(look, -entropy_of(look.prob), hp)


def pick_random(look, hp):
  """Random remasking: the schedule's number, anywhere in the block."""
  return by_rank(look, look.noise)


def pick_random_order(look, hp):
  """One token a step in random order: the exact any-order trajectory."""
  return by_rank(look._replace(quota=jnp.ones_like(look.quota)), look.noise)


def pick_origin(look, hp):
  """Each mask on its own, with the schedule's share as chance (Dream)."""
  return look.masked & (look.noise < look.share[:, None])


def pick_threshold(look, hp):
  """All at or over hp.threshold (Fast-dLLM); where none is, the most
  confident, or with fallback = leftmost the first mask (Fork-dLLM)."""
  over = look.masked & (look.confidence >= hp.threshold)
  score = look.confidence
  if hp.fallback == 'leftmost':
    score = jnp.zeros_like(score)  # ties: the lowest position
  first = look.masked & (rank_of(score, look.masked) == 0)
  return jnp.where(jnp.any(over, axis=1, keepdims=True), over, first)


def longest_prefix(look, score_RxW, accept):
  """Positions in order of score while accept(sorted score, place) holds."""
  rank = rank_of(score_RxW, look.masked)
  score = jnp.where(look.masked, score_RxW, -jnp.inf)
  ok = accept(-jnp.sort(-score, axis=1), jnp.arange(score.shape[1])[None])
  ok = ok.at[:, 0].set(True)
  kept = jnp.sum(jnp.cumprod(ok, axis=1), axis=1, keepdims=True)
  return look.masked & (rank < kept)


def pick_factor(look, hp):
  """Longest prefix c_1 >= c_2 .. with c_j >= 1 - factor/(j+1) (Fast-dLLM)."""
  return longest_prefix(
    look, look.confidence, lambda c, j: c >= 1 - hp.factor / (j + 2)
  )


def pick_entropy(look, hp):
  """Longest prefix by entropy with sum - max <= bound (the EB sampler)."""

  def accept(minus, place):
    rises = jnp.where(jnp.isfinite(minus), -minus, jnp.inf)
    return jnp.cumsum(rises, axis=1) - rises <= hp.entropy_bound

  return longest_prefix(look, -entropy_of(look.prob), accept)


PICKS = {
  'confidence': pick_confidence,
  'random': pick_random,
  'random_order': pick_random_order,
  'threshold': pick_threshold,
  'factor': pick_factor,
  'margin': pick_margin,
  'entropy': pick_entropy,
  'lowest_entropy': pick_lowest_entropy,
  'origin': pick_origin,
  'plackett_luce': pick_plackett_luce,
}
SCORED = ('confidence', 'margin', 'lowest_entropy')  # that rank by a score
# Those that use hp.steps.
SCHEDULED = (*SCORED, 'random', 'origin', 'plackett_luce')
# By hp.rank's confidence.
JUDGED = ('confidence', 'threshold', 'factor', 'plackett_luce')
DRAWN = ('random', 'random_order', 'origin', 'plackett_luce')  # by noise
