"""Drafts: somebody else proposes a block, a gate decides, the model does the rest.

All rows work on the same block. The gates confidence and reward judge a block as a
whole (RSD, arXiv 2501.19324; github.com/BaohaoLiao/RSD main_online.py). A refused block
is masked again, and the model writes it once, whatever comes out. With the draft's law
P_d, the model's P_t and the gate's verdict w(y), 0 or 1, the law of a block is

  w(y) P_d(y) + (1 - E_d w) P_t(y)

The gate exact is that of speculative decoding. A token y of the draft's step is kept
with chance min(1, q_t(y) / q_d(y)), else drawn from (q_t - q_d)_+. The steps after the
first one with a refusal are dropped. So each step has the model's law, in the order of
the draft, whatever the draft is.

The draft, the model and the verdicts have random numbers of their own. With common
ones the model's block would not be independent of the draft that it replaces.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmpo_jax import mesh, model, rng
from dmpo_jax import types as t
from dmpo_jax.sampler import unmask
from dmpo_jax.sampler.draft import Draft
from dmpo_jax.sampler.picks import Look
from dmpo_jax.sampler.unmask import Loop, Setting, Start

RECORDED = ('entropy',)  # what a draft's tokens have of Setting.records


@dataclasses.dataclass(frozen=True)
class Drafter:
  """Who drafts, and how."""

  cfg: model.ModelConfig
  how: Draft

  def setting(self, own: Setting, params: t.Params) -> Setting:
    """Returns the draft's setting beside the model's."""
    return dataclasses.replace(
      own,
      cfg=self.cfg,
      params=params,
      hp=self.how.law(own.hp),
      keys=keys_of(own.keys, 'draft'),
      records={name: x for name, x in own.records.items() if name in RECORDED},
    )


class State(NamedTuple):
  """A rollout with drafts."""

  loop: Loop  # what stays
  mine: Loop  # the draft's
  drafted: t.BoolRL  # tokens that the draft wrote
  drafts: t.Drafts


def keys_of(keys_R: t.KeyR, name: str) -> t.KeyR:
  """Returns the rows' keys of a use, which no step of the model has."""
  return jax.vmap(lambda key: rng.substream(key, name))(keys_R)


def begin(theirs: Setting, loop: Loop) -> State:
  """Returns the state before the first block."""
  zeros, drafted = jnp.zeros_like(loop.count), jnp.zeros(loop.order.shape, bool)
  mine = loop._replace(more={name: loop.more[name] for name in theirs.records})
  return State(loop, mine, drafted, t.Drafts(*[zeros] * len(t.Drafts._fields)))


def end(state: State) -> Loop:
  """Returns the loop with the record of what the draft wrote."""
  return state.loop._replace(more={**state.loop.more, 'drafted': state.drafted})


def by_draft(own: Setting, theirs: Setting, how: Draft, loop: Loop) -> State:
  """Reveals block by block with a gate that is a function of arrays."""

  def block(start: Start, span: int, state: State) -> State:
    if how.gate == 'exact':
      return exact_block(own, theirs, how.ahead, start, state)
    state, before_R = propose(theirs, start, span, state)
    state, keep_R = GATES[how.gate](own, how, start, state)
    return settle(own, (start, span), before_R, keep_R, state)

  return unmask.over_blocks(own.hp, own.prompt, block, begin(theirs, loop))


def inside(own: Setting, start: Start) -> t.Array:
  """Returns which positions of a completion are in the block, (1, L) bool."""
  at = jnp.arange(own.hp.length)[None] - (start - own.prompt)
  return (at >= 0) & (at < own.hp.block)


def written(own: Setting, start: Start, state: State) -> t.BoolRL:
  """Returns the tokens of the block that are a draft and not settled."""
  left = unmask.hidden(own, state.mine)
  return inside(own, start) & unmask.hidden(own, state.loop) & ~left


# --- gates that judge a block


def propose(
  theirs: Setting, start: Start, span: int, state: State
) -> tuple[State, t.IntR]:
  """Drafts the block; returns also the draft's steps before it."""
  before = state.mine._replace(tokens=state.loop.tokens)
  mine = unmask.unmask_block(theirs, start, span, before)
  live_R = mine.count > before.count
  drafts = state.drafts._replace(
    offered=state.drafts.offered + live_R,
    draft=state.drafts.draft + mine.count - before.count,
    batch=jnp.broadcast_to(mine.forwards, mine.count.shape),
  )
  return state._replace(mine=mine, drafts=drafts), before.count


def by_confidence(
  own: Setting, how: Draft, start: Start, state: State
) -> tuple[State, t.BoolR]:
  """Keeps blocks to whose tokens the model, given all others, gives enough chance.

  One forward with a shadow of the block (model.shadow_logits) reads all of them, as
  WINO does: a token's shadow does not see it, but sees others that do.
  """
  tokens = state.mine.tokens
  start_R = jnp.full((len(tokens),), start, jnp.int32)
  args = own.cfg, own.params, tokens, own.valid, start_R, own.hp.block
  _, shadow = model.shadow_logits(*args)
  cut = partial(model.windows, start_R=start_R, width=own.hp.block)
  new = model.windows(written(own, start, state), start_R - own.prompt, own.hp.block)
  logp = jnp.where(new, model.logp_of(shadow, cut(tokens)), 0.0)
  count_R = jnp.sum(new, axis=1)
  mean_R = jnp.sum(logp, axis=1) / jnp.maximum(count_R, 1)
  least = math.log(how.bound) if how.bound else -math.inf
  loop = state.loop._replace(forwards=state.loop.forwards + 1)
  drafts = state.drafts._replace(target=state.drafts.target + (count_R > 0))
  return state._replace(loop=loop, drafts=drafts), mean_R >= least


def by_reward(
  own: Setting, how: Draft, start: Start, state: State
) -> tuple[State, t.BoolR]:
  """Stands for the host's verdict where only shapes and memory count (plan)."""
  return state, jnp.sum(state.mine.tokens, axis=1) % 2 == 0


GATES: dict[str, Callable] = {'confidence': by_confidence, 'reward': by_reward}


def settle(
  own: Setting,
  block: tuple[Start, int],
  before_R: t.IntR,
  keep_R: t.BoolR,
  state: State,
) -> State:
  """Keeps the drafts of some rows; the model writes the block of the others."""
  loop, mine, (start, span) = state.loop, state.mine, block
  new = written(own, start, state) & keep_R[:, None]
  put = lambda old, x: jnp.where(new, x, old)
  cut = own.prompt
  completion = put(loop.tokens[:, cut:], mine.tokens[:, cut:])
  taken_R = jnp.where(jnp.any(new, axis=1), mine.count - before_R, 0)
  kept = loop._replace(
    tokens=jnp.concatenate([loop.tokens[:, :cut], completion], axis=1),
    order=put(loop.order, mine.order + (loop.count - before_R)[:, None]),
    confidence=put(loop.confidence, mine.confidence),
    count=loop.count + taken_R,
    more={x: put(old, mine.more[x]) if x in mine.more else old
          for x, old in loop.more.items()},
  )  # fmt: skip
  # A gate's forwards do not count against the bound of the block's steps.
  done = unmask.unmask_block(own, start, span, kept._replace(forwards=jnp.int32(0)))
  drafts = state.drafts._replace(
    kept=state.drafts.kept + jnp.any(new, axis=1),
    target=state.drafts.target + done.count - kept.count,
  )
  done = done._replace(forwards=loop.forwards + done.forwards)
  return State(done, mine, state.drafted | new, drafts)


# --- the exact gate


class Steps(NamedTuple):
  """Steps of the draft that nobody has judged; K of them on axis 1 of each array."""

  tokens: t.Array  # (R, K, S) the states before them
  hidden: t.Array  # (R, K, W, D) what the draft's logits come from
  new: t.Array  # (R, K, W) the window's tokens after them
  take: t.Array  # (R, K, W) bool, what they reveal


class Verdict(NamedTuple):
  """What the model says of a step of the draft."""

  token: t.IntRW  # the draft's, or another where it is refused
  refused: t.BoolRW
  logp: t.FloatRW  # under the model's sampling law
  confidence: t.FloatRW  # the token's probability at temperature 1
  more: dict[str, t.Array]


def exact_block(
  own: Setting, theirs: Setting, ahead: int, start: Start, state: State
) -> State:
  """Repeats rounds of `ahead` drafted steps and their check until the block is full."""
  more = lambda state: unmask.block_remains(own, start, state.loop)
  lap = partial(exact_round, own, theirs, min(ahead, own.hp.block), start)
  return jax.lax.while_loop(more, lap, state)


def exact_round(
  own: Setting, theirs: Setting, ahead: int, start: Start, state: State
) -> State:
  """Drafts steps, checks them in one batch of states, and keeps what the law allows.

  Of each row the first step with a refusal is the last one that stays. mine.since holds
  the steps of the block that stay.
  """
  loop, first = state.loop, state.mine
  mine, steps = draft_steps(theirs, ahead, start, first._replace(tokens=loop.tokens))
  steps = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), steps)
  seen = states_of(own, start, loop, steps.tokens)
  busy_RxK = jnp.any(steps.take, axis=2)
  step_RxK = first.count[:, None] + jnp.cumsum(busy_RxK, axis=1)

  def check(carry: tuple, k: Any) -> tuple:
    loop, alive_R = carry
    at = jax.tree.map(lambda x: x[:, k], steps)
    verdict = judged(own, theirs, step_RxK[:, k], at, seen[:, k])
    take = at.take & alive_R[:, None]
    refused = verdict.refused & take
    counts = jnp.sum(take & ~refused, axis=1), jnp.any(take, axis=1)
    alive_R &= ~jnp.any(refused, axis=1)
    return (keep(own, start, loop, verdict, take), alive_R), counts

  carry = loop, jnp.ones_like(busy_RxK[:, 0])
  (loop, _), (kept, stays) = jax.lax.scan(check, carry, jnp.arange(ahead))
  spent_R, old = jnp.sum(busy_RxK, axis=1), state.drafts
  drafts = t.Drafts(
    offered=old.offered + jnp.sum(steps.take, axis=(1, 2)),
    kept=old.kept + jnp.sum(kept, axis=0),
    draft=old.draft + spent_R,
    target=old.target + spent_R,
    batch=jnp.broadcast_to(mine.forwards, spent_R.shape),
  )
  full_R = ~jnp.any(inside(own, start) & unmask.hidden(own, loop), axis=1)
  since_R = jnp.where(full_R, 0, first.since + jnp.sum(stays, axis=0))
  loop = loop._replace(forwards=loop.forwards + 1)
  return State(loop, mine._replace(since=since_R), state.drafted, drafts)


def draft_steps(
  theirs: Setting, ahead: int, start: Start, mine: Loop
) -> tuple[Loop, Steps]:
  """Takes up to so many steps of the draft; K is the first axis of what it returns."""
  step = partial(draft_step, theirs, start)
  empty = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, mine)[1]
  )

  def one(mine: Loop, _: None) -> tuple[Loop, Steps]:
    left = jnp.any(inside(theirs, start) & unmask.remaining(theirs, mine))
    return jax.lax.cond(left, step, lambda mine: (mine, empty), mine)

  return jax.lax.scan(one, mine, length=ahead)


def draft_step(theirs: Setting, start: Start, mine: Loop) -> tuple[Loop, Steps]:
  """Takes a step of the draft, and keeps what its law is computed from."""
  s, rows, size = theirs, len(mine.tokens), theirs.hp.block
  start_R = jnp.full((rows,), start, jnp.int32)
  live_R = jnp.any(unmask.remaining(s, mine), axis=1)
  where = s.valid, start, size
  h, _ = model.window_logits(s.cfg, s.params, mine.tokens, *where, as_states=True)
  seen = h if unmask.pieces(s) > 1 else model.logits_of(s.cfg, s.params, h)
  new = unmask.reveal(s, mine, seen, start_R, live_R)
  shown = unmask.hidden(s, mine) & ~unmask.hidden(s, new)
  take = model.windows(shown, start_R - s.prompt, size)
  return new, Steps(mine.tokens, h, model.windows(new.tokens, start_R, size), take)


def states_of(own: Setting, start: Start, loop: Loop, tokens: t.Array) -> t.Array:
  """Returns what the model's logits of K states come from, (R, K, 1 or 2, W, D).

  tokens: (R, K, S). With guidance there are two.
  """
  rows, count, size = tokens.shape
  each = lambda x: jnp.repeat(x, count, axis=0)
  prompt = unmask.prompt_of(own, loop)
  where = each(own.valid), start, own.hp.block
  prompt = prompt if isinstance(prompt, int) else each(prompt)
  flat = tokens.reshape(-1, size)
  where = *where, prompt, own.hp.guidance
  h, _ = model.window_logits(own.cfg, own.params, flat, *where, as_states=True)
  return h.reshape(rows, count, -1, *h.shape[1:])


def chances(logits: t.FloatRWV, temperature: float) -> t.FloatRWV:
  """Returns the probabilities that tokens are drawn with, of the law's logits."""
  if temperature:
    return jax.nn.softmax(logits, axis=-1)
  return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])


def judged(
  own: Setting, theirs: Setting, step_R: t.IntR, at: Steps, seen: t.Array
) -> Verdict:
  """Keeps or replaces the tokens of a step; at, seen: of that step alone.

  step_R: the rows' numbers of the draft's steps, which address the random numbers.
  """
  keys = jax.vmap(jax.random.fold_in)(keys_of(own.keys, 'verdict'), step_R)

  def of_rows(part: tuple) -> Verdict:
    key, token, hidden, seen = part
    seen = seen.reshape(-1, *seen.shape[2:])
    logits = model.logits_of(own.cfg, own.params, seen, own.hp.guidance)
    hp, draft = own.hp, theirs.hp
    law = model.sampling_logits(logits, hp.temperature, hp.top_p, hp.top_k)
    other = model.logits_of(theirs.cfg, theirs.params, hidden)
    other = model.sampling_logits(other, draft.temperature, draft.top_p, draft.top_k)
    p, q = chances(law, hp.temperature), chances(other, draft.temperature)
    key_u, key_redraw = jax.vmap(lambda key: tuple(jax.random.split(key)))(key)
    u = jax.vmap(lambda key: jax.random.uniform(key, token.shape[1:]))(key_u)
    chance = lambda x: jnp.take_along_axis(x, token[..., None], -1)[..., 0]
    refused = u * chance(q) >= chance(p)
    rest = jnp.maximum(p - q, 0)
    # Laws that are equal up to rounding leave nothing.
    some = jnp.sum(rest, axis=-1, keepdims=True) > 0
    score = jnp.log(jnp.where(some, rest, p))
    drawn = jnp.argmax(score + unmask.gumbel(key_redraw, score.shape[1:]), axis=-1)
    token = jnp.where(refused, drawn.astype(jnp.int32), token)
    by = law if hp.rank_law == 'sampling' else logits
    sure = jnp.exp(model.logp_of(by, token))
    none = jnp.zeros_like(token[:, 0])
    look = Look(jax.nn.softmax(by, axis=-1), sure, refused, none, none * 1.0, sure)
    more = {name: x.fn(look, refused, hp) for name, x in own.records.items()}
    return Verdict(token, refused, model.logp_of(law, token), sure, more)

  parts = keys, at.new, at.hidden, seen
  return mesh.in_microbatches(of_rows, parts, unmask.pieces(own))


def keep(
  own: Setting, start: Start, loop: Loop, verdict: Verdict, take: t.BoolRW
) -> Loop:
  """Writes the tokens of `take`, as one step of each row that has some."""
  start_R = jnp.full((len(take),), start, jnp.int32)
  put = lambda old, x: unmask.write(old, start_R - own.prompt, take, x)
  step = jnp.broadcast_to(loop.count[:, None], take.shape)
  return loop._replace(
    tokens=unmask.write(loop.tokens, start_R, take, verdict.token),
    order=put(loop.order, step),
    logp=put(loop.logp, verdict.logp),
    confidence=put(loop.confidence, verdict.confidence),
    count=loop.count + jnp.any(take, axis=1),
    more={name: put(x, verdict.more[name]) for name, x in loop.more.items()},
  )
