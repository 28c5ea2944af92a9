"""Kernel Inception distance (Bińkowski et al. 2018)."""

import numpy as np

from vitgan_jax.errors import ConfigError

SUBSET_SIZE = 1000


def kernel_distance(
  real_features,
  fake_features,
  seed=2020,
  num_subsets=100,
  subset_size=SUBSET_SIZE,
):
  """Returns the unbiased MMD^2 with the kernel (x . y / F + 1)^3.

  On the host, with products in the precision of the features and all else in
  float64. With float32 features the result is 1e-9 off; sums in float32 would
  be 1e-7 off, 1e-3 of the distance of good samples.

  Args:
    real_features: [N, F].
    fake_features: [M, F].
    seed: of the choice of subsets; they are those of torch-fidelity, whose seed
      is 2020 by default, with the generated images as its first input.
    num_subsets: how many, each without repetition.
    subset_size: how many images of either kind are in one.

  Returns:
    The mean and the standard deviation over the subsets, floats. The mean can
    be slightly negative, as it is unbiased.

  Raises:
    ConfigError: if there are fewer images than in a subset.
  """
  num = min(len(real_features), len(fake_features))
  if num < subset_size:
    raise ConfigError(
      f"{num:,} images are too few for KID with subsets of {subset_size:,}: "
      "take more images"
    )
  # Legacy, but its draws are frozen for good, and torch-fidelity's.
  rng = np.random.RandomState(seed)
  distances = []
  for _ in range(num_subsets):
    fake, real = (
      np.asarray(features)[rng.choice(len(features), subset_size, False)]
      for features in (fake_features, real_features)
    )
    distances.append(_mmd2(fake, real))
  return float(np.mean(distances)), float(np.std(distances))


def _mmd2(x, y):
  """Returns the unbiased MMD^2 of two sets [N, F]."""
  num = len(x)
  # An image is no pair with itself: the diagonal would bias the mean upwards.
  within = sum(k.sum() - np.trace(k) for k in (_kernel(x, x), _kernel(y, y)))
  return within / (num * (num - 1)) - 2 * np.mean(_kernel(x, y))


def _kernel(x, y):
  k = (x @ y.T).astype(np.float64) / x.shape[1] + 1
  return k * k * k
