"""Published checkpoints: Hugging Face directories of LLaDA, Dream, Qwen3 kin.

One table per family says what its config.json and its tensors are called.
`load_hf` complains about everything that is wrong with a directory in one
error, and only then reads: each device's slices of each tensor, transposed and
stacked on the way, so that no host and no device ever holds the whole model.
"""

import contextlib
import dataclasses
import difflib
import glob
import json
import os
from typing import NamedTuple

import jax
import ml_dtypes  # noqa: F401  safetensors hands out bfloat16 through it
import numpy as np
from safetensors import SafetensorError, safe_open

from dmpo_jax import mesh, model

INDEX = 'model.safetensors.index.json'
# All but the weights; code is for who reads an export, nothing here runs it.
SMALL = ('*.json', '*.jinja', '*.txt', '*.model', '*.py')
# Where neither config.json nor tokenizer_config.json names the mask token.
MASK_TOKENS = ('<|mdm_mask|>', '<|mask|>', '<|MASK|>', '[MASK]', '<mask>')


class Family(NamedTuple):
  """How one family of checkpoints is written."""

  fields: dict  # config.json field -> ModelConfig field
  needs: tuple  # ModelConfig fields that config.json must give
  fixed: dict  # config.json field -> the values that we implement
  ignored: tuple  # config.json fields without a meaning here
  tensors: dict  # our name -> theirs
  layer: str  # prefix of a layer's tensors
  layers: dict  # our name in a layer -> theirs


SIZES = ('width', 'layers', 'heads', 'mlp', 'vocab')
ANY = (  # what transformers writes into every config.json
  'architectures',
  'auto_map',
  'model_type',
  'torch_dtype',
  'dtype',
  'transformers_version',
  '_name_or_path',
  '_attn_implementation',
  'attn_implementation',
  'use_cache',
  'initializer_range',
  'bos_token_id',
  'eos_token_id',
  'pad_token_id',
  'mask_token_id',
  'attention_dropout',
  'unsloth_version',
  'id2label',
  'label2id',
  'return_dict',
  'output_attentions',
  'output_hidden_states',
)
LLADA = Family(
  fields=dict(
    d_model='width',
    n_layers='layers',
    n_heads='heads',
    n_kv_heads='kv_heads',
    mlp_hidden_size='mlp',
    embedding_size='vocab',
    rope_theta='rope_theta',
    rms_norm_eps='eps',
    weight_tying='tied',
    max_sequence_length='positions',
    include_qkv_bias='qkv_bias',
  ),
  needs=SIZES,
  fixed=dict(
    activation_type=('silu', 'swiglu'),
    alibi=(False,),
    attention_layer_norm=(False,),
    bias_for_layer_norm=(False, None),
    block_type=('llama',),
    include_bias=(False,),
    input_emb_norm=(False,),
    layer_norm_type=('rms',),
    layer_norm_with_affine=(True,),
    multi_query_attention=(None, False),
    rope=(True,),
    scale_logits=(False,),
    clip_qkv=(None,),
    quantization_config=(None,),
  ),
  ignored=(
    'alibi_bias_max',
    'attention_layer_norm_with_affine',
    'block_group_size',
    'embedding_dropout',
    'flash_attention',
    'init_cutoff_factor',
    'init_device',
    'init_fn',
    'init_std',
    'mlp_ratio',
    'precision',
    'residual_dropout',
    'rope_full_precision',
    'vocab_size',
    'emb_init_std',
    'flex_attention',
  ),
  tensors=dict(
    embedding='model.transformer.wte.weight',
    final_norm='model.transformer.ln_f.weight',
    head='model.transformer.ff_out.weight',
  ),
  layer='model.transformer.blocks.{}.',
  layers=dict(
    q='q_proj',
    k='k_proj',
    v='v_proj',
    o='attn_out',
    gate='ff_proj',
    up='up_proj',
    down='ff_out',
    attn_norm='attn_norm',
    mlp_norm='ff_norm',
  ),
)
QWEN = Family(
  fields=dict(
    hidden_size='width',
    num_hidden_layers='layers',
    num_attention_heads='heads',
    num_key_value_heads='kv_heads',
    head_dim='head_dim',
    intermediate_size='mlp',
    vocab_size='vocab',
    rms_norm_eps='eps',
    tie_word_embeddings='tied',
    max_position_embeddings='positions',
    rope_theta='rope_theta',
  ),
  needs=SIZES,
  fixed=dict(
    hidden_act=('silu',),
    attention_bias=(False,),
    mlp_bias=(False,),
    rope_scaling=(None,),
    use_sliding_window=(False,),
    use_mrope=(False,),
    pretraining_tp=(1,),
    quantization_config=(None,),
  ),
  ignored=(
    'sliding_window',
    'max_window_layers',
    'full_attn_mask',
    'is_causal',
    'fuse_cross_entropy',
    'debug',
    'ep_size',
    'micro_forward',
    'skip_checkpoint',
  ),
  tensors=dict(
    embedding='model.embed_tokens.weight',
    final_norm='model.norm.weight',
    head='lm_head.weight',
  ),
  layer='model.layers.{}.',
  layers=dict(
    q='self_attn.q_proj',
    k='self_attn.k_proj',
    v='self_attn.v_proj',
    o='self_attn.o_proj',
    gate='mlp.gate_proj',
    up='mlp.up_proj',
    down='mlp.down_proj',
    attn_norm='input_layernorm',
    mlp_norm='post_attention_layernorm',
    q_norm='self_attn.q_norm',
    k_norm='self_attn.k_norm',
  ),
)

# model_type -> (how it is written, what the type implies)
DREAM, QWEN3 = dict(qkv_bias=True, shift=True), dict(qk_norm=True)
FAMILIES = {
  'llada': (LLADA, {}),
  'Dream': (QWEN, DREAM),
  'dream': (QWEN, DREAM),
  'sdar': (QWEN, QWEN3),
  'qwen2': (QWEN, dict(qkv_bias=True)),
  'a2d-qwen2': (QWEN, dict(qkv_bias=True)),
  'qwen3': (QWEN, QWEN3),
  'a2d-qwen3': (QWEN, QWEN3),
  'llama': (QWEN, {}),
  'a2d-llama': (QWEN, {}),
}


def load_hf(path, dtype='float32', mesh=None, **settings):
  """(ModelConfig, {'params': ...}) of a Hugging Face directory or hub name.

  dtype: of the arrays; mesh: sharded by mesh.RULES, else all on one device.
  `settings` are further ModelConfig fields. One ValueError lists everything
  missing, unexpected, mis-shaped or unknown.
  """
  folder = locate(path)
  cfg = model.ModelConfig(
    **{'dtype': dtype, **read_config(folder), **settings, 'param_dtype': dtype}
  )
  return cfg, read_params(folder, cfg, mesh)


def locate(path, weights=True):
  """The directory of a checkpoint; a hub name is downloaded (or found cached).

  weights=False fetches its small files only. ValueError if there is neither.
  """
  if os.path.isdir(path):
    return path
  if path.count('/') != 1 or path.startswith(('.', '/', '~')):
    raise ValueError(
      f'model.checkpoint = {path!r} is no directory, and no hub '
      "name ('owner/name') either"
    )
  import huggingface_hub

  try:
    return huggingface_hub.snapshot_download(
      path, allow_patterns=[*SMALL, *['*.safetensors'] * weights]
    )
  except Exception as error:  # many kinds: offline, no such name, no access
    raise ValueError(
      f'model.checkpoint = {path!r} is no directory here and could not be '
      f'had from the hub: {str(error).splitlines()[0]}'
    ) from error


# --- config.json


def read_json(folder, name):
  """A JSON file of the directory; {} if there is none."""
  path = os.path.join(folder, name)
  if not os.path.exists(path):
    return {}
  with open(path) as f:
    try:
      return json.load(f)
    except ValueError as error:
      raise ValueError(f'{path} is no valid JSON: {error}') from None


def family_of(folder):
  """(Family, what its type implies, config.json) of a directory."""
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
  return *FAMILIES[kind], raw


def read_config(folder):
  """ModelConfig fields from config.json and the tokenizer's files.

  ValueError lists every field that is unknown, missing, or has a value that
  this model does not implement.
  """
  family, implied, raw = family_of(folder)
  raw, found = without_nesting(raw), []
  fields = {
    ours: raw[theirs]
    for theirs, ours in family.fields.items()
    if raw.get(theirs) is not None
  }
  if 'vocab' not in fields and raw.get('vocab_size'):
    fields['vocab'] = raw['vocab_size']
  fields = {**fields, **implied}
  fields.setdefault('kv_heads', fields.get('heads'))
  if raw['model_type'] == 'sdar':
    fields['block_causal'] = raw.pop('block_size', 4)
  names = {ours: theirs for theirs, ours in family.fields.items()}
  found += [f'{names[n]} is missing' for n in family.needs if n not in fields]
  for name, value in raw.items():
    if name in family.fixed and value not in family.fixed[name]:
      found.append(f'{name} = {value!r}: only {family.fixed[name][0]!r} is implemented')
    elif not (
      name in family.fields
      or name in family.fixed
      or name in family.ignored
      or name in ANY
    ):
      found.append(f'{name} = {value!r} is an unknown field')
  ids, wrong = special_ids(folder, raw, fields.get('vocab') or 0)
  complain(f'{folder}/config.json', found + wrong)
  return {**fields, **ids}


def without_nesting(raw):
  """config.json with transformers 5's nested fields at the top."""
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


def special_ids(folder, raw, vocab):
  """({mask_id, eos_id, pad_id}, complaints).

  From config.json, else from the token that tokenizer_config.json names, else
  (the mask) from the usual names among the added tokens.
  """
  told = read_json(folder, 'tokenizer_config.json')
  added = {
    t['content']: t['id']
    for t in read_json(folder, 'tokenizer.json').get('added_tokens', [])
  }
  added |= {
    t['content']: int(i) for i, t in told.get('added_tokens_decoder', {}).items()
  }
  ids, found = {}, []
  for name in ('mask', 'eos', 'pad'):
    value = raw.get(f'{name}_token_id')
    value = value[0] if isinstance(value, list) else value
    token = told.get(f'{name}_token')
    token = token['content'] if isinstance(token, dict) else token
    spoken = added.get(token)
    if name == 'mask' and None not in (value, spoken) and value != spoken:
      found.append(
        f'mask_token_id = {value}, but tokenizer_config.json says {token!r} = {spoken}'
      )
    ids[f'{name}_id'] = spoken if value is None else value
  if ids['mask_id'] is None:
    ids['mask_id'] = next((added[t] for t in MASK_TOKENS if t in added), None)
  if ids['pad_id'] is None:
    ids['pad_id'] = ids['eos_id']
  for name, value in ids.items():
    if value is None:
      found.append(
        f"{name[:-3]}_token_id is missing, here and in the tokenizer's files"
      )
    elif not 0 <= value < vocab:
      found.append(
        f'{name[:-3]}_token_id = {value} is outside the vocabulary of {vocab}'
      )
  if ids['mask_id'] is not None and ids['mask_id'] == ids['eos_id']:
    found.append(f'mask_token_id = eos_token_id = {ids["mask_id"]}')
  return ids, found


def complain(where, found):
  """One ValueError for all that was found, if anything was."""
  if found:
    raise ValueError(f'{where}: ' + '; '.join(found))


# --- tensors


class Entry(NamedTuple):
  """Where one of our leaves lies in the files."""

  names: tuple  # a tensor's name, or one of each layer
  stacked: bool  # a leading axis of layers
  transposed: bool  # torch writes linears (out, in)


def entry_of(path, family, layers):
  """The Entry of one of our paths, such as params/layers/q/kernel."""
  parts = path.split('/')
  name = parts[-2] if parts[-1] in ('kernel', 'bias', 'scale') else parts[-1]
  suffix = '.bias' if parts[-1] == 'bias' else '.weight'
  if 'layers' not in parts:
    return Entry((family.tensors[name],), False, False)
  theirs = family.layer + family.layers[name] + suffix
  names = tuple(theirs.format(i) for i in range(layers))
  return Entry(names, True, parts[-1] == 'kernel')


def abstract(cfg):
  """{'params': ...} of ShapeDtypeStructs of a model without adapters."""
  plain = dataclasses.replace(cfg, lora_rank=0)
  return jax.eval_shape(lambda: model.init(plain, jax.random.key(0)))


def entries(cfg, family):
  """[(path, ShapeDtypeStruct, Entry)] of all parameters."""
  flat = jax.tree_util.tree_leaves_with_path(abstract(cfg))
  out = []
  for path, leaf in flat:
    path = mesh.path_of(path)
    name = path.split('/')[-2]
    if path.startswith('params/layers/') and name not in family.layers:
      raise ValueError(
        f'this family has no {name}: its checkpoints cannot hold this model'
      )
    out.append((path, leaf, entry_of(path, family, cfg.layers)))
  return out


def tensor_files(folder):
  """{tensor name: file} of a single-file or sharded checkpoint.

  ValueError if the index names files that are not in the directory.
  """
  index = read_json(folder, INDEX).get('weight_map')
  if index:
    complain(
      folder,
      [
        f'{INDEX} names {f!r}, which is no *.safetensors file of this directory'
        for f in sorted(set(map(str, index.values())))
        if os.path.basename(f) != f or not f.endswith('.safetensors')
      ],
    )
    lost = sorted(
      {f for f in index.values() if not os.path.exists(os.path.join(folder, f))}
    )
    complain(folder, [f'{INDEX} names {f}, which is not there' for f in lost])
    return index
  files = sorted(glob.glob(os.path.join(glob.escape(folder), '*.safetensors')))
  if not files:
    raise ValueError(
      f'{folder} has no *.safetensors file (weights in '
      "torch's .bin format must be converted first)"
    )
  with contextlib.ExitStack() as stack:
    return {
      name: os.path.basename(path)
      for path in files
      for name in open_file(path, stack).keys()
    }


def open_file(path, stack):
  """safetensors' reader; ValueError on a truncated file."""
  try:
    return stack.enter_context(safe_open(path, 'numpy'))
  except (SafetensorError, OSError) as error:
    raise ValueError(f'{path} is damaged or truncated: {error}') from None


def read_params(folder, cfg, grid=None):
  """{'params': ...} of a directory, checked against cfg first."""
  family, _, _ = family_of(folder)
  wanted = entries(cfg, family)
  with contextlib.ExitStack() as stack:
    files = tensor_files(folder)
    opened = {
      name: open_file(os.path.join(folder, name), stack)
      for name in sorted(set(files.values()))
    }
    check_tensors(folder, wanted, files, opened)
    leaves = [
      read_leaf(
        leaf,
        entry,
        lambda name: opened[files[name]].get_slice(name),
        place(path, leaf, grid),
      )
      for path, leaf, entry in wanted
    ]
  return jax.tree.unflatten(jax.tree.structure(abstract(cfg)), leaves)


def check_tensors(folder, wanted, files, opened):
  """One ValueError for all tensors missing, unexpected or of another shape."""
  found, known = [], set()
  for _, leaf, entry in wanted:
    shape = leaf.shape[entry.stacked :]
    shape = shape[::-1] if entry.transposed else shape
    for name in entry.names:
      known.add(name)
      if name not in files:
        found.append(f'{name} is missing')
        continue
      try:
        got = tuple(opened[files[name]].get_slice(name).get_shape())
      except SafetensorError:
        found.append(f'{name} is not in {files[name]}, as the index says')
        continue
      if got != shape:
        found.append(f'{name} is {got}, config.json means {shape}')
  # Tied checkpoints may write the head all the same; buffers are no weights.
  spare = ('lm_head.weight', 'model.transformer.ff_out.weight')
  found += [
    f'{name} is unexpected'
    for name in sorted(set(files) - known)
    if name not in spare and not name.endswith('rotary_emb.inv_freq')
  ]
  if len(found) > 12:
    found = [*found[:12], f'and {len(found) - 12} more']
  complain(folder, found)


def place(path, leaf, grid):
  """Where a leaf goes: by the rules of the mesh, else on one device."""
  if grid is None:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.NamedSharding(grid, mesh.spec_of(path, leaf, grid))


def read_leaf(leaf, entry, get_slice, sharding):
  """A global array, read slice by slice: one device's part is on the host.

  Replicas are read once.
  """
  parts = {}
  for device, at in sharding.addressable_devices_indices_map(leaf.shape).items():
    parts.setdefault(str(at), (at, []))[1].append(device)
  arrays = []
  for at, devices in parts.values():
    host = read_part(leaf, entry, get_slice, at)
    arrays += [jax.block_until_ready(jax.device_put(host, d)) for d in devices]
    del host
  return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def read_part(leaf, entry, get_slice, at):
  """One device's slice of a leaf as a host array of its dtype."""
  bounds = [s.indices(n)[:2] for s, n in zip(at, leaf.shape, strict=True)]
  shape = [stop - start for start, stop in bounds]
  inner = tuple(slice(*b) for b in bounds[entry.stacked :])
  inner = inner[::-1] if entry.transposed else inner
  turn = (lambda x: x.T) if entry.transposed else (lambda x: x)
  if not entry.stacked:
    return turn(get_slice(entry.names[0])[inner]).astype(leaf.dtype)
  out = np.empty(shape, leaf.dtype)
  for i, name in enumerate(entry.names[slice(*bounds[0])]):
    out[i] = turn(get_slice(name)[inner])
  return out


# --- PEFT adapters


def read_adapter(path, cfg, folder='', grid=None):
  """{'lora': ...} of a PEFT directory, float32; `folder` is its base's.

  ValueError if it is of another kind, rank, scale or base than cfg says.
  """
  told = read_json(path, 'adapter_config.json')
  if not told:
    raise ValueError(
      f'lora.path = {path!r} has no adapter_config.json: it is no PEFT adapter'
    )
  found = [
    f'{name} = {told[name]!r}: only {plain!r} is implemented'
    for name, plain in PEFT_FIXED.items()
    if told.get(name, plain) not in (plain, None, {}, [])
  ]
  init = told.get('init_lora_weights')
  if init not in (True, False, None, *PEFT_INIT):
    found.append(
      f'init_lora_weights = {init!r} may change the base, too: only '
      f'true, false, {", ".join(PEFT_INIT)} are implemented'
    )
  for field, name, value in (
    ('rank', 'r', cfg.lora_rank),
    ('alpha', 'lora_alpha', cfg.lora_alpha),
  ):
    if told.get(name) != value:
      found.append(f'{name} = {told.get(name)}, but lora.{field} = {value}')
  complain(f'{path}/adapter_config.json', found)
  family = family_of(folder)[0] if folder else FAMILIES[kind_of(cfg)][0]
  wanted = adapter_entries(cfg, family)
  with contextlib.ExitStack() as stack:
    name = 'adapter_model.safetensors'
    file = open_file(os.path.join(path, name), stack)
    try:
      check_tensors(path, wanted, dict.fromkeys(file.keys(), name), {name: file})
    except ValueError as error:
      raise ValueError(
        f'{error} (lora.targets = {cfg.lora_targets!r}; the '
        'adapter was made for '
        f'{told.get("base_model_name_or_path")!r}, targets '
        f'{told.get("target_modules")!r})'
      ) from None
    leaves = [
      read_leaf(leaf, entry, file.get_slice, place(path, leaf, grid))
      for path, leaf, entry in wanted
    ]
  shapes = abstract_adapter(cfg)
  return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


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
PEFT_INIT = ('gaussian', 'orthogonal', 'eva')  # those that leave the base alone


def abstract_adapter(cfg):
  """{'lora': ...} of ShapeDtypeStructs."""
  tree = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
  return {'lora': tree['lora']}


def adapter_entries(cfg, family):
  """[(path, ShapeDtypeStruct, Entry)] of the adapters, in PEFT's names."""
  out = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_adapter(cfg)):
    path = mesh.path_of(path)
    _, _, name, part = path.split('/')
    stem = f'base_model.model.{family.layer}{family.layers[name]}.lora_'
    names = tuple(f'{stem}{part.upper()}.weight'.format(i) for i in range(cfg.layers))
    out.append((path, leaf, Entry(names, True, True)))
  return out


def kind_of(cfg):
  """The model_type that a model made here is written as."""
  if cfg.shift:
    return 'Dream'
  if cfg.block_causal:
    return 'sdar'
  if cfg.qk_norm:
    return 'a2d-qwen3'
  if cfg.qkv_bias or cfg.head_dim:
    return 'a2d-qwen2' if cfg.qkv_bias else 'a2d-llama'
  return 'llada'
