"""Every field of an objective, a sampler and a log-prob estimate changes a program.

The programs are traced, not compiled. A field that says nothing beside the defaults has
its context in WITH.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax import logprob, model, sampler, score, step
from dmpo_jax.objectives import OBJECTIVES, dmpo
from dmpo_jax.types import (
  Record,
  Rollouts,
  Sampled,
  Scored,
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
  'paper trajectory'
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
  'states': {'estimator': 'trajectory'},
}


def as_text(fn, *args):
  """Returns the traced program, without the addresses of functions."""
  return re.sub(r'0x[0-9a-f]+', '', str(jax.make_jaxpr(fn)(*args)))


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


def objective_text(objective, hp):
  """Returns what an objective wants, draws, weighs and loses, as text."""
  full = np.ones((ROWS, L), np.float32)
  order = np.tile(np.arange(L, dtype=np.int32), (ROWS, 1))
  more = {'entropy': full, 'place': -full, 'fallback': full > 0}
  record = Record(order, -full, full, more)
  text = Text(full > 0, full > 0, np.ones((ROWS, P), bool), L // 2, record)
  wants, row = objective.wants(hp), np.arange(ROWS, dtype=np.int32)

  def run(key, reward):
    masks = objective.draw(key, row, text, hp)
    x = -jnp.ones(masks.masked.shape)
    groups = reward.shape
    guess = jnp.ones((*groups, x.shape[1]))
    scored = Scored(reward, jnp.full(groups, L), reward, -reward, guess)
    weight, own, metrics = objective.weigh(scored, hp)
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
    return masks, metrics, objective.loss(now, masks, batch, hp)

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

  assert text(hp) != text(changed(hp, field))


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
    law = sampler.Law(L, 0.7, 0.0, 0.0)
    setup = step.Setup(cfg, dmpo.OBJECTIVE, dmpo.Config(), law=law, logprob=hp)

    def run(params):
      who = score.policies(params, params)
      return score.score(who, sampled, *keys, setup)

    tree = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
    return as_text(run, tree)

  assert text(hp) != text(changed(hp, field))
