"""Grades a batch of completions, in threads where grading waits for other processes.

The reward of a completion is the weighted sum of its task's terms.
"""

import concurrent.futures
import functools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dmpo_jax import mesh
from dmpo_jax.tasks import find, rewards, sandbox, symbolic, userfile
from dmpo_jax.types import FloatR, Task

THREADS = 32  # completions that are graded at once


class Graded(NamedTuple):
  """The verdicts on R completions."""

  # Reward terms, before their weights; None: the function does not judge this row.
  terms: list[dict[str, float | None]]
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


# --- reward functions of a user's file


def task_of(c: Any) -> Task:
  """Returns the task of a config, with the functions of reward.file."""
  task, r = find(c.data.task), c.reward
  if not r.file:
    return task
  functions = rewards.Functions(r.file, r.seconds, r.process)
  by = r.grade or ('' if task.graded else next(iter(functions.specs)))
  task = task if r.task else task._replace(reward=lambda *_: {})
  return paying(task, functions, (by,) * bool(by))


def paying(task: Task, functions: rewards.Functions, by: Sequence[str]) -> Task:
  """Returns the task with further rewards; by: those whose sum is the grade, if any."""
  return task._replace(batch=functools.partial(_pay, functions, tuple(by)))


def ready(task: Task) -> None:
  """Imports the files of reward.file where they run; ValueError if that fails."""
  if task.batch and jax.process_index() == 0:
    task.batch.args[0].ready()  # pyright: ignore


def bound(
  task: Task,
  show: Callable[[Any], str],
  examples: Sequence[Any],
  ids: Sequence[Sequence[int]] | None = None,
) -> Task:
  """Returns the task whose functions know the prompts and problems of R completions.

  show: example -> its prompt. ids: the tokens of each, up to its first EOS.
  """
  if not task.batch:
    return task
  return task._replace(batch=functools.partial(task.batch, show, examples, ids))


def _pay(
  functions: rewards.Functions,
  by: tuple[str, ...],
  show: Callable[[Any], str],
  examples: Sequence[Any],
  ids: Sequence[Sequence[int]] | None,
  texts: Sequence[str],
) -> tuple[list[dict], list[float] | None]:
  """Returns ({function: reward} of all rows, their grades; None: the task's).

  The first process calls the functions with the whole batch and tells the others. So
  rewards depend on no number of processes, and a function sees whole groups.
  """
  said: Any = None
  if jax.process_index() == 0:
    columns = rewards.columns_of(examples)
    try:
      said = functions(list(map(show, examples)), texts, columns, ids)
    except ValueError as error:
      said = str(error)
  said = mesh.gather(said)[0]
  if isinstance(said, str):
    raise ValueError(said)
  if not by:
    return said, None
  sums = [sum(row[name] or 0.0 for name in by) for row in said]
  return said, [min(1.0, max(0.0, x)) for x in sums]


def means(terms: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
  """Returns the mean of each term over the rows that have it."""
  found: dict[str, list[float]] = {}
  for row in terms:
    for name, value in row.items():
      if value is not None:
        found.setdefault(name, []).append(value)
  return {name: float(np.mean(values)) for name, values in found.items()}


# --- verdicts


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
  that is not finite, and with file and line if a user's file fails.
  """
  if rows is None:
    rows = range(jax.process_index(), len(texts), jax.process_count())
    texts, examples = [texts[i] for i in rows], [examples[i] for i in rows]
  both = functools.partial(_verdict, task, protocol)
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
  for row, _, verdict in judged:
    if isinstance(verdict, str):
      raise ValueError(f'row {row}: {verdict}')
  texts = [text for _, text, _ in judged]
  terms = [terms for _, _, (terms, _) in judged]
  grades = [grade for _, _, (_, grade) in judged]
  if task.batch:
    paid, said = task.batch(texts)
    terms = [{**row, **more} for row, more in zip(terms, paid, strict=True)]
    grades = said or grades
  return Graded(
    terms,
    total(terms, texts, weights),
    grades,
    [comparison for _, failed in parts for comparison in failed],
    texts,
  )


def _verdict(task: Task, protocol: str, text: str, example: Any) -> Any:
  """Returns (terms, grade) of a completion, or what is wrong with them.

  It is no exception, because the other processes wait for it.
  """
  try:
    with userfile.naming('data.task'):
      terms = task.reward(text, example, protocol)
      grade = task.grade(text, example, protocol)
  except ValueError as error:
    return f'{error}; the completion is {text[:200]!r}'
  if not isinstance(terms, dict):
    return f'the reward of a task must be a dict {{term: number}}, it is {terms!r}'
  for what, x in {**terms, 'grade': grade}.items():
    if not isinstance(x, numbers.Real | np.bool_):
      return f'{what} = {x!r} of the completion {text[:200]!r} must be a number'
  if not 0 <= grade <= 1:
    return f'the grade {grade} of the completion {text[:200]!r} must be in [0, 1]'
  return terms, grade


def total(
  terms: Sequence[Mapping[str, float | None]], texts: Sequence[str], weights: Any
) -> FloatR:
  """Returns (R,) float32 weighted sums; ValueError if one is not finite."""
  sums = [
    sum(weights.get(name, 1.0) * x for name, x in term.items() if x is not None)
    for term in terms
  ]
  for value, term, text in zip(sums, terms, texts, strict=True):
    if not math.isfinite(value):
      raise ValueError(
        f'the reward {term} of the completion {text[:200]!r} is not finite: '
        'a task must return finite numbers'
      )
  return np.array(sums, np.float32)
