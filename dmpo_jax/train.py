"""The loop: Algorithm 1 of DMPO, one function.

Sample a buffer with the current policy, weigh it, take I updates on it; now
and then validate and save. Whatever interrupts it, the same command goes on
from the last checkpoint to the same result.
"""

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
  state, batch, place = resume(built, manager, state, problems, workdir,
                               writer)
  if c.data.bucket:  # what would not fit fails now, not at the long prompt
    plan.compile_longest(built, data.bucketed(problems.valid, c.data.bucket))
  progress = metrics.Progress(c.train.iterations, 'rl',
                              start=place['iteration'],
                              every_seconds=c.log.every_seconds)
  total = c.train.iterations * c.train.inner
  clock, begun, shown = metrics.Clock(), time.time() - place['seconds'], {}
  for it in range(place['iteration'], c.train.iterations):
    if batch is None:
      shown |= validate(built, state, frozen, held_out, it, writer, clock)
      with clock('rollout'):
        batch, numbers, samples = rollout.collect(
            steps, built.task, built.tokenizer, problems, state.trainable,
            frozen, it, prompts=c.train.prompts, group=c.train.group,
            seed=c.seed, protocol=c.data.protocol, samples=c.log.samples,
            bucket=c.data.bucket, weights=c.reward.weights)
      append(workdir, samples)
      shown |= writer.write('rl', it, {**numbers, **clock.take()})
    for inner in range(place['inner'], c.train.inner):
      with clock('update'):
        state, pending = steps.update(state, frozen, batch, inner)
        stop_if_not_finite(
            writer.late('update', it * c.train.inner + inner + 1, pending),
            batch, workdir)
      done = it * c.train.inner + inner + 1
      if done % c.checkpoint.every == 0 or done == total:
        stop_if_not_finite(writer.flush(), batch, workdir)
        checkpoint.save(manager, done, state, batch, dict(
            iteration=it, inner=inner + 1, seconds=time.time() - begun))
    stop_if_not_finite(writer.flush(), batch, workdir)
    batch, place['inner'] = None, 0
    progress.update(it + 1, shown)
  validate(built, state, frozen, held_out, c.train.iterations, writer, clock)
  progress.close()
  jax.block_until_ready(state.trainable)
  seconds = time.time() - begun
  return {**frozen, **state.trainable}, seconds


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
  """(state, batch or None, place): the latest checkpoint, or a fresh start."""
  place = dict(iteration=0, inner=0, seconds=0.0)
  batch, c = None, built.config
  shapes = checkpoint.abstract(state)
  done = checkpoint.latest(manager) or 1
  prompts = data.prompts_at(problems, (done - 1) // c.train.inner,
                            c.train.prompts, c.seed, c.data.bucket)
  found = checkpoint.restore(
      manager, shapes, build.abstract_batch(built, prompts.tokens.shape[1]))
  if found:
    state, batch, place = found
    logging.info('resuming at iteration %d, inner step %d',
                 place['iteration'], place['inner'])
    if place['inner'] == c.train.inner:
      batch, place = None, {**place, 'iteration': place['iteration'] + 1,
                            'inner': 0}
  # Everything after the checkpoint is forgotten and done again. With a buffer
  # in hand its rollout and validation are already written.
  last = place['iteration'] - (batch is None)
  writer.rewind('rl', last)
  writer.rewind('eval', last)
  writer.rewind('update', int(state.step))
  for name in ('samples.jsonl', 'failed_grades.jsonl'):
    rewind_lines(os.path.join(workdir, name), last)
  return state, batch, place


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
