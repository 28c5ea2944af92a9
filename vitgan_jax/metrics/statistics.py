"""Mean and covariance of features in one pass, in float64 on the host."""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Moments of a set of features; `merge` joins those of two sets.

  Attributes:
    num: how many images.
    mean: float64 [F].
    scatter: float64 [F, F], the sum of (x - mean) (x - mean)^T. Unlike the
      covariance it is defined for a single image, too.
  """

  num: int
  mean: np.ndarray
  scatter: np.ndarray

  @property
  def cov(self):
    """The unbiased covariance, float64 [F, F]; of two images or more."""
    return self.scatter / (self.num - 1)


def from_features(features):
  """Returns the statistics of one batch of features [B, F]."""
  features = np.asarray(features)
  mean = np.mean(features, axis=0, dtype=np.float64)
  # Sums of raw squares, less the square of the mean, would lose as many digits
  # as the mean exceeds the deviations.
  centred = features - mean
  return Statistics(len(features), mean, centred.T @ centred)


def from_moments(mean, cov):
  """Returns the statistics of a mean [F] and an unbiased covariance [F, F].

  They do not tell of how many images: it is as many as can be compared.
  """
  num = len(mean) + 1
  return Statistics(num, mean, cov * (num - 1))


def merge(a, b):
  """Returns the statistics of two sets together (Chan et al. 1979)."""
  num = a.num + b.num
  offset = b.mean - a.mean
  scatter = np.outer(offset, offset * (a.num * b.num / num))
  scatter += a.scatter
  scatter += b.scatter
  return Statistics(num, a.mean + offset * (b.num / num), scatter)


def from_batches(batches):
  """Returns the statistics of all batches [B, F] of an iterable.

  A merge costs as much as some hundred images: B of 1,000 wastes no time.
  """
  return functools.reduce(merge, map(from_features, batches))
