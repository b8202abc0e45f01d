"""The Python API: from prompts and a reward function to a model on disk and back."""

import json
import pathlib
import re
import subprocess
import sys
import time
import tomllib

import autoregressive
import jax
import numpy as np
import pytest

import dmpo_jax as dj
from configs import base
from dmpo_jax import api, config, conventions, grader, loaded
from dmpo_jax.sampler import SampleConfig
from dmpo_jax.tasks import given, rewards

ROOT = pathlib.Path(__file__).parents[1]
LAW = {'length': 8, 'block': 4, 'steps': 8}
TINY = {
  'model.width': 16, 'model.layers': 1, 'model.heads': 2, 'model.kv_heads': 2,
  'model.mlp': 16, 'train.iterations': 1, 'train.prompts': 2, 'train.group': 4,
  'train.microbatches': 1, 'train.inner': 1, 'sft.steps': 2, 'sft.batch': 8,
  'eval.batch': 8, 'logprob.draws': 2, 'objective.draws': 2, 'mesh.cpu': 1,
}  # fmt: skip
ROWS = [{'prompt': f'say {x}', 'completion': x, 'want': x} for x in 'abcdefgh']


def reward(prompts, completions, want, **columns):
  assert len(prompts) == len(completions) == len(want) == len(columns['completion'])
  return [
    sum(map(str.isalpha, text)) / 8 + (w in text)
    for text, w in zip(completions, want, strict=True)
  ]


@pytest.fixture(scope='module')
def plain_saves():
  jax.config.update('jax_debug_key_reuse', False)
  yield
  jax.config.update('jax_debug_key_reuse', True)


def shrink(patch, folder):
  """Everything that starts from a config does so at a tiny size, in a folder."""
  real = api.config_of

  def tiny_config(start, overrides=None):
    c, workdir = real(start, overrides)
    if not workdir and not c.model.checkpoint:
      with c.unlocked():
        c.update_from_flattened_dict({**TINY, 'sft.steps': min(c.sft.steps, 2)})
        sizes = {f'data.{split}_size': 8 for split in ('train', 'validation', 'test')}
        c.update_from_flattened_dict(sizes)
    c.eval.batch = 8
    return c, workdir

  patch.setattr(api, 'config_of', tiny_config)
  patch.chdir(folder)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder without `configs`, in which the module's calls run."""
  place = tmp_path_factory.mktemp('elsewhere')
  with pytest.MonkeyPatch.context() as patch:
    shrink(patch, place)
    yield place


@pytest.fixture(scope='module')
def page(folder, plain_saves):
  """The names of the code on the page docs/api.md, after it has run."""
  code = re.search(r'```python\n(.*?)```', (ROOT / 'docs/api.md').read_text(), re.S)
  found = {}
  exec(compile(code[1], 'docs/api.md', 'exec'), found)
  return found


@pytest.fixture(scope='module')
def model(page):
  return page['model']


def test_a_run_is_in_its_workdir_and_found_again(page, model, capsys):
  rows, reward, workdir = page['rows'], page['reward'], pathlib.Path(model.workdir)
  results = json.loads((workdir / 'results.json').read_text())
  assert 0 <= results['final']['accuracy'] <= 1 and model.name == 'latest'
  how = {'sft.steps': 0}
  for other in (dj.load(workdir), dj.rl(rows, reward, 'quickstart', overrides=how)):
    same = jax.tree.map(lambda a, b: bool((a == b).all()), model.params, other.params)
    assert all(jax.tree.leaves(same)) and other.workdir == str(workdir)
  assert 'is done' in capsys.readouterr().out
  based = dj.load(workdir, of='base')
  same = jax.tree.map(lambda a, b: bool((a == b).all()), model.params, based.params)
  assert based.name == 'base' and not all(jax.tree.leaves(same))
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  assert any('reward/reward' in json.loads(line) for line in lines)
  for other, fn in ((rows[:4], reward), (rows, lambda prompts, completions: [1.0])):
    with pytest.raises(ValueError, match='data.path'):
      dj.rl(other, fn, 'quickstart', model.workdir, how)


def test_a_completion_depends_on_its_prompt_place_and_seed(model):
  prompts = ['a', 'a longer prompt that is no shorter', 'bc']
  together = model.generate(prompts)
  assert together == [model.generate(prompt) for prompt in prompts]
  hot = dict(temperature=1.0, samples=3)
  first = model.generate(prompts, seed=1, **hot)
  assert first == model.generate(prompts, seed=1, **hot)
  assert first != model.generate(prompts, seed=2, **hot)
  assert len(set(first[0])) > 1 and [len(group) for group in first] == [3, 3, 3]
  assert model.generate(prompts[0], seed=1, **hot) == first[0]
  assert model.generate('a', chat=False) != together[0]


def test_scores_are_of_the_text_alone(model):
  prompts, texts = ['a', 'bcd', 'a'], ['xyz', 'abc<answer>1</answer>' * 2, 'xyw']
  for how in ({'draws': 4}, {'by': 'trajectory'}):
    together = model.score(prompts, texts, **how)
    alone = [
      model.score([p], [t], **how)[0] for p, t in zip(prompts, texts, strict=True)
    ]
    assert together == pytest.approx(alone, rel=1e-4) and max(together) < 0
  ids = loaded.encode(model.built.tokenizer, 'a', True)
  written = model.complete(['a'], model.law(**LAW))[0][0]['ids']
  (_, is_greedy), (_, other) = model.logp_of(
    [(ids, written), (ids, [*written[:-1], written[-1] ^ 1])],
    model.law(**LAW),
    by='trajectory',
  )
  assert is_greedy and not other


def test_saved_model_says_the_same(page, model, folder):
  assert page['again'].generate(['a', 'b'], **LAW) == model.generate(['a', 'b'], **LAW)
  with pytest.raises(ValueError, match='not empty'):
    model.save('trained')
  (card,) = model.evaluate(folder='cards')
  assert card['task'] == 'python' and card['problems'] == 8  # data.test_size
  assert (folder / 'cards' / 'python_latest_16_16.card.md').exists()


@pytest.mark.slow
def test_supervised_training_on_pairs(folder, plain_saves):
  pairs = [('a', 'b'), ('c', 'd')]
  made = dj.sft(pairs, 'base', 'pairs', TINY)
  assert made.name == 'base' and not (folder / 'pairs' / 'rl').exists()
  assert made.score(['a'], ['b'], draws=2) == dj.load('pairs', 'base').score(
    ['a'], ['b'], draws=2
  )


BAD = {
  'start': (lambda m: dj.load('nowhere'), 'no config, no workdir'),
  'of': (lambda m: dj.load(m.workdir, of='newest'), "of = 'newest'"),
  'no run': (lambda m: dj.load('base', of='best'), 'needs the workdir'),
  'field': (lambda m: dj.load('base', overrides={'optim.rl': 1}), 'optim.lr'),
  'type': (lambda m: dj.load('base', overrides={'train.group': 'x'}), 'group = x'),
  'sampler': (lambda m: m.generate('a', lenght=3), 'lenght'),
  'value': (lambda m: m.generate('a', block=3), 'sampler.block = 3'),
  'preset': (lambda m: m.generate('a', preset='drem'), "'dream'"),
  'long': (lambda m: m.generate('a' * 600), 'prompt 0 has'),
  'prompt': (lambda m: m.generate([3]), 'must be a text'),
  'pairs': (lambda m: m.score(['a'], []), '1 prompts and 0 completions'),
  'by': (lambda m: m.score(['a'], ['b'], by='guess'), 'likelihood.by'),
  'draws': (lambda m: m.score(['a'], ['b'], draws=0), 'likelihood.draws = 0'),
  'format': (lambda m: m.save('x', 'gguf'), 'merged or adapter'),
  'row': (lambda m: dj.rl(['a', 3], reward, 'base'), 'row 1 of prompts'),
  'empty': (lambda m: dj.rl([], reward, 'base'), 'list of prompts'),
  'function': (lambda m: dj.rl(['a'], 'mine', 'base'), 'must be a function'),
  'completion': (lambda m: dj.sft([{'prompt': 'a'}], 'base'), 'row 0 of pairs'),
  'steps': (
    lambda m: dj.sft([('a', 'b')], 'base', overrides={'sft.steps': 0}), 'sft.steps = 0'
  ),
  'workdir': (lambda m: dj.rl(ROWS, reward, m.workdir), 'workdir of a run'),
}  # fmt: skip


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_sentence(name, model):
  call, said = BAD[name]
  with pytest.raises(ValueError, match=re.escape(said)) as error:
    call(model)
  assert '\n' not in str(error.value)


def judged(functions, rows, texts):
  """The verdict of rewards in memory on a batch."""
  paid = rewards.Functions.of(given.named(functions), 5.0)
  task = grader.paying(given.own_task(ROWS, ROWS), paid, tuple(paid.specs))
  task = grader.bound(task, lambda row: row['prompt'], rows)
  return grader.judge(task, 'strict', texts, rows, {})


@pytest.mark.parametrize(
  'fn, said',
  [
    (lambda prompts, completions: [1.0], '1 rewards of 2 completions'),
    (lambda prompts, completions: 'high', 'list of 2 numbers'),
    (lambda prompts, completions: 1 / 0, 'row 0: .*test_api.py.*ZeroDivisionError'),
    (lambda prompts, completions, want: [0, want[-1] + 1], 'row 0: .*TypeError'),
    (lambda prompts, completions: [0, float('nan')], 'row 1: nan is not finite'),
    (lambda prompts, goal: [0, 0], 'takes goal; there are'),
    (lambda prompts, completions: time.sleep(60), 'reward.seconds'),
  ],
)
def test_a_wrong_reward_is_named_with_its_row(fn, said):
  with pytest.raises(ValueError, match=said) as error:
    judged([fn], ROWS[:2], ['a', 'b'])
  assert 'the reward <lambda>' in str(error.value)


def test_rewards_get_whole_batches_and_the_columns_that_they_name():
  seen = {}

  def few(prompts, completions, want):
    seen.update(prompts=prompts, completions=completions, want=want)
    return [True, None]

  found = judged([reward, few], ROWS[:2], ['abc', 'x'])
  assert seen == dict(
    prompts=['say a', 'say b'], completions=['abc', 'x'], want=['a', 'b']
  )
  assert found.terms == [{'reward': 11 / 8, 'few': 1.0}, {'reward': 1 / 8, 'few': None}]
  np.testing.assert_allclose(found.reward, [19 / 8, 1 / 8])
  assert found.grades == [1.0, 1 / 8]
  with pytest.raises(ValueError, match='same name'):
    given.named([few, few])


def test_a_hash_is_of_what_a_reward_computes():
  first = 'lambda p, c: [1 for _ in c]'
  made = [eval(text) for text in (first, first, first.replace('1', '2'))]
  hashes = [given.digest_of(ROWS, [fn]) for fn in made]
  assert hashes[0] == hashes[1] != hashes[2]
  assert given.digest_of(ROWS[1:], made[:1]) != hashes[0]


def test_the_package_stays_light():
  """Tasks import it in worker processes."""
  code = (
    'import dmpo_jax, sys; sys.exit("jax" in sys.modules or "rl" not in dir(dmpo_jax))'
  )
  assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
  with pytest.raises(AttributeError, match='nothing'):
    dj.nothing  # noqa: B018


def test_a_wheel_has_every_folder():
  setup = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']
  folders = {path.parent for path in ROOT.glob('dmpo_jax/**/*.py')}
  names = {str(path.relative_to(ROOT)).replace('/', '.') for path in folders}
  assert set(setup['packages']) == names | {'dmpo_jax.configs'}
  assert setup['package-dir'] == {'dmpo_jax.configs': 'configs'}


@pytest.mark.parametrize('name', conventions.PRESETS)
def test_presets_are_possible(name):
  c = base.get_config()
  config.update(c, conventions.fields_of(name))
  hp = SampleConfig(**{k: c.eval.sampler[k] for k in vars(SampleConfig(1, 1, 1))})
  assert hp.problems() == [] and conventions.PRESETS[name].source


@pytest.mark.long
def test_the_notebook_runs(plain_saves, tmp_path, monkeypatch, capsys):
  """As a script: it uses no magic of notebooks, and keeps no output."""
  shrink(monkeypatch, tmp_path)
  book = json.loads((ROOT / 'docs/quickstart.ipynb').read_text())
  cells = [cell for cell in book['cells'] if cell['cell_type'] == 'code']
  assert not any(cell['outputs'] or cell['execution_count'] for cell in cells)
  found = {}
  for cell in cells:
    exec(compile(''.join(cell['source']), cell['id'], 'exec'), found)
  out = capsys.readouterr().out
  assert all(f'{word}' in out for word in ('base: ', 'final: ', 'elbo', 'trajectory'))
  assert json.loads(pathlib.Path('runs/mine/results.json').read_text())


def test_a_block_causal_directory_needs_no_settings(tmp_path):
  """Its attention block is that of both samplers, in a length that it divides."""
  fields = autoregressive.config_of('qwen3') | {
    'model_type': 'a2d-qwen3',
    'architectures': ['A2DQwen3LMHeadModel'],
    'mask_token_id': 3,
    'block_size': 12,
  }
  (tmp_path / 'config.json').write_text(json.dumps(fields))
  c, _ = api.config_of(tmp_path, {'eval.sampler.length': 48, 'eval.sampler.steps': 48})
  for section, length in ((c.sampler, 24), (c.eval.sampler, 48)):
    assert (section.block, section.length, section.steps) == (12, length, length)
