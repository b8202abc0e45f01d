"""Products of rows with the kernels of their groups, in the best form of a platform.

Rows are sorted by group, `sizes` says how many each group has, and rows after the last
group's belong to none: what they become is left open. A platform has three functions:

  forward   (x (Y, D), kernels (E, D, F) or OfLayer, sizes (E,)) -> (Y, F)
  backward  (dy (Y, F), kernels, sizes (E,)) -> (Y, D), the gradient of x
  outer     (x (Y, D), dy (Y, F), sizes (E,)) -> (E, D, F), that of the kernels

TPUs have a grouped kernel for `jax.lax.ragged_dot`. XLA's compilers for CPUs and GPUs
make E products of all rows of it. On CPUs a loop over tiles of rows is faster, by about
E. GPUs have Triton kernels (triton.py).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmpo_jax.types import Array

# Rows of a tile: enough for a fast matrix product, and few are lost at a group's end.
# It is constant, so that a row's result does not depend on the number of rows.
TILE = 32


class OfLayer(NamedTuple):
  """A layer's kernels in the array of all layers, from where they are read.

  A GPU would copy a slice of them in every step. Their gradient is as large as all
  layers, so it is for kernels that take none.
  """

  layers: Array  # (N, E, D, F)
  number: Array  # () int32


Kernels = Array | OfLayer


def kernel_of(kernels: Kernels, *expert: Array) -> Array:
  """Returns the kernels of a layer as one array, or that of an expert."""
  if isinstance(kernels, OfLayer):
    return kernels.layers[(kernels.number, *expert)]
  return kernels[expert] if expert else kernels


def over_tiles(sizes: Array, body: Callable, start: Array) -> Array:
  """Folds body(expert, first row, end of the expert's rows, sum) over all tiles.

  A tile holds rows of one expert, and after their end some of the next ones.
  """
  # Else JAX would make `start` before the loop over layers, on other platforms as well.
  start, sizes = jax.lax.optimization_barrier((start, sizes))
  tiles = -(-sizes // TILE)
  ends, row_ends = jnp.cumsum(tiles), jnp.cumsum(sizes)

  def step(i: Array, total: Array) -> Array:
    expert = jnp.searchsorted(ends, i, side='right')
    first = row_ends[expert] - sizes[expert] + TILE * (i - ends[expert] + tiles[expert])
    return body(expert, first, row_ends[expert], total)

  return jax.lax.fori_loop(0, ends[-1], step, start)


def tile_of(x: Array, first: Array) -> Array:
  """Returns a tile of rows that have TILE rows more than there are."""
  return jax.lax.dynamic_slice_in_dim(x, first, TILE)


def padded(x: Array) -> Array:
  """Adds TILE rows of zeros, into which the last tile may reach."""
  return jnp.pad(x, ((0, TILE), (0, 0)))


def cpu_product(x: Array, kernels: Kernels, sizes: Array, transposed: bool) -> Array:
  """Multiplies each row with its group's kernel, or with that kernel transposed."""
  rows, axis = padded(x), 1 if transposed else 0

  def body(expert: Array, first: Array, end: Array, out: Array) -> Array:
    # What a tile computes after its expert's end is overwritten: tiles are in order.
    real = (first + jnp.arange(TILE) < end)[:, None]
    dims = ((1,), (axis,)), ((), ())
    y = jax.lax.dot_general(tile_of(rows, first), kernel_of(kernels, expert), dims)
    return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(real, y, 0), first, 0)

  width = jax.tree.leaves(kernels)[0].shape[-1 - axis]
  return over_tiles(sizes, body, jnp.zeros((len(rows), width), x.dtype))[: len(x)]


def cpu_outer(x: Array, dy: Array, sizes: Array) -> Array:
  """Sums the outer products of the rows of each group, in float32."""
  rows, dys = padded(x), padded(dy)

  def body(expert: Array, first: Array, end: Array, out: Array) -> Array:
    real = (first + jnp.arange(TILE) < end)[:, None]
    dy = jnp.where(real, tile_of(dys, first), 0)
    new = jnp.matmul(tile_of(rows, first).T, dy, preferred_element_type=jnp.float32)
    return out.at[expert].add(new)

  shape = len(sizes), x.shape[1], dy.shape[1]
  return over_tiles(sizes, body, jnp.zeros(shape, jnp.float32)).astype(x.dtype)


def ragged_forward(x: Array, kernels: Kernels, sizes: Array) -> Array:
  return jax.lax.ragged_dot(x, kernel_of(kernels), sizes)


def ragged_backward(dy: Array, kernels: Kernels, sizes: Array) -> Array:
  """Returns dx of `jax.lax.ragged_dot`."""
  return jax.lax.ragged_dot(dy, jnp.swapaxes(kernel_of(kernels), 1, 2), sizes)


def ragged_outer(x: Array, dy: Array, sizes: Array) -> Array:
  """Returns the kernels' gradient of `jax.lax.ragged_dot`."""
  dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
  return jax.lax.ragged_dot_general(x, dy, sizes, dims)


def on_gpu(name: str, *args: Kernels, **options: bool) -> Array:
  """Calls a function of triton.py, imported here: few runs need it."""
  from dmpo_jax.model import triton

  return getattr(triton, name)(*args, **options)


FORWARD = dict(
  cpu=partial(cpu_product, transposed=False),
  cuda=partial(on_gpu, 'rows_dot'),
  default=ragged_forward,
)
BACKWARD = dict(
  cpu=partial(cpu_product, transposed=True),
  cuda=partial(on_gpu, 'rows_dot', transposed=True),
  default=ragged_backward,
)
OUTER = dict(cpu=cpu_outer, cuda=partial(on_gpu, 'kernels_dot'), default=ragged_outer)
# The name of the calls below in a traced program: tools/costs.py counts them by shapes.
SCOPE = 'grouped_product'


def choose(forms: dict[str, Callable], *args: Kernels) -> Array:
  """Calls the function of the platform that the program is lowered for."""
  with jax.named_scope(SCOPE):
    return jax.lax.platform_dependent(*args, **forms)


@jax.custom_vjp
def grouped(x_YxD: Array, kernels_ExDxF: Kernels, sizes_E: Array) -> Array:
  """Returns each row times the kernel of its group, (Y, F)."""
  return choose(FORWARD, x_YxD, kernels_ExDxF, sizes_E)


def grouped_forward(x: Array, kernels: Kernels, sizes: Array) -> tuple:
  return grouped(x, kernels, sizes), (x, kernels, sizes)


def grouped_backward(saved: tuple, dy: Array) -> tuple:
  x, kernels, sizes = saved
  dy = dy.astype(x.dtype)
  dx, slope = choose(BACKWARD, dy, kernels, sizes), choose(OUTER, x, dy, sizes)
  if isinstance(kernels, OfLayer):
    nothing = jnp.zeros_like(kernels.layers)
    return dx, OfLayer(nothing.at[kernels.number].set(slope), None), None  # pyright: ignore
  return dx, slope, None


grouped.defvjp(grouped_forward, grouped_backward)
