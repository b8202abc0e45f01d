"""AGRPO: PPO on steps of the recorded unmasking, by Monte Carlo.

arXiv 2510.04019. U_s is what step s revealed, T_g the last step that revealed
a token other than EOS, and log-probs are those of the sampling law:

  J = mean_g 1/(T_g + 1) sum_{s <= T_g} sum_{U_s} min(rho A, clip(rho) A)

`draws` steps of a row stand for all: choose = uniform, or entropy (in
proportion to what its tokens' entropies sum to, with importance weights). Both
are unbiased for J; J's gradient is the policy's, but for 1/(T_g + 1), where the
choice of positions does not depend on the policy (pick random, a block of
one). log p_old is what was recorded, so that no pass is spent on it.
"""

import dataclasses

import jax.numpy as jnp

from dmpo_jax.objectives import shared
from dmpo_jax.types import Objective


@dataclasses.dataclass(frozen=True)
class Config:
  advantage: str = 'mean'
  clip: float = 0.2
  clip_high: float = 0.0
  beta: float = 0.0
  kl: str = 'k3_ratio'
  choose: str = 'entropy'
  draws: int = 24


def draw(key, row_R, completion_RxL, hp, record):
  """The states before the chosen steps."""
  last = jnp.max(jnp.where(record['text'], record['order'], 0), axis=1)
  wanted = jnp.arange(completion_RxL.shape[1])[None] <= last[:, None]
  return shared.draw_steps(key, row_R, record, wanted, hp)


def loss(logp_RxKxL, masks, batch, elbo_old_R, hp):
  """(mean over rows of the mean over steps, metrics)."""
  old = jnp.broadcast_to(batch.extra['record']['logp'][:, None], logp_RxKxL.shape)
  old = jnp.where(masks.counted, old, 0.0)
  now = jnp.where(masks.counted, logp_RxKxL, 0.0)
  value = shared.terms(
    now, old, batch, hp, batch.extra['tokens_ref'] if hp.beta else None
  )
  return shared.total(value, masks, batch), shared.gap_metrics(
    now, old, masks.counted, batch
  )


def needs(hp):
  return (
    {'record', 'law'}
    | ({'tokens_ref'} if hp.beta else set())
    | ({'entropy'} if hp.choose in ('entropy', 'top') else set())
  )


def check(hp):
  return shared.ratio_rules(hp) + shared.complain(
    hp, choose=shared.CHOICES, draws=shared.least(0 if hp.choose == 'each' else 1)
  )


OBJECTIVE = Objective(
  hp=Config,
  needs=needs,
  check=check,
  draw=draw,
  weigh=shared.weigh_rows,
  reweigh=shared.no_reweigh,
  loss=loss,
)
