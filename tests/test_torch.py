"""Comparisons with torch's own models and PEFT, where these are installed.

pip install torch peft

They are skipped otherwise. test_weights.py makes the same comparisons with a
plain NumPy forward.
"""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_weights import CONFIGS, TOKENS, write

from dmpo_jax import hf, model, weights

torch = pytest.importorskip('torch')
import transformers  # noqa: E402

# A LLaDA body is a Llama body by other names.
RENAMED = (
  ('model.transformer.blocks', 'model.layers'),
  ('attn_norm', 'input_layernorm'),
  ('ff_norm', 'post_attention_layernorm'),
  ('attn_out', 'self_attn.o_proj'),
  ('q_proj', 'self_attn.q_proj'),
  ('k_proj', 'self_attn.k_proj'),
  ('v_proj', 'self_attn.v_proj'),
  ('ff_proj', 'mlp.gate_proj'),
  ('up_proj', 'mlp.up_proj'),
  ('ff_out', 'mlp.down_proj'),
  ('model.transformer.wte', 'model.embed_tokens'),
  ('model.transformer.ln_f', 'model.norm'),
)
KINDS = {'llada': 'Llama', 'Dream': 'Qwen2', 'a2d-qwen3': 'Qwen3', 'llama': 'Llama'}
FROM_LLADA = dict(
  hidden_size='d_model',
  intermediate_size='mlp_hidden_size',
  num_attention_heads='n_heads',
  num_key_value_heads='n_kv_heads',
  num_hidden_layers='n_layers',
  rms_norm_eps='rms_norm_eps',
  vocab_size='vocab_size',
  rope_theta='rope_theta',
  tie_word_embeddings='weight_tying',
)


def renamed(name):
  if name == 'model.transformer.ff_out.weight':
    return 'lm_head.weight'
  for theirs, ours in RENAMED:
    name = name.replace(theirs, ours)
  return name


def torch_model(folder):
  """Returns transformers' model with a directory's weights."""
  c = json.loads((folder / 'config.json').read_text())
  kind = KINDS[c['model_type']]
  fields = (
    FROM_LLADA.values() if c['model_type'] == 'llada' else (*FROM_LLADA, 'head_dim')
  )
  settings = {k: c[k] for k in fields if k in c}
  if c['model_type'] == 'llada':
    settings = {k: c[v] for k, v in FROM_LLADA.items()}
  settings['rope_parameters'] = {
    'rope_type': 'default',
    'rope_theta': settings.pop('rope_theta'),
  }
  config = getattr(transformers, f'{kind}Config')(
    **settings, attn_implementation='eager'
  )
  net = getattr(transformers, f'{kind}ForCausalLM')(config).eval()
  tensors = {}
  for path in folder.glob('model*.safetensors'):
    tensors |= load_file(path)
  if c['model_type'] == 'llada':
    tensors = {renamed(name): x for name, x in tensors.items()}
  missing, unexpected = net.load_state_dict(
    {name: torch.tensor(x) for name, x in tensors.items()}, strict=False
  )
  assert not unexpected and set(missing) <= {'lm_head.weight'}
  net.tie_weights()
  return net


def torch_logits(net, tokens_T):
  """Returns logits (T, V) without a causal mask: torch takes a 4-d mask as it is."""
  count = len(tokens_T)
  with torch.no_grad():
    return (
      net(
        torch.tensor(tokens_T[None]).long(),
        attention_mask=torch.zeros(1, 1, count, count),
      )
      .logits[0]
      .numpy()
    )


NAMES = [name for name, c in CONFIGS.items() if c['model_type'] in KINDS]


@pytest.mark.parametrize('name', NAMES)
def test_logits_equal_torch(name, tmp_path):
  folder = write(tmp_path / name, CONFIGS[name])
  cfg, params = weights.load_hf(str(folder))
  got = np.asarray(model.full_logits(cfg, params, TOKENS[None])[0])
  want = torch_logits(torch_model(folder), TOKENS)
  if cfg.shift:
    want = np.concatenate([want[:1], want[:-1]])
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert np.abs(want).max() > 1


@pytest.mark.parametrize('name', ['dream', 'qwen3'])
def test_peft_reads_an_exported_adapter(name, tmp_path, weights_of):
  """PEFT gives our logits with the exported adapter, and others without it."""
  peft = pytest.importorskip('peft')
  folder = write(tmp_path / name, CONFIGS[name])
  cfg, params = weights.load_hf(str(folder))
  cfg, params = with_adapter(cfg, params, weights_of)
  out = str(tmp_path / 'adapter')
  hf.save_adapter(out, cfg, params, str(folder), str(folder))
  net = torch_model(folder)
  plain = torch_logits(net, TOKENS)
  want = torch_logits(peft.PeftModel.from_pretrained(net, out).eval(), TOKENS)
  assert np.abs(want - plain).max() > 1e-2
  if cfg.shift:
    want = np.concatenate([want[:1], want[:-1]])
  got = np.asarray(model.full_logits(cfg, params, TOKENS[None])[0])
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_peft_merges_to_the_same_weights(tmp_path, weights_of):
  """Each linear of LLaDA is merged with its adapter; the head is left alone."""
  peft = pytest.importorskip('peft')
  folder = write(tmp_path / 'llada', CONFIGS['llada'])
  cfg, params = weights.load_hf(str(folder))
  cfg, params = with_adapter(cfg, params, weights_of)
  hf.save_adapter(str(tmp_path / 'adapter'), cfg, params, '', str(folder))
  hf.save_hf(str(tmp_path / 'merged'), cfg, params, source=str(folder))
  before = load_file(folder / 'model.safetensors')
  net = peft.PeftModel.from_pretrained(
    tree(before), str(tmp_path / 'adapter')
  ).merge_and_unload()
  ours = load_file(tmp_path / 'merged' / 'model.safetensors')
  theirs = {name: x.detach().numpy() for name, x in net.state_dict().items()}
  moved = 0
  for name in ours:
    np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5)
    moved += np.abs(ours[name] - before[name]).max() > 1e-3
  assert moved == 7 * cfg.layers


def with_adapter(cfg, params, weights_of):
  cfg = dataclasses.replace(cfg, lora_rank=3, lora_alpha=7.0)
  return cfg, {**params, 'lora': weights_of(cfg)['lora']}


def tree(tensors):
  """Returns a torch module whose linears have these names and weights."""
  root = torch.nn.Module()
  root.prepare_inputs_for_generation = None  # peft looks for it
  for name, x in tensors.items():
    *path, last = name.removesuffix('.weight').split('.')
    node = root
    for part in path:
      if not hasattr(node, part):
        node.add_module(part, torch.nn.Module())
      node = getattr(node, part)
    leaf = (
      torch.nn.Linear(x.shape[1], x.shape[0], bias=False)
      if x.ndim == 2
      else torch.nn.LayerNorm(x.shape[0], bias=False)
    )
    leaf.weight = torch.nn.Parameter(torch.tensor(x))
    node.add_module(last, leaf)
  return root
