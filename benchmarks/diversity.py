"""pass@k of final policies and of their base: what RL keeps of it, and what it loses.

python -m benchmarks.compare --only=train --arms=dmpo,wd1      # first
python -m benchmarks.diversity --arms=dmpo,wd1 [--samples=64] [--problems=256]

Each finished run of an arm's best rate solves the same test problems, SAMPLES times
each, with the training sampler. Prints the mean of pass@k over seeds with its 95 %
interval. Cards stay in the workdirs, and what is there is not done again.
"""

import argparse
import json
import pathlib
import statistics

from benchmarks import compare

KS = (1, 4, 16, 64)


def card(args, workdir, *flags):
  """Returns the card of a run, or of a base for which flags name a config."""
  wanted = {'samples': args.samples, 'problems': args.problems}

  def found():
    for path in sorted(workdir.glob('**/*.card.json')):
      said = json.loads(path.read_text())
      if all(said[name] == value for name, value in wanted.items()):
        return said
    return None

  if found() is None:
    sampler = args.config.sampler
    compare.call(
      workdir,
      *flags,
      '--mode=eval',
      f'--config.eval.samples={args.samples}',
      f'--config.data.test_size={args.problems}',
      f'--config.eval.sampler.temperature={sampler.temperature}',
      f'--config.eval.sampler.steps={sampler.steps}',
    )
  return found()


def line(args, name, cards):
  """Returns a line of the table."""
  cells = [name, str(len(cards))]
  for k in (k for k in KS if k <= args.samples):
    values = [said['accuracy' if k == 1 else f'pass@{k}'] for said in cards]
    mean, half = compare.interval(values) if len(values) > 1 else (values[0], None)
    cells.append(f'{mean:.3f}' if half is None else f'{mean:.3f} ± {half:.3f}')
  cells.append(f'{statistics.fmean(said["majority"] for said in cards):.3f}')
  return '| ' + ' | '.join(cells) + ' |'


def runs_of(args, arm):
  """Returns the workdirs of an arm's finished runs at the rate with most seeds."""
  study, found = args.study, {}
  for rate in study.RATES:
    for seed in study.SEEDS:
      workdir = compare.place(args, args.task, arm, rate, seed)
      if (workdir / 'results.json').exists():
        found.setdefault(rate, []).append(workdir)
  return max(found.values(), key=len, default=[])


def main():
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  parser.add_argument('--study', choices=compare.STUDIES, default='compare')
  parser.add_argument('--task', default='sudoku')
  parser.add_argument('--arms', default='', help="comma-separated; '' = all there are")
  parser.add_argument('--samples', type=int, default=64, help='of a problem')
  parser.add_argument('--problems', type=int, default=256)
  parser.add_argument('--folder', type=pathlib.Path, help='default: runs/STUDY')
  args = parser.parse_args()
  args.folder = (args.folder or pathlib.Path('runs') / args.study).resolve()
  args.study = compare.STUDIES[args.study]
  args.config = args.study.get_config(args.task)
  compare.share_cores(1)
  shown = [f'pass@{k}' for k in KS if k <= args.samples]
  head = ('policy', 'seeds', *shown, 'majority')
  print('| ' + ' | '.join(head) + ' |\n|' + '---|' * len(head), flush=True)
  base = args.folder / args.task / 'base'
  flags = (
    compare.flag_of(args, args.task), f'--config.model.checkpoint={base / "model"}',
    '--config.sft.steps=0',
  )  # fmt: skip
  print(
    line(args, 'base', [card(args, base.parent / 'judged_base', *flags)]), flush=True
  )
  for arm in args.arms.split(',') if args.arms else args.study.ARMS:
    if runs := runs_of(args, arm):
      cards = [card(args, workdir) for workdir in runs]
      print(line(args, arm, cards), flush=True)


if __name__ == '__main__':
  main()
