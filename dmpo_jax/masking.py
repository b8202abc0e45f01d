"""The forward process: which completion positions the mask token covers.

Every draw is addressed by (key, row id), so a completion's masks do not depend
on the batch it is in. `Masks.weight` turns a sum of log-probs over the masked
positions of a draw into an estimate of the ELBO (see `logprob.seq_elbo`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import betainc

from dmpo_jax import rng
from dmpo_jax.types import Masks


def completion_mask(completion_RxL, eos_id):
  """(R, L) bool, True up to and including the first EOS."""
  eos = completion_RxL == eos_id
  return jnp.cumsum(eos, axis=1) - eos == 0


def apply_masks(tokens_RxS, masked_RxKxL, mask_id, prompt_RxKxP=None):
  """(R, K, S) int32: the rows with their completions masked, K times.

  prompt_RxKxP: what is masked of the prompts, if anything is.
  """
  length = masked_RxKxL.shape[-1]
  prompt = tokens_RxS[:, None, :-length]
  completion = jnp.where(masked_RxKxL, mask_id, tokens_RxS[:, None, -length:])
  shape = masked_RxKxL.shape[:2] + prompt.shape[2:]
  if prompt_RxKxP is not None:
    prompt = jnp.where(prompt_RxKxP, mask_id, prompt)
  return jnp.concatenate([jnp.broadcast_to(prompt, shape), completion], -1)


def draw_bernoulli(key, row_R, length, draws, low=0.1, high=1.0, antithetic=True):
  """Masks each position with probability lambda ~ U(low, high), per draw.

  With `antithetic` the second half of the draws is the complement of the
  first (draws must be even). Weight L/max(m, 1) with m the masked count.
  DMPO eq. of WDCE; official dmpo_trainer.py:135-150, whose clamp is
  [0.1, 1.0) although its comment says [0.1, 0.9].
  """
  if antithetic and draws % 2:
    raise ValueError(f'antithetic masks need an even number of draws: {draws}')
  fresh = draws // 2 if antithetic else draws

  def one(key):
    key_rate, key_mask = jax.random.split(key)
    rate = jax.random.uniform(key_rate, (fresh, 1), minval=low, maxval=high)
    masked = jax.random.uniform(key_mask, (fresh, length)) < rate
    return jnp.concatenate([masked, ~masked]) if antithetic else masked

  masked = rng.per_row(key, row_R, one)
  count = jnp.sum(masked, axis=-1)
  return Masks(masked, length / jnp.maximum(count, 1))


def anywhere(key, count_K, length):
  """(K, L) bool: so many masks each, all places alike."""
  noise = jax.random.uniform(key, (len(count_K), length))
  rank = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1)
  return rank < count_K[:, None]


def count_law(length, low, high):
  """(L + 1,) float64: how often draw_bernoulli masks 0..L places.

  The binomial law integrated over its rate; 1/(L + 1) each for (0, 1).
  """
  count = np.arange(length + 1)
  below = lambda rate: betainc(count + 1, length - count + 1, rate)
  return (below(high) - below(low)) / ((length + 1) * (high - low))


def draw_even(key, row_R, length, draws, low=0.1, high=1.0, antithetic=True):
  """`draw_bernoulli` with the counts of a row's draws spread evenly.

  Each draw alone has the same law, so every mean over draws keeps its
  expectation; but the counts of the J fresh ones come from one each of J
  equal parts of `count_law`, shuffled.
  """
  if antithetic and draws % 2:
    raise ValueError(f'antithetic masks need an even number of draws: {draws}')
  fresh = draws // 2 if antithetic else draws
  below = jnp.asarray(np.cumsum(count_law(length, low, high))[:-1], jnp.float32)

  def one(key):
    key_part, key_count, key_order = jax.random.split(key, 3)
    part = jax.random.permutation(key_part, fresh)
    at = (part + jax.random.uniform(key_count, (fresh,))) / fresh
    count = jnp.searchsorted(below, at, side='right')
    masked = anywhere(key_order, count, length)
    return jnp.concatenate([masked, ~masked]) if antithetic else masked

  masked = rng.per_row(key, row_R, one)
  count = jnp.sum(masked, axis=-1)
  return Masks(masked, length / jnp.maximum(count, 1))


def draw_stratified(key, row_R, length, draws):
  """Exact masked counts, spread evenly over {0..L}, each with its complement.

  Counts x_j = (k + j (L+1)/J) mod (L+1), k ~ U{0..L}, J = draws/2. Weight
  (L+1)/x makes the estimate unbiased, empty draws included (ESPO
  espo_trainer.py:55-75, there stratified over the rows of a device).
  """
  if draws % 2:
    raise ValueError(f'stratified masks need an even number of draws: {draws}')
  pairs = draws // 2

  def one(key):
    key_count, key_order = jax.random.split(key)
    offset = jnp.arange(pairs) * (length + 1) // pairs
    first = jax.random.randint(key_count, (), 0, length + 1)
    count = (first + offset) % (length + 1)
    masked = anywhere(key_order, count, length)
    return jnp.concatenate([masked, ~masked])

  masked = rng.per_row(key, row_R, one)
  count = jnp.sum(masked, axis=-1)
  weight = jnp.where(count > 0, (length + 1) / jnp.maximum(count, 1), 0.0)
  return Masks(masked, weight)


def restrict(masks, completion_RxL):
  """Takes the tail after the first EOS out of every draw (it stays visible).

  The weight becomes L_row/max(m, 1) with L_row the tokens that count. This is
  what the release's `loss_mask_non_eos` was meant to do (it inverts an int
  mask and so indexes rows, dmpo_trainer.py:144-146).
  """
  masked = masks.masked & completion_RxL[:, None, :]
  count = jnp.sum(masked, axis=-1)
  length = jnp.sum(completion_RxL, axis=-1)
  return Masks(masked, length[:, None] / jnp.maximum(count, 1))


def draw_prompt(key, row_R, valid_RxP, draws, rate):
  """(R, K, P) bool: real prompt tokens, each masked with chance `rate`.

  A token's number depends on its distance from the completion, not on the
  padding before the prompt.
  """
  length = valid_RxP.shape[1]

  def one(key):
    keys = jax.vmap(lambda at: jax.random.fold_in(key, at))(jnp.arange(length)[::-1])
    noise = jax.vmap(lambda key: jax.random.uniform(key, (draws,)))(keys)
    return noise.T < rate

  return rng.per_row(key, row_R, one) & valid_RxP[:, None]


def draw_sft(key, row_R, length, floor=1e-3):
  """LLaDA's SFT corruption: one draw, p = (1 - floor) t + floor, t ~ U(0, 1).

  Weight 1/p, so that the masked sum is an ELBO (LLaDA GUIDELINES.md).
  """

  def one(key):
    key_rate, key_mask = jax.random.split(key)
    rate = (1 - floor) * jax.random.uniform(key_rate, (1, 1)) + floor
    return jax.random.uniform(key_mask, (1, length)) < rate, 1 / rate[:, 0]

  return Masks(*rng.per_row(key, row_R, one))
