"""AdamW with warm-up, constant or falling; clipping by the global norm.

And the moving reference: a copy of what trains, that follows it. It lives in
the optimizer's state, so that it is split, saved and restored like the rest.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Held(NamedTuple):
  reference: dict  # shaped as what trains


def make_optimizer(
  lr, warmup, b1, b2, eps, weight_decay, clip, decay_steps=0, scale=1.0, hold=False
):
  """The papers' optimizer. warmup in updates; clip 0 = off.

  decay_steps > 0 lets the rate fall linearly to zero over so many updates;
  hold keeps a moving reference, that `follow` moves.
  Weight decay spares norms and biases, as the Hugging Face trainer does.
  scale multiplies the rate; it may be traced, and leaves the state as it is.
  """

  def schedule(count):
    rate = lr * jnp.minimum(1.0, (count + 1) / max(warmup, 1))
    if decay_steps:
      rate *= jnp.maximum(0.0, 1 - count / decay_steps)
    return rate * scale

  parts = [optax.clip_by_global_norm(clip)] if clip else []
  parts.append(
    optax.adamw(schedule, b1, b2, eps, weight_decay=weight_decay, mask=decayed)
  )
  if hold:
    parts.append(
      optax.GradientTransformation(
        lambda params: Held(jax.tree.map(jnp.copy, params)),
        lambda updates, state, params=None: (updates, state),
      )
    )
  return optax.chain(*parts)


def reference_of(opt_state):
  """The moving reference, shaped as what trains."""
  return optax.tree.get(opt_state, 'reference')


def follow(old, new, every, mix):
  """TrainState `new` with its reference moved if an update is due for it.

  Every so many updates mix * parameters + (1 - mix) * reference: 1 is a copy,
  less a running mean. `old` is the state before: a refused update moves none.
  """
  due = (new.step > old.step) & (new.step % every == 0)
  reference = jax.tree.map(
    lambda r, x: jnp.where(due, mix * x + (1 - mix) * r, r).astype(r.dtype),
    reference_of(new.opt_state),
    new.trainable,
  )
  return new._replace(opt_state=optax.tree.set(new.opt_state, reference=reference))


def decayed(params):
  """True on matrices, False on norms and biases."""

  def matrix(path, leaf):
    return str(path[-1].key) not in ('scale', 'bias')

  return jax.tree_util.tree_map_with_path(matrix, params)
