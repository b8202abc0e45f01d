"""Settings of the real models on hardware that they were planned for.

The name of a slice stands after the colon of a config, alone or beside a recipe:
configs/llada_math.py:h100, configs/llada_math.py:espo,h100. docs/plans.md has its
memory and its time. A new slice is an entry here, and a plan (benchmarks/plans.py).

A slice sets how a run is computed: what is rematerialised, microbatches, rows at a
time, how the base is stored. It does not change what is learned.
"""

import math
from typing import NamedTuple

from dmpo_jax.sampler import SAMPLERS


class Slice(NamedTuple):
  """One kind of hardware."""

  topology: str  # as --topology names it
  devices: int
  # preset -> (rows that a device updates at once, fields to set)
  models: dict


DOTS = {'model.remat': 'dots'}
# Keys and values of 64 rows at a time; the other 64 follow.
HALF = {'sampler.slots': 64, 'eval.batch': 64}
# Every device holds the whole base, so that none of it is gathered.
INT8 = {'model.quantize': 'int8'}
# A sixteenth of the weights on each chip; they are gathered for every forward.
SPLIT = {'mesh.fsdp': 16}
# The same, but whole weights of a small model fit while it samples.
ONCE = {**SPLIT, 'mesh.gather': 'rollout'}
# Of cards with 80 GB. A row of llada_8b and dream_7b has 512 tokens, that of a block
# model a packed copy for each recorded step beside its text.
CARD = {
  'llada_8b': (2, DOTS),
  'dream_7b': (2, DOTS),
  'fast_dllm_7b': (2, {}),
  'sdar_4b': (2, {}),
  'sdar_1_7b': (8, {}),
  'a2d_0_6b': (8, {}),
}
# SDAR-30B-A3B in bfloat16 takes 69.3 GiB, and 69.2 fit.
NODE = {**CARD, 'llada2_mini': (1, {}), 'sdar_30b': (1, {**INT8})}
SLICES = {
  'h100': Slice('h100', 1, CARD),
  'a100': Slice('a100', 1, CARD),
  'h100x8': Slice('h100x8', 8, NODE),
  'l40s': Slice(
    'l40s',
    1,
    {'llada_8b': (2, {**INT8, **HALF}), 'sdar_1_7b': (8, {}), 'a2d_0_6b': (8, {})},
  ),
  'v5e16': Slice(
    'v5e:4x4',
    16,
    {
      'llada_8b': (1, INT8),
      'dream_7b': (1, SPLIT),  # its adapters are too large beside a whole base
      'fast_dllm_7b': (1, SPLIT),
      'sdar_4b': (1, SPLIT),
      'sdar_1_7b': (1, ONCE),
    },
  ),
  'v5p64': Slice('v5p:2x4x4', 32, {'llada_8b': (4, DOTS), 'dream_7b': (4, DOTS)}),
  # sdar_30b is not planned for v5p16: the programs take minutes to compile.
  'v5p16': Slice('v5p:2x2x2', 8, {'llada2_mini': (1, {}), 'sdar_30b': (1, {})}),
  'v5p256': Slice('v5p:4x4x8', 128, {'llada2_flash': (1, {'mesh.expert': 8})}),
}


def add_cache(c):
  """Caches keys and values in the samplers that can: `dual` where nothing is set."""
  for s in (c.sampler, c.eval.sampler):
    if s.cache == 'none' and SAMPLERS[s.pick].plain:
      s.cache = 'dual'


def place(c, name):
  """Gives a config the settings of a slice; ValueError if its model has none there."""
  slice_, preset = SLICES[name], c.model.preset
  if preset not in slice_.models:
    known = [x for x in SLICES if preset in SLICES[x].models]
    raise ValueError(
      f'the slice {name} after the colon has no settings of model.preset = {preset}: '
      f'{", ".join(known)} have'
    )
  rows, fields = slice_.models[preset]
  c.update_from_flattened_dict(fields)
  of_device = c.train.prompts * c.train.group // slice_.devices
  c.train.microbatches = of_device // math.gcd(of_device, rows)
  return c
