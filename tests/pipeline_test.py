import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
from types import SimpleNamespace

from etils import epath
import ml_collections
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import resource

from configs import celeba64, cifar10, digits, lsun_bedroom64
from tests import runs
from vitgan_jax import config as config_lib
from vitgan_jax.data import pipeline


def noise(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
  "shape, box",  # left, top, right, bottom
  [
    ((40, 40), (0, 0, 40, 40)),
    ((218, 178), (0, 20, 178, 198)),
    ((30, 77), (23, 0, 53, 30)),
    ((33, 20), (0, 6, 20, 26)),
  ],
)
@pytest.mark.parametrize("size", [8, 16, 64])
def test_image_is_cropped_to_its_centre_square_then_resized(shape, box, size):
  image = noise(*shape, 3)
  expected = Image.fromarray(image).crop(box)
  expected = expected.resize((size, size), Image.Resampling.LANCZOS)
  np.testing.assert_array_equal(
    pipeline.resize(image, size), np.asarray(expected)
  )


def test_image_of_the_right_height_is_only_cropped():
  image = noise(32, 40, 3)
  np.testing.assert_array_equal(pipeline.resize(image, 32), image[:, 4:36])


def test_what_lies_outside_the_square_does_not_matter():
  image = noise(64, 40, 3)
  other = noise(64, 40, 3, seed=1)
  other[12:52] = image[12:52]
  np.testing.assert_array_equal(
    pipeline.resize(image, 16), pipeline.resize(other, 16)
  )


@pytest.mark.parametrize("size", [8, 16])
def test_grey_image_becomes_three_equal_channels(size):
  image = noise(8, 8, 1)
  resized = pipeline.resize(image, size)
  assert resized.shape == (size, size, 3) and resized.dtype == np.uint8
  expected = Image.fromarray(image[..., 0]).resize(
    (size, size), Image.Resampling.LANCZOS
  )
  for channel in range(3):
    np.testing.assert_array_equal(resized[..., channel], np.asarray(expected))


def numbered(num_images):
  """Returns images [N, 1, 1, 3] that tell their index."""
  images = np.arange(num_images, dtype=np.uint8).reshape(-1, 1, 1, 1)
  return images.repeat(3, axis=-1)


@pytest.mark.parametrize(
  "num_images, batch_size, processes",
  [(12, 4, 1), (12, 4, 2), (10, 4, 2), (7, 6, 3), (5, 16, 4), (1, 2, 2)],
)
def test_each_epoch_has_every_image_once(num_images, batch_size, processes):
  streams = [
    pipeline.ShuffledBatches(numbered(num_images), batch_size, 3, i, processes)
    for i in range(processes)
  ]
  epochs = 5
  steps = -(-epochs * num_images // batch_size)
  seen = np.concatenate(
    [s[t][:, 0, 0, 0] for t in range(steps) for s in streams]
  )
  for epoch in range(epochs):
    part = seen[epoch * num_images : (epoch + 1) * num_images]
    np.testing.assert_array_equal(np.sort(part), np.arange(num_images))


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_share_the_batch_that_one_would_read(processes):
  images = numbered(31)
  whole = pipeline.ShuffledBatches(images, 12, 0)
  parts = [
    pipeline.ShuffledBatches(images, 12, 0, i, processes)
    for i in range(processes)
  ]
  for step in range(6):
    assert all(len(part[step]) == 12 // processes for part in parts)
    np.testing.assert_array_equal(
      np.concatenate([part[step] for part in parts]), whole[step]
    )


def test_batch_is_a_function_of_the_step():
  images = numbered(10)
  sequential = pipeline.ShuffledBatches(images, 4, 0)
  batches = [sequential[step] for step in range(40)]
  stream = pipeline.ShuffledBatches(images, 4, 0)
  for step in np.random.default_rng(0).permutation(40).tolist():
    np.testing.assert_array_equal(stream[step], batches[step])


def test_epochs_and_seeds_have_their_own_orders():
  images = numbered(50)
  orders = {
    tuple(pipeline.ShuffledBatches(images, 50, seed).indices(epoch).tolist())
    for seed in range(3)
    for epoch in range(3)
  }
  assert len(orders) == 9


def test_order_is_pinned():
  # A change of it breaks runs that go on: say so in the changelog.
  indices = pipeline.ShuffledBatches(numbered(10), 10, 0).indices(1)
  np.testing.assert_array_equal(indices, [9, 1, 3, 8, 7, 6, 0, 4, 2, 5])


class FakeBuilder:
  """As much of a TFDS builder as preparing needs."""

  def __init__(self, num_images):
    split = SimpleNamespace(num_examples=num_images)
    self.info = SimpleNamespace(full_name="fake/1.0.0", splits={"train": split})


@pytest.fixture
def data(tmp_path):
  return ml_collections.ConfigDict(
    {
      "dataset": "fake",
      "split": "train",
      "image_size": 4,
      "data_dir": str(tmp_path),
    }
  )


def files_in(folder):
  return [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]


@pytest.fixture
def fake_source(monkeypatch):
  """Six images, read as if from TFDS."""
  images = noise(6, 4, 4, 3)
  monkeypatch.setattr(
    pipeline, "_build", lambda data: (FakeBuilder(6), "image")
  )
  monkeypatch.setattr(pipeline, "_progress", lambda *args: iter(images))
  return images


def test_images_are_prepared_once(data, fake_source, monkeypatch):
  np.testing.assert_array_equal(pipeline.load_images(data), fake_source)

  def build(data):
    raise AssertionError("built again")

  monkeypatch.setattr(pipeline, "_build", build)
  images = pipeline.load_images(data)
  np.testing.assert_array_equal(images, fake_source)
  assert isinstance(images, np.memmap)
  with pytest.raises(ValueError, match="read-only"):
    images[0] = 0


def test_preparing_leaves_the_array_and_its_card(data, fake_source):
  pipeline.load_images(data)
  path = pipeline.prepared_path(data)
  card = path.with_suffix(".json")
  assert sorted(files_in(data.data_dir)) == sorted([path, card])
  assert json.loads(card.read_text()) == {
    "dataset": "fake/1.0.0",
    "split": "train",
    "num_images": 6,
    "image_size": 4,
    "crop": "largest centred square",
    "filter": "lanczos",
  }


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_preparing_that_is_cut_off_leaves_nothing(
  data, fake_source, monkeypatch, error
):
  def cut_off(*args):
    yield from fake_source[:3]
    raise error

  monkeypatch.setattr(pipeline, "_progress", cut_off)
  with pytest.raises(error):
    pipeline.load_images(data)
  assert not files_in(data.data_dir)


def test_source_with_too_few_images_is_not_filled_up(
  data, fake_source, monkeypatch
):
  monkeypatch.setattr(pipeline, "_progress", lambda *args: fake_source[:3])
  with pytest.raises(config_lib.ConfigError):
    pipeline.load_images(data)
  assert not files_in(data.data_dir)


@pytest.mark.parametrize(
  "field", ["dataset", "split", "image_size", "data_dir"]
)
def test_each_choice_of_data_has_its_own_array(data, field):
  other = data.copy_and_resolve_references()
  other[field] = 2 * data[field]
  assert pipeline.prepared_path(other) != pipeline.prepared_path(data)


def test_data_dir_defaults_to_the_one_of_tfds(data, monkeypatch):
  data.data_dir = ""
  monkeypatch.setenv("TFDS_DATA_DIR", "/somewhere")
  assert pipeline.prepared_path(data).is_relative_to("/somewhere")
  monkeypatch.delenv("TFDS_DATA_DIR")
  home = pathlib.Path("~/tensorflow_datasets").expanduser()
  assert pipeline.prepared_path(data).is_relative_to(home)


def test_reading_prepared_images_does_not_import_tensorflow():
  pipeline.load_images(digits.get_config("smoke").data)
  program = """
import sys
from configs import digits
from vitgan_jax.data import pipeline
images = pipeline.load_images(digits.get_config("smoke").data)
batch = pipeline.ShuffledBatches(images, 8, 0)[0]
print(batch.shape, [m for m in sys.modules if m.startswith("tensorflow")])
"""
  output = subprocess.run(
    [sys.executable, "-c", program],
    cwd=runs.ROOT,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  assert output == "(8, 16, 16, 3) []\n"


def test_unknown_split_is_an_error_that_lists_the_splits(data):
  data.dataset, data.split = "sklearn_digits", "valid"
  with pytest.raises(config_lib.ConfigError, match="it has train, test"):
    pipeline.load_images(data)


@pytest.mark.parametrize("split", ["train[:0]", "train[:5"])
def test_bad_part_of_a_split_is_an_error_of_one_line(data, split):
  data.dataset, data.split = "sklearn_digits", split
  with pytest.raises(config_lib.ConfigError) as error:
    pipeline.load_images(data)
  assert split in str(error.value) and "\n" not in str(error.value)


def test_part_of_a_split_is_the_same_images(data):
  data.dataset, data.split, data.image_size = "sklearn_digits", "train", 8
  whole = pipeline.load_images(data)
  data.split = "train[10:15]"
  np.testing.assert_array_equal(pipeline.load_images(data), whole[10:15])


def test_dataset_without_images_is_an_error(data):
  data.dataset = "glue"
  with pytest.raises(config_lib.ConfigError, match="has no images"):
    pipeline.load_images(data)


def test_dataset_that_does_not_exist_is_an_error_with_a_hint(data, monkeypatch):
  def unknown(name, **kwargs):
    raise tfds.core.registered.DatasetNotFoundError(f"{name}\nnot found")

  monkeypatch.setattr(tfds, "builder", unknown)
  data.dataset = "cifr10"
  with pytest.raises(config_lib.ConfigError, match="cifar10") as error:
    pipeline.load_images(data)
  assert "'cifr10'" in str(error.value) and "\n" not in str(error.value)
  assert not files_in(data.data_dir)


def test_download_that_fails_is_an_error_that_says_what_to_do(
  data, monkeypatch
):
  def fail(self, **kwargs):
    raise ConnectionError("no route to host\nmore lines")

  monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
  data.dataset = "cifar10"
  with pytest.raises(config_lib.ConfigError) as error:
    pipeline.load_images(data)
  message = str(error.value)
  assert "no route to host" in message and "config.data.data_dir" in message
  assert "\n" not in message
  assert not files_in(data.data_dir)


def write_cifar10(folder, images, labels):
  """Writes images [6 n, 32, 32, 3] as the archive that cifar10 downloads."""
  builder = tfds.builder("cifar10", data_dir=str(folder))
  url = builder._cifar_info.url
  url_info = builder.url_infos[url]
  downloads = epath.Path(folder) / "downloads"
  downloads.mkdir(parents=True)
  path = downloads / resource.get_dl_fname(url, url_info.checksum)
  names = [*builder._cifar_info.train_files, *builder._cifar_info.test_files]
  # Each record: a byte of label, then 1,024 bytes each of red, green, blue.
  records = np.concatenate(
    [labels[:, None], images.transpose(0, 3, 1, 2).reshape(len(images), -1)],
    axis=1,
  ).astype(np.uint8)
  files = dict(zip(names, [x.tobytes() for x in np.split(records, len(names))]))
  files["batches.meta.txt"] = "\n".join(f"class{i}" for i in range(10)).encode()
  with tarfile.open(path, "w:gz") as archive:
    for name, content in files.items():
      info = tarfile.TarInfo(builder._cifar_info.prefix + name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  resource.write_info_file(
    url, path, "cifar10", os.path.basename(url), url_info
  )


def test_cifar10_of_tfds_trains(tmp_path):
  images = noise(48, 32, 32, 3)  # eight in each of the archive's six files
  labels = np.random.default_rng(0).integers(0, 10, 48)
  write_cifar10(tmp_path / "data", images, labels)
  config = cifar10.get_config("smoke")
  config.data.data_dir = str(tmp_path / "data")
  config.total_kimg = 0.016  # one call

  prepared = pipeline.load_images(config.data)
  index = {image.tobytes(): i for i, image in enumerate(images)}
  order = [index[image.tobytes()] for image in prepared]  # TFDS shuffles once
  assert sorted(order) == list(range(40))
  np.testing.assert_array_equal(
    pipeline.load_labels(config.data), labels[order]
  )

  run = runs.train_quietly(config, tmp_path / "run", num_devices=1)
  assert int(run.state.step) == 2
  assert (run.workdir / "samples" / "00000002.png").exists()


@pytest.fixture
def mock_images(monkeypatch):
  """TFDS with 20 random images in the split `train` of any dataset."""

  def prepare(self, **kwargs):
    split = tfds.core.SplitInfo(name="train", shard_lengths=[20], num_bytes=0)
    self.info.set_splits(tfds.core.SplitDict([split]))

  with (
    tfds.testing.mock_data(num_examples=20),
    pytest.MonkeyPatch.context() as m,
  ):
    m.setattr(tfds.core.DatasetBuilder, "download_and_prepare", prepare)
    yield


@pytest.mark.parametrize("module", [celeba64, lsun_bedroom64])
def test_images_of_64_pixels_train(module, mock_images, tmp_path):
  config = module.get_config("smoke")
  config.data.data_dir = str(tmp_path / "data")
  config.total_kimg = 0.016  # one call
  builder = tfds.builder(config.data.dataset, data_dir=config.data.data_dir)
  builder.download_and_prepare()
  dataset = builder.as_dataset(split="train", shuffle_files=False)
  source = [example["image"] for example in tfds.as_numpy(dataset)]
  assert all(image.shape[0] != image.shape[1] for image in source[:1])

  prepared = pipeline.load_images(config.data)
  assert prepared.shape == (20, 64, 64, 3)
  for image, original in zip(prepared, source):
    np.testing.assert_array_equal(image, pipeline.resize(original, 64))

  run = runs.train_quietly(config, tmp_path / "run", num_devices=1)
  assert int(run.state.step) == 2
  with Image.open(run.workdir / "grid.png") as grid:
    assert grid.size == (536, 536)  # 4 x 4 images of 64 and gaps of 4, twice
