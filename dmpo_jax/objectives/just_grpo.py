"""JustGRPO: GRPO on left-to-right conditionals, which are exact.

Completions are sampled one token after the other (sampler.block = 1), and
pi(x_k | x_<k) has all from k on masked: an autoregressive policy, whose
gradient this is, averaged over a completion's tokens. choose = each with
draws = 0: all positions, a forward each. top: the `draws` of most entropy
alone (the paper's fast form, a quarter of them). uniform, entropy: `draws`
of them, unbiased.
"""

import dataclasses

from dmpo_jax.objectives import agrpo, shared


@dataclasses.dataclass(frozen=True)
class Config(agrpo.Config):
  advantage: str = 'zscore'
  kl: str = 'k3'
  choose: str = 'each'
  draws: int = 0


def draw(key, row_R, completion_RxL, hp, record):
  """The states before the chosen tokens."""
  wanted = shared.shown_steps(record, completion_RxL)
  return shared.draw_steps(key, row_R, record, wanted, hp)


def needs(hp):
  return agrpo.needs(hp) | {'left_to_right'}


OBJECTIVE = agrpo.OBJECTIVE._replace(hp=Config, draw=draw, needs=needs)
