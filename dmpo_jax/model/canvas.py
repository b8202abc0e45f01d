"""Where the completion of a block-causal model stands: at the start of a block."""

from typing import NamedTuple

import jax.numpy as jnp

from dmpo_jax import types as t
from dmpo_jax.model.presets import ModelConfig


class Aligned(NamedTuple):
  """Texts whose last L columns, the canvas, begin an attention block."""

  tokens: t.IntRS  # prompts, then given tokens, then the answer or masks
  valid: t.BoolRS  # False on padding
  given: t.BoolRL  # tokens of the prompt on the canvas: they share a block with others


def align(
  cfg: ModelConfig, tokens_RxS: t.Array, valid_RxS: t.Array, answer: int, length: int
) -> Aligned:
  """Moves left-padded texts so that an attention block begins L columns before the end.

  Blocks are counted from the text's first token, so the end of a prompt may share a
  block with the completion. It becomes the head of the canvas. answer: how many of the
  last columns are a completion; after them stands padding. 0: the canvas holds masks.
  """
  size, block = tokens_RxS.shape[1] - answer, cfg.block_causal
  count_R = jnp.sum(valid_RxS[:, :size], axis=1, keepdims=True)
  if cfg.block_grid == 'text':
    prompt, rest_R = max(1, size // block) * block, count_R % block
  else:  # the prompt's end begins a block
    prompt, rest_R = -(-max(1, size) // block) * block, jnp.zeros_like(count_R)
  # Which token of its text a column holds: 0 is the first one.
  place = jnp.arange(prompt + length)[None] - prompt + count_R - rest_R
  real = (place >= 0) & (place < count_R + answer)
  column = jnp.clip(place + size - count_R, 0, size + answer - 1)
  text = jnp.take_along_axis(tokens_RxS, column, axis=1)
  canvas = jnp.arange(prompt + length)[None] >= prompt
  blank = jnp.where(canvas, cfg.eos_id if answer else cfg.mask_id, cfg.pad_id)
  valid = real if answer else real | canvas
  given = canvas & (place < count_R)
  tokens = jnp.where(real, text, blank).astype(jnp.int32)
  return Aligned(tokens, valid, given[:, prompt:])
