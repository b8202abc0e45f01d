"""A run that does not fit is refused with settings that do."""

import jax
import jax.numpy as jnp
import pytest

from configs import base
from dmpo_jax import build, config, fits, model
from dmpo_jax.phases import texts

ALL = ('sample', 'score', 'update', 'evaluate')


def settings(**changes):
  c = base.get_config()
  fields = {
    'model.width': 16,
    'model.layers': 1,
    'model.mlp': 16,
    'train.prompts': 8,
    'train.group': 8,
    'train.microbatches': 1,
    'eval.batch': 8,
  }
  config.update(c, fields | changes)
  return c


class Program:
  """A program of known size: a power of two for each setting that makes it smaller."""

  def __init__(self, c, name):
    rows = {'none': 64, 'dots': 32, 'full': 16}[c.model.remat]
    cached = {'none': 4}.get(c.sampler.cache, 128)
    trained = rows * 1024 // c.train.microbatches
    self.size = {
      'sample': cached * 1024,
      'score': trained // 4,
      'update': trained,
      'evaluate': c.eval.batch * 512,
    }[name]

  def trace(self):
    return self


@pytest.fixture
def sized(monkeypatch):
  """Programs with sizes by formula: nothing is compiled. Returns the compiled names."""
  names = []

  def compiled(name, program, _):
    names.append(name)
    return fits.Use(name, program.size, 0, 0.0, None, None)

  listed = lambda built, *_: [(x, Program(built.config, x), ()) for x in ALL]
  monkeypatch.setattr(build, 'programs', listed)
  monkeypatch.setattr(fits, 'compiled', compiled)
  monkeypatch.setattr(fits, 'held', lambda built: fits.Held(600, 300, 100))
  return names


def memory_for(size):
  """The least memory in which programs of this size fit beside what is held."""
  return int((1000 + size) / (1 - fits.SPARE)) + 1


def refusal(c, memory):
  """What is said of a run on devices of this memory, and the fields that it names."""
  built, target = build.build(c), fits.Target(memory)
  said = fits.verdict(built, (20, 20), target, fits.uses(built, (20, 20), target))
  _, found, advice = said.partition('It fits with ')
  pairs = [text.removeprefix('--config.').split('=') for text in advice.split()]
  kind = lambda value: int(value) if value.isdigit() else value
  return said, {name: kind(value) for name, value in pairs} if found else None


@pytest.mark.parametrize(
  'config_says, size, named',
  [
    ({}, 2**14, {'train.microbatches': 4}),
    ({'train.microbatches': 2}, 2**14, {'train.microbatches': 4}),
    # One row of each of eight devices a microbatch is too much without remat.
    ({}, 2**13, {'train.microbatches': 8}),
    (
      {'sampler.cache': 'none'},
      2**13 - 1,
      {'model.remat': 'dots', 'train.microbatches': 8},
    ),
    (
      {'sampler.cache': 'dual', 'train.microbatches': 8},
      2**16,
      {'sampler.cache': 'none'},
    ),
    ({'eval.batch': 512}, 2**16, {'eval.batch': 128}),
    (
      {'eval.batch': 512, 'sampler.cache': 'dual'},
      2**15,
      {'train.microbatches': 2, 'sampler.cache': 'none', 'eval.batch': 64},
    ),
  ],
)
def test_settings_that_fit_are_named(config_says, size, named, sized):
  """They are the mildest ones, and what they name is not refused."""
  least = {'sampler.steps': 16} | config_says
  said, fields = refusal(settings(**least), memory_for(size))
  assert fields == named, said
  assert refusal(settings(**least | fields), memory_for(size))[0] == ''


def test_values_of_remat_are_known():
  assert {*fits.REMATS} == {*model.REMAT}


def test_what_cannot_fit_names_other_ways(sized, monkeypatch):
  said, fields = refusal(settings(), 900)
  assert fields is None and 'mesh.fsdp or mesh.expert' in said
  assert sized == [*ALL]  # nothing else was tried
  said, fields = refusal(settings(), memory_for(100))
  assert fields is None and 'train.prompts' in said and 'mesh.fsdp' in said
  assert refusal(settings(), 0)[0] == ''  # unknown
  assert refusal(settings(), 2**40)[0] == ''

  def held(built):  # 600 of 1,000 bytes are experts
    c, shape = built.config, built.mesh.shape
    stored = 0.5 if c.model.quantize == 'int8' else 1.0
    part = 600 / shape.get('expert', 1) + 360
    return fits.Held(part / shape['fsdp'] * stored, 0, 40)

  monkeypatch.setattr(fits, 'held', held)
  experts = {'model.preset': 'tiny_moe', 'model.layers': 2, 'lora.rank': 2}
  said, _ = refusal(settings(**experts), 640)
  assert 'mesh.expert=4 or --config.mesh.fsdp=2 or --config.model.quantize=int8' in said
  said, _ = refusal(settings(), 640)
  assert 'fits with --config.mesh.fsdp=2' in said
  assert 'mesh.expert' not in said and 'int8' not in said  # all parameters train


def test_check_asks_the_device(sized, monkeypatch, tmp_path, no_program_cache):
  """It refuses where the device says how much memory it has.

  Elsewhere it compiles only where a cache keeps the programs of the longest prompts.
  """
  built = build.build(settings(**{'data.bucket': 4}))
  fits.check(built)
  assert not sized  # a CPU does not say, and the programs would be lost
  jax.config.update('jax_compilation_cache_dir', str(tmp_path))
  fits.check(built)
  assert sized == [*ALL]
  jax.config.update('jax_compilation_cache_dir', None)
  monkeypatch.setattr(fits, 'limit', lambda _: 2**40)
  beats = []
  fits.check(built, lambda: beats.append(1))
  assert sized == [*ALL] * 2
  monkeypatch.setattr(fits, 'limit', lambda _: memory_for(2**14))
  with pytest.raises(ValueError, match='does not fit: .*--config.train.microbatches=4'):
    fits.check(built)
  sized.clear()
  idle = build.build(settings(**{'train.iterations': 0}))
  fits.check(idle)
  assert not sized


def test_programs_of_pmap_are_left_out(sized, monkeypatch):
  """They compile when they are called."""
  built = build.build(settings(**{'sampler.parallel': 'pmap'}))
  listed = [
    ('sample', built.steps.sample, ()),
    ('update', Program(built.config, 'update'), ()),
  ]
  monkeypatch.setattr(build, 'programs', lambda *_: listed)
  assert [x.name for x in fits.uses(built, (8, 8), fits.Target(0))] == ['update']


def test_the_checked_score_is_the_program_that_runs():
  """Else it is compiled again at its first call; weak types make it another one."""
  built = build.build(settings(**{'train.prompts': 4, 'train.group': 2}))
  steps, shapes = built.steps, build.abstract_buffer(built, 6)
  tokens, valid, row = (jnp.zeros(x.shape, x.dtype) for x in shapes.prompts)
  drawn = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.state.trainable)
  params = {
    **jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.frozen),
    **drawn,
  }
  sampled = steps.sample(params, tokens, ~valid, row)
  weak = lambda tree: [bool(x.weak_type) for x in jax.tree.leaves(tree)]
  assert weak(shapes.sampled) == weak(sampled)


def test_an_update_needs_less_in_more_microbatches():
  """Of a real program, as the compiler tells it."""

  def update(pieces):
    c = settings(**{'train.microbatches': pieces, 'sampler.length': 64})
    name, program, args = build.programs(build.build(c), 8, 8)[2]
    return fits.compiled(name, program.trace(*args), fits.Target(0))

  whole, cut = update(1), update(8)
  assert whole.name == 'update' and whole.program and cut.size < whole.size / 3


def test_first_value_that_fits():
  for least in range(6):
    asked = []
    enough = lambda x, least=least, asked=asked: asked.append(x) or x >= least
    assert fits.first(range(5), enough) == (least if least < 5 else None)
    assert len(asked) <= 4
  assert fits.first([], lambda _: True) is None


@pytest.mark.slow
def test_supervised_training_that_does_not_fit_names_microbatches(monkeypatch):
  """Of the real programs, compiled once each: the named number fits, the one before it
  does not; what cannot fit names other ways; a CPU is not asked."""
  c = settings(**{'sft.steps': 2, 'sft.batch': 32, 'sampler.length': 64})
  built = build.build(c)
  lesson = texts.lessons_of(built).largest()
  fits.check_phase(built, 'sft', lesson)  # a CPU does not say what it has
  changed, compiled, made, asked = fits.changed, fits.compiled, {}, []

  def noted(built, fields):
    asked.append(fields['sft.microbatches'])
    return changed(built, fields)

  def once(*job):
    return made.setdefault(asked[-1], made.get(asked[-1]) or compiled(*job))

  monkeypatch.setattr(fits, 'changed', noted)
  monkeypatch.setattr(fits, 'compiled', once)
  monkeypatch.setattr(fits, 'limit', lambda _: 1)
  with pytest.raises(ValueError, match='does not fit: .*No sft.microbatches.*sft.rank'):
    fits.check_phase(built, 'sft', lesson)
  assert asked == [1, 4]
  held = fits.per_device(build.sft_phase(built, lesson).held)
  assert made[1].size > made[4].size
  limit = int((held + made[4].size) / (1 - fits.SPARE)) + 1
  monkeypatch.setattr(fits, 'limit', lambda _: limit)
  with pytest.raises(ValueError, match='does not fit: .*--config.sft.microbatches=4$'):
    fits.check_phase(built, 'sft', lesson)
  assert asked[2:] == [1, 4, 2] and made[2].size > made[4].size


def test_training_on_pairs_that_does_not_fit_names_microbatches(monkeypatch):
  """The larger one of its two programs counts, in rows: two for each pair."""
  rows = {'score_pairs': 40, 'update_pairs': 64}

  class Sized:
    def __init__(self, size):
      self.size = size

    def trace(self):
      return self

  def phase(built, prompt):
    assert prompt == 20
    pieces = built.config.pairs.microbatches
    sizes = {name: 2**10 * count // pieces for name, count in rows.items()}
    listed = [(name, Sized(size), ()) for name, size in sizes.items()]
    held = jax.ShapeDtypeStruct((250,), 'float32')
    return build.Phase('pairs of 20 + 16 tokens', 2 * 32, held, listed)

  compiled = lambda name, program, _: fits.Use(name, program.size, 0, 0, None, None)
  monkeypatch.setitem(build.PHASES, 'pairs', phase)
  monkeypatch.setattr(fits, 'compiled', compiled)
  built = build.build(settings(**{'pairs.path': ('x',), 'pairs.batch': 32}))
  said = lambda size: fits.phase_verdict(
    built, 'pairs', 20, fits.Target(memory_for(size))
  )
  assert said(2**16) == ''
  assert '20 + 16 tokens' in said(2**14)
  assert said(2**14).endswith('It fits with --config.pairs.microbatches=4')
  # With eight rows on a device there are eight pieces at most.
  assert said(2**13).endswith('=8') and 'lora.rank > 0' in said(2**13 - 1)
  rows['score_pairs'] = 128
  assert said(2**14).endswith('=8')
