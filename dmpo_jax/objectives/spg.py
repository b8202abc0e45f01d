"""SPG: push up a lower bound of good completions, push down an upper bound of bad ones.

arXiv 2510.09541. Over K = `draws` masks z with mask ratio t:

  ELBO = mean_z 1/t sum_masked log p(x_i|z)
  EUBO = 1/power sum_i log mean_z [ 1/t 1(i masked) p(x_i|z)^power ]
  loss = -mean_g A (ELBO if A > 0 else bound),  A = r - mean

bound = eubo | elbo | mix (`mix` EUBO + the rest ELBO) | none (A < 0 is left out).
variant = released: both bounds are means over the masked tokens (EUBO's over the tokens
masked in any copy), and rows count by their length. masks = block: a uniform number in
one block of the sampler, all in the blocks after it and behind the first EOS, and each
token that is then left clean, of the prompt too, with chance `mask_prompt`. random: a
uniform number of the completion's tokens; the tail and the chance as before. The log of
a mean over K masks is below the log of its expectation. No ratio: reuse of rollouts is
unguarded.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmpo_jax import masking, rng
from dmpo_jax.objectives import shared
from dmpo_jax.rng import AnyKey
from dmpo_jax.types import (
  Array,
  FloatR,
  IntR,
  Masks,
  Objective,
  Scored,
  Text,
  TrainBatch,
  ViewLogp,
  Wants,
)


@dataclasses.dataclass(frozen=True)
class Config(shared.Settings):
  OWN = {
    'bound': shared.one_of('elbo', 'eubo', 'mix', 'none'),
    'power': shared.least(1),
    'variant': shared.one_of('released', 'formula'),
    'masks': shared.one_of('block', 'random'),
    'mix': shared.least(0),
  }
  advantage: str = 'mean'  # reward less: mean | loo (mean of the others) | zscore
  bound: str = 'mix'  # bound of bad completions: elbo | eubo | mix | none
  power: float = 1.5  # power of the probabilities in the EUBO, >= 1
  mix: float = 0.5  # share of the EUBO in bound mix
  variant: str = 'released'  # released (means over tokens) | formula (sums)
  masks: str = 'block'  # block (of the sampler) | random
  draws: int = 2  # masked copies of a completion per update
  low: float = 0.0  # least share of the block that is masked
  high: float = 1.0  # largest share of the block that is masked
  mask_prompt: float = 0.15  # chance of a clean token to be masked; 0 = none

  def idle(self) -> dict[str, str]:
    return shared.without_effect(
      ('mix', self.bound == 'mix', 'objective.bound = mix'),
      ('power', self.bound in ('eubo', 'mix'), 'objective.bound = eubo or mix'),
    )

  def problems(self) -> list[str]:
    right = 0 <= self.low <= self.high <= 1
    return super().problems() + shared.rates(self, right, '0 <= low <= high <= 1')


def draw(key: AnyKey, row_R: IntR, text: Text, hp: Config) -> Masks:
  """Draws hp.draws masks; Masks.weight is one over the masked share."""
  completion_RxL = text.completion
  length = completion_RxL.shape[1]
  block = text.block if hp.masks == 'block' else length
  which = jnp.arange(length) // block
  count_R = jnp.sum(completion_RxL, axis=1)

  def of_row(key, completion, count):
    keys = jax.random.split(key, 4)
    blocks = -(-count // block)  # blocks that the completion reaches
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

  masked = jax.vmap(of_row)(rng.row_keys(key, row_R), completion_RxL, count_R)
  counted = masked & completion_RxL[:, None]
  prompt = None
  if hp.mask_prompt:
    prompt = masking.draw_prompt(
      rng.substream(key, 'prompt'), row_R, text.prompt, hp.draws, hp.mask_prompt
    )
  masks = masking.per_copy(masked, count_R[:, None] / jnp.sum(counted, axis=-1))
  return masks._replace(counted=counted, prompt=prompt)


def bounds(logp_RxKxL: Array, masks: Masks, hp: Config) -> tuple[FloatR, FloatR]:
  """Returns (ELBO, EUBO)."""
  size = jnp.maximum(jnp.sum(masks.counted, axis=-1), 1)  # a draft may leave none
  sums = jnp.sum(jnp.where(masks.counted, logp_RxKxL, 0.0), axis=-1)
  lifted = hp.power * logp_RxKxL + jnp.log(masks.weight)
  lifted = jnp.where(masks.counted, lifted, -1e30)
  seen = jnp.any(masks.counted, axis=1)
  each = jax.nn.logsumexp(lifted, axis=1) - jnp.log(logp_RxKxL.shape[1])
  upper = jnp.sum(jnp.where(seen, each, 0.0), axis=1) / hp.power
  if hp.variant == 'formula':
    return jnp.mean(masks.weight[..., 0] * sums, axis=1), upper
  return jnp.mean(sums / size, axis=1), upper / jnp.maximum(jnp.sum(seen, axis=1), 1)


def weigh(scored: Scored, hp: Config) -> tuple:
  """Weighs for a mean over rows; released: rows count by their length."""
  scale = shared.per_row(scored)
  if hp.variant == 'released':
    scale = shared.per_token(scored) * scored.length
  return shared.weigh(scored, hp, scale)


def loss(now: ViewLogp, masks: Masks, batch: TrainBatch, hp: Config) -> tuple:
  """Returns (sum over rows / norm, metrics)."""
  lower, upper = bounds(now.logp, masks, hp)
  mix = hp.mix * upper + (1 - hp.mix) * lower
  kinds = {'elbo': lower, 'eubo': upper, 'mix': mix, 'none': jnp.zeros_like(lower)}
  below = kinds[hp.bound]
  value = jnp.where(batch.weight > 0, lower, below)
  return -jnp.sum(batch.weight * value) / batch.norm, {
    'elbo': jnp.sum(lower) / batch.total,
    'eubo': jnp.sum(upper) / batch.total,
  }


OBJECTIVE = Objective(
  Config,
  lambda hp: Wants(),
  draw,
  weigh,
  loss,
  whole_text='it masks the prompt, which copies share, and later blocks, unseen',
)
