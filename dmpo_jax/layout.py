"""How a family of models reads a text: the seam between objectives and networks.

A layout runs the network on K masked copies of completions and returns the hidden
states that predict their tokens. Nothing above `logprob` knows the family. A new
family is a function here and a line in LAYOUTS.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmpo_jax import model, routing
from dmpo_jax.model import ModelConfig
from dmpo_jax.types import (
  Array,
  BoolRKL,
  BoolRKP,
  BoolRS,
  IntRS,
  KeyR,
  Masks,
  Params,
  Routes,
)


class Predictions(NamedTuple):
  """The tokens to predict, and the states that predict them.

  The axes N and T are R * K and L, or R and K * L: both are (R, K, L) when reshaped.
  """

  hidden: Array  # (N, T, D)
  targets: Array  # (N, T) int32, the true tokens
  routed: model.Routed | None = None  # where tokens were sent, with cfg.keep_routes


def apply_masks(
  tokens_RxS: IntRS,
  masked_RxKxL: BoolRKL,
  mask_id: int,
  prompt_RxKxP: BoolRKP | None = None,
) -> Array:
  """Returns K masked copies of each row, (R, K, S) int32.

  prompt_RxKxP: prompt tokens that are masked, too.
  """
  length = masked_RxKxL.shape[-1]
  prompt = tokens_RxS[:, None, :-length]
  completion = jnp.where(masked_RxKxL, mask_id, tokens_RxS[:, None, -length:])
  shape = masked_RxKxL.shape[:2] + prompt.shape[2:]
  if prompt_RxKxP is not None:
    prompt = jnp.where(prompt_RxKxP, mask_id, prompt)
  return jnp.concatenate([jnp.broadcast_to(prompt, shape), completion], -1)


def bidirectional(
  cfg: ModelConfig,
  params: Params,
  tokens_RxS: IntRS,
  masks: Masks,
  valid_RxS: BoolRS | None,
  keys_R: KeyR | None,
) -> Predictions:
  """Reads each masked copy in a row of its own: [prompt | noisy completion]."""
  rows, draws, length = masks.masked.shape
  masked = masks.masked
  if masks.sampled is not None:  # what the sampler left masked it never saw
    masked = masked | ~masks.sampled[:, None]
  noisy = apply_masks(tokens_RxS, masked, cfg.mask_id, masks.prompt)
  valid = None if valid_RxS is None else jnp.repeat(valid_RxS, draws, axis=0)
  keys = keys_R
  if keys is not None:  # each copy has a key of its own
    keys = jax.vmap(lambda key: jax.random.split(key, draws))(keys).ravel()
  targets = jnp.repeat(tokens_RxS[:, -length:], draws, axis=0)
  noisy = noisy.reshape(rows * draws, -1)
  if masks.future is None:
    routes = routes_of(cfg, masks.routes, masked)
    h, kept = model.hidden(cfg, params, noisy, valid, dropout_R=keys, routes=routes)
  else:  # the copies of a row see the same
    seen_by = jnp.repeat(masks.future.keys, draws)
    future = masks.future._replace(keys=seen_by)
    h, kept = model.annealed(cfg, params, noisy, valid, keys, future)
  return Predictions(h[:, -length:], targets, kept and kept.routed)


def routes_of(
  cfg: ModelConfig, routes: Routes | None, masked_RxKxL: BoolRKL
) -> Array | None:
  """Returns the experts that copies replay; masked: what they see as masked."""
  if routes is None:
    return None
  return routing.replayed(routes, masked_RxKxL, cfg.block_causal)


def block_causal(
  cfg: ModelConfig,
  params: Params,
  tokens_RxS: IntRS,
  masks: Masks,
  valid_RxS: BoolRS | None,
  keys_R: KeyR | None,
) -> Predictions:
  """Reads all copies in one row: [prompt + completion | noisy copy 1 | ... | copy K].

  It is exact for every block at once, with masks of its own: a noisy block sees the
  true text before it, and the gradient flows through that text. The completion must
  begin an attention block (`model.align`), and L be a multiple of it. A family that
  shifts reads the first token of a block off the true token before it (Fast-dLLM v2).
  ValueError if prompt tokens are masked: the copies share the prompt.
  """
  _, draws, length = masks.masked.shape
  size, block = tokens_RxS.shape[1], cfg.block_causal
  if masks.prompt is not None:
    raise ValueError('a block-causal model cannot mask prompt tokens in its copies')
  if length % block:
    raise ValueError(
      f'a completion of {length} tokens is no multiple of the attention block, {block}'
    )
  # The column of the text that each column of the row repeats.
  index = np.concatenate(
    [np.arange(size), np.tile(np.arange(size - length, size), draws)]
  )
  valid = jnp.ones(tokens_RxS.shape, bool) if valid_RxS is None else valid_RxS
  positions = model.positions_of(valid)
  mask = model.Packed(valid, length, draws, block)
  masked = masks.masked
  if masks.sampled is not None:  # given tokens stay; a later block that was not
    masked = masked & masks.sampled[:, None]  # sampled is seen by none that was
  noisy = apply_masks(tokens_RxS, masked, cfg.mask_id)[..., -length:]
  inputs = model.Inputs(
    jnp.concatenate([tokens_RxS, noisy.reshape(len(noisy), -1)], axis=1),
    positions[:, index],
    mask,
    dropout=keys_R,
    routes=routes_of(cfg, masks.routes, masked),
    counted=valid[:, index],
  )
  h, kept = model.states(cfg, params, inputs)
  where = np.arange(size, len(index))
  if cfg.shift:
    first = index[size:] % block == (size - length) % block
    where = np.maximum(np.where(first, index[size:], where) - 1, 0)
  targets = jnp.tile(tokens_RxS[:, -length:], (1, draws))
  return Predictions(h[:, where], targets, kept and kept.routed)


LAYOUTS: dict[str, Callable[..., Predictions]] = {
  'bidirectional': bidirectional,
  'block_causal': block_causal,
}


def layout_of(cfg: ModelConfig) -> Callable[..., Predictions]:
  """Returns the layout of a model's family."""
  return LAYOUTS['block_causal' if cfg.block_causal else 'bidirectional']
