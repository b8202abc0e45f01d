"""One optimizer update: pure functions, which build.py compiles.

`train_step` draws masks, reads log-probs, adds up the objective's loss over
microbatches, and steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dmpo_jax import logprob, masking, model, optim, rng, routing
from dmpo_jax.control import Controller
from dmpo_jax.logprob import LogprobConfig
from dmpo_jax.mesh import join_rows, split_rows
from dmpo_jax.model import ModelConfig
from dmpo_jax.objectives.shared import Common, surrogate
from dmpo_jax.rng import AnyKey
from dmpo_jax.sampler import SampleConfig
from dmpo_jax.types import (
  Array,
  BoolRL,
  BoolRS,
  Canvas,
  FloatR,
  Future,
  IntR,
  IntRS,
  KeyR,
  Lesson,
  Masks,
  Objective,
  Params,
  Record,
  Routes,
  Text,
  TrainBatch,
  TrainState,
  ViewLogp,
  Wants,
)


@dataclasses.dataclass(frozen=True)
class Setup:
  """What stays the same from update to update."""

  cfg: ModelConfig
  objective: Objective
  hp: Any  # the objective's Config
  group: int = 1  # G
  inner: int = 1  # I, updates per buffer
  microbatches: int = 1  # M
  law: SampleConfig | None = None  # the sampler's; needed by trajectory and Wants.law
  logprob: LogprobConfig = LogprobConfig()
  common: Common = Common()
  experts: routing.Config = routing.Config()
  # Whether all of logp_old, logp_ref and old.elbo are computed, wanted or not, and
  # updates report metrics['elbo_drift'].
  measure: bool = False
  weights: tuple[float, ...] = (1.0,)  # p_ref is the mean of p_k by these weights
  mean: str = 'geometric'  # or harmonic: see score.mixed
  clip: float = 0.0  # nats that a log p_k may lie off the first's; 0 = any
  optimizer: Any = None  # an optax.GradientTransformation
  moves: tuple[int, float] | None = None  # (every, mix) of a moving reference
  control: Controller | None = None  # None: all rows have the sampler's own number

  @property
  def wants(self) -> Wants:
    return self.objective.wants(self.hp)

  @property
  def records(self) -> tuple[str, ...]:
    """What rollouts record of their steps: names for `sampler.sample`."""
    return (*(self.wants.records or ()), *['routes'] * self.experts.records)

  @property
  def drift(self) -> bool:
    """Whether updates report the drift of the policy's ELBO."""
    return self.measure or 'old' in self.wants.elbo


class Rows(NamedTuple):
  """The fields of a batch that a pass of the network needs; so has TrainBatch."""

  tokens: IntRS
  valid: BoolRS
  completion: BoolRL
  row: IntR
  sampled: BoolRL | None
  record: Record | None
  routes: Routes | None
  made: BoolRL | None = None


def init_state(trainable: Params, optimizer: Any) -> TrainState:
  return TrainState(jnp.int32(0), trainable, optimizer.init(trainable))


# --- microbatches


def split_batch(batch: TrainBatch, microbatches: int) -> TrainBatch:
  """Cuts a batch into microbatches on a new leading axis; each keeps the scalars."""
  whole = lambda x: jnp.broadcast_to(x, (microbatches,))
  return jax.tree.map(
    lambda x: split_rows(x, microbatches) if x.ndim else whole(x), batch
  )


# --- one pass under the loss's masks


def canvas_of(cfg: ModelConfig, rows: Any) -> Canvas:
  """Returns where masks may stand in the completions of Rows or a TrainBatch."""
  length = rows.completion.shape[1]
  return Canvas(length, cfg.block_causal, rows.sampled if cfg.block_causal else None)


def draw(setup: Setup, key: AnyKey, rows: Any) -> Masks:
  """Draws the loss's masks of Rows or a TrainBatch."""
  length = rows.completion.shape[1]
  text = Text(
    rows.completion,
    rows.tokens[:, -length:] != setup.cfg.eos_id,
    rows.valid[:, :-length],
    setup.law.block if setup.law else length,
    canvas_of(setup.cfg, rows),
    rows.record,
  )
  masks = setup.objective.draw(key, rows.row, text, setup.hp)
  masks = masks._replace(sampled=rows.sampled, made=rows.made, routes=rows.routes)
  if rows.made is not None and masks._asdict()['counted'] is not None:
    masks = masks._replace(counted=masks.counted & rows.made[:, None])
  return masks


def view(
  setup: Setup, params: Params, key: AnyKey, rows: Any, dropout: bool = False
) -> tuple[ViewLogp, Masks]:
  """Returns what `params` says of the masked copies that `key` draws, and the masks."""
  wants, masks = setup.wants, draw(setup, key, rows)
  keys = rng.row_keys(rng.substream(key, 'dropout'), rows.row)
  read = logprob.reader(setup.cfg, setup.law if wants.law else None, wants.reads)
  found = logprob.view_logp(
    setup.cfg,
    params,
    rows.tokens,
    masks,
    rows.valid,
    dropout_R=keys if dropout else None,
    read=read,
  )
  return found, masks


# --- the update


def at_inner(batch: TrainBatch, inner: Any) -> TrainBatch:
  """Takes the views of this inner update: their axis I goes."""
  take = lambda views: jax.tree.map(lambda x: x[:, inner], views)
  return batch._replace(old=take(batch.old), ref=take(batch.ref))


def anchor(setup: Setup, params: Params, batch: TrainBatch, key: AnyKey) -> Array:
  """Returns -coef times the mean ELBO per token of the rollouts (DiPOD)."""
  common, length = setup.common, batch.completion.shape[1]
  masks = masking.draw_stratified(
    rng.substream(key, 'anchor'),
    batch.row,
    canvas_of(setup.cfg, batch),
    common.elbo_draws,
  )
  masks = masks._replace(sampled=batch.sampled, made=batch.made)
  elbo = logprob.elbo(setup.cfg, params, batch.tokens, batch.valid, masks) / length
  return -common.elbo_coef * jnp.sum(elbo) / batch.total


def steer(law: Controller, trainable: Params, batch: TrainBatch) -> tuple[Array, dict]:
  """Returns the controller's loss, and metrics that add up over microbatches.

  gradient: -sum of weight times the clipped ratio. Else the cross-entropy with the
  target weights. There the ratio times `level` is a control variate: the mean of its
  gradient is zero under the law that drew u.
  """
  params, rows = trainable[optim.CONTROL], batch.control
  assert rows is not None and rows.weight is not None
  mean, sigma = law.mean(params, rows.features, len(rows.u)), law.sigma(params)
  logp = law.logp(rows.u, mean, sigma)
  gap = logp - rows.logp
  if rows.level is None:
    gain = surrogate(gap, rows.weight, law.hp.clip, law.hp.clip)
  else:
    gain = rows.weight * logp - rows.level * jnp.exp(jnp.minimum(gap, 20.0))
  loss = -jnp.sum(gain) / batch.norm
  if law.hp.learn_sigma:
    loss += law.hp.pull * jnp.sum(law.kl(mean, sigma)) / batch.total
  return loss, {
    'control/mean': jnp.sum(mean) / batch.total,
    'control/sigma': sigma * len(mean) / batch.total,
    'control/ratio_log_abs': jnp.sum(jnp.abs(gap)) / batch.total,
  }


def reweighed(
  setup: Setup, params: Params, batch: TrainBatch, key: AnyKey
) -> TrainBatch:
  """Returns the batch with weights that depend on the current policy.

  A pass without gradient over all rows comes first, so that the softmax over a group
  is whole however the rows are cut into microbatches.
  """

  def elbo(part):
    now, masks = view(setup, params, key, part)
    return logprob.seq_elbo(now.logp, masks.weight)

  elbo_R = join_rows(jax.lax.map(elbo, split_batch(batch, setup.microbatches)))
  reweigh: Any = setup.objective.reweigh
  return batch._replace(weight=reweigh(elbo_R, batch, setup.group, setup.hp))


def train_step(
  state: TrainState,
  frozen: Params,
  batch: TrainBatch,
  key: AnyKey,
  inner: Any,
  setup: Setup,
) -> tuple[TrainState, dict]:
  """Makes one update on a TrainBatch; returns (TrainState, metrics).

  key and inner address the masks. The microbatches add up to the whole batch's
  gradient exactly, because losses are sums over a fixed norm. If loss or gradient is
  not finite the state is returned unchanged, with metrics['finite'] = 0.
  metrics['elbo_drift'] is the mean over rows of the policy's ELBO less batch.old.elbo,
  nats, where setup.drift.
  """
  key = jax.random.fold_in(key, inner)
  batch, wants = at_inner(batch, inner), setup.wants
  if wants.reweigh:
    batch = reweighed(setup, {**frozen, **state.trainable}, batch, key)
  if wants.fresh:
    key = rng.substream(key, 'fresh')
  adapters = 'lora' in state.trainable  # routers are part of the base
  factor = 0.0 if adapters else setup.experts.factor('rl', setup.cfg.load_loss)

  def loss_fn(trainable, part):
    params = {**frozen, **trainable}
    if not setup.experts.trains('rl'):
      params = routing.still(params)
    now, masks = view(setup, params, key, part, bool(setup.cfg.lora_dropout))
    loss, metrics = setup.objective.loss(now, masks, part, setup.hp)
    if now.routed is not None:
      more, load = of_load(setup.cfg, now.routed, len(part.row), factor)
      loss, metrics = loss + more / part.total, {**metrics, LOAD: load}
    if setup.drift:
      gap = jnp.sum(logprob.seq_elbo(now.logp, masks.weight) - part.old.elbo)
      metrics = {**metrics, 'elbo_drift': gap / part.total}
    if setup.common.elbo_coef:
      loss += anchor(setup, params, part, key)
    if setup.control:
      value, numbers = steer(setup.control, trainable, part)
      loss, metrics = loss + value, {**metrics, **numbers}
    return loss, metrics

  parts = split_batch(batch, setup.microbatches)
  new, metrics = update(state, loss_fn, parts, setup.optimizer)
  metrics = with_load(metrics)
  if setup.moves:
    new = optim.follow(state, new, *setup.moves)
  return new, metrics


LOAD = 'load'  # among the metrics of a microbatch: tokens of each expert, (N, E)


def of_load(
  cfg: ModelConfig, routed: model.Routed, rows: int, factor: float
) -> tuple[Array, Array]:
  """Returns the load loss of a pass of `rows` rows, and the tokens of each expert.

  The loss is the sum over rows of the mean over layers, times `factor`. A row balances
  its own tokens, so that microbatches add up to the batch. Its copies count as one.
  """
  balance = jax.vmap(lambda *x: model.balance_loss(cfg, *x), 1)
  loss_RxN = balance(routed.load, routed.mass)
  loss = factor * jnp.sum(jnp.mean(loss_RxN, axis=1)) * rows / len(loss_RxN)
  return loss, jnp.sum(routed.load, axis=1)


def with_load(metrics: dict[str, Any]) -> dict[str, Any]:
  """Replaces the tokens of each expert by what they say of the load."""
  count = metrics.pop(LOAD, None)
  return metrics if count is None else metrics | routing.load_metrics(count)


def update(
  state: TrainState, loss_fn: Callable, parts: Any, optimizer: Any
) -> tuple[TrainState, dict]:
  """Adds loss_fn's gradients over the leading axis of `parts`, then steps."""
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

  def add(total, part):
    (loss, metrics), grad = grad_fn(state.trainable, part)
    return jax.tree.map(jnp.add, total, (loss, metrics, grad)), None

  first = jax.tree.map(lambda x: x[0], parts)
  shapes = jax.eval_shape(grad_fn, state.trainable, first)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (*shapes[0], shapes[1]))
  (loss, metrics, grad), _ = jax.lax.scan(add, zeros, parts)
  norm = optax.tree.norm(optim.of_model(grad))
  if own := optim.of_control(grad):
    metrics = {**metrics, 'control/grad_norm': optax.tree.norm(own)}
  updates, opt_state = optimizer.update(grad, state.opt_state, state.trainable)
  trainable: Any = optax.apply_updates(state.trainable, updates)
  new = TrainState(state.step + 1, trainable, opt_state)
  finite = jnp.isfinite(loss + optax.tree.norm(grad) + optax.tree.norm(updates))
  new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
  numbers = {'loss': loss, 'grad_norm': norm, 'finite': finite.astype(jnp.float32)}
  return new, {**metrics, **numbers}


# --- supervised


@dataclasses.dataclass(frozen=True)
class SftSetup:
  """What stays the same from one supervised step to the next."""

  cfg: ModelConfig
  # Tokens that masks are drawn for, so that they do not depend on a batch's padding.
  length: int
  optimizer: Any
  microbatches: int = 1
  rates: masking.Rates = masking.Rates()
  by_token: bool = False  # the mean over learned tokens, else over rows
  share: Any = None  # of the later tokens that are seen; None: the model's attention
  experts: routing.Config = routing.Config()


def aligned(cfg: ModelConfig, lesson: Lesson) -> Lesson:
  """Moves prompts with completions so that the canvas begins an attention block.

  Texts that are learned from their first column on lie so already.
  """
  length, block = lesson.learn.shape[2], cfg.block_causal
  if not block or lesson.tokens.shape[1] == length:
    return lesson
  tokens, valid, given = model.align(
    cfg, lesson.tokens, lesson.valid, length, length + block
  )
  learn = (valid[:, -given.shape[1] :] & ~given)[:, None]
  return lesson._replace(tokens=tokens, valid=valid, learn=learn)


def lesson_masks(
  cfg: ModelConfig, lesson: Lesson, length: int, draw: Callable[[int, Canvas], Masks]
) -> Masks:
  """Returns the masks of a lesson's copies; draw: (copy, Canvas) -> one copy's.

  In the last attention block of a turn all that follows it is masked, too, as it is
  where the turn is sampled. Without that the turn would see what comes after it.
  """
  copies, size = lesson.learn.shape[1:]
  found = []
  for k in range(copies):
    free = jnp.pad(lesson.learn[:, k], ((0, 0), (0, length - size)))
    found.append(draw(k, Canvas(length, cfg.block_causal, free)))
  masked = jnp.concatenate([one.masked[:, :, :size] for one in found], axis=1)
  weight = jnp.concatenate([one.weight[:, :, :size] for one in found], axis=1)
  if cfg.block_causal:
    blocks = lesson.learn.reshape(*lesson.learn.shape[:2], -1, cfg.block_causal)
    upto = jnp.flip(jax.lax.cummax(jnp.flip(blocks, -1).astype(jnp.int8), axis=3), -1)
    after = jnp.any(blocks, axis=-1, keepdims=True) & (upto == 0)
    masked |= after.reshape(masked.shape)
    weight = jnp.where(lesson.learn, weight, 0.0)
  return Masks(masked, weight)


def lesson_nll(
  cfg: ModelConfig,
  params: Params,
  lesson: Lesson,
  masks: Masks,
  dropout_R: KeyR | None = None,
) -> tuple[FloatR, Any]:
  """Returns the negative ELBO of the learned tokens of each row, nats.

  Also where tokens were sent, with cfg.keep_routes (model.Routed).
  """
  found = logprob.view_logp(
    cfg, params, lesson.tokens, masks, lesson.valid, dropout_R=dropout_R
  )
  nll = -logprob.seq_elbo(found.logp, masks.weight) * masks.masked.shape[1]
  return nll, found.routed


def sft_step(
  state: TrainState, frozen: Params, lesson: Lesson, key: AnyKey, setup: SftSetup
) -> tuple[TrainState, dict]:
  """Makes one step of LLaDA's SFT loss: the sum of CE / p over the masks, per token.

  A row counts by its mean over its learned tokens, or all tokens of the batch count
  alike (setup.by_token, as d1's trainer divides). The state holds adapters, or all of
  the base: then adapters of setup.cfg are left out, under which no kernel has a
  gradient.
  """
  cfg, rows = setup.cfg, lesson.tokens.shape[0]
  factor = setup.experts.factor('sft', cfg.load_loss)
  if 'lora' not in state.trainable:
    cfg = dataclasses.replace(cfg, lora_rank=0)
  else:  # routers are part of the base
    factor = 0.0
  total = jnp.maximum(jnp.sum(lesson.learn), 1)

  def draw(k, canvas, row):
    copy = jax.random.fold_in(rng.substream(key, 'turns'), k) if k else key
    return masking.draw_sft(copy, row, canvas, setup.rates)

  def loss_fn(trainable, part):
    params = {**frozen, **trainable}
    if not setup.experts.trains('sft'):
      params = routing.still(params)
    part = aligned(cfg, part)
    length = max(setup.length, part.learn.shape[2])
    masks = lesson_masks(cfg, part, length, lambda k, where: draw(k, where, part.row))
    if setup.share is not None:
      seen_by = rng.row_keys(rng.substream(key, 'anneal'), part.row)
      masks = masks._replace(future=Future(seen_by, setup.share))
    keys = None
    if cfg.lora_rank and cfg.lora_dropout:
      keys = rng.row_keys(rng.substream(key, 'dropout'), part.row)
    nll, routed = lesson_nll(cfg, params, part, masks, keys)
    if setup.by_token:
      loss = jnp.sum(nll) / total
    else:
      count = jnp.maximum(jnp.sum(part.learn, axis=(1, 2)), 1)
      loss = jnp.sum(nll / count) / rows
    if routed is None:
      return loss, {}
    more, load = of_load(cfg, routed, len(part.row), factor)
    return loss + more / rows, {LOAD: load}

  parts = jax.tree.map(lambda x: split_rows(x, setup.microbatches), lesson)
  state, metrics = update(state, loss_fn, parts, setup.optimizer)
  return state, with_load(metrics)


def held_out(
  params: Params, lesson: Lesson, key: AnyKey, setup: SftSetup, levels: int
) -> tuple[Array, Array]:
  """Returns the negative ELBO of a lesson, summed over rows, and its learned tokens.

  The mean over a fixed grid of masked shares, (j + 1/2) / levels, each under masks that
  depend on the row alone: the same at every call.
  """
  cfg, row = setup.cfg, lesson.row
  lesson = aligned(cfg, lesson)
  length = max(setup.length, lesson.learn.shape[2])

  def of_level(level):
    def draw(k, canvas):
      canvas = canvas._replace(block=canvas.block or canvas.length)
      at = jax.random.fold_in(rng.substream(key, 'held_out'), k)
      return masking.draw_blocks(at, row, canvas, 1, level=level)

    masks = lesson_masks(cfg, lesson, length, draw)
    return lesson_nll(cfg, params, lesson, masks)[0]

  nll = jax.lax.map(of_level, (jnp.arange(levels) + 0.5) / levels)
  return jnp.sum(jnp.mean(nll, axis=0)), jnp.sum(lesson.learn)
