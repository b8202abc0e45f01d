"""Log-probabilities of completions: per token, by ELBO, or along a trajectory.

`view_logp` is the one differentiable path from parameters to losses. It never builds a
(R, K, L, V) array when cfg.head_chunk is set: the head is applied to chunks of the
completion under rematerialisation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dmpo_jax import layout, masking, model, routing, rules
from dmpo_jax.model import ModelConfig
from dmpo_jax.rng import AnyKey
from dmpo_jax.sampler import SampleConfig, orders
from dmpo_jax.types import (
  GIVEN,
  Array,
  BoolRKL,
  BoolRL,
  BoolRS,
  Canvas,
  FloatR,
  FloatRKL,
  FloatRL,
  IntR,
  IntRS,
  KeyR,
  Masks,
  Params,
  Rollouts,
  ViewLogp,
)


@dataclasses.dataclass(frozen=True)
class LogprobConfig(rules.Section):
  """How log p_ref and log p_old of a completion are estimated."""

  NAME = 'logprob'
  OWN = {
    'estimator': rules.one_of('elbo', 'trajectory'),
    'elbo': rules.one_of('paper', 'stratified', 'order'),
    'draws': rules.least(1),
    'states': rules.least(0),
  }
  WHOLE_TEXT = masking.WHOLE_TEXT

  estimator: str = 'elbo'  # elbo | trajectory (along the recorded unmasking steps)
  # Masks of the ELBO: paper (Bernoulli, L/m; in attention blocks 1..W of each) |
  # stratified | order (attention blocks: one random order, each token read once).
  elbo: str = 'paper'
  draws: int = 4  # masked copies of a completion
  low: float = 0.1  # paper: mask ratio ~ U(low, high)
  high: float = 1.0  # paper: upper end of the mask ratio, at most 1
  antithetic: bool = True  # paper: the second half of the copies is the complement
  tail: bool = True  # elbo: count the tokens sampled after the first EOS
  states: int = 0  # trajectory: recorded steps to visit; 0 = all
  fuse: bool = False  # elbo, adapters: log p_old and log p_ref in one pass

  def idle(self) -> dict[str, str]:
    return rules.without_effect(
      ('states', self.estimator == 'trajectory', 'logprob.estimator = trajectory'),
      ('tail fuse', self.estimator == 'elbo', 'logprob.estimator = elbo'),
      ('low high antithetic', self.elbo == 'paper', 'logprob.elbo = paper'),
      ('draws', self.elbo != 'order', 'logprob.elbo = paper or stratified'),
    )

  def problems(self) -> list[str]:
    """Returns a sentence for each impossible setting."""
    bad = super().problems()
    pairs = {'paper': self.antithetic, 'stratified': True}.get(self.elbo, False)
    if self.draws % 2 and pairs:
      bad.append(
        f'logprob.draws = {self.draws} must be even with logprob.antithetic=True or '
        'logprob.elbo=stratified: their masks come in pairs'
      )
    right = 0 <= self.low < self.high <= 1
    return bad + rules.rates(self, right, '0 <= low < high <= 1')


# --- what is read off the logits


def read_centred(
  cfg: ModelConfig, law: SampleConfig | None, logits: Array, tokens: Array
) -> Array:
  """Returns the token's logit less the mean of all logits."""
  own = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
  return own - jnp.mean(logits, axis=-1)


def read_score(
  cfg: ModelConfig, law: SampleConfig | None, logits: Array, tokens: Array
) -> Array:
  """Returns the score by which pick plackett_luce ranks a position.

  It is the largest log-prob divided by law.rank_temperature. ValueError without a law.
  """
  if law is None:
    raise ValueError("the read 'score' needs the sampling law: set Wants.law")
  allowed = model.without_mask(cfg, logits)
  best = jnp.max(allowed, -1) - jax.nn.logsumexp(allowed, axis=-1)
  return best / law.rank_temperature


def read_guess(
  cfg: ModelConfig, law: SampleConfig | None, logits: Array, tokens: Array
) -> Array:
  """Returns the most probable token."""
  return jnp.argmax(model.without_mask(cfg, logits), axis=-1)


# Numbers that an objective may read besides log-probs:
# (ModelConfig, SampleConfig or None, logits (N, L, V), tokens (N, L)) -> (N, L).
READS: dict[str, Callable] = {
  'centred': read_centred,
  'score': read_score,
  'guess': read_guess,
}


def reader(
  cfg: ModelConfig, law: SampleConfig | None = None, reads: tuple[str, ...] = ()
) -> Callable:
  """Returns (logits, tokens) -> {'logp': log-probs, name: READS[name], ...}.

  law: log-probs are the sampling law's; None: the model's at temperature 1.
  """

  def read(logits, tokens):
    allowed = logits
    if law is not None:
      allowed = model.sampling_logits(model.without_mask(cfg, logits), law.temperature)
    return {'logp': model.logp_of(allowed, tokens)} | {
      name: READS[name](cfg, law, logits, tokens) for name in reads
    }

  return read


# --- masked copies


def token_logp(
  cfg: ModelConfig,
  params: Params,
  tokens_RxS: IntRS,
  masked_RxKxL: BoolRKL,
  valid_RxS: BoolRS | None = None,
) -> FloatRKL:
  """Returns log p(token | the rest, masked), float32; 0 where not masked.

  tokens_RxS hold the true completion in their last L places; masked_RxKxL says where
  the network sees the mask token instead.
  """
  masks = Masks(masked_RxKxL, jnp.ones((*masked_RxKxL.shape[:2], 1)))
  return view_logp(cfg, params, tokens_RxS, masks, valid_RxS).logp


def view_logp(
  cfg: ModelConfig,
  params: Params,
  tokens_RxS: IntRS,
  masks: Masks,
  valid_RxS: BoolRS | None = None,
  *,
  dropout_R: KeyR | None = None,
  read: Callable | None = None,
) -> ViewLogp:
  """Returns what the policy says of the masked copies of completions.

  dropout_R: keys of the adapters' dropout, one a row; None: no dropout. read: a
  `reader`; None: log-probs at temperature 1.
  """
  counted = masks.masked
  if masks.sampled is not None:
    counted = counted & masks.sampled[:, None]
  if masks.made is not None:
    counted = counted & masks.made[:, None]
  predict = layout.layout_of(cfg)
  h, targets, routed = predict(cfg, params, tokens_RxS, masks, valid_RxS, dropout_R)
  numbers = chosen_logp(cfg, params, h, targets, read)
  numbers = jax.tree.map(
    lambda x: jnp.where(counted, x.reshape(counted.shape), 0.0), numbers
  )
  return ViewLogp(numbers.pop('logp'), numbers, routed)


def chosen_logp(
  cfg: ModelConfig,
  params: Params,
  hidden_NxLxD: Array,
  targets_NxL: Array,
  read: Callable | None = None,
) -> dict[str, Array]:
  """Returns a `reader`'s numbers at the targets, (N, L) each.

  The head is applied in chunks of cfg.head_chunk positions under remat. ValueError if
  the chunk does not divide L.
  """
  read = read or reader(cfg)

  @jax.checkpoint
  def of_chunk(hidden, targets):
    return read(model.head(cfg, params, hidden), targets)

  return in_chunks(cfg, of_chunk, hidden_NxLxD, targets_NxL)


def in_chunks(cfg: ModelConfig, fn: Callable, *arrays: Array) -> Any:
  """Applies fn to chunks of cfg.head_chunk along the second axis."""
  length, chunk = arrays[0].shape[1], cfg.head_chunk
  if not chunk or chunk >= length:
    return fn(*arrays)
  if length % chunk:
    raise ValueError(
      f'model.head_chunk = {chunk} must divide the completion length {length}'
    )
  chunks = [jnp.stack(jnp.split(x, length // chunk, axis=1)) for x in arrays]
  numbers = jax.lax.map(lambda chunk: fn(*chunk), tuple(chunks))
  return jax.tree.map(lambda x: jnp.concatenate(x, axis=1), numbers)


# --- ELBO


def draw(key: AnyKey, row_R: IntR, canvas: Canvas, hp: LogprobConfig) -> Masks:
  """Draws the masks of the ELBO that `hp` describes."""
  if hp.elbo == 'stratified':
    return masking.draw_stratified(key, row_R, canvas, hp.draws)
  if hp.elbo == 'order' and canvas.block:
    return masking.draw_order(key, row_R, canvas)
  rates = hp.low, hp.high
  return masking.draw_bernoulli(key, row_R, canvas, hp.draws, rates, hp.antithetic)


def copy_sums(x_RxKxL: FloatRKL, weight_RxKxL: Array) -> Array:
  """Returns the weighted sum over a copy's positions, (R, K).

  weight broadcasts to (R, K, L). One weight a copy multiplies the sum.
  """
  if weight_RxKxL.shape[-1] == 1:
    return weight_RxKxL[..., 0] * jnp.sum(x_RxKxL, axis=-1)
  return jnp.sum(weight_RxKxL * x_RxKxL, axis=-1)


def seq_elbo(logp_RxKxL: FloatRKL, weight_RxKxL: Array) -> FloatR:
  """Returns the mean over copies of their weighted sums, nats."""
  return jnp.mean(copy_sums(logp_RxKxL, weight_RxKxL), axis=-1)


def elbo(
  cfg: ModelConfig,
  params: Params,
  tokens_RxS: IntRS,
  valid_RxS: BoolRS | None,
  masks: Masks,
  counted_RxL: BoolRL | None = None,
) -> FloatR:
  """Returns the ELBO under `masks`, nats; only counted_RxL positions enter the sum."""
  logp = view_logp(cfg, params, tokens_RxS, masks, valid_RxS).logp
  if counted_RxL is not None:
    logp = logp * counted_RxL[:, None, :]
  return seq_elbo(logp, masks.weight)


# --- along the recorded unmasking steps


def state_logp(
  cfg: ModelConfig,
  params: Params,
  rollouts: Rollouts,
  step_R: IntR,
  law: SampleConfig,
  policy: Params | None = None,
) -> Array:
  """Returns log-probs of the tokens unmasked at each row's step `step_R`.

  (2, R) float32, nats: under `params`, and as the sampler recorded them. The state has
  every token masked that was unmasked at that step or later. Only the block of the
  unmasked tokens goes through the head. policy: see `Along`. Recorded routes are
  replayed.
  """
  length = rollouts.order.shape[1]
  prompt = rollouts.tokens.shape[1] - length
  hidden_yet = rollouts.order >= step_R[:, None]
  hidden_yet |= rollouts.order == -1  # the tail that eos_stop left masked
  shown = rollouts.order == step_R[:, None]
  state = layout.apply_masks(rollouts.tokens, hidden_yet[:, None], cfg.mask_id)[:, 0]
  start_R = jnp.argmax(shown, axis=1) // law.block * law.block
  where = rollouts.valid, prompt + start_R, law.block
  if cfg.block_causal:  # a prompt's end may stand on the canvas
    prompt_R = prompt + jnp.sum(rollouts.order == GIVEN, axis=1)
    where = *where, prompt_R, law.guidance
  else:
    where = *where, prompt, law.guidance
  replay = layout.routes_of(cfg, rollouts.routes, hidden_yet[:, None])

  def look(params):
    return model.window_logits(cfg, params, state, *where, routes=replay)[0]

  logits = look(params)
  window = lambda x_RxL: model.windows(x_RxL, start_R, law.block)
  logp = model.logp_of(
    model.sampling_logits(logits, law.temperature), window(rollouts.tokens[:, prompt:])
  )
  mine = shown if (made := made_of(rollouts)) is None else shown & made
  now = jnp.sum(jnp.where(window(mine), logp, 0.0), axis=1)
  if law.order_logp:
    limit = limits(cfg, rollouts, shown[:, None], hidden_yet[:, None], law)[:, 0]
    judged = logits if policy is None else look(policy)
    now += jnp.sum(passed_over(law, logits, judged, window(limit)), axis=1)
  return jnp.stack([now, jnp.sum(recorded(rollouts, law) * shown, axis=1)])


def made_of(rollouts: Rollouts) -> BoolRL | None:
  """Returns the tokens that no draft wrote; None: there were no drafts."""
  more = rollouts.more or {}
  return ~more['drafted'] if 'drafted' in more else None


def recorded(rollouts: Rollouts, law: SampleConfig) -> FloatRL:
  """Returns the recorded log-probs; their sum is that of tokens and positions."""
  if not law.order_logp:
    return rollouts.logp
  if not rollouts.more or 'order_logp' not in rollouts.more:
    raise ValueError('these rollouts lack the record that sampler.order_logp makes')
  return rollouts.logp + rollouts.more['order_logp']


def limits(
  cfg: ModelConfig, rollouts: Rollouts, now: BoolRKL, masked: BoolRKL, law: SampleConfig
) -> Array:
  """Returns orders.limits of recorded steps; now: the tokens that a copy's steps keep.

  masked: all that a copy masks.
  """
  rest = masked & ~now
  if cfg.block_causal and cfg.shift:  # the first token of a block came alone
    cut = now.reshape(*now.shape[:2], -1, law.block)
    begins = jnp.arange(cut.shape[2]) * law.block % cfg.block_causal == 0
    alone = cut[..., 0] & begins[None, None]
    rest &= ~jnp.repeat(alone, law.block, axis=-1)
  return orders.limits(rollouts.confidence, now, rest, law)


def passed_over(law: SampleConfig, logits: Array, judged: Array, limit: Array) -> Array:
  """Returns orders.below of a policy's logits; judged: of the one that sampled."""
  if law.rank_law == 'sampling':
    judged = model.sampling_logits(judged, law.temperature)
  return orders.below(model.sampling_logits(logits, law.temperature), judged, limit)


@dataclasses.dataclass(frozen=True)
class Along:
  """How log-probs are taken along the recorded steps."""

  states: int = 0  # steps of a row to visit, one from each even stratum; 0 = all
  u_R: FloatR | None = None  # U(0, 1), the rows' places within the strata
  policy: Params | None = None  # that sampled; None: it is the one that is scored


def packed_trajectory(
  cfg: ModelConfig, params: Params, rollouts: Rollouts, law: SampleConfig, how: Along
) -> tuple[FloatR, FloatR]:
  """Computes `trajectory_logp` of a block-causal model in one packed pass.

  Copy j holds the states of the j-th rounds of all blocks, W copies at most, of which
  how.states are visited. With law.order_logp the policy that sampled has a pass of its
  own, if it is another. ValueError with guidance.
  """
  if law.guidance:
    raise ValueError(
      f'sampler.guidance = {law.guidance} has no log-prob along the trajectory of a '
      'block-causal model: set 0, or logprob.estimator = elbo'
    )
  block, scale = cfg.block_causal, 1.0
  rounds_RxL = routing.rounds_of(rollouts.order, block)
  copies = jnp.broadcast_to(jnp.arange(block), (len(rounds_RxL), block))
  states, u_R, policy = how.states, how.u_R, how.policy
  if u_R is not None and 0 < states < block:
    copies = jnp.int32((jnp.arange(states)[None] + u_R[:, None]) / states * block)
    copies, scale = jnp.minimum(copies, block - 1), block / states
  rounds_RxKxL, copies = rounds_RxL[:, None], copies[:, :, None]
  masks = Masks(rounds_RxKxL >= copies, jnp.ones(copies.shape), routes=rollouts.routes)
  now = rounds_RxKxL == copies

  def look(params):
    args = cfg, params, rollouts.tokens, masks, rollouts.valid, None
    return layout.layout_of(cfg)(*args)

  h, targets, _ = look(params)
  logp = chosen_logp(cfg, params, h, targets, reader(cfg, law))['logp']
  mine = now if (made := made_of(rollouts)) is None else now & made[:, None]
  logp = jnp.where(mine, logp.reshape(now.shape), 0.0)
  if law.order_logp:
    theirs, whose = (h, params) if policy is None else (look(policy).hidden, policy)
    limit = limits(cfg, rollouts, now, masks.masked, law).reshape(targets.shape)

    def of_chunk(mine, theirs, limit):
      logits, judged = (
        model.without_mask(cfg, model.head(cfg, params, h))
        for params, h in ((params, mine), (whose, theirs))
      )
      return passed_over(law, logits, judged, limit)

    logp += in_chunks(cfg, of_chunk, h, theirs, limit).reshape(now.shape)
  old = jnp.where(now, recorded(rollouts, law)[:, None], 0.0)
  add = lambda x: scale * jnp.sum(x, axis=(1, 2))
  return add(logp), add(old)


def trajectory_logp(
  cfg: ModelConfig,
  params: Params,
  rollouts: Rollouts,
  law: SampleConfig,
  how: Along = Along(),
) -> tuple[FloatR, FloatR]:
  """Returns log-probs along the recorded steps: under `params`, and as recorded; nats.

  Where SampleConfig.order_from is 'state' or 'noise' their difference is the exact
  log-ratio of two normalised laws: the policy's own, and that of `params` with
  positions unmasked as the policy does (the frozen-scheduler ratio). Visits how.states
  of a row's S steps, weighted S/n: unbiased for both log-probs and for their
  difference.

  With law.order_logp the log-probs are of tokens and positions. `params` proposes, and
  how.policy, which sampled, ranks the proposals: both laws have the same support. Under
  a rank of its own a reference could not take a step that its tokens fail by a hair.

  With rollouts.routes the tokens go to the experts that the rollout chose, whatever
  `params` would choose.
  """
  if cfg.block_causal:
    return packed_trajectory(cfg, params, rollouts, law, how)
  states, u_R, policy = how.states, how.u_R, how.policy
  count_R = jnp.max(rollouts.order, axis=1) + 1
  if not states:

    def add(step, total):
      step_R = jnp.full_like(count_R, step)
      return total + state_logp(cfg, params, rollouts, step_R, law, policy)

    zero = jnp.zeros((2,) + count_R.shape, jnp.float32)
    return tuple(jax.lax.fori_loop(0, jnp.max(count_R), add, zero))

  def visit(j):
    step_R = jnp.floor((j + u_R) / states * count_R).astype(jnp.int32)
    step_R = jnp.minimum(step_R, count_R - 1)
    return state_logp(cfg, params, rollouts, step_R, law, policy)

  pair = jax.lax.map(visit, jnp.arange(states, dtype=jnp.float32))
  return tuple(jnp.sum(pair, axis=0) * count_R[None] / states)
