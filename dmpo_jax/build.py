"""Checks a config and compiles the project: every jit and the pmap live here.

Below this file nobody sees a ConfigDict. `check` refuses what cannot work
before anything is compiled; `build` returns the parts, `Steps` the compiled
functions with their shardings.
"""

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmpo_jax import (
    checkpoint,
    data,
    health,
    logprob,
    masking,
    mesh,
    model,
    optim,
    rng,
    rollout,
    sampler,
    step,
    weights,
)
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.objectives.shared import Common
from dmpo_jax.tasks import TASKS, answers, symbolic
from dmpo_jax.types import Rollouts, Scored, TaskOptions, TrainBatch

_compiled = [0, 0.0]  # programs so far in this process, and their seconds


def _note_compilation(event, seconds, **_):
  # Told of programs found in the persistent cache, too: quickly.
  if event == '/jax/core/compile/backend_compile_duration':
    _compiled[:] = _compiled[0] + 1, _compiled[1] + seconds


jax.monitoring.register_event_duration_secs_listener(_note_compilation)


def compilations():
  """Programs compiled since the last call, and their seconds, as metrics."""
  count, seconds = _compiled
  _compiled[:] = 0, 0.0
  return {'compilations': count, 'seconds/compile': seconds}


class Steps(NamedTuple):
  """The compiled functions; arguments are host or device arrays."""

  init: Callable  # () -> params
  init_lora: Callable  # () -> {'lora': ...}
  start: Callable  # trainable -> TrainState
  start_sft: Callable  # params -> TrainState
  sample: Callable  # (params, tokens, valid, row) -> (Rollouts, completion)
  sample_eval: Callable  # the same with the evaluation's sampler
  sampler_of: Callable  # config section -> the same with that sampler
  # () -> what p_ref is made of: trees over `frozen`, None for the moving one;
  # () for the base alone
  read_references: Callable
  # (trainable, frozen, rollouts, row, completion, references) -> dict
  score: Callable
  pack: Callable  # (rollouts, completion, row, reward_BxG, scores) -> batch
  update: Callable  # (state, frozen, batch, inner, scale) -> (state, metrics)
  sft: Callable  # (state, tokens, valid, row, step) -> (state, metrics)
  quantize: Callable  # params -> params, kernels as model.quantize says
  digest: Callable  # tree -> uint32 of all its bits


class Built(NamedTuple):
  """All that a run is made of."""

  config: Any  # the ConfigDict it came from
  mesh: Any
  model: model.ModelConfig
  task: Any  # types.Task
  tokenizer: Any
  objective: Any  # types.Objective
  hp: Any  # its settings
  steps: Steps
  encoded: dict  # split -> data.Problems, filled by `problems`


SIZES = ('width', 'layers', 'heads', 'kv_heads', 'mlp')  # of config.model


def nearest(section, name, table):
  """The complaint about an unknown name, with the one perhaps meant."""
  if name in table:
    return []
  close = difflib.get_close_matches(str(name), list(table), 1, 0.4)
  hint = f'; did you mean {close[0]!r}?' if close else ''
  return [f'{section} = {name!r} must be one of {", ".join(table)}{hint}']


def settings(cls, section):
  """A frozen dataclass from the fields of its name in a config section."""
  names = [field.name for field in dataclasses.fields(cls)]
  return cls(**{name: section[name] for name in names})


def check(c, count, platform=''):
  """Raises one ValueError that lists every impossible setting of a config.

  count: devices that the run will have; platform: theirs, '' = jax's default.
  """
  found = []
  for section, name, table in (
      ('model.preset', c.model.preset, model.PRESETS),
      ('data.task', c.data.task, TASKS),
      ('objective.name', c.objective.name, OBJECTIVES),
      ('sampler.pick', c.sampler.pick, sampler.NAMES),
      ('eval.sampler.pick', c.eval.sampler.pick, sampler.NAMES),
      ('data.protocol', c.data.protocol, ('strict', 'paper')),
      ('data.overlong', c.data.overlong, ('error', 'drop', 'cut')),
      ('health.action', c.health.action, health.ACTIONS),
      ('model.quantize', c.model.quantize, ('none', *model.QUANT)),
      ('model.remat', c.model.remat, model.REMAT),
      ('model.attention', c.model.attention, model.ATTENTION),
      ('logprob.estimator', c.logprob.estimator, ('elbo', 'trajectory')),
      ('logprob.elbo', c.logprob.elbo, ('paper', 'stratified')),
      ('model.dtype', c.model.dtype, ('float32', 'bfloat16')),
      ('model.param_dtype', c.model.param_dtype, ('float32', 'bfloat16')),
      ('sampler.parallel', c.sampler.parallel, ('jit', 'pmap')),
      ('eval.sampler.parallel', c.eval.sampler.parallel, ('jit', 'pmap'))):
    found += nearest(section, name, table)
  if c.data.task in TASKS:
    styles = TASKS[c.data.task].styles
    found += nearest('data.style', c.data.style, styles)
    found += nearest('eval.style', c.eval.style, ('', *styles))
  for prefix, section in (('', c.sampler), ('eval.', c.eval.sampler)):
    hp = settings(sampler.SampleConfig, section)
    if hp.pick in sampler.NAMES:
      found += [prefix + text for text in sampler.problems(hp)]
  if c.objective.name in OBJECTIVES:
    objective = OBJECTIVES[c.objective.name]
    found += objective.check(settings(objective.hp, c.objective))
  found += check_numbers(c) + check_rows(c, count) + check_logprob(c)
  found += check_model(c) + check_eval(c) + check_health(c)
  found += check_objective(c) + check_reference(c)
  found += check_attention(c, platform or jax.default_backend())
  if found:
    raise ValueError('this config cannot run:\n' + '\n'.join(
        f'  {text}' for text in found))


def check_numbers(c):
  """Fields below their least value."""
  least = {
      'train.iterations': 0, 'train.prompts': 1, 'train.group': 2,
      'train.inner': 1, 'train.microbatches': 1, 'sft.steps': 0,
      'sft.batch': 1, 'logprob.draws': 1, 'logprob.states': 0, 'eval.batch': 1,
      'eval.every': 0, 'eval.samples': 1, 'reward.workers': 0,
      'checkpoint.every': 1, 'checkpoint.keep': 1,
      'checkpoint.every_minutes': 0,
      'data.train_size': 0, 'data.validation_size': 0, 'data.test_size': 0,
      'data.prompt_length': 0, 'data.bucket': 0, 'lora.rank': 0,
      'lora.alpha': 0,
      'optim.lr': 0, 'optim.warmup': 0, 'optim.decay_steps': 0,
      'optim.clip': 0, 'sft.lr': 0, 'optim.weight_decay': 0,
      'model.head_chunk': 0, 'mesh.data': 0,
      'reference.every': 1, 'mesh.fsdp': 1, 'mesh.tensor': 1, 'mesh.cpu': 1,
      'log.samples': 0, 'log.stuck_minutes': 0, 'health.patience': 1,
      'health.rollbacks': 0,
      **{f'health.{rule}': 0 for rule in health.RULES}}
  flat = flatten(c)
  found = [] if 0 <= c.seed < 2 ** 32 else [
      f'seed = {c.seed} must be in 0 to 2 ** 32 - 1']
  return found + [f'{name} = {flat[name]} must be >= {low}'
                  for name, low in least.items() if not flat[name] >= low]


def check_eval(c):
  """Templates that are there, deadlines and samples that make sense."""
  found = []
  for name, path in (('data.template', c.data.template),
                     ('eval.template', c.eval.template)):
    if path and not os.path.isfile(path):
      found.append(f'{name} = {path!r}: no such file')
  if c.eval.samples > 1 and not c.eval.sampler.temperature:
    found.append(f'eval.samples = {c.eval.samples} needs '
                 'eval.sampler.temperature > 0: greedy ones are all the same')
  if not c.reward.deadline > 0:
    found.append(f'reward.deadline = {c.reward.deadline} must be > 0 seconds')
  if not all(isinstance(n, int) for n in c.eval.lengths):
    found.append(f'eval.lengths = {c.eval.lengths} must be whole numbers, such '
                 'as "(128, 256, 512)"')
  return found


def check_health(c):
  """Bounds that can be broken, on numbers that this objective gives."""
  h = settings(health.Config, c.health)
  found = [f'health.{rule} = {getattr(h, rule)} must be in [0, 1]; 0 = off'
           for rule in ('empty', 'repeated', 'distinct', 'equal', 'reward',
                        'ess') if not 0 <= getattr(h, rule) <= 1]
  if not 0 < h.lr_factor <= 1:
    found.append(f'health.lr_factor = {h.lr_factor} must be in (0, 1]')
  if c.objective.name not in OBJECTIVES:
    return found
  objective = OBJECTIVES[c.objective.name]
  hp = settings(objective.hp, c.objective)
  if objective.check(hp):
    return found
  if h.kl and not (c.health.measure or {'old', 'ref'} <= objective.needs(hp)):
    found.append(f'health.kl = {h.kl} needs health.measure=True: this '
                 'objective does without log p_old or log p_ref')
  if h.ess:
    groups = [jax.ShapeDtypeStruct((1, 2), jnp.float32)] * 4
    guess = jax.ShapeDtypeStruct((1, 2, 1), jnp.float32)
    given = jax.eval_shape(lambda *s: objective.weigh(Scored(*s), hp), *groups,
                           guess)[2]
    if 'ess' not in given:
      found.append(f'health.ess = {h.ess}: objective.name = {c.objective.name} '
                   'has no effective size, set 0')
  return found


def check_model(c):
  """What a checkpoint, a quantized base and adapters allow."""
  found, m = [], c.model
  sizes = [f'model.{name} = {m[name]}' for name in SIZES if m[name]]
  if m.checkpoint and sizes:
    found.append(f'{", ".join(sizes)}: the sizes are those of '
                 'model.checkpoint, leave them 0')
  if m.quantize != 'none' and not c.lora.rank:
    found.append(f'model.quantize = {m.quantize} freezes the base: it needs '
                 'lora.rank > 0')
  if not 0 <= c.lora.dropout < 1:
    found.append(f'lora.dropout = {c.lora.dropout} must be in [0, 1)')
  if not c.lora.rank and (c.lora.dropout or c.lora.path):
    found.append('lora.dropout and lora.path need lora.rank > 0')
  return found


def check_attention(c, platform):
  """Kernels against the devices and the samplers' masks."""
  found, kind = [], c.model.attention
  need = {'cudnn': 'gpu', 'splash': 'tpu'}.get(kind, platform)
  if need != platform:
    found.append(f'model.attention = {kind} needs a {need}, this is a '
                 f'{platform}: use xla')
  if kind == 'cudnn' and c.model.dtype != 'bfloat16':
    found.append(f'model.attention = cudnn needs model.dtype = bfloat16, not '
                 f'{c.model.dtype}')
  picks_ = (c.sampler.pick, c.eval.sampler.pick)
  if kind == 'splash' and 'wino' in picks_:
    found.append('sampler.pick = wino needs model.attention = xla: splash '
                 'shows all queries the same keys')
  return found


def check_rows(c, count):
  """Rows against devices and microbatches, the mesh against devices."""
  split = c.mesh.fsdp * c.mesh.tensor
  if count % split or (c.mesh.data and c.mesh.data * split != count):
    return [f'mesh.data, mesh.fsdp, mesh.tensor = {c.mesh.data}, '
            f'{c.mesh.fsdp}, {c.mesh.tensor} must multiply to the {count} '
            'devices (data = 0 takes what is left)']
  shards = count // c.mesh.tensor
  rows = c.train.prompts * c.train.group
  pieces = shards * c.train.microbatches
  found = []
  if rows % pieces:
    found.append(
        f'train.prompts * train.group = {rows} rows must be a multiple of '
        f'{shards} device shards * train.microbatches = {pieces}')
  if c.eval.batch % shards:
    found.append(f'eval.batch = {c.eval.batch} must be a multiple of the '
                 f'{shards} device shards')
  if c.sft.steps and c.sft.batch % shards:
    found.append(f'sft.batch = {c.sft.batch} must be a multiple of the '
                 f'{shards} device shards')
  replicated = split == 1
  for name, section in (('', c.sampler), ('eval.', c.eval.sampler)):
    if section.parallel == 'pmap' and not replicated:
      found.append(f'{name}sampler.parallel = pmap needs replicated weights: '
                   'set mesh.fsdp = mesh.tensor = 1, or use jit')
  if c.model.head_chunk and c.sampler.length % c.model.head_chunk:
    found.append(f'model.head_chunk = {c.model.head_chunk} must divide '
                 f'sampler.length = {c.sampler.length}')
  return found


def check_logprob(c):
  """How log-probs are estimated, against how completions are sampled."""
  found, e = [], c.logprob
  if e.draws % 2 and (e.antithetic or e.elbo == 'stratified'):
    found.append(f'logprob.draws = {e.draws} must be even with '
                 'logprob.antithetic or logprob.elbo = stratified')
  if not 0 <= e.low < e.high <= 1:
    found.append(f'logprob.low = {e.low}, logprob.high = {e.high} must be '
                 '0 <= low < high <= 1')
  if e.fuse and (not c.lora.rank or e.estimator != 'elbo'):
    found.append('logprob.fuse = True needs lora.rank > 0 and '
                 'logprob.estimator = elbo: only adapters share their base')
  if e.estimator == 'trajectory':
    found += check_trajectory(c)
  return found


def check_objective(c):
  """Fields that the objective does not have, and what it needs of the sampler.

  A field that another objective has must be as it is in base: to change it
  would do nothing.
  """
  found, o, s = [], c.objective, c.sampler
  if o.name not in OBJECTIVES:
    return found
  own = [field.name for kind in (OBJECTIVES[o.name].hp, Common)
         for field in dataclasses.fields(kind)]
  for name, usual in objective_fields().items():
    if name not in own and o[name] != usual:
      found.append(f'objective.{name} = {o[name]!r} is no setting of '
                   f'objective.name = {o.name}: leave it {usual!r}')
  if o.elbo_draws < 2 or o.elbo_draws % 2:
    found.append(f'objective.elbo_draws = {o.elbo_draws} must be even: masks '
                 'come with their complements')
  needs = OBJECTIVES[o.name].needs(settings(OBJECTIVES[o.name].hp, o))
  for need, wrong, change in (
      ('record', s.pick == 'wino', 'sampler.pick = wino takes tokens back: use '
       'another, for this needs recorded steps'),
      ('law', not s.temperature, 'sampler.temperature = 0 has no density: this '
       'needs > 0'),
      ('law', s.top_p < 1 or s.top_k, f'sampler.top_p = {s.top_p}, '
       f'sampler.top_k = {s.top_k}: this needs 1 and 0, for a policy that has '
       'changed gives chance to what was cut'),
      ('law', s.guidance, f'sampler.guidance = {s.guidance}: this needs 0, for '
       'the loss is of the network without it'),
      ('left_to_right', s.block != 1, f'sampler.block = {s.block}: this needs '
       '1, tokens from left to right'),
      ('fallback', s.pick != 'threshold', f'sampler.pick = {s.pick}: this '
       'needs threshold, whose fallbacks it trains'),
      ('place', (s.pick, s.rank, s.rank_law) != (
          'plackett_luce', 'max', 'model'), f'sampler.pick = {s.pick}, rank = '
       f'{s.rank}, rank_law = {s.rank_law}: this needs plackett_luce, max, '
       'model, whose choice of positions has a density')):
    if need in needs and wrong:
      found.append(f'{change} (objective.name = {o.name})')
  return found


def objective_fields():
  """{field: its value in base}: that of the first objective that has it."""
  return {field.name: field.default
          for objective in reversed(OBJECTIVES.values())
          for field in dataclasses.fields(objective.hp)}


def check_reference(c):
  """What p_ref is made of, against who asks for it."""
  found, r = [], c.reference
  if len(r.weights) != len(r.of) or not r.of:
    found.append(f'reference.weights = {r.weights} must hold a weight for each '
                 f'of reference.of = {r.of}')
  if not all(0 < w < float('inf') for w in r.weights):
    found.append(f'reference.weights = {r.weights} must be > 0')
  if not 0 < r.mix <= 1:
    found.append(f'reference.mix = {r.mix} must be in (0, 1]; 1 = a copy')
  if 'moving' in r.of and not c.lora.rank and r.mix < 1 and (
      c.model.param_dtype != 'float32'):
    found.append(f'reference.mix = {r.mix} is lost in rounding: it needs '
                 'model.param_dtype = float32, or lora.rank > 0')
  if plain_reference(c):
    return found
  if c.logprob.fuse:
    found.append("logprob.fuse = True knows the base alone: reference.of must "
                 "be ('base',) with weight 1")
  if c.objective.name in OBJECTIVES:
    objective = OBJECTIVES[c.objective.name]
    needs = objective.needs(settings(objective.hp, c.objective))
    if 'ref' not in needs:
      found.append(f'reference.of = {r.of}: this objective asks for no '
                   'log p_ref')
    if needs & {'tokens_ref', 'elbo_ref'}:  # under the masks of the loss
      found.append(f'reference.of = {r.of}: objective.name = '
                   f"{c.objective.name} knows the base alone: ('base',)")
  return found


def plain_reference(c):
  """Whether p_ref is the base and nothing else."""
  return tuple(c.reference.of) == ('base',) and (
      tuple(c.reference.weights) == (1.0,))


def check_trajectory(c):
  """What leaves no density along the recorded states."""
  found, s = [], c.sampler
  if not s.temperature:
    found.append('logprob.estimator = trajectory needs sampler.temperature > '
                 '0: greedy sampling has no density')
  if not c.logprob.tail:
    found.append('logprob.tail = False has no meaning along a trajectory: use '
                 'logprob.estimator = elbo')
  if s.top_p < 1 or s.top_k:
    found.append(f'sampler.top_p = {s.top_p}, sampler.top_k = {s.top_k}: '
                 'logprob.estimator = trajectory needs 1 and 0, for p_ref has '
                 'tokens that are cut here')
  if s.pick == 'wino':
    found.append('sampler.pick = wino takes tokens back, its states are not '
                 'recorded: use logprob.estimator = elbo')
  if settings(sampler.SampleConfig, s).order_from() == 'tokens':
    found.append(f'sampler.rank = token: with sampler.pick = {s.pick} the '
                 'proposals decide what is kept, and logprob.estimator = '
                 'trajectory lacks that term: use sampler.rank = max')
  return found


def flatten(c, prefix=''):
  """{'section.field': value} of a ConfigDict."""
  out = {}
  for name, value in c.items():
    if hasattr(value, 'items'):
      out |= flatten(value, f'{prefix}{name}.')
    else:
      out[prefix + name] = value
  return out


# Fields that change nothing of what a run computes (but for the rounding of
# another mesh, and for when health. ends or rolls back): they may differ when
# it goes on. And those that an evaluation may judge a run with.
FREE = ('log.', 'checkpoint.', 'mesh.', 'reward.workers', 'reward.deadline',
        'cache', 'health.')
JUDGING = (*FREE, 'eval.', 'reward.', 'data.protocol', 'data.test_size',
           'data.path')


def plain(c):
  """{'section.field': value} as JSON gives it back: tuples are lists."""
  return flatten(json.loads(c.to_json()))


def changes(old, new, free):
  """What differs between two of `plain`, but in fields that begin as `free`."""
  return '; '.join(f'{k}: {old.get(k)!r} there, {new.get(k)!r} here'
                   for k in sorted(old.keys() | new.keys())
                   if old.get(k) != new.get(k) and not k.startswith(free))


def refuse(c, free=JUDGING):
  """meta -> why a checkpoint is not of this config, or ''."""
  def why(meta):
    found = changes(meta['config'], plain(c), free) if 'config' in meta else ''
    return found and f'it is of another config ({found})'
  return why


def tokenizer_of(c, folder):
  """The tokenizer: data.tokenizer, else the checkpoint's, else 'char'."""
  ids = {}
  if folder:
    fields = weights.read_config(folder)
    ids = {name: fields[name] for name in ('mask_id', 'eos_id', 'pad_id')}
  elif not c.data.tokenizer and 'vocab' in model.PRESETS[c.model.preset]:
    return None  # a published model's, which is not here: only to plan
  return data.load_tokenizer(c.data.tokenizer or folder or 'char', ids)


def model_config(c, tokenizer, folder=''):
  """The ModelConfig of a config: a checkpoint's, or a preset with overrides."""
  if folder:
    fields = weights.read_config(folder)
  else:
    changed = {name: c.model[name] for name in SIZES if c.model[name]}
    fields = {**model.PRESETS[c.model.preset], **changed}
    if tokenizer is not None:
      fields |= dict(
          vocab=max(len(tokenizer), fields.get('vocab', 0)),
          mask_id=tokenizer.mask_token_id, eos_id=tokenizer.eos_token_id,
          pad_id=tokenizer.pad_token_id)
  cfg = model.ModelConfig(
      **fields, dtype=c.model.dtype, param_dtype=c.model.param_dtype,
      remat=c.model.remat, head_chunk=c.model.head_chunk,
      attention=c.model.attention,
      lora_rank=c.lora.rank, lora_alpha=c.lora.alpha,
      lora_dropout=c.lora.dropout,
      lora_targets=model.LORA_TARGETS.get(c.lora.targets, c.lora.targets))
  check_targets(cfg)
  if not cfg.head_dim and cfg.width % cfg.heads or cfg.heads % cfg.kv_heads:
    raise ValueError(f'model.heads = {cfg.heads} must divide model.width = '
                     f'{cfg.width} and be a multiple of model.kv_heads = '
                     f'{cfg.kv_heads}')
  if tokenizer is not None and len(tokenizer) > cfg.vocab:
    raise ValueError(f'the tokenizer has {len(tokenizer)} tokens, the model '
                     f'{cfg.vocab}: data.tokenizer is not this model\'s')
  return cfg


def check_targets(cfg):
  """Refuses adapters that adapt nothing."""
  try:
    matched = any(re.search(cfg.lora_targets, name) for name in model.LINEARS)
  except re.error as error:
    raise ValueError(f'lora.targets = {cfg.lora_targets!r} is no regular '
                     f'expression: {error}') from None
  if cfg.lora_rank and not matched:
    raise ValueError(f'lora.targets = {cfg.lora_targets!r} matches none of '
                     f'{", ".join(model.LINEARS)}')


def problems(built, split):
  """The problems of a split (data.Problems), loaded and encoded once."""
  if split not in built.encoded:
    d = built.config.data
    examples = built.task.load(split, settings(TaskOptions, d))
    texts, prefill = ask(built, examples, split)
    built.encoded[split] = data.encode_problems(
        examples, texts, built.tokenizer, d.prompt_length, d.attend_padding,
        d.overlong, prefill)
  found = built.encoded[split]
  prompt = found.tokens.shape[1]
  for name, section in (('', built.config.sampler),
                        ('eval.', built.config.eval.sampler)):
    if prompt + section.length > built.model.positions:
      raise ValueError(
          f'the longest prompt ({prompt} tokens) and {name}sampler.length = '
          f"{section.length} exceed the model's {built.model.positions} "
          'positions')
  return found


def ask(built, examples, split):
  """(the user's messages, how the answers begin) of a split's examples.

  A template is a file with {field}s of the examples, in place of a style.
  """
  style, path = built.config.data.style, built.config.data.template
  if split != 'train' and (built.config.eval.style or
                           built.config.eval.template):
    style, path = built.config.eval.style, built.config.eval.template
  if not path:
    return ([built.task.prompt(example, style) for example in examples],
            answers.PREFILL.get(style, ''))
  with open(path, encoding='utf-8') as f:
    template = f.read()
  fields = [name for name in examples[0] if f'{{{name}}}' in template]
  if not fields:
    raise ValueError(
        f'the template {path} has no field of {built.config.data.task}: '
        f'{", ".join(f"{{{name}}}" for name in examples[0])}')
  texts = []
  for example in examples:
    text = template
    for name in fields:
      text = text.replace(f'{{{name}}}', str(example[name]))
    texts.append(text)
  return texts, ''


def build(c, devices=None):
  """Checks the config and compiles nothing yet: jit compiles at first use.

  `devices`: those of a topology that is not here (plan).
  """
  there = devices or jax.devices()
  check(c, len(there), there[0].platform)
  symbolic.configure(c.reward.workers, c.reward.deadline)
  folder = c.model.checkpoint and weights.locate(c.model.checkpoint, False)
  tokenizer = tokenizer_of(c, folder)
  cfg = model_config(c, tokenizer, folder)
  if cfg.block_causal and c.train.iterations:
    raise ValueError(
        f'model.checkpoint = {c.model.checkpoint!r} attends block by block '
        '(SDAR): it can be evaluated (train.iterations = 0), but the losses '
        'here mask completions as a whole, which is not its forward process')
  grid = mesh.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, devices)
  objective = OBJECTIVES[c.objective.name]
  hp = settings(objective.hp, c.objective)
  optimizer = optimizer_of(c)
  sft_optimizer = optim.make_optimizer(
      c.sft.lr, c.sft.warmup, 0.9, 0.99, 1e-8, c.sft.weight_decay, c.sft.clip)
  read_references = make_references(c, cfg, folder, grid)
  steps = Steps(
      *make_starts(c, cfg, grid, optimizer, sft_optimizer),
      make_sample(c, c.sampler, 'sample', cfg, grid, tuple(
          name for name in sampler.RECORDS if name in objective.needs(hp))),
      make_sample(c, c.eval.sampler, 'evaluate', cfg, grid),
      lambda section: make_sample(c, section, 'evaluate', cfg, grid),
      read_references,
      *make_training(c, cfg, grid, objective, hp, sft_optimizer),
      make_quantize(c, grid), compiled(grid, checkpoint.digest))
  return Built(c, grid, cfg, TASKS[c.data.task], tokenizer, objective, hp,
               steps, {})


def compiled(grid, fn, last=(), **options):
  """jit, traced and run under the mesh (model.constrain looks for it).

  last: host scalars that are fn's last arguments. They are no part of the
  program: another seed or rate finds it in the cache of compiled ones.
  `.trace(*args)` is for `plan`: it takes ShapeDtypeStructs and compiles
  nothing yet.
  """
  jitted = jax.jit(fn, **options)

  def under_mesh(fn):
    def call(*args):
      with jax.set_mesh(grid):
        return fn(*args, *last)
    return call

  call = under_mesh(jitted)
  call.trace = under_mesh(jitted.trace)
  return call


def make_quantize(c, grid):
  """params -> params with the layers' kernels quantized, one at a time."""
  kind = c.model.quantize

  def one(path, leaf):
    if not mesh.path_of(path).endswith('/kernel'):
      return leaf
    make = lambda kernel: model.quantize(kernel, kind)
    shapes = {'kernel': jax.eval_shape(make, leaf)}
    out = jax.tree_util.tree_map_with_path(
        lambda part, x: jax.NamedSharding(grid, mesh.spec_of(
            mesh.path_of((*path, *part[1:])), x, grid)), shapes)['kernel']
    done = compiled(grid, make, out_shardings=out, donate_argnums=0)(leaf)
    return jax.block_until_ready(done)

  def quantize(params):
    if kind == 'none':
      return params
    return jax.tree_util.tree_map_with_path(one, params)
  return quantize


def make_starts(c, cfg, grid, optimizer, sft_optimizer):
  """init, init_lora, start, start_sft: sharded from birth, never copied.

  With a checkpoint init reads it, with lora.path init_lora the adapter.
  """
  def fresh(name, stream):
    make = lambda seed: {name: model.init(cfg, rng.key_for(seed, stream))[name]}
    seed = np.uint32(c.seed)
    try:
      out = mesh.shardings(jax.eval_shape(make, seed), grid)
    except KeyError:  # no adapters: lora.rank is 0
      return lambda: {}
    return compiled(grid, make, last=(seed,), out_shardings=out)

  def start(optimizer):
    def call(trainable):
      make = lambda tree: step.init_state(jax.tree.map(jnp.copy, tree),
                                          optimizer)
      out = mesh.shardings(jax.eval_shape(make, trainable), grid)
      return compiled(grid, make, out_shardings=out)(trainable)
    return call

  def read():
    folder = weights.locate(c.model.checkpoint)
    return weights.read_params(folder, cfg, grid)

  def read_adapter():
    folder = c.model.checkpoint and weights.locate(c.model.checkpoint, False)
    return weights.read_adapter(c.lora.path, cfg, folder, grid)

  return (read if c.model.checkpoint else fresh('params', 'init'),
          read_adapter if c.lora.path else fresh('lora', 'lora'),
          start(optimizer), start(sft_optimizer))


def optimizer_of(c, scale=1.0, lr=None):
  """RL's optimizer, with the moving reference if there is one.

  scale and lr (None = optim.lr) may be traced.
  """
  fields = {**c.optim, 'lr': c.optim.lr if lr is None else lr}
  return optim.make_optimizer(**fields, scale=scale,
                              hold='moving' in c.reference.of)


def is_adapter(path):
  return os.path.isfile(os.path.join(path, 'adapter_config.json'))


def make_references(c, cfg, folder, grid):
  """Steps.read_references. ValueError, before anything is read, if one is of
  another vocabulary or shape than the policy."""
  if plain_reference(c):
    return lambda: ()
  kept = tuple(field.name for field in dataclasses.fields(cfg) if field.name
               not in ('dtype', 'param_dtype', 'remat', 'head_chunk',
                       'attention') and 'lora' not in field.name)
  quantized = make_quantize(c, grid)
  plain = dataclasses.replace(cfg, lora_rank=0)

  def reader(path):
    if path == 'base':
      return lambda: {}
    if path == 'moving':
      return lambda: None
    if is_adapter(path):
      if not cfg.lora_rank:
        raise ValueError(f'reference.of: {path} is an adapter: it needs '
                         "lora.rank, alpha and targets to be the adapter's")
      return lambda: weights.read_adapter(path, cfg, folder, grid)
    path = weights.locate(path, False)
    theirs = model.ModelConfig(**{
        **{name: getattr(cfg, name) for name in kept},
        **weights.read_config(path)})
    found = [f'{name} = {getattr(theirs, name)}, but the policy has '
             f'{getattr(cfg, name)}' for name in kept
             if getattr(theirs, name) != getattr(cfg, name)]
    if found:
      raise ValueError(f'reference.of: {path}: ' + '; '.join(found))
    return lambda: quantized(weights.read_params(
        weights.locate(path), plain, grid))

  readers = [reader(path) for path in c.reference.of]
  return lambda: tuple(read() for read in readers)


def make_sample(c, section, stream, cfg, grid, records=()):
  """(params, tokens, valid, row) -> (Rollouts, completion mask)."""
  hp = settings(sampler.SampleConfig, section)

  def sample(params, tokens, valid, row, seed):
    keys_R = rng.row_keys(rng.key_for(seed, stream), row)
    out = sampler.sample(cfg, params, tokens, valid, keys_R, hp, records)
    completion = masking.completion_mask(out.tokens[:, -hp.length:],
                                         cfg.eos_id)
    return out, completion

  seed = np.uint32(c.seed)
  if section.parallel == 'pmap':
    return pmap_rows(lambda *args: sample(*args, seed), grid)
  by_row = mesh.rows(grid)
  # Said, not left to the compiler: each process reads the rows that it holds.
  out = Rollouts(*[by_row] * len(Rollouts._fields))._replace(
      forwards=mesh.replicated(grid))
  run = compiled(grid, sample, last=(seed,), out_shardings=(out, by_row))

  def call(params, tokens, valid, row):
    return run(params, *(mesh.put(x, by_row) for x in (tokens, valid, row)))
  call.trace = run.trace
  return call


def pmap_rows(sample, grid):
  """The replicated small-model path: each device samples its own rows.

  Each process runs its own devices. ValueError if the parameters are not
  replicated.
  """
  devices, by_row = grid.devices.ravel(), mesh.rows(grid)
  mine = [i for i, device in enumerate(devices)
          if device.process_index == jax.process_index()]
  here = jax.sharding.Mesh(devices[mine], 'here')
  run = jax.pmap(sample, in_axes=(None, 0, 0, 0), devices=list(devices[mine]))

  def local(x):
    return jax.make_array_from_single_device_arrays(
        x.shape, mesh.replicated(here),
        [shard.data for shard in x.addressable_shards])

  def join(x):
    parts = [jax.device_put(part, devices[i])
             for part, i in zip(x, mine, strict=True)]
    return jax.make_array_from_single_device_arrays(
        (len(devices) * x.shape[1], *x.shape[2:]), by_row, parts)

  def call(params, tokens, valid, row):
    leaves = jax.tree.leaves(params)
    if not all(leaf.sharding.is_fully_replicated for leaf in leaves):
      raise ValueError('sampler.parallel = pmap needs replicated parameters: '
                       'set mesh.fsdp = mesh.tensor = 1, or use jit')
    spread = lambda x: np.reshape(
        x, (len(devices), -1) + np.shape(x)[1:])[mine]
    out, completion = jax.device_get(run(
        jax.tree.map(local, params), spread(tokens), spread(valid),
        spread(row)))
    forwards = mesh.put(np.int32(max(mesh.gather(int(out.forwards.max())))),
                        mesh.replicated(grid))
    out = jax.tree.map(join, out._replace(forwards=out.tokens))
    return out._replace(forwards=forwards), join(completion)
  return call


def make_training(c, cfg, grid, objective, hp, sft_optimizer):
  """score, pack, update, sft."""
  by_row = mesh.rows(grid)
  how = settings(logprob.LogprobConfig, c.logprob)
  common = dict(cfg=cfg, objective=objective, hp=hp)
  of_all = settings(Common, c.objective)
  law = settings(sampler.SampleConfig, c.sampler).law()
  seed = np.uint32(c.seed)
  drift = c.health.measure or 'elbo_old' in objective.needs(hp)
  moves = c.reference.every, c.reference.mix
  if 'moving' not in c.reference.of:
    moves = None

  def score(trainable, frozen, rollouts, row, completion, references, seed):
    return step.score(
        trainable, frozen, rollouts, row, completion,
        rng.key_for(seed, 'score'), rng.key_for(seed, 'mask'), references,
        **common,
        how=how, law=law, inner=c.train.inner,
        microbatches=c.train.microbatches, measure=c.health.measure,
        weights=tuple(c.reference.weights))

  def pack(rollouts, completion, row, reward, scores):
    return rollout.pack(rollouts, completion, row, reward, scores,
                        objective=objective, hp=hp, inner=c.train.inner,
                        skip_equal=of_all.skip_equal)

  def update(state, frozen, batch, inner, scale, seed, lr):
    return step.train_step(
        state, frozen, batch, rng.key_for(seed, 'mask'), inner, **common,
        optimizer=optimizer_of(c, scale, lr), group=c.train.group,
        microbatches=c.train.microbatches, law=law, common=of_all, drift=drift,
        moves=moves)

  def sft(state, tokens, valid, row, at, seed):
    key = jax.random.fold_in(rng.key_for(seed, 'sft'), at)
    return step.sft_step(state, tokens, valid, row, key, cfg=cfg,
                         length=c.sampler.length, optimizer=sft_optimizer)

  jit_score, jit_pack = compiled(grid, score, (seed,)), compiled(grid, pack)
  jit_update = compiled(grid, update, (seed, np.float32(c.optim.lr)),
                        donate_argnums=0)
  jit_sft = compiled(grid, sft, (seed,), donate_argnums=0)

  def put_score(trainable, frozen, rollouts, row, completion, references=()):
    return jit_score(trainable, frozen, rollouts, mesh.put(row, by_row),
                     completion, references)

  def put_pack(rollouts, completion, row, reward, scores):
    return jit_pack(rollouts, completion, mesh.put(row, by_row), reward,
                    scores)

  def put_update(state, frozen, batch, inner, scale=1.0):
    return jit_update(state, frozen, batch, np.int32(inner),
                      np.float32(scale))

  def put_sft(state, tokens, valid, row, at):
    return jit_sft(state, *(mesh.put(x, by_row) for x in (tokens, valid, row)),
                   np.int32(at))

  put_score.trace, put_update.trace = jit_score.trace, jit_update.trace
  return put_score, put_pack, put_update, put_sft


def abstract(built, shape, dtype=np.float32):
  """A ShapeDtypeStruct: arrays by rows, scalars whole."""
  where = mesh.rows if shape else mesh.replicated
  return jax.ShapeDtypeStruct(shape, dtype, sharding=where(built.mesh))


def abstract_rollouts(built, prompt):
  """Rollouts of ShapeDtypeStructs; P = `prompt` tokens."""
  t, length = built.config.train, built.config.sampler.length
  rows, needs = t.prompts * t.group, built.objective.needs(built.hp)
  whole, each = (rows, prompt + length), (rows, length)
  more = {name: abstract(built, each,
                         bool if name == 'fallback' else np.float32)
          for name in sampler.RECORDS if name in needs}
  return Rollouts(
      abstract(built, whole, np.int32), abstract(built, whole, bool),
      abstract(built, each, np.int32), abstract(built, each),
      abstract(built, (), np.int32), abstract(built, each), more or None)


def abstract_batch(built, prompt):
  """A TrainBatch of ShapeDtypeStructs, for restoring; P = `prompt` tokens."""
  t, length = built.config.train, built.config.sampler.length
  rows, needs = t.prompts * t.group, built.objective.needs(built.hp)
  rollouts = abstract_rollouts(built, prompt)
  completion = abstract(built, (rows, length), bool)
  row = abstract(built, (rows,), np.int32)
  record = sampler.record_of(rollouts, needs)
  law = settings(sampler.SampleConfig, built.config.sampler).law()
  masks = jax.eval_shape(
      lambda rollouts, row, completion, record: step.draw(
          built.objective, built.hp, rng.key_for(0, 'mask'), row,
          rollouts.tokens, rollouts.valid, completion, record,
          cfg=built.model, law=law),
      rollouts, row, completion, record)
  draws = masks.masked.shape[1]
  extra = {'record': record} if record else {}
  for name in ('tokens_old', 'tokens_ref'):
    if name in needs:
      extra[name] = abstract(built, (rows, t.inner, draws, length))
  if {'centred', 'tokens_old'} <= needs:
    extra['centred_old'] = extra['tokens_old']
  if 'elbo_ref' in needs:
    extra['elbo_ref'] = abstract(built, (rows, t.inner))
  weight = (rows, draws) if 'guess' in needs else (rows,)
  return TrainBatch(
      rollouts.tokens, rollouts.valid, completion, row,
      abstract(built, weight), abstract(built, (rows,)),
      abstract(built, (rows, t.inner)), abstract(built, ()),
      abstract(built, ()), extra or None)
