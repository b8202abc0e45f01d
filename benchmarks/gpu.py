"""LLaDA-8B's shape on one GPU: sampler, LoRA update, memory, profile, as JSON lines.

python -m benchmarks.gpu --out=FILE --seconds=300 [--size=llada_8b] [--part=main]

Every figure is written to FILE as soon as it is measured. A figure for which no time is
left is a line that says so. Parts: main; flags (a part of it, for a process with other
XLA_FLAGS); plan (memory as `--mode=plan` predicts it on this device). It runs on a CPU
with --size=tiny --rank=8 --prompt=32 --length=64.
"""

import argparse
import dataclasses
import gc
import glob
import importlib
import json
import os
import statistics
import tempfile
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common, train_step
from dmpo_jax import model, optim, rng, sampler, step
from dmpo_jax.objectives import dmpo
from dmpo_jax.tools import plan

BEGUN = time.time()
GIB = 2**30


class Check:
  """The measurements, and where their lines go."""

  def __init__(self, args):
    self.args, self.rate = args, None
    self.cpu = jax.default_backend() == 'cpu'
    self.gpu = not self.cpu
    self.big = args.size.endswith('b')
    self.dtype = 'bfloat16' if self.gpu else 'float32'

  def say(self, name, **figures):
    """Writes one line of figures."""
    line = {
      'name': name,
      'part': self.args.part,
      'at': round(time.time() - BEGUN, 1),
      **figures,
    }
    with open(self.args.out, 'a') as f:
      f.write(json.dumps(line) + '\n')
    print(json.dumps(line), flush=True)

  def left(self):
    """Returns the seconds left."""
    return self.args.seconds - (time.time() - BEGUN)

  def run(self, name, need, fn, *a, **k):
    """Writes the figures that fn returns; an error or a lack of time is a line, too."""
    if self.args.only and name not in (*self.args.only.split(','), 'matmul', 'model'):
      return None
    if self.left() < need:
      return self.say(name, skipped=f'{self.left():.0f} s left, {need} wanted')
    begun = time.time()
    try:
      out = fn(*a, **k)
      self.say(name, **(out or {}), whole=round(time.time() - begun, 2))
    except Exception as error:  # one figure that fails must not lose the rest
      self.say(
        name,
        error=f'{type(error).__name__}: {str(error)[:600]}',
        trace=traceback.format_exc().splitlines()[-3:],
      )
    gc.collect()

  def peak(self):
    return round(
      (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0) / GIB, 2
    )

  # --- yardsticks

  def matmul(self, n, dtype):
    x = jax.random.normal(jax.random.key(3), (n, n), dtype)
    y = jax.random.normal(jax.random.key(4), (n, n), dtype)
    f = jax.jit(lambda a, b: a @ b).lower(x, y).compile()
    times = timed(lambda: f(x, y), 8)
    rate = 2 * n**3 / statistics.median(times)
    if dtype == self.dtype:
      self.rate = max(self.rate or 0, rate)
    return dict(n=n, dtype=str(dtype), tflops=rate / 1e12)

  def copy(self, gib):
    x = jnp.arange(int(gib * GIB / 4), dtype=jnp.float32)
    f = jax.jit(lambda x: x + 1).lower(x).compile()
    times = timed(lambda: f(x), 8)
    return dict(gib=gib, gb_per_s=2 * x.nbytes / statistics.median(times) / 1e9)

  # --- the model

  def make(self):
    a = self.args
    self.cfg = model.ModelConfig(
      **common.SIZES[a.size],
      dtype=self.dtype,
      param_dtype=self.dtype,
      remat='full' if self.big else 'none',
      lora_rank=a.rank,
      lora_alpha=64.0,
      lora_targets=model.LORA_TARGETS['paper'],
      head_chunk=32 if self.big else 0,
    )
    make = jax.jit(lambda: model.init(self.cfg, jax.random.key(0)))
    begun = time.time()
    self.params = jax.block_until_ready(make())
    # Adapters that do something: B is not zero.
    self.params['lora'] = jax.tree.map(lambda x: x + 1e-3, self.params['lora'])
    return dict(
      parameters=model.count_params(self.params['params']),
      adapters=model.count_params(self.params['lora']),
      gib=sum(x.nbytes for x in jax.tree.leaves(self.params)) / GIB,
      seconds=time.time() - begun,
      peak_gib=self.peak(),
    )

  # --- sampler

  def sample(
    self,
    rows,
    cache,
    pick='confidence',
    attention='xla',
    steps=0,
    block=32,
    sharpness=1.0,
    temperature=0.2,
    repeats=1,
    profile='',
    threshold=0.9,
  ):
    a, cfg = self.args, dataclasses.replace(self.cfg, attention=attention)
    steps = steps or a.length // 2
    hp = sampler.SampleConfig(
      a.length,
      block,
      steps,
      temperature,
      pick,
      'token',
      threshold=threshold,
      cache=cache,
    )
    shape = (rows, a.prompt)
    prompts = jax.random.randint(jax.random.key(1), shape, 0, cfg.vocab - 200)
    keys = jax.random.split(jax.random.key(2), rows)
    run = jax.jit(
      lambda params, prompts, keys: sampler.sample(
        cfg, params, prompts, jnp.ones(shape, bool), keys, hp
      )
    )
    params = self.params
    if sharpness != 1:
      params = {
        **params,
        'params': {**params['params'], 'head': params['params']['head'] * sharpness},
      }
    begun = time.time()
    traced = run.trace(params, prompts, keys)
    done = traced.lower().compile()
    compile_s = time.time() - begun
    out = jax.block_until_ready(done(params, prompts, keys))  # warm
    spent = timed(lambda: done(params, prompts, keys), repeats)
    seconds, forwards = statistics.median(spent), int(out.forwards)
    trips = common.trips_of(argparse.Namespace(rows=rows), hp, forwards)
    flops = plan.matmuls(traced.jaxpr.jaxpr, trips, 1)[0]
    memory: Any = done.memory_analysis()
    want = a.length // 2 if pick == 'confidence' else forwards
    figures = dict(
      rows=rows,
      prompt=a.prompt,
      length=a.length,
      block=block,
      cache=cache,
      pick=pick,
      attention=attention,
      steps=steps,
      forwards=forwards,
      seconds=seconds,
      spread=[min(spent), max(spent)],
      ms_per_forward=1e3 * seconds / forwards,
      tokens_per_s=rows * a.length / seconds,
      compile_s=compile_s,
      tflop=flops / 1e12,
      share_of_rate=flops / seconds / self.rate if self.rate else None,
      temp_gib=memory.temp_size_in_bytes / GIB,
      peak_gib_so_far=self.peak(),
    )
    if cache == 'none' and pick == 'confidence' and steps != want:
      # Each forward costs the same: what two tokens a step would give.
      figures['tokens_per_s_at_two_a_step'] = (
        rows * a.length / (seconds / forwards * want)
      )
    if profile and self.left() > 30:
      figures['profile'] = self.profile(lambda: done(params, prompts, keys))
    return figures

  # --- update

  def train(
    self,
    rows,
    draws,
    microbatches,
    attention='xla',
    remat='full',
    dropout=0.05,
    repeats=2,
    profile='',
  ):
    a = self.args
    cfg = dataclasses.replace(
      self.cfg,
      attention=attention,
      lora_dropout=dropout,
      remat=remat if self.big else 'none',
    )
    ns = argparse.Namespace(rows=rows, prompt=a.prompt, length=a.length)
    group = min(8, rows)
    batch = train_step.make_batch(ns, cfg, jax.random.key(1), group)
    adam = optim.Config(1e-6, b2=0.99, weight_decay=0.1, clip=0.2)
    optimizer = optim.make_optimizer(adam)
    setup = step.Setup(
      cfg,
      dmpo.OBJECTIVE,
      dmpo.Config(draws=draws),
      group,
      microbatches=microbatches,
      optimizer=optimizer,
    )

    def run(state, frozen, batch):
      return step.train_step(state, frozen, batch, rng.key_for(0, 'mask'), 0, setup)

    frozen = {'params': self.params['params']}
    state = jax.jit(lambda x: step.init_state(jax.tree.map(jnp.copy, x), optimizer))(
      {'lora': self.params['lora']}
    )
    begun = time.time()
    traced = jax.jit(run, donate_argnums=0).trace(state, frozen, batch)
    done = traced.lower().compile()
    compile_s = time.time() - begun
    held = [state]

    def once():
      held[0], metrics = done(held[0], frozen, batch)
      return metrics

    metrics = jax.block_until_ready(once())
    spent = timed(once, repeats)
    seconds = statistics.median(spent)
    flops = plan.matmuls(traced.jaxpr.jaxpr, (1,), 1)[0]
    tokens = rows * draws * (a.prompt + a.length)
    memory: Any = done.memory_analysis()
    figures = dict(
      rows=rows,
      draws=draws,
      tokens=tokens,
      microbatches=microbatches,
      attention=attention,
      remat=remat,
      dropout=dropout,
      seconds=seconds,
      spread=[min(spent), max(spent)],
      tokens_per_s=tokens / seconds,
      compile_s=compile_s,
      tflop=flops / 1e12,
      share_of_rate=flops / seconds / self.rate if self.rate else None,
      # Without what is computed twice: forward and gradient of the inputs.
      mfu=tokens
      * 2
      * 2
      * model.count_params(self.params['params'])
      / seconds
      / self.rate
      if self.rate
      else None,
      loss=float(metrics['loss']),
      finite=float(metrics['finite']),
      temp_gib=memory.temp_size_in_bytes / GIB,
      peak_gib_so_far=self.peak(),
    )
    if profile and self.left() > 30:
      figures['profile'] = self.profile(once)
    return figures

  def profile(self, run):
    """The kernels that take longest in one run: [name, ms, times]."""
    folder = tempfile.mkdtemp()
    jax.profiler.start_trace(folder)
    jax.block_until_ready(run())
    jax.profiler.stop_trace()
    (found,) = glob.glob(os.path.join(folder, '**', '*.xplane.pb'), recursive=True)
    data = jax.profiler.ProfileData.from_file(found)
    total, count, line_names = {}, {}, []
    for plane in data.planes:
      if self.gpu and not plane.name.startswith('/device:GPU'):
        continue
      for line in plane.lines:
        line_names.append(f'{plane.name}|{line.name}')
        if self.gpu and not line.name.startswith('Stream'):
          continue
        for event in line.events:
          total[event.name] = total.get(event.name, 0) + event.duration_ns / 1e6
          count[event.name] = count.get(event.name, 0) + 1
    top = sorted(total.items(), key=lambda x: -x[1])[:30]
    return dict(
      total_ms=sum(total.values()),
      lines=line_names[:12],
      top=[[name[:90], round(ms, 2), count[name]] for name, ms in top],
    )


def timed(run, repeats):
  spent = []
  for _ in range(repeats):
    begun = time.perf_counter()
    jax.block_until_ready(run())
    spent.append(time.perf_counter() - begun)
  return spent


def main():
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  parser.add_argument('--out', required=True)
  parser.add_argument('--seconds', type=float, default=300)
  parser.add_argument('--size', default='llada_8b', choices=tuple(common.SIZES))
  parser.add_argument('--part', default='main', choices=('main', 'flags', 'plan'))
  parser.add_argument('--only', default='', help='names of figures, to try a few')
  parser.add_argument('--rank', type=int, default=128)
  parser.add_argument('--prompt', type=int, default=256)
  parser.add_argument('--length', type=int, default=256)
  args = parser.parse_args()
  c = Check(args)
  device = jax.devices()[0]
  c.say(
    'machine',
    device=device.device_kind,
    jax=jax.__version__,
    backend=jax.default_backend(),
    limit_gib=(device.memory_stats() or {}).get('bytes_limit', 0) / GIB,
    flags=os.environ.get('XLA_FLAGS', ''),
    fraction=os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION', ''),
  )
  n = 8192 if c.gpu else 1024
  c.run('matmul', 5, c.matmul, n, c.dtype)
  if args.part == 'plan':
    return c.run('plan', 60, plan_here, args)
  if args.part == 'main':
    c.run('matmul_f32', 5, c.matmul, n // 2, 'float32')
    c.run('copy', 5, c.copy, 4 if c.gpu else 0.05)
  c.run('model', 20, c.make)
  few, many = (16, 64) if c.big else (2, 4)
  short = args.length // 32 * 2  # two forwards a block: each costs the same
  if args.part == 'flags':
    c.run('sample_dual_few', 30, c.sample, few, 'dual')
    c.run('sample_none_few', 20, c.sample, few, 'none', steps=short)
    c.run('train', 40, c.train, few, 4, min(4, few))
    return
  train = dict(rows=few, draws=4, microbatches=min(4, few))
  c.run('sample_dual_few', 40, c.sample, few, 'dual', repeats=3, profile='yes')
  c.run('sample_none_few', 30, c.sample, few, 'none', steps=short, repeats=2)
  c.run('train_xla', 50, c.train, **train, profile='yes')
  if c.gpu:
    c.run('train_cudnn', 45, c.train, **train, attention='cudnn')
  c.run('sample_dual_many', 45, c.sample, many, 'dual')
  c.run('sample_none_many', 40, c.sample, many, 'none', steps=short)
  c.run('sample_threshold_dual', 40, c.sample, few, 'dual', 'threshold', sharpness=24.0)
  c.run('train_no_dropout', 40, c.train, **train, dropout=0.0, repeats=1)
  if c.gpu:
    c.run(
      'sample_none_many_cudnn',
      35,
      c.sample,
      many,
      'none',
      attention='cudnn',
      steps=short,
    )
    c.run('sample_dual_few_cudnn', 35, c.sample, few, 'dual', attention='cudnn')
  c.run('sample_prefix_few', 75, c.sample, few, 'prefix', block=64)
  c.run(
    'train_dots',
    45,
    c.train,
    rows=few,
    draws=4,
    microbatches=few,
    remat='dots',
    repeats=1,
  )
  c.run('sample_threshold_none', 40, c.sample, few, 'none', 'threshold', sharpness=24.0)
  c.run('sample_dual_many_cudnn', 40, c.sample, many, 'dual', attention='cudnn')
  c.say('end', peak_gib=c.peak())


def plan_here(args):
  """The project's plan of llada_countdown on this device, fewer rows."""
  config = importlib.import_module('configs.llada_countdown').get_config()
  config.update_from_flattened_dict(
    {'train.microbatches': 16, 'sampler.cache': 'dual', 'train.prompts': 4}
  )
  made = plan.make(config)
  return dict(
    total_gib=made.total / GIB,
    memory_gib=made.memory / GIB,
    seconds=made.seconds,
    programs={
      p.name: dict(
        temp_gib=p.temporaries / GIB, compile_s=p.compile_seconds, at_least=p.seconds
      )
      for p in made.programs
    },
  )


if __name__ == '__main__':
  main()
