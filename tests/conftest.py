"""Eight devices on a host, strict JAX, checked annotations, and tiny models.

JAX reads its flags and its cache directory when it is imported, and annotations
are checked in modules that are imported after the hook. So both stand first.

Compiled programs are kept in .cache/jax, which xdist's workers, subprocesses and
later runs share. Delete the folder to start cold. JAX_COMPILATION_CACHE_DIR names
another one. DMPO_TYPECHECK=0 turns the checks of annotations off.
"""

import gc
import importlib.metadata
import os
import pathlib

# A tiny model spends nearly all its time in compilation, and these two flags make
# that eight times faster. XLA aborts on a flag that it does not know, so the second
# is set only for versions that are known to have it.
FLAGS = (
  '--xla_force_host_platform_device_count=8',
  '--xla_backend_optimization_level=0',
)
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  FLAGS += ('--xla_cpu_use_fusion_emitters=false',)
os.environ['XLA_FLAGS'] = ' '.join((os.environ.get('XLA_FLAGS', ''),) + FLAGS)
os.environ['JAX_PLATFORMS'] = 'cpu'
# Where operations stand in the source: 4 % of a test's time, and nobody reads it.
os.environ.setdefault('JAX_TRACEBACK_IN_LOCATIONS_LIMIT', '0')
CACHE = pathlib.Path(__file__).parents[1] / '.cache' / 'jax'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

import jaxtyping  # noqa: E402

if os.environ.get('DMPO_TYPECHECK') != '0':
  jaxtyping.install_import_hook('dmpo_jax', 'typecheck.check')

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from dmpo_jax import model  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_debug_key_reuse', True)

# Tracing makes many short-lived objects. With Python's own thresholds a seventh of the
# time of a test goes to looking for cycles among them, which are few.
gc.set_threshold(100_000)


@pytest.fixture
def no_program_cache():
  """Hides the cache of compiled programs from the code under test."""
  folder = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', None)
  yield
  jax.config.update('jax_compilation_cache_dir', folder)


@pytest.fixture(scope='session')
def tiny():
  """A ModelConfig that compiles in a second. Token ids 8 to 10 are special."""
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
  """Returns weights(cfg), which fills every parameter with random numbers.

  They are large enough that every part of the network matters, also the scales
  and biases that `model.init` sets to ones and zeros.
  """

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
  """The same as `weights`, for tests that import the module `weights`."""
  return weights
