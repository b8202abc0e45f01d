"""Training state on disk: Orbax, by optimizer step, latest n kept.

A checkpoint holds the state, the rollout buffer in use and the place in it, so
that a run resumes to the bit from the middle of a buffer.
"""

import os

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN


def open_manager(directory, keep=2):
  """A CheckpointManager that keeps the latest `keep` steps."""
  options = ocp.CheckpointManagerOptions(
      preservation_policy=LatestN(keep), enable_async_checkpointing=True)
  return ocp.CheckpointManager(os.path.abspath(directory), options=options)


def save(manager, step, state, batch, meta):
  """Saves TrainState, TrainBatch (or None) and a JSON-able dict at `step`."""
  items = {'state': ocp.args.StandardSave(state._asdict()),
           'meta': ocp.args.JsonSave(meta)}
  if batch is not None:
    items['batch'] = ocp.args.StandardSave(batch._asdict())
  manager.save(step, args=ocp.args.Composite(**items), force=True)


def latest(manager):
  """The newest step, or None."""
  return manager.latest_step()


def restore(manager, state, batch=None):
  """(state, batch, meta) of the latest step, or None if there is none.

  `state` and `batch` are trees of ShapeDtypeStructs that carry shardings, so
  that a checkpoint can be read onto another mesh.
  """
  step = latest(manager)
  if step is None:
    return None
  items = {'state': ocp.args.StandardRestore(state._asdict()),
           'meta': ocp.args.JsonRestore()}
  if batch is not None:
    items['batch'] = ocp.args.StandardRestore(batch._asdict())
  got = manager.restore(step, args=ocp.args.Composite(**items))
  batch = type(batch)(**got['batch']) if batch is not None else None
  return type(state)(**got['state']), batch, got['meta']


def abstract(tree):
  """ShapeDtypeStructs of arrays, with their shardings."""
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      tree)
