# ruff: noqa: F401  this file re-exports
"""A transformer that predicts masked tokens, for every supported family.

RMSNorm, RoPE, SwiGLU; MHA or GQA; optional q/k/v bias and q/k norm; tied or
untied head; predictions in place (LLaDA, SDAR) or shifted by one (Dream);
attention over the whole text (LLaDA, Dream) or up to a token's own block (SDAR).

  presets      ModelConfig and the sizes that have a name
  attention    positions, masks, RoPE, kernels
  packed       the mask of a text and its noisy copies in one row
  canvas       where the completion of a block-causal model begins
  lora         adapters, and products of a frozen base
  moe          routers, and experts in place of a dense MLP
  quantize     8 and 4 bit kernels of a frozen base
  transformer  the Flax modules
  forward      hidden states and logits of whole texts and of windows
  law          the law that tokens are sampled from
"""

from dmpo_jax.model.attention import (
  ATTENTION,
  annealed_mask,
  attend,
  attend_cudnn,
  attend_splash,
  attention_mask,
  positions_of,
)
from dmpo_jax.model.canvas import Aligned, align
from dmpo_jax.model.forward import (
  annealed,
  beside_cache,
  count_params,
  full_logits,
  guided,
  head,
  hidden,
  init,
  logits_of,
  shadow_logits,
  states,
  unshift,
  window_logits,
  windows,
  with_blind_rows,
)
from dmpo_jax.model.law import is_stop, logp_of, sampling_logits, stops, without_mask
from dmpo_jax.model.lora import matmul, matmul_frozen, merge
from dmpo_jax.model.moe import Routed, balance_loss
from dmpo_jax.model.packed import Packed
from dmpo_jax.model.presets import (
  EXPERTS,
  LINEARS,
  LORA_TARGETS,
  PRESETS,
  ModelConfig,
  Run,
  layer_runs,
  linears_of,
)
from dmpo_jax.model.quantize import QUANT, dense, quantize
from dmpo_jax.model.transformer import (
  REMAT,
  Cache,
  Inputs,
  Kept,
  constrain,
  on_own_rows,
)
