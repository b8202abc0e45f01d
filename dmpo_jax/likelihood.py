"""Log-likelihoods of given texts: an ELBO, or exactly along a greedy trajectory.

Training estimates log-probs of its own rollouts in score.py. Here are the numbers that
evaluations compare: of answers that somebody else wrote, of unequal lengths.

elbo        the mean over `draws` masked copies of n / m times the sum of the log-probs
            of the m masked tokens, m uniform in 1..n. This is LLaDA's estimate
            (eval_llada.py, get_loglikelihood), with m stratified over all copies. A
            block-causal model draws m for each attention block. As there and in
            training, the mask token has a share of the probability.
trajectory  the exact log-prob of the law that unmasks as the greedy sampler does and
            draws tokens at temperature 1 (sampler.follow). No sampler emits the mask
            token, so it has no share.

A text's number depends on its canvas and its row id, not on the texts beside it.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dmpo_jax import layout, logprob, masking, model, rng, rules, sampler
from dmpo_jax.rng import AnyKey
from dmpo_jax.sampler import SampleConfig
from dmpo_jax.types import (
  GIVEN,
  Array,
  BoolR,
  BoolRKL,
  BoolRP,
  Canvas,
  FloatR,
  FloatRKL,
  Given,
  IntR,
  IntRL,
  IntRP,
  Masks,
  Params,
  Rollouts,
  Sampled,
)

UNIT = 16  # lengths of canvases are multiples, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Likelihood(rules.Section):
  """How the log-likelihood of a given text is computed."""

  NAME = 'likelihood'
  OWN = {'by': rules.one_of('elbo', 'trajectory'), 'draws': rules.least(1)}

  by: str = 'elbo'  # elbo | trajectory
  draws: int = 32  # elbo: masked copies of a text


@dataclasses.dataclass(frozen=True)
class Program:
  """What a compiled function of this file depends on, beside shapes."""

  how: Likelihood
  law: SampleConfig  # the evaluation's sampler: its guidance, and its trajectory
  length: int  # L, tokens of the canvas
  copies: int  # elbo: copies of a text that are computed at once; divides how.draws


def unit_of(cfg: model.ModelConfig, law: SampleConfig, count: int) -> int:
  """Returns what the length of the canvas of `count` tokens is a multiple of."""
  if cfg.block_causal:
    return math.lcm(UNIT, cfg.block_causal)
  return math.lcm(UNIT, law.block) if count > law.block else UNIT


def canvas_length(
  cfg: model.ModelConfig, law: SampleConfig, prompt: int, count: int
) -> int:
  """Returns the length of the canvas of a completion of `count` tokens.

  prompt: tokens before it, some of which share an attention block of a block-causal
  model with it; -1 = as many as may be.
  """
  if cfg.block_causal and cfg.block_grid == 'text':
    count += prompt % cfg.block_causal
  unit = unit_of(cfg, law, count)
  return -(-max(count, 1) // unit) * unit


def place(
  cfg: model.ModelConfig, prompts_RxP: IntRP, valid_RxP: BoolRP, answers_RxL: IntRL
) -> Given:
  """Puts completions behind left-padded prompts, on a canvas of L tokens.

  answers_RxL: completions from the first column on, then -1. Those of a block-causal
  model may share their first attention block with the prompt's end.
  """
  length = answers_RxL.shape[1]
  found = sampler.lay_out(cfg, prompts_RxP, valid_RxP, length)
  at = jnp.arange(length)[None] - jnp.sum(found.given, axis=1, keepdims=True)
  text = jnp.take_along_axis(answers_RxL, jnp.maximum(at, 0), axis=1)
  own = (at >= 0) & (text >= 0)
  blank = jnp.where(found.given, found.tokens[:, -length:], cfg.pad_id)
  tail, real = jnp.where(own, text, blank), own | found.given
  return Given(
    jnp.concatenate([found.tokens[:, :-length], tail], axis=1),
    jnp.concatenate([found.valid[:, :-length], real], axis=1),
    own,
  )


def as_sampled(
  cfg: model.ModelConfig,
  prompts_RxP: IntRP,
  valid_RxP: BoolRP,
  answers_RxL: IntRL,
  row_R: IntR,
) -> Sampled:
  """Returns given completions as if they had been sampled, all in one step.

  answers_RxL: -1 where a sampler left a mask (sampler.eos_stop). They are laid out as
  the sampler lays out its own.
  """
  found = sampler.lay_out(cfg, prompts_RxP, valid_RxP, answers_RxL.shape[1])
  length = answers_RxL.shape[1]
  at = jnp.arange(length)[None] - jnp.sum(found.given, axis=1, keepdims=True)
  text = jnp.take_along_axis(answers_RxL, jnp.maximum(at, 0), axis=1)
  given = jnp.where(found.given, found.tokens[:, -length:], cfg.eos_id)
  tail = jnp.where(found.given | (text < 0), given, text)
  order = jnp.where(found.given, GIVEN, jnp.where(text < 0, -1, 0))
  own, zeros = ~found.given, jnp.zeros(order.shape)
  rollouts = Rollouts(
    jnp.concatenate([found.tokens[:, :-length], tail], axis=1),
    found.valid,
    order,
    logp=zeros,
    forwards=jnp.int32(0),
    confidence=zeros,
  )
  stop = model.is_stop(cfg, tail) & own
  return Sampled(rollouts, masking.completion_mask(stop) & own, row_R)


def text_logp(
  cfg: model.ModelConfig, params: Params, text: Given, rows: tuple, program: Program
) -> tuple[FloatR, BoolR]:
  """Returns the log-likelihoods of texts in nats, and which greedy decoding writes.

  rows: (key, row ids). By ELBO nothing is decoded, and all texts count as not greedy.
  """
  key, row_R = rows
  chunk = math.gcd(cfg.head_chunk, program.length)
  cfg = dataclasses.replace(cfg, head_chunk=chunk)
  if program.how.by == 'trajectory':
    greedy = sampler.following(program.law, program.length, cfg.block_causal)
    return sampler.follow(cfg, params, text, rng.row_keys(key, row_R), greedy)
  return elbo(cfg, params, text, (key, row_R), program), jnp.zeros(len(row_R), bool)


def elbo(
  cfg: model.ModelConfig,
  params: Params,
  text: Given,
  rows: tuple[AnyKey, IntR],
  program: Program,
) -> FloatR:
  """Returns the ELBOs of texts in nats; `program.copies` copies go at once."""
  draws, guidance = program.how.draws, program.law.guidance
  canvas = Canvas(program.length, cfg.block_causal or program.length, text.own)
  masks = masking.draw_blocks(*rows, canvas, draws, spread=True)

  def of_chunk(part: tuple[BoolRKL, FloatRKL]) -> Array:
    masked, weight = part
    if guidance:
      logp = guided_logp(cfg, params, text, masked, guidance)
    else:
      seen = Masks(masked, weight)
      logp = logprob.view_logp(cfg, params, text.tokens, seen, text.valid).logp
    return jnp.sum(logprob.copy_sums(logp, weight), axis=1)

  cut = lambda x: jnp.stack(jnp.split(x, draws // program.copies, axis=1))
  sums = jax.lax.map(of_chunk, (cut(masks.masked), cut(masks.weight)))
  return jnp.sum(sums, axis=0) / draws


def guided_logp(
  cfg: model.ModelConfig,
  params: Params,
  text: Given,
  masked_RxKxL: BoolRKL,
  guidance: float,
) -> FloatRKL:
  """Returns the log-probs of masked tokens under classifier-free guidance.

  A second row has its prompt masked (LLaDA eval_llada.py, get_logits). ValueError for
  a block-causal model, whose copies share their prompt.
  """
  if cfg.block_causal:
    raise ValueError(
      f'sampler.guidance = {guidance} has no ELBO of a model that attends in blocks of '
      f'{cfg.block_causal}: set 0'
    )
  rows, draws, length = masked_RxKxL.shape
  repeat = lambda x: jnp.repeat(x, draws, axis=0)
  noisy = layout.apply_masks(text.tokens, masked_RxKxL, cfg.mask_id)
  noisy, start = noisy.reshape(rows * draws, -1), text.tokens.shape[1] - length
  h, _ = model.window_logits(
    cfg,
    params,
    noisy,
    repeat(text.valid),
    start,
    length,
    start,
    guidance,
    as_states=True,
  )
  logits = model.guided(model.head(cfg, params, h), guidance)
  logp = model.logp_of(logits, repeat(text.tokens[:, start:]))
  return jnp.where(masked_RxKxL, logp.reshape(masked_RxKxL.shape), 0.0)
