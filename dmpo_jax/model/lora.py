"""Low-rank adapters (LoRA), and the products of a base that does not train."""

import zlib
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmpo_jax.model.presets import ModelConfig
from dmpo_jax.types import Array, FloatDF, FloatRTD, FloatXD, FloatXF, KeyRT


def factors(
  module: nn.Module, cfg: ModelConfig, shape: tuple[int, ...]
) -> tuple[Array, Array]:
  """Returns the adapter (a, b) of a kernel of this shape, (D, F) or (E, D, F).

  a and b are float32 variables of `module` in the collection 'lora', initialised as
  PEFT does: a by kaiming_uniform(sqrt 5), b with zeros.
  """
  *stack, inputs, features = shape
  bound = inputs**-0.5
  a = module.variable(
    'lora',
    'a',
    lambda: jax.random.uniform(
      module.make_rng('lora'),
      (*stack, inputs, cfg.lora_rank),
      minval=-bound,
      maxval=bound,
    ),
  )
  b = module.variable('lora', 'b', jnp.zeros, (*stack, cfg.lora_rank, features))
  return a.value, b.value


def adapter(module: nn.Module, cfg: ModelConfig, x: FloatXD, features: int) -> FloatXF:
  """Returns x @ a @ b · alpha / rank, in cfg.lora_dtype, of the adapter of a linear."""
  ab = factors(module, cfg, (x.shape[-1], features))
  x, down, up = (z.astype(cfg.lora_dtype) for z in (x, *ab))
  return (x @ down) @ up * (cfg.lora_alpha / cfg.lora_rank)


def merge(cfg: ModelConfig, kernel: Array, a: Array, b: Array) -> Array:
  """Returns a kernel with its adapter added, in float32, in the kernel's dtype."""
  delta = jnp.matmul(a, b, precision='highest') * (cfg.lora_alpha / cfg.lora_rank)
  return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)


def dropout(x: FloatRTD, keys: KeyRT, rate: float, name: str) -> FloatRTD:
  """Sets a share `rate` of an adapter's input to zero and scales the rest up.

  A token's mask depends on its own key and on the linear's name alone. Two inputs
  share a word of random bits, for the words are what dropout costs. So the rate is
  rounded to 2^-16; the scale has the rounded one, and the mean is exact.
  """
  address, width = zlib.crc32(name.encode()), x.shape[-1]
  kept = min(max(round((1 - rate) * 2**16), 1), 2**16 - 1)

  def drop(token: Array, key: Array) -> Array:
    words = jax.random.bits(jax.random.fold_in(key, address), (-(-width // 2), 1))
    draws = words >> jnp.arange(0, 32, 16, dtype=jnp.uint32)[None] & 0xFFFF
    keep = draws.ravel()[:width] < kept
    return jnp.where(keep, token / (kept / 2**16), 0).astype(token.dtype)

  return jax.vmap(jax.vmap(drop))(x, keys)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: FloatXD, kernel: FloatDF, dtype: type | None = None) -> FloatXF:
  """Returns x @ kernel, (..., D) and (D, F), summed and given in `dtype`.

  The kernel's gradient transposes the narrower of its two operands. JAX's own
  rule always transposes dy. XLA's CPU compiler then computes the elementwise
  operations before dy a second time, in that order: half of an update's time.
  """
  return jnp.matmul(x, kernel, preferred_element_type=dtype)


def matmul_forward(x: FloatXD, kernel: FloatDF, dtype: type | None) -> tuple:
  return matmul(x, kernel, dtype), (x, kernel)


def matmul_backward(dtype: type | None, saved: tuple, dy: FloatXF) -> tuple:
  x, kernel = saved
  dy = dy.astype(x.dtype)
  dx = jax.lax.dot_general(dy, kernel, (((dy.ndim - 1,), (1,)), ((), ())))
  rows_x, rows_dy = (z.reshape(-1, z.shape[-1]) for z in (x, dy))
  if x.shape[-1] <= dy.shape[-1]:
    return dx, rows_x.T @ rows_dy
  return dx, (rows_dy.T @ rows_x).T


matmul.defvjp(matmul_forward, matmul_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_frozen(x: FloatXD, kernel: FloatDF, dtype: type | None = None) -> FloatXF:
  """Returns `matmul` of a kernel that does not train: its gradient is zeros.

  JAX's own rule multiplies float32 cotangents with a bfloat16 kernel, for which
  a GPU makes a float32 copy of it: two GiB for the head of an 8B model.
  """
  return matmul(x, kernel, dtype)


def matmul_frozen_backward(dtype: type | None, saved: tuple, dy: FloatXF) -> tuple:
  x, kernel = saved
  return matmul(dy.astype(x.dtype), kernel.T), jnp.zeros_like(kernel)


matmul_frozen.defvjp(matmul_forward, matmul_frozen_backward)
