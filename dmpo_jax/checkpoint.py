"""Training state on disk: Orbax, by optimizer step; the latest n and the best.

A checkpoint holds the state, the rollout buffer in use, the place in it and the
buffer sampled ahead, if there is one, so that a run resumes to the bit from the
middle of a buffer. Orbax moves it into place when it is whole, but the arrays
in it are not checked when read: `digest` is stored beside them. What cannot be
read is skipped for the checkpoint before it; nothing is ever deleted for it.
"""

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging

from dmpo_jax import mesh, metrics

NAMES = ('state', 'batch', 'ahead')
UINTS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes of an element


class Kept:
  """Orbax' preservation policy: the latest `count`, and the step `best`.

  Orbax' own BestN wants the metric when a step is saved; a place that is saved
  and then validated is the best all the same.
  """

  def __init__(self, count):
    self.count, self.best = count, None

  def should_preserve(self, checkpoints, *, context):
    steps = [info.step for info in checkpoints]
    return [step in steps[-self.count :] or step == self.best for step in steps]


@functools.cache
def save_whole():
  """In one process, a replicated array is written by one device.

  Orbax has each write a slice, a program a slice: that spreads the writing over
  processes, but in one it makes a save five times slower.
  """
  if jax.process_count() == 1:
    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # it warns of what is asked for
    ocp.type_handlers.register_type_handler(
      jax.Array,
      ocp.type_handlers.ArrayHandler(use_replica_parallel=False),
      override=True,
    )
    logging.set_verbosity(level)


class Manager(ocp.CheckpointManager):
  """A CheckpointManager that can be told which step is the best."""

  def __init__(self, directory, keep):
    self.kept = Kept(keep)
    save_whole()
    super().__init__(
      os.path.abspath(directory),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self.kept, enable_async_checkpointing=True
      ),
    )

  def reached_preemption(self, step):
    """Never: guard.Preemption asks JAX, which wants one row of counts.

    Orbax would mix its steps into them, and SIGTERM be missed.
    """
    return False


@contextlib.contextmanager
def reader(manager):
  """A manager that reads on its own, where there are several processes.

  Orbax makes them wait for each other: one that finds a damaged file and
  raises would leave the others there.
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
  ) as found:
    yield found


def open_manager(directory, keep=2):
  """A manager that keeps the latest `keep` steps and the best."""
  return Manager(directory, keep)


def save(manager, step, state, batch, meta, ahead=None, digest=None):
  """Saves TrainState, TrainBatches (or None) and a JSON-able dict at `step`.

  meta['best'], if there: {'step': ...} of the checkpoint that is kept however
  old it gets. digest: the function below, compiled.
  """
  trees = {'state': state, 'batch': batch, 'ahead': ahead}
  trees = {name: tree._asdict() for name, tree in trees.items() if tree is not None}
  if digest:
    meta = {**meta, 'digest': {name: int(digest(tree)) for name, tree in trees.items()}}
  items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
  manager.kept.best = (meta.get('best') or {'step': None})['step']
  manager.save(
    step, force=True, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta))
  )


def is_due(section, done, saved):
  """Whether to save: by updates `done`, or by the minutes since `saved`."""
  if done % section.every == 0:
    return True
  spent = time.monotonic() - saved
  return bool(section.every_minutes) and mesh.agree(spent >= 60 * section.every_minutes)


def restore(
  manager,
  state,
  buffers=lambda step: (None, None),
  digest=None,
  refuse=lambda meta: '',
  only=None,
):
  """(state, batch, ahead, meta) of the newest step that can be read, or None.

  `state` and the two of buffers(step) are trees of ShapeDtypeStructs that carry
  shardings, so that a checkpoint can be read onto another mesh; None leaves a
  buffer out. refuse(meta) says why a checkpoint is not this run's, or ''. A
  step that cannot be used is skipped with a warning. ValueError if none can be;
  what says nothing of the files (memory is short, a disk is away) is raised.
  only: no other step than this.
  """
  faults = {}
  steps = sorted(manager.all_steps(), reverse=True) if only is None else [only]
  for step in steps:
    try:
      with reader(manager) as files:
        found = read(files, step, state, *buffers(step))
      fault = refuse(found[3])
    except Exception as error:  # whatever a damaged file makes others raise
      if passing(error):
        raise
      fault = f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'
    if not mesh.agree(fault):  # skipped by one process, skipped by all
      fault = digest and changed(found, digest)  # computed by all together
      if not fault:
        return found
    found = None  # the next is not read beside it: two might not fit
    faults[step] = fault or 'another process cannot read it'
    logging.warning(
      'checkpoint %s cannot be used: %s',
      os.path.join(manager.directory, str(step)),
      faults[step],
    )
  if faults:
    told = '\n'.join(f'  {step}: {fault}' for step, fault in faults.items())
    raise ValueError(
      f'no checkpoint in {manager.directory} can be used:\n{told}\nBring one '
      'back from a copy, or move the directory away to begin from nothing'
    )
  return None


def passing(error):
  """Whether an error is of the machine: the files may be well."""
  while error:  # what Orbax raises says only that it met another
    number = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
      return True
    if number and int(number[1]) != errno.ENOENT:
      return True
    if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
      return True
    error = error.__cause__ or error.__context__
  return False


def read(manager, step, state, batch, ahead):
  """(state, batch, ahead, meta) at `step`, as it lies there."""
  trees = zip(NAMES, (state, batch, ahead), strict=True)
  wanted = {name: tree for name, tree in trees if tree}
  items = {
    name: ocp.args.StandardRestore(tree._asdict()) for name, tree in wanted.items()
  }
  got = manager.restore(
    step, args=ocp.args.Composite(**items, meta=ocp.args.JsonRestore())
  )
  return (
    *(type(wanted[name])(**got[name]) if name in wanted else None for name in NAMES),
    got.meta,
  )


def changed(found, digest):
  """Whose bytes are not those that were saved, as a sentence, or ''."""
  *trees, meta = found
  for name, tree in zip(NAMES, trees, strict=True):
    value = meta.get('digest', {}).get(name)
    if tree and value is not None and int(digest(tree._asdict())) != value:
      return f'the bytes of {name!r} are not those that were saved'
  return ''


def set_aside(manager, step):
  """Moves what is newer than `step` out of the way, so that it can be redone.

  Into DIRECTORY.damaged, where a person can look at it.
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
  mesh.agree(False)  # nobody goes on before they are moved
  manager.reload()


def replace(manager, step, state, batch, meta, ahead=None, digest=None):
  """`save` at `step` in place of what is there; all that is newer goes, too.

  Moved aside, as `set_aside` does. Whole or not at all: after a kill there is
  what was before, or what `settle` completes.
  """
  with open_manager(f'{manager.directory}.next') as other:
    save(other, step, state, batch, meta, ahead, digest)
  settle(manager)


def amend(manager, step, **fields):
  """Puts `fields` into the meta that is saved at `step`, which stays whole."""
  if jax.process_index() == 0:
    path = os.path.join(manager.directory, str(step), 'meta', 'metadata')
    with open(path, encoding='utf-8') as f:
      meta = json.load(f)
    metrics.replace(path, json.dumps({**meta, **fields}))
  mesh.agree(False)  # nobody reads it before it is there


def settle(manager):
  """Completes a `replace` that was interrupted."""
  folder = f'{manager.directory}.next'
  names = os.listdir(folder) if os.path.isdir(folder) else []
  steps = [int(name) for name in names if name.isdigit()]  # one that is whole
  mesh.agree(False)  # nobody looks for it any more when it is moved
  for step in steps:
    set_aside(manager, step - 1)
    if jax.process_index() == 0:
      shutil.move(
        os.path.join(folder, str(step)), os.path.join(manager.directory, str(step))
      )
      shutil.rmtree(folder)
    mesh.agree(False)
    manager.reload()


def digest(tree):
  """A uint32 of all bits of a tree; any element that changes, changes it.

  Sums modulo 2**32, in which no order matters: the same on any mesh. Factors
  are odd, so that no difference of one element is lost.
  """
  total = jnp.uint32(0)
  for leaf in jax.tree.leaves(tree):
    if leaf.dtype in (bool, jnp.uint4, jnp.int4):  # of less than a byte
      leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, UINTS[leaf.dtype.itemsize])
    place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis, size in reversed(list(enumerate(leaf.shape))):
      at = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
      place += at * jnp.uint32(stride % 2**32)
      stride *= size
    terms = bits.astype(jnp.uint32) * (2 * place + 1)
    total = total * jnp.uint32(1000003) + jnp.sum(terms, dtype=jnp.uint32)
  return total


def abstract(tree):
  """ShapeDtypeStructs of arrays, with their shardings."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )
