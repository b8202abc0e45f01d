"""Drafts of a run: gates on the host, what is trained and saved, what is refused."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiny_run import interrupt, run, same_run, stop_at

from configs import base
from dmpo_jax import (
  buffers,
  build,
  check,
  config,
  evaluate,
  fits,
  hf,
  loaded,
  mesh,
  resume,
  step,
)
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.sampler import Draft
from dmpo_jax.tasks import TASKS, answers
from dmpo_jax.tools import cards
from dmpo_jax.types import Canvas, Record, Scored, Text, TrainBatch, ViewLogp, Views

pytest_plugins = ['tiny_run']
JUDGE = """
def lengths(prompts, completions, solution, **_):
  assert all(len(s) == 16 for s in solution) and prompts
  return [{0} for text in completions]
"""


def settings(**fields):
  c = tiny_run.tiny()
  named = {'sampler.block': 8, 'eval.sampler.block': 8, 'eval.sampler.temperature': 1.0}
  config.update(c, named | fields)
  return c


# --- gates on the host


def judge(tmp_path, value):
  path = tmp_path / f'judge{abs(hash(value))}.py'
  path.write_text(JUDGE.replace('{0}', value))
  return {'draft.gate': 'reward', 'draft.judge': f'{path}:lengths'}


def test_the_host_judges_blocks(tmp_path):
  """A function that refuses all leaves the model's own bits; one that keeps all, the
  draft's; one that looks at the text keeps some. The card says what it cost."""
  one, c = {}, settings()
  built = build.build(c)
  params, test = built.steps.init(), build.problems(built, 'test')
  plain = list(evaluate.generate(built, params, test, built.steps.sample_eval, 8, 0))
  texts = {'none': 'None', 'all': '1.0', 'some': 'sum(map(ord, text)) % 2'}
  for name, value in texts.items():
    fields = {'draft.of': 'same', 'draft.pick': 'entropy', 'reward.process': 'trainer'}
    other = build.build(settings(**fields, **judge(tmp_path, value)))
    rows = evaluate.generate(other, params, test, other.steps.sample_eval, 8, 0)
    one[name] = list(rows)
  keep = ('ids', 'order', 'confidence', 'tokens', 'batch_forwards', 'forwards')
  for a, b in zip(one['none'], plain, strict=True):
    assert {x: a[x] for x in keep} == {x: b[x] for x in keep}
  kept = {name: [row['kept'] for row in rows] for name, rows in one.items()}
  offered = [row['offered'] for row in one['all']]
  assert kept['all'] == offered and max(kept['none']) == 0 < sum(kept['some'])
  assert sum(kept['some']) < sum(row['offered'] for row in one['some'])
  for row in one['all']:
    assert row['forwards'] == 0 < row['draft_forwards']
  for row in one['some']:  # a row without refusals costs the model nothing
    assert (row['forwards'] == 0) == (row['kept'] == row['offered'])
  (card,) = cards.run(other, params, str(tmp_path / 'cards'), 'base')
  ratio = card['kept'] / card['offered']
  assert card['acceptance'] == ratio and 0 < ratio < 1
  assert card['draft.judge'].endswith(':lengths') and 'draft.ahead' not in card
  with pytest.raises(ValueError, match='draft.judge = task'):
    c = settings(**{'draft.of': 'same', 'draft.gate': 'reward'})
    mine = build.build(c).steps.sample_eval
    mine(params, test.tokens, test.valid, np.arange(8, dtype=np.int32))


def test_partial_answers():
  """A grid that is not finished breaks no rule, or its wrong cells count."""
  task, example = TASKS['sudoku'], {'puzzle': '1000' + '0' * 12}
  for text, score in {
    '': 1, '1': 1, '1234': 1, '12343': 1, '123431': 2 / 3, '2': 0,
    '11': 0, '1x': 0.5, '1233': 0.5,
    '12342': 0.6, '1234143': 1 - 4 / 7, '<reasoning> 99': 1,
    '<reasoning>x</reasoning>\n<answer>\n1224': 0.5, '12 34\n34': 1,
  }.items():  # fmt: skip
    assert task.partial(text, example) == pytest.approx(score), text
  solution = '1234341221434321'
  assert task.partial(solution, {'puzzle': solution}) == 1
  tags = answers.TAGS
  for text, good in {
    'so': 1, tags[0]: 1, tags[2]: 0, ''.join(tags): 1, tags[1] + tags[2]: 1,
    tags[0] + tags[2]: 0, tags[0] * 2: 0, ''.join(tags) + tags[0]: 0,
  }.items():  # fmt: skip
    assert answers.tags_so_far(text) == good, text


# --- training


@pytest.mark.parametrize(
  'gate', ['reward', pytest.param('exact', marks=pytest.mark.slow)]
)
def test_drafts_in_training(gate, base_params, tmp_path, plain_saves):
  """A run with drafts resumes to the bit. Its batches know what a draft wrote, and the
  loss does not see it."""
  fields = {'draft.of': 'same', 'draft.rollouts': True, 'draft.gate': gate}
  fields |= {'logprob.estimator': 'trajectory', 'sampler.pick': 'threshold'}
  fields |= {'sampler.threshold': 0.02, 'draft.threshold': 0.01, 'train.inner': 2}
  fields |= {'log.rollouts': True}
  if gate == 'reward':
    value = 'sum(map(ord, text)) % 2'
    fields |= judge(tmp_path, value) | {'reward.process': 'trainer'}
  built = build.build(settings(**fields))
  built = built._replace(task=built.task._replace(reward=tiny_run.letters))
  seen = []

  def note(name, args):
    if name == 'update':
      seen.append(args[2])

  whole = run(watched_updates(built, note), tmp_path / 'whole', base_params)
  made, rows = seen[0].made, tiny_run.rows(tmp_path / 'whole')['rl']
  assert 0 < rows[0]['draft/acceptance'] <= 1
  if gate == 'exact':
    assert made is None
  else:
    assert 0 < np.mean(made) < 1
    check_loss(built, base_params, seen[0])
  saved = buffers.read(tmp_path / 'whole')
  drafted, order = saved[0].drafted, saved[0].order
  if made is None:
    assert drafted is None
  else:
    np.testing.assert_array_equal(drafted, ~np.asarray(made).reshape(order.shape))
    assert (order[drafted] >= 0).all()  # and so they are tokens of a pair
  watch = watched_updates(built, stop_at('update', 2, interrupt))
  with pytest.raises(KeyboardInterrupt):
    run(watch, tmp_path / 'cut', base_params, kill=True)
  again = run(built, tmp_path / 'cut', base_params)
  same_run(again, tmp_path / 'cut', (tmp_path / 'whole', whole))


def watched_updates(built, watch):
  """Returns `built` that calls watch(name, args) before each update."""

  def update(*args):
    watch('update', args)
    return built.steps.update(*args)

  return built._replace(steps=built.steps._replace(update=update))


def check_loss(built, params, batch):
  """The masks' log-probs are 0 where a draft wrote, and read elsewhere."""
  batch = step.at_inner(batch, 0)
  now, masks = step.view(built.setup, params, jax.random.key(0), batch)
  drafted = masks.masked & ~batch.made[:, None]
  assert drafted.any() and not now.logp[drafted].any()
  read = masks.masked & batch.made[:, None]
  if batch.sampled is not None:
    read &= batch.sampled[:, None]
  assert (now.logp[read] < 0).all()


@pytest.mark.slow
@pytest.mark.parametrize('name', OBJECTIVES)
def test_losses_without_drafted_tokens(name):
  """With all or some of a row's tokens drafted a loss is finite, and other log-probs
  of drafted tokens, in the record or of the policy, do not change it."""
  objective, rows, length = OBJECTIVES[name], 4, 6
  hp = objective.Config()
  wants = objective.wants(hp)
  if wants.guess or wants.reweigh:
    pytest.skip('needs more than a record')
  draw = np.random.default_rng(0)
  order = jnp.tile(jnp.arange(length)[None], (rows, 1))
  made = jnp.asarray([[0] * 6, [1] * 6, [0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 1, 1]], bool)
  logp = jnp.asarray(-draw.random((rows, length)), jnp.float32)
  more = {x: jnp.asarray(draw.random((rows, length)), jnp.float32)
          for x in wants.records or ()}  # fmt: skip
  if 'fallback' in more:
    more['fallback'] = more['fallback'] > 0.3
  record = Record(order, jnp.where(made, logp, 0.0), jnp.exp(logp), more)
  full = jnp.ones((rows, length), bool)
  text = Text(full, full, full, 3, Canvas(length), record)
  masks = objective.draw(jax.random.key(0), jnp.arange(rows), text, hp)
  if masks._asdict()['counted'] is not None:
    masks = masks._replace(counted=masks.counted & made[:, None])
  group = lambda x: x.reshape(2, 2, *x.shape[1:])
  scored = Scored(
    jnp.asarray([[1.0, 0.0], [0.0, 1.0]]), jnp.full((2, 2), length),
    group(logp.sum(1)), group(logp.sum(1)), record=record, block=0,
    tokens=order,
  )  # fmt: skip
  weight, own, _ = objective.weigh(scored, hp)
  ref = jnp.broadcast_to(logp[:, None], masks.masked.shape) * made[:, None]
  views = Views(jnp.zeros(rows), ref, {x: ref for x in wants.reads})
  batch = TrainBatch(
    None, None, full, jnp.arange(rows), weight.reshape(rows, *weight.shape[2:]),  # pyright: ignore
    {x: y.reshape(rows, *y.shape[2:]) for x, y in own.items()}, jnp.float32(2),
    jnp.float32(rows), None, record, made, views, views,
  )  # fmt: skip
  counted = masks.masked & made[:, None]
  value = lambda logp: objective.loss(
    ViewLogp(jnp.where(counted, logp, 0.0), {x: ref for x in wants.reads}),
    masks, batch, hp,
  )[0]  # fmt: skip
  gradient = jax.grad(value)(jnp.broadcast_to(1.1 * logp[:, None], counted.shape))
  assert np.isfinite(value(ref)) and np.isfinite(gradient).all()
  assert not gradient[~counted].any() and np.abs(gradient).max() > 0


# --- weights of another model


@pytest.fixture(scope='module')
def exported(tmp_path_factory, base_params, built):
  """A Hugging Face directory of the base model."""
  folder = tmp_path_factory.mktemp('draft') / 'model'
  hf.export(built, base_params, base_params, str(folder), 'merged')
  return folder


def test_the_weights_of_a_draft(exported, base_params, tmp_path):
  """They are counted, compared when a run resumes, and what drafts are made with: a
  draft with the model's weights is the model."""
  c = settings(**{'draft.of': str(exported), 'draft.gate': 'exact', 'draft.tokens': 2,
                  'draft.pick': 'confidence'})  # fmt: skip
  other = settings(**{'draft.of': 'same', 'draft.gate': 'exact', 'draft.tokens': 2,
                      'draft.pick': 'confidence'})  # fmt: skip
  one, two = build.build(c), build.build(other)
  held, plain = fits.held(one), fits.held(two)
  size = fits.per_device(one.who.shapes())
  assert size > 1000 and held.reference == plain.reference + size
  problems = build.problems(one, 'test')
  rows = [
    list(evaluate.generate(x, base_params, problems, x.steps.sample_eval, 8, 0))
    for x in (one, two)
  ]
  assert rows[0] == rows[1]
  assert sum(row['kept'] for row in rows[0]) == sum(row['offered'] for row in rows[0])
  meta = {'read': {**one.read}}
  resume.refuse_swapped(one, meta)
  meta['read']['draft.of'] += 1
  with pytest.raises(ValueError, match='draft.of'):
    resume.refuse_swapped(one, meta)
  source = cards.source_of(one, base_params)
  assert source['weights of draft.of'] == one.read['draft.of']


def test_drafts_of_another_family_are_refused(exported, tmp_path):
  fields = json.loads((exported / 'config.json').read_text())
  for field, value in (('vocab_size', 200), ('eos_token_id', 3)):
    folder = tmp_path / field
    folder.mkdir()
    for file in os.listdir(exported):
      if file.endswith('.json') and 'config' in file:
        (folder / file).write_text((exported / file).read_text())
    (folder / 'config.json').write_text(json.dumps({**fields, field: value}))
    with pytest.raises(ValueError, match=f'draft.of = {folder}'):
      build.build(settings(**{'draft.of': str(folder)}))


def test_drafts_of_a_shorter_model_are_refused(exported, tmp_path):
  """Where they are drafted: prompt and completion must fit the draft, too."""
  fields = json.loads((exported / 'config.json').read_text())
  shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
  least = 16 + build.problems(build.build(settings()), 'test').tokens.shape[1]
  built = {}
  for room in (least - 1, least):
    config_json = json.dumps({**fields, 'max_position_embeddings': room})
    (tmp_path / 'config.json').write_text(config_json)
    built[room] = build.build(settings(**{'draft.of': str(tmp_path)}))
  build.problems(built[least], 'test')
  short = built[least - 1]
  build.problems(short, 'train')  # nobody drafts in rollouts
  for call in (
    lambda: build.problems(short, 'test'),
    lambda: cards.sections_of(short),
    lambda: loaded.Model(short, {}, {}, '').generate(['1' * least], seed=0),
  ):
    with pytest.raises(ValueError, match="the draft('s .*positions| has)"):
      call()
  both = {'draft.of': str(tmp_path), 'draft.rollouts': True}
  (tmp_path / 'config.json').write_text(
    json.dumps({**fields, 'max_position_embeddings': least - 1})
  )
  with pytest.raises(ValueError, match=f'sampler.length = 16 .*draft.* {least - 1}'):
    build.problems(build.build(settings(**both)), 'train')


# --- what is refused


SAME = {'draft.of': 'same'}
REFUSED = (
  ({'draft.of': 'base'}, 'draft.of = base .*lora.rank > 0'),
  ({**SAME, 'draft.gate': 'reward', 'data.task': 'countdown'}, 'draft.judge = task'),
  ({**SAME, 'draft.gate': 'best'}, 'draft.gate'),
  ({**SAME, 'draft.bound': 1.5}, 'draft.bound = 1.5'),
  ({**SAME, 'draft.pick': 'wino'}, 'draft.pick'),
  ({**SAME, 'draft.gate': 'exact', 'draft.pick': 'random'}, 'draft.pick = random'),
  ({**SAME, 'eval.sampler.pick': 'wino'}, 'eval.sampler.pick = wino'),
  ({**SAME, 'eval.sampler.slots': 8}, 'eval.sampler.slots'),
  ({**SAME, 'eval.sampler.parallel': 'pmap'}, 'eval.sampler.parallel = pmap'),
  (
    {**SAME, 'draft.gate': 'exact', 'eval.sampler.cache': 'dual'},
    'eval.sampler.cache = dual',
  ),
  (
    {**SAME, 'model.attention_block': 4, 'sampler.block': 4,
     'eval.sampler.block': 4, 'eval.sampler.cache': 'block', 'objective.low': 0.1},
    'eval.sampler.cache = block',
  ),
  (
    {**SAME, 'draft.rollouts': True, 'draft.gate': 'exact',
     'objective.name': 'fork_grpo'},
    'fork_grpo',
  ),
  (
    {**SAME, 'draft.rollouts': True, 'sampler.order_logp': True,
     'sampler.rank': 'token'},
    'order_logp',
  ),
)  # fmt: skip


@pytest.mark.parametrize('fields, said', REFUSED, ids=str)
def test_what_is_refused(fields, said):
  with pytest.raises(ValueError, match=said):
    build.build(settings(**fields))


def test_fields_without_effect():
  """Each names what it needs; drafts for evaluation change nothing in training."""
  c = base.get_config()
  with pytest.raises(ValueError, match='draft.bound = .*draft.of'):
    check.effects(c, {'draft.bound'})
  config.update(c, {'draft.of': 'same', 'draft.gate': 'exact'})
  with pytest.raises(ValueError, match='draft.bound = .*draft.gate = confidence'):
    check.effects(c, {'draft.bound'})
  assert Draft(of='same', pick='entropy').idle().keys() >= {'threshold', 'tokens'}
  one, two = build.build(settings(**SAME)), build.build(settings())
  shapes = [build.abstract_buffer(x, 16).batch for x in (one, two)]
  assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
  assert one.steps.sample.name == two.steps.sample.name
  assert mesh.rows(one.mesh).spec == mesh.rows(two.mesh).spec
