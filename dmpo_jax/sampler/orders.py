"""The log-prob of which positions a step keeps, where the sampled tokens rank them.

Every masked position of a window proposes a token of its own. Given the tokens that a
step keeps, each position that it passes over must have proposed one less confident
than a limit. So the log-prob of a step is the sum of its tokens' and of log Phi over
the others, Phi the chance of a proposal below the limit.
"""

import jax
import jax.numpy as jnp

from dmpo_jax import model
from dmpo_jax.sampler.config import SampleConfig
from dmpo_jax.sampler.picks import Look
from dmpo_jax.types import Array, BoolRKL, BoolRW, FloatRL, FloatRW

# Surer proposals count as equally sure, so the lower position goes first: which one is
# surer is decided by rounding, which no second forward repeats.
SURE = 0.999
TIE = 1e-5  # confidences that differ by less, as a share, are equal up to rounding
LEAST = -80.0  # nats; a log-prob of 0 chance would make a weight nan


def limits(
  confidence_RxL: FloatRL, now_RxKxL: BoolRKL, rest_RxKxL: BoolRKL, how: SampleConfig
) -> Array:
  """Returns the confidence that the proposals of `rest` stay below, (R, K, L).

  It is infinity where a proposal decides nothing. confidence: of the kept tokens,
  under the policy that sampled; now: those that a window's step keeps; rest: the
  positions that it passes over. how.block is the window.
  """
  size = how.block
  cut = lambda x: x.reshape(*x.shape[:-1], -1, size)
  now, rest = cut(now_RxKxL), cut(rest_RxKxL)
  sure = cut(jnp.minimum(confidence_RxL, SURE))[:, None]
  worst = jnp.min(jnp.where(now, sure, jnp.inf), axis=-1, keepdims=True)
  place = jnp.arange(size)[None, None, None]
  tied = now & (sure <= worst * (1 + TIE))
  last = jnp.max(jnp.where(tied, place, -1), axis=-1, keepdims=True)
  # Ties go to the lower position.
  limit = worst * jnp.where(place > last, 1 + TIE, 1 - TIE)
  if how.pick != 'confidence':
    over = (worst >= how.threshold) | (how.fallback == 'leftmost')
    limit = jnp.where(over, how.threshold, limit)
  rest &= jnp.any(now, axis=-1, keepdims=True)
  return jnp.where(rest, limit, jnp.inf).reshape(rest_RxKxL.shape)


def below(law: Array, judged: Array, limit: Array) -> Array:
  """Returns log Phi (...) of logits (..., V): a proposal stays below the limit.

  law: logits of the law that proposes; judged: of the law whose probability is the
  confidence.
  """
  sure = jnp.minimum(jax.nn.softmax(judged, axis=-1), SURE)
  kept = jnp.where(sure < limit[..., None], law, -jnp.inf)
  logp = jax.nn.logsumexp(kept, axis=-1) - jax.nn.logsumexp(law, axis=-1)
  return jnp.where(jnp.isfinite(limit), jnp.maximum(logp, LEAST), 0.0)


def record(look: Look, take: BoolRW, hp: SampleConfig) -> FloatRW:
  """Returns each token's share of the log-prob of its step's positions."""
  rest = look.masked & ~take
  if look.alone is not None:
    rest &= ~look.alone[:, None]
  limit = limits(look.confidence, take[:, None], rest[:, None], hp)[:, 0]
  law = judged = jnp.log(look.prob)
  if hp.rank_law == 'model':
    law = model.sampling_logits(judged, hp.temperature, hp.top_p, hp.top_k)
  total = jnp.sum(below(law, judged, limit), axis=1) / jnp.sum(take, axis=1)
  return jnp.broadcast_to(total[:, None], take.shape)
