"""A run killed at random moments ends as a run that nothing interrupts.

python -m benchmarks.kills --kills=20 [--config.optim.lr=1e-3 ...]

Runs `python main.py --config=configs/quickstart.py`, made small, first in
peace and then with kill -9 at seeded random moments of each phase, started
again by the same command each time. The results must be equal to the bit: every
array of every checkpoint, metrics but for times, samples, answers and results.
The last line is JSON; the exit code is 1 if anything differs.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import shlex
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from dmpo_jax import metrics

ROOT = pathlib.Path(__file__).parents[1]
# Each phase takes long enough to be hit, a run a minute or two.
SMALL = (
  '--config.sft.steps=60',
  '--config.sft.batch=64',
  '--config.data.train_size=2000',
  '--config.data.test_size=128',
  '--config.train.iterations=24',
  '--config.train.inner=2',
  '--config.train.prompts=16',
  '--config.train.microbatches=2',
  '--config.checkpoint.every=3',
  '--config.eval.every=3',
  '--config.optim.warmup=5',
  '--config.optim.lr=1e-4',
)
# Phases of a run, by what it has written last.
START, SFT, SAMPLE, UPDATE, SAVE, EVALUATE, END = PHASES = (
  'start',
  'supervised',
  'sampling',
  'inner steps',
  'saving',
  'evaluation',
  'final evaluation',
)


class Session(NamedTuple):
  process: subprocess.Popen
  workdir: pathlib.Path
  begun: float  # time.time()
  stale: set  # half-written checkpoints of sessions before
  log: pathlib.Path


class Seen(NamedTuple):
  phase: str
  update: int  # updates that are written
  fresh: bool  # whether this session has written anything


def launch(workdir, arguments, folder):
  """Starts main.py; returns (process, its log, which begins with the command).

  Processes with this folder share a compilation cache."""
  log = workdir.with_name(workdir.name + '.log')
  command = [sys.executable, str(ROOT / 'main.py'), f'--workdir={workdir}', *arguments]
  cache = {
    'JAX_COMPILATION_CACHE_DIR': str(folder / 'programs'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  with open(log, 'a') as out:
    out.write(shlex.join(command) + '\n')
    out.flush()
    return subprocess.Popen(
      command, stdout=out, stderr=out, cwd=ROOT, env={**cache, **os.environ}
    ), log


def begin(workdir, arguments):
  """Starts the command, or starts it again."""
  process, log = launch(workdir, arguments, workdir.parent)
  return Session(process, workdir, time.time(), unfinished(workdir), log)


def unfinished(workdir):
  """Returns {(name, inode)} of checkpoints that are not whole."""
  found = set()
  for folder in ('rl', 'sft'):
    if (workdir / folder).is_dir():
      found |= {
        (entry.name, entry.inode())
        for entry in os.scandir(workdir / folder)
        if not entry.name.isdigit()
      }
  return found


def last_row(workdir):
  """Returns the newest whole row of the metrics, {} before there is one."""
  path = workdir / metrics.FILE
  if not path.exists():
    return {}
  with open(path, 'rb') as f:
    f.seek(max(0, path.stat().st_size - (1 << 16)))
    whole = f.read().rpartition(b'\n')[0]
  return json.loads(whole.rpartition(b'\n')[2] or b'{}')


def look(session):
  """Returns where a run is; after a kill, where it was."""
  row = last_row(session.workdir)
  fresh = row.get('time', 0) > session.begun
  if not row:
    return Seen(START, 0, fresh)
  c = json.loads((session.workdir / 'config.json').read_text())
  t, step, update = c['train'], row['step'], 0
  if row['phase'] == 'sft':
    phase = SFT if step < c['sft']['steps'] else EVALUATE
  elif row['phase'] == 'rl':
    phase, update = UPDATE, step * t['inner']
  elif row['phase'] == 'eval':
    phase, update = SAMPLE, step * t['inner']
    phase = END if step == t['iterations'] else phase
  else:
    update, (it, inner) = step, divmod(step, t['inner'])
    judged = it == t['iterations'] or it % c['eval']['every'] == 0
    phase = UPDATE if inner else EVALUATE if judged else SAMPLE
  if not fresh:
    phase = START
  if unfinished(session.workdir) - session.stale:
    phase = SAVE
  return Seen(phase, update, fresh)


def seen(session):
  """Yields a Seen every few milliseconds until the process ends."""
  while session.process.poll() is None:
    yield look(session)
    time.sleep(0.003)
  if session.process.returncode:
    sys.exit(
      f'{session.log}: the run failed by itself\n' + session.log.read_text()[-2000:]
    )


def in_peace(workdir, arguments):
  """Runs to the end; returns {phase: seconds it takes at a time}."""
  spent: dict = collections.defaultdict(float)
  visits = collections.Counter()
  before, then = None, time.monotonic()
  for now in seen(begin(workdir, arguments)):
    spent[before] += time.monotonic() - then
    visits[now.phase] += now.phase != before
    before, then = now.phase, time.monotonic()
  return {phase: spent[phase] / visits[phase] for phase in visits}


def plan(kills, updates, draw):
  """Returns [(phase to kill in, first update)], in the order of updates."""
  laps = [draw.sample([SAMPLE, UPDATE, SAVE, EVALUATE, START], 5) for _ in range(kills)]
  middle = [phase for lap in laps for phase in lap][: max(0, kills - 2)]
  places = sorted(draw.randrange(updates) for _ in middle)
  return [(SFT, 0), *zip(middle, places, strict=True), (END, updates)][:kills]


def kill(session, aim, place, takes, draw):
  """Kills a session within the phase `aim`, from the update `place` on.

  Never before its first own line but where START is the aim, so that the
  runs come to an end. Returns a Seen: where it was; None if it had ended.
  """
  for now in seen(session):
    there = now.phase == aim and now.update >= place or now.phase == END
    if aim == START or now.fresh and there:
      time.sleep(draw.uniform(0, takes.get(aim, 1)))
      session.process.kill()
      session.process.wait()
      return look(session) if session.process.returncode == -9 else None


def killed(workdir, arguments, moments, takes, draw):
  """Kills at the moments, then lets the run end; returns where it was."""
  hits = []
  for aim, place in moments:
    hit = kill(begin(workdir, arguments), aim, place, takes, draw)
    if hit is None:
      break
    hits.append(hit.phase)
    print(
      f'kill {len(hits)} of {len(moments)}: {hit.phase}, after update {hit.update}',
      flush=True,
    )
  in_peace(workdir, arguments)
  return hits


# --- what is compared


def checkpoints(workdir):
  """Returns {step/tree/path: array or value} of the whole checkpoints."""
  found = {}
  for folder in sorted((workdir / 'rl').glob('*[0-9]')):
    meta = json.loads((folder / 'meta' / 'metadata').read_text())
    found[f'{folder.name}/meta'] = {k: v for k, v in meta.items() if k != 'seconds'}
    saved = {path.name for path in folder.iterdir()}
    for name in sorted(saved & {'state', 'batch', 'ahead'}):
      with ocp.StandardCheckpointer() as about, ocp.PyTreeCheckpointer() as io:
        shapes = about.metadata(folder / name).item_metadata.tree
        as_numpy = jax.tree.map(
          lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes
        )
        tree = io.restore(folder / name, restore_args=as_numpy)
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found[f'{folder.name}/{name}{jax.tree_util.keystr(path)}'] = leaf
  return found


def lines(workdir):
  """Returns {file/line: content} without times and compilations."""
  found = {}
  for i, row in enumerate(metrics.read(workdir)):
    found[f'{metrics.FILE}/{i + 1}'] = {
      k: v for k, v in row.items() if not metrics.of_machine(k)
    }
  for name in ('samples.jsonl', 'test_base.jsonl', 'test_final.jsonl'):
    text = (workdir / name).read_text()
    found |= {f'{name}/{i + 1}': line for i, line in enumerate(text.split('\n'))}
  results = json.loads((workdir / 'results.json').read_text())
  return found | {
    f'results.json/{k}': results[k]
    for k in ('base', 'final', 'seed', 'config', 'versions')
  }


def differences(one, two):
  """Returns sentences on how two finished runs differ; nan equals nan."""
  said = []
  for read in (checkpoints, lines):
    a, b = read(one), read(two)
    said += [
      f'{name} is in {one if name in a else two} alone'
      for name in sorted(set(a) ^ set(b))
    ]
    for name in sorted(set(a) & set(b)):
      x, y = a[name], b[name]
      if isinstance(x, np.ndarray):
        same = (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
      else:
        same = repr(x) == repr(y)
      said += [] if same else [f'{name} differs']
  left = unfinished(two)
  return said + ([f'half-written: {sorted(left)}'] if left else [])


def main(argv=None):
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0, help='of the moments')
  parser.add_argument('--folder', default='runs/kills', help='a new one')
  args, overrides = parser.parse_known_args(argv)
  folder = pathlib.Path(args.folder).resolve()
  folder.mkdir(parents=True)
  arguments = ['--config=configs/quickstart.py', *SMALL, *overrides]
  draw, begun = random.Random(args.seed), time.time()
  takes = in_peace(folder / 'whole', arguments)
  print('seconds a phase:', {k: round(v, 2) for k, v in takes.items()}, flush=True)
  t = json.loads((folder / 'whole' / 'config.json').read_text())['train']
  hits = killed(
    folder / 'killed',
    arguments,
    plan(args.kills, t['iterations'] * t['inner'], draw),
    takes,
    draw,
  )
  logging.set_verbosity(logging.ERROR)  # Orbax on files that none has
  said = differences(folder / 'whole', folder / 'killed')
  for text in said[:20]:
    print(text)
  result = dict(
    kills=len(hits),
    phases=collections.Counter(hits),
    identical=not said,
    differences=len(said),
    seed=args.seed,
    seconds=round(time.time() - begun),
  )
  print(json.dumps(result), flush=True)
  return result


if __name__ == '__main__':
  result = main()
  sys.exit(not result['identical'])
