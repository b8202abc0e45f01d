"""A run's metrics survive delays, kills and resumption; its progress is shown."""

import importlib.util
import io
import json
import logging
import math
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from dmpo_jax import boards, files, metrics


def scalars(workdir, phase):
  """Returns (step, tag, value) of a phase's event files, and their purge steps."""
  from tensorboardX.proto import event_pb2

  values, purges = [], []
  for path in sorted((workdir / 'tensorboard' / phase).iterdir()):
    data = path.read_bytes()
    while data:  # TFRecord: length, its crc, payload, its crc
      size = int.from_bytes(data[:8], 'little')
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      if event.HasField('session_log'):
        purges.append(event.step)
      for value in event.summary.value:
        values.append((event.step, value.tag, value.simple_value))
  return values, purges


def steps(workdir, phase):
  rows = metrics.read(workdir)
  return [row['step'] for row in rows if row['phase'] == phase]


class Device:
  """Stands for a device scalar; records when it is copied and fetched."""

  def __init__(self, value, log):
    self.value, self.log = value, log

  def copy_to_host_async(self):
    self.log.append(('copy', self.value))

  def __array__(self, dtype=None, copy=None):
    self.log.append(('fetch', self.value))
    return np.asarray(self.value, dtype)


@pytest.mark.smoke
def test_write_and_read(tmp_path):
  with metrics.Writer(tmp_path / 'new' / 'run') as writer:
    writer.write('rl', 3, {'reward': np.float32(0.5), 'n': 2, 'a': np.ones(1)})
  (row,) = metrics.read(tmp_path / 'new' / 'run')
  time = row.pop('time')
  assert time == round(time, 2) > 1.6e9
  assert row == {'phase': 'rl', 'step': 3, 'reward': 0.5, 'n': 2.0, 'a': 1.0}
  values, purges = scalars(tmp_path / 'new' / 'run', 'rl')
  assert (3, 'rl/reward', 0.5) in values and len(values) == 3
  assert not purges


def test_bad_metrics_are_named(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    with pytest.raises(ValueError, match="'wide' has shape"):
      writer.write('rl', 0, {'wide': np.ones(2)})
    with pytest.raises(ValueError, match="'step'"):
      writer.write('rl', 0, {'step': 1.0})
  assert metrics.read(tmp_path) == []


def test_late_fetches_one_step_late_and_per_phase(tmp_path):
  log = []
  with metrics.Writer(tmp_path) as writer:
    assert writer.late('update', 1, {'loss': Device(10, log)}) is None
    assert log == [('copy', 10)]
    assert writer.late('rl', 1, {'loss': Device(5, log)}) is None
    assert ('fetch', 10) not in log
    written = writer.late('update', 2, {'loss': Device(20, log)})
    assert written == {'step': 1, 'loss': 10.0}
    # The copy of the new step is under way before the host waits for the old.
    assert log[-2:] == [('copy', 20), ('fetch', 10)]
    assert steps(tmp_path, 'update') == [1]
    assert writer.flush() == {'step': 2, 'loss': 20.0}
    assert writer.flush() is None
    assert steps(tmp_path, 'rl') == [1]
    writer.late('update', 3, {'loss': Device(30, log)})
  assert steps(tmp_path, 'update') == [1, 2, 3]  # closing writes the last


def test_nonfinite_round_trip(tmp_path):
  values = {'a': math.nan, 'b': math.inf, 'c': -np.inf, 'd': np.float32('nan')}
  with metrics.Writer(tmp_path) as writer:
    writer.write('rl', 0, values)

  def refuse(name):
    raise AssertionError(f'{name} is not JSON')

  text = (tmp_path / metrics.FILE).read_text()
  strict = json.loads(text, parse_constant=refuse)
  assert (strict['a'], strict['b'], strict['c']) == ('nan', 'inf', '-inf')
  (row,) = metrics.read(tmp_path)
  assert math.isnan(row['a']) and math.isnan(row['d'])
  assert (row['b'], row['c']) == (math.inf, -math.inf)


def test_rewind_drops_exactly_the_rows_that_are_redone(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    for step in range(5):
      writer.write('rl', step, {'x': step})
      writer.write('update', 10 * step, {'x': step})
  path = tmp_path / metrics.FILE
  before = path.read_text().splitlines()
  with open(path, 'a') as f:
    f.write('{"phase": "rl", "step": 5, "x"')
  assert len(metrics.read(tmp_path)) == 10

  with metrics.Writer(tmp_path) as writer:
    assert path.read_text().splitlines() == before  # the torn line is gone
    writer.late('rl', 9, {'x': 9})
    writer.rewind('rl', 2)
    writer.write('rl', 3, {'x': 30})
  after = path.read_text().splitlines()
  kept = [line for line in before if json.loads(line)['step'] not in (3, 4)]
  assert after[:-1] == kept
  assert steps(tmp_path, 'rl') == [0, 1, 2, 3]
  assert steps(tmp_path, 'update') == [0, 10, 20, 30, 40]
  assert [p.name for p in tmp_path.glob('*.new')] == []
  # TensorBoard forgets the phase's later steps, and no other phase's.
  values, purges = scalars(tmp_path, 'rl')
  assert purges == [3] and (3, 'rl/x', 30) in values and len(values) == 6
  assert scalars(tmp_path, 'update')[1] == []


def test_rewind_of_open_phase_keeps_its_event_file(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    writer.write('rl', 1, {'x': 1})
    writer.rewind('rl', 1)
    writer.write('rl', 2, {'x': 2})
  values, purges = scalars(tmp_path, 'rl')
  assert values == [(1, 'rl/x', 1), (2, 'rl/x', 2)] and purges == [2]


class FakeWandb(types.ModuleType):
  """Stands for the package: notes what a run is given."""

  Error = RuntimeError

  def __init__(self):
    super().__init__('wandb')
    self.__spec__ = importlib.util.spec_from_loader('wandb', None)
    self.starts, self.rows, self.axes = [], [], {}

  def init(self, **options):
    if options['project'] == 'refused':
      raise self.Error('no\n API key')
    self.starts.append(options)
    return self

  def define_metric(self, name, step_metric=None, hidden=False):
    self.axes[name] = step_metric

  def log(self, row):
    self.rows.append(row)

  def finish(self):
    self.starts[-1]['done'] = True


def test_dashboards_get_the_names_of_the_file(tmp_path, monkeypatch):
  """W&B, TensorBoard and JSONL agree; a resumed workdir keeps its W&B run."""
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  boards.check('mine')
  given = dict(config={'objective.alpha': 0.5, 'seed': 3}, wandb='mine')
  with metrics.Writer(tmp_path / 'run', **given) as writer:
    writer.write('rl', 1, {'reward': 0.5, 'reward/format': 1.0})
    writer.late('update', 7, {'loss': 0.25})
  with metrics.Writer(tmp_path / 'run', **given) as writer:
    writer.rewind('rl', 0)
    writer.write('rl', 1, {'reward': 0.5, 'reward/format': 1.0})
  with metrics.Writer(tmp_path / 'run', enabled=False, wandb='mine') as writer:
    writer.write('rl', 2, {'reward': 0.5})  # another process
  first, again = fake.starts
  assert first == again and first['done'] and first['resume'] == 'allow'
  assert first['config'] == given['config'] and first['project'] == 'mine'
  assert first['name'] == 'run' and first['id']
  row = {'rl/step': 1, 'rl/reward': 0.5, 'rl/reward/format': 1.0}
  assert fake.rows == [row, {'update/step': 7, 'update/loss': 0.25}, row]
  assert fake.axes['rl/*'] == 'rl/step' and fake.axes['update/*'] == 'update/step'
  tags = {tag for _, tag, _ in scalars(tmp_path / 'run', 'rl')[0]}
  in_file = {
    f'rl/{name}' for row in metrics.read(tmp_path / 'run') if row['phase'] == 'rl'
    for name in row if name not in metrics.RESERVED
  }  # fmt: skip
  assert tags == in_file == set(row) - {'rl/step'}
  events = [x.read_bytes() for x in (tmp_path / 'run/tensorboard/config').iterdir()]
  assert len(events) == 2 and all(b'| objective.alpha | `0.5` |' in x for x in events)


def test_wandb_that_cannot_be_had_is_one_sentence(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', FakeWandb())
  with pytest.raises(ValueError, match='log.wandb = refused: no API key.*WANDB_MODE'):
    metrics.Writer(tmp_path, wandb='refused')
  monkeypatch.delitem(sys.modules, 'wandb')
  monkeypatch.setattr(boards.importlib.util, 'find_spec', lambda name: None)
  boards.check('')
  with pytest.raises(ValueError, match='log.wandb = mine needs .*pip install'):
    boards.check('mine')


def test_bad_line_before_the_last_is_an_error(tmp_path):
  (tmp_path / metrics.FILE).write_text('{"phase": "rl"\n{"phase": "rl"}\n')
  with pytest.raises(ValueError, match='line 1'):
    metrics.read(tmp_path)


def test_disabled_writer_only_returns_values(tmp_path):
  with metrics.Writer(tmp_path / 'run', enabled=False) as writer:
    writer.late('rl', 0, {'x': 1})
    assert writer.late('rl', 1, {'x': 2}) == {'step': 0, 'x': 1.0}
    writer.rewind('rl', 0)
    assert writer.flush() is None
  assert not (tmp_path / 'run').exists()
  assert metrics.read(tmp_path / 'run') == []


@pytest.fixture
def lines(monkeypatch):
  logged = []
  monkeypatch.setattr(sys, 'stderr', io.StringIO())
  monkeypatch.setattr(
    metrics.logging, 'info', lambda form, *args: logged.append(form % args)
  )
  return logged


def test_progress_logs_at_intervals_and_the_last(lines):
  progress = metrics.Progress(100, 'rl', start=90, every_seconds=1e9)
  for step in range(91, 101):
    progress.update(step, {'reward': step / 100, 'unshown': 1.0})
  progress.close()
  assert lines == ['rl 91/100, ? left, reward 0.91',
                   'rl 100/100, 00:00 left, reward 1']  # fmt: skip


def test_progress_logs_the_last_of_a_run_cut_short(lines):
  progress = metrics.Progress(100, 'sft', every_seconds=1e9)
  progress.update(1, {})
  progress.update(2, {})
  assert lines == ['sft 1/100, ? left']
  progress.close()
  progress.close()
  assert lines[1:] == ['sft 2/100, 00:00 left']


def test_progress_logs_every_step_when_slow(lines):
  progress = metrics.Progress(3, 'rl', every_seconds=0)
  for step in (1, 2, 3):
    progress.update(step, {})
  assert len(lines) == 3


def test_time_left_counts_whole_buffers_without_compilation(lines, monkeypatch):
  """A buffer is sampled for 20 s and has two updates of 5 s; compiling takes 500 s."""
  now = [0.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  with metrics.Progress(12, 'rl', start=1, every_seconds=0, stride=2) as progress:
    with metrics.waiting('validating'):
      now[0] += 40
    now[0] += 7  # work before the first buffer is in no buffer
    progress.begin(1)
    for step in range(2, 8):
      with metrics.waiting('compiling'), metrics.waiting('compiling more'):
        now[0] += 500 * (step in (2, 5))
      with metrics.waiting('validating', idle=False):
        now[0] += 2 * (step == 6)
      now[0] += 5 + 20 * (step % 2)
      progress.update(step, {})
  assert metrics.Progress.current is None
  said = [line.split(', ')[1] for line in lines if line.startswith('rl ')]
  # The first whole buffer is updates 3 and 4; validation is in the third one.
  assert said == [
    *['? left'] * 2, '02:00 left', '02:00 left', '01:33 left', '01:33 left',
  ]  # fmt: skip
  named = [line for line in lines if line.startswith('rl: ')]
  assert named[:2] == ['rl: validating ...', 'rl: compiling ...']
  assert set(named) == set(named[:2])  # the inner one and what counts say nothing
  with metrics.waiting('evaluating'):
    assert lines[-1] == 'evaluating ...'


def test_progress_bar_on_a_terminal(lines, monkeypatch):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr(sys, 'stderr', terminal)
  progress = metrics.Progress(10, 'rl', start=4, note='at temperature 0.8')
  with metrics.waiting('validating', idle=False):
    with metrics.waiting('compiling sample'):
      assert 'compiling sample ...' in terminal.getvalue()
    assert terminal.getvalue().rstrip().endswith('validating ...')
  line = logging.makeLogRecord({'levelno': logging.WARNING})
  metrics.logging.get_absl_handler().filter(line)
  assert terminal.getvalue().endswith('\r')  # a log line has a line of its own
  progress.update(10, {'accuracy': 0.25, 'loss': 2.0, 'validation': 0.5})
  progress.close()
  shown = terminal.getvalue()
  assert 'rl' in shown and '10/10' in shown
  assert '? left' not in shown.rpartition('10/10')[2]
  assert 'at temperature 0.8: accuracy 0.25, validation 0.5, loss 2' in shown
  assert not lines


def test_json_lines_are_rewound(tmp_path):
  """Rows of later iterations and a torn last line go; a clean file stays as it is."""
  path = tmp_path / 'samples.jsonl'
  rewind = lambda last: files.keep(path, lambda row: row['iteration'] <= last)
  rewind(3)
  assert files.read(path) == [] and not path.exists()
  rows = [{'iteration': i, 'text': 'ä\n\u2028'} for i in range(4)]
  files.append(path, rows)
  before = path.stat().st_ino
  rewind(3)
  assert path.stat().st_ino == before and files.read(path) == rows
  with open(path, 'a') as f:
    f.write('{"iteration": 1, "te')
  assert files.read(path) == rows
  rewind(1)
  assert path.read_text() == files.to_lines(rows[:2])


def test_replace_writes_all_or_nothing(tmp_path):
  path = tmp_path / 'file'
  files.replace(path, 'text')
  with pytest.raises(UnicodeEncodeError):
    files.replace(path, '\ud800')
  assert path.read_text() == 'text'
  files.replace(path, b'bytes')
  assert path.read_bytes() == b'bytes' and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_every_metric_of_a_run_is_explained(tmp_path):
  """A run of two iterations writes no name that METRICS lacks."""
  root = pathlib.Path(__file__).parents[1]
  fields = {
    'model.width': 16,
    'model.layers': 1,
    'sft.steps': 2,
    'train.iterations': 2,
    'train.prompts': 4,
    'data.train_size': 16,
    'data.validation_size': 8,
    'data.test_size': 8,
  }
  command = [sys.executable, root / 'main.py', '--config=configs/quickstart.py']
  flags = [f'--config.{name}={value}' for name, value in fields.items()]
  one_device = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1')
  subprocess.run(
    [*command, f'--workdir={tmp_path}', *flags],
    cwd=root,
    check=True,
    timeout=300,
    env={**os.environ, 'XLA_FLAGS': one_device},
  )
  rows = metrics.read(tmp_path)
  assert {row['phase'] for row in rows} == {'sft', 'rl', 'update', 'eval'}
  names = {name for row in rows for name in row if name not in metrics.RESERVED}
  assert [name for name in sorted(names) if not metrics.meaning(name)] == []


def test_metrics_are_explained_by_name_or_prefix():
  assert metrics.meaning('reward') == metrics.METRICS['reward']
  assert metrics.meaning('reward/correctness') == metrics.METRICS['reward/']
  assert metrics.meaning('ess/x') == metrics.meaning('unknown') == ''
  assert all(line.count('; ') == 1 for line in metrics.METRICS.values())


def test_clock(monkeypatch):
  """A part inside another stops the outer clock, so that the sums are the time."""
  times = [0.0, 1.0, 5.0, 5.5, 7.0, 8.0, 8.5, 10.0, 11.0]
  now = iter(times)
  monkeypatch.setattr(metrics.time, 'perf_counter', lambda: next(now))
  clock = metrics.Clock()
  with clock('sample'):
    with clock('score'):
      pass
  with pytest.raises(KeyError), clock('train'):
    raise KeyError
  taken = clock.take()
  assert taken == {
    'seconds/between': 3.5, 'seconds/sample': 5.5, 'seconds/score': 0.5,
    'seconds/train': 0.5,
  }  # fmt: skip
  assert sum(taken.values()) == 10.0
  assert clock.take() == {'seconds/between': 1.0}
