"""DiFFPO: PPO on a mean-field policy of two times, with an off-policy correction.

arXiv 2510.02212; from its abstract and reviews, the loss in part reconstructed. tau is
a uniform step of the row. Tokens unmasked up to tau are predicted from the prompt
alone, the others from the state after tau. With pi2 that policy and pi_old the
sampler's recorded log-prob, per token:

  loss = -sum min(pi2_old/pi_old, truncate) min(rho A, clip(rho) A) / size,
  rho = pi2_theta/pi2_old

norm = sequence: size is G times the tokens of the completion, a mean of means (the
paper's, by a review). token: the batch's tokens per prompt. With 20 and 200 tokens in a
group the two weigh the first completion ten to one.

The paper's learned threshold of the sampler is not part of this.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmpo_jax import masking, rng
from dmpo_jax.objectives import shared
from dmpo_jax.rng import AnyKey
from dmpo_jax.types import (
  IntR,
  Masks,
  Objective,
  Scored,
  Text,
  TrainBatch,
  ViewLogp,
  Wants,
)


@dataclasses.dataclass(frozen=True)
class Config(shared.PenalisedGradient):
  OWN = {'truncate': shared.above(0), 'norm': shared.one_of('sequence', 'token')}
  beta: float = 0.04  # factor of the KL to the reference; 0 = off
  truncate: float = 2.0  # largest importance correction
  norm: str = 'sequence'  # divides by tokens of: sequence (its own) | token (all)


def draw(key: AnyKey, row_R: IntR, text: Text, hp: Config) -> Masks:
  """Draws two copies: all masked, and the state after tau; a token counts in one."""
  order = text.record.order
  steps = jnp.max(order, axis=1) + 1
  tau = jnp.floor(rng.per_row(key, row_R, jax.random.uniform) * steps)
  late = (order > tau[:, None].astype(jnp.int32)) | (order < 0)
  masked = jnp.stack([jnp.ones_like(late), late], axis=1)
  counted = jnp.stack([~late, late], axis=1)
  counted &= ((order >= 0) & text.completion)[:, None]
  # The weight makes the mean over the two copies the sum of both.
  masks = masking.per_copy(masked, jnp.full(masked.shape[:2], 2.0))
  return masks._replace(counted=counted)


def weigh(scored: Scored, hp: Config) -> tuple:
  """Weighs for a mean over completions of their means, or over the batch's tokens."""
  of_row = hp.norm == 'sequence'
  scale = shared.per_length(scored) if of_row else shared.per_token(scored)
  return shared.weigh(scored, hp, scale)


def loss(now: ViewLogp, masks: Masks, batch: TrainBatch, hp: Config) -> tuple:
  """Returns (sum over counted tokens, metrics)."""
  sampled, old = batch.record.logp[:, None], batch.old.logp
  gap = jnp.where(masks.counted, old - sampled, 0.0)
  correction = jnp.minimum(jnp.exp(jnp.minimum(gap, 20.0)), hp.truncate)
  batch = batch._replace(weight=shared.like(batch.weight, old) * correction)
  ref = batch.ref.logp if hp.beta else None
  return shared.token_loss(now.logp, old, ref, masks, batch, hp)


def wants(hp: Config) -> Wants:
  return Wants(views=('old', 'ref') if hp.beta else ('old',), records=(), law=True)


OBJECTIVE = Objective(Config, wants, draw, weigh, loss)
