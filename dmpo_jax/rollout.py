"""The reinforcement half-step: prompts -> completions -> rewards -> weights.

The only place where text exists. The device scores log-probs, and does what
else the caller gives it, while the host decodes and rewards.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dmpo_jax import data, grader, health, mesh
from dmpo_jax.metrics import Clock
from dmpo_jax.types import Array, Rollouts, Scored, TrainBatch, to_groups, to_rows


class Started(NamedTuple):
  """A buffer that is sampled and not yet graded; its scores may be under way.

  `scores` are those of the policy that sampled.
  """

  iteration: int
  age: int  # updates between that policy and the buffer's first update
  index: Array  # (B,) int32, problems
  row: Array  # (R,) int32
  rollouts: Rollouts  # on the device, as the next two
  completion: Array  # (R, L) bool
  scores: dict
  kept: tuple  # on the host: tokens, order, forwards, completion, confidence
  mine: Array  # (n,) rows of the buffer that this process decodes and grades
  guess: Array | None = None  # (R, K, L) on the host, as `score` has it


def rows_of(prompts, group, iteration):
  """Prompts repeated per completion: tokens, valid, and global row ids."""
  tokens = np.repeat(prompts.tokens, group, axis=0)
  valid = np.repeat(prompts.valid, group, axis=0)
  row = iteration * len(tokens) + np.arange(len(tokens), dtype=np.int32)
  return tokens, valid, row.astype(np.int32)


def start(
  steps,
  problems,
  trainable,
  frozen,
  iteration,
  age=0,
  *,
  prompts,
  group,
  seed,
  bucket=0,
  clock=None,
  references=(),
):
  """Samples a buffer and queues its log-prob passes behind: a Started.

  Waits for the completions alone, so that what the caller then puts on the
  device (updates that donate `trainable`, too) runs while the host grades.
  """
  with (clock or Clock())('data'):
    batch = data.prompts_at(problems, iteration, prompts, seed, bucket)
  tokens, valid, row = rows_of(batch, group, iteration)
  rollouts, completion = steps.sample({**frozen, **trainable}, tokens, valid, row)
  scores = steps.score(trainable, frozen, rollouts, row, completion, references)
  # Not left to `finish`: with several processes fetching is a program, which
  # would stand behind the caller's updates.
  kept = mesh.fetch(
    (
      rollouts.tokens,
      rollouts.order,
      rollouts.forwards,
      completion,
      rollouts.confidence,
    )
  )
  guess = mesh.fetch(scores['guess']) if 'guess' in scores else None
  return Started(
    iteration,
    age,
    batch.index,
    row,
    rollouts,
    completion,
    scores,
    kept,
    mesh.my_rows(completion),
    guess,
  )


def finish(
  steps,
  task,
  tokenizer,
  problems,
  started,
  *,
  group,
  protocol,
  samples,
  weights,
  clock=None,
):
  """Grades a Started buffer on the host, weighs its groups and packs it.

  Returns (TrainBatch, dict of floats, {file name: list of dicts to append}).
  ValueError on a reward that is not finite.
  """
  iteration, row, kept = started.iteration, started.row, started.kept
  tokens = kept[0][:, -kept[3].shape[1] :]
  texts = data.decode(tokenizer, tokens[started.mine], data.stop_ids(tokenizer))
  examples = [problems.examples[i] for i in np.repeat(started.index, group)]
  with (clock or Clock())('reward'):
    graded = grader.judge(
      task, protocol, texts, [examples[i] for i in started.mine], weights, started.mine
    )
    scores, failed = started.scores, graded.failed
    if started.guess is not None:
      guesses = judge_guesses(started, task, tokenizer, protocol, examples, weights)
      none = started.guess[..., 0] < 0
      scores = {
        **scores,
        'guess': np.where(none, np.nan, np.reshape(guesses.reward, none.shape)).astype(
          np.float32
        ),
      }
      failed = failed + guesses.failed
  batch, weights = steps.pack(
    started.rollouts, started.completion, row, to_groups(graded.reward, group), scores
  )
  metrics = reward_metrics(graded, kept)
  metrics |= health.buffer_metrics(
    tokens,
    kept[3],
    tokenizer.eos_token_id,
    to_groups(np.asarray(graded.reward), group),
    to_groups(np.asarray(graded.grades), group),
  )
  unended = tokens != tokenizer.eos_token_id
  metrics['cut'] = float(np.mean(unended.all(axis=1)))  # by the length
  metrics['policy_age'] = started.age
  metrics['prompts_changed'] = problems.changed
  metrics |= {name: float(x) for name, x in mesh.fetch(weights).items()}
  shown = [
    dict(
      iteration=iteration,
      row=int(row[i]),
      example=examples[i],
      prompt=task.prompt(examples[i], 'bare'),
      completion=graded.texts[i],
      reward=graded.terms[i],
      order=kept[1][i].tolist(),
    )
    for i in range(min(samples, len(row)))
  ]
  lost = [dict(iteration=iteration, **question) for question in failed]
  return batch, metrics, {'samples.jsonl': shown, 'failed_grades.jsonl': lost}


def judge_guesses(started, task, tokenizer, protocol, examples, weights):
  """grader.Graded of the states that were completed in one step, (R * K,)."""
  draws, length = started.guess.shape[1:]
  texts = data.decode(
    tokenizer,
    np.maximum(started.guess[started.mine], 0).reshape(-1, length),
    data.stop_ids(tokenizer),
  )
  places = (started.mine[:, None] * draws + np.arange(draws)).ravel()
  return grader.judge(
    task, protocol, texts, [examples[i // draws] for i in places], weights, places
  )


def reward_metrics(graded, kept):
  _, order, forwards, completion, confidence = kept
  terms, reward_R = graded.terms, graded.reward
  out = {
    f'reward/{name}': float(np.mean([term[name] for term in terms]))
    for name in terms[0]
  }
  return out | {
    'reward': float(np.mean(reward_R)),
    'reward_std': float(np.std(reward_R)),
    'accuracy': float(np.mean(graded.grades)),
    'grades_failed': len(graded.failed),
    'length': float(np.mean(completion.sum(axis=1))),
    'forwards': int(forwards),
    **unmasking_metrics(order, confidence),
  }


# How many tokens a row's forward reveals: upper ends of the histogram's bins.
BINS = {'0': 0, '1': 1, '2': 2, '3-4': 4, '5-8': 8, '9+': 1 << 30}


def unmasking_metrics(order_RxL, confidence_RxL):
  """How the sampler went: tokens a forward (with the shares of the bins), and
  the probabilities of the tokens when they were revealed."""
  steps_R = order_RxL.max(axis=1) + 1
  most = int(steps_R.max())
  revealed = order_RxL >= 0
  row, _ = np.nonzero(revealed)
  cell = np.bincount(
    row * most + order_RxL[revealed], minlength=len(order_RxL) * most
  ).reshape(-1, most)
  counts = cell[np.arange(most) < steps_R[:, None]]
  place = np.searchsorted(list(BINS.values()), counts)
  share = np.bincount(place, minlength=len(BINS)) / len(counts)
  sure = confidence_RxL[revealed]
  return {
    'tokens_per_step': float(np.sum(revealed) / len(counts)),
    **{
      f'tokens_per_forward/{name}': float(x)
      for name, x in zip(BINS, share, strict=True)
    },
    'confidence': float(np.mean(sure)),
    'confidence_low': float(np.quantile(sure, 0.1)),  # a tenth is below
  }


def pack(
  rollouts,
  completion_RxL,
  row_R,
  reward_BxG,
  scores,
  *,
  objective,
  hp,
  inner,
  skip_equal=False,
):
  """TrainBatch and weight metrics from rollouts, rewards and log-probs.

  skip_equal: groups whose rewards are all the same weigh nothing, and the
  others as much more (DAPO's dynamic sampling, without sampling again).
  """
  groups, group = reward_BxG.shape
  rows = row_R.shape[0]
  zeros_R = jnp.zeros((rows,), jnp.float32)
  scored = Scored(
    reward_BxG,
    to_groups(jnp.sum(completion_RxL, axis=1), group),
    to_groups(scores.get('old', zeros_R), group),
    to_groups(scores.get('ref', zeros_R), group),
  )
  if 'guess' in scores:
    scored = scored._replace(guess=to_groups(scores['guess'], group))
  if skip_equal:
    live_B = jnp.max(reward_BxG, axis=1) > jnp.min(reward_BxG, axis=1)
    scored = scored._replace(live=live_B)
  weight, positive, metrics = objective.weigh(scored, hp)
  if skip_equal:
    share_B = live_B * groups / jnp.maximum(jnp.sum(live_B), 1)
    weight, positive = (
      jnp.einsum('b,b...->b...', share_B, x) for x in (weight, positive)
    )
    metrics = {**metrics, 'groups_skipped': jnp.mean(~live_B)}
  elbo_old = scores.get('elbo_old', jnp.zeros((rows, inner), jnp.float32))
  batch = TrainBatch(
    tokens=rollouts.tokens,
    valid=rollouts.valid,
    completion=completion_RxL,
    row=row_R,
    weight=to_rows(weight),
    positive=to_rows(positive),
    elbo_old=elbo_old,
    norm=jnp.float32(groups),
    total=jnp.float32(rows),
    extra=extras(rollouts, scores, objective.needs(hp)),
  )
  metrics = {
    **metrics,
    'logp_old': jnp.mean(scored.logp_old),
    'logp_ref': jnp.mean(scored.logp_ref),
  }
  if {'old', 'ref'} <= scores.keys():  # completions are of the old policy
    metrics['kl_ref'] = metrics['logp_old'] - metrics['logp_ref']
  return batch, metrics


def extras(rollouts, scores, needs):
  """TrainBatch.extra: 'record', and what `step.score` adds; None for nothing.

  tokens_old, tokens_ref, centred_old (R, I, K, L) and elbo_ref (R, I), float32.
  """
  out = {
    name: scores[name]
    for name in ('tokens_old', 'tokens_ref', 'centred_old', 'elbo_ref')
    if name in scores
  }
  if 'record' in needs:
    always = dict(
      order=rollouts.order, logp=rollouts.logp, confidence=rollouts.confidence
    )
    out['record'] = always | (rollouts.more or {})
  return out or None
