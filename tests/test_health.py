"""Numbers of a buffer on arrays made by hand, rules on made-up sequences."""

import dataclasses
import json
import math

import numpy as np
import pytest

from configs import base
from dmpo_jax import build, check, health

pytestmark = pytest.mark.smoke
EOS = 9
OFF = {rule: 0.0 for rule in health.RULES}


def measured(texts, group, reward=None, grade=None):
  """buffer_metrics of texts without EOS, padded with it to five tokens."""
  tokens = np.full((len(texts), 5), EOS, np.int32)
  for row, text in enumerate(texts):
    tokens[row, : len(text)] = [int(x) for x in text]
  ended = np.cumsum(tokens == EOS, axis=1) - (tokens == EOS)
  zeros = np.zeros((len(texts) // group, group))
  return health.buffer_metrics(
    tokens,
    ended == 0,
    EOS,
    zeros if reward is None else np.array(reward),
    zeros if grade is None else np.array(grade),
  )


def test_empty_is_eos_first():
  """Not one that ends late, nor one that never ends."""
  assert measured(['', '1', '12345', ''], 2)['empty'] == 0.5


@pytest.mark.parametrize(
  'texts, share',
  [
    (['12345', '12121'], 0.0),
    (['11111', '11111'], 1.0),
    (['1123', '2'], 1 / 3),  # of three that follow another; '2' has none
    (['', ''], 0.0),  # the EOS behind an EOS is no repetition
    (['1', '99'], 0.0),
  ],
)
def test_repeated(texts, share):
  assert measured(texts, 2)['repeated'] == pytest.approx(share)


def test_what_follows_the_eos_changes_nothing():
  """Other tokens behind it: the same completions."""
  tokens = np.array([[1, 1, EOS, 3, 3], [1, 1, EOS, 4, 5]], np.int32)
  completion = np.array([[1, 1, 1, 0, 0]] * 2, bool)
  zeros = np.zeros((1, 2))
  found = health.buffer_metrics(tokens, completion, EOS, zeros, zeros)
  assert found == measured(['11', '11'], 2)
  assert found['distinct'] == 0.5 and found['repeated'] == 1


def test_distinct_is_within_groups():
  """3 of 3 and 1 of 3; '1' in both groups is no repetition."""
  assert measured(['1', '2', '11', '1', '1', '1'], 3)['distinct'] == (
    pytest.approx((1 + 1 / 3) / 2)
  )
  assert measured(['1', '2', '3', '1', '2', '3'], 3)['distinct'] == 1


def test_equal_groups():
  """Three of four without a signal, of which one has it all wrong."""
  reward = [[1, 1], [0, 0], [0, 1], [0.5, 0.5]]
  grade = [[1, 1], [0, 0], [0, 1], [1, 0]]
  found = measured(['1'] * 8, 2, reward, grade)
  assert found['equal_reward_groups'] == 0.75
  assert found['equal_wrong_groups'] == 0.25


def run(hp, name, values, state=None):
  """(state, [broken rules after each value])."""
  state, found = state or health.fresh(), []
  for value in values:
    before = json.dumps(state)
    new = health.note(hp, state, {name: value})
    assert json.dumps(state) == before  # it is not changed in place
    state = json.loads(json.dumps(new))  # as a checkpoint would
    found.append(health.broken(hp, state))
  return state, found


@pytest.mark.parametrize(
  'rule, well, ill',
  [
    (rule, *((0.2, 0.8) if side == 'above' else (0.8, 0.2)))
    for rule, (_, side) in health.RULES.items()
    if rule != 'reward'
  ],
)
def test_rules(rule, well, ill):
  """Broken by `patience` in a row on its side; one that is well, or on the
  bound, breaks the row; nan is ill; 0 is off."""
  metric = health.RULES[rule][0]
  hp = health.Config(**{**OFF, rule: 0.5, 'patience': 3})
  values = [ill, ill, well, ill, ill, 0.5, ill, math.nan, ill, ill, well]
  _, found = run(hp, metric, values)
  assert [bool(x) for x in found] == [False] * 8 + [True, True, False]
  assert found[8] == [rule]
  for off in (
    dataclasses.replace(hp, **{rule: 0.0}),
    dataclasses.replace(hp, action='none'),
  ):
    assert not any(run(off, metric, values)[1])


def test_reward_is_a_share_of_its_best_mean():
  """Of the best `patience` buffers in a row before; nothing before there are
  so many, or where the best is not above 0."""
  hp = health.Config(**{**OFF, 'reward': 0.5, 'patience': 2})
  state, found = run(hp, 'reward', [0.2, 0.6, 0.8, 0.34, 0.34, 0.36, 0.3, 0.3])
  assert [bool(x) for x in found] == [False] * 4 + [True] + [False] * 2 + [True]
  assert state['best_reward'] == pytest.approx(0.7)
  assert state['values']['reward'] == pytest.approx([0.3 / 0.7] * 2)
  assert (
    'its best mean, is below health.reward = 0.5 for 2 buffers, now 0.42'
    in health.told(hp, state, 'reward')
  )
  assert not any(run(hp, 'reward', [-1.0, -1.0, -5.0, -5.0, -9.0])[1])
  assert not any(run(hp, 'reward', [0.0] * 6)[1])
  # A rollback begins to count anew, against the best that it goes back to.
  _, found = run(hp, 'reward', [0.3, 0.3], health.fresh(0.7))
  assert found == [[], ['reward']]


def test_a_bound_that_is_changed_counts_at_once():
  """What a resumed run is given: other bounds, less or more patience."""
  hp = health.Config(**{**OFF, 'empty': 0.5, 'patience': 3})
  state, found = run(hp, 'empty', [0.6] * 3)
  change = lambda **fields: health.broken(dataclasses.replace(hp, **fields), state)
  assert found[-1] == change(patience=2) == ['empty']
  assert change(empty=0.7) == change(patience=4) == change(action='none') == []


def test_record():
  """A line of JSON, also where a value is not finite."""
  hp = health.Config(**{**OFF, 'grad_norm': 2.0, 'patience': 2})
  state, _ = run(hp, 'grad_norm', [3.0, math.inf])
  assert json.dumps(health.record(hp, state, 7, 'grad_norm')) == (
    '{"iteration": 7, "rule": "grad_norm", "threshold": 2.0, '
    '"action": "warn", "values": [3.0, "inf"]}'
  )


def test_defaults_are_those_of_the_config():
  given = check.settings(health.Config, base.get_config().health)
  assert given == health.Config()


@pytest.mark.parametrize(
  'changes, said',
  [
    ({'action': 'rolback'}, "health.action = 'rolback'.*mean 'rollback'"),
    ({'patience': 0}, 'health.patience = 0 must be >= 1'),
    ({'empty': 1.5}, r'health.empty = 1.5 must be in \[0, 1\]; 0 = off'),
    ({'grad_norm': -1.0}, 'health.grad_norm = -1.0 must be >= 0'),
    ({'lr_factor': 0.0}, r'health.lr_factor = 0.0 must be in \(0, 1\]'),
    ({'kl': 1.0}, 'health.kl = 1.0 needs health.measure=True'),
  ],
)
def test_refused(changes, said):
  """One sentence that names the field; only alpha = 0 has no log-probs."""
  c = base.get_config()
  c.objective.alpha, c.objective.antithetic = 0.0, False
  c.health.update(changes)
  with pytest.raises(ValueError, match=said):
    check.config(c, 1)
  if 'kl' in changes:
    c.health.measure = True
    check.config(c, 1)


def test_no_effective_size(monkeypatch):
  """health.ess with an objective that reports none."""
  plain = build.OBJECTIVES['dmpo']
  silent = plain._replace(weigh=lambda scored, hp: (scored.reward, scored.reward, {}))
  c = base.get_config()
  c.health.ess = 0.2
  check.config(c, 1)
  monkeypatch.setitem(build.OBJECTIVES, 'dmpo', silent)
  with pytest.raises(ValueError, match='health.ess = 0.2: objective.name'):
    check.config(c, 1)
