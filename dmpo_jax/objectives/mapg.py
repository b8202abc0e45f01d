"""MAPG: the policy gradient of tokens and of the positions at which they stand.

arXiv 2607.15200, from notes on the paper. The sampler draws a step's positions without
replacement in proportion to exp(score) (pick plackett_luce), so their choice has a
gradient too:

  loss = -mean_g mean_s [ min(rho A, clip(rho) A) + min(pi A, clip(pi) A) ]

rho is the ratio of the probability of step s's tokens, pi that of its set of positions.
The scores are of the state alone, the largest log-prob of each position. The paper's
are of the proposals, most of which are thrown away: a noisier law of the same form.
`draws` steps stand for all. places = False leaves out pi, and with it the part of the
gradient that the order contributes.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from dmpo_jax.objectives import agrpo, shared
from dmpo_jax.rng import AnyKey
from dmpo_jax.sampler import picks
from dmpo_jax.types import IntR, Masks, Objective, Text, TrainBatch, ViewLogp, Wants


@dataclasses.dataclass(frozen=True)
class Config(shared.StepCredit, shared.StepDraws, shared.PolicyGradient):
  # Which steps stand for all: each | uniform | entropy | top | first.
  choose: str = 'uniform'
  draws: int = 12  # steps of a row per update; 0 with choose = each: all
  places: bool = True  # add the gradient of the choice of positions


def draw(key: AnyKey, row_R: IntR, text: Text, hp: Config) -> Masks:
  """Draws the states before the chosen steps; `open` is the block's masked part."""
  masks = agrpo.draw(key, row_R, text, hp)
  which = jnp.arange(text.completion.shape[1])[None, None] // text.block
  own = jnp.max(jnp.where(masks.counted, which, -1), axis=-1, keepdims=True)
  return masks._replace(open=masks.masked & (which == own))


def loss(now: ViewLogp, masks: Masks, batch: TrainBatch, hp: Config) -> tuple:
  """Returns (mean over rows of the mean over steps, metrics)."""
  record, copies = batch.record, shared.step_weight(masks)
  weight = shared.weight_of_steps(batch, masks)
  gap = shared.counted_sums(now.logp - record.logp[:, None], masks)
  live, zero = copies > 0, jnp.zeros_like(gap)
  metrics = shared.gap_metrics(gap, zero, live, batch)
  value = shared.surrogate(gap, weight, *hp.bounds)
  if hp.places:
    new = picks.plackett_luce_logp(now.reads['score'], masks.open, masks.counted)
    size = jnp.maximum(jnp.sum(masks.counted, axis=-1), 1)
    old = shared.counted_sums(record.more['place'][:, None], masks) / size
    value += shared.surrogate(new - old, weight, *hp.bounds)
    far = shared.gap_metrics(new, old, live, batch)['ratio_log_abs']
    metrics['place_log_abs'] = far
  rows = jnp.mean(copies * value, axis=1)
  return -jnp.sum(rows) / batch.norm, metrics


def wants(hp: Config) -> Wants:
  entropy = ('entropy',) if hp.choose in ('entropy', 'top') else ()
  return Wants(
    reads=('score',) if hp.places else (), records=('place', *entropy), law=True
  )


def sampler_problems(sampler: Any) -> list[str]:
  if (sampler.pick, sampler.rank, sampler.rank_law) == (
    'plackett_luce',
    'max',
    'model',
  ):
    return []
  return [
    f'sampler.pick = {sampler.pick}, sampler.rank = {sampler.rank}, sampler.rank_law = '
    f'{sampler.rank_law}: set plackett_luce, max, model, whose choice of positions has '
    'a density'
  ]


OBJECTIVE = Objective(
  Config,
  wants,
  draw,
  shared.weigh_rows,
  loss,
  sampler=dict(
    pick='plackett_luce', rank='max', rank_law='model', rank_temperature=0.5
  ),
  sampler_problems=sampler_problems,
)
