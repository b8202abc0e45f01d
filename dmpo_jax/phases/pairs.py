"""Training on preference pairs: DPO on ELBOs, by the objective vrpo in groups of two.

The pairs come from files, or are made of the saved rollouts of other runs. Then they
are written to the workdir, so that the run resumes without those. Which pairs an update
sees is a function of its number.
"""

import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from dmpo_jax import (
  buffers,
  build,
  check,
  data,
  files,
  lessons,
  mesh,
  model,
  pairs,
  resume,
  runs,
)
from dmpo_jax.phases.phase import Phase, Session
from dmpo_jax.rollout import rows_of
from dmpo_jax.types import IntB, Params, Prompts, TrainBatch, TrainState
from dmpo_jax.verify import Verifier


class Pairs(Phase):
  """pairs.epochs passes over the pairs, each update on pairs.batch of them."""

  name, rows, lr_field = 'pairs', 'pairs', 'pairs.lr'
  inner = 1

  def __init__(self, session: Session, base: Params):
    super().__init__(session)
    self.hp = check.part(self.config, 'pairs')
    self.refuse = resume.refuse(self.config, check.FREE)
    self.pairs = rows_at(self.built, session.workdir)
    held = lessons.take_out(
      self.pairs.owner, self.hp.held_out, self.config.seed, 'pairs.held_out'
    )
    self.held, self.train = np.flatnonzero(held), np.flatnonzero(~held)
    self.iterations = -(-self.hp.epochs * len(self.train) // self.hp.batch)
    self.trainable, self.frozen = resume.model_of(self.built, base)
    self.references: tuple = ()  # read by `start`

  def start(self) -> TrainState:
    found = self.built.steps.read_references()
    goes_on = check.part(self.config, 'sft').goes_on
    self.references = resume.with_base(found, self.trainable if goes_on else {})
    logging.info(
      'training on pairs: %d updates of %d pairs', self.updates, self.hp.batch
    )
    return self.built.steps.start_pairs(self.trainable)

  def prepare(self, update: int) -> int | None:
    """Drops the accuracy at the checkpoint: it is taken again."""
    super().prepare(update)
    self.writer.rewind('held_out_pairs', update - 1)

  def placed(self, index: IntB, iteration: int) -> Any:
    """Returns pairs as a buffer; the number addresses their masks."""
    found = Prompts(self.pairs.prompt[index], self.pairs.valid[index], index)
    tokens, valid, row = rows_of(found, 2, iteration)
    answers = self.pairs.answers[index].reshape(2 * len(index), -1)
    return self.built.steps.place_pairs(tokens, valid, answers, row)

  def begin(self, state: TrainState, iteration: int, age: int) -> TrainBatch:
    """Returns a batch of pairs with the reference's ELBOs, under the update's masks."""
    batch, steps = self.hp.batch, self.built.steps
    at = data.indices_at(iteration, batch, len(self.train), self.config.seed)
    sampled = self.placed(self.train[at], iteration)
    references = resume.laid(self.references, state)
    scores = steps.score_pairs(state.trainable, self.frozen, references, sampled)
    reward = np.tile(np.array([1, 0], np.float32), (batch, 1))
    return steps.pack_pairs(sampled, reward, scores)[0]

  def finish(
    self, begun: TrainBatch, place: resume.Place
  ) -> tuple[TrainBatch, resume.Place]:
    return begun, place

  def update(
    self, state: TrainState, batch: TrainBatch, inner: int
  ) -> tuple[TrainState, Any]:
    return self.built.steps.update_pairs(state, self.frozen, batch, inner)

  # --- held-out pairs

  def validates_after(self, update: int) -> bool:
    if not len(self.held):
      return False
    every = self.hp.every
    return update == self.updates or bool(every and update % every == 0)

  def validate(self, state: TrainState, update: int, beat: Callable[[], None]) -> bool:
    """Counts the held-out pairs whose chosen completion has gained more."""
    references, gaps = resume.laid(self.references, state), []
    with self.clock('evaluate'):
      for at in range(0, len(self.held), self.hp.batch):
        beat()
        index = np.resize(self.held[at : at + self.hp.batch], self.hp.batch)
        sampled = self.placed(index, at // self.hp.batch)
        args = (state.trainable, self.frozen, references, sampled)
        ours, theirs = mesh.fetch(self.built.steps.measure_pairs(*args))
        gaps.append((ours - theirs).reshape(-1, 2))
    gap = np.concatenate(gaps)[: len(self.held)].astype(np.float64)
    margin = gap[:, 0] - gap[:, 1]
    numbers = {
      # A tie counts half: so it begins at 1/2, where policy and reference are one.
      'pairs_right': float(np.mean((margin > 0) + 0.5 * (margin == 0))),
      'margin': float(margin.mean()),
    }
    self.shown |= self.writer.write('held_out_pairs', update, numbers)
    return False


# --- where the pairs come from


def rows_at(built: build.Built, workdir: str) -> pairs.Rows:
  """Returns the pairs of a run as arrays, made once.

  Those of other runs' rollouts are written to the workdir first, and read from there
  when the run resumes.
  """
  if 'pairs' in built.encoded:
    return built.encoded['pairs']
  c = built.config
  said: Any = None
  if jax.process_index() == 0:
    try:
      said = lines_of(built, workdir)
    except ValueError as error:
      said = str(error)
  said = mesh.gather(said)[0]
  if isinstance(said, str):
    raise ValueError(said)
  text = json.dumps([{**line, 'where': ''} for line in said], sort_keys=True)
  built.read['pairs.path'] = zlib.crc32(text.encode())
  cfg, length = built.model, c.sampler.length
  # The end of a prompt may share an attention block with the completion.
  shared = cfg.block_causal if cfg.block_grid == 'text' else 0
  how = pairs.Layout(
    built.tokenizer,
    length,
    lambda prompt: length - (prompt % shared if shared else 0),
    cfg.vocab,
    -1 if c.sampler.eos_stop else cfg.eos_id,
    c.pairs.overlong,
  )
  rows = pairs.rows_of(said, how)
  if rows.prompt.shape[1] + length > cfg.positions:
    raise ValueError(
      f'pairs.path: a prompt of {rows.prompt.shape[1]} tokens and sampler.length = '
      f"{length} exceed the model's {cfg.positions} positions"
    )
  built.encoded['pairs'] = rows
  return rows


def lines_of(built: build.Built, workdir: str) -> list[dict]:
  """Returns the lines of pairs.path; of workdirs they are made, and kept in a file.

  A file in a workdir where nothing was computed may be of another config.
  """
  sources, path = built.config.pairs.path, os.path.join(workdir, pairs.FILE)
  if os.path.exists(path) and runs.is_begun(workdir):
    return pairs.read([path])
  if gone := [name for name in sources if not os.path.exists(name)]:
    raise ValueError(f'pairs.path: {gone[0]}: no such file or workdir')
  if all(map(os.path.isfile, sources)):
    return pairs.read(sources)
  lines, count = curated(built, sources)
  logging.info('pairs of saved rollouts: %s', pairs.told(count))
  if not lines:
    raise ValueError(f'pairs.path = {tuple(sources)}: {pairs.told(count)}')
  files.replace(path, files.to_lines(lines))
  return pairs.read([path])


def judged(built: build.Built, folders: Sequence[str]) -> list[pairs.Completion]:
  """Returns the saved completions of some runs, as the verifier judges them."""
  c, stops = built.config, model.stops(built.model)
  prefill = build.problems(built, 'train').prefill
  verifier = Verifier(built.task, c.data.protocol, c.data.style, prefill)

  def judge(buffer: buffers.Buffer, run: int) -> list[pairs.Completion]:
    return pairs.completions_of(buffer, run, verifier, built.tokenizer, stops)

  return pairs.gather(folders, c.pairs.last, judge)


def curated(
  built: build.Built, folders: Sequence[str]
) -> tuple[list[dict], Counter[str]]:
  """Returns the pairs of some runs' rollouts, and what they were made from."""
  return pairs_among(built, judged(built, folders))


def pairs_among(
  built: build.Built, completions: Sequence[pairs.Completion]
) -> tuple[list[dict], Counter[str]]:
  """Returns the pairs of completions; none is of a problem of validation or test."""
  held = {
    data.digest(built.task, example)
    for split in ('validation', 'test')
    for example in build.problems(built, split).examples
  }
  hp = check.part(built.config, 'pairs')
  return pairs.curate(completions, hp, built.config.seed, held)


def solved_of(
  built: build.Built, folders: Sequence[str], share: float
) -> list[dict[str, str]]:
  """Returns a share of the problems that some runs answered right every time."""
  return pairs.solved(judged(built, folders), share, built.config.seed)
