"""Tests pictures, tables and the status of runs, finished or not."""

import json
import os
import pathlib
import re

import numpy as np
import pytest

from dmpo_jax import metrics
from dmpo_jax.tools import provenance, report, status

PNG = b'\x89PNG\r\n\x1a\n'


def write_run(workdir, *, seed=0, baseline='mean', final=0.6, length=40):
  """Writes a finished run's folder, with plausible noisy curves."""
  rng = np.random.default_rng(seed)
  with metrics.Writer(workdir) as writer:
    for step in range(length):
      loss = 2 * np.exp(-step / 10) + rng.normal(0, 0.05)
      writer.write('sft', step, {'loss': loss, 'grad_norm': 1 + loss})
    for step in range(length):
      accuracy = 0.2 + (final - 0.2) * step / length + rng.normal(0, 0.04)
      writer.write('rl', step, {
        'reward': 2 * accuracy, 'accuracy': accuracy, 'ess': 1 - accuracy / 2,
        'log_rnd_std': 1 + rng.normal(0, 0.1),
      })  # fmt: skip
      for inner in range(2):
        grad = np.inf if step == 3 else rng.gamma(4)
        values = {'loss': rng.normal(), 'grad_norm': grad}
        writer.write('update', 2 * step + inner, values)
      if step % 10 == 0:
        writer.write('eval', step, {'accuracy': accuracy, 'reward': accuracy})
  config = {'seed': seed, 'objective': {'baseline': baseline}}
  results = {
    'base': {'accuracy': 0.2, 'cell_accuracy': 0.5, 'reward': 0.4},
    'final': {'accuracy': final, 'cell_accuracy': 0.8, 'reward': 2 * final},
    'seconds': {'sft': 20, 'rl': 80, 'total': 100},
    'seed': seed, 'config': config, 'versions': {},
  }  # fmt: skip
  (workdir / 'config.json').write_text(json.dumps(config))
  (workdir / 'results.json').write_text(json.dumps(results))


def is_png(path):
  return path.read_bytes().startswith(PNG) and path.stat().st_size > 5000


@pytest.mark.smoke
def test_curves_follow_the_data(tmp_path):
  write_run(tmp_path)
  path = report.curves(tmp_path)
  assert path == tmp_path / 'curves.png' and is_png(path)
  first = path.read_bytes()
  report.curves(tmp_path)
  assert path.read_bytes() == first
  with metrics.Writer(tmp_path) as writer:
    writer.write('rl', 40, {'reward': 3.0})
  report.curves(tmp_path)
  assert path.read_bytes() != first and is_png(path)
  assert not list(tmp_path.glob('*.tmp'))


def test_curves_of_a_run_under_way(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    writer.write('rl', 0, {'reward': 1.0, 'ess': np.nan})
  with open(tmp_path / metrics.FILE, 'a') as f:
    f.write('{"phase": "rl", "st')
  assert is_png(report.curves(tmp_path))


def test_curves_show_the_test_and_explain_their_terms(tmp_path, monkeypatch):
  """The test's numbers before and after; each panel's title is a term of the docs."""
  figures = []
  monkeypatch.setattr(report, 'save', lambda figure, path: figures.append(figure))
  write_run(tmp_path, final=0.6)
  report.curves(tmp_path)
  (tmp_path / 'results.json').unlink()
  report.curves(tmp_path)
  done, going = (
    {ax.get_title('left').partition(':')[0]: ax for ax in figure.axes}
    for figure in figures
  )
  legend = [text.get_text() for text in done['rl/accuracy'].get_legend().get_texts()]
  assert legend[-2:] == ['test before 0.200', 'test after 0.600']
  (star,) = [line for line in done['rl/accuracy'].lines if line.get_marker() == '*']
  assert (star.get_xdata()[0], star.get_ydata()[0]) == (39, 0.6)
  texts = going['rl/accuracy'].get_legend().get_texts()
  assert not [text for text in texts if 'test' in text.get_text()]
  docs = pathlib.Path(__file__).parents[1] / 'docs'
  rows = re.findall(r'^\| `(\w+)', (docs / 'metrics.md').read_text(), re.M)
  assert len(done) == 8 and {name.split('/')[1] for name in done} <= set(rows)
  # Words of the titles and axes that are ours.
  words = ['iteration', 'update', 'group', 'ess', 'log rnd', 'completion', 'grade']
  glossary = (docs / 'glossary.md').read_text().lower()
  assert [word for word in words if f'\n| {word}' not in glossary] == []


def test_title_names_config_seed_date_and_commit(tmp_path):
  assert report.title_of(tmp_path) == tmp_path.name
  (tmp_path / 'config.json').write_text('{"name": "quick", "seed": 3}')
  assert report.title_of(tmp_path) == 'quick, seed 3'
  start = {'time': '2026-01-02T03:04:05+00:00', 'git': {}}
  provenance.append(tmp_path, start)
  assert report.title_of(tmp_path) == 'quick, seed 3, 2026-01-02'
  provenance.append(tmp_path, start | {'git': {'revision': 'a' * 40, 'diff': ''}})
  assert report.title_of(tmp_path).endswith(', commit aaaaaaaa')


def test_no_data_is_an_error(tmp_path):
  with pytest.raises(ValueError, match='no data'):
    report.curves(tmp_path)
  with metrics.Writer(tmp_path) as writer:
    writer.write('rl', 0, {'reward': np.nan})
  with pytest.raises(ValueError, match='no data'):
    report.curves(tmp_path)


def test_series_takes_the_last_of_a_step():
  rows = [
    {'phase': 'rl', 'step': 2, 'x': 5.0},
    {'phase': 'rl', 'step': 1, 'x': 3.0},
    {'phase': 'rl', 'step': 2, 'x': 7.0},
    {'phase': 'rl', 'step': 3},
    {'phase': 'eval', 'step': 9, 'x': 9.0},
  ]
  steps, values = report.series(rows, 'rl', 'x')
  assert steps.tolist() == [1, 2] and values.tolist() == [3, 7]


def test_running_mean():
  values = np.array([1.0, 3.0, np.nan, 5.0, 10.0, 0.0])
  got = report.running_mean(values, 3)
  np.testing.assert_allclose(got, [1, 2, 4, 7.5, 5, 0])
  assert np.isnan(report.running_mean(np.array([np.nan]), 3)).all()


def test_compare_groups_runs(tmp_path, monkeypatch):
  runs = []
  for baseline, seed, final in (
    ('mean', 0, 0.6), ('none', 0, 0.3), ('mean', 1, 0.8),
  ):  # fmt: skip
    runs.append(tmp_path / f'{baseline}{seed}')
    write_run(runs[-1], seed=seed, baseline=baseline, final=final, length=21)
  out = tmp_path / 'out' / 'v1.2.png'
  markdown, path = report.compare(runs, 'objective.baseline', out)
  assert path == out and is_png(out)
  assert (tmp_path / 'out' / 'v1.2.md').read_text() == markdown
  assert report.compare(runs, 'objective.baseline')[1] == tmp_path / 'comparison.png'
  # Not into the current folder, which is a project's.
  monkeypatch.chdir(tmp_path)
  for below, given in ((tmp_path, runs), ('.', [path.name for path in runs])):
    assert report._out_path('', [below / path for path in map(pathlib.Path, given)],
                            'a.png') == pathlib.Path('runs/a.png')  # fmt: skip
  inside = [pathlib.Path('x/a/r'), tmp_path / 'x/b/r']
  assert report._out_path('', inside, 'a.png') == pathlib.Path('x/a.png')
  assert markdown.splitlines()[2:] == [
    '| mean | 0, 1 | 0.200 | 0.700 ± 0.141 | 1.400 | 100 |',
    '| none | 0 | 0.200 | 0.300 | 0.600 | 100 |',
  ]


def test_compare_names_the_run_at_fault(tmp_path):
  a, b, c = tmp_path / 'a', tmp_path / 'b', tmp_path / 'c'
  for workdir in (a, b, c):
    write_run(workdir, seed=0 if workdir != b else 1, length=5)
  out = tmp_path / 'out.png'
  with pytest.raises(ValueError, match='both have .*mean, seed=0: name fewer'):
    report.compare([a, b, c], 'objective.baseline', out)
  config = json.loads((c / 'config.json').read_text())
  config['objective']['alpha'] = 0.5
  (c / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r'--by in which .*\(objective.alpha\)'):
    report.compare([a, b, c], 'objective.baseline', out)
  with pytest.raises(ValueError, match="config.json has no field 'optim.rate'"):
    report.compare([a, b], 'optim.rate', out)
  with pytest.raises(ValueError, match='end in .png'):
    report.compare([a, b], 'seed', tmp_path / 'out')
  with pytest.raises(ValueError, match='no runs'):
    report.compare([], 'seed', out)
  (b / metrics.FILE).unlink()
  with pytest.raises(ValueError, match=f'no eval accuracy in {b}'):
    report.compare([a, b], 'seed', out)
  (b / 'results.json').unlink()
  with pytest.raises(ValueError, match=f'no results.json .*: {b}$'):
    report.compare([a, b], 'seed', out)
  assert not out.exists()


def test_summary(tmp_path):
  with pytest.raises(ValueError, match='no results.json'):
    report.summary(tmp_path)
  write_run(tmp_path, length=1)
  lines = report.summary(tmp_path).splitlines()
  assert lines[0].split() == ['test', 'before', 'after', 'change']
  assert lines[2].split() == ['accuracy', '0.2', '0.6', '0.4']
  assert lines[-1] == 'seed 0; time: sft 00:20, rl 01:20, total 01:40'


def write_start(workdir, starts=(1000.0,)):
  """Writes the files of a run that was started at these times."""
  workdir.mkdir(exist_ok=True)
  (workdir / 'config.json').write_text(json.dumps({
    'train': {'iterations': 50, 'inner': 2}, 'sft': {'steps': 30},
    'eval': {'every': 5}, 'checkpoint': {'every': 6},
  }))  # fmt: skip
  stamp = '1970-01-01T{:02d}:{:02d}:{:02d}+00:00'
  (workdir / 'provenance.json').write_text(json.dumps([
    {'time': stamp.format(int(t) // 3600, int(t) // 60 % 60, int(t) % 60)}
    for t in starts
  ]))  # fmt: skip


def write_rows(workdir, rows):
  with open(workdir / metrics.FILE, 'a') as f:
    for phase, step, time, values in rows:
      row = {'phase': phase, 'step': step, 'time': time, **values}
      f.write(json.dumps(row) + '\n')


def iterations(first, last, time, each=10.0, **values):
  """Yields rows of iterations with two updates each; one of them compiles."""
  for it in range(first, last):
    late = 5.0 if it == first + 1 else 0.0
    time += each + late
    yield (
      'rl',
      it,
      time,
      {
        'reward': 0.5 + it / 100,
        'accuracy': 0.25,
        'ess': 0.75,
        'compilations': bool(late),
        'seconds/compile': late,
        **values,
      },
    )
    for inner in (1, 2):
      yield ('update', 2 * it + inner, time, {'loss': 0.125, 'grad_norm': 2.0})
    if it % 5 == 4:
      yield 'eval', it + 1, time, {'accuracy': 0.3 + (it == 9) / 4}


def test_a_run_under_way(tmp_path):
  """Two sessions are 300 s apart and a line of each file is torn."""
  write_start(tmp_path, (1000.0, 1500.0))
  write_rows(tmp_path, [('sft', 30, 1005.0, {'loss': 1.0})])
  write_rows(tmp_path, iterations(0, 15, 1005.0))
  write_rows(tmp_path, iterations(15, 20, 1500.0))  # the last row: 1555
  for name in ('rl/6', 'rl/36', 'rl/38.orbax-checkpoint-tmp', 'sft/30'):
    (tmp_path / name).mkdir(parents=True)
  os.utime(tmp_path / 'rl' / '36', (1500.0, 1500.0))
  for name in (metrics.FILE, 'health.jsonl'):
    with open(tmp_path / name, 'a') as f:
      f.write('{"phase": "rl", "st')
  assert status.under_way(tmp_path, 1560.0).splitlines() == [
    'iteration 20 of 50, update 40; 10 s per iteration, 05:00 left; '
    'last line 00:05 ago',
    'reward 0.69, accuracy 0.25, ess 0.75, loss 0.125, grad_norm 2',
    'validation 0.3 at iteration 20, best 0.55 at 10',
    'checkpoint: rl/36, 01:00 old',
    'restarts: 1',
  ]


def test_warnings_of_a_run_under_way(tmp_path):
  """Each warning has its number and a file to look at; none without a cause."""
  write_start(tmp_path)
  write_rows(tmp_path, iterations(0, 20, 1000.0))
  assert 'warning' not in status.under_way(tmp_path, 1210.0)
  write_rows(
    tmp_path,
    iterations(20, 23, 1205.0, grades_failed=2.0, policy_age=2.0, compilations=4.0),
  )
  for name in ('failed/update_5.npz', 'rl.damaged/6-1/x', 'stuck_0.txt'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('')
  (tmp_path / 'health.jsonl').write_text(
    '{"iteration": 3, "rule": "ess", "value": 0.12345678}\n{"torn'
  )
  warnings = [
    line.removeprefix('warning: ')
    for line in status.under_way(tmp_path, 5000.0).splitlines()
    if line.startswith('warning: ')
  ]
  assert warnings == [
    '6 answers could not be graded (failed_grades.jsonl)',
    'rollouts are sampled by the policy of 2 updates before',
    '12 programs compiled in the last 20 iterations: some shape changes',
    f'a loss or gradient was not finite: {tmp_path}/failed/update_5.npz',
    f'1 checkpoints were damaged: {tmp_path}/rl.damaged',
    f'the run hung at least once: {tmp_path}/stuck_0.txt',
    'health: iteration 3, rule ess, value 0.1235',
    'no new line for so long: is it still running?',
  ]


def test_run_without_any_spread_is_warned_of(tmp_path):
  """After ten buffers in a row, not after nine."""
  write_start(tmp_path)
  for last, warned in ((9, False), (10, True)):
    (tmp_path / 'metrics.jsonl').unlink(missing_ok=True)
    write_rows(tmp_path, iterations(0, last, 1000.0, equal_reward_groups=1.0))
    said = status.under_way(tmp_path, 1100.0)
    assert ('warning: in the last 10 buffers' in said) == warned


def test_a_run_that_has_hardly_begun(tmp_path):
  """Before the first line, and while the base model is made."""
  write_start(tmp_path)
  assert status.under_way(tmp_path, 1090.0).splitlines() == [
    'supervised step 0 of 30, then 50 iterations; last line 01:30 ago',
    'checkpoint: none yet',
    'restarts: 0',
  ]
  write_rows(tmp_path, [('sft', 12, 1100.0, {'loss': 1.0})])
  (tmp_path / 'sft' / '10').mkdir(parents=True)
  (tmp_path / 'provenance.json').write_text('{"tor')
  text = status.under_way(tmp_path, 1101.0)
  assert text.startswith('supervised step 12 of 30, then 50 iterations; ')
  assert 'checkpoint: sft/10' in text
  (tmp_path / 'config.json').unlink()
  with pytest.raises(FileNotFoundError, match='config.json'):
    status.under_way(tmp_path)


def test_a_run_cut_anywhere_can_be_reported(tmp_path):
  """The metrics may end at any byte."""
  write_start(tmp_path)
  write_rows(tmp_path, iterations(0, 3, 1000.0))
  path = tmp_path / metrics.FILE
  whole, seen = path.read_bytes(), set()
  for size in range(0, len(whole), 37):
    path.write_bytes(whole[:size])
    seen.add(status.under_way(tmp_path, 1040.0).split(';')[0])
  assert seen == {
    'supervised step 0 of 30, then 50 iterations',
    *(f'iteration {update // 2} of 50, update {update}' for update in range(7)),
  }
