"""The model's configuration, and the sizes that have a name."""

import dataclasses

# Names of the linears of a layer.
LINEARS = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
LORA_TARGETS = {
  'all': f'^({"|".join(LINEARS)})$',
  # The names in the papers' target lists that exist in LLaDA's checkpoint.
  'paper': r'^(q|k|v|up)$',
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The network's shape and how it is computed. Hashable, so it is a constant
  of every compiled function."""

  vocab: int  # number of tokens; rows of the embedding
  width: int  # size of the hidden states
  layers: int
  heads: int  # query heads
  kv_heads: int  # key and value heads; fewer than `heads` is GQA
  mlp: int  # inner size of the MLP
  mask_id: int  # the token that stands for a masked position
  eos_id: int  # the token that ends a text
  pad_id: int  # the token that fills a prompt on its left
  stop_ids: tuple[int, ...] = ()  # further tokens that end a text: a chat's turn ends
  head_dim: int = 0  # size of a head; 0 = width / heads
  rope_theta: float = 10000.0  # base of the rotary frequencies
  # Llama 3.1's longer context: factor, low and high frequency factor, and the positions
  # that it was trained on before; () = the frequencies as they are.
  rope_llama3: tuple[float, ...] = ()
  eps: float = 1e-5  # added to the mean square in RMSNorm
  positions: int = 4096  # longest prompt + completion; tokens
  qkv_bias: bool = False  # q, k and v add a bias (Dream, Qwen2)
  qk_norm: bool = False  # RMSNorm of each query and key head (Qwen3)
  tied: bool = False  # the head is the embedding
  shift: bool = False  # output i - 1 predicts token i (Dream)
  block_causal: int = 0  # attention ends with a token's own block (SDAR); tokens;
  # 0 = attention over the whole text
  block_grid: str = 'text'  # attention blocks start at: text (its first token) |
  # prompt (the end of the prompt)
  lora_rank: int = 0  # rank of the adapters; 0 = no adapters
  lora_alpha: float = 64.0  # adapters are scaled by lora_alpha / lora_rank
  lora_dropout: float = 0.0  # of an adapter's input, in updates; 0 = none
  lora_targets: str = LORA_TARGETS['all']  # regex on a linear's name
  lora_dtype: str = 'float32'  # of the adapters' products; their parameters: float32
  dtype: str = 'float32'  # of the matmuls; norms, softmax, logits are float32
  param_dtype: str = 'float32'  # of the parameters
  remat: str = 'none'  # what backward recomputes of a layer; a name in REMAT
  attention: str = 'xla'  # a name in ATTENTION
  head_chunk: int = 0  # completion tokens per head call; 0 = all


# What SDAR's models share, and dllm's with a Qwen3 body but for some ids.
QWEN3 = dict(
  vocab=151936,
  kv_heads=8,
  head_dim=128,
  mask_id=151669,
  eos_id=151643,
  pad_id=151643,
  stop_ids=(151645,),
  rope_theta=1e6,
  eps=1e-6,
  positions=32768,
  qk_norm=True,
  block_causal=4,
)
# What Dream and Fast-dLLM v2 share: a body of Qwen2.5.
QWEN25_7B = dict(
  vocab=152064,
  width=3584,
  layers=28,
  heads=28,
  kv_heads=4,
  mlp=18944,
  rope_theta=1e6,
  eps=1e-6,
  qkv_bias=True,
  shift=True,
)
# vocab and special ids of the small ones come from the tokenizer. 'tiny' is for
# short sequences: a small RoPE base and q/k norms make it learn several times
# faster there.
PRESETS = {
  'tiny': dict(
    width=64,
    layers=3,
    heads=2,
    kv_heads=2,
    mlp=128,
    positions=512,
    rope_theta=100.0,
    qk_norm=True,
  ),
  'small': dict(width=256, layers=8, heads=8, kv_heads=8, mlp=768, positions=2048),
  'llada_8b': dict(
    vocab=126464,
    width=4096,
    layers=32,
    heads=32,
    kv_heads=32,
    mlp=12288,
    mask_id=126336,
    eos_id=126081,
    pad_id=126081,
    rope_theta=500000.0,
  ),
  'dream_7b': dict(
    QWEN25_7B, mask_id=151666, eos_id=151643, pad_id=151643, positions=131072
  ),
  'sdar_1_7b': dict(QWEN3, width=2048, layers=28, heads=16, mlp=6144),
  'sdar_4b': dict(QWEN3, width=2560, layers=36, heads=32, mlp=9728),
  'sdar_8b': dict(QWEN3, width=4096, layers=36, heads=32, mlp=12288),
  'a2d_0_6b': dict(  # dllm's bd3lm; its mdlm sees the whole text
    QWEN3,
    width=1024,
    layers=28,
    heads=16,
    mlp=3072,
    eos_id=151645,
    stop_ids=(151643,),
    positions=40960,
    tied=True,
    block_causal=32,
  ),
  'fast_dllm_7b': dict(
    QWEN25_7B,
    mask_id=151665,
    eos_id=151645,
    pad_id=151645,
    stop_ids=(151643,),
    positions=32768,
    block_causal=32,
  ),
}
