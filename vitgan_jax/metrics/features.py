"""Features of images by a pretrained network, on all devices."""

import math

import jax
from jax.sharding import PartitionSpec
import numpy as np
from tqdm import tqdm

from vitgan_jax import partitioning, processes
from vitgan_jax.data import pipeline
from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics import efficientnet, inception
from vitgan_jax.metrics.feature_network import Features

NETWORKS = ("inception", "efficientnet")
BATCH_SIZE = 64  # per device


def load_network(name, inception_weights=""):
  """Returns a `FeatureNetwork`.

  Args:
    name: one of `NETWORKS`.
    inception_weights: file of Inception's weights; see `inception.load`.

  Raises:
    ConfigError: if its weights cannot be had.
  """
  if name == "efficientnet":
    return efficientnet.load()
  try:
    return inception.load(inception_weights)
  except ConfigError as error:
    raise ConfigError(
      f"{error}. Without them, --features=efficientnet gives a Fréchet "
      "distance that is no FID"
    ) from error


def make_extract(apply, mesh):
  """Returns the jitted `extract(params, images)`, as `FeatureNetwork.apply`.

  Args:
    apply: of a FeatureNetwork.
    mesh: of the devices that share the images.
  """
  # A CPU is a fifth faster with few images at a time: they fit its cache.
  chunk = 8 if mesh.devices.flat[0].platform == "cpu" else BATCH_SIZE

  def extract(params, images):
    count = len(images)
    size = math.gcd(chunk, count)
    chunks = images.reshape(count // size, size, *images.shape[1:])
    outputs = jax.lax.map(lambda x: apply(params, x), chunks)
    return jax.tree.map(lambda x: x.reshape(count, -1), outputs)

  data = PartitionSpec(partitioning.BATCH_AXES)
  return jax.jit(
    jax.shard_map(
      extract, mesh=mesh, in_specs=(PartitionSpec(), data), out_specs=data
    ),
    out_shardings=partitioning.replicated(mesh),
  )


class Extractor:
  """Computes features; every process takes part, and gets all of them."""

  def __init__(self, network, mesh):
    """Puts the network on the devices of a mesh.

    Args:
      network: FeatureNetwork.
      mesh: of `partitioning.create_mesh`.
    """
    self.network = network
    self.mesh = mesh
    self.batch_size = BATCH_SIZE * mesh.size
    self._params = jax.device_put(network.params, partitioning.replicated(mesh))
    self._extract = make_extract(network.apply, mesh)

  def __call__(self, images):
    """Returns `Features` on the host, of a batch that all devices share.

    Args:
      images: uint8 [B, H, W, 3], a jax.Array; the devices divide B.
    """
    return Features(*map(np.asarray, self._extract(self._params, images)))


def of_images(extractor, images, count, kind):
  """Yields `Features` of `count` images in a random order, each once.

  Args:
    extractor: an Extractor.
    images: PreparedImages, or uint8 [N, H, W, 3]; N >= count.
    count: how many.
    kind: "real" or "generated", for the progress.
  """
  stream = pipeline.ShuffledBatches(
    images,
    extractor.batch_size,
    0,
    jax.process_index(),
    jax.process_count(),
  )

  def load(step):
    return partitioning.global_batch(extractor.mesh, stream[step])

  steps = range(-(-count // extractor.batch_size))
  with tqdm(
    total=count,
    desc=f"Features of the {kind} images",
    unit=" images",
    disable=not processes.is_primary(),
  ) as progress:
    for step, batch in zip(steps, pipeline.prefetch(load, steps)):
      left = count - step * extractor.batch_size
      result = Features(*(x[:left] for x in extractor(batch)))
      yield result
      progress.update(len(result.features))


def order(images, count):
  """Returns the indices [count] of the images that `of_images` yields."""
  return pipeline.ShuffledBatches(images, count, 0).indices(0)


def concatenate(batches):
  """Returns one `Features` of many."""
  return Features(*map(np.concatenate, zip(*batches)))
