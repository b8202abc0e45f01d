"""AdamW with warm-up, then constant; clipping by the global norm."""

import jax
import optax


def make_optimizer(lr, warmup, b1, b2, eps, weight_decay, clip):
  """The papers' optimizer. warmup in updates; clip 0 = off.

  Decay spares norms and biases, as the Hugging Face trainer does.
  """
  schedule = optax.linear_schedule(0.0, lr, warmup) if warmup else lr
  if warmup:  # the first update must not be lost to a rate of zero
    schedule = optax.linear_schedule(lr / warmup, lr, max(warmup - 1, 1))
  parts = [optax.clip_by_global_norm(clip)] if clip else []
  parts.append(optax.adamw(schedule, b1, b2, eps, weight_decay=weight_decay,
                           mask=decayed))
  return optax.chain(*parts)


def decayed(params):
  """True on matrices, False on norms and biases."""
  def matrix(path, leaf):
    return str(path[-1].key) not in ('scale', 'bias')
  return jax.tree_util.tree_map_with_path(matrix, params)
