"""A model in memory: it generates, scores, is evaluated and written.

A class over the parts of the command line: build.Built, evaluate, results cards and
exports. Batches are made so that few programs are compiled, and so that no result
depends on what stands beside it.
"""

import copy
import dataclasses
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

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
  parts,
  rng,
  runner,
  runs,
)
from dmpo_jax.build import Built
from dmpo_jax.likelihood import Likelihood
from dmpo_jax.sampler import SampleConfig
from dmpo_jax.tools import cards
from dmpo_jax.types import Params

BUCKET = 32  # prompts are padded to multiples, so that few programs are compiled


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
    positions, whose = parts.limit_of(self.built, False)
    room = positions - hp.length
    self.check_room(ids, room, f'sampler.length = {hp.length}', whose)
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

  def evaluate(self, folder: str = '') -> list[dict]:
    """Returns results cards of the config's test problems, as --mode=eval writes.

    folder: where cards and generations go; '' = a folder in the workdir, or in evals/.
    """
    above = self.workdir or os.path.join(runs.EVALS, self.config.name)
    folder = folder or cards.default_folder(self.built, self.params, above)
    return cards.run(self.built, self.params, folder, self.name)

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
    return mesh.row_shards(self.built.mesh)

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

  def check_room(
    self, ids: Sequence[list[int]], room: int, what: str, whose: str = 'model'
  ) -> None:
    """Raises ValueError if a prompt leaves no room for what follows it."""
    for number, row in enumerate(ids):
      if len(row) > room:
        raise ValueError(
          f"prompt {number} has {len(row)} tokens, but the {whose}'s positions leave "
          f'{room} before {what}: shorten it'
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
