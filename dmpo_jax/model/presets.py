"""The model's configuration, and the sizes that have a name."""

import dataclasses
from typing import NamedTuple

# Names of the linears of a layer.
DENSE = ('gate', 'up', 'down')  # of a dense MLP
SHARED = ('shared_gate', 'shared_up', 'shared_down')  # of the shared experts
EXPERTS = ('experts_gate', 'experts_up', 'experts_down')  # stacked: one for each expert
LINEARS = ('q', 'k', 'v', 'o', *DENSE, *SHARED, *EXPERTS)
# All experts on all tokens, the reference; or on sorted tokens, in the best form of a
# platform (grouped.py).
EXPERT_KERNELS = ('dense', 'ragged')
LORA_TARGETS = {
  # Attention, dense MLPs and shared experts; a layer has hundreds of the other experts.
  'all': f'^({"|".join(x for x in LINEARS if x not in EXPERTS)})$',
  'experts': f'^({"|".join(LINEARS)})$',
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
  rotary: float = 1.0  # share of a head's dimensions that rotate, from the first on
  eps: float = 1e-5  # added to the mean square in RMSNorm
  # RMSNorm rounds to `dtype` before its weight multiplies (Qwen, LLaDA2), not after.
  norm_round: bool = False
  positions: int = 4096  # longest prompt + completion; tokens
  qkv_bias: bool = False  # q, k and v add a bias (Dream, Qwen2)
  qk_norm: bool = False  # RMSNorm of each query and key head (Qwen3)
  experts: int = 0  # experts of a layer; 0 = every layer has a dense MLP
  experts_per_token: int = 0  # how many of them a token is sent to
  expert_mlp: int = 0  # inner size of an expert
  shared_mlp: int = 0  # inner size of the experts that see every token; 0 = none
  dense_layers: tuple[int, ...] = ()  # layers with a dense MLP in place of experts
  router: str = 'softmax'  # scores of the experts: softmax | sigmoid
  # A bias of the scores: '' = none | choice (it chooses, the score without it is the
  # weight: LLaDA2) | weight (the score with it is the weight, too: LLaDA-MoE).
  router_bias: str = ''
  router_norm: bool = False  # the weights of a token's experts sum to 1
  router_scale: float = 1.0  # then multiplies the weights
  router_groups: int = 1  # groups that the experts stand in
  # Best groups that a token may choose from; a group counts as its two best experts.
  router_groups_kept: int = 1
  load_loss: float = 1e-3  # factor of the load loss that its training had
  expert_kernel: str = 'ragged'  # a name in EXPERT_KERNELS
  keep_routes: bool = False  # forwards return the experts that tokens were sent to
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

  def __post_init__(self) -> None:
    """Checks the fields of experts; ValueError says which of them is wrong."""
    found = [text for wrong, text in expert_rules(self) if wrong]
    if found:
      raise ValueError('; '.join(found))


def expert_rules(cfg: ModelConfig) -> list[tuple[bool, str]]:
  """Returns (whether it is broken, what is wrong) of each rule on the experts."""
  count, chosen, groups = cfg.experts, cfg.experts_per_token, cfg.router_groups
  kept, dim = cfg.router_groups_kept, cfg.head_dim or cfg.width // max(1, cfg.heads)
  turned, uneven = cfg.rotary * dim, not cfg.head_dim and cfg.width % max(1, cfg.heads)
  rules = [
    (  # heads that do not divide the width are another error
      not (0 < cfg.rotary <= 1 and (uneven or turned % 2 == 0)),
      f'rotary = {cfg.rotary}: of the {dim} dimensions of a head (head_dim, or width / '
      'heads) an even number must rotate',
    )
  ]
  if not count:
    return rules
  size = count // max(1, groups)
  return [
    *rules,
    (  # the record of a rollout's choice is int16
      not 0 < count < 2**15,
      f'experts = {count}: give 0 to {2**15 - 1}',
    ),
    (
      not 0 < chosen <= count,
      f'experts_per_token = {chosen}: give 1 to experts = {count}',
    ),
    (cfg.expert_mlp < 1, f'expert_mlp = {cfg.expert_mlp}: give the size of an expert'),
    (
      not set(cfg.dense_layers) < set(range(cfg.layers)),
      f'dense_layers = {cfg.dense_layers}: give some of 0 to layers - 1 = '
      f'{cfg.layers - 1}, or more layers; for all of them set experts = 0',
    ),
    (
      cfg.router not in ('softmax', 'sigmoid'),
      f'router = {cfg.router!r}: give softmax or sigmoid',
    ),
    (
      cfg.router_bias not in ('', 'choice', 'weight'),
      f"router_bias = {cfg.router_bias!r}: give '', choice or weight",
    ),
    (
      cfg.expert_kernel not in EXPERT_KERNELS,
      f'expert_kernel = {cfg.expert_kernel!r}: give {", ".join(EXPERT_KERNELS)}',
    ),
    (
      groups < 1 or bool(count % max(1, groups)) or (groups > 1 and size < 2),
      f'router_groups = {groups}: must divide experts = {count} into groups of >= 2',
    ),
    (
      not 0 < kept <= groups or kept * size < chosen,
      f'router_groups_kept = {kept}: give 1 to router_groups = {groups}, so that they '
      f'hold experts_per_token = {chosen}',
    ),
  ]


def linears_of(cfg: ModelConfig) -> tuple[str, ...]:
  """Returns the names in LINEARS that the model has."""
  kinds = {run.experts for run in layer_runs(cfg)}
  absent = set() if False in kinds else set(DENSE)
  absent |= set() if True in kinds else set(EXPERTS)
  absent |= set() if True in kinds and cfg.shared_mlp else set(SHARED)
  return tuple(name for name in LINEARS if name not in absent)


class Run(NamedTuple):
  """Consecutive layers of one kind: one scan, one stack of parameters."""

  name: (
    str  # of its parameters: layers, or layers_0, layers_1, ... where there are more
  )
  experts: bool  # the layers have experts; False: a dense MLP
  first: int  # layer
  count: int  # layers


def layer_runs(cfg: ModelConfig) -> tuple[Run, ...]:
  """Returns the runs of layers, in order."""
  routed = [bool(cfg.experts) and i not in cfg.dense_layers for i in range(cfg.layers)]
  starts = [i for i, kind in enumerate(routed) if not i or kind != routed[i - 1]]
  ends = [*starts[1:], cfg.layers]
  return tuple(
    Run(f'layers_{n}' if len(starts) > 1 else 'layers', routed[a], a, b - a)
    for n, (a, b) in enumerate(zip(starts, ends, strict=True))
  )


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
# LLaDA2.x: the first layer is dense, and every other one has 256 experts and one more
# that every token sees.
LLADA2 = dict(
  vocab=157184,
  kv_heads=4,
  head_dim=128,
  mask_id=156895,
  eos_id=156892,
  pad_id=156892,
  rope_theta=6e5,
  rotary=0.5,
  eps=1e-6,
  norm_round=True,
  positions=32768,
  qk_norm=True,
  block_causal=32,
  experts=256,
  experts_per_token=8,
  dense_layers=(0,),
  router='sigmoid',
  router_bias='choice',
  router_norm=True,
  router_scale=2.5,
  router_groups=8,
  router_groups_kept=4,
)
TINY = dict(
  width=64,
  layers=3,
  heads=2,
  kv_heads=2,
  mlp=128,
  positions=512,
  rope_theta=100.0,
  qk_norm=True,
)
# vocab and special ids of the small ones come from the tokenizer. 'tiny' is for
# short sequences: a small RoPE base and q/k norms make it learn several times
# faster there.
PRESETS = {
  'tiny': TINY,
  # A small LLaDA2. A token meets as many weights as in 'tiny'.
  'tiny_moe': dict(
    TINY,
    experts=8,
    experts_per_token=2,
    expert_mlp=32,
    shared_mlp=64,
    dense_layers=(0,),
    router='sigmoid',
    router_bias='choice',
    router_norm=True,
    norm_round=True,
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
  'sdar_30b': dict(
    QWEN3 | dict(kv_heads=4),
    width=2048,
    layers=48,
    heads=32,
    mlp=6144,
    experts=128,
    experts_per_token=8,
    expert_mlp=768,
    router_norm=True,
  ),
  'lladamoe_7b': dict(
    vocab=157184,
    width=2048,
    layers=16,
    heads=16,
    kv_heads=16,
    mlp=8192,
    mask_id=156895,
    eos_id=156892,
    pad_id=156892,
    rope_theta=50000.0,
    positions=8192,
    norm_round=True,
    qk_norm=True,
    experts=64,
    experts_per_token=8,
    expert_mlp=1024,
  ),
  'llada2_mini': dict(
    LLADA2, width=2048, layers=20, heads=16, mlp=5120, expert_mlp=512, shared_mlp=512
  ),
  'llada2_flash': dict(
    LLADA2, width=4096, layers=32, heads=32, mlp=9216, expert_mlp=1024, shared_mlp=1024
  ),
}
