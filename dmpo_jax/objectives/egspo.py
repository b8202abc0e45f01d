"""EGSPO: PPO on the most uncertain steps, each with its own advantage.

arXiv 2603.12554, by its released code. Of every rollout the `draws` steps whose
tokens had the most entropy on average; a step's log-prob is the sum over its
tokens, its ratio one. With r1(s) the reward of completing the state before
step s at once, by the most probable tokens, and lambda = `step_coef`:

  A(g, s) = ( r_g + lambda (r_g - r1(s)) - mean over g ) / (1 + lambda)

where the mean is over the completions' steps of the same rank by entropy, and
a completion of fewer steps is not in it. The choice of steps is not weighted:
biased for the policy gradient. The states are completed in a pass of their own,
`draws` forwards, for the sampler's logits are of one block. The release's
k3 penalty (0.04) is left out.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from dmpo_jax.objectives import shared
from dmpo_jax.types import Objective


@dataclasses.dataclass(frozen=True)
class Config:
  choose: ClassVar[str] = 'top'
  clip: float = 0.2
  clip_high: float = 0.5
  draws: int = 8
  step_coef: float = 0.5


def draw(key, row_R, completion_RxL, hp, record):
  """The states before the chosen steps."""
  wanted = shared.shown_steps(record, completion_RxL)
  return shared.draw_steps(key, row_R, record, wanted, hp, mean=True)


def weigh(scored, hp):
  """(weights (B, G, K) of steps, scales (B, G), metrics)."""
  value = scored.reward[..., None] * (1 + hp.step_coef)
  value -= hp.step_coef * scored.guess
  live = jnp.isfinite(scored.guess)
  mean = jnp.mean(value, axis=1, keepdims=True, where=live)
  value = jnp.where(live, value - mean, 0.0)
  scale = shared.per_row(scored)
  return (
    value / (1 + hp.step_coef) * scale[..., None],
    scale,
    {'guess_reward': jnp.mean(scored.guess, where=live)},
  )


def loss(logp_RxKxL, masks, batch, elbo_old_R, hp):
  """(mean over rows of the mean over steps, metrics)."""

  def by_step(x):
    return jnp.sum(jnp.where(masks.counted, x, 0.0), axis=-1)

  old = by_step(batch.extra['record']['logp'][:, None])
  gap = by_step(logp_RxKxL) - old
  value = -shared.surrogate(gap, batch.weight, hp.clip, hp.clip_high or hp.clip)
  rows = jnp.mean(masks.weight * value, axis=1)
  return jnp.sum(rows) / batch.norm, shared.gap_metrics(
    gap, jnp.zeros_like(gap), masks.weight > 0, batch
  )


def needs(hp):
  return {'record', 'law', 'entropy', 'guess'}


def check(hp):
  return shared.complain(
    hp,
    clip=shared.chance,
    clip_high=shared.least(0),
    draws=shared.least(1),
    step_coef=shared.least(0),
  )


OBJECTIVE = Objective(
  hp=Config,
  needs=needs,
  check=check,
  draw=draw,
  weigh=weigh,
  reweigh=shared.no_reweigh,
  loss=loss,
)
