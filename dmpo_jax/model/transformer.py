"""The network: embedding, layers, head, as Flax modules.

Flax Linen makes parameters and their shapes, and is used in this folder only.
Layers are scanned, so the program's size does not grow with their number.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dmpo_jax import mesh
from dmpo_jax import types as t
from dmpo_jax.model import moe
from dmpo_jax.model.attention import (
  ATTENTION,
  Mask,
  Rope,
  attend_part,
  merged,
  rope_table,
  rotate,
)
from dmpo_jax.model.grouped import OfLayer
from dmpo_jax.model.lora import adapter, dropout, factors, matmul, matmul_frozen
from dmpo_jax.model.moe import Routed
from dmpo_jax.model.presets import DENSE, EXPERTS, SHARED, ModelConfig, Run, layer_runs
from dmpo_jax.model.quantize import dense

# What a layer's backward pass recomputes: nothing, everything, or everything
# but the results of the linears.
REMAT = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(moe.PRODUCT),
  ),
}


class Cache(NamedTuple):
  """Keys (after RoPE) and values of every layer and position."""

  keys: t.FloatNRJSC
  values: t.FloatNRJSC


class Kept(NamedTuple):
  """What a forward returns beside its states where cfg.keep_routes is set."""

  cache: Cache | None  # None where it was not asked for
  routed: Routed | None  # None: no layer has experts


class Inputs(NamedTuple):
  """T tokens of each row, as the network reads them."""

  tokens: t.IntRT
  positions: t.IntRT
  mask: Mask = None  # which keys a token sees; None = all
  cache: Cache | None = None  # keys and values of other tokens
  past: t.BoolR1TS | None = None  # which of the cache a token sees
  dropout: t.KeyR | None = None  # keys for lora_dropout; None = no dropout
  # Experts that tokens are sent to, by layer with experts; -1 = by the router.
  routes: t.IntNRTX | None = None
  counted: t.BoolRT | None = None  # tokens in the load of experts; None = all
  # Kernels of the experts of all layers, by name: see Transformer.unsliced.
  kernels: Any = None


class PerLayer(NamedTuple):
  """The part of the inputs that each layer has for itself."""

  cache: Cache | None
  dropout: t.KeyRT | None
  routes: t.IntRTX | None
  number: t.IntScalar | None = None  # of the layer among those with Inputs.kernels


class Linear(nn.Module):
  """x @ kernel, plus a bias, plus the adapter where its collection is given."""

  cfg: ModelConfig
  features: int
  bias: bool = False
  gain: float = 1.0

  @nn.compact
  def __call__(self, x: t.FloatRTD, keys: t.KeyRT | None = None) -> t.FloatX:
    cfg, shape, name = self.cfg, (x.shape[-1], self.features), str(self.name)
    dtype = jnp.dtype(cfg.dtype)
    init = nn.initializers.variance_scaling(self.gain, 'fan_in', 'truncated_normal')
    kernel = self.param('kernel', init, shape, cfg.param_dtype)
    # A base under adapters takes no gradient of its kernels.
    product: Any = jnp.matmul if cfg.lora_rank else matmul
    y = product(x, dense(kernel, name).astype(dtype))
    if self.bias:
      zeros = nn.initializers.zeros
      bias = self.param('bias', zeros, shape[1:], cfg.param_dtype)
      y += jnp.broadcast_to(bias, y.shape).astype(dtype)
    adapted = cfg.lora_rank and re.search(cfg.lora_targets, name)
    if adapted and (self.is_initializing() or self.has_variable('lora', 'a')):
      if keys is not None and cfg.lora_dropout:
        x = dropout(x, keys, cfg.lora_dropout, name)
      y += adapter(self, cfg, x, self.features).astype(dtype)
    return y


class Norm(nn.Module):
  """RMSNorm in float32."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, x: t.FloatX) -> t.FloatX:
    ones = nn.initializers.ones
    scale = self.param('scale', ones, x.shape[-1:], self.cfg.param_dtype)
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.cfg.eps)
    if self.cfg.norm_round:
      y = y.astype(self.cfg.dtype)
    y *= jnp.broadcast_to(scale, y.shape).astype(y.dtype)
    return y.astype(self.cfg.dtype)


class Router(nn.Module):
  """Logits of the experts, in float32 whatever cfg.dtype, and their bias."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, x: t.FloatRTD) -> tuple[t.Array, t.Array | None]:
    cfg, shape = self.cfg, (x.shape[-1], self.cfg.experts)
    init = nn.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal')
    kernel = self.param('kernel', init, shape, cfg.param_dtype)
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    logits = jnp.matmul(x, kernel, precision='highest')
    if not cfg.router_bias:
      return logits, None
    return logits, self.param('bias', nn.initializers.zeros, shape[1:], jnp.float32)


class Expert(nn.Module):
  """A linear of every expert, and the adapters where their collection is given."""

  cfg: ModelConfig
  inputs: int
  features: int
  gain: float

  @nn.compact
  def __call__(self) -> moe.Stack:
    cfg, shape = self.cfg, (self.cfg.experts, self.inputs, self.features)
    init = nn.initializers.variance_scaling(
      self.gain, 'fan_in', 'truncated_normal', batch_axis=0
    )
    kernel = self.param('kernel', init, shape, cfg.param_dtype)
    adapted = cfg.lora_rank and re.search(cfg.lora_targets, str(self.name))
    if adapted and (self.is_initializing() or self.has_variable('lora', 'a')):
      return moe.Stack(kernel, *factors(self, cfg, shape))
    return moe.Stack(kernel)


def out_gain(cfg: ModelConfig) -> float:
  """Returns the gain of what is added to the residual stream: its scale stays."""
  return 0.5 / cfg.layers


class Block(nn.Module):
  """One layer: attention and MLP, each added to the residual stream."""

  cfg: ModelConfig
  keep: bool  # return this layer's keys and values
  routed: bool  # experts in place of the dense MLP

  @nn.compact
  def __call__(
    self, x: t.FloatRTD, own: PerLayer, rope: Rope, inputs: Inputs
  ) -> tuple[t.FloatRTD, Kept]:
    """Runs the layer on x; `inputs` says where the tokens stand beside the cache."""
    cfg, keys = self.cfg, own.dropout
    y = Norm(cfg, name='attn_norm')(x)
    q, k, v = self.project(y, keys)
    q, k = rotate(q, rope, q.shape[-1] ** -0.5), rotate(k, rope)
    if own.cache is None:
      y = ATTENTION[cfg.attention](q, k, v, inputs.mask)
    else:  # no kernel reads two arrays, and joining them would copy the cache
      parts = (*own.cache, inputs.past), (k, v, inputs.mask)
      y = merged([attend_part(q, *part) for part in parts], q.dtype)
    y = jnp.swapaxes(y, 1, 2).reshape(x.shape[:2] + (-1,))
    x += Linear(cfg, cfg.width, gain=out_gain(cfg), name='o')(y, keys)
    y, routed = Norm(cfg, name='mlp_norm')(x), None
    if self.routed:
      y, routed = self.experts(y, own, inputs)
    else:
      y = self.mlp(y, keys, DENSE, cfg.mlp)
    x += y
    return x, Kept(Cache(k, v) if self.keep else None, routed)

  def mlp(
    self, y: t.FloatRTD, keys: t.KeyRT | None, names: Sequence[str], size: int
  ) -> t.FloatRTD:
    """Runs a SwiGLU whose linears have these names."""
    cfg, (gate, up, down) = self.cfg, names
    z = nn.silu(Linear(cfg, size, name=gate)(y, keys))
    z *= Linear(cfg, size, name=up)(y, keys)
    return Linear(cfg, cfg.width, gain=out_gain(cfg), name=down)(z, keys)

  def experts(
    self, y: t.FloatRTD, own: PerLayer, inputs: Inputs
  ) -> tuple[t.FloatRTD, Routed | None]:
    """Sends each token to its experts, and to the shared ones if there are any."""
    cfg = self.cfg
    logits, bias = Router(cfg, name='router')(y)
    chosen, weights, scores = moe.choose(cfg, logits, bias, own.routes)
    width, inner = cfg.width, cfg.expert_mlp
    shapes = (width, inner, 1.0), (width, inner, 1.0), (inner, width, out_gain(cfg))
    stacks = {
      name: Expert(cfg, *shape, name=name)()
      for name, shape in zip(EXPERTS, shapes, strict=True)
    }
    for name, kernels in (inputs.kernels or {}).items():
      stacks[name] = stacks[name]._replace(kernel=OfLayer(kernels, own.number))
    z = moe.experts(cfg, stacks, y, chosen, weights, own.dropout)
    if cfg.shared_mlp:
      z += self.mlp(y, own.dropout, SHARED, cfg.shared_mlp)
    if not cfg.keep_routes:
      return z, None
    return z, moe.routed_of(cfg, scores, chosen, inputs.counted)

  def project(self, y: t.FloatRTD, keys: t.KeyRT | None) -> tuple[t.FloatRHTC, ...]:
    """Returns queries, keys and values, heads before positions."""
    cfg = self.cfg
    dim = cfg.head_dim or cfg.width // cfg.heads

    def heads(name: str, count: int) -> t.Array:
      z = Linear(cfg, count * dim, cfg.qkv_bias, name=name)(y, keys)
      z = z.reshape(y.shape[:2] + (count, dim))
      if cfg.qk_norm and name != 'v':
        z = Norm(cfg, name=f'{name}_norm')(z)
      return jnp.swapaxes(z, 1, 2)

    return heads('q', cfg.heads), heads('k', cfg.kv_heads), heads('v', cfg.kv_heads)


class Transformer(nn.Module):
  """Embedding, scanned layers, head."""

  cfg: ModelConfig
  keep: bool = False  # return the keys and values of all layers

  def setup(self) -> None:
    cfg = self.cfg
    init = nn.initializers.normal(cfg.width**-0.5)
    shape = (cfg.vocab, cfg.width)
    self.embedding = self.param('embedding', init, shape, cfg.param_dtype)
    block = Block
    if cfg.remat != 'none':
      block = nn.remat(Block, prevent_cse=False, policy=REMAT[cfg.remat])
    axes: Any = (0, nn.broadcast, nn.broadcast)

    def scanned(experts: bool, count: int) -> nn.Module:
      stack = nn.scan(
        block,
        variable_axes={'params': 0, 'lora': 0},
        split_rngs={'params': True, 'lora': True},
        in_axes=axes,
        length=count,
      )
      return stack(cfg, self.keep, experts)

    # Flax names the modules of a list layers_0, layers_1, ...
    stacks = [scanned(run.experts, run.count) for run in layer_runs(cfg)]
    self.layers: Any = stacks if len(stacks) > 1 else stacks[0]
    self.final_norm = Norm(cfg)
    if not cfg.tied:
      self.head = self.param('head', init, shape, cfg.param_dtype)

  def hidden(self, inputs: Inputs) -> tuple[t.FloatRTD, Any]:
    """Returns the last hidden states, and with `keep` the new cache.

    With cfg.keep_routes the second result is `Kept`.
    """
    x = constrain(self.embedding[inputs.tokens].astype(self.cfg.dtype))
    rope, keys = rope_table(self.cfg, inputs.positions), inputs.dropout
    if keys is not None:  # by layer and place in the text: padding has no part
      fold = jax.random.fold_in
      layers = jax.vmap(fold, (None, 0))
      places = jax.vmap(jax.vmap(fold, (None, 0)))
      keys = jax.vmap(layers, (0, None), 1)(keys, jnp.arange(self.cfg.layers))
      keys = jax.vmap(places, (0, None))(keys, inputs.positions)
    own = PerLayer(inputs.cache, keys, inputs.routes)
    inputs = inputs._replace(cache=None, dropout=None, routes=None)
    x, kept = self.run_layers(x, own, rope, inputs)
    return self.final_norm(x), kept if self.cfg.keep_routes else kept.cache

  def run_layers(
    self, x: t.FloatRTD, own: PerLayer, rope: Rope, inputs: Inputs
  ) -> tuple[t.FloatRTD, Kept]:
    """Runs the layers, one scan for each run of a kind."""
    runs = layer_runs(self.cfg)
    if len(runs) == 1:
      own, inputs = self.unsliced(runs[0], own, inputs)
      return self.layers(x, own, rope, inputs)
    found, routed = [], 0  # layers with experts so far
    for run, layers in zip(runs, self.layers, strict=True):
      cut = lambda tree, at, run=run: jax.tree.map(
        lambda z: z[at : at + run.count], tree
      )
      routes = cut(own.routes, routed) if run.experts else None
      mine = PerLayer(cut(own.cache, run.first), cut(own.dropout, run.first), routes)
      mine, seen = self.unsliced(run, mine, inputs)
      x, kept = layers(x, mine, rope, seen)
      found.append(kept)
      routed += run.count * run.experts
    return x, Kept(joined([z.cache for z in found]), joined([z.routed for z in found]))

  def unsliced(
    self, run: Run, own: PerLayer, inputs: Inputs
  ) -> tuple[PerLayer, Inputs]:
    """Lets the products of experts read the arrays of all layers, where they can.

    They cannot where the kernels take a gradient, are to be gathered or are stored in
    another dtype. Beside a cache nothing is trained.
    """
    cfg, grid = self.cfg, mesh.in_force()
    trained = not cfg.lora_rank and own.cache is None
    if (
      not run.experts
      or trained
      or cfg.expert_kernel != 'ragged'
      or self.is_initializing()
      or (grid and grid.shape['fsdp'] > 1)
    ):
      return own, inputs
    stored = self.variables['params'][run.name]
    kernels = {name: stored[name]['kernel'] for name in EXPERTS}
    as_used = lambda x: isinstance(x, jax.Array) and x.dtype == cfg.dtype
    if not all(map(as_used, kernels.values())):
      return own, inputs
    number = jnp.arange(run.count, dtype=jnp.int32)
    return own._replace(number=number), inputs._replace(kernels=kernels)

  def logits(self, hidden: t.FloatXD) -> t.FloatXV:
    """Returns float32 logits of hidden states."""
    table = self.embedding if self.cfg.tied else self.head
    table = table.astype(self.cfg.dtype).T
    product = matmul_frozen if self.cfg.lora_rank else matmul
    return product(hidden, table, jnp.float32)

  def __call__(self, inputs: Inputs) -> t.FloatXV:
    return self.logits(self.hidden(inputs)[0])


def joined(parts: list) -> Any:
  """Returns what runs of layers left as one tree; None where none left anything."""
  parts = [part for part in parts if part is not None]
  return jax.tree.map(lambda *x: jnp.concatenate(x), *parts) if parts else None


def on_own_rows(fn: Callable, axes: Sequence[int], *args: t.Array) -> t.Array:
  """Applies fn where each device has its own rows, so that none is sent.

  axes: which axis of each argument has the rows; the result has them where the first
  has. XLA does not see that reads and writes at places of each row's own are local.
  """
  if not (grid := mesh.in_force()):
    return fn(*args)
  split = mesh.row_axes(grid)
  specs = [PartitionSpec(*[None] * axis, split) for axis in axes]
  run = jax.shard_map(
    fn,
    mesh=grid,
    in_specs=tuple(specs),
    out_specs=specs[0],
    axis_names=set(split),
    check_vma=False,
  )
  return run(*args)


def constrain(x_RxTxD: t.FloatRTD) -> t.FloatRTD:
  """Keeps the hidden states sharded by rows while a mesh is in force.

  Without it XLA replicates the result of the lookup in an embedding that is
  sharded along fsdp, and computes it on every device.
  """
  if not (grid := mesh.in_force()):
    return x_RxTxD
  spec = PartitionSpec(mesh.row_axes(grid), None, None)
  return jax.lax.with_sharding_constraint(x_RxTxD, spec)
