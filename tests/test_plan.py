"""Tests plans against closed forms and against the bytes that a run allocates."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, llada_countdown
from dmpo_jax import build, mesh, model
from dmpo_jax.tools import costs, plan

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


def test_collectives_of_a_text():
  """Trip counts are known, in the condition, or given; async pairs count once."""
  assert costs.collectives(HLO, trips=(9,)) == {
    'all-gather': (5, 5 * 64 * 4),
    'all-reduce': (9, 9 * 6 * 2),
    'reduce-scatter': (1, 16 * 4),
  }
  body = HLO[HLO.index('%open.body') : HLO.index('%start')]
  assert costs.collectives(body + BRANCHING, trips=(8, 0.25)) == {
    'all-reduce': (6, 6 * 6 * 2),
    'all-to-all': (2, 2 * 10 * 4),
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
    assert abs(plan.per_device(planned) / held(allocated) - 1) < 0.01


def test_a_plan():
  """Totals add up and loops count as configured; a CPU has no data sheet."""
  c = small(**{'sampler.cache': 'dual'})
  made = plan.make(c)
  sample, score, update = made.programs
  assert [p.name for p in made.programs] == ['sample', 'score', 'update']
  assert made.total >= (
    made.parameters
    + made.reference
    + made.optimizer
    + max(p.temporaries for p in made.programs)
  )
  assert made.cache == 2 * 2 * 8 * 36 * 16 * 4  # k and v, N, rows, S, D, f32
  assert update.collectives and math.isnan(update.seconds)
  text = plan.show(made, c)
  assert '20 + 16 tokens' in text and 'at least' not in text and 'nan' not in text
  assert text.splitlines()[-1].startswith('unknown: the memory limit and the times')
  more = plan.make(small(**{'sampler.cache': 'dual', 'sampler.steps': 16}))
  assert more.programs[0].flops > 1.5 * sample.flops
  assert more.programs[2].flops == update.flops


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
  chip = plan.Chip(1e-6, 1e9, 1e9, 1e9)
  built = build.build(small())
  job = plan.jobs(built, 20)[2]
  p = plan.compiled(built, chip, job)
  sent = sum(
    size * (2 if kind == 'all-reduce' else 1)
    for kind, (_, size) in p.collectives.items()
  )
  assert p.seconds == max(p.flops, p.bytes, sent) / 1e9
  made = plan.make(small())._replace(memory=10, programs=[p] * 3)
  text = plan.show(made, small())
  assert 'DOES NOT FIT' in text and 'data sheet' not in text
  made = made._replace(memory=2**40, seconds={'update': p.seconds})
  text = plan.show(made, small())
  assert 'fits in' in text and text.endswith(plan.duration(p.seconds))


def test_memory_of_a_device(monkeypatch):
  """The device is asked first, then the data sheet, of which JAX leaves a part."""

  class Device:
    platform, stats = 'gpu', {'bytes_limit': 77}

    def memory_stats(self):
      return self.stats

  chip, device = plan.CHIPS['NVIDIA H100'], Device()
  assert plan.memory_of(device, chip) == plan.memory_of(device, None) == 77
  device.stats = None  # as of CPUs
  assert plan.memory_of(device, None) == 0
  for name in ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'):
    monkeypatch.delenv(name, raising=False)
  assert plan.memory_of(device, chip) == 60 * plan.GIB
  monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', '.9')
  assert plan.memory_of(device, chip) == 72 * plan.GIB
  device.platform = 'tpu'
  device.memory_stats = None  # one that is not here cannot be asked
  assert plan.memory_of(device, chip, 'v5e:4x4') == 80 * plan.GIB


def test_plans_that_are_refused(monkeypatch):
  """A missing topology, libtpu or prompt length, and pmap are refused."""
  from jax.experimental import topologies

  def fail(*_):
    raise RuntimeError('Invalid TPU external name: TPU v9\nmore')

  monkeypatch.setattr(topologies, 'get_topology_desc', fail)
  monkeypatch.setattr(plan.importlib.util, 'find_spec', lambda _: True)
  with pytest.raises(ValueError, match='--topology=v9:2x2: Invalid .* v9; .*v5e:4x4'):
    plan.topology_devices('v9:2x2')
  monkeypatch.setattr(plan.importlib.util, 'find_spec', lambda _: None)
  with pytest.raises(ValueError, match='--topology=v5e:4x4 .*pip install libtpu'):
    plan.topology_devices('v5e:4x4')
  assert plan.topology_devices('') is None
  with pytest.raises(ValueError, match='sampler.parallel = pmap .*set jit'):
    plan.make(small(**{'sampler.parallel': 'pmap', 'mesh.fsdp': 1, 'mesh.tensor': 1}))
  c = llada_countdown.get_config()
  c.data.prompt_length = 0
  c.train.prompts = 8
  with pytest.raises(ValueError, match='data.prompt_length = 0.*set it'):
    plan.prompt_length(build.build(c))


def test_longest_prompts_with_pmap(monkeypatch, tmp_path, no_program_cache):
  """pmap programs are left out; the others are compiled ahead."""

  class Stub:
    calls = 0

    def trace(self):
      return self

    lower = trace

    def compile(self):
      self.calls += 1

  built, stub = (
    build.build(
      small(**{'sampler.parallel': 'pmap', 'mesh.fsdp': 1, 'mesh.tensor': 1})
    ),
    Stub(),
  )
  monkeypatch.setattr(
    build,
    'programs',
    lambda *_: [('sample', built.steps.sample, ()), ('update', stub, ())],
  )
  build.compile_longest(built, 20)
  assert not stub.calls  # without a cache the program would be lost
  jax.config.update('jax_compilation_cache_dir', str(tmp_path))
  build.compile_longest(built, 20)
  assert stub.calls == 1


def test_the_real_size_from_shapes_alone():
  """LLaDA-8B has 8.02 billion parameters; none is allocated."""
  c = llada_countdown.get_config()
  c.mesh.fsdp = 8
  frozen, state = build.abstract_states(build.build(c))
  assert plan.per_device(frozen) * 8 == pytest.approx(8_015_581_184 * 2, rel=1e-3)
  adapters = 32 * (3 * (4096 + 4096) + 4096 + 12288) * 128 * 4
  held = sum(x.size * 4 for x in jax.tree.leaves(state.trainable))
  assert held == pytest.approx(adapters, rel=1e-6)
  assert held / 8 < plan.per_device(state.trainable) < held
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

    def compile(self):
      raise jax.errors.JaxRuntimeError(self.message)

  built, chip = build.build(small()), plan.CHIPS['TPU v5 lite']
  stub = Stub()
  job = ('update', stub, (), (1,))
  stub.message = (
    'RESOURCE_EXHAUSTED: the total memory required for HLO '
    'temporaries (16.30G) exceeds available HBM (15.75G)'
  )
  made = plan.compiled(built, chip, job)
  assert made.temporaries == int(16.3 * plan.GIB) and made.collectives is None
  stub.message = 'RESOURCE_EXHAUSTED'
  made = plan.compiled(built, chip, job)
  assert made.temporaries == 16 * plan.GIB
  stub.message = 'INTERNAL'
  with pytest.raises(jax.errors.JaxRuntimeError):
    plan.compiled(built, chip, job)
