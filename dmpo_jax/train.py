"""The loop: Algorithm 1 of DMPO, one function.

Sample a buffer with the current policy, weigh it, take I updates on it; now
and then validate and save. With train.overlap the next buffer is sampled
before the updates and graded during them. Whatever interrupts it, the same
command goes on from the last checkpoint to the same result. A collapse ends the
loop; after a rollback it is entered anew, as after a kill.
"""

import functools
import os
import time

import jax
import numpy as np
from absl import logging

from dmpo_jax import (
  build,
  check,
  checkpoint,
  data,
  evaluate,
  guard,
  health,
  mesh,
  metrics,
  optim,
  resume,
)


def run(built, workdir, writer, base, beat=lambda phase, step: None):
  """Trains from the base parameters; returns (params, seconds).

  Writes metrics, samples.jsonl and checkpoints into workdir. Resumes from
  workdir/rl. beat: a watchdog's. FloatingPointError if a loss or gradient is
  not finite; SystemExit, saved, after SIGTERM, or when health says so.
  """
  clock = metrics.Clock(beat)
  # `with`: what stops the run, an error too, waits for the save under way.
  with (
    guard.Preemption() as asked,
    checkpoint.open_manager(
      os.path.join(workdir, 'rl'), built.config.checkpoint.keep
    ) as manager,
  ):
    checkpoint.settle(manager)
    while True:
      try:
        return loop(built, workdir, writer, base, manager, clock, asked)
      except health.Collapse as error:
        if built.config.health.action not in ('stop', 'rollback'):
          raise
        sentence, record = str(error), error.record
      # Out here the frames of the loop, and the state they held, are gone.
      with clock('checkpoint'):
        resume.roll_back(built, workdir, manager, base, sentence, record)


def loop(built, workdir, writer, base, manager, clock, asked):
  """The iterations of `run`, from the place of the latest checkpoint on."""
  c, steps = built.config, built.steps
  problems = build.problems(built, 'train')
  held_out = build.problems(built, 'validation')
  trainable, frozen = resume.policy_of(built, base)
  with clock('checkpoint'):
    state, batch, ahead, place = resume.enter(
      built, manager, trainable, problems, workdir, writer
    )
  if c.data.bucket:  # what would not fit fails now, not at the long prompt
    build.compile_longest(built, data.bucketed(problems.valid, c.data.bucket))
  progress = metrics.Progress(
    c.train.iterations,
    'rl',
    start=place['iteration'],
    every_seconds=c.log.every_seconds,
  )
  total = c.train.iterations * c.train.inner
  begun, saved, shown = time.time() - place['seconds'], time.monotonic(), {}
  collector = build.collector(built, frozen)
  begin = functools.partial(start, collector, steps.read_references(), clock)
  end = functools.partial(finish, built, collector, workdir, writer, clock, place)
  test = functools.partial(validate, built, frozen, held_out, writer, clock)
  best = place['best']
  if not place['inner']:
    collapse(built, place, place['iteration'] - 1)
    shown, best = test(state, place['iteration'], best)
    resume.note_best(manager, state, place, best)
  for it in range(place['iteration'], c.train.iterations):
    if batch is None:
      batch, numbers = end(begin(state, it, age=0))
      shown |= numbers
    coming, held = None, []
    if c.train.overlap and ahead is None and it + 1 < c.train.iterations:
      # Before the updates: they donate the parameters that sample here.
      coming = begin(state, it + 1, age=c.train.inner)
    for inner in range(place['inner'], c.train.inner):
      done, last = it * c.train.inner + inner + 1, inner + 1 == c.train.inner
      clock.step = done
      with clock('update'):
        state, pending = steps.update(state, frozen, batch, inner)
        held.append((done, pending))
        # Nothing waits for an update while there is a buffer to be graded.
        if coming is None:
          write_late(writer, held, batch, workdir)
      stop = asked()
      due = stop or done == total or checkpoint.is_due(c.checkpoint, done, saved)
      if coming and (due or last):
        ahead, numbers = end(coming)
        shown |= numbers
        write_late(writer, held, batch, workdir)
        coming = None
      if due or last:
        written = writer.flush()
        stop_if_not_finite(written, batch, workdir)
      ill = last and judge(built, workdir, place, it, written)
      due = due or ill
      # Before it is saved: with the best so far. What is ill is not the best.
      if last and not stop and not ill:
        before = best
        numbers, best = test(state, it + 1, best)
        shown, due = shown | numbers, due or best != before
      if due:
        saved = time.monotonic()
        resume.save(
          built,
          manager,
          clock,
          state,
          batch,
          ahead,
          dict(
            place, iteration=it, inner=inner + 1, best=best, seconds=time.time() - begun
          ),
        )
      if stop:
        resume.wait(manager, clock)
        guard.leave()
      if ill:
        collapse(built, place, it)
    batch, ahead, place['inner'] = ahead, None, 0
    progress.update(it + 1, shown)
  progress.close()
  resume.wait(manager, clock)
  jax.block_until_ready(state.trainable)
  return {**frozen, **state.trainable}, time.time() - begun


def start(collector, references, clock, state, it, age):
  """Buffer `it` sampled with the parameters of `state` (rollout.Started)."""
  references = [
    optim.reference_of(state.opt_state) if tree is None else tree for tree in references
  ]
  with clock('rollout'):
    return collector.start(state.trainable, tuple(references), it, age, clock)


def finish(built, collector, workdir, writer, clock, place, started):
  """Grades a buffer, writes its lines; returns (TrainBatch, its numbers).

  place['health'] takes note of them.
  """
  c = built.config
  with clock('rollout'):
    batch, numbers, samples = collector.finish(started, clock)
  resume.append(workdir, samples)
  rules = check.settings(health.Config, c.health)
  place['health'] = health.note(rules, place['health'], numbers)
  numbers |= {
    'ill': len(health.broken(rules, place['health'])),
    'lr_scale': place['lr_scale'],
  }
  return batch, writer.write(
    'rl', started.iteration, {**numbers, **build.compilations(), **clock.take()}
  )


def judge(built, workdir, place, it, written):
  """Whether training ends or rolls back after iteration `it`.

  written: the numbers of its last update. A warning is given here, once until
  a buffer is well again.
  """
  rules = check.settings(health.Config, built.config.health)
  state = place['health'] = health.note(rules, place['health'], written)
  found = health.broken(rules, state)
  if rules.action != 'warn':
    return mesh.agree(found)
  for rule in [rule for rule in found if rule not in state['warned']]:
    logging.warning('iteration %d: %s', it, health.told(rules, state, rule))
    resume.note_down(workdir, health.record(rules, state, it, rule))
  state['warned'] = found
  return False


def collapse(built, place, it):
  """Raises health.Collapse if training ends or rolls back after `it`."""
  rules = check.settings(health.Config, built.config.health)
  found = health.broken(rules, place['health'])
  if rules.action not in ('stop', 'rollback') or not mesh.agree(found):
    return
  if not found:  # another process has: all end here
    raise health.Collapse(
      'another process has found a collapse',
      {'iteration': it, 'rule': 'of another process'},
    )
  raise health.Collapse(
    health.told(rules, place['health'], found[0]),
    health.record(rules, place['health'], it, found[0]),
  )


def validate(built, frozen, held_out, writer, clock, state, it, best):
  """Greedy accuracy on the validation split, when it is due.

  Returns (numbers to show, the best so far: {'step', 'accuracy'} or None).
  """
  c = built.config
  last = it == c.train.iterations
  if not last and (not c.eval.every or it % c.eval.every):
    return {}, best
  with clock('evaluate'):
    params = {**frozen, **state.trainable}
    numbers, _ = evaluate.accuracy(built, params, held_out, clock.beat)
  writer.write('eval', it, numbers)
  if best is None or numbers['accuracy'] > best['accuracy']:
    best = {'step': it * c.train.inner, 'accuracy': numbers['accuracy']}
  return {'validation': numbers['accuracy']}, best


def stop_if_not_finite(written, batch, workdir):
  """Saves the batch and stops when an update's numbers are not finite."""
  if not written or written['finite']:
    return
  folder = os.path.join(workdir, 'failed')
  path = os.path.join(folder, f'update_{written["step"]}.npz')
  batch = mesh.fetch(batch)
  leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
  if jax.process_index() == 0:
    os.makedirs(folder, exist_ok=True)
    np.savez(path, **{mesh.path_of(where): leaf for where, leaf in leaves})
  raise health.Collapse(
    f'loss or gradient is not finite at update {written["step"]}: loss '
    f'{written["loss"]}, gradient norm {written["grad_norm"]}; its batch is '
    f'in {path}, the last checkpoint is intact. Try a smaller optim.lr',
    {
      'iteration': int(batch.row[0]) // len(batch.row),
      'rule': 'finite',
      'values': [health.as_json(written[name]) for name in ('loss', 'grad_norm')],
    },
  )


def write_late(writer, held, batch, workdir):
  """Hands (step, numbers) of updates to the writer, oldest first."""
  while held:
    stop_if_not_finite(writer.late('update', *held.pop(0)), batch, workdir)
