"""From a config's `data` to a TFDS builder whose files are on disk.

The datasets of TFDS come from TFDS. LSUN and a lone zip of CelebA, which its
builders cannot read here, FFHQ, which it does not have, and the user's own
images are read in place.
"""

import difflib

import numpy as np

from vitgan_jax.config import ConfigError
from vitgan_jax.data import archives
from vitgan_jax.data.folders import data_dir, manual_dir, not_downloaded


def open_source(data):
  """Finds or downloads the dataset of a config's `data`.

  Args:
    data: the config's `data`: dataset, path, split, data_dir.

  Returns:
    A tfds.core.DatasetBuilder that is ready to be read, with at least one image
    in the split.

  Raises:
    ConfigError: if there is no such dataset or split, or it cannot be had.
  """
  name, _, variant = data.dataset.partition("/")
  if name in _IN_PLACE:
    builder = _IN_PLACE[name](data, variant)
  elif data.path:
    raise ConfigError(
      f"config.data.path={data.path!r} is for the datasets "
      f"{', '.join(_IN_PLACE)}; config.data.dataset is {data.dataset!r}"
    )
  else:
    builder = _tfds_builder(data)
  try:
    num_images = builder.info.splits[data.split].num_examples
  except (KeyError, ValueError):
    num_images = 0
  if not num_images:
    raise ConfigError(
      f"config.data.split={data.split!r} has no images in {data.dataset}; "
      f"it has {', '.join(builder.info.splits)} and parts like 'train[:90%]'"
    )
  return builder


def _folder(data, unused_variant):
  if not data.path:
    raise ConfigError(
      "config.data.path is empty: give the folder or zip of your images, as "
      "--config.data.path=DIR_OR_ZIP"
    )
  return _in_place(
    "folder",
    data.path,
    with_labels=True,
    description=f"Images of {data.path}.",
    license="that of your images",
  )


def _ffhq(data, unused_variant):
  if not data.path:
    raise ConfigError(
      "config.data.path is empty: download the PNGs of FFHQ, of 1024 or 128 "
      "pixels (https://github.com/NVlabs/ffhq-dataset), and give their folder "
      "or zip as --config.data.path=DIR_OR_ZIP"
    )
  return _in_place(
    "ffhq",
    data.path,
    description="Flickr-Faces-HQ: 70,000 aligned faces.",
    license="CC BY-NC-SA 4.0, and of each image its own, see "
    "https://github.com/NVlabs/ffhq-dataset",
  )


def _in_place(name, path, with_labels=False, **info):
  """Returns a builder with all images of one archive as `train`."""
  from vitgan_jax.data.in_place import InPlaceBuilder  # late: imports TFDS

  archive = archives.open_archive(path)
  labels = archives.class_labels(archive.names) if with_labels else (None, None)
  splits = {"train": (archive, np.arange(len(archive.names)))}
  return InPlaceBuilder(name, path, splits, labels, **info)


def _celeba(data, unused_variant):
  """Returns CelebA of a lone zip if there is one, else of TFDS."""
  from vitgan_jax.data import celeba

  if data.path or celeba.zip_path(data).exists():
    return celeba.open_zip(data)
  return _tfds_builder(data, celeba.advice(data))


def _lsun(data, category):
  from vitgan_jax.data import lsun

  return lsun.open_category(data, category)


def _tfds_builder(data, advice=None):
  """Returns the builder of a TFDS dataset, downloaded and prepared."""
  import tensorflow_datasets as tfds

  from vitgan_jax.data import digits  # noqa: F401, registers its builder

  where = data_dir(data)
  try:
    builder = tfds.builder(data.dataset, data_dir=str(where))
  except Exception as error:  # TFDS raises many kinds, for a name and a config
    names = [*_IN_PLACE, *tfds.list_builders()]
    similar = difflib.get_close_matches(data.dataset, names, 3)
    hint = f" Similar names: {', '.join(similar)}." if similar else ""
    raise ConfigError(
      f"config.data.dataset={data.dataset!r} is not a TFDS dataset."
      f"{hint} All names: https://www.tensorflow.org/datasets/catalog"
    ) from error
  image_key(builder)
  try:
    builder.download_and_prepare()
  except Exception as error:  # network, quota, checksum, disk, manual files
    raise not_downloaded(
      data,
      error,
      advice
      or "Set config.data.data_dir to the folder that has it, or put the files "
      f"that TFDS asks for into {manual_dir(data)}",
    ) from error
  return builder


def image_key(builder):
  """Returns the name of the first image feature of a TFDS builder.

  Raises:
    ConfigError: if it has none of 8 or 16 bits.
  """
  import tensorflow_datasets as tfds

  for key, feature in builder.info.features.items():
    # A floating-point image is stored as four bytes a value.
    if isinstance(feature, tfds.features.Image) and "uint" in str(
      np.dtype(feature.np_dtype)
    ):
      return key
  raise ConfigError(
    f"dataset {builder.name!r} has no images of 8 or 16 bits; its features are "
    f"{', '.join(builder.info.features)}"
  )


_IN_PLACE = {
  "folder": _folder,
  "ffhq": _ffhq,
  "celeb_a": _celeba,
  "lsun": _lsun,
}
