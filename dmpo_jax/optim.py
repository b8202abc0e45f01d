"""AdamW with warm-up, a constant or falling rate, and clipping by the global norm.

It also holds the moving reference: a copy of the trainable parameters that follows
them. The copy is part of the optimizer's state, so that it is sharded, saved and
restored like the rest.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dmpo_jax import rules
from dmpo_jax.types import Params, Scalar, TrainState


@dataclasses.dataclass(frozen=True)
class Config(rules.Section):
  """Settings of AdamW."""

  NAME = 'optim'
  OWN = {'b1': rules.chance, 'b2': rules.chance, 'eps': rules.above(0)}

  lr: float = 1e-4  # learning rate after warm-up
  warmup: int = 10  # updates of linear warm-up; 0 = none
  decay_steps: int = 0  # updates until the rate has decayed to zero; 0 = constant
  b1: float = 0.9  # decay of the first moment, in [0, 1)
  b2: float = 0.99  # decay of the second moment, in [0, 1)
  eps: float = 1e-8  # added to the root of the second moment
  weight_decay: float = 0.0  # decoupled, of matrices alone; 0 = none
  clip: float = 1.0  # largest global norm of the gradient; 0 = no clipping


CONTROL = 'control'  # the controller's entry beside the model in a tree of parameters


class Beside(NamedTuple):
  """Optimizer state of the model, and of the sampler's controller."""

  model: Any
  control: Any


DECAYS: dict[str, Callable[[float], float]] = {
  'constant': lambda done: 1.0,
  'linear': lambda done: 1 - done,
  'cosine': lambda done: (1 + math.cos(math.pi * done)) / 2,
}  # the share of training that is done -> the factor of the learning rate


class Held(NamedTuple):
  """Optimizer state that holds the moving reference."""

  reference: Params  # shaped as the trainable parameters


def make_optimizer(
  hp: Any, lr: float | Scalar | None = None, hold: bool = False, routers: bool = True
) -> optax.GradientTransformation:
  """Returns the papers' optimizer.

  hp: a Config, or whatever has its fields. lr: replaces hp.lr and may be traced. hold:
  keep a moving reference, which `follow` moves. routers: they are trained. Norms,
  biases and routers that are not are spared from weight decay.
  """
  peak: Any = hp.lr if lr is None else lr

  def schedule(count):
    rate = peak * jnp.minimum(1.0, (count + 1) / max(hp.warmup, 1))
    if hp.decay_steps:
      rate *= jnp.maximum(0.0, 1 - count / hp.decay_steps)
    return rate

  parts = [optax.clip_by_global_norm(hp.clip)] if hp.clip else []
  decay = dict(
    weight_decay=hp.weight_decay, mask=functools.partial(decayed, routers=routers)
  )
  parts.append(optax.adamw(schedule, hp.b1, hp.b2, hp.eps, **decay))
  if hold:
    parts.append(
      optax.GradientTransformation(
        lambda params: Held(jax.tree.map(jnp.copy, params)),
        lambda updates, state, params=None: (updates, state),
      )
    )
  return optax.chain(*parts)


def of_model(tree: Params) -> Params:
  """Returns parameters without those of the sampler's controller."""
  return {name: x for name, x in tree.items() if name != CONTROL}


def of_control(tree: Params) -> Params:
  """Returns the parameters of the sampler's controller; {} if there is none."""
  return {name: x for name, x in tree.items() if name == CONTROL}


def beside(
  first: optax.GradientTransformation, second: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Returns an optimizer of the model and another one of the controller.

  Their gradients are of other sizes, so they share neither clipping nor a rate.
  """

  def init(params: Any) -> Any:
    return Beside(first.init(of_model(params)), second.init(of_control(params)))

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    done: Any = first.update(of_model(updates), state.model, of_model(params))
    own: Any = second.update(of_control(updates), state.control, of_control(params))
    return {**done[0], **own[0]}, Beside(done[1], own[1])

  return optax.GradientTransformation(init, update)


def reference_of(opt_state: Any) -> Params:
  """Returns the moving reference, shaped as the trainable parameters."""
  return optax.tree.get(opt_state, 'reference')


def follow(old: TrainState, new: TrainState, every: int, mix: float) -> TrainState:
  """Moves the reference of `new` if a move is due at its update.

  Every `every` updates it becomes mix * parameters + (1 - mix) * reference: mix = 1 is
  a copy, less is a moving average. `old` is the state before the update: a refused
  update does not move the reference.
  """
  due = (new.step > old.step) & (new.step % every == 0)
  reference = jax.tree.map(
    lambda r, x: jnp.where(due, mix * x + (1 - mix) * r, r).astype(r.dtype),
    reference_of(new.opt_state),
    of_model(new.trainable),
  )
  return new._replace(opt_state=optax.tree.set(new.opt_state, reference=reference))


def decayed(params: Params, routers: bool = True) -> Params:
  """Returns True for matrices, False for norms and biases, as a tree.

  routers: whether theirs are among the matrices.
  """

  def is_matrix(path, leaf):
    names = [str(part.key) for part in path]
    return names[-1] not in ('scale', 'bias') and (routers or 'router' not in names)

  return jax.tree_util.tree_map_with_path(is_matrix, params)
