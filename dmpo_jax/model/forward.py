"""Functions that run the network and say for which position a state predicts.

`params` is the dict of Flax collections: {'params': ...} for a plain model, and
{'params': ..., 'lora': ...} with adapters. Leaving 'lora' out gives the base,
which is the reference policy and costs no second copy.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dmpo_jax import types as t
from dmpo_jax.model.attention import annealed_mask, attention_mask, positions_of
from dmpo_jax.model.law import without_mask
from dmpo_jax.model.packed import Packed
from dmpo_jax.model.presets import ModelConfig
from dmpo_jax.model.transformer import Cache, Inputs, Transformer


def init(cfg: ModelConfig, key: t.KeyScalar) -> t.Params:
  """Draws fresh {'params': ...}, with 'lora' where cfg.lora_rank > 0."""
  token = jnp.zeros((1, 1), jnp.int32)
  key_params, key_lora = jax.random.split(key)
  keys = {'params': key_params, 'lora': key_lora}
  return dict(Transformer(cfg).init(keys, Inputs(token, token)))


def states(
  cfg: ModelConfig, params: t.Params, inputs: Inputs, keep: bool = False
) -> tuple[t.FloatRTD, Any]:
  """Returns the last hidden states as the network gives them, and its cache.

  A family that shifts is not undone here. keep=False returns None for the cache. With
  cfg.keep_routes it is `Kept`: here, and in each function below that returns a cache.
  """
  out: Any = Transformer(cfg, keep).apply(params, inputs, method=Transformer.hidden)
  return out


def hidden(
  cfg: ModelConfig,
  params: t.Params,
  tokens_RxS: t.IntRS,
  valid_RxS: t.BoolRS | None = None,
  keep: bool = False,
  dropout_R: t.KeyR | None = None,
  routes: t.IntNRTX | None = None,
) -> tuple[t.FloatRSD, Any]:
  """Returns the last hidden states; index i predicts position i in every family.

  valid_RxS is False on padding; None means that all tokens are real. keep returns
  the cache as well. dropout_R has a key for each row; without it cfg.lora_dropout
  has no effect. routes: see `Inputs`. ValueError if the shapes differ.
  """
  valid = jnp.ones_like(tokens_RxS, bool) if valid_RxS is None else valid_RxS
  if valid.shape != tokens_RxS.shape:
    raise ValueError(
      f'valid has shape {valid.shape}, tokens {tokens_RxS.shape}: they must be equal'
    )
  positions = positions_of(valid)
  mask = attention_mask(cfg, valid_RxS, positions, positions)
  inputs = Inputs(tokens_RxS, positions, mask, None, None, dropout_R, routes, valid)
  h, cache = states(cfg, params, inputs, keep)
  return unshift(h, valid) if cfg.shift else h, cache


def annealed(
  cfg: ModelConfig,
  params: t.Params,
  tokens_RxS: t.IntRS,
  valid_RxS: t.BoolRS | None,
  dropout_R: t.KeyR | None,
  future: t.Future,
) -> tuple[t.FloatRSD, Any]:
  """Returns what `hidden` does, of tokens that see a share of later ones."""
  valid = jnp.ones_like(tokens_RxS, bool) if valid_RxS is None else valid_RxS
  positions = positions_of(valid)
  mask = annealed_mask(future, positions, valid[:, None, None])
  inputs = Inputs(tokens_RxS, positions, mask, dropout=dropout_R, counted=valid)
  h, kept = states(cfg, params, inputs)
  return unshift(h, valid) if cfg.shift else h, kept


def unshift(h_RxSxD: t.FloatRSD, valid_RxS: t.BoolRS) -> t.FloatRSD:
  """Moves states one position right; the first real token keeps its own (Dream)."""
  previous = jnp.concatenate([h_RxSxD[:, :1], h_RxSxD[:, :-1]], axis=1)
  real = jnp.concatenate([jnp.zeros_like(valid_RxS[:, :1]), valid_RxS[:, :-1]], axis=1)
  return jnp.where(real[..., None], previous, h_RxSxD)


def head(cfg: ModelConfig, params: t.Params, hidden: t.FloatXD) -> t.FloatXV:
  """Returns float32 logits of hidden states."""
  return Transformer(cfg).apply(params, hidden, method=Transformer.logits)


def full_logits(
  cfg: ModelConfig,
  params: t.Params,
  tokens_RxS: t.IntRS,
  valid_RxS: t.BoolRS | None = None,
) -> t.FloatRSV:
  """Returns float32 logits: index i predicts position i in every family.

  valid_RxS is False on padding, which is not attended and moves no position.
  """
  return head(cfg, params, hidden(cfg, params, tokens_RxS, valid_RxS)[0])


def window_logits(
  cfg: ModelConfig,
  params: t.Params,
  tokens_RxS: t.IntRS,
  valid_RxS: t.BoolRS,
  start: int | t.IntScalar | t.IntR,
  width: int,
  prompt: int | t.IntR = 0,
  guidance: float = 0.0,
  keep: bool = False,
  cache: Cache | None = None,
  span: int = 0,
  as_states: bool = False,
  routes: t.IntNRTX | None = None,
) -> tuple[t.Array, Any]:
  """Returns logits of positions [start, start + width), and the cache.

  The mask token has -inf: no sampler emits it. start may differ between rows
  where there is no cache. guidance > 0 is the scale of classifier-free guidance
  (LLaDA generate.py:81-91), with the first `prompt` tokens masked in a second row.
  With a cache only `span` positions from start on are computed (0 = `width`), and
  the rest is read from it. Where the text ends before, they are its last `span` ones.
  Without a cache `keep` returns one, else None. as_states returns what `logits_of`
  takes instead of the logits. routes: see `Inputs`, of the tokens that are computed.
  """
  if guidance:
    tokens_RxS, valid_RxS = with_blind_rows(cfg, tokens_RxS, valid_RxS, prompt)
  if cache is None:
    h, cache = hidden(cfg, params, tokens_RxS, valid_RxS, keep, routes=routes)
    start_R = jnp.broadcast_to(start, (len(h) // (1 + bool(guidance)),))
    h = windows(h, jnp.repeat(start_R, 1 + bool(guidance)), width)
  else:
    first, size, skip = start - cfg.shift, (span or width) + cfg.shift, 0
    if span:
      last = tokens_RxS.shape[1] - size
      first, skip = jnp.minimum(first, last), jnp.maximum(first - last, 0)
    first_R = jnp.broadcast_to(jnp.int32(first), tokens_RxS.shape[:1])
    args = tokens_RxS, valid_RxS, first_R, size, cache, skip
    h, cache = beside_cache(cfg, params, *args, routes)
    h = jax.lax.dynamic_slice_in_dim(h, skip, width, 1)
  return h if as_states else logits_of(cfg, params, h, guidance), cache


def logits_of(
  cfg: ModelConfig, params: t.Params, h_RxWxD: t.Array, guidance: float = 0.0
) -> t.Array:
  """Returns the logits of windows' states; with guidance from those of 2R rows.

  The mask token has -inf.
  """
  logits = head(cfg, params, h_RxWxD)
  if guidance:
    logits = guided(logits, guidance)
  return without_mask(cfg, logits)


def guided(logits_RxWxV: t.Array, guidance: float) -> t.Array:
  """Returns (R, W, V) of rows and their blind copies, (2R, W, V)."""
  shape = (-1, 2, *logits_RxWxV.shape[1:])
  cond, blind = jnp.moveaxis(logits_RxWxV.reshape(shape), 1, 0)
  return blind + (guidance + 1) * (cond - blind)


def beside_cache(
  cfg: ModelConfig,
  params: t.Params,
  tokens_RxS: t.IntRS,
  valid_RxS: t.BoolRS,
  start_R: t.IntR,
  width: int,
  cache: Cache,
  skip: int | t.IntScalar = 0,
  routes: t.IntNRTX | None = None,
) -> tuple[t.FloatRTD, Any]:
  """Returns states of each row's window [start, start + width), and its new cache.

  The cache that it returns has the window's columns alone. The window sees itself and
  the cache outside it. One of whole attention blocks sees the cache before it, and
  itself up to each token's own block. A family that shifts is not undone. The first
  `skip` tokens of the window are seen as the cache has them. routes: see `Inputs`.
  """
  cut = lambda x: windows(x, start_R, width)
  queries, real = cut(positions_of(valid_RxS)), cut(valid_RxS)
  column = jnp.arange(tokens_RxS.shape[1])[None] - start_R[:, None]
  own = real & (jnp.arange(width)[None] >= skip)
  past, mask = column < skip, own[:, None, None]
  if cfg.block_causal:
    mask = Packed(real, 0, 0, cfg.block_causal).text_mask()
  else:
    past |= column >= width
  past = (valid_RxS & past)[:, None, None]
  inputs = Inputs(cut(tokens_RxS), queries, mask, cache, past, None, routes, real)
  return states(cfg, params, inputs, keep=True)


def with_blind_rows(
  cfg: ModelConfig, tokens_RxS: t.IntRS, valid_RxS: t.BoolRS, prompt: int | t.IntR
) -> tuple[t.Array, t.Array]:
  """Puts behind each row a copy whose prompt is masked, (2R, S) each.

  prompt: its columns, the same in all rows or one number a row. A row and its copy are
  neighbours, so both are on the same device.
  """
  blank = jnp.arange(tokens_RxS.shape[1])[None] < jnp.reshape(prompt, (-1, 1))
  blind = jnp.where(blank, cfg.mask_id, tokens_RxS)
  tokens = jnp.stack([tokens_RxS, blind], 1).reshape(-1, tokens_RxS.shape[1])
  return tokens, jnp.repeat(valid_RxS, 2, axis=0)


def windows(x_RxSx: t.Array, start_R: t.IntR, width: int) -> t.Array:
  """Cuts [start, start + width) out of each row's second axis: (R, W, ...)."""
  cut = lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, width)
  return jax.vmap(cut)(x_RxSx, start_R)


def shadow_logits(
  cfg: ModelConfig,
  params: t.Params,
  tokens_RxS: t.IntRS,
  valid_RxS: t.BoolRS,
  start_R: t.IntR,
  width: int,
) -> tuple[t.FloatRWV, t.FloatRWV]:
  """Returns logits of each row's window, and what they are in hindsight (WINO).

  Appends a shadow to the sequence: a mask at each position of the window. A
  shadow sees every token but the one at its own position, so it tells how
  probable that token is given all others. No real token sees a shadow:

                   sees real tokens           sees shadows
    real token     by the attention mask      none
    shadow         ... but its own position   all

  In a family that shifts the output at i - 1 predicts token i. There a shadow
  repeats the token before its own position and stands at i - 1, and does not see
  the shadow that repeats its own token. Both logits have -inf for the mask token.
  """
  size, shift = tokens_RxS.shape[1], int(cfg.shift)
  positions = positions_of(valid_RxS)
  queries = jnp.concatenate([positions, windows(positions, start_R - shift, width)], 1)
  if shift:
    shadow = windows(tokens_RxS, start_R - 1, width)
  else:
    shadow = jnp.full((len(start_R), width), cfg.mask_id, jnp.int32)
  mask = attention_mask(cfg, valid_RxS, positions, queries)
  mask = shadow_mask(mask, start_R, width, size, shift)
  inputs = Inputs(jnp.concatenate([tokens_RxS, shadow], 1), queries, mask)
  h, _ = states(cfg, params, inputs)
  real, hindsight = windows(h[:, :size], start_R - shift, width), h[:, size:]
  return tuple(without_mask(cfg, head(cfg, params, x)) for x in (real, hindsight))


def shadow_mask(
  mask: t.BoolR1TS, start_R: t.IntR, width: int, size: int, shift: int
) -> t.Array:
  """Extends (R, 1, 1 or S + W, S) to (R, 1, S + W, S + W): see `shadow_logits`."""
  rows, total = len(start_R), size + width
  window = start_R[:, None] + jnp.arange(width)[None]
  real = jnp.broadcast_to(jnp.arange(size)[None], (rows, size))
  # The token that a column shows (-1: none), and the one hidden from a query
  # (-2: none).
  shown = jnp.concatenate([real, window - 1 if shift else jnp.full_like(window, -1)], 1)
  hidden = jnp.concatenate([jnp.full_like(real, -2), window], 1)
  is_shadow = jnp.arange(total) >= size
  mask = jnp.broadcast_to(mask[:, 0], (rows, total, size))
  seen = jnp.broadcast_to(is_shadow[None, :, None], (rows, total, width))
  mask = jnp.concatenate([mask, seen], axis=2)
  return (mask & (shown[:, None, :] != hidden[:, :, None]))[:, None]


def count_params(params: t.Params) -> int:
  """Counts the numbers in a tree of arrays or shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
