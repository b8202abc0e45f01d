"""After kill -9 the same command ends with the same bits.

This is the short form of benchmarks/kills.py: it runs the real command.
"""

import json
import os
import random
import stat

import numpy as np
import pytest

from benchmarks import kills, soak

TINY = {
  'model.width': 16,
  'model.layers': 1,
  'model.heads': 2,
  'model.kv_heads': 2,
  'model.mlp': 16,
  'data.train_size': 64,
  'data.validation_size': 8,
  'data.test_size': 8,
  'eval.batch': 8,
  'eval.every': 2,
  'sft.steps': 6,
  'sft.batch': 8,
  'train.iterations': 6,
  'train.inner': 2,
  'train.prompts': 2,
  'train.group': 4,
  'train.microbatches': 1,
  'checkpoint.every': 2,
  'mesh.cpu': 1,
  'objective.best': 0.0,
}  # an untrained model learns from no reward, too


@pytest.fixture
def one_device(monkeypatch):
  """Compiles for one device, which takes less time than for eight."""
  monkeypatch.setenv(
    'XLA_FLAGS', os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1')
  )


@pytest.fixture
def private_files():
  """Sets a umask that keeps new files from other users."""
  before = os.umask(0o077)
  yield
  os.umask(before)


# A number of its own for each row, which a checkpoint between updates must hold.
CONTROL = {
  'control.on': True,
  'sampler.pick': 'threshold',
  'sampler.threshold': 0.1,
  'checkpoint.every': 1,
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('more', [{}, CONTROL], ids=['plain', 'control'])
def test_killed_run_ends_as_the_whole_one(more, one_device, private_files, tmp_path):
  """Every file is equal to the bit, and none is readable by others."""
  folder = tmp_path / 'kills'
  result = kills.main(
    [
      f'--folder={folder}',
      '--kills=3',
      '--seed=1',
      *(f'--config.{name}={value}' for name, value in (TINY | more).items()),
    ]
  )
  assert result['kills'] == sum(result['phases'].values()) == 3
  assert result['identical'] and not result['differences']
  files = [path for path in folder.rglob('*') if not path.is_symlink()]
  assert len(files) > 100
  assert [
    path for path in files if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
  ] == []
  assert soak.lost(folder / 'killed') == []
  controls(folder / 'whole', folder / 'killed')


def controls(whole, killed):
  """The comparisons see a number, a line and a file that is left over."""
  path = killed / 'metrics.jsonl'
  text = path.read_text()
  row = text.splitlines()[-1]
  path.write_text(text.replace(row, row.replace('"step": 6', '"step": 7')))
  (killed / 'rl' / '13.orbax-checkpoint-tmp').mkdir()
  with open(killed / 'samples.jsonl', 'a') as f:
    f.write('{"iteration": 5}\n')
  found = kills.differences(whole, killed)
  assert len(found) == 4 and '13.orbax' in found[-1], found
  found = soak.lost(killed)
  assert len(found) == 3 and 'eval are [0, 2, 4, 7]' in found[0], found
  assert '3 samples of iteration 5' in found[1] and '13.orbax' in found[2]


def test_kills_are_planned_over_all_phases():
  """Supervised training comes first, the end last, every phase in between."""
  for seed in range(5):
    moments = kills.plan(20, 48, random.Random(seed))
    phases, places = zip(*moments, strict=True)
    assert len(moments) == 20 and places == tuple(sorted(places))
    assert (phases[0], phases[-1], places[-1]) == (kills.SFT, kills.END, 48)
    assert set(phases) == set(kills.PHASES)
    assert min(phases.count(phase) for phase in phases[1:-1]) >= 3
  assert [p for p, _ in kills.plan(2, 48, random.Random(0))] == [kills.SFT, kills.END]


def test_phase_of_a_run_is_seen_from_its_files(tmp_path):
  """The last whole line of the metrics and the checkpoints tell it."""
  (tmp_path / 'config.json').write_text(
    json.dumps(
      {
        'sft': {'steps': 5},
        'train': {'iterations': 9, 'inner': 2},
        'eval': {'every': 3},
      }
    )
  )
  (tmp_path / 'rl').mkdir()
  session = kills.Session(None, tmp_path, 100.0, set(), None)
  lines = [
    (None, 0, (kills.START, 0, False)),
    ('sft', 4, (kills.SFT, 0, True)),
    ('sft', 5, (kills.EVALUATE, 0, True)),
    ('eval', 3, (kills.SAMPLE, 6, True)),
    ('rl', 3, (kills.UPDATE, 6, True)),
    ('update', 7, (kills.UPDATE, 7, True)),
    ('update', 8, (kills.SAMPLE, 8, True)),
    ('update', 12, (kills.EVALUATE, 12, True)),
    ('update', 18, (kills.EVALUATE, 18, True)),
    ('eval', 9, (kills.END, 18, True)),
  ]
  for phase, step, expected in lines:
    row = {'phase': phase, 'step': step, 'time': 101.0}
    (tmp_path / 'metrics.jsonl').write_text(
      (json.dumps(row) + '\n') * bool(phase) + '{"phase": "torn'
    )
    assert kills.look(session) == expected
  assert kills.look(session._replace(begun=102.0))[:2] == (kills.START, 18)
  (tmp_path / 'rl' / '12').mkdir()
  assert kills.look(session).phase == kills.END
  (tmp_path / 'rl' / '18.orbax-checkpoint-tmp').mkdir()
  assert kills.look(session).phase == kills.SAVE
  stale = kills.unfinished(tmp_path)
  assert kills.look(session._replace(stale=stale)).phase == kills.END


def test_slope_of_memory():
  """It is the slope of the floor: neither the rise within WINDOW nor the levels of
  sessions nor short sessions count; the error is that of least squares."""
  draw = np.random.default_rng(0)
  t = np.arange(150.0)
  saw = 130.0 * (np.arange(150) % 5 > 1)
  make = lambda level: list(
    zip(t, level + 0.01 * t + saw + draw.normal(0, 0.1, 150), strict=True)
  )
  ended = [(151.0, float('nan'))]
  sessions = [make(300), make(900) + ended, [(0, 1.0), (50, 9999.0)], []]
  rate, error, readings, each = soak.slope(sessions)
  assert readings == 300 and len(each) == 2
  assert abs(rate - 36) < 3 * error and 0.5 < error < 3
  # The same by a solver, with an intercept for each session.
  low = [soak.floor(np.array(s)[:150]) for s in sessions[:2]]
  assert [len(x) for x in low] == [10, 10] and max(low[0][:, 1]) < 305
  x = np.concatenate(low)
  design = np.stack([x[:, 0], *np.repeat(np.eye(2), 10, 1)], 1)
  (b, *_), (sse,), *_ = np.linalg.lstsq(design, x[:, 1], rcond=None)
  se = np.sqrt(sse / (20 - 3) * np.linalg.inv(design.T @ design)[0, 0])
  np.testing.assert_allclose((rate, error), (3600 * b, 3600 * se), rtol=1e-6)
  assert soak.slope([])[2:] == (0, [])
