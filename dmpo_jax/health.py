"""Health of a run: numbers of a buffer, and rules over several buffers.

These are pure functions of arrays and of dicts of numbers; phases/rl.py acts on a
broken rule. The state of the rules is part of a checkpoint, so that a resumed run
judges as if it had not been interrupted.
"""

import dataclasses
from typing import Any

import numpy as np

from dmpo_jax import files, rules
from dmpo_jax.types import BoolRL, FloatBG, IntBG, IntRL

FLAT = 10  # buffers in a row without a group of different rewards: a run says so
ACTIONS = ('none', 'warn', 'stop')

# Field of Config: (the metric that it bounds, the side on which a run is unhealthy).
RULES = {
  'empty': ('empty', 'above'),
  'repeated': ('repeated', 'above'),
  'distinct': ('distinct', 'below'),
  'equal': ('equal_wrong_groups', 'above'),
  'reward': ('reward', 'below'),  # divided by its best mean
  'ess': ('ess', 'below'),
  'kl': ('kl_ref', 'above'),
  'entropy': ('entropy', 'below'),
  'logp_token': ('logp_token', 'below'),
  'grad_norm': ('grad_norm', 'above'),
  'expert_entropy': ('expert_entropy', 'below'),
  'expert_idle': ('expert_idle', 'above'),
}
OF_UPDATES = (
  'grad_norm',
  'expert_entropy',
  'expert_idle',
)  # rules of an update's numbers, not of a buffer's


def below_zero(x: float) -> str:
  return rules.finite(x) or ('' if x <= 0 else 'must be < 0, as a log-prob is')


@dataclasses.dataclass(frozen=True)
class Config(rules.Section):
  """Bounds of the rules, and what follows when one is broken for long.

  Bounds are shares, but for kl, entropy, logp_token and grad_norm.
  """

  NAME = 'health'
  OWN = {
    'action': rules.one_of(*ACTIONS),
    'patience': rules.least(1),
    'kl': rules.or_off(rules.least(0)),
    'entropy': rules.or_off(rules.least(0)),
    'logp_token': rules.or_off(below_zero),
    'grad_norm': rules.or_off(rules.least(0)),
  }

  action: str = 'warn'  # on a broken rule: none | warn | stop (exit code 77)
  patience: int = 5  # buffers in a row that must break a rule
  empty: float = 0.5  # largest share of completions that begin with EOS; 0 = off
  repeated: float = 0.5  # largest share of tokens equal to the one before; 0 = off
  distinct: float = 0.0  # smallest (different completions of a group) / G; 0 = off
  equal: float = 0.0  # largest share of groups whose answers are all wrong; 0 = off
  reward: float = 0.5  # smallest reward / its best mean over `patience`; 0 = off
  ess: float = 0.0  # smallest effective sample size of a group's weights; 0 = off
  kl: float = 0.0  # largest KL to the reference, nats a completion; 0 = off
  entropy: float = 0.0  # smallest mean entropy of a token, nats; 0 = off
  logp_token: float = 0.0  # smallest mean log-prob of a token, nats, < 0; 0 = off
  grad_norm: float = 0.0  # largest gradient norm before clipping; 0 = off
  # Experts: smallest entropy of their load, as a share of an even one's; 0 = off.
  expert_entropy: float = 0.0
  expert_idle: float = 0.0  # experts: largest share that no token chose; 0 = off
  measure: bool = False  # compute KL and ELBO drift for every objective

  def number(self, x: float) -> str:
    return rules.or_off(rules.share)(x)

  def idle(self) -> dict[str, str]:
    acts = self.action != 'none'
    return rules.without_effect(
      (f'patience {" ".join(RULES)}', acts, 'health.action = warn or stop')
    )


@dataclasses.dataclass(frozen=True)
class State:
  """What the rules remember. JSON-able by dataclasses.asdict."""

  values: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # by rule
  warned: list[str] = dataclasses.field(default_factory=list)  # rules warned about
  rewards: list[float] = dataclasses.field(default_factory=list)  # latest `patience`
  best_reward: float | None = None  # best mean of `patience` rewards in a row
  flat: int = 0  # latest buffers in which the rewards of every group are equal


def buffer_metrics(
  tokens_RxL: IntRL,
  completion_RxL: BoolRL,
  stops: tuple[int, ...],
  reward_BxG: FloatBG | IntBG,
  grade_BxG: FloatBG | IntBG,
) -> dict[str, float]:
  """Returns numbers that show a policy without content or without variety.

  stops: tokens that end a text, EOS below. empty: share of completions whose first
  token is EOS. repeated: share of tokens that equal the token before, among those that
  have one before the first EOS. distinct: mean over groups of (different completions)
  / G, compared up to the first EOS.
  distinct_right: mean number of different completions with the full grade.
  equal_reward_groups: share of groups whose rewards are equal. equal_wrong_groups:
  share of groups whose rewards are equal and whose grades are all 0.
  """
  words = completion_RxL & ~np.isin(tokens_RxL, stops)
  follows = words[:, 1:]  # a word's predecessor is always a word
  again = follows & (tokens_RxL[:, 1:] == tokens_RxL[:, :-1])
  group = reward_BxG.shape[1]
  texts = [
    tokens[word].tobytes()
    for tokens, word in zip(np.ascontiguousarray(tokens_RxL), words, strict=True)
  ]
  heads = range(0, len(texts), group)
  distinct = [len(set(texts[at : at + group])) / group for at in heads]
  right = [
    text if grade == 1 else None
    for text, grade in zip(texts, grade_BxG.ravel(), strict=True)
  ]
  distinct_right = [len(set(right[at : at + group]) - {None}) for at in heads]
  equal = reward_BxG.max(axis=1) == reward_BxG.min(axis=1)
  return {
    'empty': float(np.mean(~words.any(axis=1))),
    'repeated': float(again.sum() / max(1, follows.sum())),
    'distinct': float(np.mean(distinct)),
    'distinct_right': float(np.mean(distinct_right)),
    'equal_reward_groups': float(np.mean(equal)),
    'equal_wrong_groups': float(np.mean(equal & (grade_BxG == 0).all(1))),
  }


def is_healthy(hp: Config, rule: str, value: float) -> bool:
  """Returns whether a value satisfies a rule. NaN never does."""
  bound = getattr(hp, rule)
  if not bound:
    return True
  return value <= bound if RULES[rule][1] == 'above' else value >= bound


def note(hp: Config, state: State, numbers: dict[str, Any]) -> State:
  """Returns the state after more numbers of a run, by the names of its metrics."""
  values, warned = dict(state.values), state.warned
  for rule, (metric, _) in RULES.items():
    if metric in numbers:
      value = numbers[metric]
      if rule == 'reward':
        value = share_of_best(state.best_reward, value)
      values[rule] = [*values.get(rule, []), value][-hp.patience :]
      if is_healthy(hp, rule, value):
        warned = [name for name in warned if name != rule]
  state = dataclasses.replace(state, values=values, warned=warned)
  if 'reward' not in numbers:
    return state
  rewards = [*state.rewards, numbers['reward']][-hp.patience :]
  flat = state.flat + 1 if numbers.get('equal_reward_groups') == 1 else 0
  best, mean = state.best_reward, sum(rewards) / len(rewards)
  if len(rewards) == hp.patience and (best is None or mean > best):
    best = mean
  return dataclasses.replace(state, rewards=rewards, best_reward=best, flat=flat)


def flat_sentence(buffers: int, reward: float) -> str:
  """Says that the last buffers cannot teach anything, whatever the rules are."""
  return (
    f'in the last {buffers} buffers all completions of each prompt had one reward '
    f'(mean {reward:.4g}), so nothing is learned: look at samples.jsonl, and at '
    'data.style, data.protocol, sampler.temperature and the base model'
  )


def share_of_best(best: float | None, reward: float) -> float:
  """Returns the reward over its best mean; 1 while there is no mean above 0."""
  return reward / best if best is not None and best > 0 else 1.0


def broken(hp: Config, state: State) -> list[str]:
  """Returns the rules that each of the last `patience` buffers breaks."""
  if hp.action == 'none':
    return []
  last = {rule: values[-hp.patience :] for rule, values in state.values.items()}
  return [
    rule
    for rule in RULES
    if len(last.get(rule, [])) == hp.patience
    and not any(is_healthy(hp, rule, value) for value in last[rule])
  ]


def sentence(hp: Config, state: State, rule: str) -> str:
  """Says in words how a rule is broken."""
  metric, side = RULES[rule]
  if rule == 'reward':
    metric = 'the reward, as a share of its best mean,'
  return (
    f'{metric} is {side} health.{rule} = {getattr(hp, rule):g} for '
    f'{hp.patience} buffers, now {state.values[rule][-1]:.4g}'
  )


def record(hp: Config, state: State, iteration: int, rule: str) -> dict[str, Any]:
  """Returns the line of health.jsonl for a broken rule."""
  return {
    'iteration': iteration,
    'rule': rule,
    'threshold': getattr(hp, rule),
    'action': hp.action,
    'values': [files.number(x) for x in state.values[rule]],
  }
