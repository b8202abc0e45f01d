"""Least squares on the relative score (RSPO, trajectory balance).

RSPO arXiv 2605.10218, TraFL arXiv 2605.13935; from notes on the papers. With
d_g = E_theta - E_ref less its group's mean, A = r - mean and alpha:

  the gradient of alpha/2 mean_g (d_g - A_g/alpha)^2, which is
  -mean_g (A_g - alpha d_g) grad E_theta

At the optimum p ~ p_ref exp(r/alpha), DMPO's target, with the group mean for log Z; the
push vanishes there. d_g comes from a pass of its own over whole groups. fresh: under
other masks than the gradient's. Without it the noise of d_g adds -alpha cov(E, grad E).
per_token: E/L stands for E.
"""

import dataclasses

import jax.numpy as jnp

from dmpo_jax.objectives import shared
from dmpo_jax.types import FloatR, Objective, TrainBatch, Wants, to_groups, to_rows


@dataclasses.dataclass(frozen=True)
class Config(shared.ElboMasks):
  OWN = {'alpha': shared.above(0)}
  advantage: str = 'mean'  # reward less: mean | loo (mean of the others) | zscore
  alpha: float = 0.04  # temperature of the target
  fresh: bool = True  # take the gap to the reference under masks of its own
  per_token: bool = False  # divide ELBOs by the completion length


def reweigh(elbo_R: FloatR, batch: TrainBatch, group: int, hp: Config) -> FloatR:
  """Returns the factor of -grad E_theta of each row."""
  length = batch.completion.shape[1] if hp.per_token else 1
  gap = to_groups(elbo_R - batch.ref.elbo, group) / length
  gap = to_rows(gap - jnp.mean(gap, axis=1, keepdims=True))
  return (batch.weight - hp.alpha * batch.own['scale'] * gap) / length


def wants(hp: Config) -> Wants:
  return Wants(elbo=('ref',), reweigh=True, fresh=hp.fresh)


OBJECTIVE = Objective(
  Config, wants, shared.draw_elbo, shared.weigh_rows, shared.elbo_loss, reweigh
)
