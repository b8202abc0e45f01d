"""The transformer equals its formulas, and does not depend on padding or batch."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from dmpo_jax import mesh, model, resume
from dmpo_jax.model.lora import dropout
from dmpo_jax.tools.costs import inner_jaxprs

# The families: LLaDA, Dream, Qwen3-like, a tied head, experts; GQA in two of them.
VARIANTS = {
  'llada': dict(),
  'dream': dict(heads=4, kv_heads=2, qkv_bias=True, shift=True),
  'qwen3': dict(
    heads=4, kv_heads=1, head_dim=6, qk_norm=True, rope_theta=1e6, eps=1e-6
  ),
  'tied': dict(tied=True, layers=3, mlp=20),
  'experts': dict(
    layers=3, dense_layers=(1,), experts=6, experts_per_token=2, expert_mlp=12,
    shared_mlp=8, router='sigmoid', router_bias='choice', router_norm=True,
    router_scale=2.5, router_groups=3, router_groups_kept=2, rotary=0.5,
  ),
}  # fmt: skip
PADS = (0, 1, 4)  # left padding of the rows
SIZE = 9  # of every row, padding included


def batch(cfg):
  """Returns rows of random ids, (R, S), and where they are real."""
  draw = np.random.default_rng(1)
  tokens = draw.integers(cfg.vocab, size=(len(PADS), SIZE))
  valid = np.arange(SIZE) >= np.array(PADS)[:, None]
  return jnp.asarray(tokens, jnp.int32), jnp.asarray(valid)


class Net:
  """Holds a variant's config, weights and compiled forward."""

  def __init__(self, cfg, params):
    self.cfg, self.params = cfg, params
    self.full = jax.jit(
      lambda tokens, valid=None, params=self.params: model.full_logits(
        cfg, params, tokens, valid
      )
    )


@pytest.fixture(scope='module')
def nets(tiny, weights):
  cfgs = {
    name: dataclasses.replace(tiny, **fields) for name, fields in VARIANTS.items()
  }
  return {name: Net(cfg, weights(cfg)) for name, cfg in cfgs.items()}


@pytest.fixture(scope='module', params=VARIANTS)
def net(request, nets):
  return nets[request.param]


@pytest.fixture(scope='module')
def plain(nets):
  return nets['llada']


@pytest.fixture(scope='module')
def adapted(tiny):
  """Returns a small model with fresh adapters."""
  cfg = dataclasses.replace(tiny, lora_rank=3, lora_alpha=7.0)
  fresh = jax.jit(lambda key: model.init(cfg, key))(jax.random.key(0))
  return cfg, fresh


def expected(cfg, params, tokens, pads=PADS):
  """Returns the reference's logits of each row without its padding."""
  rows = zip(np.asarray(tokens), pads, strict=True)
  return [reference.full_logits(cfg, params, row[pad:]) for row, pad in rows]


def test_logits_equal_the_formulas(net):
  """The scanned, batched and padded network equals unrolled NumPy of each row
  alone. So left padding moves no prediction, in the shifted family too."""
  tokens, valid = batch(net.cfg)
  logits = net.full(tokens, valid)
  assert logits.dtype == jnp.float32
  for row, pad, want in zip(
    logits, PADS, expected(net.cfg, net.params, tokens), strict=True
  ):
    np.testing.assert_allclose(row[pad:], want, rtol=1e-4, atol=1e-4)


def test_without_valid_all_tokens_are_real(plain):
  tokens, _ = batch(plain.cfg)
  want = expected(plain.cfg, plain.params, tokens, pads=[0] * len(PADS))
  np.testing.assert_allclose(plain.full(tokens), want, rtol=1e-4, atol=1e-4)


def test_ids_under_padding_change_nothing(net):
  """Other ids under the padding move no real prediction."""
  tokens, valid = batch(net.cfg)
  other = jnp.where(valid, tokens, (tokens + 3) % net.cfg.vocab)
  same = jnp.where(valid[..., None], net.full(tokens, valid), 0)
  again = jnp.where(valid[..., None], net.full(other, valid), 0)
  np.testing.assert_array_equal(same, again)


def test_rows_do_not_see_each_other(net):
  tokens, valid = batch(net.cfg)
  changed = tokens.at[1].set((tokens[1] + 1) % net.cfg.vocab)
  logits, again = net.full(tokens, valid), net.full(changed, valid)
  np.testing.assert_array_equal(logits[::2], again[::2])
  assert not np.allclose(logits[1], again[1])


def test_every_output_depends_on_every_input(net):
  """Attention is bidirectional: changing a token moves the logits before it and
  after it."""
  tokens = np.tile(np.arange(SIZE, dtype=np.int32), (SIZE, 1))
  changed = tokens.copy()
  np.fill_diagonal(changed, net.cfg.mask_id)  # row i differs in token i
  valid = jnp.ones((len(PADS), SIZE), bool)
  rows = lambda x: np.concatenate(
    [net.full(jnp.asarray(part), valid) for part in np.split(x, len(PADS))]
  )
  moved = np.abs(rows(changed) - rows(tokens)).max(-1)  # (input, output)
  assert moved.min() > 1e-4


def test_window_and_cache_equal_the_formulas(net):
  """A window is a slice of the logits without the mask token. The cache gives the
  same while nothing changed. Once the window's tokens change it gives the formulas
  of a frozen outside."""
  cfg, width, start = net.cfg, 3, 5
  tokens, valid = batch(cfg)

  @jax.jit
  def look(tokens, start, cache=None):
    return model.window_logits(
      cfg, net.params, tokens, valid, start, width, keep=True, cache=cache
    )

  full = np.array(net.full(tokens, valid))
  full[..., cfg.mask_id] = -np.inf
  logits, cache = look(tokens, start)
  close = dict(rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(logits, full[:, start : start + width], **close)
  again, kept = look(tokens, start, cache)
  np.testing.assert_allclose(again, logits, **close)
  own = slice(start - cfg.shift, start + width)  # it returns the window's columns
  for one, whole in zip(kept, cache, strict=True):
    np.testing.assert_allclose(one, whole[:, :, :, own], **close)

  changed = tokens.at[:, start : start + width].set(cfg.mask_id)
  found, _ = look(changed, start, cache)
  for i, pad in enumerate(PADS):
    row = np.asarray(tokens)[i, pad:]
    memory = reference.states(cfg, net.params, row)[1]
    first = start - pad - cfg.shift
    part = np.asarray(changed)[i, pad + first : start + width]
    out = reference.states(cfg, net.params, part, first, memory)[0][:width]
    want = reference.head(cfg, net.params, out)
    want[:, cfg.mask_id] = -np.inf
    np.testing.assert_allclose(found[i], want, **close)
  # It is an approximation: the outside did not see the change.
  exact, _ = look(changed, start)
  assert not np.allclose(found, exact, atol=1e-3)


def test_rows_may_start_their_windows_apart(plain):
  tokens, valid = batch(plain.cfg)
  starts = np.array([2, 6, 4])
  rows, _ = jax.jit(
    lambda starts: model.window_logits(
      plain.cfg, plain.params, tokens, valid, starts, 3
    )
  )(starts)
  for row, full, at in zip(rows, plain.full(tokens, valid), starts, strict=True):
    other = np.arange(plain.cfg.vocab) != plain.cfg.mask_id
    np.testing.assert_allclose(
      row[:, other], full[at : at + 3, other], rtol=1e-4, atol=1e-4
    )


def test_guidance_equals_its_formula(plain):
  """The logits are un + (g + 1) (cond - un), un with a masked prompt."""
  cfg, prompt, g = plain.cfg, 5, 0.7
  tokens, valid = batch(cfg)
  logits, _ = jax.jit(
    lambda tokens: model.window_logits(
      cfg, plain.params, tokens, valid, prompt, 4, prompt, g
    )
  )(tokens)
  blind = tokens.at[:, :prompt].set(cfg.mask_id)
  cond, blind = (np.asarray(plain.full(x, valid))[:, prompt:] for x in (tokens, blind))
  want = blind + (g + 1) * (cond - blind)
  want[..., cfg.mask_id] = -np.inf
  np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.smoke
def test_positions_start_at_the_first_real_token():
  """No logit shows it, because RoPE is relative; rounding far out would."""
  valid = jnp.asarray([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
  found = model.positions_of(valid)
  np.testing.assert_array_equal(found, [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])


@pytest.mark.smoke
def test_valid_must_have_the_shape_of_tokens(plain):
  tokens, valid = batch(plain.cfg)
  with pytest.raises((ValueError, TypeError)):  # or the type checker's
    model.full_logits(plain.cfg, plain.params, tokens, valid[:, 1:])


def test_fresh_adapters_change_nothing(adapted, weights):
  """b starts at zero, so the logits with and without 'lora' are equal, and the
  reference policy is the same tree without its adapters."""
  cfg, fresh = adapted
  tokens, valid = batch(cfg)
  full = jax.jit(lambda p: model.full_logits(cfg, p, tokens, valid))
  base = {'params': fresh['params']}
  np.testing.assert_array_equal(full(fresh), full(base))
  moved = {**base, 'lora': weights(cfg)['lora']}
  assert np.max(np.abs(full(moved) - full(base))) > 0.1
  for row, pad, want in zip(
    full(moved), PADS, expected(cfg, moved, tokens), strict=True
  ):
    np.testing.assert_allclose(row[pad:], want, rtol=1e-4, atol=1e-4)


def test_policy_between_base_and_adapter(adapted, weights):
  """mix scales A B, as the adapter's alpha does; without adapters it is linear."""
  cfg, fresh = adapted
  tokens, valid = batch(cfg)
  full = jax.jit(
    lambda cfg, p: model.full_logits(cfg, p, tokens, valid), static_argnums=0
  )
  base = {'params': fresh['params']}
  moved = {**base, 'lora': weights(cfg)['lora']}
  weak = dataclasses.replace(cfg, lora_alpha=cfg.lora_alpha / 4)
  got = full(cfg, resume.mixed(moved, base, 0.25))
  np.testing.assert_allclose(got, full(weak, moved), rtol=1e-5, atol=1e-5)
  assert np.max(np.abs(got - full(cfg, moved))) > 0.1
  other = jax.tree.map(lambda x: 3 * x + 1, base)
  half = resume.mixed(other, base, 0.5)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(y, 2 * x + 0.5, 1e-5, 1e-6), base, half
  )
  jax.tree.map(np.testing.assert_array_equal, resume.mixed(other, base, 0.0), base)


def test_adapters_do_not_change_the_base(adapted, tiny):
  """The base weights are those of the same key without adapters."""
  _, fresh = adapted
  plain = jax.jit(lambda key: model.init(tiny, key))(jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, fresh['params'], plain['params'])


@pytest.mark.parametrize('tied', [False, True])
def test_base_trains_without_adapters_alone(tiny, weights, tied):
  """With lora_rank > 0 the gradient of the head and of every kernel is zero. With
  lora_rank = 0 and the same base, without 'lora', every leaf has a gradient."""
  cfg = dataclasses.replace(tiny, lora_rank=3, tied=tied)
  params, (tokens, valid) = weights(cfg), batch(cfg)

  def slopes(cfg, params):
    loss = lambda p: jnp.mean(model.full_logits(cfg, p, tokens, valid) ** 2)
    tree = jax.jit(jax.grad(loss))(params)['params']
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {mesh.path_of(path): float(jnp.abs(x).max()) for path, x in flat}

  frozen = slopes(cfg, params)
  assert all(frozen[path] == 0 for path in frozen if path.endswith('head'))
  plain = dataclasses.replace(cfg, lora_rank=0)
  trained = slopes(plain, {'params': params['params']})
  assert ('head' in trained) == (not tied) and min(trained.values()) > 0


@pytest.mark.parametrize(
  'name, wanted',
  [
    ('all', ['down', 'gate', 'k', 'o', 'q', 'up', 'v']),
    ('paper', ['k', 'q', 'up', 'v']),
  ],
)
@pytest.mark.smoke
def test_lora_targets(tiny, name, wanted):
  """A target list names exactly the linears that get adapters. These are stacked
  over the layers, and float32 whatever the dtype of the weights."""
  cfg = dataclasses.replace(
    tiny,
    lora_rank=3,
    lora_targets=model.LORA_TARGETS[name],
    dtype='bfloat16',
    param_dtype='bfloat16',
  )
  shapes = jax.eval_shape(lambda key: model.init(cfg, key), jax.random.key(0))
  assert sorted(shapes['lora']) == ['layers']
  assert sorted(shapes['lora']['layers']) == wanted
  for pair in shapes['lora']['layers'].values():
    assert pair['a'].shape[::2] == (cfg.layers, 3)
    assert pair['b'].shape[:2] == (cfg.layers, 3)
  kinds = lambda tree: {leaf.dtype.name for leaf in jax.tree.leaves(tree)}
  assert kinds(shapes['lora']) == {'float32'}
  assert kinds(shapes['params']) == {'bfloat16'}


@pytest.mark.parametrize('lora_dtype', ['float32', 'bfloat16'])
def test_bfloat16_is_close(lora_dtype, adapted, weights):
  """bfloat16 is for the matmuls alone: logits and the gradients of adapters are
  float32, and the logits are near those of float32."""
  cfg, fresh = adapted
  tokens, valid = batch(cfg)
  lora = jax.tree.map(lambda x: 0.3 * x, weights(cfg)['lora'])
  found = []
  for dtype in ('float32', 'bfloat16'):
    one = dataclasses.replace(cfg, dtype=dtype)
    if dtype == 'bfloat16':
      one = dataclasses.replace(one, lora_dtype=lora_dtype)

    def logits(lora, one=one):
      tree = {**fresh, 'lora': lora}
      return model.full_logits(one, tree, tokens, valid)

    slopes = jax.eval_shape(jax.grad(lambda x: jnp.sum(logits(x))), lora)
    assert {x.dtype.name for x in jax.tree.leaves(slopes)} == {'float32'}
    found.append(jax.jit(logits)(lora)[np.asarray(valid)])
    assert found[-1].dtype == jnp.float32
  off = np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0])
  assert 1e-4 < off < 0.05
  program = jax.make_jaxpr(logits)(lora).jaxpr
  products = {eqn.invars[0].aval.dtype.name for eqn in products_of(program)}
  assert products == {'bfloat16', lora_dtype}


def products_of(jaxpr):
  """Returns the equations of a program, inner ones too, that multiply matrices."""
  found = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == 'dot_general']
  inner = [part for eqn in jaxpr.eqns for part in inner_jaxprs(eqn.params)]
  return found + [eqn for part in inner for eqn in products_of(part)]


@pytest.mark.parametrize('rate', [0.05, 0.5])
def test_dropout_keeps_its_rate_and_draws_apart(rate):
  """The mean is exact, and no two neighbours, halves of a word or tokens are tied."""
  rows, tokens, width = 4, 64, 257
  keys = jax.random.split(jax.random.key(0), (rows, tokens))
  ones = jnp.ones((rows, tokens, width))
  drop = jax.jit(dropout, static_argnums=(2, 3))
  found = np.asarray(drop(ones, keys, rate, 'q'), np.float64)
  kept, count = found > 0, found.size
  share = round((1 - rate) * 2**16) / 2**16
  np.testing.assert_allclose(found[kept], 1 / share, rtol=1e-6)
  assert abs(kept.mean() - share) < 4 * (rate * (1 - rate) / count) ** 0.5
  assert abs(kept.mean((0, 1)) - share).max() < 5 * (rate / rows / tokens) ** 0.5
  x = (kept - kept.mean()) / kept.std()
  other = np.asarray(drop(ones, keys, rate, 'k') > 0, np.float64)
  pairs = {
    'neighbours': x[..., 1:] * x[..., :-1],
    'two apart': x[..., 2:] * x[..., :-2],
    'half a row apart': x[..., 128:256] * x[..., :128],
    'tokens': x[:, 1:] * x[:, :-1],
    'rows': x[1:] * x[:-1],
    'linears': x * (other - other.mean()) / other.std(),
  }
  for name, product in pairs.items():
    assert abs(product.mean()) < 5 / product.size**0.5, name
  draws = jax.make_jaxpr(lambda x: dropout(x, keys, rate, 'q'))(ones)
  assert f'u32[{rows},{tokens},129,1]' in str(draws)  # half as many as there are inputs


def test_program_does_not_grow_with_depth(tiny):
  """The layers are scanned: three times as many give the same program."""
  sizes = []
  for layers in (2, 6):
    cfg = dataclasses.replace(tiny, layers=layers)
    shapes = jax.eval_shape(
      lambda key, cfg=cfg: model.init(cfg, key), jax.random.key(0)
    )
    program = jax.make_jaxpr(
      lambda p, cfg=cfg: model.full_logits(cfg, p, jnp.zeros((1, 4), jnp.int32))
    )(shapes)
    sizes.append(len(re.findall('\n', str(program))))
  assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
  'name, size',
  [
    # By hand from the published tables of shapes: embedding and head, layers
    # of attention, MLP and norms, and the last norm.
    (
      'llada_8b',
      2 * 126464 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 12288 + 2 * 4096) + 4096,
    ),
    (
      'dream_7b',
      2 * 152064 * 3584
      + 28
      * (2 * 3584**2 + 2 * 3584 * 512 + 3584 + 2 * 512 + 3 * 3584 * 18944 + 2 * 3584)
      + 3584,
    ),
    (
      'sdar_8b',
      2 * 151936 * 4096
      + 36 * (2 * 4096**2 + 2 * 4096 * 1024 + 2 * 128 + 3 * 4096 * 12288 + 2 * 4096)
      + 4096,
    ),
    # Half of total_size in model.safetensors.index.json: bfloat16.
    ('sdar_4b', 8822848512 // 2),
    ('fast_dllm_7b', 15231233024 // 2),
    ('llada2_mini', 32511286784 // 2),
    ('sdar_30b', 61064245248 // 2),
    (
      'sdar_1_7b',
      2 * 151936 * 2048
      + 28 * (2 * 2048**2 + 2 * 2048 * 1024 + 2 * 128 + 3 * 2048 * 6144 + 2 * 2048)
      + 2048,
    ),
    (
      'a2d_0_6b',
      151936 * 1024
      + 28 * (4 * 1024 * 2048 - 2 * 1024**2 + 2 * 128 + 3 * 1024 * 3072 + 2 * 1024)
      + 1024,
    ),
  ],
)
def test_presets_have_the_published_size(name, size):
  cfg = model.ModelConfig(**model.PRESETS[name])
  shapes = jax.eval_shape(lambda key: model.init(cfg, key), jax.random.key(0))
  assert model.count_params(shapes) == size


# Attention by other kernels, and the gradient's products.


@pytest.fixture(scope='module')
def heads():
  """Returns (q, k, v, mask) of 4 rows, 4 heads on 2; the first keys are padding."""
  draw = np.random.default_rng(1)
  q, k, v = (
    jnp.asarray(draw.normal(size=(4, n, t, 128)) / 4, jnp.float32)
    for n, t in ((4, 5), (2, 9), (2, 9))
  )
  mask = np.arange(9)[None] >= np.arange(4)[:, None]
  return q, k, v, jnp.asarray(mask[:, None, None])


def test_cudnn_gets_equivalent_arguments(heads, monkeypatch):
  """XLA, in the place of the GPU's kernel, computes `attend` from its arguments.
  The kernel needs a mask with a row for every query."""
  real = jax.nn.dot_product_attention

  def instead(q, k, v, mask, scale, implementation):
    assert implementation == 'cudnn' and mask.shape == (4, 1, 5, 9)
    return real(q, k, v, mask=mask, scale=scale)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', instead)
  found, want = model.attend_cudnn(*heads), model.attend(*heads)
  np.testing.assert_allclose(found, want, atol=1e-5)


def test_splash_equals_attend(heads):
  """The interpreted TPU kernel equals `attend`, alone and where a mesh splits rows
  and heads. It refuses masks that it cannot express."""
  run = jax.jit(functools.partial(model.attend_splash, interpret=True))
  want = model.attend(*heads)
  np.testing.assert_allclose(run(*heads), want, atol=1e-5)
  with jax.set_mesh(mesh.make_mesh(data=2, fsdp=2, tensor=2)):
    np.testing.assert_allclose(run(*heads), want, atol=1e-5)
  with pytest.raises(ValueError, match='model.attention = xla'):
    model.attend_splash(*heads[:3], jnp.ones((4, 1, 5, 9), bool))


@pytest.fixture(scope='module')
def noisy_copies():
  """Queries, keys and values of rows [text | 2 noisy copies], with padding in front,
  and the rule of their mask: a text of 2 + 3 blocks of four tokens."""
  draw = np.random.default_rng(0)
  real = np.arange(20)[None] >= np.array([[0], [4], [8]])
  packed = model.Packed(jnp.asarray(real), length=12, copies=2, block=4)
  heads = (
    jnp.asarray(draw.normal(size=(3, n, 44, 128)) / 4, jnp.float32) for n in (4, 2, 2)
  )
  return *heads, packed


def test_kernels_agree_on_noisy_copies(noisy_copies, monkeypatch):
  """Every kernel equals plain attention under the mask as one array, in values and
  gradients. The first is interpreted, the last gets its arguments."""
  q, k, v, packed = noisy_copies
  real = np.asarray(packed.real_columns())
  put = jax.nn.dot_product_attention
  monkeypatch.setattr(
    jax.nn,
    'dot_product_attention',
    lambda *args, implementation, **kw: put(*args, **kw),
  )
  loss = lambda kernel, mask: jax.value_and_grad(
    lambda *args: jnp.sum(jnp.sin(kernel(*args, mask)) * real[:, None, :, None]),
    (0, 1, 2),
  )
  want = loss(model.attend, packed.dense())(q, k, v)
  splash = functools.partial(model.attend_splash, interpret=True)
  for kernel in (model.attend, splash, model.attend_cudnn):
    found = jax.jit(loss(kernel, packed))(q, k, v)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, want
    )


def test_no_array_of_all_pairs_of_noisy_copies(noisy_copies):
  """Scores are those of text with text, copies with text, and copies with their own
  block: 3 rows, 4 heads."""
  q, k, v, packed = noisy_copies
  text = jax.make_jaxpr(lambda *args: model.attend(*args, packed))(q, k, v)
  sizes = [
    np.prod(x.aval.shape)
    for eqn in text.jaxpr.eqns
    if eqn.primitive.name == 'dot_general'
    for x in eqn.outvars
  ]
  pairs = 20 * 20, 24 * 20, 24 * 4
  assert sizes[::2] == [3 * 4 * n for n in pairs]  # each before a product with values


@pytest.mark.parametrize('wide', [6, 2])
def test_gradients_of_matmul_equal_jax(wide):
  """Both orders of the kernel's gradient give JAX's own."""
  draw = np.random.default_rng(0)
  x, kernel = draw.normal(size=(2, 3, 4)), draw.normal(size=(4, wide))
  x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
  loss = lambda fn: lambda x, kernel: jnp.sum(jnp.sin(fn(x, kernel)))
  found, want = (
    jax.grad(loss(fn), (0, 1))(x, kernel) for fn in (model.matmul, jnp.matmul)
  )
  for one, other in zip(found, want, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
