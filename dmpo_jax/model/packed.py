"""Which columns see which where a block-causal model reads a text and noisy copies."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dmpo_jax import types as t


@partial(
  jax.tree_util.register_dataclass,
  data_fields=('real',),
  meta_fields=('length', 'copies', 'block'),
)
@dataclasses.dataclass(frozen=True)
class Packed:
  """The mask of rows [text | noisy copy 1 | ... | noisy copy K], as a rule.

  The text sees itself up to its own attention block. A noisy token sees the text before
  its block, and its block in its own copy. So its state is that of a forward of
  [text before the block | noisy block]. A copy repeats the text's last `length`
  tokens, which begin a block. No array of all pairs of columns is kept.
  """

  real: t.BoolRS  # the text's tokens that are no padding
  length: int  # L
  copies: int  # K
  block: int  # W

  def columns(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns (copy, block) of each column, (T,) each; copy 0 is the text."""
    at = np.arange(self.real.shape[1]) - self.real.shape[1] + self.length
    copy = np.repeat(np.arange(1, self.copies + 1), self.length)
    again = np.tile(np.arange(self.length), self.copies)
    blocks = np.concatenate([at, again]) // self.block
    return np.concatenate([np.zeros_like(at), copy]), blocks

  def text_mask(self) -> t.BoolR1TS:
    """Returns which of the text each of its tokens sees."""
    _, block = self.columns()
    block = block[: self.real.shape[1]]
    return (block[None] <= block[:, None])[None, None] & self.real[:, None, None]

  def past_mask(self) -> t.BoolR1TS:
    """Returns which of the text each token of a noisy copy sees, (R, 1, L, S)."""
    _, block = self.columns()
    block = block[: self.real.shape[1]]
    own = np.arange(self.length) // self.block
    return (block[None] < own[:, None])[None, None] & self.real[:, None, None]

  def own_mask(self) -> t.Array:
    """Returns which keys of its own noisy block a token sees, (R, 1, 1, N, W)."""
    noisy = self.real_columns()[:, self.real.shape[1] :]
    return noisy.reshape(len(noisy), 1, 1, -1, self.block)

  def dense(self) -> t.BoolR1TS:
    """Returns the mask as one array, for kernels that need it."""
    columns = jnp.asarray(np.stack(self.columns()))
    return see(columns, columns)[None, None] & self.real_columns()[:, None, None]

  def real_columns(self) -> t.BoolRT:
    """Returns which columns are no padding."""
    noisy = self.real[:, self.real.shape[1] - self.length :]
    return jnp.concatenate([self.real, jnp.tile(noisy, (1, self.copies))], 1)


def see(queries: t.Array, keys: t.Array) -> t.Array:
  """Returns whether queries see keys, (T, S).

  queries, keys: their copy and block, (2, T) and (2, S).
  """
  (copy, block), (of_key, key_block) = queries[:, :, None], keys[:, None]
  noisy = copy > 0
  past = (of_key == 0) & (key_block <= block - noisy)
  return past | noisy & (of_key == copy) & (key_block == block)
