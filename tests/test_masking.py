"""Masks: which positions, how often, and independent of the batch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax import layout, masking, rng, types
from dmpo_jax.types import Masks

KEY = rng.key_for(0, 'mask', 1)
# Compiled once per shape; the range of the rate is an argument.
DRAWS = {
  'free': jax.jit(
    lambda rows, low, high, length: masking.draw_bernoulli(
      KEY, rows, types.Canvas(length), 3, (low, high), antithetic=False
    ),
    static_argnums=3,
  ),
  'bernoulli': jax.jit(
    lambda rows, low, high, length: masking.draw_bernoulli(
      KEY, rows, types.Canvas(length), 4, (low, high)
    ),
    static_argnums=3,
  ),
  'stratified': jax.jit(
    lambda rows, low, high, length: masking.draw_stratified(
      KEY, rows, types.Canvas(length), 4
    ),
    static_argnums=3,
  ),
  'even': jax.jit(
    lambda rows, low, high, length: masking.draw_even(
      KEY, rows, types.Canvas(length), 4, (0.1, 0.9)
    ),
    static_argnums=3,
  ),
  'even, free': jax.jit(
    lambda rows, low, high, length: masking.draw_even(
      KEY, rows, types.Canvas(length), 3, (0.1, 0.9), False
    ),
    static_argnums=3,
  ),
  'sft': jax.jit(
    lambda rows, low, high, length: masking.draw_sft(KEY, rows, types.Canvas(length)),
    static_argnums=3,
  ),
}


def draw(name, rows, length, low=0.0, high=1.0):
  return jax.device_get(DRAWS[name](jnp.asarray(rows), low, high, length))


@pytest.mark.parametrize('name', DRAWS)
def test_draws_ignore_the_batch(name):
  """A row's masks are a function of (key, row): not of its place, of its
  neighbours or of the size of the batch; and rows differ."""
  rows = np.array([7, 2, 900, 4])
  masks = draw(name, rows, 32)
  assert masks.masked.dtype == bool
  assert len({row.tobytes() for row in masks.masked}) == len(rows)
  turned, alone = draw(name, rows[::-1].copy(), 32), draw(name, [900], 32)
  for field in ('masked', 'weight'):
    whole = getattr(masks, field)
    np.testing.assert_array_equal(getattr(turned, field)[::-1], whole)
    np.testing.assert_array_equal(getattr(alone, field)[0], whole[2])


@pytest.mark.parametrize('name', ['bernoulli', 'stratified', 'even'])
@pytest.mark.smoke
def test_second_half_is_the_complement(name):
  """Each position is masked in exactly one draw of a pair."""
  masked = draw(name, np.arange(4), 32).masked
  np.testing.assert_array_equal(masked[:, :2], ~masked[:, 2:])
  assert not np.array_equal(masked[:, 0], masked[:, 1])


@pytest.mark.parametrize(
  'low, high', [(0.0, 1.0), (0.1, 1.0), (0.25, 0.75), (0.5, 0.5)]
)
def test_bernoulli_rate_is_uniform_on_its_range(low, high):
  """Over a long row the masked share is the rate: uniform on [low, high)."""
  masks = draw('free', np.arange(150), 2000, low, high)
  rate = np.sort(masks.masked.mean(-1).ravel())
  # The share of a row scatters by 0.011, and the quantiles of 450 rates lie
  # within 0.08 of their places (Kolmogorov and Smirnov, p = 0.006).
  assert rate[0] > low - 0.05 and rate[-1] < high + 0.05
  places = low + (high - low) * (np.arange(rate.size) + 0.5) / rate.size
  assert np.max(np.abs(rate - places)) < 0.08 * (high - low) + 0.05


def test_bernoulli_positions_share_the_rate_only():
  """Given the rate, positions are independent and alike."""
  masks = draw('free', np.arange(14_000), 3, 0.3, 0.3)
  masked = masks.masked.reshape(-1, 3).astype(float)
  np.testing.assert_allclose(masked.mean(0), 0.3, atol=0.012)
  joint = masked.T @ masked / len(masked)
  np.testing.assert_allclose(joint[np.triu_indices(3, 1)], 0.09, atol=0.008)


def test_bernoulli_weight():
  """L / m, and finite where nothing is masked."""
  masks = draw('free', np.arange(14_000), 3)
  count = masks.masked.sum(-1)
  assert (count == 0).any()
  np.testing.assert_allclose(masks.weight[..., 0], 3 / np.maximum(count, 1))


def test_stratified_counts():
  """Counts are exact and fair: a pair sums to L, each draw's count is
  uniform on {0..L}, and a row's draws keep their distance on the circle."""
  length, rows = 6, 7000
  masks = draw('stratified', np.arange(rows), length)
  count = masks.masked.sum(-1)
  np.testing.assert_array_equal(count[:, :2] + count[:, 2:], length)
  np.testing.assert_array_equal((count[:, 1] - count[:, 0]) % 7, 3)
  for j in range(4):
    seen = np.bincount(count[:, j], minlength=length + 1)
    assert len(seen) == length + 1
    expected = rows / (length + 1)
    assert np.sum((seen - expected) ** 2 / expected) < 22.5  # p = 0.001, 6
  # With the count given every position is as likely as any other.
  for m in range(1, length):
    share = masks.masked[:, :2][count[:, :2] == m].mean(0)
    np.testing.assert_allclose(share, m / length, atol=0.05)
  weight = np.where(count, (length + 1) / np.maximum(count, 1), 0)
  np.testing.assert_allclose(masks.weight[..., 0], weight)


@pytest.mark.parametrize('low, high', [(0.0, 1.0), (0.1, 0.9)])
def test_count_law(low, high):
  """The binomial law over its rates, by quadrature; uniform on (0, 1)."""
  nodes, weights = np.polynomial.legendre.leggauss(16)
  rate = low + (high - low) * (nodes[:, None] + 1) / 2
  m = np.arange(7)
  ways = np.array([math.comb(6, k) for k in m])
  want = weights / 2 @ (ways * rate**m * (1 - rate) ** (6 - m))
  found = masking.count_law(6, low, high)
  np.testing.assert_allclose(found, want, rtol=1e-10)
  if (low, high) == (0.0, 1.0):
    np.testing.assert_allclose(found, 1 / 7)


@pytest.mark.parametrize('name', ['even', 'even, free'])
def test_even_counts_have_the_law_of_bernoulli(name):
  """Each draw's count has the integrated binomial law, places are alike, and
  the mean over a row's three scatters much less."""
  length, rows = 6, 7000
  masked = draw(name, np.arange(rows), length).masked
  count = masked.sum(-1)
  law = masking.count_law(length, 0.1, 0.9)
  for j in range(count.shape[1]):
    seen = np.bincount(count[:, j], minlength=length + 1)
    # The law is its own mirror image here: complements have it, too.
    assert np.sum((seen - rows * law) ** 2 / (rows * law)) < 22.5
  for m in range(1, length):
    share = masked[count == m].mean(0)
    np.testing.assert_allclose(share, m / length, atol=0.03)
  if name == 'even, free':
    free = draw('free', np.arange(rows), length, 0.1, 0.9).masked
    assert count.mean(1).var() < 0.3 * free.sum(-1).mean(1).var()


def test_odd_draws_are_refused():
  rows = jnp.arange(2)
  with pytest.raises(ValueError, match='even number of draws, not 3'):
    masking.draw_bernoulli(KEY, rows, types.Canvas(4), 3)
  with pytest.raises(ValueError, match='even number of draws, not 5'):
    masking.draw_stratified(KEY, rows, types.Canvas(4), 5)
  with pytest.raises(ValueError, match='even number of draws, not 3'):
    masking.draw_even(KEY, rows, types.Canvas(4), 3)


def test_sft_weight_undoes_the_rate():
  """Weight times mask has mean 1 at every position, and the floor holds."""
  masks = draw('sft', np.arange(40_000), 4)
  assert masks.masked.shape == (40_000, 1, 4)
  assert masks.weight.min() >= 1 and masks.weight.max() <= 1000.1
  # Rare large weights make the mean heavy-tailed: its standard error is
  # sqrt(ln 1000 / 40000) = 0.013.
  mean = (masks.weight * masks.masked).mean((0, 1))
  np.testing.assert_allclose(mean, 1, atol=0.06)


def test_apply_masks_spares_the_prompt():
  """Only completion positions change, only where masked, and even where the
  prompt holds every id."""
  tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
  masked = np.zeros((2, 3, 4), bool)
  masked[0, 1] = True
  masked[1, 2, 3] = True
  noisy = np.asarray(layout.apply_masks(jnp.asarray(tokens), masked, 99))
  expected = np.repeat(tokens[:, None], 3, axis=1)
  expected[0, 1, 2:] = 99
  expected[1, 2, 5] = 99
  np.testing.assert_array_equal(noisy, expected)
  assert noisy.dtype == np.int32


@pytest.mark.smoke
def test_completion_mask():
  """True up to and including the first EOS; later ones change nothing."""
  rows = {
    (1, 2, 9, 3, 9): [1, 1, 1, 0, 0],
    (9, 9, 9, 9, 9): [1, 0, 0, 0, 0],
    (1, 2, 3, 4, 9): [1, 1, 1, 1, 1],
    (1, 2, 3, 4, 5): [1, 1, 1, 1, 1],
  }
  found = masking.completion_mask(jnp.asarray(list(rows)) == 9)
  assert found.dtype == bool
  np.testing.assert_array_equal(found, np.array(list(rows.values()), bool))


def test_restrict():
  """The tail leaves every draw, and the weight speaks of what remains."""
  masked = np.array([[[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 1]]], bool)
  completion = np.array([[1, 1, 1, 0]], bool)
  masks = masking.restrict(Masks(masked, np.zeros((1, 3, 1))), completion)
  expected = [[[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]]
  np.testing.assert_array_equal(masks.masked, np.array(expected, bool))
  np.testing.assert_allclose(masks.weight[..., 0], [[3 / 2, 3, 3]])


def test_restrict_of_whole_completions_changes_nothing():
  masks = draw('bernoulli', np.arange(4), 32)
  same = masking.restrict(masks, np.ones((4, 32), bool))
  np.testing.assert_array_equal(same.masked, masks.masked)
  np.testing.assert_allclose(same.weight, masks.weight)
