r"""Lists the work units of a sweep: the runs that a launcher starts.

  python -m launch.units --config=configs/cifar10.py \
    --sweep=configs/sweeps/seeds.py --config.total_kimg=1000

prints a line for each: its name, its workdir and its command, with tabs between
them. All launchers start what this prints. Without --sweep it is one run.

A sweep is a file with a function `sweep(add)`, which calls `add({field: value,
...})` once for each work unit, or `add({...}, name=...)` where the fields and
values that differ make too long a name; see configs/sweeps. A change of
`generator.kind` or `discriminator.kind` is what `g=` and `d=` are after
--config: that network comes with its own fields.
"""

import dataclasses
import os
import pathlib
import re
import runpy
import shlex

from absl import flags
from ml_collections import config_flags

from vitgan_jax import cli
from vitgan_jax import config as config_lib
from vitgan_jax.errors import ConfigError
from vitgan_jax.models import kinds


@dataclasses.dataclass(frozen=True)
class Unit:
  """A run of a sweep.

  Attributes:
    name: what is its own in the sweep, as `seed=1`; letters, digits and
      `._=,+-` only, so that it may name a folder.
    workdir: where it trains.
    arguments: of `vitgan_jax.main`.
  """

  name: str
  workdir: str
  arguments: tuple[str, ...]

  @property
  def command(self):
    """The command line, quoted for a shell."""
    return shlex.join(("python", "-m", "vitgan_jax.main", *self.arguments))


def define_flags():
  """Defines --config, --sweep and --workdir, which all launchers have."""
  config_flags.DEFINE_config_file(
    "config", None, "Config file, e.g. configs/digits.py; add :smoke to shrink."
  )
  cli.define_path(
    "sweep", None, "File of a sweep, e.g. configs/sweeps/seeds.py."
  )
  cli.define_path(
    "workdir",
    None,
    "Folder of the run, or of a sweep's runs, a folder each; default "
    "runs/<config name> or runs/<config name>-<sweep name>.",
  )


def from_flags():
  """Returns the units that the flags ask for.

  Raises:
    ConfigError: if flags are missing, or do not fit together.
  """
  if flags.FLAGS.config is None:
    raise ConfigError("--config=configs/<name>.py is required; see --help")
  flag = flags.FLAGS["config"]
  return make_units(
    config_flags.get_config_filename(flag),
    flags.FLAGS.config,
    flag.override_values,
    flags.FLAGS.sweep,
    flags.FLAGS.workdir,
  )


def make_units(path, config, overrides, sweep=None, workdir=None):
  """Returns the units of a sweep, in its order.

  Args:
    path: of the config file, as --config names it.
    config: what it gives, with the overrides.
    overrides: {field: value}, the same for all units.
    sweep: path of a file with `sweep(add)`; None is one unit without a change.
    workdir: the folder of the units' folders, or of the one unit.

  Raises:
    ConfigError: if the sweep cannot be read, sets no field of the config or a
      value that does not fit, or if two of its units have one name.
  """
  stem = cli.config_stem(path)
  if sweep is None:
    config_lib.validate(config)
    workdir = workdir or os.path.join("runs", stem)
    return [_make_unit(_safe(stem), workdir, path, overrides)]
  workdir = workdir or os.path.join(
    "runs", f"{stem}-{pathlib.Path(sweep).stem}"
  )
  units = {}
  for name, change in read(sweep):
    for field in change.keys() & overrides.keys():
      raise ConfigError(
        f"{sweep} sets {field}: leave --config.{field} out, or change the sweep"
      )
    own_path, own_config = _with_kinds(path, config, overrides, change, sweep)
    _check(own_config, change, sweep)
    if name in units:
      raise ConfigError(f"{sweep} has two work units of the name {name}")
    folder = os.path.join(workdir, name)
    units[name] = _make_unit(name, folder, own_path, {**overrides, **change})
  return list(units.values())


def _with_kinds(path, config, overrides, change, sweep):
  """Takes the kinds of networks out of a change; returns (path, config).

  The path has them as arguments, and the config is what it then gives.
  """
  chosen = {name: change.pop(f"{name}.kind", None) for name in kinds.TABLES}
  words = [f"{name[0]}={kind}" for name, kind in chosen.items() if kind]
  if not words:
    return path, config
  path += ("," if ":" in path else ":") + ",".join(words)
  file, argument = path.split(":")
  try:
    config = runpy.run_path(file)["get_config"](argument)
    config.update_from_flattened_dict(overrides)
  except (KeyError, TypeError, ValueError, ConfigError) as error:
    raise ConfigError(f"{sweep} does not fit {path}: {error}") from error
  return path, config


def _make_unit(name, workdir, path, values):
  arguments = [f"--config={path}", f"--workdir={workdir}"]
  arguments += [f"--config.{field}={value}" for field, value in values.items()]
  return Unit(name, workdir, tuple(arguments))


def read(sweep):
  """Returns the names and changes that a sweep's file adds.

  Raises:
    ConfigError: if it cannot be read, or adds nothing.
  """
  names, changes = [], []

  def add(change, name=None):
    names.append(name)
    changes.append(dict(change))

  try:
    found = runpy.run_path(sweep).get("sweep")
    if found is not None:
      found(add)
  except Exception as error:  # whatever the file raises
    raise ConfigError(
      f"--sweep={sweep} cannot be read: {type(error).__name__}: {error}"
    ) from error
  if found is None:
    raise ConfigError(f"{sweep} has no function sweep(add)")
  if not changes or not all(changes):
    raise ConfigError(f"{sweep} adds no work unit, or one without a change")
  varying = [
    field
    for field in dict.fromkeys(f for change in changes for f in change)
    if len(changes) == 1
    or len({repr(change.get(field)) for change in changes}) > 1
  ]
  return [
    (_safe(name or _describe(change, varying)), change)
    for name, change in zip(names, changes)
  ]


def _describe(change, fields):
  """Returns "seed=1,width=64" of a change, for those fields that it sets."""
  return ",".join(
    f"{field.split('.')[-1]}={change[field]}"
    for field in fields
    if field in change
  )


def _check(config, change, sweep):
  """Raises a ConfigError where a change does not fit the config."""
  config = config.copy_and_resolve_references()
  try:
    config.update_from_flattened_dict(change)
  except (KeyError, TypeError, ValueError) as error:
    raise ConfigError(f"{sweep} does not fit the config: {error}") from error
  config_lib.validate(config)


def _safe(name):
  return re.sub(r"[^A-Za-z0-9._=,+-]", "_", name)


def main(arguments):
  """Prints the units."""
  cli.no_arguments(arguments)
  units = from_flags()
  print("\n".join(f"{u.name}\t{u.workdir}\t{u.command}" for u in units))


if __name__ == "__main__":
  define_flags()
  cli.run(main)
