"""The command line: what it refuses, which run it finds, what each mode does."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from configs import base, quickstart
from dmpo_jax import (
  build,
  check,
  checkpoint,
  config,
  data,
  evaluate,
  fits,
  guard,
  hf,
  metrics,
  model,
  parts,
  runner,
  runs,
  train,
  weights,
)
from dmpo_jax import cli as main
from dmpo_jax.tools import cards, provenance, report, status

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from configs import base

SWEEPS = ('rates',)


def get_config():
  c = base.get_config()
  c.update_from_flattened_dict({
      'name': 'mine', 'train.prompts': 2, 'train.group': 4,
      'train.microbatches': 1, 'sft.batch': 8, 'eval.batch': 8})
  return c


def sweep(name):
  return {'rates': [{'optim.lr': 1e-3}, {'optim.lr': 1e-4, 'seed': 7}]}[name]
"""


def tiny(**changes):
  c = base.get_config()
  c.update_from_flattened_dict(
    {
      'train.prompts': 2,
      'train.group': 4,
      'train.microbatches': 1,
      'sft.batch': 8,
      'eval.batch': 8,
    }
  )
  config.update(c, changes)
  return c


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(CONFIG)
  return str(path)


@pytest.fixture
def command(config_file, monkeypatch, tmp_path):
  """Runs the command line as `python main.py --config=... args` does, in tmp_path."""
  monkeypatch.setattr(main.runner, 'quiet', lambda: None)
  monkeypatch.chdir(tmp_path)

  def call(*args, function=None, config=(f'--config={config_file}',)):
    saved = flagsaver.save_flag_values()
    argv = ['main.py', *config, *args]
    monkeypatch.setattr(sys, 'argv', argv)  # the summary repeats it
    try:
      return (function or main.start)(main.parse(argv))
    finally:
      flagsaver.restore_flag_values(saved)
      flags.FLAGS.unparse_flags()

  return call


@pytest.fixture
def phases(monkeypatch):
  """phases(sft=f, rl=g): a function of a Session in the place of each phase."""

  def put(**runs):
    monkeypatch.setattr(train, 'run', lambda name, session, *_: runs[name](session))

  return put


def sub(*args, folder):
  """The command in a process of its own."""
  return subprocess.run(
    [sys.executable, ROOT / 'main.py', *args],
    cwd=folder,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
  )


# --- what cannot run is refused before anything is compiled


# What is set -> the field, and the value or field to set instead.
IMPOSSIBLE = [
  ({'sampler.pick': 'confidense'}, r'sampler\.pick = .confidense.*confidence'),
  ({'eval.sampler.pick': 'margn'}, r'eval\.sampler\.pick = .margn.*margin'),
  ({'data.task': 'sudoko'}, "data.task = 'sudoko'.*did you mean 'sudoku'"),
  ({'model.preset': 'tinny'}, "model.preset = 'tinny'.*did you mean 'tiny'"),
  ({'data.style': 'zzz'}, "data.style = 'zzz' must be one of bare, chat"),
  ({'eval.style': 'zzz'}, "eval.style = 'zzz' must be one of"),
  ({'data.protocol': 'stric'}, "data.protocol = 'stric'.*'strict'"),
  ({'data.template': 'nowhere'}, "data.template = 'nowhere': no such file"),
  ({'logprob.estimator': 'elbow'}, 'logprob.estimator = .elbow.*elbo'),
  ({'logprob.elbo': 'paperr'}, 'logprob.elbo = .paperr.*paper'),
  ({'model.attention': 'flash'}, 'model.attention = .flash.*xla, cudnn, splash'),
  ({'model.attention': 'splash'}, 'model.attention = splash needs a tpu.*use xla'),
  ({'model.attention': 'cudnn'}, 'model.attention = cudnn.*model.dtype = bfloat16'),
  ({'model.dtype': 'float16'}, "model.dtype = 'float16'.*float32"),
  ({'sampler.parallel': 'jitt'}, "sampler.parallel = 'jitt'.*'jit'"),
  ({'train.microbatches': 3}, 'group = 8 rows.*multiple of 8.*microbatches = 24'),
  ({'train.microbatches': 0}, 'train.microbatches = 0 must be >= 1'),
  ({'train.group': 3}, 'group = 6 rows must be a multiple of 8'),
  ({'eval.batch': 9}, 'eval.batch = 9 must be a multiple of the 8'),
  ({'sft.batch': 9, 'sft.steps': 1}, 'sft.batch = 9 must be a multiple of the 8'),
  ({'sampler.block': 5}, r'^  sampler.block = 5 must divide sampler.length = 16'),
  ({'eval.sampler.block': 5}, r'^  eval.sampler.block = 5 must divide'),
  ({'sampler.steps': 17}, 'sampler.steps = 17'),
  ({'sampler.temperature': -1.0}, 'sampler.temperature = -1.0'),
  ({'sampler.threshold': 1.5}, 'sampler.threshold = 1.5'),
  ({'objective.draws': 3}, 'objective.draws = 3.*even'),
  ({'objective.alpha': -1.0}, 'objective.alpha = -1.0.*>= 0'),
  ({'logprob.draws': 3}, 'logprob.draws = 3.*even'),
  (
    {'objective.loss': 'ddo', 'objective.antithetic': False},
    'logprob.antithetic = True must be objective.antithetic = False',
  ),
  (
    {'objective.baseline': 'model', 'logprob.low': 0.2},
    'logprob.low = 0.2 must be objective.low = 0.1',
  ),
  (
    {'objective.baseline': 'model', 'logprob.elbo': 'stratified'},
    'logprob.elbo = stratified must be paper',
  ),
  (
    {
      'objective.loss': 'ddo',
      'objective.antithetic': False,
      'logprob.antithetic': False,
      'lora.rank': 2,
      'lora.dropout': 0.1,
    },
    'lora.dropout = 0.1: objective.name = dmpo.*set 0',
  ),
  (
    {'objective.baseline': 'model', 'objective.loss_tail': False},
    'objective.loss_tail = False.*set True',
  ),
  ({'logprob.low': 0.9, 'logprob.high': 0.5}, 'logprob.low = 0.9'),
  (
    {'logprob.estimator': 'trajectory', 'sampler.temperature': 0.0},
    'sampler.temperature = 0.*set it > 0.*trajectory',
  ),
  (
    {'logprob.estimator': 'trajectory', 'logprob.tail': False},
    'logprob.tail = False.*logprob.estimator = elbo',
  ),
  (
    {'logprob.estimator': 'trajectory', 'sampler.top_p': 0.9},
    'sampler.top_p = 0.9.*set 1 and 0.*trajectory',
  ),
  (
    {'logprob.estimator': 'trajectory', 'sampler.pick': 'wino'},
    'sampler.pick = wino.*logprob.estimator = elbo',
  ),
  (
    {'logprob.estimator': 'trajectory', 'sampler.rank': 'token'},
    'sampler.rank = token.*set sampler.rank = max',
  ),
  ({'logprob.fuse': True}, 'logprob.fuse = True needs lora.rank > 0'),
  ({'eval.sampler.refresh': 2}, 'eval.sampler.refresh = 2.*sampler.cache'),
  ({'train.group': 1}, 'train.group = 1 must be >= 2'),
  ({'optim.lr': float('nan')}, 'optim.lr = nan must be finite'),
  ({'optim.b1': 1.0}, 'optim.b1 = 1.0 must be in'),
  ({'optim.eps': 0.0}, 'optim.eps = 0.0 must be > 0'),
  ({'lora.alpha': 0.0, 'lora.rank': 2}, 'lora.alpha = 0.0 must be > 0'),
  ({'lora.dropout': 0.1}, 'lora.dropout.*lora.rank > 0'),
  ({'model.quantize': 'int8'}, 'model.quantize = int8.*lora.rank > 0'),
  ({'checkpoint.every': 0}, 'checkpoint.every = 0 must be >= 1'),
  ({'reference.weights': ()}, 'reference.weights = .*a weight for each'),
  ({'reference.mix': 0.0}, 'reference.mix = 0.0 must be in'),
  ({'eval.samples': 2}, 'eval.samples = 2.*eval.sampler.temperature > 0'),
  ({'seed': -1}, 'seed = -1 must be in 0'),
  ({'mesh.fsdp': 3}, 'mesh.data, mesh.fsdp, mesh.tensor, mesh.expert = 0, 3, 1, 1'),
  (
    {'sampler.parallel': 'pmap', 'mesh.fsdp': 2},
    'sampler.parallel = pmap.*mesh.fsdp = mesh.tensor = mesh.expert = 1',
  ),
  ({'model.head_chunk': 5}, 'model.head_chunk = 5 must divide'),
  ({'model.heads': 3, 'model.kv_heads': 3}, 'model.heads = 3.*model.width = 64'),
  ({'model.kv_heads': 3}, 'model.kv_heads = 3'),
  ({'model.checkpoint': 'x', 'model.width': 9}, 'model.width = 9: set 0'),
  ({'data.tokenizer': 'nowhere'}, "data.tokenizer = 'nowhere'"),
  ({'sampler.temperature': 0.0}, 'sampler.temperature = 0.*all be the same'),
  (
    {'lora.path': 'x', 'lora.rank': 2, 'sft.steps': 3},
    'sft.steps = 3 would change the base that lora.path',
  ),
  ({'reward.weights.sudoku': float('nan')}, 'reward.weights.sudoku = nan must be'),
  ({'sampler.temperature': 1e400}, 'sampler.temperature = inf must be finite'),
  ({'objective.strength': 1e400}, 'objective.strength = inf must be finite'),
  ({'health.grad_norm': 1e400}, 'health.grad_norm = inf must be finite'),
  ({'sampler.pick': 'entropy', 'sampler.steps': 0}, 'sampler.steps = 0 must be >= 1'),
]


@pytest.mark.smoke
@pytest.mark.parametrize('changes, match', IMPOSSIBLE, ids=lambda x: str(x)[:60])
def test_impossible_config_is_refused_before_compilation(changes, match, monkeypatch):
  """A sentence names the field, and nothing is compiled before it."""

  def compiles(*_, **__):
    raise AssertionError('compiled before the config was checked')

  monkeypatch.setattr(jax, 'jit', compiles)
  with pytest.raises(ValueError, match=f'(?m){match}'):
    build.build(tiny(**changes))


def test_all_complaints_come_at_once():
  """Of sections by themselves, and of rules between the sections that are right."""
  with pytest.raises(ValueError) as info:
    check.config(
      tiny(
        **{
          'objective.alpha': -1.0,
          'sampler.block': 5,
          'data.task': 'chess',
          'model.quantize': 'int8',
          'eval.batch': 9,
        }
      ),
      8,
    )
  assert str(info.value).startswith('this config cannot run:')
  assert len(str(info.value).splitlines()) == 6


def test_splash_splits_the_heads_of_k_and_v():
  """Its shard_map has whole heads on each device of the tensor axis."""
  c = tiny(**{'model.attention': 'splash', 'mesh.tensor': 2})
  tokenizer = data.char_tokenizer()
  parts.model_config(c, tokenizer)
  c.model.kv_heads = 1
  with pytest.raises(
    ValueError, match='kv_heads = 1 must be a multiple of mesh.tensor = 2'
  ):
    parts.model_config(c, tokenizer)


def test_config_of_these_tests_can_run():
  """The control of the table above."""
  check.config(tiny(), 8)


# --- flags


def test_misspelt_field_is_refused_with_the_nearest(command):
  with pytest.raises(SystemExit, match="config.optim.lrr.*did you mean 'optim.lr'"):
    command('--config.optim.lrr=1')


def test_config_can_follow_a_space_and_must_be_there(command, config_file):
  with pytest.raises(SystemExit, match="did you mean 'optim.lr'"):
    command('--config.optim.lrr', '1', config=('--config', config_file))
  for args in ((), ('--workdir=run', '--mode=eval'), ('--config.seed=1',)):
    with pytest.raises(SystemExit, match='^error: --config=FILE is missing'):
      command(*args, config=())


def test_missing_config_file_is_one_sentence(command, config_file):
  with pytest.raises(
    SystemExit, match='^error: .*mne.py: no such file.*mine.py'
  ) as info:
    command(config=(f'--config={config_file.replace("mine", "mne")}',))
  assert len(str(info.value).splitlines()) == 1


@pytest.mark.parametrize('flag', ['-h', '--help'])
def test_help_shows_modes_and_flags(command, capsys, flag):
  with pytest.raises(SystemExit) as info:
    command(flag, config=())
  out = capsys.readouterr().out
  assert info.value.code == 0 and '--workdir' in out
  assert all(f'  {name} ' in out for name in main.MODES)


def test_modes_are_those_of_the_flag():
  assert tuple(main.MODES) == main.NAMES


def test_wrong_type_is_refused_with_the_flag(command):
  with pytest.raises(SystemExit, match='error: .*train.group=many'):
    command('--config.train.group=many')


def test_stray_argument_is_refused(command):
  """`config.seed=1` without its dashes is not silently dropped."""
  with pytest.raises(SystemExit, match='config.seed=1.*--name=value'):
    command('config.seed=1')


def test_sweep_points(command):
  """Point i is applied; set twice, out of range and unknown are refused."""

  def read(*args):
    return command(*args, function=lambda argv: main.read_config(argv[1:]))

  c, overrides = read('--sweep=rates:1', '--config.train.inner=3')
  assert (c.optim.lr, c.seed, c.train.inner, c.name) == (1e-4, 7, 3, 'mine')
  assert overrides == {'train.inner': 3, 'sweep': 'rates:1'}
  assert read('--sweep=rates:0').config.optim.lr == 1e-3
  for bad in ('rates:2', 'rates', 'rates:x', 'rates:-1'):
    with pytest.raises(ValueError, match='rates:i with i from 0 to 1'):
      read(f'--sweep={bad}')
  with pytest.raises(ValueError, match="'optim.lr'.*both by --sweep and by a flag"):
    read('--sweep=rates:0', '--config.optim.lr=1')
  with pytest.raises(ValueError, match='--sweep=rate: .*has only rates'):
    read('--sweep=rate:0')
  module, c = config.load(str(ROOT / 'configs' / 'quickstart.py'))
  with pytest.raises(ValueError, match=r'no sweep\(name\)'):
    config.sweep_point(module, 'quickstart.py', 'rates:0')


def test_objective_of_a_sweep_and_of_a_flag(command, config_file):
  """Each brings its own defaults; what is explicit stays, in any order."""
  with open(config_file, 'a') as f:
    f.write("""

SWEEPS = ('objectives',)


def sweep(name):
  return {'objectives': [{'objective.name': 'espo', 'objective.draws': 2}]}[name]
""")

  def read(*args):
    return command(*args, function=lambda argv: main.read_config(argv[1:])).config

  c = read('--sweep=objectives:0', '--config.objective.beta=0.5')
  o = c.objective
  assert (o.name, o.advantage, o.draws, o.beta) == ('espo', 'loo', 2, 0.5)
  o = read('--config.objective.alpha=2', '--config.objective.name=wd1').objective
  assert (o.name, o.alpha) == ('wd1', 2.0) and 'best' not in o
  with pytest.raises(ValueError, match='objective.name.*both by --sweep'):
    read('--sweep=objectives:0', '--config.objective.name=wd1')


# --- the workdir


def begin(workdir, **changes):
  """Makes a workdir of a run that has computed something."""
  os.makedirs(workdir, exist_ok=True)
  runs.claim(tiny(**changes), str(workdir))
  with metrics.Writer(workdir) as writer:
    writer.write('sft', 1, {'loss': 1.0})


def test_default_workdir_is_a_function_of_the_config(tmp_path):
  """The name and any field that training reads move it; what may differ does not."""
  first = runs.default(tiny())
  assert first.startswith('runs/base-')
  others = [
    runs.default(tiny(**change))
    for change in ({'seed': 1}, {'data.protocol': 'paper'}, {'name': 'x'})
  ]
  assert len({first, *others}) == 4
  for change in (
    {'mesh.cpu': 3},
    {'log.samples': 1},
    {'cache': False},
    {'health.action': 'stop'},
    {'checkpoint.every': 3},
    {'eval.lengths': (32,)},
    {'reward.deadline': 1.0},
  ):
    assert runs.default(tiny(**change)) == first
  runs.claim(tiny(), str(tmp_path))
  written = json.loads((tmp_path / 'config.json').read_text())
  assert check.flatten(written) == check.flatten(
    json.loads(tiny().to_json())
  )  # a tuple comes back as a list


def test_workdir_of_another_config_is_refused(tmp_path):
  """The sentence lists what differs, and which fields may differ."""
  workdir = str(tmp_path / 'run')
  begin(workdir)
  before = (tmp_path / 'run' / 'config.json').read_text()
  with pytest.raises(ValueError) as info:
    runs.claim(tiny(**{'optim.lr': 0.5, 'train.inner': 7}), workdir)
  said = str(info.value)
  assert workdir in said and '--workdir' in said and 'seed' not in said
  assert f'optim.lr: {tiny().optim.lr!r} there, 0.5 here' in said
  assert 'train.inner: ' in said and ', 7 here' in said
  assert (tmp_path / 'run' / 'config.json').read_text() == before
  assert 'only log., checkpoint., mesh.' in said
  runs.claim(tiny(**{'log.samples': 9, 'checkpoint.every': 3}), workdir)
  assert (tmp_path / 'run' / 'config.json').read_text() == before
  assert runs.find(tiny(**{'eval.batch': 16}), workdir) == (workdir, {})


def test_command_that_computed_nothing_does_not_claim_the_workdir(tmp_path):
  """The corrected command takes it over. A checkpoint or a row of metrics claims it."""
  runs.claim(tiny(seed=1), str(tmp_path))
  assert runs.find(tiny(seed=1), str(tmp_path)) == ('', {})  # there is nothing to judge
  runs.claim(tiny(seed=2), str(tmp_path))
  assert json.loads((tmp_path / 'config.json').read_text())['seed'] == 2
  (tmp_path / 'rl' / '3').mkdir(parents=True)
  with pytest.raises(ValueError, match='seed: 2 there, 3 here'):
    runs.claim(tiny(seed=3), str(tmp_path))


# --workdir -> what the sentence names
PATHS = {
  'br[1]/run': r'--workdir=br\[1\]/run: .*\[ in the path',
  'st*r': r'\* in the path',
  'qu?': r'\? in the path',
  'back\\slash': r'\\ in the path',
  'gs://bucket/run': 'gs:// is no path.*mount',
  's3://bucket/run': 's3:// is no path.*mount',
  'file': '--workdir=file: .*file is no folder',
  'file/below/it': '--workdir=file/below/it: .*/file is no folder',
  '~nobody-here/run': 'there is no such user',
}


@pytest.mark.parametrize('path', PATHS)
def test_paths_that_cannot_be_a_workdir_are_refused(path, command, phases, tmp_path):
  """Before anything is made, in every mode that reads or writes checkpoints."""
  phases()
  (tmp_path / 'file').write_text('mine')
  there = sorted(tmp_path.rglob('*'))
  for mode in ('train', 'eval', 'export'):
    with pytest.raises(SystemExit, match=f'^error: .*{PATHS[path]}'):
      command(f'--workdir={path}', f'--mode={mode}')
  assert sorted(tmp_path.rglob('*')) == there


def test_default_workdir_below_such_a_path_is_refused(command, tmp_path, monkeypatch):
  (tmp_path / 'br[1]').mkdir()
  monkeypatch.chdir(tmp_path / 'br[1]')
  with pytest.raises(SystemExit, match=r'--workdir=runs/mine-.*\[ in the path'):
    command()


def test_workdir_that_cannot_be_written_to_is_refused(command, monkeypatch, tmp_path):
  """One sentence names the folder: root may write anywhere, so access is replaced."""
  (tmp_path / 'disk').mkdir()
  monkeypatch.setattr(runs.os, 'access', lambda *_: False)
  with pytest.raises(SystemExit, match='^error: --workdir=disk/run: .*disk cannot be'):
    command('--workdir=disk/run')


def test_home_is_expanded(command, phases, monkeypatch, tmp_path, capsys):
  """bash leaves the ~ of --workdir=~/run as it is."""
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  (tmp_path / 'home').mkdir()
  phases(sft=lambda _: ({}, 2.0))
  command('--workdir=~/run', '--mode=sft')
  assert (tmp_path / 'home' / 'run' / 'config.json').exists()
  assert not (tmp_path / '~').exists()


@pytest.mark.parametrize(
  'error',
  [
    OSError(28, 'No space left on device'),
    Exception('No space left on device (os error 28)'),  # of the tokenizers library
    ValueError("INTERNAL: Failed to write [os_error_code='28']"),  # of TensorStore
  ],
  ids=lambda error: type(error).__name__,
)
def test_error_of_the_disk_is_one_sentence_with_the_path(error, command, phases):
  def full(_):
    raise error

  phases(sft=full)
  with pytest.raises(SystemExit, match=f'^error: run: .*({error.args[-1][:9]})'):
    command('--workdir=run')


def test_second_run_in_a_workdir_is_refused(tmp_path):
  """The second is refused while the first lives, and not after its kill."""
  first = subprocess.Popen(
    [
      sys.executable,
      '-c',
      'import sys, time\n'
      'from dmpo_jax import guard\n'
      f'with guard.alone({str(tmp_path)!r}):\n'
      '  print(1, flush=True)\n'
      '  time.sleep(600)',
    ],
    stdout=subprocess.PIPE,
  )
  try:
    assert first.stdout.readline() == b'1\n'
    with pytest.raises(ValueError, match='another process is training there'):
      with guard.alone(str(tmp_path)):
        pass
  finally:
    first.kill()
    first.wait()
  with guard.alone(str(tmp_path)):
    pass


def test_damaged_config_of_a_workdir_is_named(tmp_path):
  """A sentence that names the file, and what to do."""
  workdir = str(tmp_path / 'run')
  begin(workdir)
  path = tmp_path / 'run' / 'config.json'
  for text in (path.read_text()[:100], ''):
    path.write_text(text)
    with pytest.raises(ValueError, match='config.json is no valid JSON.*remove it'):
      runs.claim(tiny(), workdir)


def test_command_trains_once(command, phases, monkeypatch, tmp_path, capsys):
  """Training leaves results; the same command then says that it is done."""
  params = {'params': {}}
  phases(sft=lambda _: (params, 2.0), rl=lambda _: (params, 3.0))
  monkeypatch.setattr(
    evaluate,
    'accuracy',
    lambda *_: ({'accuracy': 0.5, 'reward': 1.0}, [{'completion': 'x'}]),
  )
  monkeypatch.setattr(report, 'curves', lambda workdir: None)
  monkeypatch.setattr(report, 'summary', lambda workdir: 'the summary')
  command('--workdir=run', '--config.seed=3')
  out = capsys.readouterr().out
  assert out.startswith('the summary\nworkdir:    run/\ncurves:     run/curves.png\n')
  assert 'python main.py --workdir=run --mode=sample --html=sample.html' in out
  results = json.loads((tmp_path / 'run' / 'results.json').read_text())
  assert results['base'] == results['final'] == {'accuracy': 0.5, 'reward': 1.0}
  assert results['seconds']['total'] == 5.0 and results['seed'] == 3
  assert results['config'] == 'mine' and 'jax' in results['versions']
  assert (tmp_path / 'run' / 'test_final.jsonl').read_text() == (
    '{"completion": "x"}\n'
  )
  assert (tmp_path / 'run' / 'tokenizer' / 'tokenizer.json').exists()

  drawn = []
  monkeypatch.setattr(report, 'curves', drawn.append)
  monkeypatch.setattr(main.resume, 'saved_updates', lambda *_: [8, 80])
  phases()  # to train again would be a KeyError
  command('--workdir=run', '--config.seed=3')
  out = capsys.readouterr().out
  assert 'this run is done' in out and 'the summary' in out
  assert drawn == ['run'] and 'run/rl/80\n' in out  # the picture that is missing
  picture = pathlib.Path('run/curves.png')
  picture.touch()
  command('--workdir=run', '--config.seed=3')
  assert drawn == ['run']
  os.utime(picture, (1e9, 1e9))  # drawn before the end, by --mode=report
  command('--workdir=run', '--config.seed=3')
  assert drawn == ['run', 'run']
  with pytest.raises(SystemExit, match='seed: 3 there, 4 here'):
    command('--workdir=run', '--config.seed=4')
  pathlib.Path('run/results.json').write_text('')  # as a failed disk leaves it
  phases(sft=lambda _: (params, 2.0), rl=lambda _: (params, 3.0))
  command('--workdir=run', '--config.seed=3')
  again = json.loads(pathlib.Path('run/results.json').read_text())
  assert again['final'] == results['final']


def test_run_that_does_not_fit_is_refused_first(
  command, phases, monkeypatch, capsys, tmp_path
):
  """No weights are read, and the workdir stays free for another config."""
  large = fits.Use('update', 2**50, 0, 0.0, None, None)
  monkeypatch.setattr(fits, 'limit', lambda _: 2**40)
  monkeypatch.setattr(fits, 'compiled', lambda *_: large)
  phases(sft=lambda _: pytest.fail('weights are loaded'))
  with pytest.raises(SystemExit, match='error: this run does not fit: .*update'):
    command(f'--workdir={tmp_path}/run')
  assert not (tmp_path / 'run' / 'config.json').exists()


def test_pairs_that_do_not_fit_are_refused_first(
  command, phases, monkeypatch, tmp_path
):
  """With the prompts of their own file, until RL has a checkpoint."""
  asked, file = [], tmp_path / 'p.jsonl'
  line = {'prompt': [5] * 9, 'chosen': '1', 'rejected': '2'}
  file.write_text(json.dumps(line) + '\n')

  def verdict(built, name, prompt, target):
    asked.append((name, prompt))
    return 'too large'

  monkeypatch.setattr(fits, 'check', lambda *_: None)
  monkeypatch.setattr(fits, 'limit', lambda _: 2**40)
  monkeypatch.setattr(fits, 'phase_verdict', verdict)
  phases(sft=lambda _: pytest.fail('weights are loaded'))
  args = '--workdir=run', '--config.sft.steps=0', f'--config.pairs.path=("{file}",)'
  with pytest.raises(SystemExit, match='error: this run does not fit: too large'):
    command(*args)
  assert asked == [('pairs', 9)]
  pathlib.Path('run/rl/1').mkdir(parents=True)
  with pytest.raises(pytest.fail.Exception, match='weights are loaded'):
    command(*args)
  assert asked == [('pairs', 9)]


def test_supervised_update_is_compiled_until_the_phase_is_done(
  command, phases, monkeypatch
):
  compiled = []
  monkeypatch.setattr(fits, 'check_phase', lambda *_: compiled.append(True))
  phases(sft=lambda _: ({}, 2.0))
  args = '--workdir=run', '--mode=sft', '--config.sft.steps=30'
  for update, wanted in (0, 1), (29, 2), (30, 2):
    pathlib.Path(f'run/sft/{update}').mkdir(parents=True)
    command(*args)
    assert len(compiled) == wanted


def test_share_of_a_gpu_is_ours_or_the_users(monkeypatch):
  for name in fits.FRACTIONS:
    monkeypatch.delenv(name, raising=False)
  runner.share_gpu()
  assert os.environ.pop('XLA_PYTHON_CLIENT_MEM_FRACTION') == '0.92'
  monkeypatch.setenv('XLA_CLIENT_MEM_FRACTION', '.5')  # JAX refuses both
  runner.share_gpu()
  assert 'XLA_PYTHON_CLIENT_MEM_FRACTION' not in os.environ


def test_mode_sft_leaves_no_results(command, phases, capsys):
  phases(sft=lambda _: ({}, 2.0))
  command('--workdir=run', '--mode=sft')
  assert 'base model in run/sft' in capsys.readouterr().out
  assert not os.path.exists('run/results.json')


def test_ctrl_c_is_one_sentence(command, phases, capsys):
  """It says that the same command resumes; the exit code is the shell's."""

  def stop(_):
    raise KeyboardInterrupt

  phases(sft=stop)
  with pytest.raises(SystemExit) as info:
    command('--workdir=run')
  error = capsys.readouterr().err
  assert info.value.code == 130 and 'same command resumes' in error
  assert 'Traceback' not in error


def test_bad_numbers_are_one_sentence(command, phases, monkeypatch):
  """A run that stops on nan ends with the sentence, not with a traceback."""

  def stop(_):
    raise FloatingPointError('not finite at update 3')

  phases(sft=stop)
  monkeypatch.delenv('DMPO_TRACEBACK', raising=False)
  with pytest.raises(SystemExit, match='^error: not finite at update 3$'):
    command('--workdir=run')
  monkeypatch.setenv('DMPO_TRACEBACK', '1')
  with pytest.raises(FloatingPointError):
    command('--workdir=run')


def test_collapse_has_its_exit_code(command, phases, tmp_path, capsys):
  """77 and the sentence; the run is not taken for done."""
  phases(sft=lambda _: ({}, 2.0), rl=lambda _: guard.collapsed('all is EOS'))
  with pytest.raises(SystemExit) as info:
    command('--workdir=run')
  assert info.value.code == 77
  assert capsys.readouterr().err.endswith('error: all is EOS\n')
  assert not (tmp_path / 'run' / 'results.json').exists()


def test_report_of_a_run(command, monkeypatch, capsys):
  """By --workdir or by --config: curves, and a summary of what there is."""
  monkeypatch.setattr(report, 'curves', lambda workdir: f'{workdir}/c.png')
  monkeypatch.setattr(report, 'summary', lambda workdir: 'before and after')
  begin('run')
  with metrics.Writer('run') as writer:
    writer.write('rl', 0, {'reward': 1.0})
  command('--workdir=run', '--mode=report', config=())
  said = capsys.readouterr().out
  assert said.startswith('run/c.png\niteration 0 of 100, update 0; last line')
  assert 'reward 1\n' in said and 'none yet' in said
  pathlib.Path('run/results.json').write_text('{}')
  command('--workdir=run', '--mode=report')
  said = capsys.readouterr().out
  assert said.startswith('run/c.png\nbefore and after\nworkdir:    run/\n')
  assert '--workdir=run --mode=eval' in said
  with pytest.raises(SystemExit, match='no run in nowhere'):
    command('--workdir=nowhere', '--mode=report')
  with pytest.raises(SystemExit, match='no run in runs/mine-'):
    command('--mode=report')
  with pytest.raises(SystemExit, match='--mode=report needs --workdir'):
    command('--mode=report', config=())
  os.mkdir('runs')
  os.rename('run', runs.default(main.config.load('mine.py')[1]))
  command('--mode=report')
  assert 'before and after' in capsys.readouterr().out


def test_list_of_runs(command, capsys):
  """How far each is, the latest start last; what is no run is named."""
  command('--mode=list', config=())
  assert 'no run in runs/*' in capsys.readouterr().out
  for name, start in (('done', '2026-01-02'), ('going', '2026-01-03'), ('new', '')):
    os.makedirs(f'runs/{name}')
    runs.claim(tiny(seed=len(name)), f'runs/{name}')
    git = {'revision': 'abcdef' * 7}
    if start:
      provenance.append(f'runs/{name}', dict(time=f'{start}T04:05:06', git=git))
  with metrics.Writer('runs/going') as writer:
    writer.write('rl', 0, {'accuracy': 0.25})
    writer.write('update', tiny().train.inner, {'loss': 1.0})
    writer.write('eval', 1, {'accuracy': 0.5})
  done = pathlib.Path('runs/done/results.json')
  done.write_text('{"final": {"accuracy": 0.875}}')
  for name, text in (('torn', '{"na'), ('other', '[1]'), ('empty', None)):
    os.makedirs(f'runs/{name}')
    if text:
      pathlib.Path(f'runs/{name}/config.json').write_text(text)
  pathlib.Path('runs/comparison.png').touch()
  command('--mode=list', config=())
  head, *lines = capsys.readouterr().out.splitlines()
  assert head.split() == [*status.COLUMNS]
  cells = [re.split('  +', line) for line in lines]
  assert cells[:3] == [
    ['runs/new', 'base', 'iteration 0 of 100', '-', '-', '-'],
    ['runs/done', 'base', 'done', '0.875 test', '2026-01-02 04:05', 'abcdefab'],
    [
      'runs/going', 'base', 'iteration 1 of 100', '0.500 validation',
      '2026-01-03 04:05', 'abcdefab',
    ],
  ]  # fmt: skip
  named = [line.split(':')[0] for line in lines[3:]]
  assert named == ['runs/empty', 'runs/other', 'runs/torn']
  command('--mode=list', '--runs=runs/go*', config=())
  assert len(capsys.readouterr().out.splitlines()) == 2


def test_report_of_a_run_that_has_written_nothing(command, capsys):
  """How far it is, without a picture."""
  os.mkdir('run')
  runs.claim(tiny(), 'run')
  command('--workdir=run', '--mode=report')
  assert capsys.readouterr().out.startswith('iteration 0 of')


# --- what the command line alone does


@pytest.mark.parametrize(
  'args, needs',
  [
    (['--prompt=x'], '--prompt needs --mode=sample'),
    (['--format=adapter', '--mode=eval'], '--format needs --mode=export'),
    (['--of=base'], '--of needs --mode=eval or sample or export'),
    (['--topology=v5e:4x4'], '--topology needs --mode=plan'),
    (['--generations=x', '--mode=eval'], '--generations needs --mode=score'),
    (['--mode=plan', '--out=x', '--html=y'], '--html needs --mode=sample'),
    (['--mode=sample', '--prompt=x', '--problem=3'], '--problem needs no --prompt'),
    (['--mode=report', '--by=seed'], '--by needs --runs'),
    (['--mode=list', '--runs=x'], '--config needs another mode'),
    (['--mode=report', '--runs=x', '--cards=y'], '--runs needs no --cards'),
    (['--mode=report', '--runs=x', '--workdir=y'], '--workdir needs neither'),
    (['--heartbeat=9'], '--heartbeat needs --coordinator'),
  ],
)
def test_flags_of_other_modes_are_refused(command, args, needs):
  with pytest.raises(SystemExit, match=f'without effect in --mode=.*{needs}'):
    command(*args)


def test_a_field_without_effect_is_refused_or_named(command, monkeypatch, tmp_path):
  """One of the command line is refused; one of the file is named in one line."""
  lines = []
  monkeypatch.setattr(main.logging, 'warning', lines.append)
  monkeypatch.setitem(main.MODES, 'train', lambda command: None)
  with pytest.raises(SystemExit, match='sampler.steps = 16 .needs sampler.pick = '):
    command('--config.sampler.pick=entropy', '--config.sampler.steps=16')
  file = tmp_path / 'other.py'
  change = "  c.sampler.pick, c.sampler.steps = 'entropy', 8\n  return c"
  file.write_text(CONFIG.replace('  return c', change, 1))
  command(config=(f'--config={file}',))
  (line,) = lines
  assert 'sampler.steps = 8 (needs sampler.pick = ' in line and '\n' not in line


def test_a_sweep_is_applied_before_devices_are_made(command, monkeypatch, tmp_path):
  """A point may set mesh.cpu and cache."""
  seen = []
  monkeypatch.setattr(runner, 'split_cpu', seen.append)
  monkeypatch.setattr(runner, 'cache_programs', lambda c: seen.append(c.cache))
  monkeypatch.setitem(main.MODES, 'train', lambda command: None)
  file = tmp_path / 'other.py'
  point = (
    "SWEEPS = ('a',)\n\n\ndef sweep(name):\n  return [{'mesh.cpu': 3, 'cache': False}]"
  )
  file.write_text(f'{CONFIG}\n\n{point}\n')
  command('--sweep=a:0', config=(f'--config={file}',))
  assert seen == [3, False]


def test_starts_are_recorded(command, phases, tmp_path):
  """What the command line changed and the seeds, once for each start."""
  phases(sft=lambda _: ({}, 2.0))
  for _ in range(2):
    command('--workdir=run', '--mode=sft', '--config.seed=3', '--sweep=rates:0')
  found = json.loads((tmp_path / 'run' / 'provenance.json').read_text())
  assert len(found) == 2
  for entry in found:
    assert entry['overrides'] == {'seed': 3, 'sweep': 'rates:0'}
    assert entry['seeds'] == {'seed': 3, 'data.seed': 0}


def test_watchdog_of_a_run(command, phases):
  """log.stuck_minutes is its limit; it writes into the workdir."""
  dogs = []

  def run(session):
    dogs.append(session.beat.__self__)
    return {}, 0.0

  phases(sft=run)
  command('--workdir=run', '--mode=sft', '--config.log.stuck_minutes=2')
  command('--workdir=run', '--mode=sft')
  assert [dog._limit for dog in dogs] == [120, 0]
  assert dogs[0].path == os.path.join('run', 'stuck_0.txt')


def test_hanging_start_is_stopped(config_file, tmp_path):
  """In a process of its own: its code, and a stack of what takes so long."""
  done = sub(
    f'--config={config_file}',
    '--config.log.stuck_minutes=0.0005',
    '--config.data.train_size=20000',
    folder=tmp_path,
  )
  assert done.returncode == guard.STUCK and 'most recent call' in done.stderr
  assert "no progress for 0.03 seconds in 'data, train'" in done.stderr


@pytest.fixture
def updates(monkeypatch, tmp_path):
  """What is changed in jax.config, by main, as if there were a GPU."""
  found = {}
  monkeypatch.setattr(jax.config, 'update', found.__setitem__)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'mine'))
  return found


def test_programs_are_cached_per_user(no_program_cache, updates, monkeypatch, tmp_path):
  """In a directory that nobody else may enter; not for CPUs."""
  runner.cache_programs(tiny())
  folder = tmp_path / 'mine' / 'dmpo_jax' / 'programs'
  assert updates == {'jax_compilation_cache_dir': str(folder)}
  assert folder.stat().st_mode & 0o777 == 0o700
  monkeypatch.setattr(os, 'getuid', lambda: folder.stat().st_uid + 1)
  with pytest.raises(ValueError, match='belongs to another user: set XDG_'):
    runner.cache_programs(tiny())
  updates.clear()
  monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
  runner.cache_programs(tiny())
  assert updates == {}


def test_no_cache_of_programs(updates, tmp_path):
  """config.cache = False turns it off, that of the environment, too."""
  runner.cache_programs(tiny(cache=False))
  assert updates == {'jax_enable_compilation_cache': False}
  assert not (tmp_path / 'mine').exists()


# What a block-causal checkpoint (blocks of 4) is asked for -> the field and the remedy.
BLOCKS = [
  (['sampler.block=3', 'sampler.length=12', 'sampler.steps=12'], '= 3.*divides'),
  (['sampler.length=10', 'sampler.block=2', 'sampler.steps=10'], '= 10.*blocks of 4'),
  (['eval.sampler.block=8'], r'eval\.sampler\.block = 8.*blocks of 4.*divides'),
  (['sampler.cache=dual'], r'sampler\.cache = dual.*set block'),
  (['eval.sampler.cache=prefix'], r'eval\.sampler\.cache = prefix.*set block'),
  (['sampler.pick=wino'], r'sampler\.pick = wino.*another pick'),
  (['sampler.guidance=1.0', 'logprob.estimator=trajectory'], 'guidance = 1.0.*elbo'),
  (['objective.name=diffu_grpo'], r'objective\.name = diffu_grpo.*off the prompt'),
  (['objective.name=wd1'], r'objective\.name = wd1.*off the prompt'),
  (['data.prompt_length=400'], '400 tokens.*length = 16.*lower .*prompt_length'),
  (['model.attention_block=0', 'sampler.cache=block'], 'cache = block.*whole text'),
  (['model.attention_block=0', 'model.attention_grid=prompt'], 'grid = prompt.*text'),
  (['model.attention_block=6'], 'blocks of 6.*divides'),
  (['eval.sampler.block=2', 'eval.lengths=(16,18)'], r'eval\.lengths = .*blocks of 4'),
]  # fmt: skip


@pytest.fixture(scope='module')
def block_folder(tmp_path_factory):
  """An SDAR directory whose weights cannot be read."""
  ids, folder = data.char_tokenizer(), tmp_path_factory.mktemp('sdar')
  cfg = model.ModelConfig(
    vocab=len(ids), width=16, layers=1, heads=2, kv_heads=2, mlp=32, qk_norm=True,
    mask_id=1, eos_id=2, pad_id=0, positions=300, block_causal=4,
  )  # fmt: skip
  hf.save_hf(folder, cfg, model.init(cfg, jax.random.key(0)), ids)
  (folder / 'model.safetensors').write_bytes(b'')
  return folder


@pytest.mark.parametrize('fields, named', BLOCKS, ids=lambda x: str(x)[:30])
def test_what_blocks_cannot_do_is_refused_first(
  command, block_folder, monkeypatch, fields, named
):
  """In one sentence, before weights are read and before anything is compiled."""

  def compile_(*_):
    raise AssertionError('compiles')

  monkeypatch.setattr(build.Compiled, '__call__', compile_)
  mode = ['--mode=eval', '--of=base'] * any('lengths' in field for field in fields)
  small = ['sampler.block=4', 'eval.sampler.block=4']
  small = [x for x in small if x.split('=')[0] not in '='.join(fields).split('=')]
  flags_ = [f'--config.{x}' for x in (*small, *fields)]
  with pytest.raises(SystemExit, match=f'(?s)^error: .*{named}') as error:
    command(f'--config.model.checkpoint={block_folder}', *flags_, *mode)
  assert str(error.value).count('\n') <= 1 and 'model.safetensors' not in str(error)


# --- data files


def test_error_in_a_data_file_names_its_line(tmp_path):
  """Before anything is compiled, as file:line."""
  path = tmp_path / 'bad.csv'
  path.write_text('Puzzle,Solution\n' + '0' * 16 + ',oops\n')
  built = build.build(tiny(**{'data.path': str(path)}))
  with pytest.raises(ValueError, match=r'bad\.csv:2: '):
    build.problems(built, 'train')


def test_errors_of_the_real_command(tmp_path):
  """In a process of its own: one line on stderr, exit code 1."""
  config = str(ROOT / 'configs' / 'quickstart.py')
  done = sub(f'--config={config}', '--config.sampler.pik=random', folder=tmp_path)
  assert done.returncode == 1 and 'Traceback' not in done.stderr
  assert "did you mean 'sampler.pick'" in done.stderr
  done = sub(f'--config={config}', '--config.sampler.block=5', folder=tmp_path)
  assert done.returncode == 1 and 'Traceback' not in done.stderr
  assert 'error: this config cannot run' in done.stderr
  assert 'sampler.block = 5 must divide' in done.stderr
  assert list(tmp_path.iterdir()) == []  # nothing was begun
  assert jax.device_count() == 8  # and nothing here was touched


@pytest.mark.long
def test_quickstart_from_a_checkpoint(
  command, config_file, tiny_checkpoint, tmp_path, capsys
):
  """LLaDA's format, adapters on an int8 base, and out again in both formats."""
  pathlib.Path(config_file).write_text(
    'from configs.quickstart import get_config  # as it stands'
  )
  settings = (
    f'--config.model.checkpoint={tiny_checkpoint}',
    '--workdir=run',
    '--config.model.quantize=int8',
    '--config.lora.rank=2',
    '--config.lora.dropout=0.1',
    '--config.sft.steps=2',
    '--config.sft.batch=8',
    '--config.train.iterations=2',
    '--config.train.prompts=2',
    '--config.train.group=4',
    '--config.train.microbatches=1',
    '--config.optim.warmup=1',
    '--config.data.train_size=8',
    '--config.data.validation_size=8',
    '--config.data.test_size=8',
    '--config.eval.batch=8',
  )
  command(*settings)
  results = json.loads((tmp_path / 'run' / 'results.json').read_text())
  assert set(results['final']) == set(results['base'])
  assert results['final']['forwards'] <= 16
  command(*settings, '--mode=export', '--out=merged')
  told = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert told['max_logit_difference'] < 1e-4 * told['max_logit']
  before, after = (
    weights.load_hf(str(f))[1] for f in (tiny_checkpoint, tmp_path / 'merged')
  )
  assert not all(
    jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), before, after))
  )
  with pytest.raises(SystemExit, match='sft.steps = 2 changed the base'):
    command(*settings, '--mode=export', '--format=adapter')


def test_a_published_adapter_is_where_training_starts(
  tiny_checkpoint, weights_of, tmp_path
):
  """lora.path: the policy starts as base and adapter, the reference as base."""
  c = quickstart.get_config()
  c.update_from_flattened_dict(
    {
      'model.checkpoint': str(tiny_checkpoint),
      'lora.rank': 2,
      'lora.path': str(tmp_path / 'adapter'),
      'sft.steps': 0,
    }
  )
  cfg, _ = weights.load_hf(str(tiny_checkpoint), lora_rank=2)
  lora = weights_of(cfg)['lora']
  hf.save_adapter(
    str(tmp_path / 'adapter'),
    dataclasses.replace(cfg, lora_alpha=c.lora.alpha),
    {'lora': lora},
  )
  read = build.build(c).steps.init_lora()['lora']
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), read, lora)
  c.lora.rank = 3
  with pytest.raises(ValueError, match='adapter_config.json: r = 2, but lora.rank = 3'):
    build.build(c)  # before the base is read


def test_an_adapter_knows_its_base(tiny_checkpoint, weights_of, tmp_path, caplog):
  """Other weights under the base's name are told by the digest in the adapter."""
  c = quickstart.get_config()
  c.update_from_flattened_dict(
    {'model.checkpoint': str(tiny_checkpoint), 'lora.rank': 2, 'sft.steps': 0}
  )
  built = build.build(c)
  base = built.steps.init()
  trained = {**base, 'lora': weights_of(built.model)['lora']}
  folder = str(tmp_path / 'out')
  hf.export(built, trained, base, folder, 'adapter')
  c.lora.path = folder
  build.build(c).steps.init()
  assert 'other weights' not in caplog.text
  other = jax.tree.map(lambda x: x + 0.1, base)
  hf.save_hf(tiny_checkpoint, built.model, other, shard_bytes=20_000)
  build.build(c).steps.init()
  assert f'{folder} was trained on other weights' in caplog.text


@pytest.fixture
def tiny_checkpoint(request, weights_of, tmp_path):
  """A LLaDA directory with the character tokenizer, in two shards."""
  ids = data.char_tokenizer()
  cfg = dataclasses.replace(
    request.getfixturevalue('tiny'),
    vocab=len(ids),
    eos_id=ids.eos_token_id,
    mask_id=ids.mask_token_id,
    pad_id=ids.pad_token_id,
  )
  folder = tmp_path / 'llada'
  hf.save_hf(str(folder), cfg, weights_of(cfg), ids, shard_bytes=20_000)
  assert (folder / hf.INDEX).exists()
  return folder


# --- evaluation


def write_gsm8k(folder):
  """Files in the field's format; the answers are single digits."""
  folder.mkdir()
  for name, count in (('train', 200), ('test', 9)):
    (folder / f'{name}.jsonl').write_text(
      '\n'.join(
        json.dumps({'question': f'{i} and {name}?', 'answer': f'So.\n#### {i % 10}'})
        for i in range(count)
      )
    )
  return folder


def test_train_evaluate_and_score_again(
  command, config_file, tiny_checkpoint, tmp_path, capsys
):
  """GSM8K files, three lengths, k samples; others' parsers and ours agree."""
  path = write_gsm8k(tmp_path / 'files')
  pathlib.Path(config_file).write_text(
    'from configs.quickstart import get_config  # as it stands'
  )
  settings = (
    f'--config.model.checkpoint={tiny_checkpoint}',
    '--workdir=run',
    '--config.data.task=gsm8k',
    f'--config.data.path={path}',
    '--config.data.test_size=0',
    '--config.data.train_size=0',
    '--config.lora.rank=2',
    '--config.sft.steps=0',
    '--config.train.iterations=1',
    '--config.train.prompts=2',
    '--config.train.group=4',
    '--config.train.microbatches=1',
    '--config.eval.batch=8',
    '--config.data.validation_size=8',
  )
  command(*settings)
  judged = (
    *settings,
    '--config.eval.lengths=(16, 32, 48)',
    '--mode=eval',
    '--config.eval.samples=2',
    '--config.eval.sampler.temperature=1.0',
    '--out=cards',
  )
  command(*judged)
  said = capsys.readouterr().out
  by_length = {
    length: json.loads(
      (tmp_path / f'cards/gsm8k_latest_{length}_{length}.card.json').read_text()
    )
    for length in (16, 32, 48)
  }
  for length, card in by_length.items():
    assert f'at {length} tokens, {length} steps' in said
    assert card['problems'] == 9 and card['samples'] == 2
    assert card['forwards'] == length and 1 <= card['tokens'] <= length
    assert card['accuracy'] <= card['pass@2'] <= 1
    assert card['interval'] == cards.wilson(card['accuracy'], 9)
    assert {
      'protocol',
      'pick',
      'block',
      'temperature',
      'batch',
      'dtype',
      'device',
      'seed',
      'versions',
      'seconds',
    } <= card.keys()
    file = f'cards/gsm8k_latest_{length}_{length}_0_generations.json'
    saved = json.loads((tmp_path / file).read_text())
    assert saved['gen_length'] == length and len(saved['generations']) == 18
    assert {type(item['ground_truth']) for item in saved['generations']} == {float}
    command(*settings, '--mode=score', f'--generations={file}')
    again = f'{100 * card["accuracy"]:.1f} %'
    assert again in capsys.readouterr().out
  # What is there is not sampled again; what is torn off is, to the same.
  lines = tmp_path / 'cards/gsm8k_latest_16_16.jsonl'
  whole = [strip(line) for line in lines.read_text().splitlines()]
  lines.write_text(''.join(lines.read_text().splitlines(True)[:11]) + '{"row')
  command(*judged)
  assert [strip(line) for line in lines.read_text().splitlines()] == whole
  # Nor is it mixed with what another model, or another sampler, has made.
  other = '--config.eval.sampler.temperature=0.5'
  with pytest.raises(
    SystemExit,
    match='cards has generations of another '
    r'model or config \(eval.sampler.temperature: 1.0 there',
  ):
    command(*judged[:-2], other, judged[-1])
  with pytest.raises(SystemExit, match=r'another model .* \(parameters: '):
    command(*judged, '--of=base')
  # Without its checkpoints it is the base, but not where they are asked for.
  (tmp_path / 'run' / 'rl').rename(tmp_path / 'gone')
  (tmp_path / 'run' / 'rl').mkdir()
  with pytest.raises(SystemExit, match='no checkpoint in run/rl: is that the'):
    command(*judged, '--of=best')
  with pytest.raises(SystemExit, match=r'another model .* \(parameters: '):
    command(*judged)
  (tmp_path / 'run' / 'rl').rmdir()
  (tmp_path / 'gone').rename(tmp_path / 'run' / 'rl')
  with pytest.raises(SystemExit, match='lengths has 24, which must be a mult'):
    command(*settings, '--mode=eval', '--config.eval.lengths=(24,)')
  with pytest.raises(SystemExit, match='samples = 2 needs .*temperature > 0'):
    command(*settings, '--mode=eval', '--config.eval.samples=2')
  capsys.readouterr()
  command('--mode=report', '--cards=cards/*.card.json', '--out=cards.png')
  assert '| 48 |' in capsys.readouterr().out
  assert (tmp_path / 'cards.png').stat().st_size > 1000
  command(*settings, '--mode=sample', '--problem=3', '--html=page.html')
  said = capsys.readouterr().out
  assert '3 and test?' in said and '16 steps' in said
  assert 'max="16"' in (tmp_path / 'page.html').read_text()
  command(*settings, '--mode=sample', '--prompt=How much is it?')
  said = capsys.readouterr().out
  assert said.startswith('How much is it?') and 'grade' not in said
  with pytest.raises(SystemExit, match='--problem=9 must be in 0 to 8'):
    command(*settings, '--mode=sample', '--problem=9')


def strip(line):
  """A saved generation without its time."""
  return {k: v for k, v in json.loads(line).items() if k != 'seconds'}


def test_generations_of_a_wrong_form_are_refused(command, tmp_path):
  """One sentence names the file, the generation and what it lacks."""
  path = tmp_path / 'x.json'
  good = {'question': '0' * 16, 'generations': '', 'ground_truth': '1' * 16}
  for value, message in (
    ('{', 'x.json is no valid JSON'),
    ('[]', 'no list of generations'),
    ('{"generations": []}', 'no list of generations, or an empty'),
    ('{"generations": ["x"]}', 'generation 0 is no object with fields'),
    (
      json.dumps({'generations': [{**good, 'ground_truth': None}]}),
      'every ground_truth is null',
    ),
    (
      json.dumps({'generations': [{**good, 'question': 'x'}]}),
      'generation 0: no puzzle in the question',
    ),
    (json.dumps({'generations': [good]}), 'does not solve'),
  ):
    path.write_text(value)
    with pytest.raises(SystemExit, match=message):
      command('--mode=score', '--generations=x.json')
  with pytest.raises(SystemExit, match='needs --generations'):
    command('--mode=score')


def test_score_without_a_config(command, tmp_path, capsys):
  """--task and --protocol are enough; the card is printed as JSON."""
  items = [
    {'question': 'x', 'generations': text, 'ground_truth': 3.0}
    for text in ('<answer>3</answer>', '<answer>4</answer>')
  ]
  path = tmp_path / 'x.json'
  path.write_text(json.dumps({'generations': items}))
  score = ('--mode=score', '--generations=x.json')
  command(*score, '--task=gsm8k', '--protocol=paper', config=())
  card = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert (card['task'], card['protocol'], card['problems']) == ('gsm8k', 'paper', 2)
  assert card['accuracy'] == 0.5
  (tmp_path / 'y.json').write_text('\ufeff' + path.read_text(), encoding='utf-8')
  command(score[0], '--generations=?.json', '--config.data.task=gsm8k')
  *_, last = capsys.readouterr().out.splitlines()
  assert (json.loads(last)['accuracy'], json.loads(last)['problems']) == (0.5, 4)
  with pytest.raises(SystemExit, match='is a directory'):
    command(score[0], '--generations=.', '--task=gsm8k', config=())
  with pytest.raises(SystemExit, match='--config=FILE or --task='):
    command(*score, config=())


@pytest.fixture
def judged(monkeypatch):
  """What --mode=eval judges, in its place: the workdirs, '' for a checkpoint alone."""
  found = []
  monkeypatch.setattr(runner, 'run_phases', lambda *args: found.append(args[1]))
  monkeypatch.setattr(
    runner,
    'params_of',
    lambda built, workdir, _: (found.append(workdir) or {}, {}, 'x'),
  )
  monkeypatch.setattr(cards, 'default_folder', lambda *args: f'{args[2]}/eval')
  monkeypatch.setattr(cards, 'run', lambda *args, **_: [])
  monkeypatch.setattr(report, 'summary', lambda workdir: '')
  monkeypatch.setattr(report, 'curves', lambda workdir: '')
  return found


def test_evaluation_finds_its_run(command, judged, tmp_path, capsys):
  """Without --workdir, with any field changed that may be after training."""
  trained = ('--config.seed=5', '--config.optim.lr=1e-3')
  command(*trained)
  workdir = judged.pop()
  pathlib.Path(workdir, 'rl', '7').mkdir(parents=True)
  for change in (
    ('--config.eval.lengths=(32,)', '--config.reward.deadline=1.0'),
    ('--config.data.protocol=paper', '--config.data.test_size=9'),
    ('--config.log.samples=1', '--config.cache=False'),
    ('--config.health.action=stop', '--config.checkpoint.every=7'),
  ):
    command(*trained, '--mode=eval', *change)
    assert judged.pop() == workdir and 'no run' not in capsys.readouterr().out
  command(*trained, '--config.reward.weights.sudoku=2.0')  # a second run that fits
  pathlib.Path(judged.pop(), 'rl', '7').mkdir(parents=True)
  with pytest.raises(SystemExit, match='name one by --workdir'):
    command(*trained, '--mode=eval', '--config.data.protocol=paper')
  config_json = json.loads((tmp_path / workdir / 'config.json').read_text())
  assert config_json['eval']['lengths'] == []


@pytest.mark.parametrize('mode', ['eval', 'sample', 'export'])
def test_judging_never_trains(mode, command, judged, phases, tmp_path):
  """There is a run, or a sentence; a run that differs is named with the difference."""
  phases()  # to train would be a KeyError
  here = f'--mode={mode}'
  with pytest.raises(SystemExit, match='^error: no run in runs/mine-.*trains nothing'):
    command(here)
  with pytest.raises(SystemExit, match='^error: no run in elsewhere'):
    command(here, '--workdir=elsewhere')
  begin(tmp_path / 'runs' / 'mine-1', **{'name': 'mine', 'objective.alpha': 0.2})
  with pytest.raises(
    SystemExit,
    match='(?s)no run in .*runs/mine-1: objective.alpha: 0.2 there.*--workdir',
  ):
    command(here)
  assert judged == [] and sorted(os.listdir('runs')) == ['mine-1']  # nothing is made


def test_run_is_named_by_its_workdir_alone(command, judged, tmp_path):
  """Its config.json is the config, with the overrides on top, tuples included."""
  begin(
    tmp_path / 'run', **{'seed': 5, 'objective.name': 'espo', 'eval.lengths': (32,)}
  )
  read = lambda *args: command(
    '--workdir=run', *args, config=(), function=lambda argv: main.read_config(argv[1:])
  )
  expected = tiny(**{'seed': 5, 'objective.name': 'espo', 'eval.lengths': (32,)})
  assert check.flatten(read().config) == check.flatten(expected)
  c, overrides = read('--config.eval.batch=16', '--config.eval.lengths=(8, 16)')
  assert (c.eval.batch, c.eval.lengths) == (16, (8, 16)) == tuple(overrides.values())
  with pytest.raises(ValueError, match="did you mean 'eval.batch'"):
    read('--config.eval.batc=16')
  command('--workdir=run', '--mode=eval', '--config.eval.batch=16', config=())
  assert judged == ['run']
  with pytest.raises(SystemExit, match='seed: 5 there, 6 here'):
    command('--workdir=run', '--mode=eval', '--config.seed=6', config=())
  with pytest.raises(SystemExit, match='--config=FILE is missing, .*no run is in'):
    command('--workdir=other', '--mode=eval', config=())
  saved = json.loads((tmp_path / 'run' / 'config.json').read_text())
  del saved['train']['inner']
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(saved))
  with pytest.raises(SystemExit, match='another version .*inner.*--config=FILE'):
    command('--workdir=run', '--mode=eval', config=())


def test_checkpoint_is_judged_as_it_is(
  command, config_file, phases, tiny_checkpoint, tmp_path, capsys
):
  """With the config of its run, that has sft.steps: nothing trains, and no folder that
  looks like a run appears. Where a run of this checkpoint is near, it may be meant."""
  phases()  # to train would be a KeyError
  pathlib.Path(config_file).write_text(
    'from configs.quickstart import get_config  # as it stands'
  )
  of = (
    f'--config.model.checkpoint={tiny_checkpoint}',
    '--config.data.test_size=8',
    '--config.data.train_size=8',
    '--config.eval.batch=8',
    '--mode=eval',
  )
  command(*of, "--config.eval.sets=('hard: data.min_blanks=12 data.max_blanks=12',)")
  said = capsys.readouterr().out
  assert 'no run in runs/quickstart-' in said and 'base: sudoku' in said
  assert 'base on hard: sudoku' in said
  (path,) = (tmp_path / 'evals').glob('*/*/source.json')
  (hard,) = (path.parent / 'hard').glob('*.card.json')
  assert json.loads(hard.read_text())['set'] == 'hard'
  (made,) = hard.parent.glob('*_generations.json')
  blanks = [
    row['question'].count('0') for row in json.loads(made.read_text())['generations']
  ]
  assert len(blanks) == 8 and min(blanks) >= 12
  _, params = weights.load_hf(str(tiny_checkpoint))
  digest = int(jax.jit(checkpoint.digest)(params))
  assert json.loads(path.read_text())['parameters'] == digest
  assert not (tmp_path / 'runs').exists()
  with pytest.raises(SystemExit, match='^error: --of=best: no run in'):
    command(*of, '--of=best')
  c = quickstart.get_config()
  c.model.checkpoint, c.seed = str(tiny_checkpoint), 9
  workdir = tmp_path / 'runs' / 'quickstart-1'
  workdir.mkdir(parents=True)
  runs.claim(c, str(workdir))
  (workdir / 'rl' / '3').mkdir(parents=True)
  with pytest.raises(SystemExit, match='(?s)seed: 9 there, 0 here.*--of=base'):
    command(*of)
  command(*of, '--of=base')
  assert 'base: sudoku' in capsys.readouterr().out
  (tmp_path / 'runs' / 'other').mkdir()  # no run, so it does not end a comparison
  with pytest.raises(SystemExit, match='no results.json .*in: runs/quickstart-1$'):
    command('--mode=report', '--runs=runs/*', config=())


@pytest.mark.parametrize('name, value', runner.FIXED.items())
def test_settings_of_jax_that_change_numbers_are_undone(name, value, monkeypatch):
  """x64 and other random numbers, whoever sets them."""
  other = {'threefry2x32': 'rbg', 'standard': 'strict'}.get(value, not value)
  before = getattr(jax.config, name)
  try:
    jax.config.update(name, other)
    runner.fix_numbers()
    assert getattr(jax.config, name) == value
  finally:
    jax.config.update(name, before)


@pytest.mark.parametrize('mode', ['train', 'eval', 'plan', 'score'])
def test_absent_platform_is_one_sentence(mode, command, monkeypatch):
  for error in (RuntimeError('Unable to initialize backend'), AssertionError()):

    def absent(error=error):
      raise error

    monkeypatch.setattr(jax, 'devices', absent)
    with pytest.raises(SystemExit, match='^error: JAX_PLATFORMS = .*set cpu'):
      command(f'--mode={mode}')


def test_cpu_can_be_several_devices():
  """mesh.cpu splits it, unless XLA_FLAGS already has."""
  code = (
    'import sys, jax; from dmpo_jax import runner;'
    'runner.split_cpu(int(sys.argv[1]));print(jax.device_count())'
  )
  for flags_, count, devices in (
    ('', 2, 2),
    ('', 1, 1),
    ('--xla_force_host_platform_device_count=3', 2, 3),
  ):
    done = subprocess.run(
      [sys.executable, '-c', code, str(count)],
      cwd=ROOT,
      text=True,
      env={**os.environ, 'XLA_FLAGS': flags_},
      capture_output=True,
    )
    assert done.stdout == f'{devices}\n', done.stderr
