"""Reads the weights of Hugging Face directories.

All that is wrong with a directory is said in one error, before any weight is
read. Then each device's slices of each tensor are read, transposed and stacked:
no host and no device ever holds the whole model.
"""

import contextlib
import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import ml_dtypes  # noqa: F401  safetensors returns bfloat16 by its dtypes
import numpy as np
from jax.sharding import Mesh, Sharding
from safetensors import SafetensorError, safe_open

from dmpo_jax import files, mesh, model
from dmpo_jax.hf import families
from dmpo_jax.hf.config import complain, family_of, read_config
from dmpo_jax.hf.families import FAMILIES, INDEX, Entry, Family
from dmpo_jax.types import Params

SMALL = ('*.json', '*.jinja', '*.txt', '*.model', '*.py')  # all but the weights
WHOLE, SHARD = 'model.safetensors', re.compile(r'model-\d+-of-\d+\.safetensors')
FLOATS = ('F64', 'F32', 'F16', 'BF16')  # element types that are read
# Tied checkpoints may hold the head all the same; buffers are no weights.
SPARE = re.compile(
  r'lm_head\.weight|model\.transformer\.ff_out\.weight|.*rotary_emb\.inv_freq'
)


def load_hf(
  path: str, dtype: str = 'float32', mesh: Mesh | None = None, **settings: Any
) -> tuple[model.ModelConfig, Params]:
  """Reads (ModelConfig, {'params': ...}) of a directory or a hub name.

  dtype: of the arrays and of the matmuls. mesh: shards them by mesh.RULES; None
  puts all on one device. settings: further ModelConfig fields. ValueError lists
  everything missing, unexpected, of another shape or unknown.
  """
  folder = locate(path)
  found = read_config(folder, settings.get('block_causal'))
  fields = {'dtype': dtype, **found, **settings, 'param_dtype': dtype}
  cfg = model.ModelConfig(**fields)
  return cfg, read_params(folder, cfg, mesh)


def locate(path: str, weights: bool = True) -> str:
  """Returns the directory of a checkpoint; downloads a hub name or finds it cached.

  weights=False downloads its small files only. ValueError if there is neither.
  """
  if os.path.isdir(path):
    return path
  if path.count('/') != 1 or path.startswith(('.', '/', '~')):
    raise ValueError(
      f"model.checkpoint = {path!r} is no directory, and no hub name ('owner/name')"
    )
  import huggingface_hub

  try:
    return huggingface_hub.snapshot_download(
      path, allow_patterns=[*SMALL, *['*.safetensors'] * weights]
    )
  except Exception as error:  # many kinds: offline, no such name, no access
    raise ValueError(
      f'model.checkpoint = {path!r} is no directory here and could not be '
      f'downloaded from the hub: {str(error).splitlines()[0]}'
    ) from error


def family_for(cfg: model.ModelConfig, folder: str) -> Family:
  """Returns the Family of a directory; of '' that as which cfg is written."""
  return family_of(folder)[0] if folder else FAMILIES[families.kind_of(cfg)][0]


def as_held(family: Family, folder: str) -> Family:
  """Returns the form of a family in which a directory's files hold the experts."""
  if not family.moe or not glob.glob(os.path.join(glob.escape(folder), '*.safe*')):
    return family
  with opened(folder, file_names(folder)) as readers:
    return families.as_held(family, readers.keys())


# --- tensors


def file_names(folder: str) -> list[str]:
  """Returns the names of a checkpoint's safetensors files.

  As in transformers these are those of the index, or else model.safetensors alone;
  a warning names the others. ValueError if there is none, if two copies of the
  model lie there, or if the index names anything but files of this directory.
  """
  paths = glob.glob(os.path.join(glob.escape(folder), '*.safetensors'))
  names = sorted(os.path.basename(path) for path in paths)
  index = files.read_object(os.path.join(folder, INDEX)).get('weight_map')
  shards = [name for name in names if SHARD.fullmatch(name)]
  if index:
    if not isinstance(index, dict):
      raise ValueError(f'{folder}/{INDEX}: weight_map must be an object')
    listed = sorted(set(map(str, index.values())))
    what = 'is no *.safetensors file of this directory'
    complain(folder, [f'{INDEX}: {f!r} {what}' for f in listed if f not in names])
  else:
    listed = [WHOLE] if WHOLE in names else shards or names
  if not listed:
    raise ValueError(
      f"{folder} has no *.safetensors file (convert weights in torch's .bin "
      'format first)'
    )
  if WHOLE in names and (WHOLE not in listed if index else shards):
    other = INDEX if index else few(shards)
    raise ValueError(
      f'{folder} has two copies of the model, {WHOLE} and {other}: remove one'
    )
  if unread := sorted(set(names) - set(listed)):
    mesh.warn_once(f'{folder}: {few(unread)} not read, only {few(listed)}')
  return listed


def few(names: Iterable[str]) -> str:
  """Returns the first names for a sentence, with the number of the others."""
  names = list(names)
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return ', '.join(names[:3]) + more


@contextlib.contextmanager
def opened(folder: str, names: list[str]) -> Iterator[dict[str, Any]]:
  """Opens safetensors files: {tensor: reader of its file}.

  ValueError if one is damaged or truncated, or if two hold the same tensor.
  """
  with contextlib.ExitStack() as stack:
    readers, owner, problems = {}, {}, []
    for name in names:
      path = os.path.join(folder, name)
      try:
        reader = stack.enter_context(safe_open(path, 'numpy'))
      except (SafetensorError, OSError) as error:
        why = files.stand_in(path) or error
        raise ValueError(f'{path} is damaged or truncated: {why}') from None
      twice = [key for key in reader.keys() if key in owner]
      if twice:
        problems.append(f'{owner[twice[0]]} and {name} both hold {few(twice)}')
      readers |= dict.fromkeys(reader.keys(), reader)
      owner |= dict.fromkeys(reader.keys(), name)
    complain(folder, problems)
    yield readers


def read_params(
  folder: str, cfg: model.ModelConfig, grid: Mesh | None = None
) -> Params:
  """Reads {'params': ...} of a directory and checks it against cfg first.

  Tokens that a conversion adds to the vocabulary get the mean of the others' rows.
  """
  tree, (family, _, raw) = {'params': families.shapes(cfg)['params']}, family_of(folder)
  names = file_names(folder)
  wanted = list(families.entries(tree, as_held(family, folder), cfg))
  added = 0
  if raw['model_type'] in families.CONVERTED:
    added = cfg.vocab - raw['vocab_size']

  def prepare(readers: dict[str, Any]) -> None:
    for entry in wanted:
      add_zeros(folder, entry, readers)
      if added and not entry.stacked and len(entry.leaf.shape) == 2:
        for name in entry.names:
          if name in readers:
            readers[name] = WithMeans(readers[name], added)

  return read_tree(folder, names, tree, wanted, grid, prepare)


def read_tree(
  folder: str,
  names: list[str],
  tree: dict,
  wanted: list[Entry],
  grid: Mesh | None,
  prepare: Callable[[dict[str, Any]], None],
) -> Params:
  """Reads the leaves of a tree from the named files, after a check of all of them.

  prepare: changes the readers before that, where the files have tensors in another way.
  """
  with opened(folder, names) as readers:
    prepare(readers)
    complain(folder, tensor_problems(wanted, readers))
    get_slice = lambda name: readers[name].get_slice(name)
    try:
      leaves = [read_leaf(e, get_slice, sharding_of(e, grid)) for e in wanted]
    except FloatingPointError as error:
      raise ValueError(f'{folder}: {error}') from None
  return jax.tree.unflatten(jax.tree.structure(tree), leaves)


class Held:
  """A tensor in memory, with the methods of a reader of a file and of its slices."""

  def __init__(self, value: np.ndarray):
    self.value = value

  def get_slice(self, name: str) -> 'Held':
    return self

  def get_shape(self) -> list[int]:
    return list(self.value.shape)

  def get_dtype(self) -> str:
    return 'F32'

  def __getitem__(self, at: tuple[slice, ...]) -> np.ndarray:
    return self.value[at]


def add_zeros(folder: str, entry: Entry, readers: dict[str, Any]) -> None:
  """Adds a router's bias of zeros where no layer has one: the classes begin with it."""
  if entry.path.endswith('router/bias') and not readers.keys() & set(entry.names):
    readers |= dict.fromkeys(entry.names, Held(np.zeros(entry.shape, np.float32)))
    mesh.warn_once(f'{folder} has no {few(entry.names)}: zeros are taken')


class WithMeans:
  """A reader of a table of tokens with `added` further rows: the mean of its own."""

  def __init__(self, reader: Any, added: int, table: Any = None):
    self.reader, self.added, self.table = reader, added, table

  def get_slice(self, name: str) -> 'WithMeans':
    return WithMeans(self.reader, self.added, self.reader.get_slice(name))

  def get_shape(self) -> list[int]:
    rows, width = self.table.get_shape()
    return [rows + self.added, width]

  def get_dtype(self) -> str:
    return self.table.get_dtype()

  def __getitem__(self, at: tuple[slice, slice]) -> np.ndarray:
    """Reads a part; sums 4096 rows at a time in float64, whatever the part."""
    rows, columns = self.table.get_shape()[0], at[1]
    start, stop, _ = at[0].indices(rows + self.added)
    own = self.table[min(start, rows) : min(stop, rows), columns]
    if stop <= rows:
      return own
    total = np.zeros(own.shape[1], np.float64)
    for first in range(0, rows, 4096):
      some = self.table[first : min(first + 4096, rows), columns]
      total += some.astype(np.float64).sum(axis=0)
    mean = (total / rows).astype(own.dtype)
    return np.concatenate([own, np.tile(mean, (stop - max(start, rows), 1))])


def tensor_problems(wanted: list[Entry], readers: dict[str, Any]) -> list[str]:
  """Lists what is wrong with the tensors of some files, without reading one.

  They are of another shape or type, missing, or unexpected. If a prefix would make
  the unexpected ones those that are missing, the last sentence says so.
  """
  problems, missing, known = [], [], set()
  for entry in wanted:
    shape = entry.shape
    known.update(entry.names)
    for name in entry.names:
      if name not in readers:
        missing.append(name)
        continue
      found = readers[name].get_slice(name)
      if tuple(found.get_shape()) != shape:
        problems.append(
          f'{name} is {tuple(found.get_shape())}, but config.json means {shape}'
        )
      elif found.get_dtype() not in FLOATS:
        problems.append(
          f'{name} is of type {found.get_dtype()}, but only {", ".join(FLOATS)} are '
          'read: dequantize the weights first'
        )
  if len(problems) > 3:
    problems = [*problems[:3], f'{len(problems) - 3} more like these']
  missing = list(dict.fromkeys(missing))  # several of our leaves may lie in one
  problems = list(dict.fromkeys(problems))
  empty = lambda n: (
    0 in readers[n].get_slice(n).get_shape()
  )  # shared experts of width 0
  others = [n for n in sorted(set(readers) - known) if not SPARE.fullmatch(n)]
  unexpected = [n for n in others if not empty(n)]
  sorts = (('missing', missing), ('unexpected', unexpected))
  problems += [f'{what}: {few(names)}' for what, names in sorts if names]
  return problems + prefix_hint(missing, unexpected)


def prefix_hint(missing: list[str], unexpected: list[str]) -> list[str]:
  """Says which prefix the unexpected names have too many, or lack."""

  def prefixes(longer, shorter):
    ends = set(shorter)
    for name in longer:
      parts = name.split('.')
      cuts = [i for i in range(1, len(parts)) if '.'.join(parts[i:]) in ends]
      yield from ['.'.join(parts[: cuts[0]]) + '.'] if cuts else []

  hints = []
  for verb, longer, shorter in (
    ("remove {!r} from the tensors' names", unexpected, missing),
    ("add {!r} before the tensors' names", missing, unexpected),
  ):
    for prefix, count in Counter(prefixes(longer, shorter)).most_common(1):
      if 2 * count > len(missing):
        hints.append(verb.format(prefix) + f' ({count} then fit)')
  return hints


def sharding_of(entry: Entry, grid: Mesh | None) -> Sharding:
  """Returns where a leaf goes: by mesh.RULES, or to one device without a mesh."""
  if grid is None:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.NamedSharding(grid, mesh.spec_of(entry.path, entry.leaf, grid))


def read_leaf(
  entry: Entry, get_slice: Callable[[str], Any], sharding: Sharding
) -> jax.Array:
  """Reads a global array; the host holds the part of one device at a time.

  A part that several devices hold is read once.
  """
  shape, parts = entry.leaf.shape, {}
  for device, at in sharding.addressable_devices_indices_map(shape).items():
    parts.setdefault(str(at), (at, []))[1].append(device)
  arrays = []
  for at, devices in parts.values():
    host = read_part(entry, get_slice, at)
    arrays += [jax.block_until_ready(jax.device_put(host, d)) for d in devices]
    del host
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def aligned(shape: list[int], dtype: Any) -> np.ndarray:
  """Returns an empty array from which JAX makes a CPU's array without a copy."""
  size = int(np.prod(shape)) * dtype.itemsize
  memory = np.empty(size + 64, np.uint8)  # XLA asks for addresses of 64 bytes
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(dtype).reshape(shape)


def read_part(
  entry: Entry, get_slice: Callable[[str], Any], at: tuple[slice, ...]
) -> np.ndarray:
  """Reads one device's slice of a leaf, as a host array of the leaf's dtype.

  Each tensor is read into its place, so there is no second copy of them.
  FloatingPointError names a tensor with a value that is not finite.
  """
  bounds = [s.indices(n)[:2] for s, n in zip(at, entry.leaf.shape, strict=True)]
  outer, inner = (
    tuple(slice(*b) for b in part)
    for part in (bounds[: entry.stacked], bounds[entry.stacked :])
  )
  inner = families.flipped(inner, entry.transposed)
  if entry.rows:
    first = entry.rows[0]
    inner = (slice(inner[0].start + first, inner[0].stop + first), *inner[1:])
  out = aligned([stop - start for start, stop in bounds], entry.leaf.dtype)
  names = np.asarray(entry.names, object).reshape(entry.leaf.shape[: entry.stacked])
  parts = out.reshape(-1, *out.shape[entry.stacked :])
  for name, part in zip(np.ravel(names[outer]), parts, strict=True):
    x = get_slice(name)[inner]
    part[...] = np.swapaxes(x, -1, -2) if entry.transposed else x
    if not np.isfinite(part).all():
      raise FloatingPointError(
        f'{name} holds NaN or infinity: convert or download the checkpoint again'
      )
  return out
