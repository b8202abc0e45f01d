"""Every objective from the same bases at equal network forwards: who wins.

python -m benchmarks.compare [--task=sudoku] [--arms=dmpo,wd1] [--workers=2]
python -m benchmarks.compare --study=apart [--arms=switches,baselines]

For each task of a study, configs/compare.py or another: a supervised base, then of
every arm one run at each rate with the first seed, and the other seeds at the rate
whose validation curve has the largest area. All runs are `main.py`'s own; what
is done is not done again, so that the same command goes on where it was
stopped. Then every final policy is judged by one sampler (KL along its
trajectories, right answers and how many different ones), and FOLDER/TASK.md,
.png and .jsonl are written, of what there is: `--only=report` does no more.

--arms takes names of arms and of a study's families of arms, each of which has a table.
--known=FILE takes the runs in a TASK.jsonl (or several, one after the other) as
done; docs/comparison.jsonl is one. --checkpoint=DIR starts from a model of your
own in place of the base.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import pathlib
import queue
import statistics
import sys

import numpy as np
from matplotlib.figure import Figure

from benchmarks import kills
from configs import apart, attention, collapse, compare
from dmpo_jax import build, checkpoint, config, metrics
from dmpo_jax.tools import report

ROOT = pathlib.Path(__file__).parents[1]
POINTS = 8  # validations of a run
PROMPTS = 64  # that a final policy is judged on, GROUP completions each
GROUP = 8
SHARE = 0.8  # of the best arm's gain: forwards to reach it
# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
STUDENT = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)
STUDIES = {
  'compare': compare,
  'apart': apart,
  'attention': attention,
  'collapse': collapse,
}
CORES = queue.Queue()  # shares that no run has: sets of cores

# --- runs


def share_cores(workers):
  """Fills CORES: all there are, dealt out."""
  there = (
    sorted(os.sched_getaffinity(0))
    if hasattr(os, 'sched_getaffinity')
    else list(range(os.cpu_count() or 1))
  )
  for i in range(workers):
    CORES.put(set(there[i::workers]) or {there[i % len(there)]})


def call(workdir, *arguments):
  """main.py in a process of its own, on its share of the cores.

  RuntimeError with the end of its output if it fails.
  """
  workdir.parent.mkdir(parents=True, exist_ok=True)
  cores = CORES.get()
  try:
    process, log = kills.launch(workdir, arguments, workdir.parents[1])
    if hasattr(os, 'sched_setaffinity'):  # before it has threads
      os.sched_setaffinity(process.pid, cores)
    code = process.wait()
  finally:
    CORES.put(cores)
  if code:
    raise RuntimeError(f'{log}: exit code {code}\n{log.read_text()[-1500:]}')


def config_of(args, task):
  """The task's config, with the --config.field=value of the command line.

  SystemExit for a flag that is neither of this file nor of the config.
  """
  c = args.study.get_config(task)
  for flag in args.overrides:
    if not flag.startswith('--config.'):
      sys.exit(f'error: {flag} is not a flag of this command')
  try:
    config.override(c, args.overrides)
  except ValueError as error:
    sys.exit(f'error: {error}')
  return c


def flag_of(args, task):
  """The flag that names a task's config; args.study is its module."""
  return f'--config={ROOT}/configs/{args.study.__name__.rpartition(".")[2]}.py:{task}'


def base(args, task):
  """Directory of the model that a task's runs start from, made if need be."""
  if args.checkpoint:
    return args.checkpoint
  workdir = args.folder / task / 'base'
  out = workdir / 'model'
  if not (out / 'config.json').exists():
    common = (flag_of(args, task), *args.overrides)
    call(workdir, *common, '--mode=sft')
    call(workdir, *common, '--mode=export', '--of=base', f'--out={out}')
  return str(out)


def place(args, task, arm, rate, seed):
  return args.folder / task / f'{arm}-{rate:g}-{seed}'


def last(args, task, arm, rate, seed):
  """Workdir that a run ends in: of --mode=rounds, that of the last round."""
  return place(args, task, arm, rate, seed) / ('1' if arm in args.study.MODES else '')


def done(args, *key):
  """Whether a run is in the folder, or known from before."""
  return key in args.known or (last(args, *key) / 'results.json').exists()


def train(args, task, arm, rate, seed):
  """One run, to its end."""
  workdir = place(args, task, arm, rate, seed)
  if not done(args, task, arm, rate, seed):
    count = args.study.fields_of(arm)['train.iterations']
    call(
      workdir,
      flag_of(args, task),
      f'--sweep=objectives:{args.study.ARMS.index(arm)}',
      f'--config.seed={seed}',
      f'--config.optim.lr={rate}',
      f'--config.model.checkpoint={base(args, task)}',
      '--config.sft.steps=0',
      f'--config.eval.every={max(1, count // POINTS)}',
      *args.study.MODES.get(arm, ()),
      *args.overrides,
    )
    end = row_of(args, task, arm, rate, seed)['final']
    print(f'{workdir}: {end:.3f}', flush=True)


def chain(args, task, arm):
  """All runs of an arm: the search with the first seed, then the others.

  Returns what failed, as text; the other arms go on.
  """
  first, *others = args.study.SEEDS[: args.seeds]
  rates = args.study.RATES
  try:
    for rate in rates:
      train(args, task, arm, rate, first)
    rate = best_rate(args, [row_of(args, task, arm, rate, first) for rate in rates])
    for seed in others:
      train(args, task, arm, rate, seed)
  except RuntimeError as error:
    return str(error)
  return ''


def best_rate(args, rows):
  """Of the largest area under validation, by an arm's rows of the first seed;
  None if some rate is not among them."""
  first, rates = args.study.SEEDS[0], args.study.RATES
  areas = {row['rate']: row['area'] for row in rows if row['seed'] == first}
  if len(areas) < len(rates):
    return None
  return max(rates, key=lambda rate: areas[rate])


# --- what a run says


def curve(workdir):
  """(shares of the budget, validation accuracy) of a run."""
  steps, values = report.series(metrics.read(workdir), 'eval', 'accuracy')
  return steps / steps[-1], values


def area(share, values):
  return float(np.trapezoid(values, share))


def target_of(arms):
  """The validation accuracy at SHARE of the best arm's gain.

  Of means over its runs' last two validations: one alone is noise.
  """
  start = statistics.fmean(run['curve'][1][0] for runs in arms.values() for run in runs)
  best = max(np.mean([run['curve'][1][-2:] for run in runs]) for runs in arms.values())
  return float(start + SHARE * (best - start))


def reached(share, values, target):
  """Share of the budget at which a curve reaches the target; nan if never."""
  at = int(np.argmax(values >= target))
  if values[at] < target:
    return math.nan
  if not at:
    return 0.0
  part = (target - values[at - 1]) / (values[at] - values[at - 1])
  return float(share[at - 1] + part * (share[at] - share[at - 1]))


def row_of(args, task, arm, rate, seed):
  """What the tables are made of, of one finished run."""
  if (task, arm, rate, seed) in args.known:
    return args.known[task, arm, rate, seed]
  key = {'task': task, 'arm': arm, 'rate': rate, 'seed': seed}
  workdir = last(args, task, arm, rate, seed)
  return key | said_in(workdir, args.study.COSTS[arm], args.study.inner_of(arm))


def said_in(workdir, cost, inner):
  """What the workdir of a finished run says; cost and inner: of an objective."""
  results = json.loads((workdir / 'results.json').read_text())
  rows = [row for row in metrics.read(workdir) if row['phase'] == 'rl']
  _, score, update = cost
  spent = sum(row['forwards'] for row in rows) + len(rows) * (score + inner * update)
  judged = workdir / 'judged.json'
  said = json.loads(judged.read_text()) if judged.exists() else {}
  share, values = curve(workdir)
  return {
    'base': results['base']['accuracy'],
    'final': results['final']['accuracy'],
    'area': area(share, values),
    'forwards': spent,
    'ess': [round(row['ess'], 3) for row in rows if 'ess' in row],
    'curve': [np.round(share, 4).tolist(), values.tolist()],
    'seconds': round(results['seconds']['session']),
    **said,
  }


def known(path):
  """{(task, arm, rate, seed): row} of a FOLDER/TASK.jsonl; {} for ''."""
  if not path:
    return {}
  with open(path) as f:
    rows = [json.loads(text) for text in f]
  return {
    tuple(row[name] for name in ('task', 'arm', 'rate', 'seed')): row for row in rows
  }


# --- judging


def judge(args, task):
  """Samples every finished run's final policy: FOLDER/.../judged.json.

  One config for all, with the exact log-probs along the trajectories.
  """
  todo = [
    path.parent
    for form in ('*/results.json', '*/1/results.json')
    for path in sorted((args.folder / task).glob(form))
    if not (path.parent / 'judged.json').exists()
  ]
  if not todo:
    return
  c = config_of(args, task)
  config.update(c, compare.fields_of('dmpo-exact'))
  c.update_from_flattened_dict(
    {
      'train.prompts': PROMPTS,
      'train.group': GROUP,
      'sft.steps': 0,
      'train.microbatches': 8,
      'model.checkpoint': base(args, task),
    }
  )
  built = build.build(c)
  frozen = built.steps.init()
  collector = dataclasses.replace(
    build.collector(built, frozen), problems=build.problems(built, 'test'), samples=0
  )
  shapes = {'state': checkpoint.abstract(built.steps.start(frozen))}
  for workdir in todo:
    with checkpoint.Manager(str(workdir / 'rl'), 2) as manager:
      found = checkpoint.restore(manager, lambda step: shapes)
    assert found, f'{workdir}: no checkpoint'
    tuned = found.trees['state']
    numbers = collector.finish(collector.start(tuned.trainable, (), 0))[1]
    kept = {
      'kl': numbers['kl_ref'],
      'sampled': numbers['accuracy'],
      'right': numbers['distinct_right'],
    }
    (workdir / 'judged.json').write_text(json.dumps(kept))


# --- the tables


def interval(values):
  """(mean, half width of its 95 % interval by Student's t; nan for one)."""
  half = math.nan
  if len(values) > 1:
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
  return statistics.fmean(values), half


def told(values, digits=3):
  mean, half = interval(values)
  text = f'{mean:.{digits}f}'
  return text if math.isnan(half) else f'{text} ± {half:.{digits}f}'


def gain(runs, rival):
  """Final accuracy less that of another arm, seed by seed."""
  theirs = {run['seed']: run['final'] for run in rival}
  pairs = [run['final'] - theirs[run['seed']] for run in runs if run['seed'] in theirs]
  return told(pairs) if pairs else ''


def line(arm, runs, against, target):
  """A row of the table."""
  curves = [[np.array(axis) for axis in run['curve']] for run in runs]
  spent = [
    reached(share, values, target) * run['forwards']
    for run, (share, values) in zip(runs, curves, strict=True)
  ]
  got = [x for x in spent if not math.isnan(x)]
  quick = f'{statistics.median(got):.0f} ({len(got)})' if got else 'never'
  judged = [run for run in runs if 'kl' in run]
  cells = [
    arm,
    f'{runs[0]["rate"]:g}',
    str(len(runs)),
    told([run['final'] for run in runs]),
    gain(runs, against),
    told([run['area'] for run in runs]),
    quick,
    told([run['sampled'] for run in judged]) if judged else '',
    told([run['right'] for run in judged], 2) if judged else '',
    told([run['kl'] for run in judged], 2) if judged else '',
    f'{statistics.fmean(run["forwards"] for run in runs):.0f}',
    f'{statistics.fmean(run["seconds"] for run in runs):.0f}',
  ]
  return '| ' + ' | '.join(cells) + ' |'


HEADER = (
  '| arm | rate | seeds | final accuracy | less {} | area | '
  'forwards to {:.2f} (runs) | sampled | distinct right of {} | '
  'KL, nats | forwards | s |\n' + '|---' * 12 + '|'
)


def tables(args, task):
  """FOLDER/TASK.md and .png of the arms whose search is done, and .jsonl of
  all runs that are; a table and a picture of each family of arms."""
  study, texts = args.study, []
  rows = [
    row_of(args, task, *key)
    for key in itertools.product(study.ARMS, study.RATES, study.SEEDS)
    if done(args, task, *key)
  ]
  arms = {}
  for arm in study.ARMS:
    mine = [row for row in rows if row['arm'] == arm]
    rate = best_rate(args, mine)
    if rate is not None:
      arms[arm] = [row for row in mine if row['rate'] == rate]
  if not arms:
    return
  args.folder.mkdir(parents=True, exist_ok=True)
  out = args.folder / task
  with open(out.with_suffix('.jsonl'), 'w') as f:
    f.writelines(json.dumps(row) + '\n' for row in rows)
  for family, names in families_of(study).items():
    ranked = by_end({arm: arms[arm] for arm in names if arm in arms})
    if ranked:
      title = f'{task}: {family}' if family else task
      texts.append(f'## {family}\n\n' * bool(family) + table(study, ranked))
      name = f'{task}_{family}.png' if family else f'{task}.png'
      picture(study, ranked, title, args.folder / name)
  out.with_suffix('.md').write_text('\n'.join(texts))
  print(task, *texts, sep='\n')


def families_of(study):
  """{family: its arms}; a study without families has one, ''."""
  return getattr(study, 'OF_FAMILY', {'': study.ARMS})


def by_end(arms):
  """[(arm, runs)], the best final accuracy first."""
  return sorted(
    arms.items(), key=lambda item: -statistics.fmean(run['final'] for run in item[1])
  )


def table(study, ranked):
  """Markdown of some arms: [(arm, runs)]."""
  arms = dict(ranked)
  target, against = target_of(arms), arms.get(study.AGAINST, [])
  lines = [HEADER.format(study.AGAINST, target, GROUP)]
  lines += [line(arm, runs, against, target) for arm, runs in ranked]
  return '\n'.join(lines) + '\n'


def picture(study, ranked, title, path):
  """Mean validation accuracy and ESS over the budget; the final intervals."""
  figure = Figure(figsize=(14, 5), layout='constrained')
  left, middle, right = figure.subplots(1, 3)
  grid = np.linspace(0, 1, 41)
  for i, (arm, runs) in enumerate(ranked):
    look = {
      'color': report.CYCLE[i % len(report.CYCLE)],
      'lw': 1.6,
      'ls': ('-', '--', ':', '-.')[i // len(report.CYCLE) % 4],
    }
    mean = np.mean([np.interp(grid, *run['curve']) for run in runs], axis=0)
    left.plot(grid * study.BUDGET, mean, label=arm, **look)
    if arm in study.DMPO and all(run['ess'] for run in runs):
      middle.plot(*ess_of(study, runs), **look)
    mean, half = interval([run['final'] for run in runs])
    right.errorbar(
      [mean], [-i], xerr=[[half]] * 2, color=look['color'], marker='o', ms=4, capsize=3
    )
  unit = 'network forwards of a buffer'
  report.style(left, f'{title}: validation accuracy', unit)
  report.style(middle, "effective size of a group's weights / G", unit)
  report.style(right, 'final accuracy, 95 % interval', '')
  right.set_yticks(
    [-i for i in range(len(ranked))], [arm for arm, _ in ranked], fontsize=8
  )
  figure.legend(loc='outside lower center', fontsize=7, frameon=False, ncols=11)
  report.save(figure, path)


def ess_of(study, runs):
  """(forwards, ESS): means over an eighth of the budget and the runs."""
  parts = [
    [np.mean(part) for part in np.array_split(run['ess'], POINTS)] for run in runs
  ]
  return (np.arange(POINTS) + 0.5) / POINTS * study.BUDGET, np.mean(parts, axis=0)


def chosen(flag, text, there):
  """What the names in a flag stand for, once each; SystemExit for an unknown one."""
  names = text.split(',') if text else list(there)
  for name in names:
    if name not in there:
      sys.exit(f'--{flag}: {name!r} must be one of {", ".join(filter(None, there))}')
  return list(dict.fromkeys(itertools.chain(*(there[name] for name in names))))


def main(argv=None):
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  parser.add_argument('--study', choices=STUDIES, default='compare')
  parser.add_argument('--task', default='', help="comma-separated; '' = all")
  parser.add_argument('--arms', default='', help="comma-separated; '' = all")
  parser.add_argument('--seeds', type=int, default=len(compare.SEEDS))
  parser.add_argument('--workers', type=int, default=2, help='runs at once')
  parser.add_argument('--checkpoint', default='')
  parser.add_argument(
    '--only',
    choices=('train', 'judge', 'report'),
    help='one of the three, of what there is',
  )
  parser.add_argument('--known', default='', help='a TASK.jsonl of before')
  parser.add_argument('--folder', type=pathlib.Path, help='default: runs/STUDY')
  args, args.overrides = parser.parse_known_args(argv)
  args.folder = (args.folder or pathlib.Path('runs') / args.study).resolve()
  args.known, args.study = known(args.known), STUDIES[args.study]
  study, families, failed = args.study, families_of(args.study), []
  tasks = chosen('task', args.task, {task: [task] for task in study.TASKS})
  arms = chosen('arms', args.arms, {arm: [arm] for arm in study.ARMS} | families)
  for task in tasks:
    config_of(args, task)
  if args.only in (None, 'train'):
    share_cores(args.workers)
    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
      list(pool.map(lambda task: base(args, task), tasks))
      jobs = [(task, arm) for arm in arms for task in tasks]
      failed = [text for text in pool.map(lambda job: chain(args, *job), jobs) if text]
  for task in tasks:
    if args.only in (None, 'judge'):
      judge(args, task)
    if args.only in (None, 'report'):
      tables(args, task)
  if failed:
    sys.exit('\n'.join(failed))


if __name__ == '__main__':
  main()
