"""The training loop: Algorithm 1 of DMPO, over the phases of phases/.

Sample a buffer with the current policy, score it, weigh it, take I updates on it; now
and then validate and save. With train.overlap the next buffer is sampled before the
updates and graded during them. After any interruption the same command resumes from
the latest checkpoint and comes to the same bits.
"""

import dataclasses
import os
import time
from typing import Any

import jax
import numpy as np
from absl import logging

from dmpo_jax import checkpoint, files, guard, mesh, metrics, resume
from dmpo_jax.phases import PHASES, Phase, Session
from dmpo_jax.resume import Place
from dmpo_jax.types import Params, TrainBatch, TrainState

__all__ = ['Session', 'run']


def run(
  name: str, session: Session, base: Params | None = None
) -> tuple[Params, float]:
  """Trains one phase to its end; returns (parameters, seconds of all sessions).

  base: the parameters that training on pairs, or RL, starts from. Resumes from the
  checkpoints in workdir/NAME. Raises ValueError if there are some and none can be
  used, and FloatingPointError if a loss or gradient is not finite. Exits after SIGTERM
  with everything saved (code 75), or if the run is unhealthy and health.action = stop
  (77).
  """
  make: Any = PHASES[name]
  phase = make(session, base)
  if not phase.updates and not phase.validates:
    return session.built.steps.init(), 0.0
  folder = os.path.join(session.workdir, name)
  keep, digest = phase.config.checkpoint.keep, session.built.steps.digest
  # Leaving the manager waits for the save under way, after an error too.
  with (
    guard.Preemption(at_once=True) as asked,
    checkpoint.Manager(folder, keep, digest) as manager,
  ):
    with phase.clock('checkpoint'):
      state, buffers, place = enter(phase, manager)
    asked.check()
    if place.update < phase.updates or phase.validates:
      progress = metrics.Progress(
        phase.updates,
        name,
        start=place.update,
        every_seconds=phase.config.log.every_seconds,
        stride=phase.inner if phase.iterations > 1 else 1,
        note=phase.note,
      )
      with phase.tracer, progress as phase.progress:
        state, place = loop(phase, manager, asked, state, buffers, place)
  return phase.outcome(state), place.seconds


def enter(
  phase: Phase, manager: checkpoint.Manager
) -> tuple[TrainState, dict[str, Any], Place]:
  """Reads the latest checkpoint, or makes a fresh start: (state, buffers, place)."""
  state: Any = phase.start()
  shapes = checkpoint.abstract(state)
  if manager.all_steps():
    state = None  # two states at a time might not fit
  found = checkpoint.restore(
    manager, lambda step: {'state': shapes, **phase.shapes(step)}, phase.refuse
  )
  if found:
    resume.refuse_swapped(phase.built, found.meta)
    place = Place.from_meta(found.meta)
    if place.update < phase.updates:
      it, inner = divmod(place.update, phase.inner)
      logging.info('%s: resuming at iteration %d, update %d', phase.name, it, inner)
    return found.trees.pop('state'), found.trees, place
  if lost := phase.writer.count(phase.rows):
    logging.warning(
      'no checkpoint in %s: from the start, and the %d updates that are in the '
      'metrics are done again',
      manager.directory,
      lost,
    )
  return state, {}, Place()


def loop(
  phase: Phase,
  manager: checkpoint.Manager,
  asked: guard.Preemption,
  state: TrainState,
  buffers: dict[str, Any],
  place: Place,
) -> tuple[TrainState, Place]:
  """Takes the updates of a phase from `place` on."""
  begun, saved, c = time.time() - place.seconds, time.monotonic(), phase.config
  prepare(phase, manager, asked, state, place)
  phase.progress.begin(place.update)
  batch, ahead = buffers.pop('batch', None), buffers.pop('ahead', None)
  coming, pending = None, []  # a buffer not graded yet; numbers not fetched yet
  for update in range(place.update, phase.updates):
    it, inner = divmod(update, phase.inner)
    phase.clock.step, last = update + 1, inner + 1 == phase.inner
    phase.tracer.at(it)
    # 1. Sample completions with the current policy; score, grade and weigh them.
    if batch is None:
      batch, place = phase.finish(phase.begin(state, it, 0), place)
    # 2. Overlap: sample the next ones now, for the updates donate these parameters.
    if phase.overlap and it + 1 < phase.iterations and not (coming or ahead):
      coming = phase.begin(state, it + 1, phase.inner)
    # 3. Take an update. Its numbers are fetched later, none while a buffer is graded.
    asked.at_once = False  # from here on there is something to save
    with phase.clock(phase.rows):
      state, numbers = phase.update(state, batch, inner)
      pending.append((update + 1, numbers))
      if coming is None:
        write_late(phase, pending, batch)
    due = (stop := asked()) or update + 1 == phase.updates
    due = due or checkpoint.is_due(c.checkpoint, update + 1, saved)
    # 4. Grade the buffer that was sampled ahead, while the device updates.
    if coming and (due or last):
      (ahead, place), coming = phase.finish(coming, place), None
    # 5. Check the numbers and validate: an unhealthy policy is never the best.
    ends = phase.validates_after(update + 1)
    numbers = None if coming else write_late(phase, pending, batch, due or ends)
    place = dataclasses.replace(place, update=update + 1, seconds=time.time() - begun)
    if last:
      batch, ahead = ahead, None
    place, unhealthy = phase.judge(place, numbers) if last else (place, False)
    if ends and not stop and not unhealthy:
      best, stop = validate(phase, manager, asked, state, update + 1)
      due = due or best or stop
    # 6. Save when it is due, when the policy is the best, and before the run ends.
    if due or unhealthy:
      saved = time.monotonic()
      save(phase, manager, state, {'batch': batch, 'ahead': ahead}, place)
      if stop or unhealthy:
        wait(phase, manager)
        guard.leave(asked.came) if stop else phase.stop_if_unhealthy(place)
    phase.progress.update(update + 1, phase.shown)
  phase.progress.close()
  wait(phase, manager)
  jax.block_until_ready(state.trainable)
  return state, dataclasses.replace(place, seconds=time.time() - begun)


def prepare(
  phase: Phase,
  manager: checkpoint.Manager,
  asked: guard.Preemption,
  state: TrainState,
  place: Place,
) -> None:
  """Cuts the workdir back to `place`; validates there if no buffer is begun."""
  checkpoint.set_aside(manager, place.update)
  manager.preserved.best = phase.prepare(place.update)
  if phase.validates_after(place.update):
    phase.stop_if_unhealthy(place)
    if validate(phase, manager, asked, state, place.update)[1]:
      guard.leave(asked.came)


class Stopped(Exception):
  """A validation is left, because the run was asked to stop."""


def validate(
  phase: Phase,
  manager: checkpoint.Manager,
  asked: guard.Preemption,
  state: TrainState,
  update: int,
) -> tuple[bool, bool]:
  """Validates; returns (it is the best so far, it was left because of a signal).

  The best one's checkpoint is kept.
  """

  def beat():
    phase.clock.beat()
    if asked():
      raise Stopped

  try:
    if best := phase.validate(state, update, beat):
      manager.preserved.best = update
    return best, False
  except Stopped:
    return False, True


def save(
  phase: Phase,
  manager: checkpoint.Manager,
  state: TrainState,
  buffers: dict[str, Any],
  place: Place,
) -> None:
  """Begins to save a checkpoint at `place`; reads the first one of a run back."""
  trees = {name: buffers[name] for name in phase.buffers(place.update)}
  first = not manager.all_steps()
  with phase.clock('checkpoint'):
    checkpoint.save(
      manager,
      place.update,
      {'state': state, **trees},
      {**place.to_meta(phase.built), 'updates': phase.updates},
    )
    if first:
      checkpoint.verify(manager, place.update, state)


def wait(phase: Phase, manager: checkpoint.Manager) -> None:
  """Waits for the save under way, where the watchdog can name it."""
  with phase.clock('checkpoint'):
    manager.wait_until_finished()


def write_late(
  phase: Phase, pending: list, batch: Any, flush: bool = False
) -> dict[str, Any] | None:
  """Hands (step, numbers) of updates to the writer, oldest first; empties `pending`.

  Here the host waits for the updates but the last one; with `flush` for that one too,
  whose numbers it then returns.
  """
  with phase.clock(phase.rows):
    while pending:
      numbers = phase.writer.late(phase.rows, *pending.pop(0))
      stop_if_not_finite(phase, numbers, batch)
      phase.shown |= numbers or {}
    numbers = phase.writer.flush() if flush else None
  stop_if_not_finite(phase, numbers, batch)
  return numbers


def stop_if_not_finite(phase: Phase, numbers: dict | None, batch: Any) -> None:
  """Stops if an update's numbers are not finite; writes its batch into failed/.

  Raises FloatingPointError. With health.action = stop it exits with code 77 instead.
  """
  if not numbers or numbers['finite']:
    return
  step, workdir, saved = numbers['step'], phase.session.workdir, ''
  if isinstance(batch, TrainBatch):
    path = os.path.join(workdir, 'failed', f'update_{step}.npz')
    leaves, _ = jax.tree_util.tree_flatten_with_path(mesh.fetch(batch))
    if jax.process_index() == 0:
      os.makedirs(os.path.dirname(path), exist_ok=True)
      np.savez(path, **{mesh.path_of(where): leaf for where, leaf in leaves})
    saved = f'its batch is in {path}, '
  sentence = (
    f'loss, gradient or update is not finite at {phase.name} update {step}: loss '
    f'{numbers["loss"]}, gradient norm {numbers["grad_norm"]}; {saved}the last '
    f'checkpoint is intact. Try a smaller {phase.lr_field}'
  )
  if phase.config.health.action != 'stop':
    raise FloatingPointError(sentence)
  line = {
    'iteration': (step - 1) // phase.inner,
    'rule': 'finite',
    'values': [files.number(numbers[name]) for name in ('loss', 'grad_norm')],
    'action': 'stop',
  }
  resume.append_once(workdir, 'health.jsonl', line)
  guard.collapsed(sentence)
