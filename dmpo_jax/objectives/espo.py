"""ESPO: PPO on the ELBO of the whole sequence.

arXiv 2512.03759. With E an ELBO under masks that the policy, the one that
sampled and the reference share:

  rho = exp((E_theta - E_old) / L)
  loss = mean_g [ -min(rho A, clip(rho) A) + beta/L (E_theta - E_ref)^2 / 2 ]

Masks are pairs of complements with counts spread over {0..L} (unbiased);
within a row's draws, where the release spreads them over the rows of a device.
A leaves one out, as the release does. clip = 0 is its Countdown setting.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from dmpo_jax import logprob
from dmpo_jax.objectives import shared
from dmpo_jax.types import Objective


@dataclasses.dataclass(frozen=True)
class Config:
  common_masks: ClassVar[bool] = True
  advantage: str = 'loo'
  clip: float = 0.2
  clip_high: float = 0.0
  beta: float = 1e-3
  kl: str = 'k2'
  masks: str = 'stratified'
  draws: int = 4


def sequence_loss(logp_RxKxL, masks, batch, elbo_old_R, hp, length=1.0):
  """PPO with the ratio exp(gap of ELBOs / length); KL per `length` too."""
  now = logprob.seq_elbo(logp_RxKxL, masks.weight)
  gap = (now - elbo_old_R) / length
  value = -shared.surrogate(gap, batch.weight, hp.clip, hp.clip_high or hp.clip)
  if hp.beta:
    value += (
      hp.beta
      / length
      * batch.positive
      * shared.kl(hp.kl, now, batch.extra['elbo_ref'], elbo_old_R)
    )
  return jnp.sum(value) / batch.norm, {
    'elbo': jnp.sum(now) / batch.total,
    'ratio_log_abs': jnp.sum(jnp.abs(gap)) / batch.total,
  }


def loss(logp_RxKxL, masks, batch, elbo_old_R, hp):
  """(mean over rows, metrics)."""
  return sequence_loss(logp_RxKxL, masks, batch, elbo_old_R, hp, logp_RxKxL.shape[-1])


def needs(hp):
  return {'elbo_old'} | ({'elbo_ref'} if hp.beta else set())


def check(hp):
  return shared.ratio_rules(hp) + shared.elbo_rules(hp)


OBJECTIVE = Objective(
  hp=Config,
  needs=needs,
  check=check,
  draw=shared.draw_elbo,
  weigh=shared.weigh_rows,
  reweigh=shared.no_reweigh,
  loss=loss,
)
