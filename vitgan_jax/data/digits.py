"""A TFDS builder of the handwritten digits that scikit-learn carries."""

import numpy as np
from sklearn import datasets
import tensorflow_datasets as tfds

NUM_TRAIN = 1497


class SklearnDigits(tfds.core.GeneratorBasedBuilder):
  """1,797 handwritten digits of 8x8 pixels; nothing is downloaded."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "Initial release."}

  def _info(self):
    return self.dataset_info_from_configs(
      description="Test set of the UCI optical recognition of handwritten "
      "digits, as in sklearn.datasets.load_digits; 300 of them held out.",
      homepage="https://archive.ics.uci.edu/dataset/80",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(8, 8, 1)),
          "label": tfds.features.ClassLabel(num_classes=10),
        }
      ),
      supervised_keys=("image", "label"),
    )

  def _split_generators(self, dl_manager):
    # The writers of the digits follow one another in the file.
    order = np.random.default_rng(0).permutation(1797)
    return {
      "train": self._generate_examples(order[:NUM_TRAIN]),
      "test": self._generate_examples(order[NUM_TRAIN:]),
    }

  def _generate_examples(self, indices):
    digits = datasets.load_digits()
    images = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)
    for i in indices.tolist():
      yield i, {"image": images[i][..., None], "label": digits.target[i]}
