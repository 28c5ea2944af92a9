import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest
import requests
import tensorflow_datasets as tfds
import urllib3

from configs import (
  celeba64,
  cifar10,
  ffhq64,
  folder,
  lsun_bedroom64,
  lsun_bedroom128,
)
from tests import datasets, runs
from tests.datasets import data_config, encode, noise
from vitgan_jax.data import decode, pipeline, prepare, source, sources
from vitgan_jax.errors import ConfigError


def as_prepared(encoded, data):
  """Returns what preparing makes of the bytes of image files, stacked."""
  return np.stack(
    [
      decode.crop_and_resize(decode.decode(x), data.image_size, data.crop)
      for x in encoded
    ]
  )


def smoke(module, data_dir, **data):
  """Returns a config of one call of training."""
  config = module.get_config("smoke")
  config.data.update(data_dir=str(data_dir), **data)
  config.total_kimg = 0.016
  return config


def train(config, workdir):
  """Trains for one call, and checks that it came to its end."""
  run = runs.train_quietly(config, workdir, num_devices=1)
  assert int(run.state.step) == 2
  assert (run.workdir / "samples" / "00000002.png").exists()


def test_cifar10_of_tfds_trains(tmp_path):
  images = noise(48, 32, 32, 3)  # eight in each of the archive's six files
  labels = np.random.default_rng(0).integers(0, 10, 48)
  datasets.write_cifar10(tmp_path, images, labels)
  config = smoke(cifar10, tmp_path)
  prepared = pipeline.load_images(config.data)
  index = {image.tobytes(): i for i, image in enumerate(images)}
  order = [index[image.tobytes()] for image in prepared]  # TFDS shuffles once
  assert sorted(order) == list(range(40))
  np.testing.assert_array_equal(prepared.labels(), labels[order])
  assert prepared.card["classes"] == [f"class{i}" for i in range(10)]
  train(config, tmp_path / "run")


@pytest.mark.slow
def test_imagenet_resized_of_tfds_trains(tmp_path):
  images = noise(12, 32, 32, 3)
  labels = np.random.default_rng(0).integers(0, 1000, 12)
  datasets.write_imagenet32(tmp_path, images, labels)
  config = smoke(cifar10, tmp_path, dataset="imagenet_resized/32x32")
  prepared = pipeline.load_images(config.data)
  index = {image.tobytes(): i for i, image in enumerate(images)}
  order = [index[image.tobytes()] for image in prepared]
  assert sorted(order) == list(range(12))
  np.testing.assert_array_equal(prepared.labels(), labels[order])
  assert len(prepared.card["classes"]) == 1000
  train(config, tmp_path / "run")


@pytest.fixture
def mock_images(monkeypatch):
  """TFDS with 20 random images in each of the splits of any dataset."""

  def prepare(self, **kwargs):
    self.info.set_splits(
      tfds.core.SplitDict(
        [
          tfds.core.SplitInfo(name=name, shard_lengths=[20], num_bytes=0)
          for name in ("train", "unlabelled")
        ]
      )
    )

  with (
    tfds.testing.mock_data(num_examples=20),
    pytest.MonkeyPatch.context() as m,
  ):
    m.setattr(tfds.core.DatasetBuilder, "download_and_prepare", prepare)
    yield


@pytest.mark.parametrize(
  "dataset, split, size",
  [
    ("celeb_a", "train", 64),
    ("cifar100", "train", 32),
    ("stl10", "unlabelled", 48),
    ("oxford_flowers102", "train", 64),
    ("mnist", "train", 32),
  ],
)
def test_any_image_dataset_of_tfds_is_prepared(
  mock_images, tmp_path, dataset, split, size
):
  data = data_config(tmp_path, dataset, split=split, image_size=size)
  prepared = pipeline.load_images(data)
  assert prepared.shape == (20, size, size, 3)
  assert len(np.unique(prepared[:].reshape(20, -1), axis=0)) == 20


def jpegs(num_images, height=218, width=178):
  return [
    encode(
      Image.fromarray(noise(9, 7, 3, seed=i)).resize((width, height)), "JPEG"
    )
    for i in range(num_images)
  ]


def celeba_files(numbers):
  names = [f"img_align_celeba/{number:06d}.jpg" for number in numbers]
  return dict(zip(names, jpegs(len(names))))


@pytest.mark.slow
def test_celeba_is_read_from_its_one_zip(tmp_path):
  # The last images of each split, and the first.
  train_numbers = [*range(1, 9), 162_770]
  others = {"validation": [162_771, 182_637], "test": [182_638, 202_599]}
  files = celeba_files([*train_numbers, *others["validation"], *others["test"]])
  where = tmp_path / "downloads" / "manual" / "img_align_celeba.zip"
  datasets.write_zip(where, {"img_align_celeba/": b""} | files)
  config = smoke(celeba64, tmp_path)
  prepared = pipeline.load_images(config.data)
  expected = as_prepared(celeba_files(train_numbers).values(), config.data)
  np.testing.assert_array_equal(prepared[:], expected)
  assert prepared.card["crop"] == [25, 57, 153, 185]
  assert "non-commercial" in prepared.card["licence"]
  train(config, tmp_path / "run")

  elsewhere = where.rename(tmp_path / "celeba.zip")
  for split, numbers in others.items():
    config.data.update(split=split, path=str(elsewhere))
    assert len(pipeline.load_images(config.data)) == len(numbers)


def test_zip_of_other_names_is_not_celeba(tmp_path):
  path = datasets.write_zip(tmp_path / "x.zip", {"a/cat.jpg": jpegs(1)[0]})
  data = data_config(tmp_path, "celeb_a", path=str(path))
  with pytest.raises(ConfigError, match=r"a/cat\.jpg"):
    pipeline.load_images(data)


def lsun_values(num_images):
  # Values are JPEG in what is published now, and were WebP.
  images = jpegs(num_images, 256, 341)
  images[-1] = encode(noise(256, 300, 3), "WEBP")
  return {f"{7 * i % 11:040x}".encode(): x for i, x in enumerate(images)}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["folder", "zip", "download"])
def test_lsun_is_read_from_its_lmdb(tmp_path, form):
  values = lsun_values(9)
  name = "bedroom_train_lmdb"
  made = datasets.write_lmdb(tmp_path / "made" / name, values)
  files = {f"{name}/{f.name}": f.read_bytes() for f in made.iterdir()}
  assert "bedroom_train_lmdb/data.mdb" in files
  manual = tmp_path / "downloads" / "manual"
  if form == "folder":
    datasets.write_folder(manual, files)
  elif form == "zip":
    datasets.write_zip(manual / f"{name}.zip", files)
  else:
    archive = datasets.write_zip(tmp_path / "made.zip", files)
    url = f"http://dl.yf.io/lsun/scenes/{name}.zip"
    datasets.place_download(tmp_path, "lsun/bedroom", url, archive.read_bytes())
  config = smoke(lsun_bedroom64, tmp_path)
  prepared = pipeline.load_images(config.data)
  expected = as_prepared([values[key] for key in sorted(values)], config.data)
  np.testing.assert_array_equal(prepared[:], expected)
  assert prepared.card["dataset"] == "lsun_bedroom/1.0.0"
  if form == "folder":
    train(config, tmp_path / "run")


@pytest.mark.parametrize("form", ["parent", "lmdb", "zip"])
def test_lsun_is_read_from_where_the_path_says(tmp_path, form):
  values = lsun_values(8)
  made = datasets.write_lmdb(tmp_path / "made" / "cat", values)
  path = {"parent": made.parent, "lmdb": made}.get(form)
  if form == "zip":
    files = {f"cat/{f.name}": f.read_bytes() for f in made.iterdir()}
    path = datasets.write_zip(tmp_path / "cat.zip", files)
  config = smoke(lsun_bedroom128, tmp_path, dataset="lsun/cat", path=str(path))
  prepared = pipeline.load_images(config.data)
  assert prepared.shape == (8, 128, 128, 3)


@pytest.mark.parametrize(
  "dataset, path, message",
  [
    ("lsun/kitten", "", "bedroom.*cat"),
    ("lsun", "", "lsun/bedroom"),
    ("lsun/bedroom", "nowhere", "nowhere"),
    ("lsun/bedroom", "empty", "data.mdb"),
    ("lsun/bedroom", "broken.zip", "broken.zip"),
    ("lsun/bedroom", "damaged.zip", "damaged.zip"),
    ("lsun/bedroom", "other.zip", "data.mdb"),
    ("folder", "", "--config.data.path"),
    ("folder", "nowhere", "nowhere"),
    ("folder", "empty", "no images in"),
    ("ffhq", "", "ffhq-dataset"),
    ("cifar10", "empty", "folder, ffhq, celeb_a, lsun"),
  ],
)
def test_what_is_not_there_is_one_line_that_says_what_to_do(
  tmp_path, dataset, path, message, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "empty").mkdir()
  (tmp_path / "broken.zip").write_bytes(b"no zip")
  datasets.write_zip(tmp_path / "other.zip", {"1.png": b"one"})
  archive = datasets.write_zip(tmp_path / "damaged.zip", {"data.mdb": b"one"})
  archive.write_bytes(archive.read_bytes().replace(b"one", b"two"))
  data = data_config(tmp_path / "data", dataset, path=path)
  with pytest.raises(ConfigError, match=message) as error:
    pipeline.load_images(data)
  assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thumbnails128x128", "images1024x1024"])
def test_ffhq_is_read_from_its_folders(tmp_path, kind):
  files = {
    f"{kind}/{i // 4:02d}000/{i:05d}.png": encode(noise(128, 128, 3, seed=i))
    for i in range(8)
  }
  datasets.write_folder(tmp_path / "ffhq", files)
  config = smoke(ffhq64, tmp_path, path=str(tmp_path / "ffhq"))
  prepared = pipeline.load_images(config.data)
  expected = as_prepared(files.values(), config.data)
  np.testing.assert_array_equal(prepared[:], expected)
  assert "classes" not in prepared.card  # its folders are not classes
  assert "CC BY-NC-SA" in prepared.card["licence"]
  if kind == "thumbnails128x128":
    train(config, tmp_path / "run")


def user_files():
  """Images as people have them, in two class folders."""
  palette = Image.fromarray(noise(40, 30, 3)).convert("P")
  return {
    "cats/1.png": encode(noise(70, 90, 3)),
    "cats/2.jpg": encode(noise(50, 40, 3), "JPEG"),
    "cats/more/3.webp": encode(noise(64, 64, 3), "WEBP"),
    "cats/4.png": encode(noise(33, 44, 4)),
    "dogs/1.png": encode(noise(20, 100)),
    "dogs/2.png": encode(palette),
    "dogs/3.png": encode(noise(80, 64).astype(np.uint16) * 200),
    "dogs/4.JPEG": encode(noise(10, 10), "JPEG"),
    "dogs/readme.txt": b"text",
  }


@pytest.mark.parametrize(
  "write",
  [
    pytest.param(datasets.write_folder, marks=pytest.mark.slow),
    datasets.write_zip,
  ],
)
def test_own_images_of_all_kinds_train(tmp_path, write):
  files = user_files()
  path = write(tmp_path / "mine", files)
  config = smoke(folder, tmp_path, path=str(path))
  prepared = pipeline.load_images(config.data)
  images = [files[name] for name in sorted(files) if "txt" not in name]
  np.testing.assert_array_equal(prepared[:], as_prepared(images, config.data))
  np.testing.assert_array_equal(prepared.labels(), [0] * 4 + [1] * 4)
  assert prepared.card["classes"] == ["cats", "dogs"]
  if path.is_dir():
    train(config, tmp_path / "run")


@pytest.mark.parametrize("split", ["train[2:5]", "train[:25%]+train[6:]"])
@pytest.mark.parametrize("has_classes", [True, False])
def test_part_of_own_images(tmp_path, split, has_classes):
  contents = user_files()
  if not has_classes:
    contents = {k.replace("/", "_"): v for k, v in contents.items()}
  path = datasets.write_folder(tmp_path / "mine", contents)
  data = data_config(tmp_path, "folder", path=str(path))
  whole = pipeline.load_images(data)
  data.split = split
  # Four cats come first, four dogs next; a part has as many of one as of both.
  order = [0, 4, 1, 5, 2, 6, 3, 7] if has_classes else range(8)
  places = {"train[2:5]": [2, 3, 4]}.get(split, [0, 1, 6, 7])
  expected = [order[i] for i in places]
  part = pipeline.load_images(data)
  np.testing.assert_array_equal(part[:], whole[expected])
  if has_classes:
    np.testing.assert_array_equal(part.labels(), whole.labels()[expected])


@pytest.mark.parametrize("counts", [(40, 40), (40, 10, 30), (5, 1)])
def test_parts_of_own_images_have_their_share_of_each_class(tmp_path, counts):
  contents = {
    f"{name}/{i}.png": encode(noise(4, 4, 3, seed=10 * i + len(name)))
    for name, count in zip(("a", "bb", "ccc"), counts)
    for i in range(count)
  }
  path = datasets.write_folder(tmp_path / "mine", contents)
  seen = []
  for split in ("train[:20%]", "train[20%:90%]", "train[90%:]"):
    data = data_config(tmp_path, "folder", path=str(path), split=split)
    part = pipeline.load_images(data)
    found = np.bincount(part.labels(), minlength=len(counts))
    expected = np.array(counts) * len(part) / sum(counts)
    assert np.all(np.abs(found - expected) <= 1.0)
    seen += [x.tobytes() for x in part[:]]
  assert len(set(seen)) == len(seen) == sum(counts)


def test_path_may_begin_at_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  datasets.write_folder(tmp_path / "mine", user_files())
  data = data_config("~/data", "folder", path="~/mine")
  assert len(pipeline.load_images(data)) == 8
  assert (tmp_path / "data" / "vitgan_jax").is_dir()


def test_new_images_under_the_same_path_are_prepared_anew(tmp_path):
  path = datasets.write_folder(tmp_path / "mine", user_files())
  data = data_config(tmp_path, "folder", path=str(path))
  assert len(pipeline.load_images(data)) == 8
  datasets.write_folder(path, {"dogs/5.png": encode(noise(9, 9, 3))})
  assert len(pipeline.load_images(data)) == 9


@pytest.mark.parametrize(
  "split",
  [
    "train",
    "train[:90%]",
    "train[90%:]",
    "train[:100]",
    "train[-7:]+test",
    "test[12.5%:50%] + train[:-33%]",
    "test[10:20%]",
    "all",
  ],
)
def test_parts_of_splits_are_those_of_tfds(split):
  sizes = {"train": 1001, "test": 30}
  splits = tfds.core.SplitDict(
    [
      tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0)
      for name, size in sizes.items()
    ]
  )
  expected = [
    (x.splitname, x.from_ or 0, sizes[x.splitname] if x.to is None else x.to)
    for x in tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
  ]
  assert source.Source("", "", "", sizes, None).parts(split) == expected


@pytest.mark.parametrize(
  "split",
  ["", "train[5:5]", "train[5:3]", "train[:5", "train[0]", "valid", "train[a:]"]
  + ["train[:1001]", "train[-101%:]", "train+valid", "train[1.5:]"],
)
def test_part_without_images_is_an_error_of_one_line(split):
  digits = source.Source("x/1.0.0", "", "", {"train": 1000, "test": 3}, None)
  with pytest.raises(ConfigError, match="has train, test") as error:
    digits.parts(split)
  assert repr(split) in str(error.value) and "\n" not in str(error.value)


def test_what_is_on_disk_needs_no_tensorflow(tmp_path):
  folder = datasets.write_folder(tmp_path / "mine", user_files())
  faces = datasets.write_zip(tmp_path / "a.zip", celeba_files([1, 2]))
  datasets.write_lmdb(
    tmp_path / "downloads" / "manual" / "bedroom_train_lmdb", lsun_values(3)
  )
  program = """
import sys
for module in ("tensorflow", "tensorflow_datasets"):
  sys.modules[module] = None  # to import it is an error
from configs import folder
from vitgan_jax import monitor, train
from vitgan_jax.data import pipeline
home, images, faces = sys.argv[1:]
data = folder.get_config().data
data.update(data_dir=home, image_size=8)
for data.dataset, data.path in [
  ("folder", images),
  ("ffhq", images),
  ("celeb_a", faces),
  ("lsun/bedroom", ""),
  ("sklearn_digits", ""),
]:
  print(len(pipeline.load_images(data)))
with monitor.MetricWriter(home) as writer:
  writer.write(1, {"loss/d": 0.5})
"""
  output = subprocess.run(
    [sys.executable, "-c", program, tmp_path, folder, faces],
    cwd=runs.ROOT,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  counts = [line for line in output.splitlines() if line.isdigit()]
  assert counts == ["8", "8", "2", "3", "1497"]


def test_part_of_the_digits_is_the_same_images(tmp_path):
  data = data_config(tmp_path, "sklearn_digits")
  whole = pipeline.load_images(data)
  data.split = "train[10:15]"
  np.testing.assert_array_equal(pipeline.load_images(data)[:], whole[10:15])


def test_order_does_not_depend_on_files_or_shards(tmp_path, monkeypatch):
  images = noise(48, 32, 32, 3)
  prepared = []
  for num_files in (1, 5):
    data = data_config(tmp_path / str(num_files), "cifar10", image_size=32)
    datasets.write_cifar10(data.data_dir, images, np.zeros(48, int))
    builder = tfds.builder("cifar10", data_dir=data.data_dir)
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(num_shards=num_files)
    )
    assert builder.info.splits["train"].num_shards == num_files
    prepared.append(pipeline.load_images(data))
    monkeypatch.setattr(prepare, "_MIN_SHARD_IMAGES", 11)
  one, many = prepared
  assert len(many.card["shards"]) == 4 and len(one.card["shards"]) == 1
  np.testing.assert_array_equal(many[:], one[:])


def test_unknown_split_is_an_error_that_lists_the_splits(tmp_path):
  data = data_config(tmp_path, "sklearn_digits", split="valid")
  with pytest.raises(ConfigError, match="it has train, test"):
    pipeline.load_images(data)


def test_unknown_split_of_lsun_downloads_nothing(tmp_path, no_network):
  data = data_config(tmp_path, "lsun/bedroom", split="test")
  with pytest.raises(ConfigError, match="has train, validation"):
    pipeline.load_images(data)


@pytest.mark.parametrize("dataset", ["glue", "nyu_depth_v2"])
def test_dataset_without_images_is_an_error(tmp_path, dataset, monkeypatch):
  with pytest.raises(ConfigError, match="has no images"):
    builder = tfds.builder(dataset, data_dir=str(tmp_path))
    features = dict(builder.info.features)
    features.pop("image", None)  # of nyu_depth_v2 the floats are left
    monkeypatch.setattr(type(builder.info), "features", features)
    sources.image_key(builder)


def test_dataset_that_does_not_exist_is_an_error_with_a_hint(
  tmp_path, monkeypatch
):
  def unknown(name, **kwargs):
    raise tfds.core.registered.DatasetNotFoundError(f"{name}\nnot found")

  monkeypatch.setattr(tfds, "builder", unknown)
  with pytest.raises(ConfigError, match="cifar10") as error:
    pipeline.load_images(data_config(tmp_path, "cifr10"))
  assert "'cifr10'" in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def no_network(monkeypatch):
  def fail(self, *args, **kwargs):
    raise ConnectionError("no route to host\nmore lines")

  monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
  monkeypatch.setattr(tfds.download.DownloadManager, "download", fail)


@pytest.mark.parametrize(
  "dataset, advice",
  [
    ("cifar10", ["config.data.data_dir", "downloads/manual"]),
    (
      "celeb_a",
      [
        "img_align_celeba.zip",
        "downloads/manual",
        "list_eval_partition.txt",
        "list_attr_celeba.txt",
        "list_landmarks_align_celeba.txt",
        "identity_CelebA.txt",
      ],
    ),
    ("lsun/bedroom", ["bedroom_train_lmdb.zip", "downloads/manual"]),
    ("lsun/cat", ["objects/cat.zip", "downloads/manual"]),
  ],
)
def test_download_that_fails_is_an_error_that_says_what_to_do(
  no_network, tmp_path, dataset, advice
):
  with pytest.raises(ConfigError) as error:
    pipeline.load_images(data_config(tmp_path, dataset))
  message = str(error.value)
  assert "no route to host" in message and "\n" not in message
  for words in advice:
    assert words in message, words
  left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
  assert left == [".lock"]


def test_data_dir_must_be_a_local_folder():
  data = data_config("gs://bucket/data", "cifar10")
  with pytest.raises(ConfigError, match="gs://bucket/data"):
    pipeline.load_images(data)


@pytest.mark.parametrize("dataset", ["cifar10", "lsun/bedroom"])
def test_host_that_does_not_answer_is_given_up_soon(
  dataset, tmp_path, monkeypatch
):
  waits = []

  def connect(address, timeout=None, **kwargs):
    waits.append(timeout)
    raise TimeoutError("timed out")

  monkeypatch.setattr(urllib3.util.connection, "create_connection", connect)
  send = requests.adapters.HTTPAdapter.send
  begin = time.monotonic()
  with pytest.raises(ConfigError, match="Timeout") as error:
    pipeline.load_images(data_config(tmp_path, dataset))
  assert "\n" not in str(error.value)
  assert waits and time.monotonic() - begin + sum(waits) < 30
  assert requests.adapters.HTTPAdapter.send is send  # of other users
