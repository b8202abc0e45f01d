"""What the benchmarks share: sizes, arguments, timing, the JSON line."""

import json
import platform
import statistics
import time

import jax

from dmpo_jax import model


def arguments(parser):
  parser.add_argument('--size', default='tiny', choices=tuple(model.PRESETS))
  parser.add_argument('--rows', type=int, default=16)
  parser.add_argument('--prompt', type=int, default=32, help='tokens')
  parser.add_argument('--length', type=int, default=64, help='tokens')
  parser.add_argument('--dtype', default='float32',
                      choices=('float32', 'bfloat16'))
  parser.add_argument('--repeats', type=int, default=5)


def make_model(args):
  """Random weights of a preset; small sizes get a vocabulary of 128."""
  fields = {'vocab': 128, 'mask_id': 127, 'eos_id': 126, 'pad_id': 126,
            **model.PRESETS[args.size]}
  rank = getattr(args, 'lora', 0)
  cfg = model.ModelConfig(**fields, dtype=args.dtype, param_dtype=args.dtype,
                          remat='full' if args.size.endswith('b') else 'none',
                          lora_rank=rank)
  params = jax.jit(lambda: model.init(cfg, jax.random.key(0)))()
  return cfg, params


def measure(run, repeats, *inputs):
  """({compile, median, min, max} in seconds, the last output)."""
  begun = time.perf_counter()
  compiled = run.lower(*inputs).compile()
  times = {'compile': time.perf_counter() - begun}
  out = jax.block_until_ready(compiled(*inputs))  # warm-up
  spent = []
  for _ in range(repeats):
    begun = time.perf_counter()
    out = jax.block_until_ready(compiled(*inputs))
    spent.append(time.perf_counter() - begun)
  times |= {'median': statistics.median(spent), 'min': min(spent),
            'max': max(spent)}
  return times, out


def show(args, cfg, params, times, results):
  device = jax.devices()[0]
  stats = device.memory_stats() or {}
  print(json.dumps({
      'size': args.size, 'parameters': model.count_params(params),
      'rows': args.rows, 'prompt': args.prompt, 'length': args.length,
      'dtype': args.dtype, **results, 'seconds': times,
      'peak_bytes': stats['peak_bytes_in_use']
      if 'peak_bytes_in_use' in stats else None,
      'device': device.device_kind, 'devices': jax.device_count(),
      'jax': jax.__version__, 'python': platform.python_version()}))
