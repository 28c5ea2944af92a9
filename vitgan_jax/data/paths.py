"""Where datasets live on this machine."""

import os
import pathlib

from vitgan_jax import files
from vitgan_jax.config import ConfigError


def data_dir(data):
  """Returns the folder of datasets, as a pathlib.Path.

  Raises:
    ConfigError: if it is not a path of this machine.
  """
  default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  folder = files.expand(
    data.data_dir or default,
    "a folder as --config.data.data_dir or TFDS_DATA_DIR",
  )
  if "://" in folder:
    raise ConfigError(
      f"config.data.data_dir={folder!r}: images are memory-mapped from a local "
      "disk; copy the dataset to one and give its folder"
    )
  return pathlib.Path(folder)


def manual_dir(data):
  """Returns where files that are downloaded by hand belong."""
  return data_dir(data) / "downloads" / "manual"


def not_downloaded(data, error, advice):
  """Returns the ConfigError for a dataset that could not be downloaded."""
  reason = (str(error).strip() or "no reason given").split("\n")[0]
  return ConfigError(
    f"dataset {data.dataset!r} is not in {data_dir(data)} and could not be "
    f"downloaded ({type(error).__name__}: {reason}). {advice}"
  )
