"""The law that tokens are sampled from, as a function of the logits."""

import jax
import jax.numpy as jnp

from dmpo_jax.model.presets import ModelConfig
from dmpo_jax.types import BoolX, FloatRWV, FloatX, FloatXV, IntX


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
  >= top_p, then the top_k most probable ones (0 = all): Dream's order. At
  temperature 0 the law is a point mass and says nothing about the model. The
  result is then that of temperature 1.
  """
  logits = logits / (temperature or 1.0)
  if top_p < 1:
    ordered = -jnp.sort(-logits, axis=-1)
    prob = jax.nn.softmax(ordered, axis=-1)
    nucleus = jnp.cumsum(prob, axis=-1) - prob < top_p
    least = jnp.min(jnp.where(nucleus, ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if 0 < top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, top_k)[0][..., -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return logits


def logp_of(logits: FloatXV, tokens: IntX) -> FloatX:
  """Returns the log-softmax of logits (..., V) at tokens (...), in nats."""
  own = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
  return own - jax.nn.logsumexp(logits, axis=-1)
