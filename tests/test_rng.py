"""Random numbers are addressed: who asks with whom changes nothing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax import rng

# Row ids out of order and far apart, as steps of a run have them.
ROWS = np.array([5, 0, 70_000, 3])


def bits(keys):
  return np.asarray(jax.random.key_data(keys))


@pytest.mark.smoke
def test_uses_differ():
  """No two (seed, stream, step) share a key, and so none shares numbers."""
  uses = itertools.product((0, 1), rng.STREAMS, (0, 1, 2))
  keys = {bits(rng.key_for(*use)).tobytes() for use in uses}
  assert len(keys) == 2 * len(rng.STREAMS) * 3


def test_key_is_a_function_of_its_use():
  """The same use gives the same key, the default step is 0, and a traced
  step equals a static one."""
  key = bits(rng.key_for(3, 'mask', 4))
  np.testing.assert_array_equal(key, bits(rng.key_for(3, 'mask', 4)))
  traced = jax.jit(lambda step: rng.key_for(3, 'mask', step))(4)
  np.testing.assert_array_equal(key, bits(traced))
  zero = bits(rng.key_for(3, 'init', 0))
  np.testing.assert_array_equal(bits(rng.key_for(3, 'init')), zero)


def test_unknown_stream():
  with pytest.raises(KeyError):
    rng.key_for(0, 'smaple')


def test_row_keys_ignore_the_batch():
  """A row's key depends on neither its place nor its neighbours."""
  key = rng.key_for(0, 'sample')
  keys = bits(rng.row_keys(key, jnp.asarray(ROWS)))
  assert len({row.tobytes() for row in keys}) == len(ROWS)
  back = bits(rng.row_keys(key, jnp.asarray(ROWS[::-1].copy())))
  np.testing.assert_array_equal(back[::-1], keys)
  for i, row in enumerate(ROWS):
    alone = bits(rng.row_keys(key, jnp.asarray([row])))
    np.testing.assert_array_equal(alone[0], keys[i])


def test_per_row_stacks_draws():
  """per_row is draw(row's key) row by row, for draws of any structure."""
  key = rng.key_for(0, 'mask')
  draw = lambda key: {'u': jax.random.uniform(key, (3,))}
  rows = rng.per_row(key, jnp.asarray(ROWS), draw)['u']
  for i, one in enumerate(rng.row_keys(key, jnp.asarray(ROWS))):
    np.testing.assert_array_equal(rows[i], draw(one)['u'])
