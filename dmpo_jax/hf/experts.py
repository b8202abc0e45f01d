"""What config.json says of a mixture of experts, by family.

Each family has a function that reads its fields, as its official class reads them, and
one that writes them. A field that the class does not read changes nothing here either.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from dmpo_jax import model


class Fields(NamedTuple):
  """The fields of a family's config.json that are more than a name for one of ours."""

  read: Callable[['Told'], dict[str, Any]]  # ModelConfig fields of them
  write: Callable[[model.ModelConfig], dict[str, Any]]  # the inverse
  misfits: Callable[[model.ModelConfig], dict[str, bool]]  # what it cannot hold
  defaults: dict[str, Any]  # what the class takes for a missing field
  # fields that the class ignores -> values that agree with it; None = any
  unread: dict[str, tuple | None]


class Told:
  """The fields of a config.json, the class's defaults where they are missing.

  What is wrong with a field is collected in `problems`.
  """

  def __init__(self, raw: dict[str, Any], defaults: dict[str, Any]):
    self.raw: dict[str, Any] = defaults | raw
    self.problems: list[str] = []

  def complain(self, name: str, should: str) -> None:
    value = self.raw.get(name)
    is_what = 'is missing: it' if value is None else f'= {value!r}'
    self.problems.append(f'{name} {is_what} must be {should}')

  def whole(self, name: str, least: int = 1) -> int:
    value: Any = self.raw.get(name)
    if type(value) is int and least <= value < 2**31:
      return value
    self.complain(name, f'a whole number >= {least}')
    return least

  def share(self, name: str, most: float = 1e30) -> float:
    value: Any = self.raw.get(name)
    if type(value) in (int, float) and 0 < value <= most:
      return float(value)
    self.complain(name, 'a number > 0' + (f', at most {most:g}' if most < 1e30 else ''))
    return 1.0

  def load_loss(self) -> float:
    """Returns the factor of the load loss; ours where the file names none."""
    value: Any = self.raw.get('router_aux_loss_coef')
    if type(value) in (int, float) and 0 <= value < 1e30:
      return float(value)
    if value is not None:
      self.complain('router_aux_loss_coef', 'a number >= 0')
    return model.ModelConfig.load_loss

  def flag(self, name: str) -> bool:
    value = self.raw.get(name)
    if value not in (True, False, None):
      self.complain(name, 'true or false')
    return bool(value)

  def numbers(self, name: str) -> list[int]:
    value: Any = self.raw.get(name)
    if isinstance(value, list) and all(type(x) is int and x >= 0 for x in value):
      return value
    self.complain(name, 'a list of whole numbers >= 0')
    return []

  @property
  def layers(self) -> int:
    count: Any = self.raw.get('num_hidden_layers')
    return count if type(count) is int and 0 < count < 10**6 else 0


def read_fields(fields: Fields, raw: dict[str, Any]) -> tuple[dict[str, Any], list]:
  """Returns ModelConfig fields of a config.json and what is wrong with them.

  A model whose layers are all dense has no field of experts.
  """
  told = Told(raw, fields.defaults)
  found = fields.read(told)
  count, chosen = found['experts'], found['experts_per_token']
  groups, kept = found.get('router_groups', 1), found.get('router_groups_kept', 1)
  if len(found['dense_layers']) == told.layers or not count:
    plain = ('mlp', 'rotary', 'qk_norm')
    return {name: found[name] for name in plain if name in found}, told.problems
  if not told.problems:
    if chosen > count:
      told.complain('num_experts_per_tok', f'at most num_experts = {count}')
    if groups > 1 and (count % groups or count < 2 * groups):
      told.complain(
        'n_group', f'a divisor of num_experts = {count}, at most half of it'
      )
    elif kept > groups or kept * (count // groups) < chosen:
      told.complain('topk_group', f'at most {groups} groups with {chosen} experts')
  return found, told.problems


def dense_width(told: Told, name: str, dense: tuple[int, ...], other: int) -> int:
  """Returns the width of the dense layers; `other` if no layer is dense."""
  value = told.raw.get(name)
  good = type(value) is int and 0 < value < 2**31
  return told.whole(name) if dense or good else other


# --- LLaDA2.x


def read_llada2(told: Told) -> dict[str, Any]:
  """The first layers are dense. The bias chooses; the chosen scores sum to a scale."""
  none = told.raw.get('num_experts') is None  # the class then makes dense layers
  count = 0 if none else told.whole('num_experts')
  dense = tuple(range(min(told.whole('first_k_dense_replace', 0), told.layers)))
  if none or len(dense) == told.layers:
    return dict(
      experts=0,
      experts_per_token=0,
      dense_layers=dense,
      mlp=told.whole('intermediate_size'),
      rotary=told.share('partial_rotary_factor', 1),
    )
  width, chosen = told.whole('moe_intermediate_size'), told.whole('num_experts_per_tok')
  shared = told.raw.get('num_shared_experts')
  shared = 0 if shared is None else told.whole('num_shared_experts', 0)
  return dict(
    experts=count,
    experts_per_token=chosen,
    expert_mlp=width,
    shared_mlp=shared * width,
    dense_layers=dense,
    mlp=dense_width(told, 'intermediate_size', dense, width),
    router='sigmoid',
    router_bias='choice',
    router_norm=chosen > 1,
    router_scale=told.share('routed_scaling_factor'),
    router_groups=told.whole('n_group'),
    router_groups_kept=told.whole('topk_group'),
    rotary=told.share('partial_rotary_factor', 1),
  )


def write_llada2(cfg: model.ModelConfig) -> dict[str, Any]:
  if not cfg.experts:
    return dict(
      num_experts=None,
      intermediate_size=cfg.mlp,
      partial_rotary_factor=cfg.rotary,
      use_qk_norm=True,
    )
  return dict(
    num_experts=cfg.experts,
    num_experts_per_tok=cfg.experts_per_token,
    moe_intermediate_size=cfg.expert_mlp,
    num_shared_experts=cfg.shared_mlp // cfg.expert_mlp or None,
    first_k_dense_replace=len(cfg.dense_layers),
    intermediate_size=cfg.mlp,
    routed_scaling_factor=cfg.router_scale,
    n_group=cfg.router_groups,
    topk_group=cfg.router_groups_kept,
    partial_rotary_factor=cfg.rotary,
    moe_router_enable_expert_bias=True,
    norm_topk_prob=cfg.router_norm,
    router_dtype='fp32',
    score_function='sigmoid',
    use_qk_norm=True,
  )


LLADA2 = Fields(
  read_llada2,
  write_llada2,
  lambda cfg: dict(
    router=cfg.experts > 0 and cfg.router != 'sigmoid',
    router_bias=cfg.experts > 0 and cfg.router_bias != 'choice',
    router_norm=cfg.experts > 0 and cfg.router_norm != (cfg.experts_per_token > 1),
    qk_norm=not cfg.qk_norm,
    shift=cfg.shift,
    dense_layers=cfg.dense_layers != tuple(range(len(cfg.dense_layers))),
    shared_mlp=cfg.experts > 0 and cfg.shared_mlp % cfg.expert_mlp > 0,
  ),
  defaults=dict(
    num_experts=16,
    num_experts_per_tok=2,
    num_shared_experts=0,
    first_k_dense_replace=0,
    routed_scaling_factor=2.5,
    n_group=8,
    topk_group=4,
    partial_rotary_factor=0.5,
    moe_intermediate_size=None,
    intermediate_size=None,
  ),
  unread=dict(
    moe_router_enable_expert_bias=(True,),
    norm_topk_prob=(True,),
    score_function=('sigmoid',),
    router_dtype=('fp32',),
    use_qk_norm=(True,),
    use_rmsnorm=(True,),
    norm_head=(False, None),
    norm_softmax=(False, None),
    using_split_qkv_in_self_attention=(False, None),
    use_sliding_window=(False, None),
    rotary_dim=None,
  ),
)


# --- SDAR-MoE


def read_sdar_moe(told: Told) -> dict[str, Any]:
  """Every decoder_sparse_step-th layer has experts, but for those of a list."""
  if told.raw.get('mlp_only_layers') is None:
    told.raw['mlp_only_layers'] = []
  listed, step = told.numbers('mlp_only_layers'), told.whole('decoder_sparse_step')
  count, width = told.whole('num_experts', 0), told.whole('moe_intermediate_size')
  dense = tuple(i for i in range(told.layers) if i in listed or (i + 1) % step)
  return dict(
    experts=count,
    experts_per_token=told.whole('num_experts_per_tok'),
    expert_mlp=width,
    dense_layers=dense,
    mlp=dense_width(told, 'intermediate_size', dense or () if count else (0,), width),
    router_norm=told.flag('norm_topk_prob'),
    load_loss=told.load_loss(),
  )


def write_sdar_moe(cfg: model.ModelConfig) -> dict[str, Any]:
  return dict(
    num_experts=cfg.experts,
    num_experts_per_tok=cfg.experts_per_token,
    moe_intermediate_size=cfg.expert_mlp,
    mlp_only_layers=list(cfg.dense_layers),
    decoder_sparse_step=1,
    intermediate_size=cfg.mlp,
    norm_topk_prob=cfg.router_norm,
    router_aux_loss_coef=cfg.load_loss,
  )


SOFTMAX = lambda cfg: dict(
  router=cfg.router != 'softmax',
  router_scale=cfg.router_scale != 1,
  router_groups=cfg.router_groups != 1,
  qkv_bias=cfg.qkv_bias,
  shift=cfg.shift,
)
SDAR_MOE = Fields(
  read_sdar_moe,
  write_sdar_moe,
  lambda cfg: (
    SOFTMAX(cfg)
    | dict(
      router_bias=bool(cfg.router_bias),
      shared_mlp=cfg.shared_mlp > 0,
      rotary=cfg.rotary != 1,
      qk_norm=not cfg.qk_norm,
    )
  ),
  defaults=dict(
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    decoder_sparse_step=1,
    mlp_only_layers=None,
    intermediate_size=6144,
    norm_topk_prob=False,
    router_aux_loss_coef=1e-3,
  ),
  unread={},
)


# --- LLaDA-MoE


def read_lladamoe(told: Told) -> dict[str, Any]:
  """A list says which layers have experts. The chosen weights are never normalised."""
  freq, width = told.numbers('moe_layer_freq'), told.whole('expert_intermediate_size')
  if len(freq) < told.layers and not told.problems:
    told.complain('moe_layer_freq', f'of {told.layers} numbers, one a layer')
  dense = tuple(i for i, x in enumerate(freq[: told.layers]) if not x)
  shared = told.raw.get('shared_expert_intermediate_size')
  shared = told.whole('shared_expert_intermediate_size', 0) if shared else 0
  heads = told.raw.get('num_attention_heads')
  if told.raw['head_dim'] is not None and type(heads) is int:
    if told.raw['head_dim'] * heads != told.raw.get('hidden_size'):
      told.complain(
        'head_dim', 'hidden_size / num_attention_heads, as the class has it'
      )
  return dict(
    experts=told.whole('num_experts'),
    experts_per_token=told.whole('num_experts_per_tok'),
    expert_mlp=width,
    shared_mlp=shared,
    dense_layers=dense,
    mlp=dense_width(told, 'dense_intermediate_size', dense, width),
    router_bias='weight' if told.flag('moe_router_enable_expert_bias') else '',
    rotary=told.share('partial_rotary_factor', 1),
    qk_norm=told.flag('qk_layernorm'),
    load_loss=told.load_loss(),
  )


def write_lladamoe(cfg: model.ModelConfig) -> dict[str, Any]:
  return dict(
    num_experts=cfg.experts,
    num_experts_per_tok=cfg.experts_per_token,
    expert_intermediate_size=cfg.expert_mlp,
    shared_expert_intermediate_size=cfg.shared_mlp or None,
    moe_layer_freq=[int(i not in cfg.dense_layers) for i in range(cfg.layers)],
    dense_intermediate_size=cfg.mlp,
    moe_router_enable_expert_bias=cfg.router_bias == 'weight',
    moe_router_score_function='softmax',
    partial_rotary_factor=cfg.rotary,
    qk_layernorm=cfg.qk_norm,
    router_aux_loss_coef=cfg.load_loss,
  )


LLADA_MOE = Fields(
  read_lladamoe,
  write_lladamoe,
  lambda cfg: (
    SOFTMAX(cfg)
    | dict(
      router_bias=cfg.router_bias == 'choice',
      router_norm=cfg.router_norm,
      head_dim=cfg.head_dim not in (0, cfg.width / cfg.heads),
    )
  ),
  defaults=dict.fromkeys(
    (
      'num_experts',
      'num_experts_per_tok',
      'expert_intermediate_size',
      'shared_expert_intermediate_size',
      'dense_intermediate_size',
      'moe_layer_freq',
      'moe_router_enable_expert_bias',
      'partial_rotary_factor',
      'qk_layernorm',
      'head_dim',
      'router_aux_loss_coef',
    )
  ),
  unread=dict(
    norm_topk_prob=(False, None),
    routed_scaling_factor=(1, None),
    router_num_group=(1, 0, None),
    router_topk_group=(1, 0, None),
    moe_router_score_function=('softmax', None),
  ),
)


def kind_of(cfg: model.ModelConfig) -> str:
  """Returns the model_type as which a mixture of experts made here is written.

  Also of a dense model whose heads rotate in part, as only these families' do.
  ValueError names the fields that keep it from being any.
  """
  kinds = {'lladamoe': LLADA_MOE, 'sdar_moe': SDAR_MOE}
  if cfg.block_causal:
    kinds = dict(reversed(kinds.items()))
  if cfg.router == 'sigmoid' or not cfg.experts:
    kinds = {'llada2_moe': LLADA2}
  said = lambda name: f'{name} = {getattr(cfg, name)!r}'
  wrong = {
    kind: [said(name) for name, is_wrong in fields.misfits(cfg).items() if is_wrong]
    for kind, fields in kinds.items()
  }
  for kind, names in wrong.items():
    if not names:
      return kind
  reasons = '; '.join(f'{kind} has no {", ".join(x)}' for kind, x in wrong.items())
  raise ValueError(f'no family of checkpoints can hold this model: {reasons}')
