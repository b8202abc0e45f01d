"""A fixed number of rows at a time: a row that has ended hands its slot to the next.

Short answers then do not wait for long ones, and keys and values are kept for the slots
alone. Every random number belongs to a row, so the tokens are those without slots.
Rows stay on their own device: each shard of the rows has its own slots.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmpo_jax import mesh
from dmpo_jax import types as t
from dmpo_jax.sampler import blocks, unmask
from dmpo_jax.sampler.unmask import Loop, Setting
from dmpo_jax.types import Array


class Batch(NamedTuple):
  """What the slots work on. G shards have S / G slots and R / G rows each."""

  state: blocks.State  # of the slots
  own: tuple  # of the slots' rows: Setting.valid, data of .keys, .bound
  row: t.Array  # (G, S / G) row of the shard that a slot works on; R / G: none
  begun: t.Array  # (G,) rows that have had a slot
  rows: Loop  # of all R rows: as they begin, then as they ended


def split(x: Array, parts: int) -> Array:
  """Returns (G, R / G, ...) of (R, ...): each part lies on one shard."""
  return x.reshape((parts, -1) + x.shape[1:])


def take(x_Rx: Array, at_GxN: Array) -> Array:
  """Returns rows of each shard, (G * N, ...); an index past the end gives the last."""
  part = split(x_Rx, len(at_GxN))
  found = jax.vmap(lambda x, at: x[jnp.minimum(at, len(x) - 1)])(part, at_GxN)
  return found.reshape((-1,) + x_Rx.shape[1:])


def put(x_Rx: Array, at_GxN: Array, new: Array) -> Array:
  """Returns x with new rows of each shard; an index past the end writes nothing."""
  parts = split(x_Rx, len(at_GxN)), at_GxN, split(new, len(at_GxN))
  done = jax.vmap(lambda x, at, new: x.at[at].set(new, mode='drop'))(*parts)
  return done.reshape(x_Rx.shape)


def put_loop(loop: Loop, at_GxN: Array, new: Loop) -> Loop:
  """Returns a loop with the rows of another; it keeps its own count of forwards."""
  forwards, zero = loop.forwards, None
  loop, new = loop._replace(forwards=zero), new._replace(forwards=zero)
  done = jax.tree.map(lambda x, new: put(x, at_GxN, new), loop, new)
  return done._replace(forwards=forwards)


def by_slot(setting: Setting, loop: Loop) -> Loop:
  """Samples all rows with hp.slots of them at a time."""
  if setting.hp.cache in ('prefix', 'dual'):
    return in_pieces(setting, loop)
  parts, rows = mesh.row_shards(), len(loop.tokens)
  slots = setting.hp.slots // parts
  first = jnp.broadcast_to(jnp.arange(slots)[None], (parts, slots))
  state, own = begin(setting, loop, first)
  batch = Batch(state, own, first, jnp.full((parts,), slots), loop)
  # A prompt is computed for several slots at once: it costs many steps of a slot.
  few = max(1, slots // 8) if setting.hp.cache == 'block' else 1
  waiting = lambda batch: batch.begun < rows // parts

  def goes_on(batch: Batch) -> Array:
    """Whether the next thing to do is a step, not to fill the slots."""
    live = split(live_of(setting, batch), parts)
    free = slots - jnp.sum(live, axis=1)
    return jnp.any(live) & ~jnp.any(waiting(batch) & (free >= few))

  def lap(batch: Batch) -> Batch:
    batch = jax.lax.while_loop(goes_on, partial(step, setting), batch)
    return fill(setting, batch, few)

  def remain(batch: Batch) -> Array:
    bounded = batch.state.loop.forwards < 2 * setting.hp.length * (rows // parts)
    more = jnp.any(live_of(setting, batch)) | jnp.any(waiting(batch))
    return more & bounded

  batch = jax.lax.while_loop(remain, lap, batch)
  return batch.rows._replace(forwards=batch.state.loop.forwards)


def own_of(setting: Setting) -> tuple:
  """Returns what the rows of a setting have of their own, as plain arrays."""
  return setting.valid, jax.random.key_data(setting.keys), setting.bound


def of_rows(setting: Setting, own: tuple) -> Setting:
  """Returns the setting of other rows; own: as `own_of` returns it."""
  valid, keys, bound = own
  keys = jax.random.wrap_key_data(keys, impl=jax.random.key_impl(setting.keys))
  return dataclasses.replace(setting, valid=valid, keys=keys, bound=bound)


def live_of(setting: Setting, batch: Batch) -> t.Array:
  """Returns which slots work on a row that has not ended, (S,) bool."""
  setting = of_rows(setting, batch.own)
  left = unmask.remaining(setting, batch.state.loop)
  return jnp.any(left, axis=1)


def step(setting: Setting, batch: Batch) -> Batch:
  """Takes one step of every slot."""
  setting, state = of_rows(setting, batch.own), batch.state
  if setting.hp.cache == 'block':
    return batch._replace(state=blocks.step(setting, state))
  loop = unmask.step_each_row(setting, state.loop)
  return batch._replace(state=state._replace(loop=loop))


def begin(setting: Setting, rows: Loop, at_GxN: Array) -> tuple[blocks.State, tuple]:
  """Returns the state of rows that begin, and what they have of their own."""
  of = lambda x: take(x, at_GxN)
  own = jax.tree.map(of, own_of(setting))
  forwards, rows = rows.forwards, rows._replace(forwards=None)
  loop = jax.tree.map(of, rows)._replace(forwards=forwards)
  setting = of_rows(setting, own)
  if setting.hp.cache == 'block':
    return blocks.begin(setting, loop), own
  return blocks.State(loop, None, loop.count), own


def fill(setting: Setting, batch: Batch, count: int) -> Batch:
  """Puts away the rows that have ended, and begins `count` others in their slots."""
  parts, slots = batch.row.shape
  size = len(batch.rows.tokens) // parts
  free = ~split(live_of(setting, batch), parts)
  rows = put_loop(batch.rows, jnp.where(free, batch.row, size), batch.state.loop)
  row = jnp.where(free, size, batch.row)
  # The first free slots of a shard, and the rows that they begin.
  slot = jnp.argsort(~free, axis=1, stable=True)[:, :count]
  new = batch.begun[:, None] + jnp.arange(count)[None]
  used = jnp.take_along_axis(free, slot, axis=1) & (new < size)
  slot = jnp.where(used, slot, slots)
  state, own = begin(setting, rows._replace(forwards=batch.state.loop.forwards), new)
  loop = put_loop(batch.state.loop, slot, state.loop)
  loop = loop._replace(forwards=state.loop.forwards)
  cache = batch.state.cache
  if cache is not None:  # its rows are the second axis
    layer = jax.vmap(put, (0, None, 0))
    cache = jax.tree.map(lambda x, new: layer(x, slot, new), cache, state.cache)
  done = put(batch.state.done, slot, state.done)
  return Batch(
    blocks.State(loop, cache, done),
    jax.tree.map(lambda x, new: put(x, slot, new), batch.own, own),
    put(row.ravel(), slot, new.ravel()).reshape(row.shape),
    batch.begun + jnp.sum(used, axis=1),
    rows,
  )


def in_pieces(setting: Setting, loop: Loop) -> Loop:
  """Samples hp.slots rows after the others: caches that all rows share need that."""
  count = len(loop.tokens) // setting.hp.slots

  def one(piece: Any) -> Loop:
    loop, own = piece
    loop = loop._replace(forwards=jnp.int32(0))
    return unmask.by_rule(of_rows(setting, own), loop)

  whole = loop._replace(forwards=None), own_of(setting)
  done = jax.lax.map(one, jax.tree.map(lambda x: mesh.split_rows(x, count), whole))
  forwards, done = jnp.sum(done.forwards), done._replace(forwards=None)
  return jax.tree.map(mesh.join_rows, done)._replace(forwards=forwards)
