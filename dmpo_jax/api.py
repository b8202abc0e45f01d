"""The Python API: what `import dmpo_jax as dj` offers in a script or a notebook.

  model = dj.load('GSAI-ML/LLaDA-8B-Instruct')   # or a directory, or a run's workdir
  model.generate(['What is 2 + 2?'], preset='d1')
  model.score(['What is 2 + 2?'], ['4'])
  model = dj.rl(prompts, reward, 'quickstart', overrides={'train.iterations': 100})
  model.save('my-model')

It is a thin layer over the command line's own parts: configs and their overrides, runs
in workdirs that every mode reads, results cards. All prompts of a call that trains or
evaluates are in memory; the folder in which Python runs does not matter.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from dmpo_jax import check, config, grader, runner, runs
from dmpo_jax.build import Built
from dmpo_jax.loaded import Model
from dmpo_jax.tasks import rewards as called
from dmpo_jax.tasks.given import digest_of, examples_of, named, own_task
from dmpo_jax.types import Task

__all__ = ['Model', 'load', 'rl', 'run', 'sft']

Overrides = Mapping[str, Any] | None  # {'section.field': value}
Start = str | os.PathLike | ConfigDict  # what `config_of` takes


# --- where a model or a run begins


def config_of(start: Start, overrides: Overrides = None) -> tuple[Any, str]:
  """Returns (config, workdir) of what a call starts from; the workdir may be ''.

  start: a workdir, a config (quickstart, FILE.py, FILE.py:ARGUMENT or a ConfigDict), or
  a checkpoint: a directory or a hub name. ValueError if it is none of them.
  """
  workdir = ''
  if isinstance(start, ConfigDict):
    c = start.copy_and_resolve_references()
  else:
    path = os.path.expanduser(os.fspath(start))
    name = config.in_presets(path.partition(':')[0])
    if os.path.isfile(name):
      c = config.load(path)[1]
    elif os.path.isdir(path) and 'seed' in runs.read_config(path):
      c, workdir = runs.config_of(path), path
    elif os.path.isdir(path) or path.count('/') == 1:
      c = config.load('base')[1]
      c.model.checkpoint = path
      fit_blocks(c)
    else:
      raise ValueError(
        f'{path!r} is no config, no workdir of a run and no checkpoint: give a name in '
        f'{config.presets()}, a file, a directory, or a hub name (owner/name)'
      )
  with config.in_file('overrides', ''):
    config.update(c, overrides or {})
  return c.lock(), workdir


def fit_blocks(c: Any) -> None:
  """Gives both samplers the attention block of a block-causal checkpoint."""
  block = check.with_block(c).model.attention_block
  for section in (c.sampler, c.eval.sampler) if block > 0 else ():
    length = -(-section.length // block) * block
    section.update(block=block, length=length, steps=length)


def ready(c: Any) -> Built:
  """Settles the process as the command line does; returns the parts of a config."""
  runner.quiet()
  runner.fix_numbers()
  runner.share_gpu()
  try:
    runner.split_cpu(c.mesh.cpu)
  except RuntimeError:  # JAX has its devices already
    pass
  runner.cache_programs(c)
  return runner.ready(c)


def load(start: Start, of: str = '', overrides: Overrides = None) -> Model:
  """Reads a model: a checkpoint's directory or hub name, or the workdir of a run.

  of: latest | best | base, of a workdir; '' = the latest if there is one. A config
  without a run gives its base, such as the random weights of quickstart. overrides:
  {'section.field': value} of the config. ValueError says what is missing.
  """
  if of not in ('', 'latest', 'best', 'base'):
    raise ValueError(f'of = {of!r} must be latest, best or base')
  c, workdir = config_of(start, overrides)
  if of not in ('', 'base') and not workdir:
    raise ValueError(f'of = {of!r} needs the workdir of a run, not {start!r}')
  if workdir:
    runs.refuse_other(c, workdir, check.JUDGING)
  return Model.read(ready(c), workdir, of)


# --- training


def run(start: Start, workdir: str = '', overrides: Overrides = None) -> Model:
  """Trains as `--mode=train` does: a config's own problems and rewards.

  start, workdir, overrides: as in `rl`.
  """
  return in_workdir(fresh_config(start, overrides), workdir, overrides, None, False)


def rl(
  prompts: Sequence,
  reward: Any,
  start: Start,
  workdir: str = '',
  overrides: Overrides = None,
  held_out: Sequence | None = None,
) -> Model:
  """Trains on prompts with a reward function; returns the trained model.

  prompts: texts, or dicts with a `prompt` and columns for the reward. reward: a
  function `fn(prompts, completions, **columns) -> list of numbers`, as trl's, or
  several, whose rewards are added. start, overrides: as in `load`; the config says how
  to train. workdir: '' = runs/NAME-HASH. The same call resumes there. held_out: prompts
  of validation and test; None = the training prompts. Accuracy is the mean reward, with
  each reward cut to 0 to 1.
  """
  rewards = list(reward) if isinstance(reward, list | tuple) else [reward]
  for fn in rewards:
    if not callable(fn):
      raise ValueError(f'reward must be a function or a list of them, not {fn!r}')
  examples = examples_of(prompts, 'prompts')
  other = examples_of(held_out, 'held_out') if held_out is not None else examples
  functions = named(rewards)
  c = fresh_config(start, overrides)
  paid = called.Functions.of(functions, c.reward.seconds)
  task = grader.paying(own_task(examples, other), paid, tuple(functions))
  return trained(task, examples + other, rewards, c, (workdir, overrides))


def sft(
  pairs: Sequence, start: Start, workdir: str = '', overrides: Overrides = None
) -> Model:
  """Trains on pairs of prompt and completion; returns the trained model.

  pairs: (prompt, completion) tuples, or dicts with these columns. It takes sft.steps
  updates. start, workdir, overrides: as in `rl`.
  """
  pairs = [
    dict(zip(('prompt', 'completion'), pair, strict=True))
    if isinstance(pair, tuple)
    else pair
    for pair in pairs
  ]
  examples = examples_of(pairs, 'pairs')
  for row, example in enumerate(examples):
    if not isinstance(example.get('completion'), str):
      raise ValueError(f'row {row} of pairs has no text named completion')
  task, c = own_task(examples, examples), fresh_config(start, overrides)
  if not c.sft.steps:
    raise ValueError("sft.steps = 0: set overrides={'sft.steps': N}")
  return trained(task, examples, None, c, (workdir, overrides))


def trained(
  task: Task,
  examples: list[dict],
  rewards: Sequence[Callable] | None,
  c: Any,
  where: tuple[str, Overrides],
) -> Model:
  """Trains a caller's task in a workdir; rewards None: supervised training alone.

  where: workdir and overrides. data.path records whose prompts and rewards they are:
  the same call resumes, another one is refused there, and the command line cannot take
  them for a file.
  """
  workdir, overrides = where
  with c.unlocked():
    c.data.path = f'python:{digest_of(examples, rewards or [])}'
    c.data.update(style='bare', template='', protocol='strict')
    c.eval.update(style='', template='')
  return in_workdir(c, workdir, overrides, task, rewards is None)


def fresh_config(start: Start, overrides: Overrides) -> Any:
  """Returns the config that a run starts from; ValueError for a run's workdir."""
  c, before = config_of(start, overrides)
  if before:
    raise ValueError(
      f'{before} is the workdir of a run: save its model, and start from that directory'
    )
  return c


def in_workdir(
  c: Any, workdir: str, overrides: Overrides, task: Task | None, only_sft: bool
) -> Model:
  """Trains in a workdir as --mode=train does; returns the model that it has then.

  task: in the place of the config's. ValueError if the workdir has another run.
  """
  workdir = runs.workdir_of(workdir or runs.default(c), written=True)
  runs.refuse_other(c, workdir, check.FREE)
  built = ready(c)
  built = built._replace(task=task) if task else built
  runner.train(built, workdir, dict(overrides or {}), only_sft)
  return Model.read(built, workdir, 'base' if only_sft else '')
