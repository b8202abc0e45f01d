"""diffu-GRPO (d1): PPO on one-step predictions of every token.

arXiv 2504.12216. log pi(x_i) is predicted with the whole completion masked and each
prompt token masked with chance `mask_prompt`, afresh for every update. The policy that
sampled and the reference see the same prompts.

  loss = sum [ -min(rho A, clip(rho) A) + beta k3 ] / tokens, A = r - mean

It ignores the completion's other tokens: biased as a likelihood. The mean is over the
batch's tokens, the release's over the tokens that one process holds. The release with
several accumulation steps reads only a part of its prompt masks; all are read here.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from dmpo_jax import masking
from dmpo_jax.objectives import shared
from dmpo_jax.rng import AnyKey
from dmpo_jax.types import IntR, Masks, Objective, Text, TrainBatch, ViewLogp, Wants


@dataclasses.dataclass(frozen=True)
class Config(shared.PenalisedGradient):
  clip: float = 0.5  # ratios are clipped below at 1 - clip
  beta: float = 0.04  # factor of the KL to the reference; 0 = off
  mask_prompt: float = 0.15  # chance of a prompt token to be masked; 0 = none


def draw(key: AnyKey, row_R: IntR, text: Text, hp: Any) -> Masks:
  """Draws one copy: all of the completion is masked, and a part of the prompt."""
  masked = jnp.ones_like(text.completion)[:, None]
  prompt = None
  if hp.mask_prompt:
    prompt = masking.draw_prompt(key, row_R, text.prompt, 1, hp.mask_prompt)
  masks = masking.per_copy(masked, jnp.ones(masked.shape[:2]))
  return masks._replace(counted=text.completion[:, None], prompt=prompt)


def loss(now: ViewLogp, masks: Masks, batch: TrainBatch, hp: Any) -> tuple:
  """Returns (sum over counted tokens, metrics)."""
  ref = batch.ref.logp if hp.beta else None
  return shared.token_loss(now.logp, batch.old.logp, ref, masks, batch, hp)


def wants(hp: Any) -> Wants:
  return Wants(views=('old', 'ref') if hp.beta else ('old',))


OBJECTIVE = Objective(
  Config,
  wants,
  draw,
  shared.weigh_tokens,
  loss,
  whole_text='it reads all tokens off the prompt alone, and blocks off what is before',
)
