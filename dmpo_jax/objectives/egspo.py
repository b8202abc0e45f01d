"""EGSPO: PPO on the most uncertain steps, each with an advantage of its own.

arXiv 2603.12554, by its released code. Of every rollout it takes the `draws` steps
whose tokens had the most entropy on average. A step's log-prob is the sum over its
tokens, and its ratio is one ratio. With r1(s) the reward of completing the state before
step s at once, by the most probable tokens, and lambda = `step_coef`:

  A(g, s) = ( r_g + lambda (r_g - r1(s)) - mean over g ) / (1 + lambda)

The mean is over the completions' steps of the same rank by entropy; a completion of
fewer steps is not in it. The choice of steps is not weighted: biased for the policy
gradient. The states are completed in a pass of their own, `draws` forwards, because the
sampler's logits are those of one block. The release's k3 penalty (0.04) is left out.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from dmpo_jax.objectives import shared
from dmpo_jax.rng import AnyKey
from dmpo_jax.types import (
  IntR,
  Masks,
  Objective,
  Scored,
  Text,
  TrainBatch,
  ViewLogp,
  Wants,
)


@dataclasses.dataclass(frozen=True)
class Config(shared.Settings):
  OWN = {'step_coef': shared.least(0)}
  choose: ClassVar[str] = 'top'
  clip: float = 0.2  # ratios are clipped below at 1 - clip
  clip_high: float = 0.5  # ratios are clipped above at 1 + clip_high; 0 = as clip
  draws: int = 8  # steps of a row per update
  step_coef: float = 0.5  # lambda, weight of the step's own advantage


def draw(key: AnyKey, row_R: IntR, text: Text, hp: Config) -> Masks:
  """Draws the states before the chosen steps."""
  wanted = shared.shown_steps(text.record, text.completion)
  return shared.draw_steps(key, row_R, text.record, wanted, hp, mean=True)


def weigh(scored: Scored, hp: Config) -> tuple:
  """Returns (weights (B, G, K) of steps, no further row values, metrics)."""
  value = scored.reward[..., None] * (1 + hp.step_coef)
  value -= hp.step_coef * scored.guess
  live = jnp.isfinite(scored.guess)
  mean = jnp.mean(value, axis=1, keepdims=True, where=live)
  value = jnp.where(live, value - mean, 0.0)
  weight = value / (1 + hp.step_coef) * shared.per_row(scored)[..., None]
  return weight, {}, {'guess_reward': jnp.mean(scored.guess, where=live)}


def loss(now: ViewLogp, masks: Masks, batch: TrainBatch, hp: Config) -> tuple:
  """Returns (mean over rows of the mean over steps, metrics)."""
  old = shared.counted_sums(batch.record.logp[:, None], masks)
  gap = shared.counted_sums(now.logp, masks) - old
  value = -shared.surrogate(gap, batch.weight, hp.clip, hp.clip_high or hp.clip)
  weight = shared.step_weight(masks)
  rows = jnp.mean(weight * value, axis=1)
  metrics = shared.gap_metrics(gap, jnp.zeros_like(gap), weight > 0, batch)
  return jnp.sum(rows) / batch.norm, metrics


def wants(hp: Config) -> Wants:
  return Wants(records=('entropy',), law=True, guess=True)


OBJECTIVE = Objective(
  Config,
  wants,
  draw,
  weigh,
  loss,
  whole_text='it grades states completed in one step, which ends one block alone',
)
