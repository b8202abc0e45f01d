"""Every objective from sampling to an update, and what is refused before."""

import dataclasses
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, rivals
from dmpo_jax import build, check, checkpoint, mesh, model, rng, rollout, sampler, step
from dmpo_jax.objectives import OBJECTIVES, dmpo
from dmpo_jax.objectives.shared import Common
from dmpo_jax.types import Scored, TrainState

ROOT = pathlib.Path(__file__).parents[1]
P, L = 3, 4


def tiny(name, **changes):
  c = base.get_config()
  c.update_from_flattened_dict(rivals.fields_of(name))
  c.update_from_flattened_dict(
    {
      'model.width': 16,
      'model.layers': 1,
      'model.heads': 2,
      'model.kv_heads': 2,
      'model.mlp': 16,
      'data.train_size': 16,
      'data.validation_size': 8,
      'data.test_size': 8,
      'sampler.length': L,
      'sampler.steps': 2,
      'sampler.temperature': 0.7,
      'sampler.block': 1 if name == 'just_grpo' else L,
      'train.prompts': 2,
      'train.group': 4,
      'train.inner': 2,
      'train.microbatches': 1,
      'logprob.draws': 2,
    }
  )
  if name == 'just_grpo':
    c.sampler.steps = L
  if 'low' in OBJECTIVES[name].hp.__dataclass_fields__ and name == 'dmpo':
    c.objective.draws = 2
  c.update_from_flattened_dict(changes)
  return c


def through(built, microbatches=1, **common):
  """(batch, new state, metrics) of a buffer and its first update: one jit."""
  c, cfg = built.config, built.model
  hp = check.settings(sampler.SampleConfig, c.sampler)
  needs = built.objective.needs(built.hp)
  records = tuple(n for n in sampler.RECORDS if n in needs)
  rows = c.train.prompts * c.train.group
  same = dict(cfg=cfg, objective=built.objective, hp=built.hp)
  how = check.settings(build.logprob.LogprobConfig, c.logprob)
  of_all = Common(**common)

  class Plain:
    """SGD with rate one: an update is minus the gradient."""

    init = staticmethod(lambda tree: ())
    update = staticmethod(
      lambda grad, state, _: (jax.tree.map(jnp.negative, grad), state)
    )

  @jax.jit
  def run(params):
    row = jnp.arange(rows)
    keys = rng.row_keys(jax.random.key(1), row)
    prompts = jax.random.randint(jax.random.key(2), (rows, P), 8, 14)
    out = sampler.sample(
      cfg, params, prompts, jnp.ones((rows, P), bool), keys, hp, records
    )
    completion = jnp.ones((rows, L), bool).at[:, -1].set(row % 2 == 0)
    scores = step.score(
      params,
      params,
      out,
      row,
      completion,
      jax.random.key(3),
      jax.random.key(4),
      **same,
      how=how,
      law=hp.law(),
      inner=c.train.inner,
    )
    reward = jax.random.uniform(jax.random.key(5), (2, 4)).at[1].set(0.5)
    if 'guess' in scores:
      scores['guess'] = jnp.mean(scores['guess'] % 3, axis=-1)
    batch, _ = rollout.pack(
      out,
      completion,
      row,
      reward,
      scores,
      objective=built.objective,
      hp=built.hp,
      inner=c.train.inner,
      skip_equal=of_all.skip_equal,
    )
    state = TrainState(jnp.int32(0), params, ())
    new, metrics = step.train_step(
      state,
      {},
      batch,
      jax.random.key(4),
      0,
      **same,
      optimizer=Plain,
      group=4,
      microbatches=microbatches,
      law=hp.law(),
      common=of_all,
    )
    return batch, new.trainable, metrics

  return run(model.init(cfg, jax.random.key(0)))


@pytest.fixture(scope='module')
def built_of():
  cache = {}

  def call(name):
    if name not in cache:
      cache[name] = build.build(tiny(name))
    return cache[name]

  return call


def close(a, b, tol=1e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      np.asarray(x), np.asarray(y), rtol=tol, atol=tol
    ),
    a,
    b,
  )


@pytest.mark.parametrize('name', OBJECTIVES)
def test_from_sampling_to_an_update(name, built_of):
  """Shapes are those that checkpoints expect, the ratio begins at one, and
  the parameters move."""
  built = built_of(name)
  batch, new, metrics = through(built)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(batch) == shapes(build.abstract_batch(built, P))
  assert all(np.isfinite(x).all() for x in metrics.values())
  assert metrics['finite'] == 1 and metrics['grad_norm'] > 1e-6
  if 'ratio_log_abs' in metrics:
    assert metrics['ratio_log_abs'] < 2e-5
  if 'place_log_abs' in metrics:  # of positions: the recorded law is the loss's
    assert metrics['place_log_abs'] < 1e-4


@pytest.mark.parametrize('name', ['egspo', 'residual', 'spg'])
def test_microbatches_change_nothing(name, built_of):
  """Weights of steps, gaps of groups and sums over tokens, cut or not."""
  one, two = (through(built_of(name), m)[1] for m in (1, 2))
  close(one, two, 2e-5)


def test_equal_groups_are_skipped(built_of):
  """The second group weighs nothing, the first twice as much."""
  plain, skipped = (
    through(built_of('diffu_grpo'), skip_equal=x)[0] for x in (False, True)
  )
  assert np.asarray(plain.positive[4:] > 0).all()
  assert not np.asarray(skipped.weight[4:]).any()
  assert not np.asarray(skipped.positive[4:]).any()
  # A mean over the tokens of what is left: 1 / (norm of two * tokens of one).
  tokens = int(skipped.completion[:4].sum())
  close(skipped.positive[:4], np.full(4, 2 / tokens))
  per_row = Scored(np.array([[0.0, 1.0]] * 2), np.ones((2, 2)), 0, 0)
  assert OBJECTIVES['espo'].weigh(per_row, OBJECTIVES['espo'].hp())[0].shape


def test_elbo_can_be_held_up(built_of):
  """DiPOD's term adds its gradient, the same for any objective."""
  built = built_of('wd1')
  moves = [through(built, elbo_coef=coef)[1] for coef in (0.0, 0.5, 1.0)]
  flat = [
    np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in moves
  ]
  assert np.abs(flat[1] - flat[0]).max() > 1e-4
  close(2 * (flat[1] - flat[0]), flat[2] - flat[0], 1e-4)


def test_what_is_not_asked_for_is_free(built_of):
  """DMPO's update compiled with extras in its batch and without: the same
  work, and the same numbers to the bit."""
  built = built_of('dmpo')
  batch = through(built)[0]
  rows = batch.tokens.shape[0]
  assert batch.extra is None and batch.weight.shape == (rows,)
  full = batch._replace(
    extra=dict(
      record=dict(order=jnp.zeros((rows, L), jnp.int32)),
      elbo_ref=jnp.zeros((rows, 2)),
      tokens_old=jnp.zeros((rows, 2, 4, L)),
    )
  )
  optimizer = build.optim.make_optimizer(build.optim.Config(1e-3, 0))
  params = model.init(built.model, jax.random.key(0))
  state = step.init_state(params, optimizer)

  def update(state, batch):
    return step.train_step(
      state,
      {},
      batch,
      jax.random.key(0),
      0,
      cfg=built.model,
      objective=dmpo.OBJECTIVE,
      hp=built.hp,
      optimizer=optimizer,
      group=4,
      law=dict(block=1),
      common=Common(),
    )

  costs, results = [], []
  for each in (batch, full):
    compiled = jax.jit(update).lower(state, each).compile()
    cost = compiled.cost_analysis()
    costs.append((cost['flops'], cost['bytes accessed']))
    results.append(compiled(state, each))
  assert costs[0] == costs[1]
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_no_further_passes_for_dmpo(built_of):
  """Nor does it record, score or draw with more than it has to."""
  built = built_of('dmpo')
  assert built.objective.needs(built.hp) == {'old', 'ref'}
  assert build.abstract_rollouts(built, P).more is None
  assert build.abstract_batch(built, P).extra is None


def test_checkpoints_hold_the_extras(built_of, tmp_path):
  """A buffer with records and old log-probs comes back to the bit."""
  built = built_of('diffpo')
  batch = through(built)[0]
  shapes = build.abstract_batch(built, P)
  batch = jax.tree.map(lambda x, s: mesh.put(np.asarray(x), s.sharding), batch, shapes)
  state = TrainState(mesh.put(np.int32(1), mesh.replicated(built.mesh)), {}, {})
  with checkpoint.open_manager(str(tmp_path)) as manager:
    checkpoint.save(manager, 1, {'state': state, 'batch': batch}, {})
    manager.wait_until_finished()
    found = checkpoint.restore(
      manager, lambda step: {'state': checkpoint.abstract(state), 'batch': shapes}
    )
  jax.tree.map(np.testing.assert_array_equal, found.trees['batch'], batch)


def test_one_step_completions_are_graded(built_of):
  """EGSPO's states, completed at once, go through the task's reward."""

  class Steps:
    def __init__(self):
      self.seen = None

    def pack(self, rollouts, completion, row, reward, scores):
      self.seen = scores['guess']
      return None, {}

  built, steps = built_of('egspo'), Steps()
  letters = lambda text, example, protocol: {'length': float(len(text))}
  task = built.task._replace(reward=letters, grade=lambda *_: 0.0)
  ids = np.array(built.tokenizer('1234')['input_ids'], np.int32)
  guess = np.tile(ids, (8, 3, 1))
  guess[0, 1, 2] = built.tokenizer.eos_token_id  # cuts it to two letters
  guess[5, 2] = -1  # a draw of no step
  zeros = np.zeros((8, L), np.float32)
  kept = (np.tile(ids, (8, 1)), zeros.astype(np.int32), 4, np.ones((8, L), bool), zeros)

  class Problems:
    examples, changed = (
      [
        built.task.load('train', check.settings(build.TaskOptions, built.config.data))[
          0
        ]
      ],
      0,
    )

  started = rollout.Started(
    0, 0, np.zeros(2, int), np.arange(8), None, None, {}, kept, np.arange(8), guess
  )
  rollout.finish(
    steps,
    task,
    built.tokenizer,
    Problems,
    started,
    group=4,
    protocol='strict',
    samples=0,
    weights={},
  )
  want = np.full((8, 3), 4.0)
  want[0, 1], want[5, 2] = 2, np.nan
  np.testing.assert_array_equal(steps.seen, want)


def test_records_of_the_sampler(built_of):
  """Entropies are the model's; a fallback is one leftmost token, alone."""
  cfg = built_of('fork_grpo').model
  params = model.init(cfg, jax.random.key(0))
  hp = sampler.SampleConfig(8, 8, 8, 1.0, 'threshold', 'max', 0.2, fallback='leftmost')
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


# --- a new one


def test_a_new_objective_is_one_file(tmp_path, monkeypatch):
  """The one in docs/objectives.md: registered, checked, and two updates."""
  text = (ROOT / 'docs' / 'objectives.md').read_text()
  code = re.search(r'```python\n(.*?)```', text, re.S)[1]
  assert len(code.splitlines()) < 60
  (tmp_path / 'toy.py').write_text(code)
  spec = importlib.util.spec_from_file_location('toy', tmp_path / 'toy.py')
  toy = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(toy)
  monkeypatch.setitem(OBJECTIVES, 'toy', toy.OBJECTIVE)
  c = tiny('toy')
  built = build.build(c, jax.devices()[:1])
  row = np.arange(8, dtype=np.int32)
  params = built.steps.init()
  rollouts, completion = built.steps.sample(
    params, np.zeros((8, P), np.int32), np.ones((8, P), bool), row
  )
  scores = built.steps.score(params, params, rollouts, row, completion)
  reward = np.random.default_rng(0).random((2, 4)).astype(np.float32)
  batch, _ = built.steps.pack(rollouts, completion, row, reward, scores)
  state, elbos = built.steps.start(params), []
  for inner in (0, 1):
    state, metrics = built.steps.update(state, {}, batch, inner)
    elbos.append(float(metrics['elbo']))
  assert int(state.step) == 2 and np.isfinite(elbos).all()
  with pytest.raises(ValueError, match='objective.draws = 3 must be even'):
    check.config(tiny('toy', **{'objective.draws': 3}), 1)


# --- what cannot be


REFUSED = {
  'sampler.pick = wino.*recorded steps.*agrpo': ('agrpo', {'sampler.pick': 'wino'}),
  'sampler.temperature = 0': ('diffpo', {'sampler.temperature': 0.0}),
  'sampler.top_p = 0.9': ('egspo', {'sampler.top_p': 0.9}),
  'sampler.guidance = 1.0': ('mapg', {'sampler.guidance': 1.0}),
  'sampler.block = 4.*this needs 1': ('just_grpo', {'sampler.block': 4}),
  'sampler.pick = entropy.*threshold': (
    'fork_grpo',
    {'sampler.pick': 'entropy', 'sampler.fallback': 'best'},
  ),
  'rank = token.*plackett_luce': ('mapg', {'sampler.rank': 'token'}),
  'lora.dropout = 0.1: objective.name = espo compares': (
    'espo',
    {'lora.rank': 2, 'lora.dropout': 0.1},
  ),
  'lora.dropout = 0.1: objective.name = agrpo compares': (
    'agrpo',
    {'lora.rank': 2, 'lora.dropout': 0.1},
  ),
  'rank_temperature > 0': ('mapg', {'sampler.rank_temperature': 0.0}),
  'objective.alpha = 0.5 is no setting of objective.name = espo': (
    'espo',
    {'objective.alpha': 0.5},
  ),
  'objective.clip = 0.5 is no setting of objective.name = dmpo: leave it': (
    'dmpo',
    {'objective.clip': 0.5},
  ),
  'objective.elbo_draws = 3 must be even': ('wd1', {'objective.elbo_draws': 3}),
  "did you mean 'espo'": ('espo', {'objective.name': 'esspo'}),
}


@pytest.mark.smoke
@pytest.mark.parametrize('said', REFUSED)
def test_refused_before_anything_compiles(said):
  """The field to change, and the objective that wants it otherwise."""
  name, changes = REFUSED[said]
  check.config(tiny(name), 1)
  with pytest.raises(ValueError, match=said):
    check.config(tiny(name, **changes), 1)


def test_base_is_the_first_objective_that_has_a_field():
  """What `check` takes for untouched is what base.py says."""
  section = base.get_config().objective
  fields = check.objective_fields()
  assert {name: section[name] for name in fields} == fields
  own = {field.name for field in dataclasses.fields(Common)}
  assert set(section) == set(fields) | own | {'name'}
  assert check.settings(Common, section) == Common()


def test_points_are_the_objectives_own_defaults():
  """configs/rivals.py: nothing but the defaults, by name and by number."""
  for name, point in zip(OBJECTIVES, rivals.sweep('objectives'), strict=True):
    c = rivals.get_config(name)
    assert c.objective.name == point['objective.name'] == name
    kind = OBJECTIVES[name].hp
    assert check.settings(kind, c.objective) == kind()
