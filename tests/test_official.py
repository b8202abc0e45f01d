"""Tiny checkpoints against the outputs of the releases' own PyTorch files.

official.npz holds inputs, every 16th logit or gradient, and completions with the step
that wrote each token and the forwards that were spent (greedy, float32). They were
made on 2026-11-26 with JetAstra/SDAR c2041a8 (modeling_sdar.py, generate.py),
ZHZisZZ/dllm ca17675 (a2d qwen3 with the bd3lm sampler; Dream's modeling and
generation_utils) and the hub's Fast_dLLM_v2_7B (modeling.py). The weights are random
numbers, drawn here again from their seeds.
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
from marks import mostly_slow
from safetensors.numpy import load_file, save_file

from dmpo_jax import hf, layout, logprob, model, sampler, weights
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


def test_gradients_of_sdars_loss(checkpoint, tmp_path):
  """Cross-entropy over p of a row's level, per token of the answers."""
  cfg, params = checkpoint('sdar')
  clean, noisy = (jnp.asarray(GOLDEN[f'sdar/two_{x}'], jnp.int32)
                  for x in ('clean', 'noisy'))  # fmt: skip
  lengths = GOLDEN['sdar/two_prompt_lengths']
  answers = clean.size - lengths.sum()

  def loss(params):
    masked = (clean != noisy)[:, None]
    logp = logprob.token_logp(cfg, params, clean, masked)
    return -jnp.sum(logp / GOLDEN['sdar/two_p_mask'][:, None, None]) / answers

  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  np.testing.assert_allclose(value, GOLDEN['sdar/loss'], rtol=1e-5)
  norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose(norm, GOLDEN['sdar/total_grad_norm'], rtol=1e-4)
  hf.save_hf(tmp_path, cfg, jax.device_get(grads))
  found = load_file(tmp_path / 'model.safetensors')
  names = [x for x in GOLDEN.files if x.startswith('sdar/grad__')]
  assert len(names) == 6
  for name in names:
    got, want = found[name.removeprefix('sdar/grad__')].ravel(), GOLDEN[name].ravel()
    got = got[::16] if got.size > len(want) else got
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < 1e-3, (name, error)


# --- samplers

PICKS = {
  'static': 'confidence', 'dynamic': 'dynamic', 'sequential': 'sequential',
  'maskgit_plus': 'confidence', 'entropy': 'lowest_entropy', 'topk_margin': 'margin',
}  # fmt: skip
# One of each kind and prompt length is run by default, the others as slow tests.
QUICK = {
  'sdar/p5_dynamic_b4_s2_t0.5', 'sdar/p8_static_b8_s3_uneven',
  'sdar/p11_sequential_b4_s4', 'fast_dllm_v2/p11_b8_sub4_t0.5',
  'a2d_bd3lm/p11_bd3lm_b8_s6', 'a2d_bd3lm/p5_bd3lm_b8_s8_cfg1', 'dream/p7_entropy_s5',
}  # fmt: skip
CASES = mostly_slow(
  [
    name
    for name in GOLDEN.files
    if re.match(r'[^/]+/(p\d|batch)[^/]*_[^/]*\d$', name) and 'prompt' not in name
  ],
  QUICK,
)


@dataclasses.dataclass(frozen=True)
class Case:
  """A completion of a release, by its name and what is known of it."""

  name: str  # family/p{prompt}_{settings}, or family/batch_{settings}

  @property
  def family(self):
    return self.name.split('/')[0]

  def number(self, letter: str, default: float = 0.0) -> float:
    found = re.search(rf'_{letter}([\d.]+)', self.name)
    return float(found[1]) if found else default

  @functools.cached_property
  def block(self):
    return int(self.number('b', 16))

  def prompts(self):
    """Returns (tokens, valid), left-padded."""
    get = lambda x: GOLDEN[f'{self.family}/{x}'].astype(np.int32)
    if 'batch' not in self.name:
      rows = [get('prompt' + re.sub(r'.*/p(\d+)_.*', r'\1', self.name))]
    elif self.family == 'dream':
      return get('batch_prompts'), get('batch_attention_mask').astype(bool)
    else:
      rows = [get(f'batch_prompt{i}') for i in range(3)]
    size = max(map(len, rows))
    pad = lambda x, value: np.pad(x, (size - len(x), 0), constant_values=value)
    valid = [pad(np.ones(len(x), bool), False) for x in rows]
    return np.stack([pad(x, 0) for x in rows]), np.stack(valid)

  def model(self):
    """Returns fields of the model's config."""
    if self.family == 'dream':
      return {}
    return dict(block_causal=0 if 'mdlm' in self.name else self.block)

  def settings(self, new):
    """Returns the SampleConfig; new: tokens after the prompt's whole blocks."""
    length = -(-new // self.block) * self.block
    fields: dict = dict(length=length, block=self.block, cache='block')
    steps = int(self.number('s', 1))
    blocks = length // self.block
    if self.family == 'sdar':
      fields |= dict(pick=PICKS[self.name.split('_')[1]], steps=steps * blocks)
      if 'dynamic' in self.name:
        fields['threshold'] = self.number('t')
    elif self.family == 'fast_dllm_v2':
      fields |= dict(
        block=int(self.number('sub')), pick='threshold', threshold=self.number('t')
      )
    elif self.family == 'a2d_bd3lm':
      guidance = self.number('cfg', 0.0)
      steps = -(-steps // blocks) * blocks  # so many in each block, rounded up
      fields |= dict(pick='confidence', steps=steps, schedule='nearest',
                     guidance=guidance)  # fmt: skip
      if 'mdlm' in self.name:
        del fields['cache']
    else:
      pick = PICKS[re.sub(r'.*/(?:batch|p\d+)_(\w+?)_s\d.*', r'\1', self.name)]
      fields = dict(length=16, block=16, pick=pick, steps=steps, schedule='dream')
      fields |= dict(rank_law='sampling', top_k=50 * ('topk50' in self.name))
    return sampler.SampleConfig(**{'steps': length, **fields})

  def forwards(self, spent, new, prompt):
    """Returns the release's count of forwards where ours is `spent` steps.

    Ours has one more, which reads the prompt. A finished block enters the cache
    with the first step of the next one; the releases do that in a forward of its own.
    """
    stored = -(-new // self.block)
    if self.family == 'sdar':
      return spent + stored + (prompt >= self.block)  # and one reads the prompt
    if 'bd3lm_' in self.name.split('/')[1]:
      return (spent + stored) * (2 if 'cfg' in self.name else 1)
    if self.family == 'fast_dllm_v2':  # what stores a block gives the next token
      return spent + (prompt > self.block and prompt % self.block > 0)
    return spent


@pytest.mark.parametrize('name', CASES)
def test_completions(name, checkpoint):
  """Greedy tokens are those of the release, and so are steps and forwards."""
  case, want = Case(name), np.atleast_2d(GOLDEN[name])
  prompts, valid = case.prompts()
  cfg, params = checkpoint(case.family, **case.model())
  if case.family in ('sdar', 'fast_dllm_v2'):  # the prompt's end is on the canvas
    new = want.shape[1] - prompts.shape[1] // case.block * case.block
  else:
    new = int(case.number('new', 16))
  if case.family == 'a2d_bd3lm':
    cfg = dataclasses.replace(cfg, block_grid='prompt')
  hp = case.settings(new)
  run = jax.jit(lambda params: sampler.generate(
    cfg, params, jnp.asarray(prompts), jax.random.key(0), hp, jnp.asarray(valid)
  ))  # fmt: skip
  out = jax.device_get(run(params))
  # dllm's canvas ends inside its last block, which is another text for the network.
  whole = new // case.block * case.block if case.family == 'a2d_bd3lm' else new
  cut = lambda x: np.atleast_2d(x)[:, -new:][:, :whole]
  tokens, order = (
    x[:, -hp.length :][:, :whole] for x in (out.tokens, np.maximum(out.order, -1))
  )
  np.testing.assert_array_equal(tokens, cut(want))
  step, spent = cut(GOLDEN[f'{name}/step']), int(order.max()) + 1
  if case.family == 'fast_dllm_v2':  # -2: the first token of a block, not counted there
    alone = order[step == -2]
    order = np.where(step == -2, -2, order - (order[..., None] > alone).sum(-1))
  np.testing.assert_array_equal(order, step)
  if whole == new:
    official = case.forwards(spent, new, prompts.shape[1])
    assert official == GOLDEN[f'{name}/forwards']
    if case.family != 'fast_dllm_v2':  # ours goes on to the end of the last block
      assert out.forwards == spent + (hp.cache == 'block')
