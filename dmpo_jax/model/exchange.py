"""How the tokens of a layer reach their experts, on one device and across a mesh.

A device sorts its tokens' choices by expert. Where the mesh splits the experts (its
axis 'expert'), the devices of that axis first gather each other's tokens. Each computes
the choices of its own experts, and a reduce-scatter brings the sums back. So shapes are
static, no token is dropped, and no kernel of an expert travels. An all-to-all of static
shape would be padded to as many bytes, for one device may have all the experts of all
tokens. With M tokens on each of n devices of the axis, a device receives (n - 1) M
tokens and as many float32 sums. An all-to-all without padding sends each of k choices,
k M (n - 1) / n: more where n < k.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dmpo_jax import mesh
from dmpo_jax import types as t

# The scope of the loop over pieces. Unless the load is uneven one piece has rows, and
# tools/costs.py counts one.
PIECES = 'expert_pieces'
PIECE = 1.25  # rows of a piece, as a share of what a device computes on average

# (x_MxD, (chosen_Mxk, weights_Mxk), stacks, keys_M, pieces) -> (M, D) float32: the
# weighted sums over each token's choices. Ids outside the stacks' experts add nothing.
Compute = Callable[..., t.Array]


def routed(
  compute: Compute, x_RxTxD: t.FloatRTD, choice: Any, stacks: Any, keys_RxT: Any = None
) -> t.Array:
  """Returns each token's weighted sum over its chosen experts, (R, T, D) float32.

  choice: chosen and weights, (R, T, k). stacks: arrays with the experts in front, at
  the paths that they have as parameters. Under a mesh each device takes the tokens of
  its own rows.
  """
  grid = mesh.in_force()
  if grid is None or x_RxTxD.shape[0] % mesh.row_shards(grid):
    return of_tokens(compute, x_RxTxD, choice, stacks, keys_RxT)
  split = mesh.row_axes(grid)
  specs = jax.tree_util.tree_map_with_path(
    lambda path, leaf: mesh.used_spec(mesh.path_of(path), leaf, grid), stacks
  )
  leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
  parted = 'tensor' if any('tensor' in spec for spec in leaves) else None
  local = compute
  if 'expert' in split:
    local = partial(on_own_experts, compute, grid.shape['expert'])

  def of_device(*args: Any) -> t.Array:
    return of_tokens(local, *args)[None]

  by_row = PartitionSpec(split)
  parts = jax.shard_map(
    of_device,
    mesh=grid,
    in_specs=(by_row, by_row, specs, by_row),
    out_specs=PartitionSpec(parted, split),
    check_vma=False,
  )(x_RxTxD, choice, stacks, keys_RxT)
  return jnp.sum(parts, axis=0)  # over the parts of the experts' inner size


def on_own_rows(fn: Callable, x_Rx: t.Array) -> t.Array:
  """Applies fn where each device has its own rows: XLA gathers them all for a top_k."""
  grid = mesh.in_force()
  if grid is None or x_Rx.shape[0] % mesh.row_shards(grid):
    return fn(x_Rx)
  by_row = PartitionSpec(mesh.row_axes(grid))
  return jax.shard_map(
    fn, mesh=grid, in_specs=by_row, out_specs=by_row, check_vma=False
  )(x_Rx)


def on_own_experts(
  compute: Compute, count: int, x: t.Array, choice: Any, stacks: Any, keys: Any
) -> t.Array:
  """Computes M tokens of each of `count` devices, which have the stacks' parts."""
  here = jax.tree.leaves(stacks)[0].shape[-3]
  gather = partial(jax.lax.all_gather, axis_name='expert', tiled=True)
  x, (chosen, weights), keys = jax.tree.map(gather, (x, choice, keys))
  chosen = chosen.astype(jnp.int32) - here * jax.lax.axis_index('expert')
  y = compute(x, (chosen, weights), stacks, keys, count)
  return jax.lax.psum_scatter(y, 'expert', tiled=True)


def of_tokens(
  compute: Compute, x: t.Array, choice: Any, stacks: Any, keys: Any
) -> t.Array:
  """Applies a function of tokens (M, ...) to those of rows (R, T, ...)."""
  merge = partial(jax.tree.map, lambda z: z.reshape(-1, *z.shape[2:]))
  y = compute(merge(x), merge(choice), stacks, merge(keys))
  return y.reshape(*x.shape[:2], -1)


# --- sorted choices


class Sorted(NamedTuple):
  """The choices of M tokens, sorted by expert."""

  order: t.Array  # (Q,) the number of a choice, token * k + j, by its place
  place: t.Array  # (M, k) the place of a choice; outside [0, Q): it is not here
  sizes: t.Array  # (E,) choices of each expert; those after them are nobody's


def by_expert(chosen_Mxk: t.Array, experts: int) -> Sorted:
  """Sorts choices by expert; those of ids outside [0, experts) are nobody's."""
  here = (chosen_Mxk >= 0) & (chosen_Mxk < experts)
  flat = jnp.where(here, chosen_Mxk, experts).ravel().astype(jnp.int32)
  order = jnp.argsort(flat, stable=True).astype(jnp.int32)
  place = jnp.argsort(order).astype(jnp.int32).reshape(chosen_Mxk.shape)
  ends = jnp.searchsorted(flat[order], jnp.arange(experts), side='right')
  sizes = jnp.diff(ends, prepend=0).astype(jnp.int32)
  return Sorted(order, jnp.where(here, place, order.size), sizes)


def piece_of(whole: Sorted, start: t.Array, size: int) -> Sorted:
  """Returns the choices at places start, ..., start + size - 1."""
  order = jax.lax.dynamic_slice_in_dim(whole.order, start, size)
  cut = jnp.clip(jnp.cumsum(whole.sizes) - start, 0, size)
  place = whole.place - start
  inside = (place >= 0) & (place < size)
  return Sorted(order, jnp.where(inside, place, size), jnp.diff(cut, prepend=0))


# `dispatch` and `combine` only gather, in both directions: each place is one choice's.
# JAX's own transpose of a gather would add rows up, in no certain order on a GPU.


@jax.custom_vjp
def dispatch(x_MxD: t.Array, at: Sorted) -> t.Array:
  """Returns each choice's token, (Q, D)."""
  return x_MxD[at.order // at.place.shape[1]]


@jax.custom_vjp
def combine(y_QxD: t.Array, weights_Mxk: t.Array, at: Sorted) -> t.Array:
  """Returns the weighted sums over each token's choices here, (M, D) float32."""
  parts = (
    taken(y_QxD, at.place[:, j]).astype(jnp.float32) * weights_Mxk[:, j : j + 1]
    for j in range(weights_Mxk.shape[1])
  )
  return sum(parts, jnp.float32(0))


def taken(x_Qx: t.Array, place: t.Array) -> t.Array:
  """Returns what is at places of x, and zeros for places behind it."""
  return jnp.take(x_Qx, place, axis=0, mode='fill', fill_value=0)


def dispatch_backward(at: Sorted, dx_QxD: t.Array) -> tuple:
  ones = jnp.ones(at.place.shape, jnp.float32)
  return combine(dx_QxD, ones, at).astype(dx_QxD.dtype), None


def combine_backward(saved: tuple, dsum_MxD: t.Array) -> tuple:
  y_QxD, weights_Mxk, at = saved
  dy = dispatch(dsum_MxD, at)
  weights = weights_Mxk.ravel()[at.order][:, None]
  dweights = taken(jnp.sum(dy * y_QxD.astype(jnp.float32), axis=1), at.place)
  return (dy * weights).astype(y_QxD.dtype), dweights.astype(weights_Mxk.dtype), None


dispatch.defvjp(lambda x, at: (dispatch(x, at), at), dispatch_backward)
combine.defvjp(lambda y, w, at: (combine(y, w, at), (y, w, at)), combine_backward)


def compute_sorted(
  rows: Callable, x: t.Array, choice: Any, stacks: Any, keys: Any, pieces: int = 1
) -> t.Array:
  """Is a `Compute` of experts that read sorted rows.

  rows: (rows of choices (Q, D), sizes (E,), stacks, keys (Q,)) -> (Q, D). pieces > 1:
  on average this share of the choices is here. They are computed in pieces of PIECE of
  it, and a piece without any is skipped: an uneven load takes time, not memory.
  """
  chosen, weights = choice
  tokens, k = chosen.shape
  experts = jax.tree.leaves(stacks)[0].shape[-3]
  whole = by_expert(chosen, experts)
  most, total = tokens * min(k, experts), jnp.sum(whole.sizes)
  size = most if pieces == 1 else min(most, int(-(-PIECE * tokens * k // pieces)))

  def piece(start: t.Array, x: t.Array, weights: t.Array, stacks: Any) -> t.Array:
    at = piece_of(whole, start, size)
    own = None if keys is None else keys[at.order // k]
    return combine(rows(dispatch(x, at), at.sizes, stacks, own), weights, at)

  if size == most:
    whole = whole._replace(order=whole.order[:most])
    return piece(jnp.int32(0), x, weights, stacks)
  whole = whole._replace(order=jnp.pad(whole.order[:most], (0, -most % size)))
  nothing = jnp.zeros((tokens, x.shape[1]), jnp.float32)

  @partial(jax.checkpoint, prevent_cse=False)
  def add(start: t.Array, *args: Any) -> t.Array:
    return jax.lax.cond(start < total, piece, lambda *_: nothing, start, *args)

  def step(sums_MxD: t.Array, start: t.Array) -> tuple[t.Array, None]:
    return sums_MxD + add(start, x, weights, stacks), None

  with jax.named_scope(PIECES):
    return jax.lax.scan(step, nothing, jnp.arange(0, most, size, dtype=jnp.int32))[0]
