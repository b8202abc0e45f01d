"""Every objective at its paper's settings, from the quickstart's start.

python main.py --config=configs/rivals.py:espo

The name is one of dmpo_jax.objectives.OBJECTIVES; `--sweep=objectives:i` is the
i-th of them. The objective's fields are its own defaults, the rest is the
quickstart's with two updates a buffer, so that ratios matter, and another
sampler where the objective wants one. Rates are not tuned: for a comparison
search them. docs/objectives.md tells what differs from the papers' code.
"""

import dataclasses

from configs import quickstart
from dmpo_jax import check
from dmpo_jax.objectives import OBJECTIVES

SWEEPS = ('objectives',)
# What an objective needs of the sampler, or is made for.
SAMPLERS = {
  'agrpo': dict(pick='random'),
  'fork_grpo': dict(pick='threshold', threshold=0.8, fallback='leftmost'),
  'just_grpo': dict(pick='confidence', block=1),
  'mapg': dict(pick='plackett_luce', rank_temperature=0.5, steps=8),
}


def get_config(name='dmpo'):
  c = quickstart.get_config()
  c.train.prompts = 32
  c.train.inner = 2
  c.update_from_flattened_dict(fields_of(name))
  return c


def fields_of(name):
  """{config field: value}: the defaults of `name`, and of no other objective
  a field that is set."""
  if wrong := check.nearest('the objective after the colon', name, OBJECTIVES):
    raise ValueError(wrong[0])
  fields = check.objective_fields() | {
    field.name: field.default for field in dataclasses.fields(OBJECTIVES[name].hp)
  }
  sampler = SAMPLERS.get(name, {})
  return {
    'name': f'rivals-{name}',
    'objective.name': name,
    **{f'objective.{field}': value for field, value in fields.items()},
    **{f'sampler.{field}': value for field, value in sampler.items()},
  }


def sweep(name):
  return {'objectives': [fields_of(each) for each in OBJECTIVES]}[name]
