"""Completions of a batch judged, many at once where judging waits.

The reward of a completion is the weighted sum of its task's terms.
"""

import concurrent.futures
import math
from typing import NamedTuple

import numpy as np

from dmpo_jax import mesh
from dmpo_jax.tasks import symbolic

THREADS = 32  # completions of a batch that wait for other processes at once


class Graded(NamedTuple):
  terms: list  # of dicts of reward terms, before their weights
  reward: np.ndarray  # (R,) float32, their weighted sums
  grades: list  # of floats in [0, 1], the evaluation's verdict
  failed: list  # of dicts: comparisons that were killed, or crashed
  texts: list  # the completions


def judge(task, protocol, texts, examples, weights, rows=None):
  """Graded of R texts; a comparison without an answer counts as wrong.

  weights: dict from a term's name to its factor; terms not in it count once.
  rows: with several processes the places of these texts among the R, of which
  the others judge the rest. A row has one grade, though hosts differ in speed.
  ValueError names a reward that is not finite.
  """

  def one(text, example):
    return (task.reward(text, example, protocol), task.grade(text, example, protocol))

  if task.threads and len(texts) > 1:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
      found = list(pool.map(one, texts, examples))
  else:
    found = list(map(one, texts, examples))
  rows = range(len(texts)) if rows is None else map(int, rows)
  parts = mesh.gather([list(zip(rows, texts, found, strict=True)), symbolic.drain()])
  judged = sorted(
    (item for part, _ in parts for item in part), key=lambda item: item[0]
  )
  texts = [text for _, text, _ in judged]
  terms = [terms for _, _, (terms, _) in judged]
  return Graded(
    terms,
    total(terms, texts, weights),
    [grade for _, _, (_, grade) in judged],
    [question for _, failed in parts for question in failed],
    texts,
  )


def total(terms, texts, weights):
  """(R,) float32 weighted sums; ValueError names what is not finite."""
  sums = [
    sum(weights.get(name, 1.0) * value for name, value in term.items())
    for term in terms
  ]
  for value, term, text in zip(sums, terms, texts, strict=True):
    if not math.isfinite(value):
      raise ValueError(
        f'the reward {term} of the completion {text[:200]!r} is '
        'not finite: rewards must be finite numbers'
      )
  return np.array(sums, np.float32)
