"""The texts that supervised training learns: of files, of the hub, or of the task."""

from collections.abc import Iterator

import numpy as np

from dmpo_jax import build, check, data, dialogues, lessons


def lessons_of(built: build.Built) -> lessons.Lessons:
  """Returns the rows of supervised training, made once.

  ValueError if a file has no texts or a wrong row, or if a text is too long.
  """
  if 'sft' not in built.encoded:
    c, sft = built.config, check.part(built.config, 'sft')
    made = canvas_rows(built) if not (sft.path or sft.length) else text_rows(built)
    make, size, file, owner, copies = made
    held = lessons.take_out(owner, sft.held_out, c.data.seed)
    weights = sft.weights or [1.0] * max(1, len(sft.path))
    train = np.flatnonzero(~held)
    rows = [train[np.asarray(file)[train] == k] for k in range(len(weights))]
    if empty := [sft.path[k] for k, x in enumerate(rows) if not len(x)]:
      raise ValueError(f'sft.path: {empty[0]} has no text that can be learned')
    takes = [max(1, round(w * len(x))) for w, x in zip(weights, rows, strict=True)]
    order = lessons.Order(tuple(rows), tuple(takes), size, sft.batch, c.seed)
    made = lessons.Lessons(make, order, np.flatnonzero(held), copies)
    if sft.anneal > (updates := made.updates(sft.steps, sft.epochs)):
      raise ValueError(
        f'sft.anneal = {sft.anneal} must be at most the {updates} updates of '
        f"{sft.length_of()}: attention would not become the model's own"
      )
    built.encoded['sft'] = made
  return built.encoded['sft']


def canvas_rows(built: build.Built) -> tuple:
  """Returns the task's solutions at RL's lengths: see lessons_of."""
  tokens, valid = canvas(built)
  learn = np.ones((len(tokens), built.config.sampler.length), np.int8)
  n = len(tokens)
  make = lambda index: (tokens[index], valid[index], learn[index])
  return make, np.zeros(n, np.int32), [0] * n, range(n), 1


def canvas(built: build.Built) -> tuple[np.ndarray, np.ndarray]:
  """Returns (n, S) int32 tokens and bool validity of prompts with true answers."""
  c = built.config
  found = build.problems(built, 'train')
  texts = [built.task.target(example, c.data.style) for example in found.examples]
  targets, kept = data.encode_targets(
    texts, built.tokenizer, c.sampler.length, c.sft.overlong
  )
  tokens = np.concatenate([found.tokens[kept], targets], axis=1)
  valid = np.concatenate([found.valid[kept], np.ones_like(targets, bool)], axis=1)
  return tokens, valid


def text_rows(built: build.Built) -> tuple:
  """Returns texts of files, or of the task at sft.length: see lessons_of."""
  cfg, sft = built.model, check.part(built.config, 'sft')
  texts = [
    text._replace(
      ids=np.array(text.ids, np.int32),
      turn=np.array(text.turn, np.int16),
      file=k,
      owner=owner,
    )
    for owner, (k, one) in enumerate(enumerate_texts(built))
    for text in one
  ]
  longest = max(text.lead + len(text.ids) for text in texts)
  how = lessons.Layout(
    sft.length or longest,
    sft.bucket,
    sft.fill,
    sft.overlong,
    cfg.block_causal,
    cfg.eos_id,
  )
  texts = lessons.fit(texts, how)
  size = np.array([lessons.size_of(text, how) for text in texts], np.int32)
  if size.max() > cfg.positions:
    raise ValueError(
      f"sft.length: rows of {size.max()} tokens exceed the model's {cfg.positions} "
      'positions: lower it, and set sft.overlong = drop or cut'
    )
  _, owner = np.unique([text.owner for text in texts], return_inverse=True)
  copies = max(int(lessons.copies_of(text, how).max()) for text in texts)
  return (
    lambda index: lessons.rows_of([texts[i] for i in index], how),
    size,
    [text.file for text in texts],
    owner,
    copies,
  )


def enumerate_texts(built: build.Built) -> Iterator[tuple[int, list[lessons.Text]]]:
  """Yields (number of the file, texts) of each dialogue, or of the task's problems."""
  c, tokenizer = built.config, built.tokenizer
  blocks = built.model.block_causal, c.model.attention_grid
  for k, name in enumerate(c.sft.path):
    for one in dialogues.read(name):
      yield k, lessons.texts_of(tokenizer, one, c.sft.turns, *blocks)
  if c.sft.path:
    return
  found, end = build.problems(built, 'train'), data.turn_end(tokenizer)
  for at, example in enumerate(found.examples):
    prompt = found.tokens[at][found.valid[at]].tolist()
    learned = data.encode_end(tokenizer, built.task.target(example, c.data.style), end)
    text = lessons.asked(prompt, f'training problem {at}', *blocks)
    yield 0, [lessons.ended(tokenizer, text, learned)]
