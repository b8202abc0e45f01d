"""Advantages of recorded steps, and subsets of steps, against enumeration.

Groups of completions of test_unbiased.py's table model are enumerated. What a baseline
is worth shows in the mean gradient over all groups.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_unbiased
from test_unbiased import cosine, error, gradient, policy_gradient, record_of, reward_of

from dmpo_jax import rollout
from dmpo_jax.objectives import OBJECTIVES, credit, shared
from dmpo_jax.types import Record, Scored

L = test_unbiased.L


def credits_of(order, tokens, value, shrink=1.0):
  """Returns prefix_advantages of rows as NumPy, (B, G, L)."""
  record = Record(jnp.asarray(order), None, None, {})
  scored = Scored(
    jnp.float32(value), None, record=record, block=0, tokens=jnp.asarray(tokens)
  )
  run = jax.jit(credit.prefix_advantages, static_argnums=2)
  return np.asarray(run(scored, jnp.float32(value), shrink))


# --- all groups of a sampler


@functools.cache
def groups_of(rule):
  """Returns groups of three: trajectories (N, 3), probability (N,), reward (N, 3).

  The last two are unordered: what is looked at is the first.
  """
  tokens, *_, p = test_unbiased.trajectories(rule)
  pairs = itertools.combinations_with_replacement(range(len(p)), 2)
  a, b = np.array(list(pairs)).T
  one, pair = (x.ravel() for x in np.mgrid[: len(p), : len(a)])
  members = np.stack([one, a[pair], b[pair]], axis=1)
  chance = p[members].prod(1) * np.where(a[pair] == b[pair], 1, 2)
  assert chance.sum() == pytest.approx(1, abs=1e-5)
  return members, chance, reward_of(tokens)[members]


def expected(rule, credit_NxGxL):
  """Returns the token credits of each trajectory, added over groups, (K, L)."""
  members, chance, _ = groups_of(rule)
  out = chance[:, None] * credit_NxGxL[:, 0]
  return np.add.reduceat(out, np.nonzero(np.diff(members[:, 0], prepend=-1))[0])


@pytest.mark.parametrize(
  'name, rule, steps, hp',
  [
    ('agrpo', 'left', 3, dict(choose='first', first=1, draws=2)),
    ('tracerl', 'threshold', 1, dict(beta=0.0)),
    pytest.param('dipo', 'random', 1, dict(beta=0.0), marks=pytest.mark.slow),
    ('mapg', 'luce', 2, dict(choose='each', draws=0)),
  ],
)
def test_prefix_credit_is_unbiased(name, rule, steps, hp):
  """The mean gradient over all groups is that of the expected reward.

  Whether positions follow from the state, or are drawn so that states meet again.
  """
  tokens, p, record = record_of(rule)
  members, _, reward = groups_of(rule)
  rows = lambda x: x[members].reshape(-1, L)
  for shrink in (1.0,) if rule == 'random' else (0.0, 1.0):
    tokens_credit = credits_of(rows(record.order), rows(tokens), reward, shrink)
    loo = shared.advantages(jnp.float32(reward), 'loo')
    assert np.abs(tokens_credit - np.asarray(loo)[..., None]).max() > 0.1
    mean = expected(rule, tokens_credit)
    copies = 4000 if hp.get('choose') == 'first' else 1
    got = steps * gradient(name, tokens, 0 * p, record, copies, mean, **hp)
    assert error(got, policy_gradient(rule)) < (5e-4 if copies == 1 else 0.03)


def scores(rule):
  """Returns the gradient of each token's log-prob by the table, (K, L, 64 * L * V)."""
  tokens, order, *_ = test_unbiased.trajectories(rule)
  theta = np.asarray(test_unbiased.THETA, np.float64)
  out = np.zeros((len(tokens), L, *theta.shape))
  for k, i in np.ndindex(*tokens.shape):
    state = np.where(order[k] >= order[k, i], test_unbiased.M, tokens[k])
    at = test_unbiased.index_of(state)
    law = np.exp(theta[at, i]) / np.exp(theta[at, i]).sum()
    out[k, i, at, i] = np.eye(len(law))[tokens[k, i]] - law
  return out.reshape(len(tokens), L, -1)


def step_weights(rule):
  """Returns {how: advantages of steps, (N, G, L)}."""
  members, _, reward = groups_of(rule)
  tokens, order, *_ = test_unbiased.trajectories(rule)
  differ = (order[:, None] != order[None]) | (tokens[:, None] != tokens[None])
  parting = np.where(differ, np.minimum(order[:, None], order[None]), L).min(-1)
  depth = parting[members[:, :, None], members[:, None]]  # L: the same trajectory
  self = np.eye(3, dtype=bool)[None]
  depth = np.where(self, L, depth)
  mean = lambda who: (who * reward[:, None]).sum(2) / np.maximum(who.sum(2), 1)
  whole, others = (
    reward.mean(1, keepdims=True),
    mean(np.broadcast_to(~self, depth.shape)),
  )
  out = {}
  of = lambda how, x: out.setdefault(how, []).append(x)
  for step in range(L):
    here, chosen = depth >= step, depth >= step + 1
    alone = (here & ~self).sum(2) == 0
    value, later = mean(here), mean(chosen)
    of('mean', reward - whole)
    of('others', reward - others)
    of('all here', reward - value)
    of('others here or nothing', np.where(alone, 0, reward - mean(here & ~self)))
    of('tempo', reward - whole + later - value)
    of('distinct', (later - value) / chosen.sum(2))
  out = {how: np.stack(x, 2) for how, x in out.items()}
  taken = np.arange(L) < (order.max(1) + 1)[members][..., None]
  classes = np.stack([1 / (depth >= step + 1).sum(2) for step in range(L)], 2)
  out['distinct'] = 3 * out['distinct'] / (classes * taken).sum((1, 2))[:, None, None]
  return out


@pytest.mark.parametrize('rule', ['left', 'threshold'])
def test_which_baselines_are_biased(rule):
  """Means that count the completion itself are, and so is leaving out steps."""
  _, order, *_ = test_unbiased.trajectories(rule)
  members = groups_of(rule)[0]
  exact, by_token = policy_gradient(rule).ravel(), scores(rule)
  found = {}
  for how, x in step_weights(rule).items():
    tokens = np.take_along_axis(x, order[members], axis=2)
    got = np.einsum('kl,klp->p', expected(rule, tokens), by_token)
    found[how] = error(got, exact)
    assert cosine(got, exact) > 0.8, how
    if how == 'mean':
      assert error(got * 3 / 2, exact) < 1e-4
  assert found['others'] < 1e-4, found
  for how in ('all here', 'others here or nothing', 'tempo', 'distinct'):
    assert found[how] > 0.05, found


# --- states, by brute force


def some_rows():
  """Returns order, tokens, reward of two groups whose rows share their beginnings."""
  rng = np.random.default_rng(0)
  order = np.array([rng.permutation(6) // 2 for _ in range(2)])[
    [0, 0, 0, 1, 1, 1, 0, 1]
  ]
  tokens = np.where(order < 1, 5, rng.integers(0, 2, order.shape))
  order[:, 5] = -2  # the end of the prompt
  order[2, order[2] == 2] = -1  # never unmasked: eos_stop
  tokens[1] = tokens[0]  # the same completion
  tokens[:, 5] = 7
  return order, tokens, rng.random((2, 4))


def test_credits_by_brute_force():
  """Completions are compared state by state; the recurrence is written out."""
  order, tokens, reward = some_rows()
  state = lambda r, d: [
    x if at < d and at != -1 else None
    for x, at in zip(tokens[r], order[r], strict=True)
  ]
  for shrink in (0.0, 1.5):
    got = credits_of(order, tokens, reward, shrink)
    for b, g in np.ndindex(2, 4):
      r, others = reward[b], [h for h in range(4) if h != g]
      base, were = [r[others].mean()], others
      for d in range(1, 4):
        here = [h for h in others if state(4 * b + h, d) == state(4 * b + g, d)]
        before = base[-1]
        mean = (r[here].sum() + shrink * before) / max(len(here) + shrink, 1e-9)
        base.append(mean if here and here != were else before)
        were = here
      for i, at in enumerate(order[4 * b + g]):
        want = r[g] - base[at] if at >= 0 else 0.0
        assert got[b, g, i] == pytest.approx(want, abs=1e-6)


def test_credits_follow_their_members_and_vanish_for_equal_rewards():
  order, tokens, reward = some_rows()
  got = credits_of(order, tokens, reward)
  assert np.ptp(got, axis=2).max() > 0.1
  swap = [2, 0, 3, 1]
  rows = lambda x: x.reshape(2, 4, -1)[:, swap].reshape(8, -1)
  swapped = credits_of(rows(order), rows(tokens), reward[:, swap])
  np.testing.assert_allclose(swapped, got[:, swap], atol=1e-6)
  assert not credits_of(order, tokens, np.full((2, 4), 0.1)).any()


def test_shrinkage_does_not_wear_off_along_a_shared_way():
  """Two of four rows stay together for many steps: one pull to the group, not many."""
  order = np.tile(np.arange(12), (4, 1))
  tokens = np.zeros((4, 12), int)
  tokens[2:, 0] = 1, 2
  got = credits_of(order, tokens, [[1.0, 0.0, 0.0, 0.0]])
  np.testing.assert_allclose(got[0, 0, 1:], 1.0)
  np.testing.assert_allclose(got[0, 1, 0], -1 / 3, rtol=1e-6)
  np.testing.assert_allclose(got[0, 1, 1:], -(1 + 1 / 3) / 2, rtol=1e-6)


def test_shared_steps_by_brute_force():
  """The metric counts the first steps that another row of the group takes, too."""
  order, tokens, _ = some_rows()
  order = np.where(order == -2, -1, order)  # as the host has it
  steps = lambda r: [
    sorted((i, tokens[r, i]) for i in np.nonzero(order[r] == d)[0])
    for d in range(order[r].max() + 1)
  ]

  def together(a, b):
    same = [x == y for x, y in zip(steps(a), steps(b), strict=False)]
    return (same + [False]).index(False)

  most = [
    max(together(r, h) for h in range(r // 4 * 4, r // 4 * 4 + 4) if h != r)
    for r in range(8)
  ]
  assert 0 < np.mean(most) < 3
  assert rollout.shared_steps(order, tokens, 4) == pytest.approx(np.mean(most))


# --- subsets of steps


def test_first_steps_surely_and_the_rest_by_inverse_probability():
  """Inclusion, mean and variance are those of drawing without replacement."""
  rng, copies = np.random.default_rng(1), 20000
  wanted = np.array([[1, 0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1, 0, 1], [0] * 8], bool)
  value = rng.normal(size=8)
  tile = jnp.repeat(jnp.asarray(wanted), copies, axis=0)
  row = jnp.arange(3 * copies)
  args = jax.random.key(0), row, tile, 2, 4
  step, weight = jax.jit(shared.choose_first, static_argnums=(3, 4))(*args)
  step, weight = (np.asarray(x).reshape(3, copies, 4) for x in (step, weight))
  included = lambda r, s: np.mean(((step[r] == s) & (weight[r] > 0)).any(1))
  of_row = (weight * value[step]).mean(2)
  np.testing.assert_allclose([included(0, s) for s in (0, 2)], 1)
  late = [3, 4, 5, 6, 7]
  np.testing.assert_allclose([included(0, s) for s in late], 2 / 5, atol=0.012)
  assert all(len(set(x)) == 4 for x in step[0, :1000])
  spread = 5**2 / 2 * (1 - 2 / 5) * value[late].var(ddof=1) / 7**2
  assert of_row[0].var() == pytest.approx(spread, rel=0.04)
  assert of_row[0].mean() == pytest.approx(value[wanted[0]].mean(), abs=0.01)
  np.testing.assert_allclose(of_row[1], value[wanted[1]].mean(), atol=1e-6)  # all four
  assert not weight[2].any()


@pytest.mark.parametrize('first', [0, 4])
def test_later_steps_must_have_a_chance(first):
  hp = OBJECTIVES['agrpo'].Config(choose='first', first=first, draws=4)
  assert any('objective.first' in text for text in hp.problems())
  assert 'first' in OBJECTIVES['agrpo'].Config().idle()


def test_merged_rounds_have_no_shared_states():
  hp = OBJECTIVES['tracerl'].Config(advantage='prefix', shrink=8)
  assert any('objective.shrink = 8' in text for text in hp.problems())
