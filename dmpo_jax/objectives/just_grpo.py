"""JustGRPO: GRPO on left-to-right conditionals, which are exact.

Completions are sampled one token after the other (sampler.block = 1), and
pi(x_k | x_<k) has all positions from k on masked. This is an autoregressive policy; its
gradient is averaged over a completion's tokens. choose = each with draws = 0: all
positions, a forward each. top: the `draws` of most entropy alone (the paper's fast
form, a quarter of them). uniform, entropy: `draws` of them, unbiased.
"""

import dataclasses
from typing import Any

from dmpo_jax.objectives import agrpo, shared
from dmpo_jax.rng import AnyKey
from dmpo_jax.types import IntR, Masks, Text


@dataclasses.dataclass(frozen=True)
class Config(agrpo.Config):
  advantage: str = 'zscore'  # reward less: mean | loo | zscore | prefix
  kl: str = 'k3'  # estimator of the KL: k1 | k2 | k3 | k3_ratio
  # Which tokens stand for all: each | uniform | entropy | top | first.
  choose: str = 'each'
  draws: int = 0  # tokens of a row per update; 0 with choose = each: all


def draw(key: AnyKey, row_R: IntR, text: Text, hp: Config) -> Masks:
  """Draws the states before the chosen tokens."""
  wanted = shared.shown_steps(text.record, text.completion)
  return shared.draw_steps(key, row_R, text.record, wanted, hp)


def sampler_problems(sampler: Any) -> list[str]:
  if sampler.block == 1:
    return []
  return [f'sampler.block = {sampler.block}: set 1, tokens from left to right']


OBJECTIVE = agrpo.OBJECTIVE._replace(
  Config=Config,
  draw=draw,
  sampler=dict(pick='confidence', block=1),
  sampler_problems=sampler_problems,
)
