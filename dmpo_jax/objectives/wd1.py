"""wd1: weighted likelihood of one-step predictions, without ratios.

arXiv 2507.08838. w+ = softmax_g(A / psi), w- = softmax_g(-A / psi):

  loss = sum_g (-w+ + w-) sum_i log pi(x_i), pi as in diffu_grpo

psi is `alpha`; strength = 0 leaves w- out (the paper's positive-only arm). The
weights are DMPO's without log-probs; what differs is the likelihood.
"""

import dataclasses

import jax.numpy as jnp

from dmpo_jax.objectives import diffu_grpo, dmpo, shared
from dmpo_jax.types import Objective


@dataclasses.dataclass(frozen=True)
class Config:
  alpha: float = 1.0
  strength: float = 1.0
  mask_prompt: float = 0.15


def weigh(scored, hp):
  """Signed weights and w+, each (B, G), and metrics."""
  plus, minus = dmpo.target_weights(
    scored.reward, jnp.zeros_like(scored.reward), hp.alpha
  )
  return plus - hp.strength * minus, plus, {'ess': jnp.mean(dmpo.effective_size(plus))}


def loss(logp_RxKxL, masks, batch, elbo_old_R, hp):
  """(sum over rows / norm, metrics)."""
  weight = shared.like(batch.weight, logp_RxKxL)
  counted = jnp.where(masks.counted, logp_RxKxL, 0.0)
  return -jnp.sum(weight * counted) / batch.norm, {
    'nll': -jnp.sum(counted) / batch.total
  }


def needs(hp):
  return {'prompt'} if hp.mask_prompt else set()


def check(hp):
  return shared.complain(
    hp, alpha=shared.above(0), strength=shared.least(0), mask_prompt=shared.chance
  )


OBJECTIVE = Objective(
  hp=Config,
  needs=needs,
  check=check,
  draw=diffu_grpo.draw,
  weigh=weigh,
  reweigh=shared.no_reweigh,
  loss=loss,
)
