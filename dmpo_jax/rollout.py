"""One rollout buffer: prompts -> completions -> rewards -> weights.

Text exists only here. The device scores log-probs, and does what else the caller gives
it, while the host decodes and rewards.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dmpo_jax import buffers, curriculum, data, drafting, grader, health, mesh
from dmpo_jax.metrics import Clock
from dmpo_jax.types import (
  NOT_ASKED,
  Array,
  BoolB,
  FloatBG,
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
  forwards_of,
  to_groups,
)


class Fetched(NamedTuple):
  """What the host reads of a buffer: its completions."""

  tokens: Array  # (R, L) int32
  order: Array  # (R, L) int32
  forwards: Array  # () int32
  completion: Array  # (R, L) bool
  confidence: Array  # (R, L) float32
  row: Array  # (R,) int32, addresses of the rows' random numbers
  guess: Array | None  # (R, K, L) int32; None: not asked for
  entropy: Array | None = None  # (R, L) float32; None: not measured
  bound: Array | None = None  # (R,) float32: see types.Control; None: the sampler's own
  drafts: Any = None  # types.Drafts; None: nobody drafts
  drafted: Array | None = None  # (R, L) bool, tokens that a draft wrote; None: none


# What stands in them behind a completion.
FILL = dict(order=-1, completion=False, confidence=0.0, entropy=0.0, drafted=False)


def fetched(sampled: Sampled, eos_id: int, guess: Any = None) -> Fetched:
  """Fetches a buffer, and cuts its completions out."""
  r, done = sampled.rollouts, sampled.completion
  bound, drafted = r.control and r.control.bound, (r.more or {}).get('drafted')
  own = r.confidence, sampled.row, guess, sampled.entropy, bound, r.drafts, drafted
  found = mesh.fetch(Fetched(r.tokens, r.order, r.forwards, done, *own))
  found = found._replace(tokens=found.tokens[:, -found.order.shape[1] :])
  cut = {
    name: data.after_given(found.order, getattr(found, name), fill)
    for name, fill in {'tokens': eos_id, **FILL}.items()
    if getattr(found, name) is not None
  }
  return found._replace(**cut)


class Drawn(NamedTuple):
  """Completions of B prompts."""

  chosen: curriculum.Chosen  # their problems
  sampled: Sampled  # on the device
  host: Fetched
  mine: Array  # (n,) rows that this process decodes and grades
  graded: grader.Graded = NOT_ASKED  # None: not yet


class Started(NamedTuple):
  """A buffer that is sampled and not yet weighed; its scores may be under way.

  `scores` are those of the policy that sampled.
  """

  iteration: int
  age: int  # updates between that policy and the buffer's first update
  drawn: Drawn
  scores: Scores  # on the device
  passes: tuple = ()  # (index_B, grades_BxG) of each round that is graded already
  replaced: int = 0  # groups that resampling put in the place of others


def rows_of(prompts: Prompts, group: int, step: int) -> tuple[Any, Any, Any]:
  """Repeats prompts for each completion: tokens, valid, and global row ids."""
  tokens = np.repeat(prompts.tokens, group, axis=0)
  valid = np.repeat(prompts.valid, group, axis=0)
  row = step * len(tokens) + np.arange(len(tokens), dtype=np.int32)
  return tokens, valid, row.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Collector:
  """Makes rollout buffers: what stays the same from one to the next."""

  steps: Any  # the compiled functions: build.Steps
  task: Task
  tokenizer: Any
  problems: data.Problems
  frozen: Params
  chooser: curriculum.Curriculum | None  # None: each problem once an epoch
  prompts: int  # B
  group: int  # G
  seed: int
  bucket: int  # prompts are padded to a multiple of this; 0 = all of P
  protocol: str  # of rewards: paper | strict
  weights: dict  # factor of each reward term
  stops: tuple[int, ...]  # tokens that end a text: model.stops
  samples: int = 0  # completions per buffer that are written down
  resample: int = 0  # rounds of other prompts for groups of equal rewards
  saves: bool = False  # whether `finish` returns the buffer as arrays, too

  def choose(self, iteration: int, part: int = 0) -> curriculum.Chosen:
    """Returns the problems of a buffer; part: the round of its resampling."""
    if self.chooser:
      return self.chooser.choose(iteration, part)
    count, step = len(self.problems.examples), self.step(iteration, part)
    return curriculum.Chosen(data.indices_at(step, self.prompts, count, self.seed))

  def step(self, iteration: int, part: int) -> int:
    """Returns the number of a round of sampling, which addresses its rows."""
    return iteration * (1 + self.resample) + part

  def prompts_at(self, iteration: int) -> Prompts:
    """Returns the prompts of a buffer."""
    index = self.choose(iteration).index
    return data.prompts_of(self.problems, index, self.bucket)

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
    clock, policy = clock or Clock(), {**self.frozen, **trainable}
    score = lambda x: self.steps.score(trainable, self.frozen, references, x)
    if self.resample:
      drawn, passes, replaced = self.resampled(policy, iteration, clock)
      with clock('score'):
        scores = score(drawn.sampled)
        host = drawn.host._replace(guess=mesh.fetch(scores.guess))
      drawn = drawn._replace(host=host)
      return Started(iteration, age, drawn, scores, passes, replaced)
    chosen, sampled = self.sample(policy, iteration, 0, clock)
    with clock('score'):
      scores = score(sampled)
    with clock('sample'):
      jax.block_until_ready(sampled)
    # Fetched here, not in `finish`: with several processes fetching is a program,
    # which would stand behind the caller's updates.
    with clock('score'):  # the program stands behind it
      host = fetched(sampled, self.tokenizer.eos_token_id, scores.guess)
    mine = mesh.my_rows(sampled.completion)
    return Started(iteration, age, Drawn(chosen, sampled, host, mine), scores)

  def sample(
    self, policy: Params, iteration: int, part: int, clock: Clock
  ) -> tuple[curriculum.Chosen, Sampled]:
    """Queues the sampling of a round; returns its problems, too."""
    with clock('data'):
      chosen = self.choose(iteration, part)
      prompts = data.prompts_of(self.problems, chosen.index, self.bucket)
    rows = rows_of(prompts, self.group, self.step(iteration, part))
    known = [self.problems.examples[i] for i in np.repeat(chosen.index, self.group)]
    sample = drafting.bound(self.steps.sample, self.problems.show, known)
    with clock('sample'):
      return chosen, sample(policy, *rows)

  def resampled(
    self, policy: Params, iteration: int, clock: Clock
  ) -> tuple[Drawn, tuple, int]:
    """Samples and grades; replaces groups of equal rewards by those of other prompts.

    It ends when no such group is left, and after `resample` rounds. Returns also the
    (index_B, grades_BxG) of each round, and the number of groups that were replaced.
    """

    def round_of(part: int) -> Drawn:
      chosen, sampled = self.sample(policy, iteration, part, clock)
      with clock('sample'):
        host = fetched(sampled, self.tokenizer.eos_token_id)
      mine = mesh.my_rows(sampled.completion)
      with clock('reward'):
        return self.graded(Drawn(chosen, sampled, host, mine))

    kept, replaced = round_of(0), 0
    passes = [self.passes_of(kept)]
    for part in range(1, self.resample + 1):
      dead = np.flatnonzero(~self.live(kept))
      if not len(dead):
        break
      other = round_of(part)
      passes.append(self.passes_of(other))
      good = np.flatnonzero(self.live(other))[: len(dead)]
      at_B = np.arange(self.prompts)
      at_B[dead[: len(good)]] = self.prompts + good
      with clock('sample'):
        kept = joined(kept, other, at_B, self.group, self.steps.select)
      replaced += len(good)
    return kept, tuple(passes), replaced

  def live(self, drawn: Drawn) -> BoolB:
    """Returns the groups of different rewards."""
    reward_BxG = to_groups(drawn.graded.reward, self.group)
    return reward_BxG.max(axis=1) > reward_BxG.min(axis=1)

  def passes_of(self, drawn: Drawn) -> tuple[IntB, FloatBG]:
    """Returns the problems of a round and the grades of their completions."""
    grades = np.asarray(drawn.graded.grades, np.float32)
    return drawn.chosen.index, to_groups(grades, self.group)

  def graded(self, drawn: Drawn) -> Drawn:
    """Grades completions; each process decodes and grades some of the rows."""
    texts = self.decode(drawn.host.tokens[drawn.mine])
    ids = drawn.host.tokens, drawn.host.completion
    graded = self.judge(texts, self.examples_of(drawn), drawn.mine, ids)
    return drawn._replace(graded=graded)

  def examples_of(self, drawn: Drawn) -> list[dict]:
    """Returns the problem of each row."""
    index_R = np.repeat(drawn.chosen.index, self.group)
    return [self.problems.examples[i] for i in index_R]

  def finish(
    self, started: Started, clock: Any = None
  ) -> tuple[TrainBatch, dict, dict]:
    """Grades a buffer on the host, weighs its groups and packs it.

    Returns (TrainBatch, dict of floats, {file name: list of dicts to append}), with the
    whole buffer under buffers.FOLDER where it is saved.
    ValueError on a reward that is not finite.
    """
    clock = clock or Clock()
    with clock('reward'):
      drawn, scores = started.drawn, started.scores
      drawn = drawn if drawn.graded else self.graded(drawn)
      host, graded = drawn.host, drawn.graded
      failed = graded.failed
      if host.guess is not None:
        rewards, lost = self.judge_guesses(drawn)
        scores = scores._replace(guess=None, guess_reward=rewards)
        failed = failed + lost
    reward_BxG = to_groups(graded.reward, self.group)
    with clock('score'):
      share = () if drawn.chosen.share is None else (drawn.chosen.share,)
      batch, weighed = self.steps.pack(drawn.sampled, reward_BxG, scores, *share)
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
    ended = np.isin(host.tokens, self.stops) & host.completion
    metrics['cut'] = float(np.mean(~ended.any(axis=1)))
    metrics['shared_steps'] = shared_steps(host.order, host.tokens, self.group)
    metrics['policy_age'] = started.age
    metrics['prompts_changed'] = self.problems.changed
    metrics |= {name: float(x) for name, x in weighed.items()}
    files = {
      'samples.jsonl': self.samples_of(started.iteration, drawn),
      'failed_grades.jsonl': [dict(iteration=started.iteration, **x) for x in failed],
    }
    if self.saves:
      files[buffers.FOLDER] = [self.arrays_of(started.iteration, drawn)]
    passes = started.passes or (self.passes_of(drawn),)
    if self.resample:
      metrics |= {
        'resampled': len(passes) - 1,
        'groups_replaced': started.replaced / self.prompts,
      }
    if self.chooser:
      index, grades = map(np.concatenate, zip(*passes, strict=True))
      line = self.chooser.line(started.iteration, index, grades)
      files[curriculum.FILE] = [line]
    return batch, metrics, files

  def decode(self, tokens: Array) -> list[str]:
    return data.decode(self.tokenizer, tokens, self.stops)

  def judge(
    self, texts: list, examples: list, rows: Array, ids: tuple | None = None
  ) -> grader.Graded:
    """Grades the texts of `rows`; the other processes grade the others.

    ids: tokens (R, L), and which of them are of the completion.
    """
    own = [examples[i] for i in rows]
    task = grader.prefilled(self.task, self.problems.prefill)
    if task.batch:
      said = ids and [row[done].tolist() for row, done in zip(*ids, strict=True)]
      task = grader.bound(task, self.problems.show, examples, said)
    return grader.judge(task, self.protocol, texts, own, self.weights, rows)

  def judge_guesses(self, drawn: Drawn) -> tuple[Any, list]:
    """Grades states that were completed in one step.

    Returns (rewards (R, K) float32, nan for a copy of no step; failed comparisons).
    """
    guess: IntRKL = drawn.host.guess
    draws, length = guess.shape[1:]
    texts = self.decode(np.maximum(guess[drawn.mine], 0).reshape(-1, length))
    rows = (drawn.mine[:, None] * draws + np.arange(draws)).ravel()
    examples = [x for x in self.examples_of(drawn) for _ in range(draws)]
    graded = self.judge(texts, examples, rows)
    none = guess[..., 0] < 0
    reward = np.where(none, np.nan, np.reshape(graded.reward, none.shape))
    return reward.astype(np.float32), graded.failed

  def samples_of(self, iteration: int, drawn: Drawn) -> list[dict]:
    """Returns the lines of samples.jsonl: the first completions of the buffer."""
    graded, host, examples = drawn.graded, drawn.host, self.examples_of(drawn)
    return [
      dict(
        iteration=iteration,
        row=int(host.row[i]),
        example=examples[i],
        prompt=self.task.prompt(examples[i], 'bare'),
        completion=graded.texts[i],
        reward=graded.terms[i],
        order=host.order[i].tolist(),
      )
      for i in range(min(self.samples, len(host.order)))
    ]

  def arrays_of(self, iteration: int, drawn: Drawn) -> buffers.Buffer:
    """Returns a buffer as it is saved; the caller sets the policy's update."""
    graded, host, index = drawn.graded, drawn.host, drawn.chosen.index
    column = lambda name: [row.get(name) for row in graded.terms]
    names = dict.fromkeys(name for row in graded.terms for name in row)
    number = lambda x: np.nan if x is None else x
    return buffers.Buffer(
      iteration,
      0,
      [self.problems.examples[i] for i in index],
      np.asarray(index, np.int32),
      self.problems.tokens[index],
      self.problems.valid[index],
      np.asarray(host.tokens, np.int32),
      np.asarray(host.order, np.int32),
      host.completion.sum(axis=1).astype(np.int32),
      {x: np.array(list(map(number, column(x))), np.float32) for x in names},
      np.asarray(graded.reward, np.float32),
      np.asarray(graded.grades, np.float32),
      host.drafted,
    )


def joined(
  one: Drawn, two: Drawn, at_B: IntB, group: int, select: Callable[..., Sampled]
) -> Drawn:
  """Returns the groups `at_B` of those of two rounds.

  select: build.Steps.select. Forwards are those of both rounds.
  """
  at_R = (at_B[:, None] * group + np.arange(group)).ravel()
  pick = lambda a, b, at: None if a is None else np.concatenate([a, b])[at]
  rows = lambda a, b: [[*a, *b][i] for i in at_R]
  graded = grader.Graded(
    rows(one.graded.terms, two.graded.terms),
    pick(one.graded.reward, two.graded.reward, at_R),
    rows(one.graded.grades, two.graded.grades),
    one.graded.failed + two.graded.failed,
    rows(one.graded.texts, two.graded.texts),
  )
  host = jax.tree.map(
    lambda a, b: pick(a, b, at_R), *(x.host._replace(forwards=None) for x in (one, two))
  )
  return Drawn(
    curriculum.Chosen(pick(one.chosen.index, two.chosen.index, at_B)),
    select(one.sampled, two.sampled, at_R.astype(np.int32)),
    host._replace(forwards=one.host.forwards + two.host.forwards),
    one.mine,
    graded,
  )


# --- metrics


def reward_metrics(graded: grader.Graded, host: Fetched) -> dict[str, float]:
  """Returns means of rewards, lengths and unmasking steps."""
  terms = {f'reward/{name}': x for name, x in grader.means(graded.terms).items()}
  return terms | {
    'reward': float(np.mean(graded.reward)),
    'reward_std': float(np.std(graded.reward)),
    'accuracy': float(np.mean(graded.grades)),
    'grades_failed': len(graded.failed),
    'length': float(np.mean(host.completion.sum(axis=1))),
    'forwards': int(host.forwards),
    'row_forwards': float(np.mean(forwards_of(host.order))),
    **unmasking_metrics(host.order, host.confidence),
    **token_metrics(host),
    **draft_metrics(host.drafts),
  }


def draft_metrics(drafts: Any) -> dict[str, float]:
  """Returns the share of drafts that stay, and forwards of a row; {} without drafts."""
  if drafts is None:
    return {}
  return {
    'draft/acceptance': float(np.sum(drafts.kept) / max(1, np.sum(drafts.offered))),
    'draft/forwards': float(np.mean(drafts.draft)),
    'draft/target_forwards': float(np.mean(drafts.target)),
  }


def shared_steps(order_RxL: IntRL, tokens_RxL: IntRL, group: int) -> float:
  """Returns the mean over rows of the steps taken with another row of their group.

  Two rows part at the first step that unmasks a position or token of one alone.
  """
  never = order_RxL.shape[1]
  at = to_groups(np.where(order_RxL < 0, never, order_RxL), group)
  tokens = to_groups(tokens_RxL, group)
  pair = lambda x: (x[:, :, None], x[:, None])
  differ = np.not_equal(*pair(at)) | np.not_equal(*pair(tokens))
  steps = to_groups(forwards_of(order_RxL), group)[..., None]
  parting = np.where(differ, np.minimum(*pair(at)), never).min(axis=-1)
  parting = np.where(np.eye(group, dtype=bool), 0, np.minimum(parting, steps))
  return float(parting.max(axis=2).mean())


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
  steps_R = forwards_of(order_RxL)
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
