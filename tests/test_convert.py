"""From an autoregressive checkpoint to a diffusion model, and out again.

tests/autoregressive.py writes the directories and says whose logits the file beside it
holds.
"""

import dataclasses
import json
import os
import pathlib

import autoregressive
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import mostly_slow
from tiny_run import fail_sft_at, interrupt, run_sft, same

from configs import a2d_qwen3, base
from dmpo_jax import (
  anneal,
  build,
  check,
  data,
  hf,
  masking,
  mesh,
  model,
  parts,
  rng,
  types,
)  # fmt: skip
from dmpo_jax.phases import texts

pytest_plugins = 'tiny_run'
GOLDEN = np.load(pathlib.Path(__file__).parent / 'autoregressive.npz')
KINDS = tuple(autoregressive.CONFIGS)
HOWS = ('masked', 'shifted', 'block')
TOKENS = autoregressive.TOKENS.astype(np.int32)[None]
STEPS, ANNEAL = 6, 3


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp('autoregressive')
  return {kind: autoregressive.write(root / kind, kind) for kind in KINDS}


def config_of(folder, how, **fields):
  """A run of seconds that converts a checkpoint."""
  c = base.get_config()
  c.update_from_flattened_dict(
    {
      'model.checkpoint': folder,
      'model.convert': how,
      'model.attention_block': 4 if how == 'block' else -1,
      'data.train_size': 16,
      'data.validation_size': 8,
      'data.test_size': 8,
      'sampler.length': 20,
      'sampler.steps': 20,
      'eval.sampler.length': 64,
      'eval.sampler.steps': 64,
      'eval.batch': 8,
      'sft.steps': STEPS,
      'sft.anneal': ANNEAL,
      'sft.batch': 8,
      'sft.lr': 1e-2,
      'sft.warmup': 0,
      'train.iterations': 0,
      'train.prompts': 2,
      'train.group': 4,
      'train.microbatches': 1,
      'checkpoint.every': 2,
    }
  )
  for s in (c.sampler, c.eval.sampler):
    s.block = 4
    s.cache = 'block' if how == 'block' else 'none'
  c.update_from_flattened_dict(fields)
  return c


def opened(c):
  """Returns the ModelConfig, tokenizer and parameters of a config."""
  folder = c.model.checkpoint
  tokenizer = parts.tokenizer_of(c, folder)
  cfg = parts.model_config(c, tokenizer, folder)
  return cfg, tokenizer, hf.read_params(folder, cfg)


def causal_logits(cfg, params, share=0.0, tokens=TOKENS, valid=None):
  """Logits where a share of the later tokens is seen, as the network gives them."""
  keys = jax.random.split(jax.random.key(3), len(tokens))
  future = types.Future(keys, jnp.float32(share))
  h, _ = model.annealed(cfg, params, tokens, valid, None, future)
  return model.head(cfg, params, h)


@pytest.mark.smoke
@pytest.mark.parametrize('how', HOWS)
@pytest.mark.parametrize('kind', KINDS)
def test_a_converted_model_begins_as_the_autoregressive_one(kind, how, folders):
  """Under a causal mask its logits are those of transformers' own model; only the
  mask's row is new."""
  cfg, tokenizer, params = opened(config_of(folders[kind], how))
  rows = GOLDEN[kind].shape[1]
  if how == 'block':
    cfg_1 = dataclasses.replace(cfg, block_causal=1)
    got = jax.jit(lambda params: model.full_logits(cfg_1, params, TOKENS))(params)
  else:
    got = jax.jit(lambda params: causal_logits(cfg, params))(params)
  want = GOLDEN[kind]
  if cfg.shift:
    want = np.concatenate([want[:1], want[:-1]])
  np.testing.assert_allclose(got[0, :, :rows], want, atol=2e-5)
  spare = autoregressive.SPARE[kind]
  assert (cfg.shift, cfg.block_causal) == (how == 'shifted', 4 * (how == 'block'))
  assert cfg.mask_id == len(autoregressive.known(kind)) == tokenizer.mask_token_id
  assert tokenizer.mask_token == data.MASK_TOKEN
  assert cfg.vocab == rows + (not spare)
  tensors, tree = autoregressive.tensors_of(kind), mesh.fetch(params['params'])
  names = {'embedding': 'model.embed_tokens.weight', 'head': 'lm_head.weight'}
  assert ('head' in tree) == (not cfg.tied)
  for ours in set(tree) & set(names):
    theirs = tensors[names[ours]]
    np.testing.assert_array_equal(tree[ours][: len(theirs)], theirs)
    if not spare:
      np.testing.assert_allclose(tree[ours][-1], theirs.mean(0, np.float64), rtol=1e-6)


# --- the mask token


@pytest.mark.parametrize(
  'kind, token, grows',
  [('qwen3', '<|fim_pad|>', 0), ('llama', '<|reserved_special_token_0|>', 0),
   ('llama', '<MASK>', 1)],
)  # fmt: skip
def test_a_named_token_becomes_the_mask(kind, token, grows, folders):
  """A reserved token keeps its row; another name is a new token."""
  c = config_of(folders[kind], 'masked', **{'model.mask_token': token})
  cfg, tokenizer, params = opened(c)
  tokens = autoregressive.known(kind)
  at = len(tokens) if grows else tokens.index(token)
  assert cfg.mask_id == at == tokenizer.mask_token_id
  assert tokenizer.mask_token == token
  rows = autoregressive.tensors_of(kind)['model.embed_tokens.weight']
  assert cfg.vocab == len(rows) + grows
  if not grows:
    np.testing.assert_array_equal(params['params']['embedding'], rows)


def test_rows_of_a_grown_table_are_the_same_on_any_mesh(folders):
  """Each device reads its part of the table, or only of the new row."""
  c = config_of(folders['llama'], 'masked')
  cfg, _, alone = opened(c)
  grid = mesh.make_mesh(fsdp=4, tensor=2)
  same(mesh.fetch(hf.read_params(folders['llama'], cfg, grid)), mesh.fetch(alone))
  even = dataclasses.replace(cfg, vocab=cfg.vocab + cfg.vocab % 2)
  wide = mesh.fetch(hf.read_params(folders['llama'], even, grid))['params']
  assert even.vocab % 2 == 0 and wide['head'].shape[0] == even.vocab
  np.testing.assert_array_equal(wide['head'][: cfg.vocab], alone['params']['head'])


def edited(folder, name, **changes):
  """Changes a JSON file of a directory."""
  path = pathlib.Path(folder) / name
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BAD = {
  'no convert': ({}, {'model.convert': ''}, 'autoregressive.*model.convert'),
  'has a mask': (
    {'mask_token_id': 3}, {}, "mask token is 3.*diffusion.*model.convert = ''",
  ),
  'a2d': (
    {'model_type': 'a2d-qwen3', 'mask_token_id': 3, 'block_size': 0}, {},
    "'a2d-qwen3'.*model.convert = ''",
  ),
  'an end': ({}, {'model.mask_token': '<|im_end|>'}, 'model.mask_token.*meaning'),
  'padding': ({}, {'model.mask_token': '<|endoftext|>'}, 'model.mask_token.*meaning'),
  'a word': ({}, {'model.mask_token': 'a'}, 'model.mask_token.*meaning'),
  'no block': (
    {}, {'model.convert': 'block'}, 'model.attention_block.*needs the tokens',
  ),
  'a block': ({}, {'model.attention_block': 4}, 'attention_block = 4.*whole text'),
  'misspelt': ({}, {'model.convert': 'mask'}, 'model.convert.*masked'),
  'too long': ({}, {'sft.anneal': STEPS + 1}, 'sft.anneal.*at most sft.steps'),
  'splash': ({}, {'model.attention': 'splash'}, 'sft.anneal needs model.attention'),
}  # fmt: skip


@pytest.mark.parametrize('name', BAD)
def test_what_cannot_be_converted_is_refused(name, tmp_path):
  """The sentence names the field, before any weight is read."""
  changes, fields, message = BAD[name]
  folder = autoregressive.write(tmp_path / 'it', 'qwen3')
  os.remove(tmp_path / 'it' / 'model.safetensors')
  edited(folder, 'config.json', **changes)
  with pytest.raises(ValueError, match=f'(?s){message}'):
    build.build(config_of(folder, 'masked', **fields))


def test_fields_of_a_conversion_need_it(folders):
  """On the command line they are refused where they do nothing."""
  for fields, needs in (
    ({'model.checkpoint': ''}, 'model.convert.*needs model.checkpoint'),
    ({'model.convert': '', 'model.mask_token': '<m>'}, 'mask_token.*model.convert'),
    ({'sft.steps': 0}, 'sft.anneal.*sft.steps > 0'),
  ):
    c = config_of(folders['qwen3'], 'masked', **fields)
    with pytest.raises(ValueError, match=needs):
      check.effects(c, ['model.convert', 'model.mask_token', 'sft.anneal'])


# --- annealing


def test_attention_is_annealed_from_causal_to_whole(folders):
  """At 0 no token sees a later one, at 1 all is seen, to the bit of the plain forward;
  between them the share is seen, whatever the padding."""
  cfg, _, params = opened(config_of(folders['qwen3'], 'masked'))
  rows = np.random.default_rng(0).integers(0, cfg.vocab, (2, 12)).astype(np.int32)
  valid = np.arange(12)[None] >= [[0], [4]]
  look = jax.jit(lambda share, *row: causal_logits(cfg, params, share, *row))
  plain = jax.jit(lambda *row: model.full_logits(cfg, params, *row))
  real = valid[..., None]
  np.testing.assert_array_equal(
    look(1.0, rows, valid) * real, plain(rows, valid) * real
  )
  other = rows.copy()
  other[:, 8] += 1
  for share, moved in ((0.0, [False] * 8 + [True] * 4), (1.0, [True] * 12)):
    gap = np.abs(look(share, rows, valid) - look(share, other, valid)).max(-1) > 1e-6
    assert gap[0].tolist() == moved
    assert (gap[1, 4:] == gap[0, 4:]).all()
  cut = look(0.5, rows[:, 4:], valid[:, 4:])
  np.testing.assert_allclose(look(0.5, rows, valid)[1, 4:], cut[1], atol=1e-5)
  assert np.abs(look(0.5, rows, valid) - plain(rows, valid))[valid].max() > 1e-3


def test_a_share_of_the_later_tokens_is_seen():
  """Each pair with its own chance, independent between rows; more at a larger share."""
  keys, places = jax.random.split(jax.random.key(0), 8), np.tile(np.arange(64), (8, 1))
  mask = lambda share: np.asarray(
    model.annealed_mask(types.Future(keys, jnp.float32(share)), places, None)
  )[:, 0]
  later = np.triu(np.ones((64, 64), bool), 1)
  some, more = mask(0.25), mask(0.5)
  assert some[:, ~later].all() and not (some & ~more).any()
  assert abs(some[:, later].mean() - 0.25) < 0.01  # 4.6 standard errors of 16128 draws
  assert np.corrcoef(some[:, later])[np.triu_indices(8, 1)].max() < 0.1


def test_the_stage_is_a_function_of_the_update(tiny):
  """Blocks double in equal parts of the annealing, and divide the last one."""
  assert anneal.block_sizes(32) == [1, 2, 4, 8, 16, 32]
  assert anneal.block_sizes(12) == [1, 2, 4, 12]
  assert anneal.block_sizes(1) == [1]
  for block in range(1, 65):
    sizes = anneal.block_sizes(block)
    assert sizes[-1] == block and all(block % size == 0 for size in sizes)
  blocks = dataclasses.replace(tiny, block_causal=32)
  got = [anneal.stage_of(blocks, 10, at).block for at in range(11)]
  assert got == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 32]
  assert anneal.stage_of(blocks, 0, 0) == anneal.Stage(32, False)
  assert [anneal.stage_of(tiny, 2, at) for at in (1, 2)] == [(0, True), (0, False)]
  assert anneal.share_of(4, jnp.int32(0)) == 0
  assert anneal.share_of(4, jnp.int32(3)) == 0.75


# --- runs


def loss_of(built, params, at):
  """The loss of update `at` on the training set's rows."""
  state, lesson = built.steps.start_sft(params), texts.lessons_of(built).at(at)
  return float(built.steps.sft(state, {}, lesson, at, 1.0)[1]['loss']), lesson


def first_loss(built, params, lesson):
  """The loss of the first update from causal logits and cross-entropies."""
  cfg, length = built.model, 20
  tokens, valid, _, row = lesson
  key = jax.random.fold_in(rng.key_for(np.uint32(0), 'sft'), 0)
  masks = masking.draw_sft(key, jnp.asarray(row), types.Canvas(length))
  noisy = tokens.copy()
  noisy[:, -length:][masks.masked[:, 0]] = cfg.mask_id
  logits = jax.jit(lambda *x: causal_logits(cfg, params, 0.0, *x))(noisy, valid)
  logp = jax.nn.log_softmax(logits[:, -length:])
  own = np.take_along_axis(np.asarray(logp), tokens[:, -length:, None], -1)[..., 0]
  own = np.where(masks.masked[:, 0], own, 0) * np.asarray(masks.weight)[:, 0]
  return -own.sum() / length / len(tokens)


RUNS = [('qwen3', 'masked'), ('llama', 'shifted'), ('qwen2', 'block')]


@pytest.mark.usefixtures('plain_saves')
@pytest.mark.parametrize('kind, how', mostly_slow(RUNS, RUNS[:1]))
def test_conversion_trains_resumes_and_is_exported(kind, how, folders, tmp_path):
  """It learns through the stages of its annealing; killed within one it ends with the
  same bits; the exported A2D directory has the same logits, mask and chat."""
  built = build.build(config_of(folders[kind], how))
  begun = built.steps.init()
  params = run_sft(built, tmp_path / 'whole')
  before, _ = loss_of(built, begun, STEPS)
  assert loss_of(built, params, STEPS)[0] < before - 0.3
  if how != 'block':
    loss, lesson = loss_of(built, begun, 0)
    np.testing.assert_allclose(loss, first_loss(built, begun, lesson), rtol=1e-4)
    assert abs(loss_of(build.build(plain(built)), begun, 0)[0] - loss) > 1e-3
  killed, _ = fail_sft_at(built, 3, interrupt)
  with pytest.raises(KeyboardInterrupt):
    run_sft(killed, tmp_path / 'killed')
  same(mesh.fetch(run_sft(built, tmp_path / 'killed')), mesh.fetch(params))
  told = hf.export(built, params, params, str(tmp_path / 'out'), 'merged')
  assert told['max_logit_difference'] < 1e-4 * told['max_logit']
  reloaded(kind, how, built, params, tmp_path / 'out')


@pytest.mark.parametrize('kind', a2d_qwen3.KINDS)
def test_the_recipe_converts(kind, folders):
  """After the colon stands what a checkpoint becomes; one without it is planned."""
  c = a2d_qwen3.get_config(f'{kind},h100')
  sizes = build.build(c).model
  assert sizes.block_causal == 32 * (kind == 'block')
  c.model.checkpoint = folders['qwen3']
  cfg = build.build(c).model
  assert (cfg.shift, cfg.block_causal) == (kind == 'shifted', sizes.block_causal)
  assert (c.model.convert, c.sft.anneal > 0) == (kind, kind == 'shifted')
  check.training(c)
  with pytest.raises(ValueError, match='one of block, masked'):
    a2d_qwen3.get_config('block,masked')


def test_annealing_ends_within_the_epochs(folders):
  """The number of updates is known when the texts are read."""
  fields = {'sft.steps': 0, 'sft.epochs': 1, 'data.train_size': 16}
  built = build.build(config_of(folders['qwen3'], 'masked', **fields))
  with pytest.raises(ValueError, match='sft.anneal = 3 .*2 updates of sft.epochs = 1'):
    texts.lessons_of(built)


def plain(built):
  """The config without annealing."""
  c = built.config.copy_and_resolve_references()
  c.sft.anneal = 0
  return c


def reloaded(kind, how, built, params, out):
  """Asserts that an exported directory is an A2D model as dllm reads it, and ours."""
  told = json.loads((out / 'config.json').read_text())
  assert told['model_type'] == f'a2d-{kind}'
  classes = {'qwen2': 'Qwen2', 'qwen3': 'Qwen3', 'llama': 'Llama'}
  assert told['architectures'] == [f'A2D{classes[kind]}LMHeadModel']
  assert told['mask_token_id'] == built.model.mask_id
  assert told['vocab_size'] == built.model.vocab
  assert told['block_size'] == (4 if how == 'block' else 0)
  assert ('right_shift_logits' in told) == (how == 'shifted')
  c = config_of(str(out), '', **{'model.attention_block': -1, 'sft.steps': 0})
  cfg, tokenizer, again = opened(c)
  assert (cfg.shift, cfg.block_causal) == (how == 'shifted', 4 * (how == 'block'))
  assert (cfg.mask_id, cfg.stop_ids) == (built.model.mask_id, built.model.stop_ids)
  look = lambda cfg, tree: jax.jit(lambda p: model.full_logits(cfg, p, TOKENS))(tree)
  got, want = look(cfg, again), look(built.model, params)
  np.testing.assert_allclose(got, want, atol=1e-4)
  text = '1 + 1 is\n<answer>2</answer>'
  assert tokenizer(text)['input_ids'] == built.tokenizer(text)['input_ids']
  assert data.encode_chat(tokenizer, text) == data.encode_chat(built.tokenizer, text)
  assert tokenizer.mask_token == data.MASK_TOKEN
  kept = json.loads((out / 'tokenizer_config.json').read_text())
  assert kept['tokenizer_class'] == autoregressive.CLASSES[kind]
  assert not (out / 'special_tokens_map.json').exists()
