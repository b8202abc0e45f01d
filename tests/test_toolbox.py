"""Tests the arms of the toolbox, and the tables of drafts and of the controller."""

import argparse
import json

import numpy as np
import pytest
from test_compare import check_costs, write_run

from benchmarks import compare as runs
from benchmarks import control, drafts, whole
from benchmarks import toolbox as bench
from configs import compare, toolbox
from dmpo_jax import check, config
from dmpo_jax.tasks import rewards


def test_an_arm_differs_from_its_rival_in_its_tool_alone():
  """Equal budget, rate and settings but for the tool, which is in effect."""
  for arm, (off, tool) in toolbox.TOOLS.items():
    mine, theirs = toolbox.fields_of(arm), toolbox.fields_of(off)
    different = {name for name in mine if mine[name] != theirs.get(name)} - {'name'}
    if toolbox.COSTS[arm] != toolbox.COSTS[off]:  # fewer buffers for as many forwards
      different.remove('train.iterations')
    assert different == set(tool) and tool
    assert toolbox.rates_of(arm) == toolbox.rates_of(off)
    c = toolbox.get_config()
    config.update(c, mine)
    if arm in toolbox.MODES:  # what --mode=rounds sets
      c.pairs.path = ('runs/0',)
    for field in tool:
      assert field not in check.idle(c)


@pytest.mark.parametrize('arm', ['agrpo'])
def test_costs(arm):
  """Those of compare.py, but for one with other draws; each spends the budget."""
  check_costs(toolbox, arm)
  for arm, cost in toolbox.COSTS.items():
    off = toolbox.off_of(arm)
    sample, score, update = cost
    rounds = 1 + toolbox.fields_of(arm).get('curriculum.resample', 0)
    assert off == 'agrpo' or (sample / rounds, score, update) == compare.COSTS[off]
    buffer = sample + score + toolbox.INNER * update
    spent = toolbox.fields_of(arm)['train.iterations'] * buffer
    if arm in toolbox.MODES:  # two rounds of RL, and a tenth for the pairs
      assert 0.9 <= 2 * spent / toolbox.BUDGET < 1
    else:
      assert abs(spent - toolbox.BUDGET) <= buffer / 2


def test_tasks_differ_in_the_reward_alone():
  whole_grid, cells = map(toolbox.get_config, toolbox.TASKS)
  a, b = (check.flatten(c) for c in (whole_grid, cells))
  own = {'reward.file', 'reward.task', 'reward.weights.whole', 'name'}
  assert {name for name in a if a[name] != b.get(name)} <= own
  assert rewards_of(whole_grid) == ['whole'] and not cells.reward.file


def rewards_of(c):
  """Names of the functions that a config pays."""
  assert not c.reward.task
  return list(rewards.specs(c.reward.file))


def test_reward_is_of_the_whole_grid():
  grid = '1234341221434321'
  assert whole.whole([grid, f' {grid}\n', grid[:-1], ''], [grid] * 4) == [1, 1, 0, 0]


def add_means(workdir):
  path = workdir / 'metrics.jsonl'
  rows = [json.loads(row) for row in path.read_text().splitlines()]
  rows = [row | dict.fromkeys(bench.MEANS, 0.5) for row in rows]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def test_rounds_add_up(tmp_path):
  """Costs of both rounds and the pairs; one curve, over all that was spent."""
  arm = 'dmpo-pairs'
  key = (arm, toolbox.rates_of(arm)[0], 0)
  args = argparse.Namespace(study=toolbox, task='sudoku', folder=tmp_path, known={})
  workdir = runs.place(args, 'sudoku', *key)
  for number, ends in enumerate(([0.2, 0.4], [0.5, 0.6])):
    write_run(workdir / str(number), ends[0], ends)
    add_means(workdir / str(number))
  with open(workdir / '1' / 'metrics.jsonl', 'a') as f:
    f.write('{"phase": "pairs", "step": 1}\n' * 6)
  settings = {'train': {'prompts': 8, 'group': 8}, 'pairs': {'batch': 8}}
  (workdir / '1' / 'config.json').write_text(json.dumps(settings))
  row = bench.row_of(args, *key)
  # A buffer of either round; six updates on 16 of its 64 rows.
  rl, paired = 8 + 8 + 2 * 6, 6 * (8 + 32) * 16 / 64
  assert row['forwards'] == 2 * rl + paired and row['pair_updates'] == 6
  assert row['base'] == 0.2 and row['final'] == 0.6
  share, values = row['curve']
  np.testing.assert_allclose(
    share, np.array([0, rl, rl + paired, 2 * rl + paired]) / row['forwards'], atol=1e-4
  )
  assert values == [0.2, 0.4, 0.5, 0.6]


def test_runs_go_seed_by_seed_and_once(tmp_path, monkeypatch):
  """A stopped comparison has whole seeds; a failure does not stop the others."""
  ran = []

  def call(workdir, *arguments):
    ran.append(workdir.name)
    if workdir.name == 'base':
      (workdir / 'model').mkdir(parents=True, exist_ok=True)
      (workdir / 'model' / 'config.json').write_text('{}')
    elif workdir.name == 'dmpo-own-7e-05-0':
      raise RuntimeError('dmpo-own fails')
    else:
      tool = 0.1 * workdir.name.startswith('dmpo-other')
      seed = int(workdir.name[-1])
      write_run(workdir, 0.3, [0.3, 0.4 + 0.01 * seed + tool * (1 + seed)])
      add_means(workdir)

  monkeypatch.setattr(runs, 'call', call)
  monkeypatch.setattr(runs, 'judge', lambda args, task: None)
  command = [
    '--arms=dmpo,dmpo-own,dmpo-other', '--seeds=2', f'--folder={tmp_path}',
  ]  # fmt: skip
  with pytest.raises(SystemExit, match='dmpo-own fails'):
    bench.main(command)
  names = [name for name in ran if name != 'base']
  assert [name[-1] for name in names] == ['0'] * 3 + ['1'] * 3
  lines = (tmp_path / 'sudoku.md').read_text().splitlines()[2:]
  cells = {row.split(' | ')[0]: row.split(' | ')[1:] for row in lines}
  assert list(cells) == ['| dmpo', '| dmpo-other', '| dmpo-own']
  # Seeds 0 and 1 gain 0.1 and 0.2: 0.15, with Student's 12.706 for one degree.
  assert cells['| dmpo-other'][2] == '0.150 ± 0.635'
  assert cells['| dmpo'][2] == '' and cells['| dmpo-own'][0] == '1'
  del ran[:]
  with pytest.raises(SystemExit):
    bench.main(command)
  assert [name for name in ran if name != 'base'] == ['dmpo-own-7e-05-0']
  # The same table from the lines alone.
  known = [f'--known={tmp_path}/sudoku.jsonl', '--only=report']
  bench.main([*command[:2], f'--folder={tmp_path}/again', *known])
  assert (tmp_path / 'again' / 'sudoku.md').read_text().splitlines()[2:] == lines


def test_unknown_names_are_refused():
  with pytest.raises(SystemExit, match="'ppo' must be one of dmpo"):
    bench.main(['--arms=ppo'])


def test_drafts_are_judged_once_and_compared_seed_by_seed(tmp_path, monkeypatch):
  """What a file has is not judged again; what it has of other settings is refused."""
  args = argparse.Namespace(workdir=str(tmp_path), steps=1, problems=4, batch=2)
  ran, gains = [], {'bold draft, exact': (0.1, 0.2)}

  def judged(args, seed, name, nets):
    ran.append((seed, name))
    if len(ran) == 10:
      raise RuntimeError('stopped')  # in the middle of a seed
    above = gains.get(name, (0, 0))[seed]
    return {'accuracy': 0.5 + 0.1 * seed + above, 'forwards': 4.0 + seed}

  def networks(args, seed):
    (tmp_path / str(seed)).mkdir(exist_ok=True)
    return 'trained'

  monkeypatch.setattr(drafts, 'networks', networks)
  monkeypatch.setattr(drafts, 'judged', judged)
  with pytest.raises(RuntimeError, match='stopped'):
    drafts.rows_of(args, 0)
  seeds = [drafts.rows_of(args, seed) for seed in (0, 1)]
  assert len(ran) == 2 * len(drafts.WAYS) + 1
  assert [drafts.rows_of(args, seed) for seed in (0, 1)] == seeds
  assert len(ran) == 2 * len(drafts.WAYS) + 1
  # Gains of 10 and 20 points: 15, with Student's 12.706 for one degree of freedom.
  cells = drafts.line('bold draft, exact', seeds).split(' | ')
  assert cells[2] == '15.0 ± 63.5' and cells[4] == '4.5 ± 6.4'
  assert drafts.line('the model alone', seeds).split(' | ')[2] == ''
  args.steps = 2
  with pytest.raises(SystemExit, match='--workdir'):
    drafts.rows_of(args, 0)


def test_controller_is_compared_at_its_own_forwards(capsys):
  fixed = {'a': {'row': 2.0, 'accuracy': 0.4}, 'b': {'row': 4.0, 'accuracy': 0.6}}
  own = [{'controller': {'row': 3.0, 'accuracy': 0.5 + x}} for x in (0.1, 0.2)]
  control.gains({'fixed': [fixed, fixed], 'controller': own})
  said = capsys.readouterr().out
  assert '0.500 (+0.100), 0.500 (+0.200)' in said and '0.150 ± 0.635' in said
