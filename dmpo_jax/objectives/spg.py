"""SPG: push up a lower bound of good completions, down an upper one of bad.

arXiv 2510.09541. Over K = `draws` masks z with share t masked:

  ELBO = mean_z 1/t sum_masked log p(x_i|z)
  EUBO = 1/power sum_i log mean_z [ 1/t 1(i masked) p(x_i|z)^power ]
  loss = -mean_g A (ELBO if A > 0 else bound),  A = r - mean

bound = eubo | elbo | mix (`mix` EUBO + the rest ELBO) | none (A < 0 is left
out). variant = released: both are means over the tokens masked (EUBO's
of those masked at all), and rows count by their length. masks = block: in
one block of the sampler a uniform number, all in those after it and behind
the first EOS, and of what is then left clean each token, of the prompt
too, with chance `mask_prompt`. random: a uniform number of the completion's
tokens, the tail and the chance as before. The log of a mean over K masks is
below the log of its expectation. No ratio: reuse of rollouts is unguarded.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmpo_jax import masking, rng
from dmpo_jax.objectives import shared
from dmpo_jax.types import Masks, Objective

BOUNDS = ('elbo', 'eubo', 'mix', 'none')


@dataclasses.dataclass(frozen=True)
class Config:
  advantage: str = 'mean'
  bound: str = 'mix'
  power: float = 1.5
  mix: float = 0.5
  variant: str = 'released'
  masks: str = 'block'
  draws: int = 2
  low: float = 0.0
  high: float = 1.0
  mask_prompt: float = 0.15


def draw(key, row_R, completion_RxL, hp, record=None):
  """hp.draws masks; Masks.weight is one over the share that is masked."""
  length = completion_RxL.shape[1]
  block = record['block'] if hp.masks == 'block' else length
  which = jnp.arange(length) // block
  count_R = jnp.sum(completion_RxL, axis=1)

  def one(key, completion, count):
    keys = jax.random.split(key, 4)
    blocks = -(-count // block)  # of them that the completion reaches
    order = jax.random.permutation(keys[0], length // block)
    chosen = order[jnp.arange(hp.draws) % len(order)] % blocks
    inside = (which[None] == chosen[:, None]) & completion[None]
    size = jnp.sum(inside, axis=1)
    least = jnp.maximum(jnp.floor(size * hp.low), 1).astype(jnp.int32)
    most = jnp.minimum(jnp.floor(size * hp.high), size).astype(jnp.int32)
    some = least + jnp.floor(
      jax.random.uniform(keys[1], (hp.draws,)) * (jnp.maximum(most, least) - least + 1)
    ).astype(jnp.int32)
    noise = jnp.where(inside, jax.random.uniform(keys[2], (hp.draws, length)), 2.0)
    rank = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1)
    masked = inside & (rank < some[:, None])
    masked |= (which[None] > chosen[:, None]) | ~completion[None]
    extra = jax.random.uniform(keys[3], (hp.draws, length))
    return masked | (extra < hp.mask_prompt)

  masked = jax.vmap(one)(rng.row_keys(key, row_R), completion_RxL, count_R)
  counted = masked & completion_RxL[:, None]
  prompt = None
  if hp.mask_prompt:
    prompt = masking.draw_prompt(
      jax.random.fold_in(key, 1), row_R, record['prompt'], hp.draws, hp.mask_prompt
    )
  return Masks(masked, count_R[:, None] / jnp.sum(counted, axis=-1), counted, prompt)


def bounds(logp_RxKxL, masks, hp):
  """(ELBO, EUBO), each (R,)."""
  size = jnp.sum(masks.counted, axis=-1)
  sums = jnp.sum(jnp.where(masks.counted, logp_RxKxL, 0.0), axis=-1)
  lifted = hp.power * logp_RxKxL + jnp.log(masks.weight)[..., None]
  lifted = jnp.where(masks.counted, lifted, -1e30)
  seen = jnp.any(masks.counted, axis=1)
  each = jax.nn.logsumexp(lifted, axis=1) - jnp.log(logp_RxKxL.shape[1])
  upper = jnp.sum(jnp.where(seen, each, 0.0), axis=1) / hp.power
  if hp.variant == 'formula':
    return jnp.mean(masks.weight * sums, axis=1), upper
  return jnp.mean(sums / size, axis=1), upper / jnp.sum(seen, axis=1)


def weigh(scored, hp):
  scale = shared.per_row(scored)
  if hp.variant == 'released':
    scale = shared.per_token(scored) * scored.length
  return shared.weigh(scored, hp.advantage, scale)


def loss(logp_RxKxL, masks, batch, elbo_old_R, hp):
  """(sum over rows / norm, metrics)."""
  lower, upper = bounds(logp_RxKxL, masks, hp)
  share = {'elbo': 0.0, 'eubo': 1.0, 'mix': hp.mix, 'none': 0.0}[hp.bound]
  below = share * upper + (1 - share) * lower
  if hp.bound == 'none':
    below = jnp.zeros_like(lower)
  value = jnp.where(batch.weight > 0, lower, below)
  return -jnp.sum(batch.weight * value) / batch.norm, {
    'elbo': jnp.sum(lower) / batch.total,
    'eubo': jnp.sum(upper) / batch.total,
  }


def needs(hp):
  return ({'block'} if hp.masks == 'block' else set()) | (
    {'prompt'} if hp.mask_prompt else set()
  )


def check(hp):
  found = shared.complain(
    hp,
    advantage=shared.ADVANTAGES,
    bound=BOUNDS,
    power=shared.least(1),
    variant=('released', 'formula'),
    masks=('block', 'random'),
    draws=shared.least(1),
    mask_prompt=shared.chance,
    mix=shared.least(0),
  )
  if not 0 <= hp.low <= hp.high <= 1:
    found.append(
      f'objective.low = {hp.low}, objective.high = {hp.high} must '
      'be 0 <= low <= high <= 1'
    )
  return found


OBJECTIVE = Objective(
  hp=Config,
  needs=needs,
  check=check,
  draw=draw,
  weigh=weigh,
  reweigh=shared.no_reweigh,
  loss=loss,
)
