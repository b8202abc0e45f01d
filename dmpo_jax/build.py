"""Compiles the project: every jit and the pmap live here.

Below this file nobody sees a ConfigDict but `check`, which refuses what cannot
work before anything is compiled. `build` returns the parts, `Steps` the
compiled functions with their shardings.
"""

import dataclasses
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmpo_jax import (
  check,
  checkpoint,
  data,
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
from dmpo_jax.types import Rollouts, TaskOptions, TrainBatch

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
  update: Callable  # (state, frozen, batch, inner) -> (state, metrics)
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
    changed = {name: c.model[name] for name in check.SIZES if c.model[name]}
    fields = {**model.PRESETS[c.model.preset], **changed}
    if tokenizer is not None:
      fields |= dict(
        vocab=max(len(tokenizer), fields.get('vocab', 0)),
        mask_id=tokenizer.mask_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
      )
  cfg = model.ModelConfig(
    **fields,
    dtype=c.model.dtype,
    param_dtype=c.model.param_dtype,
    remat=c.model.remat,
    head_chunk=c.model.head_chunk,
    attention=c.model.attention,
    lora_rank=c.lora.rank,
    lora_alpha=c.lora.alpha,
    lora_dropout=c.lora.dropout,
    lora_targets=model.LORA_TARGETS.get(c.lora.targets, c.lora.targets),
  )
  check_targets(cfg)
  if not cfg.head_dim and cfg.width % cfg.heads or cfg.heads % cfg.kv_heads:
    raise ValueError(
      f'model.heads = {cfg.heads} must divide model.width = '
      f'{cfg.width} and be a multiple of model.kv_heads = '
      f'{cfg.kv_heads}'
    )
  if c.model.attention == 'splash' and cfg.kv_heads % c.mesh.tensor:
    raise ValueError(
      f'model.attention = splash splits the K/V heads: '
      f'model.kv_heads = {cfg.kv_heads} must be a multiple of '
      f'mesh.tensor = {c.mesh.tensor}, or use xla'
    )
  if tokenizer is not None and len(tokenizer) > cfg.vocab:
    raise ValueError(
      f'the tokenizer has {len(tokenizer)} tokens, the model '
      f"{cfg.vocab}: data.tokenizer is not this model's"
    )
  return cfg


def check_targets(cfg):
  """Refuses adapters that adapt nothing."""
  try:
    matched = any(re.search(cfg.lora_targets, name) for name in model.LINEARS)
  except re.error as error:
    raise ValueError(
      f'lora.targets = {cfg.lora_targets!r} is no regular expression: {error}'
    ) from None
  if cfg.lora_rank and not matched:
    raise ValueError(
      f'lora.targets = {cfg.lora_targets!r} matches none of {", ".join(model.LINEARS)}'
    )


def problems(built, split):
  """The problems of a split (data.Problems), loaded and encoded once."""
  if split not in built.encoded:
    d = built.config.data
    examples = built.task.load(split, check.settings(TaskOptions, d))
    texts, prefill = ask(built, examples, split)
    built.encoded[split] = data.encode_problems(
      examples,
      texts,
      built.tokenizer,
      d.prompt_length,
      d.attend_padding,
      d.overlong,
      prefill,
    )
  found = built.encoded[split]
  prompt = found.tokens.shape[1]
  for name, section in (
    ('', built.config.sampler),
    ('eval.', built.config.eval.sampler),
  ):
    if prompt + section.length > built.model.positions:
      raise ValueError(
        f'the longest prompt ({prompt} tokens) and {name}sampler.length = '
        f"{section.length} exceed the model's {built.model.positions} "
        'positions'
      )
  length = prompt + built.config.sampler.length
  if built.config.model.attention == 'cudnn' and length % 2:
    raise ValueError(
      f'model.attention = cudnn trains on even lengths, this one is {length}:'
      f' set data.prompt_length = {prompt + 1}'
    )
  return found


def ask(built, examples, split):
  """(the user's messages, how the answers begin) of a split's examples.

  A template is a file with {field}s of the examples, in place of a style.
  """
  style, path = built.config.data.style, built.config.data.template
  if split != 'train' and (built.config.eval.style or built.config.eval.template):
    style, path = built.config.eval.style, built.config.eval.template
  if not path:
    return (
      [built.task.prompt(example, style) for example in examples],
      answers.PREFILL.get(style, ''),
    )
  with open(path, encoding='utf-8') as f:
    template = f.read()
  if not examples:
    return [], ''  # data.encode_problems says what is wrong
  fields = [name for name in examples[0] if f'{{{name}}}' in template]
  if not fields:
    raise ValueError(
      f'the template {path} has no field of {built.config.data.task}: '
      f'{", ".join(f"{{{name}}}" for name in examples[0])}'
    )
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
  check.config(c, len(there), there[0].platform)
  symbolic.configure(c.reward.workers, c.reward.deadline)
  folder = c.model.checkpoint and weights.locate(c.model.checkpoint, False)
  tokenizer = tokenizer_of(c, folder)
  cfg = model_config(c, tokenizer, folder)
  if cfg.block_causal and c.train.iterations:
    raise ValueError(
      f'model.checkpoint = {c.model.checkpoint!r} attends block by block '
      '(SDAR): it can be evaluated (train.iterations = 0), but the losses '
      'here mask completions as a whole, which is not its forward process'
    )
  s = c.eval.sampler
  if cfg.block_causal and (s.block != cfg.block_causal or s.length % cfg.block_causal):
    raise ValueError(
      f'eval.sampler.block = {s.block}, length = {s.length}: this model '
      f'attends in blocks of {cfg.block_causal}, so block must be that, and '
      'length a multiple'
    )
  grid = mesh.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, devices)
  objective = OBJECTIVES[c.objective.name]
  hp = check.settings(objective.hp, c.objective)
  optimizer = optimizer_of(c)
  sft_optimizer = optim.make_optimizer(
    optim.Config(
      c.sft.lr, c.sft.warmup, weight_decay=c.sft.weight_decay, clip=c.sft.clip
    )
  )
  read_references = make_references(c, cfg, folder, grid)
  steps = Steps(
    *make_starts(c, cfg, grid, optimizer, sft_optimizer),
    make_sample(
      c,
      c.sampler,
      'sample',
      cfg,
      grid,
      tuple(name for name in sampler.RECORDS if name in objective.needs(hp)),
    ),
    make_sample(c, c.eval.sampler, 'evaluate', cfg, grid),
    lambda section: make_sample(c, section, 'evaluate', cfg, grid),
    read_references,
    *make_training(c, cfg, grid, objective, hp, sft_optimizer),
    make_quantize(c, grid),
    compiled(grid, checkpoint.digest),
  )
  return Built(c, grid, cfg, TASKS[c.data.task], tokenizer, objective, hp, steps, {})


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
      lambda part, x: jax.NamedSharding(
        grid, mesh.spec_of(mesh.path_of((*path, *part[1:])), x, grid)
      ),
      shapes,
    )['kernel']
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
      make = lambda tree: step.init_state(jax.tree.map(jnp.copy, tree), optimizer)
      out = mesh.shardings(jax.eval_shape(make, trainable), grid)
      return compiled(grid, make, out_shardings=out)(trainable)

    return call

  def read():
    folder = weights.locate(c.model.checkpoint)
    return weights.read_params(folder, cfg, grid)

  def read_adapter():
    folder = c.model.checkpoint and weights.locate(c.model.checkpoint, False)
    return weights.read_adapter(c.lora.path, cfg, folder, grid)

  return (
    read if c.model.checkpoint else fresh('params', 'init'),
    read_adapter if c.lora.path else fresh('lora', 'lora'),
    start(optimizer),
    start(sft_optimizer),
  )


def optimizer_of(c, lr=None):
  """RL's optimizer, with the moving reference if there is one.

  lr (None = optim.lr) may be traced.
  """
  return optim.make_optimizer(c.optim, lr, hold='moving' in c.reference.of)


def is_adapter(path):
  """Whether a path is the directory of a PEFT adapter."""
  return os.path.isfile(os.path.join(path, 'adapter_config.json'))


def make_references(c, cfg, folder, grid):
  """Steps.read_references. ValueError, before anything is read, if one is of
  another vocabulary or shape than the policy."""
  if check.plain_reference(c):
    return lambda: ()
  kept = tuple(
    field.name
    for field in dataclasses.fields(cfg)
    if field.name not in ('dtype', 'param_dtype', 'remat', 'head_chunk', 'attention')
    and 'lora' not in field.name
  )
  quantized = make_quantize(c, grid)
  plain = dataclasses.replace(cfg, lora_rank=0)

  def reader(path):
    if path == 'base':
      return lambda: {}
    if path == 'moving':
      return lambda: None
    if is_adapter(path):
      if not cfg.lora_rank:
        raise ValueError(
          f'reference.of: {path} is an adapter: it needs '
          "lora.rank, alpha and targets to be the adapter's"
        )
      return lambda: weights.read_adapter(path, cfg, folder, grid)
    path = weights.locate(path, False)
    theirs = model.ModelConfig(
      **{**{name: getattr(cfg, name) for name in kept}, **weights.read_config(path)}
    )
    found = [
      f'{name} = {getattr(theirs, name)}, but the policy has {getattr(cfg, name)}'
      for name in kept
      if getattr(theirs, name) != getattr(cfg, name)
    ]
    if found:
      raise ValueError(f'reference.of: {path}: ' + '; '.join(found))
    return lambda: quantized(weights.read_params(weights.locate(path), plain, grid))

  readers = [reader(path) for path in c.reference.of]
  return lambda: tuple(read() for read in readers)


def make_sample(c, section, stream, cfg, grid, records=()):
  """(params, tokens, valid, row) -> (Rollouts, completion mask)."""
  hp = check.settings(sampler.SampleConfig, section)

  def sample(params, tokens, valid, row, seed):
    keys_R = rng.row_keys(rng.key_for(seed, stream), row)
    out = sampler.sample(cfg, params, tokens, valid, keys_R, hp, records)
    completion = masking.completion_mask(out.tokens[:, -hp.length :], cfg.eos_id)
    return out, completion

  seed = np.uint32(c.seed)
  if section.parallel == 'pmap':
    return pmap_rows(lambda *args: sample(*args, seed), grid)
  by_row = mesh.rows(grid)
  # Said, not left to the compiler: each process reads the rows that it holds.
  out = Rollouts(*[by_row] * len(Rollouts._fields))._replace(
    forwards=mesh.replicated(grid)
  )
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
  mine = [
    i for i, device in enumerate(devices) if device.process_index == jax.process_index()
  ]
  here = jax.sharding.Mesh(devices[mine], 'here')
  run = jax.pmap(sample, in_axes=(None, 0, 0, 0), devices=list(devices[mine]))

  def local(x):
    return jax.make_array_from_single_device_arrays(
      x.shape, mesh.replicated(here), [shard.data for shard in x.addressable_shards]
    )

  def join(x):
    parts = [jax.device_put(part, devices[i]) for part, i in zip(x, mine, strict=True)]
    return jax.make_array_from_single_device_arrays(
      (len(devices) * x.shape[1], *x.shape[2:]), by_row, parts
    )

  def call(params, tokens, valid, row):
    leaves = jax.tree.leaves(params)
    if not all(leaf.sharding.is_fully_replicated for leaf in leaves):
      raise ValueError(
        'sampler.parallel = pmap needs replicated parameters: '
        'set mesh.fsdp = mesh.tensor = 1, or use jit'
      )
    spread = lambda x: np.reshape(x, (len(devices), -1) + np.shape(x)[1:])[mine]
    out, completion = jax.device_get(
      run(jax.tree.map(local, params), spread(tokens), spread(valid), spread(row))
    )
    forwards = mesh.put(
      np.int32(max(mesh.gather(int(out.forwards.max())))), mesh.replicated(grid)
    )
    out = jax.tree.map(join, out._replace(forwards=out.tokens))
    return out._replace(forwards=forwards), join(completion)

  return call


def make_training(c, cfg, grid, objective, hp, sft_optimizer):
  """score, pack, update, sft."""
  by_row = mesh.rows(grid)
  how = check.settings(logprob.LogprobConfig, c.logprob)
  common = dict(cfg=cfg, objective=objective, hp=hp)
  of_all = check.settings(Common, c.objective)
  law = check.settings(sampler.SampleConfig, c.sampler).law()
  seed = np.uint32(c.seed)
  drift = c.health.measure or 'elbo_old' in objective.needs(hp)
  moves = c.reference.every, c.reference.mix
  if 'moving' not in c.reference.of:
    moves = None

  def score(trainable, frozen, rollouts, row, completion, references, seed):
    return step.score(
      trainable,
      frozen,
      rollouts,
      row,
      completion,
      rng.key_for(seed, 'score'),
      rng.key_for(seed, 'mask'),
      references,
      **common,
      how=how,
      law=law,
      inner=c.train.inner,
      microbatches=c.train.microbatches,
      measure=c.health.measure,
      weights=tuple(c.reference.weights),
    )

  def pack(rollouts, completion, row, reward, scores):
    return rollout.pack(
      rollouts,
      completion,
      row,
      reward,
      scores,
      objective=objective,
      hp=hp,
      inner=c.train.inner,
      skip_equal=of_all.skip_equal,
    )

  def update(state, frozen, batch, inner, seed, lr):
    return step.train_step(
      state,
      frozen,
      batch,
      rng.key_for(seed, 'mask'),
      inner,
      **common,
      optimizer=optimizer_of(c, lr),
      group=c.train.group,
      microbatches=c.train.microbatches,
      law=law,
      common=of_all,
      drift=drift,
      moves=moves,
    )

  def sft(state, tokens, valid, row, at, seed):
    key = jax.random.fold_in(rng.key_for(seed, 'sft'), at)
    return step.sft_step(
      state,
      tokens,
      valid,
      row,
      key,
      cfg=cfg,
      length=c.sampler.length,
      optimizer=sft_optimizer,
    )

  jit_score, jit_pack = compiled(grid, score, (seed,)), compiled(grid, pack)
  jit_update = compiled(grid, update, (seed, np.float32(c.optim.lr)), donate_argnums=0)
  jit_sft = compiled(grid, sft, (seed,), donate_argnums=0)

  def put_score(trainable, frozen, rollouts, row, completion, references=()):
    return jit_score(
      trainable, frozen, rollouts, mesh.put(row, by_row), completion, references
    )

  def put_pack(rollouts, completion, row, reward, scores):
    return jit_pack(rollouts, completion, mesh.put(row, by_row), reward, scores)

  def put_update(state, frozen, batch, inner):
    return jit_update(state, frozen, batch, np.int32(inner))

  def put_sft(state, tokens, valid, row, at):
    return jit_sft(
      state, *(mesh.put(x, by_row) for x in (tokens, valid, row)), np.int32(at)
    )

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
  more = {
    name: abstract(built, each, bool if name == 'fallback' else np.float32)
    for name in sampler.RECORDS
    if name in needs
  }
  return Rollouts(
    abstract(built, whole, np.int32),
    abstract(built, whole, bool),
    abstract(built, each, np.int32),
    abstract(built, each),
    abstract(built, (), np.int32),
    abstract(built, each),
    more or None,
  )


def abstract_batch(built, prompt):
  """A TrainBatch of ShapeDtypeStructs, for restoring; P = `prompt` tokens."""
  t, length = built.config.train, built.config.sampler.length
  rows, needs = t.prompts * t.group, built.objective.needs(built.hp)
  rollouts = abstract_rollouts(built, prompt)
  completion = abstract(built, (rows, length), bool)
  row = abstract(built, (rows,), np.int32)
  record = sampler.record_of(rollouts, needs)
  law = check.settings(sampler.SampleConfig, built.config.sampler).law()
  masks = jax.eval_shape(
    lambda rollouts, row, completion, record: step.draw(
      built.objective,
      built.hp,
      rng.key_for(0, 'mask'),
      row,
      rollouts.tokens,
      rollouts.valid,
      completion,
      record,
      cfg=built.model,
      law=law,
    ),
    rollouts,
    row,
    completion,
    record,
  )
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
    rollouts.tokens,
    rollouts.valid,
    completion,
    row,
    abstract(built, weight),
    abstract(built, (rows,)),
    abstract(built, (rows, t.inner)),
    abstract(built, ()),
    abstract(built, ()),
    extra or None,
  )
