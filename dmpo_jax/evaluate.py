"""Evaluates parameters on a split: samples, decodes, grades and averages.

`accuracy` is the number of a training run. dmpo_jax/tools/cards.py makes results
cards of the same parts.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dmpo_jax import data, drafting, grader, mesh, model, rollout
from dmpo_jax.build import Built
from dmpo_jax.types import BoolBP, IntB, IntBP, Params, Task, forwards_of


def accuracy(
  built: Built,
  params: Params,
  problems: data.Problems,
  beat: Callable[[], Any] = lambda: None,
) -> tuple[dict[str, float], list[dict]]:
  """Returns mean grade, reward and the task's extra numbers, and the samples.

  Samples with eval.sampler in batches of eval.batch. beat() is called after each
  completion.
  """
  total, task = len(problems.examples), grader.prefilled(built.task, problems.prefill)
  rows = []
  for row in generate(built, params, problems, built.steps.sample_eval, total, 0):
    rows.append(row)
    beat()
  examples = [problems.examples[row['problem']] for row in rows]
  texts, protocol = [row['text'] for row in rows], built.config.data.protocol
  task = grader.bound(task, problems.show, examples, ids_of(rows))
  graded = grader.judge(task, protocol, texts, examples, built.config.reward.weights)
  numbers = [
    {
      'reward': float(reward),
      'forwards': row['batch_forwards'],
      'row_forwards': row['forwards'],
      **({'bound': row['bound']} if 'bound' in row else {}),
      **task.extra(row['text'], example),
    }
    for reward, row, example in zip(graded.reward, rows, examples, strict=True)
  ]
  mean = {
    'accuracy': averaged(task, protocol, examples, graded.grades),
    **{name: float(np.mean([row[name] for row in numbers])) for name in numbers[0]},
  }
  samples = [
    dict(
      prompt=task.prompt(example, 'bare'),
      example=example,
      completion=row['text'],
      reward=terms,
      order=row['order'],
    )
    for row, example, terms in zip(rows, examples, graded.terms, strict=True)
  ]
  return mean, samples


def ids_of(rows: Sequence[dict]) -> list[list[int]] | None:
  """Returns the tokens of each completion; None where a row has none."""
  if not all('ids' in row and 'tokens' in row for row in rows):
    return None
  return [row['ids'][: row['tokens']] for row in rows]


def averaged(
  task: Task, protocol: str, examples: Iterable[dict], grades: Sequence[float | int]
) -> float:
  """Returns the mean grade, where a problem counts as Task.counts says."""
  counts = [task.counts(example, protocol) for example in examples]
  return float(np.average(grades, weights=counts)) if any(counts) else 0.0


def generate(
  built: Built,
  params: Params,
  problems: data.Problems,
  sample: Callable,
  total: int,
  first: int,
) -> Iterator[dict]:
  """Yields the completions first .. total - 1 as dicts, sampled in batches.

  Completion r answers problem r mod n. Its random numbers depend on r alone, not
  on the batch. The last batch is padded with repeats that are left out. confidence is
  the probability of each token when it was revealed.
  """
  batch, count = built.config.eval.batch, len(problems.examples)
  for start in range(first, total, batch):
    row = np.arange(start, start + batch, dtype=np.int32)
    at = np.minimum(row, total - 1) % count
    prompts = problems.tokens[at], problems.valid[at]
    known = [problems.examples[i] for i in at]
    judged = drafting.bound(sample, problems.show, known)
    done = complete(built, params, judged, prompts, row)
    for i, found in enumerate(done[: total - start]):
      yield dict(row=start + i, problem=int(at[i]), **found)


def drafts_of(drafts: Any, row: int) -> dict[str, int]:
  """Returns what drafts have cost a row; forwards are then the model's.

  {} without drafts.
  """
  if drafts is None:
    return {}
  return dict(
    forwards=int(drafts.target[row]),
    draft_forwards=int(drafts.draft[row]),
    draft_batch_forwards=int(drafts.batch[row]),
    offered=int(drafts.offered[row]),
    kept=int(drafts.kept[row]),
  )


def complete(
  built: Built,
  params: Params,
  sample: Callable,
  prompts: tuple[IntBP, BoolBP],
  row: IntB,
) -> list[dict]:
  """Samples a completion of each prompt, as dicts of text, ids and what they cost.

  prompts: tokens and validity. row: the addresses of their random numbers.
  """
  stop = model.stops(built.model)
  sampled = sample(params, *prompts, row)
  host = rollout.fetched(sampled, built.tokenizer.eos_token_id)
  own, order = mesh.my_rows(sampled.completion), host.order
  steps = forwards_of(order)
  decoded = data.decode(built.tokenizer, host.tokens[own], stop)
  pairs = list(zip(own.tolist(), decoded, strict=True))
  texts = dict(itertools.chain(*mesh.gather(pairs)))
  return [
    dict(
      text=texts[i],
      ids=host.tokens[i].tolist(),
      order=order[i].tolist(),
      confidence=host.confidence[i].tolist(),
      tokens=int(host.completion[i].sum()),
      batch_forwards=int(host.forwards),
      **({} if host.bound is None else {'bound': float(host.bound[i])}),
      **{'forwards': int(steps[i]), **drafts_of(host.drafts, i)},
    )
    for i in range(len(row))
  ]
