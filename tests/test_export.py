"""Writing checkpoints and adapters, and reading them back."""

import dataclasses
import json
import os
import re
import types

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from configs import base
from dmpo_jax import build, checkpoint, data, hf, mesh, model, weights
from dmpo_jax.hf import write
from dmpo_jax.tools import costs

KINDS = {
  'llada': dict(),
  'a2d-qwen3': dict(qk_norm=True, kv_heads=1, head_dim=6),
  'Dream': dict(qkv_bias=True, shift=True, kv_heads=1),
  'a2d-llama': dict(head_dim=10, tied=True),
  'sdar': dict(qk_norm=True, block_causal=4),
}


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.smoke
@pytest.mark.parametrize('kind', KINDS)
def test_merged_weights_give_the_same_logits(kind, tiny, weights_of, tmp_path):
  """The directory gives the logits of base and adapters in memory."""
  cfg = dataclasses.replace(tiny, lora_rank=2, **KINDS[kind])
  params = weights_of(cfg)
  assert hf.kind_of(cfg) == kind
  hf.save_hf(tmp_path, cfg, params, shard_bytes=4000)
  if cfg.qk_norm:  # transformers' default is not the model's head size
    written = json.loads((tmp_path / 'config.json').read_text())
    assert written['head_dim'] == (cfg.head_dim or cfg.width // cfg.heads)
  again, read = weights.load_hf(str(tmp_path))
  tokens = write.probe(cfg)
  close(model.full_logits(again, read, tokens), model.full_logits(cfg, params, tokens))
  alone = {'params': params['params']}
  assert (
    np.abs(
      model.full_logits(cfg, alone, tokens) - model.full_logits(cfg, params, tokens)
    ).max()
    > 1e-2
  )  # the adapters matter


def test_index_lists_every_tensor_once(tiny, params, tmp_path):
  """A tensor lies in the file that the index says; no file is over the limit."""
  limit = 3000
  hf.save_hf(tmp_path, tiny, params, shard_bytes=limit)
  index = json.loads((tmp_path / hf.INDEX).read_text())
  files = sorted(set(index['weight_map'].values()))
  assert len(files) > 2
  assert files[0] == f'model-00001-of-{len(files):05d}.safetensors'
  found = {}
  for name in files:
    held = load_file(tmp_path / name)
    assert not set(held) & set(found)
    assert set(held) == {k for k, v in index['weight_map'].items() if v == name}
    assert len(held) == 1 or sum(x.nbytes for x in held.values()) <= limit
    found |= held
  total = sum(x.nbytes for x in found.values())
  assert total == index['metadata']['total_size']
  assert total == 4 * model.count_params(params)


def test_eight_devices_write_the_same_files(tiny, params, tmp_path):
  """Sharded parameters are written whole."""
  grid = mesh.make_mesh(fsdp=4, tensor=2)
  spread = jax.device_put(params, mesh.shardings(params, grid))
  for name, tree in (('one', params), ('eight', spread)):
    hf.save_hf(tmp_path / name, tiny, tree)
  one, eight = (load_file(tmp_path / n / 'model.safetensors') for n in ('one', 'eight'))
  assert one.keys() == eight.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], eight[name])


def test_small_files_of_the_source_are_copied(tiny, params, tmp_path):
  """config.json, tokenizer and remote code are copied, weights are not."""
  source = tmp_path / 'source'
  hf.save_hf(source, tiny, params, data.char_tokenizer(), shard_bytes=3000)
  (source / 'modeling_llada.py').write_text('# theirs')
  config = (source / 'config.json').read_text()
  hf.save_hf(tmp_path / 'out', tiny, params, source=str(source))
  names = set(os.listdir(tmp_path / 'out'))
  assert {
    'config.json',
    'tokenizer.json',
    'modeling_llada.py',
    'model.safetensors',
  } <= names
  assert not any('-of-' in n or n == hf.INDEX for n in names)
  assert (tmp_path / 'out' / 'config.json').read_text() == config


def test_links_out_of_the_source_are_refused(tiny, params, tmp_path):
  """An export is given away, so it holds no file from outside of its source. The
  hub's cache consists of links within itself, which are followed."""
  cache = tmp_path / 'models--x'
  source = cache / 'snapshots' / '1'
  hf.save_hf(source, tiny, params)
  (cache / 'blobs').mkdir()
  (source / 'config.json').rename(cache / 'blobs' / 'abc')
  (source / 'config.json').symlink_to('../../blobs/abc')
  (tmp_path / 'out').mkdir()
  write.copy_small(str(source), str(tmp_path / 'out'))
  assert [p.name for p in (tmp_path / 'out').iterdir()] == ['config.json']
  assert not (tmp_path / 'out' / 'config.json').is_symlink()
  (tmp_path / 'id_rsa').write_text('mine')
  (source / 'notes.txt').symlink_to(tmp_path / 'id_rsa')
  with pytest.raises(ValueError, match='notes.txt .*id_rsa.*copy'):
    write.copy_small(str(source), str(tmp_path / 'out'))


def test_adapter_reads_back_to_the_bit(tiny, weights_of, tmp_path):
  """Keeps rank and scale; target_modules matches the layers' linears alone."""
  cfg = dataclasses.replace(tiny, lora_rank=3, lora_alpha=7.0)
  params = weights_of(cfg)
  hf.save_adapter(tmp_path, cfg, params, 'owner/base')
  read = hf.read_adapter(str(tmp_path), cfg)
  jax.tree.map(np.testing.assert_array_equal, read, {'lora': params['lora']})
  written = json.loads((tmp_path / 'adapter_config.json').read_text())
  assert (written['r'], written['lora_alpha'], written['base_model_name_or_path']) == (
    3,
    7.0,
    'owner/base',
  )
  matches = lambda name: re.fullmatch(written['target_modules'], name)
  assert matches('model.transformer.blocks.13.ff_out')
  assert not matches('model.transformer.ff_out')  # the head
  held = load_file(tmp_path / 'adapter_model.safetensors')
  assert held[
    'base_model.model.model.transformer.blocks.1.ff_out.lora_A.weight'
  ].shape == (3, tiny.mlp)
  stems = {re.match(r'base_model\.model\.(.*)\.lora_', n)[1] for n in held}
  assert len(stems) == 7 * cfg.layers and all(map(matches, stems))


# What PEFT 0.18 writes beside the fields of save_adapter, and what unsloth adds.
PEFT_DEFAULTS = {
  'init_lora_weights': 'gaussian',
  'alora_invocation_tokens': None,
  'alpha_pattern': {},
  'arrow_config': None,
  'auto_mapping': None,
  'corda_config': None,
  'ensure_weight_tying': False,
  'eva_config': None,
  'exclude_modules': None,
  'layer_replication': None,
  'layers_pattern': None,
  'layers_to_transform': None,
  'loftq_config': {},
  'lora_bias': False,
  'megatron_config': None,
  'megatron_core': 'megatron.core',
  'peft_version': '0.18.0',
  'qalora_group_size': 16,
  'rank_pattern': {},
  'revision': 'main',
  'target_parameters': [],
  'trainable_token_indices': None,
  'unsloth_fixed': True,
  'use_qalora': False,
}


@pytest.mark.parametrize(
  'there', [(), ('adapter_model.bin',), ('adapter_model-00001-of-00002.safetensors',)]
)
def test_an_adapter_without_its_file_is_not_called_damaged(
  there, tiny, weights_of, tmp_path
):
  """The file is missing; what is there instead is named."""
  cfg = dataclasses.replace(tiny, lora_rank=3)
  hf.save_adapter(tmp_path, cfg, weights_of(cfg))
  (tmp_path / 'adapter_model.safetensors').unlink()
  for name in there:
    (tmp_path / name).write_bytes(b'x')
  with pytest.raises(ValueError, match='has no adapter_model.safetensors') as info:
    hf.check_adapter(str(tmp_path), cfg)
  said = str(info.value)
  assert 'damaged' not in said and all(name in said for name in there)


def test_an_adapter_on_another_base_warns(tiny, weights_of, tmp_path, caplog):
  """A name is compared without its folders; only a name that differs warns."""
  cfg = dataclasses.replace(tiny, lora_rank=3)
  hf.save_adapter(tmp_path, cfg, weights_of(cfg), 'GSAI-ML/LLaDA-8B-Instruct')
  check = lambda base: hf.check_adapter(str(tmp_path), cfg, '', base)
  for same in ('GSAI-ML/LLaDA-8B-Instruct', '/models/LLaDA-8B-Instruct/'):
    check(same)
  assert not caplog.records
  for other in ('GSAI-ML/LLaDA-1.5', ''):
    check(other)
    assert (
      f"'GSAI-ML/LLaDA-8B-Instruct', but model.checkpoint = '{other}'" in caplog.text
    )


def test_wrong_adapters_are_refused(tiny, weights_of, tmp_path):
  """An adapter has another rank, scale, kind, target or base."""
  cfg = dataclasses.replace(tiny, lora_rank=3)
  hf.save_adapter(tmp_path, cfg, weights_of(cfg), 'owner/base')
  change = lambda **fields: dataclasses.replace(cfg, **fields)
  for other, message in (
    (change(lora_rank=4), 'r = 3, but lora.rank = 4'),
    (change(lora_alpha=1.0), 'lora_alpha = 64.0, but lora.alpha = 1.0'),
    (change(lora_targets='^q$'), 'unexpected.*owner/base'),
    (change(mlp=8), r'is \(3, 24\), but config.json means \(3, 8\)'),
    (change(layers=3), 'missing: .*blocks.2.*'),
  ):
    with pytest.raises(ValueError, match=message):
      hf.read_adapter(str(tmp_path), other)
  path = tmp_path / 'adapter_config.json'
  written = json.loads(path.read_text())
  for name, value, message in (
    ('use_dora', True, 'use_dora = True'),
    ('peft_type', 'LOHA', "peft_type = 'LOHA'"),
    ('alora_invocation_tokens', [1, 2], r'alora_invocation_tokens = \[1, 2\]'),
    ('use_qalora', True, 'use_qalora = True'),
    ('layer_replication', [[0, 1], [0, 1]], 'layer_replication'),
    ('target_parameters', ['mlp.experts.gate_up_proj'], 'target_parameters'),
    ('arrow_config', {'top_k': 2}, 'arrow_config'),
    ('trainable_token_indices', [1], 'trainable_token_indices'),
    ('lora_bias', True, 'lora_bias = True'),
    ('corda_config', {'corda_method': 'kpm'}, 'corda_config'),
    ('a_field_of_2027', 0.5, 'a_field_of_2027 = 0.5'),
    ('rank_pattern', {'q_proj': 8}, 'rank_pattern'),
    ('r', '3', "r = '3', but lora.rank = 3"),
    ('init_lora_weights', 'pissa_niter_4', "init_lora_weights = 'pissa_niter_4'"),
    ('init_lora_weights', 'olora', "init_lora_weights = 'olora'"),
  ):
    path.write_text(json.dumps(written | {name: value}))
    with pytest.raises(ValueError, match=message):
      hf.read_adapter(str(tmp_path), cfg)
  path.write_text(json.dumps(written | PEFT_DEFAULTS))
  hf.read_adapter(str(tmp_path), cfg)
  with pytest.raises(ValueError, match='lora.path = .*adapter_config.json'):
    hf.read_adapter(str(tmp_path / 'nowhere'), cfg)


def fake_run(cfg):
  """Returns the fields of a Built that hf.export needs."""
  return types.SimpleNamespace(
    model=cfg,
    config=base.get_config(),
    tokenizer=data.char_tokenizer(),
    mesh=mesh.make_mesh(),
    steps=types.SimpleNamespace(digest=jax.jit(checkpoint.digest)),
  )


def test_export_reports_the_difference(tiny, weights_of, tmp_path):
  """Both formats report the difference of what was read back: next to nothing."""
  ids = data.char_tokenizer()
  cfg = dataclasses.replace(
    tiny,
    lora_rank=2,
    vocab=len(ids),
    mask_id=ids.mask_token_id,
    eos_id=ids.eos_token_id,
    pad_id=ids.pad_token_id,
  )
  params = weights_of(cfg)
  params = jax.device_put(params, mesh.shardings(params, mesh.make_mesh()))
  frozen = {'params': params['params']}
  for kind in ('merged', 'adapter'):
    written = hf.export(fake_run(cfg), params, frozen, str(tmp_path / kind), kind)
    assert written['max_logit_difference'] < 3e-5 * written['max_logit']


def test_share_of_the_update_that_survives_rounding(
  tiny, weights_of, tmp_path, monkeypatch
):
  """All of it in float32. Of a tiny one little is left in bfloat16, which is warned of:
  at a step of 2 ** -8 of a weight, a change of 1e-6 moves few weights."""
  warnings = []
  monkeypatch.setattr(
    write.logging, 'warning', lambda text, *args: warnings.append(text % args)
  )
  ids = data.char_tokenizer()
  fields = dict(vocab=len(ids), mask_id=ids.mask_token_id, eos_id=ids.eos_token_id)
  kept = {}
  for dtype in ('float32', 'bfloat16'):
    cfg = dataclasses.replace(
      tiny, lora_rank=2, param_dtype=dtype, pad_id=ids.pad_token_id, **fields
    )
    params = weights_of(cfg)
    small = jax.tree.map(lambda x: 1e-3 * x, params['lora'])
    params = {'params': optax.tree.cast(params['params'], dtype), 'lora': small}
    told = hf.export(
      fake_run(cfg),
      params,
      {'params': params['params']},
      str(tmp_path / dtype),
      'merged',
    )
    kept[dtype] = told['update_kept']
    held = load_file(tmp_path / dtype / 'model.safetensors')
    hf.save_hf(tmp_path / f'{dtype}_base', cfg, {'params': params['params']})
    alone = load_file(tmp_path / f'{dtype}_base' / 'model.safetensors')
    changed = sum(np.count_nonzero(held[name] != alone[name]) for name in held)
    meant = sum(
      x.size for x in jax.tree.leaves(params['params']['layers']) if x.ndim > 2
    )
    np.testing.assert_allclose(kept[dtype], changed / meant, rtol=1e-3)
  assert kept['float32'] > 0.9 and 0 < kept['bfloat16'] < 0.1
  assert len(warnings) == 1 and '--format=adapter' in warnings[0]


def test_dtype_of_config_json_is_that_of_the_weights(tiny, params, tmp_path):
  """transformers would round float32 weights to the dtype that the source names."""
  source = tmp_path / 'source'
  hf.save_hf(source, tiny, params)
  path = source / 'config.json'
  path.write_text(
    json.dumps(json.loads(path.read_text()) | {'torch_dtype': 'bfloat16'})
  )
  hf.save_hf(tmp_path / 'out', tiny, params, source=str(source))
  written = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert written['torch_dtype'] == 'float32'


@pytest.mark.parametrize('kind', ['int8', 'nf4'])
def test_export_of_a_quantized_base_is_the_policy_that_was_trained(
  kind, tiny, weights_of, tmp_path, monkeypatch
):
  """Merged it has the restored base. The adapter fits the published base, on which it
  is another policy: the report says how far, and a warning what it is."""
  warnings = []
  monkeypatch.setattr(
    write.logging, 'warning', lambda text, *args: warnings.append(text % args)
  )
  ids = data.char_tokenizer()
  cfg = dataclasses.replace(
    tiny,
    lora_rank=2,
    width=64,
    mlp=64,
    vocab=len(ids),
    mask_id=ids.mask_token_id,
    eos_id=ids.eos_token_id,
    pad_id=ids.pad_token_id,
  )
  params, run = weights_of(cfg), fake_run(cfg)
  run.config.model.quantize = kind
  published = {'params': params['params']}
  digest = jax.jit(checkpoint.digest)
  run.steps = types.SimpleNamespace(init=lambda: published, digest=digest)
  copy = jax.tree.map(jax.numpy.copy, published)
  frozen = build.make_quantize(run.config, run.mesh)(copy)
  policy = {**frozen, 'lora': params['lora']}
  told = {
    name: hf.export(run, policy, frozen, str(tmp_path / name), name)
    for name in ('merged', 'adapter')
  }
  tokens = write.probe(cfg)
  trained = model.full_logits(cfg, policy, tokens)
  again, read = weights.load_hf(str(tmp_path / 'merged'))
  np.testing.assert_allclose(model.full_logits(again, read, tokens), trained, atol=1e-3)
  assert told['merged']['max_logit_difference'] < 1e-4 * told['merged']['max_logit']
  far = np.abs(model.full_logits(cfg, {**params}, tokens) - trained).max()
  np.testing.assert_allclose(told['adapter']['max_logit_difference'], far, rtol=1e-3)
  assert far > 1e-2 and len(warnings) == 1 and kind in warnings[0]


def test_interrupted_export_leaves_nothing_under_its_name(
  tiny, weights_of, tmp_path, monkeypatch
):
  """The same command then writes it."""
  cfg = dataclasses.replace(tiny, lora_rank=2)
  params, folder = weights_of(cfg), tmp_path / 'out'
  arguments = params, {'params': params['params']}, str(folder), 'adapter'

  def full(*_):
    raise OSError('the disk is full')

  with monkeypatch.context() as m:
    m.setattr(write, 'write_tensors', full)
    with pytest.raises(OSError):
      hf.export(fake_run(cfg), *arguments)
  assert not folder.exists()
  hf.export(fake_run(cfg), *arguments)
  assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_useless_exports_are_refused(tiny, weights_of, tmp_path):
  """Nothing was trained, there is no adapter, or the directory is not empty."""
  cfg = dataclasses.replace(tiny, lora_rank=2)
  params = weights_of(cfg)
  frozen = {'params': params['params']}
  same = {
    **frozen,
    'lora': jax.tree_util.tree_map_with_path(
      lambda path, x: x * (path[-1].key == 'a'), params['lora']
    ),
  }
  refused = lambda *args: pytest.raises(ValueError, match=args[0])
  folder = str(tmp_path / 'new')
  with refused('equals its base in every weight'):
    hf.export(fake_run(cfg), same, frozen, folder, 'merged')
  with refused('equals its base in every weight'):
    hf.export(fake_run(tiny), frozen, frozen, folder, 'merged')
  with refused('--format=adapter: .*lora.rank = 0'):
    hf.export(fake_run(tiny), frozen, frozen, folder, 'adapter')
  with refused('--format=adapter: --of=base'):
    hf.export(fake_run(cfg), frozen, frozen, folder, 'adapter')
  (tmp_path / 'x').write_text('')
  with refused('--out=.*not empty'):
    hf.export(fake_run(cfg), params, frozen, str(tmp_path), 'merged')


# --- adapters and the frozen base


def test_dropout_depends_on_a_rows_key(tiny, weights_of):
  """Dropout is off without keys; with them a row's mask depends on its own key."""
  cfg = dataclasses.replace(tiny, lora_rank=2, lora_dropout=0.5)
  params, tokens = weights_of(cfg), write.probe(cfg)[:, :6]
  run = jax.jit(
    lambda tokens, keys: model.hidden(cfg, params, tokens, dropout_R=keys)[0]
  )
  keys = jax.random.split(jax.random.key(1), 2)
  plain = dataclasses.replace(cfg, lora_dropout=0.0)
  close(
    model.hidden(cfg, params, tokens)[0],
    model.hidden(plain, params, tokens, dropout_R=keys)[0],
  )
  both = run(tokens, keys)
  assert np.abs(both - model.hidden(cfg, params, tokens)[0]).max() > 1e-2
  close(run(tokens[::-1], keys[::-1])[::-1], both)
  close(run(tokens[:1].repeat(2, 0), keys)[0], both[0])
  same = run(tokens[:1].repeat(2, 0), keys)
  assert np.abs(same[0] - same[1]).max() > 1e-2
  # A token's mask depends on its place in the text, not on the padding before it.
  wide, valid = (np.pad(x, ((0, 0), (3, 0))) for x in (tokens, tokens >= 0))
  padded = model.hidden(cfg, params, wide, valid, dropout_R=keys)[0]
  close(padded[:, 3:], both)


@pytest.mark.parametrize('kind, bound', [('int8', 0.5), ('nf4', 0.16)])
def test_quantization_error_is_bounded(kind, bound):
  """int8 is off by half a step of its output's scale, nf4 by half its widest gap."""
  kernel = np.random.default_rng(0).normal(size=(2, 128, 6)).astype(np.float32)
  stored = model.quantize(kernel, kind)
  got = np.asarray(model.dense(stored))
  size = dict(int8=128, nf4=64)[kind]
  parts = kernel.reshape(2, -1, size, 6)
  unit = np.abs(parts).max(2, keepdims=True) / (127 if kind == 'int8' else 1)
  error = np.abs(parts - got.reshape(parts.shape))
  assert (error <= bound * unit * 1.01).all() and error.max() > 0
  with pytest.raises(ValueError, match='model.quantize = nf4 .*64.*24'):
    model.quantize(kernel[:, :24], 'nf4')


def test_adapters_train_on_a_quantized_base(tiny, weights_of):
  """A quantized kernel is sharded like a plain one, and the gradients of the
  adapters are close to those of the plain base."""
  cfg = dataclasses.replace(tiny, lora_rank=2)
  params, grid = weights_of(cfg), mesh.make_mesh(fsdp=4, tensor=2)
  c = base.get_config()
  c.model.quantize = 'int8'
  frozen = {
    'params': jax.device_put(params['params'], mesh.shardings(params['params'], grid))
  }
  stored = build.make_quantize(c, grid)(jax.tree.map(jax.numpy.copy, frozen))
  up = stored['params']['layers']['up']['kernel']
  assert up.qvalue.dtype == np.int8 and up.qvalue.addressable_shards[0].data.shape == (
    tiny.layers,
    tiny.width // 4,
    tiny.mlp // 2,
  )
  np.testing.assert_array_equal(stored['params']['head'], params['params']['head'])
  # What is gathered is one byte a number.
  with jax.set_mesh(grid):
    use = jax.jit(lambda x, kernel: x @ model.dense(kernel, 'up'))
    one = jax.ShapeDtypeStruct(
      up.qvalue.shape[1:], np.int8, sharding=NamedSharding(grid, P('fsdp', 'tensor'))
    )
    scale = jax.ShapeDtypeStruct(
      up.scale.shape[1:],
      up.scale.dtype,
      sharding=NamedSharding(grid, P(None, 'tensor')),
    )
    x = jax.ShapeDtypeStruct(
      (8, tiny.width), np.float32, sharding=NamedSharding(grid, P('fsdp'))
    )
    kernel = dataclasses.replace(up, qvalue=one, scale=scale)
    text = use.lower(x, kernel).compile().as_text()
  assert costs.collectives(text, (1,)) == {
    'all-gather': (1, tiny.width * tiny.mlp // 2)
  }
  tokens = write.probe(cfg)

  def total(lora, frozen):
    return (model.full_logits(cfg, {**frozen, 'lora': lora}, tokens) ** 2).mean()

  grads = jax.jit(jax.grad(total))
  a, b = (grads(params['lora'], f) for f in (stored, params))
  flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
  cosine = flat(a) @ flat(b) / np.linalg.norm(flat(a)) / np.linalg.norm(flat(b))
  assert 0.99 < cosine < 1 - 1e-9


def test_remat_changes_no_gradient(tiny, params):
  """Every policy in REMAT gives the loss and gradient of 'none'."""
  tokens = write.probe(tiny)[:, :5]

  def value(cfg):
    return jax.jit(
      jax.value_and_grad(lambda p: (model.full_logits(cfg, p, tokens) ** 2).mean())
    )(params)

  want = value(tiny)
  for policy in model.REMAT:
    got = value(dataclasses.replace(tiny, remat=policy))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, want
    )
