"""Curricula and credit of single steps, each on and off, at equal network forwards.

python -m benchmarks.toolbox [--arms=dmpo,dmpo-own] [--seeds=3]

Trains the base of configs/toolbox.py, then every arm with every seed: all arms of a
seed before the next seed. What is done is not done again, so that the same command
goes on where it was stopped. Then the final policies are judged as those of
benchmarks/compare.py, and FOLDER/TASK.md and .jsonl are written, of what there is:
`--only=report` does no more. --known=docs/toolbox.jsonl takes those runs as done.
"""

import argparse
import json
import pathlib
import statistics
import sys

import numpy as np

from benchmarks import compare as runs
from configs import toolbox
from dmpo_jax import metrics

# Columns: (name in the table, of a run's row, digits).
COLUMNS = (
  ('final accuracy', 'final', 3),
  ('area', 'area', 3),
  ('sampled', 'sampled', 3),
)
MEANS = ('equal_reward_groups', 'shared_steps')  # of a run's buffers


def keys(seeds):
  """Yields (arm, rate, seed) of all runs, a seed after the other."""
  for seed in toolbox.SEEDS[:seeds]:
    for arm in toolbox.ARMS:
      for rate in toolbox.rates_of(arm):
        yield arm, rate, seed


def row_of(args, arm, rate, seed):
  """What the table is made of, of one finished run."""
  row = runs.row_of(args, args.task, arm, rate, seed)
  if all(name in row for name in MEANS):
    return row
  workdir = runs.place(args, args.task, arm, rate, seed)
  folders = [workdir]
  if arm in toolbox.MODES:
    folders = [workdir / '0', workdir / '1']
    row |= rounds_of(folders, arm)
  lines = [line for folder in folders for line in metrics.read(folder)]
  return row | {
    name: round(
      statistics.fmean(line[name] for line in lines if line['phase'] == 'rl'), 3
    )
    for name in MEANS
  }


def rounds_of(folders, arm):
  """What two rounds say together: the curve goes on, the costs add up."""
  one, two = (
    runs.said_in(folder, toolbox.COSTS[arm], toolbox.INNER) for folder in folders
  )
  updates = sum(line['phase'] == 'pairs' for line in metrics.read(folders[1]))
  c = json.loads((folders[1] / 'config.json').read_text())
  rows = c['train']['prompts'] * c['train']['group']
  paired = updates * toolbox.PAIR * 2 * c['pairs']['batch'] / rows
  spent = one['forwards'] + paired + two['forwards']
  share = np.concatenate(
    [
      np.array(said['curve'][0]) * said['forwards'] + before
      for said, before in ((one, 0), (two, one['forwards'] + paired))
    ]
  )
  values = np.array(one['curve'][1] + two['curve'][1])
  return {
    'base': one['base'],
    'area': runs.area(share / spent, values),
    'forwards': spent,
    'curve': [np.round(share / spent, 4).tolist(), values.tolist()],
    'ess': one['ess'] + two['ess'],
    'pair_updates': updates,
    'seconds': one['seconds'] + two['seconds'],
  }


def less(mine, others, name, digits):
  """A value less that of the other arm, seed by seed."""
  theirs = {run['seed']: run[name] for run in others if name in run}
  pairs = [
    run[name] - theirs[run['seed']]
    for run in mine
    if name in run and run['seed'] in theirs
  ]
  return runs.told(pairs, digits) if pairs else ''


def line(arm, rows):
  """A row of the table; rows: those of all arms, {arm: [row]}."""
  mine, off = rows[arm], toolbox.off_of(arm)
  cells = [arm, str(len(mine))]
  for _, name, digits in COLUMNS:
    there = [run[name] for run in mine if name in run]
    cells.append(runs.told(there, digits) if there else '')
    cells.append(less(mine, rows.get(off, []), name, digits) if arm != off else '')
  cells += [f'{statistics.fmean(run[name] for run in mine):.2f}' for name in MEANS]
  for name in ('forwards', 'seconds'):
    cells.append(f'{statistics.fmean(run[name] for run in mine):.0f}')
  return '| ' + ' | '.join(cells) + ' |'


def tables(args):
  """Writes FOLDER/TASK.md of the arms, and .jsonl of the runs, that are done."""
  found = [
    row_of(args, *key) for key in keys(args.seeds) if runs.done(args, args.task, *key)
  ]
  rows = {}
  for row in found:
    rows.setdefault(row['arm'], []).append(row)
  names = [cell for name, _, _ in COLUMNS for cell in (name, 'less without')]
  names = ['arm', 'seeds', *names, 'equal groups', 'shared steps', 'forwards', 's']
  arms = sorted(
    rows, key=lambda arm: (list(toolbox.OFF).index(toolbox.off_of(arm)), arm)
  )
  text = '\n'.join(
    ['| ' + ' | '.join(names) + ' |', '|---' * len(names) + '|']
    + [line(arm, rows) for arm in arms]
  )
  args.folder.mkdir(parents=True, exist_ok=True)
  out = args.folder / args.task
  out.with_suffix('.md').write_text(text + '\n')
  with open(out.with_suffix('.jsonl'), 'w') as f:
    f.writelines(json.dumps(row) + '\n' for row in found)
  print(text)


def train(args, arms):
  """Runs what is not done; returns what failed, as text."""
  runs.share_cores(1)
  failed = []
  for arm, rate, seed in keys(args.seeds):
    if arm in arms:
      try:
        runs.train(args, args.task, arm, rate, seed)
      except RuntimeError as error:
        failed.append(str(error))
  return failed


def main(argv=None):
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  parser.add_argument('--task', choices=toolbox.TASKS, default=toolbox.TASKS[0])
  parser.add_argument('--arms', default='', help="comma-separated; '' = all")
  parser.add_argument('--seeds', type=int, default=len(toolbox.SEEDS))
  parser.add_argument('--only', choices=('train', 'judge', 'report'))
  parser.add_argument('--checkpoint', default='')
  parser.add_argument('--known', default='', help='a TASK.jsonl of before')
  parser.add_argument('--folder', type=pathlib.Path, default='runs/toolbox')
  args, args.overrides = parser.parse_known_args(argv)
  args.folder, args.known = args.folder.resolve(), runs.known(args.known)
  args.study, failed = toolbox, []
  arms = runs.chosen('arms', args.arms, {arm: [arm] for arm in toolbox.ARMS})
  runs.config_of(args, args.task)
  if args.only in (None, 'train'):
    failed = train(args, arms)
  if args.only in (None, 'judge'):
    runs.judge(args, args.task)
  if args.only in (None, 'report'):
    tables(args)
  if failed:
    sys.exit('\n'.join(failed))


if __name__ == '__main__':
  main()
