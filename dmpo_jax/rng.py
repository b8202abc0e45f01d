"""Randomness is addressed, not threaded: a key is a function of where it acts.

`key_for(seed, stream, step)` names a use; `row_keys` gives every row its own
key. So the same numbers come out on one device, on eight, under jit or pmap
and for any microbatching, and nothing random is ever checkpointed.
"""

import jax

STREAMS = dict(init=0, lora=1, sample=2, score=3, mask=4, sft=5, evaluate=6)


def key_for(seed, stream, step=0):
  """Key of `stream` (a name in STREAMS) at `step`."""
  key = jax.random.fold_in(jax.random.key(seed), STREAMS[stream])
  return jax.random.fold_in(key, step)


def row_keys(key, row_R):
  """(R,) keys, each a function of (key, row id) alone."""
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_R)


def per_row(key, row_R, draw):
  """Stacks draw(key of row) over rows: no row's draw depends on another."""
  return jax.vmap(draw)(row_keys(key, row_R))
