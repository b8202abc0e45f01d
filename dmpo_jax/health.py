"""Whether a run is well: numbers of a buffer, and rules over several of them.

Pure functions of arrays and dicts of numbers; what follows from a broken rule
is done in train.py and resume.py. The state of the rules goes into the
checkpoints, so that a resumed run judges as if it had not been interrupted.
"""

import dataclasses
import math

import numpy as np

ACTIONS = ('none', 'warn', 'stop', 'rollback')

# Field of Config: (the metric it bounds, on which side a run is ill).
RULES = {
  'empty': ('empty', 'above'),
  'repeated': ('repeated', 'above'),
  'distinct': ('distinct', 'below'),
  'equal': ('equal_wrong_groups', 'above'),
  'reward': ('reward', 'below'),  # as a share of its best mean
  'ess': ('ess', 'below'),
  'kl': ('kl_ref', 'above'),
  'grad_norm': ('grad_norm', 'above'),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Bounds (0 = off), and what follows when one is broken for long."""

  action: str = 'warn'  # on a broken rule: none | warn | stop (exit code 77)
  patience: int = 5  # buffers in a row that must break a rule
  empty: float = 0.5  # largest share of completions that begin with EOS; 0 = off
  repeated: float = 0.5  # largest share of tokens equal to the one before; 0 = off
  distinct: float = 0.0  # smallest (different completions of a group) / G; 0 = off
  equal: float = 0.0  # largest share of groups whose answers are all wrong; 0 = off
  reward: float = 0.5  # smallest reward / its best mean over `patience`; 0 = off
  ess: float = 0.0  # smallest effective sample size of a group's weights; 0 = off
  kl: float = 0.0  # largest KL to the reference, nats a completion; 0 = off
  grad_norm: float = 0.0  # largest gradient norm before clipping; 0 = off
  lr_factor: float = 0.5  # of each rollback
  rollbacks: int = 3  # at most; then the run stops
  measure: bool = False  # compute KL and ELBO drift for every objective

  def problems(self) -> list[str]:
    """Returns complaints about fields that are out of range."""
    out = []
    if self.action not in ACTIONS:
      out.append(f'health.action = {self.action!r} must be one of {", ".join(ACTIONS)}')
    if self.patience < 1:
      out.append(f'health.patience = {self.patience} must be >= 1')
    for rule in RULES:
      most = float('inf') if rule in ('kl', 'grad_norm') else 1
      if not 0 <= getattr(self, rule) <= most:
        out.append(
          f'health.{rule} = {getattr(self, rule)} must be in [0, {most}]; 0 = off'
        )
    return out


class Collapse(FloatingPointError):
  """What ends the loop for a rollback or a stop; `record` says why."""

  def __init__(self, sentence, record):
    super().__init__(sentence)
    self.record = record


def buffer_metrics(tokens_RxL, completion_RxL, eos_id, reward_BxG, grade_BxG):
  """Floats that show a policy without content or without variety.

  empty: share of completions whose first token is EOS. repeated: of the tokens
  that follow another before the first EOS, the share equal to it. distinct:
  mean over groups of different completions / G, up to the first EOS;
  distinct_right: how many different ones have the full grade.
  equal_reward_groups: share of groups without a signal; equal_wrong_groups:
  those of them whose grades are all 0.
  """
  words = completion_RxL & (tokens_RxL != eos_id)
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


def fresh(best_reward=None):
  """The state of the rules before the first buffer, or after a rollback."""
  return {'values': {}, 'warned': [], 'rewards': [], 'best_reward': best_reward}


def well(hp, rule, value):
  """Whether a value keeps its rule, so written that nan does not."""
  bound = getattr(hp, rule)
  if not bound:
    return True
  return value <= bound if RULES[rule][1] == 'above' else value >= bound


def note(hp, state, numbers):
  """The state after more numbers: the last values that rules bound, and the
  best mean reward so far."""
  values, warned = dict(state['values']), state['warned']
  for rule, (metric, _) in RULES.items():
    if metric in numbers:
      value = numbers[metric]
      if rule == 'reward':
        value = share_of_best(state['best_reward'], value)
      values[rule] = [*values.get(rule, []), value][-hp.patience :]
      if well(hp, rule, value):
        warned = [name for name in warned if name != rule]
  state = {**state, 'values': values, 'warned': warned}
  if 'reward' in numbers:
    rewards = [*state['rewards'], numbers['reward']][-hp.patience :]
    best, mean = state['best_reward'], sum(rewards) / len(rewards)
    if len(rewards) == hp.patience and (best is None or mean > best):
      best = mean
    state |= {'rewards': rewards, 'best_reward': best}
  return state


def share_of_best(best, reward):
  """The reward over its best mean; 1 while there is no mean above 0."""
  return reward / best if best is not None and best > 0 else 1.0


def broken(hp, state):
  """Names of the rules that the last `patience` buffers all break."""
  if hp.action == 'none':
    return []
  last = {rule: values[-hp.patience :] for rule, values in state['values'].items()}
  return [
    rule
    for rule in RULES
    if len(last.get(rule, [])) == hp.patience
    and not any(well(hp, rule, value) for value in last[rule])
  ]


def told(hp, state, rule):
  """A broken rule in words."""
  metric, side = RULES[rule]
  if rule == 'reward':
    metric = 'the reward, as a share of its best mean,'
  value = state['values'][rule][-1]
  return (
    f'{metric} is {side} health.{rule} = {getattr(hp, rule):g} for '
    f'{hp.patience} buffers, now {value:.4g}'
  )


def record(hp, state, iteration, rule):
  """What is written down of a broken rule."""
  return {
    'iteration': iteration,
    'rule': rule,
    'threshold': getattr(hp, rule),
    'action': hp.action,
    'values': [as_json(x) for x in state['values'][rule]],
  }


def as_json(value):
  """A number for a line of JSON, which has no nan and no inf."""
  return value if math.isfinite(value) else str(value)
