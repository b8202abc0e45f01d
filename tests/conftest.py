"""Eight devices on a host, strict JAX, and the tiny models of the tests.

The flags must be in the environment before jax is imported: do it here.
"""

import importlib.metadata
import os

# Nearly all the time of a tiny model goes into its compilation, and these two
# make that eight times faster. XLA dies of a flag that it does not know, so
# the second is for the versions that are known to have it.
FLAGS = (
  '--xla_force_host_platform_device_count=8',
  '--xla_backend_optimization_level=0',
)
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  FLAGS += ('--xla_cpu_use_fusion_emitters=false',)
os.environ['XLA_FLAGS'] = ' '.join((os.environ.get('XLA_FLAGS', ''),) + FLAGS)
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from dmpo_jax import model  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_debug_key_reuse', True)


@pytest.fixture(scope='session')
def tiny():
  """A ModelConfig that compiles in a second; ids 8 to 10 are special."""
  return model.ModelConfig(
    vocab=11,
    width=16,
    layers=2,
    heads=2,
    kv_heads=2,
    mlp=24,
    mask_id=10,
    eos_id=9,
    pad_id=8,
    dtype='float32',
    remat='none',
  )


@pytest.fixture(scope='session')
def weights():
  """weights(cfg): random numbers everywhere, also where `model.init` gives
  ones and zeros, and large enough that every part of the network matters."""

  def fill(cfg):
    shapes = jax.eval_shape(lambda key: model.init(cfg, key), jax.random.key(0))
    draw = np.random.default_rng(0)

    def leaf(path, shape):
      noise = 0.3 * draw.normal(size=shape.shape) + (path[-1].key == 'scale')
      return jnp.asarray(noise, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)

  return fill


@pytest.fixture(scope='session')
def params(tiny, weights):
  """Weights of `tiny`."""
  return weights(tiny)


@pytest.fixture(scope='session')
def weights_of(weights):
  """The same, where a test imports the module `weights`."""
  return weights
