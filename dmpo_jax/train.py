"""The loop: Algorithm 1 of DMPO, one function.

Sample a buffer with the current policy, weigh it, take I updates on it; now
and then validate and save. With train.overlap the next buffer is sampled
before the updates and graded during them. Whatever interrupts it, the same
command goes on from the last checkpoint to the same result.
"""

import functools
import json
import os
import time

import jax
import numpy as np
from absl import logging

from dmpo_jax import (
    build,
    checkpoint,
    data,
    evaluate,
    mesh,
    metrics,
    plan,
    rollout,
)


def policy_of(built, base):
  """(trainable, frozen): what RL changes, and the reference policy."""
  lora = built.steps.init_lora()
  return (lora or base), base


def run(built, workdir, writer, base):
  """Trains from the base parameters; returns (params, seconds).

  Writes metrics, samples.jsonl and checkpoints into workdir. Resumes from
  workdir/rl. FloatingPointError if a loss or gradient is not finite.
  """
  # `with`: what stops the run, an error too, waits for the save under way.
  with checkpoint.open_manager(os.path.join(workdir, 'rl'),
                               built.config.checkpoint.keep) as manager:
    return loop(built, workdir, writer, base, manager)


def loop(built, workdir, writer, base, manager):
  """The iterations of `run`, from the place of the latest checkpoint on."""
  c, steps = built.config, built.steps
  problems = build.problems(built, 'train')
  held_out = build.problems(built, 'validation')
  trainable, frozen = policy_of(built, base)
  state = steps.start(trainable)
  state, batch, ahead, place = resume(built, manager, state, problems, workdir,
                                      writer)
  if c.data.bucket:  # what would not fit fails now, not at the long prompt
    plan.compile_longest(built, data.bucketed(problems.valid, c.data.bucket))
  progress = metrics.Progress(c.train.iterations, 'rl',
                              start=place['iteration'],
                              every_seconds=c.log.every_seconds)
  total = c.train.iterations * c.train.inner
  clock, begun, shown = metrics.Clock(), time.time() - place['seconds'], {}
  begin = functools.partial(start, built, problems, frozen, clock)
  end = functools.partial(finish, built, problems, workdir, writer, clock)
  for it in range(place['iteration'], c.train.iterations):
    if not place['inner']:
      shown |= validate(built, state, frozen, held_out, it, writer, clock)
    if batch is None:
      batch, numbers = end(begin(state, it, age=0))
      shown |= numbers
    coming, held = None, []
    if c.train.overlap and ahead is None and it + 1 < c.train.iterations:
      # Before the updates: they donate the parameters that sample here.
      coming = begin(state, it + 1, age=c.train.inner)
    for inner in range(place['inner'], c.train.inner):
      done = it * c.train.inner + inner + 1
      due = done % c.checkpoint.every == 0 or done == total
      with clock('update'):
        state, pending = steps.update(state, frozen, batch, inner)
        held.append((done, pending))
        # Nothing waits for an update while there is a buffer to be graded.
        if coming is None:
          write_late(writer, held, batch, workdir)
      if coming and (due or inner + 1 == c.train.inner):
        ahead, numbers = end(coming)
        shown |= numbers
        write_late(writer, held, batch, workdir)
        coming = None
      if due:
        stop_if_not_finite(writer.flush(), batch, workdir)
        checkpoint.save(manager, done, state, batch, dict(
            iteration=it, inner=inner + 1, seconds=time.time() - begun), ahead)
    stop_if_not_finite(writer.flush(), batch, workdir)
    batch, ahead, place['inner'] = ahead, None, 0
    progress.update(it + 1, shown)
  validate(built, state, frozen, held_out, c.train.iterations, writer, clock)
  progress.close()
  jax.block_until_ready(state.trainable)
  seconds = time.time() - begun
  return {**frozen, **state.trainable}, seconds


def start(built, problems, frozen, clock, state, it, age):
  """Buffer `it` sampled with the parameters of `state` (rollout.Started)."""
  c = built.config
  with clock('rollout'):
    return rollout.start(
        built.steps, problems, state.trainable, frozen, it, age,
        prompts=c.train.prompts, group=c.train.group, seed=c.seed,
        bucket=c.data.bucket)


def finish(built, problems, workdir, writer, clock, started):
  """Grades a buffer, writes its lines; returns (TrainBatch, its numbers)."""
  c = built.config
  with clock('rollout'):
    batch, numbers, samples = rollout.finish(
        built.steps, built.task, built.tokenizer, problems, started,
        group=c.train.group, protocol=c.data.protocol, samples=c.log.samples,
        weights=c.reward.weights)
  append(workdir, samples)
  return batch, writer.write('rl', started.iteration,
                             {**numbers, **clock.take()})


def latest(built, workdir, base):
  """Parameters of the newest checkpoint, else what training starts from."""
  trainable, frozen = policy_of(built, base)
  folder = os.path.join(workdir, 'rl')
  if not os.path.isdir(folder):
    return {**frozen, **trainable}
  state = built.steps.start(trainable)
  with checkpoint.open_manager(folder,
                               built.config.checkpoint.keep) as manager:
    found = checkpoint.restore(manager, checkpoint.abstract(state))
  return {**frozen, **(found[0].trainable if found else trainable)}


def resume(built, manager, state, problems, workdir, writer):
  """(state, batch, ahead, place): the latest checkpoint, or a fresh start.

  The buffers, in use and sampled ahead, are None where there is none.
  """
  place = dict(iteration=0, inner=0, seconds=0.0)
  batch, ahead, c = None, None, built.config
  it = ((checkpoint.latest(manager) or 1) - 1) // c.train.inner
  more = c.train.overlap and it + 1 < c.train.iterations
  found = checkpoint.restore(manager, checkpoint.abstract(state),
                             shapes_at(built, problems, it),
                             shapes_at(built, problems, it + 1) if more
                             else None)
  if found:
    state, batch, ahead, place = found
    logging.info('resuming at iteration %d, inner step %d',
                 place['iteration'], place['inner'])
    if place['inner'] == c.train.inner:
      batch, ahead = ahead, None
      place = {**place, 'iteration': place['iteration'] + 1, 'inner': 0}
  # Everything after the checkpoint is forgotten and done again. What buffers
  # in hand have written stays; their validation is that of the iteration begun.
  last = place['iteration'] - (batch is None) + (ahead is not None)
  writer.rewind('rl', last)
  writer.rewind('eval', place['iteration'] - (place['inner'] == 0))
  writer.rewind('update', int(state.step))
  for name in ('samples.jsonl', 'failed_grades.jsonl'):
    rewind_lines(os.path.join(workdir, name), last)
  return state, batch, ahead, place


def shapes_at(built, problems, it):
  """The TrainBatch of iteration `it` as shapes, for restoring."""
  c = built.config
  prompts = data.prompts_at(problems, it, c.train.prompts, c.seed,
                            c.data.bucket)
  return build.abstract_batch(built, prompts.tokens.shape[1])


def validate(built, state, frozen, held_out, it, writer, clock):
  """Greedy accuracy on the validation split, when it is due."""
  c = built.config
  last = it == c.train.iterations
  if not last and (not c.eval.every or it % c.eval.every):
    return {}
  with clock('evaluate'):
    params = {**frozen, **state.trainable}
    numbers, _ = evaluate.accuracy(built, params, held_out)
  writer.write('eval', it, numbers)
  return {'validation': numbers['accuracy']}


def stop_if_not_finite(written, batch, workdir):
  """Saves the batch and stops when an update's numbers are not finite."""
  if not written or written['finite']:
    return
  folder = os.path.join(workdir, 'failed')
  os.makedirs(folder, exist_ok=True)
  path = os.path.join(folder, f"update_{written['step']}.npz")
  np.savez(path, **mesh.fetch(batch)._asdict())
  raise FloatingPointError(
      f"loss or gradient is not finite at update {written['step']}: loss "
      f"{written['loss']}, gradient norm {written['grad_norm']}; its batch is "
      f'in {path}, the last checkpoint is intact. Try a smaller optim.lr')


def write_late(writer, held, batch, workdir):
  """Hands (step, numbers) of updates to the writer, oldest first."""
  while held:
    stop_if_not_finite(writer.late('update', *held.pop(0)), batch, workdir)


def append(workdir, lines):
  """Adds to the files of `lines`, {name: dicts}; none for nothing."""
  for name, rows in lines.items():
    if rows and jax.process_index() == 0:
      with open(os.path.join(workdir, name), 'a') as f:
        f.writelines(json.dumps(row) + '\n' for row in rows)


def rewind_lines(path, last):
  """Drops lines of iterations after `last`, and a torn last line."""
  if jax.process_index() or not os.path.exists(path):
    return
  with open(path) as f:
    lines = [line for line in f if line.endswith('\n')
             and json.loads(line)['iteration'] <= last]
  with open(path + '.new', 'w') as f:
    f.writelines(lines)
  os.replace(path + '.new', path)
