"""Measures drafts against the model alone, on two networks trained here.

taskset -c 0 python -m benchmarks.drafts --workdir=runs/drafts

Trains the quickstart's network and a smaller one on solved puzzles (supervised), writes
the smaller one as a Hugging Face directory, and answers the test problems in blocks of
4 tokens, a row of the grid each. A line of Markdown for each way: accuracy, share of
the drafts that stay, forwards of a row and of a batch, of the model and of the draft.
Begun again in the same workdir, it goes on.
"""

import argparse
import json
import os

import numpy as np

from configs import quickstart
from dmpo_jax import config, hf, resume, runner
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
HEADER = (
  '| way | accuracy | 95 % interval | drafts kept | model, a row | draft, a row '
  '| model, a batch | draft, a batch |\n|---|---|---|---|---|---|---|---|'
)


def settings(args, **fields):
  """Returns the quickstart without RL, and a greedy cautious sampler in blocks of 4."""
  c = quickstart.get_config()
  own = {
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


def trained(args, name, fields):
  """Returns (Built, parameters) after supervised training in a folder of that name."""
  built = runner.ready(settings(args, **fields))
  workdir = os.path.join(args.workdir, name)
  runner.train(built, workdir, {}, only_sft=True)
  return built, resume.base_of(built, workdir)


def numbers(args, name, params, fields):
  """Returns a line of the table."""
  built = runner.ready(settings(args, **fields))
  folder = os.path.join(args.workdir, 'cards', name.replace(' ', '_'))
  (card,) = cards.run(built, params, folder, 'base')
  (file,) = (x for x in os.listdir(folder) if x.endswith('.jsonl'))
  with open(os.path.join(folder, file), encoding='utf-8') as f:
    rows = [json.loads(line) for line in f]
  mean = lambda field: np.mean([row.get(field, 0) for row in rows])
  low, high = (f'{100 * x:.1f}' for x in card['interval'])
  kept = f'{100 * card["acceptance"]:.0f} %' if 'acceptance' in card else ''
  spent = 'forwards', 'draft_forwards', 'batch_forwards', 'draft_batch_forwards'
  cells = ' | '.join(f'{mean(field):.1f}' for field in spent)
  accuracy = f'{100 * card["accuracy"]:.1f}'
  return f'| {name} | {accuracy} | {low} to {high} | {kept} | {cells} |'


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', default='runs/drafts')
  parser.add_argument('--steps', type=int, default=400, help='supervised updates')
  parser.add_argument('--problems', type=int, default=512)
  parser.add_argument('--batch', type=int, default=8)
  args = parser.parse_args()
  runner.fix_numbers()
  _, large = trained(args, 'model', {})
  built, small = trained(args, 'small', SMALL)
  folder = os.path.join(args.workdir, 'draft')
  if not os.path.isdir(folder):
    hf.export(built, small, small, folder, 'merged')
  print(HEADER, flush=True)
  for name, fields in WAYS.items():
    if 'draft.gate' in fields:
      fields = {'draft.of': folder, 'draft.threshold': 0.7} | fields
    alone = name == 'the small one alone'
    fields, params = (fields | SMALL, small) if alone else (fields, large)
    print(numbers(args, name, params, fields), flush=True)


if __name__ == '__main__':
  main()
