"""The loop: Algorithm 1 of DMPO, one function.

Sample a buffer with the current policy, weigh it, take I updates on it; now
and then validate and save. With train.overlap the next buffer is sampled
before the updates and graded during them. Whatever interrupts it, the same
command goes on from the last checkpoint to the same result. A collapse ends the
loop; after a rollback it is entered anew, as after a kill.
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
    check,
    checkpoint,
    data,
    evaluate,
    guard,
    health,
    mesh,
    metrics,
    optim,
    plan,
    rollout,
)


def policy_of(built, base):
  """(trainable, frozen): what RL changes, and the reference policy."""
  lora = built.steps.init_lora()
  return (lora or base), base


def run(built, workdir, writer, base, beat=lambda phase, step: None):
  """Trains from the base parameters; returns (params, seconds).

  Writes metrics, samples.jsonl and checkpoints into workdir. Resumes from
  workdir/rl. beat: a watchdog's. FloatingPointError if a loss or gradient is
  not finite; SystemExit, saved, after SIGTERM, or when health says so.
  """
  clock = metrics.Clock(beat)
  # `with`: what stops the run, an error too, waits for the save under way.
  with guard.Preemption() as asked, checkpoint.open_manager(
      os.path.join(workdir, 'rl'), built.config.checkpoint.keep) as manager:
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
        roll_back(built, workdir, manager, base, sentence, record)


def loop(built, workdir, writer, base, manager, clock, asked):
  """The iterations of `run`, from the place of the latest checkpoint on."""
  c, steps = built.config, built.steps
  problems = build.problems(built, 'train')
  held_out = build.problems(built, 'validation')
  trainable, frozen = policy_of(built, base)
  state = steps.start(trainable)
  with clock('checkpoint'):
    state, batch, ahead, place = resume(built, manager, state, problems,
                                        workdir, writer)
  if c.data.bucket:  # what would not fit fails now, not at the long prompt
    plan.compile_longest(built, data.bucketed(problems.valid, c.data.bucket))
  progress = metrics.Progress(c.train.iterations, 'rl',
                              start=place['iteration'],
                              every_seconds=c.log.every_seconds)
  total = c.train.iterations * c.train.inner
  begun, saved, shown = time.time() - place['seconds'], time.monotonic(), {}
  begin = functools.partial(start, built, problems, frozen,
                            steps.read_references(), clock)
  end = functools.partial(finish, built, problems, workdir, writer, clock,
                          place)
  test = functools.partial(validate, built, frozen, held_out, writer, clock)
  best = place['best']
  if not place['inner']:
    collapse(built, place, place['iteration'] - 1)
    shown, best = test(state, place['iteration'], best)
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
        state, pending = steps.update(state, frozen, batch, inner,
                                      place['lr_scale'])
        held.append((done, pending))
        # Nothing waits for an update while there is a buffer to be graded.
        if coming is None:
          write_late(writer, held, batch, workdir)
      stop = asked()
      due = stop or done == total or checkpoint.is_due(c.checkpoint, done,
                                                       saved)
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
        save(built, manager, clock, state, batch, ahead, dict(
            place, iteration=it, inner=inner + 1, best=best,
            seconds=time.time() - begun))
      if stop:
        wait(manager, clock)
        guard.leave()
      if ill:
        collapse(built, place, it)
    batch, ahead, place['inner'] = ahead, None, 0
    progress.update(it + 1, shown)
  progress.close()
  wait(manager, clock)
  jax.block_until_ready(state.trainable)
  return {**frozen, **state.trainable}, time.time() - begun


def save(built, manager, clock, state, batch, ahead, place):
  """Begins to save a place in the run: its buffers, and what resume reads."""
  c = built.config
  done = place['iteration'] * c.train.inner + place['inner']
  with clock('checkpoint'):
    checkpoint.save(manager, done, state, batch,
                    {**place, 'config': check.plain(c)}, ahead,
                    built.steps.digest)


def wait(manager, clock):
  """For the save under way: here, where a watchdog knows its name."""
  with clock('checkpoint'):
    manager.wait_until_finished()


def start(built, problems, frozen, references, clock, state, it, age):
  """Buffer `it` sampled with the parameters of `state` (rollout.Started)."""
  c = built.config
  references = [optim.reference_of(state.opt_state) if tree is None else tree
                for tree in references]
  with clock('rollout'):
    return rollout.start(
        built.steps, problems, state.trainable, frozen, it, age,
        prompts=c.train.prompts, group=c.train.group, seed=c.seed,
        bucket=c.data.bucket, clock=clock, references=tuple(references))


def finish(built, problems, workdir, writer, clock, place, started):
  """Grades a buffer, writes its lines; returns (TrainBatch, its numbers).

  place['health'] takes note of them.
  """
  c = built.config
  with clock('rollout'):
    batch, numbers, samples = rollout.finish(
        built.steps, built.task, built.tokenizer, problems, started,
        group=c.train.group, protocol=c.data.protocol, samples=c.log.samples,
        weights=c.reward.weights, clock=clock)
  append(workdir, samples)
  rules = check.settings(health.Config, c.health)
  place['health'] = health.note(rules, place['health'], numbers)
  numbers |= {'ill': len(health.broken(rules, place['health'])),
              'lr_scale': place['lr_scale']}
  return batch, writer.write('rl', started.iteration,
                             {**numbers, **build.compilations(),
                              **clock.take()})


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
    note_down(workdir, health.record(rules, state, it, rule))
  state['warned'] = found
  return False


def collapse(built, place, it):
  """Raises health.Collapse if training ends or rolls back after `it`."""
  rules = check.settings(health.Config, built.config.health)
  found = health.broken(rules, place['health'])
  if rules.action not in ('stop', 'rollback') or not mesh.agree(found):
    return
  if not found:  # another process has: all end here
    raise health.Collapse('another process has found a collapse', {
        'iteration': it, 'rule': 'of another process'})
  raise health.Collapse(health.told(rules, place['health'], found[0]),
                        health.record(rules, place['health'], it, found[0]))


def roll_back(built, workdir, manager, base, sentence, record):
  """Back to the best checkpoint, or the start, with a smaller learning rate.

  It takes the place of all checkpoints after it, with the record in it, so
  that the loop goes on from it as after a kill. SystemExit if the action is to
  stop, or all rollbacks are spent.
  """
  rules = check.settings(health.Config, built.config.health)
  manager.wait_until_finished()
  state = built.steps.start(policy_of(built, base)[0])
  how = dict(digest=built.steps.digest,
             refuse=check.refuse(built.config, check.FREE))
  found = checkpoint.restore(manager, checkpoint.abstract(state), **how)
  meta = found[3] if found else {}
  done, seconds = meta.get('rollbacks', []), meta.get('seconds', 0.0)
  if rules.action == 'stop' or len(done) >= rules.rollbacks:
    note_down(workdir, {**record, 'action': 'stop'})
    spent = f', after {len(done)} rollbacks' if done else ''
    guard.collapsed(f"iteration {record['iteration']}{spent}: {sentence}; "
                    'see "When training goes wrong" in docs/running.md')
  top, batch, ahead = (meta.get('best') or {'step': 0})['step'], None, None
  meta = {'iteration': -1, 'inner': built.config.train.inner, 'best': None,
          'config': check.plain(built.config)}
  if top:
    state, batch, ahead, meta = checkpoint.restore(
        manager, checkpoint.abstract(state), buffers_at(built), only=top, **how)
  scale = rules.lr_factor * (done[-1]['lr_scale'] if done else 1.0)
  record = {**record, 'action': 'rollback', 'to_update': top,
            'lr_scale': scale}
  logging.warning('iteration %d: %s; back to update %d, learning rate * %g',
                  record['iteration'], sentence, top, scale)
  checkpoint.replace(manager, top, state, batch, {
      **meta, 'seconds': seconds, 'rollbacks': [*done, record],
      'lr_scale': scale, 'health': health.fresh(
          meta.get('health', {}).get('best_reward'))},
                     ahead, built.steps.digest)


def latest(built, workdir, base, best=False):
  """Parameters of the newest checkpoint, else what training starts from.

  best: those that validated best so far. ValueError if they are gone.
  """
  trainable, frozen = policy_of(built, base)
  folder = os.path.join(workdir, 'rl')
  if not os.path.isdir(folder):
    return {**frozen, **trainable}
  state = checkpoint.abstract(built.steps.start(trainable))
  how = dict(digest=built.steps.digest, refuse=check.refuse(built.config))
  with checkpoint.open_manager(folder,
                               built.config.checkpoint.keep) as manager:
    found = checkpoint.restore(manager, state, **how)
    top = found and found[3].get('best')
    if best and top and not top['step']:
      found = None  # nothing was better than the start
    elif best and top and top['step'] != int(found[0].step):
      found = checkpoint.restore(manager, state, only=top['step'], **how)
  return {**frozen, **(found[0].trainable if found else trainable)}


def resume(built, manager, state, problems, workdir, writer):
  """(state, batch, ahead, place): the latest checkpoint, or a fresh start.

  The buffers, in use and sampled ahead, are None where there is none.
  ValueError if there are checkpoints and none can be used.
  """
  place = dict(iteration=0, inner=0, seconds=0.0, best=None,
               health=health.fresh(), rollbacks=[], lr_scale=1.0)
  batch, ahead, c = None, None, built.config
  found = checkpoint.restore(
      manager, checkpoint.abstract(state), buffers_at(built),
      built.steps.digest, check.refuse(c, check.FREE))
  if found:
    state, batch, ahead, meta = found
    place |= meta
    checkpoint.set_aside(manager, int(state.step))
    logging.info('resuming at iteration %d, inner step %d',
                 place['iteration'], place['inner'])
    if place['inner'] == c.train.inner:
      batch, ahead = ahead, None
      place = {**place, 'iteration': place['iteration'] + 1, 'inner': 0}
  elif lost := writer.count('update'):
    logging.warning('no checkpoint in %s: from the start, and the %d updates '
                    'that are in the metrics are done again',
                    os.path.join(workdir, 'rl'), lost)
  # Everything after the checkpoint is forgotten and done again. What buffers
  # in hand have written stays; their validation is that of the iteration begun.
  last = place['iteration'] - (batch is None) + (ahead is not None)
  writer.rewind('rl', last)
  writer.rewind('eval', place['iteration'] - (place['inner'] == 0))
  writer.rewind('update', int(state.step))
  for name in ('samples.jsonl', 'failed_grades.jsonl'):
    rewind_lines(os.path.join(workdir, name), last)
  rewind_lines(os.path.join(workdir, 'health.jsonl'),
               place['iteration'] - 1)
  for record in place['rollbacks']:
    note_down(workdir, record)
  return state, batch, ahead, place


def buffers_at(built):
  """step -> shapes of the buffers in a checkpoint: in use, sampled ahead."""
  c, problems = built.config, build.problems(built, 'train')

  def buffers(step):
    if not step:  # a rollback to the start
      return None, None
    it = (step - 1) // c.train.inner
    more = c.train.overlap and it + 1 < c.train.iterations
    return (shapes_at(built, problems, it),
            shapes_at(built, problems, it + 1) if more else None)
  return buffers


def shapes_at(built, problems, it):
  """The TrainBatch of iteration `it` as shapes, for restoring."""
  c = built.config
  prompts = data.prompts_at(problems, it, c.train.prompts, c.seed,
                            c.data.bucket)
  return build.abstract_batch(built, prompts.tokens.shape[1])


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
  path = os.path.join(folder, f"update_{written['step']}.npz")
  batch = mesh.fetch(batch)
  leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
  if jax.process_index() == 0:
    os.makedirs(folder, exist_ok=True)
    np.savez(path, **{mesh.path_of(where): leaf for where, leaf in leaves})
  raise health.Collapse(
      f"loss or gradient is not finite at update {written['step']}: loss "
      f"{written['loss']}, gradient norm {written['grad_norm']}; its batch is "
      f'in {path}, the last checkpoint is intact. Try a smaller optim.lr', {
          'iteration': int(batch.row[0]) // len(batch.row), 'rule': 'finite',
          'values': [health.as_json(written[name]) for name in (
              'loss', 'grad_norm')]})


def write_late(writer, held, batch, workdir):
  """Hands (step, numbers) of updates to the writer, oldest first."""
  while held:
    stop_if_not_finite(writer.late('update', *held.pop(0)), batch, workdir)


def note_down(workdir, record):
  """Adds a line to health.jsonl, unless it is there."""
  path = os.path.join(workdir, 'health.jsonl')
  if jax.process_index() == 0 and os.path.exists(path):
    with open(path) as f:
      if json.dumps(record) + '\n' in f:
        return
  append(workdir, {'health.jsonl': [record]})


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
  metrics.replace(path, ''.join(lines))
