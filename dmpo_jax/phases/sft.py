"""Supervised training of the masked model: LLaDA's SFT loss on true answers.

It makes the base model of a run that starts from nothing, or tunes one that is read.
Which texts an update sees is a function of the update's number, so that a resumed run
sees the same.
"""

import os
from collections.abc import Callable
from typing import Any

from absl import logging

from dmpo_jax import check, lessons, optim, resume
from dmpo_jax.phases import texts
from dmpo_jax.phases.phase import Phase, Session
from dmpo_jax.types import Params, TrainState


class SFT(Phase):
  """sft.steps or sft.epochs of updates on texts with answers."""

  name, rows, lr_field = 'sft', 'sft', 'sft.lr'
  iterations = 1

  def __init__(self, session: Session, base: Params | None = None):
    super().__init__(session)
    self.hp = check.part(self.config, 'sft')
    self.inner, self.best = 0, None
    if self.hp.trains:
      self.texts = texts.lessons_of(self.built)
      self.inner = self.texts.updates(self.hp.steps, self.hp.epochs)

  def start(self) -> TrainState:
    trainable, self.frozen = resume.sft_start(self.built)
    return self.built.steps.start_sft(trainable)

  def prepare(self, update: int) -> int | None:
    """Drops the held-out loss at the checkpoint: it is taken again."""
    super().prepare(update)
    self.writer.rewind('held_out', update - 1)
    self.best = resume.best_held_out(self.session.workdir, update)
    return self.best and self.best.update

  def finish(
    self, begun: None, place: resume.Place
  ) -> tuple[lessons.Lessons, resume.Place]:
    logging.info(
      'supervised training: %d updates of %d rows', self.updates, self.hp.batch
    )
    return self.texts, place

  def update(
    self, state: TrainState, batch: lessons.Lessons, inner: int
  ) -> tuple[TrainState, Any]:
    factor = optim.DECAYS[self.hp.decay](inner / self.updates)
    lesson = batch.at(inner)
    return self.built.steps.sft(state, self.frozen, lesson, inner, factor)

  # --- held-out texts

  def validates_after(self, update: int) -> bool:
    if not self.hp.held_out or not update:
      return False
    every = self.hp.every
    return update == self.updates or bool(every and update % every == 0)

  def validate(self, state: TrainState, update: int, beat: Callable[[], None]) -> bool:
    """Takes the ELBO of the held-out texts; returns whether it is the best so far."""
    nll, tokens = 0.0, 0
    with self.clock('evaluate'):
      for lesson in self.texts.held_out():
        beat()
        one = self.built.steps.held_out(state.trainable, self.frozen, lesson)
        nll, tokens = nll + float(one[0]), tokens + int(one[1])
    loss = nll / max(tokens, 1)
    self.shown |= self.writer.write('held_out', update, {'held_out_nll': loss})
    if self.best and -loss <= self.best.accuracy:
      return False
    self.best = resume.Best(update, -loss)
    return True

  def outcome(self, state: TrainState) -> Params:
    """Returns the base of RL: of the best checkpoint, with the adapters merged."""
    trainable, workdir = state.trainable, self.session.workdir
    best = resume.best_held_out(workdir, self.updates) if self.hp.held_out else None
    if best and best.update != self.updates:
      folder = os.path.join(workdir, self.name)
      found = resume.read_state(self.built, folder, lambda: state, best.update)
      if found is None:
        raise ValueError(
          f'{folder}/{best.update}, the checkpoint with the least held-out loss, '
          'is gone: bring it back from a copy, or set sft.held_out = 0'
        )
      trainable = found.trees['state'].trainable
    return resume.trained_base(self.built, trainable, self.frozen)
