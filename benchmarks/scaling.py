"""How the sampler's cost grows with batch, length and devices: JSON lines.

python -m benchmarks.scaling [--cache=dual] [--rows=16] ...

One line for each size with the median seconds, then a line with the fitted
exponent of seconds in that size (log-log least squares): 1 is proportional.
Devices are forced host devices, each in a process of its own, for the number
is fixed when jax starts; the batch stays the same (strong scaling).
"""

import argparse
import json
import os
import subprocess
import sys

import jax
import numpy as np

from benchmarks import common
from dmpo_jax import mesh

ROWS, LENGTHS, DEVICES = (4, 8, 16, 32), (32, 64, 128, 256), (1, 2, 4, 8)


def timed(args, **changes):
  """Seconds of sampling with some arguments changed, over all devices here."""
  args = argparse.Namespace(**{**vars(args), **changes})
  args.steps = args.length // 2
  cfg, params = common.make_model(args)
  run = common.sampling(cfg, common.sample_config(args))
  inputs = common.prompts_of(args, cfg)
  if jax.device_count() > 1:
    grid = mesh.make_mesh()
    params = jax.device_put(params, mesh.replicated(grid))
    inputs = jax.device_put(inputs, mesh.rows(grid))
    with jax.set_mesh(grid):
      return common.measure(run, args.repeats, params, *inputs)[0]
  return common.measure(run, args.repeats, params, *inputs)[0]


def elsewhere(devices):
  """The seconds of this command on so many host devices."""
  flags = f'--xla_force_host_platform_device_count={devices}'
  out = subprocess.run(
    [sys.executable, '-m', 'benchmarks.scaling', *sys.argv[1:], '--alone'],
    env={**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  return json.loads(out)


def report(axis, sizes, times):
  for size, seconds in zip(sizes, times, strict=True):
    print(json.dumps({axis: size, 'seconds': seconds}), flush=True)
  medians = [seconds['median'] for seconds in times]
  slope = np.polyfit(np.log(sizes), np.log(medians), 1)[0]
  print(json.dumps({'axis': axis, 'exponent': round(float(slope), 3)}), flush=True)


def main():
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  common.arguments(parser)
  common.sampling_arguments(parser)
  parser.add_argument(
    '--alone', action='store_true', help='time the given size only, print the seconds'
  )
  args = parser.parse_args()
  if args.alone:
    print(json.dumps(timed(args)))
    return
  report('rows', ROWS, [timed(args, rows=n) for n in ROWS])
  report('length', LENGTHS, [timed(args, length=n) for n in LENGTHS])
  report('devices', DEVICES, [elsewhere(n) for n in DEVICES])


if __name__ == '__main__':
  main()
