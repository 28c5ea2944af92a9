"""From a config's `data` to a Source whose files are on disk.

The datasets of TFDS come from TFDS. LSUN and a lone zip of CelebA, which its
builders cannot read here, FFHQ, which it does not have, and the user's own
images are read where they lie, without TensorFlow.
"""

import difflib

import numpy as np

from vitgan_jax.data import archives, celeba, digits, lsun, source
from vitgan_jax.data.paths import data_dir, downloading, manual_dir
from vitgan_jax.errors import ConfigError


def open_source(data):
  """Finds or downloads the dataset of a config's `data`.

  Args:
    data: the config's `data`: dataset, path, split, data_dir.

  Returns:
    A Source that is ready to be read.

  Raises:
    ConfigError: if there is no such dataset, or it cannot be had.
  """
  name = data.dataset.split("/")[0]
  if name in _IN_PLACE:
    return _IN_PLACE[name](data)
  if data.path:
    raise ConfigError(
      f"config.data.path={data.path!r} is for the datasets "
      f"{', '.join(_IN_PLACE)}; config.data.dataset is {data.dataset!r}"
    )
  if name == "sklearn_digits":
    return digits.open_digits()
  return _of_tfds(data)


def _folder(data):
  if not data.path:
    raise ConfigError(
      "config.data.path is empty: give the folder or zip of your images, as "
      "--config.data.path=DIR_OR_ZIP"
    )
  archive = archives.open_archive(data.path)
  classes, labels = archive.class_labels()
  order = np.arange(len(archive.names))
  # A part has its share of each class; the whole stays in the order of names.
  if classes and "[" in data.split:
    order = _spread_over_classes(labels)
  splits = {"train": (archive, order)}
  return source.of_archives(
    "folder", data.path, "that of your images", splits, classes, labels
  )


def _spread_over_classes(labels):
  """Returns an order [N] whose every part has its share of each class.

  Image i of the n of a class comes after a share of (i + 1/2) / n of all.
  """
  shares = np.empty(len(labels))
  for label in np.unique(labels):
    (members,) = np.nonzero(labels == label)
    shares[members] = (np.arange(len(members)) + 0.5) / len(members)
  return np.argsort(shares, kind="stable")


def _ffhq(data):
  if not data.path:
    raise ConfigError(
      "config.data.path is empty: download the PNGs of FFHQ, of 1024 or 128 "
      "pixels (https://github.com/NVlabs/ffhq-dataset), and give their folder "
      "or zip as --config.data.path=DIR_OR_ZIP"
    )
  archive = archives.open_archive(data.path)
  return source.of_archives(
    "ffhq",
    data.path,
    "CC BY-NC-SA 4.0, and of each image its own, see "
    "https://github.com/NVlabs/ffhq-dataset",
    {"train": (archive, np.arange(len(archive.names)))},
  )


def _celeba(data):
  """Returns CelebA of a lone zip if there is one, else of TFDS."""
  if data.path or celeba.zip_path(data).exists():
    return celeba.open_zip(data)
  return _of_tfds(data, celeba.advice(data))


def _of_tfds(data, advice=None):
  """Returns the Source of a TFDS dataset, downloaded and prepared."""
  import tensorflow_datasets as tfds  # late: it takes seconds

  where = data_dir(data)
  try:
    builder = tfds.builder(data.dataset, data_dir=str(where))
  except Exception as error:  # TFDS raises many kinds, for a name and a config
    names = [*_IN_PLACE, "sklearn_digits", *tfds.list_builders()]
    similar = difflib.get_close_matches(data.dataset, names, 3)
    hint = f" Similar names: {', '.join(similar)}." if similar else ""
    raise ConfigError(
      f"config.data.dataset={data.dataset!r} is not a TFDS dataset."
      f"{hint} All names: https://www.tensorflow.org/datasets/catalog"
    ) from error
  key = image_key(builder)
  advice = advice or (
    "Set config.data.data_dir to the folder that has it, or put the files that "
    f"TFDS asks for into {manual_dir(data)}"
  )
  with downloading(data, advice):
    builder.download_and_prepare()
  info = builder.info
  keys, classes = [key], None
  label = dict(info.features).get("label")
  if isinstance(label, tfds.features.ClassLabel):
    keys.append("label")
    classes = label.names

  def read(split, start, stop):
    dataset = builder.as_dataset(
      split=tfds.core.ReadInstruction(split, start, stop, unit="abs"),
      decoders=tfds.decode.PartialDecoding(
        dict.fromkeys(keys, True),
        decoders={key: tfds.decode.SkipDecoding()},
      ),
      # Several files at a time would be read in an order of their own.
      read_config=tfds.ReadConfig(interleave_cycle_length=1, add_tfds_id=True),
    )
    # Each call of Python costs more than to read an image.
    for batch in tfds.as_numpy(dataset.batch(64)):
      for i, name in enumerate(batch["tfds_id"]):
        label = int(batch["label"][i]) if classes else None
        yield name.decode(errors="replace"), batch[key][i], label

  return source.Source(
    info.full_name,
    builder.data_path,
    info.redistribution_info.license
    or f"not stated by TFDS, see {info.homepage}",
    {split: info.splits[split].num_examples for split in info.splits},
    read,
    classes,
  )


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
  "lsun": lsun.open_category,
}
