"""TraceRL: PPO on all recorded rounds, with a KL to the policy that sampled.

arXiv 2509.06949, by its released code (dLLM-RL, train/rl_sdar.py). Copy j of a
completion masks, in every attention block, the tokens that the sampler unmasked in
round j or later, and the tokens of round j are trained. All copies are one packed pass.
With N the rows of a buffer and L the length of a completion:

  loss = 1/(N L) sum over tokens of [ -min(rho A, clip(rho) A) + beta k3(theta || old) ]

A token's states are those that were sampled, and its log-prob is that of the sampling
law. With one update on a buffer rho is 1, and the gradient is -sum A grad log p along
the recorded states. `shrink` merges so many consecutive rounds into one: 1 for block
models; 8 for models that see the whole text (LLaDA), whose rounds are the row's steps.
Then log p_old is computed again in the merged states. Otherwise it is the record, which
the trainer's equals. `draws` rounds of a row stand for all, unbiased; 0 = all.

Where we differ from the released code:
* The value model (train_trado_value.py) is left out: all tokens share A.
* norm = constant divides by N L. The release has a row for each round and takes the
  mean over rows (norm = released): the number of rounds, not of completions, divides.
  Its L is the longest padded answer of the data set.
* Of models that see the whole text the release averages the policy term over a round's
  tokens, but adds up the KL. Here both are sums.
* It samples with blocks counted from the text's start (grid A) and trains with blocks
  counted from the prompt's end (B). It cuts the last block at the stop id, and encodes
  completions again from their text. So it may train other states than were sampled.
* It clips log rho to +-10; here rho is at most e^20.
* It keeps prompts of accuracy 0.2 to 0.8 only; `skip_equal` leaves out 0 and 1.
* Tokens behind the first stop are masked as they were, but not trained (its post_num =
  0); loss_tail = True trains them.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from dmpo_jax.objectives import shared
from dmpo_jax.rng import AnyKey
from dmpo_jax.types import (
  GIVEN,
  Array,
  BoolRL,
  IntR,
  IntRL,
  Masks,
  Objective,
  Scored,
  Text,
  TrainBatch,
  ViewLogp,
  Wants,
  to_groups,
)


@dataclasses.dataclass(frozen=True)
class Config(shared.StepCredit, shared.PenalisedGradient):
  OWN = {
    'shrink': shared.least(1),
    'draws': shared.least(0),
    'norm': shared.one_of('constant', 'released'),
  }
  advantage: str = 'zscore'  # reward less: mean | loo | zscore | prefix
  beta: float = 0.01  # factor of the KL to the policy that sampled; 0 = off
  shrink: int = 1  # consecutive rounds that are one; the paper's for LLaDA: 8
  draws: int = 0  # rounds of a row per update; 0 = all
  norm: str = 'constant'  # constant (rows times length) | released (rounds for rows)
  loss_tail: bool = False  # train the tokens sampled after the first EOS

  def problems(self) -> list[str]:
    bad = super().problems()
    if self.advantage == 'prefix' and self.shrink > 1:
      bad.append(
        f'objective.shrink = {self.shrink} must be 1 with objective.advantage = '
        'prefix: a merged round has no state that completions share'
      )
    return bad


def counted_of(order_RxL: IntRL, completion_RxL: BoolRL, hp: Any) -> BoolRL:
  """Returns the tokens that are trained."""
  return (order_RxL >= 0) & (completion_RxL | hp.loss_tail)


def draw(key: AnyKey, row_R: IntR, text: Text, hp: Any) -> Masks:
  """Draws the states before the rounds."""
  order = text.record.order
  rounds, most = shared.recorded_rounds(order, text.canvas.block, hp.shrink)
  counted = counted_of(order, text.completion, hp)
  return shared.draw_rounds(key, row_R, rounds, counted, most, hp.draws)


def sizes(scored: Scored, hp: Any) -> tuple[Array, Array, int, int]:
  """Returns trained tokens and rounds (B, G), the most rounds there can be, and L."""
  order, group = scored.record.order, scored.reward.shape[1]
  own = order != GIVEN
  completion = own & (jnp.cumsum(own, axis=1) <= scored.length.reshape(-1, 1))
  rounds, most = shared.recorded_rounds(order, scored.block, hp.shrink)
  counted = counted_of(order, completion, hp)
  last = jnp.max(jnp.where(counted, rounds, -1), axis=1)
  tokens = jnp.sum(counted, axis=1)
  return *(to_groups(x, group) for x in (tokens, last + 1)), most, order.shape[1]


def weigh(scored: Scored, hp: Config) -> tuple:
  """Weighs for a mean over rows, or over rounds, divided by the length."""
  _, rounds, _, length = sizes(scored, hp)
  scale = shared.per_row(scored)
  if hp.norm == 'released':
    scale = shared.per_token(scored._replace(length=rounds))
  return shared.weigh(scored, hp, scale / length)


def loss(now: ViewLogp, masks: Masks, batch: TrainBatch, hp: Config) -> tuple:
  """Returns (sum of the tokens' terms over rows / norm, metrics)."""
  old = batch.old.logp if hp.shrink > 1 else batch.record.logp[:, None]
  return shared.token_loss(now.logp, old, old, masks, batch, hp)


def wants(hp: Config) -> Wants:
  return Wants(views=('old',) if hp.shrink > 1 else (), records=(), law=True)


OBJECTIVE = Objective(
  Config, wants, draw, weigh, loss, sampler=dict(pick='dynamic', threshold=0.9)
)
