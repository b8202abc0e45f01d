"""diffu-GRPO (d1): PPO on one-step predictions of every token.

arXiv 2504.12216. log pi(x_i) is predicted with the whole completion masked and
each prompt token masked with chance `mask_prompt`, afresh for every update;
the policy that sampled and the reference see the same prompts.

  loss = sum [ -min(rho A, clip(rho) A) + beta k3 ] / tokens, A = r - mean

It ignores what the completion says: biased as a likelihood. The mean is over
the batch's tokens, the release's over what one process holds; the release with
several accumulation steps reads only a part of its prompt masks, all are read
here.
"""

import dataclasses

import jax.numpy as jnp

from dmpo_jax import masking
from dmpo_jax.objectives import shared
from dmpo_jax.types import Masks, Objective


@dataclasses.dataclass(frozen=True)
class Config:
  advantage: str = 'mean'
  clip: float = 0.5
  clip_high: float = 0.0
  beta: float = 0.04
  kl: str = 'k3'
  mask_prompt: float = 0.15


def draw(key, row_R, completion_RxL, hp, record=None):
  """One view: all of the completion masked, a part of the prompt too."""
  masked = jnp.ones_like(completion_RxL)[:, None]
  prompt = None
  if hp.mask_prompt:
    prompt = masking.draw_prompt(key, row_R, record['prompt'], 1, hp.mask_prompt)
  return Masks(masked, jnp.ones(masked.shape[:2]), completion_RxL[:, None], prompt)


def loss(logp_RxKxL, masks, batch, elbo_old_R, hp):
  """(sum over counted tokens, metrics)."""
  old = batch.extra['tokens_old']
  value = shared.terms(
    logp_RxKxL, old, batch, hp, batch.extra['tokens_ref'] if hp.beta else None
  )
  return shared.total(value, masks, batch), shared.gap_metrics(
    logp_RxKxL, old, masks.counted, batch
  )


def needs(hp):
  return (
    {'tokens_old'}
    | ({'tokens_ref'} if hp.beta else set())
    | ({'prompt'} if hp.mask_prompt else set())
  )


def check(hp):
  return shared.ratio_rules(hp) + shared.complain(hp, mask_prompt=shared.chance)


OBJECTIVE = Objective(
  hp=Config,
  needs=needs,
  check=check,
  draw=draw,
  weigh=shared.weigh_tokens,
  reweigh=shared.no_reweigh,
  loss=loss,
)
