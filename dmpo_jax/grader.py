"""Grades a batch of completions, in threads where grading waits for other processes.

The reward of a completion is the weighted sum of its task's terms.
"""

import concurrent.futures
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dmpo_jax import mesh
from dmpo_jax.tasks import sandbox, symbolic
from dmpo_jax.types import FloatR, Task

THREADS = 32  # completions that are graded at once


class Graded(NamedTuple):
  """The verdicts on R completions."""

  terms: list[dict[str, float]]  # reward terms, before their weights
  reward: FloatR  # float32, weighted sums of the terms
  grades: list[float]  # in [0, 1], as the evaluation counts them
  failed: list[dict]  # without a verdict; see symbolic.drain and sandbox.drain
  texts: list[str]  # the completions


def configure(reward: Any) -> None:
  """Sets how answers are compared and programs run; reward: the config's section."""
  symbolic.configure(reward.workers, reward.deadline)
  how = (reward.sandbox, reward.python, reward.memory)
  sandbox.configure(*how, reward.workers, reward.deadline)


def prefilled(task: Task, prefill: str) -> Task:
  """Returns the task with rewards of `prefill` and the completion together.

  The prompt ends with the prefill, so the model does not write it, but the formats have
  it. Grades are of the completion, as the evaluations of d1 and DMPO read it.
  """
  reward = lambda text, *how: task.reward(prefill + text, *how)
  return task._replace(reward=reward) if prefill else task


def judge(
  task: Task,
  protocol: str,
  texts: Sequence[str],
  examples: Sequence,
  weights: Any,
  rows: Iterable | None = None,
) -> Graded:
  """Grades R completions; a comparison without a verdict counts as wrong.

  weights: dict or ConfigDict, a term's name -> its factor; other terms have factor 1.
  rows: the row of each of these texts among the R, where a process has some of them;
  None: each process has all texts, and grades its share. Every process returns all R,
  so a row has one grade although hosts differ in speed. Raises ValueError on a reward
  that is not finite.
  """
  if rows is None:
    rows = range(jax.process_index(), len(texts), jax.process_count())
    texts, examples = [texts[i] for i in rows], [examples[i] for i in rows]
  both = lambda text, example: (
    task.reward(text, example, protocol),
    task.grade(text, example, protocol),
  )
  if task.threads and len(texts) > 1:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
      verdicts = list(pool.map(both, texts, examples))
  else:
    verdicts = list(map(both, texts, examples))
  mine = list(zip(map(int, rows), texts, verdicts, strict=True))
  parts = mesh.gather([mine, symbolic.drain() + sandbox.drain()])
  judged = sorted(
    (item for part, _ in parts for item in part), key=lambda item: item[0]
  )
  texts = [text for _, text, _ in judged]
  terms = [terms for _, _, (terms, _) in judged]
  return Graded(
    terms,
    total(terms, texts, weights),
    [grade for _, _, (_, grade) in judged],
    [comparison for _, failed in parts for comparison in failed],
    texts,
  )


def total(
  terms: Sequence[Mapping[str, float]], texts: Sequence[str], weights: Any
) -> FloatR:
  """Returns (R,) float32 weighted sums; ValueError if one is not finite."""
  sums = [
    sum(weights.get(name, 1.0) * value for name, value in term.items())
    for term in terms
  ]
  for value, term, text in zip(sums, terms, texts, strict=True):
    if not math.isfinite(value):
      raise ValueError(
        f'the reward {term} of the completion {text[:200]!r} is not finite: '
        'a task must return finite numbers'
      )
  return np.array(sums, np.float32)
