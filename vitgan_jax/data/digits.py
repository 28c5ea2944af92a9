"""The handwritten digits that scikit-learn carries."""

import hashlib

import numpy as np

from vitgan_jax import pictures
from vitgan_jax.data.source import Source

NUM_TRAIN = 1497


def open_digits():
  """Returns the Source of 1,797 digits of 8 x 8 pixels, 300 of them held out.

  They are the test set of the UCI optical recognition of handwritten digits;
  nothing is downloaded.
  """
  import sklearn
  from sklearn import datasets

  digits = datasets.load_digits()
  images = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)
  # The writers of the digits follow one another in the file.
  order = np.random.default_rng(0).permutation(len(images)).tolist()
  splits = {"train": order[:NUM_TRAIN], "test": order[NUM_TRAIN:]}
  for split, indices in splits.items():
    # As TFDS orders what it writes, which the demo's run has seen.
    indices.sort(key=lambda i: hashlib.md5(f"{split}{i}".encode()).digest())

  def read(split, start, stop):
    for i in splits[split][start:stop]:
      yield str(i), pictures.encode_png(images[i]), int(digits.target[i])

  return Source(
    "sklearn_digits/1.0.0",
    f"scikit-learn {sklearn.__version__}",
    "see https://archive.ics.uci.edu/dataset/80",
    {split: len(indices) for split, indices in splits.items()},
    read,
    [str(i) for i in range(10)],
  )
