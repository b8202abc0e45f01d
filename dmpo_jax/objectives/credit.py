"""Baselines of recorded steps: what the others earned from the same state.

Token-efficient RL (arXiv 2504.20834) credits a token by the completions of the group
that have its prefix. In masked diffusion the prefix is the state before a step. Let
n_d of the other completions be in g's state before step d:

  b_0 = mean of the others
  b_d = (sum over the n_d of r + lambda b_{d-1}) / (n_d + lambda)
  b_d = b_{d-1} if n_d = 0, or if they are those of the step before
  A(g, d) = r_g - b_d

Without the last rule a long way together would wear the shrinkage off. b_d depends
neither on r_g nor on what g does from step d on, so the policy gradient stays unbiased,
whatever rule picks the positions. A mean that includes g is biased. So is leaving out
the steps at which g is alone, or counting each state once, as the paper is remembered
to do.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dmpo_jax.types import Array, FloatBG, IntRL, Scored, to_groups


def same_state(order_BxGxL: Array, tokens_BxGxL: Array, step: Any) -> Array:
  """Returns which other completions are in the state before `step`, (B, G, G)."""
  hidden = (order_BxGxL >= step) | (order_BxGxL == -1)
  state = jnp.where(hidden, -1, tokens_BxGxL)
  same = jnp.all(state[:, :, None] == state[:, None], axis=-1)
  return same & ~jnp.eye(same.shape[1], dtype=bool)[None]


def prefix_baselines(
  order_RxL: IntRL, tokens_RxL: IntRL, value_BxG: FloatBG, shrink: float
) -> Array:
  """Returns b_d of every step, (B, G, L); steps are below L."""
  group = value_BxG.shape[1]
  order, tokens = (to_groups(x, group) for x in (order_RxL, tokens_RxL))
  total = jnp.sum(value_BxG, axis=1, keepdims=True)
  first = (total - value_BxG) / (group - 1)

  def deeper(carry, step):
    before, were = carry
    same = same_state(order, tokens, step)
    count = jnp.sum(same, axis=2)
    summed = jnp.sum(jnp.where(same, value_BxG[:, None], 0.0), axis=2)
    mean = (summed + shrink * before) / jnp.maximum(count + shrink, 1e-6)
    changed = jnp.any(same != were, axis=2)
    now = jnp.where(changed & (count > 0), mean, before)
    return (now, same), now

  start = first, same_state(order, tokens, 0)
  steps = jnp.arange(order.shape[2])
  return jnp.moveaxis(jax.lax.scan(deeper, start, steps)[1], 0, 2)


def prefix_advantages(scored: Scored, value_BxG: FloatBG, shrink: float) -> Array:
  """Returns a value less its baseline before each token's step, (B, G, L).

  0 at tokens that were never unmasked.
  """
  order = scored.record.order
  # Equal values become zeros, and with them their baselines.
  value_BxG = value_BxG - value_BxG[:, :1]
  baseline = prefix_baselines(order, scored.tokens, value_BxG, shrink)
  order = to_groups(order, value_BxG.shape[1])
  own = jnp.take_along_axis(baseline, jnp.maximum(order, 0), axis=2)
  return jnp.where(order >= 0, value_BxG[..., None] - own, 0.0)
