"""Kernels of a frozen base, stored in 8 or 4 bits.

qwix is imported where it is used: most runs quantize nothing and start faster.
"""

from typing import Any

import jax

from dmpo_jax import mesh
from dmpo_jax.types import Array

# Kinds of quantized kernels: qwix's type, and the inputs that share a scale.
QUANT = {'int8': ('int8', 0), 'nf4': ('nf4', 64)}  # 0 = all inputs of an output
Kernel = Any  # an array, or the qwix.QArray that `quantize` makes


def dense(kernel: Kernel, name: str = '') -> Array:
  """Returns a kernel as matmuls take it, restored if `quantize` made it.

  name: of its linear in a layer. Under a mesh its codes are then gathered along fsdp:
  XLA would restore a device's part, and gather that.
  """
  if not hasattr(kernel, 'qvalue'):
    return kernel
  import qwix

  if name and (grid := mesh.in_force()):

    def whole(path: Any, leaf: Array) -> Array:
      spec = mesh.used_spec(f'{name}/kernel/{mesh.path_of(path)}', leaf, grid)
      return jax.lax.with_sharding_constraint(leaf, spec)

    kernel = jax.tree_util.tree_map_with_path(whole, kernel)
  return qwix.dequantize(kernel)


def quantize(kernel: Array, kind: str) -> Kernel:
  """Quantizes a kernel of all layers, (N, D, F), or of all experts, (N, E, D, F).

  kind: a name in QUANT. int8 has one scale per output, nf4 one per 64 inputs of an
  output. ValueError if the number of inputs is no multiple of that.
  """
  import qwix

  qtype, tile = QUANT[kind]
  *stack, inputs, _ = range(kernel.ndim)
  size = kernel.shape[inputs]
  if tile and size % tile:
    raise ValueError(
      f'model.quantize = {kind} needs linears whose number of inputs is a '
      f'multiple of {tile}; one has {size}'
    )
  return qwix.quantize(
    kernel,
    qtype,
    channelwise_axes=(*stack, inputs + 1),
    tiled_axes={inputs: tile} if tile else None,
  )
