"""Objectives by name. A new one is a file beside this and a name in NAMES."""

import importlib

from dmpo_jax.logprob import READS
from dmpo_jax.sampler import RECORDS
from dmpo_jax.types import Objective

NAMES = (
  'dmpo',
  'agrpo',
  'coupled_grpo',
  'diffpo',
  'diffu_grpo',
  'dipo',
  'egspo',
  'espo',
  'fork_grpo',
  'gdpo',
  'gdsd',
  'just_grpo',
  'mapg',
  'residual',
  'spg',
  'tracerl',
  'vrpo',
  'wd1',
)


def checked(name: str, objective: Objective) -> Objective:
  """Returns the objective; ValueError if its default `wants` has an unknown name."""
  wants = objective.wants(objective.Config())
  for field, known in (('reads', READS), ('records', RECORDS)):
    if unknown := set(getattr(wants, field) or ()) - set(known):
      raise ValueError(
        f'objective {name}: Wants.{field} = {sorted(unknown)} must be of '
        f'{", ".join(known)}'
      )
  if wants.reweigh and not objective.reweigh:
    raise ValueError(f'objective {name}: Wants.reweigh needs Objective.reweigh')
  return objective


OBJECTIVES = {
  name: checked(name, importlib.import_module(f'dmpo_jax.objectives.{name}').OBJECTIVE)
  for name in NAMES
}
