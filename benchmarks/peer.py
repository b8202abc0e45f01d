"""Ours against a PyTorch reference: the same weights, prompts and schedule.

python -m benchmarks.peer --reference=DMPO/fast_samplers/fast_dllm \
    --python=/path/to/python/with/torch [--cases=none,dual]
python -m benchmarks.peer --reference=SDAR --attention-block=4 --block=4 \
    --steps=128 --python=...

The reference is a folder of the DMPO release (or one like it), or SDAR's
generate.py beside the modelling files of an SDAR checkpoint; nothing of it is
here. It runs in a process of its own (benchmarks/peer_torch.py), whose Python
needs torch, transformers 4.52, safetensors and einops; the two take turns, so
that both see the same machine. One JSON line a case: tokens per second of both
(medians), their ratio, forwards, and the share of tokens that agree.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from benchmarks import common, train_step
from dmpo_jax import hf

CASES = {
  'none': {},
  'threshold': dict(pick='threshold'),
  'prefix': dict(cache='prefix'),
  'dual': dict(cache='dual'),
  'dual_threshold': dict(cache='dual', pick='threshold'),
  'prefix_threshold': dict(cache='prefix', pick='threshold'),
}
# With --attention-block: a block-causal model against SDAR's release.
BLOCK_CASES = {
  'block': dict(cache='block'),
  'block_dynamic': dict(cache='block', pick='dynamic'),
}


def export_all(folder, args, cfg, params):
  """The weights, prompts and whole rows, for the reference to read."""
  hf.save_hf(folder, cfg, params)
  prompts, _ = common.prompts_of(args, cfg)
  np.save(os.path.join(folder, 'prompts.npy'), np.asarray(prompts))
  batch = train_step.make_batch(args, cfg, jax.random.key(1), 8)
  np.save(os.path.join(folder, 'rows.npy'), np.asarray(batch.tokens))


class Peer:
  """The worker: `ask` sends a request and waits for its answer."""

  def __init__(self, args, folder):
    script = pathlib.Path(__file__).with_name('peer_torch.py')
    self.process = subprocess.Popen(
      [args.python, str(script), args.reference, folder],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    assert self.process.stdin and self.process.stdout
    self.said, self.asked = self.process.stdout, self.process.stdin
    self.about = self.read()

  def read(self):
    line = self.said.readline()
    if not line:
      raise RuntimeError('the reference has stopped; see its message above')
    return json.loads(line)

  def ask(self, **request):
    self.asked.write(json.dumps(request) + '\n')
    self.asked.flush()
    return self.read()


def in_turns(repeats, ours, theirs):
  """((our seconds, our last output), (theirs)); each once before for warmth."""
  spent, got = ([], []), [ours(), theirs()]
  for _ in range(repeats):
    begun = time.perf_counter()
    got[0] = jax.block_until_ready(ours())
    spent[0].append(time.perf_counter() - begun)
    got[1] = theirs()
    spent[1].append(got[1]['seconds'])
  return (spent[0], got[0]), (spent[1], got[1])


def compare(args, cfg, params, peer, name):
  """The JSON of one case of sampling."""
  hp = common.sample_config(args, **(CASES | BLOCK_CASES)[name])
  run, inputs = common.sampling(cfg, hp), common.prompts_of(args, cfg)
  threshold = args.threshold if hp.pick in ('threshold', 'dynamic') else None
  request = dict(
    what='sample',
    cache=hp.cache,
    steps=hp.steps,
    length=hp.length,
    block=hp.block,
    threshold=threshold,
  )
  ours, theirs = in_turns(
    args.repeats,
    lambda: jax.block_until_ready(run(params, *inputs)),
    lambda: peer.ask(**request),
  )
  same = np.asarray(ours[1].tokens) == np.asarray(theirs[1]['tokens'])
  tokens = args.rows * args.length
  speeds = [tokens / statistics.median(x) for x in (ours[0], theirs[0])]
  return dict(
    case=name,
    ours=speeds[0],
    theirs=speeds[1],
    ratio=speeds[0] / speeds[1],
    unit='tokens per second',
    forwards=int(ours[1].forwards),
    same_tokens=float(same[:, args.prompt :].mean()),
    our_seconds=common.spread(ours[0]),
    their_seconds=common.spread(theirs[0]),
  )


def compare_training(args, cfg, params, peer):
  run, inputs = train_step.make_step(args, cfg, params)
  ours, theirs = in_turns(
    args.repeats,
    lambda: jax.block_until_ready(run(*inputs)),
    lambda: peer.ask(what='train', draws=args.draws, length=args.length),
  )
  medians = [statistics.median(x) for x in (ours[0], theirs[0])]
  return dict(
    case='train_step',
    ours=medians[0],
    theirs=medians[1],
    ratio=medians[1] / medians[0],
    unit='seconds a step',
    our_seconds=common.spread(ours[0]),
    their_seconds=common.spread(theirs[0]),
  )


def main():
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  common.arguments(parser)
  common.sampling_arguments(parser)
  train_step.arguments(parser)
  parser.add_argument('--reference', required=True, help='its folder')
  parser.add_argument(
    '--python', default=sys.executable, help='an interpreter that has torch'
  )
  parser.add_argument('--cases', help='default: all of the family')
  args = parser.parse_args()
  cases = BLOCK_CASES if args.attention_block else [*CASES, 'train_step']
  cfg, params = common.make_model(args)
  with tempfile.TemporaryDirectory() as folder:
    export_all(folder, args, cfg, params)
    peer = Peer(args, folder)
    for name in args.cases.split(',') if args.cases else cases:
      found = (
        compare_training(args, cfg, params, peer)
        if name == 'train_step'
        else compare(args, cfg, params, peer, name)
      )
      print(json.dumps(found | peer.about), flush=True)
    peer.asked.close()
    peer.process.wait()


if __name__ == '__main__':
  main()
