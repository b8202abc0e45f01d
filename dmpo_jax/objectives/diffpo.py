"""DiFFPO: PPO on a mean-field policy of two times, with its correction.

arXiv 2510.02212; from its abstract and reviews, the loss in part reconstructed.
tau is a uniform step of the row: what was revealed up to tau is predicted from
the prompt alone, the rest from the state after tau. With pi2 that policy and
pi_old the sampler, as recorded, per token:

  loss = -sum min(pi2_old/pi_old, truncate) min(rho A, clip(rho) A) / tokens,
  rho = pi2_theta/pi2_old

The paper's learned threshold of the sampler is not part of this.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmpo_jax import rng
from dmpo_jax.objectives import shared
from dmpo_jax.types import Masks, Objective


@dataclasses.dataclass(frozen=True)
class Config:
  advantage: str = 'mean'
  clip: float = 0.2
  clip_high: float = 0.0
  beta: float = 0.04
  kl: str = 'k3'
  truncate: float = 2.0


def draw(key, row_R, completion_RxL, hp, record):
  """Two views: all masked, and the state after tau; a token counts in one."""
  order = record['order']
  steps = jnp.max(order, axis=1) + 1
  tau = jnp.floor(rng.per_row(key, row_R, jax.random.uniform) * steps)
  late = (order > tau[:, None].astype(jnp.int32)) | (order < 0)
  masked = jnp.stack([jnp.ones_like(late), late], axis=1)
  counted = jnp.stack([~late, late], axis=1)
  counted &= ((order >= 0) & completion_RxL)[:, None]
  # A mean over the two views is to be the sum of both.
  return Masks(masked, jnp.full(masked.shape[:2], 2.0), counted)


def loss(logp_RxKxL, masks, batch, elbo_old_R, hp):
  """(sum over counted tokens, metrics)."""
  extra = batch.extra
  pi, old = extra['record']['logp'][:, None], extra['tokens_old']
  gap = jnp.where(masks.counted, old - pi, 0.0)
  weight = shared.like(batch.weight, old) * jnp.minimum(
    jnp.exp(jnp.minimum(gap, 20.0)), hp.truncate
  )
  value = -shared.surrogate(logp_RxKxL - old, weight, hp.clip, hp.clip_high or hp.clip)
  if hp.beta:
    value += (
      hp.beta
      * shared.like(batch.positive, old)
      * shared.kl(hp.kl, logp_RxKxL, extra['tokens_ref'], old)
    )
  return shared.total(value, masks, batch), shared.gap_metrics(
    logp_RxKxL, old, masks.counted, batch
  )


def needs(hp):
  return {'record', 'law', 'tokens_old'} | ({'tokens_ref'} if hp.beta else set())


def check(hp):
  return shared.ratio_rules(hp) + shared.complain(hp, truncate=shared.above(0))


OBJECTIVE = Objective(
  hp=Config,
  needs=needs,
  check=check,
  draw=draw,
  weigh=shared.weigh_tokens,
  reweigh=shared.no_reweigh,
  loss=loss,
)
