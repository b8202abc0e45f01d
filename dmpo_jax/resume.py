"""Where a run is: what its checkpoints say, and how it goes on from them.

A place is a dict: iteration, inner (updates done on its buffer), seconds, the
best validation so far, what health has noted, the rollbacks. Lines of the
workdir's files that are of later iterations are dropped, for they are made
again.
"""

import json
import os

import jax
from absl import logging

from dmpo_jax import build, check, checkpoint, data, guard, health, metrics


def policy_of(built, base):
  """(trainable, frozen): what RL changes, and the reference policy."""
  lora = built.steps.init_lora()
  return (lora or base), base


def save(built, manager, clock, state, batch, ahead, place):
  """Begins to save a place in the run: its buffers, and what resume reads."""
  c = built.config
  done = place['iteration'] * c.train.inner + place['inner']
  with clock('checkpoint'):
    checkpoint.save(
      manager,
      done,
      state,
      batch,
      {**place, 'config': check.plain(c)},
      ahead,
      built.steps.digest,
    )


def note_best(manager, state, place, best):
  """Tells the checkpoint of this place of a best that it was saved without.

  After SIGTERM it is validated by the next start; if it was of the last update,
  nothing is saved after it.
  """
  if best != place['best'] and int(state.step):
    checkpoint.amend(manager, int(state.step), best=best)


def wait(manager, clock):
  """For the save under way: here, where a watchdog knows its name."""
  with clock('checkpoint'):
    manager.wait_until_finished()


def is_saved(workdir):
  """Whether there is a checkpoint in workdir/rl."""
  folder = os.path.join(workdir, 'rl')
  return os.path.isdir(folder) and any(map(str.isdigit, os.listdir(folder)))


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
  with checkpoint.open_manager(folder, built.config.checkpoint.keep) as manager:
    found = checkpoint.restore(manager, state, **how)
    top = found and found[3].get('best')
    if best and top and top['step'] != int(found[0].step):
      found = None  # not beside another: two might not fit
      if top['step']:  # else nothing was better than the start
        found = checkpoint.restore(manager, state, only=top['step'], **how)
  return {**frozen, **(found[0].trainable if found else trainable)}


def enter(built, manager, trainable, problems, workdir, writer):
  """(state, batch, ahead, place): the latest checkpoint, or a fresh start.

  trainable: what a fresh state starts from. The buffers, in use and sampled
  ahead, are None where there is none. ValueError if there are checkpoints and
  none can be used.
  """
  place = dict(
    iteration=0,
    inner=0,
    seconds=0.0,
    best=None,
    health=health.fresh(),
    rollbacks=[],
    lr_scale=1.0,
  )
  batch, ahead, c = None, None, built.config
  state = built.steps.start(trainable)
  shapes = checkpoint.abstract(state)
  if manager.all_steps():
    state = None  # not beside the one that is read: two might not fit
  found = checkpoint.restore(
    manager, shapes, buffers_at(built), built.steps.digest, check.refuse(c, check.FREE)
  )
  if found:
    state, batch, ahead, meta = found
    place |= meta
    checkpoint.set_aside(manager, int(state.step))
    logging.info(
      'resuming at iteration %d, inner step %d', place['iteration'], place['inner']
    )
    if place['inner'] == c.train.inner:
      batch, ahead = ahead, None
      place = {**place, 'iteration': place['iteration'] + 1, 'inner': 0}
  elif lost := writer.count('update'):
    logging.warning(
      'no checkpoint in %s: from the start, and the %d updates '
      'that are in the metrics are done again',
      os.path.join(workdir, 'rl'),
      lost,
    )
  # Everything after the checkpoint is forgotten and done again. What buffers
  # in hand have written stays; their validation is that of the iteration begun.
  last = place['iteration'] - (batch is None) + (ahead is not None)
  writer.rewind('rl', last)
  writer.rewind('eval', place['iteration'] - (place['inner'] == 0))
  writer.rewind('update', int(state.step))
  for name in ('samples.jsonl', 'failed_grades.jsonl'):
    rewind_lines(os.path.join(workdir, name), last)
  rewind_lines(os.path.join(workdir, 'health.jsonl'), place['iteration'] - 1)
  for record in place['rollbacks']:
    note_down(workdir, record)
  return state, batch, ahead, place


def roll_back(built, workdir, manager, base, sentence, record):
  """Back to the best checkpoint, or the start, with a smaller learning rate.

  It takes the place of all checkpoints after it, with the record in it, so
  that the loop goes on from it as after a kill. SystemExit if the action is to
  stop, or all rollbacks are spent.
  """
  rules = check.settings(health.Config, built.config.health)
  manager.wait_until_finished()
  trainable = policy_of(built, base)[0]
  shapes = checkpoint.abstract(built.steps.start(trainable))
  how = dict(digest=built.steps.digest, refuse=check.refuse(built.config, check.FREE))
  # Of what is read only the meta is kept: two states might not fit.
  meta = (checkpoint.restore(manager, shapes, **how) or ({},))[-1]
  done, seconds = meta.get('rollbacks', []), meta.get('seconds', 0.0)
  if rules.action == 'stop' or len(done) >= rules.rollbacks:
    note_down(workdir, {**record, 'action': 'stop'})
    spent = f', after {len(done)} rollbacks' if done else ''
    guard.collapsed(
      f'iteration {record["iteration"]}{spent}: {sentence}; '
      'see "When training goes wrong" in docs/running.md'
    )
  top, batch, ahead = (meta.get('best') or {'step': 0})['step'], None, None
  meta = {
    'iteration': -1,
    'inner': built.config.train.inner,
    'best': None,
    'config': check.plain(built.config),
  }
  if top:
    state, batch, ahead, meta = checkpoint.restore(
      manager, shapes, buffers_at(built), only=top, **how
    )
  else:
    state = built.steps.start(trainable)
  scale = rules.lr_factor * (done[-1]['lr_scale'] if done else 1.0)
  record = {**record, 'action': 'rollback', 'to_update': top, 'lr_scale': scale}
  logging.warning(
    'iteration %d: %s; back to update %d, learning rate * %g',
    record['iteration'],
    sentence,
    top,
    scale,
  )
  checkpoint.replace(
    manager,
    top,
    state,
    batch,
    {
      **meta,
      'seconds': seconds,
      'rollbacks': [*done, record],
      'lr_scale': scale,
      'health': health.fresh(meta.get('health', {}).get('best_reward')),
    },
    ahead,
    built.steps.digest,
  )


def buffers_at(built):
  """step -> shapes of the buffers in a checkpoint: in use, sampled ahead."""
  c, problems = built.config, build.problems(built, 'train')

  def buffers(step):
    if not step:  # a rollback to the start
      return None, None
    it = (step - 1) // c.train.inner
    more = c.train.overlap and it + 1 < c.train.iterations
    return (
      shapes_at(built, problems, it),
      shapes_at(built, problems, it + 1) if more else None,
    )

  return buffers


def shapes_at(built, problems, it):
  """The TrainBatch of iteration `it` as shapes, for restoring."""
  c = built.config
  prompts = data.prompts_at(problems, it, c.train.prompts, c.seed, c.data.bucket)
  return build.abstract_batch(built, prompts.tokens.shape[1])


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
    lines = [
      line
      for line in f
      if line.endswith('\n') and json.loads(line)['iteration'] <= last
    ]
  metrics.replace(path, ''.join(lines))
