"""What can be recorded of a token when it is revealed, beside what always is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from dmpo_jax.sampler import picks
from dmpo_jax.sampler.config import SampleConfig
from dmpo_jax.types import BoolRW, FloatRW


class Recorder(NamedTuple):
  """A number of every token: an (R, L) array in Rollouts.more."""

  dtype: Any
  fn: Callable[..., Any]  # (Look, revealed (R, W) bool, SampleConfig) -> (R, W)


def best(look: picks.Look, take: BoolRW, hp: SampleConfig) -> FloatRW:
  """Returns the probability of the most probable token; needs rank = max."""
  return look.confidence


def entropy(look: picks.Look, take: BoolRW, hp: SampleConfig) -> FloatRW:
  """Returns the entropy of each token's law, in nats."""
  return picks.entropy_of(look.prob)


def fallback(look: picks.Look, take: BoolRW, hp: SampleConfig) -> BoolRW:
  """Returns True where pick threshold found no token confident enough."""
  number = hp.threshold if look.bound is None else look.bound[:, None]
  sure = look.masked & (look.confidence >= number)
  return jnp.broadcast_to(~jnp.any(sure, 1, keepdims=True), take.shape)


def place(look: picks.Look, take: BoolRW, hp: SampleConfig) -> FloatRW:
  """Returns the log-prob of a step's positions, under pick plackett_luce."""
  score = picks.log_confidence(look) / hp.rank_temperature
  logp = picks.plackett_luce_logp(score, look.masked, take)
  return jnp.broadcast_to(logp[:, None], take.shape)
