"""Decodes, crops and resizes a dataset into shards of uint8 arrays."""

import concurrent.futures
import json
import os
import shutil
import threading

import numpy as np
from tqdm import tqdm

from vitgan_jax import files
from vitgan_jax.data import decode
from vitgan_jax.data.source import count
from vitgan_jax.errors import ConfigError

MAX_CORRUPT_SHARE = 0.01  # of the images; more of them is an error


class TooManyCorruptError(ConfigError):
  """More images are corrupt than may be."""


class ShardMaker:
  """Makes the missing shards of a folder, on all cores."""

  def __init__(self, source, data, folder, num_shards):
    """Plans them.

    Args:
      source: of `sources.open_source`.
      data: the config's `data`.
      folder: of the shards; those that it has are kept.
      num_shards: how many.
    """
    self._source = source
    self._data = data
    self._folder = folder
    self._parts = source.parts(data.split)
    self._num_images = count(self._parts)
    self._num_shards = num_shards
    self._num_skipped = 0
    self._stop = threading.Event()
    self._count_lock = threading.Lock()

  def run(self):
    """Returns the records of all shards, in order.

    Raises:
      ConfigError: if there is not enough room.
      TooManyCorruptError: says which images.
    """
    records = [self._read_record(k) for k in range(self._num_shards)]
    done = sum(
      r["num_images"] + len(r["skipped"]) for r in records if r is not None
    )
    self._check_room(self._num_images - done)
    missing = [k for k, record in enumerate(records) if not record]
    # Threads: Pillow decodes and resizes without the interpreter's lock.
    num_threads = max(1, min(len(missing), _num_cores()))
    with (
      tqdm(
        total=self._num_images,
        initial=done,
        desc=f"Preparing {self._data.dataset} at {self._data.image_size} px",
        unit=" images",
      ) as self._progress,
      concurrent.futures.ThreadPoolExecutor(num_threads) as pool,
    ):
      for record in filter(None, records):
        self._count_skipped(record["skipped"])
      futures = {pool.submit(self._make_or_stop, k): k for k in missing}
      try:
        for future in concurrent.futures.as_completed(futures):
          records[futures[future]] = future.result()
      finally:  # of Ctrl-C: threads end at their next image
        self._stop.set()
        pool.shutdown(cancel_futures=True)
    done = sum(r["num_images"] + len(r["skipped"]) for r in records)
    if done != self._num_images:
      raise ConfigError(
        f"{self._source.name} has {done:,} images of the "
        f"{self._num_images:,} that it should have: delete "
        f"{self._source.path} and try again"
      )
    return records

  def _check_room(self, num_images):
    needed = num_images * self._data.image_size**2 * 3
    free = shutil.disk_usage(self._folder).free
    if needed > free:
      raise ConfigError(
        f"preparing {self._data.dataset} needs {needed / 1e9:.1f} GB in "
        f"{self._folder.parent}, where {free / 1e9:.1f} GB are free. Make "
        "room, or give another disk as config.data.data_dir"
      )

  def _read_record(self, k):
    try:
      return files.parse_json(self._path(k).with_suffix(".json").read_text())
    except (OSError, ValueError):
      return None

  def _path(self, k):
    return self._folder / f"images-{k:05d}.npy"

  def _make_or_stop(self, k):
    """Makes shard k; an error ends the other threads, too."""
    try:
      return self._make_shard(k)
    except BaseException:
      self._stop.set()
      raise

  def _make_shard(self, k):
    """Writes shard k, then its record: a shard with a record is whole."""
    # Read here: what fails below is an image's fault.
    size, crop = self._data.image_size, self._data.crop
    max_pixels = self._data.max_pixels
    path = self._path(k)
    temporary = path.with_suffix(".tmp")
    count, labels, skipped = 0, [], []
    with open(temporary, "wb") as file:
      write_header(file, (0, size, size, 3))
      for name, encoded, label in self._read(k):
        if self._stop.is_set():
          return None
        try:
          image = decode.decode(encoded, max_pixels)
          image = decode.crop_and_resize(image, size, crop)
        except Exception as error:  # Pillow raises many kinds for a damaged one
          skipped.append(f"{name}: {' '.join(str(error).split())}")
          self._count_skipped(skipped[-1:])
        else:
          file.write(image.tobytes())
          count += 1
          if label is not None:
            labels.append(label)
        with self._count_lock:
          self._progress.update()
      file.seek(0)
      write_header(file, (count, size, size, 3))
    record = {
      "file": path.name,
      "num_images": count,
      "sha256": files.sha256(temporary),
      "skipped": skipped,
      "labels": labels,
    }
    temporary.rename(path)
    record_path = path.with_suffix(".json")
    temporary.write_text(json.dumps(record))
    temporary.rename(record_path)
    return record

  def _read(self, k):
    """Yields the name, the bytes and the class of each image of shard k."""
    for split, start, stop in self._parts:
      share, more = divmod(stop - start, self._num_shards)
      first = start + k * share + min(k, more)  # the first shards have one more
      last = first + share + (k < more)
      if first < last:  # of a small part not each shard has some
        yield from self._source.read(split, first, last)

  def _count_skipped(self, skipped):
    """Names corrupt images; raises if they are too many."""
    with self._count_lock:
      self._num_skipped += len(skipped)
      too_many = self._num_skipped > MAX_CORRUPT_SHARE * self._num_images
    for line in skipped:
      self._progress.write(f"Skipped a corrupt image: {line}")
    if skipped and too_many:
      raise TooManyCorruptError(
        f"{self._num_skipped} of the {self._num_images:,} images of "
        f"{self._data.dataset} are corrupt so far, the last of them "
        f"{skipped[-1]}. At most {MAX_CORRUPT_SHARE:.0%} may be: repair or "
        "remove them, or get the dataset anew"
      )


def _num_cores():
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count()


def write_header(file, shape):
  """Writes the .npy header of a uint8 array of a shape; data are to follow."""
  # NumPy leaves room in it, so that the count can be written over later.
  np.lib.format.write_array_header_1_0(
    file, {"descr": "|u1", "fortran_order": False, "shape": shape}
  )
