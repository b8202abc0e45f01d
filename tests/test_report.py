"""Pictures are drawn from what is there; what is missing is named."""

import json

import numpy as np
import pytest

from dmpo_jax import metrics, report

PNG = b'\x89PNG\r\n\x1a\n'


def write_run(workdir, *, seed=0, baseline='mean', final=0.6, length=40):
  """A finished run's folder, with plausible noisy curves."""
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


def test_curves_show_the_base_accuracy(tmp_path):
  write_run(tmp_path)
  report.curves(tmp_path)
  with_base = (tmp_path / 'curves.png').read_bytes()
  (tmp_path / 'results.json').unlink()
  report.curves(tmp_path)
  assert (tmp_path / 'curves.png').read_bytes() != with_base


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
  np.testing.assert_allclose(got, [2, 2, 4, 7.5, 5, 5])
  assert np.isnan(report.running_mean(np.array([np.nan]), 3)).all()


def test_compare_groups_runs(tmp_path):
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
  assert markdown.splitlines()[2:] == [
    '| mean | 0, 1 | 0.200 | 0.700 ± 0.141 | 1.400 | 100 |',
    '| none | 0 | 0.200 | 0.300 | 0.600 | 100 |',
  ]


def test_compare_names_what_is_wrong(tmp_path):
  a, b, c = tmp_path / 'a', tmp_path / 'b', tmp_path / 'c'
  for workdir in (a, b, c):
    write_run(workdir, seed=0 if workdir != b else 1, length=5)
  out = tmp_path / 'out.png'
  with pytest.raises(ValueError, match='both have .*mean, seed=0'):
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
  assert lines[-1] == 'seed 0; time: sft 20s, rl 1m20s, total 1m40s'
