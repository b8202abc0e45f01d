"""Makes rows of tokens of supervised texts, and says which rows an update sees.

A text is a prompt with its answer, or a dialogue. It stands from the first column on,
and is padded on the right to a multiple of sft.bucket. The task's own solutions are
laid out as RL has them instead: prompts padded on the left, completions of L columns.

Answers of a dialogue: a model that sees the whole text has a row for each answer, with
all before it as the prompt. A block-causal model learns all of them in one row. Two
answers in one attention block are then learned in two masked copies, each of which
hides what comes after its answer. So the loss is that of a row for each answer, summed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from dmpo_jax import data
from dmpo_jax.dialogues import Dialogue
from dmpo_jax.types import IntB, IntR, Lesson


class Text(NamedTuple):
  """A row before it is padded."""

  ids: Any  # integers; a list, or an array
  turn: Any  # the answer that a token belongs to, from 1; 0 = none, not learned
  where: str = ''  # file and line
  lead: int = 0  # padding before it, so that the answer begins an attention block
  whole: bool = True  # False: its end was cut off
  file: int = 0  # number of its file
  owner: int = 0  # number of its dialogue


@dataclasses.dataclass(frozen=True)
class Layout:
  """How texts become rows."""

  length: int  # tokens of a text at most; 0 = the longest
  bucket: int = 0  # a row is padded to a multiple of it; 0 = to the length
  fill: bool = True  # whether that padding is EOS and learned
  overlong: str = 'error'  # error | drop | cut
  block: int = 0  # tokens of an attention block; 0 = the model sees the whole text
  eos: int = 0


# --- dialogues to texts


def texts_of(
  tokenizer: Any, one: Dialogue, turns: str, block: int, grid: str
) -> list[Text]:
  """Returns the texts of a dialogue: one for all answers if they can share one.

  turns: all | last. grid: where attention blocks begin; from the prompt's end on they
  differ between the answers, so that these have a text each.
  """
  at = [i for i, m in enumerate(one.messages) if m['role'] == 'assistant']
  at = at if turns == 'all' else at[-1:]
  if block and grid == 'text' and len(at) > 1:
    if packed := pack(tokenizer, one, at):
      return [packed]
  out = []
  for i in at:
    _, body, end = split(tokenizer, one, i)
    ids = data.apply_chat(tokenizer, one.messages[:i], True)
    learned = data.encode_end(tokenizer, body, end)
    out.append(ended(tokenizer, asked(ids, one.where, block, grid), learned))
  return out


def asked(ids: list[int], where: str, block: int, grid: str) -> Text:
  """Returns a prompt as a text that learns nothing, for an answer to go on from."""
  lead = -len(ids) % block if block and grid == 'prompt' else 0
  return Text(ids, [0] * len(ids), where, lead)


def split(tokenizer: Any, one: Dialogue, at: int) -> tuple[str, str, list[int]]:
  """Returns prompt and answer `at` as the chat template writes them, and its end."""
  prompt = data.apply_chat(tokenizer, one.messages[:at], False)
  both = data.apply_chat(tokenizer, one.messages[: at + 1], False, asks=False)
  if not both.startswith(prompt):
    raise ValueError(
      f'{one.where}: the chat template does not write an answer behind the prompt that '
      f'asks for it ({prompt[-40:]!r}): such a template cannot be learned from'
    )
  content = one.messages[at]['content']
  return prompt, *data.split_end(tokenizer, both[len(prompt) :], content)


def ended(tokenizer: Any, text: Text, learned: list[int], turn: int = 1) -> Text:
  """Returns a text with its last answer and EOS behind it."""
  eos = tokenizer.eos_token_id
  learned = learned if learned[-1:] == [eos] else [*learned, eos]
  return text._replace(ids=text.ids + learned, turn=text.turn + [turn] * len(learned))


def pack(tokenizer: Any, one: Dialogue, at: Sequence[int]) -> Text | None:
  """Returns one text of all answers.

  None if the template rewrites earlier answers, or does not end them by a token.
  """
  ids, turn, done = [], [], ''
  for number, i in enumerate(at, 1):
    prompt, body, end = split(tokenizer, one, i)
    if not (prompt.startswith(done) and end):
      return None
    if done:
      between = tokenizer(prompt[len(done) :], add_special_tokens=False)['input_ids']
    else:
      between = data.apply_chat(tokenizer, one.messages[:i], True)
    learned = data.encode_end(tokenizer, body, end)
    ids, turn = ids + between, turn + [0] * len(between)
    if i == at[-1]:
      return ended(tokenizer, Text(ids, turn, one.where), learned, number)
    ids, turn = ids + learned, turn + [number] * len(learned)
    done = prompt + body + ''.join(tokenizer.convert_ids_to_tokens(end))
  return None


# --- texts to rows


def fit(texts: Sequence[Text], how: Layout, field: str = 'sft.length') -> list[Text]:
  """Returns the texts that fit how.length, as how.overlong says; drops the empty."""
  size = lambda text: text.lead + len(text.ids)
  long = [text for text in texts if size(text) > how.length]
  if long and how.overlong == 'error':
    raise ValueError(
      f'{field} = {how.length} is too short for {len(long)} of {len(texts)} texts, '
      f'such as that of {long[0].where}: raise it to {max(map(size, long))}, or set '
      'sft.overlong = drop or cut'
    )
  if how.overlong == 'drop':
    kept = [text for text in texts if size(text) <= how.length]
  else:
    kept = [
      text
      if size(text) <= how.length
      else text._replace(
        ids=text.ids[: how.length - text.lead],
        turn=text.turn[: how.length - text.lead],
        whole=False,
      )
      for text in texts
    ]
    kept = [text for text in kept if np.any(text.turn)]
  if len(kept) < len(texts):
    logging.info('left out %d of %d texts', len(texts) - len(kept), len(texts))
  if not kept:
    least, most = min(map(size, texts)), max(map(size, texts))
    raise ValueError(
      f'{field} = {how.length} leaves out every text: they have {least} to {most} '
      'tokens, raise it'
    )
  return kept


def size_of(text: Text, how: Layout) -> int:
  """Returns the columns of a text with its padding, which no other text decides."""
  unit = -(-(how.bucket or how.length) // (how.block or 1)) * (how.block or 1)
  return -(-(text.lead + len(text.ids)) // unit) * unit


def filled(text: Text, how: Layout) -> Text:
  """Returns a text with its padding, if that is learned."""
  missing = size_of(text, how) - text.lead - len(text.ids)
  if not (how.fill and text.whole):
    return text
  return text._replace(
    ids=np.pad(text.ids, (0, missing), constant_values=how.eos),
    turn=np.pad(text.turn, (0, missing), mode='edge'),
  )


def copies_of(text: Text, how: Layout) -> np.ndarray:
  """Returns the masked copy that learns each token, from 1; 0 = none.

  In an attention block each answer has a copy of its own.
  """
  turn = np.asarray(text.turn, np.int32)
  if not how.block:
    return np.minimum(turn, 1).astype(np.int8)
  block, learned = (np.arange(len(turn)) + text.lead) // how.block, turn > 0
  first = np.full(block[-1] + 1, turn.max())
  np.minimum.at(first, block[learned], turn[learned])
  return np.where(learned, turn - first[block] + 1, 0).astype(np.int8)


def rows_of(texts: Sequence[Text], how: Layout) -> tuple[np.ndarray, ...]:
  """Returns tokens (R, S), valid (R, S) and copies (R, S) of some texts."""
  shape = len(texts), max(size_of(text, how) for text in texts)
  tokens = np.full(shape, how.eos, np.int32)
  valid, copies = np.zeros(shape, bool), np.zeros(shape, np.int8)
  for r, text in enumerate(filled(text, how) for text in texts):
    end = text.lead + len(text.ids)
    tokens[r, text.lead : end] = text.ids
    copies[r, text.lead : end] = copies_of(text, how)
    # The rest of the last attention block stands there, as masks.
    valid[r, text.lead : -(-end // (how.block or 1)) * (how.block or 1)] = True
  return tokens, valid, copies


# --- the order of the rows


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
  """Which rows an update sees: a function of its number."""

  files: tuple[np.ndarray, ...]  # the rows of each file
  takes: tuple[int, ...]  # how many of them an epoch has
  size: np.ndarray  # columns of each row; a batch has rows of nearly one size
  batch: int
  seed: int

  @property
  def count(self) -> int:
    """Rows of an epoch."""
    return sum(self.takes)

  @functools.lru_cache(maxsize=2)  # noqa: B019  there is one Order in a run
  def epoch(self, epoch: int) -> np.ndarray:
    """Returns the rows of an epoch in their order."""
    chosen = []
    for k, (rows, take) in enumerate(zip(self.files, self.takes, strict=True)):
      whole, rest = divmod(take, len(rows))
      chosen += [rows] * whole
      if rest:  # the next of this file's own order
        seed = self.seed + 1 + k
        chosen.append(rows[data.indices_at(epoch, rest, len(rows), seed)])
    return np.concatenate(chosen)[data.permutation(self.seed, epoch, self.count)]

  @functools.lru_cache(maxsize=2)  # noqa: B019
  def window(self, window: int) -> np.ndarray:
    """Returns the rows of about an epoch of updates, (updates, batch).

    Where rows differ in size they are sorted by it, and the updates come in random
    order. Every row comes as often as in the order of epochs.
    """
    updates = max(1, self.count // self.batch)
    first, size = window * updates * self.batch, updates * self.batch
    epochs = range(first // self.count, (first + size - 1) // self.count + 1)
    rows = np.concatenate([self.epoch(epoch) for epoch in epochs])
    rows = rows[first - epochs[0] * self.count :][:size]
    if (self.size == self.size[0]).all():
      return rows.reshape(updates, -1)
    rows = rows[np.argsort(self.size[rows], kind='stable')].reshape(updates, -1)
    return rows[data.permutation(self.seed, window, updates)]

  def at(self, update: int) -> IntB:
    """Returns the rows of an update."""
    window, place = divmod(update, max(1, self.count // self.batch))
    return self.window(window)[place].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Lessons:
  """The rows of supervised training."""

  make: Callable[[IntB], tuple[np.ndarray, ...]]  # rows -> tokens, valid, copies
  order: Order
  held: np.ndarray  # rows that are held out
  copies: int = 1  # masked copies of a row

  def updates(self, steps: int, epochs: int) -> int:
    """Returns the updates that so many steps, or so many epochs, are."""
    return steps or math.ceil(epochs * self.order.count / self.order.batch)

  def lesson(self, index: IntB, row: IntR) -> Lesson:
    tokens, valid, copies = self.make(index)
    learn = (
      copies[:, None] == np.arange(1, self.copies + 1, dtype=np.int8)[None, :, None]
    )
    return Lesson(tokens, valid, learn, row.astype(np.int32))

  def at(self, update: int) -> Lesson:
    """Returns the batch of an update; its masks are addressed by place and update."""
    return self.lesson(self.order.at(update), np.arange(self.order.batch))

  def largest(self) -> Lesson:
    """Returns a batch of the rows with most columns."""
    last = np.argsort(self.order.size, kind='stable')[-self.order.batch :]
    index = np.resize(last, self.order.batch).astype(np.int32)
    return self.lesson(index, np.arange(self.order.batch))

  def held_out(self) -> Iterator[Lesson]:
    """Yields the held-out rows in batches; the last one has empty rows at its end."""
    rows = self.held[np.argsort(self.order.size[self.held], kind='stable')]
    for first in range(0, len(rows), self.order.batch):
      index = rows[first : first + self.order.batch]
      missing = self.order.batch - len(index)
      lesson = self.lesson(np.pad(index, (0, missing), mode='edge'), np.arange(1))
      where = first + np.arange(self.order.batch, dtype=np.int32)
      learn = lesson.learn & (np.arange(self.order.batch) < len(index))[:, None, None]
      yield lesson._replace(learn=learn, row=where)


def take_out(
  owner: Sequence[int] | np.ndarray,
  share: float,
  seed: int,
  field: str = 'sft.held_out',
) -> np.ndarray:
  """Returns which rows are held out, bool: those of a share of the owners, at random.

  owner: the dialogue of each row, from 0. ValueError if none would be left.
  """
  owners = np.asarray(owner)
  count = int(owners.max()) + 1
  held = max(1, int(count * share)) if share else 0
  if held >= count:
    raise ValueError(
      f'{field} = {share} holds out all {count} texts: set 0, or add texts'
    )
  chosen = np.random.default_rng([seed, count]).permutation(count)[:held]
  return np.isin(owners, chosen)
