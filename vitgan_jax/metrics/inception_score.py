"""Inception score (Salimans et al. 2016)."""

import numpy as np

from vitgan_jax.errors import ConfigError


def inception_score(logits, splits=10):
  """exp(mean KL(p(y|x) || mean p(y))), per split.

  The splits are runs of neighbours: shuffle logits that come sorted by class.
  torch-fidelity, which has the same splits, shuffles all that it is given.

  Args:
    logits: [N, C], of FID's InceptionV3 without the bias.
    splits: how many parts are scored apart. Fewer images in a part lower the
      score, so that values compare only at the same N and splits.

  Returns:
    The mean and the standard deviation over the splits, floats.

  Raises:
    ConfigError: if there are fewer images than splits.
  """
  num = len(logits)
  if num < splits:
    raise ConfigError(
      f"{num:,} images cannot be parted into {splits} splits of the inception "
      "score: take more images"
    )
  scores = [
    _score(logits[i * num // splits : (i + 1) * num // splits])
    for i in range(splits)
  ]
  return float(np.mean(scores)), float(np.std(scores))


def _score(logits):
  logits = np.asarray(logits, np.float64)
  shifted = logits - logits.max(axis=1, keepdims=True)
  log_p = shifted - np.log(np.sum(np.exp(shifted), axis=1, keepdims=True))
  p = np.exp(log_p)
  marginal = np.mean(p, axis=0)
  # A class can underflow in all images: 0 log 0 is 0.
  log_marginal = np.log(np.maximum(marginal, np.finfo(np.float64).tiny))
  return np.exp(np.mean(np.sum(p * (log_p - log_marginal), axis=1)))
