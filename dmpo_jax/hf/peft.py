"""Reads PEFT adapters.

Where a family has one linear for several of ours, our adapters (a, b) of rank r become
one of a higher rank: the a's below each other, the b's as blocks of a diagonal. An
adapter of rank r on such a linear is read as well: then all parts have its a.
"""

import os
import re
from typing import Any

import numpy as np
from jax.sharding import Mesh
from safetensors import safe_open

from dmpo_jax import files, mesh, model
from dmpo_jax.hf import families
from dmpo_jax.hf.config import complain, is_empty, shown
from dmpo_jax.hf.families import Entry, Family
from dmpo_jax.hf.read import Held, family_for, few, opened, read_tree, tensor_problems
from dmpo_jax.types import Params

ADAPTER = 'adapter_model.safetensors'
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
# Fields without effect on a trained adapter, or seen in its rank, scale and tensors.
PEFT_HARMLESS = re.compile(
  r'r|lora_alpha|lora_dropout|init_lora_weights|eva_config|task_type|auto_mapping|'
  r'base_model_name_or_path|revision|peft_version|inference_mode|target_modules|'
  r'exclude_modules|layers_(to_transform|pattern)|megatron_core|qalora_group_size|'
  r'runtime_config|unsloth_\w+'
)


def read_adapter(
  path: str, cfg: model.ModelConfig, folder: str = '', grid: Mesh | None = None
) -> Params:
  """Reads {'lora': ...} of a PEFT directory, float32; `folder` is its base's.

  ValueError if its kind, rank, scale, targets or base differ from cfg.
  """
  tree, wanted = check_adapter(path, cfg, folder)
  family = family_for(cfg, folder)
  split = lambda readers: split_fused(path, readers, family, cfg)
  return read_tree(path, [ADAPTER], tree, wanted, grid, split)


def check_adapter(
  path: str, cfg: model.ModelConfig, folder: str = '', base: str | None = None
) -> tuple[dict[str, Any], list[Entry]]:
  """Returns the shapes and entries of a PEFT directory, which is checked for cfg.

  No weight is read. base: name of the model that it is laid on; a warning says if
  the adapter was made for another one.
  """
  told = files.read_object(os.path.join(path, 'adapter_config.json'))
  if not told:
    raise ValueError(
      f'lora.path = {path!r} has no adapter_config.json: it is no PEFT adapter'
    )
  family = family_for(cfg, folder)
  complain(f'{path}/adapter_config.json', adapter_problems(told, cfg, family))
  if not os.path.exists(os.path.join(path, ADAPTER)):
    others = sorted(name for name in os.listdir(path) if name.startswith('adapter_m'))
    raise ValueError(
      f'{path} has no {ADAPTER}, but {few(others) or "no weights at all"}: save the '
      'adapter with PEFT as one safetensors file'
    )
  tree = {'lora': families.shapes(cfg)['lora']}
  wanted = list(families.entries(tree, family, cfg))
  made_for = told.get('base_model_name_or_path') or ''
  with opened(path, [ADAPTER]) as readers:
    split_fused(path, readers, family, cfg)
    if problems := tensor_problems(wanted, readers):
      problems.append(
        f'lora.targets = {cfg.lora_targets!r}, the adapter was made for {made_for!r}, '
        f'targets {shown(told.get("target_modules"))}'
      )
    complain(path, problems)
  plain = lambda name: os.path.basename(str(name).rstrip('/')).lower()
  if base is not None and made_for and plain(made_for) != plain(base):
    mesh.warn_once(
      f'{path} was made for {made_for!r}, but model.checkpoint = {base!r}: another '
      'base makes another model'
    )
  return tree, wanted


def warn_of_base(path: str, digest: str) -> None:
  """Warns if an adapter that was exported here says that it had another base.

  digest: of the base that it is laid on, with its dtype, as write.save_adapter has it.
  """
  with safe_open(os.path.join(path, ADAPTER), 'numpy') as reader:
    made_on = (reader.metadata() or {}).get('base', '')
  same_dtype = made_on.split()[:1] == digest.split()[:1]
  if same_dtype and made_on != digest:
    mesh.warn_once(
      f'{path} was trained on other weights than those of model.checkpoint: it makes '
      'another model there'
    )


def adapter_problems(
  told: dict[str, Any], cfg: model.ModelConfig, family: Family
) -> list[str]:
  """Lists where adapter_config.json differs from cfg and what is implemented."""
  problems, patterns = [], patterns_of(cfg, family)
  for name, value in told.items():
    if name in patterns and value == patterns[name]:
      continue
    if name in PEFT_FIXED:
      if value != PEFT_FIXED[name] and not is_empty(value):
        problems.append(
          f'{name} = {shown(value)}: only {PEFT_FIXED[name]!r} is implemented'
        )
    elif not PEFT_HARMLESS.fullmatch(name) and not is_empty(value):
      problems.append(f'{name} = {shown(value)} is an unknown field')
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
      problems.append(f'{name} = {told.get(name)!r}, but lora.{field} = {value}')
  return problems


# --- linears that hold several of ours


def targets_of(cfg: model.ModelConfig, names: list[str]) -> list[str]:
  """Returns those of our names that have an adapter."""
  return [name for name in names if re.search(cfg.lora_targets, name)]


def patterns_of(cfg: model.ModelConfig, family: Family) -> dict[str, dict[str, float]]:
  """Returns PEFT's rank_pattern and alpha_pattern: of what holds several adapters."""
  ranks: dict[str, float] = {}
  for name, names in families.fused(family).items():
    if (count := len(targets_of(cfg, names))) > 1:
      ranks[family.layers[name].split('.')[-1]] = count * cfg.lora_rank
  alphas = {name: rank * cfg.lora_alpha / cfg.lora_rank for name, rank in ranks.items()}
  return {'rank_pattern': ranks, 'alpha_pattern': alphas}


def split_fused(
  path: str, readers: dict[str, Any], family: Family, cfg: model.ModelConfig
) -> None:
  """Puts our adapters in the place of those of linears that hold several of ours.

  ValueError if one is of another rank, or changes rows that lora.targets leaves out.
  """
  problems = []
  for names in {tuple(x) for x in families.fused(family).values()}:
    end = f'.{family.layers[names[0]]}.lora_A.weight'
    for whole in [x for x in readers if x.endswith(end)]:
      stem = whole.removesuffix('lora_A.weight')
      if f'{stem}lora_B.weight' not in readers:
        continue
      a, b = (
        np.asarray(readers[x].get_slice(x)[:, :], np.float32)
        for x in (f'{stem}lora_A.weight', f'{stem}lora_B.weight')
      )
      parts, wrong = split_one(a, b, list(names), family, cfg)
      problems += [f'{stem}lora_B.weight {x}' for x in wrong]
      del readers[f'{stem}lora_A.weight'], readers[f'{stem}lora_B.weight']
      for name, pair in parts.items():
        for part, value in zip('AB', pair, strict=True):
          readers[f'{stem}{name}.lora_{part}.weight'] = Held(value)
  complain(path, problems[:3])


def split_one(
  a: np.ndarray, b: np.ndarray, names: list[str], family: Family, cfg: model.ModelConfig
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
  """Returns {our name: (a, b)} of one adapter, (r, in) and (out, r), and problems."""
  targets, rank, left = targets_of(cfg, names), cfg.lora_rank, b.copy()
  rows = {name: families.rows_of(family, name, cfg) for name in names}
  if (
    not targets
    or len(a) not in (rank, len(targets) * rank)
    or len(b) != rows[names[0]][1]
  ):
    of = f'of rank {len(a)} on {len(b)} rows'
    return {}, [f'is {of}: lora.rank = {rank} and lora.targets mean other adapters']
  starts = [rows[name][0] for name in names] + [len(b)]
  parts = {}
  for i, name in enumerate(targets):
    at = names.index(name)
    own = slice(starts[at], starts[at + 1])
    block = slice(None) if len(a) == rank else slice(i * rank, (i + 1) * rank)
    parts[name] = a[block], b[own, block]
    left[own, block] = 0
  wrong = 'changes rows that are no target, or one target by the part of another'
  return parts, [wrong] * bool(left.any())


def join_fused(
  tensors: dict[str, np.ndarray], family: Family, cfg: model.ModelConfig
) -> dict[str, np.ndarray]:
  """Inverts `split_fused`, for the tensors of a file."""
  out = dict(tensors)
  for names in {tuple(x) for x in families.fused(family).values()}:
    targets = targets_of(cfg, list(names))
    end = f'.{family.layers[names[0]]}.{targets[0] if targets else ""}.lora_A.weight'
    for first in [x for x in tensors if x.endswith(end)]:
      stem = first.removesuffix(f'{targets[0]}.lora_A.weight')
      pairs = {
        name: tuple(out.pop(f'{stem}{name}.lora_{part}.weight') for part in 'AB')
        for name in targets
      }
      rank, total = cfg.lora_rank, families.rows_of(family, names[0], cfg)[1]
      b = np.zeros((total, rank * len(targets)), np.float32)
      for i, name in enumerate(targets):
        start, part = families.rows_of(family, name, cfg)[0], pairs[name][1]
        b[start : start + len(part), i * rank : (i + 1) * rank] = part
      out[f'{stem}lora_A.weight'] = np.concatenate([pairs[x][0] for x in targets])
      out[f'{stem}lora_B.weight'] = b
  return out
