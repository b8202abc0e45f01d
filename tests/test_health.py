"""Numbers of buffers that are made by hand, and rules on made-up sequences."""

import dataclasses
import json
import math

import numpy as np
import pytest

from benchmarks.collapse import broken_at
from configs import base
from dmpo_jax import build, check, health

pytestmark = pytest.mark.smoke
EOS = 9
OFF = {rule: 0.0 for rule in health.RULES}


def measured(texts, group, reward=None, grade=None):
  """Returns buffer_metrics of texts that EOS pads to five tokens."""
  tokens = np.full((len(texts), 5), EOS, np.int32)
  for row, text in enumerate(texts):
    tokens[row, : len(text)] = [int(x) for x in text]
  ended = np.cumsum(tokens == EOS, axis=1) - (tokens == EOS)
  zeros = np.zeros((len(texts) // group, group))
  return health.buffer_metrics(
    tokens,
    ended == 0,
    (EOS,),
    zeros if reward is None else np.array(reward),
    zeros if grade is None else np.array(grade),
  )


def test_empty_counts_completions_that_begin_with_eos():
  assert measured(['', '1', '12345', ''], 2)['empty'] == 0.5


def test_every_stop_ends_a_text():
  """A chat's end of turn is no word: a text that begins with it is empty."""
  tokens = np.array([[7, EOS, EOS], [1, 7, EOS]], np.int32)
  completion = np.array([[1, 0, 0], [1, 1, 0]], bool)
  zeros = np.zeros((1, 2))
  found = [
    health.buffer_metrics(tokens, completion, stops, zeros, zeros)['empty']
    for stops in ((EOS,), (EOS, 7))
  ]
  assert found == [0.0, 0.5]


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
def test_repeated_tokens(texts, share):
  assert measured(texts, 2)['repeated'] == pytest.approx(share)


def test_tokens_after_the_eos_do_not_count():
  tokens = np.array([[1, 1, EOS, 3, 3], [1, 1, EOS, 4, 5]], np.int32)
  completion = np.array([[1, 1, 1, 0, 0]] * 2, bool)
  zeros = np.zeros((1, 2))
  found = health.buffer_metrics(tokens, completion, (EOS,), zeros, zeros)
  assert found == measured(['11', '11'], 2)
  assert found['distinct'] == 0.5 and found['repeated'] == 1


def test_distinct_compares_within_groups():
  """Here 3 of 3 and 1 of 3; a '1' in both groups is no repetition."""
  assert measured(['1', '2', '11', '1', '1', '1'], 3)['distinct'] == (
    pytest.approx((1 + 1 / 3) / 2)
  )
  assert measured(['1', '2', '3', '1', '2', '3'], 3)['distinct'] == 1


def test_groups_of_equal_rewards():
  """Three of four are without a signal; one of those has it all wrong."""
  reward = [[1, 1], [0, 0], [0, 1], [0.5, 0.5]]
  grade = [[1, 1], [0, 0], [0, 1], [1, 0]]
  found = measured(['1'] * 8, 2, reward, grade)
  assert found['equal_reward_groups'] == 0.75
  assert found['equal_wrong_groups'] == 0.25


def run(hp, name, values, state=None):
  """Returns (state, [broken rules after each value])."""
  state, found = state or health.State(), []
  for value in values:
    before = json.dumps(dataclasses.asdict(state))
    new = health.note(hp, state, {name: value})
    assert json.dumps(dataclasses.asdict(state)) == before  # not changed in place
    # As a checkpoint does:
    state = health.State(**json.loads(json.dumps(dataclasses.asdict(new))))
    found.append(health.broken(hp, state))
  return state, found


@pytest.mark.parametrize(
  'rule, healthy, unhealthy',
  [
    (rule, *((0.2, 0.8) if side == 'above' else (0.8, 0.2)))
    for rule, (_, side) in health.RULES.items()
    if rule != 'reward'
  ],
)
def test_rules(rule, healthy, unhealthy):
  """`patience` values in a row on the wrong side break a rule; one that is healthy or
  on the bound ends the row; nan is unhealthy; 0 is off."""
  metric = health.RULES[rule][0]
  hp = health.Config(**{**OFF, rule: 0.5, 'patience': 3})
  bad, good = unhealthy, healthy
  values = [bad, bad, good, bad, bad, 0.5, bad, math.nan, bad, bad, good]
  _, found = run(hp, metric, values)
  assert [bool(x) for x in found] == [False] * 8 + [True, True, False]
  assert found[8] == [rule]
  for off in (
    dataclasses.replace(hp, **{rule: 0.0}),
    dataclasses.replace(hp, action='none'),
  ):
    assert not any(run(off, metric, values)[1])


def test_reward_is_a_share_of_its_best_mean():
  """The best mean is that of `patience` buffers in a row; without one above 0 the rule
  is never broken."""
  hp = health.Config(**{**OFF, 'reward': 0.5, 'patience': 2})
  state, found = run(hp, 'reward', [0.2, 0.6, 0.8, 0.34, 0.34, 0.36, 0.3, 0.3])
  assert [bool(x) for x in found] == [False] * 4 + [True] + [False] * 2 + [True]
  assert state.best_reward == pytest.approx(0.7)
  assert state.values['reward'] == pytest.approx([0.3 / 0.7] * 2)
  assert (
    'its best mean, is below health.reward = 0.5 for 2 buffers, now 0.42'
    in health.sentence(hp, state, 'reward')
  )
  assert not any(run(hp, 'reward', [-1.0, -1.0, -5.0, -5.0, -9.0])[1])
  assert not any(run(hp, 'reward', [0.0] * 6)[1])
  _, found = run(hp, 'reward', [0.3, 0.3], health.State(best_reward=0.7))
  assert found == [[], ['reward']]


def test_a_changed_bound_counts_at_once():
  """A resumed run may have other bounds, and less or more patience."""
  hp = health.Config(**{**OFF, 'empty': 0.5, 'patience': 3})
  state, found = run(hp, 'empty', [0.6] * 3)
  change = lambda **fields: health.broken(dataclasses.replace(hp, **fields), state)
  assert found[-1] == change(patience=2) == ['empty']
  assert change(empty=0.7) == change(patience=4) == change(action='none') == []


def test_record_is_json():
  """Also where a value is not finite."""
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
  'changes, sentence',
  [
    ({'action': 'stopp'}, "health.action = 'stopp'.*mean 'stop'"),
    ({'action': 'rollback'}, 'health.action.*none, warn, stop'),
    ({'patience': 0}, 'health.patience.*>= 1'),
    ({'empty': 1.5}, r'health.empty.*\[0, 1\]; 0 = off'),
    ({'logp_token': 0.5}, 'health.logp_token.*< 0'),
    ({'grad_norm': -1.0}, 'health.grad_norm.*>= 0'),
    ({'kl': 1.0}, 'health.kl.*health.measure = True'),
  ],
)
def test_impossible_settings_are_refused(changes, sentence):
  """The sentence names the field; only alpha = 0 has no log-probs."""
  c = base.get_config()
  c.objective.alpha, c.objective.antithetic = 0.0, False
  c.health.update(changes)
  with pytest.raises(ValueError, match=sentence):
    check.config(c, 1)
  if 'kl' in changes:
    c.health.measure = True
    check.config(c, 1)


def test_ess_needs_an_objective_that_reports_it(monkeypatch):
  plain = build.OBJECTIVES['dmpo']
  silent = plain._replace(weigh=lambda scored, hp: (scored.reward, scored.reward, {}))
  c = base.get_config()
  c.health.ess = 0.2
  check.config(c, 1)
  monkeypatch.setitem(build.OBJECTIVES, 'dmpo', silent)
  with pytest.raises(ValueError, match='health.ess = 0.2: objective.name'):
    check.config(c, 1)


def test_run_without_any_spread_says_so_every_ten_buffers():
  """Whatever the bounds are; one group with a spread begins the count anew."""
  hp, state, counts = health.Config(action='none'), health.State(), []
  for share in [1.0] * 10 + [0.9] + [1.0] * 21:
    numbers = {'reward': 0.0, 'equal_reward_groups': share}
    state = health.note(hp, state, numbers)
    counts.append(state.flat)
  assert counts == [*range(1, 11), 0, *range(1, 22)]
  again = health.State(**json.loads(json.dumps(dataclasses.asdict(state))))
  assert health.note(hp, again, {'grad_norm': 1.0}).flat == 21  # an update's numbers


# Of two runs of benchmarks/collapse.py, diffu_grpo with seed 1: without a penalty, and
# with d1's. Nats of a completion, and the mean reward of a buffer.
COLLAPSED = (
  [
    0.0, 0.1, 0.9, 0.9, 1.6, 2.4, 2.4, 1.4, 1.9, 2.0, 2.1, 2.6, 4.6, 3.2, 4.6, 5.8, 5.2,
    2.7, 4.6, 3.3, 4.9, 4.4, 4.6, 5.4, 6.1, 3.8, 4.7, 8.3, 11.8, 12.6, 11.1, 15.3, 12.6,
  ],
  [
    0.68, 0.72, 0.82, 0.7, 0.76, 0.84, 0.82, 0.8, 0.74, 0.85, 0.71, 0.78, 0.69, 0.79,
    0.51, 0.6, 0.65, 0.72, 0.67, 0.65, 0.56, 0.48, 0.62, 0.51, 0.54, 0.64, 0.48, 0.4,
    0.26, 0.23, 0.19, 0.24, 0.11,
  ],
)  # fmt: skip
HELD = (
  [
    0.0, 0.1, 0.9, 1.2, 0.7, 0.7, 0.8, 0.6, 1.1, 1.2, 1.2, 1.3, 0.9, 0.6, 0.9, 1.0, 0.3,
    0.8, 1.1, 0.4, 0.7, 0.6, 0.8, 1.0, 1.0, 1.1, 0.4, 1.1, 1.0, 0.6, 0.8, 1.2, 0.8,
  ],
  [
    0.68, 0.73, 0.79, 0.75, 0.76, 0.67, 0.66, 0.7, 0.81, 0.82, 0.75, 0.82, 0.81, 0.62,
    0.83, 0.73, 0.72, 0.78, 0.58, 0.6, 0.52, 0.59, 0.71, 0.67, 0.71, 0.64, 0.66, 0.63,
    0.72, 0.71, 0.59, 0.67, 0.77,
  ],
)  # fmt: skip


def test_kl_sees_a_collapse_ten_buffers_before_the_reward_does():
  """The base has 1.5 nats to go to its right answers: twice that is the bound."""
  rows = lambda series: [
    {'step': i, 'kl_ref': kl, 'reward': reward}
    for i, (kl, reward) in enumerate(zip(*series, strict=True))
  ]
  seen = broken_at(rows(COLLAPSED), 'kl', 3.0, 5)
  fallen = broken_at(rows(COLLAPSED), 'reward', 0.5, 5)
  assert seen is not None and fallen is not None
  assert fallen - seen >= 10
  assert broken_at(rows(HELD), 'kl', 3.0, 5) is None
  assert broken_at(rows(HELD), 'reward', 0.5, 5) is None
