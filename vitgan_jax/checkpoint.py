"""Orbax checkpoints of the whole training state and the place in the data."""

import contextlib
import os
import sys
from typing import Any, NamedTuple

from etils import epath
import orbax.checkpoint as ocp

from vitgan_jax import compilation, partitioning, processes
from vitgan_jax import config as config_lib
from vitgan_jax.config import ConfigError, lasting_fault
from vitgan_jax.models import networks
from vitgan_jax.train_state import state_shapes


class Run(NamedTuple):
  """A run that was opened.

  Attributes:
    config: that made it.
    nets: its Networks.
    mesh: over the devices that the arrays are on.
    state: GANState of its last checkpoint.
  """

  config: Any
  nets: Any
  mesh: Any
  state: Any


@contextlib.contextmanager
def create_manager(workdir, keep=None):
  """Yields the CheckpointManager of a workdir, asynchronous, keeping last n.

  Args:
    workdir: the run's folder; checkpoints are in its `checkpoints`.
    keep: how many checkpoints to keep; None is all of them.

  Raises:
    ConfigError: at its end, if one cannot be saved.
  """
  manager = ocp.CheckpointManager(
    _directory(workdir),
    options=ocp.CheckpointManagerOptions(max_to_keep=keep),
  )
  try:
    yield manager
  finally:
    with _saving(manager):
      manager.close()


@contextlib.contextmanager
def _saving(manager):
  """Raises a ConfigError for a disk that cannot be written."""
  try:
    yield
  except (OSError, ValueError) as error:  # Orbax's, TensorStore's
    reason = lasting_fault(error)
    if not reason or isinstance(error, ConfigError):
      raise
    raise ConfigError(
      f"no checkpoint can be saved in {manager.directory}: {reason}. Those "
      "there are whole; when there is room, the same command goes on from them"
    ) from error


def open_manager(workdir):
  """Returns the manager of a workdir that has checkpoints, to read them.

  Raises:
    ConfigError: if there are none.
  """
  directory = _directory(workdir)
  if not directory.is_dir():  # the manager would make it
    raise ConfigError(_missing(directory))
  return create_manager(workdir)


def _directory(workdir):
  directory = epath.Path(workdir).absolute() / "checkpoints"
  if os.fspath(directory).encode(errors="replace") != os.fsencode(directory):
    raise ConfigError(  # TensorStore knows UTF-8 alone
      f"checkpoints in {workdir} need file names in UTF-8, and this process "
      f"has them in {sys.getfilesystemencoding()}: set PYTHONUTF8=1, or give a "
      "--workdir of plain letters"
    )
  return directory


def save(manager, state, data_state):
  """Saves under the state's step; returns before it is on disk.

  Args:
    manager: of `create_manager`.
    state: GANState.
    data_state: of the stream of batches, a dict for JSON.

  Raises:
    ConfigError: if the disk is full, or the one before could not be saved.
  """
  step = int(state.step)
  if step not in manager.all_steps():
    with _saving(manager):
      manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          data=ocp.args.JsonSave(data_state),
        ),
        force=True,  # also a step that comes before one that is there
      )


def wait(manager):
  """Returns when what was saved is on the disk.

  Raises:
    ConfigError: if the disk is full.
  """
  with _saving(manager):
    manager.wait_until_finished()


def restore(manager, config, nets, mesh, step=None):
  """Returns the GANState of a checkpoint.

  Args:
    manager: of `create_manager`.
    config: the config that made the run.
    nets: its Networks.
    mesh: of the devices that the arrays go to, not only that of the run.
    step: which checkpoint; None is the latest.

  Raises:
    ConfigError: if there is no such checkpoint, or it is of another model.
  """
  step = manager.latest_step() if step is None else step
  if step not in manager.all_steps():
    raise ConfigError(_missing(manager.directory, step))
  abstract_state = state_shapes(config, nets, mesh)
  try:
    return manager.restore(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)),
    ).state
  except ValueError as error:  # Orbax lists both trees, over many lines
    raise ConfigError(
      f"checkpoint {step} in {manager.directory} holds another model than this "
      "config describes: another config or version made it"
    ) from error


def restore_data_state(manager, step):
  """Returns what `save` got as `data_state` at a step."""
  return manager.restore(
    step, args=ocp.args.Composite(data=ocp.args.JsonRestore())
  ).data


def load_run(workdir, devices=None):
  """Loads a workdir's last checkpoint; writes nothing into it.

  What is compiled from here on is kept where the run's config says.

  Args:
    workdir: the run's folder.
    devices: those that the arrays go to; None is all of them.

  Returns:
    The Run.

  Raises:
    ConfigError: if the folder is no workdir, or has no checkpoint.
  """
  with processes.raise_together():
    config = config_lib.load(workdir)
  compilation.use_cache(config.compilation_cache)
  nets = networks.build(config)
  mesh = partitioning.create_mesh(devices)
  with open_manager(workdir) as manager:
    state = restore(manager, config, nets, mesh)
  return Run(config, nets, mesh, state)


def _missing(directory, step=None):
  which = "" if step is None else f" of step {step}"
  return (
    f"no checkpoint{which} in {directory}; train first, or give another "
    "--workdir"
  )
