"""The small files of published directories are accepted, or refused for a reason.

The fields are those of the releases: JetLM/SDAR-{1.7B,4B,8B,30B-A3B}-Chat and the
copy in OpenMOSS/DiRL, Efficient-Large-Model/Fast_dLLM_v2_7B,
Dream-org/Dream-v0-Instruct-7B,
GSAI-ML/LLaDA-8B-Instruct in DARE's copy, inclusionAI/LLaDA-MoE-7B-A1B, and
GSAI-ML/iLLaDA-8B-Base as its modelling file reads them. test_experts.py has LLaDA2.0
and SDAR-30B-A3B.
"""

import json

import pytest

from dmpo_jax import data, hf, model

QWEN = dict(
  attention_dropout=0.0, bos_token_id=151643, hidden_act='silu', initializer_range=0.02,
  max_position_embeddings=32768, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1e6,
  sliding_window=None, tie_word_embeddings=False, torch_dtype='bfloat16',
  use_cache=False, use_sliding_window=False,
)  # fmt: skip
SWITCHES = dict(
  attn_implementation='flex_attention', debug=False, ep_size=1, micro_forward=False,
  fuse_cross_entropy=True, skip_checkpoint=False, use_deepep=False,
)  # fmt: skip
SDAR = QWEN | SWITCHES | dict(
  architectures=['SDARForCausalLM'], attention_bias=False, block_size=4,
  eos_token_id=151643, head_dim=128, hidden_size=2560, intermediate_size=9728,
  mask_token_id=151669, max_window_layers=36, model_type='sdar',
  num_attention_heads=32, num_hidden_layers=36, num_key_value_heads=8,
  vocab_size=151936,
)  # fmt: skip
FAST = QWEN | dict(
  architectures=['Fast_dLLM_QwenForCausalLM'], bd_size=32, conplemenrary_mask=True,
  eos_token_id=151645, hidden_size=3584, intermediate_size=18944,
  layer_types=['full_attention'] * 28, max_window_layers=28,
  model_type='Fast_dLLM_Qwen', num_attention_heads=28, num_hidden_layers=28,
  num_key_value_heads=4, pad_token_id=151645, vocab_size=152064,
)  # fmt: skip
DREAM = QWEN | dict(
  eos_token_id=151643, hidden_size=3584, intermediate_size=18944,
  mask_token_id=151666, max_position_embeddings=131072, max_window_layers=28,
  model_type='Dream', num_attention_heads=28, num_hidden_layers=28,
  num_key_value_heads=4, pad_token_id=151643, use_mrope=False, vocab_size=152064,
  attn_implementation='flash_attention_2',
)  # fmt: skip
LLADA = dict(
  activation_type='silu', alibi=False, alibi_bias_max=8.0, attention_dropout=0.0,
  attention_layer_norm=False, attention_layer_norm_with_affine=True,
  bias_for_layer_norm=False, block_group_size=1, block_type='llama', d_model=4096,
  embedding_dropout=0.0, embedding_size=126464, eos_token_id=126081,
  flash_attention=True, flash_attn_varlen=True, include_bias=False,
  include_qkv_bias=False, init_cutoff_factor=None, init_device='meta',
  init_fn='mitchell', init_std=0.02, input_emb_norm=False, layer_norm_type='rms',
  layer_norm_with_affine=True, mask_token_id=126336, max_sequence_length=4096,
  mlp_hidden_size=12288, mlp_ratio=4, model_type='llada', multi_query_attention=None,
  n_heads=32, n_kv_heads=32, n_layers=32, pad_token_id=126081, precision='amp_bf16',
  residual_dropout=0.0, rms_norm_eps=1e-5, rope=True, rope_full_precision=True,
  rope_theta=500000.0, scale_logits=False, vocab_size=126464, weight_tying=False,
)  # fmt: skip
A2D = QWEN | dict(
  attention_bias=False, eos_token_id=151645, head_dim=128, hidden_size=1024,
  intermediate_size=3072, layer_types=['full_attention'] * 28, max_window_layers=28,
  max_position_embeddings=40960, model_type='a2d-qwen3', num_attention_heads=16,
  num_hidden_layers=28, num_key_value_heads=8, pad_token_id=151643,
  tie_word_embeddings=True, vocab_size=151936,
)  # fmt: skip
ILLADA = QWEN | dict(
  architectures=['ILLaDAForCausalLM'], attention_bias=False, eos_token_id=2,
  hidden_size=4096, intermediate_size=14336, layer_norm_eps=None, mlp_bias=False,
  max_position_embeddings=8192, model_type='illada', num_attention_heads=32,
  num_hidden_layers=32, num_key_value_heads=8, pad_token_id=0, resid_pdrop=0.0,
  rope_scaling={'type': 'default', 'factor': 1.0}, tie_word_embeddings=True,
  vocab_size=155136,
)  # fmt: skip
LLADA_MOE = dict(
  architectures=['LLaDAMoEModelLM'], attention_bias=False, attention_dropout=0.0,
  clip_qkv=None, dense_intermediate_size=8192, eos_token_id=156892,
  expert_intermediate_size=1024, hidden_act='silu', hidden_size=2048,
  initializer_range=0.02, max_position_embeddings=8192, model_type='llada',
  moe_layer_freq=[1] * 16, moe_router_enable_expert_bias=False,
  moe_router_score_function='softmax', norm_topk_prob=None, num_attention_heads=16,
  num_experts=64, num_experts_per_tok=8, num_hidden_layers=16, num_key_value_heads=16,
  pad_token_id=156892, partial_rotary_factor=1, qk_layernorm=True, rms_norm_eps=1e-5,
  rope_scaling=None, rope_theta=50000, routed_scaling_factor=1,
  router_aux_loss_coef=0.01, router_num_group=None, router_topk_group=None,
  shared_expert_intermediate_size=None, tie_word_embeddings=False, vocab_size=157184,
)  # fmt: skip
EXPERTS = dict(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768)
CHAT = {'eos_token_id': [151645, 151643], 'temperature': 0.6, 'top_k': 20}
TURNS = {'<|endoftext|>': 151643, '<|im_start|>': 151644, '<|im_end|>': 151645}
MASK = lambda content, i: {'added_tokens_decoder': {str(i): {'content': content}}}


def folder(path, config, **others):
  """Writes config.json and others.json."""
  for name, value in {'config': config, **others}.items():
    (path / f'{name}.json').write_text(json.dumps(value))
  return str(path)


# directory -> (config.json, other files, what is read)
ACCEPTED = {
  'SDAR-4B-Chat': (
    SDAR,
    dict(
      generation_config=CHAT,
      added_tokens={**TURNS, '<MASK>': 151669},
      tokenizer_config={
        'eos_token': '<|endoftext|>',
        'mask_token': '<|MASK|>',
        **MASK('<|MASK|>', 151669),
      },
    ),
    dict(model.PRESETS['sdar_4b'], tied=False),
  ),
  'SDAR-1.7B-Chat': (
    SDAR | dict(hidden_size=2048, intermediate_size=6144, num_attention_heads=16,
                num_hidden_layers=28),
    dict(generation_config=CHAT),
    model.PRESETS['sdar_1_7b'],
  ),
  'DiRL-8B': (  # without generation_config.json its chat tokens tell the end of a turn
    SDAR | dict(hidden_size=4096, intermediate_size=12288),
    dict(added_tokens=TURNS),
    model.PRESETS['sdar_8b'],
  ),
  'SDAR as it first lay on the hub': (  # the mask stands in the tokenizer's files
    {k: v for k, v in SDAR.items() if k != 'mask_token_id'},
    dict(generation_config=CHAT, tokenizer_config=MASK('<|MASK|>', 151669)),
    model.PRESETS['sdar_4b'],
  ),
  'Fast_dLLM_v2_7B': (
    FAST,
    dict(
      generation_config=CHAT,
      added_tokens={**TURNS, '|<MASK>|': 151665},
      tokenizer_config={'eos_token': '<|im_end|>', **MASK('|<MASK>|', 151665)},
    ),
    model.PRESETS['fast_dllm_7b'],
  ),
  'Fast-dLLM v2 without its tokenizer': (FAST, {}, dict(mask_id=151665)),
  'Dream-v0-Instruct-7B': (
    DREAM,
    dict(generation_config={'eos_token_id': 151643, 'mask_token_id': None}),
    dict(model.PRESETS['dream_7b'], block_causal=0, stop_ids=()),
  ),
  'LLaDA-8B-Instruct': (
    LLADA,
    dict(generation_config={'eos_token_id': 126081}),
    dict(model.PRESETS['llada_8b'], block_causal=0, stop_ids=()),
  ),
  'LLaDA-MoE-7B-A1B-Instruct': (  # of type llada on the hub, lladamoe in dllm
    LLADA_MOE,
    dict(tokenizer=dict(added_tokens=[{'content': '<|role_end|>', 'id': 156900}])),
    dict(model.PRESETS['lladamoe_7b'], block_causal=0, stop_ids=(156900,)),
  ),
  'iLLaDA-8B-Base': (
    ILLADA,
    dict(added_tokens={'<[MASK]>': 5}),
    dict(mask_id=5, kv_heads=8, mlp=14336, tied=True, block_causal=0, eps=1e-6),
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', ACCEPTED)
def test_published_directories_are_read(name, tmp_path, caplog):
  """Sizes, law, block and special ids; one warning at most, about idle fields."""
  config, others, want = ACCEPTED[name]
  found = hf.read_config(folder(tmp_path, config, **others))
  assert {k: found.get(k, getattr(model.ModelConfig, k, None)) for k in want} == want
  assert len(caplog.records) <= 1
  if config['model_type'] == 'sdar':
    assert all(x in caplog.text for x in ('use_deepep', 'fuse_cross_entropy'))
  else:
    assert 'is ignored' not in caplog.text or config in (FAST, LLADA, ILLADA)


BLOCK = 'block_size is missing: set model.attention_block'
REFUSED = {
  'TraDo without block_size': (
    {k: v for k, v in SDAR.items() if k != 'block_size'},
    BLOCK,
  ),
  'A2D, mdlm or bd3lm': (A2D | {'mask_token_id': 151669}, BLOCK),
  'Qwen3-30B-A3B': (QWEN | EXPERTS | {'model_type': 'qwen3_moe'}, 'experts'),
  'LLaDA with experts': (LLADA | EXPERTS, 'experts'),
  'SDAR with experts': (SDAR | EXPERTS, 'experts'),
  'Nemotron': (QWEN | {'model_type': 'nemotron_labs_diffusion'}, 'not implemented'),
  'iLLaDA with LayerNorm': (ILLADA | {'layer_norm_eps': 1e-5}, 'layer_norm_eps'),
  'a stop id from elsewhere': (SDAR | {'eos_token_id': [151643, 200000]}, '200000'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_others_are_refused_with_the_reason(name, tmp_path):
  config, reason = REFUSED[name]
  with pytest.raises(ValueError, match=reason) as error:
    hf.read_config(folder(tmp_path, config))
  assert '\n' not in str(error.value)
  if reason == 'experts':
    assert 'written' not in str(error.value) and 'unknown' not in str(error.value)


def test_a_told_block_is_taken_and_compared(tmp_path, caplog):
  """A warning says where it is not what the files say."""
  block = lambda config, *told: hf.read_config(folder(tmp_path, config), *told)[
    'block_causal'
  ]
  a2d = A2D | {'mask_token_id': 151669, '_experts_implementation': 'eager'}
  assert block(a2d, 32) == 32 and block(a2d, 0) == 0
  assert 'attention_block' not in caplog.text
  assert block(SDAR, 8) == 8 and 'blocks of 4' in caplog.text
  assert block(DREAM, 4) == 4 and 'the whole text' in caplog.text


@pytest.mark.parametrize('stops', [[151643, 'x'], [[1]], 151936, -1, [None]])
def test_stop_ids_are_tokens(stops, tmp_path):
  path = folder(tmp_path, SDAR, generation_config={'eos_token_id': stops})
  with pytest.raises(ValueError, match='eos_token_id.*generation_config.json'):
    hf.read_config(path)


def test_the_tokenizers_end_of_turn_is_the_models(tmp_path):
  """Completions end where data.stop_ids and the model's stops agree."""
  tokenizer = data.char_tokenizer()
  tokenizer.add_tokens(['<|im_end|>'], special_tokens=True)
  tokenizer.save_pretrained(tmp_path)
  vocab = len(tokenizer)
  config = SDAR | dict(
    vocab_size=vocab, eos_token_id=2, mask_token_id=1, bos_token_id=None
  )
  found = hf.read_config(folder(tmp_path, config))
  ends = {found['eos_id'], *found['stop_ids']}
  assert ends == set(data.stop_ids(tokenizer)) and len(ends) == 2
