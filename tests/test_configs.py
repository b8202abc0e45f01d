"""Every config file can run, and every field of the base config does something.

Programs are compared as traced, not as run: a field that changes what is
compiled changes the text of a jaxpr, which takes no compilation to see.
"""

import contextlib
import functools
import importlib
import json
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from configs import base
from dmpo_jax import (
  build,
  check,
  checkpoint,
  data,
  evaluate,
  logprob,
  mesh,
  metrics,
  model,
  step,
  train,
)
from dmpo_jax import cli as main
from dmpo_jax.types import Rollouts, TrainBatch, TrainState

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(
  p for p in (ROOT / 'configs').glob('*.py') if p.stem not in ('__init__', 'base')
)
PROMPT = 6  # tokens of the prompts in traced programs


def tiny(**changes):
  """base with a model and data so small that tracing is all that costs.

  What the tables below change is set here where base might come to agree.
  """
  c = base.get_config()
  sampler = dict(
    length=16,
    block=16,
    steps=16,
    pick='confidence',
    rank='max',
    cache='none',
    parallel='jit',
    guidance=0.0,
  )
  c.sampler.update(sampler)
  c.eval.sampler.update(sampler)
  c.update_from_flattened_dict(
    {
      'model.preset': 'tiny',
      'model.width': 16,
      'model.layers': 1,
      'model.heads': 2,
      'model.kv_heads': 2,
      'model.mlp': 16,
      'model.dtype': 'float32',
      'model.param_dtype': 'float32',
      'lora.rank': 0,
      'lora.targets': 'all',
      'data.task': 'sudoku',
      'data.style': 'bare',
      'data.protocol': 'strict',
      'data.train_size': 12,
      'data.validation_size': 9,
      'data.test_size': 8,
      'sft.steps': 4,
      'sft.batch': 8,
      'objective.baseline': 'individual',
      'objective.loss': 'wdce',
      'objective.alpha': 0.04,
      'objective.ess': 0.0,
      'objective.antithetic': True,
      'objective.draws': 4,
      'objective.loss_tail': True,
      'objective.common_masks': False,
      'objective.spread': False,
      'logprob.estimator': 'elbo',
      'logprob.elbo': 'paper',
      'logprob.antithetic': True,
      'logprob.tail': True,
      'logprob.draws': 4,
      'train.iterations': 3,
      'train.prompts': 2,
      'train.group': 4,
      'train.inner': 2,
      'train.microbatches': 1,
      'eval.every': 2,
      'eval.batch': 8,
      'checkpoint.every': 2,
      'checkpoint.keep': 2,
    }
  )
  c.update_from_flattened_dict(changes)
  return c


def other(current, value):
  """`value`, or a number twice as large where the config has it already."""
  if current == value and isinstance(value, int | float):
    value *= 2
  assert current != value
  return value


def load(path):
  sys.path[:0] = [str(ROOT)]
  try:
    return importlib.import_module(f'configs.{path.stem}')
  finally:
    del sys.path[0]


# --- the files


@pytest.mark.smoke
@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_config_files_can_run(path):
  """Each file, and each point of its sweeps, names known fields and runs."""
  module = load(path)
  points = [{}]
  if hasattr(module, 'sweep'):
    assert module.SWEEPS, 'a sweep needs its name in SWEEPS'
    points += [p for name in module.SWEEPS for p in module.sweep(name)]
  known = check.flatten(base.get_config())
  for point in points:
    c = module.get_config().lock()
    assert set(point) <= known.keys()
    c.update_from_flattened_dict(point)
    assert check.flatten(c).keys() == known.keys()
    assert all(type(v) is type(known[k]) for k, v in check.flatten(c).items())
    if jax.device_count() in fits(c):
      check.config(c, jax.device_count())


@pytest.mark.parametrize(
  'name, wrong, said',
  [
    ('llada_math', 'papr', "'papr' after the colon must be ours or paper"),
    ('compare', 'chess', "'chess' after the colon must be sudoku or countdown"),
    ('rivals', 'esp', "did you mean 'espo'"),
  ],
)
def test_what_follows_the_colon(name, wrong, said, monkeypatch):
  argv = ['main.py', f'--config={ROOT}/configs/{name}.py:{wrong}']
  monkeypatch.setattr(sys, 'argv', argv)
  saved = flagsaver.save_flag_values()
  try:
    with pytest.raises(SystemExit, match=said) as info:
      main.parse(argv)
    assert len(str(info.value).splitlines()) == 1
  finally:
    flagsaver.restore_flag_values(saved)
    flags.FLAGS.unparse_flags()


@pytest.mark.parametrize(
  'path',
  sorted(p for p in FILES if p.stem.startswith(('llada', 'dream'))),
  ids=lambda p: p.stem,
)
def test_paper_is_the_release(path):
  """Our settings differ from it in the objective's alone."""
  ours, paper = (
    check.flatten(load(path).get_config(recipe)) for recipe in ('ours', 'paper')
  )
  found = {name for name in ours if ours[name] != paper[name]}
  assert {'objective.strength'} <= found <= {'objective.strength', 'objective.best'}
  assert paper['objective.strength'] == 1 and paper['objective.best'] == 0


def fits(c):
  """Device counts that the config can mean: all, unless its mesh is fixed."""
  if c.mesh.data:
    return (c.mesh.data * c.mesh.fsdp * c.mesh.tensor,)
  return range(c.mesh.fsdp * c.mesh.tensor, 4096)


def test_base_documents_its_fields():
  """A comment on every leaf, on its line or once for a run of equal ones."""
  source = (ROOT / 'configs' / 'base.py').read_text()
  bare = []
  for line in source.splitlines():
    match = re.match(r'  (\w+)\.(\w+) = [^#]*(#.*)?$', line)
    if match and '()' not in line and not match[3]:
      bare.append(match[2])
  assert not bare


# --- what a field changes


def show(fn, last=(), **_):
  """Stands for build.compiled's result: the program as text, and `last`."""

  def call(*args):
    text = str(jax.make_jaxpr(fn)(*args, *last))
    return f'{re.sub(r"0x[0-9a-f]+", "", text)} of {last}'

  call.trace = None
  return call


@functools.cache
def parts(changes, starts=False):
  """build.build of the tiny config, with programs shown instead of run.

  `starts`: those that make states too; they trace the model when built.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(build, 'compiled', lambda grid, fn, last=(), **_: show(fn, last))
    patch.setattr(mesh, 'put', lambda x, sharding: x)
    patch.setattr(build, 'pmap_rows', lambda fn, grid: lambda *args: 'pmap')
    if not starts:
      patch.setattr(build, 'make_starts', lambda *_: (None,) * 4)
    return build.build(tiny(**dict(changes)))


@functools.cache
def variables(cfg):
  """Shapes of a model's parameters and adapters."""
  return jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))


def shapes(changes):
  """(state, frozen, supervised state) of abstract arrays."""
  built, c = parts(changes), tiny(**dict(changes))
  tree = variables(built.model)
  params = {'params': tree['params']}
  trainable = {'lora': tree['lora']} if 'lora' in tree else params
  optimizer = build.optimizer_of(c)

  def start(tree):
    return jax.eval_shape(lambda p: step.init_state(p, optimizer), tree)

  return start(trainable), params, start(params)


def cheap_logp(
  cfg, params, tokens, masked, valid, dropout=None, prompt=None, read=model.logp_of
):
  """In place of the model, where the field is not the model's."""
  total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))
  logp = jnp.where(masked, total.astype(jnp.float32), 0.0)
  names = jax.eval_shape(read, jnp.zeros((1, 1, cfg.vocab)), tokens[:1, :1])
  return dict.fromkeys(names, logp) if isinstance(names, dict) else logp


@functools.cache
def program(name, changes, whole=False):
  """The text of one compiled function under a config.

  `whole`: with the model in the log-probs, which takes most of the tracing.
  """
  if name.startswith('init'):
    return getattr(parts(changes, True).steps, name)()
  built = parts(changes)
  state, params, sft_state = shapes(changes)
  rows = built.config.train.prompts * built.config.train.group
  length = built.config.sampler.length
  row = np.arange(rows, dtype=np.int32)
  tokens = np.zeros((rows, PROMPT + length), np.int32)
  valid = np.ones_like(tokens, bool)
  prompts = tokens[:, :PROMPT], valid[:, :PROMPT], row
  zeros = np.zeros((rows, length), np.float32)
  rollouts = Rollouts(tokens, valid, tokens[:, PROMPT:], zeros, np.int32(0), zeros)
  completion = valid[:, PROMPT:]
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
    build.abstract_batch(built, PROMPT),
  )
  reward = np.zeros((built.config.train.prompts, built.config.train.group), np.float32)
  scores = dict.fromkeys(('old', 'ref'), np.zeros(rows, np.float32))
  if 'guess' in built.objective.needs(built.hp):
    scores['guess'] = np.zeros(batch.weight.shape, np.float32)
  args = {
    'sample': (params, *prompts),
    'sample_eval': (params, *prompts),
    'score': (state.trainable, params, rollouts, row, completion),
    'pack': (rollouts, completion, row, reward, scores),
    'update': (state, params, batch, 0),
    'sft': (sft_state, tokens, valid, row, 0),
  }[name]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh, 'put', lambda x, sharding: x)
    if not whole:
      patch.setattr(logprob, 'token_logp', cheap_logp)
    return getattr(built.steps, name)(*args)


SPG = {'objective.name': 'spg', 'objective.masks': 'random'}
# field: (new value, a program it changes, further settings it needs)
PROGRAMS = {
  'seed': (1, 'sample'),
  'model.preset': ('small', 'update', {'model.width': 0}),
  'model.width': (32, 'update'),
  'model.layers': (2, 'update'),
  'model.heads': (4, 'update'),
  'model.kv_heads': (1, 'update'),
  'model.mlp': (24, 'update'),
  'model.dtype': ('bfloat16', 'update'),
  'model.param_dtype': ('bfloat16', 'init'),
  'model.remat': ('full', 'update'),
  'model.head_chunk': (4, 'update'),
  'lora.rank': (2, 'update'),
  'lora.alpha': (3.0, 'update', {'lora.rank': 2}),
  'lora.targets': ('paper', 'init_lora', {'lora.rank': 2}),
  'lora.dropout': (0.5, 'update', {'lora.rank': 2}),
  'objective.best': (1.0, 'pack'),
  'sft.lr': (1e-3, 'sft'),
  'sft.warmup': (3, 'sft'),
  'sft.weight_decay': (0.1, 'sft'),
  'sft.clip': (0.5, 'sft'),
  'objective.alpha': (0.1, 'pack'),
  'objective.coef': (0.5, 'pack'),
  'objective.ess': (0.5, 'pack'),
  'objective.baseline': ('model', 'update'),
  'objective.strength': (0.5, 'pack'),
  'objective.loss': (
    'ddo',
    'update',
    {'objective.antithetic': False, 'logprob.antithetic': False},
  ),
  'objective.ddo_alpha': (
    0.5,
    'update',
    {
      'objective.antithetic': False,
      'logprob.antithetic': False,
      'objective.loss': 'ddo',
    },
  ),
  'objective.ddo_beta': (
    0.5,
    'update',
    {
      'objective.antithetic': False,
      'logprob.antithetic': False,
      'objective.loss': 'ddo',
    },
  ),
  'objective.draws': (2, 'update'),
  'objective.spread': (True, 'update'),
  'objective.low': (0.3, 'update'),
  'objective.high': (0.8, 'update'),
  'objective.antithetic': (False, 'update'),
  'objective.loss_tail': (False, 'update'),
  'objective.common_masks': (True, 'score', {'objective.baseline': 'model'}),
  'objective.advantage': ('loo', 'pack', {'objective.name': 'espo'}),
  'objective.clip': (0.5, 'update', {'objective.name': 'espo'}),
  'objective.clip_high': (0.5, 'update', {'objective.name': 'espo'}),
  'objective.beta': (0.5, 'update', {'objective.name': 'espo'}),
  'objective.kl': ('k2', 'update', {'objective.name': 'espo', 'objective.beta': 0.5}),
  'objective.choose': ('uniform', 'update', {'objective.name': 'agrpo'}),
  'objective.variant': (
    'unit',
    'update',
    {'objective.name': 'coupled_grpo', 'objective.high': 0.8},
  ),
  'objective.masks': ('random', 'update', {'objective.name': 'espo'}),
  'objective.mask_prompt': (0.5, 'update', {'objective.name': 'wd1'}),
  'objective.truncate': (3.0, 'update', {'objective.name': 'diffpo'}),
  'objective.step_coef': (0.1, 'pack', {'objective.name': 'egspo'}),
  'objective.centre': (True, 'update', {'objective.name': 'gdsd'}),
  'objective.places': (
    False,
    'update',
    {
      'objective.name': 'mapg',
      'sampler.pick': 'plackett_luce',
      'sampler.rank_temperature': 0.5,
    },
  ),
  'objective.fresh': (False, 'update', {'objective.name': 'residual'}),
  'objective.per_token': (True, 'update', {'objective.name': 'residual'}),
  'objective.bound': ('eubo', 'update', SPG),
  'objective.power': (2.0, 'update', SPG),
  'objective.mix': (0.3, 'update', SPG),
  'objective.sft_coef': (
    0.1,
    'update',
    {'objective.name': 'vrpo', 'objective.beta': 0.2, 'objective.variant': 'all'},
  ),
  'objective.skip_equal': (True, 'pack'),
  'objective.elbo_coef': (0.1, 'update'),
  'objective.elbo_draws': (4, 'update', {'objective.elbo_coef': 0.1}),
  'logprob.estimator': ('trajectory', 'score'),
  'logprob.elbo': ('stratified', 'score'),
  'logprob.draws': (2, 'score'),
  'logprob.low': (0.3, 'score'),
  'logprob.high': (0.8, 'score'),
  'logprob.antithetic': (False, 'score'),
  'logprob.tail': (False, 'score'),
  'logprob.states': (2, 'score', {'logprob.estimator': 'trajectory'}),
  'logprob.fuse': (True, 'score', {'lora.rank': 2}),
  'reference.every': (2, 'update', {'reference.of': ('moving',)}),
  'reference.mix': (0.5, 'update', {'reference.of': ('moving',)}),
  'train.microbatches': (2, 'update', {'train.prompts': 4}),
  'optim.lr': (1e-3, 'update'),
  'optim.warmup': (3, 'update'),
  'optim.decay_steps': (50, 'update'),
  'optim.b1': (0.8, 'update'),
  'optim.b2': (0.9, 'update'),
  'optim.eps': (1e-6, 'update'),
  'optim.weight_decay': (0.1, 'update'),
  'optim.clip': (0.5, 'update'),
  'health.measure': (True, 'score'),
}
SAMPLER = {
  'length': (32, {}),
  'block': (8, {}),
  'steps': (8, {}),
  'temperature': (0.5, {}),
  'pick': ('random', {}),
  'rank': ('token', {}),
  'threshold': (0.5, {'pick': 'threshold'}),
  'factor': (0.5, {'pick': 'factor'}),
  'entropy_bound': (0.5, {'pick': 'entropy'}),
  'guidance': (0.5, {}),
  'cache': ('dual', {}),
  'refresh': (3, {'cache': 'dual'}),
  'eos_stop': (True, {}),
  'fallback': ('leftmost', {'pick': 'threshold'}),
  'schedule': ('dream', {}),
  'rank_law': ('sampling', {'temperature': 0.5}),
  'rank_temperature': (0.5, {}),
  'top_p': (0.5, {}),
  'top_k': (2, {}),
  'verify': (0.5, {'pick': 'wino'}),
  'parallel': ('pmap', {}),
}
for section, name in (('sampler', 'sample'), ('eval.sampler', 'sample_eval')):
  for field, (value, more) in SAMPLER.items():
    PROGRAMS[f'{section}.{field}'] = (
      value,
      name,
      {f'{section}.{k}': v for k, v in more.items()},
    )
# field: (new value, further settings); seen in `numbers` of a run on the host
LOOPS = {
  'data.task': ('countdown', {'sft.steps': 0}),
  'data.path': ('{csv}', {}),
  'data.tokenizer': ('{tokenizer}', {}),
  'data.style': ('chat', {'sft.steps': 0}),
  'data.template': ('{template}', {}),
  'eval.style': ('chat', {}),
  'eval.template': ('{template}', {}),
  'reward.weights.sudoku': (2.0, {'data.protocol': 'paper'}),
  'data.protocol': ('paper', {}),
  'data.prompt_length': (30, {}),
  'data.bucket': (16, {'data.prompt_length': 40}),
  'data.attend_padding': (True, {'data.prompt_length': 30}),
  'data.seed': (1, {}),
  'data.train_size': (13, {}),
  'data.validation_size': (10, {}),
  'data.test_size': (7, {}),
  'data.min_blanks': (8, {}),
  'data.largest': (12, {'data.task': 'countdown'}),
  'data.numbers': (
    3,
    {'data.task': 'countdown', 'data.path': '{jsonl}', 'sft.steps': 0},
  ),
  'data.max_blanks': (5, {}),
  'sft.steps': (5, {}),
  'sft.batch': (16, {}),
  'train.iterations': (4, {}),
  'train.prompts': (4, {}),
  'train.group': (8, {}),
  'train.inner': (3, {}),
  'train.overlap': (True, {}),
  'eval.every': (1, {}),
  'eval.batch': (16, {}),
  'checkpoint.every': (3, {}),
  'checkpoint.every_minutes': (1e-9, {}),
  'checkpoint.keep': (1, {}),
  'mesh.fsdp': (2, {}),
  'mesh.tensor': (2, {}),
  'log.every_seconds': (5.0, {}),
  'log.samples': (3, {}),
  'health.action': ('none', {'health.distinct': 0.5, 'health.patience': 1}),
  'health.patience': (1, {'health.distinct': 0.5}),
  'health.repeated': (0.9, {'health.patience': 1}),
  'health.distinct': (0.5, {'health.patience': 1}),
  'health.equal': (0.5, {'health.patience': 1}),
  'health.grad_norm': (0.5, {'health.patience': 1}),
}
# objective.name is in test_rivals; two others have tests at the end.
# data.overlong is in test_data; what comes from files, and what only a
# checkpoint's base shows, in test_weights and test_export; what --mode=eval
# reads, and the weights of other tasks' terms, in test_evaluate; what main
# alone reads, in test_main; rules that the stub cannot break, in test_health; what
# p_ref is made of, in test_targets.
ELSEWHERE = {
  'name',
  'objective.name',
  'mesh.data',
  'model.checkpoint',
  'model.attention',  # other kernels need other devices
  'model.quantize',
  'lora.path',
  'data.overlong',
  'eval.lengths',
  'eval.samples',
  'reward.workers',
  'reward.deadline',
  'mesh.cpu',
  'cache',
  'log.stuck_minutes',
  'health.empty',
  'health.reward',
  'health.ess',
  'health.kl',
  'reference.of',
  'reference.weights',
}
OTHERS = {
  f'reward.weights.{name}'
  for name in (
    'correctness',
    'int',
    'strict_format',
    'soft_format',
    'xmlcount',
    'format',
    'countdown',
  )
}
ELSEWHERE |= OTHERS


def test_every_field_is_in_a_table():
  """A new field must say what it changes."""
  fields = check.flatten(base.get_config()).keys()
  assert set(PROGRAMS) | set(LOOPS) | ELSEWHERE == fields
  assert not set(PROGRAMS) & set(LOOPS)


def test_programs_are_a_function_of_the_config():
  """Traced twice from nothing a program is the same text: the control."""
  for name in ('update', 'score', 'pack', 'sample'):
    before = program(name, ())
    for cached in (parts, program):
      cached.cache_clear()
    assert program(name, ()) == before and len(before) > 500


@pytest.mark.parametrize('field', PROGRAMS)
def test_field_changes_a_program(field):
  """The program with the field's other value is another program."""
  value, name, *more = PROGRAMS[field]
  settings = tuple(more[0].items()) if more else ()
  value = other(check.flatten(tiny(**dict(settings)))[field], value)
  whole = field.startswith(('model.', 'lora.'))
  assert program(name, settings, whole) != program(
    name, (*settings, (field, value)), whole
  )


def test_another_seed_and_rate_are_the_same_programs():
  """So that the cache of compiled programs serves a whole sweep."""
  for name, other in (
    ('update', 'optim.lr'),
    ('update', 'seed'),
    ('sample', 'seed'),
    ('score', 'seed'),
    ('sft', 'seed'),
  ):
    texts = []
    for changes in ((), ((other, 3),)):
      for cached in (parts, program):  # what was traced before shows
        cached.cache_clear()
      texts.append(program(name, changes).rpartition(' of '))
    assert texts[0][0] == texts[1][0] and texts[0][2] != texts[1][2]


# --- the loops, with steps that compute nothing


class Stubs:
  """Steps of a Built that return arrays of the right shapes at once."""

  def __init__(self, c, grid, tokenizer, calls):
    self.c, self.tokenizer, self.calls = c, tokenizer, calls
    self.whole, self.by_row = mesh.replicated(grid), mesh.rows(grid)

  def _leaf(self, value):
    return mesh.put(np.float32(value), self.whole)

  def digest(self, tree):
    return 0

  def init(self):
    return {'params': {'scale': self._leaf(0)}}

  def init_lora(self):
    return {}

  def start(self, trainable):
    return TrainState(
      mesh.put(np.int32(0), self.whole),
      trainable,
      {'count': mesh.put(np.int32(0), self.whole)},
    )

  start_sft = start

  def quantize(self, params):
    return params

  def sample(self, params, tokens, valid, row):
    """Completions that solve nothing: '1' everywhere in <answer> tags."""
    length = self.c.sampler.length
    ids = self.tokenizer('<answer>' + '1' * 14 + '</answer>')['input_ids']
    text = np.resize(ids, (len(tokens), length)).astype(np.int32)
    out = np.concatenate([tokens, text], 1)
    self.calls.append(('sample', tokens.tolist(), valid.tolist()))
    full = np.concatenate([valid, np.ones_like(text, bool)], 1)
    return Rollouts(
      out, full, np.zeros_like(text), text * 0.0, np.int32(length), text * 0.0
    ), np.ones_like(text, bool)

  sample_eval = sample

  def sampler_of(self, section):
    return self.sample

  def read_references(self):
    return ()

  def score(self, *_):
    return {}

  def pack(self, rollouts, completion, row, reward, scores):
    rows = len(row)
    zero = np.zeros(rows, np.float32)
    put = functools.partial(mesh.put, sharding=self.by_row)
    batch = TrainBatch(
      *map(
        put,
        (
          rollouts.tokens,
          rollouts.valid,
          completion,
          row,
          zero,
          zero,
          np.zeros((rows, self.c.train.inner), np.float32),
        ),
      ),
      self._leaf(rows / self.c.train.group),
      self._leaf(rows),
    )
    return batch, {'ess': np.float32(1)}

  def update(self, state, frozen, batch, inner):
    self.calls.append(('update', inner))
    numbers = {
      'loss': np.float32(1),
      'grad_norm': np.float32(1),
      'finite': np.float32(1),
    }
    return state._replace(step=state.step + 1), numbers

  def sft(self, state, tokens, valid, row, at):
    self.calls.append(('sft', tokens.tolist()))
    return self.update(state, None, None, 0)


class Saves(str):
  """A manager by its folder's name, that has nothing to wait for."""

  preserved = types.SimpleNamespace(best=None)

  def all_steps(self):
    return []

  def wait_until_finished(self):
    pass


def numbers(c, workdir):
  """All that a run on the host leaves behind, and what it asked for."""
  asked, real = [], metrics.Progress

  def progress(*args, **options):
    asked.append(['progress', options['every_seconds']])
    return real(*args, **options)

  def manager(directory, keep=2, digest=None):
    asked.append(['keep', directory[-3:], keep])
    return contextlib.nullcontext(Saves(directory[-3:]))

  def save(manager, step, trees, meta):
    meta = {k: v for k, v in meta.items() if k not in ('seconds', 'config')}
    asked.append(['save', manager, step, meta])

  built = build.build(c)
  stubs = Stubs(c, built.mesh, built.tokenizer, asked)
  built = built._replace(
    steps=build.Steps(**{name: getattr(stubs, name) for name in build.Steps._fields})
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(metrics, 'Progress', progress)
    patch.setattr(checkpoint, 'open_manager', manager)
    patch.setattr(checkpoint, 'save', save)
    patch.setattr(checkpoint, 'restore', lambda *_, **__: None)
    patch.setattr(checkpoint, 'set_aside', lambda *_: None)
    with metrics.Writer(workdir) as writer:
      session = train.Session(built, str(workdir), writer)
      params, _ = train.run('sft', session)
      train.run('rl', session, params)
  test, _ = evaluate.accuracy(built, params, build.problems(built, 'test'))
  rows = [
    {
      k: v
      for k, v in row.items()
      if k not in ('time', 'compilations') and not k.startswith('seconds')
    }
    for row in metrics.read(workdir)
  ]
  return json.dumps(
    [
      rows,
      (workdir / 'samples.jsonl').read_text(),
      test,
      asked,
      dict(built.mesh.shape),
      len(built.tokenizer),
    ]
  )


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  """Values of fields that are paths."""
  folder = tmp_path_factory.mktemp('places')
  tokenizer = data.char_tokenizer()
  tokenizer.add_tokens(['<extra>'])
  tokenizer.save_pretrained(folder)
  from dmpo_jax.tasks import sudoku

  lines = ['Puzzle,Solution'] + [
    f'{"0" * 4 + grid[4:]},{grid}' for grid in sudoku.grids()
  ]
  (folder / 'data.csv').write_text('\n'.join(lines) + '\n')
  (folder / 'data.jsonl').write_text(
    '\n'.join(
      json.dumps({'nums': nums, 'target': sum(nums)})
      for i in range(1, 200)
      for nums in ([i, 1], [i, 1, 2])
    )
  )
  (folder / 'template').write_text('Solve {puzzle}!')
  return {
    '{csv}': str(folder / 'data.csv'),
    '{jsonl}': str(folder / 'data.jsonl'),
    '{tokenizer}': str(folder),
    '{template}': str(folder / 'template'),
  }


@pytest.fixture(scope='module')
def numbers_of(tmp_path_factory):
  """`numbers` of the tiny config with changes, each run once."""

  @functools.cache
  def call(changes):
    return numbers(tiny(**dict(changes)), tmp_path_factory.mktemp('run'))

  return call


@pytest.mark.parametrize('field', LOOPS)
def test_field_changes_a_run(field, places, numbers_of):
  """What a run asks for, writes or leaves differs with the field."""
  value, more = LOOPS[field]
  value = places.get(value, value)
  more = {k: places[v] if v == '{jsonl}' else v for k, v in more.items()}
  value = other(check.flatten(tiny(**more))[field], value)
  more = tuple(more.items())
  assert numbers_of(more) != numbers_of((*more, (field, value)))


def test_runs_on_the_host_repeat(tmp_path, numbers_of):
  """The control: the same config leaves the same."""
  assert numbers(tiny(), tmp_path) == numbers_of(())


def test_every_field_is_read(tmp_path, monkeypatch):
  """Building, tracing and a run read all fields but those that main reads."""
  read, silent = set(), []
  c = tiny()
  names = {}

  def walk(section, prefix):
    names[id(section)] = prefix
    for key in section:
      if isinstance(section[key], ml_collections.ConfigDict):
        walk(section[key], f'{prefix}{key}.')

  walk(c, '')
  getitem, flatten = ml_collections.ConfigDict.__getitem__, check.flatten

  def record(self, key):
    if not silent and id(self) in names:
      read.add(names[id(self)] + key)
    return getitem(self, key)

  def quietly(*args):  # looking at all fields is not reading one
    silent.append(0)
    try:
      return flatten(*args)
    finally:
      silent.pop()

  monkeypatch.setattr(ml_collections.ConfigDict, '__getitem__', record)
  monkeypatch.setattr(check, 'flatten', quietly)
  numbers(c, tmp_path)
  monkeypatch.undo()
  assert (
    set(flatten(c)) - read
    == {'name', 'mesh.cpu', 'cache', 'log.stuck_minutes'} | OTHERS
  )


def test_name_is_in_the_workdir(tmp_path, monkeypatch):
  """The experiment's name is part of the default workdir."""
  monkeypatch.chdir(tmp_path)
  c = tiny(name='other')
  assert main.settle(c, '').startswith('runs/other-')


def test_mesh_data_is_what_the_others_leave():
  """It has one right value on given devices, and 0 stands for it."""
  assert dict(build.build(tiny(**{'mesh.data': 4, 'mesh.fsdp': 2})).mesh.shape) == dict(
    data=4, fsdp=2, tensor=1
  )
  with pytest.raises(ValueError, match='mesh.data.* = 2, 2, 1 .*8 devices'):
    check.config(tiny(**{'mesh.data': 2, 'mesh.fsdp': 2}), 8)


def test_reading_is_noticed(monkeypatch):
  """The recorder above sees c.a.b and c['a']['b'] alike: its own test."""
  seen = []
  getitem = ml_collections.ConfigDict.__getitem__
  monkeypatch.setattr(
    ml_collections.ConfigDict,
    '__getitem__',
    lambda self, key: (seen.append(key), getitem(self, key))[1],
  )
  c = tiny()
  seen.clear()
  assert c.optim.lr == c['optim']['lr']
  assert seen == ['optim', 'lr'] * 2
