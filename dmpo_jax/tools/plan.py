"""Plans a run before anything is loaded: whether it fits, and how long it takes.

Compiles the samplers, the log-prob pass and the update from shapes alone, for the
devices here or for those of a topology (chips.py). Memory and collectives are read from
the compiled programs. FLOPs and bytes are those of the matmuls in the traced programs.
"""

import glob
import math
import os
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dmpo_jax import build, config, fits, mesh, parts
from dmpo_jax.fits import GIB, size
from dmpo_jax.sampler import SAMPLERS, at_once
from dmpo_jax.tools import chips
from dmpo_jax.tools.chips import Chip
from dmpo_jax.tools.costs import collectives, matmuls, trips_of
from dmpo_jax.types import Lesson


class Program(NamedTuple):
  """One compiled program of a run; bytes and FLOPs are those of a device."""

  name: str
  temporaries: int  # bytes beside arguments and donated results
  output: int  # bytes that are not donated arguments
  flops: float
  bytes: float  # that its matmuls read and write
  collectives: dict | None  # kind -> (count, bytes); None if it does not compile
  compile_seconds: float
  seconds: float  # at the roofline; nan without a data sheet


class Plan(NamedTuple):
  """Memory and time of a run."""

  devices: str
  mesh: dict
  rows: int
  prompt: int  # P in tokens
  held: fits.Held
  cache: int  # K/V bytes while it samples
  programs: list
  total: int  # bytes at the peak
  memory: int  # bytes of the chip that JAX may take; 0 = unknown
  misfit: str  # why it does not fit, and with which settings it would; '' = it fits
  before: list[str]  # a line about each phase before RL
  faster: str  # a setting that fits too and makes rollouts faster; '' = none known
  seconds: dict  # of rollout, update, validation and run; nan = unknown


def run(c: Any, topology: str = '') -> str:
  """Returns the plan of a config as text."""
  return show(make(c, topology), c)


def make(c: Any, topology: str = '') -> Plan:
  """Returns the Plan of a config; loads no weights."""
  for field, section in (('', c.sampler), ('eval.', c.eval.sampler)):
    if section.parallel == 'pmap':
      raise ValueError(f'{field}sampler.parallel = pmap cannot be planned: set jit')
  devices = chips.devices_of(topology)
  built = build.build(c, devices)
  device = built.mesh.devices.flat[0]
  chip, target = chips.chip_of(device), chips.target_of(device, topology)
  prompt = prompt_length(built)
  uses, programs = [], []
  for job in jobs(built, prompt):
    use, program = compiled(built, chip, target, job)
    uses.append(use)
    programs.append(program)
  held = fits.held(built)
  misfit = fits.verdict(built, (prompt, prompt), target, uses)
  before, too_large = of_phases(built, prompt, chip, target)
  misfit = misfit or too_large
  return Plan(
    devices=f'{built.mesh.devices.size} {device.device_kind}',
    mesh=dict(built.mesh.shape),
    rows=c.train.prompts * c.train.group,
    prompt=prompt,
    held=held,
    cache=cache_bytes(built, prompt),
    programs=programs,
    total=sum(held) + max(use.size for use in uses),
    memory=target.memory,
    misfit=misfit,
    before=before,
    faster='' if misfit else gather_once(built, chip, target, programs),
    seconds=times(c, {program.name: program.seconds for program in programs}),
  )


def gather_once(
  built: build.Built, chip: Chip | None, target: fits.Target, programs: list
) -> str:
  """Returns a sentence if whole weights fit during a rollout, and make it faster."""
  c, prompt = built.config, prompt_length(built)
  if not chip or not target.memory or c.mesh.fsdp == 1 or c.mesh.gather == 'rollout':
    return ''
  once = {'mesh.gather': 'rollout'}
  other, before = fits.changed(built, once), {p.name: p.seconds for p in programs}
  after, left = dict(before), fits.room(built, target)
  for job in jobs(other, prompt):
    if job[0] != 'update':
      use, program = compiled(other, chip, target, job)
      if use.size > left:
        return ''
      after[program.name] = program.seconds
  slow, fast = (times(c, x)['rollout'] for x in (before, after))
  if fast >= 0.95 * slow:
    return ''
  return (
    f'{fits.settings(once)} fits, too: a rollout then takes at least '
    f'{duration(fast)}, not {duration(slow)}'
  )


def times(c: Any, seconds: dict[str, float]) -> dict[str, float]:
  """Returns the seconds of a rollout, an update, a validation and all of the run.

  seconds: of each program. The final test samples its problems from the base model and
  from the trained one. A size of 0 (all of a file) counts as one batch.
  """
  t, e = c.train, c.eval
  batches = lambda count: -(-count // e.batch) or 1
  rollout = seconds['sample'] + seconds['score']
  validation = batches(c.data.validation_size) * seconds['evaluate']
  test = 2 * batches(c.data.test_size) * seconds['evaluate']
  validated = {it for it in range(t.iterations) if e.every and it % e.every == 0}
  count = len(validated | {t.iterations})
  training = t.iterations * (rollout + t.inner * seconds['update'])
  return {
    'rollout': rollout,
    'update': seconds['update'],
    'validation': validation,
    'run': training + count * validation + test,
  }


def prompt_length(built: build.Built) -> int:
  """Returns P: data.prompt_length, else the longest prompt of any split."""
  if built.config.data.prompt_length:
    return built.config.data.prompt_length
  if built.tokenizer is None:
    raise ValueError(
      'data.prompt_length = 0: without a checkpoint the length of the prompts is '
      'unknown, set it to plan'
    )
  return max(fits.prompts_of(built))


def cache_bytes(built: build.Built, prompt: int) -> int:
  """Returns bytes of a device's K/V cache while it samples; 0 without a cache."""
  c, cfg = built.config, built.model
  if c.sampler.cache == 'none':
    return 0
  shards = mesh.row_shards(built.mesh)
  rows = at_once(c.sampler, c.train.prompts * c.train.group) // shards
  rows *= 2 if c.sampler.guidance else 1
  dim = cfg.head_dim or cfg.width // cfg.heads
  width = cfg.kv_heads * dim * jnp.dtype(cfg.dtype).itemsize
  tokens = prompt + c.sampler.length
  if cfg.block_causal:  # the rest of the prompt stands on the canvas
    tokens -= prompt % cfg.block_causal
  return 2 * cfg.layers * rows * tokens * width


def jobs(built: build.Built, prompt: int) -> list[tuple]:
  """Returns build.programs, each with the trips of its open loops.

  Rules that plan no steps take one a token. Of the cache `block` the block before a
  step's own counts once a block. Rows whose prompts end elsewhere in their blocks
  compute it more often.
  """
  c = built.config
  steps_of = lambda hp: hp.steps if SAMPLERS[hp.pick].scheduled else hp.length
  rows = {'sample': c.train.prompts * c.train.group, 'evaluate': c.eval.batch}
  trips = {
    name: trips_of(hp, built.model.block_causal, rows[name], steps_of(hp))
    for name, hp in (('sample', c.sampler), ('evaluate', c.eval.sampler))
  }
  # A trajectory has as many states as steps.
  trips |= {'score': (steps_of(c.sampler),), 'update': (1,)}
  return [(*job, trips[job[0]]) for job in build.programs(built, prompt, prompt)]


def compiled(
  built: build.Built, chip: Chip | None, target: fits.Target, job: tuple
) -> tuple[fits.Use, Program]:
  """Traces, counts and compiles one of `jobs`."""
  name, program, args, trips = job
  return counted(built, chip, target, (name, program.trace(*args), trips))


def counted(
  built: build.Built, chip: Chip | None, target: fits.Target, job: tuple
) -> tuple[fits.Use, Program]:
  """Counts and compiles a traced program; job: its name, itself, its loops' trips."""
  (name, traced, trips), grid = job, built.mesh
  flops, moved = matmuls(
    traced.jaxpr.jaxpr, trips, grid.devices.size, grid.shape['tensor']
  )
  use = fits.compiled(name, traced, target)
  traffic, received = None, 0
  if use.program:
    traffic = collectives(hlo_text(use.lowered, use.program), trips)
    received = sum(
      count * (2 if kind == 'all-reduce' else 1) for kind, (_, count) in traffic.items()
    )
  seconds = math.nan
  if chip:
    seconds = max(flops / chip.flops, moved / chip.bandwidth, received / chip.network)
  return use, Program(
    name, use.temporaries, use.output, flops, moved, traffic, use.seconds, seconds
  )


def phases(built: build.Built, prompt: int) -> dict[str, Any]:
  """Returns the rows of each phase before RL, as build.PHASES takes them."""
  c, by_row, found = built.config, mesh.rows(built.mesh), {}
  if config.part(c, 'sft').trains:
    learned = parts.text_length(c, built.model)
    columns = learned + (0 if c.sft.path or c.sft.length else prompt)
    shape = lambda kind, *dims: jax.ShapeDtypeStruct(
      (c.sft.batch, *dims), kind, sharding=by_row
    )
    numbers, flags = np.int32, np.bool_
    found['sft'] = Lesson(
      shape(numbers, columns), shape(flags, columns), shape(flags, 1, learned),
      shape(numbers),
    )  # fmt: skip
  if config.part(c, 'pairs').trains:
    found['pairs'] = prompt
  return found


def of_phases(
  built: build.Built, prompt: int, chip: Chip | None, target: fits.Target
) -> tuple[list[str], str]:
  """Returns a line about an update of each phase before RL, and why one does not fit.

  Pairs are taken to have prompts as long as the run's.
  """
  lines, misfit = [], ''
  for name, rows in phases(built, prompt).items():
    phase = build.PHASES[name](built, rows)
    jobs = [(job, program.trace(*args), (1,)) for job, program, args in phase.programs]
    counts = [counted(built, chip, target, job) for job in jobs]
    total = fits.per_device(phase.held) + max(use.size for use, _ in counts)
    line = f'{phase.what}, peak {size(total)}'
    seconds = sum(program.seconds for _, program in counts)
    if not math.isnan(seconds):
      line += f', an update at least {duration(seconds)}'
    lines.append(line)
    if target.memory and total > (1 - fits.SPARE) * target.memory:
      misfit = misfit or fits.phase_verdict(built, name, rows, target)
  return lines, misfit


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
    *(f'  {name:16}{size(count)}' for name, count in plan.held._asdict().items()),
    '  temporaries     '
    + ', '.join(f'{p.name} {size(p.temporaries)}' for p in programs)
    + (f' (K/V cache {size(plan.cache)})' if plan.cache else ''),
    f'  peak            {size(plan.total)}',
    '',
    'program      TFLOP  GiB moved  ' + ' at least  ' * timed + 'compile  collectives',
  ]
  for p in programs:
    lines.append(
      f'{p.name:8}{p.flops / 1e12:10.2f}{p.bytes / GIB:11.2f}'
      + (f'{duration(p.seconds):>11}' if timed else '')
      + f'{p.compile_seconds:7.0f} s  {sent(p)}'
    )
  lines += ['', *plan.before]
  if timed:
    spans = (f'{name} at least {duration(s)}' for name, s in plan.seconds.items())
    lines.append(', '.join(spans))
  if not timed or not plan.memory:
    unknown = ['the memory limit'] * (not plan.memory) + ['the times'] * (not timed)
    lines.append(
      f'unknown: {" and ".join(unknown)}, as dmpo_jax/tools/chips.py has no data sheet '
      'of this device; --topology=v5e:4x4 plans for a TPU slice, --topology=h100 for a '
      'GPU'
    )
  return '\n'.join(lines + verdict(plan))


def verdict(plan: Plan) -> list[str]:
  """Returns the plan's last lines; none if the memory is unknown."""
  if not plan.memory:
    return []
  if plan.misfit:
    return [f'DOES NOT FIT: {plan.misfit}']
  share = ''
  if ' NVIDIA ' in plan.devices:
    share = f', the share of the card that JAX takes ({fits.FRACTIONS[1]})'
  fits_ = f'fits: {size(plan.total)} of {size(plan.memory)}{share}'
  return [fits_, f'faster: {plan.faster}'] if plan.faster else [fits_]


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
