"""Reads config.json and the special ids of a checkpoint, without its weights.

A field that the family does not know is an error only if it may change the law of
the model. One warning names the others. A value of another JSON type than the
field's is an error.
"""

import dataclasses
import os
import re
from typing import Any

from dmpo_jax import files, mesh, model
from dmpo_jax.hf import experts, families
from dmpo_jax.hf.families import FAMILIES, Family
from dmpo_jax.types import STOP_TOKENS

KINDS = {field.name: field.type for field in dataclasses.fields(model.ModelConfig)}
SIZES = ('width', 'layers', 'heads', 'mlp', 'vocab')  # no default stands for them
# Usual names, where neither config.json nor tokenizer_config.json has the token.
MASK_TOKENS = (
  '<|mdm_mask|>', '<|mask|>', '<|MASK|>', '<MASK>', '|<MASK>|', '<[MASK]>', '[MASK]',
  '<mask>',
)  # fmt: skip
EXPERTS = re.compile(r'n(um)?_(\w+_)?experts')  # fields of a mixture of experts


def complain(where: str, problems: list[str]) -> None:
  """Raises one ValueError for all problems, if there are any."""
  if len(problems) > 12:
    problems = [*problems[:12], f'and {len(problems) - 12} more']
  if problems:
    raise ValueError(f'{where}: ' + '; '.join(problems))


def is_empty(value: Any) -> bool:
  """Returns whether a field of a JSON file switches nothing on."""
  return value is None or value is False or value in ([], {}, '')


def shown(value: Any) -> str:
  """Returns a value for a sentence, cut to a length that can be read."""
  text = repr(value)
  return text if len(text) <= 80 else text[:77] + '...'


def family_of(folder: str) -> tuple[Family, dict[str, Any], dict[str, Any]]:
  """Returns a directory's Family, the fields that its type implies, config.json."""
  raw = files.read_object(os.path.join(folder, 'config.json'))
  if not raw:
    raise ValueError(f'{folder} has no config.json: it is no Hugging Face checkpoint')
  kind = families.kind_in(raw)
  raw = raw | {'model_type': kind}
  found = FAMILIES.get(kind) if isinstance(kind, str) else None
  mixed = any(EXPERTS.fullmatch(name) and raw[name] not in (None, 0) for name in raw)
  mixed |= 'moe' in str(kind).lower()
  if found and (found[0].moe or not mixed):
    return *found[:2], raw
  plain = lambda name: re.sub('[^a-z0-9]', '', str(name).lower())
  same = [name for name in FAMILIES if plain(name) == plain(kind) and name != kind]
  why = 'is not implemented'
  if mixed and not same:
    why += ' as a mixture of experts'
  elif same:
    why = f'must be written {same[0]!r}'
  raise ValueError(
    f'{folder}/config.json: model_type = {kind!r} {why} (known are '
    f'{", ".join(FAMILIES)})'
  )


def read_config(
  folder: str, block: int | None = None, convert: str = ''
) -> dict[str, Any]:
  """Returns ModelConfig fields from config.json and the tokenizer's files.

  block: tokens of an attention block, if it is not config.json's; 0 = the whole text.
  convert: what an autoregressive model becomes (masked, shifted or block): mask_id is
  None then. '' = the directory holds a diffusion model.
  ValueError lists every field that is missing, of a wrong type, has a value that is
  not implemented, or is unknown and may change the law. A warning names the unknown
  fields that cannot.
  """
  family, implied, raw = family_of(folder)
  raw, kind = without_nesting(raw), raw['model_type']
  if stretched := llama3_of(raw) if 'rope_scaling' in family.fixed else ():
    implied, raw = {**implied, 'rope_llama3': stretched}, raw | {'rope_scaling': None}
  found = {
    ours: (theirs, raw[theirs])
    for theirs, ours in family.fields.items()
    if raw.get(theirs) is not None
  }
  if raw.get('vocab_size') is not None:
    found.setdefault('vocab', ('vocab_size', raw['vocab_size']))
  size, wrong = (block or 0, []) if convert else block_of(folder, raw, block)
  problems = wrong + [
    f'{theirs} is missing'
    for theirs, ours in family.fields.items()
    if ours in SIZES and ours not in found
  ]
  for ours, (theirs, value) in found.items():
    if wrong := wrong_type(value, KINDS[ours]):
      problems.append(f'{theirs} = {shown(value)} must be {wrong}')
  fields: dict[str, Any] = implied | {ours: x for ours, (_, x) in found.items()}
  if family.moe:
    of_experts, wrong = experts.read_fields(family.moe, raw)
    fields, problems = fields | of_experts, problems + wrong
  if not problems:
    problems += head_problems(fields)
  unknown, harmless = sort_fields(family, raw)
  vocab = fields.get('vocab', '')
  ids, wrong = special_ids(folder, raw, 0 if wrong_type(vocab, int) else vocab)
  if convert or kind in families.CONVERTED and ids['mask_id'] is None:
    wrong = [x for x in wrong if 'mask_token_id is missing' not in x]
    wrong += conversion_problems(convert, kind, ids['mask_id'])
    fields |= {'shift': convert == 'shifted'}
  complain(f'{folder}/config.json', problems + unknown + wrong)
  if harmless:
    mesh.warn_once(f'{folder}/config.json: ' + '; '.join(harmless))
  fields |= {
    name: float(fields[name]) for name in ('rope_theta', 'eps') if name in fields
  }
  fields.setdefault('kv_heads', fields['heads'])
  return {**fields, **ids, 'block_causal': size}


def conversion_problems(convert: str, kind: str, mask: int | None) -> list[str]:
  """Says where model.convert does not fit the kind of a checkpoint and its mask."""
  if not convert:
    return [
      f'model_type = {kind!r} without a mask token is an autoregressive model: set '
      'model.convert to masked, shifted or block to make a diffusion model of it'
    ]
  if kind not in families.CONVERTED:
    return [
      f'model_type = {kind!r} cannot be converted, only '
      f"{', '.join(families.CONVERTED)}: set model.convert = '' for a diffusion model"
    ]
  if mask is not None:
    return [
      f'its mask token is {mask}, so it is a diffusion model already: set '
      "model.convert = ''"
    ]
  return []


def is_autoregressive(folder: str) -> bool:
  """Returns whether a directory holds a model that model.convert takes."""
  raw = family_of(folder)[2]
  if raw['model_type'] not in families.CONVERTED:
    return False
  return special_ids(folder, raw, 0)[0]['mask_id'] is None


def block_of(
  folder: str, raw: dict[str, Any], told: int | None
) -> tuple[int, list[str]]:
  """Returns the attention block, in tokens, and what is wrong with it.

  Takes its field out of config.json's fields. The block is `told`, else the field's,
  else the family's. A family whose directories differ is never guessed. A warning
  says where `told` is not the checkpoint's own.
  """
  field, default = families.BLOCKS.get(raw['model_type'], ('', 0))
  value = raw.pop(field, None)
  if type(value) is not int and value is not None or (value or 0) < 0:
    return 0, [f'{field} = {shown(value)} must be a whole number >= 0']
  own = default if value is None else value
  assumed = value is None and raw['model_type'] in families.ASSUMED
  if told is not None:
    if own not in (None, told) and not assumed:
      mesh.warn_once(
        f'model.attention_block = {told}, but {folder} was trained with '
        + (f'blocks of {own}' if own else 'attention over the whole text')
      )
    return told, []
  if own is not None:
    if assumed:
      mesh.warn_once(
        f'{folder}/config.json has no {field}: {own} is taken, as of the release. Set '
        'model.attention_block if it was trained with another'
      )
    return own, []
  return 0, [
    f'{field} is missing: set model.attention_block to the tokens of an attention '
    'block that it was trained with (SDAR: 4, or 8 to 64 as its name ends; bd3lm: its '
    'block; mdlm, which sees the whole text: 0)'
  ]


def head_problems(fields: dict[str, Any]) -> list[str]:
  """Says where the heads do not share the width or the keys evenly."""
  width, heads = fields['width'], fields['heads']
  key_heads, size = fields.get('kv_heads', heads), fields.get('head_dim')
  problems = []
  if heads % key_heads:
    problems.append(f'{heads} heads cannot share {key_heads} key and value heads')
  if not size and width % heads:
    problems.append(f'{heads} heads cannot share a width of {width} evenly')
  return problems


def wrong_type(value: Any, kind: Any) -> str:
  """Returns what a field of this kind must be, or '' if the value is that."""
  if kind is bool:
    return '' if isinstance(value, bool) else 'true or false'
  if kind is int:
    good = type(value) is int and 0 < value < 2**31
    return '' if good else 'a whole number >= 1'
  good = type(value) in (int, float) and 0 < value < 1e30
  return '' if good else 'a number > 0'


def sort_fields(family: Family, raw: dict[str, Any]) -> tuple[list[str], list[str]]:
  """Returns what may change the law and is not implemented, and what is ignored."""
  problems, ignored = [], []
  read = family.moe.defaults if family.moe else {}
  unread = family.moe.unread if family.moe else {}
  for name, value in raw.items():
    if name in read:
      continue
    if name in unread:
      agrees = unread[name]
      if agrees is not None and value not in agrees:
        ignored.append(f'{name} = {shown(value)} is ignored, as by the official class')
    elif name in family.fixed:
      if value not in family.fixed[name]:
        problems.append(
          f'{name} = {shown(value)}: only {family.fixed[name][0]!r} is implemented'
        )
    elif name in family.fields or families.HARMLESS.fullmatch(name):
      continue
    elif is_empty(value) or families.SERVING.fullmatch(name) or generates(name):
      ignored.append(f'{name} = {shown(value)} is ignored')
    else:
      problems.append(f'{name} = {shown(value)} is an unknown field')
  return problems, ignored


def generates(name: str) -> bool:
  """Returns whether a field is one of generation_config.json: it is no law's."""
  import transformers

  return name in vars(transformers.GenerationConfig())


def without_nesting(raw: dict[str, Any]) -> dict[str, Any]:
  """Moves transformers 5's nested fields to the top, and drops what has no effect.

  What changes rotary positions beside their base stays in rope_scaling.
  """
  raw = dict(raw)
  ropes = [raw.pop(name, None) for name in ('rope_scaling', 'rope_parameters')]
  ropes = [{} if is_empty(rope) else rope for rope in ropes]
  if odd := [rope for rope in ropes if not isinstance(rope, dict)]:
    raw['rope_scaling'] = odd[0]
    return raw
  rope = {**ropes[0], **ropes[1]}
  if rope.get('rope_theta') is not None:
    raw['rope_theta'] = rope.pop('rope_theta')
  share = rope.pop('partial_rotary_factor', None)
  if share not in (1, None) or 'partial_rotary_factor' in raw and share is not None:
    raw['partial_rotary_factor'] = share
  if rope.get('rope_type', rope.get('type')) == 'default':
    rope = {k: x for k, x in rope.items() if isinstance(x, dict | list) and x}
  if rope:
    raw['rope_scaling'] = rope
  layers = raw.get('layer_types')
  if isinstance(layers, list) and all(kind == 'full_attention' for kind in layers):
    del raw['layer_types']
  return raw


def llama3_of(raw: dict[str, Any]) -> tuple[float, ...]:
  """Returns ModelConfig.rope_llama3 of a config.json; () if it has no such scaling.

  () as well if a number is missing or wrong: the field is then refused as unknown.
  """
  rope = raw.get('rope_scaling')
  if not isinstance(rope, dict) or rope.get('rope_type', rope.get('type')) != 'llama3':
    return ()
  names = (
    'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings',
  )  # fmt: skip
  numbers: list[Any] = [rope.get(name) for name in names]
  if any(wrong_type(x, float) for x in numbers) or not numbers[1] < numbers[2]:
    return ()
  return tuple(map(float, numbers))


# --- special ids


def added_tokens(folder: str, told: dict[str, Any]) -> dict[str, int]:
  """Returns {token: id} of the tokens that a tokenizer's files list as added."""
  listed = files.read_object(os.path.join(folder, 'tokenizer.json'))
  own = files.read_object(os.path.join(folder, 'added_tokens.json'))
  try:
    added = {t['content']: int(t['id']) for t in listed.get('added_tokens') or []}
    decoder = told.get('added_tokens_decoder') or {}
    added |= {content: int(i) for content, i in own.items()}
    return added | {t['content']: int(i) for i, t in decoder.items()}
  except (TypeError, KeyError, AttributeError, ValueError) as error:
    raise ValueError(
      f'{folder}: the added tokens of tokenizer.json or tokenizer_config.json are '
      f'not as transformers writes them ({type(error).__name__}: {error})'
    ) from None


def special_ids(
  folder: str, raw: dict[str, Any], vocab: int
) -> tuple[dict[str, Any], list[str]]:
  """Returns {mask_id, eos_id, pad_id, stop_ids} and what is wrong with them.

  An id comes from config.json, else from the token that tokenizer_config.json
  names, else (the mask) from the usual names among the added tokens, else from
  the family. Where config.json lists several, the tokenizer's is taken. Mask and
  EOS must be the same in both files. Padding is never read, so there config.json's
  is taken. stop_ids: the other EOS of both files, and a chat's end of turn.
  """
  told = files.read_object(os.path.join(folder, 'tokenizer_config.json'))
  added, ids, problems = added_tokens(folder, told), {}, []
  for name in ('mask', 'eos', 'pad'):
    field, value = f'{name}_token_id', raw.get(f'{name}_token_id')
    several = listed(value)
    if wrong := [x for x in several if type(x) is not int]:
      problems.append(f'{field} = {shown(wrong[0])} must be a whole number')
      several = []
    if name == 'pad':  # old LLaMAs say -1 where there is none
      several = [x for x in several if x >= 0]
    token = told.get(f'{name}_token')
    token = token.get('content') if isinstance(token, dict) else token
    named = added.get(token) if isinstance(token, str) else None
    if name != 'pad' and named is not None and several and named not in several:
      problems.append(
        f'{field} = {value}, but tokenizer_config.json says {token!r} = {named}: '
        'which is right? Change the other'
      )
    ids[f'{name}_id'] = named if named in several or not several else several[0]
  if ids['mask_id'] is None:
    ids['mask_id'] = next((added[t] for t in MASK_TOKENS if t in added), None)
  for name, table in (('mask_id', families.MASKS), ('eos_id', families.ENDS)):
    if ids[name] is None and table.get(raw['model_type'], vocab) < vocab:
      ids[name] = table[raw['model_type']]
  if ids['pad_id'] is None:
    ids['pad_id'] = ids['eos_id']
  for name, value in ids.items():
    field = f'{name[:-3]}_token_id'
    if value is None and not any(field in problem for problem in problems):
      problems.append(
        f"{field} is missing, here and in the tokenizer's files: add the token's id"
      )
    elif value is not None and vocab and not 0 <= value < vocab:
      problems.append(f'{field} = {shown(value)} is outside the vocabulary of {vocab}')
  if ids['mask_id'] is not None and ids['mask_id'] == ids['eos_id']:
    problems.append(f'mask_token_id = eos_token_id = {ids["mask_id"]}')
  sampling = files.read_object(os.path.join(folder, 'generation_config.json'))
  stops = listed(raw.get('eos_token_id')) + listed(sampling.get('eos_token_id'))
  ends = [x for x in stops if type(x) is int and 0 <= x < (vocab or 2**31)]
  if len(ends) < len(stops) and not any('eos' in problem for problem in problems):
    problems.append(
      f'eos_token_id = {shown(stops)}, here and in generation_config.json, must be '
      f'tokens of the vocabulary of {vocab}'
    )
  ends = {*ends, *(added[t] for t in STOP_TOKENS if t in added)}
  ends -= {ids['mask_id'], ids['eos_id']}
  return {**ids, 'stop_ids': tuple(sorted(ends))}, problems


def listed(value: Any) -> list:
  """Returns a field that may hold one value, several or none as a list."""
  return [] if value is None else value if isinstance(value, list) else [value]
