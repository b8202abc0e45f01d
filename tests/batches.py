"""Inputs of objectives for the tests: texts and batches with what a test needs."""

import jax.numpy as jnp

from dmpo_jax.types import Canvas, Text, TrainBatch, Views


def text_of(completion_RxL, record=None, block=None):
  """A Text of completions whose prompts are one real token."""
  completion = jnp.asarray(completion_RxL, bool)
  prompt = jnp.ones((completion.shape[0], 1), bool)
  length = completion.shape[1]
  return Text(completion, completion, prompt, block or length, Canvas(length), record)


def batch_of(weight_R, own=None, groups=1, **fields):
  """A TrainBatch of rows with these weights; `fields` replace its other fields."""
  rows = len(weight_R)
  batch = TrainBatch(
    tokens=None,
    valid=None,
    completion=None,
    row=jnp.arange(rows),
    weight=jnp.asarray(weight_R),
    own={name: jnp.asarray(x) for name, x in (own or {}).items()},
    norm=jnp.float32(groups),
    total=jnp.float32(rows),
  )
  return batch._replace(**fields)


def elbos(x_R):
  """Views that hold the ELBO of each row alone."""
  return Views(elbo=jnp.asarray(x_R))
