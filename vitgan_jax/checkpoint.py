"""Orbax checkpoints of the whole training state."""

import pathlib

import jax
import orbax.checkpoint as ocp

from vitgan_jax.config import ConfigError
from vitgan_jax.train_state import create_train_state


def create_manager(workdir, keep=None):
  """Returns the CheckpointManager of a workdir, asynchronous, keeping last n.

  Args:
    workdir: the run's folder; checkpoints are in its `checkpoints`.
    keep: how many checkpoints to keep; None is all of them.
  """
  return ocp.CheckpointManager(
    pathlib.Path(workdir).absolute() / "checkpoints",
    options=ocp.CheckpointManagerOptions(max_to_keep=keep),
  )


def save(manager, state):
  """Saves a GANState under its step; returns before it is on disk."""
  step = int(state.step)
  if step not in manager.all_steps():
    manager.save(step, args=ocp.args.StandardSave(state))


def restore(manager, config, sharding, step=None):
  """Returns the GANState of a checkpoint.

  Args:
    manager: of `create_manager`.
    config: the config that made the run.
    sharding: where the restored arrays go; any mesh will do.
    step: which checkpoint; None is the latest.

  Raises:
    ConfigError: if there is no such checkpoint.
  """
  step = manager.latest_step() if step is None else step
  if step not in manager.all_steps():
    raise ConfigError(
      f"no checkpoint{f' of step {step}' if step else ''} in "
      f"{manager.directory}; train first, or give another --workdir"
    )
  abstract_state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    jax.eval_shape(lambda: create_train_state(config)),
  )
  return manager.restore(step, args=ocp.args.StandardRestore(abstract_state))
