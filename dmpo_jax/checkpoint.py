"""Training state on disk: Orbax, by optimizer step, latest n kept.

A checkpoint holds the state, the rollout buffer in use, the place in it and the
buffer sampled ahead, if there is one, so that a run resumes to the bit from the
middle of a buffer.
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


def save(manager, step, state, batch, meta, ahead=None):
  """Saves TrainState, TrainBatches (or None) and a JSON-able dict at `step`."""
  items = {'state': ocp.args.StandardSave(state._asdict()),
           'meta': ocp.args.JsonSave(meta)}
  for name, buffer in (('batch', batch), ('ahead', ahead)):
    if buffer is not None:
      items[name] = ocp.args.StandardSave(buffer._asdict())
  manager.save(step, args=ocp.args.Composite(**items), force=True)


def latest(manager):
  """The newest step, or None."""
  return manager.latest_step()


def restore(manager, state, batch=None, ahead=None):
  """(state, batch, ahead, meta) of the latest step, or None if there is none.

  The arguments are trees of ShapeDtypeStructs that carry shardings, so that a
  checkpoint can be read onto another mesh; None leaves a buffer out.
  """
  step = latest(manager)
  if step is None:
    return None
  items = {'state': ocp.args.StandardRestore(state._asdict()),
           'meta': ocp.args.JsonRestore()}
  wanted = {name: buffer for name, buffer in (('batch', batch),
                                              ('ahead', ahead)) if buffer}
  for name, buffer in wanted.items():
    items[name] = ocp.args.StandardRestore(buffer._asdict())
  got = manager.restore(step, args=ocp.args.Composite(**items))
  batch, ahead = (type(wanted[name])(**got[name]) if name in wanted else None
                  for name in ('batch', 'ahead'))
  return type(state)(**got['state']), batch, ahead, got['meta']


def abstract(tree):
  """ShapeDtypeStructs of arrays, with their shardings."""
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      tree)
