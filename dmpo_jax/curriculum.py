"""Chooses the prompts of a buffer by the signal that its objective expects of them.

A problem's chance p of a right answer has a Beta(a, b) posterior, from what its recent
completions were graded. The signal of a group of G completions, the expected push on
the logit of p, has a closed form in it (SIGNALS). A policy gradient learns most where
p = 1/2; DMPO, whose weights sum to one however few answers are right, at p = 0.26
(G = 8). The table of posteriors is not stored: it is the fold of passes.jsonl, so the
prompts of a buffer are a function of what the run has recorded.

Systematic sampling: B different problems in a random order, where the sum of their
inclusion probabilities crosses v, v + 1, .. v + B - 1 for one uniform v. Each problem
is in the buffer with exactly its probability (Madow 1949).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dmpo_jax import rules
from dmpo_jax.types import Array, FloatB, IntB

FILE = 'passes.jsonl'


def policy_gradient(a: Array, b: Array, group: int) -> Array:
  """E[p (1 - p) (G - 1) / G]: rewards less their mean."""
  return a * b / ((a + b) * (a + b + 1)) * (group - 1) / group


def all_wrong(a: Array, b: Array, group: int) -> Array:
  """E[(1 - p)^G]; E[p^G] with a and b exchanged."""
  j = np.arange(group)[:, None]
  return np.prod((b + j) / (a + b + j), axis=0)


def targets(a: Array, b: Array, group: int, strength: float) -> Array:
  """E[(1 - p) - (1 - p)^G + strength (p - p^G)]: DMPO's target weights.

  They sum to one over a group. `strength` of the turned reward's weights is subtracted;
  with 1 the signal is the chance that a group has right and wrong answers.
  """
  right = b / (a + b) - all_wrong(a, b, group)
  return right + strength * (a / (a + b) - all_wrong(b, a, group))


Signal = Callable[[Array, Array, int], Array]  # (a_N, b_N, group) -> (N,)
SIGNALS: dict[str, Signal] = {
  'policy_gradient': policy_gradient,
  'matching': functools.partial(targets, strength=0.0),
  'mixed': functools.partial(targets, strength=1.0),
}


def signal_of(name: str, strength: float | None) -> Signal:
  """Returns a signal by its name.

  strength: what `objective` means: Objective.strength of the objective in use.
  """
  if name != 'objective':
    return SIGNALS[name]
  if strength is None:
    return policy_gradient
  return functools.partial(targets, strength=strength)


@dataclasses.dataclass(frozen=True)
class Config(rules.Section):
  """Which prompts a buffer has."""

  NAME = 'curriculum'
  OWN = {
    'signal': rules.one_of('none', 'objective', *SIGNALS),
    'uniform': rules.positive_share,
    'memory': rules.share,
  }

  # Prompts are drawn by this expected signal: none (each problem once an epoch) |
  # objective (its own) | policy_gradient | matching (DMPO) | mixed (its `individual`).
  signal: str = 'none'
  uniform: float = 0.2  # share of the prompts that is drawn without regard to it
  memory: float = 0.5  # share of a posterior's counts that the next group leaves
  # True: groups weigh B / (N inclusion probability), so that the expected update is
  # that of uniform prompts. It gives up most of the gain; for comparisons.
  correct: bool = False
  # Rounds of other prompts for groups of equal rewards, as DAPO samples; 0 = none.
  resample: int = 0

  def idle(self) -> dict[str, str]:
    drawn = self.signal != 'none'
    needs = 'curriculum.signal other than none'
    return rules.without_effect(('uniform memory correct', drawn, needs))

  def problems(self) -> list[str]:
    found = super().problems()
    if self.correct and self.resample:
      found.append(
        'curriculum.correct = True has no meaning with curriculum.resample > 0, which '
        'chooses groups by their rewards: set one of them'
      )
    return found


class Chosen(NamedTuple):
  """The problems of a buffer."""

  index: IntB
  share: FloatB | None = None  # factor of each group's weight; None: all 1


def inclusion(signal_N: Array, batch: int, uniform: float) -> np.ndarray:
  """Returns each problem's probability to be among `batch` of N, float64.

  In proportion to (1 - uniform) of the signal's share + uniform / N. Those that would
  exceed 1 are certain, and the others share what is left.
  """
  count = len(signal_N)
  total = signal_N.sum()
  pull = signal_N / total if total > 0 else np.full(count, 1 / count)
  pull = (1 - uniform) * pull + uniform / count
  out, open_N = np.ones(count), np.ones(count, bool)
  while open_N.any():
    left = batch - np.sum(~open_N)
    out[open_N] = left * pull[open_N] / pull[open_N].sum()
    over = open_N & (out > 1)
    if not over.any():
      break
    out[over], open_N = 1.0, open_N & ~over
  return out


def systematic(inclusion_N: Array, batch: int, random: np.random.Generator) -> IntB:
  """Returns `batch` different problems, each with its inclusion probability."""
  order = random.permutation(len(inclusion_N))
  ends = np.cumsum(inclusion_N[order])
  ends *= batch / ends[-1]  # of rounding alone
  at = np.searchsorted(ends, random.uniform() + np.arange(batch), side='right')
  return order[np.minimum(at, len(order) - 1)].astype(np.int32)


class Curriculum:
  """Chooses problems by the lines of the buffers before.

  sizes: problems N, and of a buffer the prompts B and their completions G.
  """

  def __init__(
    self, hp: Config, signal: Signal, sizes: tuple[int, int, int], seed: int
  ):
    self.hp, self.signal, self.seed = hp, signal, seed
    self.count, self.batch, self.group = sizes
    self.lines: dict[int, dict[str, Any]] = {}  # by iteration
    self.start()

  def start(self) -> None:
    """Sets the posteriors to Beta(1, 1), of no line."""
    self.counted, self.a, self.b = 0, np.ones(self.count), np.ones(self.count)

  def read(self, lines: Sequence[Mapping[str, Any]]) -> None:
    """Takes the lines of a run that is resumed, in place of those it has."""
    self.lines = {line['iteration']: dict(line) for line in lines}
    self.start()

  def line(self, iteration: int, index: Array, grades_BxG: Array) -> dict[str, Any]:
    """Notes the grades of a buffer; returns its line of FILE."""
    passes = np.sum(grades_BxG, axis=1, dtype=np.float64)
    made = dict(
      iteration=iteration, index=list(map(int, index)), passes=passes.tolist()
    )
    self.lines[iteration] = made
    if iteration < self.counted:
      self.start()
    return made

  def posterior(self, iteration: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (a, b) of all problems before an iteration, from Beta(1, 1).

    ValueError if the line of an earlier iteration is missing.
    """
    if iteration < self.counted:
      self.start()
    a, b = self.a, self.b
    for at in range(self.counted, iteration):
      if at not in self.lines:
        raise ValueError(
          f'{FILE} has no line of iteration {at}: bring the file back, without it the '
          'prompts would be others'
        )
      line = self.lines[at]
      index, passes = np.array(line['index']), np.array(line['passes'])
      # One after another: resampling may draw a problem twice.
      for i, k in zip(index, passes, strict=True):
        a[i] = 1 + self.hp.memory * (a[i] - 1) + k
        b[i] = 1 + self.hp.memory * (b[i] - 1) + self.group - k
      self.counted = at + 1
    return a.copy(), b.copy()

  def chance(self, iteration: int) -> np.ndarray:
    """Returns each problem's probability to be in a buffer."""
    signal_N = self.signal(*self.posterior(iteration), self.group)
    return inclusion(signal_N, self.batch, self.hp.uniform)

  def choose(self, iteration: int, part: int = 0) -> Chosen:
    """Returns the problems of a buffer; part: the round of its resampling."""
    chance_N = self.chance(iteration)
    random = np.random.default_rng([self.seed, iteration, part])
    index = systematic(chance_N, self.batch, random)
    if not self.hp.correct:
      return Chosen(index)
    share = self.batch / (self.count * chance_N[index])
    return Chosen(index, share.astype(np.float32))
