"""Tiny mixtures of experts in the files of three families, for tests.

`FAMILIES` has the config.json with which official_moe.npz was made; its weights are
random numbers, drawn here again from their seeds.
"""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

GOLDEN = np.load(pathlib.Path(__file__).with_name('official_moe.npz'))
VOCAB, MASK, EOS = 320, 301, 298
COMMON = dict(
  hidden_act='silu', hidden_size=64, initializer_range=0.02,
  max_position_embeddings=256, num_attention_heads=4, num_experts=16,
  num_experts_per_tok=4, num_hidden_layers=3, num_key_value_heads=2,
  output_router_logits=False, rope_scaling=None, tie_word_embeddings=False,
  torch_dtype='float32', use_cache=False, vocab_size=VOCAB, pad_token_id=EOS,
)  # fmt: skip
# family -> (config.json, seed of the weights)
FAMILIES = {
  'llada2': (
    COMMON
    | dict(
      architectures=['LLaDA2MoeModelLM'], first_k_dense_replace=1,
      head_dim=24, intermediate_size=160, model_type='llada2_moe',
      moe_intermediate_size=32, moe_router_enable_expert_bias=True, n_group=4,
      norm_topk_prob=True, num_shared_experts=1, partial_rotary_factor=0.5,
      rms_norm_eps=1e-6, rope_theta=600000, rotary_dim=12, routed_scaling_factor=2.5,
      router_dtype='fp32', score_function='sigmoid', sliding_window=4096, topk_group=2,
      use_bias=False, use_qk_norm=True, use_qkv_bias=False, use_rmsnorm=True,
      use_sliding_window=False, using_split_qkv_in_self_attention=False,
    ),
    200,
  ),
  'lladamoe': (
    COMMON
    | dict(
      architectures=['LLaDAMoEModelLM'], attention_bias=False, clip_qkv=None,
      dense_intermediate_size=160, eos_token_id=EOS, expert_intermediate_size=32,
      model_type='lladamoe', moe_layer_freq=[0, 1, 1],
      moe_router_enable_expert_bias=False, moe_router_score_function='softmax',
      norm_topk_prob=None, partial_rotary_factor=1, qk_layernorm=True,
      rms_norm_eps=1e-5, rope_theta=50000, routed_scaling_factor=1,
      router_aux_loss_coef=0.01, router_num_group=None, router_topk_group=None,
      shared_expert_intermediate_size=None,
    ),
    300,
  ),
  'sdar_moe': (
    COMMON
    | dict(
      architectures=['SDARMoeForCausalLM'], attention_bias=False, decoder_sparse_step=1,
      eos_token_id=EOS, head_dim=24, intermediate_size=160, max_window_layers=3,
      mlp_only_layers=[], model_type='sdar_moe', moe_intermediate_size=32,
      norm_topk_prob=True, rms_norm_eps=1e-6, rope_theta=1e6,
      router_aux_loss_coef=0.001, sliding_window=None, use_sliding_window=False,
    ),
    400,
  ),
}  # fmt: skip


def dense_layers(c):
  """Layers without experts, by the fields of the three families."""
  count, listed = c['num_hidden_layers'], c.get('mlp_only_layers') or ()
  freq, step = c.get('moe_layer_freq', [1] * count), c.get('decoder_sparse_step', 1)
  first = c.get('first_k_dense_replace', 0)
  return {
    i for i in range(count) if i in listed or not freq[i] or (i + 1) % step or i < first
  }


def mlp_shapes(c, dense):
  """{name: shape} of what a layer has in place of an MLP, or of the MLP."""
  kind, width = c['model_type'], c['hidden_size']
  mlp = lambda name, size: {
    f'{name}.gate_proj.weight': (size, width),
    f'{name}.up_proj.weight': (size, width),
    f'{name}.down_proj.weight': (width, size),
  }
  if dense:
    return mlp('mlp', c.get('intermediate_size') or c['dense_intermediate_size'])
  size = c.get('moe_intermediate_size') or c['expert_intermediate_size']
  count, out = c['num_experts'], {'mlp.gate.weight': (c['num_experts'], width)}
  if kind.startswith('llada2'):
    out['mlp.gate.expert_bias'] = (count,)
    if shared := c['num_shared_experts']:
      out |= mlp('mlp.shared_experts', shared * size)
  elif c.get('moe_router_enable_expert_bias'):
    out['mlp.expert_bias'] = (count,)
  if shared := c.get('shared_expert_intermediate_size'):
    out |= mlp('shared_expert', shared)
  for i in range(count):
    out |= mlp(f'mlp.experts.{i}', size)
  return out


def attention_shapes(c):
  """{name: shape} of a layer's attention."""
  heads, kv, width = (
    c[x] for x in ('num_attention_heads', 'num_key_value_heads', 'hidden_size')
  )
  dim = c.get('head_dim', width // heads)
  if c['model_type'].startswith('llada2'):
    rows, bias = (heads + 2 * kv) * dim, c['use_qkv_bias']
    return {
      'attention.query_key_value.weight': (rows, width),
      **({'attention.query_key_value.bias': (rows,)} if bias else {}),
      'attention.dense.weight': (width, heads * dim),
      'attention.query_layernorm.weight': (dim,),
      'attention.key_layernorm.weight': (dim,),
    }
  out = {
    f'self_attn.{name}_proj.weight': (n * dim, width)
    for name, n in (('q', heads), ('k', kv), ('v', kv))
  }
  out['self_attn.o_proj.weight'] = (width, heads * dim)
  if c.get('qk_layernorm', True):
    out |= {f'self_attn.{name}_norm.weight': (dim,) for name in 'qk'}
  return out


def shapes(c):
  """{tensor: shape} as torch has them, for a config.json."""
  width, table = c['hidden_size'], (c['vocab_size'], c['hidden_size'])
  embedding = 'word_embeddings' if c['model_type'][:6] == 'llada2' else 'embed_tokens'
  out = {f'model.{embedding}.weight': table, 'model.norm.weight': (width,)}
  if not c['tie_word_embeddings']:
    out['lm_head.weight'] = table
  for i in range(c['num_hidden_layers']):
    parts = attention_shapes(c) | mlp_shapes(c, i in dense_layers(c))
    parts |= {'input_layernorm.weight': (width,)}
    parts |= {'post_attention_layernorm.weight': (width,)}
    out |= {f'model.layers.{i}.{name}': shape for name, shape in parts.items()}
  return out


def scaled(name, x):
  """Gives a standard normal array the size that a tensor of this name has."""
  if name == 'model.norm.weight':
    return np.exp(x)
  if 'q_norm' in name or 'query_layernorm' in name:
    return 1.4 * np.exp(0.2 * x)
  if 'norm' in name:
    return 1 + 0.2 * x
  if 'embed' in name:
    return 0.5 * x
  if '.v_proj' in name or '.o_proj' in name or '.dense.' in name:
    return 0.3 * x
  if name.endswith('expert_bias'):
    return 0.1 * x
  if '.mlp.' in name and '.experts.' not in name or 'shared_expert' in name:
    return 0.12 * x
  return 0.2 * x


def tensors(family, config=None):
  """Draws the weights in the order of their names, as they were drawn then."""
  own, seed = FAMILIES[family]
  draw, out = np.random.Generator(np.random.PCG64(seed)), {}
  for name, shape in sorted(shapes(config or own).items()):
    x = scaled(name, draw.standard_normal(shape))
    if name == 'lm_head.weight':  # the special tokens are never the most probable
      x[EOS] *= 0.3
      x[MASK:] *= 0.3
    out[name] = x.astype(np.float32)
  return out


def write(folder, family, held=None, **changes):
  """Writes a directory of a family with changes of its config.json; returns its path.

  held: the tensors; None = those of the golden data.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(exist_ok=True)
  config = FAMILIES[family][0] | changes
  added = [{'id': EOS, 'content': '<|endoftext|>'}, {'id': MASK, 'content': '<|mask|>'}]
  for name, value in {
    'config': config,
    'tokenizer': {'added_tokens': added},
    'tokenizer_config': {'eos_token': '<|endoftext|>', 'mask_token': '<|mask|>'},
  }.items():
    (folder / f'{name}.json').write_text(json.dumps(value))
  held = tensors(family, config) if held is None else held
  save_file(held, folder / 'model.safetensors')
  return str(folder)
