"""The record of the experts that a rollout's passes chose; see types.Routes."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dmpo_jax import model, routing
from dmpo_jax import types as t
from dmpo_jax.sampler.config import SAMPLERS, SampleConfig
from dmpo_jax.types import Array, Routes


def problem(cfg: model.ModelConfig, hp: SampleConfig) -> str:
  """Returns why the experts of a sampler's passes cannot be recorded; '' = they can."""
  if not cfg.experts:
    return 'the model has no experts: set routing.replay = routing.measure = False'
  if hp.guidance:
    return (
      f'sampler.guidance = {hp.guidance}: a step has two passes, whose experts are not '
      'recorded; set 0, or routing.replay = routing.measure = False'
    )
  if not SAMPLERS[hp.pick].records:
    return (
      f'sampler.pick = {hp.pick} takes tokens back, so experts of its passes are not '
      'recorded; set another pick, or routing.replay = routing.measure = False'
    )
  return ''


def blank(
  cfg: model.ModelConfig, hp: SampleConfig, order_RxL: Array, columns: int
) -> Routes:
  """Returns the record of no pass; columns: S."""
  size, most = cfg.block_causal, hp.length
  if SAMPLERS[hp.pick].scheduled and hp.schedule != 'dream':
    most = hp.steps
  each = cfg.layers - len(cfg.dense_layers), cfg.experts_per_token
  none = lambda *shape: jnp.full((len(order_RxL), *shape, *each), -1, jnp.int16)
  if size:
    return Routes(order_RxL, none(size, hp.length), none(columns))
  return Routes(order_RxL, none(most, columns))


def split(kept: Any) -> tuple[Any, Any]:
  """Returns the cache of a pass, and its choices (R, T, N, X); None: not kept."""
  if not isinstance(kept, model.Kept):
    return kept, None
  assert kept.routed is not None
  return kept.cache, jnp.moveaxis(kept.routed.experts, 0, 2)


def put_step(
  steps: Array, new_RxTx: Array, step_R: t.IntR, first_R: t.IntR, where_R: t.BoolR
) -> Array:
  """Writes the choices of T columns from `first` on at each row's own step."""

  def of_row(x: Array, new: Array, step: Array, first: Array, where: Array) -> Array:
    at = step, first, *[0] * (new.ndim - 1)
    old = jax.lax.dynamic_slice(x, at, (1, *new.shape))
    new = jnp.where(where & (step < len(x)), new[None], old)
    return jax.lax.dynamic_update_slice(x, new, at)

  args = steps, new_RxTx, step_R, first_R, where_R
  return model.on_own_rows(jax.vmap(of_row), (0,) * 5, *args)


def put_text(text: Array, new_RxTx: Array, first_R: t.IntR) -> Array:
  """Writes the choices of T columns from each row's `first` on."""
  of_row = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
  put = lambda x, new, at: of_row(x, new, at)
  return model.on_own_rows(jax.vmap(put), (0, 0, 0), text, new_RxTx, first_R)


def note_block(setting: Any, loop: Any, new_RxWx: Array, start_R: Array) -> Routes:
  """Notes a pass of the attention blocks that begin at columns `start`.

  A row whose block has no mask left has ended.
  """
  size, prompt = setting.cfg.block_causal, setting.prompt
  at_R, masked, record = start_R - prompt, masked_of(setting, loop), loop.routes
  live_R = jnp.any(model.windows(masked, at_R, size), axis=1)
  order = model.windows(jnp.where(masked, -1, loop.order), at_R, size)
  round_R = jnp.sum(routing.first_of_step(order), axis=1).astype(jnp.int32)
  steps = put_step(record.steps, new_RxWx, round_R, at_R, live_R)
  return record._replace(steps=steps)


def masked_of(setting: Any, loop: Any) -> t.BoolRL:
  """Returns where a mask stands on the canvas."""
  masked = loop.tokens[:, setting.prompt :] == setting.cfg.mask_id
  return masked & (loop.order != t.GIVEN)


def note(
  setting: Any, loop: Any, new: Array, start: int | t.IntScalar | t.IntR
) -> Routes:
  """Notes a pass of the windows that begin at `start`, or of all columns."""
  size, record = setting.cfg.block_causal, loop.routes
  start_R = jnp.broadcast_to(jnp.int32(start), loop.count.shape)
  if not size:
    window = masked_of(setting, loop), start_R - setting.prompt, setting.hp.block
    busy_R = jnp.any(model.windows(*window), axis=1)
    last = loop.tokens.shape[1] - new.shape[1]
    first_R = jnp.minimum(start_R - setting.cfg.shift, last)
    steps = put_step(record.steps, new, loop.count, first_R, busy_R)
    return record._replace(steps=steps)
  block_R = setting.prompt + (start_R - setting.prompt) // size * size
  past = jnp.arange(new.shape[1])[None] < block_R[:, None]
  text = jnp.where(past[..., None, None], new, record.text)
  loop = loop._replace(routes=record._replace(text=text))
  return note_block(setting, loop, model.windows(new, block_R, size), block_R)
