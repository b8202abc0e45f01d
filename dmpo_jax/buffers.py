"""Rollout buffers as files: WORKDIR/rollouts/ITERATION.npz, with log.rollouts = True.

A file appears whole or not at all, and holds what the buffer's rewards and weights were
made from: problems, prompts, completions with their order of unmasking, reward terms
and grades. A resumed run cuts the folder back to its checkpoint.
"""

import io
import json
import os
import pathlib
import zipfile
from typing import NamedTuple

import numpy as np

from dmpo_jax import files
from dmpo_jax.types import BoolBP, BoolRL, FloatR, IntB, IntBP, IntR, IntRL

FOLDER = 'rollouts'
TERM = 'term/'  # before the names of reward terms in a file


class Buffer(NamedTuple):
  """One buffer: B problems with G completions each, row r = b * G + g."""

  iteration: int
  step: int  # optimizer updates of the policy that sampled
  examples: list[dict]  # the B problems, in the task's field names
  index: IntB  # their numbers among the run's training problems
  prompt: IntBP  # left-padded
  valid: BoolBP  # False on padding
  tokens: IntRL  # completions
  order: IntRL  # as Rollouts.order; -1: never unmasked
  length: IntR  # tokens up to and including the first stop
  terms: dict[str, FloatR]  # reward terms before their weights; nan: not judged
  reward: FloatR
  grade: FloatR
  drafted: BoolRL | None = None  # tokens that a draft wrote; None: there are none

  @property
  def group(self) -> int:
    """Completions G of a problem."""
    return len(self.tokens) // len(self.index)


def path_of(workdir: files.Path, iteration: int) -> str:
  return os.path.join(workdir, FOLDER, f'{iteration:06d}.npz')


def write(workdir: files.Path, buffer: Buffer) -> None:
  """Writes a buffer, in one step."""
  arrays = {name: x for name, x in buffer._asdict().items() if x is not None}
  terms, examples = arrays.pop('terms'), json.dumps(arrays.pop('examples'))
  arrays |= {f'{TERM}{name}': x for name, x in terms.items()}
  content = io.BytesIO()
  text = np.frombuffer(examples.encode(), np.uint8)
  np.savez_compressed(content, examples=text, **arrays)
  os.makedirs(os.path.join(workdir, FOLDER), exist_ok=True)
  files.replace(path_of(workdir, buffer.iteration), content.getvalue())


def read_file(path: files.Path) -> Buffer:
  """Reads a buffer. ValueError names a file that holds none."""
  try:
    with np.load(path) as found:
      arrays = dict(found)
    examples = json.loads(arrays.pop('examples').tobytes())
    terms = {
      name.removeprefix(TERM): arrays.pop(name)
      for name in list(arrays)
      if name.startswith(TERM)
    }
    iteration, step = (int(arrays.pop(name)) for name in ('iteration', 'step'))
    return Buffer(iteration, step, examples, terms=terms, **arrays)
  except (ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(f'{path} is no saved rollout buffer ({error})') from None


def paths(workdir: files.Path) -> list[pathlib.Path]:
  """Returns the files of a run's saved buffers, by iteration."""
  found = pathlib.Path(workdir, FOLDER).glob('*.npz')
  return sorted((p for p in found if p.stem.isdecimal()), key=lambda p: int(p.stem))


def read(workdir: files.Path, last: int = 0) -> list[Buffer]:
  """Reads the saved buffers of a run, oldest first.

  last: only so many of the newest; 0 = all. ValueError if there are none.
  """
  found = paths(workdir)[-last:]
  if not found:
    raise ValueError(
      f'{os.path.join(workdir, FOLDER)} has no rollouts: train with log.rollouts = True'
    )
  return list(map(read_file, found))


def rewind(workdir: files.Path, last: int) -> None:
  """Removes the buffers of iterations after `last`."""
  for path in paths(workdir):
    if int(path.stem) > last:
      path.unlink()
