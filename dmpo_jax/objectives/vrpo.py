"""VRPO (LLaDA 1.5): DPO on ELBOs, with pairs made of verified rollouts.

arXiv 2505.19223. For a pair (w, l) of one prompt with r_w > r_l, and E the ELBO under
masks that policy and reference share:

  -log sigmoid(beta (E_theta - E_ref)(w) - beta (E_theta - E_ref)(l))
  - sft_coef E_theta(w) / L

smoothing = e takes a preference for wrong with that chance (conservative DPO, Mitchell
2023): the first term becomes -(1 - e) log sigmoid(m) - e log sigmoid(-m), m the beta
times the gap. Two outcomes then part by log((1 - e) / e) / beta nats; with e = 0 no
finite gap is the best.

variant = all: the mean over a group's pairs; best: its first best against its first
worst. The paper's pairs are given preferences; ours are rollouts of one group, and
groups of equal rewards have none. `reweigh` gives the derivatives by every row's ELBO,
under the same masks: the gradient is exact however rows are cut into microbatches. The
sigmoid of a noisy ELBO is biased; its variance bounds that.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmpo_jax import logprob
from dmpo_jax.objectives import shared
from dmpo_jax.types import (
  Array,
  FloatBG,
  FloatR,
  Masks,
  Objective,
  Scored,
  TrainBatch,
  ViewLogp,
  Wants,
  to_groups,
  to_rows,
)


@dataclasses.dataclass(frozen=True)
class Preference(shared.ElboMasks):
  """Settings of DPO on ELBOs, wherever its pairs come from."""

  OWN = {
    'beta': shared.above(0),
    'sft_coef': shared.least(0),
    'smoothing': lambda x: '' if 0 <= x < 0.5 else 'must be in [0, 0.5)',
  }
  beta: float = 0.2  # inverse temperature of the ELBO gap
  sft_coef: float = 0.05  # factor of the winners' likelihood; 0 = off
  smoothing: float = 0.0  # chance that a preference is wrong; 0 = none is
  masks: str = 'random'  # masks of the ELBO: stratified | random | order
  draws: int = 8  # masked copies of a completion per update


@dataclasses.dataclass(frozen=True)
class Config(Preference):
  OWN = {**Preference.OWN, 'variant': shared.one_of('all', 'best')}
  variant: str = 'all'  # pairs of a group: all | best (first best and first worst)


def weigh(scored: Scored, hp: Config) -> tuple:
  """Returns wins less losses, the rewards as own['reward'], and metrics."""
  share = pairs(scored.reward, hp)
  metrics = {'groups_with_pairs': jnp.mean(jnp.sum(share, axis=(1, 2)))}
  weight = jnp.sum(share - jnp.swapaxes(share, 1, 2), axis=2)
  return weight, {'reward': scored.reward}, metrics


def pairs(reward_BxG: FloatBG, hp: Config) -> Array:
  """Returns the share of the pair (winner, loser) in its group, (B, G, G)."""
  better = reward_BxG[:, :, None] > reward_BxG[:, None, :]
  if hp.variant == 'best':
    group = reward_BxG.shape[1]
    best = jax.nn.one_hot(jnp.argmax(reward_BxG, axis=1), group, dtype=bool)
    worst = jax.nn.one_hot(jnp.argmin(reward_BxG, axis=1), group, dtype=bool)
    better &= best[:, :, None] & worst[:, None, :]
  count = jnp.sum(better, axis=(1, 2), keepdims=True)
  return better / jnp.maximum(count, 1)


def reweigh(elbo_R: FloatR, batch: TrainBatch, group: int, hp: Config) -> FloatR:
  """Returns minus the derivative of a group's loss by each row's ELBO."""
  share = pairs(to_groups(batch.own['reward'], group), hp)
  gap = to_groups(elbo_R - batch.ref.elbo, group)
  margin = hp.beta * (gap[:, :, None] - gap[:, None, :])
  # (1 - e) sigmoid(-m) - e sigmoid(m), since the two sigmoids add up to 1.
  push = hp.beta * (jax.nn.sigmoid(-margin) - hp.smoothing) * share
  length = batch.completion.shape[1]
  return to_rows(
    jnp.sum(push, axis=2)
    - jnp.sum(push, axis=1)
    + hp.sft_coef / length * jnp.sum(share, axis=2)
  )


def pair_loss(now: ViewLogp, masks: Masks, batch: TrainBatch, hp: Config) -> tuple:
  """Returns the loss of given pairs, rewards (1, 0) in groups of two, and metrics.

  Both likelihoods are reported: their gap grows while both fall, too.
  """
  loss, _ = shared.elbo_loss(now, masks, batch, hp)
  elbo, wins = logprob.seq_elbo(now.logp, masks.weight), batch.own['reward']
  gap = elbo - batch.ref.elbo
  numbers = {
    'elbo_chosen': elbo * wins,
    'elbo_rejected': elbo * (1 - wins),
    'chosen_gap': gap * wins,
    'rejected_gap': gap * (1 - wins),
    'margin': gap * (2 * wins - 1),
  }
  return loss, {name: jnp.sum(x) / batch.norm for name, x in numbers.items()}


def wants(hp: Config) -> Wants:
  return Wants(elbo=('ref',), reweigh=True)


PAIRS = Objective(Config, wants, shared.draw_elbo, weigh, pair_loss, reweigh)
OBJECTIVE = Objective(Config, wants, shared.draw_elbo, weigh, shared.elbo_loss, reweigh)
