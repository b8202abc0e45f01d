"""Tokens per second of the sampler, as one JSON line.

python -m benchmarks.sampler --size=tiny [--rows=64] [--pick=confidence] ...

Compile time is apart; times are medians of --repeats with minimum and maximum.
"""

import argparse

import jax
import jax.numpy as jnp

from benchmarks import common
from dmpo_jax import sampler


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  common.arguments(parser)
  parser.add_argument('--steps', type=int, default=64)
  parser.add_argument('--block', type=int, default=32)
  parser.add_argument('--temperature', type=float, default=1.0)
  parser.add_argument('--pick', default='confidence',
                      choices=tuple(sampler.PICKS))
  parser.add_argument('--cache', default='none', choices=('none', 'dual'))
  args = parser.parse_args()
  cfg, params = common.make_model(args)
  hp = sampler.SampleConfig(
      args.length, args.block, args.steps, args.temperature, args.pick,
      cache=args.cache)
  shape = (args.rows, args.prompt)
  prompts = jax.random.randint(jax.random.key(1), shape, 0, cfg.vocab - 1)
  valid = jnp.ones(shape, bool)

  def run(params, prompts, valid):
    keys_R = jax.random.split(jax.random.key(2), args.rows)
    return sampler.sample(cfg, params, prompts, valid, keys_R, hp)

  times, out = common.measure(jax.jit(run), args.repeats, params, prompts,
                              valid)
  common.show(args, cfg, params, times, {
      'tokens_per_second': args.rows * args.length / times['median'],
      'forwards': int(out.forwards), 'steps': args.steps, 'block': args.block,
      'pick': args.pick, 'cache': args.cache})


if __name__ == '__main__':
  main()
