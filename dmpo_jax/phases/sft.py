"""Supervised training of the masked model: LLaDA's SFT loss on true answers.

Makes the base model of a run that starts from nothing. Position in the data
is a function of the step, so that it resumes to the bit.
"""

import contextlib
import os
import time

import jax
import numpy as np
from absl import logging

from dmpo_jax import build, check, checkpoint, data, guard, metrics


def run(
  built, workdir, writer, beat=lambda phase, step: None, alone=contextlib.nullcontext
):
  """Base parameters after sft.steps; resumes from, or reads, workdir/sft.

  Returns ({'params': ...}, seconds spent in all sessions). ValueError if there
  are checkpoints and none can be used; SystemExit, saved, after SIGTERM.
  `with alone()` is held while it trains, for those who come without the lock.
  """
  c = built.config
  if not c.sft.steps:
    return built.steps.init(), 0.0
  state, clock = built.steps.start_sft(built.steps.init()), metrics.Clock(beat)
  with checkpoint.open_manager(os.path.join(workdir, 'sft'), 2) as manager:
    start, spent = 0, 0.0
    with clock('checkpoint'):
      found = checkpoint.restore(
        manager,
        checkpoint.abstract(state),
        digest=built.steps.digest,
        refuse=check.refuse(c),
      )
    if found:
      state, _, _, meta = found
      start, spent = meta['step'], meta['seconds']
    if start < c.sft.steps:
      with alone(), guard.Preemption() as asked:
        checkpoint.set_aside(manager, start)
        state, spent = train(built, state, start, spent, writer, manager, clock, asked)
  return state.trainable, spent


def train(built, state, start, spent, writer, manager, clock, asked):
  """Steps start .. sft.steps; saves at the end and every checkpoint.every."""
  c = built.config
  tokens, valid = encode(built)
  logging.info('supervised training: %d steps of %d rows', c.sft.steps, c.sft.batch)
  writer.rewind('sft', start)
  progress = metrics.Progress(
    c.sft.steps, 'sft', start=start, every_seconds=c.log.every_seconds
  )
  begun, saved = time.time() - spent, time.monotonic()
  for at in range(start, c.sft.steps):
    index = data.indices_at(at, c.sft.batch, len(tokens), c.seed)
    clock.step = at
    with clock('supervised update'):
      state, pending = built.steps.sft(
        state, tokens[index], valid[index], np.arange(c.sft.batch, dtype=np.int32), at
      )
      written = writer.late('sft', at + 1, pending)
    stop_if_not_finite(written)
    progress.update(at + 1, written or {})
    stop, last = asked(), at + 1 == c.sft.steps
    if stop or last or checkpoint.is_due(c.checkpoint, at + 1, saved):
      stop_if_not_finite(writer.flush())
      saved = time.monotonic()
      with clock('checkpoint'):
        checkpoint.save(
          manager,
          at + 1,
          state,
          None,
          dict(step=at + 1, seconds=time.time() - begun, config=check.plain(c)),
          digest=built.steps.digest,
        )
    if stop or last:
      with clock('checkpoint'):
        manager.wait_until_finished()
    if stop:
      guard.leave()
  progress.close()
  jax.block_until_ready(state.trainable)
  return state, time.time() - begun


def stop_if_not_finite(written):
  """FloatingPointError if a step's numbers, where there are any, say so."""
  if written and not written['finite']:
    raise FloatingPointError(
      f'supervised loss or gradient is not finite at step {written["step"]}:'
      f' loss {written["loss"]}, gradient norm {written["grad_norm"]}; the '
      'last checkpoint is intact, try a smaller sft.lr'
    )


def encode(built):
  """(n, S) tokens and validity: prompts with their true completions."""
  c = built.config
  found = build.problems(built, 'train')
  texts = [built.task.target(example, c.data.style) for example in found.examples]
  targets = data.encode_targets(texts, built.tokenizer, c.sampler.length)
  tokens = np.concatenate([found.tokens, targets], axis=1)
  valid = np.concatenate([found.valid, np.ones_like(targets, bool)], axis=1)
  return tokens, valid
