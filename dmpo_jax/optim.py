"""AdamW with warm-up, constant or falling; clipping by the global norm."""

import jax
import jax.numpy as jnp
import optax


def make_optimizer(lr, warmup, b1, b2, eps, weight_decay, clip, decay_steps=0,
                   scale=1.0):
  """The papers' optimizer. warmup in updates; clip 0 = off.

  decay_steps > 0 lets the rate fall linearly to zero over so many updates.
  Weight decay spares norms and biases, as the Hugging Face trainer does.
  scale multiplies the rate; it may be traced, and leaves the state as it is.
  """
  def schedule(count):
    rate = lr * jnp.minimum(1.0, (count + 1) / max(warmup, 1))
    if decay_steps:
      rate *= jnp.maximum(0.0, 1 - count / decay_steps)
    return rate * scale

  parts = [optax.clip_by_global_norm(clip)] if clip else []
  parts.append(optax.adamw(schedule, b1, b2, eps, weight_decay=weight_decay,
                           mask=decayed))
  return optax.chain(*parts)


def decayed(params):
  """True on matrices, False on norms and biases."""
  def matrix(path, leaf):
    return str(path[-1].key) not in ('scale', 'bias')
  return jax.tree_util.tree_map_with_path(matrix, params)
