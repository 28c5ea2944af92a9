"""Programs kept, in the process and on the disk, for the next start."""

import functools
import os
import warnings

from etils import epath
import jax
import ml_collections

from vitgan_jax import files
from vitgan_jax.errors import ConfigError

_MIN_COMPILE_SECONDS = 0.1  # less is not worth a file
_NUM_REMEMBERED = 4  # of each function


def once_per_config(make):
  """Remembers what a function of (config, nets, mesh) returned.

  A run that goes back to a checkpoint, or one after another in a notebook, has
  its programs traced and compiled once.
  """

  @functools.lru_cache(maxsize=_NUM_REMEMBERED)
  def remembered(config, nets, mesh):
    return make(ml_collections.ConfigDict(config), nets, mesh)

  @functools.wraps(make)
  def call(config, nets, mesh):
    # A copy, which has a hash: the caller may change the config later.
    return remembered(ml_collections.FrozenConfigDict(config), nets, mesh)

  return call


def use_cache(folder):
  """Has JAX keep what it compiles, and look there first.

  A folder that JAX was given before, as by JAX_COMPILATION_CACHE_DIR, stays.
  One that cannot be written into is told of, and not used: a program that is
  compiled anew is the same. JAX tells programs apart by their code, its own
  version, its flags, and the devices.

  Args:
    folder: made where it is missing; "~" is the user's; "" is none.
  """
  if not folder or jax.config.jax_compilation_cache_dir:
    return
  try:
    path = epath.Path(files.expand(folder))
    # JAX would warn of each program, and of a file in its place with a trace.
    files.check_writable(path, "config.compilation_cache")
  except ConfigError as error:
    files.tell(f"Compiled programs are not kept: {error}")
    return
  # Of a disk that fills up later; of each program, too.
  warnings.filterwarnings("ignore", "Error writing persistent compilation")
  jax.config.update("jax_compilation_cache_dir", os.fspath(path))
  jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS
  )
