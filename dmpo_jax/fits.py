"""Compares what the programs of a run need of memory with what its devices have.

`check` does so before weights are loaded. It refuses a run that does not fit, and names
settings that do. tools/plan.py asks the same of devices that are not here.
"""

import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dmpo_jax import build, data, metrics

GIB = 2**30
REMATS = ('none', 'dots', 'full')  # values of model.remat, from the fastest
SPARE = 0.05  # share of the memory that a plan keeps free, for what pieces waste
# What the GPU's memory pool takes of a card where the user has not said it. CUDA and
# NCCL need the rest.
FRACTION = 0.92
FRACTIONS = ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION')


class Target(NamedTuple):
  """The device that programs are compiled for."""

  memory: int  # bytes that JAX may take of it; 0 = unknown
  platforms: tuple[str, ...] | None = None  # None: those that are here
  options: dict[str, Any] = {}  # of the compiler
  beat: Callable[[], Any] = lambda: None  # called before each compilation


class Held(NamedTuple):
  """Bytes that a device holds during all of a run."""

  parameters: int  # of the model that samples
  reference: int  # further ones of the reference policy and of a draft
  optimizer: int


class Use(NamedTuple):
  """A compiled program, and the bytes of a device that it needs beside `Held`."""

  name: str
  temporaries: int
  output: int  # that is not a donated argument
  seconds: float  # of compilation
  lowered: Any
  program: Any  # None: the compiler refuses it as too large

  @property
  def size(self) -> int:
    """Bytes while it runs."""
    return self.temporaries + self.output


def limit(device: Any) -> int:
  """Returns the bytes that JAX may take of a device that is here; 0 = unknown."""
  return (device.memory_stats() or {}).get('bytes_limit', 0)


def size(count: float) -> str:
  """Returns bytes as text, in GiB or MiB."""
  return f'{count / GIB:.2f} GiB' if count >= GIB / 20 else f'{count / 2**20:.2f} MiB'


# --- what is held


def per_device(tree: Any) -> int:
  """Returns bytes that one device holds of a tree of sharded shapes."""

  def size(x):
    shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    bits = 4 if x.dtype in (jnp.uint4, jnp.int4) else 8 * x.dtype.itemsize
    return int(np.prod(shape)) * bits // 8

  return sum(size(x) for x in jax.tree.leaves(tree))


def held(built: build.Built) -> Held:
  """Returns what a device holds. The moving reference is part of the optimizer."""
  frozen, state = build.abstract_states(built)
  references = build.abstract_references(built, frozen, state)
  parameters = per_device({**frozen, **state.trainable})
  draft = per_device(built.who.shapes()) if built.who else 0
  return Held(
    parameters,
    draft
    + per_device(frozen)
    + per_device(state)
    - per_device(state.opt_state)
    - parameters
    + per_device(build.kept_references(built, references)),
    per_device(state.opt_state),
  )


# --- what programs need


def compiled(name: str, traced: Any, target: Target) -> Use:
  """Compiles a traced program; one that is too large needs what the compiler says."""
  target.beat()
  begun = time.time()
  lowered = traced.lower(lowering_platforms=target.platforms)
  try:
    with metrics.waiting(f'compiling {name}'):
      program = lowered.compile(target.options or None)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    needed = needed_bytes(str(error)) or target.memory
    return Use(name, needed, 0, time.time() - begun, lowered, None)
  memory = program.memory_analysis()
  output = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
  spent = time.time() - begun
  return Use(name, memory.temp_size_in_bytes, output, spent, lowered, program)


def needed_bytes(error: str) -> int:
  """Returns the bytes that a refused program needs; 0 if the compiler does not say."""
  match = re.search(r'([\d.]+)G(?:\) exceeds| of [\d.]+G hbm)', error)
  return int(float(match[1]) * GIB) if match else 0


def uses(built: build.Built, prompts: tuple[int, int], target: Target) -> list[Use]:
  """Compiles the programs of a run; one of pmap compiles when it is called."""
  found = []
  for name, program, args in build.programs(built, *prompts):
    if hasattr(program, 'trace'):
      logging.info('compiling %s for prompts of %d tokens', name, prompts[0])
      found.append(compiled(name, program.trace(*args), target))
  return found


# --- what would fit


def room(built: build.Built, target: Target) -> float:
  """Returns the bytes that a program may take beside `held`; SPARE stays free."""
  return (1 - SPARE) * target.memory - sum(held(built))


def first(values: Sequence[Any], fits: Callable[[Any], bool]) -> Any:
  """Returns the first value that fits, where all after it do too; None if none does."""
  if not values or not fits(values[-1]):
    return None
  low, high = 0, len(values) - 1
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if fits(values[middle]) else (middle + 1, high)
  return values[low]


def divisors(count: int) -> list[int]:
  """Returns the divisors of a number, in order."""
  return [n for n in range(1, count + 1) if count % n == 0]


def remedy(
  built: build.Built, prompts: tuple[int, int], target: Target, made: Sequence[Use]
) -> dict[str, Any] | None:
  """Returns the fields to change so that all fits; None if no such values are found.

  It tries the smallest train.microbatches, then more rematerialisation; no cache for
  `sample`; and the largest eval.batch. made: as `uses` returns it.
  """
  c, found = built.config, {}
  left = room(built, target)
  shards = built.mesh.devices.size // built.mesh.shape['tensor']
  rows, least = c.train.prompts * c.train.group // shards, c.train.microbatches
  large = {use.name for use in made if use.size > left}

  def fits(names, fields):
    logging.info('trying %s', settings(fields))
    other = changed(built, fields)
    wanted = [job for job in build.programs(other, *prompts) if job[0] in names]
    return all(
      compiled(name, program.trace(*args), target).size <= left
      for name, program, args in wanted
    )

  def search(names, options):
    for fields, name, values in options:
      value = first(values, lambda x: fits(names, {**fields, name: x}))  # noqa: B023
      if value is not None:
        return found.update({**fields, name: value})
    large.add('nothing')

  pieces = [n for n in divisors(rows) if n >= least]
  remats = REMATS[REMATS.index(c.model.remat) :]
  if large & {'score', 'update'}:
    names = ('score', 'update')
    other = [({'model.remat': x}, 'train.microbatches', pieces) for x in remats[1:]]
    search(names, [({}, 'train.microbatches', pieces), *other])
  if 'sample' in large:
    caches = ['none'] if c.sampler.cache != 'none' else []
    search(('sample',), [({}, 'sampler.cache', caches)])
  if 'evaluate' in large:
    batches = [n for n in divisors(c.eval.batch)[::-1] if n % shards == 0]
    search(('evaluate',), [({}, 'eval.batch', batches)])
  return None if 'nothing' in large else found


def changed(built: build.Built, fields: dict[str, Any]) -> build.Built:
  """Returns the parts of a run with other values of some fields."""
  c = built.config.copy_and_resolve_references()
  c.update_from_flattened_dict(fields)
  return build.build(c, list(built.mesh.devices.flat))


def smaller(built: build.Built, most: float) -> str:
  """Returns how a device would hold at most so many bytes, each by one field alone."""
  c, experts = built.config, built.model.experts
  spread = divisors(built.mesh.devices.size // built.mesh.shape['tensor'])
  options = [
    ('mesh.expert', [n for n in spread if experts and experts % n == 0]),
    ('mesh.fsdp', [n for n in spread if n % c.mesh.fsdp == 0]),
    ('model.quantize', ['int8'] if c.lora.rank and c.model.quantize == 'none' else []),
  ]
  alone = {'mesh.data': 0, 'mesh.expert': 1, 'mesh.fsdp': 1}

  def held_by(fields: dict[str, Any]) -> float:
    return sum(held(changed(built, fields)))

  found = []
  for name, values in options:
    kept = alone if name.startswith('mesh') else {}
    value = first(values, lambda x: held_by({**kept, name: x}) <= most)  # noqa: B023
    found += [] if value is None else [settings({name: value})]
  return ' or '.join(found)


def settings(fields: dict[str, Any]) -> str:
  """Returns fields as the command line sets them."""
  return ' '.join(f'--config.{name}={value}' for name, value in fields.items())


def verdict(
  built: build.Built, prompts: tuple[int, int], target: Target, made: Sequence[Use]
) -> str:
  """Returns what does not fit and which settings would, as a sentence; '' if all fits.

  A run fits if it leaves SPARE of the memory free.
  """
  always, left = sum(held(built)), room(built, target)
  large = [use for use in made if use.size > left]
  if not target.memory or not (large or left < 0):
    return ''
  needs = ', '.join(f'{use.name} {size(always + use.size)}' for use in large)
  device = built.mesh.devices.flat[0].device_kind
  said = (
    f'JAX may take {size(target.memory)} of a {device}; model and optimizer need '
    f'{size(always)}, and with what they compute: {needs}. '
  )
  if left < 0:
    less = smaller(built, (1 - SPARE) * target.memory)
    return (
      said
      + 'The model is too large: '
      + (
        f'a device holds a part of it that fits with {less}'
        if less
        else 'use more devices, with mesh.fsdp or mesh.expert, or model.quantize'
      )
    )
  fields = remedy(built, prompts, target, made)
  if fields is None:
    less = smaller(built, left + always - max(use.size for use in large))
    return said + (
      f'No train.microbatches from {built.config.train.microbatches} on fits, with any '
      'model.remat, and the sampler without a cache: '
      + (f'set {less}' if less else 'use more devices (mesh.fsdp), model.quantize')
      + ', or fewer train.prompts'
    )
  return f'{said}It fits with {settings(fields)}'


def prompts_of(built: build.Built) -> tuple[int, int]:
  """Returns the longest prompts that training and evaluation see, in tokens."""
  problems = lambda split: build.problems(built, split)
  longest = [problems(split).tokens.shape[1] for split in ('validation', 'test')]
  bucket = built.config.data.bucket
  return data.bucketed(problems('train').valid, bucket), max(longest)


def check(built: build.Built, beat: Callable[[], Any] = lambda: None) -> None:
  """Compiles the programs of the longest prompts; ValueError if one is too large.

  On devices that do not say how much memory they have (CPUs) it compiles only where a
  cache keeps the programs, and prompts differ in length: then a program that does not
  compile fails here, not at the long prompt hours later.
  """
  c, memory = built.config, limit(built.mesh.local_devices[0])
  kept: Any = jax.config
  if not c.train.iterations or not (
    memory or (kept.jax_compilation_cache_dir and c.data.bucket)
  ):
    return
  prompts, target = prompts_of(built), Target(memory, beat=beat)
  if said := verdict(built, prompts, target, uses(built, prompts, target)):
    raise ValueError(f'this run does not fit: {said}')


# --- what comes before RL


def check_phase(
  built: build.Built, name: str, rows: Any, beat: Callable[[], Any] = lambda: None
) -> None:
  """Compiles the programs of a phase before RL; ValueError if one is too large.

  rows: the largest, as build.PHASES[name] takes them. Does nothing on devices that do
  not say how much memory they have.
  """
  target = Target(limit(built.mesh.local_devices[0]), beat=beat)
  if target.memory and (said := phase_verdict(built, name, rows, target)):
    raise ValueError(f'this run does not fit: {said}')


def phase_verdict(built: build.Built, name: str, rows: Any, target: Target) -> str:
  """Returns why an update on such rows does not fit, and what would; '' if it does."""
  left, phase = (1 - SPARE) * target.memory, build.PHASES[name](built, rows)

  def needs(microbatches: int) -> int:
    logging.info('compiling %s with %d microbatches', name, microbatches)
    other = changed(built, {f'{name}.microbatches': microbatches})
    own = build.PHASES[name](other, rows)
    traced = ((job, program.trace(*args)) for job, program, args in own.programs)
    return per_device(own.held) + max(compiled(*job, target).size for job in traced)

  now = built.config[name].microbatches
  if (size_now := needs(now)) <= left:
    return ''
  shards = built.mesh.devices.size // built.mesh.shape['tensor']
  more = [n for n in divisors(phase.rows // shards) if n > now]
  found = first(more, lambda n: needs(n) <= left)
  rank = {'sft': 'sft.rank', 'pairs': 'lora.rank'}[name]
  return (
    f'JAX may take {size(target.memory)} of a '
    f'{built.mesh.devices.flat[0].device_kind}, {phase.what} needs {size(size_now)}. '
    + (
      f'It fits with {settings({f"{name}.microbatches": found})}'
      if found
      else f'No {name}.microbatches fits: set {rank} > 0 with model.param_dtype = '
      'bfloat16, model.remat = full, shorter rows, or mesh.fsdp'
    )
  )
