"""Checkpoints of training by Orbax: the latest n, and the best by validation.

A checkpoint is named by the number of optimizer updates. It holds the training
state, the rollout buffers in use, and a JSON dict (the meta). Orbax makes it visible
once it is whole, but does not check the arrays that it reads. So a digest of each
tree is stored in the meta. A checkpoint that cannot be used is skipped for the one
before it, with a warning. Nothing is ever deleted for a fault.
"""

import contextlib
import errno
import functools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging

from dmpo_jax import mesh

UINTS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes of an element


class Found(NamedTuple):
  """What `restore` returns."""

  trees: dict[str, Any]  # name -> TrainState or TrainBatch
  meta: dict[str, Any]


class Preserved:
  """Orbax preservation policy: the latest `count` steps, and the step `best`.

  Orbax' own BestN needs the metric when a step is saved. Here a validation may
  follow the save: after SIGTERM the next start validates.
  """

  def __init__(self, count: int):
    self.count = count
    self.best: int | None = None

  def should_preserve(self, checkpoints: Sequence, *, context: Any) -> list[bool]:
    steps = [info.step for info in checkpoints]
    return [step in steps[-self.count :] or step == self.best for step in steps]


@functools.cache
def write_arrays_whole() -> None:
  """Makes one device write a replicated array, where there is one process.

  By default every device writes a slice, by a program of its own. That spreads the
  work over processes, but makes a save five times slower in a single one.
  """
  if jax.process_count() == 1:
    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # Orbax warns of the override
    ocp.type_handlers.register_type_handler(
      jax.Array,
      ocp.type_handlers.ArrayHandler(use_replica_parallel=False),
      override=True,
    )
    logging.set_verbosity(level)


class Manager(ocp.CheckpointManager):
  """Orbax' manager, which keeps the latest `keep` steps and the best.

  digest: the function below, compiled; None stores and checks no digests.
  """

  def __init__(
    self, directory: str | os.PathLike, keep: int = 2, digest: Callable | None = None
  ):
    self.preserved: Preserved = Preserved(keep)
    self.digest = digest
    write_arrays_whole()
    super().__init__(
      os.path.abspath(directory),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self.preserved, enable_async_checkpointing=True
      ),
    )

  def reached_preemption(self, step: int) -> bool:
    """Returns False: guard.Preemption alone may ask JAX.

    JAX stops all processes at an equal count. Orbax' step numbers in between would
    make them miss it.
    """
    return False


@contextlib.contextmanager
def independent_reader(manager: Manager) -> Iterator[ocp.CheckpointManager]:
  """Opens a manager that reads without waiting for other processes.

  With the shared one, a process that meets a damaged file and raises would leave the
  others waiting.
  """
  if jax.process_count() == 1:
    yield manager
    return
  me = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}, barrier_sync_key_prefix=f'reader{me}'
  )
  with ocp.CheckpointManager(
    manager.directory,
    options=ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone),
  ) as reader:
    yield reader


def save(
  manager: Manager, step: int, trees: dict[str, Any], meta: dict[str, Any]
) -> None:
  """Begins to save named trees (NamedTuples of arrays) and a JSON-able dict."""
  dicts = {name: tree._asdict() for name, tree in trees.items()}
  if manager.digest:
    digests = {name: int(manager.digest(tree)) for name, tree in dicts.items()}
    meta = {**meta, 'digest': digests}
  items = {name: ocp.args.StandardSave(tree) for name, tree in dicts.items()}
  manager.save(
    step, force=True, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta))
  )


def verify(manager: Manager, step: int, state: Any) -> None:
  """Waits for a save and raises ValueError if it cannot be read again.

  Reads the shapes of all arrays, and the smallest one; two states might not fit.
  """
  manager.wait_until_finished()
  folder = os.path.join(manager.directory, str(step), 'state')
  leaf = ocp.args.PyTreeRestore(
    {'step': (shape := abstract(state.step))},
    {'step': ocp.ArrayRestoreArgs(sharding=shape.sharding)},
    partial_restore=True,
  )
  try:
    with independent_reader(manager) as reader:
      reader.item_metadata(step)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      same = int(reader.restore(folder, args=leaf)['step']) == int(state.step)
  except Exception as error:  # of any kind, as in `restore`
    if is_transient(error):
      raise
    logging.warning('%s', error)
    same = False
  if mesh.agree(not same):
    raise ValueError(
      f'{folder}, the first checkpoint, cannot be read back: the file system or the '
      'path does not suit Orbax, so name another --workdir'
    )


def is_due(section: Any, done: int, saved: float) -> bool:
  """Returns whether to save after `done` updates.

  section: the config's checkpoint section. saved: time.monotonic() of the last save.
  """
  if done % section.every == 0:
    return True
  spent = time.monotonic() - saved
  return bool(section.every_minutes) and mesh.agree(spent >= 60 * section.every_minutes)


def restore(
  manager: Manager,
  shapes: Callable[[int], dict[str, Any]],
  refuse: Callable[[dict], str] = lambda meta: '',
  only: int | None = None,
) -> Found | None:
  """Reads the newest usable checkpoint; returns None if there is none at all.

  shapes(step): name -> tree of ShapeDtypeStructs with shardings, which may be of
  another mesh than the saved one. refuse(meta): why a checkpoint is not this run's, or
  ''. only: read no other step. An unusable step is skipped with a warning. Raises
  ValueError if there are steps and none is usable. Raises errors that do not concern
  the files (memory, an unreachable disk) as they are.
  """
  faults = {}
  steps = sorted(manager.all_steps(), reverse=True) if only is None else [only]
  for step in steps:
    found: Any = None  # two states at a time might not fit
    try:
      with independent_reader(manager) as reader:
        found = read(reader, step, shapes(step))
      fault = refuse(found.meta)
    except Exception as error:  # a damaged file makes others raise anything
      if is_transient(error):
        raise
      fault = f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'
    if not mesh.agree(fault):  # a step that one process skips is skipped by all
      fault = manager.digest and digest_fault(found, manager.digest)
      if not fault:
        return found
    faults[step] = fault or 'another process cannot read it'
    logging.warning(
      'checkpoint %s cannot be used: %s',
      os.path.join(manager.directory, str(step)),
      faults[step],
    )
  if faults:
    lines = '\n'.join(f'  {step}: {fault}' for step, fault in faults.items())
    instead = 'move the directory away to begin from nothing'
    raise ValueError(
      f'no checkpoint in {manager.directory} can be used:\n{lines}\nBring one '
      f'back from a copy, or {instead if only is None else "use --of=latest"}'
    )
  return None


def is_transient(error: BaseException | None) -> bool:
  """Returns whether an error says nothing about the files themselves."""
  while error:  # Orbax raises its own error from the first one
    number = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
      return True
    if number and int(number[1]) != errno.ENOENT:
      return True
    if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
      return True
    error = error.__cause__ or error.__context__
  return False


def read(manager: ocp.CheckpointManager, step: int, shapes: dict[str, Any]) -> Found:
  """Reads one checkpoint as it is."""
  items = {
    name: ocp.args.StandardRestore(tree._asdict()) for name, tree in shapes.items()
  }
  got: Any = manager.restore(
    step, args=ocp.args.Composite(**items, meta=ocp.args.JsonRestore())
  )
  trees = {name: type(tree)(**got[name]) for name, tree in shapes.items()}
  return Found(trees, got.meta)


def digest_fault(found: Found, digest: Callable) -> str:
  """Names the tree whose bytes differ from the saved ones; '' if none does."""
  for name, tree in found.trees.items():
    saved = found.meta.get('digest', {}).get(name)
    if saved is not None and int(digest(tree._asdict())) != saved:
      return f'the bytes of {name!r} are not those that were saved'
  return ''


def set_aside(manager: Manager, step: int) -> None:
  """Moves checkpoints newer than `step` into DIRECTORY.damaged.

  The run makes them again; a person can look at the old ones.
  """
  newer = [s for s in manager.all_steps() if s > step]
  if not newer:
    return
  folder = f'{manager.directory}.damaged'
  if jax.process_index() == 0:
    os.makedirs(folder, exist_ok=True)
    for s in newer:
      shutil.move(
        os.path.join(manager.directory, str(s)),
        os.path.join(folder, f'{s}-{time.time_ns()}'),
      )
  mesh.agree(False)  # wait until they are moved
  manager.reload()


def digest(tree: Any) -> jax.Array:
  """Returns a uint32 of all bits of a tree; a change of one element changes it.

  It is a sum of bits * (2 * position + 1) modulo 2**32. The order of a sum does not
  matter, so it is the same on any mesh. Factors are odd, so that no difference of a
  single element is lost.
  """
  total = jnp.uint32(0)
  for leaf in jax.tree.leaves(tree):
    if leaf.dtype in (bool, jnp.uint4, jnp.int4):  # smaller than a byte
      leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, UINTS[leaf.dtype.itemsize])
    position, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis, size in reversed(list(enumerate(leaf.shape))):
      index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
      position += index * jnp.uint32(stride % 2**32)
      stride *= size
    terms = bits.astype(jnp.uint32) * (2 * position + 1)
    total = total * jnp.uint32(1000003) + jnp.sum(terms, dtype=jnp.uint32)
  return total


def abstract(tree: Any) -> Any:
  """Returns the ShapeDtypeStructs of a tree of arrays, with their shardings."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )
