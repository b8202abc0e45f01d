"""Supervised training of the masked model: LLaDA's SFT loss on true answers.

It makes the base model of a run that starts from nothing. The true answers are its
only buffer. Which of them an update sees is a function of the update's number, so
that a resumed run sees the same.
"""

from typing import Any

import numpy as np
from absl import logging

from dmpo_jax import build, data, resume
from dmpo_jax.phases.phase import Phase, Session
from dmpo_jax.types import Params, TrainState


class SFT(Phase):
  """sft.steps updates on the prompts and true answers of the training split."""

  name, rows, lr_field = 'sft', 'sft', 'sft.lr'
  iterations = 1

  def __init__(self, session: Session, base: Params | None = None):
    super().__init__(session)
    self.inner = self.config.sft.steps

  def start(self) -> TrainState:
    return self.built.steps.start_sft(self.built.steps.init())

  def finish(self, begun: None, place: resume.Place) -> tuple[tuple, resume.Place]:
    c = self.config
    logging.info('supervised training: %d steps of %d rows', c.sft.steps, c.sft.batch)
    return encode(self.built), place

  def update(
    self, state: TrainState, batch: tuple, inner: int
  ) -> tuple[TrainState, Any]:
    tokens, valid = batch
    rows, seed = self.config.sft.batch, self.config.seed
    index = data.indices_at(inner, rows, len(tokens), seed)
    row = np.arange(rows, dtype=np.int32)
    return self.built.steps.sft(state, tokens[index], valid[index], row, inner)


def encode(built: build.Built) -> tuple[np.ndarray, np.ndarray]:
  """Returns (n, S) int32 tokens and bool validity of prompts with true answers."""
  c = built.config
  found = build.problems(built, 'train')
  texts = [built.task.target(example, c.data.style) for example in found.examples]
  targets = data.encode_targets(texts, built.tokenizer, c.sampler.length)
  tokens = np.concatenate([found.tokens, targets], axis=1)
  valid = np.concatenate([found.valid, np.ones_like(targets, bool)], axis=1)
  return tokens, valid
