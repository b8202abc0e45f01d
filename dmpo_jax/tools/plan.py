"""Plans a run before anything is loaded: whether it fits, and how long it takes.

Compiles the sampler, the log-prob pass and the update from shapes alone, for the
devices here or for a TPU topology (libtpu compiles without TPUs). Memory and
collectives are read from the compiled programs. FLOPs and bytes are those of the
matmuls in the traced programs.
"""

import glob
import importlib.util
import math
import os
import re
import tempfile
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from dmpo_jax import build
from dmpo_jax.sampler import SAMPLERS
from dmpo_jax.tools.costs import collectives, matmuls
from dmpo_jax.types import Params, TrainState

GIB = 2**30


class Chip(NamedTuple):
  """Figures of one device from its data sheet."""

  memory: float  # GiB
  flops: float  # bfloat16, per second
  bandwidth: float  # of its memory, bytes per second
  network: float  # to its neighbours, bytes per second


# By the start of jax's device_kind; the first match counts.
CHIPS = {
  'TPU v4': Chip(32, 275e12, 1.23e12, 300e9),
  'TPU v5 lite': Chip(16, 197e12, 0.82e12, 200e9),
  'TPU v5': Chip(95, 459e12, 2.76e12, 600e9),
  'TPU v6 lite': Chip(32, 918e12, 1.64e12, 448e9),
  'NVIDIA A100': Chip(80, 312e12, 2.0e12, 300e9),
  'NVIDIA H100': Chip(80, 989e12, 3.35e12, 450e9),
  'NVIDIA H200': Chip(141, 989e12, 4.8e12, 450e9),
}


class Program(NamedTuple):
  """One compiled program of a run; bytes and FLOPs are those of a device."""

  name: str
  temporaries: int  # bytes beside arguments and donated results
  output: int  # bytes that are not donated arguments
  flops: float
  bytes: float  # that its matmuls read and write
  collectives: dict | None  # kind -> (count, bytes); None if it does not compile
  compile_seconds: float
  seconds: float  # lower bound by the roofline; nan without a data sheet


class Plan(NamedTuple):
  """Memory and time of a run."""

  devices: str
  mesh: dict
  rows: int
  prompt: int  # P in tokens
  parameters: int  # bytes a device holds of the model it samples with
  reference: int  # further bytes for the reference policy
  optimizer: int  # bytes
  cache: int  # K/V bytes while it samples
  programs: list
  total: int  # bytes at the peak
  memory: int  # bytes of the chip that JAX may take; 0 = unknown
  seconds: dict  # of rollout, update and run: lower bounds; nan = unknown


def topology_devices(name: str) -> list | None:
  """Returns the devices of a TPU topology such as v5p:4x4x4; None for ''.

  Raises ValueError if libtpu is not installed or the topology does not exist.
  """
  if not name:
    return None
  if not importlib.util.find_spec('libtpu'):
    raise ValueError(
      f'--topology={name} needs libtpu, which compiles for TPU slices (and only '
      'for these) on any machine: pip install libtpu'
    )
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # no TPU host to ask
  from jax.experimental import topologies

  try:
    return list(topologies.get_topology_desc(name, 'tpu').devices)
  except Exception as error:  # libtpu has exceptions of its own
    raise ValueError(
      f'--topology={name}: {str(error).splitlines()[0]}; name a TPU slice such as '
      'v5e:4x4, v5p:2x4x4 or v6e:8x8 (only one process at a time can use libtpu)'
    ) from None


def run(c: Any, topology: str = '') -> str:
  """Returns the plan of a config as text."""
  return show(make(c, topology), c)


def make(c: Any, topology: str = '') -> Plan:
  """Returns the Plan of a config; loads no weights."""
  if c.sampler.parallel == 'pmap':
    raise ValueError('sampler.parallel = pmap cannot be planned: set jit')
  devices = topology_devices(topology)
  built = build.build(c, devices)
  devices = devices or jax.devices()
  kind = devices[0].device_kind
  chip = next((x for name, x in CHIPS.items() if kind.startswith(name)), None)
  prompt = prompt_length(built)
  programs = [compiled(built, chip, job) for job in jobs(built, prompt)]
  frozen, state = build.abstract_states(built)
  held = per_device(frozen) + per_device(state) + fixed_bytes(built, frozen, state)
  parameters = per_device({**frozen, **state.trainable})
  sample, score, update = (p.seconds for p in programs)
  rollout, t = sample + score, c.train
  return Plan(
    devices=f'{len(devices)} {kind}',
    mesh=dict(built.mesh.shape),
    rows=t.prompts * t.group,
    prompt=prompt,
    parameters=parameters,
    reference=held - parameters - per_device(state.opt_state),
    optimizer=per_device(state.opt_state),
    cache=cache_bytes(built, prompt),
    programs=programs,
    total=held + max(p.temporaries + p.output for p in programs),
    memory=memory_of(devices[0], chip, topology),
    seconds={
      'rollout': rollout,
      'update': update,
      'run': t.iterations * (rollout + t.inner * update),
    },
  )


def memory_of(device: Any, chip: Chip | None, topology: str = '') -> int:
  """Returns the bytes of a device that JAX hands out; 0 = unknown.

  A device that is here says so itself. Else the data sheet counts, of which JAX
  by default leaves a quarter of a GPU to other programs.
  """
  stats = {} if topology else device.memory_stats() or {}
  if 'bytes_limit' in stats or not chip:
    return stats.get('bytes_limit', 0)
  names = ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION')
  fractions = [os.environ[name] for name in names if os.environ.get(name)]
  fraction = float([*fractions, 0.75][0]) if device.platform == 'gpu' else 1.0
  return int(fraction * chip.memory * GIB)


def prompt_length(built: build.Built) -> int:
  """Returns P: data.prompt_length, else the longest training prompt."""
  if built.config.data.prompt_length:
    return built.config.data.prompt_length
  if built.tokenizer is None:
    raise ValueError(
      'data.prompt_length = 0: without a checkpoint the length of the prompts is '
      'unknown, set it to plan'
    )
  return build.problems(built, 'train').tokens.shape[1]


# --- shapes


def fixed_bytes(built: build.Built, frozen: Params, state: TrainState) -> int:
  """Returns bytes of the references that are read; the state has the moving one."""
  return sum(
    per_device(tree)
    for path, tree in zip(
      built.config.reference.of,
      build.abstract_references(built, frozen, state),
      strict=False,
    )
    if path != 'moving'
  )


def per_device(tree: Any) -> int:
  """Returns bytes that one device holds of a tree of sharded shapes."""

  def size(x):
    shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    bits = 4 if x.dtype in (jnp.uint4, jnp.int4) else 8 * x.dtype.itemsize
    return math.prod(shape) * bits // 8

  return sum(size(x) for x in jax.tree.leaves(tree))


def cache_bytes(built: build.Built, prompt: int) -> int:
  """Returns bytes of a device's K/V cache while it samples; 0 without a cache."""
  c, cfg = built.config, built.model
  if c.sampler.cache == 'none':
    return 0
  shards = built.mesh.shape['data'] * built.mesh.shape['fsdp']
  rows = c.train.prompts * c.train.group // shards
  rows *= 2 if c.sampler.guidance else 1
  dim = cfg.head_dim or cfg.width // cfg.heads
  width = cfg.kv_heads * dim * jnp.dtype(cfg.dtype).itemsize
  tokens = prompt + c.sampler.length
  if cfg.block_causal:  # the rest of the prompt stands on the canvas
    tokens -= prompt % cfg.block_causal
  return 2 * cfg.layers * rows * tokens * width


def jobs(built: build.Built, prompt: int) -> list[tuple]:
  """Returns build.programs, each with the trips of its open loops.

  Of the cache `block` it counts a step's own block, and once a block the one before it.
  Rows whose prompts end elsewhere in their blocks compute that one more often.
  """
  c = built.config
  length = steps = c.sampler.length
  if SAMPLERS[c.sampler.pick].scheduled:
    steps = c.sampler.steps
  trips = (steps,)
  if c.sampler.cache == 'block':
    trips = (steps, length / built.model.block_causal / steps)
  elif c.sampler.cache != 'none':  # laps of a block, cached steps of a lap
    a_block = steps // (length // c.sampler.block)
    a_lap = min(a_block, c.sampler.refresh or a_block)
    trips = (-(-a_block // a_lap), a_lap - 1)
  loops = {'sample': trips, 'score': (steps,), 'update': (1,)}
  return [(*job, loops[job[0]]) for job in build.programs(built, prompt)]


def compiled(built: build.Built, chip: Chip | None, job: tuple) -> Program:
  """Traces, counts and compiles one of `jobs`."""
  name, program, args, trips = job
  traced, grid = program.trace(*args), built.mesh
  flops, moved = matmuls(
    traced.jaxpr.jaxpr, trips, grid.devices.size, grid.shape['tensor']
  )
  begun = time.time()
  lowered = traced.lower(lowering_platforms=(grid.devices.flat[0].platform,))
  least = max(flops / chip.flops, moved / chip.bandwidth) if chip else math.nan
  try:
    done = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    needed = needed_bytes(str(error), chip)
    return Program(name, needed, 0, flops, moved, None, time.time() - begun, least)
  spent = time.time() - begun
  memory = done.memory_analysis()
  traffic = collectives(hlo_text(lowered, done), trips)
  if chip:
    received = sum(
      count * (2 if kind == 'all-reduce' else 1) for kind, (_, count) in traffic.items()
    )
    least = max(least, received / chip.network)
  output = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
  return Program(
    name, memory.temp_size_in_bytes, output, flops, moved, traffic, spent, least
  )


def needed_bytes(error: str, chip: Chip | None) -> int:
  """Returns the bytes that a program needs which the compiler refuses as too large."""
  match = re.search(r'\(([\d.]+)G\) exceeds', error)
  return int((float(match[1]) if match else chip.memory if chip else 0) * GIB)


def hlo_text(lowered: Any, done: Any) -> str:
  """Returns the compiled program as text.

  libtpu cannot return some programs (fused asynchronous collectives of many
  hosts). These are compiled again, and the compiler dumps them.
  """
  try:
    return done.as_text()
  except jax.errors.JaxRuntimeError as error:
    logging.info('compiling again to read the program: %s', str(error).splitlines()[0])
  with tempfile.TemporaryDirectory() as folder:
    lowered.compile({'xla_dump_to': folder, 'xla_dump_hlo_as_text': True})
    (dump,) = glob.glob(os.path.join(folder, '*.after_optimizations.txt'))
    with open(dump) as f:
      return f.read()


# --- showing


def show(plan: Plan, c: Any) -> str:
  """Returns the plan as text; a line says why a number is not known."""
  t, programs = c.train, plan.programs
  timed = not any(math.isnan(p.seconds) for p in programs)
  lines = [
    f'{c.name} on {plan.devices}, mesh '
    + ' '.join(f'{k}={v}' for k, v in plan.mesh.items()),
    f'{t.prompts} prompts x {t.group} completions = {plan.rows} rows of '
    f'{plan.prompt} + {c.sampler.length} tokens, {t.inner} updates, '
    f'{t.iterations} iterations',
    '',
    'memory of a device',
    f'  parameters      {size(plan.parameters)}',
    f'  reference       {size(plan.reference)}',
    f'  optimizer       {size(plan.optimizer)}',
    '  temporaries     '
    + ', '.join(f'{p.name} {size(p.temporaries)}' for p in programs)
    + (f' (K/V cache {size(plan.cache)})' if plan.cache else ''),
    f'  peak            {size(plan.total)}{fits(plan)}',
    '',
    'program   TFLOP  GiB moved  ' + ' at least  ' * timed + 'compile  collectives',
  ]
  for p in programs:
    lines.append(
      f'{p.name:8}{p.flops / 1e12:7.2f}{p.bytes / GIB:11.2f}'
      + (f'{duration(p.seconds):>11}' if timed else '')
      + f'{p.compile_seconds:7.0f} s  {sent(p)}'
    )
  lines.append('')
  if timed:
    times = (f'{name} at least {duration(s)}' for name, s in plan.seconds.items())
    lines.append(', '.join(times))
  if not timed or not plan.memory:
    unknown = ['the memory limit'] * (not plan.memory) + ['the times'] * (not timed)
    lines.append(
      f'unknown: {" and ".join(unknown)}, as dmpo_jax/tools/plan.py (CHIPS) has no '
      'data sheet of this device; --topology=v5e:4x4 plans for a TPU slice'
    )
  return '\n'.join(lines)


def size(count: int) -> str:
  """Returns bytes as text, in GiB or MiB."""
  return f'{count / GIB:.2f} GiB' if count >= GIB / 20 else f'{count / 2**20:.2f} MiB'


def fits(plan: Plan) -> str:
  """Returns whether the peak fits in the memory; '' if the memory is unknown."""
  if not plan.memory:
    return ''
  if plan.total < 0.95 * plan.memory:
    return f': fits in {size(plan.memory)}'
  return f': DOES NOT FIT in {size(plan.memory)} (5 % kept free)'


def sent(program: Program) -> str:
  """Returns a program's collectives as text."""
  if program.collectives is None:
    return 'unknown: too large to compile'
  kinds = sorted(program.collectives.items())
  return ', '.join(f'{n} {kind} {size(x)}' for kind, (n, x) in kinds) or 'none'


def duration(seconds: float) -> str:
  """Returns seconds as text, in seconds, minutes or hours."""
  if math.isnan(seconds):
    return 'unknown'
  if seconds < 120:
    return f'{seconds:.3g} s'
  return f'{seconds / 60:.0f} min' if seconds < 7200 else f'{seconds / 3600:.1f} h'
