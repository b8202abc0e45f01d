"""Measures the sampler's tokens per second, and prints one JSON line.

python -m benchmarks.sampler --size=tiny [--pick=threshold] [--cache=dual] ...

Times are medians of --repeats, with minimum and maximum; compilation and warm-up
are timed apart. `share_of_rate` compares with the matmul rate that the same
process measures.
"""

import argparse

import jax.numpy as jnp

from benchmarks import common


def main():
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  common.arguments(parser)
  common.sampling_arguments(parser)
  args = parser.parse_args()
  cfg, params = common.make_model(args)
  hp = common.sample_config(args)
  run, inputs = common.sampling(cfg, hp), common.prompts_of(args, cfg)
  times, out = common.measure(run, args.repeats, params, *inputs)
  forwards = int(out.forwards)
  flops = common.flops_of(run, common.trips_of(args, hp, forwards), params, *inputs)
  common.show(
    args,
    params,
    times,
    flops,
    {
      'tokens_per_second': int(jnp.sum(out.order >= 0)) / times['median'],
      'forwards': forwards,
      'steps': args.steps,
      'block': args.block,
      'pick': args.pick,
      'cache': args.cache,
      'refresh': args.refresh,
      'slots': args.slots,
      'attention_block': args.attention_block,
      'network_tokens': common.network_tokens(args, forwards),
    },
  )


if __name__ == '__main__':
  main()
