"""Prepared images on disk -> shuffled uint8 batches, made ahead of time.

Images are decoded, cropped and resized once (see `prepare`); what a step reads
is a plain gather from memory-mapped arrays. Neither TensorFlow nor JAX is
imported here.
"""

import collections
import concurrent.futures
import functools
import hashlib
import mmap

import numpy as np

from vitgan_jax.data import prepare
from vitgan_jax.errors import ConfigError

# Pages of a memory map stay in the process once they were read, with some of
# their neighbours. After this many bytes they are given back; the system still
# caches them.
_RELEASE_BYTES = 32 * 2**20


def load_images(data):
  """Returns a dataset's PreparedImages; prepares them if they are not yet.

  Args:
    data: the config's `data`.

  Raises:
    ConfigError: if there is no such dataset, it cannot be had, or it has other
      classes than the networks get.
  """
  images = PreparedImages(prepare.prepare(data))
  known = len(images.card.get("classes", ()))
  if data.num_classes not in (0, known):
    allowed = f"0 or the {known} classes of" if known else "0, without any in"
    raise ConfigError(
      f"config.data.num_classes={data.num_classes} must be {allowed} "
      f"{data.dataset}"
    )
  return images


class PreparedImages:
  """The images of a prepared folder, uint8 [num_images, S, S, 3].

  Indexed like an array, with integers, slices or arrays of integers.
  """

  def __init__(self, path):
    """Maps the shards of a folder of `prepare.prepare` into memory.

    Raises:
      ConfigError: if a file is missing or too short.
    """
    self.path = path
    self.card = prepare.read_card(path)
    size = self.card["image_size"]
    self._shards = [
      self._map(shard, (shard["num_images"], size, size, 3))
      for shard in self.card["shards"]
      if shard["num_images"]  # all of a shard may have been corrupt
    ]
    self._starts = np.cumsum([0, *(len(x.images) for x in self._shards)])
    self.shape = (int(self._starts[-1]), size, size, 3)
    self._bytes_read = 0

  def _map(self, shard, shape):
    try:
      images = np.load(self.path / shard["file"], mmap_mode="r")
    except Exception as error:  # NumPy raises many kinds
      raise prepare.damaged(self.path, shard["file"]) from error
    if images.shape != shape or images.dtype != np.uint8:
      raise prepare.damaged(self.path, shard["file"])
    return _Shard(images)

  def __len__(self):
    return self.shape[0]

  def __getitem__(self, index):
    if isinstance(index, (int, slice)):
      index = np.arange(len(self))[index]
    indices = np.asarray(index)
    flat = indices.reshape(-1)
    shards = np.searchsorted(self._starts, flat, side="right") - 1
    offsets = flat - self._starts[shards]
    places = list(zip(shards.tolist(), offsets.tolist()))
    # All of a batch is asked for first: from a disk, it then comes at once, and
    # without the neighbours that the system would read along with each.
    for k, offset in places:
      self._shards[k].will_need(offset)
    batch = np.empty((flat.size, *self.shape[1:]), np.uint8)
    for i, (k, offset) in enumerate(places):
      batch[i] = self._shards[k].images[offset]
    self._bytes_read += batch.nbytes
    if self._bytes_read > _RELEASE_BYTES:
      self._release()
    return batch.reshape(*indices.shape, *self.shape[1:])

  def _release(self):
    for shard in self._shards:
      shard.map.madvise(mmap.MADV_DONTNEED)
    self._bytes_read = 0

  @functools.cached_property
  def fingerprint(self):
    """Text that tells these images, in their order, from any others."""
    checksums = [shard["sha256"] for shard in self.card["shards"]]
    return hashlib.sha256("".join(checksums).encode()).hexdigest()

  def labels(self):
    """Returns the classes int32 [num_images].

    Raises:
      ConfigError: if the dataset has none, or they are damaged.
    """
    if "classes" not in self.card:
      raise ConfigError(f"dataset {self.card['dataset']} has no class labels")
    try:
      labels = np.load(self.path / "labels.npy")
    except Exception as error:
      raise prepare.damaged(self.path, "labels.npy") from error
    if labels.shape != (len(self),):
      raise prepare.damaged(self.path, "labels.npy")
    return labels


class _Shard:
  """A memory-mapped array of images."""

  def __init__(self, memmap):
    self.images = np.asarray(memmap)  # a memmap itself is slow to index
    self.map = memmap.base
    self._offset = memmap.offset
    self._image_bytes = memmap[0].nbytes

  def will_need(self, index):
    """Starts reading an image from the disk, if it is not in memory."""
    start = self._offset + index * self._image_bytes
    page = start // mmap.PAGESIZE * mmap.PAGESIZE
    self.map.madvise(mmap.MADV_WILLNEED, page, start + self._image_bytes - page)


def held_out_indices(num_images, count):
  """Returns the indices [count] of images that are not trained on.

  They are spread over all: a folder's images come class after class.
  """
  return np.linspace(0, num_images - 1, count).astype(np.int64)


class ShuffledBatches:
  """An endless stream of shuffled batches; batch t is a function of t.

  Each epoch is a permutation drawn from the seed and the epoch's number, and
  epochs follow one another without a gap. So the state of the stream is one
  number, and a run resumes exactly, on any number of processes.
  """

  def __init__(
    self,
    images,
    batch_size,
    seed,
    process_index=0,
    process_count=1,
    held_out=0,
  ):
    """Makes the stream.

    Args:
      images: PreparedImages, or uint8 [num_images, S, S, 3].
      batch_size: B, of all processes together.
      seed: of the permutations.
      process_index: which part of each batch this process reads.
      process_count: number of parts, equal where it divides B.
      held_out: how many images it leaves out, those of `held_out_indices`.
    """
    self._images = images
    self._used = np.delete(
      np.arange(len(images)), held_out_indices(len(images), held_out)
    )
    self._batch_size = batch_size
    self._seed = seed
    self._part = slice(
      process_index * batch_size // process_count,
      (process_index + 1) * batch_size // process_count,
    )
    self._permutation = functools.lru_cache(2)(
      lambda epoch: np.random.default_rng((seed, epoch)).permutation(self._used)
    )

  def indices(self, step):
    """Returns the indices [B / process_count] of this process's images."""
    positions = step * self._batch_size + np.arange(self._batch_size)
    epochs, offsets = np.divmod(positions[self._part], len(self._used))
    return np.concatenate(
      [
        self._permutation(epoch)[offsets[epochs == epoch]]
        for epoch in np.unique(epochs).tolist()
      ]
      or [np.zeros(0, np.int64)]
    )

  def __getitem__(self, step):
    """Returns this process's uint8 part [B / process_count, S, S, 3]."""
    return self._images[self.indices(step)]

  def state_at(self, step):
    """Returns the state of the stream before a step, as a dict for JSON."""
    return {
      "next_image": step * self._batch_size,
      "seed": self._seed,
      "num_images": len(self._images),
      "fingerprint": self._images.fingerprint,
    }

  def step_of(self, state):
    """Returns the step that a state of `state_at` stands before.

    Raises:
      ConfigError: if it is the state of a stream of other images.
    """
    step, remainder = divmod(state["next_image"], self._batch_size)
    expected = self.state_at(step)
    if remainder or state != expected:
      raise ConfigError(
        f"the checkpoint was trained on {state['num_images']:,} images with "
        f"seed {state['seed']}, and {self._images.path} holds "
        f"{len(self._images):,} that are not the same: give the old dataset "
        "to resume, or another --workdir to start anew"
      )
    return step


def prefetch(function, arguments, depth=2):
  """Yields function(a) of each argument, made ahead of time in a thread.

  Args:
    function: what makes an item, of one argument.
    arguments: iterable of them.
    depth: how many items are made ahead.
  """
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    pending = collections.deque()
    for argument in arguments:
      pending.append(pool.submit(function, argument))
      if len(pending) > depth:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
