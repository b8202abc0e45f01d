"""The unmasking loop: a scan over blocks, a while loop over steps inside.

`sample` is one function. A pick rule decides which proposals of a step are
kept; PICKS names them. Every random number is a function of (row key, the
row's own step), so a row's tokens depend neither on its neighbours nor on how
rows are spread over devices.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmpo_jax import model, rng
from dmpo_jax.types import Array, Rollouts


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """How completions are sampled."""

  length: int  # L, tokens of a completion
  block: int  # W, unmasked left to right in blocks of this many
  steps: int  # unmasking steps of a completion, for the scheduled picks
  temperature: float = 0.0  # 0 = greedy
  pick: str = 'confidence'  # a name in PICKS
  rank: str = 'token'  # confidence of: token (sampled; LLaDA) | max
  threshold: float = 0.9  # pick 'threshold'
  factor: float = 1.0  # pick 'factor'
  entropy_bound: float = 0.1  # pick 'entropy', nats
  guidance: float = 0.0  # classifier-free guidance scale; 0 = off
  cache: str = 'none'  # none | dual (only the block's window is recomputed)

  def law(self):
    """What `logprob.trajectory_logp` must know of the sampling law."""
    return dict(block=self.block, temperature=self.temperature,
                guidance=self.guidance)


class Look(NamedTuple):
  """What a pick rule sees of one step; all of a block's window."""

  prob: Array  # (R, W, V) float32, softmax at temperature 1
  confidence: Array  # (R, W) float32, of the proposal or of the best token
  masked: Array  # (R, W) bool, positions still masked
  quota: Array  # (R,) int32, what the schedule wants revealed now
  noise: Array  # (R, W) float32, U(0, 1)


def rank_of(score_RxW, masked_RxW):
  """0 for the highest masked score; ties go to the lower position."""
  score = jnp.where(masked_RxW, score_RxW, -jnp.inf)
  order = jnp.argsort(-score, axis=1, stable=True)
  return jnp.argsort(order, axis=1)


def by_rank(look, score_RxW):
  return look.masked & (rank_of(score_RxW, look.masked) < look.quota[:, None])


def pick_confidence(look, hp):
  """LLaDA's low-confidence remasking (generate.py:94-115)."""
  return by_rank(look, look.confidence)


def pick_random(look, hp):
  """Random remasking: the schedule's number, anywhere in the block."""
  return by_rank(look, look.noise)


def pick_random_order(look, hp):
  """One token a step in random order: the exact any-order trajectory."""
  return by_rank(look._replace(quota=jnp.ones_like(look.quota)), look.noise)


def pick_margin(look, hp):
  """By the gap between the two best probabilities (Dream topk_margin)."""
  best = jax.lax.top_k(look.prob, 2)[0]
  return by_rank(look, best[..., 0] - best[..., 1])


def pick_threshold(look, hp):
  """The most confident, and all at or over hp.threshold (Fast-dLLM)."""
  first = rank_of(look.confidence, look.masked) == 0
  return look.masked & (first | (look.confidence >= hp.threshold))


def longest_prefix(look, score_RxW, accept):
  """Positions in order of score while accept(sorted score, place) holds."""
  rank = rank_of(score_RxW, look.masked)
  score = jnp.where(look.masked, score_RxW, -jnp.inf)
  ok = accept(-jnp.sort(-score, axis=1), jnp.arange(score.shape[1])[None])
  ok = ok.at[:, 0].set(True)
  kept = jnp.sum(jnp.cumprod(ok, axis=1), axis=1, keepdims=True)
  return look.masked & (rank < kept)


def pick_factor(look, hp):
  """Longest prefix c_1 >= c_2 .. with c_j >= 1 - factor/(j+1) (Fast-dLLM)."""
  return longest_prefix(look, look.confidence,
                        lambda c, j: c >= 1 - hp.factor / (j + 2))


def pick_entropy(look, hp):
  """Longest prefix by entropy with sum - max <= bound (the EB sampler)."""
  entropy = -jnp.sum(jax.scipy.special.xlogy(look.prob, look.prob), axis=-1)

  def accept(minus, place):
    rises = jnp.where(jnp.isfinite(minus), -minus, jnp.inf)
    return jnp.cumsum(rises, axis=1) - rises <= hp.entropy_bound

  return longest_prefix(look, -entropy, accept)


PICKS = {
    'confidence': pick_confidence,
    'random': pick_random,
    'random_order': pick_random_order,
    'threshold': pick_threshold,
    'factor': pick_factor,
    'margin': pick_margin,
    'entropy': pick_entropy,
}
SCHEDULED = ('confidence', 'random', 'margin')  # those that use hp.steps
# Rules that look at the state alone: their recorded trajectory is exact.
STATE_ONLY = ('random', 'random_order', 'margin', 'entropy')


class Loop(NamedTuple):
  tokens: Array  # (R, S) int32
  order: Array  # (R, L) int32
  logp: Array  # (R, L) float32
  count: Array  # (R,) int32, the row's own steps so far
  forwards: Array  # () int32


def generate(cfg, params, prompts_RxP, key, hp, valid_RxP=None):
  """Samples one completion per row; `sample` with keys made from `key`.

  prompts_RxP int32, left-padded where valid_RxP (bool) is False; hp is a
  SampleConfig. Returns Rollouts.
  """
  if valid_RxP is None:
    valid_RxP = jnp.ones(prompts_RxP.shape, bool)
  keys_R = rng.row_keys(key, jnp.arange(prompts_RxP.shape[0]))
  return sample(cfg, params, prompts_RxP, valid_RxP, keys_R, hp)


def sample(cfg, params, prompts_RxP, valid_RxP, keys_R, hp):
  """Rollouts of one completion per row; keys_R are the rows' own keys."""
  complain = problems(hp)
  if complain:
    raise ValueError('; '.join(complain))
  # 1. The canvas: the prompt, then L masks.
  rows, prompt = prompts_RxP.shape
  blank = jnp.full((rows, hp.length), cfg.mask_id, jnp.int32)
  tokens = jnp.concatenate([jnp.asarray(prompts_RxP, jnp.int32), blank], 1)
  valid = jnp.concatenate([valid_RxP, jnp.ones_like(blank, bool)], axis=1)
  loop = Loop(tokens, jnp.zeros_like(blank), jnp.zeros(blank.shape),
              jnp.zeros_like(blank[:, 0]), jnp.int32(0))

  # 2. Blocks from left to right; in a block, steps until no mask is left.
  def block(loop, index):
    start, begun = prompt + index * hp.block, loop.count

    def masks_left(loop):
      window = jax.lax.dynamic_slice_in_dim(loop.tokens, start, hp.block, 1)
      return jnp.any(window == cfg.mask_id)

    def forward(loop, **cache):
      return model.window_logits(cfg, params, loop.tokens, valid, start,
                                 hp.block, prompt, hp.guidance, **cache)

    def step(loop, logits):
      return reveal(cfg, hp, loop, logits, start, prompt, keys_R, begun)

    cache = {}
    if hp.cache == 'dual':
      logits, kept = forward(loop, keep=True)
      loop, cache = step(loop, logits), {'cache': kept}
    loop = jax.lax.while_loop(
        masks_left, lambda loop: step(loop, forward(loop, **cache)[0]), loop)
    return loop, None

  loop, _ = jax.lax.scan(block, loop, jnp.arange(hp.length // hp.block))
  return Rollouts(loop.tokens, valid, loop.order, loop.logp, loop.forwards)


def reveal(cfg, hp, loop, logits_RxWxV, start, prompt, keys_R, begun_R):
  """One unmasking step: propose at every mask of the window, keep the picks."""
  window = lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, hp.block, 1)
  old = window(loop.tokens, start)
  masked = old == cfg.mask_id
  # 1. Propose tokens: Gumbel-max at the sampling temperature, in float32.
  keys = jax.vmap(jax.random.fold_in)(keys_R, loop.count)
  split = lambda key: tuple(jax.random.split(key))
  gumbel_key, noise_key = jax.vmap(split)(keys)
  score = logits_RxWxV
  if hp.temperature:
    noise = jax.vmap(lambda k: jax.random.gumbel(k, score.shape[1:]))
    score = score / hp.temperature + noise(gumbel_key)
  proposal = jnp.argmax(score, axis=-1).astype(jnp.int32)
  # 2. Pick positions. Confidence is at temperature 1 whatever the sampling.
  prob = jax.nn.softmax(logits_RxWxV, axis=-1)
  own = jnp.take_along_axis(prob, proposal[..., None], -1)[..., 0]
  noise = jax.vmap(lambda k: jax.random.uniform(k, (hp.block,)))(noise_key)
  per_block = max(1, hp.steps // (hp.length // hp.block))
  since = loop.count - begun_R
  quota = hp.block // per_block + (since < hp.block % per_block)
  confidence = jnp.max(prob, axis=-1) if hp.rank == 'max' else own
  look = Look(prob, confidence, masked, quota, noise)
  take = PICKS[hp.pick](look, hp)
  # 3. Write tokens, the row's own step, and log-probs of the sampling law.
  logp = model.sampling_logp(logits_RxWxV, hp.temperature)
  logp = jnp.take_along_axis(logp, proposal[..., None], -1)[..., 0]

  def write(x, at, new):
    new = jnp.where(take, new, window(x, at))
    return jax.lax.dynamic_update_slice_in_dim(x, new, at, 1)

  at = start - prompt
  return Loop(
      write(loop.tokens, start, proposal),
      write(loop.order, at, jnp.broadcast_to(loop.count[:, None], old.shape)),
      write(loop.logp, at, logp),
      loop.count + jnp.any(masked, axis=1), loop.forwards + 1)


def problems(hp):
  """What is impossible in a SampleConfig, one sentence each."""
  found = []
  if hp.length < 1 or hp.block < 1 or hp.length % hp.block:
    found.append(f'sampler.block = {hp.block} must divide sampler.length = '
                 f'{hp.length}')
  elif hp.pick in SCHEDULED:
    blocks = hp.length // hp.block
    if hp.steps < blocks or hp.steps > hp.length or hp.steps % blocks:
      found.append(
          f'sampler.steps = {hp.steps} must be a multiple of the {blocks} '
          f'blocks and at most sampler.length = {hp.length}')
  for field, allowed in (('pick', tuple(PICKS)), ('rank', ('token', 'max')),
                         ('cache', ('none', 'dual'))):
    value = getattr(hp, field)
    if value not in allowed:
      found.append(f'sampler.{field} = {value!r} must be one of '
                   f'{", ".join(allowed)}')
  if not 0 <= hp.threshold <= 1:
    found.append(f'sampler.threshold = {hp.threshold} must be in [0, 1]')
  for field in ('temperature', 'factor', 'entropy_bound', 'guidance'):
    if not getattr(hp, field) >= 0:
      found.append(f'sampler.{field} = {getattr(hp, field)} must be >= 0')
  return found
