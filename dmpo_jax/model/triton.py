"""The functions of grouped.py for GPUs, as Triton kernels.

On a GPU XLA's `ragged_dot` copies the rows once for each group and multiplies all of
them. Here each program of the grid computes one tile of one group's rows, and kernels
are read in place. Rows after the last group's are not written.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dmpo_jax.model.grouped import Kernels, OfLayer
from dmpo_jax.types import Array

ROWS, COLUMNS, INNER = 64, 128, 64  # of a tile
PARAMETERS = triton.CompilerParams(num_warps=4, num_stages=3)


def tiles(sizes_E: Array, rows: int) -> tuple[Array, Array, Array]:
  """Returns group, first row and end of each tile of the grid; a spare one is empty."""
  count = -(-rows // ROWS) + sizes_E.shape[0]
  ends, laps = jnp.cumsum(sizes_E), jnp.cumsum(-(-sizes_E // ROWS))
  i = jnp.arange(count, dtype=jnp.int32)
  group = jnp.searchsorted(laps, i, side='right').astype(jnp.int32)
  safe = jnp.minimum(group, sizes_E.shape[0] - 1)
  before = laps[safe] - -(-sizes_E[safe] // ROWS)
  first = ends[safe] - sizes_E[safe] + (i - before) * ROWS
  end = jnp.where(group == safe, jnp.minimum(first + ROWS, ends[safe]), first)
  return safe, first.astype(jnp.int32), end.astype(jnp.int32)


def rows_dot(
  x: Array,
  kernels: Kernels,
  sizes: Array,
  transposed: bool = False,
  interpret: bool = False,
) -> Array:
  """Multiplies rows with their groups' kernels, or with the transposed kernels."""
  if not isinstance(kernels, OfLayer):
    kernels = OfLayer(kernels[None], jnp.int32(0))
  rows, inner = x.shape
  features = kernels.layers.shape[2 if transposed else 3]
  where = *tiles(sizes, rows), kernels.number.reshape(1)

  def program(x: Any, kernel: Any, *refs: Any) -> None:
    group, first, end, layer, y = refs
    i, layer = pl.program_id(0), layer[0]
    own = first[i] + jnp.arange(ROWS)
    column = pl.program_id(1) * COLUMNS + jnp.arange(COLUMNS)
    real, inside = own < end[i], column < features

    def add(lap: Array, total: Array) -> Array:
      k = lap * INNER + jnp.arange(INNER)
      seen = k < inner
      part = load(x.at[own[:, None], k[None, :]], real[:, None] & seen[None, :])
      if transposed:
        at = kernel.at[layer, group[i], column[:, None], k[None, :]]
        weight = load(at, inside[:, None] & seen[None, :]).T
      else:
        at = kernel.at[layer, group[i], k[:, None], column[None, :]]
        weight = load(at, seen[:, None] & inside[None, :])
      return total + triton.dot(part, weight)

    laps = jnp.minimum(end[i] - first[i], 1) * pl.cdiv(inner, INNER)
    total = jax.lax.fori_loop(0, laps, add, jnp.zeros((ROWS, COLUMNS), jnp.float32))
    at = y.at[own[:, None], column[None, :]]
    mask = real[:, None] & inside[None, :]
    triton.store(at, total.astype(y.dtype), mask=mask)

  grid = where[0].size, pl.cdiv(features, COLUMNS)
  shape = jax.ShapeDtypeStruct((rows, features), x.dtype)
  return call(program, grid, shape, interpret)(x, kernels.layers, *where)


def kernels_dot(x: Array, dy: Array, sizes: Array, interpret: bool = False) -> Array:
  """Returns the gradient of the kernels, (E, D, F), summed in float32."""
  ends = jnp.cumsum(sizes).astype(jnp.int32)
  inputs, features = x.shape[1], dy.shape[1]
  tile = ROWS, COLUMNS

  def program(x: Any, dy: Any, first: Any, end: Any, out: Any) -> None:
    e = pl.program_id(0)
    row = pl.program_id(1) * ROWS + jnp.arange(ROWS)
    column = pl.program_id(2) * COLUMNS + jnp.arange(COLUMNS)

    def add(lap: Array, total: Array) -> Array:
      own = first[e] + lap * INNER + jnp.arange(INNER)
      real = own < end[e]
      left = load(
        x.at[own[:, None], row[None, :]], real[:, None] & (row < inputs)[None]
      )
      right = load(
        dy.at[own[:, None], column[None, :]], real[:, None] & (column < features)[None]
      )
      return total + triton.dot(left, right, trans_a=True)

    laps = pl.cdiv(end[e] - first[e], INNER)
    total = jax.lax.fori_loop(0, laps, add, jnp.zeros(tile, jnp.float32))
    mask = (row < inputs)[:, None] & (column < features)[None, :]
    at = out.at[e, row[:, None], column[None, :]]
    triton.store(at, total.astype(x.dtype), mask=mask)

  grid = sizes.shape[0], pl.cdiv(inputs, ROWS), pl.cdiv(features, COLUMNS)
  shape = jax.ShapeDtypeStruct((sizes.shape[0], inputs, features), x.dtype)
  first = ends - sizes.astype(jnp.int32)
  return call(program, grid, shape, interpret)(x, dy, first, ends)


def load(at: Any, mask: Array) -> Array:
  """Reads a tile; what the mask hides is 0."""
  return triton.load(at, mask=mask, other=0.0)


def call(program: Any, grid: tuple, shape: Any, interpret: bool) -> Any:
  """Returns a program over a grid as a function of arrays."""
  return pl.pallas_call(
    program, grid=grid, out_shape=shape, compiler_params=PARAMETERS, interpret=interpret
  )
