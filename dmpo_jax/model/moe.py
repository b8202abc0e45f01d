"""Mixture of experts: where a token is sent, and what the experts make of it.

No expert drops a token. A token's experts depend on its own state alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmpo_jax import types as t
from dmpo_jax.model.presets import ModelConfig


class Routed(NamedTuple):
  """Where tokens were sent, by layer with experts."""

  experts: t.IntNRTX  # int16; the best first
  load: t.FloatNRE  # tokens of a row that were sent to an expert
  mass: (
    t.FloatNRE
  )  # sums over a row's tokens of the shares of the scores, which sum to 1


class Stack(NamedTuple):
  """A linear of every expert, and its adapter."""

  kernel: t.Array  # (E, D, F)
  a: t.Array | None = None  # (E, D, A)
  b: t.Array | None = None  # (E, A, F)


# --- the router


def choose(
  cfg: ModelConfig,
  logits_RxTxE: t.Array,
  bias_E: t.Array | None,
  routes_RxTxX: t.Array | None,
) -> tuple[t.Array, t.Array, t.Array]:
  """Returns the experts of each token, their weights, and the scores of all.

  Experts come best first; of two with equal scores the lower number does. Where routes
  are given and not -1 they are the experts, and the weights are by this forward's own
  scores of them.
  """
  if cfg.router == 'sigmoid':
    scores = jax.nn.sigmoid(logits_RxTxE)
  else:
    scores = jax.nn.softmax(logits_RxTxE, axis=-1)
  choice = scores if bias_E is None else scores + bias_E[None, None]
  weigh = choice if cfg.router_bias == 'weight' else scores
  _, chosen = jax.lax.top_k(best_groups(cfg, choice), cfg.experts_per_token)
  if routes_RxTxX is not None:
    chosen = jnp.where(routes_RxTxX < 0, chosen, routes_RxTxX.astype(chosen.dtype))
  weights = jnp.take_along_axis(weigh, chosen, axis=-1)
  if cfg.router_norm and cfg.experts_per_token > 1:
    weights /= jnp.sum(weights, axis=-1, keepdims=True) + 1e-20
  return chosen, weights * cfg.router_scale, scores


def best_groups(cfg: ModelConfig, choice_RxTxE: t.Array) -> t.Array:
  """Sets experts to -inf that are not in a token's best groups."""
  if cfg.router_groups_kept == cfg.router_groups:
    return choice_RxTxE
  shape = choice_RxTxE.shape
  grouped = choice_RxTxE.reshape(*shape[:-1], cfg.router_groups, -1)
  score = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
  _, best = jax.lax.top_k(score, cfg.router_groups_kept)
  kept = jnp.any(jax.nn.one_hot(best, cfg.router_groups, dtype=bool), axis=-2)
  return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(shape)


def routed_of(
  cfg: ModelConfig, scores: t.Array, chosen: t.Array, counted: t.BoolRT | None
) -> Routed:
  """Returns where one layer's tokens were sent; the load is of the counted tokens."""
  sent = jnp.any(jax.nn.one_hot(chosen, cfg.experts, dtype=bool), axis=-2)
  shares = scores / jnp.sum(scores, axis=-1, keepdims=True)
  if counted is not None:
    sent, shares = (jnp.where(counted[..., None], x, 0) for x in (sent, shares))
  load, mass = (jnp.sum(x.astype(jnp.float32), axis=1) for x in (sent, shares))
  return Routed(chosen.astype(jnp.int16), load, mass)


def balance_loss(cfg: ModelConfig, load_NxE: t.Array, mass_NxE: t.Array) -> t.Array:
  """Returns the load-balance loss of each layer: E Σ_e f_e p_e (Switch Transformer).

  load_NxE, mass_NxE: sums of `Routed` over all rows. f_e is the number of times that
  tokens were sent to e, p_e its mean share of the scores. A layer in balance has the
  value experts_per_token. Gradients flow through the mass alone.
  """
  tokens = jnp.sum(mass_NxE, axis=-1, keepdims=True)
  tokens = jnp.maximum(jax.lax.stop_gradient(tokens), 1.0)
  load = jax.lax.stop_gradient(load_NxE) / tokens
  return cfg.experts * jnp.sum(load * mass_NxE / tokens, axis=-1)


# --- the experts


class Dense:
  """Every expert sees every token: the reference, and the fastest for few experts."""

  def __init__(self, cfg: ModelConfig, chosen_TxX: t.Array):
    self.experts, self.chosen = cfg.experts, chosen_TxX

  def send(self, x_Tx: t.Array) -> t.Array:
    return jnp.broadcast_to(x_Tx[None], (self.experts, *x_Tx.shape))

  def expert(self, count: int) -> t.Array:
    return jnp.broadcast_to(jnp.arange(self.experts)[:, None], (self.experts, count))

  def product(self, x_ExTxD: t.Array, kernel_ExDxF: t.Array) -> t.Array:
    return jnp.einsum('etd,edf->etf', x_ExTxD, kernel_ExDxF)

  def gather(self, y_ExTxD: t.Array, weights_TxX: t.Array) -> t.Array:
    one_hot = jax.nn.one_hot(self.chosen, self.experts, dtype=jnp.float32)
    of_expert = jnp.sum(one_hot * weights_TxX[..., None], axis=1)
    return jnp.sum(y_ExTxD.astype(jnp.float32) * of_expert.T[..., None], axis=0)


class Ragged:
  """Tokens sorted by expert, one `ragged_dot` for all experts."""

  def __init__(self, cfg: ModelConfig, chosen_TxX: t.Array):
    flat = chosen_TxX.reshape(-1)
    self.order = jnp.argsort(flat, stable=True)
    self.place = jnp.argsort(self.order)  # of a choice among the sorted ones
    self.sorted, self.each = flat[self.order], chosen_TxX.shape[1]
    self.sizes = jnp.bincount(flat, length=cfg.experts).astype(jnp.int32)

  def send(self, x_Tx: t.Array) -> t.Array:
    return x_Tx[self.order // self.each]

  def product(self, x_YxD: t.Array, kernel_ExDxF: t.Array) -> t.Array:
    return jax.lax.ragged_dot(x_YxD, kernel_ExDxF, self.sizes)

  def gather(self, y_YxD: t.Array, weights_TxX: t.Array) -> t.Array:
    y = y_YxD[self.place].reshape(*weights_TxX.shape, -1).astype(jnp.float32)
    return jnp.sum(y * weights_TxX[..., None], axis=1)


KERNELS = {'dense': Dense, 'ragged': Ragged}


def experts(
  cfg: ModelConfig,
  stacks: dict[str, Stack],
  x_RxTxD: t.Array,
  chosen_RxTxX: t.Array,
  weights_RxTxX: t.Array,
  keys_RxT: t.KeyRT | None = None,
) -> t.Array:
  """Returns the weighted sum of what each token's experts make of it.

  stacks: by name in presets.EXPERTS. Sums in float32; the result has x's dtype.
  """
  x, chosen, weights = (
    z.reshape(-1, z.shape[-1]) for z in (x_RxTxD, chosen_RxTxX, weights_RxTxX)
  )
  form = KERNELS[cfg.expert_kernel](cfg, chosen)

  def linear(name: str, z: t.Array) -> t.Array:
    stack = stacks[name]
    y = form.product(z, stack.kernel.astype(z.dtype))
    if stack.a is None or stack.b is None:
      return y
    low = jnp.dtype(cfg.lora_dtype)
    z = form.product(z.astype(low), stack.a.astype(low))
    z = form.product(z, stack.b.astype(low)) * (cfg.lora_alpha / cfg.lora_rank)
    return y + z.astype(y.dtype)

  sent = form.send(x)
  y = jax.nn.silu(linear('experts_gate', sent)) * linear('experts_up', sent)
  y = form.gather(linear('experts_down', y), weights)
  return y.astype(x_RxTxD.dtype).reshape(x_RxTxD.shape)
