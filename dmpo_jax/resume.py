"""Resuming: where a run is, by its checkpoints and metrics, and what it reads back.

A resumed run cuts its files back to its checkpoint and makes the later lines again,
to the same bits.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from absl import logging

from dmpo_jax import build, check, checkpoint, files, mesh, metrics, optim
from dmpo_jax.health import State
from dmpo_jax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Place:
  """A place in a phase. A checkpoint's JSON meta holds its fields."""

  update: int = 0  # optimizer updates that are done
  seconds: float = 0.0  # spent, over all sessions
  health: State = dataclasses.field(default_factory=State)

  def to_meta(self, built: build.Built) -> dict[str, Any]:
    """Returns the meta of a checkpoint at this place."""
    fields = dataclasses.asdict(self)
    return {**fields, 'config': check.plain(built.config), 'read': built.read}

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

  def why(meta):
    new = check.plain(config)
    if found := check.changes(meta.get('config', new), new, free):
      return f'it is of another config ({found})'
    return '' if 'update' in meta else 'an older version of this code wrote it'

  return why


def refuse_swapped(
  built: build.Built, meta: dict[str, Any], judging: bool = False
) -> None:
  """Raises ValueError if a checkpoint was made with other weights than are read now.

  Also if a file of the user's (data.task, reward.file) says something else now;
  judging: that is only worth a warning.
  """
  old = meta.get('read', {})
  changed = [name for name, x in built.read.items() if old.get(name, x) != x]
  read = ('data.task', 'data.drop', 'pairs.path', 'reward.file')
  files_ = [name for name in changed if name.startswith(read)]
  if files_:
    text = f'{" and ".join(files_)}: the file has changed since this run began'
    if not judging:
      raise ValueError(f'{text}: bring it back, or name another --workdir')
    logging.warning('%s', text)
  changed = [name for name in changed if name not in files_]
  if changed:
    named = (f'{name} = {check.plain(built.config)[name]!r}' for name in changed)
    raise ValueError(
      f'{" and ".join(named)}: the weights there are not those that this run began '
      'with: bring them back (provenance.json has the revision of a hub name), or name '
      'another --workdir'
    )


def policy_of(built: build.Built, base: Params) -> tuple[Params, Params]:
  """Returns (trainable, frozen): what RL changes, and what it leaves.

  base: as `trained_base` returns it; RL goes on with its adapters, if it has any.
  """
  if 'lora' in base:
    return {'lora': base['lora']}, {'params': base['params']}
  return built.steps.init_lora() or base, base


def with_base(found: tuple, start: Params) -> tuple:
  """Returns references with the policy that a phase starts from for the base.

  found: of Steps.read_references. start: what the phase trains, if adapters were
  trained before; {} otherwise.
  """
  first = {'lora': start['lora']} if 'lora' in start else {}
  return tuple(first if tree == {} else tree for tree in found)


def laid(references: tuple, state: TrainState) -> tuple:
  """Returns references with the moving one, of an optimizer's state, in its place."""
  moving = lambda tree: optim.reference_of(state.opt_state) if tree is None else tree
  return tuple(map(moving, references))


def after_pairs(built: build.Built, workdir: str | os.PathLike, base: Params) -> Params:
  """Returns the parameters that training on pairs has come to; `base` without it."""
  if not workdir or not saved_updates(workdir, 'pairs'):
    return base
  trainable, frozen = policy_of(built, base)
  folder = os.path.join(workdir, 'pairs')
  found = read_state(built, folder, lambda: built.steps.start_pairs(trainable))
  return {**frozen, **found.trees['state'].trainable} if found else base


def sft_start(built: build.Built) -> tuple[Params, Params]:
  """Returns (trainable, frozen) of supervised training: adapters or all weights."""
  base, lora = built.steps.init(), built.steps.init_sft()
  if not lora:
    return base, {}
  goes_on = check.part(built.config, 'sft').goes_on
  return lora, built.steps.quantize(base) if goes_on else base


def trained_base(built: build.Built, trainable: Params, frozen: Params) -> Params:
  """Returns what RL starts from: the base after supervised training.

  Adapters are merged, or stay beside it where RL goes on with them.
  """
  if not frozen:
    return trainable
  if check.part(built.config, 'sft').goes_on:
    return {**frozen, **trainable}
  return built.steps.merge(frozen, trainable)


def saved_updates(workdir: str | os.PathLike, phase: str = 'rl') -> list[int]:
  """Returns the updates whose checkpoints of a phase are in a workdir."""
  folder = os.path.join(workdir, phase)
  names = os.listdir(folder) if os.path.isdir(folder) else []
  return sorted(int(name) for name in names if name.isdecimal())


def read_state(
  built: build.Built, folder: str, start: Callable[[], Any], only: int | None = None
) -> checkpoint.Found | None:
  """Reads the newest checkpoint of a phase, or the one of the update `only`.

  start() makes a state of the same shape. None if there is no checkpoint.
  """
  keep, digest = built.config.checkpoint.keep, built.steps.digest
  if not os.path.isdir(folder):
    return None
  with checkpoint.Manager(folder, keep, digest) as manager:
    shapes = checkpoint.abstract(start())
    found = checkpoint.restore(
      manager, lambda step: {'state': shapes}, refuse(built.config), only
    )
  if found:
    refuse_swapped(built, found.meta, judging=True)
  return found


def base_of(
  built: build.Built, workdir: str | os.PathLike, best: bool | None = None
) -> Params:
  """Returns the base model of a run, as supervised training left it; trains nothing.

  workdir: '' = no run, the model as it is read. best: the checkpoint with the least
  loss of held-out texts, or the last one; None = as RL starts. ValueError if its
  training has not come to its end.
  """
  sft = check.part(built.config, 'sft')
  if not workdir or not sft.trains:
    return built.steps.init()
  folder, saved = os.path.join(workdir, 'sft'), saved_updates(workdir, 'sft')
  trainable, frozen = sft_start(built)
  only = None
  if best or (best is None and sft.held_out):
    row = best_held_out(workdir, max(saved, default=0))
    only = row.update if row else None
    if best and not row:
      raise ValueError(
        f'--of=best: {os.path.join(workdir, metrics.FILE)} has no held-out loss '
        '(sft.held_out = 0, or the run has just begun): use --of=latest'
      )
  found = read_state(built, folder, lambda: built.steps.start_sft(trainable), only)
  done, total = max(saved, default=0), found.meta['updates'] if found else 1
  if not found or done < total:
    raise ValueError(
      f'{folder} has {done} of {sft.length_of()} updates of the base model: let '
      '--mode=train go on first'
    )
  return trained_base(built, found.trees['state'].trainable, frozen)


def best_held_out(workdir: str | os.PathLike, last: int) -> Best | None:
  """Returns the update up to `last` with the least loss of held-out texts."""
  rows = metrics.read(workdir) if jax.process_index() == 0 else []
  rows = [(r['step'], -r['held_out_nll']) for r in rows if r['phase'] == 'held_out']
  return best_of(rows, last)


def latest(
  built: build.Built, workdir: str | os.PathLike, base: Params, best: bool = False
) -> Params:
  """Returns the parameters of the newest checkpoint, else those training starts from.

  best: those of the best validation instead. Raises ValueError if nothing was
  validated, if the best checkpoint is gone, or if there are checkpoints and none can
  be used.
  """
  trainable, frozen = policy_of(built, base)
  folder, only = os.path.join(workdir, 'rl'), None
  if best:  # the newest validation of a run under way may not be saved yet
    saved = saved_updates(workdir)
    found = best_validation(workdir, built.config.train.inner, max(saved, default=0))
    where = os.path.join(workdir, metrics.FILE)
    if not found or not saved:
      raise ValueError(
        f'--of=best: {where} has no validation of a checkpoint (eval.every = 0, or the '
        'run has just begun): use --of=latest'
      )
    if only := found.update:
      if only not in saved:
        raise ValueError(
          f'--of=best: {os.path.join(folder, str(only))}, the checkpoint of the best '
          'validation, is gone: bring it back from a copy, or use --of=latest'
        )
  start = lambda: built.steps.start(trainable)
  state = None if only == 0 else read_state(built, folder, start, only)
  return {**frozen, **(state.trees['state'].trainable if state else trainable)}


def mixed(params: Params, base: Params, mix: float) -> Params:
  """Returns base + mix (policy - base), as WiSE-FT interpolates (arXiv 2109.01903).

  An adapter is scaled instead, which is the same: W + mix A B. ValueError where the
  base has an adapter already: the mean of two is no adapter of that rank.
  """
  if 'lora' in base:
    raise ValueError(
      '--mix: RL went on with the adapters of supervised training, which are part of '
      'the base: it needs sft.merge = True'
    )
  if 'lora' not in params:
    between = lambda old, new: (old + mix * (new - old)).astype(old.dtype)
    return jax.tree.map(between, base, params)
  scaled = lambda path, x: mix * x if mesh.path_of(path).endswith('/b') else x
  lora = jax.tree_util.tree_map_with_path(scaled, params['lora'])
  return {**params, 'lora': lora}


def best_validation(workdir: str | os.PathLike, inner: int, last: int) -> Best | None:
  """Returns the best validation in metrics.jsonl up to the update `last`.

  inner: updates of an iteration. Of equal accuracies the first counts. None if there
  is none. One process reads the file for all.
  """
  rows = metrics.read(workdir) if jax.process_index() == 0 else []
  rows = [(r['step'] * inner, r['accuracy']) for r in rows if r['phase'] == 'eval']
  return best_of(rows, last)


def best_of(rows: list[tuple[int, float]], last: int) -> Best | None:
  """Returns the first of the best (update, number) up to `last`; None if none is."""
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
    files.keep(os.path.join(workdir, name), lambda row: row['iteration'] <= last)
