"""Shared parts of the benchmarks: sizes, arguments, timing, the JSON line."""

import dataclasses
import json
import platform
import resource
import statistics
import time

import jax
import jax.numpy as jnp

from dmpo_jax import model, sampler
from dmpo_jax.sampler.config import CACHES
from dmpo_jax.tools import costs

SMALL_IDS = dict(vocab=4096, mask_id=4095, eos_id=4094, pad_id=4094)
SIZES = {
  # Eight layers of 256, 8.9 M parameters: what two cores can do.
  'tiny': {**model.PRESETS['small'], **SMALL_IDS},
  # The quickstart's.
  'quickstart': {
    **model.PRESETS['tiny'],
    'vocab': 128,
    'mask_id': 127,
    'eos_id': 126,
    'pad_id': 126,
  },
  **{name: fields for name, fields in model.PRESETS.items() if 'vocab' in fields},
}


def arguments(parser):
  parser.add_argument('--size', default='tiny', choices=tuple(SIZES))
  parser.add_argument('--rows', type=int, default=16)
  parser.add_argument('--prompt', type=int, default=64, help='tokens')
  parser.add_argument('--length', type=int, default=128, help='tokens')
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument(
    '--sharpness',
    type=float,
    default=1.0,
    help='factor of the head: random weights give flat probabilities, which '
    'never reach a threshold',
  )


def sampling_arguments(parser):
  parser.add_argument('--steps', type=int, default=64)
  parser.add_argument('--block', type=int, default=32)
  parser.add_argument('--temperature', type=float, default=0.0)
  parser.add_argument('--pick', default='confidence', choices=sampler.NAMES)
  parser.add_argument('--threshold', type=float, default=0.9)
  parser.add_argument('--cache', default='none', choices=CACHES)
  parser.add_argument('--refresh', type=int, default=0)
  parser.add_argument('--slots', type=int, default=0, help='rows at a time')
  parser.add_argument(
    '--mean',
    type=int,
    default=0,
    help='tokens after which a row ends, drawn geometrically; needs --temperature=1',
  )
  parser.add_argument(
    '--attention-block', type=int, default=0, help='tokens; 0: the whole text'
  )


def sample_config(args, **changes):
  hp = sampler.SampleConfig(
    args.length,
    args.block,
    args.steps,
    args.temperature,
    args.pick,
    threshold=args.threshold,
    cache=args.cache,
    refresh=args.refresh,
    slots=args.slots,
    eos_stop=bool(args.mean),
  )
  return dataclasses.replace(hp, **changes)


def make_model(args):
  """Returns (ModelConfig, random weights) of a size."""
  rank = getattr(args, 'lora', 0)
  cfg = model.ModelConfig(
    **SIZES[args.size],
    dtype=args.dtype,
    param_dtype=args.dtype,
    remat='full' if args.size.endswith('b') else 'none',
    lora_rank=rank,
    block_causal=getattr(args, 'attention_block', 0),
  )
  if cfg.block_causal and not cfg.shift:  # SDAR's body is Qwen3's
    cfg = dataclasses.replace(cfg, qk_norm=True)
  if mean := getattr(args, 'mean', 0):  # random weights draw tokens almost evenly
    cfg = dataclasses.replace(cfg, stop_ids=tuple(range(cfg.vocab // mean)))
  params = jax.jit(lambda: model.init(cfg, jax.random.key(0)))()
  params['params']['head'] *= args.sharpness
  return cfg, params


def prompts_of(args, cfg):
  """Returns random prompts and a key for each row."""
  shape = (args.rows, args.prompt)
  prompts = jax.random.randint(jax.random.key(1), shape, 0, cfg.vocab - 2)
  return prompts, jax.random.split(jax.random.key(2), args.rows)


def sampling(cfg, hp):
  """Returns the sampler as a jitted function of (params, prompts, keys)."""

  def run(params, prompts, keys):
    valid = jnp.ones(prompts.shape, bool)
    return sampler.sample(cfg, params, prompts, valid, keys, hp)

  return jax.jit(run)


def measure(run, repeats, *inputs):
  """Returns ({compile, warm_up, median, min, max} in seconds, the last output)."""
  begun = time.perf_counter()
  compiled = run.lower(*inputs).compile()
  times = {'compile': time.perf_counter() - begun}
  begun = time.perf_counter()
  out = jax.block_until_ready(compiled(*inputs))
  times['warm_up'] = time.perf_counter() - begun
  spent = []
  for _ in range(repeats):
    begun = time.perf_counter()
    out = jax.block_until_ready(compiled(*inputs))
    spent.append(time.perf_counter() - begun)
  return times | spread(spent), out


def spread(spent):
  return {'median': statistics.median(spent), 'min': min(spent), 'max': max(spent)}


def network_tokens(args, forwards):
  """Returns how many tokens the network computes in a rollout, per row.

  All rows finish their blocks at the same step, as those of scheduled picks do. Where
  rows end early (--mean), those that wait for the others count like them.
  """
  forwards = costs.steps_of(args, args.rows, forwards)
  text, blocks = args.prompt + args.length, args.length // args.block
  if args.cache == 'none':
    return forwards * text
  if args.cache == 'block':  # a block's first step computes the block before, too
    behind = args.length - args.attention_block
    return args.prompt + (forwards - 1) * args.attention_block + behind
  spans = [args.block] * blocks
  if args.cache == 'prefix':
    spans = [args.length - i * args.block for i in range(blocks)]
  return blocks * text + sum(span * (forwards / blocks - 1) for span in spans)


def flops_of(run, trips, *inputs):
  """Returns FLOPs of the matmuls of a jitted function; trips: as costs.matmuls."""
  return costs.matmuls(run.trace(*inputs).jaxpr.jaxpr, trips, 1)[0]


def trips_of(args, hp, forwards):
  """Returns how often the sampler's open loops ran, for `flops_of`."""
  steps = costs.steps_of(hp, args.rows, forwards)
  return costs.trips_of(hp, getattr(args, 'attention_block', 0), args.rows, steps)


def matmul_rate(dtype, size=0, repeats=5):
  """Measures FLOP/s of one large square matmul on this device."""
  size = size or (1536 if jax.default_backend() == 'cpu' else 8192)
  x = jax.random.normal(jax.random.key(3), (size, size), dtype)
  times, _ = measure(jax.jit(lambda a, b: a @ b), repeats, x, x)
  return 2 * size**3 / times['median']


def peak_bytes():
  """Returns peak bytes of the device, or of the process on a CPU."""
  stats = jax.devices()[0].memory_stats() or {}
  return stats.get(
    'peak_bytes_in_use', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  )


def show(args, params, times, flops, results):
  """Prints the JSON line; `flops` of one run."""
  peak = peak_bytes()
  rate = matmul_rate(args.dtype)
  print(
    json.dumps(
      {
        'size': args.size,
        'parameters': model.count_params(params),
        'rows': args.rows,
        'prompt': args.prompt,
        'length': args.length,
        'dtype': args.dtype,
        **results,
        'seconds': times,
        'matmul_flops': flops,
        'matmul_rate': rate,
        'share_of_rate': flops / times['median'] / rate,
        'peak_bytes': peak,
        'device': jax.devices()[0].device_kind,
        'devices': jax.device_count(),
        'jax': jax.__version__,
        'python': platform.python_version(),
      }
    ),
    flush=True,
  )
