"""wd1: weighted likelihood of one-step predictions, without ratios.

arXiv 2507.08838. w+ = softmax_g(A / psi), w- = softmax_g(-A / psi):

  loss = sum_g (-w+ + w-) sum_i log pi(x_i), pi as in diffu_grpo

psi is `alpha`; strength = 0 leaves out w- (the paper's positive-only arm). The weights
are DMPO's without log-probs; the likelihood differs.
"""

import dataclasses

import jax.numpy as jnp

from dmpo_jax.objectives import diffu_grpo, dmpo, shared
from dmpo_jax.types import Masks, Scored, TrainBatch, ViewLogp, Wants


@dataclasses.dataclass(frozen=True)
class Config(shared.Settings):
  OWN = {'alpha': shared.above(0), 'strength': shared.least(0)}
  alpha: float = 1.0  # psi, temperature of the weights
  strength: float = 1.0  # factor of w-; 0 = positive weights only
  mask_prompt: float = 0.15  # chance of a prompt token to be masked; 0 = none


def weigh(scored: Scored, hp: Config) -> tuple:
  """Returns signed weights (B, G), no further row values, and metrics."""
  paid = scored.reward - hp.alpha * scored.cost_of()
  plus, minus = dmpo.target_weights(paid, jnp.zeros_like(paid), hp.alpha)
  metrics = {'ess': jnp.mean(dmpo.effective_size(plus))}
  return plus - hp.strength * minus, {}, metrics


def loss(now: ViewLogp, masks: Masks, batch: TrainBatch, hp: Config) -> tuple:
  """Returns (sum over rows / norm, metrics)."""
  weight = shared.like(batch.weight, now.logp)
  counted = jnp.where(masks.counted, now.logp, 0.0)
  return -jnp.sum(weight * counted) / batch.norm, {
    'nll': -jnp.sum(counted) / batch.total
  }


OBJECTIVE = diffu_grpo.OBJECTIVE._replace(
  Config=Config,
  wants=lambda hp: Wants(),
  weigh=weigh,
  loss=loss,
  strength=lambda hp: hp.strength,
)
