"""Any TFDS dataset -> uint8 arrays on disk -> shuffled batches.

Images are decoded, cropped and resized once, into a memory-mapped array; what
a step reads is a plain gather from it. TensorFlow is imported to make the array
and never to read it.
"""

import difflib
import functools
import json
import os
import pathlib
import re

import numpy as np
from PIL import Image

from vitgan_jax.config import ConfigError

FILTER = "lanczos"


def load_images(data):
  """Returns a dataset's images, prepared if they are not yet.

  Args:
    data: the config's `data`: dataset, split, image_size, data_dir.

  Returns:
    uint8 [num_images, S, S, 3], memory-mapped, read-only.

  Raises:
    ConfigError: if there is no such dataset or it cannot be had.
  """
  path = prepared_path(data)
  if not path.exists():
    _prepare(data, path)
  return np.load(path, mmap_mode="r")


def prepared_path(data):
  """Returns where the prepared array of the config's `data` lives."""
  name = f"{data.dataset}-{data.split}-{data.image_size}.npy"
  return _data_dir(data) / "vitgan_jax" / re.sub(r"[^\w.=+-]", "_", name)


def _data_dir(data):
  default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
  return pathlib.Path(data.data_dir or default).expanduser()


def _prepare(data, path):
  """Writes the prepared array and, beside it, a JSON card of its making."""
  builder, key = _build(data)
  num_images = builder.info.splits[data.split].num_examples
  path.parent.mkdir(parents=True, exist_ok=True)
  # Renamed when it is whole: a run that is cut off leaves nothing half-written.
  partial = path.with_suffix(f".partial{os.getpid()}")
  shape = (num_images, data.image_size, data.image_size, 3)
  try:
    array = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
    count = 0
    for image in _progress(builder, data, key):
      array[count] = resize(image, data.image_size)
      count += 1
    if count < num_images:
      raise ConfigError(
        f"dataset {data.dataset!r} has {count} images of the {num_images} that "
        f"it should have; delete it from {_data_dir(data)} and try again"
      )
    array.flush()
    card = {
      "dataset": builder.info.full_name,
      "split": data.split,
      "num_images": num_images,
      "image_size": data.image_size,
      "crop": "largest centred square",
      "filter": FILTER,
    }
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def _build(data):
  """Returns the TFDS builder, its dataset on disk, and its image feature."""
  import tensorflow_datasets as tfds  # late: it takes seconds

  from vitgan_jax.data import digits  # noqa: F401, registers its builder

  where = _data_dir(data)
  try:
    builder = tfds.builder(data.dataset, data_dir=str(where))
  except Exception as error:  # TFDS raises many kinds, for a name and a config
    similar = difflib.get_close_matches(data.dataset, tfds.list_builders(), 3)
    hint = f" Similar names: {', '.join(similar)}." if similar else ""
    raise ConfigError(
      f"config.data.dataset={data.dataset!r} is not a TFDS dataset."
      f"{hint} All names: https://www.tensorflow.org/datasets/catalog"
    ) from error
  keys = [
    key
    for key, feature in builder.info.features.items()
    if isinstance(feature, tfds.features.Image) and feature.shape[-1] in (1, 3)
  ]
  if not keys:
    raise ConfigError(
      f"dataset {data.dataset!r} has no images of one or three channels; its "
      f"features are {', '.join(builder.info.features)}"
    )
  try:
    builder.download_and_prepare()
  except Exception as error:  # network, quota, checksum, disk, manual files
    reason = str(error).strip().split("\n")[0]
    raise ConfigError(
      f"dataset {data.dataset!r} is not in {where} and could not be downloaded "
      f"({type(error).__name__}: {reason}). Set config.data.data_dir to the "
      "folder that has it, or put the files that TFDS asks for into "
      f"{where / 'downloads' / 'manual'}"
    ) from error
  try:
    num_images = builder.info.splits[data.split].num_examples
  except (KeyError, ValueError):
    num_images = 0
  if not num_images:
    raise ConfigError(
      f"config.data.split={data.split!r} has no images in {data.dataset}; "
      f"it has {', '.join(builder.info.splits)} and parts like 'train[:90%]'"
    )
  return builder, keys[0]


def _read(builder, data, key):
  """Returns an iterable of one feature of a split, in order, as numpy."""
  import tensorflow_datasets as tfds

  dataset = builder.as_dataset(split=data.split, shuffle_files=False)
  return tfds.as_numpy(dataset.map(lambda example: example[key]))


def _progress(builder, data, key):
  """Yields the decoded images of a split in order, with a progress bar."""
  from tqdm import tqdm

  return tqdm(
    _read(builder, data, key),
    desc=f"Preparing {data.dataset} at {data.image_size} px",
    total=builder.info.splits[data.split].num_examples,
    unit=" images",
  )


def resize(image, size):
  """Crops to the largest centred square and resizes, antialiased (Lanczos).

  Args:
    image: uint8 [H, W, 1] or [H, W, 3].
    size: S.

  Returns:
    uint8 [S, S, 3].
  """
  height, width = image.shape[:2]
  side = min(height, width)
  left, top = (width - side) // 2, (height - side) // 2
  # Cut first: given a box, Pillow's filter reads pixels from outside of it.
  image = image[top : top + side, left : left + side]
  image = np.repeat(image, 3 // image.shape[-1], axis=-1)
  if side == size:
    return image
  return np.asarray(
    Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)
  )


class ShuffledBatches:
  """An endless stream of shuffled batches; batch t is a function of t.

  Each epoch is a permutation drawn from the seed and the epoch's number, and
  epochs follow one another without a gap. So the position of the stream is the
  training step, and there is no iterator to save: a run resumes exactly, on
  any number of processes.
  """

  def __init__(
    self, images, batch_size, seed, process_index=0, process_count=1
  ):
    """Makes the stream.

    Args:
      images: uint8 [num_images, S, S, 3].
      batch_size: B, of all processes together; process_count divides it.
      seed: of the permutations.
      process_index: which part of each batch this process reads.
      process_count: number of parts.
    """
    self._images = images
    self._batch_size = batch_size
    self._part = slice(
      process_index * batch_size // process_count,
      (process_index + 1) * batch_size // process_count,
    )
    self._permutation = functools.lru_cache(2)(
      lambda epoch: np.random.default_rng((seed, epoch)).permutation(
        len(images)
      )
    )

  def indices(self, step):
    """Returns the indices [B / process_count] of this process's images."""
    positions = step * self._batch_size + np.arange(self._batch_size)
    epochs, offsets = np.divmod(positions[self._part], len(self._images))
    return np.array(
      [self._permutation(e)[i] for e, i in zip(epochs.tolist(), offsets)]
    )

  def __getitem__(self, step):
    """Returns this process's uint8 part [B / process_count, S, S, 3]."""
    return self._images[self.indices(step)]


def load_labels(data):
  """Returns the labels [num_images] of a prepared split, in its order."""
  builder, _ = _build(data)
  return np.fromiter(_read(builder, data, "label"), np.int64)
