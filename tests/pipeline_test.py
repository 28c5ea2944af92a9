import json
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from benchmarks import data as benchmark
from configs import digits
from tests import datasets, runs
from tests.datasets import data_config, encode, noise
from vitgan_jax.data import pipeline, prepare
from vitgan_jax.errors import ConfigError


@pytest.fixture(scope="module")
def prepared_folder(tmp_path_factory):
  """A prepared folder of 18 images of 8 pixels, in five shards."""
  tmp_path = tmp_path_factory.mktemp("prepared")
  files = {f"{i:02d}.png": encode(noise(8, 8, 3, seed=i)) for i in range(18)}
  datasets.write_folder(tmp_path / "images", files)
  data = data_config(tmp_path, "folder", path=str(tmp_path / "images"))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prepare, "_MIN_SHARD_IMAGES", 4)
    return prepare.prepare(data)


@pytest.fixture(scope="module")
def expected():
  return np.stack([noise(8, 8, 3, seed=i) for i in range(18)])


@pytest.mark.parametrize(
  "index",
  [
    0,
    17,
    -1,
    slice(None),
    slice(3, 15, 2),
    slice(64),
    slice(5, 5),
    [3, 17, 3, 0],
    np.array([[4, 5], [11, 0]]),
    np.zeros(0, np.int64),
  ],
)
def test_prepared_images_are_indexed_like_an_array(
  prepared_folder, expected, index
):
  images = pipeline.PreparedImages(prepared_folder)
  assert len(images) == 18 and images.shape == expected.shape
  selected = images[index]
  assert selected.dtype == np.uint8
  np.testing.assert_array_equal(selected, expected[index])


def test_index_out_of_range_is_an_error(prepared_folder):
  images = pipeline.PreparedImages(prepared_folder)
  with pytest.raises(IndexError):
    images[18]
  with pytest.raises(IndexError):
    images[[0, 18]]


def test_giving_pages_back_changes_nothing(
  prepared_folder, expected, monkeypatch
):
  images = pipeline.PreparedImages(prepared_folder)
  monkeypatch.setattr(pipeline, "_RELEASE_BYTES", 1000)
  for _ in range(3):
    np.testing.assert_array_equal(images[:], expected)
    assert images._bytes_read == 0


def test_memory_stays_bounded_while_reading(tmp_path):
  folder = tmp_path / "x"
  benchmark.write_sparse(folder, num_shards=4, shape=(12_500, 64, 64, 3))
  few = benchmark.peak_megabytes(folder, 1)
  many = benchmark.peak_megabytes(folder, 390)  # all of the 600 MB
  assert many - few < 300


def test_file_that_is_missing_or_cut_short_is_an_error(
  prepared_folder, tmp_path
):
  for k, damage in enumerate(
    [
      lambda path: path.unlink(),
      lambda path: os.truncate(path, 300),
      lambda path: path.write_bytes(b""),
      lambda path: np.save(path, np.zeros((4, 8, 8, 3))),
      lambda path: np.save(path, np.zeros((5, 8, 8, 3), np.uint8)),
    ]
  ):
    path = tmp_path / str(k)
    shutil.copytree(prepared_folder, path)
    damage(path / "images-00001.npy")
    with pytest.raises(
      ConfigError, match=r"images-00001\.npy is damaged: delete"
    ):
      pipeline.PreparedImages(path)


@pytest.mark.parametrize(
  "content", ["", "{", "3", "[" * 100_000, '{"shards": []}', None]
)
def test_damaged_card_is_an_error(prepared_folder, tmp_path, content):
  path = shutil.copytree(prepared_folder, tmp_path / "x")
  if content is None:
    (path / "card.json").unlink()
  else:
    (path / "card.json").write_text(content)
  with pytest.raises(ConfigError, match=r"card\.json is damaged"):
    pipeline.PreparedImages(path)


@pytest.mark.parametrize(
  "damage",
  [
    {"image_size": "8"},
    {"shards": 3},
    {"shards": [{"file": "images-00000.npy", "num_images": 5}]},
    {"skipped": None},
    {"classes": [1]},
  ],
)
def test_card_of_another_form_is_an_error(prepared_folder, tmp_path, damage):
  path = shutil.copytree(prepared_folder, tmp_path / "x")
  card = json.loads((path / "card.json").read_text())
  (path / "card.json").write_text(json.dumps(card | damage))
  with pytest.raises(ConfigError, match=r"card\.json is damaged"):
    pipeline.PreparedImages(path)


def test_damaged_labels_are_an_error(prepared_folder, tmp_path):
  path = shutil.copytree(prepared_folder, tmp_path / "x")
  images = pipeline.PreparedImages(path)
  images.card["classes"] = ["a"]
  labels = path / "labels.npy"
  np.save(labels, np.zeros(len(images) - 1))
  # A header that ends in the midst makes NumPy raise what Python's parser does.
  torn = labels.read_bytes().replace(b"}", b" ", 1)
  for content in (labels.read_bytes(), b"", b"text", torn):
    labels.write_bytes(content)
    with pytest.raises(ConfigError, match=r"labels\.npy is damaged"):
      images.labels()


def test_dataset_without_classes_has_no_labels(prepared_folder):
  with pytest.raises(ConfigError, match="no class labels"):
    pipeline.PreparedImages(prepared_folder).labels()


def test_reading_prepared_images_imports_neither_tensorflow_nor_jax():
  pipeline.load_images(digits.get_config("smoke").data)
  program = """
import sys
from configs import digits
from vitgan_jax.data import pipeline
images = pipeline.load_images(digits.get_config("smoke").data)
batch = pipeline.ShuffledBatches(images, 8, 0)[0]
heavy = ("tensorflow", "tensorflow_datasets", "jax", "jaxlib")
print(batch.shape, [module for module in heavy if module in sys.modules])
"""
  output = subprocess.run(
    [sys.executable, "-c", program],
    cwd=runs.ROOT,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  assert output == "(8, 16, 16, 3) []\n"


def numbered(num_images):
  """Returns images [N, 1, 1, 3] that tell their index."""
  images = np.arange(num_images, dtype=np.uint16).reshape(-1, 1, 1, 1)
  return images.repeat(3, axis=-1)


def random_cases(count):
  """Returns [(num_images, batch_size, processes)], all sorts of them."""
  rng = np.random.default_rng(0)
  cases = [(12, 4, 1), (10, 4, 2), (7, 6, 3), (5, 16, 4), (1, 2, 2)]
  for _ in range(count):
    cases.append(tuple(rng.integers(1, [300, 70, 9]).tolist()))
  return cases


@pytest.mark.parametrize("num_images, batch_size, processes", random_cases(40))
def test_each_epoch_has_every_image_once(num_images, batch_size, processes):
  streams = [
    pipeline.ShuffledBatches(numbered(num_images), batch_size, 3, i, processes)
    for i in range(processes)
  ]
  epochs = 3
  steps = -(-epochs * num_images // batch_size)
  seen = np.concatenate(
    [s[t][:, 0, 0, 0] for t in range(steps) for s in streams]
  )
  assert len(seen) == steps * batch_size
  for epoch in range(epochs):
    part = seen[epoch * num_images : (epoch + 1) * num_images]
    np.testing.assert_array_equal(np.sort(part), np.arange(num_images))


@pytest.mark.parametrize("num_images, batch_size, processes", random_cases(40))
def test_processes_share_the_batch_that_one_would_read(
  num_images, batch_size, processes
):
  images = numbered(num_images)
  whole = pipeline.ShuffledBatches(images, batch_size, 0)
  parts = [
    pipeline.ShuffledBatches(images, batch_size, 0, i, processes)
    for i in range(processes)
  ]
  for step in range(6):
    local = [part[step] for part in parts]
    lengths = [len(batch) for batch in local]
    assert max(lengths) - min(lengths) <= 1
    np.testing.assert_array_equal(np.concatenate(local), whole[step])


@pytest.mark.parametrize("num_images, batch_size, processes", random_cases(10))
def test_stream_that_goes_on_elsewhere_equals_one_that_did_not_stop(
  prepared_folder, num_images, batch_size, processes
):
  del num_images
  images = pipeline.PreparedImages(prepared_folder)
  whole = [
    pipeline.ShuffledBatches(images, batch_size, 5)[step] for step in range(12)
  ]
  stop = batch_size % 11
  state = pipeline.ShuffledBatches(images, batch_size, 5, 0, 2).state_at(stop)
  # Saved by one of two processes, and read by any number of new ones.
  parts = [
    pipeline.ShuffledBatches(
      pipeline.PreparedImages(prepared_folder), batch_size, 5, i, processes
    )
    for i in range(processes)
  ]
  for step in range(parts[0].step_of(state), 12):
    np.testing.assert_array_equal(
      np.concatenate([part[step] for part in parts]), whole[step]
    )
  assert parts[0].step_of(state) == stop


def test_state_is_a_few_numbers(prepared_folder):
  images = pipeline.PreparedImages(prepared_folder)
  state = pipeline.ShuffledBatches(images, 4, 5).state_at(10**6)
  assert state == {
    "next_image": 4_000_000,
    "seed": 5,
    "num_images": 18,
    "fingerprint": images.fingerprint,
  }


@pytest.mark.parametrize(
  "change",
  [{"num_images": 17}, {"fingerprint": "x"}, {"seed": 1}, {"next_image": 5}],
)
def test_state_of_other_images_is_refused(prepared_folder, change):
  images = pipeline.PreparedImages(prepared_folder)
  stream = pipeline.ShuffledBatches(images, 4, 5)
  with pytest.raises(ConfigError, match="not the same"):
    stream.step_of(stream.state_at(3) | change)


def test_fingerprint_tells_images_apart(prepared_folder, tmp_path):
  path = shutil.copytree(prepared_folder, tmp_path / "x")
  same = pipeline.PreparedImages(path).fingerprint
  assert same == pipeline.PreparedImages(prepared_folder).fingerprint
  card = (path / "card.json").read_text()
  checksum = pipeline.PreparedImages(path).card["shards"][3]["sha256"]
  (path / "card.json").write_text(card.replace(checksum, checksum[::-1]))
  assert pipeline.PreparedImages(path).fingerprint != same


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


@pytest.mark.parametrize("held_out", [1, 5, 10])
def test_images_held_out_are_never_drawn_and_all_others_are(held_out):
  images = np.arange(30)
  held = pipeline.held_out_indices(30, held_out)
  assert len(set(held.tolist())) == held_out
  assert held.tolist() == sorted(held) and set(held) <= set(range(30))
  # They are spread over the classes, which a folder has one after the other.
  assert len(set(held // 6)) == min(held_out, 5)
  stream = pipeline.ShuffledBatches(images, 5, seed=3, held_out=held_out)
  num_epochs, count = 5, 30 - held_out
  drawn = np.concatenate([stream.indices(i) for i in range(count)])
  for epoch in drawn.reshape(num_epochs, count):
    assert sorted(epoch) == sorted(set(range(30)) - set(held.tolist()))


def test_order_is_pinned():
  # A change of it breaks runs that go on: say so in the changelog.
  indices = pipeline.ShuffledBatches(numbered(10), 10, 0).indices(1)
  np.testing.assert_array_equal(indices, [9, 1, 3, 8, 7, 6, 0, 4, 2, 5])


def test_prefetch_yields_everything_in_order():
  for depth in (0, 1, 3):
    items = list(pipeline.prefetch(lambda x: x * x, range(7), depth))
    assert items == [0, 1, 4, 9, 16, 25, 36]
  assert list(pipeline.prefetch(lambda x: x, [])) == []


def test_prefetch_works_ahead_and_not_too_far():
  made, ready = [], threading.Event()

  def make(x):
    made.append(x)
    if len(made) == 3:
      ready.set()
    return x

  items = pipeline.prefetch(make, range(100), depth=2)
  assert next(items) == 0
  assert ready.wait(10)  # without another next()
  time.sleep(0.05)
  assert made == [0, 1, 2]
  items.close()


def test_prefetch_passes_errors_on():
  def make(x):
    if x == 2:
      raise ConfigError("no more")
    return x

  items = pipeline.prefetch(make, range(5))
  assert [next(items), next(items)] == [0, 1]
  with pytest.raises(ConfigError, match="no more"):
    next(items)
