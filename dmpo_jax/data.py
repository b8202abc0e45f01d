"""Loads tokenizers, encodes prompts in left-padded arrays, and draws batches by step.

The position in the data is a function of the step. So no data state is saved, and a
resumed run skips nothing.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from dmpo_jax import files
from dmpo_jax.tasks import userfile
from dmpo_jax.tasks.answers import PREFILL, TAGS
from dmpo_jax.types import (
  GIVEN,
  STOP_TOKENS,
  Array,
  BoolBP,
  BoolR,
  BoolRP,
  IntB,
  IntBP,
  IntRL,
  Prompts,
  Task,
  TaskOptions,
)

Tokenizer = Any  # a Hugging Face tokenizer; transformers is imported where it is needed

CHAT = (
  '{% for message in messages %}<|{{ message.role }}|>'
  '{{ message.content }}{% endfor %}'
  '{% if add_generation_prompt %}<|assistant|>{% endif %}'
)
SPECIAL = ('<|pad|>', '<|mask|>', '<|eos|>', '<|unk|>', '<|user|>', '<|assistant|>')
MASK_TOKEN = '<|mask|>'  # of a converted model where none is named; dllm's
TOKENIZER_FILES = (
  'tokenizer_config.json', 'tokenizer.json', 'special_tokens_map.json',
  'added_tokens.json', 'vocab.json',
)  # fmt: skip
# A token that tells the model family -> its chat template, if the files have none.
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
  '<|role_end|>': (  # LLaDA2's
    '<role>SYSTEM</role>detailed thinking off<|role_end|>'
    '{% for message in messages %}<role>'
    "{{ 'HUMAN' if message.role == 'user' else message.role | upper }}</role>"
    '{{ message.content }}<|role_end|>{% endfor %}'
    '{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}'
  ),
  '<|assistant|>': CHAT,
}


@dataclasses.dataclass(frozen=True)
class PromptOptions:
  """How problems become prompts."""

  style: str = 'bare'  # prompt template of the task: one of Task.styles
  template: str = ''  # file with {field}s of a problem; replaces style if set
  prompt_length: int = 0  # P in tokens; 0 = the longest prompt's
  overlong: str = 'error'  # prompts above prompt_length: error | drop | cut (left end)
  drop: str = ''  # file of training problems to leave out (solved.jsonl); '' = none
  attend_padding: bool = False  # True: padding counts as real, as in the papers' code


class Problems(NamedTuple):
  """The problems of a split and their prompts; n problems, P tokens."""

  examples: list[dict]  # in the task's field names
  tokens: IntBP  # (n, P) int32, prompts left-padded
  valid: BoolBP  # (n, P) False on padding
  changed: int = 0  # number of over-long prompts that were dropped or cut
  prefill: str = ''  # how every answer begins, at the end of its prompt
  show: Callable[[Any], str] = str  # example -> the text of its prompt


def char_tokenizer() -> Tokenizer:
  """Returns a tokenizer with one token per printable ASCII character.

  Each tag and each special token is one token too. It is a PreTrainedTokenizerFast
  with pad, mask and EOS tokens and a chat template.
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


def load_tokenizer(
  name: str, ids: Mapping[str, int] | None = None, mask: str = ''
) -> Tokenizer:
  """Returns the 'char' tokenizer, or that of a directory; never runs remote code.

  ids: mask_id, eos_id and pad_id of the model; they name the special tokens that the
  files leave out. mask: the token that becomes the mask of a converted model. Raises
  ValueError if a file or the chat template is missing or broken, if there is no mask or
  EOS, or if they have other ids than the model's.
  """
  if name != 'char' and not os.path.isdir(name):
    raise ValueError(
      f"data.tokenizer = {name!r} must be 'char' or a directory with tokenizer.json"
    )
  tokenizer = char_tokenizer() if name == 'char' else read_tokenizer(name)
  if mask:
    add_mask(tokenizer, mask)
  set_special_tokens(tokenizer, name, ids or {})
  vocab = tokenizer.get_vocab()
  if not tokenizer.chat_template:
    templates = [t for mark, t in TEMPLATES.items() if mark in vocab]
    if not templates:
      raise ValueError(
        f'{name} has no chat template, and its vocabulary has none of '
        f'{", ".join(TEMPLATES)} to tell the model family: add chat_template.jinja, or '
        'chat_template to tokenizer_config.json'
      )
    tokenizer.chat_template = templates[0]
  if 'probe' not in apply_chat(tokenizer, 'probe', tokenize=False):
    raise ValueError(f'the chat template of {name} leaves out what the user says')
  return tokenizer


def add_mask(tokenizer: Tokenizer, token: str) -> None:
  """Makes a token the mask; it gets the next id if the tokenizer does not have it.

  A mask of the tokenizer's own stays where the token is MASK_TOKEN, the default.
  ValueError if the token has a meaning already.
  """
  if token == MASK_TOKEN and tokenizer.mask_token is not None:
    return
  known = tokenizer.get_vocab().get(token)
  free = set(tokenizer.added_tokens_decoder) - {
    *stop_ids(tokenizer), tokenizer.pad_token_id, tokenizer.bos_token_id
  }  # fmt: skip
  if known is not None and known not in free:
    raise ValueError(
      f'model.mask_token = {token!r} has a meaning in {tokenizer.name_or_path}: name '
      f"an added token that it does not use, or set '' for a new token {MASK_TOKEN!r}"
    )
  tokenizer.add_special_tokens({'mask_token': token})


def set_special_tokens(tokenizer: Tokenizer, name: str, ids: Mapping[str, int]) -> None:
  """Gives a tokenizer the model's mask, EOS and padding where it has none.

  Padding is never read, so there the model's replaces another one. ValueError if
  mask or EOS differ from the model's, or if there is none. A mask of the model may
  be a row of the embedding beyond the tokenizer's tokens.
  """
  problems, replaced = [], []
  for kind in ('mask', 'eos', 'pad'):
    field, wanted = f'{kind}_token', ids.get(f'{kind}_id')
    if kind == 'pad' and wanted is None and tokenizer.pad_token is None:
      wanted = tokenizer.eos_token_id
    own = getattr(tokenizer, f'{field}_id')
    if wanted is None and own is None:
      problems.append(f'it has no {field}: name one in tokenizer_config.json')
    if wanted in (None, own):
      continue
    if kind != 'pad' and own is not None:
      problems.append(f"{field}_id = {own}, but the model's is {wanted}")
      continue
    replaced += [f'{own} by {wanted}'] * (own is not None)
    token = tokenizer.convert_ids_to_tokens(wanted)
    if token is None and kind != 'mask':
      problems.append(f"it has no token {wanted}, the model's {field}_id")
    setattr(tokenizer, field, token)
  if problems:
    raise ValueError(f'data.tokenizer: {name} does not fit: ' + '; '.join(problems))
  if replaced:
    logging.warning("%s: padding %s, the model's", name, replaced[0])


def read_tokenizer(folder: str) -> Tokenizer:
  """Reads tokenizer.json, or Qwen's vocab.json and merges.txt, as Dream has them."""
  import transformers

  has = lambda name: os.path.exists(os.path.join(folder, name))
  # Their errors name no file.
  read = {n: files.read_object(os.path.join(folder, n)) for n in TOKENIZER_FILES}
  named = read['tokenizer_config.json'].get('fast_tokenizer_files') or []
  named = map(str, named if isinstance(named, list) else [named])
  if wrong := [name for name in named if os.path.basename(name) != name]:
    raise ValueError(
      f'{folder}/tokenizer_config.json names the file {wrong[0]!r}, which is outside '
      'of its directory'
    )
  if has('tokenizer.json'):
    kind = transformers.PreTrainedTokenizerFast
  elif has('vocab.json') and has('merges.txt'):
    kind = transformers.Qwen2Tokenizer
  else:
    raise ValueError(
      f'{folder} has neither tokenizer.json nor vocab.json with merges.txt: '
      'set data.tokenizer to a directory that has them'
    )
  try:
    return kind.from_pretrained(folder)
  except Exception as error:  # many kinds, some of the Rust library
    raise ValueError(
      f'{folder}: the files of its tokenizer are damaged: {str(error).splitlines()[0]}'
    ) from error


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
  """Returns the ids that end a completion's text: EOS and the chat's end of turn."""
  vocab = tokenizer.get_vocab()
  ends = {vocab[t] for t in STOP_TOKENS if t in vocab}
  return tuple(sorted(ends | {tokenizer.eos_token_id}))


# ---- problems


def load_problems(
  task: Task, split: str, tokenizer: Tokenizer, options: TaskOptions, how: PromptOptions
) -> Problems:
  """Loads the problems of a split and encodes their prompts.

  Raises ValueError if the problems cannot be loaded, the template has no field of the
  task, or a prompt is too long.
  """
  with userfile.naming('data.task'):
    examples = list(task.load(split, options))
    check_problems(split, examples)
    if how.drop and split == 'train':
      examples = without(task, examples, how.drop)
    if how.template:
      show = lambda example: fill_template(how.template, [example])[0]
      texts, prefill = fill_template(how.template, examples), ''
    else:
      show = lambda example: task.prompt(example, how.style)
      texts, prefill = list(map(show, examples)), PREFILL.get(how.style, '')
  for number, text in enumerate(texts):
    if not isinstance(text, str):
      raise ValueError(
        f'data.task: the prompt of problem {number} of {split} must be a text, it is '
        f'{text!r}'
      )
  return encode_problems(examples, texts, tokenizer, how, prefill)._replace(show=show)


def digest(task: Task, example: dict) -> str:
  """Returns what tells problems apart: a hash of the prompt in its barest form."""
  return hashlib.sha256(task.prompt(example, 'bare').encode()).hexdigest()[:16]


def without(task: Task, examples: list[dict], path: str) -> list[dict]:
  """Returns the problems that a file of lines {problem: digest} does not name.

  ValueError if none is left, or a line names none.
  """
  rows = files.read(path)
  if wrong := [at for at, row in enumerate(rows, 1) if 'problem' not in row]:
    raise ValueError(
      f'data.drop = {path!r}, line {wrong[0]}: it must be {{"problem": digest}}, as '
      '--mode=pairs writes them'
    )
  named = {row['problem'] for row in rows}
  kept = [example for example in examples if digest(task, example) not in named]
  logging.info('left out %d of %d problems', len(examples) - len(kept), len(examples))
  if not kept:
    raise ValueError(f'data.drop = {path!r} leaves out every problem: set another')
  return kept


def check_problems(split: str, examples: Sequence[Any]) -> None:
  """Raises ValueError if a problem cannot be written beside its completions."""
  for number, example in enumerate(examples):
    try:
      right = isinstance(example, dict) and json.dumps(example)
    except (TypeError, ValueError):
      right = False
    if not right:
      raise ValueError(
        f'data.task: problem {number} of {split} must be a dict of values that JSON '
        f'can hold, it is {example!r}'
      )


def fill_template(path: str, examples: Sequence[dict]) -> list[str]:
  """Returns the text of a file with each {field} replaced, for each example.

  Other braces stay as they are. Raises ValueError if the file has no field.
  """
  with open(path, encoding='utf-8') as file:
    template = file.read()
  texts = []
  for example in examples:
    text, fields = template, [name for name in example if f'{{{name}}}' in template]
    if not fields:
      raise ValueError(
        f'the template {path} has no field of the problems: use '
        f'{", ".join(f"{{{name}}}" for name in example)}'
      )
    for name in fields:
      text = text.replace(f'{{{name}}}', str(example[name]))
    texts.append(text)
  return texts


def encode_chat(tokenizer: Tokenizer, text: str, prefill: str = '') -> list[int]:
  """Returns the token ids of a user's message, up to where the assistant begins.

  prefill: the beginning of the assistant's answer, which is added.
  """
  ids = apply_chat(tokenizer, text, tokenize=True)
  if prefill:
    ids = ids + tokenizer(prefill, add_special_tokens=False)['input_ids']
  return ids


def apply_chat(
  tokenizer: Tokenizer, said: str | list[dict], tokenize: bool, asks: bool = True
) -> Any:
  """Returns the ids or the text of a user's message in the chat template.

  said: may be a list of messages. asks: end where the assistant begins. ValueError if
  the template fails: it is a program, so it may raise anything.
  """
  try:
    return tokenizer.apply_chat_template(
      [{'role': 'user', 'content': said}] if isinstance(said, str) else said,
      add_generation_prompt=asks,
      tokenize=tokenize,
      return_dict=False,
    )
  except Exception as error:
    raise ValueError(
      f'the chat template of {tokenizer.name_or_path or "this tokenizer"} is broken: '
      f'{type(error).__name__}: {error}'
    ) from error


def left_pad(
  ids: Sequence[Sequence[int]], length: int, pad_id: int
) -> tuple[IntBP, BoolBP]:
  """Returns (n, length) int32 tokens and validity of n lists of ids."""
  tokens = np.full((len(ids), length), pad_id, np.int32)
  valid = np.zeros((len(ids), length), bool)
  for row, row_ids in enumerate(ids):
    if row_ids:
      tokens[row, -len(row_ids) :] = row_ids
      valid[row, -len(row_ids) :] = True
  return tokens, valid


def encode_problems(
  examples: list[dict],
  texts: Sequence[str],
  tokenizer: Tokenizer,
  how: PromptOptions = PromptOptions(),
  prefill: str = '',
) -> Problems:
  """Encodes the prompts `texts` of a split's examples.

  Prompts longer than `how.prompt_length` raise ValueError ('error'), drop their
  problem ('drop') or lose their beginning ('cut', as in the papers' code). Raises
  ValueError also if no problem is left.
  """
  if not examples:
    raise ValueError('the data set is empty: data.path has no problem of this split')
  ids = [encode_chat(tokenizer, text, prefill) for text in texts]
  longest = max(map(len, ids))
  length = how.prompt_length or longest
  overlong = sum(len(row) > length for row in ids)
  if overlong and how.overlong == 'error':
    raise ValueError(
      f'data.prompt_length = {length} is too short: {overlong} of {len(ids)} prompts '
      f'are longer, the longest has {longest} tokens. Raise it to {longest}, or set '
      'data.overlong to drop or cut'
    )
  if overlong and how.overlong == 'drop':
    logging.info(
      'dropped %d of %d prompts, which have more than %d tokens',
      *(overlong, len(ids), length),
    )
    examples = [e for e, row in zip(examples, ids, strict=True) if len(row) <= length]
    ids = [row for row in ids if len(row) <= length]
    if not ids:
      raise ValueError(
        f'data.prompt_length = {length} drops all {overlong} prompts: raise it to '
        f'{longest}'
      )
  tokens, valid = left_pad(
    [row[-length:] for row in ids], length, tokenizer.pad_token_id
  )
  return Problems(examples, tokens, valid | how.attend_padding, overlong, prefill)


def check_positions(
  problems: Problems, lengths: Mapping[str, int], positions: int, whose: str = 'model'
) -> None:
  """Raises ValueError if prompt and completion exceed the positions of a model.

  lengths: config field -> its number of completion tokens. whose: model | draft.
  """
  prompt = problems.tokens.shape[1]
  for field, length in lengths.items():
    if prompt + length > positions:
      raise ValueError(
        f'the longest prompt ({prompt} tokens) and {field} = {length} exceed the '
        f"{whose}'s {positions} positions: lower {field} or data.prompt_length"
      )


# ---- batches


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
  """Returns the order of `count` problems in an epoch."""
  return np.random.default_rng([seed, epoch]).permutation(count)


def indices_at(step: int, batch: int, count: int, seed: int) -> IntB:
  """Returns the problems of a step: seeded permutations, one epoch after another."""
  drawn = range(step * batch, (step + 1) * batch)
  return np.array(
    [permutation(seed, i // count, count)[i % count] for i in drawn], np.int32
  )


def prompts_of(problems: Problems, index: IntB, bucket: int = 0) -> Prompts:
  """Returns the B prompts of these problems, padded to a multiple of `bucket`."""
  tokens, valid = problems.tokens[index], problems.valid[index]
  length = bucketed(valid, bucket)
  return Prompts(tokens[:, -length:], valid[:, -length:], index)


def bucketed(valid_RxP: BoolRP, bucket: int) -> int:
  """Returns the longest prompt, rounded up to a multiple of `bucket`; 0: all of P."""
  whole = valid_RxP.shape[1]
  if not bucket:
    return whole
  longest = whole - int(np.argmax(valid_RxP.any(axis=0)))
  return min(whole, -(-longest // bucket) * bucket)


# ---- completions


def encode_answer(tokenizer: Tokenizer, text: str) -> list[int]:
  """Returns the token ids of an answer.

  A mask in it, which no sampler emits, or an end before its end is text like any
  other: the answer is then encoded without special tokens.
  """
  encode = lambda **how: tokenizer(text, add_special_tokens=False, **how)['input_ids']
  ids, ends = encode(), stop_ids(tokenizer)
  inside = list(ids)
  while inside and inside[-1] in ends:
    inside.pop()
  hidden = {tokenizer.mask_token_id, *ends}.intersection(inside)
  return encode(split_special_tokens=True) if hidden else ids


def turn_end(tokenizer: Tokenizer) -> list[int]:
  """Returns the token by which the chat template ends an answer; [] if it has none."""
  asked = apply_chat(tokenizer, 'a', False)
  both = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
  ended = apply_chat(tokenizer, both, False, asks=False)
  return split_end(tokenizer, ended[len(asked) :], 'b')[1]


def split_end(tokenizer: Tokenizer, text: str, content: str) -> tuple[str, list[int]]:
  """Cuts what a template writes of an answer into its text and its end: [id] or [].

  What follows is left out: LLaDA's template ends with the header of another answer.
  """
  vocab, content = tokenizer.get_vocab(), content.strip()
  stop = text.find(content) + len(content)
  if not text.count(content):  # the template rewrites it
    stop = len(text)
  ends = [(text.find(x, stop), x) for x in STOP_TOKENS if x in vocab]
  ends = sorted(pair for pair in ends if pair[0] >= 0)
  if not ends:
    return text[:stop], []
  at, token = ends[0]
  return text[:at], [vocab[token]]


def encode_end(tokenizer: Tokenizer, text: str, end: list[int]) -> list[int]:
  """Returns the ids of an answer with the end of its turn, once."""
  ids = encode_answer(tokenizer, text)
  return ids if ids[-1:] == end else ids + end


def encode_targets(
  texts: Sequence[str], tokenizer: Tokenizer, length: int, overlong: str = 'error'
) -> tuple[IntRL, BoolR]:
  """Returns (n, L) int32 completions filled with EOS, and which of the texts they are.

  The end of the turn stands before EOS where the chat template has one. A longer text
  is an error, is left out (drop), or loses its end (cut), so that no EOS follows.
  """
  end = turn_end(tokenizer)
  ids = [encode_end(tokenizer, text, end) for text in texts]
  long = np.array([len(row) > length for row in ids], bool)
  if long.any() and (overlong == 'error' or (overlong == 'drop' and long.all())):
    raise ValueError(
      f'sampler.length = {length} is too short for {long.sum()} of {len(ids)} SFT '
      f'targets, such as {texts[int(np.argmax(long))]!r}: set it to '
      f'{max(map(len, ids))} or more, or sft.overlong = cut'
    )
  kept = ~long if overlong == 'drop' else np.ones_like(long)
  out = np.full((len(texts), length), tokenizer.eos_token_id, np.int32)
  for row, row_ids in enumerate(ids):
    out[row, : len(row_ids)] = row_ids[:length]
  return out[kept], kept


def after_given(order_RxL: IntRL, x_RxL: Array, fill: Any) -> np.ndarray:
  """Returns x without the columns of given tokens, filled up on the right.

  They are the prompt's end, at the head of a block-causal model's canvas.
  """
  x, count = np.asarray(x_RxL), np.sum(np.asarray(order_RxL) == GIVEN, axis=1)
  if not count.any():
    return x
  column = np.arange(x.shape[1])[None] + count[:, None]
  moved = np.take_along_axis(x, np.minimum(column, x.shape[1] - 1), axis=1)
  return np.where(column < x.shape[1], moved, fill)


def decode(
  tokenizer: Tokenizer, completion_RxL: IntRL, stop: int | Sequence[int]
) -> list[str]:
  """Returns texts up to the first `stop` id, with other special tokens left in."""
  texts = []
  for row in np.asarray(completion_RxL):
    end = np.flatnonzero(np.isin(row, stop))
    row = row[: end[0]] if len(end) else row
    texts.append(tokenizer.decode(row, skip_special_tokens=False))
  return texts
