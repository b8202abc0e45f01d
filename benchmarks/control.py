"""Compares the learned sampler with fixed numbers: accuracy against forwards.

python -m benchmarks.control --out=runs/control [--seeds=5] [--iterations=40]

For each seed a supervised base of the quickstart, and two runs from it: with the fixed
entropy bound of its config, and with the controller (docs/control.md). The final
policies answer the test problems greedily at each of BOUNDS, the second one also at its
controller's mean. What is done is not done again: the same command goes on where it was
stopped. Prints a row of Markdown for each, means and ranges over the seeds; then the
accuracy of the fixed arm at the controller's forwards of a row, between the two nearest
bounds, and how much the controller's is above: of each seed, and the mean with its 95 %
interval.
"""

import argparse
import json
import os
import statistics

import numpy as np

from benchmarks import compare
from configs import quickstart
from dmpo_jax import api, build, config, evaluate, files, grader, optim

START = 0.02  # the quickstart's bound
BOUNDS = (0.005, 0.02, 0.08, 0.3, 1.0, 3.0)
ARMS = {'fixed': {}, 'controller': {'control.on': True}}
HEADER = (
  '| trained with | judged with | accuracy | forwards of a row | of a batch |\n'
  '|---|---|---|---|---|'
)


def config_of(args, seed):
  """Returns the quickstart with a shorter training, which judges with its own pick."""
  c = quickstart.get_config()
  config.update(
    c,
    {
      'seed': seed,
      'train.iterations': args.iterations,
      'train.prompts': 32,
      'optim.warmup': 5,
      'eval.every': 0,
      'eval.sampler.pick': 'entropy',
      'eval.sampler.entropy_bound': START,
      'data.validation_size': 16,
      'data.test_size': 256,
      'mesh.cpu': 1,
    },
  )
  return c


def base_of(args, seed):
  """Returns the directory of the seed's supervised base, trained if it is missing."""
  folder = os.path.join(args.out, f'base_{seed}')
  if not os.path.isdir(folder):
    workdir = os.path.join(args.out, f'sft_{seed}')
    model = api.in_workdir(config_of(args, seed).lock(), workdir, {}, None, True)
    model.save(folder)
  return folder


def trained(args, seed, arm):
  """Returns the final policy of an arm, trained as far as it is not yet."""
  c = config_of(args, seed)
  config.update(
    c,
    {
      'model.checkpoint': base_of(args, seed),
      'sft.steps': 0,
      'control.cost': args.cost,
      **ARMS[arm],
    },
  )
  return api.in_workdir(
    c.lock(), os.path.join(args.out, f'{arm}_{seed}'), {}, None, False
  )


def judged(model, bound):
  """Returns numbers of the test problems; bound: None = at the controller's mean."""
  built, params = model.built, model.params
  section = built.config.eval.sampler.copy_and_resolve_references()
  if bound is not None:
    section.entropy_bound, params = bound, optim.of_model(params)
  held = build.problems(built, 'test')
  sample, total = built.steps.sampler_of(section), len(held.examples)
  rows = list(evaluate.generate(built, params, held, sample, total, 0))
  c, texts = built.config, [row['text'] for row in rows]
  examples = [held.examples[row['problem']] for row in rows]
  graded = grader.judge(built.task, c.data.protocol, texts, examples, c.reward.weights)
  return {
    'accuracy': float(np.mean(graded.grades)),
    'row': float(np.mean([row['forwards'] for row in rows])),
    'batch': float(np.mean([row['batch_forwards'] for row in rows])),
    'bound': float(np.mean([row.get('bound', bound or 0.0) for row in rows])),
  }


def points(args, seed, arm):
  """Returns {name of the sampler: numbers} of an arm, from its file if it is there."""
  path = os.path.join(args.out, f'{arm}_{seed}.json')
  if os.path.exists(path):
    return files.read_json(path)
  model = trained(args, seed, arm)
  found = {f'bound {bound:g}': judged(model, bound) for bound in BOUNDS}
  if arm == 'controller':
    found['controller'] = judged(model, None)
  files.replace(path, json.dumps(found, indent=1))
  return found


def show(found):
  """Prints the table; found: {arm: [points of each seed]}."""
  print(HEADER)
  for arm, seeds in found.items():
    for name in seeds[0]:
      texts = []
      for field, form in (('accuracy', '.3f'), ('row', '.2f'), ('batch', '.1f')):
        values = [point[name][field] for point in seeds]
        low, high = min(values), max(values)
        texts.append(f'{statistics.mean(values):{form}} ({low:{form}}-{high:{form}})')
      print(f'| {arm} | {name} | {" | ".join(texts)} |', flush=True)


def at_forwards(points_, forwards):
  """Returns the accuracy of a fixed arm at a number of forwards, by interpolation."""
  pairs = sorted((x['row'], x['accuracy']) for x in points_.values())
  spent, accuracy = zip(*pairs, strict=True)
  return float(np.interp(forwards, spent, accuracy))


def gains(found):
  """Prints what the controller is above the fixed arm at its own forwards."""
  texts, above = [], []
  for fixed, own in zip(found['fixed'], found['controller'], strict=True):
    mine = own['controller']
    there = at_forwards(fixed, mine['row'])
    above.append(mine['accuracy'] - there)
    texts.append(f'{there:.3f} ({above[-1]:+.3f})')
  print(f'fixed at the forwards of the controller: {", ".join(texts)}')
  print(f'the controller is above by {compare.told(above)}')


def main():
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  parser.add_argument('--out', required=True, help='folder of all runs')
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--iterations', type=int, default=40, help='buffers of a run')
  parser.add_argument('--cost', type=float, default=0.2, help='control.cost')
  args = parser.parse_args()
  os.makedirs(args.out, exist_ok=True)
  found = {arm: [] for arm in ARMS}
  for seed in range(args.seeds):
    for arm in ARMS:
      found[arm].append(points(args, seed, arm))
    print(f'seed {seed}: {found["controller"][-1]["controller"]}', flush=True)
  show(found)
  gains(found)


if __name__ == '__main__':
  main()
