"""Experts on a mesh: no axis, padding or neighbour changes what a model computes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dmpo_jax import build, check, mesh, model, optim, rng, step
from dmpo_jax.model import exchange, grouped, triton
from dmpo_jax.tools import costs
from tests import test_mesh

# data, fsdp, tensor, expert. The last two are mixed.
MESHES = ((1, 1, 1, 8), (8, 1, 1, 1), (1, 2, 1, 4), (2, 1, 2, 2), (1, 2, 2, 2))
R, S = 8, 10
SIZES: dict[str, Any] = dict(
  vocab=11, width=16, layers=2, heads=2, kv_heads=2, mlp=24, mask_id=10, eos_id=9,
  pad_id=8, experts=8, experts_per_token=3, expert_mlp=8, shared_mlp=8,
  dense_layers=(0,), router='sigmoid', router_bias='choice', router_norm=True,
  router_scale=2.5, router_groups=4, router_groups_kept=2,
)  # fmt: skip


def grid(data=1, fsdp=1, tensor=1, expert=8):
  return mesh.make_mesh(data, fsdp, tensor, None, expert)


def tokens():
  draw = np.random.default_rng(0)
  valid = np.ones((R, S), bool)
  valid[::2, :3] = False
  return draw.integers(0, 8, (R, S)).astype(np.int32), valid


def value_and_grads(cfg, params, tokens, valid):
  """Returns (logits, gradients) of a function that reads all logits."""

  def loss(params):
    logits = model.full_logits(cfg, params, tokens, valid)
    return jnp.sum(jnp.where(valid[..., None], jnp.sin(logits), 0)), logits

  grads, logits = jax.grad(loss, has_aux=True)(params)
  return logits, grads


def on_mesh(shape, fn, params, *rows):
  """Runs fn(params, *rows) on a mesh, the parameters by the rules."""
  where = grid(*shape)
  params = jax.tree.map(mesh.put, params, mesh.shardings(params, where))
  run = build.Compiled(where, fn, by_row=tuple(range(1, 1 + len(rows))))
  return mesh.fetch(run(params, *rows))


def close(got, want):
  """Asserts that two trees agree relative to the largest number of a leaf."""

  def leaf(a, b):
    scale = max(1e-3, float(np.abs(b).max()))
    np.testing.assert_allclose(a, b, atol=2e-5 * scale)

  jax.tree.map(leaf, got, jax.device_get(want))


@pytest.fixture(scope='module')
def plain(weights_of):
  """Returns (cfg, params, results) on one device, with an expert for everybody."""
  cfg = model.ModelConfig(**SIZES)
  params = weights_of(cfg)
  # One expert gets all tokens and four get none, which their devices must skip.
  bias = np.where(np.arange(8) < 4, 0.5, -0.5).astype(np.float32)
  bias[1] = 9
  params['params']['layers_1']['router']['bias'] = jnp.asarray(bias)[None]
  return (
    cfg,
    params,
    jax.jit(functools.partial(value_and_grads, cfg))(params, *tokens()),
  )


@pytest.mark.parametrize('shape', [
  MESHES[3], *(pytest.param(x, marks=pytest.mark.slow) for x in MESHES[:3] + MESHES[4:])
])  # fmt: skip
def test_logits_and_gradients_on_every_mesh(shape, plain):
  """Eight devices compute what one does, though the load could not be less even."""
  cfg, params, want = plain
  got = on_mesh(shape, functools.partial(value_and_grads, cfg), params, *tokens())
  close(got, want)
  assert (
    float(np.abs(got[1]['params']['layers_1']['experts_up']['kernel']).max()) > 1e-3
  )


@pytest.mark.slow
def test_padding_and_neighbours(plain):
  """A row's logits are the same beside other rows, and with other padding."""
  cfg, params, (want, _) = plain
  ids, valid = tokens()
  forward = functools.partial(model.full_logits, cfg)
  more = np.concatenate([np.full((R, 2), 8, np.int32), ids], 1)
  real = np.concatenate([np.zeros((R, 2), bool), valid], 1)
  order = np.random.default_rng(1).permutation(R)
  got = on_mesh((1, 2, 1, 4), forward, params, more[order], real[order])[:, 2:]
  for row, at in zip(got, order, strict=True):
    np.testing.assert_allclose(row[valid[at]], want[at][valid[at]], atol=2e-5)


@pytest.mark.long
@pytest.mark.parametrize('more', [
  {'lora_rank': 4, 'lora_targets': 'experts|^q$'}, {'remat': 'full', 'tied': True},
  {'expert_kernel': 'dense', 'router': 'softmax', 'router_bias': 'weight'},
])  # fmt: skip
def test_other_models_on_a_mesh(more, weights_of):
  """Adapters on experts, rematerialisation and the dense form are no exception."""
  cfg = model.ModelConfig(**{**SIZES, **more})
  params, run = weights_of(cfg), functools.partial(value_and_grads, cfg)
  close(on_mesh((1, 1, 2, 4), run, params, *tokens()), jax.jit(run)(params, *tokens()))


def settings(shape, **fields) -> Any:
  """Returns the config of test_mesh with experts, on a mesh."""
  c: Any = test_mesh.settings(shape[:3])
  c.update_from_flattened_dict({'mesh.expert': shape[3], **fields})
  return c


def with_experts(built):
  """Returns `built` with a model of eight experts."""
  cfg = dataclasses.replace(
    built.model, experts=8, experts_per_token=2, expert_mlp=8, router_norm=True
  )
  return dataclasses.replace(built.setup, cfg=cfg)


@pytest.mark.long
def test_update_is_the_same(weights_of):
  """One DMPO update moves the moments and the weights as on one device."""
  c = settings((1, 1, 1, 8))
  c.mesh.expert, c.mesh.data = 1, 8
  built = build.build(c)
  optimizer = optim.make_optimizer(c.optim)
  setup = dataclasses.replace(with_experts(built), optimizer=optimizer)
  params = weights_of(setup.cfg)
  batch = test_mesh.random_batch()

  def update(state, *batch):
    batch = jax.tree.unflatten(tree, batch)
    return step.train_step(state, {}, batch, rng.key_for(0, 'mask'), 1, setup)

  leaves, tree = jax.tree.flatten(batch)
  state = step.init_state(params, optimizer)
  want = jax.jit(update)(state, *leaves)
  where = grid(1, 2, 1, 4)
  placed = jax.tree.map(mesh.put, state, mesh.shardings(state, where))
  rows = tuple(i for i, x in enumerate(leaves, 1) if np.ndim(x))
  got = mesh.fetch(build.Compiled(where, update, by_row=rows)(placed, *leaves))
  assert float(got[1]['grad_norm']) > 1e-2
  close(got[0].opt_state, want[0].opt_state)
  atol = functools.partial(np.testing.assert_allclose, atol=2e-6)
  jax.tree.map(atol, got[0].trainable, jax.device_get(want[0].trainable))


# --- pieces


def test_pieces_are_all_of_it():
  """Small pieces give the sums of one, for even loads, none, and all on one expert."""
  draw = np.random.default_rng(0)
  stacks = jnp.asarray(draw.normal(size=(4, 6, 6)), jnp.float32)
  x = jnp.asarray(draw.normal(size=(40, 6)), jnp.float32)
  weights = jnp.asarray(draw.uniform(size=(40, 3)), jnp.float32)
  rows = lambda x, sizes, stacks, keys: jax.lax.ragged_dot(x, stacks, sizes)

  @functools.partial(jax.jit, static_argnums=4)
  def run(x, chosen, weights, stacks, pieces):
    def total(x, weights, stacks):
      compute = functools.partial(exchange.compute_sorted, rows)
      y = compute(x, (chosen, weights), stacks, None, pieces)
      return jnp.sum(jnp.sin(y)), y

    return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(x, weights, stacks)

  for chosen in (
    np.stack([draw.permutation(16)[:3] for _ in range(40)]) - 4,  # a quarter is here
    np.tile([5, 9, -3], (40, 1)),  # nobody's
    np.tile([2, 1, 0], (40, 1)),  # all are here
  ):
    (_, want), grads = run(x, chosen, weights, stacks, 1)
    here = (chosen >= 0) & (chosen < 4)
    products = np.einsum(
      'md,mkdf->mkf', x, np.asarray(stacks)[np.where(here, chosen, 0)]
    )
    direct = np.sum(products * (np.asarray(weights) * here)[..., None], axis=1)
    np.testing.assert_allclose(want, direct, atol=1e-5)
    (_, got), more = run(x, chosen, weights, stacks, 4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5),
                 (got, more), (want, grads))  # fmt: skip


# --- rules, refusals, costs


def leaves_of(cfg):
  tree = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
  return test_mesh.leaves(tree)


def test_experts_have_rules():
  """Kernels and adapters of experts are split along `expert`; the router is whole."""
  cfg = model.ModelConfig(**SIZES, lora_rank=4, lora_targets='.')
  where = grid(1, 2, 2, 2)
  specs = {path: mesh.spec_of(path, x, where) for path, x in leaves_of(cfg).items()}
  for path, spec in specs.items():
    assert ('expert' in spec) == ('experts_' in path), path
    if 'router' in path:
      assert spec == P()
  up = 'layers_1/experts_up'
  assert specs[f'params/{up}/kernel'] == P(None, 'expert', 'fsdp', 'tensor')
  assert specs[f'lora/{up}/b'] == P(None, 'expert', None, 'tensor')
  assert specs['params/layers_1/shared_up/kernel'] == P(None, 'fsdp', 'tensor')
  # Without the axis the same rules hold, and rows lie on every axis but `tensor`.
  leaf = leaves_of(cfg)[f'params/{up}/kernel']
  one = mesh.make_mesh(4, 2, 1)
  assert mesh.spec_of(f'params/{up}/kernel', leaf, one) == P(
    None, None, 'fsdp', 'tensor'
  )
  assert mesh.row_axes(where) == ('data', 'fsdp', 'expert')
  assert (mesh.row_shards(where), mesh.row_shards(one)) == (4, 8)


def test_experts_must_divide():
  """The axis needs experts that it divides, and its devices; errors name the fields."""
  c = settings((1, 1, 1, 8))
  with pytest.raises(ValueError, match='mesh.expert = 8.*number of experts, 0'):
    build.build(c)
  c.mesh.expert = 3
  with pytest.raises(ValueError, match='mesh.expert = 1, 1, 1, 3 .* 8 devices'):
    check.config(c, 8)
  with pytest.raises(ValueError, match='mesh.expert .*8 devices'):
    mesh.make_mesh(1, 1, 1, None, 3)


def test_flops_are_those_of_active_experts():
  """A token counts for its own experts, on every mesh: 6 k D F a layer, forward."""

  def flops(shape, size, fn):
    cfg = model.ModelConfig(**{**SIZES, 'expert_mlp': size, 'remat': 'full'})
    params = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((R, S), np.int32)
    run = lambda params, ids: jnp.sum(model.full_logits(cfg, params, ids))
    traced = build.Compiled(grid(*shape), fn(run)).trace(params, ids)
    return costs.matmuls(traced.jaxpr.jaxpr, (1,), 8, shape[2])[0]

  for shape, fn, times in (
    ((8, 1, 1, 1), lambda f: f, 1),
    ((2, 1, 2, 2), jax.grad, 4),  # recomputed once
  ):
    more = flops(shape, 16, fn) - flops(shape, 8, fn)
    experts = SIZES['experts_per_token']
    assert more == pytest.approx(times * 6 * experts * R * S * 16 * 8 / 8)


def test_kernels_stay_where_they_are(plain):
  """On an expert axis tokens travel, and no gather is as large as a kernel."""
  cfg, _, _ = plain
  cfg = dataclasses.replace(cfg, expert_mlp=4096)
  kernel = 16 * 4096 * 4  # bytes of one expert

  def sent(*shape):
    where = grid(*shape)
    shapes = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
    rows = jax.ShapeDtypeStruct((R, S), np.int32, sharding=mesh.rows(where))
    run = build.Compiled(where, functools.partial(model.full_logits, cfg))
    traced = run.trace(build.sharded(shapes, where), rows)
    return costs.collectives(traced.lower().compile().as_text(), (1,))

  found = sent(1, 1, 1, 8)
  assert found['all-gather'][0] and found['reduce-scatter'][0]
  for kind, (_, size) in found.items():
    assert size < kernel, kind
  # With whole weights on each device nothing is sent, for a choice of experts neither.
  assert not sent(8, 1, 1, 1)


def test_kernels_of_gpus():
  """The Triton kernels, interpreted, give the sums of the portable form."""
  draw = np.random.default_rng(0)
  make = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
  x, dy, kernels = make(150, 20), make(150, 136), make(4, 20, 136)
  sizes = jnp.asarray([0, 70, 1, 64], jnp.int32)  # 15 rows are nobody's
  close = functools.partial(np.testing.assert_allclose, atol=3e-5)
  run = functools.partial(jax.jit, static_argnums=(3, 4))
  close(run(triton.rows_dot)(x, kernels, sizes, False, True)[:135],
        grouped.FORWARD['default'](x, kernels, sizes)[:135])  # fmt: skip
  close(run(triton.rows_dot)(dy, kernels, sizes, True, True)[:135],
        grouped.BACKWARD['default'](dy, kernels, sizes)[:135])  # fmt: skip
  of_layer = grouped.OfLayer(jnp.stack([-kernels, kernels]), jnp.int32(1))
  np.testing.assert_array_equal(
    run(triton.rows_dot)(x, of_layer, sizes, False, True)[:135],
    run(triton.rows_dot)(x, kernels, sizes, False, True)[:135],
  )
  got = jax.jit(triton.kernels_dot, static_argnums=3)(x, dy, sizes, True)
  close(got, grouped.OUTER['default'](x, dy, sizes))
