"""GDPO: PPO on an ELBO whose mask ratios are the nodes of a Gauss rule.

arXiv 2510.08554. N = `draws` Gauss-Legendre nodes t_n with weights w_n:

  E = sum_n w_n / t_n sum_masked log p(x_i | x_masked at ratio t_n)
  loss = mean_g 1/L [ -min(rho A, clip(rho) A) + beta KL ], rho = exp(dE)

masks = bernoulli: each position at ratio t_n, so N nodes are exact where L <= 2N.
rounded: exactly max(1, round(t_n L)) positions but the weight of t_n, as the reference
does; this rounding bias shrinks with L. Attention blocks share the ratio of a copy,
and N nodes are exact where a block has at most 2N tokens. The tail after the first EOS
counts, and so L does. The paper's coefficient of the KL is not known; the default is
ESPO's.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dmpo_jax import masking, rng
from dmpo_jax.objectives import espo, shared
from dmpo_jax.rng import AnyKey
from dmpo_jax.types import IntR, Masks, Objective, Text, TrainBatch, ViewLogp


@dataclasses.dataclass(frozen=True)
class Config(shared.PenalisedGradient):
  OWN = {'masks': shared.one_of('bernoulli', 'rounded')}
  beta: float = 1e-3  # factor of the KL to the reference; 0 = off
  kl: str = 'k2'  # estimator of the KL: k1 | k2 | k3 | k3_ratio
  masks: str = 'bernoulli'  # bernoulli (exact for L <= 2 draws) | rounded (released)
  draws: int = 3  # nodes, one masked copy each


def nodes(count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns (nodes, weights) of the Gauss-Legendre rule on (0, 1)."""
  at, weight = np.polynomial.legendre.leggauss(count)
  return (at + 1) / 2, weight / 2


def draw(key: AnyKey, row_R: IntR, text: Text, hp: Config) -> Masks:
  """Draws one mask at each node; Masks.weight is K w_n / t_n."""
  length = text.completion.shape[1]
  at, weight = nodes(hp.draws)
  count = np.maximum(np.round(at * length), 1)

  def of_row(key):
    if hp.masks == 'rounded':
      return masking.anywhere(key, count, length)
    noise = jax.random.uniform(key, (hp.draws, length))
    return noise < at.astype(np.float32)[:, None]

  masked = rng.per_row(key, row_R, of_row)
  weight = jnp.asarray(hp.draws * weight / at, jnp.float32)
  return masking.per_copy(masked, jnp.broadcast_to(weight, masked.shape[:2]))


def loss(now: ViewLogp, masks: Masks, batch: TrainBatch, hp: Config) -> tuple:
  """Returns (mean over rows, per token, and metrics)."""
  value, metrics = espo.sequence_loss(now, masks, batch, hp)
  return value / now.logp.shape[-1], metrics


OBJECTIVE = Objective(Config, espo.wants, draw, shared.weigh_rows, loss)
