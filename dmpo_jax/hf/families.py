"""How each family writes its checkpoints: config.json, tensors, adapters.

A Family is a table from Hugging Face's names to ours. FAMILIES says for each
model_type which table it uses and which ModelConfig fields it implies. Another
family of LLaMA's kind is one Family (or none) and one line in FAMILIES. What the
fields of a mixture of experts mean beyond a name stands in experts.py.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax

from dmpo_jax import mesh, model
from dmpo_jax.hf import experts

INDEX = 'model.safetensors.index.json'
OFF = (False, None)


class Family(NamedTuple):
  """How one family of checkpoints is written.

  Where several of our names have one of theirs, their tensor has our rows in the order
  of `layers`. `{}` in a name of `layers` is the expert. A name with a slash, such as
  router/bias, has the whole name of its tensor.
  """

  fields: dict[str, str]  # config.json field -> ModelConfig field
  fixed: dict[str, tuple]  # config.json field -> values that are implemented
  tensors: dict[str, str]  # our name -> theirs
  layer: str  # prefix of a layer's tensors
  layers: dict[str, str]  # our name in a layer -> theirs
  moe: experts.Fields | None = None  # of a mixture of experts


MLP = ('gate', 'up', 'down')
EXPERTS = {f'experts_{name}': f'mlp.experts.{{}}.{name}_proj' for name in MLP} | dict(
  router='mlp.gate'
)
LLADA = Family(
  fields=dict(
    d_model='width',
    n_layers='layers',
    n_heads='heads',
    n_kv_heads='kv_heads',
    mlp_hidden_size='mlp',
    embedding_size='vocab',
    rope_theta='rope_theta',
    rms_norm_eps='eps',
    weight_tying='tied',
    max_sequence_length='positions',
    include_qkv_bias='qkv_bias',
  ),
  fixed=dict(
    activation_type=('silu', 'swiglu'),
    block_type=('llama',),
    layer_norm_type=('rms',),
    layer_norm_with_affine=(True,),
    rope=(True,),
    multi_query_attention=(None, False),
    **dict.fromkeys(('alibi', 'attention_layer_norm', 'bias_for_layer_norm'), OFF),
    **dict.fromkeys(('include_bias', 'input_emb_norm', 'scale_logits'), OFF),
  ),
  tensors=dict(
    embedding='model.transformer.wte.weight',
    final_norm='model.transformer.ln_f.weight',
    head='model.transformer.ff_out.weight',
  ),
  layer='model.transformer.blocks.{}.',
  layers=dict(
    q='q_proj',
    k='k_proj',
    v='v_proj',
    o='attn_out',
    gate='ff_proj',
    up='up_proj',
    down='ff_out',
    attn_norm='attn_norm',
    mlp_norm='ff_norm',
  ),
)
QWEN = Family(
  fields=dict(
    hidden_size='width',
    num_hidden_layers='layers',
    num_attention_heads='heads',
    num_key_value_heads='kv_heads',
    head_dim='head_dim',
    intermediate_size='mlp',
    vocab_size='vocab',
    rms_norm_eps='eps',
    tie_word_embeddings='tied',
    max_position_embeddings='positions',
    rope_theta='rope_theta',
  ),
  fixed=dict(
    hidden_act=('silu',),
    pretraining_tp=(1, None),
    rope_scaling=(None,),
    **dict.fromkeys(('attention_bias', 'mlp_bias'), OFF),
    **dict.fromkeys(('use_sliding_window', 'use_mrope'), OFF),
  ),
  tensors=dict(
    embedding='model.embed_tokens.weight',
    final_norm='model.norm.weight',
    head='lm_head.weight',
  ),
  layer='model.layers.{}.',
  layers=dict(
    q='self_attn.q_proj',
    k='self_attn.k_proj',
    v='self_attn.v_proj',
    o='self_attn.o_proj',
    gate='mlp.gate_proj',
    up='mlp.up_proj',
    down='mlp.down_proj',
    attn_norm='input_layernorm',
    mlp_norm='post_attention_layernorm',
    q_norm='self_attn.q_norm',
    k_norm='self_attn.k_norm',
  ),
)
# The fields of a mixture of experts lie in experts.py, the width of its MLP too.
DENSE = {k: v for k, v in QWEN.fields.items() if v not in ('mlp', 'head_dim')}
SDAR_MOE = QWEN._replace(
  fields=DENSE | dict(head_dim='head_dim'),
  fixed=QWEN.fixed | dict(partial_rotary_factor=(1, None)),
  layers=QWEN.layers | EXPERTS,
  moe=experts.SDAR_MOE,
)
LLADA_MOE = QWEN._replace(
  fields=DENSE,
  fixed=QWEN.fixed | dict(clip_qkv=(None,)),
  layers=QWEN.layers
  | EXPERTS
  | {'router/bias': 'mlp.expert_bias'}
  | {f'shared_{name}': f'shared_expert.{name}_proj' for name in MLP},
  moe=experts.LLADA_MOE,
)
LLADA2 = Family(
  fields=DENSE | dict(head_dim='head_dim', use_qkv_bias='qkv_bias'),
  fixed=dict(hidden_act=('silu',), rope_scaling=(None,), use_bias=OFF),
  tensors=QWEN.tensors | dict(embedding='model.word_embeddings.weight'),
  layer=QWEN.layer,
  layers=QWEN.layers
  | dict.fromkeys(('q', 'k', 'v'), 'attention.query_key_value')
  | dict(
    o='attention.dense',
    q_norm='attention.query_layernorm',
    k_norm='attention.key_layernorm',
  )
  | EXPERTS
  | {'router/bias': 'mlp.gate.expert_bias'}
  | {f'shared_{name}': f'mlp.shared_experts.{name}_proj' for name in MLP},
  moe=experts.LLADA2,
)
# As dFactory's trainer holds them: all experts of a layer in one tensor.
STACKED = {f'experts_{name}/kernel': f'mlp.experts.{name}_proj' for name in MLP}
LLADA2_STACKED = LLADA2._replace(layers=LLADA2.layers | STACKED)
# dllm tells its trainers and samplers that a model shifts; the field keeps it.
A2D = QWEN._replace(fields=QWEN.fields | dict(right_shift_logits='shift'))
# model_type -> its table, what the type implies, and the class that reads it
LLAMA = dict(eps=1e-6)  # transformers' default; LLaDA's is ModelConfig's
QWEN2, QWEN3 = LLAMA | dict(qkv_bias=True), LLAMA | dict(qk_norm=True)
DREAM = QWEN2 | dict(shift=True)
ROUNDS = dict(eps=1e-5, norm_round=True)
LLADA2_LAW = ROUNDS | dict(qk_norm=True)
FAMILIES = {
  'llada': (LLADA, {}, 'LLaDAModelLM'),
  'Dream': (QWEN, DREAM, 'DreamModel'),
  'dream': (QWEN, DREAM, 'DreamModel'),
  'sdar': (QWEN, QWEN3, 'SDARForCausalLM'),
  'Fast_dLLM_Qwen': (QWEN, DREAM, 'Fast_dLLM_QwenForCausalLM'),
  'qwen2': (QWEN, QWEN2, 'Qwen2ForCausalLM'),
  'a2d-qwen2': (A2D, QWEN2, 'A2DQwen2LMHeadModel'),
  'qwen3': (QWEN, QWEN3, 'Qwen3ForCausalLM'),
  'a2d-qwen3': (A2D, QWEN3, 'A2DQwen3LMHeadModel'),
  'llama': (QWEN, LLAMA, 'LlamaForCausalLM'),
  'a2d-llama': (A2D, LLAMA, 'A2DLlamaLMHeadModel'),
  'illada': (QWEN, LLAMA, 'ILLaDAForCausalLM'),
  'sdar_moe': (SDAR_MOE, QWEN3, 'SDARMoeForCausalLM'),
  'lladamoe': (LLADA_MOE, ROUNDS, 'LLaDAMoEModelLM'),
  'llada2_moe': (LLADA2, LLADA2_LAW, 'LLaDA2MoeModelLM'),
  'llada2_moe_veomni': (LLADA2_STACKED, LLADA2_LAW, 'LLaDA2MoeModelLM'),
}
# model_type of an autoregressive model -> that of the diffusion model made of it
CONVERTED = {'qwen2': 'a2d-qwen2', 'qwen3': 'a2d-qwen3', 'llama': 'a2d-llama'}
# model_type -> config.json's field of the attention block, and the block where that
# field is missing. None: such directories differ, so the user must say it.
BLOCKS = {
  'sdar': ('block_size', None),
  'Fast_dLLM_Qwen': ('bd_size', 32),
  **dict.fromkeys(CONVERTED.values(), ('block_size', None)),
  'sdar_moe': ('block_size', 4),
  'lladamoe': ('block_size', 0),
  'llada2_moe': ('block_size', 32),
  'llada2_moe_veomni': ('block_size', 32),
}
# Those of BLOCKS whose directories may differ from it without saying so.
ASSUMED = ('sdar_moe',)
# model_type -> the mask's id of the published models, where no file names the token.
MASKS = {
  'llada': 126336,
  'illada': 5,
  'sdar': 151669,
  'Fast_dLLM_Qwen': 151665,
  'sdar_moe': 151669,
  **dict.fromkeys(('lladamoe', 'llada2_moe', 'llada2_moe_veomni'), 156895),
}
# The same of the token that ends a text.
ENDS = dict.fromkeys(('lladamoe', 'llada2_moe', 'llada2_moe_veomni'), 156892)
# Fields of any family that describe the files or the training of the model, or
# have no effect beside the fields above.
HARMLESS = re.compile(
  r'_?name_or_path|architectures|auto_map|model_type|(torch_)?dtype|\w*_version|'
  r'\w+_token_id|use_cache|return_dict|output_\w+|id2label|label2id|num_labels|'
  r'init(ializer)?_\w+|emb_init_std|\w+_(dropout|pdrop)|precision|_commit_hash|'
  r'tokenizer_class|problem_type|finetuning_task|task_specific_params|prefix|'
  r'alibi_bias_max|attention_layer_norm_with_affine|block_group_size|mlp_ratio|'
  r'rope_full_precision|vocab_size|sliding_window|max_window_layers|'
  r'full_attn_mask|is_causal|_?\w*(attn|experts)_implementation\w*'
)
# Switches of a training or serving stack, whatever their value.
SERVING = re.compile(
  r'fl(ash|ex)_\w+|use_(flash|fused|liger)\w*|fused?_\w+|debug|ep_size|'
  r'micro_forward|skip_checkpoint|use_deepep|gradient_checkpointing\w*|torchscript|'
  r'torch_compile|use_bfloat16|chunk_size_feed_forward|tf_legacy_loss|unsloth_\w+|'
  r'transformers\.js_config|\w+_loss_coef|conplemenrary_mask'
)


def kind_of(cfg: model.ModelConfig) -> str:
  """Returns the model_type as which a model that was made here is written."""
  if cfg.experts or cfg.rotary != 1:
    return experts.kind_of(cfg)
  if cfg.qk_norm:
    return 'sdar' if cfg.block_causal and not cfg.shift else 'a2d-qwen3'
  if cfg.qkv_bias and cfg.shift:
    return 'Fast_dLLM_Qwen' if cfg.block_causal else 'Dream'
  if cfg.qkv_bias:
    return 'a2d-qwen2'
  other = cfg.head_dim or cfg.block_causal or cfg.shift
  return 'a2d-llama' if other else 'llada'


def kind_in(raw: dict[str, Any]) -> Any:
  """Returns the model_type of a config.json; LLaDA-MoE's on the hub is LLaDA's."""
  kind, made_for = raw.get('model_type'), str(raw.get('architectures'))
  of_experts = 'LLaDAMoE' in made_for or 'expert_intermediate_size' in raw
  return 'lladamoe' if kind == 'llada' and of_experts else kind


class Entry(NamedTuple):
  """One of our leaves, and where it lies in the files."""

  path: str  # such as params/layers/q/kernel
  leaf: Any  # its ShapeDtypeStruct, or the array itself
  names: tuple[str, ...]  # the tensors' names, in the order of the leading axes
  stacked: int  # leading axes of the leaf along which tensors are stacked
  transposed: bool  # torch writes linears as (out, in)
  rows: tuple[int, int] | None = None  # the first of the tensor's rows, and all of them

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of each tensor in the files."""
    shape = flipped(self.leaf.shape[self.stacked :], self.transposed)
    return shape if self.rows is None else (self.rows[1], *shape[1:])


def flipped(parts: tuple, transposed: bool) -> tuple:
  """Swaps the last two of a shape or of slices, where torch has them so."""
  return (*parts[:-2], parts[-1], parts[-2]) if transposed else parts


def shapes(cfg: model.ModelConfig) -> dict[str, Any]:
  """Returns ShapeDtypeStructs of {'params', 'lora'?} of a model."""
  return jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))


def entries(tree: dict, family: Family, cfg: model.ModelConfig) -> Iterator[Entry]:
  """Yields the Entry of each leaf of `shapes`, adapters in PEFT's names.

  ValueError if the family has no tensor for a part of the model.
  """
  runs = {run.name: run for run in model.layer_runs(cfg)}
  together = fused(family)
  for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
    path = mesh.path_of(keys)
    collection, *parts = path.split('/')
    if parts[0] not in runs:
      yield Entry(path, leaf, (family.tensors[parts[0]],), 0, False)
      continue
    run, name, part = runs[parts[0]], *parts[1:]
    theirs = name_of(family, name, part, collection)
    numbers = range(run.first, run.first + run.count)
    if '{}' in theirs.replace('{}', '', 1):  # of the layer, and of the expert
      names = [theirs.format(i, e) for i in numbers for e in range(leaf.shape[1])]
    else:
      names = [theirs.format(i) for i in numbers]
    stacked = 1 + (len(names) > run.count)
    linear = part in ('kernel', 'a', 'b')
    shares = collection == 'params' and part in ('kernel', 'bias') and name in together
    rows = rows_of(family, name, cfg) if shares else None
    yield Entry(path, leaf, tuple(names), stacked, linear, rows)


def as_held(family: Family, names: Collection[str]) -> Family:
  """Returns the family that has the experts as the files of these tensors have them.

  dFactory's tool for LLaDA2 stacks and splits them, and leaves config.json as it is.
  """
  stacked = any(name.endswith('.mlp.experts.gate_proj') for name in names)
  split = any('.mlp.experts.0.' in name for name in names)
  if family.moe is not experts.LLADA2 or stacked == split:
    return family
  return LLADA2_STACKED if stacked else LLADA2


def name_of(family: Family, name: str, part: str, collection: str) -> str:
  """Returns the tensor's name of a part of a layer, with {} for layer and expert."""
  if name not in family.layers and f'{name}/{part}' not in family.layers:
    raise ValueError(
      f'this family has no {name}: its checkpoints cannot hold this model'
    )
  if collection == 'lora':
    linear = family.layer + family.layers[name]
    if name in fused(family):  # lora.py splits and joins it
      linear += f'.{name}'
    return f'base_model.model.{linear}.lora_{part.upper()}.weight'
  if whole := family.layers.get(f'{name}/{part}'):
    return family.layer + whole
  return family.layer + family.layers[name] + ('.bias' if part == 'bias' else '.weight')


def fused(family: Family) -> dict[str, list[str]]:
  """Returns, for each of our names that shares a tensor, all those in its order."""
  sharing: dict[str, list[str]] = {}
  for ours, theirs in family.layers.items():
    sharing.setdefault(theirs, []).append(ours)
  return {name: names for names in sharing.values() if len(names) > 1 for name in names}


def rows_of(family: Family, name: str, cfg: model.ModelConfig) -> tuple[int, int]:
  """Returns the first row of a name that shares a tensor, and that tensor's rows."""
  names = fused(family)[name]
  dim = cfg.head_dim or cfg.width // cfg.heads
  sizes = [dim * (cfg.heads if x == 'q' else cfg.kv_heads) for x in names]
  return sum(sizes[: names.index(name)]), sum(sizes)
