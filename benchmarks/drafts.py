"""Measures drafts against the model alone, on two networks trained here, by seed.

taskset -c 0 python -m benchmarks.drafts --workdir=runs/drafts [--seeds=5]

Trains the quickstart's network and a smaller one on solved puzzles (supervised), writes
the smaller one as a Hugging Face directory, and answers the test problems in blocks of
4 tokens, a row of the grid each. A seed changes the training and the sampling, not the
problems. A line of Markdown for each way, with means over the seeds and 95 % intervals:
accuracy, how much that is above the model alone, share of the drafts that stay,
forwards of a row and of a batch, of the model and of the draft. Begun again in the same
workdir, it goes on: SEED/numbers.json has what is done.
"""

import argparse
import json
import os

from benchmarks import compare
from configs import quickstart
from dmpo_jax import config, files, hf, resume, runner
from dmpo_jax.tools import cards

SMALL = {'model.width': 32, 'model.layers': 1, 'model.heads': 2, 'model.mlp': 64}
GREEDY = {'eval.sampler.temperature': 0.0}
DRAWN = {'eval.sampler.temperature': 1.0}
BOLD = {'draft.of': 'same', 'draft.threshold': 0.3}
CONFIDENCE = {'draft.gate': 'confidence', 'draft.bound': 0.7}
REWARD = {'draft.gate': 'reward', 'draft.bound': 1.0}
EXACT = {'draft.gate': 'exact', 'draft.ahead': 4}
WAYS = {
  'the model alone': GREEDY,
  'the small one alone': GREEDY,
  'the model alone, threshold 0.3': GREEDY | {'eval.sampler.threshold': 0.3},
  'small draft, confidence 0.7': GREEDY | CONFIDENCE,
  'small draft, no rule broken': GREEDY | REWARD,
  'small draft, exact': GREEDY | EXACT,
  'small draft, exact, one a step': GREEDY | EXACT | {'draft.pick': 'confidence'},
  'bold draft, confidence 0.7': GREEDY | BOLD | CONFIDENCE,
  'bold draft, no rule broken': GREEDY | BOLD | REWARD,
  'bold draft, exact': GREEDY | BOLD | EXACT,
  'the model alone, T = 1': DRAWN,
  'small draft, exact, T = 1': DRAWN | EXACT,
  'bold draft, exact, T = 1': DRAWN | BOLD | EXACT,
}
# Columns: (name, of a card, factor, digits).
COLUMNS = (
  ('drafts kept, %', 'acceptance', 100, 0),
  ('model, a row', 'forwards', 1, 1),
  ('draft, a row', 'draft_forwards', 1, 1),
  ('model, a batch', 'batch_forwards', 1, 1),
  ('draft, a batch', 'draft_batch_forwards', 1, 1),
)
SHOWN = 'accuracy', *(field for _, field, *_ in COLUMNS)


def settings(args, seed, **fields):
  """Returns the quickstart without RL, and a greedy cautious sampler in blocks of 4."""
  c = quickstart.get_config()
  own = {
    'seed': seed,
    'train.iterations': 0,
    'sft.steps': args.steps,
    'data.test_size': args.problems,
    'data.min_blanks': 2,
    'data.max_blanks': 6,
    'mesh.cpu': 1,
    'eval.batch': args.batch,
    'eval.sampler.block': 4,
    'eval.sampler.steps': 16,
    'eval.sampler.pick': 'threshold',
    'eval.sampler.threshold': 0.9,
  }
  config.update(c, own | fields)
  return c


def trained(args, seed, name, fields):
  """Returns (Built, parameters) after supervised training in a folder of that name."""
  built = runner.ready(settings(args, seed, **fields))
  workdir = os.path.join(args.workdir, str(seed), name)
  runner.train(built, workdir, {}, only_sft=True)
  return built, resume.base_of(built, workdir)


def networks(args, seed):
  """Returns parameters of the model and of the small one, and the latter's folder."""
  _, large = trained(args, seed, 'model', {})
  built, small = trained(args, seed, 'small', SMALL)
  folder = os.path.join(args.workdir, str(seed), 'draft')
  if not os.path.isdir(folder):
    hf.export(built, small, small, folder, 'merged')
  return large, small, folder


def judged(args, seed, name, nets):
  """Returns numbers of a way: those of its card that are shown."""
  fields, (large, small, folder) = WAYS[name], nets
  if 'draft.gate' in fields:
    fields = {'draft.of': folder, 'draft.threshold': 0.7} | fields
  alone = name == 'the small one alone'
  fields, params = (fields | SMALL, small) if alone else (fields, large)
  built = runner.ready(settings(args, seed, **fields))
  out = os.path.join(args.workdir, str(seed), 'cards', name.replace(' ', '_'))
  (card,) = cards.run(built, params, out, 'base')
  return {field: card[field] for field in SHOWN if field in card}


def rows_of(args, seed):
  """Returns {way: numbers} of a seed; trains and samples what its file lacks."""
  path = os.path.join(args.workdir, str(seed), 'numbers.json')
  asked = {name: getattr(args, name) for name in ('steps', 'problems', 'batch')}
  said = files.read_json(path) if os.path.exists(path) else {'of': asked, 'ways': {}}
  if said['of'] != asked:
    raise SystemExit(f'{path} is of {said["of"]}: name another --workdir')
  nets = None
  for name in WAYS:
    if name not in said['ways']:
      nets = nets or networks(args, seed)
      said['ways'][name] = judged(args, seed, name, nets)
      files.replace(path, json.dumps(said, indent=1))
  return said['ways']


def line(name, seeds):
  """Returns a line of the table; seeds: [{way: numbers}]."""
  drawn = WAYS[name]['eval.sampler.temperature'] > 0
  alone = 'the model alone, T = 1' if drawn else 'the model alone'
  right = lambda way: [100 * seed[way]['accuracy'] for seed in seeds]
  cells = [name, compare.told(right(name), 1), '']
  if name != alone:
    pairs = zip(right(name), right(alone), strict=True)
    cells[2] = compare.told([mine - other for mine, other in pairs], 1)
  for _, field, factor, digits in COLUMNS:
    there = [seed[name][field] for seed in seeds if field in seed[name]]
    cells.append(compare.told([factor * x for x in there], digits) if there else '')
  return '| ' + ' | '.join(cells) + ' |'


def table(seeds):
  names = ['way', 'accuracy, %', 'less alone', *(name for name, *_ in COLUMNS)]
  head = ['| ' + ' | '.join(names) + ' |', '|---' * len(names) + '|']
  return '\n'.join(head + [line(name, seeds) for name in WAYS])


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', default='runs/drafts')
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=400, help='supervised updates')
  parser.add_argument('--problems', type=int, default=512)
  parser.add_argument('--batch', type=int, default=8)
  args = parser.parse_args()
  runner.fix_numbers()
  seeds = []
  for seed in range(args.seeds):
    seeds.append(rows_of(args, seed))
    print(f'seed {seed} is done', flush=True)
  print(table(seeds))


if __name__ == '__main__':
  main()
