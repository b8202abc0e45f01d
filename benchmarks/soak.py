"""Runs the quickstart again and again, with kills: memory stays flat, nothing is lost.

python -m benchmarks.soak --minutes=60 [--config.train.iterations=50 ...]

It loops `python main.py --config=configs/quickstart.py` with a new seed a run, kills
it with -9 after random (exponential) times, and repeats the command. It reads resident
memory every second into memory.csv. Memory rises and falls within an iteration, so the
slope is fitted to its floor: the least of every WINDOW readings. One least-squares fit
covers all sessions, each with its own level and without its warm-up. The standard error
assumes independent points, which they are not; the slopes of single sessions show how
far to trust it. The last line is JSON; the exit code is 1 if anything is lost.
"""

import argparse
import collections
import json
import pathlib
import random
import sys
import time

import numpy as np

from benchmarks import kills
from dmpo_jax import files, metrics

FEWEST = 60  # readings of a session that counts
WINDOW = 15  # readings, several iterations, whose least is one point of the fit


def resident(process):
  """Returns the resident MiB of a process; nan once it has ended."""
  try:
    text = pathlib.Path(f'/proc/{process.pid}/status').read_text()
    return int(text.split('VmRSS:')[1].split()[0]) / 1024
  except (OSError, IndexError):
    return float('nan')


def live(session, life, warm, until):
  """Returns [(seconds, MiB)] of a session after its first `warm` updates.

  Kills it `life` seconds after these, or at time.time() = until.
  """
  readings, start, warmed = [], None, None
  while session.process.poll() is None:
    seen, now = kills.look(session), time.time()
    if seen.fresh and seen.update and start is None:
      start = seen.update
    if start is not None and seen.update >= start + warm:
      warmed = warmed or now
      readings.append((now - warmed, resident(session.process)))
    if now > until or warmed and now - warmed > life:
      session.process.kill()
      session.process.wait()
      return readings
    time.sleep(1)
  if session.process.returncode:
    sys.exit(
      f'{session.log}: the run failed by itself\n' + session.log.read_text()[-2000:]
    )
  return readings


def floor(readings):
  """Returns (n, 2) of (seconds, MiB): the mean and the least of every WINDOW."""
  x = readings[: len(readings) // WINDOW * WINDOW].reshape(-1, WINDOW, 2)
  return np.stack([x[..., 0].mean(1), x[..., 1].min(1)], axis=1)


def slope(sessions):
  """Returns (MiB/hour, its standard error, readings, [MiB/hour of each session]).

  sessions: lists of (seconds, MiB).
  """
  kept = [np.array(session).reshape(-1, 2) for session in sessions]
  kept = [x[np.isfinite(x[:, 1])] for x in kept]
  kept = [floor(x) for x in kept if len(x) >= FEWEST]
  if not kept:
    return float('nan'), float('nan'), 0, []
  readings = WINDOW * sum(map(len, kept))
  kept = [x - x.mean(axis=0) for x in kept]
  fit = lambda x: float(x[:, 0] @ x[:, 1] / (x[:, 0] @ x[:, 0]))
  together = np.concatenate(kept)
  common = fit(together)
  left = together[:, 1] - common * together[:, 0]
  freedom = len(together) - len(kept) - 1
  error = np.sqrt(left @ left / freedom / (together[:, 0] @ together[:, 0]))
  return (3600 * common, 3600 * float(error), readings, [3600 * fit(x) for x in kept])


def lost(workdir):
  """Returns sentences on what is missing, double or left over in a workdir."""
  done = (workdir / 'results.json').exists()
  config = workdir / 'config.json'
  if not config.exists():
    return []  # stopped before it had begun
  c = json.loads(config.read_text())
  n, inner, every = (c['train']['iterations'], c['train']['inner'], c['eval']['every'])
  whole = {
    'sft': range(1, c['sft']['steps'] + 1),
    'rl': range(n),
    'update': range(1, n * inner + 1),
    'eval': [i for i in range(n + 1) if i == n or every and i % every == 0],
  }
  found, said = collections.defaultdict(list), []
  for row in metrics.read(workdir):
    found[row['phase']].append(row['step'])
  for phase, steps in whole.items():
    wanted = list(steps)[: None if done else len(found[phase])]
    if found[phase] != wanted:
      said.append(f'{workdir}: steps of {phase} are {found[phase]}')
  count = collections.Counter(
    row['iteration'] for row in files.read(workdir / 'samples.jsonl')
  )
  for it in found['rl'] if done else found['rl'][:-1]:
    if count[it] != c['log']['samples']:
      said.append(f'{workdir}: {count[it]} samples of iteration {it}')
  left = [
    path.name
    for pattern in ('*.new', '*.tmp', '*-tmp*')
    for path in workdir.rglob(pattern)
  ]
  return said + ([f'{workdir}: left over: {left}'] if done and left else [])


def main(argv=None):
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  parser.add_argument('--minutes', type=float, default=60)
  parser.add_argument(
    '--mean', type=float, default=8, help='minutes from the warm-up to a kill'
  )
  parser.add_argument(
    '--warm',
    type=int,
    default=45,
    help='updates of each session that do not count: two validations are in them',
  )
  parser.add_argument('--seed', type=int, default=0, help='of the kills')
  parser.add_argument('--folder', default='runs/soak', help='a new one')
  args, overrides = parser.parse_known_args(argv)
  folder = pathlib.Path(args.folder).resolve()
  folder.mkdir(parents=True)
  draw, until = random.Random(args.seed), time.time() + 60 * args.minutes
  runs, sessions, said, killed = 0, [], [], 0
  while time.time() < until:
    workdir = folder / f'run_{runs}'
    session = kills.begin(
      workdir, ['--config=configs/quickstart.py', f'--config.seed={runs}', *overrides]
    )
    life = draw.expovariate(1 / (60 * args.mean))
    sessions.append(live(session, life, args.warm, until))
    with open(folder / 'memory.csv', 'a') as f:
      f.writelines(f'{len(sessions)},{t:.1f},{mib:.1f}\n' for t, mib in sessions[-1])
    stopped, after = session.process.returncode == -9, time.time() < until
    killed += stopped and after
    said += lost(workdir)
    runs += not stopped
    print(
      f'session {len(sessions)}: {workdir.name} '
      f'{"killed" if stopped else "done"} after {len(sessions[-1])} '
      'readings',
      flush=True,
    )
  rate, error, readings, each = slope(sessions)
  for text in said[:20]:
    print(text)
  most = max((mib for s in sessions for _, mib in s), default=0)
  result = dict(
    minutes=args.minutes,
    runs=runs,
    sessions=len(sessions),
    kills=killed,
    slope_MiB_per_hour=round(rate, 2) if readings else None,
    standard_error=round(error, 2) if readings else None,
    readings=readings,
    each_session=[round(x, 1) for x in each],
    largest_MiB=round(most),
    lost=len(said),
  )
  print(json.dumps(result), flush=True)
  return result


if __name__ == '__main__':
  sys.exit(bool(main()['lost']))
