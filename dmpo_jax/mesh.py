"""Devices and who holds what: one mesh, one table of rules.

Axes: 'data' replicates weights, 'fsdp' splits them along their first large
dimension, 'tensor' splits heads and the MLP. Rows are split over the first
two. RULES is ordered; a leaf that matches none is an error, so replication is
written out.
"""

import json
import re

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

P = PartitionSpec
AXES = ('data', 'fsdp', 'tensor')
ROWS = P(('data', 'fsdp'))

# (regex on the leaf's path, spec). One line serves a parameter, its adapter
# and its optimizer moments; layers are stacked on a leading axis.
RULES = (
  (r'(^|/)(embedding|head)$', P('tensor', 'fsdp')),
  # A quantized kernel has two parts; its scales lie along the same axes.
  (r'/(q|k|v|gate|up)/kernel(/qvalue|/scale)?$', P(None, 'fsdp', 'tensor')),
  (r'/(o|down)/kernel(/qvalue|/scale)?$', P(None, 'tensor', 'fsdp')),
  (r'/(q|k|v|gate|up)/bias$', P(None, 'tensor')),
  (r'/(q|k|v|gate|up)/a$', P(None, 'fsdp', None)),
  (r'/(q|k|v|gate|up)/b$', P(None, None, 'tensor')),
  (r'/(o|down)/a$', P(None, 'tensor', None)),
  (r'/(o|down)/b$', P(None, None, 'fsdp')),
  (r'(^|/)(scale|count|step)$', P()),
)


def make_mesh(data=0, fsdp=1, tensor=1, devices=None):
  """A mesh over all devices; data = 0 takes what the others leave.

  `devices` may be those of a topology that is not here (plan). ValueError if
  the product is not the number of devices.
  """
  count = len(devices or jax.devices())
  data = data or count // (fsdp * tensor)
  if data * fsdp * tensor != count:
    raise ValueError(
      f'mesh.data * mesh.fsdp * mesh.tensor = {data} * {fsdp} * {tensor} '
      f'must equal the {count} devices'
    )
  types = (AxisType.Auto,) * 3
  return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=types, devices=devices)


def path_of(path):
  """A path of jax.tree_util as text: params/layers/q/kernel."""
  return '/'.join(str(getattr(p, 'key', getattr(p, 'name', p))) for p in path)


def spec_of(path, leaf, mesh):
  """The first rule that matches; axes that do not divide are left whole."""
  for pattern, spec in RULES:
    if re.search(pattern, path):
      parts = list(spec)[: len(leaf.shape)]
      for i, axis in enumerate(parts):
        if axis and leaf.shape[i] % mesh.shape[axis]:
          parts[i] = None
      return P(*parts)
  raise ValueError(f'no sharding rule matches {path!r}: add one to mesh.RULES')


def shardings(tree, mesh):
  """NamedShardings of a tree of arrays or shapes, by RULES."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(mesh, spec_of(path_of(path), leaf, mesh)), tree
  )


def rows(mesh):
  """How arrays lie whose first axis is rows."""
  return NamedSharding(mesh, ROWS)


def replicated(mesh):
  """How arrays lie that every device holds whole."""
  return NamedSharding(mesh, P())


def put(x, sharding):
  """A host array that every process holds whole -> a global array."""
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])


def fetch(tree):
  """A tree of global arrays -> host arrays, whole, on every process."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  split = lambda x: (
    isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
  )
  return jax.tree.map(
    lambda x: (
      multihost_utils.process_allgather(x, tiled=True) if split(x) else np.asarray(x)
    ),
    tree,
  )


# ---- many processes: every row's text is read in one of them


def my_rows(x_Rx):
  """Numbers of the rows of a global array that this process reads.

  Those of its devices; where devices of several processes hold a row (along
  the tensor axis), the first reads it.
  """
  rows, first = x_Rx.shape[0], {}
  if jax.process_count() == 1:
    return np.arange(rows)
  for device, at in x_Rx.sharding.devices_indices_map(x_Rx.shape).items():
    first.setdefault(at[0].indices(rows)[:2], device)
  return np.concatenate(
    [
      np.arange(0),
      *(
        np.arange(*at)
        for at, device in sorted(first.items())
        if device.process_index == jax.process_index()
      ),
    ]
  )


def gather(thing):
  """What each process hands in, JSON-able, as a list: the same on all."""
  if jax.process_count() == 1:
    return [thing]
  text = np.frombuffer(
    json.dumps(thing, default=lambda number: number.item()).encode(), np.uint8
  )
  sizes = multihost_utils.process_allgather(np.int32(len(text)))
  # Of few sizes, for each is a program.
  padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
  padded[: len(text)] = text
  return [
    json.loads(part[:size].tobytes())
    for part, size in zip(multihost_utils.process_allgather(padded), sizes, strict=True)
  ]


def agree(flag):
  """Whether `flag` is true on any process; nobody goes on before all ask."""
  if jax.process_count() == 1:
    return bool(flag)
  return bool(multihost_utils.process_allgather(np.bool_(bool(flag))).any())
