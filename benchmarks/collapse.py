"""When runs collapse, and which number of a run shows it before.

python -m benchmarks.compare --study=collapse --only=train
python -m benchmarks.collapse [--folder=runs/collapse] [--kl=5]

A run has collapsed at the first buffer at which the rule health.reward is broken: the
reward is below half of its best mean for five buffers. Each other rule is played over
the metrics of the same run, with the bound that its flag gives: the table says at which
buffer it breaks. Markdown; one line for each arm, numbers of its seeds.
"""

import argparse
import pathlib
import statistics
from typing import Any

from configs import collapse
from dmpo_jax import health, metrics

NEVER = '–'


def broken_at(rows, rule, bound, patience):
  """Returns the buffer at which a rule is broken first; None if never."""
  fields: Any = dict.fromkeys(health.RULES, 0.0) | {rule: bound}
  hp = health.Config(**fields, patience=patience)
  state = health.State()
  for row in rows:
    state = health.note(hp, state, row)
    if health.broken(hp, state):
      return row['step']
  return None


def read(folder, arm, task='sudoku'):
  """Yields (metrics of its buffers, validation accuracies) of each finished run."""
  for rate in collapse.RATES:
    for seed in collapse.SEEDS:
      workdir = folder / task / f'{arm}-{rate:g}-{seed}'
      if (workdir / 'results.json').exists():
        rows = list(metrics.read(workdir))
        own = [row for row in rows if row['phase'] == 'rl']
        yield own, [row['accuracy'] for row in rows if row['phase'] == 'eval']


def line(args, arm, runs):
  """Returns a line of the table."""
  bounds = {'kl': args.kl, 'entropy': args.entropy, 'logp_token': args.logp_token}
  at = lambda rule, bound: ', '.join(
    NEVER if found is None else str(found)
    for found in (broken_at(rows, rule, bound, args.patience) for rows, _ in runs)
  )
  mean = lambda values: f'{statistics.fmean(values):.3f}'
  tail = lambda name: mean(
    [statistics.fmean(row[name] for row in rows[-10:]) for rows, _ in runs]
  )
  cells = (
    arm, str(len(runs)), mean([max(curve) for _, curve in runs]),
    mean([curve[-1] for _, curve in runs]), at('reward', 0.5),
    *(at(rule, bound) for rule, bound in bounds.items() if bound),
    tail('kl_ref'), tail('entropy'), tail('logp_token'),
  )  # fmt: skip
  return '| ' + ' | '.join(cells) + ' |'


def main():
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  parser.add_argument('--folder', type=pathlib.Path, default='runs/collapse')
  parser.add_argument('--kl', type=float, default=5.0, help='bound of health.kl')
  parser.add_argument('--entropy', type=float, default=0.0, help='0: not shown')
  parser.add_argument('--logp_token', type=float, default=0.0, help='0: not shown')
  parser.add_argument('--patience', type=int, default=5)
  args = parser.parse_args()
  rules = {'kl': args.kl, 'entropy': args.entropy, 'logp_token': args.logp_token}
  shown = [f'health.{rule} = {bound:g}' for rule, bound in rules.items() if bound]
  head = (
    'arm', 'seeds', 'best accuracy', 'last accuracy', 'collapse', *shown,
    'kl_ref', 'entropy', 'logp_token',
  )  # fmt: skip
  print('| ' + ' | '.join(head) + ' |\n|' + '---|' * len(head))
  for arm in collapse.ARMS:
    if runs := list(read(args.folder, arm)):
      print(line(args, arm, runs), flush=True)


if __name__ == '__main__':
  main()
