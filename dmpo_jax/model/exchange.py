"""How the tokens of a layer reach their experts, on one device and across a mesh.

A device sorts its tokens' choices by expert. Where the mesh splits the experts (its
axis 'expert'), the devices of that axis first gather each other's tokens; each computes
the choices of its own experts, and a reduce-scatter brings the sums back. So shapes are
static, no token is dropped, and no expert's kernel travels. An all-to-all would have to
be padded to the same bytes, for one device may hold all the experts of all tokens. For
M tokens of a device and n devices of the axis it receives (n - 1) M D numbers, no more
than an unpadded all-to-all of k choices a token where n <= k, and as many float32 sums.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dmpo_jax import mesh
from dmpo_jax import types as t

# Name of the loop over pieces, of which one runs unless the experts' load is uneven:
# tools/costs.py counts one.
PIECES = 'expert_pieces'
# Rows of a piece, as a share of the choices that a device has to compute on average.
PIECE = 1.25

# (rows of choices (Q, D), how many are of each expert (E,), kernels, keys of the rows) ->
# (Q, D): the experts' MLPs. Rows are sorted by expert. Those after the last expert's
# have none; what they become is not read.
Rows = Callable[[t.Array, t.Array, Any, Any], t.Array]


class Sorted(NamedTuple):
  """The choices of M tokens, sorted by expert."""

  order: t.Array  # (Q,) a choice's number, token * k + j, by its place
  place: t.Array  # (M, k) the place of each choice; outside [0, Q): it is not here
  sizes: t.Array  # (E,) choices of each expert


def by_expert(chosen_Mxk: t.Array, experts: int) -> Sorted:
  """Sorts choices by expert; ids outside [0, experts) come last and count nowhere."""
  flat = jnp.where(chosen_Mxk < 0, experts, chosen_Mxk).ravel().astype(jnp.int32)
  order = jnp.argsort(flat, stable=True).astype(jnp.int32)
  place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
  ends = jnp.searchsorted(flat[order], jnp.arange(experts), side='right')
  sizes = jnp.diff(ends, prepend=0).astype(jnp.int32)
  return Sorted(order, place.reshape(chosen_Mxk.shape), sizes)


# `dispatch` and `combine` are each other's transposes, so both directions gather.
# JAX's own transpose of a gather adds rows up in no certain order on a GPU.


@partial(jax.custom_vjp, nondiff_argnums=())
def dispatch(x_MxD: t.Array, order_Q: t.Array, place_Mxk: t.Array) -> t.Array:
  """Returns each choice's token, (Q, D)."""
  return x_MxD[order_Q // place_Mxk.shape[1]]


@jax.custom_vjp
def combine(y_QxD: t.Array, order_Q: t.Array, place_Mxk: t.Array) -> t.Array:
  """Returns the sums over each token's choices, (M, D) in y's dtype, added in float32.

  A choice whose place is outside of y adds nothing.
  """
  count = y_QxD.shape[0]
  inside = jnp.where(place_Mxk < 0, count, place_Mxk)
  take = partial(jnp.take, y_QxD, axis=0, mode='fill', fill_value=0)
  parts = [take(inside[:, j]).astype(jnp.float32) for j in range(place_Mxk.shape[1])]
  return sum(parts[1:], parts[0]).astype(y_QxD.dtype)


dispatch.defvjp(
  lambda x, order, place: (dispatch(x, order, place), (order, place)),
  lambda at, dy: (combine(dy, *at), None, None),
)
combine.defvjp(
  lambda y, order, place: (combine(y, order, place), (order, place)),
  lambda at, dx: (dispatch(dx, *at), None, None),
)


def on_device(
  rows: Rows, x_MxD: t.Array, choice: tuple, kernels: Any, keys_M: Any, pieces: int = 1
) -> t.Array:
  """Returns each token's weighted sum over its experts that are here, (M, D) float32.

  choice: chosen_Mxk, where ids outside the kernels' experts are not here, and
  weight_Mxk. pieces: computes the choices that are here in pieces of PIECE of an even
  share; a piece without any is skipped, so many cost memory for one.
  """
  chosen, weight = choice
  tokens, k = chosen.shape
  experts = jax.tree.leaves(kernels)[0].shape[0]
  order, place, sizes = by_expert(chosen, experts)
  ends, total = jnp.cumsum(sizes), jnp.sum(sizes)
  most = tokens * min(k, experts)
  size = most if pieces == 1 else min(most, int(-(-PIECE * tokens * k // pieces)))
  order = jnp.pad(order[:most], (0, -most % size))

  def piece(start: t.Array, x: t.Array, weight: t.Array, kernels: Any) -> t.Array:
    own = jax.lax.dynamic_slice_in_dim(order, start, size)
    at = jnp.where(place < start + size, place - start, size)
    cut = jnp.clip(ends - start, 0, size)
    real = (jnp.arange(size) < total - start)[:, None]
    keys = None if keys_M is None else keys_M[own // k]
    y = rows(dispatch(x, own, at), jnp.diff(cut, prepend=0), kernels, keys)
    y = jnp.where(real, y.astype(jnp.float32), 0) * weight.ravel()[own][:, None]
    return combine(y, own, at)

  if size == most:
    return piece(jnp.int32(0), x_MxD, weight, kernels)

  @partial(jax.checkpoint, prevent_cse=False)
  def add(start: t.Array, *args: Any) -> t.Array:
    nothing = jnp.zeros((tokens, x_MxD.shape[1]), jnp.float32)
    skip = lambda *_: nothing
    return jax.lax.cond(start < total, piece, skip, start, *args)

  def step(sum_MxD: t.Array, start: t.Array) -> tuple[t.Array, None]:
    return sum_MxD + add(start, x_MxD, weight, kernels), None

  with jax.named_scope(PIECES):
    zeros = jnp.zeros((tokens, x_MxD.shape[1]), jnp.float32)
    starts = jnp.arange(0, order.size, size, dtype=jnp.int32)
    return jax.lax.scan(step, zeros, starts)[0]


def routed(
  rows: Rows,
  x_RxTxD: t.FloatRTD,
  choice: tuple,
  kernels: Any,
  keys_RxT: Any = None,
) -> t.Array:
  """Returns each token's weighted sum over its chosen experts, (R, T, D) float32.

  choice: chosen and weight, (R, T, k). kernels: a dict of {'kernel': ..., 'a': ...} by
  the linear's name, as in the parameters; every leaf has the experts in front. Under a
  mesh each device sorts its own rows' tokens.
  """
  grid = mesh.in_force()
  if grid is None or x_RxTxD.shape[0] % mesh.row_shards(grid):
    return flat(partial(on_device, rows), x_RxTxD, choice, kernels, keys_RxT)
  split = mesh.row_axes(grid)
  specs = jax.tree_util.tree_map_with_path(partial(kernel_spec, grid), kernels)
  parted = any('tensor' in spec for spec in jax.tree.leaves(specs, is_leaf=is_spec))
  across = grid.shape.get('expert', 1)

  def local(x: t.Array, choice: tuple, kernels: Any, keys: Any) -> t.Array:
    own = lambda *args: on_own_experts(rows, across, *args)
    return flat(own, x, choice, kernels, keys)[None]

  by_row = PartitionSpec(split)
  out = jax.shard_map(
    local,
    mesh=grid,
    in_specs=(by_row, by_row, specs, by_row),
    out_specs=PartitionSpec('tensor' if parted else None, split),
    check_vma=False,
  )(x_RxTxD, choice, kernels, keys_RxT)
  return jnp.sum(out, axis=0)  # over parts of the experts' inner size


def on_own_experts(
  rows: Rows, across: int, x_MxD: t.Array, choice: tuple, kernels: Any, keys_M: Any
) -> t.Array:
  """Computes `on_device` where the axis 'expert' of so many devices splits kernels."""
  if across == 1:
    return on_device(rows, x_MxD, choice, kernels, keys_M)
  here = jax.tree.leaves(kernels)[0].shape[0]
  gather = partial(jax.lax.all_gather, axis_name='expert', tiled=True)
  x, (chosen, weight), keys = jax.tree.map(gather, (x_MxD, choice, keys_M))
  chosen = chosen.astype(jnp.int32) - here * jax.lax.axis_index('expert')
  chosen = jnp.where(chosen < here, chosen, -1)
  y = on_device(rows, x, (chosen, weight), kernels, keys, across)
  return jax.lax.psum_scatter(y, 'expert', tiled=True)


def flat(fn: Callable, x: t.Array, choice: tuple, kernels: Any, keys: Any) -> t.Array:
  """Applies a function of tokens (M, ...) to those of rows (R, T, ...)."""
  merge = lambda z: z.reshape(-1, *z.shape[2:])
  y = fn(merge(x), jax.tree.map(merge, choice), kernels, jax.tree.map(merge, keys))
  return y.reshape(*x.shape[:2], -1)


def kernel_spec(grid: Any, path: tuple, leaf: t.Array) -> PartitionSpec:
  """Returns how a layer's leaf lies while it is used: split as stored, but by fsdp."""
  name = f'/experts_{mesh.path_of(path)}'
  spec = mesh.spec_of(name, jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), grid)
  return PartitionSpec(*(None if axis == 'fsdp' else axis for axis in spec[1:]))


def is_spec(x: Any) -> bool:
  """Returns whether something is a PartitionSpec."""
  return isinstance(x, PartitionSpec)
