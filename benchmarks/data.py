"""Speed of reading prepared images, beside tf.data reading the same dataset.

A dataset of random smooth images is written through TFDS, as PNG, and prepared.
Both sides then give shuffled batches of 128; tf.data with its shuffle buffer of
10,000 images and all its automatic tuning.
"""

import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from PIL import Image

from configs import common
from vitgan_jax import partitioning
from vitgan_jax.data import pipeline, shards

_NUM_IMAGES = 8192
_BATCH_SIZE = 128
_SHUFFLE_BUFFER = 10_000  # images, of tf.data

_FIRST_BATCH = """
import sys, pathlib
from vitgan_jax.data import pipeline
images = pipeline.PreparedImages(pathlib.Path(sys.argv[1]))
pipeline.ShuffledBatches(images, 128, 0)[0]
assert "tensorflow" not in sys.modules
"""
_MEMORY = """
import sys, pathlib
from vitgan_jax.data import pipeline
images = pipeline.PreparedImages(pathlib.Path(sys.argv[1]))
stream = pipeline.ShuffledBatches(images, 128, 0)
for step in range(int(sys.argv[2])):
  stream[step]
# Of this process's own memory: ru_maxrss would count its parent's, too.
print([l.split()[1] for l in open("/proc/self/status") if "VmHWM" in l][0])
"""


def run(seconds):
  """Returns the figures, a list of one dict for each image size.

  Args:
    seconds: to measure each figure for.
  """
  results = []
  with tempfile.TemporaryDirectory() as folder:
    for size in (32, 64, 128):
      results.append(_measure(folder, size, seconds))
    results[1]["resident_mb_of_3m_images"] = _memory(pathlib.Path(folder))
  return results


def _measure(folder, size, seconds):
  builder = _write_dataset(folder, size)
  data = common.get_config().data
  data.update(
    dataset=f"benchmark_images/{size}", image_size=size, data_dir=folder
  )
  images = pipeline.load_images(data)
  batches = pipeline.ShuffledBatches(images, _BATCH_SIZE, seed=0)
  mesh = partitioning.create_mesh()

  def to_device(step):
    return partitioning.global_batch(mesh, batches[step])

  steps = range(10**9)
  host = _images_per_sec(map(batches.__getitem__, steps), seconds)
  on_device = map(jax.block_until_ready, pipeline.prefetch(to_device, steps))
  device = _images_per_sec(on_device, seconds)
  cached = _images_per_sec(_tf_data(builder, True), seconds)
  tf_data = _images_per_sec(_tf_data(builder, False), seconds)
  return {
    "image_size": size,
    "host_images_per_sec": round(host),
    "device_images_per_sec": round(device),
    "tf_data_images_per_sec": round(tf_data),
    "tf_data_cached_images_per_sec": round(cached),
    "ratio": round(host / tf_data, 1),
    "first_batch_seconds": _first_batch(images.path),
  }


def _images_per_sec(batches, seconds):
  iterator = iter(batches)
  for _ in range(20):  # caches and buffers fill
    next(iterator)
  count, start = 0, time.perf_counter()
  while time.perf_counter() - start < seconds:
    next(iterator)
    count += 1
  return count * _BATCH_SIZE / (time.perf_counter() - start)


def _write_dataset(folder, size):
  """Returns the builder of a dataset of PNGs, prepared by TFDS."""
  import tensorflow_datasets as tfds

  if "benchmark_images" not in tfds.list_builders():

    class BenchmarkImages(tfds.core.GeneratorBasedBuilder):
      """Smooth random images."""

      BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=f"{size}", version="1.0.0")
        for size in (32, 64, 128)
      ]

      def _info(self):
        size = int(self.builder_config.name)
        features = {"image": tfds.features.Image(shape=(size, size, 3))}
        return tfds.core.DatasetInfo(
          builder=self, features=tfds.features.FeaturesDict(features)
        )

      def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

      def _generate_examples(self):
        size = int(self.builder_config.name)
        rng = np.random.default_rng(0)
        for i in range(_NUM_IMAGES):
          noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
          yield i, {"image": np.asarray(noise.resize((size, size)))}

  builder = tfds.builder(f"benchmark_images/{size}", data_dir=folder)
  builder.download_and_prepare()
  return builder


def _tf_data(builder, autocache):
  import tensorflow as tf
  import tensorflow_datasets as tfds

  # TFDS keeps datasets of less than 250 MB decoded in memory; large ones, which
  # are those where reading matters, it cannot.
  dataset = builder.as_dataset(
    split="train",
    shuffle_files=True,
    read_config=tfds.ReadConfig(try_autocache=autocache),
  )
  dataset = dataset.map(
    lambda example: example["image"], num_parallel_calls=tf.data.AUTOTUNE
  )
  dataset = dataset.repeat().shuffle(_SHUFFLE_BUFFER).batch(_BATCH_SIZE)
  return tfds.as_numpy(dataset.prefetch(tf.data.AUTOTUNE))


def _first_batch(path):
  """Returns seconds from the start of a process to its first batch."""
  start = time.perf_counter()
  subprocess.run([sys.executable, "-c", _FIRST_BATCH, path], check=True)
  return round(time.perf_counter() - start, 2)


def _memory(folder):
  """Returns the peak of a process that reads from 3 million images, in MB.

  25,600 of them are read.
  """
  path = folder / "sparse"
  write_sparse(path, num_shards=256, shape=(11_719, 64, 64, 3))
  return round(peak_megabytes(path, num_batches=200))


def write_sparse(path, num_shards, shape):
  """Writes a prepared folder of images that take no room on the disk.

  Its shards are sparse files, all zeros. To a process, they are as any others.

  Args:
    path: of the folder.
    num_shards: how many.
    shape: of each, (n, S, S, 3).
  """
  path.mkdir()
  card = dict.fromkeys(("dataset", "source", "licence", "split", "filter"), "")
  card |= {"image_size": shape[1], "num_images": num_shards * shape[0]}
  card |= {"shards": [], "skipped": []}
  for k in range(num_shards):
    shard = {"file": f"{k}.npy", "num_images": shape[0], "sha256": ""}
    card["shards"].append(shard)
    with open(path / shard["file"], "wb") as file:
      shards.write_header(file, shape)
      file.truncate(file.tell() + math.prod(shape))
  (path / "card.json").write_text(json.dumps(card))


def peak_megabytes(path, num_batches):
  """Returns the peak of a process that reads batches of prepared images."""
  output = subprocess.run(
    [sys.executable, "-c", _MEMORY, path, str(num_batches)],
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  return int(output) / 1024
