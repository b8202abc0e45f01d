"""Block-causal models: the exact cache of their finished blocks.

The keys and values of a finished attention block depend on nothing behind it. So they
are computed once, and the steps of a block cost the tokens of that block alone. Rows
work on blocks of their own: none waits for another.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmpo_jax import model
from dmpo_jax import types as t
from dmpo_jax.sampler import routes, unmask
from dmpo_jax.sampler.unmask import Loop, Setting


class State(NamedTuple):
  """The rows' loop, and what is kept of their finished blocks."""

  loop: Loop
  cache: Any  # model.Cache; None: nothing is kept
  done: t.IntR  # columns of each row whose keys and values are in the cache


def by_block(setting: Setting, loop: Loop) -> Loop:
  """Reveals block by block with the exact cache, until no mask is left."""
  more = lambda state: unmask.masks_remain(setting, state.loop)
  return jax.lax.while_loop(more, partial(step, setting), begin(setting, loop)).loop


def begin(setting: Setting, loop: Loop) -> State:
  """Computes the keys and values of the prompts."""
  tokens, valid = (x[:, : setting.prompt] for x in texts(setting, loop))
  mask = model.Packed(valid, 0, 0, setting.cfg.block_causal)
  inputs = model.Inputs(tokens, model.positions_of(valid), mask)
  _, kept = model.states(setting.cfg, setting.params, inputs, keep=True)
  cache, chosen = routes.split(kept)
  if loop.routes is not None:
    text = routes.put_text(loop.routes.text, chosen, jnp.zeros_like(loop.count))
    loop = loop._replace(routes=loop.routes._replace(text=text))
  pad = [(0, 0)] * 3 + [(0, setting.hp.length), (0, 0)]
  cache = model.Cache(*(jnp.pad(x, pad) for x in cache))
  # A family that shifts reads a block's first token off the block before it.
  done = setting.prompt - setting.cfg.block_causal * setting.cfg.shift
  return State(
    loop._replace(forwards=loop.forwards + 1),
    cache,
    jnp.full((len(loop.tokens),), done, jnp.int32),
  )


def step(setting: Setting, state: State) -> State:
  """Takes one step of every row; computes finished blocks that are not in the cache."""
  size = setting.cfg.block_causal
  at_R, live_R = unmask.own_blocks(setting, state.loop)
  start_R = setting.prompt + (at_R - setting.prompt) // size * size
  run = partial(window, setting, state, start_R)
  behind = jnp.any(live_R & (state.done < start_R))
  h, new, chosen = jax.lax.cond(behind, partial(run, 2 * size), partial(run, size))
  # XLA copies what a branch of a condition writes to, but not what a loop does.
  write = lambda _, cache: put(cache, new, each(setting, start_R - size))
  cache = jax.lax.fori_loop(0, jnp.int32(behind), write, state.cache)
  loop = noted(setting, state.loop, chosen, start_R, behind)
  h = model.windows(h, each(setting, at_R - start_R), setting.hp.block)
  if unmask.pieces(setting) == 1:
    h = model.logits_of(setting.cfg, setting.params, h, setting.hp.guidance)
  loop = unmask.reveal(setting, loop, h, at_R, live_R)
  return State(loop, cache, jnp.where(behind, start_R, state.done))


def noted(
  setting: Setting, loop: Loop, chosen_Rx2Wx: Any, start_R: t.IntR, behind: t.Array
) -> Loop:
  """Notes the experts of the blocks at `start`, and of those before if `behind`."""
  if loop.routes is None:
    return loop
  size = setting.cfg.block_causal
  write = lambda _, text: routes.put_text(text, chosen_Rx2Wx[:, :size], start_R - size)
  text = jax.lax.fori_loop(0, jnp.int32(behind), write, loop.routes.text)
  loop = loop._replace(routes=loop.routes._replace(text=text))
  record = routes.note_block(setting, loop, chosen_Rx2Wx[:, size:], start_R)
  return loop._replace(routes=record)


def texts(setting: Setting, loop: Loop) -> tuple[t.Array, t.Array]:
  """Returns tokens and valid; with guidance a blind copy stands behind each row."""
  both = loop.tokens, setting.valid
  if not setting.hp.guidance:
    return both
  return model.with_blind_rows(setting.cfg, *both, unmask.prompt_of(setting, loop))


def each(setting: Setting, x_R: t.IntR) -> t.Array:
  """Returns a number of every row of `texts`."""
  return jnp.repeat(x_R, 2) if setting.hp.guidance else x_R


def window(
  setting: Setting, state: State, start_R: t.IntR, width: int
) -> tuple[t.Array, model.Cache, Any]:
  """Computes the attention blocks at `start`, with width = 2 W also those before.

  Returns the states that predict the blocks' tokens, (R, W, D) or with guidance
  (2R, W, D), and keys and values of the blocks before; of width = W zeros. Where routes
  are recorded, also the experts of both blocks, (R, 2W, N, X).
  """
  cfg, size = setting.cfg, setting.cfg.block_causal
  first_R = each(setting, start_R + size - width)
  args = *texts(setting, state.loop), first_R, width, state.cache
  h, kept = model.beside_cache(cfg, setting.params, *args)
  new, chosen = routes.split(kept)
  if cfg.shift:
    h = model.unshift(h, jnp.ones(h.shape[:2], bool))
  if chosen is not None:
    chosen = jnp.pad(chosen, ((0, 0), (2 * size - width, 0), (0, 0), (0, 0)))
  if width == size:
    return h, jax.tree.map(jnp.zeros_like, new), chosen
  return h[:, size:], jax.tree.map(lambda x: x[..., :size, :], new), chosen


def put(cache: model.Cache, new: model.Cache, at_R: t.Array) -> model.Cache:
  """Writes keys and values of some columns, at a place of each row's own."""

  def of_row(x: t.Array, part: t.Array, at: t.Array) -> t.Array:
    return jax.lax.dynamic_update_slice(x, part, (0, 0, at, 0))

  rows = partial(model.on_own_rows, jax.vmap(of_row, (1, 1, 0), 1), (1, 1, 0))
  return jax.tree.map(lambda x, part: rows(x, part, at_R), cache, new)
