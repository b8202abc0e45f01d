"""ForkGRPO: GRPO on the tokens at which no prediction was sure enough.

Fork-dLLM. The sampler takes all tokens over its threshold. Where there is none it takes
the leftmost mask (pick threshold, fallback leftmost). Those fallback tokens are what is
trained on, as a mean over a completion's; the others count as environment. Their
log-probs are exact, given the states, where the threshold looks at the state alone
(rank = max). With fallback = best it is FastGRPO, which is said to collapse. A row with
more of them than `draws` is represented by as many, evenly spread.
"""

import dataclasses
from typing import Any

from dmpo_jax.objectives import agrpo, shared
from dmpo_jax.rng import AnyKey
from dmpo_jax.types import IntR, Masks, Text, Wants


@dataclasses.dataclass(frozen=True)
class Config(agrpo.Config):
  advantage: str = 'zscore'  # reward less: mean | loo | zscore | prefix
  kl: str = 'k3'  # estimator of the KL: k1 | k2 | k3 | k3_ratio
  # Which fallbacks stand for all: each | uniform | entropy | top | first.
  choose: str = 'each'
  draws: int = 16  # fallbacks of a row per update

  def rules(self) -> dict:
    return super().rules() | {'draws': shared.least(1)}  # a fork has few tokens


def draw(key: AnyKey, row_R: IntR, text: Text, hp: Config) -> Masks:
  """Draws the states before the chosen fallbacks."""
  fallback = text.record.more['fallback'] & text.completion
  wanted = shared.shown_steps(text.record, fallback)
  return shared.draw_steps(key, row_R, text.record, wanted, hp)


def wants(hp: Config) -> Wants:
  base = agrpo.wants(hp)
  return dataclasses.replace(base, records=(*(base.records or ()), 'fallback'))


def sampler_problems(sampler: Any) -> list[str]:
  if sampler.pick == 'threshold':
    return []
  return [f'sampler.pick = {sampler.pick}: set threshold, whose fallbacks are trained']


OBJECTIVE = agrpo.OBJECTIVE._replace(
  Config=Config,
  draw=draw,
  wants=wants,
  sampler=dict(pick='threshold', threshold=0.8, fallback='leftmost'),
  sampler_problems=sampler_problems,
)
