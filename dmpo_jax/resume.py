"""Resuming: where a run is, by its checkpoints and metrics, and what it reads back.

A resumed run cuts its files back to its checkpoint and makes the later lines again,
to the same bits.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dmpo_jax import build, check, checkpoint, files, mesh, metrics
from dmpo_jax.health import State
from dmpo_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Place:
  """A place in a phase. A checkpoint's JSON meta holds its fields."""

  update: int = 0  # optimizer updates that are done
  seconds: float = 0.0  # spent, over all sessions
  health: State = dataclasses.field(default_factory=State)

  def to_meta(self, config: Any) -> dict[str, Any]:
    """Returns the meta of a checkpoint at this place."""
    return {**dataclasses.asdict(self), 'config': check.plain(config)}

  @classmethod
  def from_meta(cls, meta: dict[str, Any]) -> 'Place':
    """Reads the place back from a checkpoint's meta."""
    return cls(meta['update'], meta['seconds'], State(**meta['health']))


class Best(NamedTuple):
  """The best validation so far."""

  update: int  # its checkpoint; 0 = the parameters that training starts from
  accuracy: float


def refuse(config: Any, free: tuple[str, ...] = check.JUDGING) -> Callable[[dict], str]:
  """Returns meta -> why a checkpoint is not one of this config, or ''.

  free: beginnings of the fields that may differ.
  """
  of_config = check.refuse(config, free)
  old = 'an older version of this code wrote it'
  return lambda meta: of_config(meta) or ('' if 'update' in meta else old)


def policy_of(built: build.Built, base: Params) -> tuple[Params, Params]:
  """Returns (trainable, frozen): what RL changes, and the reference policy."""
  return built.steps.init_lora() or base, base


def is_saved(workdir: str | os.PathLike) -> bool:
  """Returns whether there is a checkpoint in workdir/rl."""
  folder = os.path.join(workdir, 'rl')
  return os.path.isdir(folder) and any(map(str.isdigit, os.listdir(folder)))


def latest(
  built: build.Built, workdir: str | os.PathLike, base: Params, best: bool = False
) -> Params:
  """Returns the parameters of the newest checkpoint, else those training starts from.

  best: those of the best validation instead. Raises ValueError if nothing was
  validated, or if there are checkpoints and none can be used.
  """
  trainable, frozen = policy_of(built, base)
  folder, found, only = os.path.join(workdir, 'rl'), None, None
  keep, digest = built.config.checkpoint.keep, built.steps.digest
  if os.path.isdir(folder):
    with checkpoint.open_manager(folder, keep, digest) as manager:
      if best:  # the newest validation of a run under way may not be saved yet
        saved = manager.latest_step() or 0
        only = best_validation(workdir, built.config.train.inner, saved)
      if not best or (only and only.update):  # update 0 is no checkpoint
        shapes = checkpoint.abstract(built.steps.start(trainable))
        found = checkpoint.restore(
          manager,
          lambda step: {'state': shapes},
          refuse(built.config),
          only and only.update,
        )
  if best and not only:
    raise ValueError(
      f'--of=best: {os.path.join(workdir, metrics.FILE)} has no validation '
      '(eval.every = 0, or the run has just begun): use --of=latest'
    )
  return {**frozen, **(found.trees['state'].trainable if found else trainable)}


def best_validation(workdir: str | os.PathLike, inner: int, last: int) -> Best | None:
  """Returns the best validation in metrics.jsonl up to the update `last`.

  inner: updates of an iteration. Of equal accuracies the first counts. None if there
  is none. One process reads the file for all.
  """
  rows = metrics.read(workdir) if jax.process_index() == 0 else []
  rows = [(r['step'] * inner, r['accuracy']) for r in rows if r['phase'] == 'eval']
  found = [row for row in mesh.gather(rows)[0] if row[0] <= last]
  return Best(*max(found, key=lambda row: row[1])) if found else None


def append(workdir: str, lines: dict[str, list[dict]]) -> None:
  """Appends to JSON-lines files, {name: rows}; creates none for no rows."""
  for name, rows in lines.items():
    if rows and jax.process_index() == 0:
      files.append(os.path.join(workdir, name), rows)


def append_once(workdir: str, name: str, row: dict) -> None:
  """Appends a line to a JSON-lines file, unless the file has it."""
  if jax.process_index() == 0 and row not in files.read(os.path.join(workdir, name)):
    append(workdir, {name: [row]})


def rewind_lines(workdir: str, name: str, last: int) -> None:
  """Drops lines of iterations after `last`, and an incomplete last line."""
  if jax.process_index() == 0:
    files.rewind(os.path.join(workdir, name), last)
