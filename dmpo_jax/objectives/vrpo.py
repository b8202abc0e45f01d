"""VRPO (LLaDA 1.5): DPO on ELBOs, the pairs made of verified rollouts.

arXiv 2505.19223. For a pair (w, l) of one prompt with r_w > r_l, and E the
ELBO under masks that policy and reference share:

  -log sigmoid(beta (E_theta - E_ref)(w) - beta (E_theta - E_ref)(l))
  - sft_coef E_theta(w) / L

variant = all: the mean over a group's pairs; best: its first best against its
first worst. The paper's pairs come from elsewhere, ours of the rollouts; groups
of equal rewards have none. `reweigh` gives the derivatives by every row's
ELBO, under the same masks: the gradient is exact however rows are cut into
microbatches. The sigmoid of a noisy ELBO is biased; its variance bounds that.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmpo_jax.objectives import shared
from dmpo_jax.types import Objective, to_groups, to_rows


@dataclasses.dataclass(frozen=True)
class Config:
  beta: float = 0.2
  sft_coef: float = 0.05
  variant: str = 'all'
  masks: str = 'random'
  draws: int = 8


def weigh(scored, hp):
  """`positive` holds the rewards: `reweigh` makes pairs of them."""
  share = pairs(scored.reward, hp)
  return (
    jnp.sum(share - jnp.swapaxes(share, 1, 2), axis=2),
    scored.reward,
    {'groups_with_pairs': jnp.mean(jnp.sum(share, axis=(1, 2)))},
  )


def pairs(reward_BxG, hp):
  """(B, G, G): the share of the pair (winner, loser) in its group."""
  better = reward_BxG[:, :, None] > reward_BxG[:, None, :]
  if hp.variant == 'best':
    group = reward_BxG.shape[1]
    best = jax.nn.one_hot(jnp.argmax(reward_BxG, axis=1), group, dtype=bool)
    worst = jax.nn.one_hot(jnp.argmin(reward_BxG, axis=1), group, dtype=bool)
    better &= best[:, :, None] & worst[:, None, :]
  count = jnp.sum(better, axis=(1, 2), keepdims=True)
  return better / jnp.maximum(count, 1)


def reweigh(elbo_R, elbo_old_R, batch, group, hp):
  """(R,) minus the derivative of a group's loss by each row's ELBO."""
  share = pairs(to_groups(batch.positive, group), hp)
  gap = to_groups(elbo_R - batch.extra['elbo_ref'], group)
  margin = hp.beta * (gap[:, :, None] - gap[:, None, :])
  push = hp.beta * jax.nn.sigmoid(-margin) * share
  length = batch.completion.shape[1]
  return to_rows(
    jnp.sum(push, axis=2)
    - jnp.sum(push, axis=1)
    + hp.sft_coef / length * jnp.sum(share, axis=2)
  )


def needs(hp):
  return {'elbo_ref', 'policy'}


def check(hp):
  return shared.elbo_rules(hp) + shared.complain(
    hp, beta=shared.above(0), sft_coef=shared.least(0), variant=('all', 'best')
  )


OBJECTIVE = Objective(
  hp=Config,
  needs=needs,
  check=check,
  draw=shared.draw_elbo,
  weigh=weigh,
  reweigh=reweigh,
  loss=shared.elbo_loss,
)
