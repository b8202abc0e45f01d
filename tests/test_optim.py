"""The optimizer: warm-up, decay and clipping, by their effect on weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmpo_jax import optim

PARAMS = {
  'layers': {
    'q': {'kernel': jnp.array([[1.0, -2.0]]), 'bias': jnp.array([3.0])},
    'norm': {'scale': jnp.array([2.0])},
  },
  'embedding': jnp.array([[4.0]]),
}
PLAIN = optim.Config(lr=0.1, warmup=0, clip=0.0)


def moves(grads, lr=None, **changes):
  """Returns the updates for a sequence of gradients of PARAMS."""
  optimizer = optim.make_optimizer(dataclasses.replace(PLAIN, **changes), lr)
  state, out = optimizer.init(PARAMS), []
  for grad in grads:
    update, state = optimizer.update(grad, state, PARAMS)
    out.append(update)
  return out


def filled(value):
  return jax.tree.map(lambda x: jnp.full_like(x, value), PARAMS)


def norm(tree):
  return float(optax.tree.norm(tree))


def size(update):
  return float(np.abs(update['embedding'][0, 0]))


@pytest.mark.smoke
def test_warm_up_is_a_ramp_then_constant():
  """Adam's step on a constant gradient is the rate: lr/n, 2 lr/n, .. lr."""
  got = [size(u) for u in moves([filled(0.5)] * 8, warmup=4)]
  np.testing.assert_allclose(got, [0.025, 0.05, 0.075] + [0.1] * 5, rtol=1e-4)


@pytest.mark.parametrize(
  'warmup, want', [(0, [0.1] * 3), (1, [0.1] * 3), (2, [0.05, 0.1, 0.1])]
)
def test_short_warm_ups(warmup, want):
  """Without warm-up the first update has the full rate."""
  got = [size(u) for u in moves([filled(0.5)] * 3, warmup=warmup)]
  np.testing.assert_allclose(got, want, rtol=1e-4)


def test_decay_spares_norms_and_biases():
  """Without a gradient only the matrices shrink, by lr * decay * weight."""
  (update,) = moves([filled(0.0)], weight_decay=0.2)
  q = update['layers']['q']
  np.testing.assert_allclose(q['kernel'], [[-0.02, 0.04]], rtol=1e-5)
  np.testing.assert_allclose(update['embedding'], [[-0.08]], rtol=1e-5)
  assert float(q['bias'][0]) == 0
  assert float(update['layers']['norm']['scale'][0]) == 0
  mask = optim.decayed({**PARAMS, 'lora': {'q': {'a': 1.0, 'b': 1.0}}})
  assert mask == {
    'layers': {'q': {'kernel': True, 'bias': False}, 'norm': {'scale': False}},
    'embedding': True,
    'lora': {'q': {'a': True, 'b': True}},
  }


def test_clip_is_by_the_global_norm():
  """Gradients above the norm are scaled together, others stay."""
  # A large eps makes Adam's first step nearly the gradient / eps.
  few = dict(lr=1e3, eps=1e3)
  large, small = filled(2.0), filled(0.01)
  assert norm(large) > 0.3 > norm(small)
  (clipped,) = moves([large], clip=0.3, **few)
  assert norm(clipped) == pytest.approx(0.3, rel=1e-3)
  (left,) = moves([small], clip=0.3, **few)
  assert norm(left) == pytest.approx(norm(small), rel=1e-3)
  (free,) = moves([large], clip=0.0, **few)
  assert norm(free) == pytest.approx(norm(large), rel=1e-2)


def test_adamw_by_hand():
  """Two updates of one weight are those of the formulas."""
  grads, decay = [0.5, -0.2], 0.3
  got = moves([filled(g) for g in grads], b1=0.8, b2=0.95, eps=1e-3, weight_decay=decay)
  m = v = 0.0
  for t, (g, update) in enumerate(zip(grads, got, strict=True), 1):
    m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
    step = m / (1 - 0.8**t) / ((v / (1 - 0.95**t)) ** 0.5 + 1e-3)
    assert float(update['embedding'][0, 0]) == pytest.approx(
      -0.1 * (step + decay * 4.0), rel=1e-4
    )


def test_golden():
  """The third update of a fixed run is the one of the past."""
  got = moves(
    [filled(g) for g in (1.0, -0.5, 0.25)], warmup=2, clip=1.0, weight_decay=0.1
  )[2]
  assert float(got['embedding'][0, 0]) == pytest.approx(-0.0597419, abs=1e-6)


def test_decay_ends_at_zero():
  """The rate is halved half-way, and zero from decay_steps on."""
  hp = optim.Config(1.0, 0, decay_steps=10, b1=0.0, b2=0.0, eps=1e-30, clip=0.0)
  optimizer = optim.make_optimizer(hp)
  params = {'kernel': jnp.ones(1)}
  state, rates = optimizer.init(params), []
  for _ in range(12):
    updates, state = optimizer.update(params, state, params)
    rates.append(-float(updates['kernel'][0]))
  np.testing.assert_allclose(rates[0:11:5], [1.0, 0.5, 0.0], atol=1e-6)
  assert rates[11] == 0.0


def test_learning_rate_may_be_an_argument():
  """A rate that is traced gives the update of a constant one; moments do not see it."""
  grads = [filled(0.5), filled(-0.2)]
  settings = dict(warmup=3, decay_steps=9, weight_decay=0.1)
  traced = jax.jit(lambda lr: moves(grads, lr, **settings))
  for lr in (0.1, 0.025):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
      traced(np.float32(lr)),
      moves(grads, lr, **settings),
    )
