"""What generated images are compared with: a dataset, seen by a network."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from vitgan_jax import files, processes
from vitgan_jax.metrics import features as features_lib
from vitgan_jax.metrics import statistics


class Reference(NamedTuple):
  """A dataset, seen by a feature network.

  Attributes:
    statistics: `Statistics` of all images.
    features: [n, F] of some of them, drawn at random.
    indices: which these are, [n].
  """

  statistics: Any
  features: Any
  indices: Any


def load(extractor, images, count):
  """Returns the Reference of a dataset; computed once, then kept on disk.

  Args:
    extractor: features.Extractor.
    images: PreparedImages.
    count: features of this many images are kept, for the metrics that compare
      images one by one; all images are in the statistics.

  Returns:
    A Reference, in the first process; None in others.
  """
  count = min(count, len(images))
  network = extractor.network
  name = (
    f"{images.fingerprint[:12]}-{network.name}-{network.sha256[:8]}-{count}.npz"
  )
  path = images.path.parent / "references" / name
  # The first process decides for all, which may have other disks.
  is_primary = processes.is_primary()
  known = _read(path) if is_primary and path.exists() else None
  if processes.broadcast_from_first(known is not None):
    return known
  result = compute(extractor, images, count)
  if is_primary:
    try:
      _write(path, result)
    except OSError as error:
      files.tell(f"The features of the real images are not kept: {error}")
  return result if is_primary else None


def compute(extractor, images, count):
  """Returns the Reference of images, [N, S, S, 3] or PreparedImages."""
  kept = []

  def features():
    left = count
    for batch in features_lib.of_images(extractor, images, len(images), "real"):
      if left:
        kept.append(batch.features[:left])
        left -= len(kept[-1])
      yield batch.features

  moments = statistics.from_batches(_thousands(features()))
  indices = features_lib.order(images, count)
  return Reference(moments, np.concatenate(kept), indices)


def _thousands(batches):
  """Joins batches, as each that is merged costs some hundred images."""
  waiting = []
  for batch in batches:
    waiting.append(batch)
    if sum(map(len, waiting)) >= 1000:
      yield np.concatenate(waiting)
      waiting = []
  if waiting:
    yield np.concatenate(waiting)


def _write(path, reference):
  path.parent.mkdir(exist_ok=True)
  # Runs on the same images may come to their first scores together.
  with (
    files.whole(path, shared=True) as partial,
    open(partial, "wb") as file,
  ):
    np.savez(
      file,
      **dataclasses.asdict(reference.statistics),
      features=reference.features,
      indices=reference.indices,
    )


def _read(path):
  """Returns the Reference in a file, or None if it is damaged."""
  try:
    with open(path, "rb") as file, np.load(file) as arrays:
      moments = statistics.Statistics(
        int(arrays["num"]), arrays["mean"], arrays["scatter"]
      )
      return Reference(moments, arrays["features"], arrays["indices"])
  except Exception:  # zipfile and NumPy raise many kinds
    files.tell(f"{path} is damaged: it is computed and written anew")
    return None
