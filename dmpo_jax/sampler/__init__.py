"""The unmasking loop: steps of all rows together until no mask is left.

`sample` is one function. Without a cache each row is in its own block: none
waits for another. With a cache all rows are in the same block: a scan over
blocks, a while loop over steps inside. `wino` drafts and verifies. A pick rule
(picks.py) decides which proposals of a step are kept. Every random number is a
function of (row key, the row's own step), so a row's tokens depend neither on
its neighbours nor on how rows are spread over devices.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmpo_jax import model, rng
from dmpo_jax.sampler import picks
from dmpo_jax.sampler.picks import PICKS
from dmpo_jax.types import Array, Rollouts

CACHES = ('none', 'prefix', 'dual')
NAMES = (*PICKS, 'wino')  # what sampler.pick may be


class Law(NamedTuple):
  """What log-probs must know of the sampling law."""

  block: int
  temperature: float
  guidance: float = 0.0
  rank_temperature: float = 0.0


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """How completions are sampled."""

  length: int  # L, tokens of a completion
  block: int  # W, unmasked left to right in blocks of this many
  steps: int  # unmasking steps of a completion, for the scheduled picks
  temperature: float = 0.0  # 0 = greedy
  pick: str = 'confidence'  # a name in PICKS, or wino
  rank: str = 'token'  # confidence of: token (sampled; LLaDA) | max
  threshold: float = 0.9  # picks 'threshold' and 'wino'
  factor: float = 1.0  # pick 'factor'
  entropy_bound: float = 0.1  # pick 'entropy', nats
  guidance: float = 0.0  # classifier-free guidance scale; 0 = off
  # What is not recomputed in a block's steps: none | prefix (what is before
  # the block) | dual (all but the block).
  cache: str = 'none'
  refresh: int = 0  # steps between full forwards; 0 = once a block
  eos_stop: bool = False  # leave a row where all before its first EOS is there
  fallback: str = 'best'  # threshold reached by none: best | leftmost
  schedule: str = 'even'  # of the scheduled picks: even | dream
  rank_law: str = 'model'  # picks judge by: model (T = 1) | sampling (Dream)
  rank_temperature: float = 0.0  # > 0: positions drawn (Dream's alg_temp)
  top_p: float = 1.0  # nucleus of tokens; 1 = all
  top_k: int = 0  # most probable tokens; 0 = all
  verify: float = 0.9  # pick 'wino': less probable in hindsight is masked again

  def problems(self) -> list[str]:
    """Returns one sentence for each impossible setting."""
    return problems(self)

  def law(self):
    """What `logprob.trajectory_logp` must know of the sampling law."""
    return Law(self.block, self.temperature, self.guidance, self.rank_temperature)

  def order_from(self):
    """What decides which positions a step reveals, beside the tokens there.

    state: a rule of what is revealed already. A completion has one trajectory,
      and the sum of its recorded logp is its exact log-prob.
    noise: a draw of its own. The recorded logp is exact given the order; the
      ratio of two policies along a trajectory is one of normalised laws.
    tokens: the proposals; the recorded logp lacks their term (LLaDA's rule).
    hindsight: tokens are taken back, and their states are not recorded.

    With a cache, with guidance and with eos_stop (where the tail is a function
    of the rest) this holds of the law that was sampled: that is recorded.
    """
    if self.pick == 'wino':
      return 'hindsight'
    alone = (
      self.block == 1
      or self.pick == 'confidence'
      and (self.steps * self.block == self.length)
    )
    if alone:  # all that is proposed is kept
      return 'state'
    if self.pick in picks.JUDGED and self.rank == 'token' and self.temperature:
      return 'tokens'
    drawn = self.pick in picks.DRAWN or self.rank_temperature
    return 'noise' if drawn else 'state'


def entropy_record(look, take, hp):
  return picks.entropy_of(look.prob)


def fallback_record(look, take, hp):
  """Where pick threshold found no token sure enough."""
  return jnp.broadcast_to(
    ~jnp.any(look.masked & (look.confidence >= hp.threshold), 1, keepdims=True),
    take.shape,
  )


def place_record(look, take, hp):
  """Log-prob of the positions of a step, under pick plackett_luce."""
  score = jnp.log(jnp.maximum(look.confidence, 1e-30)) / hp.rank_temperature
  logp = picks.plackett_luce_logp(score, look.masked, take)
  return jnp.broadcast_to(logp[:, None], take.shape)


# What can be recorded of every token when it is revealed, beside what always
# is: (Look, taken, SampleConfig) -> (R, W).
RECORDS = {
  'entropy': entropy_record,
  'fallback': fallback_record,
  'place': place_record,
}


class Loop(NamedTuple):
  tokens: Array  # (R, S) int32
  order: Array  # (R, L) int32
  logp: Array  # (R, L) float32
  confidence: Array  # (R, L) float32
  count: Array  # (R,) int32, the row's own steps so far
  since: Array  # (R,) int32, those of them in its present block
  forwards: Array  # () int32
  more: dict | None = None  # of RECORDS, (R, L) each


class Proposal(NamedTuple):
  """A token for every position of the window, and how sure it is."""

  token: Array  # (R, W) int32
  logp: Array  # (R, W) float32, under the sampling law
  confidence: Array  # (R, W) float32, its probability at temperature 1
  look: picks.Look


class Setting(NamedTuple):
  """What stays the same during a rollout."""

  cfg: model.ModelConfig
  params: dict
  hp: SampleConfig
  valid: Array  # (R, S) bool
  prompt: int  # P
  keys: Array  # (R,) keys
  records: tuple = ()  # names in RECORDS


def generate(cfg, params, prompts_RxP, key, hp, valid_RxP=None):
  """Samples one completion per row; `sample` with keys made from `key`.

  prompts_RxP int32, left-padded where valid_RxP (bool) is False; hp is a
  SampleConfig. Returns Rollouts.
  """
  if valid_RxP is None:
    valid_RxP = jnp.ones(prompts_RxP.shape, bool)
  keys_R = rng.row_keys(key, jnp.arange(prompts_RxP.shape[0]))
  return sample(cfg, params, prompts_RxP, valid_RxP, keys_R, hp)


def sample(cfg, params, prompts_RxP, valid_RxP, keys_R, hp, records=()):
  """Rollouts of one completion per row; keys_R are the rows' own keys.

  records: names in RECORDS, for Rollouts.more.
  ValueError if hp, or a completion of its length, is impossible.
  """
  complain = problems(hp)
  if complain:
    raise ValueError('; '.join(complain))
  rows, prompt = prompts_RxP.shape
  if prompt + hp.length > cfg.positions:
    raise ValueError(
      f'sampler.length = {hp.length} after a prompt of {prompt} tokens '
      f"exceeds the model's {cfg.positions} positions"
    )
  # 1. The canvas: the prompt, then L masks.
  blank = jnp.full((rows, hp.length), cfg.mask_id, jnp.int32)
  tokens = jnp.concatenate([jnp.asarray(prompts_RxP, jnp.int32), blank], 1)
  valid = jnp.concatenate([valid_RxP, jnp.ones_like(blank, bool)], axis=1)
  zeros_R, zeros = jnp.zeros_like(blank[:, 0]), jnp.zeros(blank.shape)
  more = {
    name: jnp.zeros(blank.shape, bool if name == 'fallback' else jnp.float32)
    for name in records
  } or None
  loop = Loop(
    tokens, jnp.zeros_like(blank), zeros, zeros, zeros_R, zeros_R, jnp.int32(0), more
  )
  # 2. Steps until every mask that must go is gone.
  setting = Setting(cfg, params, hp, valid, prompt, keys_R, tuple(records))
  unmask = (
    wino if hp.pick == 'wino' else each_row if hp.cache == 'none' else block_by_block
  )
  loop = unmask(setting, loop)
  # 3. What eos_stop has left masked is EOS, and belongs to no step.
  left = loop.tokens == cfg.mask_id
  return Rollouts(
    jnp.where(left, cfg.eos_id, loop.tokens),
    valid,
    jnp.where(left[:, prompt:], -1, loop.order),
    loop.logp,
    loop.forwards,
    loop.confidence,
    loop.more,
  )


def needed(setting, tokens_RxS):
  """(R, L) bool: masks that must go. With eos_stop not those after an EOS."""
  completion = tokens_RxS[:, setting.prompt :]
  masked = completion == setting.cfg.mask_id
  if setting.hp.eos_stop:
    eos = completion == setting.cfg.eos_id
    masked &= jnp.cumsum(eos, axis=1) == 0
  return masked


def each_row(setting, loop):
  """No cache: every row is in its own first block with a mask."""

  def step(loop):
    live_R, start_R = place(setting, loop)
    logits = forward(setting, loop.tokens, start_R)[0]
    return reveal(setting, loop, logits, start_R, live_R)

  return jax.lax.while_loop(
    lambda loop: jnp.any(needed(setting, loop.tokens)), step, loop
  )


def place(setting, loop):
  """(live_R bool, start_R int32) of rows that are each in their own block."""
  hp, prompt = setting.hp, setting.prompt
  live_R = jnp.any(needed(setting, loop.tokens), axis=1)
  first_R = jnp.argmax(loop.tokens[:, prompt:] == setting.cfg.mask_id, axis=1)
  return live_R, prompt + first_R.astype(jnp.int32) // hp.block * hp.block


def block_by_block(setting, loop):
  """With a cache: blocks from left to right, all rows in the same one."""
  hp, prompt = setting.hp, setting.prompt
  starts = range(prompt, prompt + hp.length, hp.block)
  if hp.cache == 'dual':  # every block has the same shapes: one program
    loop, _ = jax.lax.scan(
      lambda loop, start: (block(setting, loop, start, hp.block), None),
      loop,
      jnp.asarray(starts),
    )
    return loop
  for start in starts:
    loop = block(setting, loop, start, prompt + hp.length - start)
  return loop


def block(setting, loop, start, span):
  """One block: a full forward, then of `span` positions from its start on."""
  hp = setting.hp
  rows = loop.tokens.shape[0]
  start_R = jnp.full((rows,), start, jnp.int32)

  def window(x_RxL):
    at = start - setting.prompt
    return jax.lax.dynamic_slice_in_dim(x_RxL, at, hp.block, 1)

  def left(loop):
    return jnp.any(window(needed(setting, loop.tokens)))

  def step(loop, logits):
    live_R = jnp.any(needed(setting, loop.tokens), axis=1)
    return reveal(setting, loop, logits, start_R, live_R)

  def lap(loop):
    logits, cache = forward(setting, loop.tokens, start, keep=True)
    loop = step(loop, logits)
    until = loop.forwards + hp.refresh - 1

    def more(loop):
      return left(loop) & ((loop.forwards < until) | (hp.refresh == 0))

    def cached(loop):
      return step(loop, forward(setting, loop.tokens, start, cache=cache, span=span)[0])

    return jax.lax.while_loop(more, cached, loop)

  return jax.lax.while_loop(left, lap, loop)


def forward(setting, tokens, start, **cache):
  """(logits (R, W, V) of the windows from `start` on, Cache or None)."""
  s = setting
  return model.window_logits(
    s.cfg,
    s.params,
    tokens,
    s.valid,
    start,
    s.hp.block,
    s.prompt,
    s.hp.guidance,
    **cache,
  )


def windows(x_RxT, start_R, width):
  """(R, W): each row's window."""
  return jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, width))(
    x_RxT, start_R
  )


def write(x_RxT, start_R, where_RxW, new_RxW):
  """x with `new` at the places of the rows' windows that `where` names."""
  new = jnp.where(where_RxW, new_RxW, windows(x_RxT, start_R, where_RxW.shape[1]))
  return jax.vmap(
    lambda x, new, at: jax.lax.dynamic_update_slice_in_dim(x, new, at, 0)
  )(x_RxT, new, start_R)


def reveal(setting, loop, logits_RxWxV, start_R, live_R):
  """One unmasking step: propose at every mask of the window, keep the picks."""
  proposal = propose(setting, loop, logits_RxWxV, start_R)
  take = PICKS[setting.hp.pick](proposal.look, setting.hp) & live_R[:, None]
  again = jnp.zeros_like(take)
  return record(setting, loop, proposal, take, again, start_R, live_R)


def propose(setting, loop, logits_RxWxV, start_R):
  """A token for every place of the windows, by Gumbel-max in float32."""
  hp, cfg = setting.hp, setting.cfg
  masked = windows(loop.tokens, start_R, hp.block) == cfg.mask_id
  keys = jax.vmap(jax.random.fold_in)(setting.keys, loop.count)
  split = lambda key: tuple(jax.random.split(key))
  gumbel_key, noise_key = jax.vmap(split)(keys)
  law = model.sampling_logits(logits_RxWxV, hp.temperature, hp.top_p, hp.top_k)
  score = law
  if hp.temperature:
    noise = jax.vmap(lambda k: jax.random.gumbel(k, score.shape[1:]))
    score = score + noise(gumbel_key)
  token = jnp.argmax(score, axis=-1).astype(jnp.int32)
  # Confidence is at temperature 1 whatever the sampling, but for Dream's.
  judged = law if hp.rank_law == 'sampling' else logits_RxWxV
  own = confidence = jnp.exp(model.logp_of(judged, token))
  if hp.rank == 'max':
    best = jnp.max(judged, axis=-1)
    confidence = jnp.exp(best - jax.nn.logsumexp(judged, axis=-1))
  noise = jax.vmap(lambda k: jax.random.uniform(k, (hp.block,)))(noise_key)
  quota, share = picks.schedule(hp, masked, loop.since)
  look = picks.Look(
    jax.nn.softmax(judged, axis=-1), confidence, masked, quota, share, noise
  )
  return Proposal(token, model.logp_of(law, token), own, look)


def record(setting, loop, proposal, take, again, start_R, live_R):
  """Writes what is taken: tokens, the row's own step, how sure it was.

  What `again` names is masked once more; both are (R, W) bool.
  """
  at_R, masked = start_R - setting.prompt, proposal.look.masked
  step = jnp.broadcast_to(loop.count[:, None], take.shape)
  token = jnp.where(again, setting.cfg.mask_id, proposal.token)
  # Whether the row leaves its block.
  done_R = ~jnp.any(masked & ~take | again, axis=1)
  busy_R = live_R & jnp.any(masked, axis=1)
  more = {
    name: write(
      loop.more[name], at_R, take, RECORDS[name](proposal.look, take, setting.hp)
    )
    for name in setting.records
  } or None
  return Loop(
    write(loop.tokens, start_R, take | again, token),
    write(loop.order, at_R, take, step),
    write(loop.logp, at_R, take, proposal.logp),
    write(loop.confidence, at_R, take, proposal.confidence),
    loop.count + busy_R,
    jnp.where(done_R, 0, loop.since + busy_R),
    loop.forwards + 1,
    more,
  )


# ---- draft and verify


def wino(setting, loop):
  """WINO: bold drafts, verified in hindsight (WINO-DLLM decoding.py:113-198).

  A step takes all tokens over hp.threshold (at most 5 to 20, by what is
  masked) and masks those again which a shadow of the block, that sees all but
  the token itself, finds less probable than hp.verify: fewer than the step
  before has taken, so that rows advance. Ours is for batches, and bounded: a
  row's block takes at most 2 W steps, the last W without verifying.
  """

  def step(state):
    loop, before_R = state
    live_R, start_R = place(setting, loop)
    logits, shadow = model.shadow_logits(
      setting.cfg, setting.params, loop.tokens, setting.valid, start_R, setting.hp.block
    )
    proposal = propose(setting, loop, logits, start_R)
    take = draft(proposal.look, setting.hp) & live_R[:, None]
    again = doubtful(setting, loop, shadow, take, before_R, start_R)
    again &= live_R[:, None]
    loop = record(setting, loop, proposal, take, again, start_R, live_R)
    return loop, jnp.where(loop.since > 0, jnp.sum(take, axis=1), FIRST_DRAFT)

  before_R = jnp.full_like(loop.count, FIRST_DRAFT)
  loop, _ = jax.lax.while_loop(
    lambda state: jnp.any(needed(setting, state[0].tokens)), step, (loop, before_R)
  )
  return loop


FIRST_DRAFT = 30  # what stands for the step before a block's first


def draft(look, hp):
  """Those over the threshold, the best so many of them, or the very best."""
  over = look.masked & (look.confidence > hp.threshold)
  most_R = jnp.clip(jnp.sum(look.masked, axis=1) * 7 // 10, 5, 20)
  count_R = jnp.clip(jnp.sum(over, axis=1), 1, most_R)
  rank = picks.rank_of(look.confidence, look.masked)
  return look.masked & (rank < count_R[:, None])


def doubtful(setting, loop, shadow_RxWxV, take, before_R, start_R):
  """Tokens revealed before that the shadow would not have revealed."""
  hp = setting.hp
  token = windows(loop.tokens, start_R, hp.block)
  there = token != setting.cfg.mask_id
  hindsight = jnp.exp(model.logp_of(shadow_RxWxV, token))
  doubt = there & (hindsight < hp.verify)
  rank = picks.rank_of(-hindsight, doubt)
  may_R = (jnp.sum(take, axis=1) > 1) & (loop.since < hp.block)
  return doubt & (rank < before_R[:, None] - 1) & may_R[:, None]


def problems(hp):
  """What is impossible in a SampleConfig, one sentence each."""
  found = []
  if hp.length < 1 or hp.block < 1 or hp.length % hp.block:
    found.append(f'sampler.block = {hp.block} must divide sampler.length = {hp.length}')
  elif hp.pick in picks.SCHEDULED:
    blocks = hp.length // hp.block
    if hp.steps < blocks or hp.steps > hp.length or hp.steps % blocks:
      found.append(
        f'sampler.steps = {hp.steps} must be a multiple of the {blocks} '
        f'blocks and at most sampler.length = {hp.length}'
      )
  for field, allowed in (
    ('pick', NAMES),
    ('rank', ('token', 'max')),
    ('cache', CACHES),
    ('fallback', ('best', 'leftmost')),
    ('schedule', ('even', 'dream')),
    ('rank_law', ('model', 'sampling')),
  ):
    value = getattr(hp, field)
    if value not in allowed:
      found.append(f'sampler.{field} = {value!r} must be one of {", ".join(allowed)}')
  for field in ('threshold', 'verify'):
    if not 0 <= getattr(hp, field) <= 1:
      found.append(f'sampler.{field} = {getattr(hp, field)} must be in [0, 1]')
  if not 0 < hp.top_p <= 1:
    found.append(f'sampler.top_p = {hp.top_p} must be in (0, 1]')
  for field in (
    'temperature',
    'factor',
    'entropy_bound',
    'guidance',
    'rank_temperature',
    'top_k',
    'refresh',
  ):
    if not getattr(hp, field) >= 0:
      found.append(f'sampler.{field} = {getattr(hp, field)} must be >= 0')
  return found + contradictions(hp)


def contradictions(hp):
  """Settings that are possible alone, but say nothing beside the others."""
  found = []

  def only(field, usual, allowed, need):
    if getattr(hp, field) != usual and not allowed:
      found.append(f'sampler.{field} = {getattr(hp, field)!r} needs {need}')

  only('refresh', 0, hp.cache != 'none', 'sampler.cache = prefix or dual')
  only('fallback', 'best', hp.pick == 'threshold', 'sampler.pick = threshold')
  only(
    'schedule',
    'even',
    hp.pick in picks.SCHEDULED,
    f'sampler.pick = {" or ".join(picks.SCHEDULED)}',
  )
  drawn = (*picks.SCORED, 'plackett_luce')
  only(
    'rank_temperature', 0.0, hp.pick in drawn, f'sampler.pick = {" or ".join(drawn)}'
  )
  if hp.pick == 'plackett_luce' and not hp.rank_temperature:
    found.append(
      'sampler.pick = plackett_luce needs sampler.rank_temperature '
      '> 0: its chances are confidence^(1/rank_temperature)'
    )
  if hp.pick == 'wino':
    for field, usual in (('cache', 'none'), ('guidance', 0.0)):
      only(field, usual, False, f'another pick: wino knows {usual!r} alone')
  return found
