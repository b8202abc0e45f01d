"""GDPO: PPO on an ELBO whose mask rates are the nodes of a Gauss rule.

arXiv 2510.08554. N = `draws` Gauss-Legendre nodes t_n with weights w_n:

  E = sum_n w_n / t_n sum_masked log p(x_i | x_masked at rate t_n)
  loss = mean_g 1/L [ -min(rho A, clip(rho) A) + beta KL ], rho = exp(dE)

masks = bernoulli: each position at rate t_n, so that N nodes are exact where
L <= 2N. rounded: exactly max(1, round(t_n L)) positions but the weight of t_n,
as the reference does: a bias of rounding that shrinks with L. A tail after the
first EOS counts, and so L does. The paper's coefficient of KL is not known;
the default is ESPO's.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dmpo_jax import masking, rng
from dmpo_jax.objectives import espo, shared
from dmpo_jax.types import Masks, Objective


@dataclasses.dataclass(frozen=True)
class Config(espo.Config):
  advantage: str = 'mean'
  masks: str = 'bernoulli'
  draws: int = 3


def nodes(count):
  """(nodes, weights) of the Gauss-Legendre rule on (0, 1)."""
  at, weight = np.polynomial.legendre.leggauss(count)
  return (at + 1) / 2, weight / 2


def draw(key, row_R, completion_RxL, hp):
  """One mask at each node; Masks.weight is K w_n / t_n."""
  length = completion_RxL.shape[1]
  at, weight = nodes(hp.draws)
  count = np.maximum(np.round(at * length), 1)

  def one(key):
    if hp.masks == 'rounded':
      return masking.anywhere(key, count, length)
    noise = jax.random.uniform(key, (hp.draws, length))
    return noise < at.astype(np.float32)[:, None]

  masked = rng.per_row(key, row_R, one)
  weight = jnp.asarray(hp.draws * weight / at, jnp.float32)
  return Masks(masked, jnp.broadcast_to(weight, masked.shape[:2]))


def loss(logp_RxKxL, masks, batch, elbo_old_R, hp):
  """(mean over rows, per token, and metrics)."""
  value, metrics = espo.sequence_loss(logp_RxKxL, masks, batch, elbo_old_R, hp)
  return value / logp_RxKxL.shape[-1], metrics


def check(hp):
  return shared.ratio_rules(hp) + shared.complain(
    hp, masks=('bernoulli', 'rounded'), draws=shared.least(1)
  )


OBJECTIVE = Objective(
  hp=Config,
  needs=espo.needs,
  check=check,
  draw=draw,
  weigh=shared.weigh_rows,
  reweigh=shared.no_reweigh,
  loss=loss,
)
