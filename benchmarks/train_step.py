"""Seconds per optimizer step, as one JSON line.

python -m benchmarks.train_step --size=tiny [--rows=16] [--draws=4] ...

It makes a full update: K masked copies, log-probs, loss, gradient, AdamW. Compile time
and warm-up are separate. Times are medians of --repeats with minimum and maximum.
"""

import argparse

import jax
import jax.numpy as jnp

from benchmarks import common
from dmpo_jax import optim, rng, step
from dmpo_jax.objectives import dmpo
from dmpo_jax.types import TrainBatch, Views


def make_batch(args, cfg, key, group):
  """Returns a TrainBatch of random tokens with made-up weights."""
  shape = (args.rows, args.prompt + args.length)
  rows = jnp.zeros((args.rows,))
  return TrainBatch(
    tokens=jax.random.randint(key, shape, 0, cfg.vocab - 2),
    valid=jnp.ones(shape, bool),
    completion=jnp.ones((args.rows, args.length), bool),
    row=jnp.arange(args.rows),
    weight=jnp.sin(jnp.arange(args.rows) * 1.0),
    own={'target': rows + 1 / group},
    norm=jnp.float32(args.rows / group),
    total=jnp.float32(args.rows),
    old=Views(elbo=rows[:, None]),
  )


def arguments(parser):
  parser.add_argument('--draws', type=int, default=4)
  parser.add_argument('--microbatches', type=int, default=4)
  parser.add_argument('--lora', type=int, default=0, help='rank; 0 = full')
  parser.add_argument('--baseline', default='individual', choices=dmpo.BASELINES)


def make_step(args, cfg, params):
  """Returns (the jitted update, its inputs)."""
  name = 'lora' if args.lora else 'params'
  trainable = {name: params[name]}
  frozen = {'params': params['params']} if args.lora else {}
  optimizer = optim.make_optimizer(optim.Config(1e-4, 10, weight_decay=0.1))
  state = step.init_state(trainable, optimizer)
  group = min(8, args.rows)
  batch = make_batch(args, cfg, jax.random.key(1), group)
  setup = step.Setup(
    cfg,
    dmpo.OBJECTIVE,
    dmpo.Config(draws=args.draws, baseline=args.baseline),
    group=group,
    microbatches=args.microbatches,
    optimizer=optimizer,
  )

  def run(state, frozen, batch):
    return step.train_step(state, frozen, batch, rng.key_for(0, 'mask'), 0, setup)

  return jax.jit(run), (state, frozen, batch)


def main():
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  common.arguments(parser)
  arguments(parser)
  args = parser.parse_args()
  cfg, params = common.make_model(args)
  run, inputs = make_step(args, cfg, params)
  times, _ = common.measure(run, args.repeats, *inputs)
  tokens = args.rows * args.draws * (args.prompt + args.length)
  common.show(
    args,
    params,
    times,
    common.flops_of(run, (1,), *inputs),
    {
      'seconds_per_step': times['median'],
      'tokens_per_second': tokens / times['median'],
      'draws': args.draws,
      'microbatches': args.microbatches,
      'baseline': args.baseline,
      'lora': args.lora,
    },
  )


if __name__ == '__main__':
  main()
