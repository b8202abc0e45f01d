"""Slots: a fixed number of rows at a time gives the tokens of all rows at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax import mesh, model, sampler
from dmpo_jax.sampler import rolling

ROWS, PROMPT, LENGTH, BLOCK = 16, 7, 16, 4
CFG = model.ModelConfig(
  vocab=12, width=32, layers=2, heads=2, kv_heads=1, mlp=48, mask_id=11, eos_id=10,
  pad_id=9, positions=64, rope_theta=100.0, qk_norm=True, stop_ids=(3, 10),
)  # fmt: skip
HP = sampler.SampleConfig(
  LENGTH, BLOCK, LENGTH, 1.0, 'threshold', rank='max', threshold=0.4, eos_stop=True
)
# (attention block, shift, cache, slots)
CASES = {
  'no cache': (0, False, 'none', 4),
  'prefix': (0, True, 'prefix', 8),
  'dual': (0, False, 'dual', 4),
  'block': (BLOCK, False, 'block', 4),
  'block, shifted': (BLOCK, True, 'block', 8),
}


@pytest.fixture(scope='module')
def params(weights):
  return weights(CFG)


def rollouts(name, params, slots, grid=None):
  block, shift, cache, own = CASES[name]
  cfg = dataclasses.replace(CFG, block_causal=block, shift=shift)
  hp = dataclasses.replace(HP, cache=cache, slots=slots and own)
  prompts = jax.random.randint(jax.random.key(1), (ROWS, PROMPT), 0, 9)
  valid = jnp.arange(PROMPT)[None] >= (jnp.arange(ROWS) % 4)[:, None]
  run = lambda params, prompts, valid: sampler.generate(
    cfg, params, prompts, jax.random.key(5), hp, valid
  )
  if grid is None:
    return jax.device_get(jax.jit(run)(params, prompts, valid))
  rows = mesh.rows(grid)
  with jax.set_mesh(grid):
    args = jax.device_put(prompts, rows), jax.device_put(valid, rows)
    return jax.device_get(jax.jit(run)(params, *args))


@pytest.mark.parametrize('name', CASES)
def test_slots_change_no_token(name, params):
  want, found = (rollouts(name, params, slots) for slots in (False, True))
  for field in ('tokens', 'valid', 'order'):
    np.testing.assert_array_equal(getattr(found, field), getattr(want, field))
  for field in ('logp', 'confidence'):  # another number of rows, other rounding
    np.testing.assert_allclose(
      getattr(found, field), getattr(want, field), atol=2e-5, err_msg=field
    )
  ended = np.any(want.order == -1, axis=1)
  assert 2 < ended.sum() < ROWS - 2
  if name == 'no cache':  # a row that ends early makes room: fewer steps than pieces
    steps = np.sort(want.order.max(1).reshape(-1, 4) + 1, axis=1)
    assert found.forwards < steps[:, -1].sum()


@pytest.mark.parametrize('name', ['no cache', 'block', 'dual'])
def test_rows_of_slots_stay_on_their_devices(name, params):
  """Each shard of the rows has slots of its own; the tokens are the same."""
  want = rollouts(name, params, False)
  case = CASES[name]
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(CASES, name, (*case[:3], 8))
    found = rollouts(name, params, True, mesh.make_mesh(2, 2, 2))
  np.testing.assert_array_equal(found.tokens, want.tokens)
  np.testing.assert_array_equal(found.order, want.order)


def test_rows_are_taken_and_put_within_their_shard():
  x = jnp.arange(12).reshape(12, 1)
  at = jnp.array([[0, 5], [6, 2]])  # 6 is past the end of a shard of 6 rows
  np.testing.assert_array_equal(rolling.take(x, at)[:, 0], [0, 5, 11, 8])
  new = jnp.full((4, 1), -1)
  want = np.arange(12)
  want[[0, 5, 8]] = -1
  np.testing.assert_array_equal(rolling.put(x, at, new)[:, 0], want)
