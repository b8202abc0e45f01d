"""Every compiled function, with its shardings: all jits and the pmap live here.

`build` makes a run's parts (parts.py) and returns them with `Steps`, the compiled
functions. Shapes for restoring and planning come from tracing the same functions.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmpo_jax import (
  check,
  checkpoint,
  hf,
  likelihood,
  masking,
  mesh,
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
from dmpo_jax.tasks import TASKS, symbolic
from dmpo_jax.types import GIVEN, Params, Rollouts, Sampled, Task, TrainBatch

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
  of host arrays that are split over the devices by rows.
  """

  def __init__(
    self, grid: Any, fn: Callable, last: tuple = (), by_row: tuple = (), **options: Any
  ):
    self.grid, self.last, self.by_row = grid, last, by_row
    self.jitted = jax.jit(fn, **options)

  def __call__(self, *args: Any) -> Any:
    rows, placed = mesh.rows(self.grid), []
    for i, x in enumerate(args):
      x = mesh.put(x, rows) if i in self.by_row else x
      placed.append(np.int32(x) if isinstance(x, int) else x)
    with jax.set_mesh(self.grid):
      return self.jitted(*placed, *self.last)

  def trace(self, *args: Any) -> Any:
    """Traces with ShapeDtypeStructs; compiles nothing."""
    with jax.set_mesh(self.grid):
      return self.jitted.trace(*args, *self.last)

  def shapes(self, *args: Any) -> Any:
    """Returns the results as ShapeDtypeStructs, split by rows; scalars are whole."""

    def shape(x):
      where = mesh.rows if x.shape else mesh.replicated
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(self.grid))

    return jax.tree.map(shape, self.trace(*args).out_info)


class Steps(NamedTuple):
  """The compiled functions; arguments are host or device arrays."""

  init: Callable  # () -> {'params': ...}
  init_lora: Callable  # () -> {'lora': ...}, or {} without adapters
  start: Callable  # trainable -> TrainState
  start_sft: Callable  # params -> TrainState
  sample: Callable  # (params, tokens, valid, row) -> Sampled
  sample_eval: Callable  # the same with the evaluation's sampler
  sampler_of: Callable  # config section -> the same with that sampler
  texts_of: Callable  # likelihood.Program -> compiled log-likelihoods of given texts
  read_references: Callable  # () -> what p_ref is made of: parts.references
  score: Callable  # (trainable, frozen, references, Sampled) -> Scores
  pack: Callable  # (Sampled, reward_BxG, Scores) -> (TrainBatch, metrics)
  update: Callable  # (state, frozen, TrainBatch, inner) -> (state, metrics)
  sft: Callable  # (state, tokens, valid, row, step) -> (state, metrics)
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


def build(c: Any, devices: Any = None) -> Built:
  """Checks the config and makes the parts; programs compile at first use.

  devices: those of a topology that is not here (plan). ValueError lists everything
  that is impossible.
  """
  there = devices or jax.devices()
  check.config(c, len(there), there[0].platform)
  symbolic.configure(c.reward.workers, c.reward.deadline)
  folder = c.model.checkpoint and hf.locate(c.model.checkpoint, False)
  tokenizer = parts.tokenizer_of(c, folder)
  cfg = parts.model_config(c, tokenizer, folder)
  parts.check_blocks(c, cfg)
  if c.lora.path:
    hf.check_adapter(c.lora.path, cfg, folder, c.model.checkpoint)
  grid = mesh.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, devices)
  setup = parts.setup_of(c, cfg, OBJECTIVES[c.objective.name])
  quantize = make_quantize(c, grid)
  init, init_lora, start, start_sft = make_starts(c, cfg, folder, grid)
  read_references = parts.references(c, cfg, folder, grid, quantize)
  digest, read = Compiled(grid, checkpoint.digest), {}

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

  steps = Steps(
    noted('model.checkpoint' * bool(c.model.checkpoint), init),
    noted('lora.path' * bool(c.lora.path), init_lora),
    start,
    start_sft,
    make_sample(c, c.sampler, 'sample', cfg, grid, setup.wants.records or ()),
    make_sample(c, c.eval.sampler, 'evaluate', cfg, grid),
    lambda section: make_sample(c, section, 'evaluate', cfg, grid),
    lambda program: make_texts(c, program, cfg, grid),
    noted('reference.of' * (not check.plain_reference(c)), read_references),
    *make_training(c, grid, setup),
    quantize,
    digest,
  )
  return Built(c, grid, cfg, TASKS[c.data.task], tokenizer, setup, steps, {}, read)


def collector(built: Built, frozen: Params) -> Collector:
  """Returns what makes the training buffers of a run."""
  c = built.config
  return Collector(
    built.steps,
    built.task,
    built.tokenizer,
    problems(built, 'train'),
    frozen,
    prompts=c.train.prompts,
    group=c.train.group,
    seed=c.seed,
    bucket=c.data.bucket,
    protocol=c.data.protocol,
    weights=dict(c.reward.weights),
    stops=model.stops(built.model),
    samples=c.log.samples,
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


def make_starts(
  c: Any, cfg: model.ModelConfig, folder: str, grid: Any
) -> tuple[Callable, Callable, Callable, Callable]:
  """Returns init, init_lora, start, start_sft: sharded from birth, never copied.

  With a checkpoint init reads it, with lora.path init_lora reads the adapter.
  """

  def fresh(name, stream):
    make = lambda seed: {name: model.init(cfg, rng.key_for(seed, stream))[name]}
    seed = np.uint32(c.seed)
    try:
      out = mesh.shardings(jax.eval_shape(make, seed), grid)
    except KeyError:  # no adapters: lora.rank is 0
      return lambda: {}
    return Compiled(grid, make, last=(seed,), out_shardings=out)

  def start(optimizer):
    def call(trainable):
      make = lambda tree: step.init_state(jax.tree.map(jnp.copy, tree), optimizer)
      out = mesh.shardings(jax.eval_shape(make, trainable), grid)
      return Compiled(grid, make, out_shardings=out)(trainable)

    return call

  def read():
    return hf.read_params(hf.locate(c.model.checkpoint), cfg, grid)

  def read_adapter():
    return hf.read_adapter(c.lora.path, cfg, folder, grid)

  return (
    read if c.model.checkpoint else fresh('params', 'init'),
    read_adapter if c.lora.path else fresh('lora', 'lora'),
    start(optimizer_of(c)),
    start(parts.sft_optimizer_of(c)),
  )


# --- sampling


def make_sample(
  c: Any,
  section: Any,
  stream: str,
  cfg: model.ModelConfig,
  grid: Any,
  records: tuple[str, ...] = (),
) -> Callable:
  """Returns (params, tokens, valid, row) -> Sampled, on the device."""
  hp, whole = check.settings(sampler.SampleConfig, section), gather_of(c, grid)

  def sample(params, tokens, valid, row, seed):
    params = whole(params)
    keys_R = rng.row_keys(rng.key_for(seed, stream), row)
    out = sampler.sample(cfg, params, tokens, valid, keys_R, hp, records)
    own = out.order != GIVEN
    stop = model.is_stop(cfg, out.tokens[:, -hp.length :]) & own
    return Sampled(out, masking.completion_mask(stop) & own, row)

  seed = np.uint32(c.seed)
  if section.parallel == 'pmap':
    return pmap_rows(functools.partial(sample, seed=seed), grid)
  by_row = mesh.rows(grid)
  # Shardings are given, not left to the compiler: each process reads its own rows.
  rollouts = Rollouts._make([by_row] * len(Rollouts._fields))
  rollouts = rollouts._replace(forwards=mesh.replicated(grid))
  out = Sampled._make([rollouts, by_row, by_row])
  return Compiled(grid, sample, last=(seed,), by_row=(1, 2, 3), out_shardings=out)


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
        'set mesh.fsdp = mesh.tensor = 1, or use jit'
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


def make_training(
  c: Any, grid: Any, setup: step.Setup
) -> tuple[Compiled, Compiled, Compiled, Compiled]:
  """Returns score, pack, update, sft."""
  seed = np.uint32(c.seed)

  whole = gather_of(c, grid)

  def score(trainable, frozen, references, sampled, seed):
    who = whole(scoring.policies(trainable, frozen, references))
    keys = rng.key_for(seed, 'score'), rng.key_for(seed, 'mask')
    return scoring.score(who, sampled, *keys, setup)

  def pack(sampled, reward, scores):
    return scoring.pack(sampled, reward, scores, setup)

  def update(state, frozen, batch, inner, seed, lr):
    now = dataclasses.replace(setup, optimizer=optimizer_of(c, lr))
    return step.train_step(state, frozen, batch, rng.key_for(seed, 'mask'), inner, now)

  sft_setup = step.SftSetup(setup.cfg, c.sampler.length, parts.sft_optimizer_of(c))

  def sft(state, tokens, valid, row, at, seed):
    key = jax.random.fold_in(rng.key_for(seed, 'sft'), at)
    return step.sft_step(state, tokens, valid, row, key, sft_setup)

  lr = np.float32(c.optim.lr)
  return (
    Compiled(grid, score, (seed,)),
    Compiled(grid, pack),
    Compiled(grid, update, (seed, lr), donate_argnums=0),
    Compiled(grid, sft, (seed,), by_row=(1, 2, 3), donate_argnums=0),
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
  c, cfg = built.config, built.model
  tree = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
  params = {'params': tree['params']}
  trainable = {'lora': tree['lora']} if cfg.lora_rank else params
  params = quantized_shapes(params, c.model.quantize)
  optimizer = optimizer_of(c)
  state = jax.eval_shape(lambda x: step.init_state(x, optimizer), trainable)
  return sharded(params, built.mesh), sharded(state, built.mesh)


def quantized_shapes(params: Params, kind: str) -> Params:
  """Returns the shapes of parameters as model.quantize = kind stores them."""

  def of_leaf(path, x):
    if kind == 'none' or not mesh.path_of(path).endswith('/kernel'):
      return x
    return jax.eval_shape(lambda x: model.quantize(x, kind), x)

  return jax.tree_util.tree_map_with_path(of_leaf, params)


def abstract_references(built: Built, frozen: Params, state: Any) -> tuple:
  """Returns Steps.read_references as shapes, with the moving one in its place."""
  c = built.config
  if check.plain_reference(c):
    return ()

  def of_path(path):
    if path == 'base':
      return {}
    if path == 'moving':
      return optim.reference_of(state.opt_state)
    return state.trainable if is_adapter(path) else frozen

  return tuple(map(of_path, c.reference.of))


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
  jit = make_sample(
    c,
    jit_section(c.sampler),
    'sample',
    built.model,
    built.mesh,
    built.setup.wants.records or (),
  )
  sampled = jit.shapes({**frozen, **state.trainable}, *prompts)
  # Functions of their own: those in built.steps may be wrapped.
  score, pack, *_ = make_training(c, built.mesh, built.setup)
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
