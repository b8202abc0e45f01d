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

import copy
import dataclasses
import hashlib
import inspect
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dmpo_jax import (
  check,
  config,
  conventions,
  data,
  evaluate,
  hf,
  likelihood,
  mesh,
  metrics,
  rng,
  runner,
  runs,
)
from dmpo_jax.build import Built
from dmpo_jax.likelihood import Likelihood
from dmpo_jax.sampler import SampleConfig
from dmpo_jax.tools import cards
from dmpo_jax.types import Params, Task

__all__ = ['Model', 'load', 'rl', 'run', 'sft']

Overrides = Mapping[str, Any] | None  # {'section.field': value}
Start = str | os.PathLike | ConfigDict  # what `config_of` takes
BUCKET = 32  # prompts are padded to multiples, so that few programs are compiled


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
    else:
      raise ValueError(
        f'{path!r} is no config, no workdir of a run and no checkpoint: give a name in '
        f'{config.presets()}, a file, a directory, or a hub name (owner/name)'
      )
  with config.in_file('overrides', ''):
    config.update(c, overrides or {})
  return c.lock(), workdir


def ready(c: Any) -> Built:
  """Settles the process as the command line does; returns the parts of a config."""
  runner.fix_numbers()
  runner.share_gpu()
  try:
    runner.split_cpu(c.mesh.cpu)
  except RuntimeError:  # JAX has its devices already
    pass
  runner.cache_programs(c)
  return runner.ready(c)


def load(start: Start, of: str = '', overrides: Overrides = None) -> 'Model':
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


# --- a model


@dataclasses.dataclass(frozen=True)
class Model:
  """Parameters with what is needed to use them."""

  built: Built
  params: Params
  base: Params  # what training began with
  name: str  # base | adapter | latest | best
  workdir: str = ''  # of its run; '' = none
  programs: dict = dataclasses.field(default_factory=dict, repr=False)

  @classmethod
  def read(cls, built: Built, workdir: str, of: str = '') -> 'Model':
    """Reads the parameters `of` a run, or those that the config names."""
    params, base, name = runner.params_of(built, workdir, of)
    return cls(built, params, base, name, workdir)

  @property
  def config(self) -> Any:
    """The ConfigDict of the model and its run."""
    return self.built.config

  def law(self, preset: str = '', **fields: Any) -> SampleConfig:
    """Returns eval.sampler with a preset's fields and these, checked for the model.

    A length without steps keeps the tokens of a step. ValueError for an unknown field,
    or one that is impossible.
    """
    section = self.config.eval.sampler.copy_and_resolve_references()
    named = conventions.sampler_of(preset) if preset else {}
    known = {field.name for field in dataclasses.fields(SampleConfig)}
    if wrong := sorted(set(fields) - known):
      raise ValueError(
        f'{", ".join(wrong)}: no field of the sampler; its fields are '
        f'{", ".join(sorted(known))}'
      )
    section.update(named)
    if 'length' in fields and 'steps' not in fields:
      length, block = fields['length'], fields.get('block', section.block)
      if 'block' not in fields and length % block:
        section.block = math.gcd(length, block)
      per_step = max(1, section.length // section.steps)
      section.steps = max(1, length // per_step, length // section.block)
    with config.in_file('sampler settings', ''):
      section.update(fields)
    hp = check.settings(SampleConfig, section)
    if problems := hp.problems():
      raise ValueError('; '.join(problems))
    return hp

  def generate(
    self,
    prompts: Any,
    samples: int = 1,
    seed: int | None = None,
    chat: bool = True,
    preset: str = '',
    **sampler: Any,
  ) -> Any:
    """Returns a completion of each prompt, as text: a list, or one text for one.

    samples: completions of each prompt; above 1 gives a list of each. seed: of the
    random draws; None = the config's. chat: puts a prompt into the chat template; False
    takes it as it stands. preset: a name in dmpo_jax.conventions. sampler: fields of
    SampleConfig, such as length=256, temperature=0.7; the others are eval.sampler's.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    rows = self.complete(texts, self.law(preset, **sampler), samples, seed, chat)
    found = [[row['text'] for row in group] for group in rows]
    flat = found if samples > 1 else [group[0] for group in found]
    return flat[0] if isinstance(prompts, str) else flat

  def complete(
    self,
    prompts: Sequence,
    hp: SampleConfig,
    samples: int = 1,
    seed: int | None = None,
    chat: bool = True,
  ) -> list[list[dict]]:
    """Returns `samples` completions of each prompt, as evaluate.complete's dicts.

    A completion depends on its prompt, its place in the list and the seed, not on the
    prompts beside it. Short prompts are sampled first.
    """
    ids = [encode(self.built.tokenizer, text, chat) for text in prompts]
    room = self.built.model.positions - hp.length
    self.check_room(ids, room, f'sampler.length = {hp.length}')
    sample = self.seeded(('sample', hp), lambda: self.sampler(hp), seed)
    todo = [
      (len(ids[i]), i * samples + j) for i in range(len(ids)) for j in range(samples)
    ]
    found: dict[int, dict] = {}
    for batch in self.batches(sorted(todo), self.config.eval.batch, 'generate'):
      row = np.array([at for _, at in batch], np.int32)
      tokens, valid = self.padded([ids[at // samples] for at in row], room)
      done = evaluate.complete(self.built, self.params, sample, (tokens, valid), row)
      found |= dict(zip(row.tolist(), done, strict=True))
    return [[found[i * samples + j] for j in range(samples)] for i in range(len(ids))]

  def score(
    self,
    prompts: Sequence[str],
    completions: Sequence[str],
    chat: bool = True,
    preset: str = '',
    **how: Any,
  ) -> list[float]:
    """Returns the log-likelihood of each completion after its prompt, in nats.

    how: by = 'elbo' (a lower bound, of `draws` masked copies) or 'trajectory' (exact,
    along the steps of greedy decoding); dmpo_jax/likelihood.py says more. The end of
    the text is not scored; add the tokenizer's eos_token to score it.
    """
    if len(prompts) != len(completions):
      raise ValueError(
        f'{len(prompts)} prompts and {len(completions)} completions: give one '
        'completion for each prompt'
      )
    tokenizer = self.built.tokenizer
    pairs = [
      (encode(tokenizer, prompt, chat), data.encode_answer(tokenizer, text))
      for prompt, text in zip(prompts, completions, strict=True)
    ]
    return [logp for logp, _ in self.logp_of(pairs, self.law(preset), **how)]

  def logp_of(
    self,
    pairs: Sequence[tuple[list[int], list[int]]],
    law: SampleConfig,
    seed: int | None = None,
    **how: Any,
  ) -> list[tuple[float, bool]]:
    """Returns (log-likelihood, whether greedy decoding writes it) of pairs of ids.

    law: the sampler whose guidance and greedy trajectory count. how: fields of
    Likelihood. By ELBO the second is False. The masks are a function of the prompt and
    the seed: answers to one question share them, whatever else is scored.
    """
    wanted = likelihood_of(**how)
    groups: dict[int, list] = {}
    for at, (prompt, answer) in enumerate(pairs):
      length = likelihood.canvas_length(self.built.model, law, len(prompt), len(answer))
      self.check_room([prompt], self.built.model.positions - length, 'the completion')
      groups.setdefault(length, []).append((len(prompt), at))
    found: dict[int, tuple[float, bool]] = {}
    for length, todo in sorted(groups.items()):
      size, copies = self.split(wanted)
      program = likelihood.Program(wanted, law, length, copies)
      make = lambda program=program: self.built.steps.texts_of(program)
      run = self.seeded(('texts', program), make, seed)
      for batch in self.batches(sorted(todo), size, f'score {length}'):
        places = [at for _, at in batch]
        room = self.built.model.positions - length
        prompt = self.padded([pairs[at][0] for at in places], room)
        row = np.array([address(pairs[at][0]) for at in places], np.int32)
        answers = np.full((len(places), length), -1, np.int32)
        for i, at in enumerate(places):
          answers[i, : len(pairs[at][1])] = pairs[at][1]
        logp, greedy = mesh.fetch(run(self.params, *prompt, answers, row))
        done = zip(logp.tolist(), greedy.tolist(), strict=True)
        found |= dict(zip(places, done, strict=True))
    return [found[at] for at in range(len(pairs))]

  def evaluate(self, split: str = 'test', folder: str = '') -> list[dict]:
    """Returns results cards of a split of the config's task, as --mode=eval writes.

    folder: where cards and generations go; '' = a folder in the workdir, or in evals/.
    """
    above = self.workdir or os.path.join(runs.EVALS, self.config.name)
    folder = folder or cards.default_folder(self.built, self.params, above)
    return cards.run(self.built, self.params, folder, self.name, split)

  def save(self, folder: str, format: str = 'merged') -> dict[str, Any]:
    """Writes a Hugging Face directory (merged) or a PEFT adapter, and reads it back.

    Returns the report of --mode=export. ValueError if nothing was trained, or if the
    folder is not empty.
    """
    if format not in ('merged', 'adapter'):
      raise ValueError(f'format = {format!r} must be merged or adapter')
    folder = runs.path_of('folder', os.fspath(folder), written=True)
    return hf.export(self.built, self.params, self.base, folder, format)

  # --- batches and programs

  def sampler(self, hp: SampleConfig) -> Callable:
    """Returns the compiled sampler of these settings."""
    section = self.config.eval.sampler.copy_and_resolve_references()
    with section.unlocked():
      section.update(vars(hp) | {'parallel': 'jit'})
    return self.built.steps.sampler_of(section)

  def seeded(self, key: Any, make: Callable, seed: int | None) -> Callable:
    """Returns the program of a key, made once, with a seed of its own."""
    if key not in self.programs:
      self.programs[key] = make()
    program = self.programs[key]
    if seed is None:
      return program
    if not 0 <= seed < 2**32:
      raise ValueError(f'seed = {seed} must be in 0 to 2 ** 32 - 1')
    other = copy.copy(program)  # it shares the compiled function
    other.last = (np.uint32(seed),)
    return other

  def shards(self) -> int:
    """Returns in how many parts the devices split the rows of a batch."""
    return self.built.mesh.shape['data'] * self.built.mesh.shape['fsdp']

  def split(self, how: Likelihood) -> tuple[int, int]:
    """Returns (rows, copies of each) of a batch of about eval.batch rows in all."""
    batch, shards = self.config.eval.batch, self.shards()
    if how.by == 'trajectory':
      return batch, 1
    rows = max(1, batch // how.draws // shards) * shards
    fits = (n for n in range(how.draws, 0, -1) if how.draws % n == 0)
    return rows, next((n for n in fits if n * rows <= batch), 1)

  def batches(self, todo: Sequence, size: int, name: str) -> Iterator[list]:
    """Yields batches of at most `size` items; the last one is filled with repeats."""
    shards, every = self.shards(), self.config.log.every_seconds
    size = min(size, -(-len(todo) // shards) * shards)
    progress = None
    if len(todo) > size:
      progress = metrics.Progress(len(todo), name, every_seconds=every)
    for start in range(0, len(todo), size):
      batch = list(todo[start : start + size])
      yield batch + batch[-1:] * (size - len(batch))
      if progress:
        progress.update(start + len(batch), {})
    if progress:
      progress.close()

  def padded(self, ids: Sequence[list[int]], room: int) -> tuple:
    """Returns left-padded tokens and their validity, of few different widths."""
    longest = max(1, *map(len, ids))
    width = min(-(-longest // BUCKET) * BUCKET, max(room, longest))
    return data.left_pad(ids, width, self.built.tokenizer.pad_token_id)

  def check_room(self, ids: Sequence[list[int]], room: int, what: str) -> None:
    """Raises ValueError if a prompt leaves no room for what follows it."""
    for number, row in enumerate(ids):
      if len(row) > room:
        raise ValueError(
          f'prompt {number} has {len(row)} tokens, which with {what} is more than the '
          f"model's {self.built.model.positions} positions: shorten it"
        )


def address(prompt: list[int]) -> int:
  """Returns the row id of a prompt's random numbers, by its tokens alone."""
  return zlib.crc32(np.array(prompt, np.int32).tobytes()) % rng.NO_ROW


def likelihood_of(**how: Any) -> Likelihood:
  """Returns the Likelihood of these fields; ValueError if one is impossible."""
  known = [field.name for field in dataclasses.fields(Likelihood)]
  if wrong := sorted(set(how) - set(known)):
    raise ValueError(f'{", ".join(wrong)}: the fields are {", ".join(known)}')
  wanted = Likelihood(**how)
  if problems := wanted.problems():
    raise ValueError('; '.join(problems))
  return wanted


def encode(tokenizer: Any, text: Any, chat: bool) -> list[int]:
  """Returns the ids of a prompt, in the chat template or as it stands."""
  if not isinstance(text, str):
    raise ValueError(f'a prompt must be a text, not {text!r}')
  if chat:
    return data.encode_chat(tokenizer, text)
  start = tokenizer.bos_token
  has_start = bool(start) and text.startswith(start)
  return tokenizer(text, add_special_tokens=not has_start)['input_ids']


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
  task = own_task(examples, other, rewards)
  return trained(task, examples + other, [start, workdir, overrides], rewards)


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
  task = own_task(examples, examples, [])
  return trained(task, examples, [start, workdir, overrides], None)


def examples_of(rows: Sequence, name: str) -> list[dict]:
  """Returns prompts as dicts; ValueError names the first row that is none."""
  if isinstance(rows, str) or not len(rows):
    raise ValueError(f'{name} must be a list of prompts, not {rows!r}')
  found = []
  for number, row in enumerate(rows):
    example = {'prompt': row} if isinstance(row, str) else row
    if not isinstance(example, Mapping) or not isinstance(example.get('prompt'), str):
      raise ValueError(
        f'row {number} of {name} must be a text, or a dict with a text named prompt; '
        f'it is {row!r}'
      )
    found.append(dict(example))
  return found


def own_task(
  examples: list[dict], held_out: list[dict], rewards: Sequence[Callable]
) -> Task:
  """Returns the Task of prompts that a caller has, with the caller's rewards."""

  def load(split, options):
    size = getattr(options, f'{split}_size')
    return examples if split == 'train' else held_out[: size or None]

  last: list = [None, {}]  # the grade is asked for after the reward of the same text

  def judge(text, example, protocol):
    if last[0] != (text, id(example)):
      terms = {name_of(fn): call_reward(fn, text, example) for fn in rewards}
      last[:] = (text, id(example)), terms
    return dict(last[1])

  def grade(text, example, protocol):
    return min(1.0, max(0.0, sum(judge(text, example, protocol).values())))

  def target(example, style):
    if 'completion' not in example:
      raise ValueError('supervised training needs a column named completion')
    return example['completion']

  return Task(
    load=load,
    prompt=lambda example, style: example['prompt'],
    target=target,
    reward=judge,
    grade=grade,
    extra=lambda text, example: {},
    record=lambda example: (example['prompt'], example),
  )


def name_of(fn: Callable) -> str:
  """Returns the name of a reward function, as metrics and tables show it."""
  return getattr(fn, '__name__', type(fn).__name__)


def call_reward(fn: Callable, text: str, example: dict) -> float:
  """Returns the reward of one completion; ValueError if it is no number.

  A function without **columns gets the columns that it names.
  """
  columns = {name: [value] for name, value in example.items() if name != 'prompt'}
  takes = inspect.signature(fn).parameters
  if not any(x.kind is x.VAR_KEYWORD for x in takes.values()):
    columns = {name: value for name, value in columns.items() if name in takes}
  where = f'the reward {name_of(fn)} of the prompt {example["prompt"][:80]!r}'
  try:
    found = fn(prompts=[example['prompt']], completions=[text], **columns)
  except Exception as error:
    raise ValueError(f'{where} failed: {type(error).__name__}: {error}') from error
  values = list(found) if isinstance(found, Sequence | np.ndarray) else [found]
  if len(values) != 1 or not isinstance(values[0], int | float | np.number):
    raise ValueError(
      f'{where} is {found!r}: it must be a list with one number for each completion'
    )
  return float(values[0])


def trained(
  task: Task, examples: list[dict], where: list, rewards: Sequence[Callable] | None
) -> Model:
  """Trains a caller's task in a workdir; rewards None: supervised training alone.

  data.path records whose prompts and rewards they are: the same call resumes, another
  one is refused there, and the command line cannot take them for a file.
  """
  start, workdir, overrides = where
  c, only_sft = fresh_config(start, overrides), rewards is None
  if only_sft and not c.sft.steps:
    raise ValueError("sft.steps = 0: set overrides={'sft.steps': N}")
  with c.unlocked():
    c.data.path = f'python:{digest_of(examples, rewards or [])}'
    c.data.update(style='bare', template='', protocol='strict')
    c.eval.update(style='', template='')
  return in_workdir(c, workdir, overrides, task, only_sft)


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


def digest_of(examples: list[dict], rewards: Sequence[Callable]) -> str:
  """Returns a hash of prompts, columns and the source of the rewards."""

  def source(fn):
    try:
      return inspect.getsource(fn)
    except (OSError, TypeError):  # typed into an interpreter, or an object
      return name_of(fn)

  text = json.dumps([examples, [source(fn) for fn in rewards]], default=repr)
  return hashlib.sha256(text.encode()).hexdigest()[:12]
