"""Reads Hugging Face directories of LLaDA, Dream, Qwen3 kin, and PEFT adapters.

All that is wrong with a directory is said in one error, before any weight is
read. Then each device's slices of each tensor are read, transposed and stacked:
no host and no device ever holds the whole model.
"""

import contextlib
import difflib
import glob
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes  # noqa: F401  safetensors returns bfloat16 by its dtypes
import numpy as np
from jax.sharding import Mesh, Sharding
from safetensors import SafetensorError, safe_open

from dmpo_jax import mesh, model
from dmpo_jax.hf import families
from dmpo_jax.hf.families import FAMILIES, INDEX, Entry, Family
from dmpo_jax.types import Params

SMALL = ('*.json', '*.jinja', '*.txt', '*.model', '*.py')  # all but the weights
# Usual names, where neither config.json nor tokenizer_config.json has the token.
MASK_TOKENS = ('<|mdm_mask|>', '<|mask|>', '<|MASK|>', '[MASK]', '<mask>')


def load_hf(
  path: str, dtype: str = 'float32', mesh: Mesh | None = None, **settings: Any
) -> tuple[model.ModelConfig, Params]:
  """Reads (ModelConfig, {'params': ...}) of a directory or a hub name.

  dtype: of the arrays and of the matmuls. mesh: shards them by mesh.RULES; None
  puts all on one device. settings: further ModelConfig fields. ValueError lists
  everything missing, unexpected, of another shape or unknown.
  """
  folder = locate(path)
  fields = {'dtype': dtype, **read_config(folder), **settings, 'param_dtype': dtype}
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


def complain(where: str, problems: list[str]) -> None:
  """Raises one ValueError for all problems, if there are any."""
  if len(problems) > 12:
    problems = [*problems[:12], f'and {len(problems) - 12} more']
  if problems:
    raise ValueError(f'{where}: ' + '; '.join(problems))


# --- config.json


def read_json(folder: str, name: str) -> dict[str, Any]:
  """Reads a JSON file of the directory; {} if there is none."""
  path = os.path.join(folder, name)
  if not os.path.exists(path):
    return {}
  with open(path) as f:
    try:
      return json.load(f)
    except ValueError as error:
      raise ValueError(f'{path} is no valid JSON: {error}') from None


def family_of(folder: str) -> tuple[Family, dict[str, Any], dict[str, Any]]:
  """Returns a directory's Family, the fields that its type implies, config.json."""
  raw = read_json(folder, 'config.json')
  if not raw:
    raise ValueError(f'{folder} has no config.json: it is no Hugging Face checkpoint')
  kind = raw.get('model_type')
  if kind not in FAMILIES:
    close = difflib.get_close_matches(str(kind), list(FAMILIES), 1)
    raise ValueError(
      f'{folder}/config.json: model_type = {kind!r} is none of '
      f'{", ".join(FAMILIES)}' + (f'; did you mean {close[0]!r}?' if close else '')
    )
  return *FAMILIES[kind][:2], raw


def read_config(folder: str) -> dict[str, Any]:
  """Returns ModelConfig fields from config.json and the tokenizer's files.

  ValueError lists every field that is missing, has a value that is not
  implemented, or is unknown and may change the law. A warning names unknown
  fields that cannot: those that are null or false, and SERVING switches.
  """
  family, implied, raw = family_of(folder)
  raw = without_nesting(raw)
  fields = {
    ours: raw[theirs]
    for theirs, ours in family.fields.items()
    if raw.get(theirs) is not None
  }
  if 'vocab' not in fields and raw.get('vocab_size'):
    fields['vocab'] = raw['vocab_size']
  fields |= implied | {
    n: float(fields[n]) for n in ('rope_theta', 'eps') if n in fields
  }
  fields.setdefault('kv_heads', fields.get('heads'))
  ignored = []
  if raw['model_type'] == 'sdar':
    if 'block_size' not in raw:
      ignored.append('block_size is missing, so 4 is assumed')
    fields['block_causal'] = raw.pop('block_size', 4)
  problems = [
    f'{theirs} is missing'
    for theirs, ours in family.fields.items()
    if ours in ('width', 'layers', 'heads', 'mlp', 'vocab') and ours not in fields
  ]
  for name, value in raw.items():
    if name in family.fixed:
      if value not in family.fixed[name]:
        problems.append(
          f'{name} = {value!r}: only {family.fixed[name][0]!r} is implemented'
        )
    elif name not in family.fields and not families.HARMLESS.fullmatch(name):
      off = value is None or value is False or families.SERVING.fullmatch(name)
      where, what = (ignored, 'ignored') if off else (problems, 'an unknown field')
      where.append(f'{name} = {value!r} is {what}')
  ids, wrong = special_ids(folder, raw, fields.get('vocab') or 0)
  complain(f'{folder}/config.json', problems + wrong)
  if ignored:
    mesh.warn_once(f'{folder}/config.json: ' + '; '.join(ignored))
  return {**fields, **ids}


def without_nesting(raw: dict[str, Any]) -> dict[str, Any]:
  """Moves transformers 5's nested fields of config.json to the top."""
  raw = dict(raw)
  rope = raw.pop('rope_parameters', None) or {}
  if rope.get('rope_type', 'default') != 'default':
    raw['rope_scaling'] = rope
  if 'rope_theta' in rope:
    raw['rope_theta'] = rope['rope_theta']
  if set(raw.get('layer_types') or []) <= {'full_attention'}:
    raw.pop('layer_types', None)
  if (raw.get('rope_scaling') or {}).get('rope_type') == 'default':
    raw['rope_scaling'] = None
  return raw


def special_ids(
  folder: str, raw: dict[str, Any], vocab: int
) -> tuple[dict[str, int | None], list[str]]:
  """Returns {mask_id, eos_id, pad_id} and what is wrong with them.

  An id comes from config.json, else from the token that tokenizer_config.json
  names, else (the mask) from the usual names among the added tokens.
  """
  told = read_json(folder, 'tokenizer_config.json')
  listed = read_json(folder, 'tokenizer.json').get('added_tokens', [])
  added = {t['content']: t['id'] for t in listed}
  added |= {
    t['content']: int(i) for i, t in told.get('added_tokens_decoder', {}).items()
  }
  ids, problems = {}, []
  for name in ('mask', 'eos', 'pad'):
    value = raw.get(f'{name}_token_id')
    value = value[0] if isinstance(value, list) else value
    token = told.get(f'{name}_token')
    token = token['content'] if isinstance(token, dict) else token
    named = added.get(token)
    if name == 'mask' and None not in (value, named) and value != named:
      problems.append(
        f'mask_token_id = {value}, but tokenizer_config.json says {token!r} = {named}'
      )
    ids[f'{name}_id'] = named if value is None else value
  if ids['mask_id'] is None:
    ids['mask_id'] = next((added[t] for t in MASK_TOKENS if t in added), None)
  if ids['pad_id'] is None:
    ids['pad_id'] = ids['eos_id']
  for name, value in ids.items():
    field = f'{name[:-3]}_token_id'
    if value is None:
      problems.append(f"{field} is missing, here and in the tokenizer's files")
    elif not 0 <= value < vocab:
      problems.append(f'{field} = {value} is outside the vocabulary of {vocab}')
  if ids['mask_id'] is not None and ids['mask_id'] == ids['eos_id']:
    problems.append(f'mask_token_id = eos_token_id = {ids["mask_id"]}')
  return ids, problems


# --- tensors


def file_names(folder: str) -> list[str]:
  """Returns the names of a checkpoint's safetensors files.

  ValueError if there is none, or if the index names anything but files of this
  directory.
  """
  files = glob.glob(os.path.join(glob.escape(folder), '*.safetensors'))
  names = sorted(os.path.basename(path) for path in files)
  index = read_json(folder, INDEX).get('weight_map')
  if index:
    listed = sorted(set(map(str, index.values())))
    what = 'is no *.safetensors file of this directory'
    complain(folder, [f'{INDEX}: {f!r} {what}' for f in listed if f not in names])
    return listed
  if not names:
    raise ValueError(
      f"{folder} has no *.safetensors file (convert weights in torch's .bin "
      'format first)'
    )
  return names


@contextlib.contextmanager
def opened(folder: str, names: list[str]) -> Iterator[dict[str, Any]]:
  """Opens safetensors files: {tensor: reader of its file}.

  ValueError if one is damaged or truncated.
  """
  with contextlib.ExitStack() as stack:
    files = {}
    for name in names:
      path = os.path.join(folder, name)
      try:
        reader = stack.enter_context(safe_open(path, 'numpy'))
      except (SafetensorError, OSError) as error:
        raise ValueError(f'{path} is damaged or truncated: {error}') from None
      files |= dict.fromkeys(reader.keys(), reader)
    yield files


def read_params(
  folder: str, cfg: model.ModelConfig, grid: Mesh | None = None
) -> Params:
  """Reads {'params': ...} of a directory and checks it against cfg first."""
  tree, family = {'params': families.shapes(cfg)['params']}, family_of(folder)[0]
  wanted = list(families.entries(tree, family, cfg.layers))
  return read_tree(folder, file_names(folder), tree, wanted, grid)


def read_tree(
  folder: str, names: list[str], tree: dict, wanted: list[Entry], grid: Mesh | None
) -> Params:
  """Reads the leaves of a tree from the named files, after a check of all of them."""
  with opened(folder, names) as files:
    complain(folder, tensor_problems(wanted, files))
    get_slice = lambda name: files[name].get_slice(name)
    leaves = [read_leaf(entry, get_slice, sharding_of(entry, grid)) for entry in wanted]
  return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def tensor_problems(wanted: list[Entry], files: dict[str, Any]) -> list[str]:
  """Lists all tensors that are missing, unexpected or of another shape."""
  problems, known = [], set()
  for entry in wanted:
    shape = entry.leaf.shape[entry.stacked :]
    shape = shape[::-1] if entry.transposed else shape
    known.update(entry.names)
    for name in entry.names:
      if name not in files:
        problems.append(f'{name} is missing')
        continue
      found = tuple(files[name].get_slice(name).get_shape())
      if found != shape:
        problems.append(f'{name} is {found}, but config.json means {shape}')
  # Tied checkpoints may hold the head all the same; buffers are no weights.
  spare = ('lm_head.weight', 'model.transformer.ff_out.weight')
  return problems + [
    f'{name} is unexpected'
    for name in sorted(set(files) - known)
    if name not in spare and not name.endswith('rotary_emb.inv_freq')
  ]


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


def read_part(
  entry: Entry, get_slice: Callable[[str], Any], at: tuple[slice, ...]
) -> np.ndarray:
  """Reads one device's slice of a leaf, as a host array of the leaf's dtype."""
  bounds = [s.indices(n)[:2] for s, n in zip(at, entry.leaf.shape, strict=True)]
  inner = tuple(slice(*b) for b in bounds[entry.stacked :])
  inner = inner[::-1] if entry.transposed else inner
  out = np.empty([stop - start for start, stop in bounds], entry.leaf.dtype)
  names = entry.names[slice(*bounds[0])] if entry.stacked else entry.names
  for name, part in zip(names, out if entry.stacked else [out], strict=True):
    x = get_slice(name)[inner]
    part[...] = x.T if entry.transposed else x
  return out


# --- PEFT adapters

# Fields of adapter_config.json, with the only value that is implemented.
PEFT_FIXED = dict(
  peft_type='LORA',
  bias='none',
  use_dora=False,
  use_rslora=False,
  modules_to_save=None,
  rank_pattern={},
  alpha_pattern={},
  fan_in_fan_out=False,
)
# Values of init_lora_weights that leave the base alone.
PEFT_INIT = (True, False, None, 'gaussian', 'orthogonal', 'eva')


def read_adapter(
  path: str, cfg: model.ModelConfig, folder: str = '', grid: Mesh | None = None
) -> Params:
  """Reads {'lora': ...} of a PEFT directory, float32; `folder` is its base's.

  ValueError if its kind, rank, scale, targets or base differ from cfg.
  """
  told = read_json(path, 'adapter_config.json')
  if not told:
    raise ValueError(
      f'lora.path = {path!r} has no adapter_config.json: it is no PEFT adapter'
    )
  complain(f'{path}/adapter_config.json', adapter_problems(told, cfg))
  family = family_of(folder)[0] if folder else FAMILIES[families.kind_of(cfg)][0]
  tree = {'lora': families.shapes(cfg)['lora']}
  wanted = list(families.entries(tree, family, cfg.layers))
  try:
    return read_tree(path, ['adapter_model.safetensors'], tree, wanted, grid)
  except ValueError as error:
    raise ValueError(
      f'{error} (lora.targets = {cfg.lora_targets!r}; the adapter was made for '
      f'{told.get("base_model_name_or_path")!r}, targets '
      f'{told.get("target_modules")!r})'
    ) from None


def adapter_problems(told: dict[str, Any], cfg: model.ModelConfig) -> list[str]:
  """Lists where adapter_config.json differs from cfg and what is implemented."""
  problems = [
    f'{name} = {told[name]!r}: only {plain!r} is implemented'
    for name, plain in PEFT_FIXED.items()
    if told.get(name, plain) not in (plain, None, {}, [])
  ]
  start = told.get('init_lora_weights')
  if start not in PEFT_INIT:
    problems.append(
      f'init_lora_weights = {start!r} may change the base too: only '
      f'{", ".join(map(str, PEFT_INIT))} are implemented'
    )
  for field, name, value in (
    ('rank', 'r', cfg.lora_rank),
    ('alpha', 'lora_alpha', cfg.lora_alpha),
  ):
    if told.get(name) != value:
      problems.append(f'{name} = {told.get(name)}, but lora.{field} = {value}')
  return problems
