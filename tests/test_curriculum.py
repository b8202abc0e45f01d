"""The curriculum: closed forms, exact inclusion, and prompts that a resume repeats.

The signals are checked against the objectives' own weights and against integrals over
the Beta posterior; the runs are those of tiny_run.
"""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats
from tiny_run import (
  INNER,
  fail_at,
  interrupt,
  run,
  same,
  same_files,
  same_run,
  stop_at,
  tiny,
  vary,
  watched,
)

from dmpo_jax import build, check, curriculum
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.types import Scored

pytest_plugins = ('tiny_run',)
pytestmark = pytest.mark.usefixtures('plain_saves')

GROUP = 8
ARMS = [
  ('espo', {}, 'policy_gradient'),
  ('dmpo', {'baseline': 'none'}, 'matching'),
  ('dmpo', {'baseline': 'group'}, 'matching'),
  ('dmpo', {'baseline': 'individual'}, 'mixed'),
  ('wd1', {'alpha': 0.01}, 'mixed'),
]


def hp_of(**changes):
  return dataclasses.replace(curriculum.Config(signal='objective'), **changes)


# --- the signal


@pytest.mark.parametrize('name, changes, signal', ARMS)
def test_signal_is_the_push_of_the_objectives_own_weights(name, changes, signal):
  """d/dl of the expected loss, l the logit of p: all 2^8 groups, weighted by chance."""
  objective = OBJECTIVES[name]
  hp = dataclasses.replace(objective.Config(), **changes)
  right = (np.arange(2**GROUP)[:, None] >> np.arange(GROUP)) % 2
  zero = jnp.zeros(right.shape)
  scored = Scored(jnp.float32(right), zero.astype(int), zero, zero)
  weight = np.asarray(objective.weigh(scored, hp)[0], np.float64)
  if signal == 'policy_gradient':  # its weights are means over the group
    weight = (right - right.mean(1, keepdims=True)) / GROUP
  used = curriculum.signal_of('objective', objective.strength(hp))
  for p in (0.02, 0.257, 0.5, 0.9):
    chance = np.prod(np.where(right, p, 1 - p), axis=1)
    push = np.sum(weight * np.where(right, 1 - p, -p), axis=1) @ chance
    sure = 1e9  # a posterior that knows p
    for found in (used, curriculum.SIGNALS[signal]):
      got = found(np.array([p * sure]), np.array([(1 - p) * sure]), GROUP)
      np.testing.assert_allclose(got, push, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('name', curriculum.SIGNALS)
def test_signal_is_its_mean_over_the_posterior(name):
  """The closed form equals the integral over Beta(a, b)."""
  signal, sure = curriculum.SIGNALS[name], 1e9
  at = lambda p: float(
    signal(np.array([p * sure]), np.array([(1 - p) * sure]), GROUP)[0]
  )
  for a, b in ((1.0, 1.0), (2.5, 4.0), (9.0, 1.0)):
    density = stats.beta(a, b).pdf
    want, _ = integrate.quad(lambda p: at(p) * density(p), 1e-9, 1 - 1e-9)  # noqa: B023
    got = signal(np.array([a]), np.array([b]), GROUP)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_matching_is_largest_at_hard_problems():
  """1 - G^(-1 / (G - 1)): 0.257 for eight completions, where p (1 - p) has 1/2."""
  p = np.linspace(0, 1, 100_001)[1:-1]
  best = lambda name: p[np.argmax(curriculum.SIGNALS[name](p * 1e9, (1 - p) * 1e9, 8))]
  assert abs(best('matching') - (1 - 8 ** (-1 / 7))) < 1e-3
  assert abs(best('policy_gradient') - 0.5) < 1e-3


# --- which problems


def test_inclusion_is_exact_and_unbiased():
  """Each problem comes with its probability, no buffer has one twice, and the corrected
  weights give the mean over all problems."""
  count, batch, steps = 50, 8, 20_000
  random = np.random.default_rng(0)
  signal = random.random(count) ** 12
  chance = curriculum.inclusion(signal, batch, 0.2)
  assert chance.max() == 1  # some are certain
  np.testing.assert_allclose(chance.sum(), batch)
  assert chance.min() >= 0.2 * batch / count * (1 - 1e-9)
  value, hits, means = random.normal(size=count), np.zeros(count), []
  for step in range(steps):
    index = curriculum.systematic(chance, batch, np.random.default_rng([7, step]))
    assert len(set(index.tolist())) == batch
    hits[index] += 1
    means.append(np.mean(value[index] * batch / (count * chance[index])))
  error = np.sqrt(chance * (1 - chance) / steps)
  assert np.all(np.abs(hits / steps - chance) <= 5 * error + 1e-12)
  assert abs(np.mean(means) - value.mean()) < 5 * np.std(means) / steps**0.5


def test_choice_is_a_function_of_the_lines_before():
  """Equal posteriors draw evenly; solved problems come back at the uniform rate; later
  lines, and the order in which they are read, change nothing."""
  sizes, grades = (16, 4, GROUP), np.ones((12, GROUP))
  make = lambda **hp: curriculum.Curriculum(
    hp_of(**hp), curriculum.SIGNALS['matching'], sizes, 3
  )
  one = make()
  np.testing.assert_allclose(one.chance(0), 4 / 16)
  solved = np.arange(12)
  for iteration in range(6):
    one.line(iteration, solved, grades)
  chance = one.chance(6)
  assert np.all(chance[:12] < 0.14) and np.all(chance[:12] >= 0.2 * 4 / 16)
  assert np.all(chance[12:] > 0.6)
  two = make()
  two.read(list(one.lines.values())[::-1])
  np.testing.assert_array_equal(one.choose(3).index, two.choose(3).index)
  two.line(3, solved[:4], grades[:4] * 0)
  np.testing.assert_array_equal(one.choose(3).index, two.choose(3).index)
  assert two.chance(6)[0] > one.chance(6)[0]
  assert not np.array_equal(one.choose(3).index, one.choose(3, 1).index)
  share = make(correct=True)
  share.read(list(one.lines.values()))
  chosen = share.choose(6)
  np.testing.assert_allclose(chosen.share, 4 / (16 * chance[chosen.index]), rtol=1e-6)
  del two.lines[2]
  with pytest.raises(ValueError, match=r'passes.jsonl.*iteration 2'):
    two.choose(3)


def test_a_group_halves_what_was_known_before():
  """a <- 1 + memory (a - 1) + passes, b likewise; other problems keep theirs."""
  made = curriculum.Curriculum(hp_of(), curriculum.SIGNALS['mixed'], (3, 1, 4), 0)
  made.line(0, [1], np.array([[1, 1, 1, 0]]))
  made.line(1, [1], np.array([[0, 0.5, 0, 0]]))
  a, b = made.posterior(2)
  np.testing.assert_allclose(a, [1, 1 + 1.5 + 0.5, 1])
  np.testing.assert_allclose(b, [1, 1 + 0.5 + 3.5, 1])


# --- in a run


def grade_by_row(text, example, protocol):
  """A grade that depends on problem and text."""
  return float((sum(map(ord, text)) + int(example['puzzle'][:4])) % 3 == 0)


@pytest.fixture(scope='module')
def learning(early):
  """The tiny run of three iterations with a curriculum, and its buffers ahead."""
  part = vary(early, curriculum={'signal': 'objective', 'correct': True})
  return part._replace(task=part.task._replace(grade=grade_by_row))


def passes(workdir):
  return [json.loads(x) for x in (workdir / curriculum.FILE).read_text().splitlines()]


def test_run_with_a_curriculum_resumes_to_the_bit(learning, base_params, tmp_path):
  """Killed while a buffer is graded and trained on, it comes to the same
  prompts, weights and lines; its weights have the corrected shares."""
  seen = []

  def watch(name, args):
    if name == 'pack':
      seen.append(args)

  whole = tmp_path / 'whole'
  final = run(watched(learning, watch), whole, base_params)
  lines = passes(whole)
  assert [line['iteration'] for line in lines] == [0, 1, 2]
  assert len({tuple(line['index']) for line in lines}) > 1
  assert any(sum(line['passes']) for line in lines)
  again = build.collector(learning, base_params).chooser
  again.read(lines)
  for iteration, (_, _, _, share) in enumerate(seen):
    np.testing.assert_array_equal(again.choose(iteration).share, share)
  places = (
    ('graded', lambda part: watched(part, stop_at('reward', 8 * 2 + 3, interrupt))),
    ('trained', lambda part: fail_at(part, INNER + 2, interrupt)),
  )
  for name, stopped in places:
    part = vary(learning, checkpoint={'every': 2})
    with pytest.raises(KeyboardInterrupt):
      run(stopped(part), tmp_path / name, base_params, kill=True)
    same_run(run(part, tmp_path / name, base_params), tmp_path / name, (whole, final))
    assert passes(tmp_path / name) == lines


def test_resampling_replaces_groups_of_equal_rewards(built, base_params, tmp_path):
  """Groups come from later rounds only for such groups; what is trained on is what was
  sampled; at most so many rounds; resume is to the bit."""
  packed, sampled = [], []

  def watch(name, args):
    if name == 'pack':
      packed.append(args)
    if name == 'sample':
      sampled.append(args)

  def reward(text, example, protocol):  # half of the problems pay all the same
    same_for_all = sum(map(int, example['puzzle'])) % 2
    return {'letters': 0.5 if same_for_all else (sum(map(ord, text)) % 7) / 7}

  part = vary(built, curriculum={'resample': 3}, checkpoint={'every': 2})
  part = part._replace(task=part.task._replace(reward=reward))
  final = run(watched(part, watch), tmp_path / 'a', base_params)
  metric = [
    row
    for row in map(json.loads, (tmp_path / 'a/metrics.jsonl').read_text().splitlines())
    if row['phase'] == 'rl'
  ]
  rounds = [1 + int(row['resampled']) for row in metric]
  assert len(sampled) == sum(rounds) and max(rounds) <= 4 and max(rounds) > 1
  assert sum(row['groups_replaced'] for row in metric) > 0
  row_ids = [set(np.asarray(args[3]).tolist()) for args in sampled]
  assert sum(map(len, row_ids)) == len(set().union(*row_ids))  # no address twice
  by_row = {
    int(row): np.asarray(args[1])[i]
    for args in sampled
    for i, row in enumerate(args[3])
  }
  for got, reward_BxG, _ in packed:
    width = got.rollouts.tokens.shape[1] - 16
    for i, row in enumerate(np.asarray(got.row)):
      prompt = np.asarray(got.rollouts.tokens)[i, :width]
      np.testing.assert_array_equal(prompt, by_row[int(row)])
    first = np.asarray(got.row) % 32 < 8  # of the first round
    dead = reward_BxG.max(1) == reward_BxG.min(1)
    assert np.all(first.reshape(2, 4)[dead])  # a later round brings live groups alone
  with pytest.raises(KeyboardInterrupt):
    run(fail_at(part, 4, interrupt), tmp_path / 'b', base_params, kill=True)
  same(run(part, tmp_path / 'b', base_params), final)
  same_files(tmp_path / 'b', tmp_path / 'a')


@pytest.mark.parametrize(
  'fields, named',
  [
    ({'curriculum.signal': 'hard'}, 'curriculum.signal'),
    ({'curriculum.uniform': 0.0}, 'curriculum.uniform'),
    ({'curriculum.resample': 2, 'train.overlap': True}, 'train.overlap'),
    ({'curriculum.resample': 2, 'data.bucket': 4}, 'data.bucket'),
    (
      {
        'curriculum.resample': 1,
        'curriculum.signal': 'mixed',
        'curriculum.correct': True,
      },
      'curriculum.correct',
    ),
  ],
)
def test_impossible_settings_are_refused(fields, named):
  c = tiny()
  c.update_from_flattened_dict(fields)
  with pytest.raises(ValueError, match=named):
    check.config(c, 8)


def test_fewer_problems_than_prompts_are_refused():
  c = tiny()
  c.update_from_flattened_dict({'curriculum.signal': 'mixed', 'data.train_size': 1})
  with pytest.raises(ValueError, match=r'train.prompts = 2.*1 problems'):
    build.problems(build.build(c), 'train')
