"""Eight devices on a host, strict JAX, and the tiny models of the tests.

The flags must be in the environment before jax is imported: do it here.
"""

import os

# At optimisation level 0 a program compiles three times faster, and what
# tiny models take is the compilation.
FLAGS = (
  '--xla_force_host_platform_device_count=8',
  '--xla_backend_optimization_level=0',
)
os.environ['XLA_FLAGS'] = ' '.join((os.environ.get('XLA_FLAGS', ''),) + FLAGS)
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax  # noqa: E402
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
    remat=False,
  )


@pytest.fixture(scope='session')
def params(tiny):
  """Random weights of `tiny`."""
  return jax.jit(lambda key: model.init(tiny, key))(jax.random.key(0))
