"""Every compiled function, with its shardings: all jits and the pmap live here.

`build` makes a run's parts (parts.py) and returns them with `Steps`, the compiled
functions. Shapes for restoring and planning come from tracing the same functions.
"""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmpo_jax import (
  anneal,
  check,
  checkpoint,
  curriculum,
  drafting,
  grader,
  hf,
  likelihood,
  masking,
  mesh,
  metrics,
  model,
  optim,
  parts,
  rng,
  sampler,
  step,
)
from dmpo_jax import score as scoring
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.parts import is_adapter, optimizer_of, problems
from dmpo_jax.rollout import Collector
from dmpo_jax.types import GIVEN, Lesson, Params, Rollouts, Sampled, Task, TrainBatch

__all__ = ['build', 'is_adapter', 'optimizer_of', 'problems']

# --- compile times

_compiled = [0, 0.0]  # programs so far in this process, and their seconds


def _note_compilation(event: str, seconds: float, **_) -> None:
  # JAX reports programs found in the persistent cache, too, with few seconds.
  if event == '/jax/core/compile/backend_compile_duration':
    _compiled[:] = _compiled[0] + 1, _compiled[1] + seconds


_listener: Any = _note_compilation
jax.monitoring.register_event_duration_secs_listener(_listener)


def compilations() -> dict[str, float]:
  """Returns the programs compiled since the last call, and their seconds."""
  count, seconds = _compiled
  _compiled[:] = 0, 0.0
  return {'compilations': count, 'seconds/compile': seconds}


# --- a compiled function


class Compiled:
  """A jitted function, traced and run under the mesh (model.constrain looks for it).

  last: host scalars that are fn's last arguments. They are no constants of the program,
  so another seed or rate finds it in the cache of compiled programs. by_row: positions
  of host arrays that are split over the devices by rows. LONG names the functions that
  take long to compile.
  """

  LONG = ('sample', 'score', 'update', 'sft')

  def __init__(
    self, grid: Any, fn: Callable, last: tuple = (), by_row: tuple = (), **options: Any
  ):
    self.grid, self.last, self.by_row = grid, last, by_row
    self.jitted, self.seen = jax.jit(fn, **options), set()
    self.name = getattr(fn, '__name__', '')  # a partial has none

  def __call__(self, *args: Any) -> Any:
    rows, placed = mesh.rows(self.grid), []
    for i, x in enumerate(args):
      if i in self.by_row:
        x = jax.tree.map(lambda leaf: mesh.put(leaf, rows), x)
      placed.append(np.int32(x) if isinstance(x, int) else x)
    with jax.set_mesh(self.grid), self.naming(placed):
      return self.jitted(*placed, *self.last)

  def naming(self, args: Any) -> Any:
    """Names the compilation, at the first call with arguments of these shapes."""
    if self.name not in self.LONG:
      return contextlib.nullcontext()
    shapes = tuple(map(np.shape, jax.tree.leaves(args)))
    if shapes in self.seen:
      return contextlib.nullcontext()
    self.seen.add(shapes)
    return metrics.waiting(f'compiling {self.name}')

  def trace(self, *args: Any) -> Any:
    """Traces with ShapeDtypeStructs; compiles nothing."""
    with jax.set_mesh(self.grid):
      return self.jitted.trace(*args, *self.last)

  def shapes(self, *args: Any) -> Any:
    """Returns the results as ShapeDtypeStructs, split by rows; scalars are whole."""

    def shape(x):
      where = (mesh.rows if x.shape else mesh.replicated)(self.grid)
      weak = x.weak_type  # with others it is another program
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where, weak_type=weak)

    return jax.tree.map(shape, self.trace(*args).out_info)


class Staged:
  """An update that is another program at each stage of its training.

  make: stage -> Compiled. stage_of: the update's number, which is argument `where`, ->
  stage. A program is made when its stage begins.
  """

  def __init__(self, make: Callable, stage_of: Callable[[int], Any], where: int):
    self.make, self.stage_of, self.where = functools.cache(make), stage_of, where

  def __call__(self, *args: Any) -> Any:
    return self.make(self.stage_of(int(args[self.where])))(*args)


class Steps(NamedTuple):
  """The compiled functions; arguments are host or device arrays."""

  init: Callable  # () -> {'params': ...}
  init_lora: Callable  # () -> {'lora': ...}, or {} without adapters
  init_control: Callable  # () -> {'control': ...}, or {} without a controller
  start: Callable  # trainable -> TrainState
  init_sft: Callable  # () -> {'lora': ...} of supervised training, or {}
  start_sft: Callable  # what supervised training changes -> TrainState
  merge: Callable  # (params, adapters of supervised training) -> params
  sample: Callable  # (params, tokens, valid, row) -> Sampled
  sample_eval: Callable  # the same with the evaluation's sampler
  sampler_of: Callable  # config section -> the same with that sampler
  texts_of: Callable  # likelihood.Program -> compiled log-likelihoods of given texts
  read_references: Callable  # () -> what p_ref is made of: parts.references
  read_draft: Callable  # () -> weights of the draft that are read from files; {} = none
  select: Callable  # (Sampled, Sampled, (R,) of their 2R rows) -> Sampled
  score: Callable  # (trainable, frozen, references, Sampled) -> Scores
  # (Sampled, reward_BxG, Scores, factors of groups (B,)) -> (TrainBatch, metrics)
  pack: Callable
  update: Callable  # (state, frozen, TrainBatch, inner) -> (state, metrics)
  sft: Callable  # (state, frozen, Lesson, step, factor of the rate) -> (state, metrics)
  held_out: Callable  # (trainable, frozen, Lesson) -> (negative ELBO, tokens)
  start_pairs: Callable  # what trains on pairs -> TrainState
  # Of training on pairs: (prompts, valid, answers, row) -> Sampled, and then as above.
  place_pairs: Callable
  score_pairs: Callable
  pack_pairs: Callable
  update_pairs: Callable
  # (trainable, frozen, references, Sampled) -> ELBOs of the policy and of p_ref, (R,)
  measure_pairs: Callable
  quantize: Callable  # params -> params, kernels stored as model.quantize says
  digest: Callable  # tree -> uint32 of all its bits


class Built(NamedTuple):
  """All parts of a run."""

  config: Any  # the ConfigDict they came from
  mesh: Any
  model: model.ModelConfig
  task: Task
  tokenizer: Any  # None: only to plan
  setup: step.Setup
  steps: Steps
  encoded: dict  # split -> data.Problems, filled by `problems`
  read: dict[str, int]  # field -> digest of the weights that were read from there
  who: Any = None  # Drafting; None: nobody drafts


def build(c: Any, devices: Any = None) -> Built:
  """Checks the config and makes the parts; programs compile at first use.

  devices: those of a topology that is not here (plan). ValueError lists everything
  that is impossible.
  """
  there = devices or jax.devices()
  check.config(c, len(there), there[0].platform)
  grader.configure(c.reward)
  folder = c.model.checkpoint and hf.locate(c.model.checkpoint, False)
  tokenizer = parts.tokenizer_of(c, folder)
  cfg = parts.model_config(c, tokenizer, folder)
  parts.check_model(c, cfg)
  if c.lora.path:
    hf.check_adapter(c.lora.path, cfg, folder, c.model.checkpoint)
  grid = mesh.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, devices, c.mesh.expert)
  setup = parts.setup_of(c, cfg, OBJECTIVES[c.objective.name])
  quantize = make_quantize(c, grid)
  init, init_lora, start = make_starts(c, cfg, folder, grid)
  init_sft, start_sft, merge = make_sft_starts(c, cfg, grid)
  read_references = parts.references(c, cfg, folder, grid, quantize)
  digest, read = Compiled(grid, checkpoint.digest), parts.file_digests(c)

  def noted(field: str, call: Callable) -> Callable:
    """Returns `call`, which reads weights from a field, and notes their digest."""

    def reading():
      tree = call()
      read[field] = int(digest(tree))
      if field == 'model.checkpoint':
        for path in filter(None, (c.lora.path, *c.reference.of)):
          if is_adapter(path):
            hf.warn_of_base(path, f'{cfg.param_dtype} {read[field]}')
      return tree

    return reading if field else call

  who = drafting_of(c, cfg, tokenizer, (grid, quantize), noted)
  steps = Steps(
    noted('model.checkpoint' * bool(c.model.checkpoint), init),
    noted('lora.path' * bool(c.lora.path), init_lora),
    make_control(setup, grid),
    start,
    init_sft,
    start_sft,
    merge,
    make_sample(c, c.sampler, Use('sample', setup.records), (cfg, grid), who),
    make_sample(c, c.eval.sampler, Use('evaluate'), (cfg, grid), who),
    lambda section: make_sample(c, section, Use('evaluate'), (cfg, grid), who),
    lambda program: make_texts(c, program, cfg, grid),
    noted('reference.of' * (not check.only_base(c)), read_references),
    who.read if who else dict,
    make_select(grid),
    *make_training(c, grid, setup, RL),
    *make_sft(c, cfg, grid),
    *make_pairs(c, grid, setup),
    quantize,
    digest,
  )
  return Built(c, grid, cfg, grader.task_of(c), tokenizer, setup, steps, {}, read, who)


def collector(built: Built, frozen: Params) -> Collector:
  """Returns what makes the training buffers of a run."""
  c, known = built.config, problems(built, 'train')
  hp = check.settings(curriculum.Config, c.curriculum)
  sizes = len(known.examples), c.train.prompts, c.train.group
  chooser = None
  if hp.signal != 'none':
    strength = built.setup.objective.strength(built.setup.hp)
    signal = curriculum.signal_of(hp.signal, strength)
    chooser = curriculum.Curriculum(hp, signal, sizes, c.seed)
  return Collector(
    built.steps,
    built.task,
    built.tokenizer,
    known,
    frozen,
    chooser,
    prompts=c.train.prompts,
    group=c.train.group,
    seed=c.seed,
    bucket=c.data.bucket,
    protocol=c.data.protocol,
    weights=dict(c.reward.weights),
    stops=model.stops(built.model),
    samples=c.log.samples,
    resample=hp.resample,
    saves=c.log.rollouts,
  )


# --- parameters and states


def make_quantize(c: Any, grid: Any) -> Callable[[Params], Params]:
  """Returns params -> params with the layers' kernels quantized, one at a time."""
  kind = c.model.quantize

  def of_leaf(leaf, out):
    if isinstance(out, jax.NamedSharding):  # it is no kernel
      return leaf
    make = lambda kernel: model.quantize(kernel, kind)
    done = Compiled(grid, make, out_shardings=out, donate_argnums=0)(leaf)
    return jax.block_until_ready(done)

  def quantize(params):
    if kind == 'none':
      return params
    out = mesh.shardings(quantized_shapes(params, kind), grid)
    return jax.tree.map(of_leaf, params, out)

  return quantize


def fresh(
  c: Any, cfg: model.ModelConfig, grid: Any, name: str, stream: str
) -> Callable:
  """Returns () -> {name: ...}, drawn and sharded from birth; {} without adapters."""
  make = lambda seed: {name: model.init(cfg, rng.key_for(seed, stream))[name]}
  seed = np.uint32(c.seed)
  try:
    out = mesh.shardings(jax.eval_shape(make, seed), grid)
  except KeyError:  # no adapters: the rank is 0
    return lambda: {}
  return Compiled(grid, make, last=(seed,), out_shardings=out)


def starter(optimizer: Any, grid: Any) -> Callable:
  """Returns what trains -> its TrainState, sharded from birth, never a shared array."""

  def call(trainable):
    make = lambda tree: step.init_state(jax.tree.map(jnp.copy, tree), optimizer)
    out = mesh.shardings(jax.eval_shape(make, trainable), grid)
    return Compiled(grid, make, out_shardings=out)(trainable)

  return call


def make_starts(
  c: Any, cfg: model.ModelConfig, folder: str, grid: Any
) -> tuple[Callable, Callable, Callable]:
  """Returns init, init_lora, start.

  With a checkpoint init reads it, with lora.path init_lora reads the adapter.
  """

  def read():
    return hf.read_params(hf.locate(c.model.checkpoint), cfg, grid)

  def read_adapter():
    return hf.read_adapter(c.lora.path, cfg, folder, grid)

  return (
    read if c.model.checkpoint else fresh(c, cfg, grid, 'params', 'init'),
    read_adapter if c.lora.path else fresh(c, cfg, grid, 'lora', 'lora'),
    starter(optimizer_of(c), grid),
  )


def make_control(setup: step.Setup, grid: Any) -> Callable:
  """Returns () -> {'control': ...} at its start, on all devices; {} without one."""
  law = setup.control
  if not law:
    return lambda: {}
  make = lambda: {optim.CONTROL: law.init(setup.cfg.width)}
  return Compiled(grid, make, out_shardings=mesh.shardings(jax.eval_shape(make), grid))


def make_sft_starts(
  c: Any, cfg: model.ModelConfig, grid: Any
) -> tuple[Callable, Callable, Callable]:
  """Returns init_sft, start_sft, merge."""
  own = parts.sft_config(c, cfg)
  init_sft = fresh(c, own, grid, 'lora', 'adapt')

  def merge(params, lora):
    """Adds each adapter to its kernel, in its place, one at a time."""
    merged, add = dict(params['params']), functools.partial(model.merge, own)
    for run, added in lora['lora'].items():  # layers, or layers_0, layers_1, ...
      merged[run] = dict(merged[run])
      for name, ab in added.items():
        kernel = merged[run][name]['kernel']
        made = Compiled(grid, add, out_shardings=kernel.sharding, donate_argnums=0)
        kernel = made(kernel, ab['a'], ab['b'])
        merged[run][name] = {**merged[run][name], 'kernel': kernel}
    return {**params, 'params': merged}

  return init_sft, starter(parts.sft_optimizer_of(c), grid), merge


# --- sampling


class Use(NamedTuple):
  """What a sampler is for."""

  stream: str  # of its random numbers: sample (training) | evaluate
  records: tuple[str, ...] = ()  # that the objective wants


def make_sample(
  c: Any, section: Any, use: Use, where: tuple, who: Any = None
) -> Callable:
  """Returns (params, tokens, valid, row) -> Sampled, on the device.

  The sampler of training, whose stream is 'sample', also notes each token's entropy.
  where: (ModelConfig, mesh). who: a Drafting; None: nobody drafts.
  """
  hp, (cfg, grid) = check.settings(sampler.SampleConfig, section), where
  whole, measure = gather_of(c, grid), use.stream == 'sample'
  asked = tuple(dict.fromkeys((*use.records, *['entropy'] * measure)))
  seed, options = np.uint32(c.seed), {'out_shardings': sampled_shardings(grid)}
  law = parts.controller_of(c)
  if law and not (measure or law.moves(section, c.eval.sampler)):
    law = None

  def noted(out, row):
    own = out.order != GIVEN
    stop = model.is_stop(cfg, out.tokens[:, -hp.length :]) & own
    more, entropy = out.more or {}, None
    if measure:
      entropy = more['entropy']
      names = (*use.records, 'order_logp', 'drafted')
      more = {name: x for name, x in more.items() if name in names}
    out = out._replace(more=more or None)
    return Sampled(out, masking.completion_mask(stop) & own, row, entropy)

  def sample(params, tokens, valid, row, seed):
    params = whole(params)
    keys_R = rng.row_keys(rng.key_for(seed, use.stream), row)
    control = bound = None
    if law and optim.CONTROL in params:  # the base has none
      drawn = rng.row_keys(rng.key_for(seed, 'control'), row) if measure else None
      control = law.rows(cfg, params, (tokens, valid), hp, drawn)
      bound = control.bound
    out = sampler.sample(cfg, params, tokens, valid, keys_R, hp, asked, bound)
    return noted(out._replace(control=control), row)

  if who is not None and parts.drafts_with(c, measure):
    if wrong := who.drafter.how.misfits(hp, cfg):
      raise ValueError('; '.join(wrong))
    program = drafting.Program(who.drafter, cfg, hp, use.stream, asked, grid)
    return Drafted(who, program, (whole, noted), seed, options)
  if section.parallel == 'pmap':
    return pmap_rows(functools.partial(sample, seed=seed), grid)
  return Compiled(grid, sample, last=(seed,), by_row=(1, 2, 3), **options)


# --- drafts


class Drafting(NamedTuple):
  """Who drafts, and where the weights come from."""

  drafter: sampler.Drafter
  read: Callable[[], Params]  # weights from files; {} where they are the policy's
  shapes: Callable[[], Params]  # the same as shapes
  gate: drafting.Gate | None  # of texts; None: the gate is a function of arrays

  def both(self, params: Any) -> tuple[Params, Params]:
    """Returns (the policy's weights, the draft's) of (policy, what `read` returns)."""
    policy, theirs = params
    if not theirs:
      base = self.drafter.how.of == 'base'
      theirs = {'params': policy['params']} if base else policy
    return policy, theirs


def drafting_of(
  c: Any, cfg: model.ModelConfig, tokenizer: Any, how: tuple, noted: Callable
) -> Drafting | None:
  """Returns who drafts; None: nobody. ValueError if that is impossible.

  how: (mesh, what quantizes). noted: (field, reader) -> the same, noting a digest.
  """
  grid, quantize = how
  if not c.draft.of:
    return None
  drafter, gate = parts.drafter_of(c, cfg, tokenizer), None
  if c.draft.gate == 'reward' and tokenizer is not None:
    task, stops = grader.task_of(c), model.stops(cfg)
    gate = drafting.gate_of(drafter.how, task, tokenizer, stops, c.reward)
  if not parts.own_draft(c):
    return Drafting(drafter, dict, dict, gate)

  def shapes():
    make = lambda: model.init(drafter.cfg, jax.random.key(0))
    tree = {'params': jax.eval_shape(make)['params']}
    return sharded(quantized_shapes(tree, c.model.quantize), grid)

  read = lambda: quantize(hf.read_params(hf.locate(c.draft.of), drafter.cfg, grid))
  return Drafting(drafter, functools.cache(noted('draft.of', read)), shapes, gate)


class Drafted(Compiled):
  """A sampler with drafts: (params, tokens, valid, row) -> Sampled.

  A gate on the host has a program for each of its steps, and this one for its shapes.
  """

  def __init__(
    self, who: Drafting, program: Any, around: tuple, seed: Any, options: dict
  ):
    self.who, self.program, self.gate = who, program, who.gate
    whole, noted = around
    weights = lambda params: who.both(whole(params))

    def sample(params, tokens, valid, row, seed):
      return noted(program.whole(weights(params), tokens, valid, row, seed), row)

    super().__init__(program.grid, sample, last=(seed,), by_row=(1, 2, 3), **options)

    def step(fn, by_row=(), **options):
      call = lambda params, *args: fn(weights(params), *args)
      return Compiled(program.grid, call, by_row=by_row, **options)

    self.begin = step(program.begin, (1, 2, 3))
    by_span = lambda fn, rows: functools.cache(
      lambda span: step(functools.partial(fn, span), rows)
    )
    self.propose = by_span(program.propose, ())
    self.settle = by_span(program.settle, (4,))
    end = lambda params, carry, seed: noted(program.end(params, carry, seed), carry.row)
    self.end = step(end, **options)

  def judged(self, gate: drafting.Gate) -> 'Drafted':
    """Returns the same programs with a gate that knows the rows' problems."""
    other = copy.copy(self)
    other.gate = gate
    return other

  def __call__(self, params: Any, *rows: Any) -> Any:
    params = (params, self.who.read())
    if self.gate is None:
      return super().__call__(params, *rows)
    hp, (seed,) = self.program.hp, self.last
    carry = self.begin(params, *rows, seed)
    prompt = carry.valid.shape[1] - hp.length
    for starts, span in sampler.unmask.groups_of(hp, prompt):
      for start in map(np.int32, starts):
        carry, before = self.propose(span)(params, carry, start, seed)
        keep = self.gate.keep(rows, carry, int(start) - prompt + hp.block)
        carry = self.settle(span)(params, carry, start, before, keep, seed)
    return self.end(params, carry, seed)

  def trace(self, params: Any, *rows: Any) -> Any:
    return super().trace((params, self.who.shapes()), *rows)


def sampled_shardings(grid: Any, given: bool = False) -> Sampled:
  """Returns how a Sampled is split; given: its texts were not sampled here.

  It is not left to the compiler: each process reads its own rows.
  """
  by_row = mesh.rows(grid)
  rollouts = Rollouts._make([by_row] * len(Rollouts._fields))
  rollouts = rollouts._replace(forwards=mesh.replicated(grid))
  return Sampled(rollouts, by_row, by_row, None if given else by_row)


def make_select(grid: Any) -> Compiled:
  """Returns (Sampled, Sampled, rows) -> Sampled of some of their rows."""

  def select(one, two, at_R):
    forwards = one.rollouts.forwards + two.rollouts.forwards
    rows = [x._replace(rollouts=x.rollouts._replace(forwards=None)) for x in (one, two)]
    out = jax.tree.map(lambda x, y: jnp.concatenate([x, y])[at_R], *rows)
    return out._replace(rollouts=out.rollouts._replace(forwards=forwards))

  return Compiled(grid, select, out_shardings=sampled_shardings(grid))


def make_texts(
  c: Any, program: likelihood.Program, cfg: model.ModelConfig, grid: Any
) -> Compiled:
  """Returns (params, prompts, valid, answers, row) -> (log-probs, greedy).

  The prompts are left-padded, the answers right-padded with -1 to the canvas.
  """
  whole = gather_of(c, grid)

  def texts(params, prompts, valid, answers, row, seed):
    key = rng.key_for(seed, 'evaluate')
    text = likelihood.place(cfg, prompts, valid, answers)
    return likelihood.text_logp(cfg, whole(params), text, (key, row), program)

  by_row, seed = mesh.rows(grid), np.uint32(c.seed)
  rows, out = (1, 2, 3, 4), (by_row, by_row)
  return Compiled(grid, texts, last=(seed,), by_row=rows, out_shardings=out)


def gather_of(c: Any, grid: Any) -> Callable:
  """Returns what makes parameters whole before the loops of a pass without gradient."""
  if c.mesh.gather == 'rollout' and c.mesh.fsdp > 1:
    return functools.partial(mesh.gathered, mesh=grid)
  return lambda tree: tree


def pmap_rows(sample: Callable, grid: Any) -> Callable:
  """Returns `sample` where each device samples its own rows with replicated weights.

  Each process runs its own devices. ValueError if the parameters are not replicated.
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
    pieces = [
      jax.device_put(piece, devices[i]) for piece, i in zip(x, mine, strict=True)
    ]
    return jax.make_array_from_single_device_arrays(
      (len(devices) * x.shape[1], *x.shape[2:]), by_row, pieces
    )

  def call(params, tokens, valid, row):
    if not all(x.sharding.is_fully_replicated for x in jax.tree.leaves(params)):
      raise ValueError(
        'sampler.parallel = pmap needs replicated parameters: '
        'set mesh.fsdp = mesh.tensor = mesh.expert = 1, or use jit'
      )
    spread = lambda x: np.reshape(x, (len(devices), -1) + np.shape(x)[1:])[mine]
    rows = (spread(tokens), spread(valid), spread(row))
    out = jax.device_get(run(jax.tree.map(local, params), *rows))
    forwards = max(mesh.gather(int(out.rollouts.forwards.max())))
    rollouts = out.rollouts._replace(forwards=None)  # it has no row axis
    out = jax.tree.map(join, out._replace(rollouts=rollouts))
    whole = mesh.put(np.int32(forwards), mesh.replicated(grid))
    return out._replace(rollouts=out.rollouts._replace(forwards=whole))

  return call


# --- training


class Learning(NamedTuple):
  """What differs between RL and training on pairs."""

  stream: str  # random numbers of the loss's masks
  section: Callable  # config -> the section with its learning rate
  optimizer: Callable  # (config, rate) -> the optimizer


RL = Learning('mask', lambda c: c.optim, optimizer_of)
PAIRS = Learning('pairs', lambda c: c.pairs, parts.pairs_optimizer_of)


def make_training(
  c: Any, grid: Any, setup: step.Setup, learning: Learning
) -> tuple[Compiled, Compiled, Compiled]:
  """Returns score, pack, update."""
  seed, whole = np.uint32(c.seed), gather_of(c, grid)

  def score(trainable, frozen, references, sampled, seed):
    who = whole(scoring.policies(trainable, frozen, references))
    keys = rng.key_for(seed, 'score'), rng.key_for(seed, learning.stream)
    return scoring.score(who, sampled, *keys, setup)

  def pack(sampled, reward, scores, share=None):
    return scoring.pack(sampled, reward, scores, setup, share)

  def update(state, frozen, batch, inner, seed, lr):
    now = dataclasses.replace(setup, optimizer=learning.optimizer(c, lr))
    key = rng.key_for(seed, learning.stream)
    return step.train_step(state, frozen, batch, key, inner, now)

  lr = np.float32(learning.section(c).lr)
  return (
    Compiled(grid, score, (seed,)),
    Compiled(grid, pack),
    Compiled(grid, update, (seed, lr), donate_argnums=0),
  )


def make_sft(c: Any, cfg: model.ModelConfig, grid: Any) -> tuple[Staged, Compiled]:
  """Returns sft, held_out."""
  seed = np.uint32(c.seed)

  def sft_of(stage: anneal.Stage) -> Compiled:
    def sft(state, frozen, lesson, at, factor, seed):
      key = jax.random.fold_in(rng.key_for(seed, 'sft'), at)
      seen = dataclasses.replace(cfg, block_causal=stage.block)
      setup = parts.sft_setup_of(c, seen, factor)
      share = anneal.share_of(c.sft.anneal, at) if stage.partial else None
      setup = dataclasses.replace(setup, share=share)
      return step.sft_step(state, frozen, lesson, key, setup)

    return Compiled(grid, sft, (seed,), by_row=(2,), donate_argnums=0)

  def held_out(trainable, frozen, lesson, seed):
    key, setup = rng.key_for(seed, 'sft'), parts.sft_setup_of(c, cfg)
    params = {**frozen, **trainable}
    return step.held_out(params, lesson, key, setup, c.sft.levels)

  return (
    Staged(sft_of, lambda at: anneal.stage_of(cfg, c.sft.anneal, at), 3),
    Compiled(grid, held_out, (seed,), by_row=(2,)),
  )


def make_pairs(
  c: Any, grid: Any, rl: step.Setup
) -> tuple[Callable, Callable, Callable, Callable, Callable, Callable]:
  """Returns start_pairs, place_pairs, score_pairs, pack_pairs, update_pairs and
  measure_pairs."""
  setup, seed = parts.pairs_setup_of(c, rl), np.uint32(c.seed)
  whole = gather_of(c, grid)

  def place(tokens, valid, answers, row):
    return likelihood.as_sampled(setup.cfg, tokens, valid, answers, row)

  def measure(trainable, frozen, references, sampled, seed):
    who = whole(scoring.policies(trainable, frozen, references))
    key = rng.substream(rng.key_for(seed, 'pairs'), 'held_out')
    under = lambda params, i: scoring.under_masks(params, i, sampled, key, setup)
    return under(who.old, 0)[0], scoring.of_references(under, who, 0, setup)[0]

  by_row = (0, 1, 2, 3)
  return (
    starter(parts.pairs_optimizer_of(c), grid),
    Compiled(grid, place, by_row=by_row, out_shardings=sampled_shardings(grid, True)),
    *make_training(c, grid, setup, PAIRS),
    Compiled(grid, measure, (seed,)),
  )


# --- shapes, for restoring and planning


def sharded(tree: Any, grid: Any) -> Any:
  """Returns ShapeDtypeStructs with the shardings of mesh.RULES."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    mesh.shardings(tree, grid),
  )


def abstract_states(built: Built) -> tuple[Params, Any]:
  """Returns (frozen params, TrainState) as shapes."""
  c = built.config
  law, own = built.setup.control, {}
  if law:
    own = {optim.CONTROL: jax.eval_shape(lambda: law.init(built.model.width))}
  return state_shapes(built, built.model, c.model.quantize, optimizer_of(c), own)


def state_shapes(
  built: Built, cfg: Any, kind: str, optimizer: Any, own: Params | None = None
) -> tuple[Params, Any]:
  """Returns (frozen params, TrainState) of a network as shapes.

  kind: quantization of the frozen params. own: what trains beside the network.
  """
  tree = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
  params = {'params': tree['params']}
  trainable = {'lora': tree['lora']} if cfg.lora_rank else params
  trainable = {**trainable, **(own or {})}
  params = quantized_shapes(params, kind)
  state = jax.eval_shape(lambda x: step.init_state(x, optimizer), trainable)
  return sharded(params, built.mesh), sharded(state, built.mesh)


def quantized_shapes(params: Params, kind: str) -> Params:
  """Returns the shapes of parameters as model.quantize = kind stores them."""

  def of_leaf(path, x):
    name = mesh.path_of(path)
    if kind == 'none' or not name.endswith('/kernel') or '/router/' in name:
      return x  # a router is small, and rounding it changes its choices
    return jax.eval_shape(lambda x: model.quantize(x, kind), x)

  return jax.tree_util.tree_map_with_path(of_leaf, params)


def abstract_references(built: Built, frozen: Params, state: Any) -> tuple:
  """Returns Steps.read_references as shapes, with the moving one in its place."""
  c = built.config
  if check.plain_reference(c):
    return ()

  trained = optim.of_model(state.trainable)

  def of_path(path):
    if path == 'base':  # the policy that RL starts from
      return trained if check.keeps_adapters(c) else {}
    if path == 'moving':
      return optim.reference_of(state.opt_state)
    return trained if is_adapter(path) else frozen

  return tuple(map(of_path, c.reference.of))


def kept_references(built: Built, references: tuple) -> list[Params]:
  """Returns those that a device holds beside the state, of `abstract_references`."""
  named = zip(built.config.reference.of, references, strict=False)
  return [tree for path, tree in named if path != 'moving']


class Abstract(NamedTuple):
  """The data of one buffer as shapes."""

  frozen: Params
  state: Any
  references: tuple
  prompts: tuple  # tokens, valid, row
  sampled: Sampled
  batch: TrainBatch


def abstract_buffer(built: Built, prompt: int) -> Abstract:
  """Returns the shapes of a buffer whose prompts have P = `prompt` tokens.

  They come from tracing sample, score and pack themselves.
  """
  c, by_row = built.config, mesh.rows(built.mesh)
  frozen, state = abstract_states(built)
  refs = abstract_references(built, frozen, state)
  prompts = abstract_prompts(built, c.train.prompts * c.train.group, prompt)
  use = Use('sample', built.setup.records)
  jit = make_sample(
    c, jit_section(c.sampler), use, (built.model, built.mesh), built.who
  )
  sampled = jit.shapes({**frozen, **state.trainable}, *prompts)
  # Functions of their own: those in built.steps may be wrapped.
  score, pack, *_ = make_training(c, built.mesh, built.setup, RL)
  scores = score.shapes(state.trainable, frozen, refs, sampled)
  if scores.guess is not None:  # the host hands in their rewards
    guess = jax.ShapeDtypeStruct(scores.guess.shape[:2], np.float32, sharding=by_row)
    scores = scores._replace(guess=None, guess_reward=guess)
  reward = jax.ShapeDtypeStruct((c.train.prompts, c.train.group), np.float32)
  batch, _ = pack.shapes(sampled, reward, scores)
  return Abstract(frozen, state, refs, prompts, sampled, batch)


def abstract_prompts(built: Built, rows: int, prompt: int) -> tuple:
  """Returns a sampler's arguments tokens, valid and row as shapes."""
  kinds = ((prompt,), np.int32), ((prompt,), bool), ((), np.int32)
  by_row = mesh.rows(built.mesh)
  return tuple(
    jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=by_row)
    for shape, dtype in kinds
  )


def jit_section(section: Any) -> Any:
  """Returns the sampler section with parallel = jit, for its shapes."""
  copy = section.copy_and_resolve_references()
  with copy.unlocked():
    copy.parallel = 'jit'
  return copy


def programs(built: Built, prompt: int, held_out: int) -> list[tuple[str, Any, tuple]]:
  """Returns (name, function, arguments as shapes) of the programs of a run.

  prompt, held_out: tokens of the prompts in training and in evaluation.
  """
  a, steps = abstract_buffer(built, prompt), built.steps
  inner = jax.ShapeDtypeStruct((), np.int32)
  score_args = (a.state.trainable, a.frozen, a.references, a.sampled)
  params = {**a.frozen, **a.state.trainable}
  evaluated = abstract_prompts(built, built.config.eval.batch, held_out)
  return [
    ('sample', steps.sample, (params, *a.prompts)),
    ('score', steps.score, score_args),
    ('update', steps.update, (a.state, a.frozen, a.batch, inner)),
    ('evaluate', steps.sample_eval, (params, *evaluated)),
  ]


# --- what comes before RL


class Phase(NamedTuple):
  """A phase before RL, as shapes."""

  what: str
  rows: int  # of an update
  held: Any  # of model, references and optimizer
  programs: list[tuple[str, Any, tuple]]  # as `programs` returns them


def sft_phase(built: Built, lesson: Lesson) -> Phase:
  """Returns supervised training on rows as large as these."""
  c, cfg, by_row = built.config, built.model, mesh.rows(built.mesh)
  own = parts.sft_config(c, cfg)
  goes_on = bool(own.lora_rank) and check.part(c, 'sft').goes_on
  kind = c.model.quantize if goes_on else 'none'
  frozen, state = state_shapes(built, own, kind, parts.sft_optimizer_of(c))
  frozen = frozen if own.lora_rank else {}
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_row)
  number = lambda kind: jax.ShapeDtypeStruct((), kind)
  update = built.steps.sft.make(anneal.stage_of(cfg, c.sft.anneal, c.sft.anneal))
  rows = jax.tree.map(shape, lesson)
  args = state, frozen, rows, number(np.int32), number(np.float32)
  count, tokens = lesson.tokens.shape
  what = f'supervised training on {count} rows of {tokens} tokens'
  return Phase(what, count, (state, frozen), [('sft', update, args)])


def pairs_phase(built: Built, prompt: int) -> Phase:
  """Returns training on pairs whose prompts have `prompt` tokens."""
  c, steps, length = built.config, built.steps, built.config.sampler.length
  count, optimizer = c.pairs.batch, parts.pairs_optimizer_of(c)
  frozen, state = state_shapes(built, built.model, c.model.quantize, optimizer)
  refs = abstract_references(built, frozen, state)
  tokens, valid, row = abstract_prompts(built, 2 * count, prompt)
  answers, *_ = abstract_prompts(built, 2 * count, length)
  sampled = steps.place_pairs.shapes(tokens, valid, answers, row)
  scored = state.trainable, frozen, refs, sampled
  scores = steps.score_pairs.shapes(*scored)
  shape = jax.ShapeDtypeStruct
  batch, _ = steps.pack_pairs.shapes(sampled, shape((count, 2), np.float32), scores)
  updated = state, frozen, batch, shape((), np.int32)
  listed = [('score_pairs', steps.score_pairs, scored)]
  listed += [('update_pairs', steps.update_pairs, updated)]
  held = state, frozen, kept_references(built, refs)
  what = f'training on {count} pairs of {prompt} + {length} tokens'
  return Phase(what, 2 * count, held, listed)


PHASES = {'sft': sft_phase, 'pairs': pairs_phase}
