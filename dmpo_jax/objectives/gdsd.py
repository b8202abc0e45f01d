"""GDSD: regress the log-ratio to the old policy on the advantage.

arXiv 2605.29398, by its released code. With E the estimate of one pair of
complementary masks, psi = 1/alpha and A leaving one out:

  loss = mean_g mean_pairs [ ((E_theta - E_old)/L - psi A)^2
                             + beta/L (E_theta - E_ref)^2 / 2 ]

(released: the squares are summed over the K/2 pairs, the KL is a mean; here it
is divided by K/2, which is the same but for the rate).
centre: in the first term a token's logit less the mean over the vocabulary
stands for its log-prob (TLC; the second release's, for in the first it cancels
in the softmax). variant = elbo: weights (L+1)/m, and the clamp of the gap to
ln(1 -+ clip) is per token; 0 = none. released: no weights (E is half the sum,
which leans to heavy masks), and the clamp is on the sum of a sequence: beyond
it the gradient is zero, and after the first update nearly always.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from dmpo_jax import masking
from dmpo_jax.objectives import shared
from dmpo_jax.types import Objective


@dataclasses.dataclass(frozen=True)
class Config:
  common_masks: ClassVar[bool] = True
  advantage: str = 'loo'
  alpha: float = 0.1
  beta: float = 1e-3
  clip: float = 0.0
  centre: bool = False
  variant: str = 'elbo'
  draws: int = 4


def draw(key, row_R, completion_RxL, hp):
  masks = masking.draw_stratified(key, row_R, completion_RxL.shape[1], hp.draws)
  if hp.variant == 'released':
    return masks._replace(weight=jnp.ones_like(masks.weight))
  return masks


def by_pair(x_RxKxL, masks):
  """(R, K/2): of each mask and its complement, the mean weighted sum."""
  sums = masks.weight * jnp.sum(x_RxKxL, axis=-1)
  half = sums.shape[1] // 2
  return (sums[:, :half] + sums[:, half:]) / 2


def loss(logp_RxKxL, masks, batch, elbo_old_R, hp):
  """(mean over rows, metrics)."""
  length, extra = logp_RxKxL.shape[-1], batch.extra
  now, old = logp_RxKxL, extra['tokens_old']
  if hp.centre:
    now, old = extra['centred'], extra['centred_old']
  gap = by_pair(now, masks) - by_pair(old, masks)
  per = 1 if hp.variant == 'released' else length
  gap /= per
  if hp.clip:
    gap = jnp.clip(gap, jnp.log1p(-hp.clip), jnp.log1p(hp.clip))
  gap *= per / length
  weight, scale = batch.weight[:, None], batch.positive[:, None]
  # scale (gap - A / alpha)^2, where weight = scale A.
  target = (
    jnp.where(scale > 0, weight**2 / jnp.where(scale > 0, scale, 1), 0.0) / hp.alpha**2
  )
  value = scale * gap**2 - 2 * weight * gap / hp.alpha + target
  if hp.beta:
    far = by_pair(logp_RxKxL, masks) - by_pair(extra['tokens_ref'], masks)
    if hp.variant == 'released':
      length *= far.shape[1]
    value += hp.beta / length * scale * far**2 / 2
  return jnp.sum(jnp.mean(value, axis=1)) / batch.norm, {
    'ratio_log_abs': jnp.sum(jnp.mean(jnp.abs(gap), 1)) / batch.total
  }


def needs(hp):
  return (
    {'tokens_old'}
    | ({'tokens_ref'} if hp.beta else set())
    | ({'centred'} if hp.centre else set())
  )


def check(hp):
  return shared.complain(
    hp,
    advantage=shared.ADVANTAGES,
    alpha=shared.above(0),
    beta=shared.least(0),
    clip=shared.chance,
    variant=('elbo', 'released'),
    draws=shared.pairs,
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
