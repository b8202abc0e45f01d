"""Tokenizers, prompts in left-padded arrays, and batches by step.

The position in the data is a function of the step, so there is nothing to
checkpoint and nothing to wind forward on resume.
"""

import functools
import json
import os
from typing import NamedTuple

import numpy as np
from absl import logging

from dmpo_jax.tasks.answers import TAGS
from dmpo_jax.types import Array, Prompts

CHAT = (
  '{% for message in messages %}<|{{ message.role }}|>'
  '{{ message.content }}{% endfor %}'
  '{% if add_generation_prompt %}<|assistant|>{% endif %}'
)
SPECIAL = ('<|pad|>', '<|mask|>', '<|eos|>', '<|unk|>', '<|user|>', '<|assistant|>')
# Chat templates by a token that tells the family, for checkpoints without one.
TEMPLATES = {
  '<|start_header_id|>': (
    '{{ bos_token }}{% for message in messages %}<|start_header_id|>'
    '{{ message.role }}<|end_header_id|>\n\n{{ message.content }}<|eot_id|>'
    '{% endfor %}{% if add_generation_prompt %}<|start_header_id|>'
    'assistant<|end_header_id|>\n\n{% endif %}'
  ),
  '<|im_start|>': (
    '{% for message in messages %}<|im_start|>{{ message.role }}\n'
    '{{ message.content }}<|im_end|>\n{% endfor %}'
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
  ),
  '<|assistant|>': CHAT,
}


class Problems(NamedTuple):
  examples: list  # of dicts, in the task's field names
  tokens: Array  # (n, P) int32, prompts left-padded
  valid: Array  # (n, P) bool
  changed: int = 0  # over-long prompts that were dropped or cut


def char_tokenizer():
  """One token per printable ASCII character; tags and specials are one each.

  A PreTrainedTokenizerFast with pad, mask and eos tokens and a chat template.
  """
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  chars = ['\n'] + [chr(c) for c in range(32, 127)]
  vocab = {t: i for i, t in enumerate([*SPECIAL, *TAGS, *chars])}
  raw = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token='<|unk|>'))
  raw.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
  raw.decoder = decoders.Fuse()
  raw.add_special_tokens(list(SPECIAL))
  raw.add_tokens([tokenizers.AddedToken(t, special=False) for t in TAGS])
  return PreTrainedTokenizerFast(
    tokenizer_object=raw,
    pad_token='<|pad|>',
    mask_token='<|mask|>',
    eos_token='<|eos|>',
    unk_token='<|unk|>',
    chat_template=CHAT,
    clean_up_tokenization_spaces=False,
  )


def load_tokenizer(name, ids=None):
  """'char', or the tokenizer of a directory; never remote code, no questions.

  `ids` (mask_id, eos_id, pad_id) name the special tokens where the files do
  not. ValueError if a file or the chat template is missing.
  """
  if name == 'char':
    return char_tokenizer()
  if not os.path.isdir(name):
    raise ValueError(
      f"data.tokenizer = {name!r} must be 'char' or a directory "
      'that holds tokenizer.json'
    )
  tokenizer = read_tokenizer(name)
  for token, value in (ids or {}).items():
    field = token.replace('_id', '_token')
    if getattr(tokenizer, field) is None:
      setattr(tokenizer, field, tokenizer.convert_ids_to_tokens(value))
  vocab = tokenizer.get_vocab()
  if not tokenizer.chat_template:
    fits = [t for mark, t in TEMPLATES.items() if mark in vocab]
    if not fits:
      raise ValueError(
        f'{name} has no chat template (tokenizer_config.json, '
        'chat_template.jinja), and its vocabulary has none of '
        f'{", ".join(TEMPLATES)} to tell which one is meant'
      )
    tokenizer.chat_template = fits[0]
  return tokenizer


def read_tokenizer(folder):
  """tokenizer.json, or Qwen's vocab.json and merges.txt (Dream has these)."""
  import transformers

  has = lambda name: os.path.exists(os.path.join(folder, name))
  if has('tokenizer_config.json'):
    with open(os.path.join(folder, 'tokenizer_config.json')) as f:
      named = json.load(f).get('fast_tokenizer_files', [])
    if wrong := [name for name in named if os.path.basename(name) != name]:
      raise ValueError(
        f'{folder}/tokenizer_config.json names {wrong[0]!r}, outside of its directory'
      )
  if has('tokenizer.json'):
    kind = transformers.PreTrainedTokenizerFast
  elif has('vocab.json') and has('merges.txt'):
    kind = transformers.Qwen2Tokenizer
  else:
    raise ValueError(
      f'{folder} has no tokenizer.json, nor vocab.json and '
      'merges.txt: set data.tokenizer to a directory that has'
    )
  return kind.from_pretrained(folder)


def stop_ids(tokenizer):
  """Ids that end a completion's text: EOS and the chat's end of turn."""
  vocab = tokenizer.get_vocab()
  found = {vocab[t] for t in ('<|eot_id|>', '<|im_end|>') if t in vocab}
  return tuple(sorted(found | {tokenizer.eos_token_id}))


def encode_chat(tokenizer, text, prefill=''):
  """Token ids of a user's message, up to where the assistant begins.

  prefill: the beginning of the assistant's answer.
  """
  ids = tokenizer.apply_chat_template(
    [{'role': 'user', 'content': text}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=False,
  )
  if prefill:
    ids = ids + tokenizer(prefill, add_special_tokens=False)['input_ids']
  return ids


def left_pad(ids, length, pad_id):
  """Lists of ids -> (n, length) int32 tokens and bool validity."""
  tokens = np.full((len(ids), length), pad_id, np.int32)
  valid = np.zeros((len(ids), length), bool)
  for row, row_ids in enumerate(ids):
    if row_ids:
      tokens[row, -len(row_ids) :] = row_ids
      valid[row, -len(row_ids) :] = True
  return tokens, valid


def encode_problems(
  examples,
  texts,
  tokenizer,
  length=0,
  attend_padding=False,
  overlong='error',
  prefill='',
):
  """Problems of a split. length 0 takes the longest prompt's.

  attend_padding marks padding as real tokens, as the papers' code treats it.
  Prompts longer than `length`: 'error', 'drop' the problem, or 'cut' the
  prompt's beginning, as the papers' code does. ValueError also if nothing is
  left.
  """
  if not examples:
    raise ValueError('the data set is empty: data.path holds no problem of this split')
  ids = [encode_chat(tokenizer, text, prefill) for text in texts]
  long = sum(len(row) > length for row in ids) if length else 0
  if length and overlong == 'cut':
    ids = [row[-length:] for row in ids]
  elif length and overlong == 'drop':
    kept = [i for i, row in enumerate(ids) if len(row) <= length]
    if len(kept) < len(ids):
      logging.info(
        '%d of %d prompts have more than %d tokens: dropped', long, len(ids), length
      )
    if not kept:
      raise ValueError(f'data.prompt_length = {length} drops all {len(ids)} prompts')
    examples, ids = [examples[i] for i in kept], [ids[i] for i in kept]
  longest = max(map(len, ids))
  if length and longest > length:
    raise ValueError(
      f'data.prompt_length = {length} is too short: '
      f'{sum(len(i) > length for i in ids)} of {len(ids)} prompts are '
      f'longer, the longest has {longest} tokens'
    )
  pad = tokenizer.pad_token_id
  tokens, valid = left_pad(ids, length or longest, pad)
  return Problems(examples, tokens, valid | attend_padding, long)


@functools.lru_cache(maxsize=4)
def permutation(seed, epoch, count):
  return np.random.default_rng([seed, epoch]).permutation(count)


def indices_at(step, batch, count, seed):
  """(batch,) rows of step `step`: epochs of seeded permutations, end to end."""
  places = step * batch + np.arange(batch)
  return np.array(
    [permutation(seed, int(p) // count, count)[p % count] for p in places], np.int32
  )


def prompts_at(problems, step, batch, seed, bucket=0):
  """The B prompts of rollout `step`, padding cut to a multiple of `bucket`."""
  index = indices_at(step, batch, len(problems.examples), seed)
  tokens, valid = problems.tokens[index], problems.valid[index]
  length = bucketed(valid, bucket)
  return Prompts(tokens[:, -length:], valid[:, -length:], index)


def bucketed(valid_RxP, bucket):
  """The longest prompt, rounded up to a multiple of `bucket`; 0: all of P."""
  whole = valid_RxP.shape[1]
  if not bucket:
    return whole
  longest = whole - int(np.argmax(valid_RxP.any(axis=0)))
  return min(whole, -(-longest // bucket) * bucket)


def encode_targets(texts, tokenizer, length):
  """(n, L) int32 completions, the tail filled with EOS.

  ValueError if one is longer than `length`.
  """
  out = np.full((len(texts), length), tokenizer.eos_token_id, np.int32)
  for row, text in enumerate(texts):
    ids = tokenizer(text, add_special_tokens=False)['input_ids']
    if len(ids) > length:
      raise ValueError(
        f'sampler.length = {length} is too short for the SFT '
        f'target {text!r} of {len(ids)} tokens'
      )
    out[row, : len(ids)] = ids
  return out


def decode(tokenizer, completion_RxL, stop):
  """Texts up to the first of the `stop` ids, other special tokens left in."""
  texts = []
  for row in np.asarray(completion_RxL):
    end = np.flatnonzero(np.isin(row, stop))
    row = row[: end[0]] if len(end) else row
    texts.append(tokenizer.decode(row, skip_special_tokens=False))
  return texts
