"""coupled-GRPO (DiffuCoder): PPO on tokens, each seen in a pair of masks.

arXiv 2506.20639. With p0 the log-prob under a fully masked completion, p1 that under a
mask S at ratio r ~ U(0.2, 0.8), and p2 that under its complement (r of each row here,
of a batch in the release):

  log pi(x_i) = a (p0 + [i in S] p1/r + [i not in S] p2/(1 - r))

variant = released: a = 1/2, so a token's weight is 1.5 on average and ratios are taken
to about that power. unit: a = 1/3, of weight one. elbo: no p0, |S| uniform over {0..L}
and weights (L+1)/|S|, halved: unbiased for the ELBO. The loss is diffu_grpo's.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmpo_jax import masking, rng
from dmpo_jax.objectives import diffu_grpo, shared
from dmpo_jax.rng import AnyKey
from dmpo_jax.types import (
  Array,
  IntR,
  Masks,
  Objective,
  Text,
  TrainBatch,
  ViewLogp,
  Views,
)


@dataclasses.dataclass(frozen=True)
class Config(shared.PenalisedGradient):
  OWN = {'variant': shared.one_of('released', 'unit', 'elbo')}
  advantage: str = 'loo'  # reward less: mean | loo (mean of the others) | zscore
  clip: float = 0.5  # ratios are clipped below at 1 - clip
  beta: float = 0.01  # factor of the KL to the reference; 0 = off
  variant: str = 'released'  # weights of the masks: released | unit | elbo
  low: float = 0.2  # mask ratio ~ U(low, high)
  high: float = 0.8  # below 1

  def idle(self) -> dict[str, str]:
    rates = self.variant != 'elbo'
    needs = 'objective.variant = released or unit'
    return super().idle() | shared.without_effect(('low high', rates, needs))

  def problems(self) -> list[str]:
    right = 0 < self.low < self.high < 1
    return super().problems() + shared.rates(self, right, '0 < low < high < 1')


def draw(key: AnyKey, row_R: IntR, text: Text, hp: Config) -> Masks:
  """Draws all, S and its complement; a token's log-prob is their weighted mean."""
  length, counted = text.completion.shape[1], text.completion[:, None]
  if hp.variant == 'elbo':
    masks = masking.draw_stratified(key, row_R, text.canvas, 2)
    return masks._replace(counted=counted)

  def of_row(key):
    key_rate, key_mask = jax.random.split(key)
    rate = jax.random.uniform(key_rate, minval=hp.low, maxval=hp.high)
    some = jax.random.uniform(key_mask, (length,)) < rate
    return (
      jnp.stack([jnp.ones_like(some), some, ~some]),
      jnp.stack([jnp.ones_like(rate), 1 / rate, 1 / (1 - rate)]),
    )

  masked, weight = rng.per_row(key, row_R, of_row)
  if hp.variant == 'released':
    weight *= 1.5
  return masking.per_copy(masked, weight)._replace(counted=counted)


def mean_logp(logp_RxKxL: Array, masks: Masks) -> Array:
  """Returns the weighted mean over copies, (R, 1, L)."""
  return jnp.mean(masks.weight * logp_RxKxL, axis=1, keepdims=True)


def loss(now: ViewLogp, masks: Masks, batch: TrainBatch, hp: Config) -> tuple:
  """Returns (sum over counted tokens, metrics)."""
  old = Views(logp=mean_logp(batch.old.logp, masks))
  ref = Views(logp=mean_logp(batch.ref.logp, masks)) if hp.beta else Views()
  whole = masks._replace(weight=jnp.ones_like(masks.weight[:, :1]))
  return diffu_grpo.loss(
    ViewLogp(mean_logp(now.logp, masks)), whole, batch._replace(old=old, ref=ref), hp
  )


OBJECTIVE = Objective(
  Config,
  diffu_grpo.wants,
  draw,
  shared.weigh_tokens,
  loss,
  whole_text='its masks come with complements, and those of blocks do not',
)
