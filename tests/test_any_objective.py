"""Every objective from sampling to an update, and which samplers are refused."""

import dataclasses
import functools
import importlib.util
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import mostly_slow

from configs import base
from dmpo_jax import (
  build,
  check,
  checkpoint,
  config,
  curriculum,
  mesh,
  model,
  objectives,
  rng,
  rollout,
  sampler,
  score,
  step,
)
from dmpo_jax.objectives import OBJECTIVES, credit
from dmpo_jax.objectives.shared import Common
from dmpo_jax.types import (
  Canvas,
  Record,
  Rollouts,
  Sampled,
  Scored,
  Scores,
  Text,
  TrainBatch,
  TrainState,
  Views,
  Wants,
)

ROOT = pathlib.Path(__file__).parents[1]
P, L, ROWS = 3, 4, 8
SIZES = {
  'model.width': 16,
  'model.layers': 1,
  'model.heads': 2,
  'model.kv_heads': 2,
  'model.mlp': 16,
  'data.train_size': 16,
  'data.validation_size': 8,
  'data.test_size': 8,
  'sampler.length': L,
  'sampler.temperature': 0.7,
  'train.prompts': 2,
  'train.group': 4,
  'train.inner': 2,
  'train.microbatches': 1,
  'logprob.draws': 2,
}
VARIANTS = {
  'dmpo': {'objective.draws': 2},
  'dmpo, model baseline': {'objective.draws': 2, 'objective.baseline': 'model'},
  'dmpo, rounds': {'objective.draws': 2, 'objective.masks': 'rounds'},
  'agrpo, prefix': {'objective.advantage': 'prefix', 'objective.draws': 4},
}


BLOCKS = {
  'model.attention_block': 2,
  'sampler.block': 2,
  'sampler.cache': 'block',
  'eval.sampler.block': 2,
}
BLOCKWISE = [name for name, x in OBJECTIVES.items() if not x.whole_text]
BLOCK_VARIANTS = {f'{name}, blocks': BLOCKS for name in OBJECTIVES}
for masks in ('order', 'rounds'):
  BLOCK_VARIANTS[f'dmpo, {masks}, blocks'] = {**BLOCKS, 'objective.masks': masks}
BLOCK_VARIANTS['tracerl, prefix, blocks'] = {**BLOCKS, 'objective.advantage': 'prefix'}
BLOCK_VARIANTS['just_grpo, blocks'] = {**BLOCKS, 'sampler.block': 1}


def tiny(name, **changes):
  """Returns the config of an objective, or of one of VARIANTS, at the smallest size."""
  c = base.get_config()
  config.choose_objective(c, name.split(',')[0])
  c.sampler.block = min(c.sampler.block, L)
  c.sampler.steps = max(2, L // c.sampler.block)
  variant = {**VARIANTS, **BLOCK_VARIANTS}.get(name, {})
  c.update_from_flattened_dict({**SIZES, **variant, **changes})
  return c


@functools.cache
def built_of(name):
  return build.build(tiny(name))


def prompts():
  return jax.random.randint(jax.random.key(2), (ROWS, P), 8, 14)


def buffer(built, params):
  """Returns the TrainBatch of a buffer that is sampled, scored and weighed."""
  setup, hp = built.setup, check.settings(sampler.SampleConfig, built.config.sampler)
  row = jnp.arange(ROWS)
  keys = rng.row_keys(jax.random.key(1), row)
  valid, records = jnp.ones((ROWS, P), bool), setup.wants.records or ()
  out = sampler.sample(setup.cfg, params, prompts(), valid, keys, hp, records)
  completion = jnp.ones((ROWS, L), bool).at[:, -1].set(row % 2 == 0)
  return packed(built, params, Sampled(out, completion, row))


def packed(built, params, sampled):
  """Returns the TrainBatch of a sampled buffer."""
  setup = built.setup
  who = score.policies(params, params)
  scores = score.score(who, sampled, jax.random.key(3), jax.random.key(4), setup)
  if scores.guess is not None:  # the host grades them
    rewards = jnp.mean(scores.guess % 3, axis=-1)
    scores = scores._replace(guess=None, guess_reward=rewards)
  reward = jax.random.uniform(jax.random.key(5), (2, 4)).at[1].set(0.5)
  return score.pack(sampled, reward, scores, setup)[0]


@functools.cache
def params_of(name):
  return model.init(built_of(name).model, jax.random.key(0))


@functools.cache
def batch_of(name):
  """Returns the TrainBatch of an objective: one compiled program."""
  return jax.jit(functools.partial(buffer, built_of(name)))(params_of(name))


@functools.cache
def update(name, microbatches=1, **common):
  """Returns (parameters, metrics) of an SGD step with rate one: minus the gradient."""
  setup = dataclasses.replace(
    built_of(name).setup,
    microbatches=microbatches,
    common=Common(**common),
    optimizer=optax.sgd(1.0),
  )
  state = step.init_state(params_of(name), setup.optimizer)
  run = jax.jit(
    lambda state, batch: step.train_step(state, {}, batch, jax.random.key(4), 0, setup)
  )
  new, metrics = run(state, batch_of(name))
  return new.trainable, metrics


def close(a, b, tol=1e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      np.asarray(x), np.asarray(y), rtol=tol, atol=tol
    ),
    a,
    b,
  )


ALL = sorted({*OBJECTIVES, *VARIANTS})
# One of each kind: the ELBO of the old policy; records, reads and the sampling law;
# graded guesses and a weight for each copy; `reweigh` of pairs; views and a record.
KINDS = ('dmpo', 'dmpo, model baseline', 'mapg', 'egspo', 'vrpo', 'diffpo')


@functools.cache
def abstract_of(name):
  return build.abstract_buffer(built_of(name), P)


def shapes(tree):
  return jax.tree.map(lambda x: x.shape, tree)


@pytest.mark.parametrize('name', ALL)
def test_a_batch_holds_what_the_objective_asks_for(name):
  """It holds nothing else, so that checkpoints and scores cost no more."""
  setup, batch = built_of(name).setup, abstract_of(name).batch
  wants, words = setup.wants, jnp.ones((ROWS, L), bool)
  text = Text(
    words,
    words,
    jnp.ones((ROWS, P), bool),
    setup.law.block,
    Canvas(words.shape[1]),
    None,
  )

  def draw(record):
    key, text_ = jax.random.key(0), text._replace(record=record)
    return setup.objective.draw(key, jnp.arange(ROWS), text_, setup.hp).masked

  view = (ROWS, setup.inner, *jax.eval_shape(draw, batch.record).shape[1:])
  for policy in ('old', 'ref'):
    want = Views(
      elbo=view[:2] if policy in wants.elbo else None,
      logp=view if policy in wants.views else None,
      reads=dict.fromkeys(wants.reads, view) if policy in wants.views else None,
    )
    assert shapes(getattr(batch, policy)) == want
  if wants.records is None:
    assert batch.record is None
  else:
    assert batch.record.more.keys() == set(wants.records)
    assert all(x.shape == (ROWS, L) for x in jax.tree.leaves(batch.record))
  assert batch.weight.shape == (view[:1] + view[2:3] if wants.guess else view[:1])
  credits = {'credit': (ROWS, L)}
  for field, x in batch.own.items():
    assert x.shape == credits.get(field, view[:1])
  assert ('prefix' in name) == ('credit' in batch.own)


@pytest.mark.parametrize('name', mostly_slow(ALL, KINDS))
def test_an_update_begins_at_ratio_one_and_moves_the_parameters(name):
  """Log-probs of the loss are those of the scores, and of the sampler's record."""
  assert shapes(batch_of(name)) == shapes(abstract_of(name).batch)
  _, metrics = update(name)
  assert all(np.isfinite(x).all() for x in metrics.values())
  assert metrics['finite'] == 1 and metrics['grad_norm'] > 1e-6
  assert metrics.get('ratio_log_abs', 0) < 2e-5
  assert metrics.get('place_log_abs', 0) < 1e-4  # of positions


@pytest.mark.parametrize(
  'name',
  [
    'egspo',
    'vrpo',
    'diffpo',
    pytest.param('residual', marks=pytest.mark.slow),
    pytest.param('spg', marks=pytest.mark.slow),
  ],
)
def test_microbatches_change_nothing(name):
  """Weights of steps, gaps within groups and means over tokens stay the same."""
  close(update(name)[0], update(name, 2)[0], 2e-5)


def made_up(built):
  """Returns a Sampled whose second group has other lengths than its first."""
  zeros = jnp.zeros((ROWS, L))
  rollouts = Rollouts(
    tokens=jnp.zeros((ROWS, P + L), jnp.int32),
    valid=jnp.ones((ROWS, P + L), bool),
    order=zeros.astype(jnp.int32),
    logp=zeros,
    forwards=None,
    confidence=zeros,
  )
  completion = jnp.arange(L)[None] < jnp.array([4, 3, 2, 1, 4, 4, 4, 4])[:, None]
  return Sampled(rollouts, completion, jnp.arange(ROWS))


@pytest.mark.parametrize('name', mostly_slow(ALL, ('dmpo',)))
def test_what_eos_stop_left_masked_has_no_part(name):
  """No number of an update depends on the tokens that fill these places."""
  built = built_of(name)
  setup = dataclasses.replace(
    built.setup,
    law=dataclasses.replace(built.setup.law, eos_stop=True),
    common=Common(elbo_coef=0.1),
    optimizer=optax.sgd(1.0),
    measure=True,
  )
  ends = np.where(np.arange(ROWS) % 3 == 0, 2, L)[:, None]
  order = np.where(np.arange(L) < ends, np.arange(L), -1).astype(np.int32)
  names, records = setup.wants.records or (), sampler.RECORDS
  more = {name: jnp.ones((ROWS, L), records[name].dtype) for name in names}

  @jax.jit
  def run(params, tokens):
    sampled = made_up(built)
    rollouts = sampled.rollouts._replace(tokens=tokens, order=order, more=more)
    sampled = sampled._replace(rollouts=rollouts, completion=order >= 0)
    batch = packed(built._replace(setup=setup), params, sampled)
    state = step.init_state(params, setup.optimizer)
    return step.train_step(state, {}, batch, jax.random.key(4), 0, setup)

  text = np.random.default_rng(0).integers(8, 14, (ROWS, P + L)).astype(np.int32)
  tail = np.pad(order < 0, ((0, 0), (P, 0)))
  found = [run(params_of(name), np.where(tail, x, text)) for x in (setup.cfg.eos_id, 9)]
  jax.tree.map(np.testing.assert_array_equal, *found)
  assert found[0][1]['finite'] == 1 and found[0][1]['grad_norm'] > 1e-6


def test_groups_of_equal_rewards_are_skipped():
  """The second group weighs nothing, and the first twice as much."""
  built, reward = built_of('diffu_grpo'), jnp.array([[0.0, 1, 2, 3], [1] * 4])
  plain, skipped = (
    score.pack(
      made_up(built),
      reward,
      Scores(),
      dataclasses.replace(built.setup, common=Common(skip_equal=skip)),
    )
    for skip in (False, True)
  )
  assert (plain[0].own['scale'][4:] > 0).all() and 'groups_skipped' not in plain[1]
  assert skipped[1]['groups_skipped'] == 0.5
  assert not {'logp_old', 'logp_ref', 'kl_ref'} & plain[1].keys()
  assert not skipped[0].weight[4:].any() and not skipped[0].own['scale'][4:].any()
  # A mean over the tokens of what is left: 1 / (norm of two * tokens of one).
  close(skipped[0].own['scale'][:4], np.full(4, 2 / 10))


@pytest.mark.parametrize('devices', [1, 4])
def test_credits_do_not_depend_on_the_devices(devices):
  """Groups lie across shards; the batch's credits are those of plain arrays."""
  rng = np.random.default_rng(0)
  made = made_up(built_of('agrpo, prefix'))
  order = np.tile(np.array([1, 0, 2, 2], np.int32), (ROWS, 1))
  tokens = rng.integers(0, 2, (ROWS, P + L)).astype(np.int32)
  rollouts = made.rollouts._replace(
    order=order,
    tokens=tokens,
    forwards=np.int32(3),
    more={'entropy': made.rollouts.logp},
  )
  sampled = jax.tree.map(np.asarray, made._replace(rollouts=rollouts))
  reward = rng.random((2, 4)).astype(np.float32)
  built = build.build(tiny('agrpo, prefix'), jax.devices()[:devices])
  got = mesh.fetch(built.steps.pack(sampled, reward, Scores())[0].own['credit'])
  scored = Scored(
    reward, None, record=Record(order, None, None, {}), tokens=tokens[:, -L:]
  )
  shrink = built.setup.hp.credit_shrink
  want = credit.prefix_advantages(scored, reward, shrink) / 4
  assert np.ptp(want, axis=2).max() > 0.01
  close(got, want.reshape(ROWS, L), 1e-6)


def test_skipped_groups_may_leave_the_rate_alone():
  """With skip_scale the mean update is larger by (1 - (1 - s)^B) / s, without by 1."""
  built = built_of('espo')
  sums = {True: 0.0, False: 0.0}
  lives = list(itertools.product([False, True], repeat=2))
  for live in lives:  # s = 1/2, B = 2
    reward = jnp.float32([[0, 0, 0, x] for x in live])
    for scale in sums:
      common = Common(skip_equal=True, skip_scale=scale)
      setup = dataclasses.replace(built.setup, common=common)
      batch, _ = score.pack(made_up(built), reward, Scores(), setup)
      sums[scale] += float(jnp.sum(jnp.abs(batch.weight))) / len(lives)
  # A live group has |r - mean of the others| / G = 1/4 + 3 (1/3) / 4; half are live.
  assert sums[False] == pytest.approx(2 * 0.5 / 2)
  assert sums[True] == pytest.approx(sums[False] * (1 - 0.5**2) / 0.5)


def test_elbo_coef_adds_the_gradient_of_the_elbo():
  """DiPOD's term is the same for any objective, and linear in elbo_coef."""
  moves = [update('dmpo')[0]] + [update('dmpo', elbo_coef=x)[0] for x in (0.5, 1.0)]
  flat = [
    np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in moves
  ]
  assert np.abs(flat[1] - flat[0]).max() > 1e-4
  close(2 * (flat[1] - flat[0]), flat[2] - flat[0], 1e-4)


def test_fields_that_are_not_asked_for_cost_nothing():
  """DMPO's update does the same work with further fields in its batch, to the bit."""
  built, batch = built_of('dmpo'), batch_of('dmpo')
  zeros, views = jnp.zeros((ROWS, L)), jnp.zeros((ROWS, 2, 2, L))
  full = batch._replace(
    record=Record(zeros.astype(jnp.int32), zeros, zeros, {}),
    old=Views(logp=views, reads={}),
    ref=Views(elbo=jnp.zeros((ROWS, 2)), logp=views, reads={'centred': views}),
  )
  setup = dataclasses.replace(built.setup, optimizer=optax.sgd(1.0))
  state = step.init_state(params_of('dmpo'), setup.optimizer)

  def update(state, batch):
    return step.train_step(state, {}, batch, jax.random.key(0), 0, setup)

  costs, results = [], []
  for each in (batch, full):
    compiled = jax.jit(update).lower(state, each).compile()
    cost = compiled.cost_analysis()
    costs.append((cost['flops'], cost['bytes accessed']))
    results.append(compiled(state, each))
  assert costs[0] == costs[1]
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_dmpo_asks_for_two_sequence_log_probs_alone():
  """It reads no record of the sampler."""
  wants = Wants(sequence=('old', 'ref'), common_masks=False)
  assert built_of('dmpo').setup.wants == wants
  abstract = abstract_of('dmpo')
  assert not abstract.sampled.rollouts.more
  assert abstract.batch.own.keys() == {'target'}


def test_checkpoints_restore_records_and_views(tmp_path):
  """A batch comes back to the bit, as the same NamedTuples."""
  built, batch = built_of('diffpo'), batch_of('diffpo')
  like = build.abstract_buffer(built, P).batch
  batch = jax.tree.map(lambda x, s: mesh.put(np.asarray(x), s.sharding), batch, like)
  state = TrainState(mesh.put(np.int32(1), mesh.replicated(built.mesh)), {}, {})
  with checkpoint.Manager(str(tmp_path)) as manager:
    checkpoint.save(manager, 1, {'state': state, 'batch': batch}, {})
    manager.wait_until_finished()
    shapes = {'state': checkpoint.abstract(state), 'batch': like}
    restored = checkpoint.restore(manager, lambda step: shapes).trees['batch']
  jax.tree.map(np.testing.assert_array_equal, restored, batch)
  assert restored.old.has('logp') and not restored.old.has('elbo')
  assert isinstance(restored.record, Record)


def test_guesses_are_graded():
  """EGSPO's states, completed in one step, go through the task's reward."""
  seen = []

  def pack(sampled, reward, scores):
    seen.append(scores.guess_reward)
    return TrainBatch(*[None] * 8), {}

  built = built_of('egspo')
  letters = lambda text, example, protocol: {'length': float(len(text))}
  collector = dataclasses.replace(
    build.collector(built, {}),
    steps=built.steps._replace(pack=pack),
    task=built.task._replace(reward=letters, grade=lambda *_: 0.0),
    weights={},
    samples=0,
  )
  ids = np.array(built.tokenizer('1234')['input_ids'], np.int32)
  guess = np.tile(ids, (ROWS, 3, 1))
  guess[0, 1, 2] = built.tokenizer.eos_token_id  # cuts it to two letters
  guess[5, 2] = -1  # a copy of no step
  zeros = np.zeros((ROWS, L), np.float32)
  host = rollout.Fetched(
    tokens=np.tile(ids, (ROWS, 1)),
    order=zeros.astype(np.int32),
    forwards=np.int32(4),
    completion=np.ones((ROWS, L), bool),
    confidence=zeros,
    row=np.arange(ROWS),
    guess=guess,
  )
  chosen = curriculum.Chosen(np.zeros(2, int))
  drawn = rollout.Drawn(chosen, None, host, np.arange(ROWS))
  collector.finish(rollout.Started(0, 0, drawn, Scores()))
  want = np.full((ROWS, 3), 4.0)
  want[0, 1], want[5, 2] = 2, np.nan
  np.testing.assert_array_equal(seen[0], want)


def test_sampler_records_entropies_and_fallbacks():
  """Entropies are the model's. A fallback is the leftmost mask, alone in its step."""
  cfg = built_of('fork_grpo').model
  params = params_of('fork_grpo')
  hp = sampler.SampleConfig(
    8, 8, 8, 1.0, pick='threshold', rank='max', threshold=0.2, fallback='leftmost'
  )
  prompts = jax.random.randint(jax.random.key(2), (16, P), 8, 14)
  valid = jnp.ones((16, P), bool)

  @jax.jit
  def run(params):
    out = sampler.sample(
      cfg,
      params,
      prompts,
      valid,
      rng.row_keys(jax.random.key(1), jnp.arange(16)),
      hp,
      ('entropy', 'fallback'),
    )
    blank = jnp.concatenate([prompts, jnp.full((16, 8), cfg.mask_id)], axis=1)
    logits = model.full_logits(cfg, params, blank)[:, P:]
    logp = jax.nn.log_softmax(logits.at[..., cfg.mask_id].set(-1e9))
    return out, -jnp.sum(jnp.exp(logp) * logp, axis=-1)

  out, entropy = run(params)
  first = np.asarray(out.order) == 0
  close(out.more['entropy'][first], entropy[first], 1e-4)
  forked, order = np.asarray(out.more['fallback']), np.asarray(out.order)
  assert 0 < forked.mean() < 1
  for r, i in zip(*np.nonzero(forked), strict=True):
    assert (order[r] == order[r, i]).sum() == 1
    assert (order[r, :i] < order[r, i]).all()


# --- a new objective


def test_the_example_of_the_docs_is_an_objective_in_one_file(tmp_path, monkeypatch):
  """The one in docs/objectives.md is registered, checked, and makes two updates."""
  text = (ROOT / 'docs' / 'objectives.md').read_text()
  code = re.search(r'```python\n(.*?)```', text, re.S)[1]
  assert len(code.splitlines()) < 60
  (tmp_path / 'toy.py').write_text(code)
  spec = importlib.util.spec_from_file_location('toy', tmp_path / 'toy.py')
  toy = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(toy)
  monkeypatch.setitem(OBJECTIVES, 'toy', objectives.checked('toy', toy.OBJECTIVE))
  built = build.build(tiny('toy'), jax.devices()[:1])
  row = np.arange(ROWS, dtype=np.int32)
  prompts = np.zeros((ROWS, P), np.int32), np.ones((ROWS, P), bool), row
  params = built.steps.init()
  sampled = built.steps.sample(params, *prompts)
  scores = built.steps.score(params, params, (), sampled)
  reward = np.random.default_rng(0).random((2, 4)).astype(np.float32)
  batch, _ = built.steps.pack(sampled, reward, scores)
  state, elbos = built.steps.start(params), []
  for inner in (0, 1):
    state, metrics = built.steps.update(state, {}, batch, inner)
    elbos.append(float(metrics['elbo']))
  assert int(state.step) == 2 and np.isfinite(elbos).all()
  with pytest.raises(ValueError, match='objective.draws = 3 must be even'):
    check.config(tiny('toy', **{'objective.draws': 3}), 1)


# --- samplers that an objective cannot use

# Field that is named -> objective, changes.
REFUSED = {
  'sampler.pick = wino.*agrpo': ('agrpo', {'sampler.pick': 'wino'}),
  'sampler.pick = wino.*tracerl': ('tracerl', {'sampler.pick': 'wino'}),
  'sampler.pick = wino.*dmpo': (
    'dmpo',
    {'objective.masks': 'rounds', 'sampler.pick': 'wino'},
  ),
  'sampler.top_k = 50.*dipo': ('dipo', {'sampler.top_k': 50}),
  'sampler.temperature = 0.*diffpo': ('diffpo', {'sampler.temperature': 0.0}),
  'sampler.top_p = 0.9.*egspo': ('egspo', {'sampler.top_p': 0.9}),
  'sampler.guidance = 1.0.*mapg': ('mapg', {'sampler.guidance': 1.0}),
  'sampler.block = 4: set 1.*just_grpo': ('just_grpo', {'sampler.block': 4}),
  'sampler.pick = entropy: set threshold.*fork_grpo': (
    'fork_grpo',
    {'sampler.pick': 'entropy', 'sampler.fallback': 'best'},
  ),
  'sampler.rank = token.*mapg': ('mapg', {'sampler.rank': 'token'}),
  'rank_temperature': ('mapg', {'sampler.rank_temperature': 0.0}),
  'lora.dropout = 0.1.*espo': ('espo', {'lora.rank': 2, 'lora.dropout': 0.1}),
  'lora.dropout = 0.1.*agrpo': ('agrpo', {'lora.rank': 2, 'lora.dropout': 0.1}),
  'objective.elbo_draws = 3 must be even': ('wd1', {'objective.elbo_draws': 3}),
  "objective.name = 'esspo'.*did you mean 'espo'": (
    'espo',
    {'objective.name': 'esspo'},
  ),
}


@pytest.mark.smoke
@pytest.mark.parametrize('message', REFUSED)
def test_an_impossible_config_is_refused_before_anything_compiles(message):
  """The error names the field, and the objective that needs another value."""
  name, changes = REFUSED[message]
  check.config(tiny(name), 1)
  with pytest.raises(ValueError, match=message):
    check.config(tiny(name, **changes), 1)


# --- block-causal models


@pytest.mark.parametrize(
  'name',
  mostly_slow(
    [*BLOCKWISE, 'dmpo, order', 'dmpo, rounds', 'tracerl, prefix'], ('dmpo', 'espo')
  ),
)
def test_block_causal_models_train(name):
  """The end of a prompt on the canvas is in no loss; microbatches change nothing."""
  name = f'{name}, blocks'
  batch = batch_of(name)
  given = np.asarray(batch.tokens[:, -L]) == np.asarray(prompts()[:, -1])
  assert given.all() and not np.asarray(batch.sampled[:, 0]).any()
  one, two = update(name), update(name, microbatches=2)
  assert float(one[1]['grad_norm']) > 0 and float(one[1]['finite'])
  close(one[0], two[0], 1e-4)
  setup, key = built_of(name).setup, jax.random.key(4)
  rows = step.at_inner(batch, 0)
  found = step.view(setup, params_of(name), jax.random.fold_in(key, 0), rows)[0]
  assert (np.asarray(found.logp)[:, :, 0] == 0).all()


@pytest.mark.parametrize('name', sorted(set(OBJECTIVES) - set(BLOCKWISE)))
def test_objectives_of_whole_texts_refuse_block_causal_models(name):
  c = tiny(f'{name}, blocks', **{'sampler.block': 2})
  with pytest.raises(ValueError, match=f'objective.name = {name}.*blocks of 2'):
    build.build(c)
