"""The LLaDA family: a bidirectional transformer that predicts masked tokens.

RMSNorm, RoPE, SwiGLU, MHA or GQA, optional q/k/v bias and q/k norm, tied or
untied head, predictions in place (LLaDA, SDAR) or shifted by one (Dream).
Flax Linen serves as a parameter and shape factory and is seen here only; the
layers are scanned, so the program's size does not grow with depth.

`params` is everywhere the dict of Flax collections: {'params': ...} for a
plain model, {'params': ..., 'lora': ...} with adapters. Leaving 'lora' out
gives the reference policy and costs no second copy.
"""

import dataclasses
import re
import zlib
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dmpo_jax.types import Array

LINEARS = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')  # of a layer
LORA_TARGETS = {
  'all': f'^({"|".join(LINEARS)})$',
  # The names in the papers' target lists that exist in LLaDA's checkpoint.
  'paper': r'^(q|k|v|up)$',
}

# What a layer's backward pass recomputes: nothing, everything, or everything
# but the results of the linears.
REMAT = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
# Kinds of quantized kernels: qwix's type, and inputs that share a scale.
QUANT = {'int8': ('int8', 0), 'nf4': ('nf4', 64)}  # 0 = a whole column


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Static and hashable: a constant of every compiled function."""

  vocab: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  mlp: int
  mask_id: int
  eos_id: int
  pad_id: int
  head_dim: int = 0  # 0 = width / heads
  rope_theta: float = 10000.0
  eps: float = 1e-5
  positions: int = 4096  # longest prompt + completion
  qkv_bias: bool = False  # Dream
  qk_norm: bool = False  # Qwen3-style
  tied: bool = False  # the head is the embedding
  shift: bool = False  # Dream: the output at i - 1 predicts token i
  block_causal: int = 0  # SDAR: attention ends with one's own block of so many
  lora_rank: int = 0  # 0 = no adapters
  lora_alpha: float = 64.0
  lora_dropout: float = 0.0  # of the adapters' input, where keys are given
  lora_targets: str = LORA_TARGETS['all']  # regex on the linear's name
  dtype: str = 'bfloat16'  # of the matmuls; norms, softmax, head sum in f32
  param_dtype: str = 'float32'
  remat: str = 'full'  # of a layer, in the backward pass: a name in REMAT
  attention: str = 'xla'  # a name in ATTENTION
  head_chunk: int = 0  # completion positions per head call in log-probs; 0=all


PRESETS = {
  # vocab and special ids of the small ones come from the tokenizer.
  # 'tiny' is for short sequences: a small RoPE base and q/k norms make it
  # learn several times faster there.
  'tiny': dict(
    width=64,
    layers=3,
    heads=2,
    kv_heads=2,
    mlp=128,
    positions=512,
    rope_theta=100.0,
    qk_norm=True,
  ),
  'small': dict(width=256, layers=8, heads=8, kv_heads=8, mlp=768, positions=2048),
  'llada_8b': dict(
    vocab=126464,
    width=4096,
    layers=32,
    heads=32,
    kv_heads=32,
    mlp=12288,
    mask_id=126336,
    eos_id=126081,
    pad_id=126081,
    rope_theta=500000.0,
  ),
  'dream_7b': dict(
    vocab=152064,
    width=3584,
    layers=28,
    heads=28,
    kv_heads=4,
    mlp=18944,
    mask_id=151666,
    eos_id=151643,
    pad_id=151643,
    rope_theta=1e6,
    eps=1e-6,
    positions=131072,
    qkv_bias=True,
    shift=True,
  ),
  'sdar_8b': dict(
    vocab=151936,
    width=4096,
    layers=36,
    heads=32,
    kv_heads=8,
    mlp=12288,
    head_dim=128,
    mask_id=151669,
    eos_id=151643,
    pad_id=151643,
    rope_theta=1e6,
    eps=1e-6,
    positions=32768,
    qk_norm=True,
  ),
}


class Cache(NamedTuple):
  """Keys (after RoPE) and values of every position and layer."""

  keys: Array  # (N, R, kv_heads, S, C)
  values: Array  # (N, R, kv_heads, S, C)


class Window(NamedTuple):
  """Where a partial forward stands in the sequence it attends to."""

  cache: Cache
  start: Array  # () int32, position of its first token


class Linear(nn.Module):
  """x @ kernel (+ bias) (+ the adapter, where its collection is given)."""

  cfg: ModelConfig
  features: int
  bias: bool = False
  gain: float = 1.0

  @nn.compact
  def __call__(self, x, keys=None):
    cfg, shape = self.cfg, (x.shape[-1], self.features)
    dtype = jnp.dtype(cfg.dtype)
    init = nn.initializers.variance_scaling(self.gain, 'fan_in', 'truncated_normal')
    kernel = self.param('kernel', init, shape, cfg.param_dtype)
    # A base under adapters has no gradient of its kernels.
    product = jnp.matmul if cfg.lora_rank else matmul
    y = product(x, dense(kernel).astype(dtype))
    if self.bias:
      zeros = nn.initializers.zeros
      bias = self.param('bias', zeros, shape[1:], cfg.param_dtype)
      y += jnp.broadcast_to(bias, y.shape).astype(dtype)
    wanted = cfg.lora_rank and re.search(cfg.lora_targets, self.name)
    if wanted and (self.is_initializing() or self.has_variable('lora', 'a')):
      y += self.adapter(self.drop(x, keys), shape).astype(dtype)
    return y

  def drop(self, x, keys):
    """Dropout of the adapter's input; keys_R are the rows' own."""
    rate = self.cfg.lora_dropout
    if keys is None or not rate:
      return x
    name = zlib.crc32(self.name.encode())

    def one(row, key):
      key = jax.random.fold_in(key, name)
      kept = jax.random.bernoulli(key, 1 - rate, row.shape)
      return jnp.where(kept, row / (1 - rate), 0).astype(row.dtype)

    return jax.vmap(one)(x, keys)

  def adapter(self, x, shape):
    """PEFT's initialisation (kaiming_uniform(sqrt 5), zeros), float32."""
    cfg, bound = self.cfg, shape[0] ** -0.5
    a = self.variable(
      'lora',
      'a',
      lambda: jax.random.uniform(
        self.make_rng('lora'), (shape[0], cfg.lora_rank), minval=-bound, maxval=bound
      ),
    )
    b = self.variable('lora', 'b', jnp.zeros, (cfg.lora_rank, shape[1]))
    x = x.astype(jnp.float32)
    return (x @ a.value) @ b.value * (cfg.lora_alpha / cfg.lora_rank)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x, kernel, dtype=None):
  """x @ kernel, (..., D) and (D, F), summed and given in `dtype`.

  The gradient of the kernel transposes the narrower of its two operands.
  JAX's own rule takes the outputs', and XLA's CPU compiler then computes the
  elementwise chain before it once more, in that order: half of an update.
  """
  return jnp.matmul(x, kernel, preferred_element_type=dtype)


def matmul_fwd(x, kernel, dtype):
  return matmul(x, kernel, dtype), (x, kernel)


def matmul_bwd(dtype, kept, dy):
  x, kernel = kept
  dy = dy.astype(x.dtype)
  dx = jax.lax.dot_general(dy, kernel, (((dy.ndim - 1,), (1,)), ((), ())))
  rows_x, rows_dy = (z.reshape(-1, z.shape[-1]) for z in (x, dy))
  if x.shape[-1] <= dy.shape[-1]:
    return dx, rows_x.T @ rows_dy
  return dx, (rows_dy.T @ rows_x).T


matmul.defvjp(matmul_fwd, matmul_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_frozen(x, kernel, dtype=None):
  """`matmul` of a kernel that does not train: its gradient is zeros.

  JAX's own rule multiplies float32 cotangents with a bfloat16 kernel, for which
  a GPU makes a float32 copy of it: two GiB for the head of an 8B model.
  """
  return matmul(x, kernel, dtype)


def matmul_frozen_bwd(dtype, kept, dy):
  x, kernel = kept
  return matmul(dy.astype(x.dtype), kernel.T), jnp.zeros_like(kernel)


matmul_frozen.defvjp(matmul_fwd, matmul_frozen_bwd)


def dense(kernel):
  """A kernel as matmuls take it: one stored by `quantize` is restored."""
  if not hasattr(kernel, 'qvalue'):
    return kernel
  import qwix

  return qwix.dequantize(kernel)


def quantize(kernel_NxDxF, kind):
  """A layer-stacked kernel as a qwix.QArray; `kind` is a name in QUANT.

  int8 has one scale for a column (an output), nf4 one for 64 inputs of it.
  ValueError if the inputs do not divide by that.
  """
  import qwix

  qtype, tile = QUANT[kind]
  if tile and kernel_NxDxF.shape[1] % tile:
    raise ValueError(
      f'model.quantize = {kind} needs linears whose inputs are '
      f'a multiple of {tile}; one has {kernel_NxDxF.shape[1]}'
    )
  return qwix.quantize(
    kernel_NxDxF, qtype, channelwise_axes=(0, 2), tiled_axes={1: tile} if tile else None
  )


class Norm(nn.Module):
  """RMSNorm in float32."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, x):
    ones = nn.initializers.ones
    scale = self.param('scale', ones, x.shape[-1:], self.cfg.param_dtype)
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.cfg.eps)
    y *= jnp.broadcast_to(scale, y.shape).astype(jnp.float32)
    return y.astype(self.cfg.dtype)


class Block(nn.Module):
  """One layer. With a `cache` its K/V replace the cached ones from `start`."""

  cfg: ModelConfig
  keep: bool  # return this layer's keys and values

  @nn.compact
  def __call__(self, x, per_layer, rope, mask, start):
    cfg, (cache, keys) = self.cfg, per_layer
    out_gain = 0.5 / cfg.layers  # keeps the residual stream's scale at depth
    y = Norm(cfg, name='attn_norm')(x)
    q, k, v = self.project(y, keys)
    q, k = rotate(q, rope, q.shape[-1] ** -0.5), rotate(k, rope)
    if cache is not None:
      at = (0, 0, start, 0)
      k = jax.lax.dynamic_update_slice(cache.keys, k, at)
      v = jax.lax.dynamic_update_slice(cache.values, v, at)
    y = ATTENTION[cfg.attention](q, k, v, mask)
    y = jnp.swapaxes(y, 1, 2).reshape(x.shape[:2] + (-1,))
    x += Linear(cfg, cfg.width, gain=out_gain, name='o')(y, keys)
    y = Norm(cfg, name='mlp_norm')(x)
    gate = nn.silu(Linear(cfg, cfg.mlp, name='gate')(y, keys))
    y = gate * Linear(cfg, cfg.mlp, name='up')(y, keys)
    x += Linear(cfg, cfg.width, gain=out_gain, name='down')(y, keys)
    return x, Cache(k, v) if self.keep else None

  def project(self, y, keys):
    cfg = self.cfg
    dim = cfg.head_dim or cfg.width // cfg.heads

    def heads(name, count):
      z = Linear(cfg, count * dim, cfg.qkv_bias, name=name)(y, keys)
      z = z.reshape(y.shape[:2] + (count, dim))
      if cfg.qk_norm and name != 'v':
        z = Norm(cfg, name=f'{name}_norm')(z)
      return jnp.swapaxes(z, 1, 2)

    return (heads('q', cfg.heads), heads('k', cfg.kv_heads), heads('v', cfg.kv_heads))


class Transformer(nn.Module):
  """Embedding, scanned layers, head."""

  cfg: ModelConfig
  keep: bool = False

  def setup(self):
    cfg = self.cfg
    init = nn.initializers.normal(cfg.width**-0.5)
    shape = (cfg.vocab, cfg.width)
    self.embedding = self.param('embedding', init, shape, cfg.param_dtype)
    block = Block
    if cfg.remat != 'none':
      block = nn.remat(Block, prevent_cse=False, policy=REMAT[cfg.remat])
    self.layers = nn.scan(
      block,
      variable_axes={'params': 0, 'lora': 0},
      split_rngs={'params': True, 'lora': True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=cfg.layers,
    )(cfg, self.keep)
    self.final_norm = Norm(cfg)
    if not cfg.tied:
      self.head = self.param('head', init, shape, cfg.param_dtype)

  def hidden(self, tokens, positions, mask, cache, start, keys):
    x = constrain(self.embedding[tokens].astype(self.cfg.dtype))
    rope = rope_table(self.cfg, positions)
    if keys is not None:  # each layer its own
      layer = jnp.arange(self.cfg.layers)
      fold = jax.vmap(jax.random.fold_in, (0, None))
      keys = jax.vmap(fold, (None, 0))(keys, layer)
    x, kept = self.layers(x, (cache, keys), rope, mask, start)
    return self.final_norm(x), kept

  def logits(self, hidden):
    table = self.embedding if self.cfg.tied else self.head
    table = table.astype(self.cfg.dtype).T
    product = matmul_frozen if self.cfg.lora_rank else matmul
    return product(hidden, table, jnp.float32)

  def __call__(self, tokens, positions):
    return self.logits(self.hidden(tokens, positions, *[None] * 4)[0])


def constrain(x):
  """Keeps the hidden stream sharded by rows when a mesh is in force.

  Without it XLA answers the gather from an FSDP-sharded embedding with a full
  rematerialisation.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or 'fsdp' not in mesh.axis_names:
    return x
  spec = PartitionSpec(('data', 'fsdp'), None, None)
  return jax.lax.with_sharding_constraint(x, spec)


def rope_table(cfg, positions_RxT):
  """(cos, sin), each (R, 1, T, C/2) float32."""
  dim = cfg.head_dim or cfg.width // cfg.heads
  inverse = cfg.rope_theta ** -(jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
  positions = positions_RxT[:, None, :, None].astype(jnp.float32)
  angle = positions * inverse[None, None, None]
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x, rope, gain=1.0):
  """RoPE, NeoX's rotate-half, and a factor, in float32."""
  cos, sin = rope
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return (y * gain).astype(x.dtype)


def attend(q_RxHxTxC, k_RxKxSxC, v_RxKxSxC, mask):
  """Softmax attention, (R, H, T, C), of scaled queries, H/K to a K/V head.

  mask: (R, 1, 1 or T, S) bool, or None. Heads come before positions so that
  both products are batched matrices as they lie, the mask is added, and the
  sum divides the result, which is smaller than the weights: XLA's CPU
  compiler puts softmax and second product into one kernel. Weights are float32
  until they are multiplied.
  """
  rows, count, _, dim = q_RxHxTxC.shape
  heads = k_RxKxSxC.shape[1]
  product = partial(jnp.einsum, preferred_element_type=jnp.float32)
  q = q_RxHxTxC.reshape(rows, heads, -1, dim)
  w = product('rkqc,rksc->rkqs', q, k_RxKxSxC)
  if mask is not None:
    if mask.shape[2] > 1:
      mask = jnp.tile(mask, (1, 1, count // heads, 1))
    w += jnp.where(mask, 0.0, -1e30)
  w = jnp.exp(w - jax.lax.stop_gradient(jnp.max(w, -1, keepdims=True)))
  y = product('rkqs,rksc->rkqc', w.astype(v_RxKxSxC.dtype), v_RxKxSxC)
  y /= jnp.sum(w, axis=-1, keepdims=True)
  return y.reshape(q_RxHxTxC.shape).astype(v_RxKxSxC.dtype)


def attend_cudnn(q_RxHxTxC, k_RxKxSxC, v_RxKxSxC, mask):
  """`attend` by cuDNN's fused kernel: GPUs, bfloat16, C a multiple of 8."""
  if mask is not None:  # it takes no mask of one row for all queries
    mask = jnp.broadcast_to(mask, (*mask.shape[:2], q_RxHxTxC.shape[2], mask.shape[3]))
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_RxHxTxC, k_RxKxSxC, v_RxKxSxC))
  y = jax.nn.dot_product_attention(
    q, k, v, mask=mask, scale=1.0, implementation='cudnn'
  )
  return jnp.swapaxes(y, 1, 2)


def attend_splash(q_RxHxTxC, k_RxKxSxC, v_RxKxSxC, mask, interpret=False):
  """`attend` by Pallas' splash kernel: TPUs; mask (R, 1, 1, S) or None.

  Lengths are padded to its tiles of 128. A kernel is not partitioned by the
  compiler, so under a mesh each device runs its own rows and heads.
  ValueError on a mask that differs between queries.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  if mask is None:
    mask = jnp.ones((q_RxHxTxC.shape[0], 1, 1, k_RxKxSxC.shape[2]), bool)
  if mask.shape[2] > 1:
    raise ValueError(
      'model.attention = splash hides keys from all queries or '
      'from none: block-causal models and wino need xla'
    )

  def local(q, k, v, real_RxS):
    wide = lambda x, axis: jnp.pad(
      x, [(0, -n % 128 if i == axis else 0) for i, n in enumerate(x.shape)]
    )
    length = q.shape[2]
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    q, k, v, real = wide(q, 2), wide(k, 2), wide(v, 2), wide(real_RxS, 1)
    full = masks.FullMask((q.shape[2], k.shape[2]))
    kernel = splash.make_splash_mha(
      masks.MultiHeadMask([full] * q.shape[1]),
      head_shards=1,
      q_seq_shards=1,
      interpret=interpret,
    )
    seen = splash.SegmentIds(jnp.ones((len(q), q.shape[2]), jnp.int32), real)
    return jax.vmap(kernel)(q, k, v, seen)[:, :, :length]

  args = q_RxHxTxC, k_RxKxSxC, v_RxKxSxC, mask[:, 0, 0].astype(jnp.int32)
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


ATTENTION = {'xla': attend, 'cudnn': attend_cudnn, 'splash': attend_splash}


def positions_of(valid_RxS):
  """Positions counted from the first real token, so padding moves nothing."""
  return jnp.maximum(jnp.cumsum(valid_RxS, axis=1) - 1, 0)


def init(cfg, key):
  """Fresh {'params': ...}, with 'lora' where cfg.lora_rank > 0."""
  token = jnp.zeros((1, 1), jnp.int32)
  key_params, key_lora = jax.random.split(key)
  keys = {'params': key_params, 'lora': key_lora}
  return Transformer(cfg).init(keys, token, token)


def attention_mask(cfg, valid_RxS, positions_RxS, queries_RxT):
  """What each query sees, (R, 1 or T, S) bool: no padding, no later block.

  Blocks are counted from the start of a text that is given without valid_RxS.
  With it the last is whole, and so are all of a completion whose length is a
  multiple: it is the prompt's first block that may be short.
  """
  mask = True if valid_RxS is None else valid_RxS[:, None, :]
  if cfg.block_causal:
    size = cfg.block_causal
    short = (
      0 if valid_RxS is None else -jnp.sum(valid_RxS, axis=1, keepdims=True) % size
    )
    block = lambda x: (x + short) // size
    mask &= block(positions_RxS)[:, None] <= block(queries_RxT)[..., None]
  return mask


def hidden(
  cfg, params, tokens_RxS, valid_RxS=None, keep=False, window=None, dropout_R=None
):
  """The last hidden states; `head` makes logits of them.

  Returns ((R, T, D), Cache or None). Without `window` T = S and index i holds
  the prediction for position i, whatever the family. With `window` the tokens
  are the T positions from window.start on, valid_RxS speaks of the whole
  sequence, and the states come as the network gives them (not shifted).
  dropout_R are keys, one a row, for cfg.lora_dropout; without them it is off.
  """
  valid = jnp.ones_like(tokens_RxS, bool) if valid_RxS is None else valid_RxS
  if window is None and valid.shape != tokens_RxS.shape:
    raise ValueError(
      f'valid has shape {valid.shape}, tokens {tokens_RxS.shape}: they must be equal'
    )
  positions = positions_of(valid)
  cache, start, queries = None, None, positions
  if window is not None:
    cache, start = window
    queries = jax.lax.dynamic_slice_in_dim(positions, start, tokens_RxS.shape[1], 1)
  mask = None
  if valid_RxS is not None or cfg.block_causal:
    mask = attention_mask(cfg, valid_RxS, positions, queries)[:, None]
  h, kept = Transformer(cfg, keep).apply(
    params,
    tokens_RxS,
    queries,
    mask,
    cache,
    start,
    dropout_R,
    method=Transformer.hidden,
  )
  if cfg.shift and window is None:
    h = unshift(h, valid)
  return h, kept


def unshift(h_RxSxD, valid_RxS):
  """Moves states one right; the first real token keeps its own (Dream)."""
  previous = jnp.concatenate([h_RxSxD[:, :1], h_RxSxD[:, :-1]], axis=1)
  real = jnp.concatenate([jnp.zeros_like(valid_RxS[:, :1]), valid_RxS[:, :-1]], axis=1)
  return jnp.where(real[..., None], previous, h_RxSxD)


def head(cfg, params, hidden):
  """(..., D) -> (..., V) float32 logits."""
  return Transformer(cfg).apply(params, hidden, method=Transformer.logits)


def full_logits(cfg, params, tokens_RxS, valid_RxS=None):
  """(R, S, V) float32: the prediction for position i at index i.

  Holds for every family (Dream's shift is undone). valid_RxS False marks
  padding: it is not attended and moves no position.
  """
  return head(cfg, params, hidden(cfg, params, tokens_RxS, valid_RxS)[0])


def window_logits(
  cfg,
  params,
  tokens_RxS,
  valid_RxS,
  start,
  width,
  prompt=0,
  guidance=0.0,
  keep=False,
  cache=None,
  span=0,
):
  """Logits of positions [start, start + width) under the sampling law.

  start: () or (R,) int32. guidance > 0 is classifier-free guidance: a second
  row with its prompt masked, un + (guidance + 1)(cond - un) (LLaDA
  generate.py:81-91). The mask token has -inf: no sampler emits it. With a
  `cache` only `span` positions from start (a scalar) on are recomputed, those
  of the window if span = 0.
  Returns ((R, W, V) float32, Cache or None).
  """
  row_count = tokens_RxS.shape[0]
  if guidance:
    blank = jnp.arange(tokens_RxS.shape[1])[None] < prompt
    blind = jnp.where(blank, cfg.mask_id, tokens_RxS)
    # Side by side, so that both of a row are on the same device.
    tokens_RxS = jnp.stack([tokens_RxS, blind], 1).reshape(2 * row_count, -1)
    valid_RxS = jnp.repeat(valid_RxS, 2, axis=0)
  if cache is None:
    h, kept = hidden(cfg, params, tokens_RxS, valid_RxS, keep)
    start_R = jnp.broadcast_to(start, (row_count,))
    start_R = jnp.repeat(start_R, 1 + bool(guidance))
    h = jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, width))(h, start_R)
  else:
    shift = int(cfg.shift)
    part = jax.lax.dynamic_slice_in_dim(
      tokens_RxS, start - shift, (span or width) + shift, 1
    )
    h, kept = hidden(cfg, params, part, valid_RxS, keep, Window(cache, start - shift))
    h = h[:, :width]
  logits = head(cfg, params, h)
  if guidance:
    cond, blind = jnp.moveaxis(logits.reshape(-1, 2, *logits.shape[1:]), 1, 0)
    logits = blind + (guidance + 1) * (cond - blind)
  return without_mask(cfg, logits), kept


def without_mask(cfg, logits):
  is_mask = jnp.arange(cfg.vocab)[None, None] == cfg.mask_id
  return jnp.where(is_mask, -jnp.inf, logits)


def shadow_logits(cfg, params, tokens_RxS, valid_RxS, start_R, width):
  """Logits of each row's window, and what they would be in hindsight.

  A shadow of the window, masks at the same positions that no real token sees,
  is appended; it sees everything but its twin, so it tells how probable a
  token is given all others (WINO). Where the family shifts, the output before
  predicts: there the shadow stands for the tokens before, which it repeats.
  Returns two (R, W, V) float32, -inf for the mask token.
  """
  size, shift = tokens_RxS.shape[1], int(cfg.shift)
  part = jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, width))
  positions = positions_of(valid_RxS)
  places = jnp.concatenate([positions, part(positions, start_R - shift)], 1)
  shadow = (
    part(tokens_RxS, start_R - 1)
    if shift
    else jnp.full((len(start_R), width), cfg.mask_id, jnp.int32)
  )
  # Which real token each column is; a shadow of a mask is none (-1).
  window = start_R[:, None] + jnp.arange(width)[None]
  real = jnp.broadcast_to(jnp.arange(size)[None], tokens_RxS.shape)
  column = jnp.concatenate(
    [real, window - 1 if shift else jnp.full_like(window, -1)], axis=1
  )
  mask = attention_mask(cfg, valid_RxS, positions, places)
  mask = jnp.broadcast_to(mask, (len(start_R), size + width, size))
  is_shadow = jnp.arange(size + width) >= size
  seen = jnp.broadcast_to(is_shadow[None, :, None], mask.shape[:2] + (width,))
  mask = jnp.concatenate([mask, seen], axis=2)
  twin = jnp.concatenate([jnp.full_like(real, -2), window], axis=1)
  mask &= column[:, None, :] != twin[:, :, None]
  h, _ = Transformer(cfg).apply(
    params,
    jnp.concatenate([tokens_RxS, shadow], axis=1),
    places,
    mask[:, None],
    None,
    None,
    None,
    method=Transformer.hidden,
  )
  return tuple(
    without_mask(cfg, head(cfg, params, x))
    for x in (part(h[:, :size], start_R - shift), h[:, size:])
  )


def sampling_logits(logits, temperature, top_p=1.0, top_k=0):
  """Logits whose softmax is the law that tokens are drawn from (float32).

  Temperature, then the nucleus that top_p needs (with the token that crosses
  it), then the top_k most probable: Dream's order. At temperature 0 the law is
  a point mass and says nothing about the model: it is then that at 1.
  """
  logits = logits / (temperature or 1.0)
  if top_p < 1:
    best = -jnp.sort(-logits, axis=-1)
    prob = jax.nn.softmax(best, axis=-1)
    kept = jnp.cumsum(prob, axis=-1) - prob < top_p
    least = jnp.min(jnp.where(kept, best, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if 0 < top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, top_k)[0][..., -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return logits


def logp_of(logits, tokens):
  """Log-softmax of (..., V) logits at (...) tokens alone."""
  own = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
  return own - jax.nn.logsumexp(logits, axis=-1)


def sampling_logp(logits, temperature):
  """Log-probs of the sampling law (float32); see `sampling_logits`."""
  return jax.nn.log_softmax(sampling_logits(logits, temperature), axis=-1)


def count_params(params):
  return sum(leaf.size for leaf in jax.tree.leaves(params))
