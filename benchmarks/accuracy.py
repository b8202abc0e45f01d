"""Measures what faster samplers cost in accuracy, on one trained run.

python main.py --config=configs/quickstart.py --workdir=runs/q
python -m benchmarks.accuracy --workdir=runs/q --block=4

Greedy answers to the test problems of a finished run by every cache and pick:
accuracy, tokens per second, forwards a batch, and the share of tokens that are
those of the exact sampler with one token a step. A row of Markdown for each.
"""

import argparse
import copy
import json
import os
import time

import numpy as np

from configs import base
from dmpo_jax import build, check, config, evaluate, grader, metrics, resume, train

PICKS = (
  ('confidence, 1 a step', dict(pick='confidence')),
  ('confidence, 2 a step', dict(pick='confidence', a_step=2)),
  ('threshold 0.95', dict(pick='threshold', threshold=0.95)),
  ('threshold 0.9', dict(pick='threshold', threshold=0.9)),
  ('threshold 0.7', dict(pick='threshold', threshold=0.7)),
  ('threshold 0.5', dict(pick='threshold', threshold=0.5)),
  ('entropy 0.1', dict(pick='entropy', entropy_bound=0.1)),
  ('wino 0.6', dict(pick='wino', threshold=0.6)),
)
CACHES = ('none', 'prefix', 'dual')
HEADER = (
  '| cache | pick | accuracy | tokens/s | forwards | same tokens |\n'
  '|---|---|---|---|---|---|'
)


def trained(workdir):
  """Returns (Built, parameters) of a finished run, by its config.json."""
  c = base.get_config()
  with open(os.path.join(workdir, 'config.json')) as f:
    config.update(
      c,
      {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in check.flatten(json.load(f)).items()
      },
    )
  built = build.build(c)
  with metrics.Writer(workdir, enabled=False) as writer:
    start = train.run('sft', train.Session(built, workdir, writer))[0]
  return built, resume.latest(built, workdir, start)


def section_of(built, args, cache, fields):
  """Returns eval.sampler with this cache and pick, greedy."""
  section = copy.deepcopy(built.config.eval.sampler)
  fields = dict(fields)
  steps = section.length // fields.pop('a_step', 1)
  section.update(
    dict(
      block=args.block or section.block,
      steps=steps,
      cache=cache,
      refresh=args.refresh if cache != 'none' else 0,
      temperature=0.0,
      **fields,
    )
  )
  return section


def answers(built, params, held, section):
  """Returns (accuracy, seconds, mean forwards of a batch, tokens) of a split."""
  sample, total = built.steps.sampler_of(section), len(held.examples)
  run = lambda total: list(evaluate.generate(built, params, held, sample, total, 0))
  run(1)  # compiles
  begun = time.perf_counter()
  rows = run(total)
  seconds = time.perf_counter() - begun
  examples = [held.examples[row['problem']] for row in rows]
  c, texts = built.config, [row['text'] for row in rows]
  graded = grader.judge(built.task, c.data.protocol, texts, examples, c.reward.weights)
  return (
    float(np.mean(graded.grades)),
    seconds,
    float(np.mean([row['batch_forwards'] for row in rows])),
    np.array([row['ids'] for row in rows]),
  )


def main():
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  parser.add_argument('--workdir', required=True, help='of a finished run')
  parser.add_argument('--block', type=int, default=0, help="0: the run's")
  parser.add_argument('--refresh', type=int, default=0, help='of the caches')
  args = parser.parse_args()
  built, params = trained(args.workdir)
  held = build.problems(built, 'test')
  exact = None
  print(HEADER, flush=True)
  for cache in CACHES:
    for name, fields in PICKS:
      if fields['pick'] == 'wino' and cache != 'none':
        continue
      section = section_of(built, args, cache, fields)
      accuracy, seconds, forwards, ids = answers(built, params, held, section)
      exact = ids if exact is None else exact
      print(
        f'| {cache} | {name} | {accuracy:.3f} | {ids.size / seconds:,.0f} '
        f'| {forwards:.1f} | {np.mean(ids == exact):.3f} |',
        flush=True,
      )


if __name__ == '__main__':
  main()
