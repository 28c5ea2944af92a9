"""Speed of the metrics, beside torch-fidelity on the same device.

InceptionV3 has random weights, which take as long as the published ones; images
are random, of 32 pixels. The two take turns. Needs torch and torch-fidelity.
"""

import pathlib
import tempfile

import jax
import numpy as np

from benchmarks import fidelity, turns
from vitgan_jax import partitioning
from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics import (
  compute,
  features,
  inception,
  statistics,
  torch_files,
)
from vitgan_jax.metrics.feature_network import FeatureNetwork, Features
from vitgan_jax.metrics.reference import Reference

NUM_IMAGES = 10_000  # of either kind, for the time of a whole score
NUM_FEATURES = 2048  # of Inception
_THEIR_BATCH = 16  # faster than 64, its default, on a CPU


def run(seconds):
  """Returns the figures, a list of one dict.

  Args:
    seconds: to measure the features for, of each of the two.

  Raises:
    ConfigError: if torch or torch-fidelity is missing.
  """
  try:
    fidelity.load("metric_fid")
  except ImportError as error:
    raise ConfigError(
      "`benchmarks metrics` compares with torch-fidelity: run `make test`, "
      "or pip install torch and, with --no-deps, torch-fidelity"
    ) from error
  ours, theirs = _features_per_sec(seconds)
  rng = np.random.default_rng(0)
  normal = rng.normal(size=(2, NUM_IMAGES, NUM_FEATURES))
  real, fake = np.abs(normal).astype(np.float32)
  logits = rng.normal(size=(NUM_IMAGES, 1008)).astype(np.float32)
  our_seconds = turns.time_of(_our_scores, real, fake, logits)
  their_seconds = turns.time_of(fidelity.scores, real, fake, logits)
  # The features of both kinds; then all metrics.
  our_total = 2 * NUM_IMAGES / ours + our_seconds
  their_total = 2 * NUM_IMAGES / theirs + their_seconds
  return [
    {
      "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
      "features_per_sec": round(ours, 2),
      "torch_fidelity_features_per_sec": round(theirs, 2),
      "features_ratio": round(ours / theirs, 2),
      "num_images": NUM_IMAGES,
      "metrics_seconds": round(our_seconds, 1),
      "torch_fidelity_metrics_seconds": round(their_seconds, 1),
      "metrics_ratio": round(their_seconds / our_seconds, 2),
      "estimated_total_seconds": round(our_total),
      "torch_fidelity_estimated_total_seconds": round(their_total),
      "total_ratio": round(their_total / our_total, 2),
    }
  ]


def _features_per_sec(seconds):
  """Returns ours and theirs, in turns of 64 images for each device."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "weights.pth"
    fidelity.write_random_inception(path)
    params = inception.from_state_dict(torch_files.read_state_dict(path))
    their_network = fidelity.inception(path)
  network = FeatureNetwork("random", "", NUM_FEATURES, params, inception.apply)
  extractor = features.Extractor(network, partitioning.create_mesh())
  images = np.random.default_rng(0).integers(
    0, 256, (extractor.batch_size, 32, 32, 3), np.uint8
  )
  batch = partitioning.global_batch(extractor.mesh, images)

  def ours():
    extractor(batch)

  def theirs():
    import torch

    with torch.no_grad():
      for i in range(0, len(images), _THEIR_BATCH):
        part = images[i : i + _THEIR_BATCH].transpose(0, 3, 1, 2)
        their_network(torch.from_numpy(np.ascontiguousarray(part)))

  medians, _ = turns.median_seconds([ours, theirs], seconds)
  return [len(images) / median for median in medians]


def _our_scores(real, fake, logits):
  moments = statistics.from_features(real)
  reference = Reference(moments, real, None)
  compute.scores("inception", reference, Features(fake, logits))
