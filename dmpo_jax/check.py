"""Refuses a config that cannot run, before anything is compiled.

`config` collects the complaints of every section (config.py) and of the rules below,
which hold between sections, into one error. The end of the file compares configs, for
a run that is resumed or evaluated.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Container
from typing import Any

import jax
import jax.numpy as jnp

from dmpo_jax import control, hf, model, sampler
from dmpo_jax.config import (
  SECTIONS,
  TERMS,
  compares_old,
  flatten,
  misfits,
  part,
  settings,
)
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.objectives.shared import Common
from dmpo_jax.rules import nearest, without_effect
from dmpo_jax.tasks import TASKS, find, rewards
from dmpo_jax.types import Record, Scored, Wants


def config(c: Any, count: int, platform: str = '') -> None:
  """Raises one ValueError that lists everything impossible in a config.

  count: number of devices that the run will have; platform: theirs, such as 'tpu'
  ('' = JAX's default). A rule between sections waits until they are right themselves.
  """
  if not (found := misfits(c)):
    c = with_block(c)
    found, wrong = section_problems(c)
    for rule, sections in RULES.items():
      if not wrong & set(sections):
        found += rule(c)
    if not wrong & {'mesh', 'train', 'eval', 'sft', 'pairs'}:
      found += devices(c, count)
    found += attention(c, platform or jax.default_backend())
  if found:
    raise ValueError('this config cannot run:\n  ' + '\n  '.join(found))


def section_problems(c: Any) -> tuple[list[str], set[str]]:
  """Returns the complaints about sections by themselves, and the sections they name."""
  found, wrong = [], set()
  for name, one in parts(c):
    if c.model.attention_block > 0:
      one = dataclasses.replace(one, **one.WHOLE_TEXT)
    prefix = name.rpartition('.')[0]  # a nested sampler's complaints begin 'sampler.'
    said = one.problems()
    found += [f'{prefix}.{text}' if prefix else text for text in said]
    wrong |= {name} if said else set()
  if not 0 <= c.seed < 2**32:
    found.append(f'seed = {c.seed} must be in 0 to 2 ** 32 - 1')
  return found, wrong


def training(c: Any) -> None:
  """Raises ValueError for what only training needs.

  Updates must not be lost by rounding, and a right answer must be paid.
  """
  sft = part(c, 'sft')
  whole = sft.trains and not sft.rank or tunes(c) and not c.lora.rank
  if c.model.param_dtype != 'float32' and whole:
    raise ValueError(
      f'model.param_dtype = {c.model.param_dtype} rounds away a change of less than a '
      '500th of a weight: set float32, or train adapters (lora.rank > 0, and sft.rank '
      '> 0 if supervised training comes first)'
    )
  style, unpaid = c.data.style, find(c.data.task).unpaid
  if c.data.protocol == 'paper' and style in unpaid and not c.data.template:
    raise ValueError(
      f'data.style = {style} with data.protocol = paper: these rules do not pay, or do '
      f'not grade as right, what this prompt of data.task = {c.data.task} asks for: '
      'set data.style = chat (eval.style is free), or data.protocol = strict'
    )


def tunes(c: Any) -> bool:
  """Whether training goes on after the supervised one: on pairs, or RL."""
  return bool(c.train.iterations or part(c, 'pairs').trains)


# --- fields without effect


def parts(c: Any) -> list[tuple[str, Any]]:
  """Returns (section, its dataclass) of all sections; that of objective has two."""
  kinds = (OBJECTIVES[c.objective.name].Config, Common)
  own = [('objective', settings(kind, c.objective)) for kind in kinds]
  return [(name, part(c, name)) for name in SECTIONS] + own


def with_block(c: Any) -> Any:
  """Returns a copy with the model's own model.attention_block where it is -1.

  It stays -1 of a checkpoint that cannot be read; `build` says what is wrong with it.
  """
  c = c.copy_and_resolve_references()
  if c.model.attention_block != -1:
    return c
  if not c.model.checkpoint:
    preset = model.PRESETS.get(c.model.preset, {})  # a wrong name is complained of
    c.model.attention_block = preset.get('block_causal', 0)
  else:
    with contextlib.suppress(ValueError):
      folder = hf.locate(c.model.checkpoint, False)
      fields = hf.read_config(folder, None, c.model.convert)
      c.model.attention_block = fields['block_causal']
  return c


def idle(c: Any) -> dict[str, str]:
  """Returns {'section.field': what it needs} of fields without effect in a config.

  c: as `with_block` returns it.
  """
  own = {
    f'{name}.{x}': re.sub(r'\bsampler\.', f'{name}.', need)
    for name, p in parts(c)
    for x, need in p.idle().items()
  }
  if (block := c.model.attention_block) > 0:
    need = f'a model that sees the whole text, this one attends in blocks of {block}'
    own |= {f'{name}.{x}': need for name, p in parts(c) for x in p.WHOLE_TEXT}
  return own | idle_between(c)


def idle_between(c: Any) -> dict[str, str]:
  """Returns the fields that have no effect because of other sections."""
  _, wants = wanted(c)
  task, log = find(c.data.task), part(c, 'logprob')
  scored = bool(c.health.measure or wants.sequence)
  by_elbo = scored and log.estimator == 'elbo'
  by_elbo |= 'old' in wants.elbo and not wants.common_masks
  rates = by_elbo and log.elbo == 'paper'
  asks = 'an objective that asks for log p_old or log p_ref (dmpo: objective.alpha > 0)'
  functions = rewards.specs(c.reward.file)
  paid = (task.terms or tuple(c.reward.weights)) if c.reward.task else ()
  need = 'reward.task = True' if not c.reward.task else 'data.task = '
  weights = [
    (
      f'reward.weights.{term}',
      term in (*paid, *functions),
      need + names * c.reward.task,
    )
    for term in TERMS
    if (names := ' or '.join(n for n, other in TASKS.items() if term in other.terms))
  ]
  sections = (
    'objective.', 'logprob.', 'reference.', 'optim.', 'train.', 'curriculum.',
    'control.', 'routing.load', 'routing.replay', 'routing.measure',
  )  # fmt: skip
  rl = [name for name in flatten(c) if name.startswith(sections)]
  of_pairs = {x for x in rl if x.startswith(('reference.', 'optim.'))}
  of_pairs -= {'optim.lr', 'optim.warmup', 'optim.decay_steps'}
  rl = sorted({*rl} - {'objective.name', 'train.iterations'} - of_pairs)
  solves = part(c, 'sft').trains and not c.sft.path
  return without_effect(
    ('logprob.estimator logprob.tail logprob.states logprob.fuse', scored, asks),
    ('logprob.draws logprob.elbo', by_elbo, f'logprob.estimator = elbo, and {asks}'),
    (
      'logprob.low logprob.high logprob.antithetic',
      rates,
      f'logprob.estimator = elbo, logprob.elbo = paper, and {asks}',
    ),
    ('lora.dtype', c.model.dtype == 'bfloat16', 'model.dtype = bfloat16'),
    ('data.style', not c.data.template or solves, "data.template = ''"),
    *weights,
    ('reward.sandbox reward.python reward.memory', task.ready, 'data.task = code'),
    ('draft.rollouts', c.train.iterations, 'train.iterations > 0'),
    (' '.join(rl), c.train.iterations, 'train.iterations > 0'),
    (' '.join(sorted(of_pairs)), tunes(c), 'train.iterations > 0 or pairs.path'),
    ('log.rollouts', c.train.iterations, 'train.iterations > 0'),
    ('data.drop', c.train.iterations or solves, 'train.iterations > 0'),
    *idle_experts(c),
  )


def idle_experts(c: Any) -> list[tuple[str, Any, str]]:
  """Returns rows for `without_effect` of the options of experts."""
  experts, sft = has_experts(c), part(c, 'sft')
  names = [f'routing.{name}' for name in vars(part(c, 'routing'))]
  names += ['health.expert_entropy', 'health.expert_idle']
  rl = c.train.iterations and not c.lora.rank
  supervised = sft.trains and not sft.rank
  base = 'whose base is trained (lora.rank = 0, sft.rank = 0)'
  return [
    ('routing.load', rl, f'RL {base}'),
    ('routing.sft_load', supervised, f'supervised training {base}'),
    ('routing.train', rl or supervised, f'training {base}'),
    (' '.join(names), experts, 'a model with experts'),
  ]


def has_experts(c: Any) -> bool:
  """Returns whether the model has experts; True where its config cannot be read."""
  if not c.model.checkpoint:
    return 'experts' in model.PRESETS.get(c.model.preset, {})
  with contextlib.suppress(ValueError):
    folder = hf.locate(c.model.checkpoint, False)
    block = None if c.model.attention_block < 0 else c.model.attention_block
    return 'experts' in hf.read_config(folder, block, c.model.convert)
  return True


def effects(c: Any, given: Container[str]) -> str:
  """Returns one line about the fields of a file or a sweep that have no effect.

  Fields at their defaults are not named. '' if there are none, or if a section is wrong
  itself, which `config` refuses. given: fields of the command line. ValueError if one
  of them has no effect.
  """
  if misfits(c) or section_problems(c := with_block(c))[1]:
    return ''
  found, values = idle(c), flatten(c)
  known = {f'{name}.{x}': p.default(x) for name, p in parts(c) for x in vars(p)}
  known |= {f'reward.weights.{term}': 1.0 for term in c.reward.weights}

  def told(names: list[str]) -> str:
    needs = dict.fromkeys(found[x] for x in names)
    groups = {need: [x for x in names if found[x] == need] for need in needs}
    return '; '.join(
      f'{", ".join(f"{x} = {values[x]!r}" for x in group)} (needs {need})'
      for need, group in groups.items()
    )

  if wrong := told([x for x in found if x in given]):
    raise ValueError(f'without effect: {wrong}: set that, or leave it out')
  # Configs of published models name a preset, by which they are planned.
  rest = [x for x in found if values[x] != known[x] and x != 'model.preset']
  rest = told(rest)
  return f'without effect in this config: {rest}' if rest else ''


# --- rules between sections


def wanted(c: Any) -> tuple[Any, Wants]:
  """Returns the objective's settings, and what it wants."""
  objective = OBJECTIVES[c.objective.name]
  hp = settings(objective.Config, c.objective)
  return hp, objective.wants(hp)


def evaluation(c: Any) -> list[str]:
  """The evaluation's prompt template and samples make sense for this task."""
  styles = ('', *find(c.data.task).styles)
  found = nearest('eval.style', c.eval.style, styles)
  if c.eval.samples > 1 and not c.eval.sampler.temperature:
    found.append(
      f'eval.samples = {c.eval.samples} needs eval.sampler.temperature > 0: '
      'greedy samples are all the same'
    )
  return found


def rewarded(c: Any) -> list[str]:
  """Something pays and grades, under names of its own."""
  task, functions = find(c.data.task), rewards.specs(c.reward.file)
  found = [
    f'reward.file: {name} is a term of data.task = {c.data.task}: rename the function'
    for name in functions
    if c.reward.task and name in task.terms
  ]
  if not (task.graded or functions):
    found.append(
      f'data.task = {c.data.task} has no verifier: set reward.file, or '
      'data.task = prompts:number, :math, :exact or :regex'
    )
  return found


def quantization(c: Any) -> list[str]:
  """A quantized base is frozen, so adapters must train."""
  if c.model.quantize == 'none' or c.lora.rank:
    return []
  return [f'model.quantize = {c.model.quantize} freezes the base: set lora.rank > 0']


def head_chunk(c: Any) -> list[str]:
  """The output head divides completions into equal chunks."""
  chunk, length = c.model.head_chunk, c.sampler.length
  if not chunk or length % chunk == 0:
    return []
  return [f'model.head_chunk = {chunk} must divide sampler.length = {length}']


def pmap(c: Any) -> list[str]:
  """pmap samples with replicated weights."""
  return [
    f'{prefix}sampler.parallel = pmap needs replicated weights: '
    'set mesh.fsdp = mesh.tensor = mesh.expert = 1, or use jit'
    for prefix, section in (('', c.sampler), ('eval.', c.eval.sampler))
    if section.parallel == 'pmap' and c.mesh.fsdp * c.mesh.tensor * c.mesh.expert > 1
  ]


def devices(c: Any, count: int) -> list[str]:
  """Devices form the mesh, and rows divide by them and by the microbatches."""
  split = c.mesh.fsdp * c.mesh.tensor * c.mesh.expert
  if count % split or (c.mesh.data and c.mesh.data * split != count):
    return [
      f'mesh.data, mesh.fsdp, mesh.tensor, mesh.expert = {c.mesh.data}, '
      f'{c.mesh.fsdp}, {c.mesh.tensor}, {c.mesh.expert} must multiply to the {count} '
      'devices (data = 0 takes what is left)'
    ]
  shards = count // c.mesh.tensor
  found, rows = [], c.train.prompts * c.train.group
  pieces = shards * c.train.microbatches
  if rows % pieces:
    found.append(
      f'train.prompts * train.group = {rows} rows must be a multiple of '
      f'{shards} device shards * train.microbatches = {pieces}'
    )
  pieces = shards * c.pairs.microbatches
  if part(c, 'pairs').trains and 2 * c.pairs.batch % pieces:
    found.append(
      f'2 * pairs.batch = {2 * c.pairs.batch} rows must be a multiple of the {shards} '
      f'device shards * pairs.microbatches = {pieces}'
    )
  pieces = shards * c.sft.microbatches
  if part(c, 'sft').trains and c.sft.batch % pieces:
    found.append(
      f'sft.batch = {c.sft.batch} must be a multiple of the {shards} device shards * '
      f'sft.microbatches = {pieces}'
    )
  for name, batch in (
    ('eval.batch', c.eval.batch),
    ('sampler.slots', c.sampler.slots),
    ('eval.sampler.slots', c.eval.sampler.slots),
  ):
    if batch % shards:
      found.append(f'{name} = {batch} must be a multiple of the {shards} device shards')
  for prefix, hp, batch in (
    ('', c.sampler, rows),
    ('eval.', c.eval.sampler, c.eval.batch),
  ):
    if batch % sampler.at_once(hp, batch) and hp.cache in ('prefix', 'dual'):
      found.append(
        f'{prefix}sampler.slots = {hp.slots} must divide the {batch} rows with '
        f'{prefix}sampler.cache = {hp.cache}'
      )
  return found


def attention(c: Any, platform: str) -> list[str]:
  """The attention kernel runs on these devices, and with these samplers."""
  found, kind = [], c.model.attention
  need = {'cudnn': 'gpu', 'splash': 'tpu'}.get(kind, platform)
  if need != platform:
    found.append(
      f'model.attention = {kind} needs a {need}, this is a {platform}: use xla'
    )
  if kind == 'splash' and c.sft.anneal and c.model.attention_block <= 0:
    found.append(
      'sft.anneal needs model.attention = xla or cudnn: splash shows the same keys to '
      'every query'
    )
  for pick in (c.sampler.pick, c.eval.sampler.pick):
    known = sampler.SAMPLERS.get(pick)
    if kind == 'splash' and known and not known.plain:
      found.append(
        f'sampler.pick = {pick} needs model.attention = xla: splash shows the same '
        'keys to every query'
      )
  return found


def fuse(c: Any) -> list[str]:
  """One pass for log p_old and log p_ref needs a shared base."""
  if not c.logprob.fuse:
    return []
  found = []
  if not c.lora.rank or c.logprob.estimator != 'elbo':
    found.append(
      'logprob.fuse = True needs lora.rank > 0 and logprob.estimator = elbo: only '
      'adapters share their base'
    )
  if not plain_reference(c):
    found.append(
      "logprob.fuse = True knows the base alone: set reference.of = ('base',), weight "
      '1, sft.merge = True, and no pairs.path'
    )
  return found


def no_density(s: Any) -> list[str]:
  """Returns why other policies have no log-prob of what a sampler section samples."""
  found = []
  if not s.temperature:
    found.append('sampler.temperature = 0 has no density: set it > 0')
  if s.top_p < 1 or s.top_k:
    found.append(
      f'sampler.top_p = {s.top_p}, sampler.top_k = {s.top_k}: set 1 and 0, since '
      'another policy gives chance to the tokens that were cut'
    )
  return found


def resampling(c: Any) -> list[str]:
  """Groups are sampled again before the buffer is whole."""
  again = f'curriculum.resample = {c.curriculum.resample}'
  if not c.curriculum.resample:
    return []
  found = []
  if c.train.overlap:
    found.append(
      f'{again} grades while it samples: set train.overlap = False, or resample = 0'
    )
  if c.data.bucket:
    found.append(
      f'{again} puts prompts of several rounds into a buffer: set data.bucket = 0'
    )
  return found


def controlled(c: Any) -> list[str]:
  """The pick rule has a number to learn, and the objective the weights for it."""
  law, hp = settings(sampler.SampleConfig, c.sampler), part(c, 'control')
  if not hp.on:
    return []
  if found := sampler.unbound(law):
    return [f'{text} (control.on = True)' for text in found]
  try:
    control.start_of(law)
  except ValueError as error:
    return [str(error)]
  own, wants = wanted(c)
  name = c.objective.name
  if hp.learn != 'gradient' and 'target' not in weighed(c, own)[1]:
    return [
      f'control.learn = {hp.learn} needs target weights, which objective.name = {name} '
      'has not: set control.learn = gradient, or objective.name = dmpo'
    ]
  if hp.learn == 'joint' and set(wants.sequence) != {'old', 'ref'}:
    return [
      f'control.learn = joint needs log p_ref - log p_old in the weights of '
      f'objective.name = {name}: set objective.alpha > 0'
    ]
  return []


def trajectory(c: Any) -> list[str]:
  """Completions have a density along their recorded states."""
  s = c.sampler
  if c.logprob.estimator != 'trajectory':
    return []
  found = [f'{text} (logprob.estimator = trajectory)' for text in no_density(s)]
  if not c.logprob.tail:
    found.append(
      'logprob.tail = False has no meaning along a trajectory: set '
      'logprob.estimator = elbo'
    )
  if not sampler.SAMPLERS[s.pick].records:
    found.append(
      f'sampler.pick = {s.pick} takes tokens back and does not record their states: '
      'set logprob.estimator = elbo'
    )
  if ordered(c).order_from() == 'tokens':
    found.append(
      f'sampler.rank = token: the tokens of sampler.pick = {s.pick} decide the order, '
      'a term that logprob.estimator = trajectory lacks; set sampler.rank = max, or '
      'sampler.order_logp = True, which records it'
    )
  return found


def ordered(c: Any) -> sampler.SampleConfig:
  """Returns the sampler of rollouts, with the order of an exact draft's steps."""
  hp, how = settings(sampler.SampleConfig, c.sampler), part(c, 'draft')
  return how.followed(hp) if how.of and how.rollouts else hp


def drafts(c: Any) -> list[str]:
  """The draft has weights, a gate that judges, and rollouts that can be trained."""
  how, s, found = part(c, 'draft'), c.sampler, []
  if not how.of:
    return []
  if c.control.on:
    found.append(
      f"draft.of = {how.of} writes by its own pick rule and does not read a row's own "
      'number: set control.on = False'
    )
  if how.of == 'base' and not c.lora.rank:
    found.append(
      'draft.of = base is the model without adapters: set lora.rank > 0, or name a '
      'directory'
    )
  if how.gate == 'reward' and how.judge == 'task' and find(c.data.task).partial is None:
    tasks = ' or '.join(name for name, task in TASKS.items() if task.partial)
    found.append(
      f'draft.judge = task: data.task = {c.data.task} has no check of answers that are '
      f'not finished ({tasks} has one): set draft.judge = format or FILE.py:NAME'
    )
  trained = how.rollouts and c.train.iterations
  for name, section in (('sampler', s), ('eval.sampler', c.eval.sampler)):
    if section.parallel == 'pmap' and (trained or name != 'sampler'):
      found.append(f'{name}.parallel = pmap has no drafts: set jit')
  if not trained:
    return found
  if s.order_logp:
    found.append(
      'sampler.order_logp = True: a draft has no log-prob of its order, set False, or '
      'draft.rollouts = False'
    )
  extra = set(wanted(c)[1].records or ()) - {'entropy'}
  if how.gate == 'exact' and extra:
    found.append(
      f'objective.name = {c.objective.name} reads {", ".join(sorted(extra))} of the '
      "sampler's own steps, which draft.gate = exact takes from the draft: set another "
      'gate, or draft.rollouts = False'
    )
  if c.routing.replay or c.routing.measure:
    found.append(
      'routing.replay and routing.measure read the experts of every step, which a '
      'draft does not record: set both False, or draft.rollouts = False'
    )
  return found


def replay(c: Any) -> list[str]:
  """There are recorded states whose experts can be replayed."""
  if not (c.routing.replay and c.train.iterations):
    return []
  found, (_, wants) = [], wanted(c)
  scored = c.health.measure or wants.sequence
  along = c.logprob.estimator == 'trajectory' and scored
  if not along and wants.records is None:
    found.append(
      'routing.replay = True: masks that are drawn anew are no recorded state, and '
      f'objective.name = {c.objective.name} has no others here; set '
      'logprob.estimator = trajectory where it scores log-probs, objective.masks = '
      'rounds (dmpo), or an objective of recorded steps, such as tracerl'
    )
  if c.sampler.cache in ('prefix', 'dual'):
    found.append(
      f'routing.replay = True: sampler.cache = {c.sampler.cache} keeps keys and values '
      'of older states, which no pass of the trainer repeats; set none'
    )
  return found


def rollouts(c: Any) -> list[str]:
  """The completions of a group differ, and adapters are laid on their own base."""
  found, s = [], c.sampler
  drawn = s.temperature or s.rank_temperature or sampler.SAMPLERS[s.pick].drawn
  if c.train.iterations and not drawn:
    found.append(
      'sampler.temperature = 0: the train.group completions of a prompt would all be '
      'the same, and teach nothing: set it > 0'
    )
  sft = part(c, 'sft')
  if c.lora.path and sft.trains:
    found.append(
      f'{sft.length_of()} would change the base that lora.path was trained on: set 0'
    )
  return found


def supervised(c: Any) -> list[str]:
  """RL can begin where supervised training ends, and its head is cut evenly."""
  found, sft = [], part(c, 'sft')
  texts, unit = sft.trains and (sft.path or sft.length), sft.bucket or sft.length
  name = f'{"sft.bucket" if sft.bucket else "sft.length"} = {unit}'
  chunk, cudnn = c.model.head_chunk, c.model.attention == 'cudnn'
  if texts and chunk and (not unit or unit % chunk):
    found.append(f'model.head_chunk = {chunk} must divide {name}, which must be > 0')
  if texts and cudnn and (not unit or unit % 2):
    found.append(f'model.attention = cudnn trains on even lengths: {name} must be even')
  if not sft.goes_on:
    return found
  targets = sft.targets or c.lora.targets
  pairs = ('rank', sft.rank), ('alpha', sft.alpha), ('targets', targets)
  if other := [name for name, value in pairs if value != c.lora[name]]:
    found.append(
      'sft.merge = False: RL goes on with the adapters of supervised training, so '
      + ', '.join(f'lora.{x} = {c.lora[x]!r}' for x in other)
      + f' must be {", ".join(f"sft.{x} = {dict(pairs)[x]!r}" for x in other)}'
    )
  return found


def objective_sampler(c: Any) -> list[str]:
  """The sampler gives what the objective learns from."""
  s, objective = c.sampler, OBJECTIVES[c.objective.name]
  _, wants = wanted(c)
  found = []
  if wants.records is not None and not sampler.SAMPLERS[s.pick].records:
    found.append(f'sampler.pick = {s.pick} has no recorded steps: set another pick')
  found += no_density(s) if wants.law else []
  if wants.law and s.guidance:
    found.append(
      f'sampler.guidance = {s.guidance}: set 0, since the loss is of the network '
      'without it'
    )
  found += objective.sampler_problems(ordered(c))
  return [f'{text} (objective.name = {c.objective.name})' for text in found]


def old_policy(c: Any) -> list[str]:
  """log p_old and log p_theta are comparable."""
  found, o, e = [], c.objective, c.logprob
  _, wants = wanted(c)
  if c.lora.dropout and compares_old(wants):
    found.append(
      f'lora.dropout = {c.lora.dropout}: objective.name = {o.name} compares log '
      'p_theta with log p_old, which has no dropout: set 0'
    )
  if 'old' not in wants.elbo or wants.common_masks:
    return found
  why, whole = 'log p_old and log p_theta are compared', c.model.attention_block <= 0
  found += [
    f'logprob.{field} = {e[field]} must be objective.{field} = {o[field]}: {why}'
    for field in ('low', 'high', 'antithetic')
    if whole and field in o and e[field] != o[field]
  ]
  if whole and e.elbo != 'paper':
    found.append(f'logprob.elbo = {e.elbo} must be paper: {why}')
  if 'loss_tail' in o and not o.loss_tail:
    found.append(
      f'objective.loss_tail = False: {why}, and log p_old has the tail: set True, or '
      '(baseline model) objective.common_masks = True'
    )
  return found


def only_base(c: Any) -> bool:
  """Whether p_ref is made of the base alone, as supervised training left it."""
  return tuple(c.reference.of) == ('base',) and tuple(c.reference.weights) == (1.0,)


def plain_reference(c: Any) -> bool:
  """Whether p_ref is the frozen base, without any adapters."""
  return only_base(c) and not keeps_adapters(c)


def keeps_adapters(c: Any) -> bool:
  """Whether RL goes on with adapters that were trained before it."""
  return part(c, 'sft').goes_on or bool(part(c, 'pairs').trains and c.lora.rank)


def reference(c: Any) -> list[str]:
  """p_ref can be computed, and the objective reads it."""
  found, r = [], c.reference
  averaged = 'moving' in r.of and r.mix < 1
  if averaged and not c.lora.rank and c.model.param_dtype != 'float32':
    found.append(
      f'reference.mix = {r.mix} is lost in rounding: set model.param_dtype = float32, '
      'or lora.rank > 0'
    )
  if only_base(c):
    return found
  name, (_, wants) = c.objective.name, wanted(c)
  reads = any('ref' in x for x in (wants.sequence, wants.elbo, wants.views))
  if not (reads or part(c, 'pairs').trains):
    found.append(
      f'reference.of = {r.of}: objective.name = {name} reads no log p_ref, set '
      "('base',)"
    )
  if 'ref' in wants.views and tuple(r.weights) != (1.0,):
    found.append(
      f'reference.of = {r.of}, reference.weights = {r.weights}: set one name with '
      f'weight 1; objective.name = {name} compares single tokens, whose laws have '
      'no normalised mean'
    )
  return found


def bounds(c: Any) -> list[str]:
  """Health rules bound numbers that this objective has."""
  found, h = [], c.health
  hp, wants = wanted(c)
  if h.kl and not (h.measure or {'old', 'ref'} <= set(wants.sequence)):
    found.append(
      f'health.kl = {h.kl} needs health.measure = True: this objective works without '
      'log p_old or log p_ref'
    )
  if h.ess and 'ess' not in weighed(c, hp)[2]:
    found.append(
      f'health.ess = {h.ess}: objective.name = {c.objective.name} has no effective '
      'sample size, set 0'
    )
  return found


def weighed(c: Any, hp: Any) -> Any:
  """Returns what an objective's `weigh` returns, as shapes."""
  groups = [jax.ShapeDtypeStruct((1, 2), jnp.float32)] * 4
  guess = jax.ShapeDtypeStruct((1, 2, 1), jnp.float32)
  number, step = (jax.ShapeDtypeStruct((2, 1), x) for x in (jnp.float32, jnp.int32))
  record, objective = Record(step, number, number, {}), OBJECTIVES[c.objective.name]

  def weigh(record, *args):
    steps = {'record': record, 'block': 0, 'tokens': record.order}
    return objective.weigh(Scored(*args, **steps), hp)

  return jax.eval_shape(weigh, record, *groups, guess)


# Each rule, with the sections that must be right themselves before it can be asked.
RULES: dict[Callable[[Any], list[str]], tuple[str, ...]] = {
  evaluation: ('data', 'eval', 'eval.sampler'),
  rewarded: ('data', 'reward'),
  quantization: ('model', 'lora'),
  head_chunk: ('model', 'sampler'),
  pmap: ('mesh', 'sampler', 'eval.sampler'),
  fuse: ('logprob', 'lora', 'pairs', 'reference', 'sft'),
  trajectory: ('draft', 'logprob', 'sampler'),
  drafts: (
    'control',
    'data',
    'draft',
    'eval.sampler',
    'lora',
    'objective',
    'routing',
    'sampler',
  ),
  replay: ('health', 'logprob', 'objective', 'routing', 'sampler', 'train'),
  rollouts: ('lora', 'sampler', 'sft', 'train'),
  supervised: ('lora', 'model', 'sft'),
  objective_sampler: ('draft', 'objective', 'sampler'),
  resampling: ('curriculum', 'data', 'train'),
  controlled: ('control', 'objective', 'sampler'),
  old_policy: ('objective', 'logprob', 'lora'),
  reference: ('objective', 'pairs', 'reference'),
  bounds: ('objective', 'health'),
}


# --- how two configs differ

# Beginnings of fields that do not change what a run computes (but for the rounding of
# another mesh, and for when `health` ends the run): they may differ when it is resumed.
FREE = (
  'log.', 'checkpoint.', 'mesh.', 'health.', 'cache', 'reward.workers',
  'reward.deadline', 'reward.seconds', 'reward.process', 'reward.sandbox',
  'reward.python', 'reward.memory',
)  # fmt: skip
# The fields that training does not read: the default workdir is named without them.
UNNAMED = (*FREE, 'eval.', 'data.test_size')
# And those with which a run may be evaluated otherwise than it was trained.
JUDGING = (*UNNAMED, 'reward.', 'data.protocol', 'data.path', 'draft.')


def plain(c: Any) -> dict[str, Any]:
  """Returns {'section.field': value} as JSON gives it back: tuples become lists."""
  return flatten(json.loads(c.to_json()))


def changes(old: dict[str, Any], new: dict[str, Any], free: tuple[str, ...]) -> str:
  """Returns the differences of two of `plain`, but in fields that begin as `free`.

  Only the first ones are listed; a workdir of another version has many.
  """
  found = [
    f'{k}: {old.get(k)!r} there, {new.get(k)!r} here'
    for k in sorted(old.keys() | new.keys())
    if old.get(k) != new.get(k) and not k.startswith(free)
  ]
  more = len(found) - 8
  tail = [f'and {more} more, as a workdir of another version has'] if more > 0 else []
  return '; '.join(found[:8] + tail)
