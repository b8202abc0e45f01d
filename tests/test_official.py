"""Tiny checkpoints against the outputs of the releases' own PyTorch files.

official.npz holds inputs, every 16th logit, and completions with the step that wrote
each token (greedy, float32). They were made on 2026-11-26 with JetAstra/SDAR c2041a8
(modeling_sdar.py, generate.py), ZHZisZZ/dllm ca17675 (a2d qwen3 with the bd3lm sampler;
Dream's modeling and generation_utils) and the hub's Fast_dLLM_v2_7B (modeling.py). The
weights are random numbers, drawn here again from their seeds.
"""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dmpo_jax import layout, model, sampler, weights
from dmpo_jax.types import Masks

GOLDEN = np.load(pathlib.Path(__file__).with_name('official.npz'))
VOCAB, MASK, EOS = 320, 301, 298
COMMON = dict(
  hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
  intermediate_size=160, vocab_size=VOCAB, rms_norm_eps=1e-6, rope_theta=1e6,
  max_position_embeddings=256, mask_token_id=MASK, eos_token_id=EOS, pad_token_id=EOS,
)  # fmt: skip
# model_type, further fields of config.json, seed of the weights
FAMILIES = {
  'sdar': ('sdar', dict(head_dim=24, block_size=4, tie_word_embeddings=False), 100),
  'fast_dllm_v2': ('Fast_dLLM_Qwen', dict(bd_size=8, tie_word_embeddings=False), 500),
  'dream': ('Dream', dict(tie_word_embeddings=False), 600),
  'a2d_bd3lm': (
    'a2d-qwen3',
    dict(head_dim=24, block_size=4, tie_word_embeddings=True, pad_token_id=299),
    700,
  ),
}


def tensors(family):
  """Draws the weights in the order of their names, as they were drawn then."""
  kind, fields, seed = FAMILIES[family]
  dim, qwen3 = fields.get('head_dim', 16), 'head_dim' in fields
  shapes = {'model.embed_tokens.weight': (VOCAB, 64), 'model.norm.weight': (64,)}
  if not fields['tie_word_embeddings']:
    shapes['lm_head.weight'] = (VOCAB, 64)
  for i in range(3):
    layer = f'model.layers.{i}.'
    for name, shape in {
      'input_layernorm': (64,), 'post_attention_layernorm': (64,),
      'mlp.gate_proj': (160, 64), 'mlp.up_proj': (160, 64), 'mlp.down_proj': (64, 160),
      'self_attn.q_proj': (4 * dim, 64), 'self_attn.k_proj': (2 * dim, 64),
      'self_attn.v_proj': (2 * dim, 64), 'self_attn.o_proj': (64, 4 * dim),
    }.items():  # fmt: skip
      shapes[f'{layer}{name}.weight'] = shape
      if not qwen3 and name[-6:] in ('q_proj', 'k_proj', 'v_proj'):
        shapes[f'{layer}{name}.bias'] = shape[:1]
    if qwen3:
      for name in ('q_norm', 'k_norm'):
        shapes[f'{layer}self_attn.{name}.weight'] = (dim,)
  draw, out = np.random.Generator(np.random.PCG64(seed)), {}
  for name in sorted(shapes):
    x = draw.standard_normal(shapes[name])
    if name == 'model.norm.weight':
      x = np.exp(x)
    elif 'q_norm' in name:
      x = 1.4 * np.exp(0.2 * x)
    elif 'norm' in name:
      x = 1 + 0.2 * x
    elif name.endswith('bias') or re.search(r'[vo]_proj', name):
      x = 0.3 * x
    elif '.mlp.' in name:
      x = 0.12 * x
    elif 'embed' in name:
      x = (0.25 if fields['tie_word_embeddings'] else 0.5) * x
    else:  # q, k, head
      x = 0.2 * x
    head = 'embed' if fields['tie_word_embeddings'] else 'lm_head'
    if head in name:  # the special tokens are never the most probable
      x[[EOS, fields.get('pad_token_id', EOS)]] *= 0.3
      x[MASK:] *= 0.3
    out[name] = x.astype(np.float32)
  return out


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """checkpoint(family, **fields) -> (ModelConfig, params), by load_hf."""

  @functools.cache
  def folder(family):
    kind, fields, _ = FAMILIES[family]
    path = tmp_path_factory.mktemp(family)
    config = {**COMMON, **fields, 'model_type': kind}
    (path / 'config.json').write_text(json.dumps(config))
    save_file(tensors(family), path / 'model.safetensors')
    return str(path)

  return lambda family, **fields: weights.load_hf(folder(family), **fields)


def close(logits, name):
  np.testing.assert_allclose(logits[..., ::16], GOLDEN[name], atol=3e-4)


@pytest.mark.parametrize(
  'family, name, fields',
  [
    ('sdar', 'logits_block4', {}),
    ('sdar', 'logits_block8', dict(block_causal=8)),
    ('sdar', 'logits_bidirectional', dict(block_causal=0)),
    ('a2d_bd3lm', 'logits_block4', {}),
    ('a2d_bd3lm', 'logits_bidirectional', dict(block_causal=0)),
    ('dream', 'logits_shifted_right', {}),
  ],
)
def test_logits(family, name, fields, checkpoint):
  cfg, params = checkpoint(family, **fields)
  tokens = jnp.asarray(GOLDEN[f'{family}/input_ids'], jnp.int32)
  close(model.full_logits(cfg, params, tokens), f'{family}/{name}')


def test_raw_logits_of_a_block_causal_family_that_shifts(checkpoint):
  cfg, params = checkpoint('fast_dllm_v2')
  assert cfg.shift and cfg.block_causal == 8
  tokens = jnp.asarray(GOLDEN['fast_dllm_v2/input_ids'], jnp.int32)
  at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  mask = model.attention_mask(cfg, None, at, at)
  h, _ = model.states(cfg, params, model.Inputs(tokens, at, mask))
  close(model.head(cfg, params, h), 'fast_dllm_v2/raw_logits_block8')


def test_the_packed_pass_is_sdars_two_copies(checkpoint):
  cfg, params = checkpoint('sdar')
  clean, noisy = (jnp.asarray(GOLDEN[f'sdar/two_{x}'], jnp.int32)
                  for x in ('clean', 'noisy'))  # fmt: skip
  masks = Masks((clean != noisy)[:, None], jnp.ones((len(clean), 1, 1)))
  found = layout.block_causal(cfg, params, clean, masks, None, None)
  close(model.head(cfg, params, found.hidden), 'sdar/two_logits')


# --- samplers

PICKS = {
  'static': 'confidence', 'dynamic': 'dynamic', 'sequential': 'sequential',
  'maskgit_plus': 'confidence', 'entropy': 'lowest_entropy', 'topk_margin': 'margin',
}  # fmt: skip
# One of each kind and prompt length is run by default, the others as slow tests.
QUICK = {
  'sdar/p5_dynamic_b4_s2_t0.5', 'sdar/p8_static_b8_s3_uneven',
  'sdar/p11_sequential_b4_s4',
  'fast_dllm_v2/p11_b8_sub4_t0.5', 'a2d_bd3lm/p11_bd3lm_b4_s16', 'dream/p7_entropy_s5',
}  # fmt: skip
CASES = [
  pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
  for name in GOLDEN.files
  if re.match(r'[^/]+/p\d+_[^/]*$', name)
]


def settings(name, size, block):
  """Returns the SampleConfig of a case, by its name; size: P and the new tokens."""
  family, case = name.split('/')
  prompt, total = size
  number = lambda letter: float(re.search(rf'_{letter}([\d.]+)', case)[1])
  length = -(-(total - prompt // block * block) // block) * block
  fields = dict(block=block, cache='block')
  if family == 'sdar':
    fields |= dict(
      pick=PICKS[case.split('_')[1]], steps=int(number('s')) * length // block
    )
    if 'dynamic' in case:
      fields['threshold'] = number('t')
  elif family == 'fast_dllm_v2':
    fields |= dict(block=int(number('sub')), pick='threshold', threshold=number('t'))
  elif family == 'a2d_bd3lm':
    length = 16
    fields |= dict(pick='confidence', steps=int(number('s')))
  else:
    length = 16
    pick = PICKS[re.match(r'p\d+_(\w+?)_s\d', case)[1]]
    fields = dict(block=16, pick=pick, steps=int(number('s')), schedule='dream',
                  rank_law='sampling', top_k=50 * ('topk50' in case))  # fmt: skip
  return sampler.SampleConfig(**{'length': length, 'steps': length, **fields})


@pytest.mark.parametrize('name', CASES)
def test_completions(name, checkpoint):
  """Greedy tokens are those of the release, and so are the steps that wrote them."""
  family, case = name.split('/')
  prompt = GOLDEN[f'{family}/prompt{case.split("_")[0][1:]}'].astype(np.int32)
  want = GOLDEN[name]
  found = re.search(r'_b(\d+)', case)
  block = int(found[1]) if found else 16
  fields = {} if family == 'dream' else dict(block_causal=block)
  cfg, params = checkpoint(family, **fields)
  if family == 'a2d_bd3lm':
    cfg = dataclasses.replace(cfg, block_grid='prompt')
  hp = settings(name, (len(prompt), len(want)), block)
  run = jax.jit(lambda params: sampler.generate(
    cfg, params, jnp.asarray(prompt)[None], jax.random.key(0), hp))  # fmt: skip
  out = jax.device_get(run(params))
  tokens, order = out.tokens[0, -hp.length :], out.order[0]
  count = len(want)
  if family == 'a2d_bd3lm' or family == 'dream':
    want = want[-hp.length :]
  else:  # the prompt's end stands on the canvas
    want = want[len(prompt) // block * block :]
  np.testing.assert_array_equal(tokens[: len(want)], want)
  if f'{name}/step' in GOLDEN and family != 'fast_dllm_v2':
    step = GOLDEN[f'{name}/step'][-len(want) :]
    np.testing.assert_array_equal(np.maximum(order[: len(want)], -1), step)
    spent = int(step.max()) + 1 + (hp.cache == 'block')  # and one for the prompt
    assert int(out.forwards) == spent, count
