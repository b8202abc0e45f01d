"""ESPO: PPO on the ELBO of the whole sequence.

arXiv 2512.03759. With E an ELBO under masks that the policy, the policy that sampled
and the reference share:

  rho = exp((E_theta - E_old) / L)
  loss = mean_g [ -min(rho A, clip(rho) A) + beta/L (E_theta - E_ref)^2 / 2 ]

Masks are pairs of complements with counts stratified over {0..L} (unbiased): within a
row's copies here, over the rows of a device in the release. A leaves one out, as the
release does. clip = 0 is its Countdown setting.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from dmpo_jax import logprob
from dmpo_jax.objectives import shared
from dmpo_jax.types import Masks, Objective, TrainBatch, ViewLogp, Wants


@dataclasses.dataclass(frozen=True)
class Config(shared.ElboMasks, shared.PenalisedGradient):
  advantage: str = 'loo'  # reward less: mean | loo (mean of the others) | zscore
  beta: float = 1e-3  # factor of the KL to the reference; 0 = off
  kl: str = 'k2'  # estimator of the KL: k1 | k2 | k3 | k3_ratio


def sequence_loss(
  now: ViewLogp, masks: Masks, batch: TrainBatch, hp: Any, length: float = 1.0
) -> tuple:
  """Returns PPO's loss with ratio exp(gap of ELBOs / length) and the KL per length."""
  elbo, old = logprob.seq_elbo(now.logp, masks.weight), batch.old.elbo
  gap = (elbo - old) / length
  value = -shared.surrogate(gap, batch.weight, *hp.bounds)
  if hp.beta:
    far = shared.kl(hp.kl, elbo, batch.ref.elbo, old)
    value += hp.beta / length * batch.own['scale'] * far
  return jnp.sum(value) / batch.norm, {
    'elbo': jnp.sum(elbo) / batch.total,
    'ratio_log_abs': jnp.sum(jnp.abs(gap)) / batch.total,
  }


def loss(now: ViewLogp, masks: Masks, batch: TrainBatch, hp: Config) -> tuple:
  """Returns (mean over rows, metrics)."""
  return sequence_loss(now, masks, batch, hp, now.logp.shape[-1])


def wants(hp: Any) -> Wants:
  return Wants(elbo=('old', 'ref') if hp.beta else ('old',))


OBJECTIVE = Objective(Config, wants, shared.draw_elbo, shared.weigh_rows, loss)
