"""MAPG: the policy gradient of tokens and of the positions they stand at.

arXiv 2607.15200, from notes on the paper. The sampler draws a step's positions
without replacement in proportion to exp(score) (pick plackett_luce), so their
choice has a gradient too:

  loss = -mean_g mean_s [ min(rho A, clip(rho) A) + min(pi A, clip(pi) A) ]

rho: ratio of the probability of step s's tokens; pi: of its set of positions.
The scores are of the state alone, the largest log-prob of each place; the
paper's are of the proposals, most of which are thrown away: a noisier law of
the same form. `draws` steps stand for all. places = False leaves pi out, and
with it what the gradient owes to the order.
"""

import dataclasses

import jax.numpy as jnp

from dmpo_jax.objectives import agrpo, shared
from dmpo_jax.sampler import picks
from dmpo_jax.types import Objective


@dataclasses.dataclass(frozen=True)
class Config:
  advantage: str = 'mean'
  clip: float = 0.2
  clip_high: float = 0.0
  choose: str = 'uniform'
  draws: int = 12
  places: bool = True


def draw(key, row_R, completion_RxL, hp, record):
  """The states before the chosen steps; `open` is what is masked of the
  block."""
  masks = agrpo.draw(key, row_R, completion_RxL, hp, record)
  which = jnp.arange(completion_RxL.shape[1])[None, None] // record['block']
  own = jnp.max(jnp.where(masks.counted, which, -1), axis=-1, keepdims=True)
  return masks._replace(open=masks.masked & (which == own))


def loss(logp_RxKxL, masks, batch, elbo_old_R, hp):
  """(mean over rows of the mean over steps, metrics)."""
  record, counted = batch.extra['record'], masks.counted

  def by_step(x):
    return jnp.sum(jnp.where(counted, x, 0.0), axis=-1)

  weight = jnp.broadcast_to(batch.weight[:, None], masks.weight.shape)
  bounds = hp.clip, hp.clip_high or hp.clip
  gap = by_step(logp_RxKxL - record['logp'][:, None])
  live, zero = masks.weight > 0, jnp.zeros_like(gap)
  metrics = shared.gap_metrics(gap, zero, live, batch)
  value = shared.surrogate(gap, weight, *bounds)
  if hp.places:
    now = picks.plackett_luce_logp(batch.extra['score'], masks.open, counted)
    old = by_step(record['place'][:, None]) / jnp.maximum(jnp.sum(counted, axis=-1), 1)
    value += shared.surrogate(now - old, weight, *bounds)
    far = shared.gap_metrics(now, old, live, batch)['ratio_log_abs']
    metrics['place_log_abs'] = far
  rows = jnp.mean(masks.weight * value, axis=1)
  return -jnp.sum(rows) / batch.norm, metrics


def needs(hp):
  wanted = {'record', 'law', 'block', 'place'}
  wanted |= {'score'} if hp.places else set()
  return wanted | ({'entropy'} if hp.choose in ('entropy', 'top') else set())


def check(hp):
  return shared.complain(
    hp,
    advantage=shared.ADVANTAGES,
    clip=shared.chance,
    clip_high=shared.least(0),
    choose=shared.CHOICES,
    draws=shared.least(0 if hp.choose == 'each' else 1),
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
