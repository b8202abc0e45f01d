"""Mixture of experts: where a token is sent, and what the experts make of it.

No expert drops a token. A token's experts depend on its own state alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dmpo_jax import types as t
from dmpo_jax.model import exchange
from dmpo_jax.model.grouped import OfLayer, grouped
from dmpo_jax.model.lora import dropout
from dmpo_jax.model.presets import EXPERTS, ModelConfig
from dmpo_jax.model.quantize import Kernel, dense

PRODUCT = 'expert_product'  # names what the policy dots of remat keeps


class Routed(NamedTuple):
  """Where tokens were sent, by layer with experts."""

  experts: t.IntNRTX  # int16; the best first
  load: t.FloatNRE  # tokens of a row that were sent to an expert
  mass: (
    t.FloatNRE
  )  # sums over a row's tokens of the shares of the scores, which sum to 1


class Stack(NamedTuple):
  """A linear of every expert, and its adapter."""

  kernel: Kernel | OfLayer  # (E, D, F); quantized ones travel as they are stored
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
  best = lambda x: jax.lax.top_k(best_groups(cfg, x), cfg.experts_per_token)[1]
  chosen = exchange.on_own_rows(best, jax.lax.stop_gradient(choice))
  if routes_RxTxX is not None:
    chosen = jnp.where(routes_RxTxX < 0, chosen, routes_RxTxX.astype(chosen.dtype))
  weights = jnp.take_along_axis(weigh, chosen, axis=-1)
  if cfg.router_norm:
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


def compute_dense(
  cfg: ModelConfig, x: t.Array, choice: Any, stacks: Any, keys: Any, _pieces: int = 1
) -> t.Array:
  """Is an `exchange.Compute` in which every expert sees every token: the reference."""
  chosen, weights = choice
  count = jax.tree.leaves(stacks)[0].shape[0]
  one_hot = jax.nn.one_hot(chosen, count, dtype=jnp.float32)
  of_expert = jnp.sum(one_hot * weights[..., None], axis=1)
  product = lambda z, kernel: jnp.einsum('etd,edf->etf', z, kernel)
  sent = jnp.broadcast_to(x[None], (count, *x.shape))
  y = chain(cfg, product, stacks, sent, keys)
  return jnp.sum(y.astype(jnp.float32) * of_expert.T[..., None], axis=0)


def ragged_rows(
  cfg: ModelConfig, x_QxD: t.Array, sizes_E: t.Array, stacks: Any, keys_Q: Any
) -> t.Array:
  """Runs the experts on rows sorted by expert; rows that are nobody's become zeros."""
  real = (jnp.arange(x_QxD.shape[0]) < jnp.sum(sizes_E))[:, None]
  # A kernel need not write such rows, and what is not a number would reach a gradient.
  product = lambda z, kernel: jnp.where(
    real, PRODUCTS[cfg.expert_kernel](z, kernel, sizes_E), 0
  )
  return chain(cfg, product, stacks, x_QxD, keys_Q)


# (rows sorted by expert (Q, D), kernels (E, D, F), rows of each expert (E,)) -> (Q, F).
# What becomes of rows after the last expert's is left open.
PRODUCTS = {'ragged': grouped}


def chain(
  cfg: ModelConfig, product: Callable, stacks: dict[str, Stack], x: t.Array, keys: Any
) -> t.Array:
  """Runs the experts' MLPs by a product of rows with the kernels of their experts.

  Adapters of all experts of a token drop the same of their inputs: so neither the order
  of the rows nor the number of an expert on its device has a part in it.
  """
  if keys is not None:
    keys = jnp.broadcast_to(keys, x.shape[:-1])

  def linear(name: str, z: t.Array) -> t.Array:
    stack, kernel = stacks[name], stacks[name].kernel
    if not isinstance(kernel, OfLayer):
      kernel = dense(kernel).astype(z.dtype)
    y = checkpoint_name(product(z, kernel), PRODUCT)
    if stack.a is None or stack.b is None:
      return y
    if keys is not None and cfg.lora_dropout:
      rows = z.reshape(1, -1, z.shape[-1]), keys.reshape(1, -1)
      z = dropout(*rows, cfg.lora_dropout, name).reshape(z.shape)
    low = jnp.dtype(cfg.lora_dtype)
    z = product(z.astype(low), stack.a.astype(low))
    z = product(z, stack.b.astype(low)) * (cfg.lora_alpha / cfg.lora_rank)
    return y + z.astype(y.dtype)

  gate, up, down = EXPERTS
  return linear(down, jax.nn.silu(linear(gate, x)) * linear(up, x))


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
  compute = partial(exchange.compute_sorted, partial(ragged_rows, cfg))
  if cfg.expert_kernel == 'dense':
    compute = partial(compute_dense, cfg)
  choice = chosen_RxTxX, weights_RxTxX
  y = exchange.routed(compute, x_RxTxD, choice, stacks, keys_RxT)
  return y.astype(x_RxTxD.dtype)
