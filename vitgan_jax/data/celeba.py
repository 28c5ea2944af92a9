"""CelebA from its one zip of aligned images, read in place.

TFDS wants four more files, of attributes, and downloads from a drive whose
quota is often used up.
"""

import pathlib
import re

import numpy as np

from vitgan_jax import files
from vitgan_jax.data import archives, source
from vitgan_jax.data.paths import manual_dir
from vitgan_jax.errors import ConfigError

HOMEPAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
# list_eval_partition.txt: number of the first image of each split.
_SPLITS = {"train": 1, "validation": 162_771, "test": 182_638}
ZIP = "img_align_celeba.zip"
_FILES = (
  ZIP,
  "list_eval_partition.txt",
  "list_attr_celeba.txt",
  "list_landmarks_align_celeba.txt",
  "identity_CelebA.txt",
)


def zip_path(data):
  """Returns where the zip of a config's `data` is or would be."""
  return pathlib.Path(files.expand(data.path or manual_dir(data) / ZIP))


def advice(data):
  """Returns what to do when TFDS cannot download CelebA."""
  return (
    f"Its host often refuses: download {ZIP} with a browser "
    f"({HOMEPAGE}) and put it into {manual_dir(data)}; that one file is "
    f"enough (TFDS itself asks for all five: {', '.join(_FILES)})"
  )


def open_zip(data):
  """Returns the Source of the images of the zip, or folder, of `data`.

  Raises:
    ConfigError: if it is not there, or holds other files.
  """
  path = zip_path(data)
  archive = archives.open_archive(path)
  numbers = []
  for name in archive.names:
    stem = pathlib.PurePosixPath(name).stem
    if not re.fullmatch(r"\d{6}", stem):
      raise ConfigError(
        f"{path} holds {name}: the aligned images of CelebA are called "
        "img_align_celeba/000001.jpg, ..."
      )
    numbers.append(int(stem))
  bounds = [*_SPLITS.values(), np.inf]
  which = np.searchsorted(bounds, numbers, side="right") - 1
  splits = {
    split: (archive, np.flatnonzero(which == i))
    for i, split in enumerate(_SPLITS)
  }
  licence = f"non-commercial research purposes only, see {HOMEPAGE}"
  return source.of_archives("celeb_a", path, licence, splits)
