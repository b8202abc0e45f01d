"""From causal attention to a model's own, as supervised training goes on.

A model that sees the whole text begins with causal attention. Each token then sees a
random share of the later ones, which grows by the same amount in every update
(DiffuLLaMA, arXiv 2410.17891). A block-causal model begins with blocks of one token,
which double until they are its own. The stage is a function of the update alone.
"""

from typing import NamedTuple

from dmpo_jax.model import ModelConfig
from dmpo_jax.types import IntScalar, Scalar


class Stage(NamedTuple):
  """What one compiled program of supervised training sees."""

  block: int  # tokens of an attention block; 0 = the whole text
  partial: bool  # whether a share of the later tokens is hidden


def block_sizes(block: int) -> list[int]:
  """Returns 1, 2, 4, ... and the block itself; each divides it."""
  sizes = [1]
  while sizes[-1] < block:
    size = 2 * sizes[-1]
    sizes.append(block if block % size else size)
  return sizes


def stage_of(cfg: ModelConfig, steps: int, at: int) -> Stage:
  """Returns the stage of update `at`; from update `steps` on it is the model's own."""
  own = Stage(cfg.block_causal, False)
  if at >= steps:
    return own
  if not own.block:
    return Stage(0, True)
  sizes = block_sizes(own.block)
  return Stage(sizes[at * (len(sizes) - 1) // steps], False)


def share_of(steps: int, at: IntScalar) -> Scalar:
  """Returns the chance that a token sees a later one in update `at` < `steps`."""
  return at / steps
