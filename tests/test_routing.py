"""Routers in training, and the rollout's choice of experts: recorded and replayed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import mostly_slow
from tiny_run import (
  interrupt,
  letters,
  rows,
  run,
  same,
  same_files,
  stop_at,
  tiny,
  watched,
)

from dmpo_jax import (
  agreement,
  build,
  check,
  config,
  data,
  hf,
  layout,
  logprob,
  mesh,
  model,
  parts,
  rng,
  routing,
  sampler,
  step,
  weights,
)
from dmpo_jax.types import Lesson, Masks

pytest_plugins = 'tiny_run'
W, L, P = 4, 8, 7
CFG = model.ModelConfig(
  vocab=24, width=32, layers=3, heads=2, kv_heads=1, mlp=48, mask_id=23, eos_id=22,
  pad_id=21, positions=64, rope_theta=100.0, qk_norm=True, block_causal=W, experts=8,
  experts_per_token=2, expert_mlp=16, shared_mlp=16, dense_layers=(0,),
  router='sigmoid', router_bias='choice', router_norm=True, router_groups=4,
  router_groups_kept=2, expert_kernel='dense',
)  # fmt: skip
HP = sampler.SampleConfig(
  length=L, block=4, steps=L, temperature=1.0, pick='threshold', threshold=0.3,
  rank='max', cache='block', eos_stop=True,
)  # fmt: skip
KINDS = {
  'block': (CFG, HP),
  'slots': (CFG, dataclasses.replace(HP, slots=2, block=2)),
  'uncached': (
    CFG, dataclasses.replace(HP, cache='none', pick='confidence', eos_stop=False)
  ),
  'whole': (
    dataclasses.replace(CFG, block_causal=0),
    dataclasses.replace(HP, cache='none', pick='confidence', steps=4),
  ),
}  # fmt: skip


@pytest.fixture(scope='module')
def params(weights):
  """Parameters whose routers decide by more than rounding."""
  return jax.tree.map(lambda x: 1.5 * x, weights(CFG))


def sampled(cfg, hp, params, rows=slice(None), extra=0):
  """Rollouts with their routes; the rows' prompts have `extra` columns of padding."""
  prompts = jax.random.randint(jax.random.key(1), (4, P), 0, 20)
  valid = jnp.ones((4, P), bool).at[1, :3].set(False)
  pad = lambda x, fill: jnp.pad(x, ((0, 0), (extra, 0)), constant_values=fill)
  keys = rng.row_keys(jax.random.key(2), jnp.arange(4))[rows]
  args = pad(prompts, 21)[rows], pad(valid, False)[rows], keys, hp, ('routes',)
  return jax.jit(lambda p: sampler.sample(cfg, p, *args))(params)


def moved(params):
  """Parameters with other routers."""
  turn = lambda path, x: jnp.roll(x, 3, -1) if 'router' in str(path) else x
  return jax.tree_util.tree_map_with_path(turn, params)


@pytest.mark.parametrize('kind', mostly_slow(KINDS, ('block', 'whole')))
def test_replay_repeats_the_rollout(kind, params):
  """Log-probs are the record's; under other routers the experts are still its own."""
  cfg, hp = KINDS[kind]
  out = sampled(cfg, hp, params)
  record, block = out.routes, cfg.block_causal
  scored = jax.jit(lambda p, x: logprob.trajectory_logp(cfg, p, x, hp))
  free = out._replace(routes=None)
  for rollouts in (out, free):  # no expert hangs on rounding in float32
    new, old = scored(params, rollouts)
    np.testing.assert_allclose(new, old, atol=1e-4)
  assert (
    np.abs(scored(moved(params), out)[0] - scored(moved(params), free)[0]).max() > 1
  )
  # Every recorded state of a block, or of a row, is replayed by the layout.
  at = routing.rounds_of(out.order, block) if block else out.order
  masks = Masks((at >= 0)[:, None], jnp.ones((4, 1, 1)), routes=record)
  masks = masks._replace(sampled=out.order >= 0 if block else out.order != -1)
  keep = dataclasses.replace(cfg, keep_routes=True)
  found = jax.jit(lambda p: layout.layout_of(cfg)(
    keep, p, out.tokens, masks, out.valid, None
  ).routed.experts)(moved(params))  # fmt: skip
  first = np.moveaxis(np.asarray(record.steps[:, 0]), 2, 0)
  had = np.asarray(at >= 0).reshape(4, -1, block or L).any(-1)
  if block:
    seen, had = np.asarray(found)[:, :, -L:], np.repeat(had, block, 1)
    known = np.asarray(record.text) >= 0
    text = np.moveaxis(np.asarray(found), 0, 2)[:, : out.tokens.shape[1]]
    np.testing.assert_array_equal(text[known], np.asarray(record.text)[known])
    # All that a later block saw is known: the last block of a row alone is not.
    assert known[:, :-L].all() and known.any(axis=(1, 2, 3)).all()
  else:
    seen, had = np.asarray(found), np.repeat(had, first.shape[2], 1)
  assert (first >= 0)[:, had].all()
  np.testing.assert_array_equal(seen[:, had], first[:, had])


def test_record_depends_on_the_row_alone(params):
  """Neither on its neighbours, nor on padding, nor on slots."""
  whole, two = sampled(CFG, HP, params), slice(1, 3)
  for hp, extra in ((HP, 4), (dataclasses.replace(HP, slots=1), 0)):
    part = sampled(CFG, hp, params, two, extra)
    np.testing.assert_array_equal(part.tokens[:, -L:], whole.tokens[two, -L:])
    done = np.asarray(routing.rounds_of(part.order, W))
    for row, x, y in zip(done, part.routes.steps, whole.routes.steps[two], strict=True):
      for at in range(0, L, W):
        rounds = row[at : at + W].max() + 1
        both = (z[:rounds, at : at + W] for z in (x, y))
        np.testing.assert_array_equal(*both)
    real = np.asarray(part.valid)
    old = np.asarray(whole.valid)[two]
    for a, b, x, y in zip(
      part.routes.text, whole.routes.text[two], real, old, strict=True
    ):
      np.testing.assert_array_equal(np.asarray(a)[x][:-L], np.asarray(b)[y][:-L])


@pytest.mark.parametrize('block', [0, 4])
def test_recorded_state(block):
  """A copy is at a step if exactly what was unmasked then or later is masked."""
  order = jnp.array([[-2, 2, 1, 1, 3, 5, 4, 3], [0, 1, 2, 3, 4, 5, -1, -1]])
  order = order if block else jnp.maximum(order, -1)
  cut = lambda x: np.asarray(x).reshape(2, -1, block or 8)
  rounds = (
    cut(order)
    if not block
    else np.array([[[-1, 1, 0, 0], [0, 2, 1, 0]], [[0, 1, 2, 3], [0, 1, -1, -1]]])
  )
  if block:
    np.testing.assert_array_equal(cut(routing.rounds_of(order, block)), rounds)
  draw = np.random.default_rng(0).random((2, 40, 8)) < 0.5
  steps = np.arange(7)[None, :, None]
  states = np.broadcast_to(rounds.reshape(2, 1, 8) >= steps, (2, 7, 8))
  masked = np.concatenate([states, draw & (np.asarray(order) >= 0)[:, None]], axis=1)
  found = np.asarray(routing.recorded_state(order, jnp.asarray(masked), block))
  for row, copies in enumerate(masked):
    for k, copy in enumerate(copies):
      for c, cell in enumerate(rounds[row]):
        part, own = copy.reshape(-1, block or 8)[c], cell >= 0
        fits = [s for s in np.unique(cell[own]) if (part == (cell >= s))[own].all()]
        assert found[row, k, c] == (fits[0] if fits else -1)
  assert (found[:, 7:] == -1).any() and (found[:, :1] >= 0).all()


# --- training


def lesson():
  tokens = jax.random.randint(jax.random.key(5), (4, 12), 0, 20)
  valid = jnp.ones((4, 12), bool).at[1, :2].set(False)
  learn = jnp.ones((4, 1, L), bool)
  return Lesson(tokens, valid, learn, jnp.arange(4))


@pytest.fixture(scope='module')
def taught(params):
  """how, microbatches -> (parameters, metrics) after an update with weight decay."""

  def update(how, microbatches=1, **fields):
    cfg = dataclasses.replace(CFG, keep_routes=True, **fields)
    optimizer = step.optim.make_optimizer(
      step.optim.Config(lr=1e-2, warmup=0, weight_decay=0.1), routers=how.trains('sft')
    )
    setup = step.SftSetup(cfg, L, optimizer, microbatches, experts=how)
    start = {'params': params['params'], **(
      {'lora': model.init(cfg, jax.random.key(3))['lora']} if cfg.lora_rank else {}
    )}  # fmt: skip
    trained = {'lora': start['lora']} if cfg.lora_rank else start
    state = step.init_state(trained, optimizer)
    fn = jax.jit(lambda s: step.sft_step(s, start, lesson(), jax.random.key(4), setup))
    state, metrics = fn(state)
    return state.trainable, metrics

  return update


def test_routers_train_by_field(taught, params):
  """A frozen router keeps its bits under weight decay; so does a choice's bias."""
  old = params['params']['layers_1']['router']
  for train, still in (('none', True), ('sft', False)):
    new = taught(routing.Config(train=train))[0]['params']['layers_1']
    assert (new['router']['kernel'] == old['kernel']).all() == still
    assert (new['router']['bias'] == old['bias']).all()
    assert (new['experts_up']['kernel'] != params['params']['layers_1']['experts_up'][
      'kernel']).any()  # fmt: skip


def test_load_loss(taught):
  """It has a gradient, and microbatches add up to it."""
  how = lambda factor: routing.Config(sft_load=factor)
  one, metrics = taught(how(10.0))
  two, _ = taught(how(10.0), 2)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, two)
  none, plain = taught(how(0.0))
  router = lambda tree: tree['params']['layers_1']['router']['kernel']
  assert np.abs(router(one) - router(none)).max() > 1e-3
  assert metrics['loss'] > plain['loss'] + 10


@pytest.mark.slow
def test_adapters_leave_the_load_loss_out(taught):
  losses = [
    taught(routing.Config(sft_load=x), lora_rank=2)[1]['loss'] for x in (0.0, 10.0)
  ]
  assert losses[0] == losses[1]


def test_factor_of_the_load_loss():
  """The checkpoint's own in supervised training, off in RL; 0 of a frozen router."""
  own, none = routing.Config(), routing.Config(train='none', sft_load=2.0)
  assert (own.factor('sft', 0.25), own.factor('rl', 0.25)) == (0.25, 0.0)
  assert (none.factor('sft', 0.25), none.factor('rl', 0.25)) == (0.0, 0.0)
  every = routing.Config(train='all', sft_load=0.5, load=0.125)
  assert (every.factor('sft', 0.25), every.factor('rl', 0.25)) == (0.5, 0.125)


def test_load_loss_is_that_of_the_releases():
  """transformers, load_balancing_loss_func, of one row and layer: E sum f p."""
  logits = np.random.default_rng(0).normal(size=(1, 12, 8)).astype(np.float32)
  cfg = dataclasses.replace(
    CFG, router='softmax', router_bias='', router_groups=1, router_groups_kept=1
  )
  chosen, _, scores = model.moe.choose(cfg, jnp.asarray(logits), None, None)
  routed = model.moe.routed_of(cfg, scores, chosen, jnp.arange(12)[None] < 10)
  routed = jax.tree.map(lambda x: x[None], routed)
  loss, load = step.of_load(cfg, routed, 1, 0.5)
  share = np.exp(logits[0, :10]) / np.exp(logits[0, :10]).sum(-1, keepdims=True)
  best = np.argsort(-share)[:, :2]
  mask = np.eye(8)[best]  # (tokens, k, E)
  want = 8 * (mask.mean(0) * share.mean(0)).sum()
  assert float(loss) == pytest.approx(0.5 * want, rel=1e-5)
  np.testing.assert_array_equal(load[0], mask.sum((0, 1)))


def test_load_metrics():
  even, one = jnp.full((2, 8), 3.0), jnp.zeros((2, 8)).at[:, 2].set(5.0)
  for count, want in ((even, (1, 1, 0)), (one, (8, 0, 7 / 8))):
    found = routing.load_metrics(count)
    names = 'expert_top', 'expert_entropy', 'expert_idle'
    np.testing.assert_allclose([found[x] for x in names], want, atol=1e-6)


def test_replayed_routers_have_gradients(params):
  """The weights are this pass's scores; the choice and its bias have no gradient."""
  out = sampled(CFG, HP, params)
  total = lambda p: jnp.sum(logprob.trajectory_logp(CFG, p, out, HP)[0])
  grad = jax.jit(jax.grad(total))(params)['params']['layers_1']['router']
  assert np.abs(grad['kernel']).max() > 1e-4 and not np.any(grad['bias'])


def test_agreement(params):
  """Equal programs agree; other routers do not, but where they replay."""
  out = sampled(CFG, HP, params)
  measure = jax.jit(lambda p: agreement.agreement(CFG, p, out, HP))
  found, other = measure(params), measure(moved(params))
  assert np.max(found['routes_differ']) == 0
  assert max(np.max(found[x]) for x in ('routes_logp', 'routes_replayed')) < 1e-5
  assert np.min(other['routes_differ']) > 0.3
  assert np.all(other['routes_most'] >= other['routes_logp'])
  with pytest.raises(ValueError, match='record of routes'):
    agreement.agreement(CFG, params, out._replace(routes=None), HP)


# --- runs


def experts(**fields):
  """The tiny run's config with experts, blocks and recorded rounds."""
  c = tiny()
  changes = {
    'model.preset': 'tiny_moe', 'model.layers': 2, 'model.attention_block': 4,
    'objective.name': 'tracerl',
    'sampler.length': 8, 'sampler.block': 4, 'sampler.steps': 8,
    'sampler.cache': 'block', 'eval.sampler.length': 8, 'eval.sampler.block': 4,
    'eval.sampler.steps': 8,
    'sft.overlong': 'cut', 'routing.replay': True, 'model.mlp': 0,
    'routing.train': 'all', 'routing.load': 0.01,
  }  # fmt: skip
  config.update(c, changes | fields)
  return c


BAD = {
  'masks': ({'objective.name': 'dmpo'}, 'routing.replay.*trajectory.*rounds'),
  'cache': (
    {'model.attention_block': 0, 'sampler.cache': 'dual'},
    'routing.replay.*sampler.cache = dual',
  ),
  'guidance': ({'sampler.guidance': 0.5}, 'sampler.guidance.*set 0'),
  'dense': (
    {'model.preset': 'tiny'}, 'no experts.*routing.replay'
  ),
  'load': ({'routing.train': 'sft'}, 'routing.load.*routing.train = all'),
  'health': (
    {
      'model.preset': 'tiny', 'routing.replay': False, 'routing.load': 0.0,
      'health.expert_idle': 0.5,
    },
    'health.expert_idle.*no experts',
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', BAD)
def test_impossible_options_are_refused(name):
  fields, said = BAD[name]
  with pytest.raises(ValueError, match=said):
    build.build(experts(**fields))


def test_options_without_effect_are_named():
  c = tiny()
  c.routing.replay = True
  assert 'routing.replay' in check.effects(c, ())
  with pytest.raises(ValueError, match='routing.train.*experts'):
    check.effects(c, ('routing.train',))


def test_the_preset_is_a_small_llada2(tmp_path, weights_of):
  """A token meets the weights of the dense preset; files hold the model to the bit."""
  preset, tokenizer = model.PRESETS['tiny_moe'], data.char_tokenizer()
  met = preset['experts_per_token'] * preset['expert_mlp'] + preset['shared_mlp']
  assert met == model.PRESETS['tiny']['mlp']
  cfg = parts.model_config(experts(), tokenizer)
  params = weights_of(cfg)
  hf.save_hf(tmp_path, cfg, params, tokenizer)
  again, found = weights.load_hf(str(tmp_path))
  assert again == dataclasses.replace(cfg, head_dim=cfg.width // cfg.heads)
  same(found, params)
  logits = jax.jit(
    lambda c, p: model.full_logits(c, p, hf.write.probe(cfg)), static_argnums=0
  )
  same(logits(cfg, params), logits(again, found))
  told = json.loads((tmp_path / 'config.json').read_text())
  assert told['architectures'] == ['LLaDA2MoeModelLM']
  assert told['num_shared_experts'] * told['moe_intermediate_size'] == cfg.shared_mlp


@pytest.mark.long
def test_interrupted_run_ends_with_the_same_bits(tmp_path, plain_saves):
  """Routes are a part of the saved buffer; a run reports load and agreement.

  Its export is a LLaDA2 that gives the same logits and completions.
  """
  built = build.build(experts(**{'routing.measure': True}))
  built = built._replace(task=built.task._replace(reward=letters))
  base = built.steps.init()
  whole = run(built, tmp_path / 'whole', base)
  watch = stop_at('update', 3, interrupt)
  with pytest.raises(KeyboardInterrupt):
    run(watched(built, watch), tmp_path / 'cut', base, kill=True)
  same(run(built, tmp_path / 'cut', base), whole)
  same_files(tmp_path / 'cut', tmp_path / 'whole')
  lines = rows(tmp_path / 'whole')
  assert all(0 < row['expert_entropy'] <= 1 for row in lines['update'])
  assert all(row['routes_replayed'] < 1e-5 for row in lines['rl'])
  out = str(tmp_path / 'out')
  assert not hf.export(built, whole, base, out, 'merged')['max_logit_difference']
  own = dict.fromkeys(('width', 'layers', 'heads', 'kv_heads'), 0)
  own |= {'checkpoint': out, 'attention_block': -1}
  other = build.build(experts(**{f'model.{name}': x for name, x in own.items()}))
  found = other.steps.init()
  same(mesh.fetch(found), whole)
  tokens = build.problems(built, 'test')
  args = tokens.tokens, tokens.valid, np.arange(8, dtype=np.int32)
  same(*(mesh.fetch(x.steps.sample_eval(p, *args)) for x, p in
         ((built, whole), (other, found))))  # fmt: skip
