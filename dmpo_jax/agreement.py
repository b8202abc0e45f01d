"""How far the trainer's own choice of experts differs from the rollout's.

The rollout's passes are windows beside a cache; the trainer's see a whole text, or a
packed row. Both compute the same hidden states, but round differently, and a router
turns a rounding into another expert. `agreement` repeats the recorded states of a
buffer under the policy that sampled it, with and without the recorded choice.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmpo_jax import logprob, model, routing
from dmpo_jax.model import ModelConfig
from dmpo_jax.sampler import SampleConfig
from dmpo_jax.types import Array, Masks, Params, Rollouts, ViewLogp


def agreement(
  cfg: ModelConfig, params: Params, rollouts: Rollouts, law: SampleConfig
) -> dict[str, Array]:
  """Returns numbers of each row, (R,) float32 each.

  routes_differ: the share of the recorded choices (layer, token, expert) that a pass of
  its own does not make. routes_logp: the mean absolute difference of a token's log-prob
  from the record, nats, where tokens choose; routes_replayed: where they replay.
  routes_most: the largest such difference where tokens choose. ValueError if no routes
  were recorded.
  """
  if rollouts.routes is None:
    raise ValueError("these rollouts lack the record of routes: sample with 'routes'")
  cfg = dataclasses.replace(cfg, keep_routes=True)
  read, order = logprob.reader(cfg, law), rollouts.order
  at_RxL = routing.rounds_of(order, block) if (block := cfg.block_causal) else order

  def look(masks: Masks) -> ViewLogp:
    args = cfg, params, rollouts.tokens, masks, rollouts.valid
    return logprob.view_logp(*args, read=read)

  def of_state(step: Array) -> dict[str, Array]:
    masks = Masks((at_RxL >= step)[:, None], jnp.ones((len(order), 1, 1)))
    masks = masks._replace(sampled=order != -1)
    own, bound = look(masks), look(masks._replace(routes=rollouts.routes))
    now, add = at_RxL == step, lambda x: jnp.sum(x.astype(jnp.float32), axis=1)
    free, replayed = (
      jnp.where(now, jnp.abs(x.logp[:, 0] - rollouts.logp), 0.0) for x in (own, bound)
    )
    chosen, other = compared(cfg, rollouts, masks, own.routed, step == 0)
    sums = dict(tokens=add(now), free=add(free), replayed=add(replayed))
    return sums | dict(most=jnp.max(free, axis=1), chosen=chosen, other=other)

  found = jax.lax.map(of_state, jnp.arange(rollouts.routes.steps.shape[1]))
  most = jnp.max(found['most'], axis=0)
  sums = {name: jnp.sum(x, axis=0) for name, x in found.items()}
  tokens, chosen = (jnp.maximum(sums[name], 1) for name in ('tokens', 'chosen'))
  return {
    'routes_differ': sums['other'] / chosen,
    'routes_logp': sums['free'] / tokens,
    'routes_replayed': sums['replayed'] / tokens,
    'routes_most': most,
  }


def compared(
  cfg: ModelConfig, rollouts: Rollouts, masks: Masks, routed: model.Routed, first: Array
) -> tuple[Array, Array]:
  """Returns the recorded choices of one copy's tokens, and those `routed` lacks, (R,).

  Padding does not count. The text before the copy counts if `first`, () bool.
  """
  record, masked, valid = rollouts.routes, masks.masked, rollouts.valid
  assert record is not None and masks.sampled is not None
  if not cfg.block_causal:
    masked |= ~masks.sampled[:, None]
  else:
    copy = valid[:, -masked.shape[2] :]
    valid = jnp.concatenate([valid & first, copy], axis=1)
  then = routing.replayed(record, masked, cfg.block_causal)
  same = jnp.any(then[..., :, None] == routed.experts[..., None, :], axis=-1)
  known = (then >= 0) & valid[None, :, :, None]
  add = lambda x: jnp.sum(x, axis=(0, 2, 3), dtype=jnp.float32)
  return add(known), add(known & ~same)
