"""WINO: bold drafts, verified in hindsight (WINO-DLLM decoding.py:113-198).

A step takes all tokens over hp.threshold, at most 5 to 20 depending on how many
are masked. It masks those again that a shadow of the block finds less probable
than hp.verify; the shadow sees everything but the token itself. It masks fewer
than the step before has taken, so that rows advance. Ours serves batches, and
is bounded: a row's block takes at most 2 W steps, the last W without verifying.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmpo_jax import model
from dmpo_jax.sampler import picks
from dmpo_jax.sampler.config import SampleConfig
from dmpo_jax.sampler.unmask import (
  Loop,
  Proposal,
  Setting,
  masks_remain,
  own_blocks,
  propose,
  record,
)
from dmpo_jax.types import BoolRW, FloatRWV, IntR

FIRST_DRAFT = 30  # stands for what the step before a block's first has taken


class Drafts(NamedTuple):
  """The loop's state, and how many tokens each row's last step has taken."""

  loop: Loop
  taken: IntR


def draft_and_verify(setting: Setting, loop: Loop) -> Loop:
  """Reveals and takes back until no mask is left."""
  first = Drafts(loop, jnp.full_like(loop.count, FIRST_DRAFT))
  more = lambda drafts: masks_remain(setting, drafts.loop)
  return jax.lax.while_loop(more, partial(step, setting), first).loop


def step(setting: Setting, drafts: Drafts) -> Drafts:
  """Takes one step of every row in its own block."""
  hp, loop = setting.hp, drafts.loop
  start_R, live_R = own_blocks(setting, loop)
  logits, shadow = model.shadow_logits(
    setting.cfg, setting.params, loop.tokens, setting.valid, start_R, hp.block
  )
  proposal = propose(setting, loop, logits, start_R, live_R)
  take = draft(proposal.look, hp) & live_R[:, None]
  again = doubtful(setting, drafts, proposal, shadow, take) & live_R[:, None]
  loop = record(setting, loop, proposal, take, again)
  return Drafts(loop, jnp.where(loop.since > 0, jnp.sum(take, axis=1), FIRST_DRAFT))


def draft(look: picks.Look, hp: SampleConfig) -> BoolRW:
  """Takes the tokens over the threshold, up to a limit, or the very best."""
  over = look.masked & (look.confidence > hp.threshold)
  most_R = jnp.clip(jnp.sum(look.masked, axis=1) * 7 // 10, 5, 20)
  count_R = jnp.clip(jnp.sum(over, axis=1), 1, most_R)
  rank = picks.rank_of(look.confidence, look.masked)
  return look.masked & (rank < count_R[:, None])


def doubtful(
  setting: Setting, drafts: Drafts, proposal: Proposal, shadow: FloatRWV, take: BoolRW
) -> BoolRW:
  """Returns tokens revealed before that the shadow would not have revealed."""
  hp, loop = setting.hp, drafts.loop
  token = model.windows(loop.tokens, proposal.start, hp.block)
  hindsight = jnp.exp(model.logp_of(shadow, token))
  doubt = (token != setting.cfg.mask_id) & (hindsight < hp.verify)
  rank = picks.rank_of(-hindsight, doubt)
  may_R = (jnp.sum(take, axis=1) > 1) & (loop.since < hp.block)
  return doubt & (rank < drafts.taken[:, None] - 1) & may_R[:, None]
