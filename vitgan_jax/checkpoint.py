"""Orbax checkpoints of the whole training state and the place in the data.

Orbax and zarr let some flipped bits pass. So a checkpoint holds the checksums
of its files, written before it gets its name: it never is without them.
"""

import contextlib
import itertools
import os
import sys
from typing import Any, NamedTuple

from etils import epath
import jax
import orbax.checkpoint as ocp

from vitgan_jax import compilation, files, partitioning, processes
from vitgan_jax import config as config_lib
from vitgan_jax.errors import (
  ConfigError,
  DamagedError,
  lasting_fault,
  storage_errors,
  storage_fault,
)
from vitgan_jax.models import networks
from vitgan_jax.train_state import state_shapes


class Run(NamedTuple):
  """A run that was opened.

  Attributes:
    config: that made it.
    nets: its Networks.
    mesh: over the devices that the arrays are on.
    state: GANState of its last whole checkpoint.
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
    options=ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      async_options=ocp.options.AsyncOptions(
        post_finalization_callback=lambda: _write_checksums(manager)
      ),
    ),
  )
  try:
    yield manager
  finally:
    with _saving(manager), files.waiting("saving the last checkpoint"):
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


def _folder(manager, step):
  return manager.directory / str(step)


def save(manager, state, data_state):
  """Saves under the state's step; returns before it is on disk.

  A damaged checkpoint of that step is set aside, a whole one kept.

  Args:
    manager: of `create_manager`.
    state: GANState.
    data_state: of the stream of batches, a dict for JSON.

  Raises:
    ConfigError: if the disk is full, or the one before could not be saved.
  """
  step = int(state.step)
  with _saving(manager):
    manager.wait_until_finished()  # as saving does: the step before is written
    if step in manager.all_steps():
      try:
        _check(manager, step)
        return
      except DamagedError as error:
        _set_aside(manager, step, error)
    manager.saved_step = step
    manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state)
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


def _write_checksums(manager):
  """Writes those of the checkpoint that is about to get its name."""
  if processes.is_primary():
    folder = _folder(manager, manager.saved_step)  # where files are not renamed
    temporary = folder.with_name(folder.name + ocp.utils.TMP_DIR_SUFFIX)
    folder = temporary if temporary.exists() else folder
    paths = [
      path / name
      for path, _, names in folder.walk()
      for name in names
      if path != folder  # Orbax still writes there, what no reader needs
    ]
    files.write_checksums(folder, paths)


def has_any(workdir):
  """Tells, in all processes, whether a workdir has a checkpoint."""
  found = bool(files.numbers_in(_directory(workdir)))
  return processes.broadcast_from_first(found)


def whole_steps(workdir):
  """Returns the steps of a workdir's checkpoints that have no fault."""
  directory = _directory(workdir)
  steps = files.numbers_in(directory)
  return {step for step in steps if not _fault(directory / str(step))}


def _fault(folder):
  """Returns what is wrong with the files of a checkpoint's folder, or None.

  A checkpoint of an earlier version has no checksums, and seems whole.
  """
  try:
    if not (folder / files.CHECKSUMS).exists():
      return None if (folder / "state").is_dir() else "it has no state"
  except OSError as error:
    return f"it cannot be read: {storage_fault(error)}"
  return files.fault_of(folder)


def _check(manager, step):
  """Raises a DamagedError in all processes if the first one sees a fault."""
  found = _fault(_folder(manager, step)) if processes.is_primary() else None
  if processes.broadcast_from_first(bool(found)):
    raise _damaged(manager, step, found or "the first process says how")


def _damaged(manager, step, reason):
  return DamagedError(
    f"checkpoint {step} in {manager.directory} is damaged: {reason}"
  )


def _set_aside(manager, step, error):
  """Renames a damaged checkpoint, so that none is taken for one."""
  folder = _folder(manager, step)
  with processes.raise_together():
    if processes.is_primary():
      names = (f"{step}.damaged{i or ''}" for i in itertools.count())
      aside = next(x for x in map(folder.with_name, names) if not x.exists())
      try:
        folder.rename(aside)
      except storage_errors() as other:
        raise ConfigError(
          f"{error}, and cannot be renamed: {storage_fault(other)}"
        ) from other
      files.tell(f"Set aside as {aside.name}: {error}")
  manager.reload()


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
    DamagedError: if it is not what was written.
  """
  step = manager.latest_step() if step is None else step
  if step not in manager.all_steps():
    raise ConfigError(_missing(manager.directory, step))
  _check(manager, step)
  is_known = processes.broadcast_from_first(
    (_folder(manager, step) / files.CHECKSUMS).exists()
  )
  abstract_state = state_shapes(config, nets, mesh)
  arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
  try:
    with processes.raise_together():
      try:
        return manager.restore(step, args=arguments).state
      except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # of this machine
      except Exception as error:  # Orbax and TensorStore raise many kinds
        raise ConfigError(type(error).__name__) from error
  except ConfigError as error:  # Orbax lists both trees, over many lines
    if is_known:
      raise ConfigError(
        f"checkpoint {step} in {manager.directory} holds another model than "
        "this config describes: another config or version made it"
      ) from error
    reason = "it does not read as one of this version"
    raise _damaged(manager, step, reason) from error


def restore_data_state(manager, step):
  """Returns what `save` got as `data_state` at a step.

  Raises:
    DamagedError: if it cannot be read.
  """
  arguments = ocp.args.Composite(data=ocp.args.JsonRestore())
  try:
    return manager.restore(step, args=arguments).data
  except Exception as error:
    reason = "the place in the data cannot be read"
    raise _damaged(manager, step, reason) from error


def restore_last(manager, config, nets, mesh, set_aside=False):
  """Returns the GANState and the data state of the last whole checkpoint.

  Args:
    manager: of `create_manager`.
    config: the config that made the run.
    nets: its Networks.
    mesh: of the devices that the arrays go to, not only that of the run.
    set_aside: whether to rename the damaged ones that come after it; else
      they are told of alone.

  Raises:
    ConfigError: if there is no checkpoint, or it is of another model.
    DamagedError: if none is whole; all stay where they are.
  """
  errors = {}
  for step in sorted(manager.all_steps(), reverse=True):
    try:
      state = restore(manager, config, nets, mesh, step)
      data_state = restore_data_state(manager, step)
      break
    except DamagedError as error:
      errors[step] = error
  else:
    if not errors:
      raise ConfigError(_missing(manager.directory))
    raise DamagedError(
      f"no checkpoint is whole: {'; '.join(map(str, errors.values()))}. Give "
      "another --workdir, or delete these to train anew"
    )
  for damaged, error in errors.items():
    if set_aside:
      _set_aside(manager, damaged, error)
    elif processes.is_primary():
      files.tell(f"Passed over: {error}")
  if errors and processes.is_primary():
    files.tell(f"Checkpoint {step} in {manager.directory} is taken instead")
  return state, data_state


def load_run(workdir, devices=None):
  """Loads a workdir's last whole checkpoint; writes nothing into it.

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
    state, _ = restore_last(manager, config, nets, mesh)
  return Run(config, nets, mesh, state)


def _missing(directory, step=None):
  which = "" if step is None else f" of step {step}"
  return (
    f"no checkpoint{which} in {directory}; train first, or give another "
    "--workdir"
  )
