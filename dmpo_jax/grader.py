"""Completions of a batch judged, many at once where judging waits.

The reward of a completion is the weighted sum of its task's terms.
"""

import concurrent.futures
import math
from typing import NamedTuple

import numpy as np

from dmpo_jax.tasks import symbolic

THREADS = 32  # completions of a batch that wait for other processes at once


class Graded(NamedTuple):
  terms: list  # of dicts of reward terms, before their weights
  reward: np.ndarray  # (R,) float32, their weighted sums
  grades: list  # of floats in [0, 1], the evaluation's verdict
  failed: list  # of dicts: comparisons that were killed, or crashed


def judge(task, protocol, texts, examples, weights):
  """Graded of R texts; a comparison without an answer counts as wrong.

  weights: dict from a term's name to its factor; terms not in it count once.
  ValueError names a reward that is not finite.
  """
  def one(text, example):
    return (task.reward(text, example, protocol),
            task.grade(text, example, protocol))

  if task.threads and len(texts) > 1:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
      found = list(pool.map(one, texts, examples))
  else:
    found = list(map(one, texts, examples))
  terms = [terms for terms, _ in found]
  return Graded(terms, total(terms, texts, weights),
                [grade for _, grade in found], symbolic.drain())


def total(terms, texts, weights):
  """(R,) float32 weighted sums; ValueError names what is not finite."""
  sums = [sum(weights.get(name, 1.0) * value for name, value in term.items())
          for term in terms]
  for value, term, text in zip(sums, terms, texts, strict=True):
    if not math.isfinite(value):
      raise ValueError(f'the reward {term} of the completion {text[:200]!r} is '
                       'not finite: rewards must be finite numbers')
  return np.array(sums, np.float32)
