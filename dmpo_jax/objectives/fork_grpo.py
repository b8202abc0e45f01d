"""ForkGRPO: GRPO on the tokens where no prediction was sure enough.

The sampler takes all tokens over its threshold, and where there is none the
leftmost mask (pick threshold, fallback leftmost): those are what is trained on,
a completion's mean over them; the rest is the environment. Their log-probs are
exact, given the states, where sureness is of the state alone (rank = max).
With fallback = best it is FastGRPO, which is said to collapse. A row with more
of them than `draws` is represented by as many, evenly spread.
"""

import dataclasses

from dmpo_jax.objectives import agrpo, shared


@dataclasses.dataclass(frozen=True)
class Config(agrpo.Config):
  advantage: str = 'zscore'
  kl: str = 'k3'
  choose: str = 'each'
  draws: int = 16


def draw(key, row_R, completion_RxL, hp, record):
  """The states before the chosen fallbacks."""
  wanted = shared.shown_steps(record, record['fallback'] & completion_RxL)
  return shared.draw_steps(key, row_R, record, wanted, hp)


def needs(hp):
  return agrpo.needs(hp) | {'fallback'}


def check(hp):
  found = agrpo.check(hp)
  if hp.draws < 1 and not found:
    found.append('objective.draws = 0 must be >= 1: a fork has few tokens')
  return found


OBJECTIVE = agrpo.OBJECTIVE._replace(hp=Config, draw=draw, needs=needs, check=check)
