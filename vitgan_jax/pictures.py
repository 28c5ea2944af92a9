"""Pictures of many images: grids, and PNG files."""

import io
import re

import numpy as np
from PIL import Image


def image_grid(images, columns=None):
  """Lays images [N, S, S, 3] out in rows.

  A black gap of a sixteenth of an image keeps neighbours apart.

  Args:
    images: the first of them fill the first row.
    columns: how many are in a row; None is as nearly square as N allows.
  """
  num_images, size, _, channels = images.shape
  columns = columns or int(np.ceil(np.sqrt(num_images)))
  rows = -(-num_images // columns)
  gap = size // 16
  pitch = size + gap
  grid = np.zeros((rows * columns, pitch, pitch, channels), images.dtype)
  grid[:num_images, :size, :size] = images
  grid = grid.reshape(rows, columns, pitch, pitch, channels).swapaxes(1, 2)
  grid = grid.reshape(rows * pitch, columns * pitch, channels)
  return grid[: rows * pitch - gap, : columns * pitch - gap]


def class_grid(images, labels):
  """Lays images out as `image_grid` does, each class in rows of its own.

  Where most images have a class of their own, or there are no classes, it is
  `image_grid`.

  Args:
    images: [N, S, S, 3].
    labels: [N], or more, the classes of these; None without classes. Their
      order is that of the rows.
  """
  if labels is None:
    return image_grid(images)
  labels = np.asarray(labels)[: len(images)]
  groups = [images[labels == c] for c in dict.fromkeys(labels.tolist())]
  if 2 * len(groups) > len(images):
    return image_grid(images)
  columns = int(np.ceil(np.sqrt(len(images))))
  columns = min(columns, max(map(len, groups)))
  # What is left of a class's last row is black.
  rows = [
    np.pad(group, [(0, -len(group) % columns)] + 3 * [(0, 0)])
    for group in groups
  ]
  return image_grid(np.concatenate(rows), columns)


def write_png(path, image, min_side=0):
  """Writes a uint8 image [H, W, 3] as a PNG.

  Args:
    path: pathlib.Path or epath.Path.
    image: what to write.
    min_side: it is enlarged by whole pixels to at least this many.
  """
  path.write_bytes(encode_png(enlarge(image, min_side)))


def encode_png(image):
  """Returns a uint8 image [H, W] or [H, W, 3] as the bytes of a PNG."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, format="PNG")
  return file.getvalue()


def enlarge(image, min_side):
  """Enlarges images [..., H, W, C] by whole pixels to at least `min_side`."""
  factor = max(1, -(-min_side // min(image.shape[-3:-1])))
  return image.repeat(factor, axis=-3).repeat(factor, axis=-2)


def natural_key(name):
  """Returns a key for `sorted`, which has block10 after block9."""
  return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)]
