"""Randomness is addressed, not threaded: a key is a function of where it acts.

`key_for(seed, stream, step)` names a use; `row_keys` gives every row its own key.
So the same numbers come out on one device, on eight, under jit or pmap and for any
number of microbatches, and nothing random is ever checkpointed.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Key

from dmpo_jax.types import IntR, KeyR

AnyKey = Key[Any, '']

STREAMS = dict(
  init=0, lora=1, sample=2, score=3, mask=4, sft=5, evaluate=6, adapt=7, pairs=8
)
# Uses inside one stream and step, beside its rows.
SUBSTREAMS = dict(
  dropout=0, anchor=1, fresh=2, prompt=3, order=4, turns=5, held_out=6, anneal=7
)
# Rows are counted from 0 over the whole run; none reaches the largest int32.
NO_ROW = 2**31 - 1


def key_for(seed: Any, stream: str, step: Any = 0) -> AnyKey:
  """Returns the key of `stream` (a name in STREAMS) at `step`; both may be traced."""
  key = jax.random.fold_in(jax.random.key(seed), STREAMS[stream])
  return jax.random.fold_in(key, step)


def substream(key: AnyKey, name: str) -> AnyKey:
  """Returns the key of a use (a name in SUBSTREAMS) within a stream.

  It is a child of a key that no row has, so it is no row's key either.
  """
  return jax.random.fold_in(jax.random.fold_in(key, NO_ROW), SUBSTREAMS[name])


def row_keys(key: AnyKey, row_R: IntR) -> KeyR:
  """Returns one key per row, each a function of (key, row id) alone."""
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_R)


def per_row(key: AnyKey, row_R: IntR, draw: Callable) -> Any:
  """Stacks draw(key of row) over rows: no row's draw depends on another's."""
  return jax.vmap(draw)(row_keys(key, row_R))
