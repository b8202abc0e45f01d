"""Whether a run fits and how long it takes, before anything is loaded.

Compiles the sampler, the log-prob pass and the update for the devices here or
for a TPU topology that is not (libtpu compiles without TPUs), from shapes
alone, and reads memory and collectives off the compiled programs. FLOPs and
bytes are those of the matmuls in the traced programs, recomputation included.
"""

import glob
import importlib.util
import math
import os
import re
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dmpo_jax import build, check, mesh, model, optim, step
from dmpo_jax.sampler import picks

GIB = 2**30


class Chip(NamedTuple):
  """Data sheet figures of one device."""

  memory: float  # GiB
  flops: float  # bfloat16, a second
  bandwidth: float  # of its memory, bytes a second
  network: float  # to its neighbours, bytes a second


# By the start of jax's device_kind; the first that fits.
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
  """One compiled program of a run; bytes and FLOPs are a device's."""

  name: str
  temporaries: int  # bytes beside arguments and donated results
  output: int  # bytes that are not donated arguments
  flops: float
  bytes: float  # that its matmuls read and write
  collectives: dict  # kind -> (count, bytes); None if it does not compile
  compile_seconds: float
  seconds: float  # roofline, at least; nan without a data sheet


class Plan(NamedTuple):
  """What a run will hold and how long it takes."""

  devices: str
  mesh: dict
  rows: int
  prompt: int  # P in tokens
  parameters: int  # bytes a device holds of the model it samples with
  reference: int  # further bytes for the reference policy
  optimizer: int  # bytes
  cache: int  # K/V bytes while it samples
  programs: list
  total: int  # bytes at the worst moment
  memory: int  # bytes that JAX may take of the chip; 0 = unknown
  seconds: dict  # rollout, update, run: at least


def topology_devices(name):
  """The devices of a TPU topology such as v5p:4x4x4; None for ''.

  ValueError if libtpu is not there or the topology does not exist.
  """
  if not name:
    return None
  if not importlib.util.find_spec('libtpu'):
    raise ValueError(
      f'--topology={name} needs libtpu, which compiles for TPUs '
      'also where there are none: pip install libtpu'
    )
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # no TPU host to ask
  from jax.experimental import topologies

  try:
    return list(topologies.get_topology_desc(name, 'tpu').devices)
  except Exception as error:  # libtpu's own kinds
    raise ValueError(
      f'--topology={name}: {str(error).splitlines()[0]}; such as v5e:4x4, '
      'v5p:2x4x4 or v6e:8x8 would be right (and one process at a time can '
      'use libtpu)'
    ) from None


def run(c, topology=''):
  """The plan of a config as text."""
  return show(make(c, topology), c)


def make(c, topology=''):
  """The Plan of a config. Loads no weights."""
  if c.sampler.parallel == 'pmap':
    raise ValueError('sampler.parallel = pmap cannot be planned: set jit')
  devices = topology_devices(topology)
  built = build.build(c, devices)
  devices = devices or jax.devices()
  kind = devices[0].device_kind
  chip = next((x for name, x in CHIPS.items() if kind.startswith(name)), None)
  prompt = prompt_length(built)
  made = [compiled(built, chip, len(devices), *job) for job in jobs(built, prompt)]
  parts, state = states(built)
  cache = cache_bytes(built, prompt)
  held = per_device(parts) + per_device(state) + fixed_bytes(built, parts, state)
  total = held + max(p.temporaries + p.output for p in made)
  sample, score, update = (p.seconds for p in made)
  t = c.train
  rollout = sample + score
  seconds = {
    'rollout': rollout,
    'update': update,
    'run': t.iterations * (rollout + t.inner * update),
  }
  return Plan(
    f'{len(devices)} {kind}',
    dict(built.mesh.shape),
    t.prompts * t.group,
    prompt,
    per_device({**parts, **state.trainable}),
    held - per_device({**parts, **state.trainable}) - per_device(state.opt_state),
    per_device(state.opt_state),
    cache,
    made,
    total,
    memory_of(devices[0], chip, topology),
    seconds,
  )


def memory_of(device, chip, topology=''):
  """Bytes of a device that JAX hands out; 0 = unknown.

  As the device says where it is here, else as the data sheet does: JAX leaves a
  quarter of a GPU to others, unless it is told another fraction.
  """
  told = {} if topology else device.memory_stats() or {}
  if 'bytes_limit' in told or not chip:
    return told.get('bytes_limit', 0)
  names = ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION')
  fractions = [os.environ[name] for name in names if os.environ.get(name)]
  fraction = float([*fractions, 0.75][0]) if device.platform == 'gpu' else 1.0
  return int(fraction * chip.memory * GIB)


def prompt_length(built):
  """P: as configured, else of the longest training prompt."""
  if built.config.data.prompt_length:
    return built.config.data.prompt_length
  if built.tokenizer is None:
    raise ValueError(
      'data.prompt_length = 0: without a checkpoint the '
      "prompts' length is not known, set it to plan"
    )
  return build.problems(built, 'train').tokens.shape[1]


def compile_longest(built, prompt):
  """Compiles the programs of the longest prompts, if a cache keeps them."""
  if not jax.config.jax_compilation_cache_dir:
    return
  for name, program, args, _ in jobs(built, prompt):
    if not hasattr(program, 'trace'):  # pmap compiles when it is called
      continue
    logging.info('compiling %s for prompts of %d tokens', name, prompt)
    program.trace(*args).lower().compile()


# --- shapes


def sharded(tree, grid):
  """ShapeDtypeStructs with the shardings of mesh.RULES."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    mesh.shardings(tree, grid),
  )


def states(built):
  """(frozen params, TrainState) as a run holds them, as shapes."""
  c, cfg = built.config, built.model
  tree = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
  params = {'params': tree['params']}
  trainable = {'lora': tree['lora']} if cfg.lora_rank else params
  params = quantized(params, c.model.quantize)
  optimizer = build.optimizer_of(c)
  state = jax.eval_shape(lambda x: step.init_state(x, optimizer), trainable)
  return sharded(params, built.mesh), sharded(state, built.mesh)


def references(built, frozen, state):
  """Steps.read_references as shapes, with the moving one in its place."""
  c = built.config
  if check.plain_reference(c):
    return ()
  moving = 'moving' in c.reference.of and optim.reference_of(state.opt_state)
  return tuple(
    {}
    if path == 'base'
    else moving
    if path == 'moving'
    else state.trainable
    if build.is_adapter(path)
    else frozen
    for path in c.reference.of
  )


def fixed_bytes(built, frozen, state):
  """Bytes of the references that are read; the moving one is in the state."""
  return sum(
    per_device(tree)
    for path, tree in zip(
      built.config.reference.of, references(built, frozen, state), strict=False
    )
    if path != 'moving'
  )


def quantized(params, kind):
  """Shapes of parameters as model.quantize = kind stores them."""

  def one(path, x):
    if kind == 'none' or not mesh.path_of(path).endswith('/kernel'):
      return x
    return jax.eval_shape(lambda x: model.quantize(x, kind), x)

  return jax.tree_util.tree_map_with_path(one, params)


def per_device(tree):
  """Bytes that one device holds of a tree of sharded shapes."""

  def size(x):
    shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    bits = 4 if x.dtype in (jnp.uint4, jnp.int4) else 8 * x.dtype.itemsize
    return math.prod(shape) * bits // 8

  return sum(size(x) for x in jax.tree.leaves(tree))


def cache_bytes(built, prompt):
  """K/V of all layers that a device keeps while it samples; 0 without."""
  c, cfg = built.config, built.model
  if c.sampler.cache == 'none':
    return 0
  shards = built.mesh.shape['data'] * built.mesh.shape['fsdp']
  rows = c.train.prompts * c.train.group // shards
  rows *= 2 if c.sampler.guidance else 1
  dim = cfg.head_dim or cfg.width // cfg.heads
  width = cfg.kv_heads * dim * jnp.dtype(cfg.dtype).itemsize
  return 2 * cfg.layers * rows * (prompt + c.sampler.length) * width


def jobs(built, prompt):
  """[(name, program, arguments as shapes, trips of its open loops)]."""
  c, grid = built.config, built.mesh
  rows, length = c.train.prompts * c.train.group, c.sampler.length
  by_row = mesh.rows(grid)

  def row(shape, dtype):
    return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=by_row)

  frozen, state = states(built)
  rollouts = build.abstract_rollouts(built, prompt)
  steps = c.sampler.length
  if c.sampler.pick in picks.SCHEDULED:
    steps = c.sampler.steps
  trips = (steps,)
  if c.sampler.cache != 'none':  # laps of a block, cached steps of a lap
    a_block = steps // (length // c.sampler.block)
    a_lap = min(a_block, c.sampler.refresh or a_block)
    trips = (-(-a_block // a_lap), a_lap - 1)
  return [
    (
      'sample',
      built.steps.sample,
      (
        {**frozen, **state.trainable},
        row((prompt,), jnp.int32),
        row((prompt,), jnp.bool_),
        row((), jnp.int32),
      ),
      trips,
    ),
    (
      'score',
      built.steps.score,
      (
        state.trainable,
        frozen,
        rollouts,
        row((), jnp.int32),
        row((length,), jnp.bool_),
        references(built, frozen, state),
      ),
      (steps,),
    ),
    (
      'update',
      built.steps.update,
      (
        state,
        frozen,
        build.abstract_batch(built, prompt),
        jax.ShapeDtypeStruct((), jnp.int32),
      ),
      (1,),
    ),
  ]


def compiled(built, chip, devices, name, program, args, trips):
  """Traces, counts and compiles one program."""
  traced = program.trace(*args)
  tensor = built.mesh.shape['tensor']
  flops, moved = matmuls(traced.jaxpr.jaxpr, trips, devices, tensor)
  begun = time.time()
  lowered = traced.lower(lowering_platforms=(built.mesh.devices.flat[0].platform,))
  least = max(flops / chip.flops, moved / chip.bandwidth) if chip else math.nan
  try:
    done = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return Program(
      name, wanted(str(error), chip), 0, flops, moved, None, time.time() - begun, least
    )
  spent = time.time() - begun
  memory = done.memory_analysis()
  found = collectives(hlo_text(lowered, done), trips)
  if chip:
    sent = sum(
      size * (2 if kind == 'all-reduce' else 1) for kind, (_, size) in found.items()
    )
    least = max(least, sent / chip.network)
  output = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return Program(
    name, memory.temp_size_in_bytes, max(0, output), flops, moved, found, spent, least
  )


def wanted(error, chip):
  """Bytes that a program which the compiler refuses would have needed."""
  told = re.search(r'\(([\d.]+)G\) exceeds', error)
  return int((float(told[1]) if told else chip.memory if chip else 0) * GIB)


def hlo_text(lowered, done):
  """The compiled program as text.

  libtpu cannot hand back some programs (fused asynchronous collectives of many
  hosts); those are compiled once more and dumped by the compiler itself.
  """
  try:
    return done.as_text()
  except jax.errors.JaxRuntimeError as error:
    logging.info('compiling again to read the program: %s', str(error).splitlines()[0])
  with tempfile.TemporaryDirectory() as folder:
    lowered.compile({'xla_dump_to': folder, 'xla_dump_hlo_as_text': True})
    (found,) = glob.glob(os.path.join(folder, '*.after_optimizations.txt'))
    with open(found) as f:
      return f.read()


# --- counting


def matmuls(jaxpr, trips, devices, tensor=1):
  """(FLOPs, bytes) a device spends on the matmuls of a traced program.

  Loops count as often as they run; those without a fixed number (unmasking
  steps) trips[0] times, such loops inside of them trips[1] times. Operands of
  two dimensions are weights: whole on every device but for the tensor axis; all
  others are split over the devices.
  """
  flops = moved = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (left, _), _ = eqn.params['dimension_numbers']
      shapes = [v.aval for v in (*eqn.invars, *eqn.outvars)]
      inner = math.prod(shapes[0].shape[i] for i in left)
      flops += 2 * math.prod(shapes[2].shape) * inner / devices
      moved += sum(
        x.size * x.dtype.itemsize / (tensor if x.ndim <= 2 else devices) for x in shapes
      )
      continue
    is_open = eqn.primitive.name == 'while'
    times = trips[0] if is_open else eqn.params.get('length', 1)
    inside = trips[1:] or trips if is_open else trips
    for part in inner_jaxprs(eqn.params):
      f, m = matmuls(part, inside, devices, tensor)
      flops, moved = flops + times * f, moved + times * m
  return flops, moved


def inner_jaxprs(params):
  """The programs inside an equation: bodies of loops, calls, branches."""
  for value in params.values():
    for x in value if isinstance(value, (tuple, list)) else (value,):
      x = getattr(x, 'jaxpr', x)
      if hasattr(x, 'eqns'):
        yield x


KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
LINE = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z\-]+)\((.*)$')
TYPE = re.compile(r'(pred|[a-z]+\d+)\w*\[([\d,]*)\]')
CALL = re.compile(
  r'(?:calls|to_apply|body|condition|true_computation|'
  r'false_computation)=%?([\w.\-]+)'
)


def collectives(text, trips):
  """{kind: (count, bytes)} that a device takes part in, from compiled HLO.

  Bytes of a collective are those of the larger of its operand and result. A
  collective that is split over several computations has one channel and
  counts once.
  """
  computations, entry = parse(text)
  seen = {}

  def visit(name, times, trips):
    for kind, size, channel, calls in computations.get(name, ()):
      if kind:
        key = (channel, kind)
        seen[key] = max(seen.get(key, (0, 0)), (times, size))
      for child, own in calls:
        if own is None:  # an open loop
          visit(child, times * trips[0], trips[1:] or trips)
        else:
          visit(child, times * own, trips)

  visit(entry, 1, trips)
  out = {}
  for (_, kind), (times, size) in seen.items():
    count, total = out.get(kind, (0, 0))
    out[kind] = count + times, total + times * size
  return out


def parse(text):
  """({computation: [(kind, bytes, channel, [(callee, times)])]}, entry)."""
  computations, bounds, entry, name = {}, {}, '', ''
  loops = []
  for line in text.splitlines():
    head = HEAD.match(line)
    if head:
      name, sizes, constants = head[2], {}, {}
      computations[name] = []
      entry = name if head[1] else entry
      continue
    found = LINE.match(line)
    if not found:
      continue
    result, kind, op, rest = found.groups()
    sizes[result] = largest(kind)
    if op == 'constant':
      constants[result] = rest.split(')')[0]
    if op == 'compare' and 'direction=LT' in rest and 'ROOT' in line:
      limit = re.findall(r'%?([\w.\-]+)[,)]', rest)[1]
      bounds[name] = constants.get(limit)
    calls = [(callee, 1) for callee in CALL.findall(rest)]
    if op == 'while':
      told = re.search(r'known_trip_count\D+(\d+)', rest)
      loops.append(
        (
          calls,
          int(told[1]) if told else None,
          re.search(r'condition=%?([\w.\-]+)', rest)[1],
        )
      )
    base = op.removesuffix('-start')
    if base in KINDS or calls:
      operand = re.match(r'%?([\w.\-]+)', rest)
      size = max(sizes[result], sizes.get(operand[1], 0) if operand else 0)
      channel = re.search(r'channel_id=(\d+)', rest)
      channel = channel[1] if channel else f'{name}/{result}'
      computations[name].append((base if base in KINDS else '', size, channel, calls))
  for calls, told, condition in loops:
    limit = bounds.get(condition)
    times = told or (int(limit) if limit and limit.isdigit() else None)
    calls[:] = [(callee, times) for callee, _ in calls]
  return computations, entry


def largest(kind):
  """Bytes of the largest array in an HLO type (a tuple has several)."""

  def size(dtype, dims):
    bits = 8 if dtype == 'pred' else int(re.search(r'\d+', dtype)[0])
    return math.prod(int(d) for d in dims.split(',') if d) * bits // 8

  return max((size(*found) for found in TYPE.findall(kind)), default=0)


# --- showing


def show(plan, c):
  """The plan as text."""
  gib = lambda x: f'{x / GIB:.2f} GiB' if x >= GIB / 20 else (f'{x / 2**20:.2f} MiB')
  t = c.train
  lines = [
    f'{c.name} on {plan.devices}, mesh '
    + ' '.join(f'{k}={v}' for k, v in plan.mesh.items()),
    f'{t.prompts} prompts x {t.group} completions = {plan.rows} rows of '
    f'{plan.prompt} + {c.sampler.length} tokens, {t.inner} updates, '
    f'{t.iterations} iterations',
    '',
    'memory of a device',
    f'  parameters      {gib(plan.parameters)}',
    f'  reference       {gib(plan.reference)}',
    f'  optimizer       {gib(plan.optimizer)}',
    '  temporaries     '
    + ', '.join(f'{p.name} {gib(p.temporaries)}' for p in plan.programs)
    + (f' (K/V cache {gib(plan.cache)})' if plan.cache else ''),
  ]
  fits = (
    'unknown'
    if not plan.memory
    else f'fits in {gib(plan.memory)}'
    if plan.total < 0.95 * plan.memory
    else f'DOES NOT FIT in {gib(plan.memory)} (5 % kept free)'
  )
  lines += [
    f'  at the worst    {gib(plan.total)}: {fits}',
    '',
    'program   TFLOP  GiB moved   at least  compile  collectives',
  ]
  for p in plan.programs:
    sent = (
      'unknown: too large to compile'
      if p.collectives is None
      else (
        ', '.join(
          f'{n} {kind} {gib(size)}' for kind, (n, size) in sorted(p.collectives.items())
        )
        or 'none'
      )
    )
    lines.append(
      f'{p.name:8}{p.flops / 1e12:7.2f}{p.bytes / GIB:11.2f}'
      f'{duration(p.seconds):>11}{p.compile_seconds:7.0f} s  {sent}'
    )
  lines += [
    '',
    ', '.join(f'{name} at least {duration(s)}' for name, s in plan.seconds.items()),
  ]
  return '\n'.join(lines)


def duration(seconds):
  """Seconds as text, in the unit that they are read best in."""
  if np.isnan(seconds):
    return 'unknown'
  if seconds < 120:
    return f'{seconds:.3g} s'
  return f'{seconds / 60:.0f} min' if seconds < 7200 else (f'{seconds / 3600:.1f} h')
