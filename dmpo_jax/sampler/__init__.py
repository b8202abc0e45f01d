"""Samples completions: turns a prompt and L masks into tokens, with a record.

A sampler is a name of `sampler.pick` in SAMPLERS. Most are a pick rule in the
loops of unmask.py: a new one is a function and a line in picks.py. A sampler with
its own loop, as wino.py, is a file and a line in SAMPLERS. A new record of each
token is a function and a line in RECORDS.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from dmpo_jax import model, rng
from dmpo_jax.sampler import (
  blocks,
  orders,
  picks,
  records,
  rolling,
  routes,
  speculate,
  unmask,
  wino,
)
from dmpo_jax.sampler.config import SAMPLERS, SampleConfig, Sampler, at_once
from dmpo_jax.sampler.draft import OWN_WEIGHTS, Draft
from dmpo_jax.sampler.picks import PICKS
from dmpo_jax.sampler.records import Recorder
from dmpo_jax.sampler.speculate import Drafter
from dmpo_jax.types import (
  GIVEN,
  Array,
  BoolR,
  BoolRL,
  BoolRP,
  FloatR,
  Given,
  IntRP,
  IntRS,
  KeyR,
  Params,
  Rollouts,
)

__all__ = [
  'NAMES', 'OWN_WEIGHTS', 'PICKS', 'RECORDS', 'SAMPLERS', 'Draft', 'Drafter',
  'Recorder', 'SampleConfig', 'Sampler', 'at_once', 'closed', 'finished', 'follow',
  'following', 'generate', 'opened', 'picks', 'routes', 'sample', 'speculate',
  'unbound', 'unmask', 'with_drafts',
]  # fmt: skip

SAMPLERS.update(
  PICKS,
  wino=Sampler(
    unmask=wino.draft_and_verify,
    judged=True,
    reads=('threshold', 'verify'),
    records=False,
    plain=False,
  ),
)
NAMES = tuple(SAMPLERS)  # the values of sampler.pick
# What Rollouts.more can hold of every token.
RECORDS = {
  'best': Recorder(jnp.float32, records.best),
  'entropy': Recorder(jnp.float32, records.entropy),
  'fallback': Recorder(jnp.bool_, records.fallback),
  'order_logp': Recorder(jnp.float32, orders.record),
  'place': Recorder(jnp.float32, records.place),
}


def generate(
  cfg: model.ModelConfig,
  params: Params,
  prompts_RxP: IntRP,
  key: Array,
  hp: SampleConfig,
  valid_RxP: BoolRP | None = None,
) -> Rollouts:
  """Samples one completion per row; `sample` with row keys made from `key`.

  prompts_RxP is int32, left-padded where valid_RxP (bool) is False.
  """
  if valid_RxP is None:
    valid_RxP = jnp.ones(prompts_RxP.shape, bool)
  keys_R = rng.row_keys(key, jnp.arange(prompts_RxP.shape[0]))
  return sample(cfg, params, prompts_RxP, valid_RxP, keys_R, hp)


def sample(
  cfg: model.ModelConfig,
  params: Params,
  prompts_RxP: IntRP,
  valid_RxP: BoolRP,
  keys_R: KeyR,
  hp: SampleConfig,
  records: Sequence[str] = (),
  bound_R: FloatR | None = None,
) -> Rollouts:
  """Samples one completion per row; keys_R are the rows' own keys.

  records: names in RECORDS, for Rollouts.more (None without names); 'routes' for
  Rollouts.routes. bound_R: each
  row's own threshold, factor or entropy_bound, whichever the pick rule reads; None:
  that of hp. ValueError if hp has problems, if prompt and completion exceed the
  model's positions, or if the rule has no such number.
  """
  if bound_R is not None and (problems := unbound(hp)):
    raise ValueError('; '.join(problems))
  setting, loop = opened(cfg, params, prompts_RxP, valid_RxP, keys_R, hp, records)
  setting = dataclasses.replace(setting, bound=bound_R)
  return closed(setting, loop_of(hp, len(loop.tokens))(setting, loop))


def with_drafts(
  own: tuple[unmask.Setting, unmask.Loop], drafter: Drafter, params: Params
) -> Rollouts:
  """Samples completions that somebody else drafts; own: of `opened`.

  params: the draft's. The gate must be a function of arrays. ValueError if the sampler
  cannot have drafts.
  """
  setting, loop = own
  theirs = drafter.setting(setting, params)
  state = speculate.by_draft(setting, theirs, drafter.how, loop)
  return finished(setting, state, drafter)


def finished(
  setting: unmask.Setting, state: speculate.State, drafter: Drafter
) -> Rollouts:
  """Returns the rollouts of a state without masks."""
  loop = state.loop
  if drafter.how.gate != 'exact':  # there each token has the model's law
    loop = speculate.end(state)
  return closed(setting, loop)._replace(drafts=state.drafts)


def opened(
  cfg: model.ModelConfig,
  params: Params,
  prompts_RxP: IntRP,
  valid_RxP: BoolRP,
  keys_R: KeyR,
  hp: SampleConfig,
  records: Sequence[str] = (),
) -> tuple[unmask.Setting, unmask.Loop]:
  """Returns what stays the same during a rollout, and its state before the first step.

  ValueError as `sample`.
  """
  if problems := hp.problems():
    raise ValueError('; '.join(problems))
  prompt = prompts_RxP.shape[1]
  if prompt + hp.length > cfg.positions:
    raise ValueError(
      f'sampler.length = {hp.length} after a prompt of {prompt} tokens '
      f"exceeds the model's {cfg.positions} positions"
    )
  if problem := block_problem(cfg, hp):
    raise ValueError(problem)
  # The canvas: the prompt, then L masks.
  canvas, valid, given = lay_out(cfg, prompts_RxP, valid_RxP, hp.length)
  prompt, routed = canvas.shape[1] - hp.length, 'routes' in records
  records = [*records, *['order_logp'] * hp.order_logp]
  records = [name for name in records if name != 'routes']
  loop = begun(canvas, given, records)
  cfg = dataclasses.replace(cfg, keep_routes=routed)
  if routed:
    if problem := routes.problem(cfg, hp):
      raise ValueError(problem)
    loop = loop._replace(routes=routes.blank(cfg, hp, loop.order, canvas.shape[1]))
  setting = unmask.Setting(
    cfg, params, hp, valid, prompt, keys_R, {name: RECORDS[name] for name in records}
  )
  return setting, loop


def closed(setting: unmask.Setting, loop: unmask.Loop) -> Rollouts:
  """Returns the rollouts of a loop that has ended.

  Where eos_stop has left a mask stands EOS, which belongs to no step.
  """
  prompt = setting.prompt
  completion = loop.tokens[:, prompt:]
  left = unmask.hidden(setting, loop)
  completion = jnp.where(left, setting.cfg.eos_id, completion)
  order, record = jnp.where(left, -1, loop.order), loop.routes
  return Rollouts(
    tokens=jnp.concatenate([loop.tokens[:, :prompt], completion], axis=1),
    valid=setting.valid,
    order=order,
    logp=loop.logp,
    forwards=loop.forwards,
    confidence=loop.confidence,
    more=loop.more or None,
    routes=None if record is None else record._replace(order=order),
  )


def unbound(hp: SampleConfig) -> list[str]:
  """Returns why rows cannot have a number of their own; [] = they can."""
  found = []
  if not SAMPLERS[hp.pick].bound:
    have = ', '.join(name for name, x in SAMPLERS.items() if x.bound)
    found.append(
      f'sampler.pick = {hp.pick} has no number that a row may have of its own: set one '
      f'of {have}'
    )
  if hp.order_logp:
    found.append(
      'sampler.order_logp = True takes one threshold for all rows, here each has its '
      'own: set False, with sampler.rank = max'
    )
  return found


def begun(canvas_RxS: IntRS, given_RxL: BoolRL, records: Sequence[str]) -> unmask.Loop:
  """Returns the state of a rollout before its first step."""
  order = jnp.where(given_RxL, GIVEN, 0)
  zeros_R, zeros = jnp.zeros_like(order[:, 0]), jnp.zeros(order.shape)
  return unmask.Loop(
    tokens=canvas_RxS,
    order=order,
    logp=zeros,
    confidence=zeros,
    count=zeros_R,
    since=zeros_R,
    forwards=jnp.int32(0),
    more={name: jnp.zeros(order.shape, RECORDS[name].dtype) for name in records},
  )


def following(hp: SampleConfig, length: int, window: int = 0) -> SampleConfig:
  """Returns the greedy sampler of hp's rule for a canvas of `length` tokens.

  It keeps the tokens of a step, and has neither cache nor early end. window: tokens of
  an attention block; 0 = the model sees the whole text. ValueError if the order of
  unmasking is not a function of the state alone.
  """
  block = hp.block if window else min(hp.block, length)
  per_step = max(1, hp.length // hp.steps)
  same = dict(temperature=0.0, top_p=1.0, top_k=0, rank='max', order_logp=False)
  same |= dict(cache='none', refresh=0, slots=0, eos_stop=False)
  steps = length // block * -(-block // per_step)
  greedy = dataclasses.replace(hp, length=length, block=block, steps=steps, **same)
  if greedy.order_from() != 'state':
    raise ValueError(
      f'sampler.pick = {hp.pick}, sampler.rank_temperature = {hp.rank_temperature}: a '
      'given text has no log-prob along the trajectory of a sampler that draws '
      'positions or takes tokens back: set sampler.pick = confidence, or score by elbo'
    )
  if problems := greedy.problems():
    raise ValueError('; '.join(problems))
  return greedy


def follow(
  cfg: model.ModelConfig, params: Params, text: Given, keys_R: KeyR, hp: SampleConfig
) -> tuple[FloatR, BoolR]:
  """Returns the log-probs of given texts along the trajectory of a greedy sampler.

  hp is of `following`. At each state the rule chooses the positions, and the text's
  tokens are revealed there. The sum of their log-probs is the exact log-prob under the
  law that draws tokens at temperature 1 in this order (DUEL, arXiv 2603.01367). Also
  returns whether greedy decoding writes that text.
  """
  prompt = text.tokens.shape[1] - hp.length
  tail = jnp.where(text.own, cfg.mask_id, text.tokens[:, prompt:])
  canvas = jnp.concatenate([text.tokens[:, :prompt], tail], axis=1)
  setting = unmask.Setting(
    cfg, params, hp, text.valid, prompt, keys_R, {'best': RECORDS['best']}, text.tokens
  )
  loop = unmask.by_rule(setting, begun(canvas, ~text.own, ['best']))
  greedy = jnp.all(~text.own | (loop.confidence >= loop.more['best']), axis=1)
  return jnp.sum(loop.logp, axis=1), greedy


def loop_of(hp: SampleConfig, rows: int) -> Callable[..., unmask.Loop]:
  """Returns the function that reveals all masks of so many rows."""
  if own := SAMPLERS[hp.pick].unmask:
    return own
  if at_once(hp, rows) < rows:
    return rolling.by_slot
  return blocks.by_block if hp.cache == 'block' else unmask.by_rule


def lay_out(
  cfg: model.ModelConfig, prompts_RxP: IntRP, valid_RxP: BoolRP, length: int
) -> model.Aligned:
  """Puts L masks behind the prompts, in whole attention blocks if there are some."""
  prompts_RxP = jnp.asarray(prompts_RxP, jnp.int32)
  if cfg.block_causal:
    return model.align(cfg, prompts_RxP, valid_RxP, 0, length)
  blank = jnp.full((len(prompts_RxP), length), cfg.mask_id, jnp.int32)
  return model.Aligned(
    jnp.concatenate([prompts_RxP, blank], axis=1),
    jnp.concatenate([valid_RxP, jnp.ones_like(blank, bool)], axis=1),
    jnp.zeros(blank.shape, bool),
  )


def block_problem(cfg: model.ModelConfig, hp: SampleConfig) -> str:
  """Returns why blocks or cache do not fit the model's attention; '' = they do."""
  size = cfg.block_causal
  if not size and hp.cache == 'block':
    return (
      'sampler.cache = block needs a model that attends block by block, and this one '
      'sees the whole text: set none, prefix or dual'
    )
  if size and (size % hp.block or hp.length % size):
    return (
      f'sampler.block = {hp.block}, sampler.length = {hp.length}: this model attends '
      f'in blocks of {size}; set a block that divides it, and a length that it divides'
    )
  if size and hp.cache in ('prefix', 'dual'):
    return (
      f'sampler.cache = {hp.cache} is for models that see the whole text, and this one '
      f'attends in blocks of {size}: set block, which is exact, or none'
    )
  if size and not SAMPLERS[hp.pick].plain:
    return (
      f'sampler.pick = {hp.pick} is for models that see the whole text, and this one '
      f'attends in blocks of {size}: set another pick'
    )
  return ''
