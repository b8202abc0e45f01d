"""Files of mixtures of experts: three families, read and written."""

import dataclasses
import hashlib
import json
import pathlib
import re

import jax
import ml_dtypes
import moe_models
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dmpo_jax import hf, mesh, model, weights
from dmpo_jax.hf import families, peft, read

# The fields of inclusionAI/LLaDA2.0-mini and JetLM/SDAR-30B-A3B-Chat that differ from
# the tiny ones; number, size and SHA-256 of the names in their index files.
MINI = dict(
  head_dim=128, hidden_size=2048, intermediate_size=5120, max_position_embeddings=32768,
  moe_intermediate_size=512, n_group=8, num_attention_heads=16, num_experts=256,
  num_experts_per_tok=8, num_hidden_layers=20, num_key_value_heads=4,
  pad_token_id=156892, rotary_dim=64, topk_group=4, vocab_size=157184,
  torch_dtype='bfloat16', norm_head=False, norm_softmax=False, max_window_layers=28,
)  # fmt: skip
A3B = dict(
  eos_token_id=151643, head_dim=128, hidden_size=2048, intermediate_size=6144,
  max_position_embeddings=32768, max_window_layers=48, moe_intermediate_size=768,
  num_attention_heads=32, num_experts=128, num_experts_per_tok=8, num_hidden_layers=48,
  num_key_value_heads=4, pad_token_id=None, vocab_size=151936,
)  # fmt: skip
RELEASES = {
  'llada2_mini': (
    'llada2', MINI, 14813, 32511286784,
    '061ba0e76dca16dce716e1e8bf88ac400a2479cdcf0afe6134e70d024c1c2598',
  ),
  'sdar_30b': (
    'sdar_moe', A3B, 18867, 61064245248,
    '2dc20e7e2721e2db383851257df6af98df3705c28db667bd2222f7310a7b97a8',
  ),
}  # fmt: skip


def config_only(folder, family, **changes):
  """Writes the config.json of a family with changes; None leaves a field out."""
  c = moe_models.FAMILIES[family][0] | changes
  c = {k: v for k, v in c.items() if v is not ... and (k != 'pad_token_id' or v)}
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(c))
  return str(folder)


@pytest.mark.parametrize('name', RELEASES)
def test_published_index_files_are_covered(name, tmp_path, caplog):
  """Every name once, with the shapes that sum to the files' bytes; ids and block from
  the tables, since no file beside tokenizer.json has them."""
  family, changes, count, size, digest = RELEASES[name]
  folder = config_only(tmp_path, family, **changes)
  found = hf.read_config(folder)
  want = model.PRESETS[name]
  ids = {'stop_ids'}  # of tokenizer.json or generation_config.json
  assert {k: found.get(k) for k in want.keys() - ids} == {
    k: v for k, v in want.items() if k not in ids
  }
  cfg = model.ModelConfig(**found, param_dtype='bfloat16')
  tree = {'params': families.shapes(cfg)['params']}
  parts = list(families.entries(tree, read.family_for(cfg, folder), cfg))
  shapes = {n: entry.shape for entry in parts for n in entry.names}
  assert len(shapes) == count
  assert hashlib.sha256('\n'.join(sorted(shapes)).encode()).hexdigest() == digest
  assert 2 * sum(int(np.prod(x)) for x in shapes.values()) == size
  assert shapes == moe_models.shapes(moe_models.FAMILIES[family][0] | changes)
  assert ('block_size' in caplog.text) == (family == 'sdar_moe')


# --- round trips

VARIANTS = {
  'llada2': [
    {}, dict(n_group=1, topk_group=1), dict(num_shared_experts=None),
    dict(first_k_dense_replace=2, tie_word_embeddings=True, num_shared_experts=2),
    dict(first_k_dense_replace=0, use_qkv_bias=True, partial_rotary_factor=0.25),
    dict(num_experts_per_tok=1, partial_rotary_factor=1.0, topk_group=1),
    dict(model_type='llada2_moe', block_size=8),
  ],
  'lladamoe': [
    {}, dict(shared_expert_intermediate_size=48, moe_layer_freq=[1, 1, 1]),
    dict(moe_router_enable_expert_bias=True, qk_layernorm=False),
    dict(partial_rotary_factor=0.25, tie_word_embeddings=True),
    dict(model_type='llada', num_key_value_heads=4),
  ],
  'sdar_moe': [
    {}, dict(mlp_only_layers=[1]),
    dict(decoder_sparse_step=2, tie_word_embeddings=True),
    dict(norm_topk_prob=False, block_size=8, head_dim=16),
  ],
}  # fmt: skip


# Those that are run by default, by family and place; the others are slow tests.
QUICK = {
  ('llada2', 3),
  ('llada2', 4),
  ('lladamoe', 1),
  ('lladamoe', 2),
  ('sdar_moe', 1),
}


@pytest.mark.parametrize(
  'family, changes',
  [
    pytest.param(f, c, marks=[] if (f, i) in QUICK else pytest.mark.slow)
    for f, cs in VARIANTS.items()
    for i, c in enumerate(cs)
  ],
)
def test_round_trip_to_the_bit(family, changes, tmp_path):
  """Written beside its source: the same names, types and bits. Written as made here:
  another config.json, from which the same model is read."""
  block = dict(block_causal=4) if family != 'lladamoe' else {}
  source = moe_models.write(tmp_path / 'a', family, **changes)
  cfg, params = weights.load_hf(source, **block)
  hf.save_hf(tmp_path / 'b', cfg, params, source=source, shard_bytes=400_000)
  held = {}
  for path in (tmp_path / 'b').glob('*.safetensors'):
    held |= load_file(path)
  same(held, load_file(tmp_path / 'a' / 'model.safetensors'))
  told, was = (json.loads((tmp_path / x / 'config.json').read_text()) for x in 'ba')
  assert told.pop('block_size', None) == block.get('block_causal')
  assert told == {k: v for k, v in was.items() if k != 'block_size'}
  hf.save_hf(tmp_path / 'c', cfg, params)
  again, found = weights.load_hf(str(tmp_path / 'c'))
  assert dataclasses.replace(again, stop_ids=cfg.stop_ids) == cfg
  same(*map(jax.device_get, (found, params)))


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_bfloat16_keeps_its_bits(tmp_path):
  """The bias of a router is held in float32, and written as it was."""
  held = {
    k: x.astype(ml_dtypes.bfloat16) for k, x in moe_models.tensors('llada2').items()
  }
  source = moe_models.write(tmp_path / 'a', 'llada2', held)
  cfg, params = weights.load_hf(source, 'bfloat16')
  hf.save_hf(tmp_path / 'b', cfg, params, source=source)
  with read.opened(str(tmp_path / 'b'), ['model.safetensors']) as readers:
    for name, x in held.items():
      got = readers[name].get_tensor(name)
      assert got.dtype == x.dtype and got.tobytes() == x.tobytes(), name


def stacked(held):
  """The tensors as dFactory's tool merges them: all experts of a layer in one."""
  count = sum('layers.1.mlp.experts.' in name for name in held) // 3
  out = {k: x for k, x in held.items() if '.experts.' not in k}
  for name in [k for k in held if '.experts.0.' in k]:
    parts = [held[name.replace('.experts.0.', f'.experts.{e}.')] for e in range(count)]
    whole = name.replace('.experts.0.', '.experts.').removesuffix('.weight')
    out[whole] = np.stack(parts)
  return out


@pytest.mark.parametrize('kind', ['llada2_moe_veomni', 'llada2_moe'])
def test_stacked_experts(kind, tmp_path):
  """dFactory's files hold the same model, whatever config.json calls them."""
  held = moe_models.tensors('llada2')
  plain = moe_models.write(tmp_path / 'a', 'llada2', held)
  path = moe_models.write(tmp_path / 'b', 'llada2', stacked(held), model_type=kind)
  (cfg, params), (_, want) = weights.load_hf(path), weights.load_hf(plain)
  same(*map(jax.device_get, (params, want)))
  hf.save_hf(tmp_path / 'c', cfg, params, source=path)
  same(*(load_file(tmp_path / x / 'model.safetensors') for x in 'cb'))


def test_sharded_loading_reads_each_part_once(tmp_path):
  """Eight devices hold what one holds. A device's part touches its tensors alone."""
  source = moe_models.write(tmp_path / 'a', 'llada2')
  grid = mesh.make_mesh(fsdp=4, tensor=2)
  (cfg, params), (_, want) = (weights.load_hf(source, mesh=x) for x in (grid, None))
  same(*map(jax.device_get, (params, want)))
  hf.save_hf(tmp_path / 'b', cfg, params, source=source)
  same(*(load_file(tmp_path / x / 'model.safetensors') for x in 'ba'))
  tree, family = {'params': families.shapes(cfg)['params']}, families.LLADA2
  entry = {x.path: x for x in families.entries(tree, family, cfg)}
  touched, held = [], moe_models.tensors('llada2')

  class Recorded:
    def __init__(self, name):
      self.name = name

    def __getitem__(self, at):
      touched.append((self.name, held[self.name][at].size))
      return held[self.name][at]

  at = (slice(1, 2), slice(4, 6), slice(0, 16), slice(8, 32))  # layer, expert, D, F
  up = read.read_part(entry['params/layers_1/experts_up/kernel'], Recorded, at)
  names = [f'model.layers.2.mlp.experts.{e}.up_proj.weight' for e in (4, 5)]
  assert touched == [(name, 16 * 24) for name in names]
  same(up[0, 1], held[names[1]][8:32, :16].T)
  assert up.ctypes.data % 64 == 0  # a CPU's array is made of it without a copy
  k = read.read_part(
    entry['params/layers_0/k/kernel'],
    Recorded,
    (slice(None), slice(None), slice(8, 24)),
  )
  fused = held['model.layers.0.attention.query_key_value.weight']
  same(k[0], fused[96 + 8 : 96 + 24].T)


# --- what the files may lack, and what they may not say


def test_a_router_without_its_bias(tmp_path, caplog):
  """LLaDA2's class begins with zeros, and so do we; a lost one of many is an error."""
  held = moe_models.tensors('llada2')
  bias = [name for name in held if name.endswith('expert_bias')]
  bare = {k: x for k, x in held.items() if k not in bias}
  path = moe_models.write(tmp_path / 'a', 'llada2', bare)
  params = weights.load_hf(path)[1]['params']
  assert not params['layers_1']['router']['bias'].any() and 'zeros' in caplog.text
  path = moe_models.write(tmp_path / 'b', 'llada2', bare | {bias[0]: held[bias[0]]})
  with pytest.raises(ValueError, match=f'missing: {bias[1]}'):
    weights.load_hf(path)


UNREAD = {  # values that would change the law, were they read by the official class
  'llada2': dict(
    norm_topk_prob=False, score_function='softmax', moe_router_enable_expert_bias=False,
    router_dtype='bf16', use_qk_norm=False, norm_head=True, use_sliding_window=True,
  ),
  'lladamoe': dict(
    norm_topk_prob=True, routed_scaling_factor=2.5, router_num_group=4,
    router_topk_group=2, moe_router_score_function='sigmoid',
  ),
  'sdar_moe': dict(max_window_layers=1),
}  # fmt: skip


@pytest.mark.parametrize('family', UNREAD)
def test_fields_that_no_class_reads_change_nothing(family, tmp_path, caplog):
  plain = hf.read_config(config_only(tmp_path / 'a', family, mask_token_id=301,
                                     eos_token_id=298, block_size=8))  # fmt: skip
  caplog.clear()
  other = hf.read_config(config_only(tmp_path / 'b', family, mask_token_id=301,
                                     eos_token_id=298, block_size=8,
                                     **UNREAD[family]))  # fmt: skip
  assert plain == other
  warned = family != 'sdar_moe'
  assert ('official class' in caplog.text) == warned and len(caplog.records) == warned


REFUSED = [
  ('llada2', dict(use_bias=True), 'use_bias = True'),
  ('llada2', dict(num_experts_per_tok=17), 'tok = 17 .*num_experts = 16'),
  ('llada2', dict(num_experts_per_tok=9), 'topk_group = 2 .*9 experts'),
  ('llada2', dict(n_group=3), 'n_group = 3 .*divisor'),
  ('llada2', dict(n_group=16), 'n_group = 16 .*half'),
  ('llada2', dict(topk_group=5), 'topk_group = 5 .*at most 4'),
  ('llada2', dict(num_experts='16'), "num_experts = '16' must be a whole"),
  ('llada2', dict(moe_intermediate_size=None), 'moe_intermediate_size is missing'),
  ('llada2', dict(intermediate_size=None), 'intermediate_size is missing'),
  ('llada2', dict(partial_rotary_factor=1.5), 'factor = 1.5 .*at most 1'),
  ('llada2', dict(rope_scaling={'type': 'yarn', 'factor': 4.0}), 'rope_scaling'),
  ('llada2', dict(n_shared_experts=2), 'n_shared_experts = 2 is an unknown'),
  ('llada2', dict(num_experts_per_block=48), 'num_experts_per_block = 48'),
  ('lladamoe', dict(moe_layer_freq=[0, 1]), 'moe_layer_freq = .*3 numbers'),
  ('lladamoe', dict(moe_layer_freq=1), 'moe_layer_freq = 1 must be a list'),
  ('lladamoe', dict(clip_qkv=8.0), 'clip_qkv = 8.0'),
  ('lladamoe', dict(head_dim=24), 'head_dim = 24 .*hidden_size'),
  ('lladamoe', dict(attention_bias=True), 'attention_bias = True'),
  ('lladamoe', dict(partial_rotary_factor=...), 'partial_rotary_factor is missing'),
  ('sdar_moe', dict(decoder_sparse_step=0), 'decoder_sparse_step = 0 must be'),
  ('sdar_moe', dict(mlp_only_layers=3), 'mlp_only_layers = 3 must be a list'),
  ('sdar_moe', dict(norm_topk_prob='yes'), "norm_topk_prob = 'yes' must be true"),
  ('sdar_moe', dict(partial_rotary_factor=0.5), 'partial_rotary_factor = 0.5'),
  ('sdar_moe', dict(use_sliding_window=True), 'use_sliding_window = True'),
  ('sdar_moe', dict(shared_expert_intermediate_size=8), 'shared_expert_intermediate'),
]  # fmt: skip


@pytest.mark.parametrize('family, changes, message', REFUSED)
def test_other_routers_are_refused(family, changes, message, tmp_path):
  folder = config_only(tmp_path, family, mask_token_id=301, **changes)
  with pytest.raises(ValueError, match=message) as error:
    hf.read_config(folder)
  assert '\n' not in str(error.value)


def test_transformers_5_nests_the_rotary_share(tmp_path):
  rope = dict(rope_type='default', rope_theta=7e5, partial_rotary_factor=0.25)
  folder = config_only(tmp_path, 'llada2', mask_token_id=301, eos_token_id=298,
                       rope_theta=..., partial_rotary_factor=...,
                       rope_parameters=rope)  # fmt: skip
  found = hf.read_config(folder)
  assert (found['rotary'], found['rope_theta']) == (0.25, 7e5)


@pytest.mark.parametrize(
  'family, changes', [
    ('llada2', dict(num_experts=None)), ('llada2', dict(first_k_dense_replace=3)),
    ('lladamoe', dict(moe_layer_freq=[0, 0, 0])), ('sdar_moe', dict(num_experts=0)),
    ('sdar_moe', dict(mlp_only_layers=[0, 1, 2])),
  ],
)  # fmt: skip
def test_a_model_without_experts_is_dense(family, changes, tmp_path):
  cfg = model.ModelConfig(
    **hf.read_config(
      config_only(tmp_path, family, mask_token_id=301, eos_token_id=298, **changes)
    )
  )
  assert not cfg.experts and cfg.mlp == 160
  assert cfg.rotary == (0.5 if family == 'llada2' else 1)


def test_a_model_that_no_family_holds(tmp_path):
  """The fields in the way are named; a dense model that rotates in part is LLaDA2's."""
  cfg, params = weights.load_hf(moe_models.write(tmp_path / 'a', 'llada2'))
  odd = dataclasses.replace(cfg, router_bias='', shared_mlp=48)
  with pytest.raises(
    ValueError, match="llada2_moe has no router_bias = '', shared_mlp"
  ):
    families.kind_of(odd)
  odd = dataclasses.replace(cfg, router='softmax', router_scale=2.0)
  with pytest.raises(
    ValueError, match='sdar_moe has no .*router_scale.*lladamoe has no'
  ):
    families.kind_of(odd)
  dense = dataclasses.replace(cfg, experts=0, dense_layers=())
  assert families.kind_of(dense) == 'llada2_moe'


# --- adapters


def with_adapter(family, targets, tmp_path):
  """(cfg, its adapters, the directory of the base) with values everywhere."""
  source = moe_models.write(tmp_path / 'base', family)
  cfg, _ = weights.load_hf(source, lora_rank=2, lora_alpha=4.0, lora_targets=targets)
  draw = np.random.default_rng(3)
  lora = jax.tree.map(
    lambda x: draw.normal(size=x.shape).astype(np.float32), families.shapes(cfg)['lora']
  )
  return cfg, lora, source


@pytest.mark.parametrize(
  'family, targets, count', [
    ('llada2', 'experts', 2 * (6 + 3 + 6 + 96)), ('sdar_moe', 'all', 2 * 12),
    *(
      pytest.param(*x, marks=pytest.mark.slow) for x in (
        ('llada2', 'all', 2 * (3 * 2 + 3 + 2 * 3)), ('llada2', 'paper', 2 * (3 + 1)),
        ('lladamoe', 'experts', 2 * (12 + 3 + 96)),
        ('sdar_moe', 'experts', 2 * (12 + 144)),
      )
    ),
  ],
)  # fmt: skip
def test_adapters_round_trip(family, targets, count, tmp_path):
  """To the bit, under PEFT's names. One linear of theirs has one adapter, whose product
  is that of ours below each other."""
  cfg, lora, source = with_adapter(family, model.LORA_TARGETS[targets], tmp_path)
  hf.save_adapter(tmp_path / 'x', cfg, {'lora': lora}, 'owner/base', source)
  same(jax.device_get(hf.read_adapter(str(tmp_path / 'x'), cfg, source))['lora'], lora)
  held = load_file(tmp_path / 'x' / peft.ADAPTER)
  assert len(held) == count
  told = json.loads((tmp_path / 'x' / 'adapter_config.json').read_text())
  assert all(f'model.layers.{i}.' in ' '.join(held) for i in range(3))
  if family == 'llada2':
    stem = 'base_model.model.model.layers.1.attention.query_key_value.lora_'
    a, b = (held[f'{stem}{x}.weight'] for x in 'AB')
    layer = lora['layers_1']
    parts = {x: (layer[x]['a'][0] @ layer[x]['b'][0]).T for x in 'qkv'}
    np.testing.assert_allclose(b @ a, np.concatenate(list(parts.values())), atol=1e-5)
    assert told['rank_pattern'] == {'query_key_value': 6} and len(a) == 6
    assert told['alpha_pattern'] == {'query_key_value': 12.0}
  else:
    assert told['rank_pattern'] == {}
  tree = {'params': families.shapes(dataclasses.replace(cfg, lora_rank=0))['params']}
  modules = {n.removesuffix('.weight') for e in
             families.entries(tree, read.family_for(cfg, source), cfg)
             for n in e.names}  # fmt: skip
  matched = {m for m in modules if re.fullmatch(told['target_modules'], m)}
  ours = {n.removeprefix('base_model.model.').rsplit('.lora_', 1)[0] for n in held}
  assert matched == ours


def test_an_adapter_that_peft_trained_on_the_fused_linear(tmp_path):
  """Its parts share a; rows that are no target, or another rank, are refused."""
  cfg, lora, source = with_adapter('llada2', '^(q|k|v)$', tmp_path)
  out = tmp_path / 'x'
  hf.save_adapter(out, cfg, {'lora': lora}, '', source)
  draw, held = np.random.default_rng(5), load_file(out / peft.ADAPTER)
  for name, x in held.items():
    shape = (2, 64) if 'lora_A' in name else (x.shape[0], 2)
    held[name] = draw.normal(size=shape).astype(np.float32)
  save_file(held, out / peft.ADAPTER)
  told = json.loads((out / 'adapter_config.json').read_text())
  plain = told | {'rank_pattern': {}, 'alpha_pattern': {}}
  (out / 'adapter_config.json').write_text(json.dumps(plain))
  got = hf.read_adapter(str(out), cfg, source)['lora']['layers_0']
  stem = 'base_model.model.model.layers.0.attention.query_key_value.lora_'
  a, b = (held[f'{stem}{x}.weight'] for x in 'AB')
  for name, rows in (
    ('q', slice(0, 96)),
    ('k', slice(96, 144)),
    ('v', slice(144, 192)),
  ):
    same(got[name]['a'][0], a.T)
    same(got[name]['b'][0], b[rows].T)
  only_q = dataclasses.replace(cfg, lora_targets='^q$')
  with pytest.raises(ValueError, match='rows that are no target'):
    hf.read_adapter(str(out), only_q, source)
  save_file(
    {n: x[:1] if 'lora_A' in n else x for n, x in held.items()}, out / peft.ADAPTER
  )
  with pytest.raises(ValueError, match='rank 1.*lora.rank = 2'):
    hf.read_adapter(str(out), cfg, source)


def test_merged_experts_and_a_quantized_base(tmp_path):
  """An adapter of experts is added to each of them; few bits are restored."""
  targets = model.LORA_TARGETS['experts']
  cfg, lora, source = with_adapter('llada2', targets, tmp_path)
  params = weights.load_hf(source)[1]['params']
  up = params['layers_1']['experts_up']
  up['kernel'] = model.quantize(up['kernel'], 'int8')
  hf.save_hf(tmp_path / 'b', cfg, {'params': params, 'lora': lora}, source=source)
  held = load_file(pathlib.Path(tmp_path) / 'b' / 'model.safetensors')
  part = lora['layers_1']['experts_up']
  for layer, expert in ((0, 3), (1, 15)):
    want = np.asarray(model.dense(up['kernel']))[layer, expert]
    want = want + part['a'][layer, expert] @ part['b'][layer, expert] * 2
    name = f'model.layers.{layer + 1}.mlp.experts.{expert}.up_proj.weight'
    np.testing.assert_allclose(held[name], want.T, atol=1e-5)
  gate = held['model.layers.1.mlp.gate.weight']
  same(gate, load_file(f'{source}/model.safetensors')['model.layers.1.mlp.gate.weight'])
