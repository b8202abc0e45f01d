"""Reading published checkpoints; each family's format is written by hand here."""

import builtins
import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from safetensors.numpy import save_file

from configs import base
from dmpo_jax import check, data, hf, mesh, model, weights
from dmpo_jax.hf import read

V, D, N, F = 40, 16, 2, 24
MASK, EOS = 33, 30

LLADA = dict(  # every field of the published file
  activation_type='silu',
  alibi=False,
  alibi_bias_max=8.0,
  architectures=['LLaDAModelLM'],
  attention_dropout=0.0,
  attention_layer_norm=False,
  attention_layer_norm_with_affine=True,
  auto_map={
    'AutoConfig': 'configuration_llada.LLaDAConfig',
    'AutoModel': 'modeling_llada.LLaDAModelLM',
  },
  bias_for_layer_norm=False,
  block_group_size=1,
  block_type='llama',
  d_model=D,
  embedding_dropout=0.0,
  embedding_size=V,
  eos_token_id=EOS,
  flash_attention=True,
  flash_attn_varlen=True,
  include_bias=False,
  include_qkv_bias=False,
  init_cutoff_factor=None,
  init_device='meta',
  init_fn='mitchell',
  init_std=0.02,
  input_emb_norm=False,
  layer_norm_type='rms',
  layer_norm_with_affine=True,
  mask_token_id=MASK,
  max_sequence_length=4096,
  mlp_hidden_size=F,
  mlp_ratio=4,
  model_type='llada',
  multi_query_attention=None,
  n_heads=4,
  n_kv_heads=4,
  n_layers=N,
  pad_token_id=EOS,
  precision='amp_bf16',
  residual_dropout=0.0,
  rms_norm_eps=1e-05,
  rope=True,
  rope_full_precision=True,
  rope_theta=500000.0,
  scale_logits=False,
  torch_dtype='bfloat16',
  transformers_version='4.51.2',
  use_cache=False,
  vocab_size=V,
  weight_tying=False,
)
DREAM = dict(
  architectures=['DreamModel'],
  attention_dropout=0.0,
  auto_map={'AutoModel': 'modeling_dream.DreamModel'},
  bos_token_id=EOS,
  eos_token_id=EOS,
  hidden_act='silu',
  hidden_size=D,
  initializer_range=0.02,
  intermediate_size=F,
  mask_token_id=MASK,
  max_position_embeddings=131072,
  max_window_layers=N,
  model_type='Dream',
  num_attention_heads=4,
  num_hidden_layers=N,
  num_key_value_heads=2,
  pad_token_id=EOS,
  rms_norm_eps=1e-06,
  rope_scaling=None,
  rope_theta=1000000.0,
  sliding_window=None,
  tie_word_embeddings=False,
  torch_dtype='bfloat16',
  transformers_version='4.46.2',
  use_cache=True,
  use_mrope=False,
  use_sliding_window=False,
  vocab_size=V,
)
QWEN3 = dict(
  architectures=['A2DQwen3LMHeadModel'],
  attention_bias=False,
  attention_dropout=0.0,
  block_size=0,
  bos_token_id=EOS,
  eos_token_id=EOS,
  head_dim=6,
  hidden_act='silu',
  hidden_size=D,
  initializer_range=0.02,
  intermediate_size=F,
  mask_token_id=MASK,
  max_position_embeddings=32768,
  max_window_layers=N,
  model_type='a2d-qwen3',
  num_attention_heads=4,
  num_hidden_layers=N,
  num_key_value_heads=1,
  rms_norm_eps=1e-06,
  rope_scaling=None,
  rope_theta=1000000,
  sliding_window=None,
  tie_word_embeddings=True,
  torch_dtype='bfloat16',
  use_cache=True,
  use_sliding_window=False,
  vocab_size=V,
)
CONFIGS = {
  'llada': LLADA,
  'llada_gqa': {**LLADA, 'n_kv_heads': 2},
  'dream': DREAM,
  'qwen3': QWEN3,
  'sdar': {
    **QWEN3,
    'model_type': 'sdar',
    'block_size': 4,
    'tie_word_embeddings': False,
    'fuse_cross_entropy': True,
    'use_deepep': False,
  },
  'llama': {
    k: v
    for k, v in {
      **QWEN3,
      'model_type': 'llama',
      'tie_word_embeddings': False,
      'mlp_bias': False,
    }.items()
    if k not in ('head_dim', 'block_size')
  },
}


def shapes(c):
  """{tensor: shape} as torch has them, (out, in), for a config.json."""
  if c['model_type'] == 'llada':
    kv = D // c['n_heads'] * c['n_kv_heads']
    out = {
      'model.transformer.wte.weight': (V, D),
      'model.transformer.ln_f.weight': (D,),
      'model.transformer.ff_out.weight': (V, D),
    }
    for i in range(N):
      block = f'model.transformer.blocks.{i}.'
      out |= {
        block + name + '.weight': shape
        for name, shape in dict(
          attn_norm=(D,),
          ff_norm=(D,),
          q_proj=(D, D),
          k_proj=(kv, D),
          v_proj=(kv, D),
          attn_out=(D, D),
          ff_proj=(F, D),
          up_proj=(F, D),
          ff_out=(D, F),
        ).items()
      }
    return out
  heads, kv = c['num_attention_heads'], c['num_key_value_heads']
  dim = c.get('head_dim', D // heads)
  out = {'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,)}
  if not c['tie_word_embeddings']:
    out['lm_head.weight'] = (V, D)
  for i in range(N):
    layer = f'model.layers.{i}.'
    out |= {
      layer + name + '.weight': shape
      for name, shape in {
        'input_layernorm': (D,),
        'post_attention_layernorm': (D,),
        'self_attn.q_proj': (heads * dim, D),
        'self_attn.k_proj': (kv * dim, D),
        'self_attn.v_proj': (kv * dim, D),
        'self_attn.o_proj': (D, heads * dim),
        'mlp.gate_proj': (F, D),
        'mlp.up_proj': (F, D),
        'mlp.down_proj': (D, F),
      }.items()
    }
    if c['model_type'] == 'Dream':
      out |= {
        f'{layer}self_attn.{n}_proj.bias': (k * dim,)
        for n, k in (('q', heads), ('k', kv), ('v', kv))
      }
    if c['model_type'] in ('a2d-qwen3', 'sdar'):
      out |= {f'{layer}self_attn.{n}_norm.weight': (dim,) for n in 'qk'}
  return out


def write(folder, c, shards=1, dtype=np.float32, tensors=None):
  """A Hugging Face directory with random weights."""
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(c))
  if tensors is None:
    draw = np.random.default_rng(0)
    tensors = {
      name: (0.3 * draw.normal(size=shape) + ('norm' in name or 'ln_f' in name)).astype(
        dtype
      )
      for name, shape in shapes(c).items()
    }
  names = list(tensors)
  index = {}
  for i in range(shards):
    file = (
      'model.safetensors'
      if shards == 1
      else f'model-{i + 1:05d}-of-{shards:05d}.safetensors'
    )
    save_file({n: tensors[n] for n in names[i::shards]}, folder / file)
    index |= dict.fromkeys(names[i::shards], file)
  if shards > 1:
    (folder / 'model.safetensors.index.json').write_text(
      json.dumps({'metadata': {}, 'weight_map': index})
    )
  return folder


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp('checkpoints')
  return {
    name: write(root / name, c, shards=1 + 2 * (name == 'llada'))
    for name, c in CONFIGS.items()
  }


@pytest.fixture(scope='module')
def loaded(folders):
  return {name: weights.load_hf(str(folder)) for name, folder in folders.items()}


TOKENS = np.random.default_rng(1).integers(0, V, 11).astype(np.int32)


@pytest.mark.smoke
@pytest.mark.parametrize('name', CONFIGS)
def test_logits_equal_a_plain_forward(name, folders, loaded):
  """float32 within 1e-4; index i predicts position i, for Dream too."""
  cfg, params = loaded[name]
  assert cfg.shift == (name == 'dream')
  got = model.full_logits(cfg, params, TOKENS[None])[0]
  want = reference.hf_logits(folders[name], TOKENS)
  if name == 'dream':
    want = np.concatenate([want[:1], want[:-1]])
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize('name', CONFIGS)
def test_left_padding_changes_no_logit(name, loaded):
  """A row of a left-padded batch equals the row alone within 1e-5."""
  cfg, params = loaded[name]
  pad = 5
  rows = np.stack([TOKENS, np.r_[[EOS] * pad, TOKENS[pad:]]])
  valid = np.ones_like(rows, bool)
  valid[1, :pad] = False
  both = model.full_logits(cfg, params, rows, valid)
  alone = model.full_logits(
    cfg, params, TOKENS[None, pad:], np.ones((1, len(TOKENS) - pad), bool)
  )
  np.testing.assert_allclose(both[1, pad:], alone[0], atol=1e-5)


@pytest.mark.parametrize('name', ['llada', 'dream', 'qwen3'])
def test_sharded_loading_equals_one_device(name, folders, loaded):
  """Eight devices hold the same numbers, each the part that mesh.RULES gives it."""
  grid = mesh.make_mesh(fsdp=4, tensor=2)
  cfg, params = weights.load_hf(str(folders[name]), mesh=grid)
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(params),
    jax.device_get(loaded[name][1]),
  )
  wanted = mesh.shardings(params, grid)
  assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, params, wanted))
  up = params['params']['layers']['up']['kernel']
  assert up.addressable_shards[0].data.shape == (N, D // 4, F // 2)
  with jax.set_mesh(grid):
    got = jax.jit(lambda p: model.full_logits(cfg, p, TOKENS[None]))(params)
  np.testing.assert_allclose(
    got, model.full_logits(*loaded[name], TOKENS[None]), atol=1e-5
  )


def test_block_causal_attention_sees_no_later_block(loaded):
  """SDAR: changing a token moves the logits of its own block and of later ones."""
  cfg, params = loaded['sdar']
  assert cfg.block_causal == 4
  other = TOKENS.copy()
  other[5] = (other[5] + 1) % V
  a, b = (model.full_logits(cfg, params, t[None])[0] for t in (TOKENS, other))
  moved = np.abs(np.asarray(a - b)).max(-1) > 1e-6
  assert moved.tolist() == [False] * 4 + [True] * 7


def test_blocks_begin_with_the_completion(loaded):
  """Grid `prompt`: a completion starts a block, whatever the length of its prompt."""
  cfg, params = loaded['sdar']
  cfg = dataclasses.replace(cfg, block_grid='prompt')
  tokens = np.tile(TOKENS[:10], (4, 1))
  valid = np.arange(10) >= np.arange(4)[:, None]  # 6, 5, 4 prompt tokens, 3
  other = tokens.copy()
  other[:, 7] = (other[:, 7] + 1) % V
  a, b = (model.full_logits(cfg, params, t, valid) for t in (tokens, other))
  moved = np.abs(np.asarray(a - b)).max(-1) > 1e-6
  assert moved[:, -4:].all() and not (moved & valid)[:, :-4].any()


def test_parameters_have_the_dtype_asked_for(tmp_path):
  """bfloat16 files load as bfloat16 to the bit, or are widened to float32."""
  folder = write(tmp_path / 'x', LLADA, dtype=ml_dtypes.bfloat16)
  _, wide = weights.load_hf(str(folder))
  cfg, narrow = weights.load_hf(str(folder), 'bfloat16')
  assert cfg.param_dtype == 'bfloat16'
  for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(narrow), strict=True):
    assert a.dtype == jnp.float32 and b.dtype == jnp.bfloat16
    np.testing.assert_array_equal(a, b.astype(jnp.float32))


# --- special ids


def test_special_ids(tmp_path):
  """An id comes from config.json, tokenizer_config.json, or the usual names."""
  bare = {
    k: v for k, v in LLADA.items() if k not in ('mask_token_id', 'pad_token_id')
  } | {'eos_token_id': [EOS, 31]}
  folder = write(tmp_path / 'x', bare)
  added = [{'content': '<|mdm_mask|>', 'id': 35}, {'content': '<m>', 'id': 36}]
  (folder / 'tokenizer.json').write_text(json.dumps({'added_tokens': added}))
  cfg, _ = weights.load_hf(str(folder))
  assert (cfg.mask_id, cfg.eos_id, cfg.pad_id) == (35, EOS, EOS)
  (folder / 'tokenizer_config.json').write_text(
    json.dumps({'mask_token': {'content': '<m>'}})
  )
  assert weights.load_hf(str(folder))[0].mask_id == 36
  (folder / 'config.json').write_text(json.dumps(bare | {'mask_token_id': 34}))
  with pytest.raises(ValueError, match="mask_token_id = 34, .*'<m>' = 36"):
    weights.load_hf(str(folder))


def test_eos_is_the_same_in_both_files(tmp_path):
  """Of several in config.json the tokenizer's counts. Another one is refused; for
  padding, which is never read, config.json's counts."""
  folder = write(tmp_path / 'x', {**LLADA, 'eos_token_id': [EOS, 31]}, tensors={})
  decoder = {str(i): {'content': f'<{i}>'} for i in (29, 31)}
  told = {'added_tokens_decoder': decoder, 'eos_token': '<31>', 'pad_token': '<29>'}
  (folder / 'tokenizer_config.json').write_text(json.dumps(told))
  ids = hf.read_config(str(folder))
  assert (ids['eos_id'], ids['pad_id']) == (31, LLADA['pad_token_id'])
  told['eos_token'] = '<29>'
  (folder / 'tokenizer_config.json').write_text(json.dumps(told))
  with pytest.raises(ValueError, match="eos_token_id = .*30, 31.* '<29>' = 29"):
    hf.read_config(str(folder))


# --- bad input


def without(c, *names):
  return {k: v for k, v in c.items() if k not in names}


@pytest.mark.parametrize(
  'c, message',
  [
    ({**LLADA, 'model_type': 'LLaDA'}, "model_type = 'LLaDA' must be written 'llada'"),
    ({**LLADA, 'model_type': ['llada']}, r"model_type = \['llada'\] .*known are"),
    ({**LLADA, 'n_layers': '2'}, "n_layers = '2' must be a whole number"),
    ({**LLADA, 'n_heads': True}, 'n_heads = True must be a whole number'),
    ({**LLADA, 'd_model': [D]}, r'd_model = \[16\] must be a whole number'),
    ({**LLADA, 'n_kv_heads': 3}, '4 heads cannot share 3 key and value heads'),
    ({**LLADA, 'd_model': 17}, '4 heads cannot share a width of 17'),
    ({**LLADA, 'embedding_size': 0}, 'embedding_size = 0 must be'),
    ({**LLADA, 'rope_theta': '5e5'}, "rope_theta = '5e5' must be a number"),
    ({**LLADA, 'rms_norm_eps': float('nan')}, 'rms_norm_eps = nan must be a number'),
    ({**LLADA, 'weight_tying': 'no'}, "weight_tying = 'no' must be true or false"),
    ({**LLADA, 'eos_token_id': [None]}, 'eos_token_id = None must be a whole'),
    ({**LLADA, 'mask_token_id': '33'}, "mask_token_id = '33' must be a whole"),
    ({**CONFIGS['sdar'], 'block_size': '4'}, "block_size = '4' must be a whole"),
    ({**CONFIGS['sdar'], 'block_size': -4}, 'block_size = -4 must be a whole'),
    (
      {k: v for k, v in CONFIGS['sdar'].items() if k != 'block_size'},
      'block_size is missing: set model.attention_block',
    ),
    ({**DREAM, 'rope_scaling': {'factor': 2.0}}, 'rope_scaling = .*factor'),
    ({**DREAM, 'rope_scaling': 'default'}, "rope_scaling = 'default'"),
    (
      {**DREAM, 'rope_parameters': {'full_attention': {'rope_theta': 1e6}}},
      'rope_scaling = .*full_attention',
    ),
    (
      {
        **DREAM,
        'rope_parameters': {'rope_type': 'default', 'partial_rotary_factor': 0.5},
      },
      'partial_rotary_factor',
    ),
    ({**DREAM, 'layer_types': 'full_attention'}, 'layer_types'),
    ({**DREAM, 'is_encoder_decoder': True}, 'is_encoder_decoder = True'),
    ({**DREAM, 'pruned_heads': {'0': [1]}}, 'pruned_heads'),
    ({**LLADA, 'experts': 8}, 'experts = 8'),
    ({**LLADA, 'alibi': True}, 'alibi = True: only False'),
    (without(LLADA, 'n_layers', 'd_model'), 'd_model is missing.*n_layers is missing'),
    ({**LLADA, 'mask_token_id': V}, f'mask_token_id = {V} .*{V}'),
    ({**LLADA, 'mask_token_id': EOS}, 'mask_token_id = eos_token_id'),
    (without(LLADA, 'mask_token_id'), 'mask_token_id is missing'),
    ({**DREAM, 'rope_scaling': {'rope_type': 'yarn'}}, 'rope_scaling = .*yarn'),
    ({**LLADA, 'rope': None}, 'rope = None: only True'),
    ({**DREAM, 'bd_size': 32}, 'bd_size = 32'),
    ({**DREAM, 'head_scale': 0.0}, 'head_scale = 0.0'),
    ({**DREAM, 'experts_of': [1]}, 'experts_of'),
    ({**DREAM, 'layer_types': ['sliding_attention'] * N}, 'layer_types'),
    ({**LLADA, 'quantization_config': {'bits': 4}}, 'quantization_config'),
  ],
)
def test_wrong_configs_are_refused(c, message, tmp_path):
  """The error names the file, the field and its value."""
  folder = write(tmp_path / 'x', c, tensors={'a': np.zeros(1)})
  with pytest.raises(ValueError, match=message) as info:
    weights.load_hf(str(folder))
  assert 'config.json' in str(info.value)


# Fields of real config.json files that change nothing: transformers 4.47 to 4.51 write
# the first, older ones wrote the generation fields there.
NEEDLESS = {
  '_attn_implementation_autoset': True,
  '_attn_implementation_internal': 'sdpa',
  'tokenizer_class': 'Qwen2Tokenizer',
  'problem_type': None,
  'torchscript': False,
  'is_decoder': False,
  'pruned_heads': {},
  'temperature': 0.2,
  'top_k': 50,
  'num_beams': 1,
  'max_length': 20,
  'repetition_penalty': 1.0,
  'do_sample': True,
  'task_specific_params': None,
  'chunk_size_feed_forward': 0,
  'gradient_checkpointing': True,
  'rope_scaling': {'type': 'default'},
}


@pytest.mark.parametrize(
  'change',
  [
    NEEDLESS,
    {'rope_scaling': {'rope_type': 'default', 'factor': 1.0}},
    {'rope_scaling': {}},
    {
      'rope_scaling': None,
      'rope_parameters': {'rope_theta': 1e6, 'rope_type': 'default'},
    },
    {'layer_types': ['full_attention'] * N, 'use_sliding_window': None},
    {'pad_token_id': -1},
  ],
)
def test_fields_without_effect_change_no_setting(change, tmp_path):
  """ModelConfig is that of the file without them."""
  plain, more = ({**DREAM, **extra} for extra in ({}, change))
  folders = [write(tmp_path / n, c, tensors={}) for n, c in (('a', plain), ('b', more))]
  one, two = (hf.read_config(str(folder)) for folder in folders)
  assert one == two


@pytest.mark.parametrize(
  'kind, fields, reason',
  [
    ('lada', {}, ''),
    ('gpt2', {}, ''),
    ('qwen', {}, ''),
    ('qwen3_moe', {'num_experts': 256, 'moe_intermediate_size': 512}, 'experts'),
    ('mixtral', {'num_local_experts': 8, 'num_experts_per_tok': 2}, 'experts'),
    (None, {}, ''),
  ],
)
def test_another_family_is_no_misspelling(kind, fields, reason, tmp_path):
  """It is not implemented, for a reason where there is one to see."""
  folder = write(tmp_path / 'x', {**DREAM, **fields, 'model_type': kind}, tensors={})
  with pytest.raises(ValueError, match='model_type = .* not implemented') as info:
    hf.read_config(str(folder))
  assert reason in str(info.value)
  assert 'mean' not in str(info.value) and 'written' not in str(info.value)


def test_one_warning_names_ignored_fields(tmp_path, caplog):
  """Unknown fields that are null, false or empty, serving switches, generation
  fields are named in one warning; fields of the files are not."""
  c = {**CONFIGS['sdar'], **NEEDLESS, 'new_switch': False, 'new_table': None}
  folder = write(tmp_path / 'x', c)
  for _ in range(2):
    assert weights.load_hf(str(folder))[0].block_causal == 4
  (warning,) = (record.getMessage() for record in caplog.records)
  for name in (
    'new_switch',
    'new_table',
    'fuse_cross_entropy',
    'temperature',
    'repetition_penalty',
    'pruned_heads',
  ):
    assert name in warning
  for name in ('torch_dtype', 'hidden_size', 'max_window_layers', 'rope_scaling'):
    assert name not in warning


def test_the_attention_block_is_read_or_said_never_guessed(tmp_path):
  """A told block wins; 0 is the whole text; Fast-dLLM v2's is 32 if it is missing."""
  block = lambda name, c, *told: hf.read_config(str(write(tmp_path / name, c)), *told)[
    'block_causal'
  ]
  sdar = dict(CONFIGS['sdar'])
  assert block('a', sdar) == 4 and block('b', sdar, 8) == 8 and block('c', sdar, 0) == 0
  del sdar['block_size']
  assert block('d', sdar, 16) == 16
  fast = {
    **CONFIGS['dream'],
    'model_type': 'Fast_dLLM_Qwen',
    'conplemenrary_mask': True,
  }
  assert block('e', fast) == 32 and block('f', {**fast, 'bd_size': 8}) == 8
  assert hf.read_config(str(tmp_path / 'f'))['shift']
  a2d = dict(CONFIGS['qwen3'])
  assert block('g', a2d) == 0 and block('h', a2d, 4) == 4
  del a2d['block_size']
  with pytest.raises(ValueError, match='block_size is missing.*model.attention_block'):
    block('i', a2d)


def test_fields_that_its_attention_blocks_do_not_read_are_refused(tmp_path):
  """The checkpoint says how it attends, not the config."""
  c = base.get_config()
  for kind, refused in (('sdar', True), ('llada', False)):
    c.model.checkpoint = str(write(tmp_path / kind, CONFIGS[kind], tensors={}))
    found = check.idle(check.with_block(c))
    assert ('objective.low' in found) == ('logprob.low' in found) == refused
  c.model.checkpoint = str(tmp_path / 'nowhere')
  assert 'objective.low' not in check.idle(check.with_block(c))


def test_one_error_lists_all_wrong_tensors(tmp_path, monkeypatch):
  """Names missing, unexpected and mis-shaped tensors before any is read."""
  monkeypatch.setattr(read, 'read_leaf', None)
  tensors = {n: np.zeros(s, np.float32) for n, s in shapes(LLADA).items()}
  q = 'model.transformer.blocks.0.q_proj.weight'
  tensors[q] = np.zeros((D, D + 1), np.float32)
  del tensors['model.transformer.ln_f.weight']
  tensors['model.visual.weight'] = np.zeros(2, np.float32)
  folder = write(tmp_path / 'x', LLADA, tensors=tensors)
  with pytest.raises(ValueError) as info:
    weights.load_hf(str(folder))
  for part in (
    f'{q} is ({D}, {D + 1})',
    'missing: model.transformer.ln_f.weight',
    'unexpected: model.visual.weight',
  ):
    assert part in str(info.value)


def test_wrong_directories_are_refused(tmp_path, monkeypatch):
  """There is no config, broken JSON, no weights, damaged ones, or no directory."""
  load = lambda path: weights.load_hf(str(path))
  folder = tmp_path / 'x'
  folder.mkdir()
  with pytest.raises(ValueError, match='has no config.json'):
    load(folder)
  (folder / 'config.json').write_text('{')
  with pytest.raises(ValueError, match='config.json is no valid JSON'):
    load(folder)
  (folder / 'config.json').write_text(json.dumps(LLADA))
  (folder / 'pytorch_model.bin').write_bytes(b'')
  with pytest.raises(ValueError, match=r'no \*.safetensors file.*\.bin'):
    load(folder)
  write(folder, LLADA, shards=2)
  lost = folder / 'model-00002-of-00002.safetensors'
  whole = lost.read_bytes()
  lost.write_bytes(whole[:-10])
  with pytest.raises(ValueError, match='00002.* is damaged or truncated'):
    load(folder)
  lost.unlink()
  with pytest.raises(ValueError, match='index.json: .*00002'):
    load(folder)
  with pytest.raises(ValueError, match='model.checkpoint = .*hub name'):
    load(tmp_path / 'nowhere')

  def offline(*_, **__):
    raise OSError('no network\nmore')

  monkeypatch.setattr('huggingface_hub.snapshot_download', offline)
  with pytest.raises(ValueError, match='model.checkpoint = .*: no network$'):
    load('GSAI-ML/LLaDA-8B-Instruct')
  asked = []
  monkeypatch.setattr(
    'huggingface_hub.snapshot_download',
    lambda path, **how: asked.append(how['allow_patterns']) or path,
  )
  hf.locate('GSAI-ML/LLaDA-8B-Instruct', False)
  # auto_map in config.json points at code, which an export must have too.
  assert '*.py' in asked[0] and '*.safetensors' not in asked[0]


@pytest.mark.parametrize(
  'name',
  [
    '../secret.safetensors',
    '{folder}/secret.safetensors',
    '..',
    '',
    'model.bin',
    'x/../../secret.safetensors',
    7,
  ],
)
def test_index_names_only_files_beside_it(name, tmp_path):
  """Nothing is read if a downloaded index names a file outside its directory."""
  write(tmp_path / 'x', LLADA, shards=2)
  path = tmp_path / 'x' / hf.INDEX
  index = json.loads(path.read_text())
  (tmp_path / 'x' / 'model-00002-of-00002.safetensors').rename(
    tmp_path / 'secret.safetensors'
  )
  outside = str(name).format(folder=tmp_path)
  index['weight_map'] = {
    k: outside if '00002' in v else v for k, v in index['weight_map'].items()
  }
  path.write_text(json.dumps(index))
  with pytest.raises(
    ValueError, match=r'index.json: .* is no \*.safetensors file of this directory'
  ):
    weights.load_hf(str(tmp_path / 'x'))


def llada_tensors(dtype=np.float32):
  return {name: np.ones(shape, dtype) for name, shape in shapes(LLADA).items()}


@pytest.mark.parametrize(
  'stray', ['adapter_model', 'optimizer', 'consolidated', 'model_ema']
)
def test_model_safetensors_is_read_alone(stray, tmp_path, caplog):
  """Another file beside it is named in a warning, whatever it holds."""
  folder = write(tmp_path / 'x', LLADA)
  _, alone = weights.load_hf(str(folder))
  other = {n: np.zeros_like(x) for n, x in llada_tensors().items()}
  save_file({**other, 'step': np.zeros(1)}, folder / f'{stray}.safetensors')
  _, params = weights.load_hf(str(folder))
  jax.tree.map(np.testing.assert_array_equal, params, alone)
  assert f'{stray}.safetensors not read' in caplog.text


def test_a_tensor_in_two_files_is_refused(tmp_path):
  """Which one is meant is not guessed: a whole file beside shards, two sets of
  shards, two files of other names, or a tensor twice in the files of an index."""
  folder = write(tmp_path / 'x', LLADA)
  write(folder, LLADA, shards=2)
  with pytest.raises(ValueError, match='two copies .*model.safetensors.*index'):
    weights.load_hf(str(folder))
  index = folder / hf.INDEX
  told = index.read_text()
  index.unlink()
  with pytest.raises(ValueError, match='two copies .*model.safetensors.*00001-of'):
    weights.load_hf(str(folder))
  whole = folder / 'model.safetensors'
  whole.rename(folder / 'model-00001-of-00001.safetensors')
  with pytest.raises(ValueError, match='00001-of-00001.* both hold model'):
    weights.load_hf(str(folder))
  (folder / 'model-00001-of-00001.safetensors').unlink()
  weights.load_hf(str(folder))  # shards without an index, each tensor once
  index.write_text(told)
  save_file(llada_tensors(), folder / 'model-00002-of-00002.safetensors')
  with pytest.raises(ValueError, match='00001-of-00002.*00002-of-00002.* both hold'):
    weights.load_hf(str(folder))
  for path in folder.glob('*.safetensors*'):
    path.unlink()
  for name in ('a', 'b'):
    save_file(llada_tensors(), folder / f'{name}.safetensors')
  with pytest.raises(ValueError, match='a.safetensors and b.safetensors both hold'):
    weights.load_hf(str(folder))


@pytest.mark.parametrize(
  'dtype, name',
  [
    (ml_dtypes.float8_e4m3fn, 'F8_E4M3'),
    (ml_dtypes.float8_e5m2, 'F8_E5M2'),
    (np.int8, 'I8'),
    (np.uint8, 'U8'),
    (np.int32, 'I32'),
  ],
)
def test_types_other_than_floats_are_refused(dtype, name, tmp_path):
  """The weights of an int8 or fp8 dump mean nothing without their scales."""
  tensors = llada_tensors()
  odd = 'model.transformer.blocks.1.q_proj.weight'
  tensors[odd] = tensors[odd].astype(dtype)
  folder = write(tmp_path / 'x', LLADA, tensors=tensors)
  with pytest.raises(ValueError, match=f'{odd} is of type {name}.*F32.*dequantize'):
    weights.load_hf(str(folder))


@pytest.mark.parametrize(
  'value, dtype, at',
  [
    (np.nan, 'float32', 'blocks.1.q_proj'),
    (np.inf, 'bfloat16', 'ln_f'),
    (-np.inf, 'float32', 'wte'),
  ],
)
def test_values_that_are_not_finite_are_refused(value, dtype, at, tmp_path):
  """The error names the directory and the tensor; float16 may hold them too."""
  tensors = llada_tensors(np.float16)
  name = f'model.transformer.{at}.weight'
  tensors[name].flat[-1] = value
  folder = write(tmp_path / 'x', LLADA, tensors=tensors)
  with pytest.raises(ValueError, match=f'{folder}.*{name} holds NaN or infinity'):
    weights.load_hf(str(folder), dtype, mesh.make_mesh(fsdp=4, tensor=2))


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'base_model.model.'])
def test_a_prefix_is_suggested(prefix, tmp_path):
  """What is missing, what was found, and the prefix that turns one into the other."""
  tensors = {f'{prefix}{n}': x for n, x in llada_tensors().items()}
  folder = write(tmp_path / 'x', LLADA, tensors=tensors)
  with pytest.raises(ValueError, match=f'remove {prefix!r}') as info:
    weights.load_hf(str(folder))
  for part in ('missing: model.', f'unexpected: {prefix}'):
    assert part in str(info.value)
  tensors = {n.removeprefix('model.'): x for n, x in llada_tensors().items()}
  folder = write(tmp_path / 'y', LLADA, tensors=tensors)
  with pytest.raises(ValueError, match="unexpected: transformer.*add 'model.'"):
    weights.load_hf(str(folder))
  # Nothing fits: no suggestion.
  folder = write(tmp_path / 'z', LLADA, tensors={'a.b': np.zeros(1, np.float32)})
  with pytest.raises(ValueError, match='unexpected: a.b$'):
    weights.load_hf(str(folder))


POINTER = 'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n'


@pytest.mark.parametrize(
  'name, text, message',
  [
    ('model.safetensors', POINTER, 'git lfs pull'),
    ('model.safetensors', '', 'damaged or truncated'),
    ('config.json', POINTER, 'git lfs pull'),
    ('config.json', '[1]', 'must hold a JSON object, not list'),
    ('config.json', 'null', 'must hold a JSON object'),
    ('config.json', '[' * 100_000, 'no valid JSON'),
    ('config.json', '{"a": "\udc80"}', 'no valid JSON'),
    ('tokenizer.json', '{"added_tokens": [', 'no valid JSON'),
    ('tokenizer.json', '{"added_tokens": [1]}', 'added tokens'),
    ('tokenizer.json', '{"added_tokens": [{"content": [], "id": 1}]}', 'added tokens'),
    ('tokenizer_config.json', '{"mask_token": ', 'no valid JSON'),
    ('tokenizer_config.json', '{"added_tokens_decoder": [1]}', 'added tokens'),
    (
      'tokenizer_config.json',
      '{"added_tokens_decoder": {"x": {"content": "a"}}}',
      'added tokens',
    ),
    (hf.INDEX, '{"weight_map": {"a": ', 'no valid JSON'),
    (hf.INDEX, '{"weight_map": ["a"]}', 'weight_map must be'),
  ],
)
def test_damaged_files_are_named(name, text, message, tmp_path):
  """One sentence says which file, and what is wrong with it."""
  folder = write(tmp_path / 'x', LLADA, tensors=llada_tensors())
  (folder / name).write_text(text, errors='surrogateescape')
  with pytest.raises(ValueError, match=message) as info:
    weights.load_hf(str(folder))
  assert name in str(info.value)


# --- memory

MEASURE = """
import resource, sys, threading, time
import jax
from dmpo_jax import mesh, weights

def anonymous():  # the kernel may drop pages of mapped files
  text = open('/proc/self/status').read()
  return int(text.split('RssAnon:')[1].split()[0]) * 1024

grid = mesh.make_mesh(fsdp=8)
jax.block_until_ready(jax.device_put(0, mesh.replicated(grid)))
before, peak, done = anonymous(), [0], threading.Event()

def watch():
  while not done.wait(0.002):
    held = sum(x.nbytes for x in jax.live_arrays())
    peak[0] = max(peak[0], anonymous() - before - held)

thread = threading.Thread(target=watch)
thread.start()
_, params = weights.load_hf(sys.argv[1], 'bfloat16', grid)
jax.block_until_ready(params)
done.set(); thread.join()
sizes = [sum(s.data.nbytes for x in jax.tree.leaves(params)
             for s in x.addressable_shards if s.device == d)
         for d in jax.devices()]
print(peak[0], max(sizes), sum(x.nbytes for x in jax.tree.leaves(params)))
"""


def test_loading_needs_little_host_memory(tmp_path):
  """Loads LLaDA at 1/64 size; the host never holds more than 1.5 shards.

  On CPUs device arrays lie in the same memory, so they are subtracted.
  """
  width, mlp, layers, vocab = 384, 1152, 16, 126464
  c = {
    **LLADA,
    'd_model': width,
    'mlp_hidden_size': mlp,
    'n_layers': layers,
    'n_heads': 3,
    'n_kv_heads': 3,
    'vocab_size': vocab,
    'embedding_size': vocab,
    'mask_token_id': 126336,
    'eos_token_id': 126081,
    'pad_token_id': 126081,
  }
  blocks = {}
  for i in range(layers):
    blocks |= {
      f'model.transformer.blocks.{i}.{n}.weight': s
      for n, s in dict(
        attn_norm=(width,),
        ff_norm=(width,),
        q_proj=(width, width),
        k_proj=(width, width),
        v_proj=(width, width),
        attn_out=(width, width),
        ff_proj=(mlp, width),
        up_proj=(mlp, width),
        ff_out=(width, mlp),
      ).items()
    }
  names = list(blocks)
  parts = [
    {'model.transformer.wte.weight': (vocab, width)},
    {n: blocks[n] for n in names[: len(names) // 2]},
    {n: blocks[n] for n in names[len(names) // 2 :]},
    {
      'model.transformer.ff_out.weight': (vocab, width),
      'model.transformer.ln_f.weight': (width,),
    },
  ]
  (tmp_path / 'config.json').write_text(json.dumps(c))
  index, largest = {}, 0
  for i, part in enumerate(parts):
    file = f'model-{i + 1:05d}-of-00004.safetensors'
    save_file(
      {n: np.ones(s, ml_dtypes.bfloat16) for n, s in part.items()}, tmp_path / file
    )
    largest = max(largest, (tmp_path / file).stat().st_size)
    index |= dict.fromkeys(part, file)
  (tmp_path / hf.INDEX).write_text(json.dumps({'weight_map': index}))
  done = subprocess.run(
    [sys.executable, '-c', MEASURE, str(tmp_path)],
    capture_output=True,
    text=True,
    check=True,
  )
  peak, device, total = map(int, done.stdout.split())
  assert total > 240e6 and device < total / 7  # an eighth, and the norms
  assert peak < 1.5 * largest, (peak, largest)


# --- tokenizers


@pytest.fixture
def silent(monkeypatch):
  def refuse(*_):
    raise AssertionError('asked on the terminal')

  monkeypatch.setattr(builtins, 'input', refuse)


def test_llada_tokenizer_needs_no_remote_code(tmp_path, silent):
  """Reads tokenizer.json beside an auto_map, and takes LLaDA's template."""
  tokenizer = data.char_tokenizer()
  tokenizer.add_tokens(
    ['<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>', '<|startoftext|>'],
    special_tokens=True,
  )
  tokenizer.bos_token = '<|startoftext|>'
  tokenizer.chat_template = None
  tokenizer.save_pretrained(tmp_path)
  told = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  told |= {'auto_map': {'AutoTokenizer': ['evil.Tokenizer', None]}}
  told.pop('mask_token')
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(told))
  (tmp_path / 'config.json').write_text(json.dumps(LLADA))
  mask = tokenizer.convert_tokens_to_ids('<|mask|>')
  got = data.load_tokenizer(str(tmp_path), {'mask_id': mask})
  assert got.mask_token_id == mask
  text = got.decode(data.encode_chat(got, 'hi'))
  assert text == (
    '<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n'
    'hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>'
    '\n\n'
  )
  vocab = got.get_vocab()
  assert set(data.stop_ids(got)) == {vocab['<|eos|>'], vocab['<|eot_id|>']}


def test_dream_tokenizer_needs_no_tokenizer_json(tmp_path, silent):
  """Reads Qwen's vocab.json and merges.txt."""
  vocab = {
    c: i
    for i, c in enumerate(
      [
        'h',
        'i',
        'hi',
        'u',
        's',
        'e',
        'r',
        'a',
        't',
        'n',
        'Ċ',
        'Ġ',
        '<|endoftext|>',
        '<|im_start|>',
        '<|im_end|>',
        '<|mask|>',
      ]
    )
  }
  (tmp_path / 'vocab.json').write_text(json.dumps(vocab))
  (tmp_path / 'merges.txt').write_text('#version: 0.2\nh i\n')
  special = {
    str(i): {
      'content': t,
      'special': True,
      'lstrip': False,
      'rstrip': False,
      'normalized': False,
      'single_word': False,
    }
    for t, i in vocab.items()
    if t.startswith('<|')
  }
  (tmp_path / 'tokenizer_config.json').write_text(
    json.dumps(
      {
        'added_tokens_decoder': special,
        'eos_token': '<|endoftext|>',
        'pad_token': '<|endoftext|>',
        'tokenizer_class': 'DreamTokenizer',
        'auto_map': {'AutoTokenizer': ['tokenization_dream.X', None]},
      }
    )
  )
  got = data.load_tokenizer(str(tmp_path), {'mask_id': 15})
  assert (got.mask_token_id, got.eos_token_id) == (15, 12)
  assert got('hi', add_special_tokens=False)['input_ids'] == [2]
  text = got.decode(data.encode_chat(got, 'hi'))
  assert text == ('<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n')
  assert set(data.stop_ids(got)) == {12, 14}


def test_wrong_tokenizers_are_refused(tmp_path):
  """There are no files, or no chat template and no sign of which one fits."""
  with pytest.raises(
    ValueError, match='tokenizer.json.*vocab.json.*set data.tokenizer'
  ):
    data.load_tokenizer(str(tmp_path))
  plain = data.char_tokenizer()
  plain.chat_template = None
  plain.save_pretrained(tmp_path)
  text = (tmp_path / 'tokenizer.json').read_text()
  (tmp_path / 'tokenizer.json').write_text(text.replace('<|assistant|>', '<|helper|>'))
  with pytest.raises(ValueError, match='has no chat template'):
    data.load_tokenizer(str(tmp_path))
  path = tmp_path / 'tokenizer_config.json'
  for name in ('../tokenizer.4.0.json', '/x/tokenizer.4.0.json'):
    path.write_text(json.dumps({'fast_tokenizer_files': [name]}))
    with pytest.raises(ValueError, match=f"names .*'{name}'.* outside"):
      data.load_tokenizer(str(tmp_path))


def saved_tokenizer(folder, **changes):
  """Writes the character tokenizer with changes to tokenizer_config.json."""
  data.char_tokenizer().save_pretrained(folder)
  path = folder / 'tokenizer_config.json'
  told = json.loads(path.read_text()) | changes
  told = {name: value for name, value in told.items() if value is not None}
  path.write_text(json.dumps(told))
  return str(folder)


# The character tokenizer has pad 0, mask 1, EOS 2.
@pytest.mark.parametrize(
  'changes, ids, message',
  [
    ({}, (2, 0, 1), 'mask_token_id = 1, .*is 2; eos_token_id = 2, .*is 0'),
    ({}, (1, 3, 0), "eos_token_id = 2, but the model's is 3"),
    ({}, (4, 2, 0), "mask_token_id = 1, but the model's is 4"),
    ({'eos_token': None}, (1, 999, 0), 'no token 999.*eos_token_id'),
    ({'mask_token': None}, (), 'no mask_token.*tokenizer_config.json'),
    ({'eos_token': None}, (), 'no eos_token.*tokenizer_config.json'),
    ({'chat_template': '{% for'}, (), 'chat template of .* is broken: Template'),
    ({'chat_template': '{{ nothing.at.all }}'}, (), 'chat template of .* is broken'),
    ({'chat_template': '{{ 1 // 0 }}'}, (), 'is broken: ZeroDivisionError'),
    ({'chat_template': '<|user|>'}, (), 'template .*leaves out what the user says'),
    ({'chat_template': 7}, (), 'chat template of .* is broken'),
    ({'fast_tokenizer_files': '../x.json'}, (), 'outside'),
    ({'mask_token': [1]}, (), 'tokenizer'),
  ],
)
def test_tokenizers_that_do_not_fit_are_refused(changes, ids, message, tmp_path):
  """Its ids are other than the model's, it has none, or its template fails."""
  folder = saved_tokenizer(tmp_path, **changes)
  (tmp_path / 'chat_template.jinja').unlink(missing_ok=True)
  if not ids and 'chat_template' not in changes:
    (tmp_path / 'chat_template.jinja').write_text(data.CHAT)
  named = dict(zip(('mask_id', 'eos_id', 'pad_id'), ids, strict=False))
  with pytest.raises(ValueError, match=message) as info:
    data.load_tokenizer(folder, named)
  assert str(tmp_path) in str(info.value)


def test_the_character_tokenizer_is_checked_too():
  with pytest.raises(
    ValueError, match="char .*mask_token_id = 1, but the model's is 9"
  ):
    data.load_tokenizer('char', {'mask_id': 9, 'eos_id': 2, 'pad_id': 0})


@pytest.mark.parametrize('ids', [(1, 2, 2), (1, 2, 1), (1, 2, 0)])
def test_padding_is_the_models(ids, tmp_path, caplog):
  """Nothing reads padding, so another one is replaced, with a warning."""
  named = dict(zip(('mask_id', 'eos_id', 'pad_id'), ids, strict=False))
  got = data.load_tokenizer(saved_tokenizer(tmp_path), named)
  assert (got.mask_token_id, got.eos_token_id, got.pad_token_id) == ids
  assert ('padding 0 by' in caplog.text) == (ids[2] != 0)


def test_a_tokenizer_without_padding_pads_with_eos(tmp_path):
  got = data.load_tokenizer(saved_tokenizer(tmp_path, pad_token=None))
  assert got.pad_token_id == got.eos_token_id == 2


def test_a_mask_may_be_an_unused_row(tmp_path):
  """A causal model has no mask token; an id beyond the tokenizer's serves as one."""
  ids = {'mask_id': 120, 'eos_id': 2, 'pad_id': 0}
  got = data.load_tokenizer(saved_tokenizer(tmp_path, mask_token=None), ids)
  assert got.eos_token_id == 2 and data.encode_chat(got, 'hi')


@pytest.mark.parametrize(
  'name', ['tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json']
)
@pytest.mark.parametrize('text', ['{"a": {', '', POINTER, '[]'])
def test_damaged_tokenizers_are_named(name, text, tmp_path):
  """A download that was cut short names its file."""
  folder = saved_tokenizer(tmp_path)
  (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=name):
    data.load_tokenizer(folder)
  (tmp_path / name).unlink()
  saved_tokenizer(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{"model": {"type": "WordLevel"}}')
  with pytest.raises(ValueError, match='files of its tokenizer are damaged'):
    data.load_tokenizer(folder)
