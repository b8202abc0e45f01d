"""Tokenizers, prompts in left-padded arrays, and batches by step.

The position in the data is a function of the step, so there is nothing to
checkpoint and nothing to wind forward on resume.
"""

import functools
import os
from typing import NamedTuple

import numpy as np

from dmpo_jax.types import Array, Prompts

CHAT = ('{% for message in messages %}<|{{ message.role }}|>'
        '{{ message.content }}{% endfor %}'
        '{% if add_generation_prompt %}<|assistant|>{% endif %}')
SPECIAL = ('<|pad|>', '<|mask|>', '<|eos|>', '<|unk|>', '<|user|>',
           '<|assistant|>')
TAGS = ('<reasoning>', '</reasoning>', '<answer>', '</answer>')


class Problems(NamedTuple):
  examples: list  # of dicts, in the task's field names
  tokens: Array  # (n, P) int32, prompts left-padded
  valid: Array  # (n, P) bool


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
  raw.pre_tokenizer = pre_tokenizers.Split(
      tokenizers.Regex(r'[\s\S]'), 'isolated')
  raw.decoder = decoders.Fuse()
  raw.add_special_tokens(list(SPECIAL))
  raw.add_tokens([tokenizers.AddedToken(t, special=False) for t in TAGS])
  return PreTrainedTokenizerFast(
      tokenizer_object=raw, pad_token='<|pad|>', mask_token='<|mask|>',
      eos_token='<|eos|>', unk_token='<|unk|>', chat_template=CHAT,
      clean_up_tokenization_spaces=False)


def load_tokenizer(name):
  """'char', or a directory with a tokenizer.json (never remote code)."""
  if name == 'char':
    return char_tokenizer()
  if not os.path.isdir(name):
    raise ValueError(f"data.tokenizer = {name!r} must be 'char' or a directory "
                     'that holds tokenizer.json')
  from transformers import PreTrainedTokenizerFast
  return PreTrainedTokenizerFast.from_pretrained(name)


def encode_chat(tokenizer, text):
  """Token ids of a user's message, up to where the assistant begins."""
  return tokenizer.apply_chat_template(
      [{'role': 'user', 'content': text}], add_generation_prompt=True,
      tokenize=True, return_dict=False)


def left_pad(ids, length, pad_id):
  """Lists of ids -> (n, length) int32 tokens and bool validity."""
  tokens = np.full((len(ids), length), pad_id, np.int32)
  valid = np.zeros((len(ids), length), bool)
  for row, row_ids in enumerate(ids):
    if row_ids:
      tokens[row, -len(row_ids):] = row_ids
      valid[row, -len(row_ids):] = True
  return tokens, valid


def encode_problems(examples, texts, tokenizer, length=0,
                    attend_padding=False):
  """Problems of a split. length 0 takes the longest prompt's.

  attend_padding marks padding as real tokens, as the papers' code treats it.
  ValueError if a prompt is longer than `length` or there are none.
  """
  if not examples:
    raise ValueError('the data set is empty: data.path holds no problem of '
                     'this split')
  ids = [encode_chat(tokenizer, text) for text in texts]
  longest = max(map(len, ids))
  if length and longest > length:
    raise ValueError(
        f'data.prompt_length = {length} is too short: '
        f'{sum(len(i) > length for i in ids)} of {len(ids)} prompts are '
        f'longer, the longest has {longest} tokens')
  pad = tokenizer.pad_token_id
  tokens, valid = left_pad(ids, length or longest, pad)
  return Problems(examples, tokens, valid | attend_padding)


@functools.lru_cache(maxsize=4)
def permutation(seed, epoch, count):
  return np.random.default_rng([seed, epoch]).permutation(count)


def indices_at(step, batch, count, seed):
  """(batch,) rows of step `step`: epochs of seeded permutations, end to end."""
  places = step * batch + np.arange(batch)
  return np.array([permutation(seed, int(p) // count, count)[p % count]
                   for p in places], np.int32)


def prompts_at(problems, step, batch, seed):
  """The B prompts of rollout `step`."""
  index = indices_at(step, batch, len(problems.examples), seed)
  return Prompts(problems.tokens[index], problems.valid[index], index)


def encode_targets(texts, tokenizer, length):
  """(n, L) int32 completions, the tail filled with EOS.

  ValueError if one is longer than `length`.
  """
  out = np.full((len(texts), length), tokenizer.eos_token_id, np.int32)
  for row, text in enumerate(texts):
    ids = tokenizer(text, add_special_tokens=False)['input_ids']
    if len(ids) > length:
      raise ValueError(f'sampler.length = {length} is too short for the SFT '
                       f'target {text!r} of {len(ids)} tokens')
    out[row, :len(ids)] = ids
  return out


def decode(tokenizer, completion_RxL, eos_id):
  """Texts up to the first EOS (kept out), special tokens left in."""
  texts = []
  for row in np.asarray(completion_RxL):
    end = np.flatnonzero(row == eos_id)
    row = row[:end[0]] if len(end) else row
    texts.append(tokenizer.decode(row, skip_special_tokens=False))
  return texts
