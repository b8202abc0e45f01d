"""The forward process: draws of the completion positions that the mask token covers.

Every draw is addressed by (key, row id), so the masks of a completion do not depend
on the batch around it. `Masks.weight` turns the sum of log-probs over the masked
positions of a copy into an estimate of the ELBO (see `logprob.seq_elbo`). It
broadcasts to (R, K, L); the draws below give one weight a copy, (R, K, 1).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import betainc

from dmpo_jax import rng
from dmpo_jax.rng import AnyKey
from dmpo_jax.types import (
  Array,
  BoolRKL,
  BoolRKP,
  BoolRL,
  BoolRP,
  Canvas,
  IntR,
  IntRL,
  Masks,
)

# Settings of draws that attention blocks do not read, as if none were set.
WHOLE_TEXT = {'low': 0.0, 'high': 1.0, 'antithetic': False}


def completion_mask(stop_RxL: BoolRL) -> BoolRL:
  """Returns True up to and including the first stop of each completion."""
  return jnp.cumsum(stop_RxL, axis=1) - stop_RxL == 0


def per_copy(masked_RxKxL: BoolRKL, weight_RxK: Array) -> Masks:
  """Returns Masks with one weight for each copy."""
  return Masks(masked_RxKxL, weight_RxK[..., None])


def masked_count(masked_RxKxL: BoolRKL) -> Array:
  """Returns the number of masked positions of each copy, (R, K), at least 1."""
  return jnp.maximum(jnp.sum(masked_RxKxL, axis=-1), 1)


def draw_blocks(
  key: AnyKey,
  row_R: IntR,
  canvas: Canvas,
  draws: int,
  spread: bool = False,
  level: Any = None,
) -> Masks:
  """Draws 1..n of the n free tokens of each attention block, in each copy on its own.

  Every count is equally likely, and the weight of a token is n / count: the mean over
  copies of the weighted sum is unbiased for the ELBO, a sum over blocks. spread: a
  copy's counts are stratified over its blocks, and a block's over the copies; each
  alone keeps its law. level: the share that is masked, in [0, 1), instead of a draw.
  """
  blocks = canvas.length // canvas.block

  def of_row(key, free_L):
    key_count, key_order = jax.random.split(key)
    free = free_L.reshape(blocks, canvas.block)
    total = jnp.sum(free, axis=1)
    if level is not None:
      at = jnp.full((draws, blocks), level)
    elif spread:
      at = lattice(key_count, draws, blocks)
    else:
      at = jax.random.uniform(key_count, (draws, blocks))
    count = jnp.minimum(jnp.floor(at * total[None]).astype(jnp.int32) + 1, total[None])
    noise = jax.random.uniform(key_order, (draws, *free.shape))
    rank = jnp.argsort(jnp.argsort(jnp.where(free[None], noise, 2.0), -1), -1)
    weight = total[None] / jnp.maximum(count, 1)
    masked = (rank < count[..., None]) & free[None]
    weight = jnp.broadcast_to(weight[..., None], masked.shape)
    return [x.reshape(draws, -1) for x in (masked, weight)]

  masked, weight = jax.vmap(of_row)(rng.row_keys(key, row_R), free_of(canvas, row_R))
  return Masks(masked, weight)


def lattice(key: AnyKey, draws: int, blocks: int) -> Array:
  """Returns (draws, blocks) uniforms, stratified over both axes: K and B strata."""
  key_block, key_place, key_copy = jax.random.split(key, 3)
  place = jax.random.permutation(key_block, blocks) + jax.random.uniform(
    key_place, (blocks,)
  )
  copy = jax.vmap(lambda key: jax.random.permutation(key, draws))(
    jax.random.split(key_copy, blocks)
  )
  return (place[None] / blocks + copy.T / draws) % 1.0


def draw_order(key: AnyKey, row_R: IntR, canvas: Canvas) -> Masks:
  """Draws one random order of each attention block: W copies, each token read once.

  Copy k masks all but the first k free tokens, and reads the next. The mean over copies
  of the weighted sum is unbiased for the ELBO; it varies only as the orders differ.
  """
  return in_rounds(random_rounds(key, row_R, canvas), canvas.block)


def random_rounds(key: AnyKey, row_R: IntR, canvas: Canvas) -> IntRL:
  """Draws each free token's place in a random order of its block; -1 = not free."""
  noise = lambda key: jax.random.uniform(key, (canvas.length,))
  free = free_of(canvas, row_R)
  noise = jnp.where(free, rng.per_row(key, row_R, noise), 2.0)
  noise = noise.reshape(len(free), -1, canvas.block or canvas.length)
  rank = jnp.argsort(jnp.argsort(noise, -1), -1).reshape(free.shape)
  return jnp.where(free, rank, -1)


def in_rounds(round_RxL: IntRL, rounds: int) -> Masks:
  """Returns copies of the states before each round, which read its tokens.

  round_RxL: the round that unmasks each token; -1: it is never masked.
  """
  at = jnp.arange(rounds)[None, :, None]
  masked, now = round_RxL[:, None] >= at, round_RxL[:, None] == at
  return Masks(masked, jnp.where(now, jnp.float32(rounds), 0.0))


def free_of(canvas: Canvas, row_R: IntR) -> Array:
  """Returns the positions that may be masked, (R, L) bool."""
  every = jnp.ones((len(row_R), canvas.length), bool)
  return every if canvas.free is None else canvas.free


def draw_bernoulli(
  key: AnyKey,
  row_R: IntR,
  canvas: Canvas,
  draws: int,
  rates: tuple = (0.1, 1.0),
  antithetic: bool = True,
) -> Masks:
  """Masks each position with probability lambda ~ U(rates), drawn for each copy.

  With `antithetic` the second half of the copies is the complement of the first.
  The weight is L / max(m, 1) with m masked positions. DMPO's WDCE; the release's
  range is [0.1, 1.0), although its comment says [0.1, 0.9] (dmpo_trainer.py:135-150).
  The blocks of a block-causal model are drawn by `draw_blocks`. ValueError if
  `antithetic` and `draws` is odd.
  """
  if canvas.block:
    return draw_blocks(key, row_R, canvas, draws)
  length, fresh = canvas.length, fresh_copies(draws, antithetic)

  def of_row(key):
    key_rate, key_mask = jax.random.split(key)
    rate = jax.random.uniform(key_rate, (fresh, 1), minval=rates[0], maxval=rates[1])
    masked = jax.random.uniform(key_mask, (fresh, length)) < rate
    return jnp.concatenate([masked, ~masked]) if antithetic else masked

  masked = rng.per_row(key, row_R, of_row)
  return per_copy(masked, length / masked_count(masked))


def fresh_copies(draws: int, antithetic: bool) -> int:
  """Returns how many copies are drawn; the others are their complements."""
  if antithetic and draws % 2:
    raise ValueError(f'antithetic masks need an even number of draws, not {draws}')
  return draws // 2 if antithetic else draws


def anywhere(key: AnyKey, count_K: Array, length: int) -> Array:
  """Returns (K, L) bool with count_K masked positions each, uniformly placed."""
  noise = jax.random.uniform(key, (len(count_K), length))
  rank = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1)
  return rank < count_K[:, None]


def count_law(length: int, low: float, high: float) -> np.ndarray:
  """Returns the chance that `draw_bernoulli` masks 0..L positions, (L + 1,) float64.

  It is the binomial law integrated over its rate: 1 / (L + 1) each for (0, 1).
  """
  count = np.arange(length + 1)
  below = lambda rate: betainc(count + 1, length - count + 1, rate)
  return (below(high) - below(low)) / ((length + 1) * (high - low))


def draw_even(
  key: AnyKey,
  row_R: IntR,
  canvas: Canvas,
  draws: int,
  rates: tuple = (0.1, 1.0),
  antithetic: bool = True,
) -> Masks:
  """Draws as `draw_bernoulli`, with the masked counts of a row stratified.

  Each copy alone keeps its law, so every mean over copies keeps its expectation. The
  counts of the J fresh copies come from J equal parts of `count_law`, one each, in
  random order.
  """
  if canvas.block:
    return draw_blocks(key, row_R, canvas, draws, spread=True)
  length, fresh = canvas.length, fresh_copies(draws, antithetic)
  below = jnp.asarray(np.cumsum(count_law(length, *rates))[:-1], jnp.float32)

  def of_row(key):
    key_part, key_count, key_order = jax.random.split(key, 3)
    part = jax.random.permutation(key_part, fresh)
    at = (part + jax.random.uniform(key_count, (fresh,))) / fresh
    count = jnp.searchsorted(below, at, side='right')
    masked = anywhere(key_order, count, length)
    return jnp.concatenate([masked, ~masked]) if antithetic else masked

  masked = rng.per_row(key, row_R, of_row)
  return per_copy(masked, length / masked_count(masked))


def draw_stratified(key: AnyKey, row_R: IntR, canvas: Canvas, draws: int) -> Masks:
  """Draws exact masked counts, stratified over {0..L}, each with its complement.

  Counts are x_j = (k + j (L + 1) / J) mod (L + 1) with k ~ U{0..L} and J = draws / 2.
  The weight (L + 1) / x makes the estimate unbiased, empty copies included (ESPO,
  espo_trainer.py:55-75, stratifies over the rows of a device instead).
  """
  if canvas.block:
    return draw_blocks(key, row_R, canvas, draws, spread=True)
  length, pairs = canvas.length, fresh_copies(draws, True)

  def of_row(key):
    key_count, key_order = jax.random.split(key)
    offset = jnp.arange(pairs) * (length + 1) // pairs
    first = jax.random.randint(key_count, (), 0, length + 1)
    masked = anywhere(key_order, (first + offset) % (length + 1), length)
    return jnp.concatenate([masked, ~masked])

  masked = rng.per_row(key, row_R, of_row)
  count = jnp.sum(masked, axis=-1)
  weight = jnp.where(count > 0, (length + 1) / jnp.maximum(count, 1), 0.0)
  return per_copy(masked, weight)


def restrict(masks: Masks, completion_RxL: BoolRL) -> Masks:
  """Unmasks the tail after the first EOS in every copy; it stays visible.

  The weight becomes L_row / max(m, 1) with L_row the tokens that count. The release's
  `loss_mask_non_eos` was meant to do this; it inverts an int mask and so indexes rows
  (dmpo_trainer.py:144-146).
  """
  masked = masks.masked & completion_RxL[:, None, :]
  length = jnp.sum(completion_RxL, axis=-1)
  return per_copy(masked, length[:, None] / masked_count(masked))


def draw_prompt(
  key: AnyKey, row_R: IntR, valid_RxP: BoolRP, draws: int, rate: float
) -> BoolRKP:
  """Masks each real prompt token with chance `rate`.

  A token's random number depends on its distance from the completion, not on the
  padding before the prompt.
  """
  length = valid_RxP.shape[1]

  def of_row(key):
    keys = jax.vmap(lambda at: jax.random.fold_in(key, at))(jnp.arange(length)[::-1])
    noise = jax.vmap(lambda key: jax.random.uniform(key, (draws,)))(keys)
    return noise.T < rate

  return rng.per_row(key, row_R, of_row) & valid_RxP[:, None]


@dataclasses.dataclass(frozen=True)
class Rates:
  """The law of the mask rate of a supervised text: see config.Sft."""

  law: str = 'uniform'
  low: float = 1e-3
  high: float = 1.0


def draw_sft(key: AnyKey, row_R: IntR, canvas: Canvas, rates: Rates = Rates()) -> Masks:
  """Draws one masked copy of a supervised text; the masked sum is an ELBO.

  `uniform` masks each free token with chance p ~ U(low, high) and weight 1 / p. With
  the defaults it is LLaDA's p = (1 - 0.001) t + 0.001 (LLaDA GUIDELINES.md). `cosine`:
  p = sin(pi t / 2) with t ~ U(low, high) and weight p' / p (MaskGIT; dllm's
  CosineAlphaScheduler). `count` draws the number of masked tokens, 1 to all, as the
  attention blocks of a block-causal model do under any law.
  """
  if canvas.block or rates.law == 'count':
    return draw_blocks(
      key, row_R, canvas._replace(block=canvas.block or canvas.length), 1
    )

  def of_row(key):
    key_rate, key_mask = jax.random.split(key)
    rate = jax.random.uniform(key_rate, (1, 1))
    rate = (rates.high - rates.low) * rate + rates.low
    weight = 1 / rate[:, 0]
    if rates.law == 'cosine':
      angle = jnp.pi / 2 * rate
      rate, weight = jnp.sin(angle), jnp.pi / 2 / jnp.tan(angle[:, 0])
    return jax.random.uniform(key_mask, (1, canvas.length)) < rate, weight

  masked, weight = rng.per_row(key, row_R, of_row)
  free = free_of(canvas, row_R)
  return per_copy(masked & free[:, None], weight)
