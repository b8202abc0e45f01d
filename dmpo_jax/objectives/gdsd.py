"""GDSD: regress the log-ratio to the old policy on the advantage.

arXiv 2605.29398, by its released code. With E the estimate of one pair of complementary
masks, psi = 1/alpha and A leaving one out:

  loss = mean_g mean_pairs [ ((E_theta - E_old)/L - psi A)^2
                             + beta/L (E_theta - E_ref)^2 / 2 ]

The release sums the squares over the K/2 pairs and takes the mean of the KL; here the
KL is divided by K/2, which is the same but for the rate. centre: in the first term a
token's logit less the mean over the vocabulary stands for its log-prob (TLC; the second
release's, because in the first it cancels in the softmax). variant = elbo: weights
(L+1)/m, and the clamp of the gap to ln(1 -+ clip) is per token; 0 = none. released: no
weights (E is half the sum, which leans to heavy masks), and the clamp is on the sum of
a sequence: beyond it the gradient is zero, which holds nearly always after the first
update.
"""

import dataclasses

import jax.numpy as jnp

from dmpo_jax import logprob, masking
from dmpo_jax.objectives import shared
from dmpo_jax.rng import AnyKey
from dmpo_jax.types import (
  Array,
  IntR,
  Masks,
  Objective,
  Text,
  TrainBatch,
  ViewLogp,
  Wants,
)


@dataclasses.dataclass(frozen=True)
class Config(shared.Settings):
  OWN = {
    'alpha': shared.above(0),
    'variant': shared.one_of('elbo', 'released'),
    'draws': shared.pairs,
  }
  advantage: str = 'loo'  # reward less: mean | loo (mean of the others) | zscore
  alpha: float = 0.1  # 1 / psi, temperature of the target
  beta: float = 1e-3  # factor of the KL to the reference; 0 = off
  clip: float = 0.0  # clamp of the gap to ln(1 -+ clip); 0 = none
  centre: bool = False  # take logits less their mean, not log-probs
  variant: str = 'elbo'  # weights of the masks: elbo | released
  draws: int = 4  # masked copies of a completion per update, in pairs


def draw(key: AnyKey, row_R: IntR, text: Text, hp: Config) -> Masks:
  """Draws pairs of complementary masks."""
  masks = masking.draw_stratified(key, row_R, text.canvas, hp.draws)
  if hp.variant == 'released':
    return masks._replace(weight=jnp.ones_like(masks.weight))
  return masks


def by_pair(x_RxKxL: Array, masks: Masks) -> Array:
  """Returns (R, K/2): the mean weighted sum of each mask and its complement."""
  sums = logprob.copy_sums(x_RxKxL, masks.weight)
  half = sums.shape[1] // 2
  return (sums[:, :half] + sums[:, half:]) / 2


def loss(now: ViewLogp, masks: Masks, batch: TrainBatch, hp: Config) -> tuple:
  """Returns (mean over rows, metrics)."""
  length = now.logp.shape[-1]
  new, old = now.logp, batch.old.logp
  if hp.centre:
    new, old = now.reads['centred'], batch.old.reads['centred']
  gap = by_pair(new, masks) - by_pair(old, masks)
  per = 1 if hp.variant == 'released' else length
  gap /= per
  if hp.clip:
    gap = jnp.clip(gap, jnp.log1p(-hp.clip), jnp.log1p(hp.clip))
  gap *= per / length
  weight, scale = batch.weight[:, None], batch.own['scale'][:, None]
  # scale (gap - A / alpha)^2, where weight = scale A.
  square = jnp.where(scale > 0, weight**2 / jnp.where(scale > 0, scale, 1), 0.0)
  value = scale * gap**2 - 2 * weight * gap / hp.alpha + square / hp.alpha**2
  if hp.beta:
    far = by_pair(now.logp, masks) - by_pair(batch.ref.logp, masks)
    if hp.variant == 'released':
      length *= far.shape[1]
    value += hp.beta / length * scale * far**2 / 2
  return jnp.sum(jnp.mean(value, axis=1)) / batch.norm, {
    'ratio_log_abs': jnp.sum(jnp.mean(jnp.abs(gap), 1)) / batch.total
  }


def wants(hp: Config) -> Wants:
  return Wants(
    views=('old', 'ref') if hp.beta else ('old',),
    reads=('centred',) if hp.centre else (),
  )


OBJECTIVE = Objective(Config, wants, draw, shared.weigh_rows, loss)
