"""DiPO: PPO on all recorded rounds, with an asymmetric clip and the reference's KL.

arXiv 2512.22234, by its released code (DiRL, modeling_sdar.py and dapo.py). States,
log-probs and packed pass are TraceRL's (tracerl.py), with clip 0.8 to 1.28:

  loss = 1/(N L) sum over tokens of [ -min(rho A, clip(rho) A) + beta k3(theta || ref) ]

Where we differ from the released code:
* norm = constant divides by N L: rows of a buffer times the length of a completion.
  norm = released is the mean over groups of their sum, divided by the tokens of a
  group's rows / W. The release has a row for each round, so that is the number of
  tokens only where every completion has W rounds; with fewer the loss is larger.
* It samples with top_k = 50 and scores without it, so E[rho] is not 1. Here
  objectives of the sampling law refuse top_k.
* It ranks positions by the sampled token's probability and drops the term of that
  choice. `sampler.rank = max` has no such term.
* Its `shrink` other than 1 makes one round of a whole block. TraceRL's merges
  consecutive rounds; here there is none.
* It clips log rho to +-10; here rho is at most e^20.
* It samples again where a group's answers are all right or all wrong; `skip_equal`
  leaves such groups out.
* As there, tokens behind the first stop are trained as far as they were sampled.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from dmpo_jax.objectives import shared, tracerl
from dmpo_jax.types import Masks, Scored, TrainBatch, ViewLogp, Wants


@dataclasses.dataclass(frozen=True)
class Config(shared.StepCredit, shared.PenalisedGradient):
  OWN = {'draws': shared.least(0), 'norm': shared.one_of('constant', 'released')}
  shrink: ClassVar[int] = 1
  advantage: str = 'zscore'  # reward less: mean | loo | zscore | prefix
  clip_high: float = 0.28  # ratios are clipped above at 1 + clip_high; 0 = as clip
  draws: int = 0  # rounds of a row per update; 0 = all
  norm: str = 'constant'  # constant (rows times length) | released (a group's tokens)
  loss_tail: bool = True  # train the tokens sampled after the first EOS


def weigh(scored: Scored, hp: Config) -> tuple:
  """Weighs for a mean over rows times the length, or for the mean of groups' means."""
  tokens, rounds, most, length = tracerl.sizes(scored, hp)
  if hp.norm == 'constant':
    scale = shared.per_row(scored) / length
  else:
    size = jnp.sum(tokens * rounds, axis=1, keepdims=True)
    scale = jnp.broadcast_to(most / jnp.maximum(size, 1), tokens.shape)
  return shared.weigh(scored, hp, scale)


def loss(now: ViewLogp, masks: Masks, batch: TrainBatch, hp: Config) -> tuple:
  """Returns (sum of the tokens' terms over rows / norm, metrics)."""
  ref = batch.ref.logp if hp.beta else None
  old = batch.record.logp[:, None]
  return shared.token_loss(now.logp, old, ref, masks, batch, hp)


def wants(hp: Config) -> Wants:
  return Wants(views=('ref',) if hp.beta else (), records=(), law=True)


OBJECTIVE = tracerl.OBJECTIVE._replace(
  Config=Config, wants=wants, weigh=weigh, loss=loss
)
