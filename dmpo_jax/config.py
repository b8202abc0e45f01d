"""The settings of a run: every field once, with its default and its own rules.

A part with a module of its own keeps its dataclass there: sampler.SampleConfig,
logprob.LogprobConfig, health.Config, optim.Config, and the `Config` of each objective.
The other sections are the dataclasses below. `section` makes a section of a ConfigDict
from one of them; configs/base.py puts the sections together. `problems()` of a class
lists the values that are out of range, by rules.py. Rules between sections are in
check.py.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from dmpo_jax import (
  control,
  curriculum,
  health,
  logprob,
  model,
  optim,
  pairs,
  routing,
  sampler,
)
from dmpo_jax.data import PromptOptions
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.objectives.shared import Common
from dmpo_jax.objectives.vrpo import Preference
from dmpo_jax.rules import (
  Section,
  above,
  chance,
  finite,
  least,
  nearest,
  one_of,
  positive_share,
  rates,
  without_effect,
)
from dmpo_jax.tasks import TASKS, find, readers, rewards, sandbox
from dmpo_jax.types import TaskOptions, Wants

SIZES = ('width', 'layers', 'heads', 'kv_heads', 'mlp')  # fields of Model


# --- complaints


def missing_file(field: str, path: str) -> list[str]:
  """Returns the complaint about a file that does not exist; '' names none."""
  return (
    [f'{field} = {path!r}: no such file'] if path and not os.path.isfile(path) else []
  )


# --- sections


@dataclasses.dataclass(frozen=True)
class Model(Section):
  """Which network is trained, and how it is computed."""

  OWN = {
    'preset': one_of(*model.PRESETS),
    'quantize': one_of('none', *model.QUANT),
    'remat': one_of(*model.REMAT),
    'attention': one_of(*model.ATTENTION),
    'attention_block': least(-1),
    'convert': one_of('', 'masked', 'shifted', 'block'),
    'attention_grid': one_of('text', 'prompt'),
    'dtype': one_of('float32', 'bfloat16'),
    'param_dtype': one_of('float32', 'bfloat16'),
  }

  checkpoint: str = ''  # Hugging Face directory or hub name; '' = random weights
  # What an autoregressive checkpoint (Qwen2, Qwen3, Llama) becomes: masked (predicts in
  # place) | shifted (output i - 1 predicts token i) | block (in place, block-causal);
  # '' = the checkpoint is a diffusion model.
  convert: str = ''
  # convert: the token that becomes the mask; '' = a new token <|mask|>.
  mask_token: str = ''
  preset: str = 'tiny'  # sizes of a network without checkpoint; see model.PRESETS
  width: int = 0  # model dimension D; 0 = the preset's
  layers: int = 0  # number of layers N; 0 = the preset's
  heads: int = 0  # attention heads H; 0 = the preset's
  # Key/value heads, fewer than heads for GQA; 0 = the preset's, or as many as heads
  # where the preset has as many.
  kv_heads: int = 0
  mlp: int = 0  # inner width F of the SwiGLU; 0 = the preset's
  dtype: str = 'float32'  # of matrix products; float32 | bfloat16
  param_dtype: str = 'float32'  # of stored parameters; float32 | bfloat16
  quantize: str = 'none'  # the frozen base under adapters; none | int8 | nf4
  remat: str = 'none'  # recomputed in the backward pass; none | dots | full
  attention: str = 'xla'  # kernel; xla | cudnn (GPU, bfloat16) | splash (TPU)
  # Tokens of an attention block (SDAR, A2D's bd3lm); 0 = attention over the whole
  # text; -1 = the checkpoint's own, else the preset's.
  attention_block: int = -1
  # Where attention blocks begin: text (its first token) | prompt (its end: dllm's
  # sampler for bd3lm).
  attention_grid: str = 'text'
  head_chunk: int = 0  # completion positions per call of the output head; 0 = all

  def idle(self) -> dict[str, str]:
    planned = 'vocab' in model.PRESETS.get(self.preset, {})  # a published model's sizes
    return without_effect(
      ('preset', not self.checkpoint, "model.checkpoint = ''"),
      ('convert', self.checkpoint or planned, 'model.checkpoint'),
      ('mask_token', self.convert, 'model.convert = masked, shifted or block'),
    )

  def problems(self) -> list[str]:
    found = super().problems()
    values = {name: getattr(self, name) for name in SIZES}
    changed = [f'model.{name} = {value}' for name, value in values.items() if value]
    if self.checkpoint and changed:
      found.append(f'{", ".join(changed)}: set 0, model.checkpoint has its own sizes')
    block = self.attention_block
    if self.convert == 'block' and block <= 0:
      found.append(
        f'model.attention_block = {block}: model.convert = block needs the tokens of '
        'an attention block, such as 32'
      )
    if self.convert in ('masked', 'shifted') and block > 0:
      found.append(
        f'model.attention_block = {block}: model.convert = {self.convert} makes a '
        'model that sees the whole text; set -1, or model.convert = block'
      )
    if self.attention == 'cudnn' and self.dtype != 'bfloat16':
      found.append(
        f'model.attention = cudnn needs model.dtype = bfloat16, not {self.dtype}'
      )
    return found


@dataclasses.dataclass(frozen=True)
class Lora(Section):
  """Low-rank adapters."""

  OWN = {'alpha': above(0), 'dropout': chance, 'dtype': one_of('float32', 'bfloat16')}

  rank: int = 0  # rank A; 0 = no adapters, every parameter is trained
  alpha: float = 64.0  # the adapter's output is scaled by alpha / rank
  # Adapted linears; all (but those of experts) | experts (those as well) | paper (q, k,
  # v, up) | a regex.
  targets: str = 'all'
  dropout: float = 0.0  # on the adapters' input in updates; probability, 0 = none
  # Of the adapters' matrix products; float32 | bfloat16 (as PEFT under autocast, where
  # model.dtype is bfloat16). The adapters are stored in float32.
  dtype: str = 'float32'
  path: str = ''  # PEFT adapter directory to start from; '' = a new adapter

  def idle(self) -> dict[str, str]:
    return without_effect(('alpha targets dropout dtype', self.rank, 'lora.rank > 0'))

  def problems(self) -> list[str]:
    found = super().problems()
    if not self.rank and (self.dropout or self.path):
      found.append('lora.dropout and lora.path need lora.rank > 0')
    return found


@dataclasses.dataclass(frozen=True)
class Data(Section, TaskOptions, PromptOptions):
  """The problems, their prompts, and their grading; extends two dataclasses."""

  OWN = {
    'protocol': one_of('strict', 'paper'),
    'overlong': one_of('error', 'drop', 'cut'),
    'held': one_of('problem', 'numbers'),
  }

  # A name in tasks.TASKS, prompts:VERIFIER, gym:NAME, or FILE.py:NAME of your own.
  task: str = 'sudoku'
  tokenizer: str = ''  # char | a directory; '' = the checkpoint's, else char
  protocol: str = 'strict'  # grading rules; strict (correct) | paper (as published)
  bucket: int = 0  # pads a buffer's prompts to a multiple of so many tokens; 0 = to P

  def idle(self) -> dict[str, str]:
    rows = [
      ('overlong', self.prompt_length, 'data.prompt_length > 0'),
      ('bucket', not self.attend_padding, 'data.attend_padding = False'),
    ]
    kind, task = 'file' if self.path else 'generated', find(self.task)
    options = {}  # option -> [task (kind of problems) that reads it]
    for name, kinds_ in readers().items():
      for where, names in kinds_.items():
        for option in names:
          options.setdefault(option, []).append(f'{name} ({where})')
    for option, names in options.items():
      known = not task.options or option in task.options.get(kind, ())
      rows.append((option, known, f'data.task = {" or ".join(names)}'))
    return without_effect(*rows)

  def problems(self) -> list[str]:
    found = super().problems() + missing_file('data.template', self.template)
    found += missing_file('data.drop', self.drop)
    try:
      found += nearest('data.style', self.style, find(self.task).styles)
      self.own()
    except ValueError as error:
      found.append(str(error))
    return found


TERMS = tuple(dict.fromkeys(term for task in TASKS.values() for term in task.terms))


@dataclasses.dataclass(frozen=True)
class Reward(Section):
  """How completions are rewarded."""

  OWN = {
    'deadline': above(0),
    'seconds': above(0),
    'process': one_of('worker', 'trainer'),
    'memory': least(64),
    'sandbox': one_of(*sandbox.LEVELS),
  }

  # Functions of your own, FILE.py:NAME,NAME (docs/own.md); '' = the task's alone.
  file: str = ''
  task: bool = True  # False: only the functions of reward.file are paid
  # Function whose value, in [0, 1], is the grade; '' = the task's grade, and the first
  # function's where the task has none.
  grade: str = ''
  # Where functions run: worker (a process without accelerator, killed at its limit) |
  # trainer (a thread beside the trainer, with its devices).
  process: str = 'worker'
  seconds: float = 120.0  # time limit of a function's call on a batch; seconds
  workers: int = 0  # processes that compare expressions or run programs; 0 = cores
  deadline: float = 3.0  # of one comparison, of a program's tests; seconds of CPU
  # What keeps programs from this machine: auto (the best that works, or none is run) |
  # bwrap | namespaces | rlimits (limits alone: for a container of its own).
  sandbox: str = 'auto'
  # Interpreter of programs, with its installed packages; '' = ours without any.
  python: str = ''
  memory: int = 512  # address space of a program's process; MiB
  # Factor of each reward term of the task, and of each function of reward.file; 0 = it
  # does not count.
  weights: Any = dataclasses.field(default_factory=lambda: dict.fromkeys(TERMS, 1.0))

  def idle(self) -> dict[str, str]:
    return without_effect(('task grade process seconds', self.file, 'reward.file'))

  def problems(self) -> list[str]:
    found = super().problems() + missing_file('reward.python', self.python)
    try:
      names = rewards.specs(self.file)
      rewards.check(self.file)
      if self.grade and names:
        found += nearest('reward.grade', self.grade, names)
    except ValueError as error:
      found.append(str(error))
    return found + [
      f'reward.weights.{name} = {weight} {wrong}'
      for name, weight in self.weights.items()
      if (wrong := finite(weight))
    ]


@dataclasses.dataclass(frozen=True)
class Sft(Section):
  """Supervised fine-tuning before RL, on the task's solutions or on files of texts."""

  NAME = 'sft'
  OWN = {
    **dict.fromkeys(('batch', 'microbatches', 'levels'), least(1)),
    'anneal': least(0),
    **dict.fromkeys(('held_out', 'dropout'), chance),
    'decay': one_of(*optim.DECAYS),
    'alpha': above(0),
    'turns': one_of('all', 'last'),
    'overlong': one_of('error', 'drop', 'cut'),
    'mean': one_of('row', 'token'),
    'law': one_of('uniform', 'cosine', 'count'),
  }
  WHOLE_TEXT = {'law': 'uniform', 'low': 1e-3, 'high': 1.0}

  steps: int = 0  # supervised updates; 0 = as epochs says
  epochs: int = 0  # passes over the texts; 0 = as steps says, or no training
  # Updates in which attention goes from causal to the model's own: a growing share of
  # the later tokens is seen, or the attention block grows; 0 = at once.
  anneal: int = 0
  batch: int = 128  # rows per update
  microbatches: int = 1  # microbatches of an update, for gradient accumulation
  lr: float = 2e-3  # learning rate after warm-up
  warmup: int = 20  # updates of linear warm-up; 0 = none
  decay: str = 'constant'  # to zero at the last update; constant | linear | cosine
  weight_decay: float = 0.0  # AdamW, on matrices; 0 = none
  clip: float = 1.0  # largest global norm of the gradient; 0 = no clipping
  rank: int = 0  # rank of the adapters that are trained; 0 = all parameters
  alpha: float = 64.0  # the adapter's output is scaled by alpha / rank
  targets: str = ''  # adapted linears, as lora.targets; '' = the same
  dropout: float = 0.0  # on the adapters' input; probability, 0 = none
  # True: adapters are added to the base before RL, and RL begins with new ones.
  # False: RL goes on with them, and its reference is the base with them as they are.
  merge: bool = True
  path: tuple = ()  # files or hub names of texts; () = the task's training problems
  weights: tuple = ()  # how often an epoch has each text of a file; () = once
  turns: str = 'all'  # answers of a dialogue that are learned; all | last
  # Tokens of a text, prompt and answer. 0 = the longest text of sft.path; without it
  # the prompt's and sampler.length.
  length: int = 0
  overlong: str = 'error'  # texts above it; error | drop | cut (no EOS then)
  bucket: int = 0  # pads a text to a multiple of so many tokens; 0 = to sft.length
  fill: bool = True  # True: that padding is EOS, and learned; False: none is seen
  mean: str = 'row'  # of the loss; row (each row alike) | token (each token alike)
  # Law of the share of masked tokens; uniform | cosine | count. Attention blocks have
  # their own, as count.
  law: str = 'uniform'
  low: float = 1e-3  # uniform, cosine: lower end of the rate
  high: float = 1.0  # uniform, cosine: upper end of the rate, at most 1
  held_out: float = 0.0  # share of the texts that is held out; 0 = none
  every: int = 100  # updates between losses of the held-out texts; 0 = only at the end
  levels: int = 8  # masked shares at which that loss is taken

  @property
  def trains(self) -> bool:
    return bool(self.steps or self.epochs)

  def length_of(self) -> str:
    """Returns the field that says how long it trains, and its value."""
    return f'sft.epochs = {self.epochs}' if self.epochs else f'sft.steps = {self.steps}'

  @property
  def goes_on(self) -> bool:
    """Whether RL goes on with the adapters of supervised training."""
    return bool(self.trains and self.rank and not self.merge)

  def idle(self) -> dict[str, str]:
    names = [x for x in vars(self) if x not in ('steps', 'epochs')]
    texts = self.path or self.length
    return without_effect(
      ('alpha targets dropout merge', self.rank, 'sft.rank > 0'),
      ('weights turns', self.path, 'sft.path'),
      ('bucket fill', texts, 'sft.path or sft.length > 0'),
      ('low high', self.law != 'count', 'sft.law = uniform or cosine'),
      ('every levels', self.held_out, 'sft.held_out > 0'),
      (' '.join(names), self.trains, 'sft.steps > 0 or sft.epochs > 0'),
    )

  def problems(self) -> list[str]:
    found = super().problems()
    if self.steps and self.epochs:
      found.append(
        f'sft.steps = {self.steps} and sft.epochs = {self.epochs}: set one of them to 0'
      )
    if not all(isinstance(name, str) and name for name in self.path):
      found.append(f'sft.path = {self.path} must hold names of files')
    if self.weights and len(self.weights) != len(self.path):
      found.append(
        f'sft.weights = {self.weights} must hold a weight for each of sft.path = '
        f'{self.path}'
      )
    if any(above(0)(w) for w in self.weights):
      found.append(f'sft.weights = {self.weights} must be > 0')
    if self.steps and self.anneal > self.steps:
      found.append(
        f'sft.anneal = {self.anneal} must be at most sft.steps = {self.steps}: '
        "attention would not become the model's own"
      )
    right = 0 < self.low < self.high <= 1
    return found + rates(self, right, '0 < low < high <= 1')


@dataclasses.dataclass(frozen=True)
class Pairs(Preference):
  """Training on preference pairs, after supervised training and before RL: DPO."""

  NAME = 'pairs'
  OWN = {
    **Preference.OWN,
    **dict.fromkeys(('each', 'epochs', 'batch', 'microbatches'), least(1)),
    'choose': one_of(*pairs.CHOOSE),
    'overlong': one_of('error', 'drop'),
    'held_out': chance,
  }

  # Files of pairs, or workdirs of runs with log.rollouts = True, from which pairs are
  # made; () = no such training.
  path: tuple = ()
  each: int = 2  # workdirs: pairs of a problem at most
  last: int = 0  # workdirs: newest buffers of each that are used; 0 = all
  choose: str = 'longest'  # workdirs: which clean completions are chosen; or random
  # workdirs: completions that may be rejected: wrong, and unclean (right, but cut,
  # looped, without the format, or with another result in the reasoning).
  classes: tuple = pairs.CLASSES
  overlong: str = 'error'  # pairs that do not fit sampler.length; error | drop
  epochs: int = 1  # passes over the pairs
  batch: int = 32  # pairs per update
  microbatches: int = 1  # microbatches of an update, for gradient accumulation
  lr: float = 5e-7  # learning rate after warm-up; below RL's
  warmup: int = 10  # updates of linear warm-up; 0 = none
  beta: float = 0.1  # inverse temperature of the ELBO gap
  held_out: float = 0.0  # share of the problems whose pairs are held out; 0 = none
  every: int = 0  # updates between accuracies of the held-out pairs; 0 = at the end

  @property
  def trains(self) -> bool:
    return bool(self.path)

  def number(self, x: float) -> str:
    return least(0)(x)

  def idle(self) -> dict[str, str]:
    made = self.trains and not os.path.isfile(str(self.path[0]))
    return without_effect(
      ('each last choose classes', made, 'a workdir in pairs.path'),
      ('every', self.held_out, 'pairs.held_out > 0'),
      (' '.join(set(vars(self)) - {'path'}), self.trains, 'pairs.path'),
    )

  def problems(self) -> list[str]:
    found = super().problems()
    if not all(isinstance(name, str) and name for name in self.path):
      found.append(f'pairs.path = {self.path} must hold names of files or workdirs')
    kinds = {os.path.isfile(name) for name in map(str, self.path)}
    if len(kinds) > 1:
      found.append(f'pairs.path = {self.path}: name files or workdirs, not both')
    if not self.classes or set(self.classes) - set(pairs.CLASSES):
      found.append(
        f'pairs.classes = {self.classes} must be of {", ".join(pairs.CLASSES)}'
      )
    return found


@dataclasses.dataclass(frozen=True)
class Sampler(sampler.SampleConfig):
  """How completions are sampled (sampler.SampleConfig), and on which program."""

  OWN = {**sampler.SampleConfig.OWN, 'parallel': one_of('jit', 'pmap')}

  length: int = 16  # L, tokens of a completion
  block: int = 16  # W, tokens of a block; blocks are unmasked from left to right
  steps: int = 16  # unmasking steps of a completion; scheduled picks only
  rank: str = 'max'  # max: the order of unmasking is a function of the state alone
  parallel: str = 'jit'  # jit | pmap (small models, replicated on every device)


@dataclasses.dataclass(frozen=True)
class Reference(Section):
  """The reference policy p_ref: a mean of the policies p_k."""

  OWN = {
    'every': least(1),
    'mix': positive_share,
    'mean': one_of('geometric', 'harmonic'),
  }

  of: tuple = ('base',)  # each is base | moving (average of the policy) | a directory
  weights: tuple = (1.0,)  # of each, in the mean
  # geometric: the product of p_k ** weight_k | harmonic: 1 / sum of weight_k / p_k.
  mean: str = 'geometric'
  clip: float = 0.0  # nats that log p_k of a text may lie off the first's; 0 = any
  every: int = 1  # moving: updates between its steps
  mix: float = 1.0  # moving: share of the policy in a step, in (0, 1]; 1 = a copy

  def idle(self) -> dict[str, str]:
    return without_effect(
      ('every mix', 'moving' in self.of, 'moving in reference.of'),
      ('mean clip', len(self.of) > 1, 'several names in reference.of'),
    )

  def problems(self) -> list[str]:
    found = super().problems()
    if len(self.weights) != len(self.of) or not self.of:
      found.append(
        f'reference.weights = {self.weights} must hold a weight for each of '
        f'reference.of = {self.of}'
      )
    if any(above(0)(w) for w in self.weights):
      found.append(f'reference.weights = {self.weights} must be > 0')
    elif self.mean == 'harmonic' and abs(sum(self.weights) - 1) > 1e-3:
      found.append(
        f'reference.weights = {self.weights} must add up to 1 with reference.mean = '
        'harmonic'
      )
    return found


@dataclasses.dataclass(frozen=True)
class Train(Section):
  """The RL loop."""

  OWN = {
    **dict.fromkeys(('prompts', 'inner', 'microbatches'), least(1)),
    'group': least(2),
  }

  iterations: int = 100  # rollout buffers; 0 = no RL
  prompts: int = 8  # prompts B in a buffer
  group: int = 16  # completions G of each prompt
  inner: int = 2  # updates I on each buffer
  microbatches: int = 4  # microbatches M of an update, for gradient accumulation
  overlap: bool = False  # True: sample the next buffer before this one's updates


SET = r'[\w-]+:( +data\.\w+=\S+)+'  # in Eval.sets


@dataclasses.dataclass(frozen=True)
class Eval(Section):
  """Validation during training, and --mode=eval. Its sampler is a section inside."""

  OWN = dict.fromkeys(('batch', 'samples'), least(1))

  every: int = 10  # buffers between validations; 0 = only at the end
  batch: int = 128  # rows per call
  style: str = ''  # prompt template of validation and test; '' = data.style
  template: str = ''  # file of that template; '' = as eval.style says
  lengths: tuple = ()  # completion lengths of --mode=eval; () = eval.sampler.length
  samples: int = 1  # completions of a problem in --mode=eval
  # Other problems that --mode=eval judges beside the test split, a card each. Each is
  # 'NAME: data.field=value ..', such as 'hard: data.min_blanks=10 data.max_blanks=12'.
  sets: tuple = ()

  def idle(self) -> dict[str, str]:
    return without_effect(('style', not self.template, "eval.template = ''"))

  def problems(self) -> list[str]:
    found = super().problems() + missing_file('eval.template', self.template)
    if not all(type(n) is int and n > 0 for n in self.lengths):
      found.append(
        f'eval.lengths = {self.lengths} must be whole numbers > 0, such as "(128, 256)"'
      )
    wrong = [text for text in self.sets if not re.fullmatch(SET, str(text))]
    names = [str(text).partition(':')[0] for text in self.sets]
    if wrong or len(names) > len(set(names)):
      found.append(
        f'eval.sets = {self.sets}: each must be "NAME: data.field=value ..", and no '
        'name may come twice'
      )
    return found


@dataclasses.dataclass(frozen=True)
class Checkpoint(Section):
  """When the training state is saved."""

  OWN = dict.fromkeys(('every', 'keep'), least(1))

  every: int = 20  # updates between checkpoints
  every_minutes: float = 0.0  # minutes after which the next update saves; 0 = off
  keep: int = 2  # newest checkpoints that are kept, beside the best by validation


@dataclasses.dataclass(frozen=True)
class Mesh(Section):
  """How devices share the work."""

  OWN = {
    **dict.fromkeys(('fsdp', 'tensor', 'expert', 'cpu'), least(1)),
    'gather': one_of('rollout', 'forward'),
  }

  data: int = 0  # devices that replicate weights; 0 = what the others leave
  fsdp: int = 1  # devices that split weights
  tensor: int = 1  # devices that split heads and MLP
  expert: int = 1  # devices that split the experts of each layer
  cpu: int = 1  # devices that a CPU is split into where it is the only device
  # When devices that split weights (fsdp) gather them to sample and score: rollout
  # (once, to hold them whole for that time) | forward (each time, layer by layer).
  gather: str = 'forward'

  def idle(self) -> dict[str, str]:
    return without_effect(('gather', self.fsdp > 1, 'mesh.fsdp > 1'))


@dataclasses.dataclass(frozen=True)
class Log(Section):
  """What a run writes down beside its metrics."""

  every_seconds: float = 10.0  # seconds between log lines where there is no terminal
  wandb: str = ''  # project of Weights & Biases that gets the metrics, too; '' = none
  samples: int = 2  # completions of a buffer written to samples.jsonl; 0 = none
  rollouts: bool = False  # True: write every buffer to rollouts/, for pairs.path
  stuck_minutes: float = 0.0  # without progress so long the run exits (76); 0 = off


SECTIONS = {
  'model': Model, 'lora': Lora, 'data': Data, 'reward': Reward, 'sft': Sft,
  'pairs': Pairs,
  'sampler': Sampler, 'reference': Reference, 'logprob': logprob.LogprobConfig,
  'routing': routing.Config, 'train': Train, 'curriculum': curriculum.Config,
  'optim': optim.Config, 'control': control.Config,
  'eval': Eval, 'eval.sampler': Sampler, 'draft': sampler.Draft,
  'checkpoint': Checkpoint, 'health': health.Config, 'mesh': Mesh, 'log': Log,
}  # fmt: skip


def section(cls: type, **changes: Any) -> ConfigDict:
  """Returns the fields of a dataclass as a section, at its defaults but `changes`."""
  return ConfigDict(vars(cls(**changes)))


def settings(cls: type, values: Any) -> Any:
  """Returns an instance of a dataclass from the fields of its names in a section."""
  return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})


def part(c: Any, name: str) -> Any:
  """Returns a section of a config as its dataclass; name: such as 'eval.sampler'."""
  values: Any = c
  for key in name.split('.'):
    values = values[key]
  return settings(SECTIONS[name], values)


def flatten(c: Any, prefix: str = '') -> dict[str, Any]:
  """Returns {'section.field': value} of a ConfigDict or of a dict of dicts."""
  out = {}
  for name, value in c.items():
    if hasattr(value, 'items'):
      out |= flatten(value, f'{prefix}{name}.')
    else:
      out[prefix + name] = value
  return out


KINDS = {
  'int': 'a whole number', 'float': 'a number', 'bool': 'True or False',
  'str': 'a text', 'tuple': 'a tuple',
}  # fmt: skip


def kinds(objective: str, own: Iterable[str] = ()) -> dict[str, Any]:
  """Returns {'section.field': type} of the fields of a config with this objective.

  own: reward terms beside those of the built-in tasks.
  """
  hp = OBJECTIVES[objective].Config
  classes = [*SECTIONS.items(), ('objective', Common), ('objective', hp)]
  fields = {
    f'{section}.{field.name}': field.type
    for section, cls in classes
    for field in dataclasses.fields(cls)
    if field.type is not Any
  }
  weights = {f'reward.weights.{term}': float for term in (*TERMS, *own)}
  top = {'name': str, 'seed': int, 'cache': bool, 'objective.name': str}
  return {**top, **fields, **weights}


def own_terms(c: Any) -> tuple[str, ...]:
  """Returns the reward terms that are not a built-in task's: they have weights, too.

  () where the task or the file is wrong, which its section complains of.
  """
  have, found = flatten(c), []
  with contextlib.suppress(ValueError):
    found += find(str(have.get('data.task', ''))).terms
  with contextlib.suppress(ValueError):
    found += rewards.specs(str(have.get('reward.file', '')))
  return tuple(term for term in dict.fromkeys(found) if term not in TERMS)


def adopt(c: Any) -> None:
  """Gives the terms of an own task and of reward.file their weights, 1 each.

  Weights of terms that are gone are dropped, if nobody has changed them.
  """
  if 'reward' not in c or 'weights' not in c.reward:
    return
  weights, own = c.reward.weights, own_terms(c)
  with weights.unlocked():
    for term in [x for x, weight in weights.items() if weight == 1]:
      if term not in (*TERMS, *own):
        del weights[term]
    for term in own:
      if term not in weights:
        weights[term] = 1.0


def misfits(c: Any) -> list[str]:
  """Returns a sentence for each field that is unknown, missing or of a wrong type."""
  have, found = flatten(c), []
  name = have.get('objective.name', 'dmpo')
  if wrong := nearest('objective.name', name, OBJECTIVES):
    return wrong
  own = [term for term in own_terms(c) if f'reward.weights.{term}' in have]
  known = kinds(name, own)
  if lacking := [field for field in known if field not in have]:
    remedy = 'begin with configs.base.get_config() and set single fields'
    if all(field.startswith('objective.') for field in lacking):
      remedy = f'choose the objective by config.choose_objective(c, {name!r})'
    found.append(f'config.{", config.".join(lacking[:3])}: missing; {remedy}')
  else:
    found += [unknown(field, name, own) for field in have if field not in known]
  wide = {float: (int, float), tuple: (list, tuple)}
  return found + [
    f'config.{field} = {have[field]!r} must be {KINDS[kind.__name__]}'
    for field, kind in known.items()
    if field in have
    and not (
      isinstance(have[field], wide.get(kind, kind))
      and isinstance(have[field], bool) == (kind is bool)
    )
  ]


# --- the objective


def compares_old(wants: Wants) -> bool:
  """Whether a loss compares log p_theta of an update with log p_old.

  log p_old is computed without dropout, so the adapters then need dropout 0. An ELBO
  that only `reweigh` reads comes from a pass without dropout itself.
  """
  views = 'old' in wants.views or (wants.records is not None and wants.recorded)
  return views or ('old' in wants.elbo and not wants.reweigh)


def d1(task: str) -> dict[str, Any]:
  """Returns d1's RL recipe for LLaDA-8B (arXiv 2504.12216; its train.yaml).

  16 prompts x 6 completions are the 96 completions of its optimizer step. Its adapters
  are those of configs/llada_countdown.py. Left out: its 4-bit base (model.quantize=nf4
  here), and its cut of prompts to 200 tokens, which would cut the test's too.
  """
  return {
    'train.prompts': 16,
    'train.group': 6,
    'train.inner': 8 if task in ('countdown', 'sudoku') else 12,
    'sampler.length': 256,
    'sampler.block': 32,
    'sampler.steps': 128,
    'sampler.temperature': 0.9,
    'optim.lr': 3e-6,
    'optim.b1': 0.9,
    'optim.b2': 0.99,
    'optim.weight_decay': 0.1,
    'optim.clip': 0.2,
  }


# What a paper's own run of an 8B model sets beside its objective: task -> fields.
RECIPES = {'diffu_grpo': d1}


def choose_objective(c: Any, name: str) -> None:
  """Gives a config the objective `name` at its own defaults.

  Replaces the section `objective`, so that nothing set for another objective stays.
  Sets the sampler fields that the paper needs (Objective.sampler), with at least one
  step per block, and lora.dropout = 0 where log p_theta is compared with log p_old.
  For a published model it also sets the paper's recipe, if RECIPES has one.
  ValueError if there is no such objective.
  """
  if wrong := nearest('objective.name', name, OBJECTIVES):
    raise ValueError(wrong[0])
  objective = OBJECTIVES[name]
  hp = objective.Config()
  c.objective = ConfigDict({'name': name, **vars(hp), **vars(Common())})
  if name in RECIPES and 'vocab' in model.PRESETS[c.model.preset]:
    c.update_from_flattened_dict(RECIPES[name](c.data.task))
  c.sampler.update(objective.sampler)
  c.sampler.steps = max(c.sampler.steps, c.sampler.length // c.sampler.block)
  if compares_old(objective.wants(hp)):
    c.lora.dropout = 0.0


FIRST = ('data.task', 'reward.file')  # they decide which fields reward.weights has


def update(c: Any, fields: Mapping[str, Any]) -> None:
  """Sets {'section.field': value}; objective.name first, by `choose_objective`.

  Then the task and reward.file, whose terms become fields of reward.weights.
  ValueError if the config has no such field, with the nearest one that it has.
  """
  fields = dict(fields)
  if 'objective.name' in fields:
    choose_objective(c, fields.pop('objective.name'))
  known = flatten(c)
  first = {name: fields[name] for name in FIRST if name in fields and name in known}
  c.update_from_flattened_dict(first)
  adopt(c)
  refuse_unknown(c, fields)
  c.update_from_flattened_dict(fields)


def refuse_unknown(c: Any, fields: Iterable[str]) -> None:
  """Raises ValueError for the first field that a config does not have.

  A weight may be unknown because the task or the file that has its term is wrong.
  """
  known = flatten(c)
  for name in fields:
    if name not in known:
      wrong = []
      if name.startswith('reward.weights.'):
        wrong = part(c, 'data').problems() + part(c, 'reward').problems()
      raise ValueError(
        '; '.join(wrong) or unknown(name, c.objective.name, own_terms(c))
      )


def unknown(name: str, objective: str, own: Iterable[str] = ()) -> str:
  """Returns the sentence about a field that a config does not have; own: as `kinds`."""
  head, _, leaf = name.rpartition('.')
  known = kinds(objective, own)
  text = f'config.{name} is not a field'
  beside = {
    field.rpartition('.')[2]: field for field in known if field.startswith(f'{head}.')
  }
  if head == 'objective':
    text += f' of objective.name = {objective}, whose fields are '
    text += ', '.join(field for field in beside if field != 'name')
    known = {}
  close = [beside[x] for x in difflib.get_close_matches(leaf, beside, 1, 0.6)]
  close = close or sorted(field for field in known if field.split('.')[-1] == leaf)
  close = close or difflib.get_close_matches(name, known, 1, 0.6)
  return text + (f'; did you mean {" or ".join(map(repr, close))}?' if close else '')


# --- files and the command line


@contextlib.contextmanager
def in_file(flag: str, file: str) -> Iterator[None]:
  """Turns an error in a config file into one sentence, with its line."""
  try:
    yield
  except Exception as error:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f'line {x.lineno}: ' for x in frames if x.filename == file] or ['']
    what = str(error if isinstance(error, SyntaxError) else (*error.args, error)[0])
    what = ' '.join(what.replace(r'\n', ' ').split())
    # ml_collections lists all fields between the key and the nearest name.
    key = re.match(r'\W*(?:Key ")?(\w+)\W+(?:does not exist|Did you)', what)
    near = re.search(r'Did you mean "(.*?)"', what)
    kind = re.match(r"Could not override field '(\w+)' \S+ (.*) is of .*'(.*)'", what)
    if key:
      what = f'{key[1]} is not a field'
      what += f'; did you mean {near[1]!r}?' if near else ''
    elif kind:
      what = f'{kind[1]} = {kind[2]} must be {KINDS.get(kind[3], kind[3])}'
    elif not isinstance(error, ValueError):
      what = f'{type(error).__name__}: {what}'
    raise ValueError(f'{flag}: {lines[-1]}{what}') from error


def presets() -> str:
  """Returns the folder of the configs of this code; they import it as `configs`.

  It is beside the package in a clone, and inside it where a wheel was installed.
  """
  package = os.path.dirname(os.path.abspath(__file__))
  folders = os.path.join(package, 'configs'), os.path.join(package, '..', 'configs')
  folder = os.path.normpath(next(filter(os.path.isdir, folders), folders[1]))
  found = sys.modules.get('configs')
  if found is None and os.path.isdir(folder):
    start = os.path.join(folder, '__init__.py')
    spec = importlib.util.spec_from_file_location('configs', start)
    assert spec and spec.loader
    sys.modules['configs'] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
  return folder


def in_presets(file: str) -> str:
  """Returns the file of a config; NAME stands for NAME.py among those of this code."""
  folder = presets()
  path = os.path.join(folder, f'{file}.py')
  bare = not os.path.exists(file) and re.fullmatch(r'\w+', file)
  return path if bare and os.path.isfile(path) else file


def load(path: str) -> tuple[ModuleType, Any]:
  """Returns a config file as a module, and its config; path: FILE or FILE:ARGUMENT.

  FILE may be the name of a config of this code, such as quickstart, in any folder.
  ValueError if there is no such file, it refuses the argument, it has an error, or its
  config has not the fields of configs/base.py.
  """
  flag, (file, colon, argument) = f'--config={path}', path.partition(':')
  file = in_presets(file)
  if not os.path.isfile(file):
    folder = os.path.dirname(file)
    there = os.listdir(folder or '.') if os.path.isdir(folder or '.') else []
    if re.fullmatch(r'\w+', file):
      there += [os.path.splitext(name)[0] for name in os.listdir(presets())]
    close = difflib.get_close_matches(os.path.basename(file), there, 1, 0.6)
    hint = f'; did you mean {os.path.join(folder, close[0])}?' if close else ''
    what = (
      'a folder, name a file in it' if os.path.isdir(file) else f'no such file{hint}'
    )
    raise ValueError(f'{flag}: {what}')
  spec = importlib.util.spec_from_file_location('config_file', file)
  if spec is None or spec.loader is None:
    raise ValueError(f'{flag}: {file} is no Python file, such as configs/quickstart.py')
  module = importlib.util.module_from_spec(spec)
  with in_file(flag, file):
    spec.loader.exec_module(module)
  if not callable(getattr(module, 'get_config', None)):
    raise ValueError(f'{flag}: {file} has no function get_config()')
  if colon and not inspect.signature(module.get_config).parameters:
    raise ValueError(f'{flag}: {file} takes nothing after the colon')
  with in_file(flag, file):
    c = module.get_config(*[argument] * bool(colon))
  if not isinstance(c, ConfigDict):
    raise ValueError(
      f'{flag}: get_config() must return the ConfigDict of configs.base.get_config(), '
      f'with changes; it returns a {type(c).__name__}'
    )
  adopt(c)
  if wrong := misfits(c):
    raise ValueError(f'{flag}: ' + '; '.join(wrong))
  return module, c


def sweep_point(module: ModuleType, file: str, sweep: str) -> dict[str, Any]:
  """Returns the fields of point i of a config file's sweep; sweep: 'NAME:i'."""
  name, _, index = sweep.partition(':')
  names = getattr(module, 'SWEEPS', ()) if hasattr(module, 'sweep') else ()
  if name not in names:
    there = f'only {", ".join(names)}' if names else 'no sweep(name)'
    raise ValueError(f'--sweep={name}: {file} has {there}')
  with in_file(f'--sweep={sweep}', file):
    points = list(module.sweep(name))
  if not index.isdecimal() or int(index) >= len(points):
    raise ValueError(
      f'--sweep={sweep!r} must be {name}:i with i from 0 to {len(points) - 1}'
    )
  return points[int(index)]


def override(
  c: Any, overrides: Sequence[str], point: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Sets '--config.section.field=value' flags and a sweep point; locks the config.

  The objective is chosen first, then the point's fields are set, then the flags': an
  explicit field stays in whatever order the flags come. Returns {field: value} of
  the flags. ValueError for an unknown field, one that is set twice, or a bad value.
  """
  texts = [text.removeprefix('--config.').partition('=') for text in overrides]
  names = {name.partition('[')[0] for name, _, _ in texts}
  point = dict(point or {})
  if twice := sorted(names & set(point)):
    raise ValueError(f'{twice} set both by --sweep and by a flag: leave out one')
  chosen = {n: value for n, _, value in texts if n in ('objective.name', *FIRST)}
  update(c, point | chosen)
  refuse_unknown(c, names)
  values, argv = flags.FlagValues(), ['', *overrides]
  try:
    config_flags.DEFINE_config_dict(
      'config', c, lock_config=True, flag_values=values, sys_argv=argv
    )
    values(argv)
  except flags.Error as error:
    raise ValueError(str(error)) from None
  return {name: value for name, value in flatten(c).items() if name in names}
