"""The command line: what it refuses, in which words, and what it settles."""

import dataclasses
import json
import os
import pathlib
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
  data,
  evaluate,
  export,
  guard,
  metrics,
  train,
  weights,
)
from dmpo_jax import cli as main
from dmpo_jax.tools import report

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
  c.update_from_flattened_dict(changes)
  return c


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(CONFIG)
  return str(path)


@pytest.fixture
def command(config_file, monkeypatch, tmp_path):
  """Runs main as `python main.py --config=... args` would, in tmp_path."""
  monkeypatch.setattr(main, 'quiet', lambda: None)
  monkeypatch.chdir(tmp_path)

  def call(*args, function=None, config=(f'--config={config_file}',)):
    saved = flagsaver.save_flag_values()
    # ml_collections looks for overrides in sys.argv, whatever it is given.
    argv = ['main.py', *config, *args]
    monkeypatch.setattr(sys, 'argv', argv)
    try:
      rest = main.parse(argv)
      return (function or main.start)(rest)
    finally:
      flagsaver.restore_flag_values(saved)
      flags.FLAGS.unparse_flags()

  return call


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


IMPOSSIBLE = {
  "sampler.pick = 'confidense'.*did you mean 'confidence'": {
    'sampler.pick': 'confidense'
  },
  "eval.sampler.pick = 'margn'.*did you mean 'margin'": {'eval.sampler.pick': 'margn'},
  "data.task = 'sudoko'.*did you mean 'sudoku'": {'data.task': 'sudoko'},
  "objective.name = 'dmppo'.*did you mean 'dmpo'": {'objective.name': 'dmppo'},
  "model.preset = 'tinny'.*did you mean 'tiny'": {'model.preset': 'tinny'},
  "data.style = 'zzz' must be one of bare, chat, eval, one_shot": {'data.style': 'zzz'},
  "data.protocol = 'stric'.*'strict'": {'data.protocol': 'stric'},
  "logprob.estimator = 'elbow'.*'elbo'": {'logprob.estimator': 'elbow'},
  "logprob.elbo = 'paperr'.*'paper'": {'logprob.elbo': 'paperr'},
  "model.attention = 'flash' must be one of xla, cudnn, splash": {
    'model.attention': 'flash'
  },
  'model.attention = splash needs a tpu, this is a cpu': {'model.attention': 'splash'},
  'model.attention = cudnn needs model.dtype = bfloat16': {'model.attention': 'cudnn'},
  "model.dtype = 'float16'.*one of float32": {'model.dtype': 'float16'},
  "sampler.parallel = 'jitt'.*'jit'": {'sampler.parallel': 'jitt'},
  'group = 8 rows must be a multiple of 8 .*microbatches = 24': {
    'train.microbatches': 3
  },
  'group = 6 rows must be a multiple of 8': {'train.group': 3},
  'eval.batch = 9 must be a multiple of the 8': {'eval.batch': 9},
  'sft.batch = 9 must be a multiple of the 8': {'sft.batch': 9, 'sft.steps': 1},
  r'^  sampler.block = 5 must divide sampler.length = 16': {'sampler.block': 5},
  r'^  eval.sampler.block = 5 must divide': {'eval.sampler.block': 5},
  'sampler.steps = 17 must be a multiple.*at most': {'sampler.steps': 17},
  'sampler.temperature = -1.0 must be >= 0': {'sampler.temperature': -1.0},
  'sampler.threshold = 1.5 must be in': {'sampler.threshold': 1.5},
  'objective.draws = 3 must be even': {'objective.draws': 3},
  'objective.alpha = -1.0 must be >= 0': {'objective.alpha': -1.0},
  'logprob.draws = 3 must be even': {'logprob.draws': 3},
  'logprob.antithetic = True must be objective.antithetic = False': {
    'objective.loss': 'ddo',
    'objective.antithetic': False,
  },
  'logprob.low = 0.2 must be objective.low = 0.1': {
    'objective.baseline': 'model',
    'logprob.low': 0.2,
  },
  'logprob.elbo = stratified must be paper': {
    'objective.baseline': 'model',
    'logprob.elbo': 'stratified',
  },
  'lora.dropout = 0.1: objective.name = dmpo compares': {
    'objective.loss': 'ddo',
    'objective.antithetic': False,
    'logprob.antithetic': False,
    'lora.rank': 2,
    'lora.dropout': 0.1,
  },
  'objective.loss_tail = False: log p_old': {
    'objective.baseline': 'model',
    'objective.loss_tail': False,
  },
  'logprob.low = 0.9, logprob.high = 0.5': {'logprob.low': 0.9, 'logprob.high': 0.5},
  'trajectory needs sampler.temperature > 0': {
    'logprob.estimator': 'trajectory',
    'sampler.temperature': 0.0,
  },
  'logprob.tail = False has no meaning': {
    'logprob.estimator': 'trajectory',
    'logprob.tail': False,
  },
  'logprob.estimator = trajectory needs 1 and 0': {
    'logprob.estimator': 'trajectory',
    'sampler.top_p': 0.9,
  },
  'sampler.pick = wino takes tokens back': {
    'logprob.estimator': 'trajectory',
    'sampler.pick': 'wino',
  },
  'sampler.rank = token: .*use sampler.rank = max': {
    'logprob.estimator': 'trajectory',
    'sampler.rank': 'token',
  },
  'logprob.fuse = True needs lora.rank > 0': {'logprob.fuse': True},
  'eval.sampler.refresh = 2 needs sampler.cache = prefix or dual': {
    'eval.sampler.refresh': 2
  },
  'train.group = 1 must be >= 2': {'train.group': 1},
  'optim.lr = -1.0 must be >= 0': {'optim.lr': -1.0},
  'optim.lr = nan must be >= 0': {'optim.lr': float('nan')},
  'optim.b1 = 1.0 must be in': {'optim.b1': 1.0},
  'optim.b2 = -0.1 must be in': {'optim.b2': -0.1},
  'optim.eps = 0.0 must be > 0': {'optim.eps': 0.0},
  'sft.clip = -1.0 must be >= 0': {'sft.clip': -1.0},
  'sft.warmup = -1 must be >= 0': {'sft.warmup': -1},
  'sft.weight_decay = -1.0 must be >= 0': {'sft.weight_decay': -1.0},
  'lora.alpha = 0.0 must be > 0': {'lora.alpha': 0.0, 'lora.rank': 2},
  'checkpoint.every = 0 must be >= 1': {'checkpoint.every': 0},
  'checkpoint.every_minutes = -1.0 must be >= 0': {'checkpoint.every_minutes': -1.0},
  'log.stuck_minutes = -1.0 must be >= 0': {'log.stuck_minutes': -1.0},
  'mesh.data, mesh.fsdp, mesh.tensor = 0, 3, 1': {'mesh.fsdp': 3},
  'sampler.parallel = pmap needs replicated': {
    'sampler.parallel': 'pmap',
    'mesh.fsdp': 2,
  },
  'model.head_chunk = 5 must divide': {'model.head_chunk': 5},
  'model.heads = 3 must divide model.width = 64': {
    'model.heads': 3,
    'model.kv_heads': 3,
  },
  'model.kv_heads = 3': {'model.kv_heads': 3},
  "data.tokenizer = 'nowhere' must be": {'data.tokenizer': 'nowhere'},
}


@pytest.mark.smoke
@pytest.mark.parametrize('said', IMPOSSIBLE)
def test_refused_before_compilation(said, monkeypatch):
  """One sentence that names the field, and no jit before it."""

  def compiles(*_, **__):
    raise AssertionError('compiled before the config was checked')

  monkeypatch.setattr(build, 'compiled', compiles)
  with pytest.raises(ValueError, match=f'(?m){said}'):
    build.build(tiny(**IMPOSSIBLE[said]))


def test_all_complaints_at_once():
  """A config with three faults is told of three."""
  with pytest.raises(ValueError) as info:
    check.config(
      tiny(**{'objective.alpha': -1.0, 'sampler.block': 5, 'data.task': 'chess'}), 8
    )
  assert str(info.value).startswith('this config cannot run:')
  assert len(str(info.value).splitlines()) == 4


def test_splash_splits_the_heads_of_k_and_v():
  """Its shard_map has whole heads on each device of the tensor axis."""
  c = tiny(**{'model.attention': 'splash', 'mesh.tensor': 2})
  tokenizer = data.char_tokenizer()
  build.model_config(c, tokenizer)
  c.model.kv_heads = 1
  with pytest.raises(
    ValueError, match='kv_heads = 1 must be a multiple of mesh.tensor = 2'
  ):
    build.model_config(c, tokenizer)


def test_the_defaults_of_the_tests_can_run():
  """The control of the table above."""
  check.config(tiny(), 8)


# --- flags


def test_misspelt_field(command):
  """The nearest field is named, and the exit is a sentence."""
  with pytest.raises(SystemExit) as info:
    command('--config.optim.lrr=1')
  assert 'config.optim.lrr is not a field' in str(info.value)
  assert "did you mean 'optim.lr'" in str(info.value)


def test_config_named_otherwise(command, config_file):
  """With a space in place of the =, or not at all: sentences, too."""
  with pytest.raises(SystemExit, match="did you mean 'optim.lr'"):
    command('--config.optim.lrr=1', config=('--config', config_file))
  for args in ((), ('--workdir=run', '--mode=eval'), ('--config.seed=1',)):
    with pytest.raises(SystemExit, match='^error: .*--config=FILE is missing'):
      command(*args, config=())


def test_wrong_type(command):
  """A word where a number belongs is an error that names the flag."""
  with pytest.raises(SystemExit) as info:
    command('--config.train.group=many')
  assert 'error:' in str(info.value) and 'train.group' in str(info.value)


def test_stray_argument(command):
  """`config.seed=1` without its dashes is not silently dropped."""
  with pytest.raises(SystemExit, match='config.seed=1.*--name=value'):
    command('config.seed=1')


def test_sweep_points(command, config_file):
  """Point i is applied; set twice, out of range and unknown are refused."""

  def applied(*args):
    def read(_):
      c = main.CONFIG.value
      main.apply_sweep(c, flags.FLAGS['config'], main.SWEEP.value)
      return c

    return command(*args, function=read)

  c = applied('--sweep=rates:1', '--config.train.inner=3')
  assert (c.optim.lr, c.seed, c.train.inner, c.name) == (1e-4, 7, 3, 'mine')
  assert applied('--sweep=rates:0').optim.lr == 1e-3
  for bad in ('rates:2', 'rates', 'rates:x', 'rates:-1'):
    with pytest.raises(ValueError, match='rates:i with i from 0 to 1'):
      applied(f'--sweep={bad}')
  with pytest.raises(ValueError, match="'optim.lr'.*set both by --sweep"):
    applied('--sweep=rates:0', '--config.optim.lr=1')
  with pytest.raises(ValueError, match='--sweep=rate: .*has only rates'):
    applied('--sweep=rate:0')
  with pytest.raises(ValueError, match=r'quickstart.py has no sweep\(name\)'):
    main.points_of(str(ROOT / 'configs' / 'quickstart.py'), 'rates')
  # A point is still only a config: the file itself is not changed.
  assert main.module(config_file).get_config().seed == 0


# --- the workdir


def test_default_workdir_is_a_function_of_the_config(tmp_path, monkeypatch):
  """Same config, same folder; any field moves it; config.json is inside."""
  monkeypatch.chdir(tmp_path)
  first = main.settle(tiny(), '')
  assert main.settle(tiny(), '') == first
  assert first.startswith('runs/base-')
  others = [
    main.settle(tiny(**change), '')
    for change in ({'seed': 1}, {'optim.lr': 1.0}, {'name': 'x'})
  ]
  assert len({first, *others}) == 4
  written = json.loads((tmp_path / first / 'config.json').read_text())
  assert check.flatten(written) == check.flatten(
    json.loads(tiny().to_json())
  )  # a tuple comes back as a list


def test_workdir_of_another_config(tmp_path):
  """It is refused, and what differs is listed; what may differ is named."""
  workdir = str(tmp_path / 'run')
  assert main.settle(tiny(), workdir) == workdir
  before = (tmp_path / 'run' / 'config.json').read_text()
  with pytest.raises(ValueError) as info:
    main.settle(tiny(**{'optim.lr': 0.5, 'train.inner': 7}), workdir)
  said = str(info.value)
  assert f'--workdir={workdir}' in said and 'seed' not in said
  assert f'optim.lr: {tiny().optim.lr!r} there, 0.5 here' in said
  assert 'train.inner: ' in said and ', 7 here' in said
  assert (tmp_path / 'run' / 'config.json').read_text() == before
  assert 'only log., checkpoint., mesh.' in said
  main.settle(tiny(**{'log.samples': 9, 'checkpoint.every': 3}), workdir)


def test_two_runs_in_one_workdir(tmp_path):
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


def test_damaged_config_of_a_workdir(tmp_path):
  """A sentence that names the file, and what to do."""
  workdir = str(tmp_path / 'run')
  main.settle(tiny(), workdir)
  path = tmp_path / 'run' / 'config.json'
  path.write_text(path.read_text()[:100])
  with pytest.raises(ValueError, match='config.json is damaged.*remove it'):
    main.settle(tiny(), workdir)


def test_command_settles_and_trains_once(command, monkeypatch, tmp_path, capsys):
  """Training leaves results; the same command then says that it is done."""
  params = {'params': {}}
  seconds = {'sft': 2.0, 'rl': 3.0}
  monkeypatch.setattr(train, 'run', lambda name, *_: (params, seconds[name]))
  monkeypatch.setattr(
    evaluate,
    'accuracy',
    lambda *_: ({'accuracy': 0.5, 'reward': 1.0}, [{'completion': 'x'}]),
  )
  monkeypatch.setattr(report, 'curves', lambda workdir: None)
  monkeypatch.setattr(report, 'summary', lambda workdir: 'the summary')
  command('--workdir=run', '--config.seed=3')
  assert capsys.readouterr().out == 'the summary\n'
  results = json.loads((tmp_path / 'run' / 'results.json').read_text())
  assert results['base'] == results['final'] == {'accuracy': 0.5, 'reward': 1.0}
  assert results['seconds']['total'] == 5.0 and results['seed'] == 3
  assert results['config'] == 'mine' and 'jax' in results['versions']
  assert (tmp_path / 'run' / 'test_final.jsonl').read_text() == (
    '{"completion": "x"}\n'
  )
  assert (tmp_path / 'run' / 'tokenizer' / 'tokenizer.json').exists()

  def again(*_):
    raise AssertionError('a finished run was run again')

  monkeypatch.setattr(train, 'run', again)
  command('--workdir=run', '--config.seed=3')
  out = capsys.readouterr().out
  assert 'this run is done' in out and 'the summary' in out
  with pytest.raises(SystemExit, match='seed: 3 there, 4 here'):
    command('--workdir=run', '--config.seed=4')


def test_only_the_base_model(command, monkeypatch, capsys):
  """--mode=sft stops after supervised training and leaves no results."""
  monkeypatch.setattr(train, 'run', lambda *_: ({}, 2.0))
  command('--workdir=run', '--mode=sft')
  assert 'base model in run/sft' in capsys.readouterr().out
  assert not os.path.exists('run/results.json')


def test_bad_numbers_are_one_sentence(command, monkeypatch):
  """A run that stops on nan ends with the sentence, not with a traceback."""

  def stop(*_):
    raise FloatingPointError('not finite at update 3')

  monkeypatch.setattr(train, 'run', stop)
  monkeypatch.delenv('DMPO_TRACEBACK', raising=False)
  with pytest.raises(SystemExit, match='^error: not finite at update 3$'):
    command('--workdir=run')
  monkeypatch.setenv('DMPO_TRACEBACK', '1')
  with pytest.raises(FloatingPointError):
    command('--workdir=run')


def test_collapse_has_its_exit_code(command, monkeypatch, tmp_path, capsys):
  """77 and the sentence; the run is not taken for done."""

  def run(name, *_):
    return ({}, 2.0) if name == 'sft' else guard.collapsed('all is EOS')

  monkeypatch.setattr(train, 'run', run)
  with pytest.raises(SystemExit) as info:
    command('--workdir=run')
  assert info.value.code == 77
  assert capsys.readouterr().err.endswith('error: all is EOS\n')
  assert not (tmp_path / 'run' / 'results.json').exists()


def test_report_mode(command, monkeypatch, capsys):
  """It needs a workdir only: curves, and a summary of what there is."""
  monkeypatch.setattr(report, 'curves', lambda workdir: f'{workdir}/c.png')
  monkeypatch.setattr(report, 'summary', lambda workdir: 'before and after')
  main.settle(tiny(), 'run')
  with metrics.Writer('run') as writer:
    writer.write('rl', 0, {'reward': 1.0})
  command('--workdir=run', '--mode=report')
  said = capsys.readouterr().out
  assert said.startswith('run/c.png\niteration 0 of 100, update 0; last line')
  assert 'reward 1\n' in said and 'none yet' in said
  pathlib.Path('run/results.json').write_text('{}')
  command('--workdir=run', '--mode=report')
  assert capsys.readouterr().out == 'run/c.png\nbefore and after\n'
  with pytest.raises(SystemExit, match='error: .*config.json'):
    command('--workdir=nowhere', '--mode=report')


def test_report_of_a_run_that_has_written_nothing(command, capsys):
  """How far it is, without a picture."""
  main.settle(tiny(), 'run')
  command('--workdir=run', '--mode=report')
  assert capsys.readouterr().out.startswith('supervised step 0 of')


# --- what main alone does


def test_starts_are_recorded(command, monkeypatch, tmp_path):
  """What the command line changed and the seeds, once for each start."""
  monkeypatch.setattr(train, 'run', lambda *_: ({}, 2.0))
  for _ in range(2):
    command('--workdir=run', '--mode=sft', '--config.seed=3', '--sweep=rates:0')
  found = json.loads((tmp_path / 'run' / 'provenance.json').read_text())
  assert len(found) == 2
  for entry in found:
    assert entry['overrides'] == {'seed': 3, 'sweep': 'rates:0'}
    assert entry['seeds'] == {'seed': 3, 'data.seed': 0}


def test_watchdog_of_a_run(command, monkeypatch):
  """log.stuck_minutes is its limit; it writes into the workdir."""
  dogs = []

  def run(name, session):
    dogs.append(session.beat.__self__)
    return {}, 0.0

  monkeypatch.setattr(train, 'run', run)
  command('--workdir=run', '--mode=sft', '--config.log.stuck_minutes=2')
  command('--workdir=run', '--mode=sft')
  assert [dog._limit for dog in dogs] == [120, 0]
  assert dogs[0].path == os.path.join('run', 'stuck_0.txt')


def test_hanging_start(config_file, tmp_path):
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


def test_programs_are_cached_per_user(updates, monkeypatch, tmp_path):
  """In a directory that nobody else may enter; not for CPUs."""
  main.cache_programs(tiny())
  folder = tmp_path / 'mine' / 'dmpo_jax' / 'programs'
  assert updates == {'jax_compilation_cache_dir': str(folder)}
  assert folder.stat().st_mode & 0o777 == 0o700
  monkeypatch.setattr(os, 'getuid', lambda: folder.stat().st_uid + 1)
  with pytest.raises(ValueError, match='belongs to another user: set XDG_'):
    main.cache_programs(tiny())
  updates.clear()
  monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
  main.cache_programs(tiny())
  assert updates == {}


def test_no_cache_of_programs(updates, tmp_path):
  """config.cache = False turns it off, that of the environment, too."""
  main.cache_programs(tiny(cache=False))
  assert updates == {'jax_enable_compilation_cache': False}
  assert not (tmp_path / 'mine').exists()


# --- data files


def test_bad_data_file_names_its_line(tmp_path):
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
  export.save_adapter(
    str(tmp_path / 'adapter'),
    dataclasses.replace(cfg, lora_alpha=c.lora.alpha),
    {'lora': lora},
  )
  read = build.build(c).steps.init_lora()['lora']
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), read, lora)


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
  export.save_hf(str(folder), cfg, weights_of(cfg), ids, shard_bytes=20_000)
  assert (folder / weights.INDEX).exists()
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
  cards = {
    length: json.loads(
      (tmp_path / f'cards/gsm8k_latest_{length}_{length}.card.json').read_text()
    )
    for length in (16, 32, 48)
  }
  for length, card in cards.items():
    assert f'at {length} tokens, {length} steps' in said
    assert card['problems'] == 9 and card['samples'] == 2
    assert card['forwards'] == length and 1 <= card['tokens'] <= length
    assert card['accuracy'] <= card['pass@2'] <= 1
    assert card['interval'] == evaluate.wilson(card['accuracy'], 9)
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
  command('--mode=report', '--cards=cards/*.card.json')
  assert '| 48 |' in capsys.readouterr().out
  assert (tmp_path / 'cards.png').stat().st_size > 1000
  command(*settings, '--mode=sample', '--problem=3', '--html=page.html')
  said = capsys.readouterr().out
  assert '3 and test?' in said and '16 steps' in said
  assert '<table>' in (tmp_path / 'page.html').read_text()
  command(*settings, '--mode=sample', '--prompt=How much is it?')
  said = capsys.readouterr().out
  assert said.startswith('How much is it?') and 'grade' not in said
  with pytest.raises(SystemExit, match='--problem=9 must be in 0 to 8'):
    command(*settings, '--mode=sample', '--problem=9')


def strip(line):
  """A saved generation without its time."""
  return {k: v for k, v in json.loads(line).items() if k != 'seconds'}


def test_generations_that_are_refused(command, tmp_path):
  """One sentence: which file, which generation, what it lacks."""
  path = tmp_path / 'x.json'
  good = {'question': '0' * 16, 'generations': '', 'ground_truth': '1' * 16}
  for value, message in (
    ('{', 'x.json: not JSON'),
    ('[]', 'no list of generations'),
    ('{"generations": []}', 'no list of generations, or an empty'),
    ('{"generations": ["x"]}', 'generation 0 is no object with fields'),
    (
      json.dumps({'generations': [{**good, 'ground_truth': None}]}),
      'generation 0 has no ground_truth',
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


def test_evaluation_finds_its_run(command, monkeypatch, tmp_path):
  """Without --workdir, whatever may be judged otherwise than it was trained."""
  found = []
  monkeypatch.setattr(main, 'run_train', lambda *args: found.append(args[1]))
  monkeypatch.setattr(main, 'run_eval', lambda *args: found.append(args[1]))
  monkeypatch.setattr(main.report, 'summary', lambda workdir: '')
  trained = ('--config.seed=5', '--config.optim.lr=1e-3')
  command(*trained)
  command(
    *trained,
    '--mode=eval',
    '--config.eval.lengths=(32,)',
    '--config.reward.deadline=1.0',
  )
  command('--mode=eval', '--config.eval.lengths=(32,)')  # was never trained
  command(
    *trained,
    '--mode=eval',
    '--config.data.protocol=paper',
    '--config.data.test_size=9',
    '--config.eval.samples=1',
  )
  assert found[0] == found[1] == found[3] != found[2]
  text = (tmp_path / found[0] / 'config.json').read_text()
  assert json.loads(text)['eval']['lengths'] == []


def test_a_cpu_can_be_several_devices():
  """mesh.cpu splits it, unless XLA_FLAGS already has."""
  code = (
    'import sys, jax; from dmpo_jax import cli;'
    'cli.split_cpu(int(sys.argv[1]));print(jax.device_count())'
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
