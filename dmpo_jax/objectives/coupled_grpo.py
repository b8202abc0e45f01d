"""coupled-GRPO (DiffuCoder): PPO on tokens, each seen in a pair of masks.

With p0 of a fully masked completion, p1 of a mask S at rate r ~ U(0.2, 0.8)
and p2 of its complement (r of each row here, of a batch in the release):

  log pi(x_i) = a (p0 + [i in S] p1/r + [i not in S] p2/(1 - r))

variant = released: a = 1/2, so that a token's weight is 1.5 on average and
ratios are taken to about that power. unit: a = 1/3, of weight one. elbo: no
p0, |S| uniform over {0..L} and weights (L+1)/|S|, halved: unbiased for the
ELBO. The loss is diffu_grpo's.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmpo_jax import masking, rng
from dmpo_jax.objectives import diffu_grpo, shared
from dmpo_jax.types import Masks, Objective


@dataclasses.dataclass(frozen=True)
class Config:
  advantage: str = 'loo'
  clip: float = 0.5
  clip_high: float = 0.0
  beta: float = 0.01
  kl: str = 'k3'
  variant: str = 'released'
  low: float = 0.2
  high: float = 0.8


def draw(key, row_R, completion_RxL, hp):
  """All, S and its complement; a token's log-prob is the weighted mean."""
  length = completion_RxL.shape[1]
  if hp.variant == 'elbo':
    masks = masking.draw_stratified(key, row_R, length, 2)
    return masks._replace(counted=completion_RxL[:, None])

  def one(key):
    key_rate, key_mask = jax.random.split(key)
    rate = jax.random.uniform(key_rate, minval=hp.low, maxval=hp.high)
    some = jax.random.uniform(key_mask, (length,)) < rate
    return (
      jnp.stack([jnp.ones_like(some), some, ~some]),
      jnp.stack([jnp.ones_like(rate), 1 / rate, 1 / (1 - rate)]),
    )

  masked, weight = rng.per_row(key, row_R, one)
  if hp.variant == 'released':
    weight *= 1.5
  return Masks(masked, weight, completion_RxL[:, None])


def token_logp(logp_RxKxL, masks):
  return jnp.mean(masks.weight[..., None] * logp_RxKxL, axis=1, keepdims=True)


def loss(logp_RxKxL, masks, batch, elbo_old_R, hp):
  """(sum over counted tokens, metrics)."""
  extra = {
    name: token_logp(x, masks) if name.startswith('tokens_') else x
    for name, x in batch.extra.items()
  }
  whole = masks._replace(weight=jnp.ones_like(masks.weight[:, :1]))
  return diffu_grpo.loss(
    token_logp(logp_RxKxL, masks), whole, batch._replace(extra=extra), elbo_old_R, hp
  )


def needs(hp):
  return {'tokens_old'} | ({'tokens_ref'} if hp.beta else set())


def check(hp):
  found = shared.ratio_rules(hp) + shared.complain(
    hp, variant=('released', 'unit', 'elbo')
  )
  if not 0 < hp.low < hp.high < 1:
    found.append(
      f'objective.low = {hp.low}, objective.high = {hp.high} must be 0 < low < high < 1'
    )
  return found


OBJECTIVE = Objective(
  hp=Config,
  needs=needs,
  check=check,
  draw=draw,
  weigh=shared.weigh_tokens,
  reweigh=shared.no_reweigh,
  loss=loss,
)
