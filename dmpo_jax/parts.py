"""What a config names, made: tokenizer, model, optimizer, references, problems.

Below this file nobody sees a ConfigDict but `check`, which refuses an impossible config
before anything is compiled. Nothing here compiles; build.py does.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import optax

from dmpo_jax import (
  check,
  config,
  control,
  data,
  hf,
  masking,
  model,
  optim,
  routing,
  sampler,
  step,
)
from dmpo_jax.logprob import LogprobConfig
from dmpo_jax.objectives import OBJECTIVES, vrpo
from dmpo_jax.objectives.shared import Common
from dmpo_jax.sampler import SampleConfig
from dmpo_jax.tasks import rewards, userfile
from dmpo_jax.types import Objective, TaskOptions


def tokenizer_of(c: Any, folder: str) -> Any:
  """Returns the tokenizer: data.tokenizer, else the checkpoint's, else 'char'.

  None for a preset of a published model whose files are not here: only to plan.
  """
  ids, mask = {}, ''
  if folder:
    fields = hf.read_config(folder, attention_block(c), c.model.convert)
    ids = {name: fields[name] for name in ('mask_id', 'eos_id', 'pad_id')}
    if c.model.convert:
      mask = c.model.mask_token or data.MASK_TOKEN
      del ids['mask_id']
  elif not c.data.tokenizer and 'vocab' in model.PRESETS[c.model.preset]:
    return None
  return data.load_tokenizer(c.data.tokenizer or folder or 'char', ids, mask)


def attention_block(c: Any) -> int | None:
  """Returns the attention block that the config names; None: the checkpoint's own."""
  return None if c.model.attention_block < 0 else c.model.attention_block


def model_config(c: Any, tokenizer: Any, folder: str = '') -> model.ModelConfig:
  """Returns the model's sizes and settings: a checkpoint's, or a preset's.

  ValueError if heads, adapters, tokenizer and mesh do not fit together.
  """
  block = attention_block(c)
  if folder:
    fields = hf.read_config(folder, block, c.model.convert)
    if c.model.convert:
      mask = tokenizer.mask_token_id  # beyond the vocabulary it is a row more
      fields |= dict(mask_id=mask, vocab=max(fields['vocab'], mask + 1))
  else:
    changed = {name: c.model[name] for name in config.SIZES if c.model[name]}
    fields = dict(model.PRESETS[c.model.preset])
    if fields['heads'] == fields['kv_heads']:  # GQA only where it is asked for
      fields['kv_heads'] = changed.get('heads', fields['heads'])
    fields |= changed | ({} if block is None else {'block_causal': block})
    if tokenizer is not None:
      fields |= dict(
        vocab=max(len(tokenizer), fields.get('vocab', 0)),
        mask_id=tokenizer.mask_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
      )
  if tokenizer is not None:
    stops = set(data.stop_ids(tokenizer)) | set(fields.get('stop_ids', ()))
    fields['stop_ids'] = tuple(sorted(stops - {fields['eos_id']}))
  cfg = model.ModelConfig(
    **fields,
    dtype=c.model.dtype,
    param_dtype=c.model.param_dtype,
    remat=c.model.remat,
    head_chunk=c.model.head_chunk,
    attention=c.model.attention,
    block_grid=c.model.attention_grid,
    lora_rank=c.lora.rank,
    lora_alpha=c.lora.alpha,
    lora_dropout=c.lora.dropout,
    lora_dtype=c.lora.dtype if c.model.dtype == 'bfloat16' else 'float32',
    lora_targets=model.LORA_TARGETS.get(c.lora.targets) or c.lora.targets,
  )
  check_targets(cfg)
  if not cfg.head_dim and cfg.width % cfg.heads or cfg.heads % cfg.kv_heads:
    raise ValueError(
      f'model.heads = {cfg.heads} must divide model.width = '
      f'{cfg.width} and be a multiple of model.kv_heads = '
      f'{cfg.kv_heads}'
    )
  check_splits(c, cfg)
  if tokenizer is not None and len(tokenizer) > cfg.vocab:
    raise ValueError(
      f'the tokenizer has {len(tokenizer)} tokens, the model '
      f"{cfg.vocab}: data.tokenizer is not this model's"
    )
  return cfg


def check_splits(c: Any, cfg: model.ModelConfig) -> None:
  """ValueError if the mesh does not divide what it splits of the model."""
  if c.model.attention == 'splash' and cfg.kv_heads % c.mesh.tensor:
    raise ValueError(
      f'model.attention = splash splits the K/V heads: '
      f'model.kv_heads = {cfg.kv_heads} must be a multiple of '
      f'mesh.tensor = {c.mesh.tensor}, or use xla'
    )
  if c.mesh.expert > 1 and (not cfg.experts or cfg.experts % c.mesh.expert):
    raise ValueError(
      f'mesh.expert = {c.mesh.expert} splits the experts of a layer: it must divide '
      f"the model's number of experts, {cfg.experts}; set 1 for a model without"
    )


def check_model(c: Any, cfg: model.ModelConfig) -> None:
  """ValueError if options of attention blocks or experts do not fit the model."""
  check_blocks(c, cfg)
  check_experts(c, cfg)


def check_blocks(c: Any, cfg: model.ModelConfig) -> None:
  """ValueError if objective, samplers or log-probs do not fit attention blocks."""
  why = OBJECTIVES[c.objective.name].whole_text
  if cfg.block_causal and c.train.iterations and why:
    raise ValueError(
      f'objective.name = {c.objective.name} is not for a model that attends in blocks '
      f'of {cfg.block_causal}: {why}'
    )
  for name, section in (('sampler', c.sampler), ('eval.sampler', c.eval.sampler)):
    hp = check.settings(SampleConfig, section)
    if problem := sampler.block_problem(cfg, hp):
      raise ValueError(problem.replace('sampler.', f'{name}.'))
    if cfg.block_causal and cfg.attention == 'splash' and hp.cache != 'block':
      raise ValueError(
        f'{name}.cache = {hp.cache}: model.attention = splash reads attention blocks '
        'with the cache block alone; set it, or model.attention = xla'
      )
  if c.model.attention_grid == 'prompt' and not cfg.block_causal:
    raise ValueError(
      'model.attention_grid = prompt needs a model that attends block by block, and '
      'this one sees the whole text: set text'
    )
  if c.logprob.elbo == 'order' and not cfg.block_causal:
    raise ValueError(
      'logprob.elbo = order needs a model that attends block by block: set paper or '
      'stratified'
    )
  along = c.train.iterations and c.logprob.estimator == 'trajectory'
  if cfg.block_causal and along and c.sampler.guidance:
    raise ValueError(
      f'sampler.guidance = {c.sampler.guidance} has no log-prob along the trajectory '
      'of a block-causal model: set 0, or logprob.estimator = elbo'
    )


def check_experts(c: Any, cfg: model.ModelConfig) -> None:
  """ValueError if options of experts do not fit the model and its sampler."""
  how, hp = routing_of(c), check.settings(SampleConfig, c.sampler)
  if how.records and c.train.iterations:
    if problem := sampler.routes.problem(cfg, hp):
      raise ValueError(problem)
  bounded = [x for x in ('expert_entropy', 'expert_idle') if c.health[x]]
  asked = ['routing.load'] * bool(how.load) + [f'health.{x}' for x in bounded]
  if asked and not cfg.experts:
    raise ValueError(f'{" and ".join(asked)}: the model has no experts; set 0')


def check_targets(cfg: model.ModelConfig, field: str = 'lora.targets') -> None:
  """ValueError if the adapters match no linear; field: what names them."""
  names = model.linears_of(cfg)
  try:
    matched = any(re.search(cfg.lora_targets, name) for name in names)
  except re.error as error:
    raise ValueError(
      f'{field} = {cfg.lora_targets!r} is no regular expression: {error}'
    ) from None
  if cfg.lora_rank and not matched:
    raise ValueError(
      f'{field} = {cfg.lora_targets!r} matches none of {", ".join(names)}'
    )


def optimizer_of(c: Any, lr: Any = None) -> Any:
  """Returns RL's optimizer, with the moving reference if there is one.

  lr may be traced; None = optim.lr. The controller has its own Adam beside it.
  """
  routers = routing_of(c).trains('rl')
  model_ = optim.make_optimizer(c.optim, lr, 'moving' in c.reference.of, routers)
  if not c.control.on:
    return model_
  return optim.beside(model_, optax.adam(c.control.lr, b1=0.9, b2=0.99))


def pairs_optimizer_of(c: Any, lr: Any = None) -> Any:
  """Returns the optimizer of training on pairs: RL's, at a rate of its own."""
  own = dict(lr=c.pairs.lr, warmup=c.pairs.warmup, decay_steps=0)
  hp = dataclasses.replace(check.settings(optim.Config, c.optim), **own)
  routers = routing_of(c).trains('rl')
  return optim.make_optimizer(hp, lr, 'moving' in c.reference.of, routers)


def routing_of(c: Any) -> routing.Config:
  """Returns how routers of experts train."""
  return check.settings(routing.Config, c.routing)


def sft_config(c: Any, cfg: model.ModelConfig) -> model.ModelConfig:
  """Returns the model of supervised training: with its own adapters, or with none."""
  sft = c.sft
  targets = sft.targets or c.lora.targets
  found = dataclasses.replace(
    cfg,
    lora_rank=sft.rank,
    lora_alpha=sft.alpha,
    lora_dropout=sft.dropout,
    lora_targets=model.LORA_TARGETS.get(targets) or targets,
  )
  check_targets(found, 'sft.targets' if sft.targets else 'lora.targets')
  return found


def sft_optimizer_of(c: Any, factor: Any = 1.0) -> Any:
  """Returns AdamW for supervised training; factor: of its rate, may be traced."""
  sft = c.sft
  hp = optim.Config(sft.lr, sft.warmup, weight_decay=sft.weight_decay, clip=sft.clip)
  rate = None if sft.decay == 'constant' else sft.lr * factor
  return optim.make_optimizer(hp, rate, routers=routing_of(c).trains('sft'))


def sft_setup_of(c: Any, cfg: model.ModelConfig, factor: Any = 1.0) -> step.SftSetup:
  """Returns what stays the same from one supervised update to the next."""
  sft = c.sft
  own = sft_config(c, cfg)
  return step.SftSetup(
    dataclasses.replace(own, keep_routes=bool(cfg.experts)),
    text_length(c, cfg),
    sft_optimizer_of(c, factor),
    sft.microbatches,
    masking.Rates(sft.law, sft.low, sft.high),
    sft.mean == 'token',
    experts=routing_of(c),
  )


def text_length(c: Any, cfg: model.ModelConfig) -> int:
  """Returns the tokens of a supervised text that masks are drawn for.

  They are the completion's where the task's solutions are learned at RL's length.
  """
  if not (c.sft.path or c.sft.length):
    return c.sampler.length
  length, block = c.sft.length or cfg.positions, cfg.block_causal or 1
  return -(-length // block) * block


def setup_of(c: Any, cfg: model.ModelConfig, objective: Objective) -> step.Setup:
  """Returns what stays the same from update to update."""
  return step.Setup(
    dataclasses.replace(cfg, keep_routes=bool(cfg.experts)),
    objective,
    check.settings(objective.Config, c.objective),
    group=c.train.group,
    inner=c.train.inner,
    microbatches=c.train.microbatches,
    law=check.settings(SampleConfig, c.sampler),
    logprob=check.settings(LogprobConfig, c.logprob),
    common=check.settings(Common, c.objective),
    experts=routing_of(c),
    measure=c.health.measure,
    weights=tuple(c.reference.weights),
    mean=c.reference.mean,
    clip=c.reference.clip,
    moves=(c.reference.every, c.reference.mix) if 'moving' in c.reference.of else None,
    control=controller_of(c),
  )


def controller_of(c: Any) -> control.Controller | None:
  """Returns the law of the rows' own numbers of the pick rule; None: they have none."""
  hp = check.settings(control.Config, c.control)
  law = check.settings(SampleConfig, c.sampler)
  return control.Controller(hp, law) if hp.on else None


def pairs_setup_of(c: Any, setup: step.Setup) -> step.Setup:
  """Returns what stays the same in training on pairs: DPO in groups of two."""
  names = [field.name for field in dataclasses.fields(vrpo.Preference)]
  hp = vrpo.Config(**{name: c.pairs[name] for name in names})
  return dataclasses.replace(
    setup,
    objective=vrpo.PAIRS,
    hp=hp,
    group=2,
    inner=1,
    microbatches=c.pairs.microbatches,
    common=Common(),
    control=None,
    measure=False,
  )


# --- drafts


def drafts_with(c: Any, training: bool) -> bool:
  """Returns whether completions are drafted, of training or of evaluation."""
  return bool(c.draft.of) and (c.draft.rollouts or not training)


def draft_config(c: Any, cfg: model.ModelConfig, tokenizer: Any) -> model.ModelConfig:
  """Returns the network of the draft.

  ValueError if it has another tokenizer, other special tokens or another layout than
  the model: they continue each other's texts.
  """
  of = c.draft.of
  if of == 'same':
    return cfg
  plain = dataclasses.replace(cfg, lora_rank=0)
  if of in sampler.OWN_WEIGHTS:
    return plain
  folder = hf.locate(of, False)
  theirs = hf.read_config(folder, attention_block(c))
  same = ('vocab', 'mask_id', 'eos_id', 'pad_id', 'block_causal')
  refuse_differing(f'draft.of = {of}', same, theirs, cfg)
  has_words = any(os.path.isfile(os.path.join(folder, x)) for x in data.TOKENIZER_FILES)
  if tokenizer is not None and has_words:
    ids = {name: theirs[name] for name in ('mask_id', 'eos_id', 'pad_id')}
    if data.load_tokenizer(folder, ids).get_vocab() != tokenizer.get_vocab():
      raise ValueError(
        f'draft.of = {of}: its tokenizer has other tokens than the model: name a model '
        'of the same family'
      )
  run = {name: getattr(cfg, name) for name in (*OF_THE_RUN, 'block_grid')}
  return model.ModelConfig(**{**theirs, **run})


def drafter_of(c: Any, cfg: model.ModelConfig, tokenizer: Any) -> sampler.Drafter:
  """Returns who drafts; ValueError if the model or a sampler cannot have drafts."""
  how = check.settings(sampler.Draft, c.draft)
  found = []
  for name, section in (('sampler', c.sampler), ('eval.sampler', c.eval.sampler)):
    if drafts_with(c, name == 'sampler' and bool(c.train.iterations)):
      said = how.misfits(check.settings(SampleConfig, section), cfg)
      found += [text.replace('sampler.', f'{name}.') for text in said]
  if found:
    raise ValueError('; '.join(dict.fromkeys(found)))
  return sampler.Drafter(draft_config(c, cfg, tokenizer), how)


def limit_of(built: Any, training: bool) -> tuple[int, str]:
  """Returns the tokens of prompt and completion that are sampled at most, and which
  network says so: the model or its draft."""
  own = built.model.positions, 'model'
  if not built.who or not drafts_with(built.config, training):
    return own
  return min(own, (built.who.drafter.cfg.positions, 'draft'), key=lambda x: x[0])


def own_draft(c: Any) -> bool:
  """Returns whether the draft has weights that are read from files."""
  return c.draft.of not in sampler.OWN_WEIGHTS


# --- references


def is_adapter(path: str) -> bool:
  """Returns whether a path is the directory of a PEFT adapter."""
  return os.path.isfile(os.path.join(path, 'adapter_config.json'))


# Fields of ModelConfig in which a reference may differ from the policy.
OF_THE_RUN = (
  'dtype', 'param_dtype', 'remat', 'head_chunk', 'attention', 'stop_ids', 'load_loss',
)  # fmt: skip


def check_reference(c: Any, path: str, cfg: model.ModelConfig) -> None:
  """ValueError if a reference has another vocabulary or shape than the policy."""
  same = [
    field.name
    for field in dataclasses.fields(cfg)
    if field.name not in OF_THE_RUN and 'lora' not in field.name
  ]
  theirs = {name: getattr(cfg, name) for name in same}
  theirs |= hf.read_config(path, attention_block(c))
  refuse_differing(f'reference.of: {path}', same, theirs, cfg)


def refuse_differing(
  where: str, names: Iterable[str], theirs: dict[str, Any], cfg: model.ModelConfig
) -> None:
  """Raises ValueError if fields of another model are not those of the policy."""
  differing = [
    f'{name} = {theirs[name]}, but the policy has {getattr(cfg, name)}'
    for name in names
    if theirs[name] != getattr(cfg, name)
  ]
  if differing:
    raise ValueError(f'{where}: ' + '; '.join(differing))


def references(
  c: Any, cfg: model.ModelConfig, folder: str, grid: Any, quantize: Callable
) -> Callable[[], tuple]:
  """Returns a function that reads what p_ref is made of: trees over the frozen base.

  None stands for the moving one; () for the base alone. ValueError, before anything is
  read, if one does not fit the policy.
  """
  if check.plain_reference(c):
    return lambda: ()
  plain = dataclasses.replace(cfg, lora_rank=0)

  def reader(path):
    if path in ('base', 'moving'):
      return lambda: {} if path == 'base' else None
    if is_adapter(path):
      if not cfg.lora_rank:
        raise ValueError(
          f'reference.of: {path} is an adapter: set lora.rank, lora.alpha and '
          "lora.targets to the adapter's"
        )
      hf.check_adapter(path, cfg, folder, c.model.checkpoint)
      return lambda: hf.read_adapter(path, cfg, folder, grid)
    found = hf.locate(path, False)
    check_reference(c, found, cfg)
    return lambda: quantize(hf.read_params(hf.locate(path), plain, grid))

  readers = [reader(path) for path in c.reference.of]
  return lambda: tuple(read() for read in readers)


def revisions(c: Any) -> dict[str, str]:
  """Returns field -> revision of each model that comes from the hub's cache."""
  found = {}
  names = {'model.checkpoint': [c.model.checkpoint], 'reference.of': c.reference.of}
  names |= {'draft.of': [c.draft.of]}
  for field, paths in names.items():
    for path in paths:
      if path and path not in ('base', 'moving', 'same') and not os.path.isdir(path):
        above, revision = os.path.split(hf.locate(path, False))
        if os.path.basename(above) == 'snapshots':
          found[f'{field} {path}'] = revision
  files = {field: text for field, text, _ in _user_files(c)}
  return found | {f'{field} (digest)': text for field, text in files.items()}


def _user_files(c: Any) -> Iterator[tuple[str, str, str]]:
  """Yields (field, digest, FILE.py:NAME) of the user's files that a config names."""
  if userfile.is_spec(c.data.task):
    yield 'data.task', userfile.digest('data.task', c.data.task), c.data.task
  if userfile.is_spec(c.draft.judge):
    yield 'draft.judge', userfile.digest('draft.judge', c.draft.judge), c.draft.judge
  for name, spec in rewards.specs(c.reward.file).items():
    yield f'reward.file {name}', userfile.digest('reward.file', spec), spec
  if c.data.drop:
    text = hashlib.sha256(pathlib.Path(c.data.drop).read_bytes()).hexdigest()
    yield 'data.drop', text, c.data.drop


def file_digests(c: Any) -> dict[str, int]:
  """Returns a number for each of the user's files: it changes with what they say."""
  return {field: int(text[:12], 16) for field, text, _ in _user_files(c)}


# --- problems


def problems(built: Any, split: str) -> data.Problems:
  """Returns the problems of a split of build.Built, loaded and encoded once.

  ValueError if this machine cannot judge the task, if prompt and completion exceed the
  positions of the model or its draft, or if the attention kernel does not take their
  length.
  """
  c = built.config
  if split not in built.encoded:
    how = check.settings(data.PromptOptions, c.data)
    if split != 'train' and (c.eval.style or c.eval.template):
      how = dataclasses.replace(how, style=c.eval.style, template=c.eval.template)
    if built.task.ready is not None:
      built.task.ready()
    built.encoded[split] = data.load_problems(
      built.task, split, built.tokenizer, check.settings(TaskOptions, c.data), how
    )
  loaded = built.encoded[split]
  for name, section in (('sampler', c.sampler), ('eval.sampler', c.eval.sampler)):
    limit = limit_of(built, name == 'sampler' or split == 'train')
    data.check_positions(loaded, {f'{name}.length': section.length}, *limit)
  if split == 'train' and c.curriculum.signal != 'none' and c.train.iterations:
    if (count := len(loaded.examples)) < c.train.prompts:
      raise ValueError(
        f'train.prompts = {c.train.prompts} must be at most the {count} problems with '
        f'curriculum.signal = {c.curriculum.signal}, which draws different ones'
      )
  prompt = loaded.tokens.shape[1]
  if c.model.attention == 'cudnn' and (prompt + c.sampler.length) % 2:
    raise ValueError(
      f'model.attention = cudnn trains on even lengths, this one is '
      f'{prompt + c.sampler.length}: set data.prompt_length = {prompt + 1}'
    )
  return loaded
