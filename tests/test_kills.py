"""kill -9 and the same command: nothing is lost, nothing differs.

The short form of benchmarks/kills.py: processes of their own, the real command.
"""

import os
import stat

import pytest

from benchmarks import kills

TINY = {
    'model.width': 16, 'model.layers': 1, 'model.heads': 2,
    'model.kv_heads': 2, 'model.mlp': 16, 'data.train_size': 64,
    'data.validation_size': 8, 'data.test_size': 8, 'eval.batch': 8,
    'eval.every': 2, 'sft.steps': 6, 'sft.batch': 8, 'train.iterations': 6,
    'train.inner': 2, 'train.prompts': 2, 'train.group': 4,
    'train.microbatches': 1, 'checkpoint.every': 2, 'mesh.cpu': 1,
    'objective.best': 0.0}  # an untrained model learns from no reward, too


@pytest.fixture
def one_device(monkeypatch):
  """What is compiled for one device is there sooner than for eight."""
  monkeypatch.setenv('XLA_FLAGS', os.environ['XLA_FLAGS'].replace(
      'device_count=8', 'device_count=1'))


@pytest.fixture
def nobody_else():
  """Files are the user's alone."""
  before = os.umask(0o077)
  yield
  os.umask(before)


def test_killed_runs_end_as_the_whole_one(one_device, nobody_else, tmp_path):
  """All there is, bit by bit; and no file that others may read."""
  folder = tmp_path / 'kills'
  told = kills.main([f'--folder={folder}', '--kills=3', '--seed=1', *(
      f'--config.{name}={value}' for name, value in TINY.items())])
  assert told['kills'] == sum(told['phases'].values()) == 3
  assert told['identical'] and not told['differences']
  files = [path for path in folder.rglob('*') if not path.is_symlink()]
  assert len(files) > 100
  assert [path for path in files if path.stat().st_mode & (
      stat.S_IRWXG | stat.S_IRWXO)] == []
  spoil(folder / 'killed', folder / 'whole')


def spoil(killed, whole):
  """The comparison sees a bit, a line, a number and what lies about."""
  path = killed / 'metrics.jsonl'
  text = path.read_text()
  path.write_text(text.replace('"step": 2,', '"step": 3,', 1))
  assert len(kills.differences(whole, killed)) == 1
  path.write_text(text)
  (killed / 'rl' / '13.orbax-checkpoint-tmp').mkdir()
  assert "13.orbax" in kills.differences(whole, killed)[0]
