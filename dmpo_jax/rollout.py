"""One rollout buffer: prompts -> completions -> rewards -> weights.

Text exists only here. The device scores log-probs, and does what else the caller gives
it, while the host decodes and rewards.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from dmpo_jax import data, grader, health, mesh
from dmpo_jax.metrics import Clock
from dmpo_jax.types import (
  Array,
  FloatRL,
  IntB,
  IntRKL,
  IntRL,
  Params,
  Prompts,
  Sampled,
  Scores,
  Task,
  TrainBatch,
  to_groups,
)


class Fetched(NamedTuple):
  """What the host reads of a buffer: its completions."""

  tokens: Array  # (R, L) int32
  order: Array  # (R, L) int32
  forwards: Array  # () int32
  completion: Array  # (R, L) bool
  confidence: Array  # (R, L) float32
  guess: Array | None  # (R, K, L) int32; None: not asked for
  entropy: Array | None = None  # (R, L) float32; None: not measured


def fetched(sampled: Sampled, eos_id: int, guess: Any = None) -> Fetched:
  """Fetches a buffer, and cuts its completions out."""
  r, done = sampled.rollouts, sampled.completion
  both = r.confidence, sampled.entropy
  found = mesh.fetch((r.tokens, r.order, r.forwards, done, *both, guess))
  tokens, order, forwards, completion, confidence, entropy, guess = found
  cut = lambda x, fill: data.after_given(order, x, fill)
  return Fetched(
    cut(tokens[:, -order.shape[1] :], eos_id),
    cut(order, -1),
    forwards,
    cut(completion, False),
    cut(confidence, 0.0),
    guess,
    entropy if entropy is None else cut(entropy, 0.0),
  )


class Started(NamedTuple):
  """A buffer that is sampled and not yet graded; its scores may be under way.

  `scores` are those of the policy that sampled.
  """

  iteration: int
  age: int  # updates between that policy and the buffer's first update
  index: IntB  # problems
  sampled: Sampled  # on the device
  scores: Scores  # on the device
  host: Fetched
  mine: Array  # (n,) rows of the buffer that this process decodes and grades


def rows_of(prompts: Prompts, group: int, iteration: int) -> tuple[Any, Any, Any]:
  """Repeats prompts for each completion: tokens, valid, and global row ids."""
  tokens = np.repeat(prompts.tokens, group, axis=0)
  valid = np.repeat(prompts.valid, group, axis=0)
  row = iteration * len(tokens) + np.arange(len(tokens), dtype=np.int32)
  return tokens, valid, row.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Collector:
  """Makes rollout buffers: what stays the same from one to the next."""

  steps: Any  # the compiled functions: build.Steps
  task: Task
  tokenizer: Any
  problems: data.Problems
  frozen: Params
  prompts: int  # B
  group: int  # G
  seed: int
  bucket: int  # prompts are padded to a multiple of this; 0 = all of P
  protocol: str  # of rewards: paper | strict
  weights: dict  # factor of each reward term
  stops: tuple[int, ...]  # tokens that end a text: model.stops
  samples: int = 0  # completions per buffer that are written down

  def start(
    self,
    trainable: Params,
    references: tuple,
    iteration: int,
    age: int = 0,
    clock: Any = None,
  ) -> Started:
    """Samples a buffer and queues its log-prob passes behind.

    Waits for the completions alone, so that later work of the device (updates that
    donate `trainable`, too) runs while the host grades.
    """
    clock = clock or Clock()
    with clock('data'):
      prompts = data.prompts_at(
        self.problems, iteration, self.prompts, self.seed, self.bucket
      )
    tokens, valid, row = rows_of(prompts, self.group, iteration)
    policy = {**self.frozen, **trainable}
    with clock('sample'):
      sampled = self.steps.sample(policy, tokens, valid, row)
    with clock('score'):
      scores = self.steps.score(trainable, self.frozen, references, sampled)
    with clock('sample'):
      jax.block_until_ready(sampled)
    # Fetched here, not in `finish`: with several processes fetching is a program,
    # which would stand behind the caller's updates.
    with clock('score'):  # the program stands behind it
      host = fetched(sampled, self.tokenizer.eos_token_id, scores.guess)
    mine = mesh.my_rows(sampled.completion)
    return Started(iteration, age, prompts.index, sampled, scores, host, mine)

  def finish(
    self, started: Started, clock: Any = None
  ) -> tuple[TrainBatch, dict, dict]:
    """Grades a buffer on the host, weighs its groups and packs it.

    Returns (TrainBatch, dict of floats, {file name: list of dicts to append}).
    ValueError on a reward that is not finite.
    """
    host = started.host
    texts = self.decode(host.tokens[started.mine])
    examples = [self.problems.examples[i] for i in np.repeat(started.index, self.group)]
    clock = clock or Clock()
    with clock('reward'):
      graded = self.judge(texts, examples, started.mine)
      scores, failed = started.scores, graded.failed
      if host.guess is not None:
        rewards, lost = self.judge_guesses(started, examples)
        scores = scores._replace(guess=None, guess_reward=rewards)
        failed = failed + lost
    reward_BxG = to_groups(graded.reward, self.group)
    with clock('score'):
      batch, weighed = self.steps.pack(started.sampled, reward_BxG, scores)
      jax.block_until_ready(scores)
    # The updates that were queued before it are what it waits for.
    with clock('update' if started.age else 'score'):
      weighed = mesh.fetch(weighed)
    metrics = reward_metrics(graded, host) | health.buffer_metrics(
      host.tokens,
      host.completion,
      self.stops,
      reward_BxG,
      to_groups(np.asarray(graded.grades), self.group),
    )
    ended = np.isin(host.tokens, self.stops)
    metrics['cut'] = float(np.mean(~ended.any(axis=1)))
    metrics['policy_age'] = started.age
    metrics['prompts_changed'] = self.problems.changed
    metrics |= {name: float(x) for name, x in weighed.items()}
    files = {
      'samples.jsonl': self.samples_of(started, examples, graded),
      'failed_grades.jsonl': [dict(iteration=started.iteration, **x) for x in failed],
    }
    return batch, metrics, files

  def decode(self, tokens: Array) -> list[str]:
    return data.decode(self.tokenizer, tokens, self.stops)

  def judge(self, texts: list, examples: list, rows: Array) -> grader.Graded:
    """Grades the texts of `rows`; the other processes grade the others."""
    own = [examples[i] for i in rows]
    task = grader.prefilled(self.task, self.problems.prefill)
    return grader.judge(task, self.protocol, texts, own, self.weights, rows)

  def judge_guesses(self, started: Started, examples: list) -> tuple[Any, list]:
    """Grades states that were completed in one step.

    Returns (rewards (R, K) float32, nan for a copy of no step; failed comparisons).
    """
    guess: IntRKL = started.host.guess
    draws, length = guess.shape[1:]
    texts = self.decode(np.maximum(guess[started.mine], 0).reshape(-1, length))
    rows = (started.mine[:, None] * draws + np.arange(draws)).ravel()
    graded = self.judge(texts, [x for x in examples for _ in range(draws)], rows)
    none = guess[..., 0] < 0
    reward = np.where(none, np.nan, np.reshape(graded.reward, none.shape))
    return reward.astype(np.float32), graded.failed

  def samples_of(self, started: Started, examples: list, graded: Any) -> list[dict]:
    """Returns the lines of samples.jsonl: the first completions of the buffer."""
    first = started.iteration * len(started.host.order)
    return [
      dict(
        iteration=started.iteration,
        row=first + i,
        example=examples[i],
        prompt=self.task.prompt(examples[i], 'bare'),
        completion=graded.texts[i],
        reward=graded.terms[i],
        order=started.host.order[i].tolist(),
      )
      for i in range(min(self.samples, len(started.host.order)))
    ]


# --- metrics


def reward_metrics(graded: grader.Graded, host: Fetched) -> dict[str, float]:
  """Returns means of rewards, lengths and unmasking steps."""
  terms = {
    f'reward/{name}': float(np.mean([term[name] for term in graded.terms]))
    for name in graded.terms[0]
  }
  return terms | {
    'reward': float(np.mean(graded.reward)),
    'reward_std': float(np.std(graded.reward)),
    'accuracy': float(np.mean(graded.grades)),
    'grades_failed': len(graded.failed),
    'length': float(np.mean(host.completion.sum(axis=1))),
    'forwards': int(host.forwards),
    **unmasking_metrics(host.order, host.confidence),
    **token_metrics(host),
  }


def token_metrics(host: Fetched) -> dict[str, float]:
  """Returns mean log-prob and entropy of the words' tokens when they were revealed.

  The words end with the first EOS. A probability that is 0 in float32 counts as 1e-38.
  """
  own = host.completion & (host.order >= 0)
  if not own.any():
    return {}
  found = {'logp_token': np.log(np.maximum(host.confidence[own], 1e-38))}
  if host.entropy is not None:
    found['entropy'] = host.entropy[own]
  return {name: float(np.mean(x)) for name, x in found.items()}


# Tokens that a row's forward unmasks: upper ends of the histogram's bins.
BINS = {'0': 0, '1': 1, '2': 2, '3-4': 4, '5-8': 8, '9+': 1 << 30}


def unmasking_metrics(order_RxL: IntRL, confidence_RxL: FloatRL) -> dict[str, float]:
  """Returns tokens per forward, with the shares of BINS, and token probabilities."""
  steps_R = order_RxL.max(axis=1) + 1
  most = int(steps_R.max())
  unmasked = order_RxL >= 0
  row, _ = np.nonzero(unmasked)
  cell = np.bincount(
    row * most + order_RxL[unmasked], minlength=len(order_RxL) * most
  ).reshape(-1, most)
  counts = cell[np.arange(most) < steps_R[:, None]]
  bins = np.searchsorted(list(BINS.values()), counts)
  share = np.bincount(bins, minlength=len(BINS)) / len(counts)
  probability = confidence_RxL[unmasked]
  return {
    'tokens_per_step': float(np.sum(unmasked) / len(counts)),
    **{
      f'tokens_per_forward/{name}': float(x)
      for name, x in zip(BINS, share, strict=True)
    },
    'confidence': float(np.mean(probability)),
    'confidence_low': float(np.quantile(probability, 0.1)),  # a tenth lies below
  }
