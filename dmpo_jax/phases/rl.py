"""Reinforcement learning: what Algorithm 1 of DMPO does with a buffer.

A buffer is sampled and scored by `begin`, graded and weighed by `finish`. Both are in
rollout.py; here are the files, the health rules and the validation around them.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from dmpo_jax import (
  buffers,
  build,
  check,
  curriculum,
  evaluate,
  files,
  guard,
  health,
  mesh,
  metrics,
  resume,
  rollout,
)
from dmpo_jax.buffers import Buffer
from dmpo_jax.phases.phase import Phase, Session, Tracer
from dmpo_jax.types import Params, TrainBatch, TrainState


class RL(Phase):
  """train.iterations buffers of completions, train.inner updates on each."""

  name, rows, lr_field, validates = 'rl', 'update', 'optim.lr', True

  def __init__(self, session: Session, base: Params):
    super().__init__(session)
    c = self.config
    self.iterations, self.inner = c.train.iterations, c.train.inner
    self.overlap = c.train.overlap
    self.note = f'rollouts (temperature {c.sampler.temperature:g})'
    self.refuse = resume.refuse(c, check.FREE)
    self.rules = check.settings(health.Config, c.health)
    self.problems = build.problems(self.built, 'train')
    self.held_out = build.problems(self.built, 'validation')
    self.trainable, self.frozen = resume.policy_of(self.built, base)
    self.collector = build.collector(self.built, self.frozen)
    if self.collector.chooser:
      path = os.path.join(session.workdir, curriculum.FILE)
      lines = files.read(path) if jax.process_index() == 0 else []
      self.collector.chooser.read(mesh.gather(lines)[0])
    self.references: tuple = ()  # read by `start`
    self.best: resume.Best | None = None
    folder = os.path.join(session.workdir, 'profile')
    self.tracer = Tracer(folder, session.profile, self.clock)
    self.taken = 0  # updates since the last row of phase rl

  def start(self) -> TrainState:
    # The base is the policy that RL starts from, with its adapters if it has any.
    found = self.built.steps.read_references()
    start = self.trainable if check.keeps_adapters(self.config) else {}
    self.references = resume.with_base(found, start)
    return self.built.steps.start(self.trainable)

  # --- checkpoints and files

  def buffers(self, update: int) -> dict[str, int]:
    it, inner = divmod(update, self.inner)
    out = {'batch': it} if inner else {}
    following = it + (inner > 0)
    if self.overlap and update and following < self.iterations:
      out['ahead' if inner else 'batch'] = following
    return out

  def shapes(self, update: int) -> dict[str, TrainBatch]:
    out, bucketed = {}, self.config.data.bucket
    for name, it in self.buffers(update).items():
      tokens = (
        self.collector.prompts_at(it).tokens if bucketed else self.problems.tokens
      )
      out[name] = build.abstract_buffer(self.built, tokens.shape[1]).batch
    return out

  def prepare(self, update: int) -> int | None:
    """Keeps the lines of the buffers that the checkpoint holds.

    Drops the validation before an iteration that is not begun: it is done again.
    """
    (it, inner), workdir = divmod(update, self.inner), self.session.workdir
    last = max(self.buffers(update).values(), default=it - 1)
    self.writer.rewind('rl', last)
    self.writer.rewind('eval', it - (inner == 0))
    self.writer.rewind('update', update)
    for name in ('samples.jsonl', 'failed_grades.jsonl', curriculum.FILE):
      resume.rewind_lines(workdir, name, last)
    if jax.process_index() == 0:
      buffers.rewind(workdir, last)
    resume.rewind_lines(workdir, 'health.jsonl', it - (not self.overlap))
    self.best = resume.best_validation(workdir, self.inner, update)
    return self.best and self.best.update

  # --- a buffer

  def begin(self, state: TrainState, iteration: int, age: int) -> rollout.Started:
    """Samples a buffer with the current policy and queues its log-probs."""
    references = resume.laid(self.references, state)
    with self.clock('rollout'):
      return self.collector.start(
        state.trainable, references, iteration, age, self.clock
      )

  def finish(
    self, begun: rollout.Started, place: resume.Place
  ) -> tuple[TrainBatch, resume.Place]:
    """Grades a buffer, weighs its completions and writes its lines."""
    with self.clock('rollout'):
      batch, numbers, samples = self.collector.finish(begun, self.clock)
    for buffer in samples.pop(buffers.FOLDER, ()):
      self.save(buffer, begun)
    resume.append(self.session.workdir, samples)
    state = health.note(self.rules, place.health, numbers)
    if state.flat and state.flat % health.FLAT == 0:
      logging.warning('%s', health.flat_sentence(state.flat, numbers['reward']))
    numbers['ill'] = len(health.broken(self.rules, state))
    numbers |= {**build.compilations(), **self.clock.take()}
    order, tokens = begun.drawn.host.order, begun.drawn.sampled.rollouts.tokens
    prompt = tokens.shape[1] - order.shape[1]
    numbers |= self.session.rates(numbers, prompt, self.taken)
    self.taken = 0
    self.shown |= self.writer.write('rl', begun.iteration, numbers)
    return batch, dataclasses.replace(place, health=state)

  def save(self, buffer: Buffer, begun: rollout.Started) -> None:
    """Writes a buffer, with the update of the policy that sampled it."""
    step = begun.iteration * self.inner - begun.age
    if jax.process_index() == 0:
      buffers.write(self.session.workdir, buffer._replace(step=step))

  def update(
    self, state: TrainState, batch: TrainBatch, inner: int
  ) -> tuple[TrainState, Any]:
    self.taken += 1
    return self.built.steps.update(state, self.frozen, batch, inner)

  # --- health and validation

  def judge(
    self, place: resume.Place, numbers: dict[str, Any]
  ) -> tuple[resume.Place, bool]:
    """Notes the numbers; warns of a broken rule, once until it is satisfied again."""
    state = health.note(self.rules, place.health, numbers)
    broken = health.broken(self.rules, state)
    place = dataclasses.replace(place, health=state)
    if self.rules.action == 'warn':
      for rule in broken:
        if rule not in state.warned:
          logging.warning('%s', self.report(place, rule))
      state = dataclasses.replace(state, warned=broken)
      place = dataclasses.replace(place, health=state)
    return place, self.rules.action == 'stop' and bool(broken)

  def stop_if_unhealthy(self, place: resume.Place) -> None:
    broken = health.broken(self.rules, place.health)
    if self.rules.action == 'stop' and broken:
      guard.collapsed(
        f'{self.report(place, broken[0])}; '
        'see "When training goes wrong" in docs/running.md'
      )

  def report(self, place: resume.Place, rule: str) -> str:
    """Writes a broken rule into health.jsonl; returns a sentence.

    Its iteration is that of the latest numbers: with overlap the next buffer is graded
    already.
    """
    it = place.update // self.inner - 1
    if rule not in health.OF_UPDATES:
      it = max(self.buffers(place.update).values(), default=it)
    line = health.record(self.rules, place.health, it, rule)
    resume.append_once(self.session.workdir, 'health.jsonl', line)
    return f'iteration {it}: {health.sentence(self.rules, place.health, rule)}'

  def validate(self, state: TrainState, update: int, beat: Callable[[], None]) -> bool:
    """Measures greedy accuracy, every eval.every iterations and at the end."""
    it, every = update // self.inner, self.config.eval.every
    if it != self.iterations and (not every or it % every):
      return False
    with self.clock('evaluate'), metrics.waiting('validating', idle=False):
      params = {**self.frozen, **state.trainable}
      numbers, _ = evaluate.accuracy(self.built, params, self.held_out, beat)
    self.writer.write('eval', it, numbers)
    self.shown['validation'] = numbers['accuracy']
    if self.best and numbers['accuracy'] <= self.best.accuracy:
      return False
    self.best = resume.Best(update, numbers['accuracy'])
    return True
