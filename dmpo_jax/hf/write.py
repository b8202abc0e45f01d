"""Writes trained weights as Hugging Face directories and as PEFT adapters.

`export` reads back what it wrote and compares it with the model in hand. It
refuses a model that training did not change: that is how lost adapters show.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from dmpo_jax import files, mesh, model
from dmpo_jax.hf import peft, read
from dmpo_jax.hf.config import is_autoregressive
from dmpo_jax.hf.families import (
  ASSUMED,
  BLOCKS,
  CONVERTED,
  FAMILIES,
  INDEX,
  LLADA_MOE,
  Entry,
  Family,
  entries,
  kind_in,
  kind_of,
  shapes,
)
from dmpo_jax.types import Params


def save_hf(
  folder: str | os.PathLike,
  cfg: model.ModelConfig,
  params: Params,
  tokenizer: Any = None,
  source: str = '',
  shard_bytes: int = 5_000_000_000,
) -> float | None:
  """Writes a Hugging Face directory: adapters merged, in shards, with an index.

  source: the directory that the model came from; config.json and its other small
  files are copied. Without it config.json is made from cfg. tokenizer: is written
  too. Dtypes stay those of the parameters, and config.json says so. Returns the share
  of the weights to which an adapter adds anything that still differ from the base when
  they are rounded to their dtype; None without adapters.
  """
  from huggingface_hub import split_state_dict_into_shards_factory

  os.makedirs(folder, exist_ok=True)
  family, converts = read.family_for(cfg, source), False
  if source:
    copy_small(source, str(folder))
    family = read.as_held(family, source)
    told = files.read_object(os.path.join(source, 'config.json'))
    was, converts = told, is_autoregressive(source)
    told = converted(told, cfg) if converts else told
    named: dict = dict.fromkeys({'dtype', 'torch_dtype'} & told.keys(), cfg.param_dtype)
    field, block = BLOCKS.get(kind := kind_in(told), ('', cfg.block_causal))
    # The user may have said the block.
    if field in told or cfg.block_causal != block or kind in ASSUMED:
      named[field] = cfg.block_causal
    if told | named != was:  # transformers would round to the source's
      write_json(folder, 'config.json', told | named)
  else:
    write_json(folder, 'config.json', config_of(cfg, family))
  if tokenizer is not None and jax.process_index() == 0:
    tokenizer.save_pretrained(folder)
    if converts:
      settle_tokenizer(source, str(folder))
  tensors = tensors_of({'params': shapes(cfg)['params']}, family, cfg)
  plan = split_state_dict_into_shards_factory(
    tensors,
    get_storage_size=lambda parts: sum(bytes_of(entry) for entry, _ in parts),
    filename_pattern='model{suffix}.safetensors',
    max_shard_size=shard_bytes,
  )
  merged = Merged(cfg, flatten_dict(params, sep='/'))
  for name, theirs in plan.filename_to_tensors.items():
    write_tensors(folder, name, {key: merged.tensor(tensors[key]) for key in theirs})
  if plan.is_sharded:
    index = {'metadata': plan.metadata, 'weight_map': plan.tensor_to_filename}
    write_json(folder, INDEX, index)
  return merged.kept / merged.meant if merged.meant else None


Parts = list[tuple[Entry, int]]  # leaves of one tensor, and the number of its name


def tensors_of(tree: dict, family: Family, cfg: model.ModelConfig) -> dict[str, Parts]:
  """Returns {tensor: its parts, in the order of its rows}, layer by layer of a run."""
  tensors: dict[str, Parts] = {}
  for entry in entries(tree, family, cfg):
    for i, name in enumerate(entry.names):
      tensors.setdefault(name, []).append((entry, i))
  first = lambda part: part[0].rows[0] if part[0].rows else 0
  return {name: sorted(parts, key=first) for name, parts in tensors.items()}


def bytes_of(entry: Entry) -> int:
  """Returns the size of an entry's part of each of its tensors."""
  return entry.leaf.size * entry.leaf.dtype.itemsize // len(entry.names)


class Merged:
  """Tensors on the host as torch has them, adapters added in float32.

  meant, kept: the weights that adapters change, and those that rounding leaves changed.
  """

  def __init__(self, cfg: model.ModelConfig, flat: dict[str, Any]):
    self.cfg, self.flat = cfg, flat  # flat: the parameters by path
    self.meant = self.kept = 0
    self.at: tuple[str, int] = ('', 0)  # path and layer of `held`
    self.held: tuple[np.ndarray, ...] = ()

  def tensor(self, parts: Parts) -> np.ndarray:
    """Returns one tensor, joined of its parts."""
    found = [self.part(entry, number) for entry, number in parts]
    return found[0] if len(found) == 1 else np.concatenate(found)

  def part(self, entry: Entry, number: int) -> np.ndarray:
    """Returns the part of a leaf that lies in its tensor of this number."""
    layer, *expert = np.unravel_index(number, entry.leaf.shape[: entry.stacked] or (1,))
    if self.at != (entry.path, layer):
      self.held, self.at = self.layer(entry, int(layer)), (entry.path, int(layer))
    host, *adapter = (x[tuple(expert)] for x in self.held)
    if adapter:
      delta = (adapter[0] @ adapter[1]) * (self.cfg.lora_alpha / self.cfg.lora_rank)
      alone, host = host, (host.astype(np.float32) + delta).astype(host.dtype)
      self.meant += int(np.count_nonzero(delta))
      self.kept += int(np.count_nonzero((host != alone) & (delta != 0)))
    narrow = host.astype(self.cfg.param_dtype)  # a router's bias is held in float32
    host = narrow if np.array_equal(narrow, host) else host
    return np.ascontiguousarray(np.swapaxes(host, -1, -2) if entry.transposed else host)

  def layer(self, entry: Entry, layer: int) -> tuple[np.ndarray, ...]:
    """Fetches a layer of a leaf, restored if it is quantized, and of its adapter."""
    cut = lambda x: x[layer] if entry.stacked else x
    host = mesh.fetch(model.dense(jax.tree.map(cut, self.flat[entry.path])))
    stem = entry.path.removesuffix('kernel').replace('params', 'lora', 1)
    names = [stem + part for part in 'ab' if stem + part in self.flat]
    return (np.asarray(host), *mesh.fetch([cut(self.flat[name]) for name in names]))


def config_of(cfg: model.ModelConfig, family: Family) -> dict[str, Any]:
  """Makes the config.json of a model that came from no checkpoint."""
  kind = kind_of(cfg)
  out = {
    name: values[0] for name, values in family.fixed.items() if values[0] is not None
  }
  switches = ('tied', 'qkv_bias')  # written where they are off, too
  for theirs, ours in family.fields.items():
    if getattr(cfg, ours) or ours in switches:
      out[theirs] = getattr(cfg, ours)
  if family.moe:
    out |= family.moe.write(cfg)
  if kind == 'llada':
    out['vocab_size'] = cfg.vocab
  if cfg.qk_norm and 'head_dim' in family.fields:  # else Qwen3's 128 is taken
    out['head_dim'] = cfg.head_dim or cfg.width // cfg.heads
  if kind in BLOCKS:
    out[BLOCKS[kind][0]] = cfg.block_causal
  return out | dict(
    model_type=kind,
    architectures=[FAMILIES[kind][2]],
    mask_token_id=cfg.mask_id,
    eos_token_id=cfg.eos_id,
    pad_token_id=cfg.pad_id,
    torch_dtype=cfg.param_dtype,
  )


def converted(told: dict[str, Any], cfg: model.ModelConfig) -> dict[str, Any]:
  """Returns the config.json of the diffusion model made of an autoregressive one."""
  kind = CONVERTED[told['model_type']]
  rest = {name: value for name, value in told.items() if name != 'auto_map'}
  return rest | dict(
    model_type=kind,
    architectures=[FAMILIES[kind][2]],
    mask_token_id=cfg.mask_id,
    vocab_size=cfg.vocab,
    **(dict(right_shift_logits=True) if cfg.shift else {}),
  )


def settle_tokenizer(source: str, folder: str) -> None:
  """Makes the files of a tokenizer with a new mask token agree.

  The source's class stays, which transformers of any version finds. The files that
  list the source's special tokens alone go.
  """
  name = 'tokenizer_config.json'
  own, new = (files.read_object(os.path.join(x, name)) for x in (source, folder))
  if kind := own.get('tokenizer_class'):
    write_json(folder, name, new | {'tokenizer_class': kind})
  for stale in ('special_tokens_map.json', 'added_tokens.json'):
    with contextlib.suppress(FileNotFoundError):
      os.remove(os.path.join(folder, stale))


def copy_small(source: str, folder: str | os.PathLike) -> None:
  """Copies everything of the source but its weights.

  ValueError on a link out of the source: an export is made to be given away.
  """
  if jax.process_index():
    return
  root = os.path.realpath(source)
  if os.path.basename(os.path.dirname(root)) == 'snapshots':
    root = os.path.dirname(os.path.dirname(root))  # the hub's cache: all are links
  for name in sorted(os.listdir(source)):
    small = not name.endswith(('.safetensors', '.bin', '.pt', '.gguf'))
    path = os.path.join(source, name)
    if small and name != INDEX and os.path.isfile(path):
      if os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise ValueError(
          f'{path} is a link to {os.path.realpath(path)}, outside of its '
          'directory: put a copy in its place'
        )
      shutil.copy(path, folder)


def write_json(folder: str | os.PathLike, name: str, value: dict[str, Any]) -> None:
  """Writes a JSON file, from the first process."""
  if jax.process_index() == 0:
    with open(os.path.join(folder, name), 'w') as f:
      json.dump(value, f, indent=2)


def write_tensors(
  folder: str | os.PathLike,
  name: str,
  tensors: dict[str, np.ndarray],
  notes: dict[str, str] | None = None,
) -> None:
  """Writes a safetensors file, from the first process; notes: into its header."""
  if jax.process_index() == 0:
    save_file(tensors, os.path.join(folder, name), {'format': 'pt', **(notes or {})})


def save_adapter(
  folder: str | os.PathLike,
  cfg: model.ModelConfig,
  params: Params,
  base: str = '',
  source: str = '',
  digest: str = '',
) -> None:
  """Writes a PEFT adapter: adapter_config.json and adapter_model.safetensors.

  base: name of the base model, written for the reader. source: its directory.
  digest: of its weights, by which read.warn_of_base knows another base.
  target_modules is a regular expression on whole paths, because LLaDA's head has
  the name of a linear.
  """
  family = read.family_for(cfg, source)
  os.makedirs(folder, exist_ok=True)
  tree = {'lora': mesh.fetch(params['lora'])}
  tensors = {
    name: np.ascontiguousarray(np.swapaxes(part, -1, -2))
    for entry in entries(tree, family, cfg)
    for name, part in zip(
      entry.names,
      entry.leaf.reshape(-1, *entry.leaf.shape[entry.stacked :]),
      strict=True,
    )
  }
  pattern = lambda name: name.replace('.', r'\.').replace('{}', r'\d+')
  named = {name for run in tree['lora'].values() for name in run}
  linears = [pattern(family.layers[name]) for name in model.LINEARS if name in named]
  write_json(
    folder,
    'adapter_config.json',
    dict(
      peft_type='LORA',
      # PEFT wants generate of such a class, and LLaDA-MoE's has none.
      task_type=None if family is LLADA_MOE else 'CAUSAL_LM',
      r=cfg.lora_rank,
      lora_alpha=cfg.lora_alpha,
      lora_dropout=cfg.lora_dropout,
      bias='none',
      target_modules=f'{pattern(family.layer)}({"|".join(dict.fromkeys(linears))})',
      inference_mode=True,
      base_model_name_or_path=base,
      fan_in_fan_out=False,
      init_lora_weights=True,
      modules_to_save=None,
      use_dora=False,
      use_rslora=False,
      **peft.patterns_of(cfg, family),
    ),
  )
  joined = peft.join_fused(tensors, family, cfg)
  write_tensors(folder, peft.ADAPTER, joined, {'base': digest})


# --- the export of a run


KEPT = 0.5  # an export warns if it keeps a smaller share of the update


def export(
  built: Any, params: Params, base: Params, folder: str, kind: str
) -> dict[str, Any]:
  """Writes a run's model as `kind` (merged or adapter), reads it back, compares.

  built: a build.Built. params: {'params', 'lora'?} as trained; base: the same as
  training began, quantized if the run's base is. A merged export holds this base
  restored from its few bits, which is the one that the adapters were trained on. An
  adapter is compared on the published base, which is another.
  The directory appears under its name when it is whole. Returns the report of
  --mode=export. ValueError if the two do not differ (but for a base that was trained
  here), if `folder` is not empty, or if an adapter is asked of a run that has none.
  """
  cfg, c = built.model, built.config
  source = c.model.checkpoint and read.locate(c.model.checkpoint, False)
  if kind == 'adapter':
    complain_of_adapter(c, cfg, params)
  if mesh.agree(os.path.isdir(folder) and os.listdir(folder)):
    raise ValueError(f'--out={folder} is not empty: name another directory')
  trained = c.sft.steps or c.sft.epochs
  base_made_here = params is base and trained  # --of=base
  if not base_made_here and not changed(params, base):
    raise ValueError(
      'the trained model equals its base in every weight: there is nothing to '
      'export (was it trained at all?)'
    )
  tokens, partial, kept = probe(cfg), f'{os.fspath(folder).rstrip("/")}.partial', None
  logits = lambda c, p: np.asarray(mesh.fetch(model.full_logits(c, p, tokens)))
  before = logits(cfg, params)
  if jax.process_index() == 0:
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was interrupted
  # mesh.agree: all is removed, or written, before any process goes on.
  mesh.agree(False)
  if kind == 'adapter':
    published = built.steps.init() if c.model.quantize != 'none' else base
    digest = f'{cfg.param_dtype} {int(built.steps.digest(published))}'
    save_adapter(partial, cfg, params, c.model.checkpoint, source, digest)
    mesh.agree(False)
    lora = peft.read_adapter(partial, cfg, source, built.mesh)
    after = logits(cfg, {**published, **lora})
  else:
    kept = save_hf(partial, cfg, params, built.tokenizer, source)
    mesh.agree(False)
    cfg_again, again = read.load_hf(partial, cfg.param_dtype, built.mesh)
    after = logits(dataclasses.replace(cfg_again, dtype=cfg.dtype), again)
  mesh.agree(False)
  if jax.process_index() == 0:
    os.replace(partial, folder)
  warn(kind, kept, c.model.quantize, 'control' in params)
  return {
    'folder': folder,
    'format': kind,
    **({'left_out': 'control'} if 'control' in params else {}),
    'max_logit_difference': float(np.max(np.abs(after - before))),
    'max_logit': float(np.max(np.abs(before))),
    **({} if kept is None else {'update_kept': kept}),
  }


def warn(kind: str, kept: float | None, quantize: str, control: bool) -> None:
  """Warns where the export is not quite the policy that was trained.

  control: whether the run has a controller of its sampler.
  """
  if control:
    logging.warning(
      "the controller (control.on) stays in the run's checkpoints: no file of this "
      'format holds it, so the export samples with the fixed number of its config'
    )
  if kept is not None and kept < KEPT:
    logging.warning(
      'only %.1f %% of the weights that the adapters change still differ from the base '
      'after rounding: --format=adapter keeps the whole update',
      100 * kept,
    )
  if kind == 'adapter' and quantize != 'none':
    logging.warning(
      'the adapter was trained on a base with model.quantize = %s: on the published '
      'base it is another policy (max_logit_difference); --format=merged has its base',
      quantize,
    )


def complain_of_adapter(c: Any, cfg: model.ModelConfig, params: Params) -> None:
  """Raises ValueError if a run has no adapter that fits a published model."""
  why = ''
  if 'lora' not in params and cfg.lora_rank:
    why = '--of=base is the model without its adapters'
  elif 'lora' not in params:
    why = 'this run trained all parameters (lora.rank = 0)'
  elif (c.sft.steps or c.sft.epochs) and not (c.sft.rank and not c.sft.merge):
    length = f'epochs = {c.sft.epochs}' if c.sft.epochs else f'steps = {c.sft.steps}'
    why = (
      f'sft.{length} changed the base too, so an adapter would fit no published model '
      '(adapters with sft.merge = False leave it as it is)'
    )
  if why:
    raise ValueError(f'--format=adapter: {why}; --format=merged writes all weights')


def changed(params: Params, base: Params) -> bool:
  """Returns whether training moved any weight (an adapter's b is zero at first)."""
  if 'lora' in params:
    moved = jax.tree_util.tree_leaves_with_path(params['lora'])
    return any(
      bool(jnp.any(x)) for path, x in moved if mesh.path_of(path).endswith('/b')
    )
  pairs = zip(*(jax.tree.leaves(x['params']) for x in (params, base)), strict=True)
  return any(bool(jnp.any(x != y)) for x, y in pairs)


def probe(cfg: model.ModelConfig) -> np.ndarray:
  """Returns (2, 16) tokens to compare logits on, some of them masked."""
  tokens = np.random.default_rng(0).integers(0, cfg.vocab, (2, 16))
  tokens[:, ::3] = cfg.mask_id
  return tokens.astype(np.int32)
