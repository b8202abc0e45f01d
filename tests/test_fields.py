"""Every field of an objective, a sampler and a log-prob estimate changes a program.

The programs are traced, not compiled. A field that says nothing beside the defaults has
its context in WITH. In any other context a part must say that a field has no effect
(`idle`) exactly where the program stays the same.
"""

import contextlib
import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval
from marks import mostly_slow

from configs import base
from dmpo_jax import check, config, logprob, model, parts, sampler, score, step
from dmpo_jax.objectives import OBJECTIVES, dmpo
from dmpo_jax.sampler import wino
from dmpo_jax.tasks import TASKS
from dmpo_jax.types import (
  Canvas,
  Record,
  Rollouts,
  Sampled,
  Scored,
  TaskOptions,
  Text,
  TrainBatch,
  ViewLogp,
  Views,
)

GROUP, ROWS, P, L = 2, 4, 3, 20
WORDS = (
  'mean loo zscore k1 k2 k3 k3_ratio each uniform entropy top stratified random '
  'bernoulli rounded block released formula elbo unit eubo mix none all best wdce ddo '
  'group individual model token max sampling even dream leftmost prefix dual threshold '
  'paper trajectory order rounds prefix first sequence'
).split()
# Field -> what else must be set for it to matter.
WITH = {
  'kl': {'beta': 0.1},
  'loss': {'antithetic': False},
  'choose': {'draws': 4},
  'ddo_alpha': {'loss': 'ddo', 'antithetic': False},
  'ddo_beta': {'loss': 'ddo', 'antithetic': False},
  'common_masks': {'baseline': 'model'},
  'mix': {'bound': 'mix'},
  'threshold': {'pick': 'threshold'},
  'fallback': {'pick': 'threshold'},
  'factor': {'pick': 'factor'},
  'entropy_bound': {'pick': 'entropy'},
  'verify': {'pick': 'wino'},
  'refresh': {'cache': 'dual'},
  'slots': {'slots': 1},
  'states': {'estimator': 'trajectory'},
  'credit_shrink': {'advantage': 'prefix'},
  'first': {'choose': 'first', 'draws': 12},
}


def as_text(fn, *args):
  """Returns the traced program and its constants, as far as its outputs need them."""
  closed = jax.make_jaxpr(fn)(*args)
  inner = closed.jaxpr
  names = [*inner.constvars, *inner.invars]
  whole = inner.replace(constvars=[], invars=names, debug_info=None)
  needed, used = partial_eval.dce_jaxpr(whole, [True] * len(whole.outvars))
  constants = [
    np.asarray(x).tolist() if isinstance(x.dtype, np.dtype) else str(x)
    for x, kept in zip(closed.consts, used, strict=False)
    if kept
  ]
  return re.sub(r'0x[0-9a-f]+', '', f'{needed} {constants}')


def has_effect(hp, name, text):
  """Returns whether another value of a field changes the program; None: refused."""
  try:
    other = changed(hp, name)
  except StopIteration:
    return None
  return text(hp) != text(other)


def changed(hp, name):
  """Returns hp with another possible value of a field."""
  value = getattr(hp, name)
  if isinstance(value, bool):
    options = [not value]
  elif isinstance(value, str):
    options = [word for word in WORDS if word != value]
  elif isinstance(value, int):
    options = [value // 2, value + 2, value * 2, value + 1]
  else:
    options = [value * 0.5 + 0.1, value * 0.5, value * 2]
  options = [dataclasses.replace(hp, **{name: x}) for x in options if x != value]
  return next(hp for hp in options if not hp.problems())


def possible(hp, **fields):
  """Returns hp with those of the fields that it has."""
  own = {f.name for f in dataclasses.fields(hp)}
  hp = dataclasses.replace(hp, **{k: v for k, v in fields.items() if k in own})
  assert not hp.problems()
  return hp


def objective_text(objective, hp, block=0):
  """Returns what an objective wants, draws, weighs and loses, as text."""
  full = np.ones((ROWS, L), np.float32)
  order = np.tile(np.arange(L, dtype=np.int32), (ROWS, 1))
  more = {'entropy': full, 'place': -full, 'fallback': full > 0}
  record = Record(order, -full, full, more)
  canvas, words = Canvas(L, block), full > 0
  words[:, -2:] = False  # an EOS and its tail
  text = Text(words, words, np.ones((ROWS, P), bool), L // 2, canvas, record)
  wants, row = objective.wants(hp), np.arange(ROWS, dtype=np.int32)
  if 'old' not in wants.elbo:  # nothing reads it
    wants = dataclasses.replace(wants, common_masks=True)

  def run(key, reward):
    masks = objective.draw(key, row, text, hp)
    x = -jnp.ones(masks.masked.shape)
    groups = reward.shape
    guess = jnp.ones((*groups, x.shape[1]))
    scored = Scored(
      reward,
      jnp.full(groups, L - 2),
      reward,
      -reward,
      guess,
      record=record,
      block=block,
      tokens=order,
    )
    weight, own, _ = objective.weigh(scored, hp)
    rows = lambda x: jnp.reshape(x, (ROWS, *x.shape[2:]))
    views = Views(-jnp.ones(ROWS), x, {'centred': x, 'score': x})
    batch = TrainBatch(
      tokens=jnp.zeros((ROWS, P + L), jnp.int32),
      valid=jnp.ones((ROWS, P + L), bool),
      completion=text.completion,
      row=row,
      weight=rows(weight),
      own={name: rows(x) for name, x in own.items()},
      norm=jnp.float32(2),
      total=jnp.float32(ROWS),
      record=record,
      old=views,
      ref=views,
    )
    if wants.reweigh:
      batch = batch._replace(weight=objective.reweigh(reward.ravel(), batch, GROUP, hp))
    now = ViewLogp(x * reward[0, 0], {'centred': x, 'score': x})
    return masks, objective.loss(now, masks, batch, hp)[0]

  reward = jnp.linspace(0, 1, ROWS).reshape(-1, GROUP)
  return f'{wants} {as_text(run, jax.random.key(0), reward)}'


FIELDS = [
  (name, field.name)
  for name, objective in OBJECTIVES.items()
  for field in dataclasses.fields(objective.Config)
]


@pytest.mark.parametrize('name, field', FIELDS)
def test_objective_field_changes_the_objective(name, field):
  objective = OBJECTIVES[name]
  hp = possible(objective.Config(), **WITH.get(field, {}))
  other = changed(hp, field)
  assert objective_text(objective, hp) != objective_text(objective, other)


def contexts(hp):
  """Returns hp, and hp with each other choice, switch and 0 of one field."""
  out = [hp]
  for field, value in vars(hp).items():
    options = WORDS if isinstance(value, str) else ()
    if isinstance(value, bool):
      options = (not value,)
    elif isinstance(value, float):
      options = (0.0,) if value else (0.5,)
    for option in options:
      for more in ({}, WITH.get(field, {})):
        other = dataclasses.replace(hp, **{**more, field: option})
        if not other.problems() and other not in out:
          out.append(other)
  return out


QUICK = 'dmpo', 'spg', 'coupled_grpo', 'gdsd', 'wd1'
EACH = mostly_slow(OBJECTIVES, QUICK)


@pytest.mark.parametrize('name', EACH)
def test_objective_says_which_of_its_fields_have_no_effect(name):
  """Beside every other setting of one field."""
  objective = OBJECTIVES[name]
  text = functools.cache(functools.partial(objective_text, objective))
  for hp in contexts(objective.Config()):
    for field in vars(hp):
      effect = has_effect(hp, field, text)
      assert effect is None or effect == (field not in hp.idle()), (hp, field)


@pytest.mark.parametrize('name', ['dmpo', 'espo', 'tracerl', 'dipo'])
def test_an_objective_says_what_attention_blocks_do_not_read(name):
  """Beside every other setting of one field, too."""
  objective = OBJECTIVES[name]
  text = functools.cache(functools.partial(objective_text, objective, block=4))
  for hp in contexts(objective.Config()):
    useless = {**hp.idle(), **hp.WHOLE_TEXT}
    for field in vars(hp):
      effect = has_effect(hp, field, text)
      assert effect is None or effect == (field not in useless), (hp, field)


@pytest.fixture(scope='module')
def shapes(tiny):
  return jax.eval_shape(lambda: model.init(tiny, jax.random.key(0)))


@pytest.mark.parametrize(
  'field', [f.name for f in dataclasses.fields(sampler.SampleConfig)]
)
def test_sampler_field_changes_the_sampler(field, tiny, shapes):
  plain = sampler.SampleConfig(L, L // 2, L // 2, 0.7)
  hp = possible(plain, **WITH.get(field, {}))
  if field == 'refresh':
    hp = dataclasses.replace(hp, refresh=0)

  def text(hp):
    prompts, valid = jnp.zeros((2, P), jnp.int32), jnp.ones((2, P), bool)
    keys = jax.random.split(jax.random.key(0), 2)
    run = lambda params: sampler.sample(tiny, params, prompts, valid, keys, hp)
    return as_text(run, shapes)

  other = changed(hp, field)
  if field == 'cache':  # the first one is for block-causal models
    other = dataclasses.replace(hp, cache='prefix')
  assert text(hp) != text(other)


# Not of a step: the loop reads some, and at temperature 0 only the recorded log-probs
# depend on the last two.
NOT_OF_A_STEP = {'length', 'block', 'pick', 'guidance', 'cache', 'refresh', 'slots'}
NOT_OF_A_STEP |= {'eos_stop', 'top_p', 'top_k'}


@pytest.mark.parametrize('pick', sampler.NAMES)
@pytest.mark.parametrize('temperature', [0.0, 0.7])
def test_sampler_says_which_of_its_fields_have_no_effect(
  pick, temperature, tiny, monkeypatch
):
  """On the tokens of a step, of a network that is replaced."""
  logits = np.random.default_rng(0).normal(size=(2, L // 2, tiny.vocab))
  seen = jnp.asarray(logits, jnp.float32)
  monkeypatch.setattr(model, 'window_logits', lambda *_, **__: (seen, None))
  monkeypatch.setattr(model, 'shadow_logits', lambda *_: (seen, seen))
  hot = 0.5 if pick == 'plackett_luce' else 0.0
  hp = sampler.SampleConfig(
    L, L // 2, L // 5, temperature, pick=pick, rank_temperature=hot
  )
  zeros, rows = jnp.zeros((2, L)), jnp.zeros(2, jnp.int32)
  masks = jnp.full((2, L), tiny.mask_id)
  keys, valid = jax.random.split(jax.random.key(0), 2), jnp.ones((2, L), bool)

  @functools.cache
  def text(hp):
    setting = sampler.unmask.Setting(tiny, {}, hp, valid, 0, keys, {})

    def run(masks, since):
      loop = sampler.unmask.Loop(masks, masks, zeros, zeros, rows, since, rows[0], {})
      if pick == 'wino':
        return wino.step(setting, wino.Drafts(loop, since + 3)).loop.tokens
      return sampler.unmask.step_each_row(setting, loop).tokens

    return as_text(run, masks, rows)

  for field in set(vars(hp)) - NOT_OF_A_STEP:
    effect = bool(has_effect(hp, field, text))
    assert effect == (field not in hp.idle()), field
  assert bool({'top_p', 'top_k'} & hp.idle().keys()) == (temperature == 0)


@pytest.mark.parametrize(
  'field', [f.name for f in dataclasses.fields(logprob.LogprobConfig)]
)
def test_logprob_field_changes_the_scores(field, tiny, shapes):
  hp = possible(logprob.LogprobConfig(), **WITH.get(field, {}))
  cfg = dataclasses.replace(tiny, lora_rank=2) if field == 'fuse' else tiny
  full = jnp.ones((2, L))
  tokens, valid = jnp.zeros((2, P + L), jnp.int32), jnp.ones((2, P + L), bool)
  order = jnp.tile(jnp.arange(L), (2, 1))
  rollouts = Rollouts(tokens, valid, order, -full, jnp.int32(L), full)
  sampled = Sampled(rollouts, full > 0, jnp.arange(2))
  keys = jax.random.key(0), jax.random.key(1)

  def text(hp):
    law = sampler.SampleConfig(L, L, L, 0.7)
    setup = step.Setup(cfg, dmpo.OBJECTIVE, dmpo.Config(), law=law, logprob=hp)

    def run(params):
      who = score.policies(params, params)
      return score.score(who, sampled, *keys, setup)

    tree = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
    return as_text(run, tree)

  assert text(hp) != text(changed(hp, field))


# Fields of a config -> the setting in which logprob.* are looked at.
SCORING = [
  {'objective.alpha': 0.04},
  {'objective.alpha': 0.0, 'objective.best': 0.0},
  {'objective.alpha': 0.0, 'objective.best': 0.0, 'health.measure': True},
  {'objective.alpha': 0.0, 'objective.best': 0.0, 'objective.baseline': 'model'},
  {'objective.baseline': 'model'},
  {'objective.baseline': 'model', 'objective.common_masks': True},
  {'objective.loss': 'ddo', 'objective.antithetic': False},
  {'objective.name': 'wd1'},
  {'objective.name': 'espo'},
]


WHOLE_TEXT = [(*x, 0) for x in itertools.product(SCORING, ('paper', 'stratified'))]
IN_BLOCKS = [
  (fields, elbo, 4)
  for fields in (SCORING[0], SCORING[4], SCORING[-1])
  for elbo in ('paper', 'stratified', 'order')
]


FEW = (WHOLE_TEXT[0], WHOLE_TEXT[-1], IN_BLOCKS[2])


@pytest.mark.parametrize(
  'fields, elbo, block', mostly_slow(WHOLE_TEXT + IN_BLOCKS, FEW), ids=str
)
@pytest.mark.parametrize('estimator', ['elbo', 'trajectory'])
def test_check_says_which_logprob_fields_have_no_effect(
  fields, estimator, elbo, block, tiny, shapes
):
  """Beside the objectives that want their estimates, and those that do not."""
  c = base.get_config()
  c.model.attention_block = block
  tiny = dataclasses.replace(tiny, block_causal=block)
  config.update(c, fields | {'logprob.estimator': estimator, 'logprob.elbo': elbo})
  full = jnp.ones((ROWS, L))
  tokens, valid = jnp.zeros((ROWS, P + L), jnp.int32), jnp.ones((ROWS, P + L), bool)
  order = jnp.tile(jnp.arange(L), (ROWS, 1))
  rollouts = Rollouts(tokens, valid, order, -full, jnp.int32(L), full)
  sampled = Sampled(rollouts, full > 0, jnp.arange(ROWS))
  keys = jax.random.key(0), jax.random.key(1)
  setup = parts.setup_of(c, tiny, OBJECTIVES[c.objective.name])
  setup = dataclasses.replace(
    setup, law=sampler.SampleConfig(L, L, L, 0.7), microbatches=1
  )

  def text(hp):
    run = lambda params: score.score(
      score.policies(params, params),
      sampled,
      *keys,
      dataclasses.replace(setup, logprob=hp),
    )
    return as_text(run, shapes)

  found = check.idle(c)
  for field in set(vars(setup.logprob)) - {'estimator', 'elbo', 'fuse'}:
    effect = bool(has_effect(setup.logprob, field, text))
    assert effect == (f'logprob.{field}' not in found), field


class Options(TaskOptions):
  """Options that remember which of their fields were read."""

  def __getattribute__(self, name):
    if name in TaskOptions.__dataclass_fields__:
      read = self.__dict__.setdefault('read', set())
      read.add(name)
    return super().__getattribute__(name)


@pytest.mark.parametrize('path', ['', 'file'])
@pytest.mark.parametrize('name', TASKS)
def test_a_task_says_which_options_it_reads(name, path, tmp_path):
  task = TASKS[name]
  options = Options(train_size=4)
  if not path and name in ('gsm8k', 'math', 'code'):
    return  # they are not generated
  if path:
    rows = {
      'gsm8k': '{"question": "1 + 1?", "answer": "#### 2"}',
      'code': '{"question": "f?", "test_cases": ["assert f()"]}',
      'math': '{"problem": "1 + 1?", "solution": "\\\\boxed{2}"}',
      'countdown': '{"nums": [1, 2, 3], "target": 6}',
      'sudoku': 'Puzzle,Solution\n0234341221434321,1234341221434321',
    }
    file = tmp_path / ('train.csv' if name == 'sudoku' else 'train.jsonl')
    file.write_text(rows[name] + '\n')
    options = Options(path=str(tmp_path), train_size=4)
    (tmp_path / file.name.replace('train', 'test')).write_text('')
  with contextlib.suppress(ValueError):  # the other split is empty
    task.load('train', options)
  # `numbers` is refused where problems are generated.
  general = {'path', 'train_size', 'validation_size', 'test_size'}
  general |= {'numbers'} if name == 'countdown' and not path else set()
  kind = 'file' if path else 'generated'
  assert options.__dict__['read'] - general == set(task.options[kind])
