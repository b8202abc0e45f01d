"""How a family of models reads a text: the seam between objectives and networks.

A layout turns completions and their K masked copies into the network's inputs and
says where the predictions stand. Nothing above `logprob` knows the family. A new
family is a function here and a line in LAYOUTS.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmpo_jax.model import ModelConfig
from dmpo_jax.types import Array, BoolRKL, BoolRKP, BoolRS, IntRS, KeyR


class Inputs(NamedTuple):
  """Network inputs; the leading axis N is rows times masked copies."""

  tokens: Array  # (N, S) int32
  valid: Array | None  # (N, S) bool; None: all tokens are real
  targets: Array  # (N, L) int32, the true tokens
  keys: Array | None  # (N,) keys of the adapters' dropout
  # The predictions of the L targets stand in the last L places of the hidden states.


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
  tokens_RxS: IntRS,
  masked_RxKxL: BoolRKL,
  valid_RxS: BoolRS | None,
  prompt_RxKxP: BoolRKP | None,
  keys_R: KeyR | None,
) -> Inputs:
  """Lays out each masked copy as a row of its own: [prompt | noisy completion]."""
  rows, draws, length = masked_RxKxL.shape
  noisy = apply_masks(tokens_RxS, masked_RxKxL, cfg.mask_id, prompt_RxKxP)
  valid = None if valid_RxS is None else jnp.repeat(valid_RxS, draws, axis=0)
  keys = keys_R
  if keys is not None:  # each copy has a key of its own
    keys = jax.vmap(lambda key: jax.random.split(key, draws))(keys).ravel()
  targets = jnp.repeat(tokens_RxS[:, -length:], draws, axis=0)
  return Inputs(noisy.reshape(rows * draws, -1), valid, targets, keys)


LAYOUTS: dict[str, Callable[..., Inputs]] = {'bidirectional': bidirectional}


def layout_of(cfg: ModelConfig) -> Callable[..., Inputs]:
  """Returns the layout of a model's family; ValueError if there is none."""
  family = 'block_causal' if cfg.block_causal else 'bidirectional'
  if family not in LAYOUTS:
    raise ValueError(
      f'a {family} model (attention in blocks of {cfg.block_causal}) has no layout for '
      f'log-probs of masked copies; there is one for {", ".join(LAYOUTS)}'
    )
  return LAYOUTS[family]
