"""Draws pictures and tables of runs: one run's curves, and runs side by side.

It reads metrics.jsonl, config.json and, of a finished run, results.json. A run
under way is drawn as far as it is.
"""

import contextlib
import io
import json
import os
import pathlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from dmpo_jax import files, metrics
from dmpo_jax.tools import provenance

TRAIN, VALIDATION, SFT, GREY = '#0072b2', '#d55e00', '#009e73', '#777777'
CYCLE = (TRAIN, VALIDATION, SFT, '#cc79a7', '#e69f00', '#56b4e9', '#000000')
BUFFER, UPDATE, STEP = 'rollout iteration', 'optimizer step', 'SFT step'

# (x label, ((phase, metric, label, colour), ...)). The title of a panel is its
# metric's name and meaning.
PANELS = (
  (
    BUFFER,
    (
      ('rl', 'reward', 'train rollouts', TRAIN),
      ('eval', 'reward', 'validation', VALIDATION),
    ),
  ),
  (
    BUFFER,
    (
      ('rl', 'accuracy', 'train rollouts', TRAIN),
      ('eval', 'accuracy', 'validation', VALIDATION),
    ),
  ),
  (BUFFER, (('rl', 'ess', 'train rollouts', TRAIN),)),
  (BUFFER, (('rl', 'log_rnd_std', 'train rollouts', TRAIN),)),
  (UPDATE, (('update', 'loss', 'RL', TRAIN),)),
  (UPDATE, (('update', 'grad_norm', 'RL', TRAIN),)),
  (STEP, (('sft', 'loss', 'SFT', SFT),)),
  (STEP, (('sft', 'grad_norm', 'SFT', SFT),)),
)


class NoData(ValueError):
  """There is nothing to draw yet."""


def _pick(tree: Any, path: str, where: files.Path) -> Any:
  """Returns the value at a dotted path; `where` names the file in the error."""
  value = tree
  for part in path.split('.'):
    if not isinstance(value, dict) or part not in value:
      raise ValueError(f'{where} has no field {path!r}')
    value = value[part]
  return value


def series(
  rows: Sequence[dict], phase: str, name: str
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (steps, values) of a metric, by step; of a repeated step the last."""
  points = {
    row['step']: row[name] for row in rows if row['phase'] == phase and name in row
  }
  steps = sorted(points)
  return np.array(steps, float), np.array([points[s] for s in steps], float)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
  """Returns centred means over `window` (odd) values; nan values do not count.

  Near an end the window shrinks on both sides, down to the first value alone. So
  the curve neither lags behind its data nor hides the first rise.
  """
  finite = np.isfinite(values)
  total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
  count = np.concatenate([[0], np.cumsum(finite)])
  at = np.arange(len(values))
  half = np.minimum(window // 2, np.minimum(at, len(values) - 1 - at))
  low, high = at - half, at + half + 1
  n = count[high] - count[low]
  return np.where(n > 0, (total[high] - total[low]) / np.maximum(n, 1), np.nan)


def style(ax: Axes, title: str, xlabel: str) -> None:
  """Sets the axes of all pictures here and in benchmarks."""
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


def save(figure: Figure, path: files.Path) -> None:
  """Writes a PNG in one step, because a viewer may have the old one open."""
  png = io.BytesIO()
  figure.savefig(png, format='png', dpi=140)
  files.replace(path, png.getvalue())


def _draw(ax, steps, values, phase, label, colour):
  """Draws a short series as points, a long one faint with a running mean."""
  window = min(51, len(values) // 8 // 2 * 2 + 1)
  if phase == 'eval' or window == 1:
    ax.plot(steps, values, color=colour, marker='o', ms=3, lw=1.4, label=label)
    return
  ax.plot(steps, values, color=colour, alpha=0.25, lw=0.8)
  label = f'{label}, mean of {window}'
  ax.plot(steps, running_mean(values, window), color=colour, lw=1.8, label=label)


def title_of(workdir: pathlib.Path) -> str:
  """Returns a run's config name, seed, last start and commit, as far as known."""
  parts = [workdir.name]
  if (workdir / 'config.json').exists():
    fields = files.read_json(workdir / 'config.json')
    parts = [fields.get('name', workdir.name), f'seed {fields.get("seed")}']
  for start in provenance.read(workdir)[-1:]:
    parts.append(str(start.get('time'))[:10])
    git = start.get('git') or {}
    if git.get('revision'):
      parts.append(f'commit {git["revision"][:8]}' + ' and changes' * bool(git['diff']))
  return ', '.join(parts)


def curves(workdir: files.Path) -> pathlib.Path:
  """Draws curves.png of a run, finished or under way; returns its path.

  Raises NoData if there is no number in its metrics.
  """
  workdir = pathlib.Path(workdir)
  rows = metrics.read(workdir)
  panels = []
  for xlabel, wanted in PANELS:
    lines = [
      (*series(rows, phase, name), phase, label, colour)
      for phase, name, label, colour in wanted
    ]
    lines = [line for line in lines if np.isfinite(line[1]).any()]
    if lines:
      panels.append((*wanted[0][:2], xlabel, lines))
  if not panels:
    raise NoData(f'no data to draw in {workdir / metrics.FILE}')

  tested: dict[str, Any] = {'base': {}, 'final': {}}
  with contextlib.suppress(OSError, ValueError):  # none yet, or damaged: made again
    tested |= files.read_json(workdir / 'results.json')
  columns = min(2, len(panels))
  height = -(-len(panels) // columns)
  figure = Figure(figsize=(5.2 * columns, 2.7 * height + 0.3), layout='constrained')
  figure.suptitle(title_of(workdir), fontsize=11)
  axes = figure.subplots(height, columns, squeeze=False).ravel()
  for ax in axes[len(panels) :]:
    ax.set_visible(False)
  for ax, (phase, name, xlabel, lines) in zip(axes, panels, strict=False):
    style(ax, f'{phase}/{name}: {metrics.meaning(name).partition(";")[0]}', xlabel)
    for line in lines:
      _draw(ax, *line)
    if phase == 'rl' and name in tested['base']:
      base, final = tested['base'][name], tested['final'][name]
      last = max(line[0][-1] for line in lines)
      ax.axhline(base, color=GREY, ls='--', lw=1.2, label=f'test before {base:.3f}')
      ax.plot(last, final, 'k*', ms=9, zorder=3, label=f'test after {final:.3f}')
    ax.legend(fontsize=7, frameon=False)
  save(figure, workdir / 'curves.png')
  return workdir / 'curves.png'


def curves_of_end(workdir: files.Path) -> None:
  """Draws curves.png of a finished run, unless it was drawn after the end."""
  picture, results = (pathlib.Path(workdir) / x for x in ('curves.png', 'results.json'))
  if not picture.exists() or picture.stat().st_mtime_ns < results.stat().st_mtime_ns:
    curves(workdir)


def differing_fields(a: Any, b: Any, name: str = '') -> Iterator[str]:
  """Yields the dotted names of the fields in which two configs differ."""
  if isinstance(a, dict) and isinstance(b, dict):
    for key in sorted(a.keys() | b.keys()):
      yield from differing_fields(a.get(key), b.get(key), f'{name}.{key}'.lstrip('.'))
  elif a != b:
    yield name


def _runs(workdirs: list[pathlib.Path], by: str) -> list[dict]:
  """Returns the finished runs as dicts; raises ValueError for all that are not."""
  if not workdirs:
    raise ValueError('no runs to compare')
  for name in ('results.json', 'config.json'):
    lacking = [str(w) for w in workdirs if not (w / name).exists()]
    if lacking:
      raise ValueError(f'no {name} (run not finished?) in: {", ".join(lacking)}')
  runs, seen = [], {}
  for w in workdirs:
    config, results = (
      files.read_json(w / 'config.json'),
      files.read_json(w / 'results.json'),
    )
    value = _pick(config, by, w / 'config.json')
    seed = _pick(config, 'seed', w / 'config.json')
    label = value if isinstance(value, str) else json.dumps(value)
    if (label, seed) in seen:
      other, other_config = seen[label, seed]
      differ = ', '.join(list(differing_fields(config, other_config))[:5])
      raise ValueError(
        f'{w} and {other} both have {by}={label}, seed={seed}: name fewer runs in '
        '--runs'
        + (f', or name a field in --by in which they differ ({differ})' * bool(differ))
      )
    seen[label, seed] = w, config
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


def _markdown(groups: dict[str, list[dict]], by: str) -> str:
  """Returns the table of `compare`: a line per value, means over its seeds."""
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


def _out_path(
  out: files.Path, inputs: Sequence[pathlib.Path], name: str
) -> pathlib.Path:
  """Returns the PNG's path: `out`, or `name` in the folder that holds the inputs.

  If that is the current folder, or above it, the picture goes into runs/: such a folder
  is a project's, whose files may be under version control.
  """
  if not out:
    folder = pathlib.Path(os.path.commonpath([p.absolute().parent for p in inputs]))
    if pathlib.Path.cwd().is_relative_to(folder):
      return pathlib.Path('runs') / name
    inside = folder.is_relative_to(pathlib.Path.cwd())
    return (folder.relative_to(pathlib.Path.cwd()) if inside else folder) / name
  if pathlib.Path(out).suffix != '.png':
    raise ValueError(f'--out={out} must end in .png')
  return pathlib.Path(out)


def _write(figure: Figure, markdown: str, out: pathlib.Path) -> None:
  """Writes a picture, and its table beside it."""
  out.parent.mkdir(parents=True, exist_ok=True)
  save(figure, out)
  files.replace(out.with_suffix('.md'), markdown)


def compare(
  workdirs: Sequence[files.Path], by: str, out: files.Path = ''
) -> tuple[str, pathlib.Path]:
  """Groups runs by a config field; returns (Markdown table, path of the PNG).

  by: dotted path into config.json. out: path of the PNG, the table goes beside
  it; '' = comparison.png in the folder that holds the runs. Seeds of a value
  share a line with a min-max band, at the iterations where all were evaluated.
  """
  workdirs = [pathlib.Path(w) for w in workdirs]
  groups = {}
  for run in _runs(workdirs, by):
    groups.setdefault(run['label'], []).append(run)
  out = _out_path(out, workdirs, 'comparison.png')
  figure = Figure(figsize=(6.4, 4.0), layout='constrained')
  ax = figure.subplots()
  style(ax, 'validation accuracy', BUFFER)
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
  markdown = _markdown(groups, by)
  _write(figure, markdown, out)
  return markdown, out


def summary(workdir: files.Path) -> str:
  """Returns the before/after table of a finished run's test split."""
  workdir = pathlib.Path(workdir)
  path = workdir / 'results.json'
  if not path.exists():
    raise ValueError(f'no results.json (run not finished?) in: {workdir}')
  results = files.read_json(path)
  base, final = _pick(results, 'base', path), _pick(results, 'final', path)
  width = max(map(len, ['test', *base]))
  lines = [f'{"test":{width}}  {"before":>8}  {"after":>8}  {"change":>8}']
  lines.append('-' * len(lines[0]))
  for name in [name for name in base if name in final]:
    pair = base[name], final[name], final[name] - base[name]
    lines.append(f'{name:{width}}' + ''.join(f'  {x:8.4g}' for x in pair))
  seconds = _pick(results, 'seconds', path)
  spent = ', '.join(f'{k} {tqdm.format_interval(x)}' for k, x in seconds.items())
  return '\n'.join([*lines, f'seed {_pick(results, "seed", path)}; time: {spent}'])


# Fields in which two cards must agree for their numbers to be comparable.
SAME = ('task', 'protocol', 'split', 'set', 'style', 'problems')


def read_cards(paths: Sequence[files.Path]) -> list[dict]:
  """Reads results cards; raises ValueError for cards that cannot be compared."""
  cards = [files.read_json(path) for path in paths]
  if not cards:
    raise ValueError('no card to compare')
  for path, card in zip(paths, cards, strict=True):
    differ = [
      f'{name}: {cards[0].get(name)!r} and {card.get(name)!r}'
      for name in SAME
      if (card.get(name) or '') != (cards[0].get(name) or '')  # '': an older card
    ]
    if differ:
      raise ValueError(
        f'{paths[0]} and {path} cannot be compared ({"; ".join(differ)}): '
        'name fewer in --cards'
      )
  return cards


def card_table(cards: Sequence[dict]) -> str:
  """Returns cards as a Markdown table, by length and then by accuracy."""
  lines = [
    f'{cards[0]["task"]}, protocol {cards[0]["protocol"]}, '
    f'{cards[0]["problems"]} problems; * = not distinguishable from '
    'the best of its length (95 % intervals overlap)',
    '',
    '| length | model | parameters | steps | accuracy | interval | forwards |',
    '|---|---|---|---|---|---|---|',
  ]
  best = {}  # of each length
  for card in sorted(cards, key=lambda card: (card['length'], -card['accuracy'])):
    first = best.setdefault(card['length'], card)
    low, high = card['interval']
    near = card is not first and high >= first['interval'][0]
    lines.append(
      f'| {card["length"]} | {card["model"]} | {card["parameters"]} | '
      f'{card["steps"]} | {card["accuracy"]:.3f}{" *" * near} | '
      f'{low:.3f} to {high:.3f} | '
      f'{card.get("forwards", float("nan")):.0f} |'
    )
  return '\n'.join(lines) + '\n'


def compare_cards(
  paths: Sequence[files.Path], out: files.Path = ''
) -> tuple[str, pathlib.Path]:
  """Compares results cards; returns (Markdown table, path of the PNG).

  A star marks cards whose interval overlaps that of the best of their length.
  out: path of the PNG, the table goes beside it; '' = cards.png in the folder
  that holds the cards.
  """
  cards = read_cards(paths)
  for path, card in zip(paths, cards, strict=True):
    if not {'length', 'accuracy', 'interval', 'model'} <= card.keys():
      raise ValueError(f'{path} is no results card: name the *.card.json files')
  out = _out_path(out, [pathlib.Path(path) for path in paths], 'cards.png')
  figure = Figure(figsize=(6.4, 4.0), layout='constrained')
  ax = figure.subplots()
  style(ax, 'accuracy', 'completion length, tokens')
  groups = {}
  for card in sorted(cards, key=lambda card: card['length']):
    groups.setdefault((card['model'], card['parameters']), []).append(card)
  for i, (name, group) in enumerate(groups.items()):
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
  markdown = card_table(cards)
  _write(figure, markdown, out)
  return markdown, out
