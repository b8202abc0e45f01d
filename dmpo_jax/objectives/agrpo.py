"""AGRPO: PPO on Monte Carlo samples of the recorded unmasking steps.

arXiv 2510.04019. U_s is the set of tokens that step s unmasked, T_g the last step that
unmasked a token other than EOS, and log-probs are those of the sampling law:

  J = mean_g 1/(T_g + 1) sum_{s <= T_g} sum_{U_s} min(rho A, clip(rho) A)

`draws` steps of a row stand for all. `choose` is uniform, or entropy: in proportion to
the summed entropy of a step's tokens, with importance weights. Both are unbiased for J.
J's gradient is the policy gradient, but for 1/(T_g + 1), where the choice of positions
does not depend on the policy (pick random, a block of one). log p_old is the recorded
log-prob, so it costs no pass.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from dmpo_jax.objectives import shared
from dmpo_jax.rng import AnyKey
from dmpo_jax.types import IntR, Masks, Objective, Text, TrainBatch, ViewLogp, Wants


@dataclasses.dataclass(frozen=True)
class Config(shared.StepCredit, shared.StepDraws, shared.PenalisedGradient):
  kl: str = 'k3_ratio'  # estimator of the KL: k1 | k2 | k3 | k3_ratio


def draw(key: AnyKey, row_R: IntR, text: Text, hp: Any) -> Masks:
  """Draws the states before the chosen steps."""
  order = text.record.order
  last = jnp.max(jnp.where(text.words, order, 0), axis=1)
  wanted = jnp.arange(order.shape[1])[None] <= last[:, None]
  return shared.draw_steps(key, row_R, text.record, wanted, hp)


def loss(now: ViewLogp, masks: Masks, batch: TrainBatch, hp: Config) -> tuple:
  """Returns (mean over rows of the mean over steps, metrics)."""
  old = jnp.where(masks.counted, batch.record.logp[:, None], 0.0)
  logp = jnp.where(masks.counted, now.logp, 0.0)
  ref = batch.ref.logp if hp.beta else None
  return shared.token_loss(logp, old, ref, masks, batch, hp)


def wants(hp: Any) -> Wants:
  return Wants(
    views=('ref',) if hp.beta else (),
    records=('entropy',) if hp.choose in ('entropy', 'top') else (),
    law=True,
  )


OBJECTIVE = Objective(
  Config, wants, draw, shared.weigh_rows, loss, sampler={'pick': 'random'}
)
