"""The law that tokens are sampled from, as a function of the logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dmpo_jax.model.presets import ModelConfig
from dmpo_jax.types import Array, BoolX, FloatRWV, FloatX, FloatXV, IntX


def without_mask(cfg: ModelConfig, logits: FloatRWV) -> FloatRWV:
  """Sets the mask token's logit to -inf: no sampler emits it."""
  is_mask = jnp.arange(cfg.vocab)[None, None] == cfg.mask_id
  return jnp.where(is_mask, -jnp.inf, logits)


def stops(cfg: ModelConfig) -> tuple[int, ...]:
  """Returns the tokens that end a text: EOS, and those of cfg.stop_ids."""
  return (cfg.eos_id, *cfg.stop_ids)


def is_stop(cfg: ModelConfig, tokens: IntX) -> BoolX:
  """Returns where tokens end a text."""
  found = tokens == cfg.eos_id
  for other in cfg.stop_ids:
    found |= tokens == other
  return found


def sampling_logits(
  logits: FloatXV, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> FloatXV:
  """Returns logits (..., V) whose softmax is the law that tokens are drawn from.

  Applies the temperature, then keeps the smallest set of tokens with probability
  >= top_p, then the top_k most probable ones (0 = all): Dream's order. Tokens that
  are equal to the last one kept are kept too. At temperature 0 the law is a point
  mass and says nothing about the model. The result is then that of temperature 1.
  """
  logits = logits / (temperature or 1.0)
  if top_p < 1:
    best = jnp.max(logits, axis=-1, keepdims=True).astype(jnp.float32)
    mass = lambda x: jnp.exp(x.astype(jnp.float32) - best)
    enough = top_p * jnp.sum(mass(logits), axis=-1, keepdims=True)
    logits = jnp.where(logits < least_of(logits, mass, enough), -jnp.inf, logits)
  if 0 < top_k < logits.shape[-1]:
    if top_k <= FEW:
      least = jax.lax.top_k(logits, top_k)[0][..., -1:]
    else:
      least = least_of(logits, jnp.ones_like, top_k)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return logits


FEW = 16  # XLA has a kernel for the best few; for more it sorts the vocabulary


def least_of(
  logits: FloatXV, mass: Callable[[Array], Array], enough: Array | float
) -> Array:
  """Returns the largest x for which the mass of the logits >= x reaches `enough`.

  mass: logits -> what each of them counts, >= 0. Where all of them are not enough
  the result is nan, below which no logit is. Tries the 32 bits of a float32 one by
  one, in the order of the numbers: 32 sums, where a sort would move (..., V) pairs
  many times.
  """
  logits = logits.astype(jnp.float32)

  def number(rank: Array) -> Array:
    """Returns the float32 of a rank; those of nan are at both ends."""
    top = jnp.uint32(1 << 31)
    bits = jnp.where(rank >= top, rank ^ top, ~rank)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)

  def one_bit(i: Array, rank: Array) -> Array:
    tried = rank | jnp.uint32(1) << (31 - i).astype(jnp.uint32)
    over = jnp.where(logits >= number(tried), mass(logits), 0.0)
    reached = jnp.sum(over, axis=-1, keepdims=True) >= enough
    return jnp.where(reached, tried, rank)

  none = jnp.zeros((*logits.shape[:-1], 1), jnp.uint32)
  return number(jax.lax.fori_loop(0, 32, one_bit, none))


def logp_of(logits: FloatXV, tokens: IntX) -> FloatX:
  """Returns the log-softmax of logits (..., V) at tokens (...), in nats."""
  own = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
  return own - jax.nn.logsumexp(logits, axis=-1)
