"""Tests the comparison: its stated costs, its tables and the order of its runs."""

import argparse
import itertools
import json
import math

import numpy as np
import pytest
from marks import mostly_slow

from benchmarks import compare as bench
from configs import apart, collapse, compare
from dmpo_jax import build, check, config
from dmpo_jax.tools import costs, plan

DIFFERENT = [
  arm for arm in compare.ARMS if arm not in ('dmpo-exact', 'dmpo-none', 'dmpo-group')
]


def test_every_objective_is_an_arm_with_a_cost():
  names = {point['objective.name'] for point in compare.sweep('objectives')}
  assert names == set(build.OBJECTIVES)
  assert set(compare.COSTS) == set(compare.ARMS)


def check_costs(study, arm):
  """What is stated of an arm is what its programs compute."""
  c = study.get_config('sudoku')
  config.update(c, study.fields_of(arm))
  c.data.train_size = 16
  c.model.remat = 'none'  # a recomputed forward would count
  built = build.build(c)
  jobs = plan.jobs(built, plan.prompt_length(built))
  sample, score, update = (
    costs.matmuls(program.trace(*args).jaxpr.jaxpr, trips, 1)[0]
    for _, program, args, trips in jobs[:3]
  )
  steps = jobs[0][3][0]
  stated = study.COSTS[arm]
  forward = sample / steps
  if arm != 'fork_grpo':  # its number of forwards depends on the policy
    assert stated[0] == steps
  # A loss does a little more than its forwards.
  np.testing.assert_allclose((score / forward, update / forward), stated[1:], rtol=0.06)


@pytest.mark.parametrize('arm', mostly_slow(DIFFERENT, ('dmpo', 'espo')))
def test_costs_are_those_of_the_programs(arm):
  check_costs(compare, arm)


@pytest.mark.parametrize(
  'arm',
  mostly_slow(
    ['random8', 'order2', 'rounds2', 'model-inner4', 'states2'], ('rounds2',)
  ),
)
def test_costs_of_what_dmpo_is_made_of(arm):
  check_costs(apart, arm)


@pytest.mark.parametrize('study', [compare, apart])
def test_budget(study):
  """Each arm spends the budget, to within half the cost of a buffer."""
  for point, arm in zip(study.sweep('objectives'), study.ARMS, strict=True):
    sample, score, update = study.COSTS[arm]
    cost = sample + score + study.inner_of(arm) * update
    spent = point['train.iterations'] * cost
    assert abs(spent - study.BUDGET) <= cost / 2


def test_each_arm_of_dmpo_sets_what_has_an_effect():
  """Families share arms of equal settings, rows of a buffer are equal in all."""
  start = apart.fields_of(apart.AGAINST)
  seen = [apart.DMPO[arm] for arm in apart.ARMS]
  assert all(seen.count(fields) == 1 for fields in seen)
  assert set(itertools.chain(*apart.OF_FAMILY.values())) == set(apart.ARMS)
  assert apart.AGAINST in apart.OF_FAMILY['baselines']
  for arm in apart.ARMS:
    fields = apart.fields_of(arm)
    assert fields['train.group'] * fields['train.prompts'] == apart.ROWS
    c = apart.get_config()
    config.update(c, fields)
    check.config(c, 1)  # raises for a bad one
    changed = {name for name in fields if fields[name] != start[name]}
    assert not changed & set(check.idle(c))


def test_arms_that_collapse_change_one_setting_each():
  starts = {name: collapse.fields_of(name) for name in ('diffu_grpo', 'coupled_grpo')}
  for arm in collapse.ARMS:
    fields = collapse.fields_of(arm)
    c = collapse.get_config()
    config.update(c, fields)
    check.config(c, 1)  # raises for a bad one
    assert not set(fields) & set(check.idle(c))
    if start := starts.get(arm.partition('+')[0]):
      changed = [name for name in fields if fields[name] != start[name]]
      assert len(set(changed) - {'name'}) == ('+' in arm)


def test_area_and_target():
  share, values = np.array([0, 0.5, 1]), np.array([0.2, 0.6, 0.9])
  assert bench.area(share, values) == pytest.approx(0.2 + 0.375)
  assert bench.reached(share, values, 0.75) == pytest.approx(0.75)
  assert bench.reached(share, values, 0.1) == 0
  assert math.isnan(bench.reached(share, values, 0.95))


def test_interval_is_students():
  mean, half = bench.interval([1.0, 2.0, 3.0, 4.0, 5.0])
  assert mean == 3
  assert half == pytest.approx(2.776 * math.sqrt(2.5 / 5))
  assert math.isnan(bench.interval([1.0])[1])


def write_run(workdir, base, accuracies):
  workdir.mkdir(parents=True)
  last = len(accuracies) - 1
  rows = [
    {'phase': 'eval', 'step': i, 'time': i, 'accuracy': accuracy}
    for i, accuracy in enumerate(accuracies)
  ]
  rows += [
    {'phase': 'rl', 'step': i, 'time': i, 'forwards': 8.0, 'ess': 0.5}
    for i in range(last)
  ]
  (workdir / 'metrics.jsonl').write_text(
    ''.join(json.dumps(row) + '\n' for row in rows)
  )
  (workdir / 'results.json').write_text(
    json.dumps(
      {
        'base': {'accuracy': base},
        'final': {'accuracy': accuracies[-1]},
        'seconds': {'session': 60.0},
      }
    )
  )


def test_tables_of_finished_runs(tmp_path, capsys):
  """Tables have the best rate and the gains; unfinished arms are left out."""
  ends = {'dmpo-paper': 0.5, 'dmpo': 0.7}
  for arm, end in ends.items():
    for rate in compare.RATES:
      worse = 0.1 * (rate != compare.RATES[1])
      write_run(tmp_path / 'sudoku' / f'{arm}-{rate:g}-0', 0.3, [0.3, 0.4, end - worse])
    for seed in (1, 2):
      write_run(
        tmp_path / 'sudoku' / f'{arm}-{compare.RATES[1]:g}-{seed}',
        0.3,
        [0.3, 0.4, end + 0.02 * seed],
      )
  write_run(tmp_path / 'sudoku' / f'wd1-{compare.RATES[0]:g}-0', 0.3, [0.3, 0.9])
  bench.main(['--task=sudoku', '--only=report', f'--folder={tmp_path}'])
  assert 'dmpo-paper' in capsys.readouterr().out
  lines = (tmp_path / 'sudoku.md').read_text().splitlines()[2:]
  assert [line.split(' | ')[0] for line in lines] == ['| dmpo', '| dmpo-paper']
  assert lines[0].split(' | ')[1:5] == [
    f'{compare.RATES[1]:g}',
    '3',
    '0.720 ± 0.050',
    '0.200 ± 0.000',
  ]
  # The best's last two validations: 0.56 on average, from 0.3.
  assert 'forwards to 0.51' in (tmp_path / 'sudoku.md').read_text()
  rows = [
    json.loads(line) for line in (tmp_path / 'sudoku.jsonl').read_text().splitlines()
  ]
  assert [row['seed'] for row in rows] == [0, 0, 1, 2, 0] * 2 + [0]
  assert rows[0]['forwards'] == 2 * (8 + 8 + 2 * 12)
  assert (tmp_path / 'sudoku.png').stat().st_size > 10_000
  # The same from the lines alone.
  bench.main(
    [
      '--task=sudoku',
      '--only=report',
      f'--folder={tmp_path}/again',
      f'--known={tmp_path}/sudoku.jsonl',
    ]
  )
  for name in ('sudoku.md', 'sudoku.jsonl'):
    assert (tmp_path / 'again' / name).read_text() == (tmp_path / name).read_text()


def test_a_family_has_a_table_and_its_arms_a_name(tmp_path):
  for arm in apart.OF_FAMILY['switches'][:2]:
    for rate in apart.RATES:
      write_run(tmp_path / 'sudoku' / f'{arm}-{rate:g}-0', 0.3, [0.3, 0.5])
  command = ['--study=apart', '--task=sudoku', '--only=report', f'--folder={tmp_path}']
  bench.main(command)
  text = (tmp_path / 'sudoku.md').read_text()
  # The arm that others are compared with is in two families.
  assert text.count('## ') == 2 and text.count('| plain |') == 2
  assert text.count('| strength |') == 1 and 'less plain' in text
  assert (tmp_path / 'sudoku_switches.png').exists()
  there = {'a': ['a'], 'b': ['b'], 'both': ['a', 'b']}
  assert bench.chosen('arms', 'b,both', there) == ['b', 'a']
  assert bench.chosen('arms', '', there) == ['a', 'b']


def test_each_run_once_and_failures_alone(tmp_path, monkeypatch):
  """Trains a base, three rates of a seed, then the best rate; nothing twice."""
  calls = []

  def call(workdir, *arguments):
    calls.append(
      (
        workdir.name,
        dict(argument.removeprefix('--').split('=', 1) for argument in arguments),
      )
    )
    if workdir.name.startswith('spg'):
      raise RuntimeError('spg fails')
    if workdir.name == 'base':
      (workdir / 'model').mkdir(parents=True, exist_ok=True)
      (workdir / 'model' / 'config.json').write_text('{}')
    else:
      best = f'-{compare.RATES[0]:g}-' in workdir.name
      write_run(workdir, 0.3, [0.3, 0.5 + 0.1 * best])

  monkeypatch.setattr(bench, 'call', call)
  command = [
    '--task=countdown',
    '--arms=spg,wd1',
    '--only=train',
    f'--folder={tmp_path}',
    '--config.model.width=32',
  ]
  with pytest.raises(SystemExit, match='spg fails'):
    bench.main(command)
  wd1 = [(name, given) for name, given in calls if name.startswith('wd1')]
  first, last = compare.SEEDS[0], compare.SEEDS[-1]
  assert [name for name, _ in wd1] == [
    *(f'wd1-{rate:g}-{first}' for rate in compare.RATES),
    *(f'wd1-{compare.RATES[0]:g}-{seed}' for seed in compare.SEEDS[1:]),
  ]
  given = wd1[-1][1]
  assert given['config.seed'] == str(last) and given['config.sft.steps'] == '0'
  assert given['config.model.checkpoint'] == str(
    tmp_path / 'countdown' / 'base' / 'model'
  )
  assert given['config.model.width'] == '32'
  arm = int(given['sweep'].removeprefix('objectives:'))
  assert compare.sweep('objectives')[arm]['objective.name'] == 'wd1'
  del calls[:]
  with pytest.raises(SystemExit):
    bench.main(command)
  assert {name for name, _ in calls} == {f'spg-{compare.RATES[0]:g}-0'}


def test_another_study_runs_its_own_arms(tmp_path, monkeypatch):
  ran = {}

  def call(workdir, *arguments):
    ran[workdir.name] = arguments
    write_run(workdir, 0.3, [0.3, 0.5])

  monkeypatch.setattr(bench, 'call', call)
  bench.main(
    [
      '--study=apart', '--task=sudoku', '--arms=copies', '--only=train', '--seeds=1',
      f'--folder={tmp_path}', '--checkpoint=there',
    ]
  )  # fmt: skip
  assert set(ran) == {f'copies-{rate:g}-0' for rate in apart.RATES}
  (sweep,) = (x for x in ran['copies-7e-05-0'] if x.startswith('--sweep='))
  point = apart.sweep('objectives')[int(sweep.rpartition(':')[2])]
  assert point == apart.fields_of('copies') and point['objective.draws'] == 2


def test_overrides_reach_the_final_evaluation():
  """It must build the model that was trained."""
  args = argparse.Namespace(overrides=['--config.model.width=32'], study=compare)
  assert bench.config_of(args, 'sudoku').model.width == 32


def test_unknown_names_are_refused():
  with pytest.raises(SystemExit, match="'ppo' must be one of dmpo-paper"):
    bench.main(['--arms=ppo'])
  with pytest.raises(SystemExit, match='--task: .* one of sudoku, countdown'):
    bench.main(['--task=chess'])
  for flag in ('--steps=3', '--config.model.wide=3'):
    with pytest.raises(SystemExit, match=flag.strip('-3=')):
      bench.main([flag, '--only=report'])
