"""Mixture of experts: where tokens are sent, and that nothing else is changed by it.

test_model.py holds a model with experts to its formulas, with padding and windows.
Official numbers are those of test_official_moe.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import moe_models
import numpy as np
import pytest
import reference
from marks import mostly_slow
from moe_models import GOLDEN

from dmpo_jax import build, logprob, model, weights
from dmpo_jax.model import grouped, moe
from dmpo_jax.model.presets import EXPERTS

CFG = model.ModelConfig(
  vocab=24, width=32, layers=3, heads=2, kv_heads=1, mlp=48, mask_id=23, eos_id=22,
  pad_id=21, positions=64, rope_theta=100.0, qk_norm=True, block_causal=4,
  experts=6, experts_per_token=2, expert_mlp=24, shared_mlp=16, dense_layers=(0,),
  router_norm=True,
)  # fmt: skip
LLADA2 = dict(
  router='sigmoid',
  router_bias='choice',
  router_norm=True,
  router_scale=2.5,
  router_groups=4,
  router_groups_kept=2,
)
ROUTERS = {
  'llada2': LLADA2,
  'sdar_moe': dict(router_norm=True),
  'lladamoe': {},
  'biased weight': dict(router_bias='weight'),
  'groups': dict(router_groups=2, router_groups_kept=1, router_scale=0.5),
  'one': dict(experts_per_token=1, router_norm=True),
}


def family(**fields):
  return dataclasses.replace(CFG, **fields)


def router(name):
  fields = dict(router_norm=False, experts=16, experts_per_token=4) | ROUTERS[name]
  return family(**fields)


@pytest.fixture(scope='module')
def case(weights_of):
  """Parameters, texts, padding, masks; a third of the tokens is sent to two experts."""
  draw = np.random.default_rng(0)
  tokens = jnp.asarray(draw.integers(0, 20, (2, 16)), jnp.int32)
  valid = jnp.ones(tokens.shape, bool).at[1, :4].set(False)
  masked = jnp.asarray(draw.random((2, 2, 8)) < 0.5)
  routes = jnp.where(jnp.arange(16)[None, None, :, None] % 3 == 0, jnp.arange(2), -1)
  return weights_of(CFG), tokens, valid, masked, jnp.broadcast_to(routes, (2, 2, 16, 2))


# --- the router


@pytest.mark.parametrize('name', ROUTERS)
def test_router_equals_its_formula(name):
  """Also where scores are equal: then the expert or group with the lower number."""
  cfg, draw = router(name), np.random.default_rng(0)
  logits = draw.normal(size=(3, 40, 16)).astype(np.float32)
  logits[2] = np.round(logits[2])  # ties
  bias = 0.3 * draw.normal(size=16).astype(np.float32) * bool(cfg.router_bias)
  bias[:] = np.round(8 * bias) / 8
  chosen, weights, _ = moe.choose(cfg, logits, bias if cfg.router_bias else None, None)
  for at in np.ndindex(3, 40):
    want = reference.route(cfg, np.float64(logits[at]), np.float64(bias))
    if at[0] == 2 and cfg.router_bias:
      continue  # sums with a bias tie in one precision and not in another
    assert list(np.asarray(chosen[at])) == list(want), at
    own = list(want.values())
    np.testing.assert_allclose(weights[at], own, rtol=2e-5)


@pytest.mark.parametrize(
  'name, block',
  mostly_slow([('llada2', '_block8'), ('sdar_moe', '_block4'), ('lladamoe', '')],
              {('llada2', '_block8')}),
)  # fmt: skip
def test_model_equals_the_official_one(name, block, tmp_path):
  """Logits, chosen experts and their gradients, on tiny random checkpoints."""
  cfg, params = weights.load_hf(moe_models.write(tmp_path / name, name))
  cfg = dataclasses.replace(cfg, block_causal=int(block[6:] or 0), keep_routes=True)
  get = lambda what: GOLDEN[f'{name}/{what}']
  tokens, labels = get('input_ids'), get('labels')

  def loss(params):
    h, (_, routed) = model.hidden(cfg, params, tokens)
    logits = model.head(cfg, params, h)
    logp = model.logp_of(logits, labels) * (tokens == moe_models.MASK)
    return -jnp.sum(logp) / np.sum(tokens == moe_models.MASK), (logits, routed)

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (value, (logits, routed)), slopes = run(params)
  np.testing.assert_allclose(logits[..., ::16], get(f'logits{block}'), atol=3e-4)
  clear = get(f'router_margin{block}') > 1e-5
  ours, theirs = (
    np.sort(x, -1)[clear] for x in (routed.experts, get(f'experts{block}'))
  )
  np.testing.assert_array_equal(ours, theirs)
  np.testing.assert_allclose(value, get('loss'), rtol=1e-5)
  norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(slopes)))
  np.testing.assert_allclose(norm, get('total_grad_norm'), rtol=1e-4)
  slopes = reference.layer_of(slopes['params'], 2)
  for theirs, ours in {
    'gate.weight': slopes['router']['kernel'].T,
    'experts.3.down_proj.weight': slopes['experts_down']['kernel'][3].T,
  }.items():
    want = get(f'grad__model.layers.2.mlp.{theirs}')
    got = ours.ravel()[::16]
    np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())


def test_given_routes_are_weighed_by_own_scores():
  """And -1 leaves a choice to the router. A bias that only chooses has no gradient."""
  cfg, draw = router('llada2'), np.random.default_rng(1)
  logits, bias = draw.normal(size=(1, 5, 16)), draw.normal(size=16)
  own, _, scores = moe.choose(cfg, jnp.float32(logits), jnp.float32(bias), None)
  routes = jnp.full((1, 5, 4), -1).at[0, 2].set(jnp.array([3, 0, 15, 8]))
  choose = lambda logits, bias: moe.choose(cfg, logits, bias, routes)
  chosen, weights, _ = choose(jnp.float32(logits), jnp.float32(bias))
  np.testing.assert_array_equal(chosen, np.where(routes < 0, own, routes))
  picked = np.asarray(scores)[0, 2, [3, 0, 15, 8]]
  np.testing.assert_allclose(weights[0, 2], 2.5 * picked / picked.sum(), rtol=1e-5)
  slope = lambda logits, bias: jnp.sum(jnp.sin(choose(logits, bias)[1]))
  by_logit, by_bias = jax.grad(slope, (0, 1))(jnp.float32(logits), jnp.float32(bias))
  assert (by_bias == 0).all()
  assert ((np.asarray(by_logit) != 0).sum(-1) == 4).all()  # of the chosen ones


# --- products of sorted rows


SIZES = {
  'even': (32, 32, 32),
  'some get nothing': (0, 70, 0),
  'one gets all': (0, 0, 96),
  'odd': (1, 33, 31),
  'nobody': (0, 0, 0),
}


@pytest.mark.parametrize('platform', ['cpu', 'default'])
def test_product_of_sorted_rows(platform):
  """Values and both gradients; rows after the last expert's are nobody's: zeros."""
  draw = np.random.default_rng(0)
  x, dy = (draw.normal(size=(96, n)).astype(np.float32) for n in (8, 5))
  kernel = draw.normal(size=(3, 8, 5)).astype(np.float32)
  forms = grouped.FORWARD, grouped.BACKWARD, grouped.OUTER
  forward, backward, outer = (jax.jit(form[platform]) for form in forms)
  for sizes in SIZES.values():
    expert = np.repeat(np.arange(4), [*sizes, 96 - sum(sizes)])
    of = lambda i, expert=expert: (expert == i)[:, None]
    want = sum(of(i) * (x @ kernel[i]) for i in range(3))
    dx = sum(of(i) * (dy @ kernel[i].T) for i in range(3))
    sizes = jnp.array(sizes)
    np.testing.assert_allclose(forward(x, kernel, sizes), want, atol=1e-5)
    np.testing.assert_allclose(backward(dy, kernel, sizes), dx, atol=1e-5)
    dkernel = np.stack([(of(i) * x).T @ dy for i in range(3)])
    np.testing.assert_allclose(outer(x, dy, sizes), dkernel, atol=3e-5)
    # The same kernels in the array of all layers.
    layers = np.stack([kernel + 1, kernel, kernel - 1])
    of_layer = grouped.OfLayer(layers, jnp.int32(1))
    np.testing.assert_array_equal(
      forward(x, of_layer, sizes), forward(x, kernel, sizes)
    )
    np.testing.assert_array_equal(
      backward(dy, of_layer, sizes), backward(dy, kernel, sizes)
    )


def loss_of(cfg, case, dropout=None):
  """Returns (params, routes) -> (loss, gradients)."""
  _, tokens, valid, _, _ = case

  def loss(params, routes):
    h, _ = model.hidden(cfg, params, tokens, valid, False, dropout, routes)
    return jnp.sum(jnp.sin(model.head(cfg, params, h)) * valid[..., None])

  return jax.jit(jax.value_and_grad(loss))


def assert_close(one, other, rtol=2e-5):
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, atol=rtol * float(jnp.max(jnp.abs(b))) + 1e-6)


@pytest.mark.parametrize('remat', mostly_slow(['none', 'dots', 'full'], {'dots'}))
def test_sorted_experts_equal_all_experts_on_all_tokens(remat, case, weights_of):
  """Values, gradients of parameters and adapters; with experts that get all tokens, and
  others that get none; under each way to keep what backward needs; with dropout, whose
  masks know no order of the rows."""
  cfg = family(
    lora_rank=2, lora_targets=model.LORA_TARGETS['experts'], lora_dropout=0.3,
    router='sigmoid', router_bias='choice',
  )  # fmt: skip
  params, routes = weights_of(cfg), case[-1]
  keys = jax.random.split(jax.random.key(0), 2)
  plain = loss_of(dataclasses.replace(cfg, expert_kernel='dense'), case, keys)
  run = loss_of(dataclasses.replace(cfg, remat=remat), case, keys)
  for given in (routes, jnp.zeros_like(routes).at[..., 1].set(1)):
    (value, slopes), (want, expected) = run(params, given), plain(params, given)
    np.testing.assert_allclose(value, want, rtol=2e-5, atol=1e-4)
    assert_close(slopes, expected)
  down = expected['params']['layers_1']['experts_down']['kernel']
  moved = np.abs(down).max((0, 2, 3)) > 0
  np.testing.assert_array_equal(moved, [True, True, False, False, False, False])


def test_frozen_kernels_are_read_where_they_lie(case, weights_of):
  """Under adapters and beside a cache no layer's kernels are cut out of all layers'.

  A GPU would copy them in every step: a slice of them takes no part in a fusion.
  """
  cfg = family(lora_rank=2, layers=3, dense_layers=(0,))
  params, (_, tokens, valid, *_) = weights_of(cfg), case
  kernel = (cfg.experts, cfg.width, cfg.expert_mlp)

  def slices(cfg, params):
    run = lambda params: model.hidden(cfg, params, tokens, valid, routes=None)[0]
    text = jax.jit(run).trace(params).lower(lowering_platforms=('cuda',)).as_text()
    return text.count(f'-> tensor<1x{"x".join(map(str, kernel))}xf32>')

  assert slices(cfg, params) == 0
  trained = dataclasses.replace(cfg, lora_rank=0)
  assert slices(trained, {'params': params['params']}) > 0


def test_adapters_are_of_attention_and_shared_experts():
  cfg = family(lora_rank=2)
  names = lambda cfg: {
    run: set(tree)
    for run, tree in jax.eval_shape(
      lambda key: model.init(cfg, key), jax.random.key(0)
    )['lora'].items()
  }
  own = {'q', 'k', 'v', 'o'}
  shared = {'shared_gate', 'shared_up', 'shared_down'}
  found = names(cfg)
  assert found == {'layers_0': own | {'gate', 'up', 'down'}, 'layers_1': own | shared}
  assert model.linears_of(family(experts=0, dense_layers=())) == (
    'q', 'k', 'v', 'o', 'gate', 'up', 'down',
  )  # fmt: skip
  assert set(model.linears_of(cfg)) == set(model.LINEARS)
  more = names(dataclasses.replace(cfg, lora_targets=model.LORA_TARGETS['experts']))
  assert more['layers_1'] == own | shared | set(EXPERTS)


# --- routes in and out


def test_recorded_routes_replay(case):
  """In whole texts and in windows beside a cache: what a pass records is what it was
  given, and given again it leaves the same states to the bit."""
  params, tokens, valid, _, routes = case
  cfg = family(keep_routes=True)
  hidden = jax.jit(
    lambda given: model.hidden(cfg, params, tokens, valid, True, None, given)
  )
  free, (cache, routed) = hidden(jnp.full(routes.shape, -1))
  assert routed.experts.dtype == jnp.int16 and routed.experts.shape == routes.shape
  again, (_, replayed) = hidden(routed.experts)
  np.testing.assert_array_equal(again, free)
  np.testing.assert_array_equal(replayed.experts, routed.experts)
  other, (_, given) = hidden(routes)
  at = np.arange(16) % 3 == 0
  np.testing.assert_array_equal(given.experts[:, :, at], routes[:, :, at])
  assert np.abs(other - free).max() > 1e-2

  @jax.jit
  def look(given, cache):
    return model.window_logits(
      cfg, params, tokens, valid, 8, 4, keep=True, cache=cache, routes=given,
      as_states=True,
    )  # fmt: skip

  own = routed.experts[:, :, 8:12]
  near, (_, here) = look(jnp.full(own.shape, -1), cache)
  np.testing.assert_allclose(near, free[:, 8:12], atol=2e-5)
  np.testing.assert_array_equal(here.experts, own)
  np.testing.assert_array_equal(look(own, cache)[0], near)
  turned, (_, there) = look(5 - own, cache)
  np.testing.assert_array_equal(there.experts, 5 - own)
  assert np.abs(turned - near).max() > 1e-2


def test_load_counts_real_tokens(case):
  """Sums of the load are the choices of the rows' tokens, sums of the mass the tokens.
  In balance the loss is the number of experts of a token; it grows with imbalance."""
  params, tokens, valid, _, _ = case
  cfg = family(keep_routes=True)
  _, (_, routed) = jax.jit(lambda: model.hidden(cfg, params, tokens, valid))()
  count = np.sum(valid, 1)
  np.testing.assert_array_equal(np.sum(routed.load, -1), [2 * count] * 2)
  np.testing.assert_allclose(np.sum(routed.mass, -1), [count] * 2, rtol=1e-5)
  by_hand = np.zeros((2, 2, 6))
  for layer, row, token, choice in np.ndindex(2, 2, 16, 2):
    expert = int(routed.experts[layer, row, token, choice])
    by_hand[layer, row, expert] += bool(valid[row, token])
  np.testing.assert_array_equal(routed.load, by_hand)
  even = jnp.full((1, 6), 20.0)
  np.testing.assert_allclose(model.balance_loss(cfg, 2 * even, even), [2.0], rtol=1e-6)
  one = jnp.zeros((1, 6)).at[0, 3].set(120.0)
  two = one.at[0, 2].set(120.0)
  np.testing.assert_allclose(model.balance_loss(cfg, two, one), [6.0], rtol=1e-6)
  loss = lambda load, mass: jnp.sum(model.balance_loss(cfg, load, mass))
  by_load, by_mass = jax.grad(loss, (0, 1))(two, one)
  assert (by_load == 0).all() and np.argmax(by_mass) in (2, 3)


@pytest.mark.slow
def test_one_packed_pass_is_the_forward_of_every_block(case):
  """And neither padding nor neighbours change it."""
  params, tokens, valid, masked, _ = case

  @jax.jit
  def both(tokens, valid, masked):
    packed = logprob.token_logp(CFG, params, tokens, masked, valid)
    rows = []
    for k in range(2):
      parts = []
      for at in (8, 12):
        hidden = masked[:, k, at - 8 : at - 4]
        block = jnp.where(hidden, CFG.mask_id, tokens[:, at : at + 4])
        text = jnp.concatenate([tokens[:, :at], block], 1)
        logits = model.full_logits(CFG, params, text, valid[:, : at + 4])[:, at:]
        logp = model.logp_of(logits, tokens[:, at : at + 4])
        parts.append(jnp.where(hidden, logp, 0.0))
      rows.append(jnp.concatenate(parts, 1))
    return packed, jnp.stack(rows, 1)

  packed, blocks = both(tokens, valid, masked)
  np.testing.assert_allclose(packed, blocks, atol=2e-5)
  alone = logprob.token_logp(CFG, params, tokens[1:, 4:], masked[1:], valid[1:, 4:])
  np.testing.assert_allclose(alone[0], packed[1], atol=2e-5)


# --- fields, and the types of numbers


@pytest.mark.smoke
def test_runs_of_layers():
  runs = lambda **fields: [tuple(run) for run in model.layer_runs(family(**fields))]
  assert runs(experts=0, dense_layers=()) == [('layers', False, 0, 3)]
  assert runs(dense_layers=()) == [('layers', True, 0, 3)]
  assert runs() == [('layers_0', False, 0, 1), ('layers_1', True, 1, 2)]
  assert runs(layers=4, dense_layers=(1, 2)) == [
    ('layers_0', True, 0, 1), ('layers_1', False, 1, 2), ('layers_2', True, 3, 1),
  ]  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize(
  'field, value, says',
  [
    ('experts', 2**15, '0 to 32767'),
    ('experts_per_token', 7, 'experts = 6'),
    ('expert_mlp', 0, 'size of an expert'),
    ('dense_layers', (3,), '0 to layers - 1 = 2'),
    ('dense_layers', (0, 1, 2), 'more layers.*experts = 0'),
    ('router', 'tanh', 'softmax or sigmoid'),
    ('router_bias', 'yes', 'choice or weight'),
    ('router_groups', 4, 'experts = 6'),
    ('router_groups_kept', 2, 'router_groups = 1'),
    ('expert_kernel', 'fast', 'dense, ragged'),
    ('rotary', 0.3, 'width / heads.*even number'),
  ],
)
def test_wrong_fields_are_refused(field, value, says):
  with pytest.raises(ValueError, match=f'{field} = .*{says}'):
    family(**{field: value})


@pytest.mark.smoke
def test_routers_keep_their_precision(weights_of):
  """The router's products are float32 and its bias is stored so; it is not quantized.
  Experts are, with a scale for each output of each expert."""
  cfg = family(router_bias='choice', dtype='bfloat16', param_dtype='bfloat16')
  params = weights_of(cfg)
  assert params['params']['layers_1']['router']['bias'].dtype == jnp.float32
  stored = build.quantized_shapes(params, 'int8')['params']['layers_1']
  assert isinstance(stored['router']['kernel'], jax.Array)
  assert stored['experts_up']['kernel'].scale.shape == (2, 6, 1, 24)
  kernel = jax.random.normal(jax.random.key(0), (2, 3, 64, 8))
  for kind, most in (('int8', 0.01), ('nf4', 0.2)):
    again = model.dense(model.quantize(kernel, kind))
    assert np.abs(again - kernel).max() < most * np.abs(kernel).max()


@pytest.mark.smoke
def test_norms_round_before_or_after_their_weight():
  """In bfloat16; both are the same in float32."""
  draw = np.random.default_rng(0)
  x, scale = (
    jnp.asarray(draw.normal(size=(1, 64, 8)), jnp.bfloat16),
    draw.normal(size=8),
  )
  y = np.float32(x) / np.sqrt(np.mean(np.float32(x) ** 2, -1, keepdims=True) + CFG.eps)
  scale = jnp.asarray(scale, jnp.bfloat16)
  half = lambda z: jnp.asarray(z, jnp.bfloat16)
  want = {
    True: half(np.float32(half(y)) * np.float32(scale)),
    False: half(y * np.float32(scale)),
  }
  for first, expected in want.items():
    cfg = family(norm_round=first, dtype='bfloat16', param_dtype='bfloat16')
    norm = model.transformer.Norm(cfg)
    got = norm.apply({'params': {'scale': scale}}, x)
    np.testing.assert_array_equal(np.float32(got), np.float32(expected))
  assert (np.float32(want[True]) != np.float32(want[False])).any()
