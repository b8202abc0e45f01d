"""The unmasking loops: all rows step together until no mask is left.

Without a cache each row works on its own first block that has a mask, so no row
waits for another. With a cache all rows work on the same block, from left to
right. Every random number is a function of (row key, the row's own step). So a
row's tokens depend neither on its neighbours nor on the devices. A step reveals at
least one token of each row, so the forwards are bounded; the loops hold the bound
themselves, whatever a rule does.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmpo_jax import mesh, model
from dmpo_jax import types as t
from dmpo_jax.sampler import orders, picks, routes
from dmpo_jax.sampler.config import SAMPLERS, SampleConfig
from dmpo_jax.sampler.records import Recorder
from dmpo_jax.types import Array

SPANS = 4  # programs of the cache prefix, each for some of the blocks
Start = int | t.IntScalar  # index of a block's first token, the same in all rows


@dataclasses.dataclass(frozen=True)
class Setting:
  """What stays the same during a rollout."""

  cfg: model.ModelConfig
  params: t.Params
  hp: SampleConfig
  valid: t.BoolRS  # False on the prompts' padding
  prompt: int  # P
  keys: t.KeyR
  records: dict[str, Recorder]  # what Loop.more records
  forced: t.IntRS | None = None  # tokens to reveal instead of the proposals
  bound: t.FloatR | None = None  # each row's own number of the rule, see picks.Look


class Loop(NamedTuple):
  """The state of all rows; logp and confidence are 0 where nothing is revealed."""

  tokens: t.IntRS
  order: t.IntRL  # the row's own step that revealed each token
  logp: t.FloatRL
  confidence: t.FloatRL
  count: t.IntR  # the row's own steps so far
  since: t.IntR  # those of them in its present block
  forwards: t.IntScalar
  more: dict[str, Array]  # (R, L) of each of Setting.records
  routes: t.Routes | None = None  # its `order` is filled in at the end


class Proposal(NamedTuple):
  """A token for every position of each row's block, its window."""

  token: t.IntRW
  logp: t.FloatRW  # under the sampling law
  confidence: t.FloatRW  # the token's probability at temperature 1
  look: picks.Look
  start: t.IntR  # index of the window's first token in the row
  live: t.BoolR  # rows that have a mask that must go


def by_rule(setting: Setting, loop: Loop) -> Loop:
  """Reveals by the pick rule until no mask is left."""
  hp, prompt = setting.hp, setting.prompt
  if hp.cache == 'none':
    more = partial(masks_remain, setting)
    return jax.lax.while_loop(more, partial(step_each_row, setting), loop)
  return over_blocks(hp, prompt, partial(unmask_block, setting), loop)


def over_blocks(
  hp: SampleConfig, prompt: int, block: Callable[..., Any], state: Any
) -> Any:
  """Applies block(start, span, state) -> state to the blocks from left to right."""
  for starts, span in groups_of(hp, prompt):

    def body(state, start, span=span):
      return block(start, span, state), None

    state, _ = jax.lax.scan(body, state, jnp.asarray(starts))
  return state


def groups_of(hp: SampleConfig, prompt: int) -> list[tuple[np.ndarray, int]]:
  """Returns (starts, span) of the blocks whose steps have the same shapes.

  With the cache prefix a step computes all up to the end: as many positions as for its
  group's first.
  """
  end, prefix = prompt + hp.length, hp.cache == 'prefix'
  starts = np.arange(prompt, end, hp.block)
  groups = np.array_split(starts, min(SPANS, len(starts)) if prefix else 1)
  return [(group, int(end - group[0]) if prefix else 0) for group in groups]


def hidden(setting: Setting, loop: Loop) -> t.BoolRL:
  """Returns where a mask stands that is no token of the prompt."""
  masked = loop.tokens[:, setting.prompt :] == setting.cfg.mask_id
  return masked & (loop.order != t.GIVEN)


def remaining(setting: Setting, loop: Loop) -> t.BoolRL:
  """Returns the masks that must go.

  With eos_stop those after a stop may stay; in a block-causal model those of later
  attention blocks, because the block of a stop is sampled to its end.
  """
  cfg, masked = setting.cfg, hidden(setting, loop)
  if setting.hp.eos_stop:
    stop = model.is_stop(cfg, loop.tokens[:, setting.prompt :])
    stop &= loop.order != t.GIVEN
    ended = jnp.cumsum(stop, axis=1)
    if cfg.block_causal:
      ended = jnp.repeat(
        ended[:, cfg.block_causal - 1 :: cfg.block_causal], cfg.block_causal, axis=1
      )  # up to a block's end
      ended = jnp.pad(ended, ((0, 0), (cfg.block_causal, 0)))[:, : masked.shape[1]]
    masked &= ended == 0
  return masked


def masks_remain(setting: Setting, loop: Loop) -> Array:
  """Returns whether any row has a mask that must go; () bool.

  False after 2 L forwards, which is what WINO may need; the rules need at most L.
  """
  bounded = loop.forwards < 2 * setting.hp.length
  return jnp.any(remaining(setting, loop)) & bounded


def own_blocks(setting: Setting, loop: Loop) -> tuple[t.IntR, t.BoolR]:
  """Returns (start, live) of each row's first block that has a mask."""
  hp, prompt = setting.hp, setting.prompt
  live_R = jnp.any(remaining(setting, loop), axis=1)
  first_R = jnp.argmax(hidden(setting, loop), axis=1)
  return prompt + first_R.astype(jnp.int32) // hp.block * hp.block, live_R


def step_each_row(setting: Setting, loop: Loop) -> Loop:
  """Takes one step of every row in its own block."""
  start_R, live_R = own_blocks(setting, loop)
  seen, _, loop = forward(setting, loop, start_R)
  return reveal(setting, loop, seen, start_R, live_R)


# ---- all rows in the same block


def unmask_block(setting: Setting, start: Start, span: int, loop: Loop) -> Loop:
  """Repeats steps until no row has a mask in the block that must go.

  With a cache they are laps; for `span` see `lap`.
  """
  more = partial(block_remains, setting, start)
  if setting.hp.cache == 'none':
    step = lambda loop: step_block(setting, start, loop)[0]
  else:
    step = partial(lap, setting, start, span)
  return jax.lax.while_loop(more, step, loop)


def block_remains(setting: Setting, start: Start, loop: Loop) -> Array:
  """Returns whether a row has a mask in the block that must go; () bool.

  False after W forwards for this block and each before it.
  """
  masked, at = remaining(setting, loop), start - setting.prompt
  block = jax.lax.dynamic_slice_in_dim(masked, at, setting.hp.block, 1)
  return jnp.any(block) & (loop.forwards < at + setting.hp.block)


def lap(setting: Setting, start: Start, span: int, loop: Loop) -> Loop:
  """Takes a step that fills the cache, and cached ones until the next such step.

  A cached step computes the `span` positions from `start` on; see model.window_logits.
  """
  loop, cache = step_block(setting, start, loop, keep=True)
  until = loop.forwards + setting.hp.refresh - 1
  cached_step = lambda loop: step_block(setting, start, loop, cache=cache, span=span)[0]
  return jax.lax.while_loop(
    partial(lap_goes_on, setting, start, until), cached_step, loop
  )


def lap_goes_on(
  setting: Setting, start: Start, until: t.IntScalar, loop: Loop
) -> Array:
  """Returns whether the next step of the block is a cached one; () bool."""
  fresh = (loop.forwards < until) | (setting.hp.refresh == 0)
  return block_remains(setting, start, loop) & fresh


def step_block(
  setting: Setting, start: Start, loop: Loop, **cache
) -> tuple[Loop, model.Cache | None]:
  """Takes one step in the block that all rows share; returns `forward`'s cache, too."""
  seen, kept, loop = forward(setting, loop, start, **cache)
  start_R = jnp.full((len(loop.tokens),), start, jnp.int32)
  live_R = jnp.any(remaining(setting, loop), axis=1)
  return reveal(setting, loop, seen, start_R, live_R), kept


# ---- one step


def pieces(setting: Setting) -> int:
  """Returns in how many pieces the rows go through the output head, one after another.

  So many that the logits of a piece are not more than those of all rows and of
  cfg.head_chunk positions. Each device keeps its rows.
  """
  chunk, block = setting.cfg.head_chunk, setting.hp.block
  if not chunk or chunk >= block:
    return 1
  rows = len(setting.valid)
  own = rows // shards if rows % (shards := mesh.row_shards()) == 0 else rows
  fit = (n for n in range(-(-block // chunk), own) if own % n == 0)
  return next(fit, own)


def forward(
  setting: Setting, loop: Loop, start: Start | t.IntR, **cache
) -> tuple[Array, model.Cache | None, Loop]:
  """Returns what `reveal` takes of the windows from `start` on, and the cache.

  Notes the experts of the pass in the loop that it returns.
  """
  cache['as_states'] = pieces(setting) > 1
  s, hp = setting, setting.hp
  where = s.valid, start, hp.block, prompt_of(s, loop), hp.guidance
  seen, kept = model.window_logits(s.cfg, s.params, loop.tokens, *where, **cache)
  kept, chosen = routes.split(kept)
  if loop.routes is not None:
    loop = loop._replace(routes=routes.note(s, loop, chosen, start))
  return seen, kept, loop


def prompt_of(setting: Setting, loop: Loop) -> int | t.IntR:
  """Returns how many columns the prompt has, with those that stand on the canvas."""
  if not setting.cfg.block_causal:
    return setting.prompt
  return setting.prompt + jnp.sum(loop.order == t.GIVEN, axis=1)


def write(x_RxT: Array, start_R: t.IntR, where: t.BoolRW, new_RxW: Array) -> Array:
  """Returns x with `new` at the positions of the rows' windows in `where`."""
  new = jnp.where(where, new_RxW, model.windows(x_RxT, start_R, where.shape[1]))
  put = lambda x, new, at: jax.lax.dynamic_update_slice_in_dim(x, new, at, 0)
  return jax.vmap(put)(x_RxT, new, start_R)


def reveal(
  setting: Setting, loop: Loop, seen: Array, start_R: t.IntR, live_R: t.BoolR
) -> Loop:
  """Proposes a token at every mask of the windows, and keeps what the rule picks.

  seen: the windows' logits, or where `pieces` > 1 their states.
  """
  count, rows = pieces(setting), len(start_R)
  if count == 1:
    return reveal_by(setting, loop, seen, start_R, live_R)

  def of_piece(part: tuple) -> Loop:
    h, valid, keys, forced, bound, own, start_R, live_R = part
    h = h.reshape(-1, *h.shape[2:])
    logits = model.logits_of(setting.cfg, setting.params, h, setting.hp.guidance)
    few = dataclasses.replace(
      setting, valid=valid, keys=keys, forced=forced, bound=bound
    )
    own = own._replace(forwards=loop.forwards)
    done = reveal_by(few, own, logits, start_R, live_R)
    return done._replace(forwards=jnp.zeros_like(start_R))

  h = seen.reshape(rows, -1, *seen.shape[1:])  # with guidance two for each row
  own = loop._replace(forwards=jnp.zeros_like(start_R), routes=None)  # rows first
  keys = jax.random.clone(setting.keys)  # each step cuts them in pieces again
  rows_ = setting.valid, keys, setting.forced, setting.bound
  parts = h, *rows_, own, start_R, live_R
  done = mesh.in_microbatches(of_piece, parts, count)
  return done._replace(forwards=loop.forwards + 1, routes=loop.routes)


def reveal_by(
  setting: Setting, loop: Loop, logits: t.FloatRWV, start_R: t.IntR, live_R: t.BoolR
) -> Loop:
  """Does what `reveal` says by the logits of some rows, which it takes for all."""
  proposal = propose(setting, loop, logits, start_R, live_R)
  look = proposal.look
  take = picks.PICKS[setting.hp.pick].rule(look, setting.hp)
  if look.alone is not None:
    first = jnp.arange(take.shape[1])[None] == 0
    take = jnp.where(look.alone[:, None], first, take)
  take &= live_R[:, None]
  return record(setting, loop, proposal, take, jnp.zeros_like(take))


def first_alone(
  setting: Setting, start_R: t.IntR, masked_RxW: t.BoolRW
) -> t.BoolR | None:
  """Returns the rows whose next token begins an attention block; None: it may not.

  A block-causal family that shifts predicts that token from the block before, so it
  is taken alone, as the next token of the text (Fast-dLLM v2).
  """
  cfg = setting.cfg
  if not (cfg.block_causal and cfg.shift):
    return None
  return masked_RxW[:, 0] & ((start_R - setting.prompt) % cfg.block_causal == 0)


def gumbel(key_R: t.KeyR, shape: tuple[int, ...]) -> Array:
  """Draws Gumbel noise of `shape` for each row.

  JAX's default mode draws from 2^23 values, the largest 15.9. Tokens of p < 1e-7
  would hardly ever be drawn, though a vocabulary's tail may hold a percent of them.
  """
  return jax.vmap(lambda key: jax.random.gumbel(key, shape, mode='high'))(key_R)


def propose(
  setting: Setting, loop: Loop, logits: t.FloatRWV, start_R: t.IntR, live_R: t.BoolR
) -> Proposal:
  """Draws a token for every position of the windows, by Gumbel-max in float32."""
  hp = setting.hp
  masked = model.windows(hidden(setting, loop), start_R - setting.prompt, hp.block)
  keys = jax.vmap(jax.random.fold_in)(setting.keys, loop.count)
  gumbel_key, noise_key = jax.vmap(lambda key: tuple(jax.random.split(key)))(keys)
  law = model.sampling_logits(logits, hp.temperature, hp.top_p, hp.top_k)
  score = law
  if hp.temperature:
    score = score + gumbel(gumbel_key, score.shape[1:])
  token = jnp.argmax(score, axis=-1).astype(jnp.int32)
  if setting.forced is not None:
    token = model.windows(setting.forced, start_R, hp.block)
  # Confidence is at temperature 1 whatever the sampling law, except for Dream's.
  judged = law if hp.rank_law == 'sampling' else logits
  own = confidence = jnp.exp(model.logp_of(judged, token))
  if hp.rank == 'max':
    best = jnp.max(judged, axis=-1)
    confidence = jnp.exp(best - jax.nn.logsumexp(judged, axis=-1))
  if hp.order_logp and 'order_logp' in SAMPLERS[hp.pick].reads:
    confidence = jnp.minimum(confidence, orders.SURE)
  noise = jax.vmap(lambda k: jax.random.uniform(k, (hp.block,)))(noise_key)
  quota, share = picks.schedule(hp, masked, loop.since)
  prob = jax.nn.softmax(judged, axis=-1)
  alone = first_alone(setting, start_R, masked)
  look = picks.Look(prob, confidence, masked, quota, share, noise, alone, setting.bound)
  return Proposal(token, model.logp_of(law, token), own, look, start_R, live_R)


def record(
  setting: Setting, loop: Loop, proposal: Proposal, take: t.BoolRW, again: t.BoolRW
) -> Loop:
  """Writes the tokens of `take` and their records; masks those of `again`."""
  at_R, look = proposal.start - setting.prompt, proposal.look
  step = jnp.broadcast_to(loop.count[:, None], take.shape)
  token = jnp.where(again, setting.cfg.mask_id, proposal.token)
  leaves_R = ~jnp.any(look.masked & ~take | again, axis=1)  # its block is complete
  busy_R = proposal.live & jnp.any(look.masked, axis=1)
  more = {
    name: write(loop.more[name], at_R, take, record.fn(look, take, setting.hp))
    for name, record in setting.records.items()
  }
  return Loop(
    tokens=write(loop.tokens, proposal.start, take | again, token),
    order=write(loop.order, at_R, take, step),
    logp=write(loop.logp, at_R, take, proposal.logp),
    confidence=write(loop.confidence, at_R, take, proposal.confidence),
    count=loop.count + busy_R,
    since=jnp.where(leaves_R, 0, loop.since + busy_R),
    forwards=loop.forwards + 1,
    more=more,
    routes=loop.routes,
  )
