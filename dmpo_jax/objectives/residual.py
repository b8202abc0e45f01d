"""Least squares on the relative score (RSPO, trajectory balance).

RSPO arXiv 2605.10218, TraFL arXiv 2605.13935; from notes on the papers. With
d_g = E_theta - E_ref less its group's mean, A = r - mean and alpha:

  the gradient of alpha/2 mean_g (d_g - A_g/alpha)^2, which is
  -mean_g (A_g - alpha d_g) grad E_theta

At the optimum p ~ p_ref exp(r/alpha), DMPO's target, with the group mean for
log Z; the push vanishes where it is reached. d_g comes from a pass of its own
over whole groups. fresh: under other masks than the gradient's, without which
the noise of d_g adds -alpha cov(E, grad E). per_token: E/L stands for E.
"""

import dataclasses

import jax.numpy as jnp

from dmpo_jax.objectives import shared
from dmpo_jax.types import Objective, to_groups, to_rows


@dataclasses.dataclass(frozen=True)
class Config:
  advantage: str = 'mean'
  alpha: float = 0.04
  masks: str = 'stratified'
  draws: int = 4
  fresh: bool = True
  per_token: bool = False


def reweigh(elbo_R, elbo_old_R, batch, group, hp):
  """(R,) what multiplies -grad E_theta."""
  length = batch.completion.shape[1] if hp.per_token else 1
  gap = to_groups(elbo_R - batch.extra['elbo_ref'], group) / length
  gap = to_rows(gap - jnp.mean(gap, axis=1, keepdims=True))
  return (batch.weight - hp.alpha * batch.positive * gap) / length


def needs(hp):
  return {'elbo_ref', 'policy'} | ({'fresh'} if hp.fresh else set())


def check(hp):
  return shared.elbo_rules(hp) + shared.complain(
    hp, advantage=shared.ADVANTAGES, alpha=shared.above(0)
  )


OBJECTIVE = Objective(
  hp=Config,
  needs=needs,
  check=check,
  draw=shared.draw_elbo,
  weigh=shared.weigh_rows,
  reweigh=reweigh,
  loss=shared.elbo_loss,
)
