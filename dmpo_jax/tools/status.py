"""Describes a run under way: how far it is, its last numbers, and warnings."""

import datetime
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from dmpo_jax import files, health, metrics
from dmpo_jax.tools import provenance

duration = tqdm.format_interval


def under_way(workdir: files.Path, now: float | None = None) -> str:
  """Describes an unfinished run in a few lines.

  now: seconds as of time.time(); None = the present. Torn last lines are left
  out. Raises FileNotFoundError without a config.json.
  """
  workdir, now = pathlib.Path(workdir), now or time.time()
  config = files.read_json(workdir / 'config.json')
  rows = metrics.read(workdir)
  phases = phases_of(rows)
  starts = start_times(workdir)
  seconds = seconds_per_iteration(phases['rl'], starts)
  silence = now - max([row['time'] for row in rows] + starts, default=now)
  lines = [
    f'{position(config, phases, seconds)}; last line {duration(silence)} ago',
    *last_numbers(phases),
    newest_checkpoint(workdir, now),
    f'restarts: {max(0, len(starts) - 1)}',
    *(f'warning: {text}' for text in warnings(workdir, config, phases, starts)),
  ]
  if silence > max(600, 10 * (seconds or 0)):
    lines.append('warning: no new line for so long: is it still running?')
  return '\n'.join(lines)


COLUMNS = ('run', 'config', 'progress', 'accuracy', 'started', 'commit')


def listing(workdirs: Sequence[files.Path]) -> str:
  """Returns a table of runs, the latest start last; names folders that are no runs."""
  rows, broken = [], []
  for workdir in map(pathlib.Path, workdirs):
    try:
      rows.append(row_of(workdir))
    except FileNotFoundError as error:
      broken.append(
        f'{workdir}: no run, there is no {pathlib.Path(error.filename).name}'
      )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
      why = ' '.join(str(error).split())
      broken.append(f'{workdir}: cannot be read ({type(error).__name__}: {why})')
  rows = [COLUMNS, *sorted(rows, key=lambda row: row[4])]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '  '.join(f'{x:{width}}' for x, width in zip(row, widths, strict=True)).rstrip()
    for row in rows
  ]
  return '\n'.join([*lines * (len(rows) > 1), *broken])


def row_of(workdir: pathlib.Path) -> tuple[str, ...]:
  """Returns the cells of COLUMNS; raises what reading a broken workdir raises."""
  config = files.read_json(workdir / 'config.json')
  by_phase = phases_of(metrics.read(workdir))
  tested = (workdir / 'results.json').exists()
  if tested:
    accuracy = files.read_json(workdir / 'results.json')['final']['accuracy']
    progress, said = 'done', f'{accuracy:.3f} test'
  else:
    progress = position(config, by_phase, None).partition(', ')[0]
    found = by_phase['eval'] or by_phase['rl']
    kind = 'validation' if by_phase['eval'] else 'rollouts'
    said = f'{found[-1]["accuracy"]:.3f} {kind}' if found else '-'
  start = next(iter(provenance.read(workdir)[-1:]), {})
  date = str(start.get('time', '-'))[:16].replace('T', ' ')
  commit = str((start.get('git') or {}).get('revision', '-'))[:8]
  return str(workdir), str(config['name']), progress, said, date, commit


def phases_of(rows: Sequence[dict]) -> dict[str, list[dict]]:
  """Returns the rows of each phase."""
  names = ('sft', 'pairs', 'rl', 'update', 'eval')
  return {name: [row for row in rows if row['phase'] == name] for name in names}


def start_times(workdir: pathlib.Path) -> list[float]:
  """Returns the times of the run's starts, as of time.time()."""
  try:
    return [
      datetime.datetime.fromisoformat(entry['time']).timestamp()
      for entry in provenance.read(workdir)
    ]
  except (ValueError, TypeError, KeyError):
    return []


def seconds_per_iteration(
  rows: Sequence[dict], starts: Sequence[float]
) -> float | None:
  """Returns mean seconds of the last 20 iterations, without compilation.

  rows: of phase rl. The time between two sessions does not count. Returns None
  if there is no pair of iterations.
  """
  found = [
    b['time'] - a['time'] - b.get('seconds/compile', 0.0)
    for a, b in zip(rows, rows[1:], strict=False)
    if not any(a['time'] < start <= b['time'] for start in starts)
  ]
  return statistics.fmean(found[-20:]) if found else None


def position(config: dict, phases: dict[str, list], seconds: float | None) -> str:
  """Returns iterations and updates done, their rate, and the time left."""
  t = config['train']
  if not (phases['rl'] or phases['pairs']) and config['sft']['steps']:
    done = phases['sft'][-1]['step'] if phases['sft'] else 0
    sft = config['sft']
    whole = f'{sft["steps"]}' if sft['steps'] else f'{sft["epochs"]} epochs'
    return f'supervised step {done} of {whole}, then {t["iterations"]} iterations'
  if phases['pairs'] and not phases['rl']:
    done = phases['pairs'][-1]['step']
    return f'update {done} on pairs, then {t["iterations"]} iterations'
  updates = phases['update'][-1]['step'] if phases['update'] else 0
  done = updates // t['inner']
  text = f'iteration {done} of {t["iterations"]}, update {updates}'
  if not seconds:
    return text
  left = duration((t['iterations'] - done) * seconds)
  return f'{text}; {seconds:.3g} s per iteration, {left} left'


def last_numbers(phases: dict[str, list]) -> list[str]:
  """Returns the last rollouts' and updates' numbers, and the validations."""
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


def newest_checkpoint(workdir: pathlib.Path, now: float) -> str:
  """Names the newest checkpoint and its age; before RL that of the base model."""
  for name in ('rl', 'pairs', 'sft'):
    steps = [path for path in (workdir / name).glob('*') if path.name.isdigit()]
    if steps:
      newest = max(steps, key=lambda path: int(path.name))
      age = duration(now - newest.stat().st_mtime)
      return f'checkpoint: {name}/{newest.name}, {age} old'
  return 'checkpoint: none yet'


def warnings(
  workdir: pathlib.Path, config: dict, phases: dict[str, list], starts: list[float]
) -> Iterator[str]:
  """Yields a sentence for each thing that a person should look at."""
  rl = phases['rl']
  flat = [row.get('equal_reward_groups') == 1 for row in rl[-health.FLAT :]]
  if len(flat) == health.FLAT and all(flat):
    yield health.flat_sentence(health.FLAT, rl[-1]['reward'])
  if failed := sum(int(row.get('grades_failed', 0)) for row in rl):
    yield f'{failed} answers could not be graded (failed_grades.jsonl)'
  if rl and (age := rl[-1].get('policy_age', 0)):
    yield f'rollouts are sampled by the policy of {age:.0f} updates before'
  if late := late_compilations(config, rl, starts):
    yield f'{late} programs compiled in the last 20 iterations: some shape changes'
  for path in sorted((workdir / 'failed').glob('*.npz')):
    yield f'a loss or gradient was not finite: {path}'
  if damaged := list((workdir / 'rl.damaged').glob('*')):
    yield f'{len(damaged)} checkpoints were damaged: {workdir / "rl.damaged"}'
  for path in sorted(workdir.glob('stuck_*.txt')):
    yield f'the run hung at least once: {path}'
  for row in files.read(workdir / 'health.jsonl')[-3:]:
    number = lambda x: f'{x:.4g}' if isinstance(x, float) else f'{x}'
    yield 'health: ' + ', '.join(f'{name} {number(x)}' for name, x in row.items())


def late_compilations(config: dict, rows: list[dict], starts: list[float]) -> int:
  """Counts programs compiled in the last 20 iterations of this session.

  The session's first iterations do not count, until all programs were needed.
  """
  saving = -(-config['checkpoint']['every'] // config['train']['inner'])
  settled = 2 + max(config['eval']['every'], saving)
  begun = max(starts, default=0)
  session = [row for row in rows if row['time'] >= begun]
  return sum(int(row.get('compilations', 0)) for row in session[settled:][-20:])
