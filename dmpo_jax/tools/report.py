"""Pictures and tables of runs: one run's curves, and runs side by side.

Reads what a run leaves in its folder: metrics.jsonl, config.json and, once it
is done, results.json. A run under way is told by what it has written so far.
"""

import datetime
import json
import os
import pathlib
import statistics
import time

import numpy as np
from matplotlib.figure import Figure

from dmpo_jax import metrics

TRAIN, VALIDATION, SFT, GREY = '#0072b2', '#d55e00', '#009e73', '#777777'
CYCLE = (TRAIN, VALIDATION, SFT, '#cc79a7', '#e69f00', '#56b4e9', '#000000')

# (title, x label, ((phase, metric, label, colour), ...))
PANELS = (
  (
    'reward',
    'rollout iteration',
    (
      ('rl', 'reward', 'train rollouts', TRAIN),
      ('eval', 'reward', 'validation', VALIDATION),
    ),
  ),
  (
    'accuracy',
    'rollout iteration',
    (
      ('rl', 'accuracy', 'train rollouts', TRAIN),
      ('eval', 'accuracy', 'validation', VALIDATION),
    ),
  ),
  ('effective sample size', 'rollout iteration', (('rl', 'ess', 'ESS', TRAIN),)),
  (
    'log RND, standard deviation',
    'rollout iteration',
    (('rl', 'log_rnd_std', 'log RND s.d.', TRAIN),),
  ),
  ('loss', 'optimizer step', (('update', 'loss', 'RL', TRAIN),)),
  ('gradient norm', 'optimizer step', (('update', 'grad_norm', 'RL', TRAIN),)),
  ('SFT loss', 'SFT step', (('sft', 'loss', 'SFT', SFT),)),
  ('SFT gradient norm', 'SFT step', (('sft', 'grad_norm', 'SFT', SFT),)),
)


def _json(workdir, name):
  path = pathlib.Path(workdir) / name
  return json.loads(path.read_text(encoding='utf-8'))


def _pick(tree, path, where):
  """The value at a dotted path; `where` names the file in the complaint."""
  value = tree
  for part in path.split('.'):
    if not isinstance(value, dict) or part not in value:
      raise ValueError(f'{where} has no field {path!r}')
    value = value[part]
  return value


def series(rows, phase, name):
  """(steps, values) of a metric, by step; of a step written twice the last."""
  points = {
    row['step']: row[name] for row in rows if row['phase'] == phase and name in row
  }
  steps = sorted(points)
  return np.array(steps, float), np.array([points[s] for s in steps], float)


def running_mean(values, window):
  """Mean of the nearest `window` (odd) values, fewer at the ends; skips nan.

  Centred, as a trailing mean would lag: training would look worse than the
  validation beside it.
  """
  finite = np.isfinite(values)
  total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
  count = np.concatenate([[0], np.cumsum(finite)])
  at = np.arange(len(values))
  low = np.maximum(at - window // 2, 0)
  high = np.minimum(at + window // 2 + 1, len(values))
  n = count[high] - count[low]
  return np.where(n > 0, (total[high] - total[low]) / np.maximum(n, 1), np.nan)


def style(ax, title, xlabel):
  """The axes of all pictures here and in benchmarks."""
  ax.set_title(title, fontsize=10, loc='left')
  ax.set_xlabel(xlabel, fontsize=8, color='#555555')
  ax.tick_params(labelsize=8, color='#aaaaaa')
  ax.grid(color='#e6e6e6', linewidth=0.8)
  ax.set_axisbelow(True)
  ax.margins(x=0.02)
  for side in ('top', 'right'):
    ax.spines[side].set_visible(False)
  for side in ('left', 'bottom'):
    ax.spines[side].set_color('#aaaaaa')


def save(figure, path):
  """Writes a PNG in one step, as someone may be looking at the old one."""
  temporary = path.with_name(path.name + '.tmp')
  figure.savefig(temporary, format='png', dpi=140)
  os.replace(temporary, path)


def _draw(ax, steps, values, phase, label, colour):
  """Sparse series as marked points; long ones faint, with a running mean."""
  window = min(51, len(values) // 8 // 2 * 2 + 1)
  if phase == 'eval' or window == 1:
    ax.plot(steps, values, color=colour, marker='o', ms=3, lw=1.4, label=label)
    return
  ax.plot(steps, values, color=colour, alpha=0.25, lw=0.8)
  label = f'{label}, mean of {window}'
  mean = running_mean(values, window)
  ax.plot(steps, mean, color=colour, lw=1.8, label=label)


class NoData(ValueError):
  """There is nothing to draw yet."""


def curves(workdir):
  """Draws the run's curves.png, of a run under way too; returns its path.

  NoData if there is no number in its metrics.
  """
  workdir = pathlib.Path(workdir)
  rows = metrics.read(workdir)
  panels = []
  for title, xlabel, wanted in PANELS:
    lines = [
      (*series(rows, phase, name), phase, label, colour)
      for phase, name, label, colour in wanted
    ]
    lines = [line for line in lines if np.isfinite(line[1]).any()]
    if lines:
      panels.append((title, xlabel, lines))
  if not panels:
    raise NoData(f'no data to draw in {workdir / metrics.FILE}')

  base = None
  if (workdir / 'results.json').exists():
    base = _pick(
      _json(workdir, 'results.json'), 'base.accuracy', workdir / 'results.json'
    )
  columns = min(2, len(panels))
  height = -(-len(panels) // columns)
  figure = Figure(figsize=(5.2 * columns, 2.7 * height), layout='constrained')
  axes = figure.subplots(height, columns, squeeze=False).ravel()
  for ax in axes[len(panels) :]:
    ax.set_visible(False)
  for ax, (title, xlabel, lines) in zip(axes, panels, strict=False):
    style(ax, title, xlabel)
    for line in lines:
      _draw(ax, *line)
    if title == 'accuracy' and base is not None:
      ax.axhline(base, color=GREY, ls='--', lw=1.2, label=f'base {base:.3f}')
    ax.legend(fontsize=7, frameon=False)
  path = workdir / 'curves.png'
  save(figure, path)
  return path


def _runs(workdirs, by):
  """The finished runs, as dicts; complains about all that are not."""
  workdirs = [pathlib.Path(w) for w in workdirs]
  if not workdirs:
    raise ValueError('no runs to compare')
  for name in ('results.json', 'config.json'):
    lacking = [str(w) for w in workdirs if not (w / name).exists()]
    if lacking:
      raise ValueError(f'no {name} (run not finished?) in: {", ".join(lacking)}')
  runs, seen = [], {}
  for w in workdirs:
    config, results = _json(w, 'config.json'), _json(w, 'results.json')
    value = _pick(config, by, w / 'config.json')
    seed = _pick(config, 'seed', w / 'config.json')
    label = value if isinstance(value, str) else json.dumps(value)
    if (label, seed) in seen:
      raise ValueError(
        f'{w} and {seen[label, seed]} both have {by}={label}, seed={seed}'
      )
    seen[label, seed] = w
    run = {'label': label, 'seed': seed, 'workdir': w}
    for key in ('base.accuracy', 'final.accuracy', 'final.reward'):
      run[key] = _pick(results, key, w / 'results.json')
    run['seconds'] = _pick(results, 'seconds.total', w / 'results.json')
    steps, values = series(metrics.read(w), 'eval', 'accuracy')
    if not len(steps):
      raise ValueError(f'no eval accuracy in {w / metrics.FILE}')
    run['curve'] = dict(zip(steps, values, strict=True))
    runs.append(run)
  return runs


def _markdown(groups, by):
  """The table of `compare`: a line per value, means over its seeds."""
  header = (by, 'seeds', 'base accuracy', 'final accuracy', 'reward', 'seconds')
  lines = ['| ' + ' | '.join(header) + ' |', '|---' * len(header) + '|']
  for label, runs in groups.items():

    def mean(key, runs=runs):
      return statistics.fmean(run[key] for run in runs)

    final = f'{mean("final.accuracy"):.3f}'
    if len(runs) > 1:
      spread = statistics.stdev(run['final.accuracy'] for run in runs)
      final += f' ± {spread:.3f}'
    cells = (
      label,
      ', '.join(str(run['seed']) for run in runs),
      f'{mean("base.accuracy"):.3f}',
      final,
      f'{mean("final.reward"):.3f}',
      f'{mean("seconds"):.0f}',
    )
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def compare(workdirs, by, out):
  """Groups runs by a config field; returns (markdown table, path of the PNG).

  `by` is a dotted path into config.json. `out` is the PNG's path; the table
  goes next to it. Seeds of a value share a line with a min-max band, drawn at
  the iterations where all of them were evaluated.
  """
  out = pathlib.Path(out)
  if out.suffix != '.png':
    raise ValueError(f'out must end in .png: {out}')
  groups = {}
  for run in _runs(workdirs, by):
    groups.setdefault(run['label'], []).append(run)

  figure = Figure(figsize=(6.4, 4.0), layout='constrained')
  ax = figure.subplots()
  style(ax, 'validation accuracy', 'rollout iteration')
  for i, (label, runs) in enumerate(groups.items()):
    shared = sorted(set.intersection(*(set(run['curve']) for run in runs)))
    if not shared:
      names = ', '.join(str(run['workdir']) for run in runs)
      raise ValueError(f'no iteration at which all were evaluated: {names}')
    values = np.array([[run['curve'][s] for s in shared] for run in runs])
    colour = CYCLE[i % len(CYCLE)]
    ax.fill_between(
      shared, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0
    )
    name = f'{label} ({len(runs)} seed{"s" * (len(runs) > 1)})'
    ax.plot(shared, values.mean(0), color=colour, marker='o', ms=3, lw=1.8, label=name)
  ax.legend(title=by, title_fontsize=8, fontsize=8, frameon=False)

  out.parent.mkdir(parents=True, exist_ok=True)
  save(figure, out)
  markdown = _markdown(groups, by)
  out.with_suffix('.md').write_text(markdown, encoding='utf-8')
  return markdown, out


def summary(workdir):
  """The before/after table of a finished run."""
  path = pathlib.Path(workdir) / 'results.json'
  if not path.exists():
    raise ValueError(f'no results.json (run not finished?) in: {workdir}')
  results = _json(workdir, 'results.json')
  base, final = _pick(results, 'base', path), _pick(results, 'final', path)
  rows = [
    (name, float(base[name]), float(final[name]), final[name] - base[name])
    for name in base
    if name in final
  ]
  text = metrics.table(rows, ('test', 'before', 'after', 'change'))
  seconds = _pick(results, 'seconds', path)
  spent = ', '.join(f'{k} {metrics.eta(v)}' for k, v in seconds.items())
  return f'{text}\nseed {_pick(results, "seed", path)}; time: {spent}'


# --- a run under way


def under_way(workdir, now=None):
  """A run that is not done, in a few lines: where it is and what is wrong.

  now: seconds as of time.time(). Torn last lines are left out.
  FileNotFoundError without a config.json.
  """
  workdir, now = pathlib.Path(workdir), now or time.time()
  config, rows = _json(workdir, 'config.json'), metrics.read(workdir)
  phases = {
    phase: [row for row in rows if row['phase'] == phase]
    for phase in ('sft', 'rl', 'update', 'eval')
  }
  starts = _starts(workdir)
  seconds = _seconds_each(phases['rl'], starts)
  silence = now - max([row['time'] for row in rows] + starts, default=now)
  lines = [
    _place(config, phases, seconds) + f'; last line {metrics.eta(silence)} ago',
    *_numbers(phases),
    _saved(workdir, now),
    f'restarts: {max(0, len(starts) - 1)}',
    *(f'warning: {text}' for text in _warnings(workdir, config, phases, starts)),
  ]
  if silence > max(600, 10 * (seconds or 0)):
    lines.append('warning: nothing new for so long: is it still running?')
  return '\n'.join(lines)


def _starts(workdir):
  """When the run was started, and started again, as of time.time()."""
  try:
    told = _json(workdir, 'provenance.json')
    return [
      datetime.datetime.fromisoformat(entry['time']).timestamp() for entry in told
    ]
  except (OSError, ValueError, TypeError, KeyError):
    return []


def _seconds_each(rows, starts):
  """Mean seconds of the last 20 iterations, without compilation; or None.

  rows: of phase rl. What lies between two sessions does not count.
  """
  found = [
    b['time'] - a['time'] - b.get('seconds/compile', 0.0)
    for a, b in zip(rows, rows[1:], strict=False)
    if not any(a['time'] < start <= b['time'] for start in starts)
  ]
  return statistics.fmean(found[-20:]) if found else None


def _place(config, phases, seconds):
  """Iterations and updates done, their rate, and the time left."""
  t = config['train']
  if not phases['rl']:
    done = phases['sft'][-1]['step'] if phases['sft'] else 0
    return (
      f'supervised step {done} of {config["sft"]["steps"]}, then '
      f'{t["iterations"]} iterations'
    )
  updates = phases['update'][-1]['step'] if phases['update'] else 0
  done = updates // t['inner']
  text = f'iteration {done} of {t["iterations"]}, update {updates}'
  if not seconds:
    return text
  left = metrics.eta((t['iterations'] - done) * seconds)
  return f'{text}; {seconds:.3g} s an iteration, {left} left'


def _numbers(phases):
  """The last rollouts' and updates' numbers, validation last and best."""
  shown = [
    f'{name} {phases[phase][-1][name]:.4g}'
    for phase, names in (
      ('rl', ('reward', 'accuracy', 'ess')),
      ('update', ('loss', 'grad_norm')),
    )
    for name in names
    if phases[phase] and name in phases[phase][-1]
  ]
  lines = [', '.join(shown)] if shown else []
  if phases['eval']:
    last = phases['eval'][-1]
    best = max(phases['eval'], key=lambda row: row['accuracy'])
    lines.append(
      f'validation {last["accuracy"]:.4g} at iteration {last["step"]}, '
      f'best {best["accuracy"]:.4g} at {best["step"]}'
    )
  return lines


def _saved(workdir, now):
  """The newest checkpoint and its age; that of the base model before RL."""
  for name in ('rl', 'sft'):
    steps = [p for p in (workdir / name).glob('*') if p.name.isdigit()]
    if steps:
      newest = max(steps, key=lambda path: int(path.name))
      age = metrics.eta(now - newest.stat().st_mtime)
      return f'checkpoint: {name}/{newest.name}, {age} old'
  return 'checkpoint: none yet'


def _warnings(workdir, config, phases, starts):
  """What a person should look at, as sentences."""
  rl = phases['rl']
  if failed := sum(int(row.get('grades_failed', 0)) for row in rl):
    yield f'{failed} grades without a verdict (failed_grades.jsonl)'
  if rl and (age := rl[-1].get('policy_age', 0)):
    yield f'rollouts are by the policy of {age:.0f} updates before'
  if late := _late_compilations(config, rl, starts):
    yield (f'{late} programs compiled in the last 20 iterations: some shape changes')
  for path in sorted((workdir / 'failed').glob('*.npz')):
    yield f'a loss or gradient was not finite: {path}'
  if aside := list((workdir / 'rl.damaged').glob('*')):
    yield f'{len(aside)} checkpoints were damaged: {workdir / "rl.damaged"}'
  for path in sorted(workdir.glob('stuck_*.txt')):
    yield f'it hung at least once: {path}'
  for row in metrics.read(workdir, 'health.jsonl')[-3:]:
    yield 'health: ' + ', '.join(
      f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in row.items()
    )


def _late_compilations(config, rows, starts):
  """Programs compiled in the last 20 iterations, once all had been needed."""
  saving = -(-config['checkpoint']['every'] // config['train']['inner'])
  settled = 2 + max(config['eval']['every'], saving)
  begun = max(starts, default=0)
  session = [row for row in rows if row['time'] >= begun]
  return sum(int(row.get('compilations', 0)) for row in session[settled:][-20:])


# --- several evaluations


# What two cards must share for their numbers to be comparable at all.
SAME = ('task', 'protocol', 'split', 'style', 'problems')


def compare_cards(paths, out):
  """Results cards in one table and picture; returns (markdown, PNG's path).

  A line per card, best first within its length; a star marks those whose
  interval overlaps that of the best. ValueError names cards that cannot be
  compared, as for different protocols.
  """
  cards = [
    (str(path), json.loads(pathlib.Path(path).read_text('utf-8'))) for path in paths
  ]
  if not cards:
    raise ValueError('no card to compare')
  first, reference = cards[0]
  for path, card in cards:
    wrong = [
      f'{name}: {reference.get(name)!r} and {card.get(name)!r}'
      for name in SAME
      if card.get(name) != reference.get(name)
    ]
    if wrong:
      raise ValueError(f'{first} and {path} cannot be compared ({"; ".join(wrong)})')
  lines = [
    f'{reference["task"]}, protocol {reference["protocol"]}, '
    f'{reference["problems"]} problems; * = not distinguishable from '
    'the best of its length (95 % intervals overlap)',
    '',
    '| length | model | parameters | steps | accuracy | interval | forwards |',
    '|---|---|---|---|---|---|---|',
  ]
  figure = Figure(figsize=(6.4, 4.0), layout='constrained')
  ax = figure.subplots()
  style(ax, 'accuracy', 'completion length, tokens')
  by_name = {}
  for _, card in cards:
    by_name.setdefault((card['model'], card['parameters']), []).append(card)
  for length in sorted({card['length'] for _, card in cards}):
    here = sorted(
      (card for _, card in cards if card['length'] == length),
      key=lambda card: -card['accuracy'],
    )
    for card in here:
      low, high = card['interval']
      near = card is not here[0] and high >= here[0]['interval'][0]
      lines.append(
        f'| {length} | {card["model"]} | {card["parameters"]} | '
        f'{card["steps"]} | {card["accuracy"]:.3f}{" *" * near} | '
        f'{low:.3f} to {high:.3f} | '
        f'{card.get("forwards", float("nan")):.0f} |'
      )
  for i, (name, group) in enumerate(by_name.items()):
    group.sort(key=lambda card: card['length'])
    rate = np.array([card['accuracy'] for card in group])
    error = np.abs(np.array([card['interval'] for card in group]).T - rate)
    ax.errorbar(
      [card['length'] for card in group],
      rate,
      error,
      marker='o',
      capsize=3,
      color=CYCLE[i % len(CYCLE)],
      label=', '.join(name),
    )
  ax.legend(fontsize=8, frameon=False)
  out = pathlib.Path(out)
  out.parent.mkdir(parents=True, exist_ok=True)
  save(figure, out)
  markdown = '\n'.join(lines) + '\n'
  out.with_suffix('.md').write_text(markdown, encoding='utf-8')
  return markdown, out
