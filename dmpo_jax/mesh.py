"""Devices, and how arrays lie on them: one mesh, one table of rules.

Axes: 'data' replicates the weights; 'fsdp' splits them along their first large
dimension; 'tensor' splits heads and the MLP; 'expert' splits the experts of a layer,
and is there where it is larger than 1. Rows are split over all of them but 'tensor'.
RULES is ordered: the first match decides. A leaf that matches none is an error,
so nothing is replicated by accident.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dmpo_jax.types import Array

P = PartitionSpec
AXES = ('data', 'fsdp', 'tensor')

# (regex on a leaf's path, spec). One line serves a parameter, its adapter and its
# optimizer moments. Layers are stacked on a leading axis, then the experts of a layer.
# Every device has a router whole, so that no mesh changes how its scores are summed.
RULES = (
  (r'(^|/)(embedding|head)$', P('tensor', 'fsdp')),
  # A quantized kernel has two parts; its scales lie along the same axes.
  (r'/(q|k|v|(shared_)?(gate|up))/kernel(/qvalue|/scale)?$', P(None, 'fsdp', 'tensor')),
  (r'/(o|(shared_)?down)/kernel(/qvalue|/scale)?$', P(None, 'tensor', 'fsdp')),
  (r'/(q|k|v|gate|up)/bias$', P(None, 'tensor')),
  (r'/(q|k|v|(shared_)?(gate|up))/a$', P(None, 'fsdp', None)),
  (r'/(q|k|v|(shared_)?(gate|up))/b$', P(None, None, 'tensor')),
  (r'/(o|(shared_)?down)/a$', P(None, 'tensor', None)),
  (r'/(o|(shared_)?down)/b$', P(None, None, 'fsdp')),
  (r'/experts_(gate|up)/kernel(/qvalue|/scale)?$', P(None, 'expert', 'fsdp', 'tensor')),
  (r'/experts_down/kernel(/qvalue|/scale)?$', P(None, 'expert', 'tensor', 'fsdp')),
  (r'/experts_(gate|up)/a$', P(None, 'expert', 'fsdp', None)),
  (r'/experts_(gate|up)/b$', P(None, 'expert', None, 'tensor')),
  (r'/experts_down/a$', P(None, 'expert', 'tensor', None)),
  (r'/experts_down/b$', P(None, 'expert', None, 'fsdp')),
  (r'/router/(kernel|bias)$', P()),
  (r'(^|/)(scale|count|step)$', P()),
  (r'(^|/)control/\w+$', P()),  # a few numbers of the sampler's controller
)


@functools.cache
def warn_once(message: str) -> None:
  """Logs a warning the first time that a process gives this message."""
  logging.warning('%s', message)


def make_mesh(
  data: int = 0,
  fsdp: int = 1,
  tensor: int = 1,
  devices: Sequence[Any] | None = None,
  expert: int = 1,
) -> Mesh:
  """Makes a mesh over all devices; data = 0 takes what the others leave.

  `devices` may be those of a topology that is not here. ValueError if the product
  is not the number of devices.
  """
  devices = devices or jax.devices()
  count = len(devices)
  data = data or count // (fsdp * tensor * expert)
  if data * fsdp * tensor * expert != count:
    raise ValueError(
      f'mesh.data * mesh.fsdp * mesh.tensor * mesh.expert = {data} * {fsdp} * {tensor} '
      f'* {expert} must equal the {count} devices'
    )
  shape, axes = (data, fsdp, tensor), AXES
  if expert > 1:
    shape, axes = (data, fsdp, expert, tensor), (*AXES[:2], 'expert', AXES[2])
  placed = arrange(shape, devices)
  return Mesh(placed, axes, axis_types=(AxisType.Auto,) * len(axes))


def arrange(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
  """Returns devices as an array in which neighbours are close.

  An axis may be a part of a physical axis of a TPU slice, so any shape is possible.
  """
  if len({getattr(device, 'slice_index', 0) for device in devices}) > 1:
    raise ValueError('the devices are of several TPU slices: use one slice')
  return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def path_of(path: Sequence[Any]) -> str:
  """Writes a path of jax.tree_util as text: params/layers/q/kernel."""
  return '/'.join(str(getattr(p, 'key', getattr(p, 'name', p))) for p in path)


def spec_of(path: str, leaf: Any, mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """Returns the spec of the first rule that matches a leaf's path.

  An axis of the mesh that does not divide its dimension is left out, with a
  warning. ValueError if no rule matches.
  """
  for pattern, spec in RULES:
    if re.search(pattern, path):
      parts = [axis if axis in mesh.shape else None for axis in spec]
      parts = parts[: len(leaf.shape)]
      for i, axis in enumerate(parts):
        if axis and leaf.shape[i] % mesh.shape[axis]:
          parts[i] = None
          if leaf.shape[i] == 1:  # scales of quantized kernels
            continue
          name = '/'.join(path.split('/')[-2:])  # that of its moments, too
          warn_once(
            f'{name} {leaf.shape}: mesh.{axis} = {mesh.shape[axis]} does not divide '
            f'dimension {i}, so every device of that axis holds all of it'
          )
      return P(*parts)
  raise ValueError(f'no sharding rule matches {path!r}: add one to mesh.RULES')


def used_spec(path: str, leaf: Any, mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """Returns how a layer's leaf lies in use: as it is stored, but whole along fsdp.

  A path that ends with layers or number is that of a part of grouped.OfLayer.
  """
  kernel, _, part = path.rpartition('/')
  if part == 'number':
    return P()
  whole = part == 'layers'
  shape = leaf.shape if whole else (1, *leaf.shape)
  stored = jax.ShapeDtypeStruct(shape, leaf.dtype)
  spec = spec_of(f'layers/{kernel if whole else path}', stored, mesh)
  used = [None if axis == 'fsdp' else axis for axis in spec]
  return P(*(used if whole else used[1:]))


def shardings(tree: Any, mesh: Mesh) -> Any:
  """Returns NamedShardings for a tree of arrays or shapes, by RULES."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(mesh, spec_of(path_of(path), leaf, mesh)), tree
  )


def gathered(tree: Any, mesh: Mesh) -> Any:
  """Returns parameters that each device of the fsdp axis holds whole; only in a jit.

  XLA gathers what is split at every use. Called before a loop, this gathers once, and
  keeps quantized kernels as they are stored.
  """

  def of_leaf(path: Sequence[Any], leaf: Any) -> Any:
    spec = spec_of(path_of(path), leaf, mesh)
    whole = P(*(None if axis == 'fsdp' else axis for axis in spec))
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, whole))

  return jax.tree_util.tree_map_with_path(of_leaf, tree)


def row_axes(mesh: Any) -> tuple[str, ...]:
  """Returns the axes of a mesh over which rows are split."""
  return tuple(axis for axis in mesh.axis_names if axis != 'tensor')


def in_force() -> Any:
  """Returns the mesh under which a function is traced; None without one of AXES."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh if 'fsdp' in mesh.axis_names else None


def rows(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose first axis is rows."""
  return NamedSharding(mesh, P(row_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that every device holds whole."""
  return NamedSharding(mesh, P())


def put(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
  """Makes a global array of a host array that every process holds whole."""
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])


def fetch(tree: Any) -> Any:
  """Returns a tree of global arrays as whole host arrays, on every process."""
  if jax.process_count() == 1:
    return jax.device_get(tree)

  def fetch_leaf(x: Any) -> np.ndarray:
    split = isinstance(x, jax.Array) and not (
      x.is_fully_addressable or x.is_fully_replicated
    )
    return multihost_utils.process_allgather(x, tiled=True) if split else np.asarray(x)

  return jax.tree.map(fetch_leaf, tree)


# --- many processes: one of them reads the text of a row


def my_rows(x_Rx: Array) -> np.ndarray:
  """Returns the numbers of the rows of a global array that this process reads.

  Those are the rows of its devices. Where devices of several processes hold a row
  (along the tensor axis), the first of them reads it.
  """
  count, first = x_Rx.shape[0], {}
  if jax.process_count() == 1:
    return np.arange(count)
  for device, at in x_Rx.sharding.devices_indices_map(x_Rx.shape).items():
    first.setdefault(at[0].indices(count)[:2], device)
  mine = [
    np.arange(*at)
    for at, device in sorted(first.items())
    if device.process_index == jax.process_index()
  ]
  return np.concatenate([np.arange(0), *mine])


def gather(value: Any) -> list[Any]:
  """Returns the JSON-able values of all processes, the same list on each."""
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(
    json.dumps(value, default=lambda number: number.item()).encode(), np.uint8
  )
  sizes = multihost_utils.process_allgather(np.int32(len(text)))
  # Round the size up to a power of two, for each size is a program.
  padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
  padded[: len(text)] = text
  return [
    json.loads(part[:size].tobytes())
    for part, size in zip(multihost_utils.process_allgather(padded), sizes, strict=True)
  ]


def agree(flag: object) -> bool:
  """Returns whether `flag` is true on any process; all wait until all have asked."""
  if jax.process_count() == 1:
    return bool(flag)
  return bool(multihost_utils.process_allgather(np.bool_(bool(flag))).any())


# --- pieces of rows


def split_rows(x: Array, microbatches: int) -> Array:
  """Cuts (R, ...) into (M, R/M, ...), striped so that devices keep their rows."""
  x = x.reshape((-1, microbatches) + x.shape[1:])
  return jnp.swapaxes(x, 0, 1)


def join_rows(x: Array) -> Array:
  """Inverts `split_rows`."""
  x = jnp.swapaxes(x, 0, 1)
  return x.reshape((-1,) + x.shape[2:])


def in_microbatches(fn: Callable, rows: Any, microbatches: int) -> Any:
  """Applies fn to the rows of a pytree, one microbatch after the other."""
  if microbatches == 1:
    return fn(rows)
  parts = jax.tree.map(lambda x: split_rows(x, microbatches), rows)
  return jax.tree.map(join_rows, jax.lax.map(fn, parts))


def row_shards(mesh: Any = None) -> int:
  """Returns among how many devices rows are split; mesh: by default that in force."""
  mesh = mesh or in_force()
  return math.prod(mesh.shape[axis] for axis in row_axes(mesh)) if mesh else 1
