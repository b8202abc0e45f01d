"""Sharding rules; no mesh changes the result of an update."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs import base
from dmpo_jax import build, mesh, model, optim, rng, step
from dmpo_jax.tools import costs
from dmpo_jax.types import TrainBatch

AUTO = jax.sharding.AxisType.Auto
MESHES = ((8, 1, 1), (2, 4, 1), (2, 2, 2))
R, PROMPT, L = 8, 4, 16


def grid(*shape):
  return mesh.make_mesh(*shape)


def test_order_of_devices_on_cpus():
  """The mesh has JAX's own order, so that runs keep their bits."""
  for shape in MESHES:
    assert [*grid(*shape).devices.flat] == jax.devices()
    assert grid(*shape) == jax.make_mesh(shape, mesh.AXES, axis_types=(AUTO,) * 3)


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip of a TPU slice, as far as the order of a mesh depends on it."""

  id: int
  coords: tuple
  device_kind: str = 'TPU v5'
  platform: str = 'tpu'
  core_on_chip: int = 0
  process_index: int = 0
  slice_index: int = 0


def test_any_shape_on_a_torus():
  """An axis of eight on a torus of 4 x 4 x 4 is one physical axis and half another."""
  chips = [Chip(i, at) for i, at in enumerate(np.ndindex(4, 4, 4))]
  powers = [2**i for i in range(7)]
  shapes = [(f, t) for f in powers for t in powers if f * t <= 64]
  assert len(shapes) == 28
  for fsdp, tensor in shapes:
    shape = (64 // (fsdp * tensor), fsdp, tensor)
    placed = mesh.arrange(shape, chips)
    assert placed.shape == shape
    assert {*placed.flat} == {*chips}
  # Neighbours along the axis that talks most are neighbours on the torus.
  for ring in mesh.arrange((4, 4, 4), chips).reshape(-1, 4):
    assert sum(len({chip.coords[i] for chip in ring}) > 1 for i in range(3)) == 1
  two = [dataclasses.replace(chip, slice_index=chip.id // 32) for chip in chips]
  with pytest.raises(ValueError, match='several TPU slices'):
    mesh.arrange((8, 8, 1), two)


def settings(shape):
  """Returns a tiny config on a mesh; an update has eight rows."""
  c = base.get_config()
  c.update_from_flattened_dict(
    {
      'model.width': 16,
      'model.layers': 1,
      'model.heads': 2,
      'model.kv_heads': 2,
      'model.mlp': 16,
      'train.prompts': 2,
      'train.group': 4,
      'train.microbatches': 1,
      'objective.draws': 2,
      'mesh.data': shape[0],
      'mesh.fsdp': shape[1],
      'mesh.tensor': shape[2],
    }
  )
  return c


def every_leaf():
  """Returns shapes of a state with every kind of parameter, adapter and moment."""
  cfg = model.ModelConfig(
    vocab=8,
    mask_id=7,
    eos_id=6,
    pad_id=6,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    mlp=24,
    lora_rank=4,
    lora_targets='.',
    qkv_bias=True,
    qk_norm=True,
    experts=4,
    experts_per_token=2,
    expert_mlp=8,
    shared_mlp=8,
    router_bias='choice',
    dense_layers=(0,),
  )
  params = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
  optimizer = optim.make_optimizer(optim.Config(1e-3, 5, weight_decay=0.1))
  return jax.eval_shape(lambda p: step.init_state(p, optimizer), params)


def leaves(tree):
  return {
    mesh.path_of(path): leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


@pytest.mark.smoke
def test_every_leaf_has_a_rule():
  """A rule matches each parameter, bias, adapter, moment and counter."""
  state = every_leaf()
  for shape in MESHES:
    found = leaves(mesh.shardings(state, grid(*shape)))
    assert found.keys() == leaves(state).keys()
  names = '\n'.join(found)
  for part in (
    'q/kernel',
    'q/bias',
    'q_norm/scale',
    'down/a',
    'down/b',
    'mu/params/embedding',
    'nu/lora',
    'count',
    'step',
    'head',
  ):
    assert part in names


def test_moments_are_sharded_as_their_parameters():
  """One rule serves a parameter and its two moments in Adam."""
  found = leaves(mesh.shardings(every_leaf(), grid(2, 2, 2)))
  for path, sharding in found.items():
    for moment in ('/mu/', '/nu/'):
      if moment in path:
        own = 'trainable/' + path.split(moment)[1]
        assert found[own].spec == sharding.spec


def test_every_rule_is_used():
  """Each line of the table is the first match of some leaf."""
  import re

  first = {
    next(i for i, (pattern, _) in enumerate(mesh.RULES) if re.search(pattern, path))
    for path in leaves(every_leaf())
  }
  assert first == set(range(len(mesh.RULES)))


def test_matrices_are_split_over_four_devices():
  """On (2, 2, 2) every matrix of the model is split over four devices."""
  found = leaves(mesh.shardings(every_leaf().trainable['params'], grid(2, 2, 2)))
  for path, sharding in found.items():
    used = {axis for axis in sharding.spec if axis}
    if 'router' in path:
      assert not used  # its scores are summed in one order on every mesh
    elif path.endswith(('kernel', 'embedding', 'head')):
      assert used == {'fsdp', 'tensor'}, path
    else:
      assert used == ({'tensor'} if path.endswith('bias') else set()), path


def test_leaf_without_a_rule_is_an_error():
  """Nothing is replicated by accident."""
  tree = {'params': {'router': {'table': jax.ShapeDtypeStruct((4, 4), 'f4')}}}
  with pytest.raises(ValueError, match='params/router/table.*mesh.RULES'):
    mesh.shardings(tree, grid())


def test_axis_that_does_not_divide_is_reported_once(caplog):
  """The dimension stays whole, and one warning names the tensor and the axis."""
  leaf = jax.ShapeDtypeStruct((3, 6, 10), jnp.float32)
  spec = functools.partial(mesh.spec_of, 'layers/q/kernel')
  assert spec(leaf, grid(2, 2, 2)) == P(None, 'fsdp', 'tensor')
  assert spec(leaf, grid(2, 4, 1)) == P(None, None, 'tensor')
  assert spec(leaf, grid(2, 1, 4)) == P(None, 'fsdp', None)
  for path in ('trainable/layers/q/kernel', 'opt_state/mu/layers/q/kernel'):
    assert mesh.spec_of(path, leaf, grid(2, 4, 1)) == P(None, None, 'tensor')
  found = [record.getMessage() for record in caplog.records]
  assert len(found) == 2 and all('q/kernel (3, 6, 10)' in x for x in found)
  assert 'mesh.fsdp = 4' in found[0] and 'mesh.tensor = 4' in found[1]
  # Adafactor-like moments of a lower rank keep the axes that they have.
  vector = jax.ShapeDtypeStruct((8,), jnp.float32)
  assert mesh.spec_of('embedding', vector, grid(2, 2, 2)) == P('tensor')


def test_mesh_must_use_all_devices():
  """The product of the axes is the number of devices; data = 0 takes the rest."""
  assert dict(grid(0, 2, 2).shape) == dict(data=2, fsdp=2, tensor=2)
  assert dict(grid().shape) == dict(data=8, fsdp=1, tensor=1)
  for shape in ((3, 1, 1), (0, 3, 1), (0, 16, 1), (8, 2, 1)):
    with pytest.raises(ValueError, match='mesh.data .* the 8 devices'):
      mesh.make_mesh(*shape)


def test_fetch_inverts_put():
  """Host to devices to host keeps values and dtypes, whole or by rows."""
  for shape in MESHES:
    for make in (mesh.rows, mesh.replicated):
      for x in (np.arange(48, dtype=np.int32).reshape(16, 3), np.arange(16) % 3 == 0):
        y = mesh.put(x, make(grid(*shape)))
        assert y.dtype == x.dtype and len(y.sharding.device_set) == 8
        back = mesh.fetch({'x': y})['x']
        assert isinstance(back, np.ndarray)
        np.testing.assert_array_equal(back, x)
  by_row = mesh.put(np.arange(16), mesh.rows(grid(2, 2, 2)))
  assert {s.data.shape for s in by_row.addressable_shards} == {(4,)}


# --- an update


def random_batch():
  rng_ = np.random.default_rng(0)
  tokens = rng_.integers(0, 90, (R, PROMPT + L)).astype(np.int32)
  valid = np.ones((R, PROMPT + L), bool)
  valid[::2, :2] = False
  weight = rng_.normal(size=R).astype(np.float32)
  return TrainBatch(
    tokens,
    valid,
    np.ones((R, L), bool),
    np.arange(R, dtype=np.int32),
    weight,
    {'target': weight},
    np.float32(2),
    np.float32(R),
  )


def placed(tree, shape):
  """Puts a tree of host arrays on a mesh by RULES."""
  return jax.tree.map(mesh.put, tree, mesh.shardings(tree, grid(*shape)))


@pytest.fixture(scope='module')
def plain():
  """Returns (params, new state, metrics) of step.train_step on one device."""
  built = build.build(settings(MESHES[0]))
  optimizer = optim.make_optimizer(built.config.optim)
  params = jax.jit(lambda: model.init(built.model, rng.key_for(0, 'init')))()
  setup = dataclasses.replace(built.setup, optimizer=optimizer)
  fn = jax.jit(functools.partial(step.train_step, setup=setup))
  state, metrics = fn(
    step.init_state(params, optimizer), {}, random_batch(), rng.key_for(0, 'mask'), 1
  )
  return jax.device_get((params, state, metrics))


@pytest.mark.parametrize('shape', MESHES)
def test_update_is_the_same_on_every_mesh(shape, plain):
  """The compiled update gives the state and metrics of the plain one."""
  params, want, metrics = plain
  built = build.build(settings(shape))
  state = built.steps.start(placed(params, shape))
  for path, leaf in leaves(state).items():
    spec = mesh.spec_of(path, leaf, built.mesh)
    assert leaf.sharding.is_equivalent_to(
      jax.sharding.NamedSharding(built.mesh, spec), leaf.ndim
    ), path
  abstract = build.abstract_buffer(built, PROMPT).batch
  batch = jax.tree.map(lambda x, to: mesh.put(x, to.sharding), random_batch(), abstract)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(
    lambda x: (x.shape, x.dtype), abstract
  )
  new, numbers = built.steps.update(state, {}, batch, 1)
  numbers = mesh.fetch(numbers)
  assert float(numbers['finite']) == 1 and float(numbers['grad_norm']) > 1e-2
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, numbers, metrics)
  got = mesh.fetch(new)
  # Adam divides by the root of the square. So compare its moments, which are
  # the gradient, tightly, and the weights within a fraction of the rate.
  jax.tree.map(close, got.opt_state, want.opt_state)
  jax.tree.map(functools.partial(close, atol=2e-6), got.trainable, want.trainable)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), got.trainable, params)
  assert min(jax.tree.leaves(moved)) > 5e-6  # lr/warmup = 1e-5


def test_weights_are_gathered_once_a_rollout(plain):
  """mesh.gather moves the weights out of the sampler's loop, and no token."""
  shape, found = MESHES[1], {}
  prompts = np.random.default_rng(0).integers(0, 90, (R, PROMPT)).astype(np.int32)
  valid, row = np.ones((R, PROMPT), bool), np.arange(R, dtype=np.int32)
  for how in ('forward', 'rollout'):
    c = settings(shape)
    c.mesh.gather, c.sampler.cache, c.sampler.block = how, 'dual', 8
    built = build.build(c)
    sample = built.steps.sample
    params = placed(plain[0], shape)
    out = mesh.fetch(sample(params, prompts, valid, row))
    text = sample.trace(params, prompts, valid, row).lower().compile().as_text()
    bytes_ = [
      costs.collectives(text, trips)['all-gather'][1] for trips in ((1, 1), (1, 9))
    ]
    found[how] = out, bytes_[1] > 1.5 * bytes_[0]
  one, other = (found[how][0].rollouts for how in found)
  np.testing.assert_array_equal(one.tokens, other.tokens)
  np.testing.assert_array_equal(one.order, other.order)
  # XLA may add up a split contraction in another order.
  np.testing.assert_allclose(one.logp, other.logp, atol=2e-6)
  assert (found['forward'][1], found['rollout'][1]) == (True, False)


def test_gradient_norm_is_unchanged(plain):
  """The fixed update has the recorded gradient norm."""
  assert float(plain[2]['grad_norm']) == pytest.approx(4.094009, rel=1e-3)
