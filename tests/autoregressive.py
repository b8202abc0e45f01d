"""Tiny random Qwen2, Qwen3 and Llama directories, as transformers saves them.

`python tests/autoregressive.py tests/autoregressive.npz` writes the logits of
transformers' own models, in float32, which test_convert.py compares with. It needs
torch; the file was made with torch 2.13.0 and transformers 4.52.4. The fields of
config.json are those of Qwen2.5-0.5B-Instruct, Qwen3-0.6B and Llama-3.1-8B.
"""

import json
import pathlib
import sys

import numpy as np
from safetensors.numpy import save_file

TAGS = ('<answer>', '</answer>', '<reasoning>', '</reasoning>')
QWEN = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|fim_pad|>')
LLAMA = (
  '<|begin_of_text|>', '<|eot_id|>', '<|start_header_id|>', '<|end_header_id|>',
  '<|reserved_special_token_0|>',
)  # fmt: skip
D, N, F, HEADS, KV = 16, 2, 24, 4, 2
SHARED = dict(
  attention_dropout=0.0,
  hidden_act='silu',
  hidden_size=D,
  initializer_range=0.02,
  intermediate_size=F,
  num_attention_heads=HEADS,
  num_hidden_layers=N,
  num_key_value_heads=KV,
  torch_dtype='float32',
  use_cache=True,
)
OF_QWEN = SHARED | dict(
  bos_token_id=0,
  eos_token_id=2,
  max_window_layers=N,
  rms_norm_eps=1e-06,
  rope_theta=1000000.0,
  sliding_window=None,
  use_sliding_window=False,
)
CONFIGS = {
  'qwen2': OF_QWEN
  | dict(
    architectures=['Qwen2ForCausalLM'],
    max_position_embeddings=32768,
    model_type='qwen2',
    tie_word_embeddings=True,
    transformers_version='4.43.1',
  ),
  'qwen3': OF_QWEN
  | dict(
    architectures=['Qwen3ForCausalLM'],
    attention_bias=False,
    head_dim=6,
    max_position_embeddings=40960,
    model_type='qwen3',
    rope_scaling=None,
    tie_word_embeddings=True,
    transformers_version='4.51.0',
  ),
  'llama': SHARED
  | dict(
    architectures=['LlamaForCausalLM'],
    attention_bias=False,
    bos_token_id=0,
    eos_token_id=1,
    max_position_embeddings=131072,
    mlp_bias=False,
    model_type='llama',
    pretraining_tp=1,
    rms_norm_eps=1e-05,
    rope_scaling=dict(
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=8192,
      rope_type='llama3',
    ),
    rope_theta=500000.0,
    tie_word_embeddings=False,
    transformers_version='4.43.0.dev0',
  ),
}
CLASSES = dict(
  qwen2='Qwen2Tokenizer', qwen3='Qwen2Tokenizer', llama='PreTrainedTokenizerFast'
)
# Rows of the embedding: Qwen's is larger than its tokenizer, Llama's is not.
CHARS = ['\n'] + [chr(c) for c in range(32, 127)]
SPARE = {'qwen2': 7, 'qwen3': 7, 'llama': 0}


def specials(kind):
  return LLAMA if kind == 'llama' else QWEN


def known(kind):
  """The tokens of the tokenizer, in the order of their ids."""
  return [*specials(kind), *TAGS, *CHARS]


def config_of(kind):
  return CONFIGS[kind] | {'vocab_size': len(known(kind)) + SPARE[kind]}


def tensors_of(kind):
  """{tensor: random float32} as torch has them, (out, in)."""
  c = config_of(kind)
  dim = c.get('head_dim', D // HEADS)
  shapes = {
    'model.embed_tokens.weight': (c['vocab_size'], D),
    'model.norm.weight': (D,),
  }
  if not c['tie_word_embeddings']:
    shapes['lm_head.weight'] = (c['vocab_size'], D)
  linears = {
    'self_attn.q_proj': (HEADS * dim, D),
    'self_attn.k_proj': (KV * dim, D),
    'self_attn.v_proj': (KV * dim, D),
    'self_attn.o_proj': (D, HEADS * dim),
    'mlp.gate_proj': (F, D),
    'mlp.up_proj': (F, D),
    'mlp.down_proj': (D, F),
  }
  norms = {'input_layernorm': (D,), 'post_attention_layernorm': (D,)}
  if kind == 'qwen3':
    norms |= {f'self_attn.{x}_norm': (dim,) for x in 'qk'}
  for i in range(N):
    layer = f'model.layers.{i}.'
    shapes |= {f'{layer}{x}.weight': s for x, s in (linears | norms).items()}
    if kind == 'qwen2':
      names = [f'self_attn.{x}_proj' for x in 'qkv']
      shapes |= {f'{layer}{x}.bias': linears[x][:1] for x in names}
  draw = np.random.Generator(np.random.PCG64(5))
  return {
    name: (0.3 * draw.normal(size=shape) + ('norm' in name)).astype(np.float32)
    for name, shape in shapes.items()
  }


def write_tokenizer(folder, kind):
  """Writes tokenizer.json with one token a character, and its config."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  vocab = {token: i for i, token in enumerate(known(kind))}
  raw = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token='?'))
  raw.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
  raw.decoder = decoders.Fuse()
  raw.add_special_tokens(list(specials(kind)))
  raw.add_tokens([tokenizers.AddedToken(token, special=False) for token in TAGS])
  raw.save(str(folder / 'tokenizer.json'))
  ends = {'eos_token': '<|eot_id|>', 'bos_token': '<|begin_of_text|>'}
  if kind != 'llama':
    ends = {'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>'}
  told = {'tokenizer_class': CLASSES[kind], 'clean_up_tokenization_spaces': False}
  told['added_tokens_decoder'] = {
    str(vocab[token]): dict(
      content=token,
      special=token not in TAGS,
      lstrip=False,
      rstrip=False,
      normalized=False,
      single_word=False,
    )  # fmt: skip
    for token in (*specials(kind), *TAGS)
  }
  (folder / 'tokenizer_config.json').write_text(json.dumps(told | ends))
  (folder / 'special_tokens_map.json').write_text(json.dumps(ends))


def write(folder, kind):
  """Writes a whole directory; returns its name."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config_of(kind)))
  save_file(tensors_of(kind), folder / 'model.safetensors', {'format': 'pt'})
  write_tokenizer(folder, kind)
  return str(folder)


TOKENS = np.random.Generator(np.random.PCG64(6)).integers(5, 80, 12)


def main(out):
  import tempfile

  import torch
  import transformers

  logits = {}
  for kind in CONFIGS:
    with tempfile.TemporaryDirectory() as folder:
      name = write(folder, kind)
      net = transformers.AutoModelForCausalLM.from_pretrained(
        name, torch_dtype='float32'
      )
      with torch.no_grad():
        logits[kind] = net.eval()(torch.tensor(TOKENS[None])).logits[0].numpy()
  np.savez_compressed(out, **logits)


if __name__ == '__main__':
  main(sys.argv[1])
