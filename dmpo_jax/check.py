"""What a config may say: every impossible setting found before anything runs.

And how two configs differ, for a run that goes on. Nobody below `build` sees a
ConfigDict but this file.
"""

import dataclasses
import difflib
import json
import os

import jax
import jax.numpy as jnp

from dmpo_jax import health, model, sampler
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.objectives.shared import Common
from dmpo_jax.tasks import TASKS
from dmpo_jax.types import Scored

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


def config(c, count, platform=''):
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
    ('model.quantize', c.model.quantize, ('none', *model.QUANT)),
    ('model.remat', c.model.remat, model.REMAT),
    ('model.attention', c.model.attention, model.ATTENTION),
    ('logprob.estimator', c.logprob.estimator, ('elbo', 'trajectory')),
    ('logprob.elbo', c.logprob.elbo, ('paper', 'stratified')),
    ('model.dtype', c.model.dtype, ('float32', 'bfloat16')),
    ('model.param_dtype', c.model.param_dtype, ('float32', 'bfloat16')),
    ('sampler.parallel', c.sampler.parallel, ('jit', 'pmap')),
    ('eval.sampler.parallel', c.eval.sampler.parallel, ('jit', 'pmap')),
  ):
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
    raise ValueError(
      'this config cannot run:\n' + '\n'.join(f'  {text}' for text in found)
    )


def training(c):
  """ValueError if updates would be lost by rounding: of what trains alone."""
  if c.model.param_dtype != 'float32' and (c.sft.steps or not c.lora.rank):
    raise ValueError(
      f'model.param_dtype = {c.model.param_dtype}: a change of less than a '
      '500th of a weight is rounded away there; set float32, or train '
      'adapters (lora.rank > 0, sft.steps = 0)'
    )


def check_numbers(c):
  """Numbers out of their range."""
  least = {
    'train.iterations': 0,
    'train.prompts': 1,
    'train.group': 2,
    'train.inner': 1,
    'train.microbatches': 1,
    'sft.steps': 0,
    'sft.batch': 1,
    'logprob.draws': 1,
    'logprob.states': 0,
    'eval.batch': 1,
    'eval.every': 0,
    'eval.samples': 1,
    'reward.workers': 0,
    'checkpoint.every': 1,
    'checkpoint.keep': 1,
    'checkpoint.every_minutes': 0,
    'data.train_size': 0,
    'data.validation_size': 0,
    'data.test_size': 0,
    'data.prompt_length': 0,
    'data.bucket': 0,
    'lora.rank': 0,
    'lora.alpha': 0,
    'optim.lr': 0,
    'optim.warmup': 0,
    'optim.decay_steps': 0,
    'optim.clip': 0,
    'sft.lr': 0,
    'optim.weight_decay': 0,
    'sft.clip': 0,
    'sft.warmup': 0,
    'sft.weight_decay': 0,
    'model.head_chunk': 0,
    'mesh.data': 0,
    'reference.every': 1,
    'mesh.fsdp': 1,
    'mesh.tensor': 1,
    'mesh.cpu': 1,
    'log.samples': 0,
    'log.stuck_minutes': 0,
  }
  flat = flatten(c)
  found = (
    [] if 0 <= c.seed < 2**32 else [f'seed = {c.seed} must be in 0 to 2 ** 32 - 1']
  )
  found += [
    f'{name} = {flat[name]} must be in [0, 1)'
    for name in ('optim.b1', 'optim.b2')
    if not 0 <= flat[name] < 1
  ]
  for name, wanted in (('optim.eps', True), ('lora.alpha', c.lora.rank)):
    if wanted and not flat[name] > 0:
      found.append(f'{name} = {flat[name]} must be > 0')
  return found + [
    f'{name} = {flat[name]} must be >= {low}'
    for name, low in least.items()
    if not flat[name] >= low
  ]


def check_eval(c):
  """Templates that are there, deadlines and samples that make sense."""
  found = []
  for name, path in (
    ('data.template', c.data.template),
    ('eval.template', c.eval.template),
  ):
    if path and not os.path.isfile(path):
      found.append(f'{name} = {path!r}: no such file')
  if c.eval.samples > 1 and not c.eval.sampler.temperature:
    found.append(
      f'eval.samples = {c.eval.samples} needs '
      'eval.sampler.temperature > 0: greedy ones are all the same'
    )
  if not c.reward.deadline > 0:
    found.append(f'reward.deadline = {c.reward.deadline} must be > 0 seconds')
  if not all(isinstance(n, int) for n in c.eval.lengths):
    found.append(
      f'eval.lengths = {c.eval.lengths} must be whole numbers, such '
      'as "(128, 256, 512)"'
    )
  return found


def check_health(c):
  """Bounds that can be broken, on numbers that this objective gives."""
  h = settings(health.Config, c.health)
  found = h.problems()
  if c.objective.name not in OBJECTIVES:
    return found
  objective = OBJECTIVES[c.objective.name]
  hp = settings(objective.hp, c.objective)
  if objective.check(hp):
    return found
  if h.kl and not (c.health.measure or {'old', 'ref'} <= objective.needs(hp)):
    found.append(
      f'health.kl = {h.kl} needs health.measure=True: this '
      'objective does without log p_old or log p_ref'
    )
  if h.ess:
    groups = [jax.ShapeDtypeStruct((1, 2), jnp.float32)] * 4
    guess = jax.ShapeDtypeStruct((1, 2, 1), jnp.float32)
    given = jax.eval_shape(lambda *s: objective.weigh(Scored(*s), hp), *groups, guess)[
      2
    ]
    if 'ess' not in given:
      found.append(
        f'health.ess = {h.ess}: objective.name = {c.objective.name} '
        'has no effective size, set 0'
      )
  return found


def check_model(c):
  """What a checkpoint, a quantized base and adapters allow."""
  found, m = [], c.model
  sizes = [f'model.{name} = {m[name]}' for name in SIZES if m[name]]
  if m.checkpoint and sizes:
    found.append(
      f'{", ".join(sizes)}: the sizes are those of model.checkpoint, leave them 0'
    )
  if m.quantize != 'none' and not c.lora.rank:
    found.append(
      f'model.quantize = {m.quantize} freezes the base: it needs lora.rank > 0'
    )
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
    found.append(
      f'model.attention = {kind} needs a {need}, this is a {platform}: use xla'
    )
  if kind == 'cudnn' and c.model.dtype != 'bfloat16':
    found.append(
      f'model.attention = cudnn needs model.dtype = bfloat16, not {c.model.dtype}'
    )
  picks_ = (c.sampler.pick, c.eval.sampler.pick)
  if kind == 'splash' and 'wino' in picks_:
    found.append(
      'sampler.pick = wino needs model.attention = xla: splash '
      'shows all queries the same keys'
    )
  return found


def check_rows(c, count):
  """Rows against devices and microbatches, the mesh against devices."""
  split = c.mesh.fsdp * c.mesh.tensor
  if count % split or (c.mesh.data and c.mesh.data * split != count):
    return [
      f'mesh.data, mesh.fsdp, mesh.tensor = {c.mesh.data}, '
      f'{c.mesh.fsdp}, {c.mesh.tensor} must multiply to the {count} '
      'devices (data = 0 takes what is left)'
    ]
  shards = count // c.mesh.tensor
  rows = c.train.prompts * c.train.group
  pieces = shards * c.train.microbatches
  found = []
  if rows % pieces:
    found.append(
      f'train.prompts * train.group = {rows} rows must be a multiple of '
      f'{shards} device shards * train.microbatches = {pieces}'
    )
  if c.eval.batch % shards:
    found.append(
      f'eval.batch = {c.eval.batch} must be a multiple of the {shards} device shards'
    )
  if c.sft.steps and c.sft.batch % shards:
    found.append(
      f'sft.batch = {c.sft.batch} must be a multiple of the {shards} device shards'
    )
  replicated = split == 1
  for name, section in (('', c.sampler), ('eval.', c.eval.sampler)):
    if section.parallel == 'pmap' and not replicated:
      found.append(
        f'{name}sampler.parallel = pmap needs replicated weights: '
        'set mesh.fsdp = mesh.tensor = 1, or use jit'
      )
  if c.model.head_chunk and c.sampler.length % c.model.head_chunk:
    found.append(
      f'model.head_chunk = {c.model.head_chunk} must divide '
      f'sampler.length = {c.sampler.length}'
    )
  return found


def check_logprob(c):
  """How log-probs are estimated, against how completions are sampled."""
  found, e = [], c.logprob
  if e.draws % 2 and (e.antithetic or e.elbo == 'stratified'):
    found.append(
      f'logprob.draws = {e.draws} must be even with '
      'logprob.antithetic or logprob.elbo = stratified'
    )
  if not 0 <= e.low < e.high <= 1:
    found.append(
      f'logprob.low = {e.low}, logprob.high = {e.high} must be 0 <= low < high <= 1'
    )
  if e.fuse and (not c.lora.rank or e.estimator != 'elbo'):
    found.append(
      'logprob.fuse = True needs lora.rank > 0 and '
      'logprob.estimator = elbo: only adapters share their base'
    )
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
  own = [
    field.name
    for kind in (OBJECTIVES[o.name].hp, Common)
    for field in dataclasses.fields(kind)
  ]
  for name, usual in objective_fields().items():
    if name not in own and o[name] != usual:
      found.append(
        f'objective.{name} = {o[name]!r} is no setting of '
        f'objective.name = {o.name}: leave it {usual!r}'
      )
  if o.elbo_draws < 2 or o.elbo_draws % 2:
    found.append(
      f'objective.elbo_draws = {o.elbo_draws} must be even: masks '
      'come with their complements'
    )
  hp = settings(OBJECTIVES[o.name].hp, o)
  needs = OBJECTIVES[o.name].needs(hp)
  for need, wrong, change in (
    (
      'record',
      s.pick == 'wino',
      'sampler.pick = wino takes tokens back: use '
      'another, for this needs recorded steps',
    ),
    (
      'law',
      not s.temperature,
      'sampler.temperature = 0 has no density: this needs > 0',
    ),
    (
      'law',
      s.top_p < 1 or s.top_k,
      f'sampler.top_p = {s.top_p}, '
      f'sampler.top_k = {s.top_k}: this needs 1 and 0, for a policy that has '
      'changed gives chance to what was cut',
    ),
    (
      'law',
      s.guidance,
      f'sampler.guidance = {s.guidance}: this needs 0, for '
      'the loss is of the network without it',
    ),
    (
      'left_to_right',
      s.block != 1,
      f'sampler.block = {s.block}: this needs 1, tokens from left to right',
    ),
    (
      'fallback',
      s.pick != 'threshold',
      f'sampler.pick = {s.pick}: this needs threshold, whose fallbacks it trains',
    ),
    (
      'place',
      (s.pick, s.rank, s.rank_law) != ('plackett_luce', 'max', 'model'),
      f'sampler.pick = {s.pick}, rank = '
      f'{s.rank}, rank_law = {s.rank_law}: this needs plackett_luce, max, '
      'model, whose choice of positions has a density',
    ),
  ):
    if need in needs and wrong:
      found.append(f'{change} (objective.name = {o.name})')
  return found + check_old(c, needs, hp)


def check_old(c, needs, hp):
  """log p_old that log p_theta is compared with: without dropout on one side,
  and where it has masks of its own, of the law of the loss's."""
  found, o, e = [], c.objective, c.logprob
  # `reweigh` ('policy') reads ELBOs of a pass without dropout.
  if c.lora.dropout and (
    needs & {'tokens_old', 'record'} or 'elbo_old' in needs and 'policy' not in needs
  ):
    found.append(
      f'lora.dropout = {c.lora.dropout}: objective.name = {o.name} '
      'compares log p_theta with log p_old, which has no dropout: '
      'set 0'
    )
  if 'elbo_old' not in needs or hp.common_masks:
    return found
  why = 'log p_old and log p_theta are compared'
  found += [
    f'logprob.{field} = {e[field]} must be objective.{field} = {o[field]}: {why}'
    for field in ('low', 'high', 'antithetic')
    if e[field] != o[field]
  ]
  if e.elbo != 'paper':
    found.append(f'logprob.elbo = {e.elbo} must be paper: {why}')
  if not o.loss_tail:
    found.append(
      f'objective.loss_tail = False: {why}, and log p_old has the '
      'tail: set True, or (baseline model) '
      'objective.common_masks=True'
    )
  return found


def objective_fields():
  """{field: its value in base}: that of the first objective that has it."""
  return {
    field.name: field.default
    for objective in reversed(OBJECTIVES.values())
    for field in dataclasses.fields(objective.hp)
  }


def check_reference(c):
  """What p_ref is made of, against who asks for it."""
  found, r = [], c.reference
  if len(r.weights) != len(r.of) or not r.of:
    found.append(
      f'reference.weights = {r.weights} must hold a weight for each '
      f'of reference.of = {r.of}'
    )
  if not all(0 < w < float('inf') for w in r.weights):
    found.append(f'reference.weights = {r.weights} must be > 0')
  if not 0 < r.mix <= 1:
    found.append(f'reference.mix = {r.mix} must be in (0, 1]; 1 = a copy')
  if (
    'moving' in r.of
    and not c.lora.rank
    and r.mix < 1
    and (c.model.param_dtype != 'float32')
  ):
    found.append(
      f'reference.mix = {r.mix} is lost in rounding: it needs '
      'model.param_dtype = float32, or lora.rank > 0'
    )
  if plain_reference(c):
    return found
  if c.logprob.fuse:
    found.append(
      'logprob.fuse = True knows the base alone: reference.of must '
      "be ('base',) with weight 1"
    )
  if c.objective.name in OBJECTIVES:
    objective = OBJECTIVES[c.objective.name]
    needs = objective.needs(settings(objective.hp, c.objective))
    if 'ref' not in needs:
      found.append(f'reference.of = {r.of}: this objective asks for no log p_ref')
    if needs & {'tokens_ref', 'elbo_ref'}:  # under the masks of the loss
      found.append(
        f'reference.of = {r.of}: objective.name = '
        f"{c.objective.name} knows the base alone: ('base',)"
      )
  return found


def plain_reference(c):
  """Whether p_ref is the base and nothing else."""
  return tuple(c.reference.of) == ('base',) and (tuple(c.reference.weights) == (1.0,))


def check_trajectory(c):
  """What leaves no density along the recorded states."""
  found, s = [], c.sampler
  if not s.temperature:
    found.append(
      'logprob.estimator = trajectory needs sampler.temperature > '
      '0: greedy sampling has no density'
    )
  if not c.logprob.tail:
    found.append(
      'logprob.tail = False has no meaning along a trajectory: use '
      'logprob.estimator = elbo'
    )
  if s.top_p < 1 or s.top_k:
    found.append(
      f'sampler.top_p = {s.top_p}, sampler.top_k = {s.top_k}: '
      'logprob.estimator = trajectory needs 1 and 0, for p_ref has '
      'tokens that are cut here'
    )
  if s.pick == 'wino':
    found.append(
      'sampler.pick = wino takes tokens back, its states are not '
      'recorded: use logprob.estimator = elbo'
    )
  if settings(sampler.SampleConfig, s).order_from() == 'tokens':
    found.append(
      f'sampler.rank = token: with sampler.pick = {s.pick} the '
      'proposals decide what is kept, and logprob.estimator = '
      'trajectory lacks that term: use sampler.rank = max'
    )
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
FREE = (
  'log.',
  'checkpoint.',
  'mesh.',
  'reward.workers',
  'reward.deadline',
  'cache',
  'health.',
)
JUDGING = (*FREE, 'eval.', 'reward.', 'data.protocol', 'data.test_size', 'data.path')


def plain(c):
  """{'section.field': value} as JSON gives it back: tuples are lists."""
  return flatten(json.loads(c.to_json()))


def changes(old, new, free):
  """What differs between two of `plain`, but in fields that begin as `free`."""
  return '; '.join(
    f'{k}: {old.get(k)!r} there, {new.get(k)!r} here'
    for k in sorted(old.keys() | new.keys())
    if old.get(k) != new.get(k) and not k.startswith(free)
  )


def refuse(c, free=JUDGING):
  """meta -> why a checkpoint is not of this config, or ''."""

  def why(meta):
    found = changes(meta['config'], plain(c), free) if 'config' in meta else ''
    return found and f'it is of another config ({found})'

  return why
