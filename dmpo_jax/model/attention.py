"""Positions, masks and kernels of attention.

Every kernel in ATTENTION is a function of queries (R, H, T, C) that are already
scaled, keys and values (R, J, S, C), and a mask. H / J query heads share one head
of keys and values. The mask is bool, (R, 1, 1 or T, S), True where a query may
see a key; None means everywhere.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dmpo_jax import types as t
from dmpo_jax.model.presets import ModelConfig

Rope = tuple[t.FloatR1TX, t.FloatR1TX]  # cos and sin of C/2 angles


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


def packed_mask(
  blocks_RxT: t.IntRT, copies_T: t.Array, real_RxT: t.BoolRT
) -> t.BoolR1TS:
  """Returns which columns see which in a row [text | noisy copy 1 | ... | copy K].

  copies_T: 0 for the text, k for its noisy copy k. The text sees itself up to its own
  block. A noisy token sees the text before its block, and its block in its own copy.
  So its state is that of a forward of [text before the block | noisy block].
  """
  query, key = blocks_RxT[:, :, None], blocks_RxT[:, None, :]
  noisy = copies_T > 0
  last = query - noisy[None, :, None]  # the last block of the text that a token sees
  past = ~noisy[None, None, :] & (key <= last)
  copy = noisy[:, None] & (copies_T[:, None] == copies_T[None])
  see = past | (copy[None] & (key == query))
  return (see & real_RxT[:, None, :])[:, None]


def rope_table(cfg: ModelConfig, positions_RxT: t.IntRT) -> Rope:
  """Returns the cosines and sines of the rotary angles, in float32."""
  dim = cfg.head_dim or cfg.width // cfg.heads
  inverse = cfg.rope_theta ** -(jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
  positions = positions_RxT[:, None, :, None].astype(jnp.float32)
  angle = positions * inverse[None, None, None]
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: t.FloatRHTC, rope: Rope, gain: float = 1.0) -> t.FloatRHTC:
  """Applies RoPE (NeoX's rotate-half) and a factor, in float32."""
  cos, sin = rope
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return (y * gain).astype(x.dtype)


def attend(
  q_RxHxTxC: t.FloatRHTC,
  k_RxJxSxC: t.FloatRJSC,
  v_RxJxSxC: t.FloatRJSC,
  mask: t.BoolR1TS | None,
) -> t.FloatRHTC:
  """Computes softmax attention in plain XLA; the weights are float32.

  XLA's CPU compiler puts the softmax and the second product into one kernel,
  because of three things. Heads come before positions, so that both products are
  batched matrices as they lie in memory. The mask is added. The sum divides the
  result, which is smaller than the weights.
  """
  return attend_parts(q_RxHxTxC, ((k_RxJxSxC, v_RxJxSxC, mask),))


def attend_parts(
  q_RxHxTxC: t.FloatRHTC, parts: tuple[tuple[t.Array, t.Array, t.Array | None], ...]
) -> t.FloatRHTC:
  """Computes `attend` over keys, values and masks in several arrays, of any S each.

  So that a cache and new tokens are never copied into one array.
  """
  rows, count, _, dim = q_RxHxTxC.shape
  k, v, _ = parts[0]
  q = q_RxHxTxC.reshape(rows, k.shape[1], -1, dim)
  product = partial(jnp.einsum, preferred_element_type=jnp.float32)

  def scores(k: t.Array, mask: t.Array | None) -> t.Array:
    w = product('rjqc,rjsc->rjqs', q, k)
    if mask is not None:
      if mask.shape[2] > 1:
        mask = jnp.tile(mask, (1, 1, count // k.shape[1], 1))
      w += jnp.where(mask, 0.0, -1e30)
    return w

  weights = [scores(k, mask) for k, _, mask in parts]
  top = reduce(jnp.maximum, [jnp.max(w, -1, keepdims=True) for w in weights])
  weights = [jnp.exp(w - jax.lax.stop_gradient(top)) for w in weights]
  values = [
    product('rjqs,rjsc->rjqc', w.astype(v.dtype), v)
    for w, (_, v, _) in zip(weights, parts, strict=True)
  ]
  y = reduce(jnp.add, values)
  y /= reduce(jnp.add, [jnp.sum(w, axis=-1, keepdims=True) for w in weights])
  return y.reshape(q_RxHxTxC.shape).astype(v.dtype)


def attend_cudnn(
  q_RxHxTxC: t.FloatRHTC,
  k_RxJxSxC: t.FloatRJSC,
  v_RxJxSxC: t.FloatRJSC,
  mask: t.BoolR1TS | None,
) -> t.FloatRHTC:
  """Computes `attend` by cuDNN's kernel: GPUs, bfloat16, C a multiple of 8."""
  if mask is not None:  # cuDNN takes no mask of one row for all queries
    mask = jnp.broadcast_to(mask, (*mask.shape[:2], q_RxHxTxC.shape[2], mask.shape[3]))
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_RxHxTxC, k_RxJxSxC, v_RxJxSxC))
  y = jax.nn.dot_product_attention(
    q, k, v, mask=mask, scale=1.0, implementation='cudnn'
  )
  return jnp.swapaxes(y, 1, 2)


def attend_splash(
  q_RxHxTxC: t.FloatRHTC,
  k_RxJxSxC: t.FloatRJSC,
  v_RxJxSxC: t.FloatRJSC,
  mask: t.BoolR1TS | None,
  interpret: bool = False,
) -> t.FloatRHTC:
  """Computes `attend` by Pallas' splash kernel, on TPUs; the mask has T = 1.

  Pads lengths to the kernel's tiles of 128. The compiler does not partition a
  kernel, so under a mesh each device runs its own rows and heads. ValueError if
  the mask differs between queries.
  """
  if mask is None:
    mask = jnp.ones((q_RxHxTxC.shape[0], 1, 1, k_RxJxSxC.shape[2]), bool)
  if mask.shape[2] > 1:
    raise ValueError(
      'model.attention = splash hides a key from all queries or from none. '
      'Block-causal models and the sampler wino need model.attention = xla'
    )
  args = q_RxHxTxC, k_RxJxSxC, v_RxJxSxC, mask[:, 0, 0].astype(jnp.int32)
  local = partial(splash_local, interpret=interpret)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or 'fsdp' not in mesh.axis_names:
    return local(*args)
  rows = PartitionSpec(('data', 'fsdp'), 'tensor', None, None)
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(rows, rows, rows, PartitionSpec(('data', 'fsdp'), None)),
    out_specs=rows,
    check_vma=False,
  )(*args)


def splash_local(
  q: t.FloatRHTC, k: t.FloatRJSC, v: t.FloatRJSC, real_RxS: t.IntRS, interpret: bool
) -> t.FloatRHTC:
  """Runs the splash kernel on the rows and heads of one device."""
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  def pad(x: t.Array, axis: int) -> t.Array:
    return jnp.pad(
      x, [(0, -n % 128 if i == axis else 0) for i, n in enumerate(x.shape)]
    )

  length = q.shape[2]
  k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
  q, k, v, real = pad(q, 2), pad(k, 2), pad(v, 2), pad(real_RxS, 1)
  full = masks.FullMask((q.shape[2], k.shape[2]))
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([full] * q.shape[1]),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  seen = splash.SegmentIds(jnp.ones((len(q), q.shape[2]), jnp.int32), real)
  out: t.Array = jax.vmap(kernel)(q, k, v, seen)
  return out[:, :, :length]


ATTENTION = {'xla': attend, 'cudnn': attend_cudnn, 'splash': attend_splash}
