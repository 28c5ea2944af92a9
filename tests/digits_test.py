import numpy as np
import pytest
from sklearn import datasets

from configs import digits as digits_config
from vitgan_jax.data import pipeline


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  config = digits_config.get_config()
  config.data.image_size = 8
  config.data.data_dir = str(tmp_path_factory.mktemp("data"))
  return config.data


@pytest.fixture(scope="module")
def splits(data):
  """Returns {split: (images, labels)}."""
  result = {}
  for data.split in ("train", "test"):
    images = pipeline.load_images(data)
    result[data.split] = images[:], images.labels()
  return result


def records(images, labels):
  """Returns images and labels as sorted strings of bytes."""
  return sorted(
    image.tobytes() + bytes([label]) for image, label in zip(images, labels)
  )


def test_three_hundred_digits_are_held_out(splits):
  assert splits["train"][0].shape == (1497, 8, 8, 3)
  assert splits["test"][0].shape == (300, 8, 8, 3)


def test_splits_together_are_the_digits_of_sklearn(splits):
  digits = datasets.load_digits()
  images = np.floor(digits.images * 255 / 16 + 0.5).astype(np.uint8)
  images = np.repeat(images[..., None], 3, axis=-1)
  both = records(*splits["train"]) + records(*splits["test"])
  # Equal as multisets, so that no digit is in both splits.
  assert sorted(both) == records(images, digits.target)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_split_has_all_classes_about_equally(splits, split):
  labels = splits[split][1]
  counts = np.bincount(labels, minlength=10)
  # Five standard deviations of a binomial count.
  deviation = np.sqrt(len(labels) * 0.1 * 0.9)
  assert np.all(np.abs(counts - len(labels) / 10) < 5 * deviation)


def test_held_out_digits_are_not_the_last_of_the_file(splits):
  digits = datasets.load_digits()
  images = np.repeat(
    np.rint(digits.images * 255 / 16).astype(np.uint8)[..., None], 3, axis=-1
  )
  last = {image.tobytes() for image in images[-300:]}
  held_out = {image.tobytes() for image in splits["test"][0]}
  assert len(last & held_out) < 150
