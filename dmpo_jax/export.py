"""Trained weights out: Hugging Face directories, and PEFT adapters.

What was written is read back and compared with the model in hand; a model that
training did not change is refused, for that is how lost adapters show.
"""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from dmpo_jax import mesh, model, weights

ARCHITECTURES = {
  'llada': 'LLaDAModelLM',
  'Dream': 'DreamModel',
  'sdar': 'SDARForCausalLM',
  'a2d-qwen3': 'A2DQwen3LMHeadModel',
  'a2d-qwen2': 'A2DQwen2LMHeadModel',
  'a2d-llama': 'A2DLlamaLMHeadModel',
}


def save_hf(folder, cfg, params, tokenizer=None, source='', shard_bytes=5e9):
  """Writes a Hugging Face directory: adapters merged, in shards, with index.

  source: the directory the model came from, whose config.json (and whatever
  else is small) is taken over; without it config.json is made from cfg.
  tokenizer: written too, where given. Dtypes stay those of the parameters.
  """
  os.makedirs(folder, exist_ok=True)
  if source:
    family = weights.family_of(source)[0]
    copy_small(source, folder)
  else:
    family = weights.FAMILIES[weights.kind_of(cfg)][0]
    write_json(folder, 'config.json', config_of(cfg, family))
  if tokenizer is not None:
    write_tokenizer(folder, tokenizer)
  shards = shard(tensors(cfg, family), shard_bytes)
  index, total = {}, 0
  for i, names in enumerate(shards):
    name = (
      'model.safetensors'
      if len(shards) == 1
      else f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
    )
    found = {}
    for theirs, path, layer, turned in names:
      x = merged(cfg, params, path, layer)
      found[theirs] = np.ascontiguousarray(x.T if turned else x)
      total += found[theirs].nbytes
      index[theirs] = name
    if jax.process_index() == 0:
      save_file(found, os.path.join(folder, name), {'format': 'pt'})
  if len(shards) > 1:
    write_json(
      folder, weights.INDEX, {'metadata': {'total_size': total}, 'weight_map': index}
    )


def tensors(cfg, family):
  """[(their name, our path, layer or None, transposed, bytes)], in order."""
  out = []
  for path, leaf, entry in weights.entries(cfg, family):
    size = leaf.size * leaf.dtype.itemsize // len(entry.names)
    for i, name in enumerate(entry.names):
      layer = i if entry.stacked else None
      out.append((name, path, layer, entry.transposed, size))
  return out


def shard(items, limit):
  """Cuts [(..., bytes)] into lists of at most `limit` bytes (or one item)."""
  out, room = [[]], limit
  for *item, size in items:
    if out[-1] and size > room:
      out.append([])
      room = limit
    out[-1].append(item)
    room -= size
  return out


def merged(cfg, params, path, layer):
  """One tensor on the host: a layer of a leaf, its adapter added in float32."""
  collection, *rest = path.split('/')
  leaf = at(params[collection], rest)
  if layer is not None:
    leaf = jax.tree.map(lambda x: x[layer], leaf)
  host = np.asarray(mesh.fetch(model.dense(leaf)))
  adapter = at(params.get('lora', {}), rest[:-1])
  if rest[-1] != 'kernel' or not adapter:
    return host
  a, b = mesh.fetch((adapter['a'][layer], adapter['b'][layer]))
  delta = (a @ b) * (cfg.lora_alpha / cfg.lora_rank)
  return (host.astype(np.float32) + delta).astype(host.dtype)


def at(tree, path):
  """The node of a nested dict; {} where there is none."""
  for name in path:
    tree = tree.get(name, {})
  return tree


def config_of(cfg, family):
  """config.json of a model that came from no checkpoint."""
  kind = weights.kind_of(cfg)
  out = {
    name: values[0] for name, values in family.fixed.items() if values[0] is not None
  }
  for theirs, ours in family.fields.items():
    if getattr(cfg, ours):
      out[theirs] = getattr(cfg, ours)
  out |= {'weight_tying' if kind == 'llada' else 'tie_word_embeddings': cfg.tied}
  if kind == 'llada':
    out |= dict(include_qkv_bias=cfg.qkv_bias, vocab_size=cfg.vocab)
  if cfg.qk_norm:  # without it transformers takes Qwen3's 128
    out['head_dim'] = cfg.head_dim or cfg.width // cfg.heads
  if kind == 'sdar':
    out['block_size'] = cfg.block_causal
  return out | dict(
    model_type=kind,
    architectures=[ARCHITECTURES[kind]],
    mask_token_id=cfg.mask_id,
    eos_token_id=cfg.eos_id,
    pad_token_id=cfg.pad_id,
    torch_dtype=cfg.param_dtype,
  )


def copy_small(source, folder):
  """Everything of the source but its weights.

  ValueError on a link out of the source: an export is there to be given away.
  """
  if jax.process_index():
    return
  root = os.path.realpath(source)
  if os.path.basename(os.path.dirname(root)) == 'snapshots':
    root = os.path.dirname(os.path.dirname(root))  # the hub's cache: of links
  for name in sorted(os.listdir(source)):
    small = not name.endswith(('.safetensors', '.bin', '.pt', '.gguf'))
    path = os.path.join(source, name)
    if small and name != weights.INDEX and os.path.isfile(path):
      if os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise ValueError(
          f'{path} is a link to {os.path.realpath(path)}, '
          'outside of its directory: put a copy in its place'
        )
      shutil.copy(path, folder)


def write_json(folder, name, value):
  """A JSON file, from the first process."""
  if jax.process_index() == 0:
    with open(os.path.join(folder, name), 'w') as f:
      json.dump(value, f, indent=2)


def write_tokenizer(folder, tokenizer):
  """The tokenizer's files, from the first process."""
  if jax.process_index() == 0:
    tokenizer.save_pretrained(folder)


def save_adapter(folder, cfg, params, base='', source=''):
  """Writes a PEFT adapter: adapter_config.json, adapter_model.safetensors.

  base: name of the base model, for the reader; source: its directory. The
  targets are one regular expression, for LLaDA calls its head like a linear.
  """
  family = (
    weights.family_of(source)[0]
    if source
    else weights.FAMILIES[weights.kind_of(cfg)][0]
  )
  os.makedirs(folder, exist_ok=True)
  lora = mesh.fetch(params['lora'])
  found = {}
  for path, _, entry in weights.adapter_entries(cfg, family):
    leaf = at(lora, path.split('/')[1:])
    for i, name in enumerate(entry.names):
      found[name] = np.ascontiguousarray(leaf[i].T)
  layer = family.layer.replace('.', r'\.').format(r'\d+')
  linears = [
    family.layers[name].replace('.', r'\.')
    for name in model.LINEARS
    if name in lora['layers']
  ]
  write_json(
    folder,
    'adapter_config.json',
    dict(
      peft_type='LORA',
      task_type='CAUSAL_LM',
      r=cfg.lora_rank,
      lora_alpha=cfg.lora_alpha,
      lora_dropout=cfg.lora_dropout,
      bias='none',
      target_modules=f'{layer}({"|".join(linears)})',
      inference_mode=True,
      base_model_name_or_path=base,
      fan_in_fan_out=False,
      init_lora_weights=True,
      modules_to_save=None,
      use_dora=False,
      use_rslora=False,
    ),
  )
  if jax.process_index() == 0:
    save_file(
      found, os.path.join(folder, 'adapter_model.safetensors'), {'format': 'pt'}
    )


# --- the export of a run


def run(built, params, base, folder, kind):
  """Writes `kind` (merged or adapter) and reads it back; returns a report.

  params: {'params', 'lora'?} as trained, base: as training began, neither of
  them quantized. ValueError if they do not differ (but for a base that was
  trained here), if `folder` is not empty, or if an adapter is asked of a full
  fine-tuning or of a base trained here.
  """
  cfg, source = built.model, built.config.model.checkpoint
  source = source and weights.locate(source, False)
  if kind == 'adapter' and 'lora' not in params:
    why = (
      '--of=base is the model without its adapters'
      if cfg.lora_rank
      else 'this run trained all parameters (lora.rank = 0)'
    )
    raise ValueError(f'--format=adapter: {why}; --format=merged writes them')
  if kind == 'adapter' and built.config.sft.steps:
    raise ValueError(
      f'--format=adapter: sft.steps = {built.config.sft.steps} changed the '
      'base too, so an adapter would fit no published model; '
      '--format=merged writes all'
    )
  if mesh.agree(os.path.isdir(folder) and os.listdir(folder)):
    raise ValueError(f'--out={folder} is not empty: name another directory')
  made_here = params is base and built.config.sft.steps  # --of=base
  if not made_here and not changed(params, base):
    raise ValueError(
      'the trained model equals its base in every weight: '
      'there is nothing to export (was it trained at all?)'
    )
  if kind == 'adapter':
    save_adapter(folder, cfg, params, built.config.model.checkpoint, source)
    mesh.agree(False)  # all is written before any process reads it
    lora = weights.read_adapter(folder, cfg, source, built.mesh)
    again, cfg_again = {**base, **lora}, cfg
  else:
    save_hf(folder, cfg, params, built.tokenizer, source)
    mesh.agree(False)
    cfg_again, again = weights.load_hf(folder, cfg.param_dtype, built.mesh)
    cfg_again = dataclasses.replace(cfg_again, dtype=cfg.dtype)
  tokens = probe(cfg)
  before, after = (
    np.asarray(mesh.fetch(model.full_logits(c, p, tokens)))
    for c, p in ((cfg, params), (cfg_again, again))
  )
  return {
    'folder': folder,
    'format': kind,
    'max_logit_difference': float(np.max(np.abs(after - before))),
    'max_logit': float(np.max(np.abs(before))),
  }


def changed(params, base):
  """Whether training moved any weight (an adapter's b is zero at first)."""
  if 'lora' in params:
    moved = jax.tree_util.tree_leaves_with_path(params['lora'])
    return any(
      bool(jnp.any(x)) for path, x in moved if mesh.path_of(path).endswith('/b')
    )
  pairs = zip(jax.tree.leaves(params), jax.tree.leaves(base), strict=True)
  return any(bool(jnp.any(x != y)) for x, y in pairs)


def probe(cfg):
  """(2, 16) tokens to compare logits on, some of them masked."""
  tokens = np.random.default_rng(0).integers(0, cfg.vocab, (2, 16))
  tokens[:, ::3] = cfg.mask_id
  return tokens.astype(np.int32)
