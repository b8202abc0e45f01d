"""Tests plans against closed forms and against the bytes that a run allocates."""

import dataclasses
import importlib.util
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, llada_countdown
from dmpo_jax import build, fits, mesh, model, resume
from dmpo_jax.phases import texts
from dmpo_jax.tools import chips, costs, plan

A, B = np.zeros((4, 6), np.float32), np.zeros((6, 8), np.float32)
ONE = 2 * 4 * 6 * 8  # FLOPs of A @ B


def flops(fn, *args, trips=(1,)):
  return costs.matmuls(jax.make_jaxpr(fn)(*args).jaxpr, trips, 1)[0]


def test_flops_of_loops_and_branches():
  """Loops count as often as they run; open loops count `trips` times."""

  def scan(a, b):
    return jax.lax.scan(lambda c, _: (c + (a @ b).sum(), None), 0.0, None, 5)

  def nested(a, b):
    return jax.lax.map(lambda _: scan(a, b)[0], jnp.arange(3))

  def open_loop(a, b):
    return jax.lax.while_loop(lambda c: c < 1, lambda c: c + (a @ b).sum(), 0.0)

  assert flops(jnp.matmul, A, B) == ONE
  assert flops(scan, A, B) == 5 * ONE
  assert flops(nested, A, B) == 15 * ONE

  def around(a, b):
    return jax.lax.while_loop(lambda c: c < 1, lambda c: c + open_loop(a, b), 0.0)

  def branch(a, b):
    twice = lambda a: (a @ b) @ b.T @ b
    return jax.lax.cond(a.sum() > 0, twice, lambda a: a @ b, a)

  def branches(a, b):
    step = lambda c: c + branch(a + c, b).sum()
    return jax.lax.while_loop(lambda c: c < 1, step, 0.0)

  assert flops(open_loop, A, B, trips=(7,)) == 7 * ONE
  assert flops(branch, A, B) == 3 * ONE  # of which nothing is known
  assert flops(branches, A, B, trips=(8, 0.25)) == (6 * 1 + 2 * 3) * ONE
  assert flops(around, A, B, trips=(2, 7)) == 14 * ONE
  assert flops(jax.jit(scan), A, B) == 5 * ONE


def test_recomputation_counts():
  """A gradient has three matmuls for each one, and remat adds a fourth."""
  loss = lambda a, b: jnp.sin(jnp.sin(a @ b) @ b.T).sum()
  plain = flops(jax.grad(loss, (0, 1)), A, B)
  assert plain == 6 * ONE
  assert flops(jax.grad(jax.checkpoint(loss), (0, 1)), A, B) > plain


def test_forward_is_the_textbook_formula(tiny, params):
  """A forward has 2 x weights x tokens, and 4 S S C for each head and layer."""
  rows, size = 3, 7
  tokens = jnp.zeros((rows, size), jnp.int32)
  got = flops(lambda p: model.full_logits(tiny, p, tokens), params)
  kernels = sum(
    x.size
    for path, x in jax.tree_util.tree_leaves_with_path(params)
    if path[-1].key in ('kernel', 'head')
  )
  attention = 4 * tiny.layers * rows * size * size * tiny.width
  assert got == 2 * rows * size * kernels + attention


HLO = """
%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %g = f32[64]{0} all-gather(%x), channel_id=1, dimensions={0}
}

%cond.1 (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(5)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%open.body (p: f32[2]) -> f32[2] {
  %y = bf16[2,3]{1,0} all-reduce(%p), channel_id=2, to_apply=%add
}

%open.cond (p: f32[2]) -> pred[] {
  ROOT %any = pred[] custom-call(%p)
}

%start (p: f32[16]) -> f32[16] {
  %s = f32[2]{0} reduce-scatter(%p), channel_id=3, dimensions={0}
}

%done (p: f32[16]) -> f32[16] {
  %p = f32[16]{0} parameter(0)
  %s2 = f32[2]{0} reduce-scatter(%p), channel_id=3, dimensions={0}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond.1, body=%body.1
  %v = f32[2] while(%u), condition=%open.cond, body=%open.body
  %k = f32[2] while(%u), condition=%open.cond, body=%open.body, backend_config={"known_trip_count":{"n":"3"}}
  %f = f32[16] fusion(%w), kind=kLoop, calls=%start
  %h = f32[16] fusion(%f), kind=kLoop, calls=%done
}
"""  # noqa: E501
BRANCHING = """
%branching (p: f32[2]) -> f32[2] {
  %c = f32[2]{0} conditional(%i, %p, %p), branch_computations={%open.body, %rare}
  %d = f32[2]{0} conditional(%i, %p, %p), true_computation=%rare, false_computation=%add
}

%rare (p: f32[2]) -> f32[2] {
  %z = f32[10]{0} all-to-all(%p), channel_id=9
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %b = f32[2] while(%u), condition=%open.cond, body=%branching
}
"""


# As XLA for TPU writes them: a loop of 32 laps that is unrolled twice and begins at 2,
# so that 15 are left, and a gather that this loop spans.
UNROLLED = """
%add.5 (p: s32[]) -> s32[] {
  %two = s32[] constant(2)
  ROOT %sum = s32[]{:T(128)} add(%p, %two)
}

%wide.body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %s = f32[8]{0} collective-permute(%x), channel_id=5, source_target_pairs={{0,1},{1,0}}
  %part = f32[64]{0} fusion(%x), kind=kLoop, calls=%spanning
  %next = s32[]{:T(128)} fusion(%i), kind=kLoop, calls=%add.5
  ROOT %out = (s32[]{:T(128)}, f32[8]{0}) tuple(%next, /*index=1*/%s)
}

%spanning (p: f32[8]) -> f32[64] {
  %g = f32[64]{0} all-gather(%p), channel_id=6, dimensions={0}
}

%wide.cond (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(32)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %begun = s32[]{:T(128)} constant(2)
  %t = (s32[]{:T(128)}, f32[8]{0}) tuple(%begun, %a)
  %w = (s32[]{:T(128)}, f32[8]{0}) while(%t), condition=%wide.cond, body=%wide.body
  %end = f32[64]{0} fusion(%a), kind=kLoop, calls=%finish
}

%finish (p: f32[8]) -> f32[64] {
  %g2 = f32[64]{0} all-gather(%p), channel_id=6, dimensions={0}
}
"""


# shard_map's collectives: one channel, at three places.
MANUAL = """
%layer (p: f32[8]) -> f32[8] {
  %g = f32[64]{0} all-gather(%p), channel_id=1, metadata={op_name="jit(f)/while/gather"}
  %h = f32[16]{0} all-gather(%q), channel_id=1, metadata={op_name="jit(f)/while/gather"}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = f32[8] while(%a), condition=%c, body=%layer, backend_config={"known_trip_count":{"n":"5"}}
  %k = f32[64]{0} all-gather(%a), channel_id=1, metadata={op_name="jit(f)/gather"}
}
"""  # noqa: E501


def test_collectives_of_a_text():
  """Trip counts are known, in the condition, or given; async pairs count once."""
  assert costs.collectives(MANUAL, trips=(1,)) == {
    'all-gather': (11, 5 * 4 * (64 + 16) + 4 * 64)
  }
  assert costs.collectives(HLO, trips=(9,)) == {
    'all-gather': (5, 5 * 64 * 4),
    'all-reduce': (9 + 3, 12 * 6 * 2),  # of the open loop, and of the known one
    'reduce-scatter': (1, 16 * 4),
  }
  assert costs.collectives(UNROLLED, trips=(9,)) == {
    'collective-permute': (15, 15 * 8 * 4),
    'all-gather': (1, 64 * 4),
  }
  plain = UNROLLED.replace('%two = s32[] constant(2)', '%one = s32[] constant(1)')
  plain = plain.replace('add(%p, %two)', 'add(%p, %one)')
  plain = plain.replace('%begun = s32[]{:T(128)} constant(2)', '')
  assert costs.collectives(plain, trips=(9,))['collective-permute'][0] == 32
  body = HLO[HLO.index('%open.body') : HLO.index('%start')]
  assert costs.collectives(body + BRANCHING, trips=(8, 0.25)) == {
    'all-reduce': (6, 6 * 6 * 2),
    'all-to-all': (2 + 2, 4 * 10 * 4),  # both conditions call it
  }


def test_collectives_of_a_program():
  """A psum in a scan of five, compiled for eight devices."""
  grid = mesh.make_mesh(fsdp=8)

  def fn(x):
    def step(c, _):
      return c + jax.lax.psum(jnp.sin(c), 'fsdp'), None

    return jax.lax.scan(step, x, None, length=5)[0]

  mapped = jax.shard_map(
    fn, mesh=grid, in_specs=jax.P(None), out_specs=jax.P(None), check_vma=False
  )
  text = jax.jit(mapped).lower(np.zeros(6, np.float32)).compile().as_text()
  assert costs.collectives(text, trips=(100,)) == {'all-reduce': (5, 5 * 6 * 4)}


def small(**changes):
  c = base.get_config()
  c.update_from_flattened_dict(
    {
      'model.width': 16,
      'model.layers': 2,
      'model.mlp': 32,
      'data.prompt_length': 20,
      'train.prompts': 8,
      'train.group': 4,
      'train.microbatches': 1,
      'mesh.fsdp': 4,
      'mesh.tensor': 2,
      'sampler.steps': 8,
      **changes,
    }
  )
  return c


def held(tree):
  """Returns bytes that the first device holds."""
  first = jax.devices()[0]
  return sum(
    s.data.nbytes
    for x in jax.tree.leaves(tree)
    for s in x.addressable_shards
    if s.device == first
  )


@pytest.mark.parametrize('rank', [0, 4])
def test_bytes_are_what_a_run_allocates(rank):
  """Parameters and optimizer have the bytes of a real run, within 1 %."""
  built = build.build(small(**{'lora.rank': rank}))
  frozen, state = build.abstract_states(built)
  base_params, lora = built.steps.init(), built.steps.init_lora()
  real = built.steps.start(lora or base_params)
  for planned, allocated in (
    (frozen, base_params),
    (state.trainable, real.trainable),
    (state.opt_state, real.opt_state),
  ):
    assert abs(fits.per_device(planned) / held(allocated) - 1) < 0.01


@pytest.mark.parametrize('rank', [0, 4])
def test_supervised_training_has_the_bytes_of_the_real_run(rank):
  c = small(**{'sft.steps': 2, 'sft.batch': 8, 'sft.rank': rank})
  built = build.build(c)
  lesson = texts.lessons_of(built).largest()
  state, frozen = build.sft_phase(built, lesson).held
  trainable, real_frozen = resume.sft_start(built)
  real = built.steps.start_sft(trainable)
  for planned, allocated in ((state, real), (frozen, real_frozen)):
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), planned)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), allocated)
    assert fits.per_device(planned) == held(allocated)


@pytest.mark.slow
def test_a_plan_of_the_phases_before_rl():
  c = small(**{'sft.steps': 2, 'sft.batch': 8, 'pairs.path': ('x',), 'pairs.batch': 4})
  built = build.build(c)
  (one, two), misfit = plan.of_phases(built, 20, None, fits.Target(0))
  tokens = c.sampler.length
  assert f'training on 8 rows of {20 + tokens} tokens, peak' in one and misfit == ''
  assert f'training on 4 pairs of 20 + {tokens} tokens, peak' in two
  _, misfit = plan.of_phases(built, 20, None, fits.Target(1000))
  assert 'supervised training on' in misfit and 'sft.microbatches' in misfit


def test_a_plan():
  """Totals add up and loops count as configured; a CPU has no data sheet."""
  c = small(**{'sampler.cache': 'dual'})
  made = plan.make(c)
  sample, score, update, evaluate = made.programs
  names = [p.name for p in made.programs]
  assert names == ['sample', 'score', 'update', 'evaluate']
  assert made.total == sum(made.held) + max(
    p.temporaries + p.output for p in made.programs
  )
  # The same network and lengths, but more rows, without a cache.
  assert evaluate.flops > sample.flops * c.eval.batch / made.rows
  assert made.cache == 2 * 2 * 8 * 36 * 16 * 4  # k and v, N, rows, S, D, f32
  assert made.before == []
  assert update.collectives and math.isnan(update.seconds)
  text = plan.show(made, c)
  assert '20 + 16 tokens' in text and 'at least' not in text and 'nan' not in text
  assert text.splitlines()[-1].startswith('unknown: the memory limit and the times')
  more = build.build(small(**{'sampler.cache': 'dual', 'sampler.steps': 16}))
  counts = [
    costs.matmuls(program.trace(*args).jaxpr.jaxpr, trips, 8, 2)[0]
    for _, program, args, trips in plan.jobs(more, 20)
  ]
  assert counts[0] > 1.5 * sample.flops
  assert counts[2] == update.flops


def test_tokens_of_a_block_model():
  """The sampler computes the prompt once, W tokens a step and W a block; the scores
  P + (W + 1) L tokens, of which a copy's see the text and their own block."""
  changes = {
    'model.attention_block': 4,
    'data.prompt_length': 22,  # two tokens of it stand on the canvas
    'sampler.block': 2,
    'eval.sampler.block': 4,
    'sampler.steps': 16,
    'sampler.cache': 'block',
    'sampler.pick': 'dynamic',
    'logprob.estimator': 'trajectory',
  }
  built = build.build(small(**changes))
  cfg, rows, prompt, length, block, steps = built.model, 32, 20, 16, 4, 16
  layer = 2 * 4 * 16 * 16 + 2 * 3 * 16 * 32
  linear = lambda tokens: cfg.layers * layer * tokens
  pairs = lambda queries, keys: cfg.layers * 4 * queries * keys * 16
  head = lambda tokens: 2 * tokens * 16 * cfg.vocab
  window = lambda count: linear(count) + pairs(count, prompt + length + count)
  sample = linear(prompt) + pairs(prompt, prompt)
  sample += steps * (window(block) + head(2))
  sample += length // block * (window(2 * block) - window(block))
  size, noisy = prompt + length, block * length
  score = linear(size + noisy) + pairs(size, size) + pairs(noisy, size + block)
  score += head(noisy)
  for job, want in zip(plan.jobs(built, 22), (sample, score), strict=False):
    traced = job[1].trace(*job[2])
    got, _ = costs.matmuls(traced.jaxpr.jaxpr, job[3], devices=1)
    assert got == rows * want, job[0]
  # k and v, layers, rows of 4 shards, tokens, width, float32
  assert plan.cache_bytes(built, 22) == 2 * 2 * 8 * size * 16 * 4


def test_roofline():
  """The slowest of arithmetic, memory and network bounds the time."""
  chip = chips.Chip(1e-6, 1e9, 1e9, 1e9)
  built = build.build(small())
  job = plan.jobs(built, 20)[2]
  _, p = plan.compiled(built, chip, fits.Target(0), job)
  sent = sum(
    size * (2 if kind == 'all-reduce' else 1)
    for kind, (_, size) in p.collectives.items()
  )
  assert p.seconds == max(p.flops, p.bytes, sent) / 1e9
  made = plan.make(small())._replace(memory=10, programs=[p] * 3, misfit='too large')
  text = plan.show(made, small())
  assert text.endswith('DOES NOT FIT: too large') and 'data sheet' not in text
  made = made._replace(memory=2**40, misfit='', seconds={'update': p.seconds})
  *_, times, last = plan.show(made, small()).splitlines()
  assert times.endswith(plan.duration(p.seconds))
  assert last == f'fits: {fits.size(made.total)} of 1024.00 GiB'
  made = made._replace(devices='8 NVIDIA H100 80GB HBM3')
  assert 'XLA_PYTHON_CLIENT_MEM_FRACTION' in plan.show(made, small())


@pytest.mark.slow
def test_plan_gathers_once_a_rollout_where_it_fits_and_is_faster():
  fields = {'mesh.fsdp': 8, 'mesh.tensor': 1, 'sampler.steps': 16, 'model.layers': 1}
  built = build.build(small(**fields))
  used = plan.Program('', 0, 0, 0.0, 0.0, {}, 0.0, 0.0)

  def said(before, memory):
    """With so many seconds of each program where weights are gathered each forward."""
    programs = [
      used._replace(name=name, seconds=before)
      for name in ('sample', 'score', 'update', 'evaluate')
    ]
    chip = chips.Chip(1.0, 1e15, 1e15, 1e6)
    return plan.gather_once(built, chip, fits.Target(memory), programs)

  assert said(1e6, 2**34).startswith('--config.mesh.gather=rollout fits')
  assert not said(1e6, sum(fits.held(built)) + 2**10)  # too small
  assert not said(0.0, 2**34)  # no faster


@pytest.mark.parametrize('every, validations', [(10, 4), (15, 3), (40, 2), (0, 1)])
def test_seconds_of_a_run(every, validations):
  """A run has its buffers, its validations from the first on, and two final tests."""
  c = small(
    **{
      'train.iterations': 30,
      'train.inner': 3,
      'eval.every': every,
      'eval.batch': 100,
      'data.validation_size': 201,
      'data.test_size': 0,
    }
  )
  got = plan.times(c, {'sample': 1, 'score': 2, 'update': 5, 'evaluate': 1000})
  assert got['rollout'] == 3 and got['update'] == 5 and got['validation'] == 3000
  assert got['run'] == 30 * (3 + 3 * 5) + validations * 3000 + 2 * 1000


def test_memory_of_a_device(monkeypatch):
  """The device is asked first, then the data sheet, of which JAX takes a part."""

  class Device:
    platform, device_kind, stats = 'gpu', 'NVIDIA H100 80GB', {'bytes_limit': 77}

    def memory_stats(self):
      return self.stats

  device, card = Device(), int(chips.CHIPS['NVIDIA H100'].memory * fits.GIB)
  memory = lambda *args: chips.target_of(device, *args).memory
  assert memory() == 77
  for name in fits.FRACTIONS:
    monkeypatch.delenv(name, raising=False)
  assert memory('h100') == int(fits.FRACTION * card)
  monkeypatch.setenv(fits.FRACTIONS[1], '.75')
  assert memory('h100') == pytest.approx(0.75 * card, abs=1)
  device.stats = None  # as of CPUs
  assert memory() == pytest.approx(0.75 * card, abs=1)
  device.device_kind = 'cpu'
  assert memory() == 0 and chips.chip_of(device) is None
  device.platform, device.device_kind = 'tpu', 'TPU v5 lite'
  device.memory_stats = None  # one that is not here cannot be asked
  target = chips.target_of(device, 'v5e:4x4')
  assert target.memory == int(15.75 * fits.GIB)
  assert target.platforms == ('tpu',) and not target.options


def test_options_of_the_user_stay(monkeypatch):
  """Options of a GPU that is not here are set, but those of XLA_FLAGS."""

  class Device:
    platform, device_kind = 'gpu', 'NVIDIA H100 80GB'

  monkeypatch.delenv('XLA_FLAGS', raising=False)
  assert chips.target_of(Device(), 'h100').options == chips.OPTIONS
  monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_autotune_level=2')
  left = chips.target_of(Device(), 'h100').options
  assert {*chips.OPTIONS} - {*left} == {'xla_gpu_autotune_level'}


def test_plans_that_are_refused(monkeypatch):
  """A missing topology, plugin or prompt length, and pmap are refused."""
  from jax.experimental import topologies

  def fail(*_, **__):
    raise RuntimeError('Invalid TPU external name: TPU v9\nmore')

  monkeypatch.setattr(topologies, 'get_topology_desc', fail)
  monkeypatch.setattr(chips.importlib.util, 'find_spec', lambda _: True)
  with pytest.raises(ValueError, match='--topology=v9:2x2: Invalid .* v9; .*v5e:4x4'):
    chips.devices_of('v9:2x2')
  with pytest.raises(ValueError, match='--topology=h100: Invalid'):
    chips.devices_of('h100')
  for wrong in ('h1000', 'h100x0', 'v100'):
    with pytest.raises(ValueError, match=f'{wrong}: no such GPUs; .*h100.*l40s'):
      chips.devices_of(wrong)
  monkeypatch.setattr(chips.importlib.util, 'find_spec', lambda _: None)
  with pytest.raises(ValueError, match='--topology=v5e:4x4 .*pip install libtpu'):
    chips.devices_of('v5e:4x4')
  with pytest.raises(ValueError, match='--topology=h100x8 .*pip install .*cuda'):
    chips.devices_of('h100x8')
  assert chips.devices_of('') is None
  with pytest.raises(ValueError, match='sampler.parallel = pmap .*set jit'):
    plan.make(small(**{'sampler.parallel': 'pmap', 'mesh.fsdp': 1, 'mesh.tensor': 1}))
  c = llada_countdown.get_config()
  c.data.prompt_length = 0
  c.train.prompts = 8
  with pytest.raises(ValueError, match='data.prompt_length = 0.*set it'):
    plan.prompt_length(build.build(c))


def test_the_real_size_from_shapes_alone():
  """LLaDA-8B has 8.02 billion parameters; none is allocated."""
  c = llada_countdown.get_config()
  c.mesh.fsdp = 8
  frozen, state = build.abstract_states(build.build(c))
  assert fits.per_device(frozen) * 8 == pytest.approx(8_015_581_184 * 2, rel=1e-3)
  adapters = 32 * (3 * (4096 + 4096) + 4096 + 12288) * 128 * 4
  held = sum(x.size * 4 for x in jax.tree.leaves(state.trainable))
  assert held == pytest.approx(adapters, rel=1e-6)
  assert held / 8 < fits.per_device(state.trainable) < held
  int8 = build.quantized_shapes({'params': frozen['params']}, 'int8')
  assert dataclasses.is_dataclass(int8['params']['layers']['q']['kernel'])


def test_program_that_is_too_large_to_compile():
  """The plan has the number of the compiler that refuses a program."""

  class Stub:
    jaxpr = jax.make_jaxpr(lambda: 0)()

    def trace(self):
      return self

    def lower(self, **_):
      return self

    def compile(self, _):
      raise jax.errors.JaxRuntimeError(self.message)

  built, chip = build.build(small()), chips.CHIPS['TPU v5 lite']
  stub, target = Stub(), fits.Target(16 * fits.GIB)
  job = ('update', stub, (), (1,))
  for stub.message, needs in (
    (
      'RESOURCE_EXHAUSTED: the total memory required for HLO '
      'temporaries (16.30G) exceeds available HBM (15.75G)',
      16.3,
    ),
    (
      'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 63.80G of '
      '30.75G hbm. Exceeded hbm capacity by 33.05G.',
      63.8,
    ),
    ('RESOURCE_EXHAUSTED', 16),
  ):
    use, made = plan.compiled(built, chip, target, job)
    assert use.size == made.temporaries == int(needs * fits.GIB)
    assert made.collectives is None
  stub.message = 'INTERNAL'
  with pytest.raises(jax.errors.JaxRuntimeError):
    plan.compiled(built, chip, target, job)


# --- real sizes, compiled ahead for devices that are not here

PLUGINS = {'h100': ('jax_cuda13_plugin', 'jax_cuda12_plugin'), 'v5e:4x4': ('libtpu',)}
PROGRAM = """
import sys
from dmpo_jax import build, config, fits
from dmpo_jax.tools import chips, plan

file, topology = sys.argv[1:]
_, c = config.load(file)
built = build.build(c, chips.devices_of(topology))
device = built.mesh.devices.flat[0]
chip, target = chips.chip_of(device), chips.target_of(device, topology)
for job in plan.jobs(built, 256):
  if job[0] in ('sample', 'update'):
    use, program = plan.compiled(built, chip, target, job)
    need = sum(fits.held(built)) + use.size
    print(job[0], need, target.memory, program.seconds, program.collectives)
"""


def ahead(topology, *args):
  """Runs Python with JAX on the CPU; skips without the plugin of a topology."""
  if not any(map(importlib.util.find_spec, PLUGINS[topology])):
    pytest.skip(f'no plugin compiles for {topology}')
  done = subprocess.run(
    [sys.executable, *args],
    cwd=pathlib.Path(__file__).parents[1],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'},
    capture_output=True,
    text=True,
  )
  assert not done.returncode, done.stderr[-2000:]
  return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize('name, topology', [('h100', 'h100'), ('v5e16', 'v5e:4x4')])
def test_programs_of_8b_compile_and_fit(name, topology):
  """The sampler and the update of LLaDA-8B fit with the settings of their slice."""
  file = f'configs/llada_countdown.py:{name}'
  lines = ahead(topology, '-c', PROGRAM, file, topology)
  assert [line.split()[0] for line in lines] == ['sample', 'update']
  for line in lines:
    need, memory, seconds = map(float, line.split()[1:4])
    assert 8 * fits.GIB < need < (1 - fits.SPARE) * memory
    assert 0.1 < seconds < 60
  if topology == 'h100':
    assert all(line.endswith('{}') for line in lines)  # one card sends nothing


@pytest.mark.slow
def test_plan_of_one_h100_has_a_verdict():
  """The release's settings do not fit; the verdict names microbatches that do."""
  args = ('--mode=plan', '--topology=h100', '--config=configs/llada_countdown.py')
  *_, last = ahead('h100', 'main.py', *args)
  assert last.startswith('DOES NOT FIT: ') and 'update 1' in last
  assert '--config.train.microbatches=' in last


@pytest.mark.slow
@pytest.mark.parametrize('card', chips.CARDS)
def test_card_is_described_well(card):
  """The plugin takes each description, and names the card as its data sheet does."""
  code = """
import sys, jax
from dmpo_jax.tools import chips
device, _ = chips.devices_of(sys.argv[1])
options = chips.target_of(device, sys.argv[1]).options
where = jax.sharding.SingleDeviceSharding(device)
x = jax.ShapeDtypeStruct((8192, 65536), 'float32', sharding=where)
sort = jax.jit(jax.numpy.sort).trace(x).lower(lowering_platforms=('cuda',))
size = sort.compile(options).memory_analysis().output_size_in_bytes
print(chips.chip_of(device).flops, size)
"""
  flops, size = ahead('h100', '-c', code, f'{card}x2')[-1].split()
  assert float(flops) > 1e14 and int(size) == 8192 * 65536 * 4


@pytest.mark.slow
def test_meshes_of_any_shape_on_any_slice():
  """Every (data, fsdp, tensor) of powers of two is a mesh of all devices."""
  code = """
from dmpo_jax import mesh
from dmpo_jax.tools import chips
for name in ('v5e:4x4', 'v6e:8x8', 'v5p:2x4x4', 'v5p:4x4x4', 'v5p:4x4x8'):
  devices = chips.devices_of(name)
  powers = [2**i for i in range(8) if 2**i <= len(devices)]
  for fsdp in powers:
    for tensor in powers:
      if fsdp * tensor <= len(devices):
        grid = mesh.make_mesh(0, fsdp, tensor, devices)
        assert {*grid.devices.flat} == {*devices} and grid.devices.size == len(devices)
        assert grid.axis_types == (mesh.AxisType.Auto,) * 3
  print(name)
"""
  assert len(ahead('v5e:4x4', '-c', code)) == 5
