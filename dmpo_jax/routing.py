"""Which experts a mixture-of-experts model chooses: its load, and the rollout's choice.

A router's choice is a step function of the hidden states, so rounding that changes a
log-prob by 1e-7 can change an expert. The sampler computes windows beside a cache, the
trainer whole packed rows: they round differently. With routing.replay the sampler
records the choice of its passes (types.Routes). A pass under masks that are a recorded
state takes that choice, and weighs the experts by its own scores, so gradients reach
the router. Masks at no recorded state have no choice to replay: there tokens choose.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dmpo_jax import rules
from dmpo_jax.types import Array, BoolRKL, IntRL, Params, Routes


@dataclasses.dataclass(frozen=True)
class Config(rules.Section):
  """How routers of a mixture of experts train, and whether rollouts bind them."""

  NAME = 'routing'
  OWN = {
    'train': rules.one_of('none', 'sft', 'all'),
    'sft_load': lambda x: rules.finite(x) or ('' if x == -1 else rules.least(0)(x)),
  }

  # Phases that change routers where all parameters are trained; sft | all | none. A
  # router that moves in RL changes the experts between the rollout and its updates.
  train: str = 'sft'
  # Factor of the load loss in supervised training; -1 = the checkpoint's own (0.001
  # where it names none), 0 = off.
  sft_load: float = -1.0
  load: float = 0.0  # factor of the load loss in RL; 0 = off
  # Record the experts that rollouts choose; log-probs and updates at recorded states
  # take them.
  replay: bool = False
  # Record them, and report how far the trainer's own choice differs; two passes more.
  measure: bool = False

  @property
  def records(self) -> bool:
    """Whether rollouts record their choice."""
    return self.replay or self.measure

  def trains(self, phase: str) -> bool:
    """Returns whether routers are trained in a phase, sft or rl."""
    return self.train == 'all' or self.train == phase

  def factor(self, phase: str, own: float) -> float:
    """Returns the factor of the load loss in a phase; own: the checkpoint's."""
    if not self.trains(phase):
      return 0.0
    if phase == 'rl':
      return self.load
    return own if self.sft_load == -1 else self.sft_load

  def idle(self) -> dict[str, str]:
    return rules.without_effect(
      ('sft_load', self.trains('sft'), 'routing.train = sft or all')
    )

  def problems(self) -> list[str]:
    found = super().problems()
    if self.load and not self.trains('rl'):
      found.append(
        f'routing.load = {self.load} balances routers that RL does not train: set '
        'routing.train = all, or 0'
      )
    return found


# --- replay


def rounds_of(order_RxL: IntRL, block: int) -> IntRL:
  """Returns each token's unmasking round within its block, from 0; -1 where order < 0.

  A block's round j is the j-th of the row's steps that unmasked a token of it.
  """
  order = order_RxL.reshape(len(order_RxL), -1, block)
  first = first_of_step(order)
  before = first[..., None, :] & (order[..., None, :] < order[..., :, None])
  rounds = jnp.where(order >= 0, jnp.sum(before, axis=-1), -1)
  return rounds.reshape(order_RxL.shape)


def first_of_step(order: Array) -> Array:
  """Returns the tokens of (..., W) that are the first one of their step."""
  place = jnp.arange(order.shape[-1])
  same = order[..., :, None] == order[..., None, :]
  earlier = jnp.broadcast_to(place[:, None] > place[None], same.shape)
  return (order >= 0) & ~jnp.any(same & earlier, axis=-1)


def recorded_state(order_RxL: IntRL, masked_RxKxL: BoolRKL, block: int) -> Array:
  """Returns the step before which copies stood so, or a block's round, (R, K, cells).

  -1: the sampler was at no such state. block = 0: the model sees the whole text, a cell
  is all of a row.
  """
  size = block or order_RxL.shape[1]
  cut = lambda x: x.reshape(*x.shape[:-1], -1, size)
  at = cut(rounds_of(order_RxL, block) if block else order_RxL)[:, None]
  masked, own = cut(masked_RxKxL), at >= 0
  first = jnp.min(
    jnp.where(masked & own, at, order_RxL.shape[1] * 2), axis=-1, keepdims=True
  )
  same = jnp.all(~own | (masked == (at >= first)), axis=-1)
  return jnp.where(same & jnp.any(masked & own, axis=-1), first[..., 0], -1)


def replayed(routes: Routes, masked_RxKxL: BoolRKL, block: int) -> Array:
  """Returns the choices that K masked copies replay, -1 where a token chooses itself.

  Of whole texts (N, R * K, S, k); of a block-causal model's packed rows
  (N, R, S + K * L, k).
  """
  at = recorded_state(routes.order, masked_RxKxL, block)
  at = jnp.minimum(at, routes.steps.shape[1] - 1)

  def of_row(steps_Jx: Array, at_KxC: Array) -> Array:
    if not block:
      return steps_Jx[at_KxC[:, 0]]
    at = jnp.repeat(at_KxC, block, axis=1)
    return steps_Jx[at, jnp.arange(at.shape[1])[None]]

  copies = jax.vmap(of_row)(routes.steps, at)
  known = jnp.repeat(at, copies.shape[2] // at.shape[2], axis=2)
  copies = jnp.where(known[..., None, None] >= 0, copies, -1)
  if block:
    columns = [routes.text, copies.reshape(len(copies), -1, *copies.shape[3:])]
    found: Any = jnp.concatenate(columns, axis=1)
  else:
    found = copies.reshape(-1, *copies.shape[2:])
  return jnp.moveaxis(found, 2, 0)


# --- training


def still(params: Params) -> Params:
  """Returns parameters whose routers have no gradient."""

  def of_leaf(path: Any, leaf: Array) -> Array:
    names = [str(getattr(part, 'key', part)) for part in path]
    return jax.lax.stop_gradient(leaf) if 'router' in names else leaf

  return jax.tree_util.tree_map_with_path(of_leaf, params)


def load_metrics(count_NxE: Array) -> dict[str, Array]:
  """Returns how evenly the layers' experts are loaded; count: tokens that chose each.

  expert_top: the busiest expert's tokens over the mean of its layer's. expert_entropy:
  the entropy of the shares over that of equal ones. expert_idle: share of experts that
  no token chose. Means over layers.
  """
  share = count_NxE / jnp.maximum(jnp.sum(count_NxE, axis=1, keepdims=True), 1)
  experts = count_NxE.shape[1]
  entropy = -jnp.sum(jax.scipy.special.xlogy(share, share), axis=1)
  return {
    'expert_top': jnp.mean(jnp.max(share, axis=1)) * experts,
    'expert_entropy': jnp.mean(entropy) / jnp.log(jnp.float32(max(experts, 2))),
    'expert_idle': jnp.mean(count_NxE == 0),
  }
