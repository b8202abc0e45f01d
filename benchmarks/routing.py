"""Experts that the rollout and the trainer choose: agreement, and the cost of replay.

python -m benchmarks.routing                         random weights, tiny_moe
python -m benchmarks.routing --preset=llada2_mini    the same of a published size
python -m benchmarks.routing --checkpoint=DIR ...    checkpoints, random prompts
python -m benchmarks.routing --workdir=RUN           a run, its training prompts

Markdown. Each dtype and each cache that the model allows is sampled at temperature 1,
then scored along the recorded states by the same weights: with the trainer's own choice
of experts, and with the rollout's. benchmarks/README.md says what the columns are.
"""

import argparse
import dataclasses
import functools
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import SMALL_IDS
from benchmarks.planned import filled
from dmpo_jax import agreement, build, logprob, model, rng, sampler, weights

HEAD = (
  'model', 'dtype', 'cache', 'experts that differ', 'log-prob of a token',
  'largest', 'of a completion', 'replayed: of a token', 'of a completion',
  'record', 'time to sample', 'to score',
)  # fmt: skip


def random_case(args):
  """(name, cfg, params, prompts, valid) of the preset with random weights."""
  fields: Any = {**model.PRESETS['tiny_moe'], **SMALL_IDS, 'block_causal': 4}
  cfg = model.ModelConfig(**fields)
  params = model.init(cfg, jax.random.key(0))
  return 'random tiny_moe', cfg, params, *random_prompts(cfg, args)


def preset_case(args):
  """The same of a published size, with weights in bfloat16."""
  cfg = model.ModelConfig(**model.PRESETS[args.preset], param_dtype='bfloat16')
  key = jax.random.key(0)
  shapes = jax.eval_shape(lambda: model.init(cfg, key))
  return f'random {args.preset}', cfg, filled(shapes, key), *random_prompts(cfg, args)


def random_prompts(cfg, args):
  shape = args.rows, args.prompt
  prompts = jax.random.randint(jax.random.key(1), shape, 0, min(cfg.vocab, 256))
  short = jax.random.randint(jax.random.key(2), shape[:1], 0, args.prompt // 2)
  return prompts, jnp.arange(shape[1])[None] >= short[:, None]


def checkpoint_case(path, args):
  cfg, params = weights.load_hf(path)
  name = os.path.basename(os.path.dirname(path.rstrip('/'))) or path
  return name, cfg, params, *random_prompts(cfg, args)


def run_case(args):
  from benchmarks.accuracy import trained

  built, params = trained(args.workdir)
  params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)
  known = build.problems(built, 'train')
  prompts, valid = (jnp.asarray(x[: args.rows]) for x in (known.tokens, known.valid))
  return built.config.name, built.model, params, prompts, valid


def seconds(fn, *args, repeats=3):
  """(result, least seconds of a call)."""
  found, times = jax.block_until_ready(fn(*args)), []
  for _ in range(repeats):
    begin = time.perf_counter()
    jax.block_until_ready(fn(*args))
    times.append(time.perf_counter() - begin)
  return found, min(times)


def laws(cfg, args):
  """The samplers that a model is measured with."""
  block = cfg.block_causal or args.length
  same: Any = dict(length=args.length, block=block, rank='max', temperature=1.0)
  per_step = max(1, args.length // args.steps)
  steps = args.length // block * max(1, block // per_step)
  for cache in ('block', 'none') if cfg.block_causal else ('none', 'prefix', 'dual'):
    if cache in ('prefix', 'dual'):
      same |= dict(block=args.length // 2, refresh=4)
    yield sampler.SampleConfig(steps=steps, cache=cache, **same)


def row_of(case, dtype, hp):
  """One line of the table."""
  name, cfg, params, prompts, valid = case
  cfg = dataclasses.replace(cfg, dtype=dtype)
  keys = rng.row_keys(jax.random.key(3), jnp.arange(len(prompts)))

  def sample(params, records):
    return sampler.sample(cfg, params, prompts, valid, keys, hp, records)

  plain = jax.jit(functools.partial(sample, records=()))
  noted = jax.jit(functools.partial(sample, records=('routes',)))
  score = jax.jit(lambda p, x: logprob.trajectory_logp(cfg, p, x, hp))
  measure = jax.jit(lambda p, x: agreement.agreement(cfg, p, x, hp))
  _, fast = seconds(plain, params)
  out, slow = seconds(noted, params)
  free = out._replace(routes=None)
  (own, old), quick = seconds(score, params, free)
  (bound, _), careful = seconds(score, params, out)
  found = {k: np.asarray(x) for k, x in measure(params, out).items()}
  size = sum(x.nbytes for x in (out.routes.steps, out.routes.text) if x is not None)
  far = lambda new: np.abs(np.asarray(new) - np.asarray(old)).mean()
  replays = hp.cache in ('none', 'block')
  only = lambda text: text if replays else '–'
  return (
    name,
    dtype,
    hp.cache,
    f'{found["routes_differ"].mean():.2%}',
    f'{found["routes_logp"].mean():.1e}',
    f'{found["routes_most"].max():.1e}',
    f'{far(own):.1e}',
    only(f'{found["routes_replayed"].mean():.1e}'),
    only(f'{far(bound):.1e}'),
    f'{size / len(prompts) / 1024:.0f} KiB',
    f'{slow / fast:.2f}',
    only(f'{careful / quick:.2f}'),
  )


def main():
  parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  parser.add_argument('--checkpoint', nargs='*', default=[], help='directories')
  parser.add_argument('--workdir', default='', help='of a run')
  parser.add_argument('--preset', default='', help='random weights of this size')
  parser.add_argument('--dtypes', default='float32,bfloat16')
  parser.add_argument('--rows', type=int, default=64)
  parser.add_argument('--prompt', type=int, default=24, help='tokens')
  parser.add_argument('--length', type=int, default=32, help='tokens')
  parser.add_argument('--steps', type=int, default=32)
  args = parser.parse_args()
  cases = [checkpoint_case(path, args) for path in args.checkpoint]
  cases += [run_case(args)] if args.workdir else []
  cases += [preset_case(args)] if args.preset else []
  line = lambda cells: print('| ' + ' | '.join(cells) + ' |', flush=True)
  line(HEAD)
  line(['---'] * len(HEAD))
  for case in cases or [random_case(args)]:
    for dtype in args.dtypes.split(','):
      for hp in laws(case[1], args):
        line(row_of(case, dtype, hp))


if __name__ == '__main__':
  main()
