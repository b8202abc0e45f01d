"""Positions, masks and kernels of attention.

Every kernel in ATTENTION is a function of queries (R, H, T, C) that are already
scaled, keys and values (R, J, S, C), and a mask. H / J query heads share one head
of keys and values. The mask is bool, (R, 1, 1 or T, S), True where a query may
see a key; None means everywhere; `Packed` is a rule.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dmpo_jax import mesh
from dmpo_jax import types as t
from dmpo_jax.model.packed import Packed, see
from dmpo_jax.model.presets import ModelConfig

Mask = t.BoolR1TS | Packed | None
# Sums of values under exp(score - top), of the exps, and the top: (R, H, T, C or 1).
Part = tuple[t.Array, t.Array, t.Array]
Rope = tuple[t.FloatR1TX, t.FloatR1TX]  # cos and sin of up to C/2 angles


def positions_of(valid_RxS: t.BoolRS) -> t.IntRS:
  """Counts positions from a row's first real token: padding moves none."""
  return jnp.maximum(jnp.cumsum(valid_RxS, axis=1) - 1, 0)


def blocks_of(
  cfg: ModelConfig, valid_RxS: t.BoolRS | None, positions_RxT: t.IntRT
) -> t.IntRT:
  """Returns the attention block of each token of a block-causal model.

  Blocks are counted from the first token of the text, as the releases sample. With
  cfg.block_grid = prompt they are counted back from the text's end, so that a
  completion of whole blocks begins a block; the first block may be short (the sampler
  of dllm's bd3lm). Without valid_RxS both count from the start.
  """
  short: t.Array = 0
  if cfg.block_grid == 'prompt' and valid_RxS is not None:
    short = -jnp.sum(valid_RxS, axis=1, keepdims=True) % cfg.block_causal
  return (positions_RxT + short) // cfg.block_causal


def attention_mask(
  cfg: ModelConfig,
  valid_RxS: t.BoolRS | None,
  positions_RxS: t.IntRS,
  queries_RxT: t.IntRT,
) -> t.BoolR1TS | None:
  """Returns which keys each query sees: no padding, and no later block."""
  mask = None if valid_RxS is None else valid_RxS[:, None, None, :]
  if cfg.block_causal:
    keys, queries = (blocks_of(cfg, valid_RxS, x) for x in (positions_RxS, queries_RxT))
    past = keys[:, None, None, :] <= queries[:, None, :, None]
    mask = past if mask is None else mask & past
  return mask


def annealed_mask(
  future: t.Future, positions_RxS: t.IntRS, mask: t.BoolR1TS | None
) -> t.Array:
  """Hides later tokens from each token of a text, but a share of them.

  Whether one token sees another is a draw of its own, by row and places in the text:
  padding has no part. What is seen at one share is seen at every larger one.
  """

  def of_token(key: t.Array, places_S: t.Array, place: t.Array) -> t.Array:
    noise = jax.random.uniform(jax.random.fold_in(key, place), places_S.shape)
    return (places_S <= place) | (noise[places_S] < future.share)

  of_row = jax.vmap(of_token, (None, None, 0))
  seen = jax.vmap(of_row)(future.keys, positions_RxS, positions_RxS)[:, None]
  return seen if mask is None else seen & mask


def rope_table(cfg: ModelConfig, positions_RxT: t.IntRT) -> Rope:
  """Returns the cosines and sines of the rotary angles, in float32.

  There are as many as pairs of dimensions that rotate: cfg.rotary of a head.
  """
  dim = int(cfg.rotary * (cfg.head_dim or cfg.width // cfg.heads))
  inverse = cfg.rope_theta ** -(jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
  if cfg.rope_llama3:  # long waves are stretched by the factor, short ones stay
    factor, low, high, trained = cfg.rope_llama3
    turns = trained * inverse / (2 * jnp.pi)
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    inverse *= kept + (1 - kept) / factor
  positions = positions_RxT[:, None, :, None].astype(jnp.float32)
  angle = positions * inverse[None, None, None]
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: t.FloatRHTC, rope: Rope, gain: float = 1.0) -> t.FloatRHTC:
  """Applies RoPE (NeoX's rotate-half) and a factor, in float32.

  Dimensions of a head for which the table has no angle stay as they are.
  """
  cos, sin = rope
  half = cos.shape[-1]
  a, b, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
  y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
  return (y * gain).astype(x.dtype)


def attend(
  q_RxHxTxC: t.FloatRHTC, k_RxJxSxC: t.FloatRJSC, v_RxJxSxC: t.FloatRJSC, mask: Mask
) -> t.FloatRHTC:
  """Computes softmax attention in plain XLA; the weights are float32.

  XLA's CPU compiler puts the softmax and the second product into one kernel,
  because of three things. Heads come before positions, so that both products are
  batched matrices as they lie in memory. The mask is added. The sum divides the
  result, which is smaller than the weights.
  """
  if isinstance(mask, Packed):
    return attend_packed(q_RxHxTxC, k_RxJxSxC, v_RxJxSxC, mask)
  part = attend_part(q_RxHxTxC, k_RxJxSxC, v_RxJxSxC, mask)
  return merged([part], v_RxJxSxC.dtype)


def attend_part(
  q_RxHxTxC: t.Array, k_RxJxSxC: t.Array, v_RxJxSxC: t.Array, mask: t.BoolR1TS | None
) -> Part:
  """Computes what some of the keys contribute to an attention: see `merged`.

  The mask has 1 row of queries, T, or a divisor of T, after which it repeats.
  """
  product = partial(jnp.einsum, preferred_element_type=jnp.float32)
  shape = q_RxHxTxC.shape
  q = q_RxHxTxC.reshape(shape[0], k_RxJxSxC.shape[1], -1, shape[-1])
  w = product('rjqc,rjsc->rjqs', q, k_RxJxSxC)
  if mask is not None:
    if mask.shape[2] > 1:
      mask = jnp.tile(mask, (1, 1, q.shape[2] // mask.shape[2], 1))
    w += jnp.where(mask, 0.0, -1e30)
  top = jax.lax.stop_gradient(jnp.max(w, axis=-1, keepdims=True))
  w = jnp.exp(w - top)
  y = product('rjqs,rjsc->rjqc', w.astype(v_RxJxSxC.dtype), v_RxJxSxC)
  total = jnp.sum(w, axis=-1, keepdims=True)
  y, total, top = (x.reshape(*shape[:-1], -1) for x in (y, total, top))
  return y, total, top


def merged(parts: list[Part], dtype: t.Any) -> t.FloatRHTC:
  """Returns the attention over the keys of all parts.

  So that a cache and new tokens are never copied into one array.
  """
  if len(parts) == 1:
    y, total, _ = parts[0]
    return (y / total).astype(dtype)
  top = reduce(jnp.maximum, [top for _, _, top in parts])
  scales = [jnp.exp(own - top) for _, _, own in parts]
  y, total = (
    reduce(jnp.add, [part[i] * x for part, x in zip(parts, scales, strict=True)])
    for i in (0, 1)
  )
  return (y / total).astype(dtype)


def attend_packed(
  q_RxHxTxC: t.Array, k_RxJxSxC: t.Array, v_RxJxSxC: t.Array, packed: Packed
) -> t.Array:
  """Computes `attend` under a `Packed` mask without the pairs that see nothing.

  The text's queries meet the text, (S, S) pairs; those of the copies meet the text and
  their own block, (K L, S + W) pairs.
  """
  size = packed.real.shape[1]
  parts = ((x[:, :, :size], x[:, :, size:]) for x in (q_RxHxTxC, k_RxJxSxC, v_RxJxSxC))
  (q, noisy_q), (k, noisy_k), (v, noisy_v) = parts
  y = merged([attend_part(q, k, v, packed.text_mask())], v.dtype)
  if not packed.copies:
    return y
  past = attend_part(noisy_q, k, v, packed.past_mask())
  fold = lambda x: x.reshape(*x.shape[:2], -1, packed.block, x.shape[-1])
  args = fold(noisy_q), fold(noisy_k), fold(noisy_v), packed.own_mask()
  own = jax.vmap(attend_part, (2, 2, 2, 3), 2)(*args)
  own = jax.tree.map(lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1]), own)
  return jnp.concatenate([y, merged([past, own], v.dtype)], axis=2)


def attend_cudnn(
  q_RxHxTxC: t.FloatRHTC, k_RxJxSxC: t.FloatRJSC, v_RxJxSxC: t.FloatRJSC, mask: Mask
) -> t.FloatRHTC:
  """Computes `attend` by cuDNN's kernel: GPUs, bfloat16, C a multiple of 8.

  It reads a mask from memory: a `Packed` one takes R T^2 numbers of 2 bytes.
  """
  pairs = mask.dense() if isinstance(mask, Packed) else mask
  if pairs is not None:  # cuDNN takes no mask of one row for all queries
    shape = *pairs.shape[:2], q_RxHxTxC.shape[2], pairs.shape[3]
    pairs = jnp.broadcast_to(pairs, shape)
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_RxHxTxC, k_RxJxSxC, v_RxJxSxC))
  y = jax.nn.dot_product_attention(
    q, k, v, mask=pairs, scale=1.0, implementation='cudnn'
  )
  return jnp.swapaxes(y, 1, 2)


def attend_splash(
  q_RxHxTxC: t.FloatRHTC,
  k_RxJxSxC: t.FloatRJSC,
  v_RxJxSxC: t.FloatRJSC,
  mask: Mask,
  interpret: bool = False,
) -> t.FloatRHTC:
  """Computes `attend` by Pallas' splash kernel, on TPUs; a mask array has T = 1.

  Pads lengths to the kernel's tiles of 128, and skips tiles that a `Packed` mask hides.
  The compiler does not partition a kernel, so under a mesh each device runs its own
  rows and heads. ValueError if a mask array differs between queries.
  """
  columns = None
  if isinstance(mask, Packed):
    columns, real = np.stack(mask.columns()), mask.real_columns()
  elif mask is None:
    real = jnp.ones((q_RxHxTxC.shape[0], k_RxJxSxC.shape[2]), bool)
  elif mask.shape[2] == 1:
    real = mask[:, 0, 0]
  else:
    raise ValueError(
      'model.attention = splash hides a key from all queries or from none. '
      'The sampler wino, and block-causal models without sampler.cache = block, need '
      'model.attention = xla'
    )
  args = q_RxHxTxC, k_RxJxSxC, v_RxJxSxC, real.astype(jnp.int32)
  local = partial(splash_local, columns=columns, interpret=interpret)
  if not (grid := mesh.in_force()):
    return local(*args)
  split = mesh.row_axes(grid)
  rows = PartitionSpec(split, 'tensor', None, None)
  return jax.shard_map(
    local,
    mesh=grid,
    in_specs=(rows, rows, rows, PartitionSpec(split, None)),
    out_specs=rows,
    check_vma=False,
  )(*args)


def splash_local(
  q: t.FloatRHTC,
  k: t.FloatRJSC,
  v: t.FloatRJSC,
  real_RxS: t.IntRS,
  columns: np.ndarray | None,
  interpret: bool,
) -> t.FloatRHTC:
  """Runs the splash kernel on the rows and heads of one device."""
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  class Rule(masks.Mask):
    """A `Packed` mask, worked out tile by tile; one for all heads."""

    def __init__(self, columns: np.ndarray):
      self.columns = columns

    @property
    def shape(self) -> tuple[int, int]:
      return (self.columns.shape[1],) * 2

    def __getitem__(self, tile: tuple[slice, slice]) -> np.ndarray:
      return np.asarray(see(*(self.columns[:, part] for part in tile)))

  def pad(x: t.Array, axis: int) -> t.Array:
    return jnp.pad(
      x, [(0, -n % 128 if i == axis else 0) for i, n in enumerate(x.shape)]
    )

  length = q.shape[2]
  k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
  q, k, v, real = pad(q, 2), pad(k, 2), pad(v, 2), pad(real_RxS, 1)
  seen = masks.FullMask((q.shape[2], k.shape[2]))
  if columns is not None:  # the tiles' padding stands behind the text: it sees it
    far = np.array([[0], [length]])
    seen = Rule(np.concatenate([columns, np.tile(far, -length % 128)], 1))
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([seen] * q.shape[1]),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  ids = splash.SegmentIds(jnp.ones((len(q), q.shape[2]), jnp.int32), real)
  out: t.Array = jax.vmap(kernel)(q, k, v, ids)
  return out[:, :, :length]


ATTENTION = {'xla': attend, 'cudnn': attend_cudnn, 'splash': attend_splash}
