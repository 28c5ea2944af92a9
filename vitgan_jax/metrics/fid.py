"""Fréchet distance of features (Heusel et al. 2017), its spread and limit.

With the features of FID's InceptionV3 it is FID. All is float64, on the host.
"""

import numpy as np

from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics import statistics


def frechet_distance(real, fake):
  """|m - n|^2 + tr(A + B - 2 (A B)^(1/2)) of two Gaussians N(m, A), N(n, B).

  Args:
    real: `Statistics` with mean m and covariance A.
    fake: `Statistics` with n and B; the distance is the same if they swap.

  Returns:
    A float, 0 for equal sets within rounding, 1e-8 of the trace.

  Raises:
    ConfigError: if either has no more images than features, or the features
      are not of one network.
  """
  _check(real, fake.num, len(fake.mean))
  return _distance(real, _root(real.cov), fake)


def frechet_distance_of_few(real_features, fake_features):
  """Returns `frechet_distance`, of fewer images than features too.

  The covariances are singular then, and the distance is mostly their bias,
  which grows as the images become fewer: compare it at equal numbers alone.

  Args:
    real_features: [N, F], N >= 2.
    fake_features: [M, F], M >= 2.
  """
  real, fake = map(statistics.from_features, (real_features, fake_features))
  if real.num < len(real.mean):
    root = (real_features - real.mean).T / np.sqrt(real.num - 1)
  else:
    root = _root(real.cov)
  return _distance(real, root, fake)


def bootstrap_interval(real, fake_features, seed=0):
  """Returns a 95% interval for what the distance is on average over latents.

  It is about the distance at this number of generated images, the upward bias
  of finite sets included, as the number is part of the name (`fid50k`); what
  the bias is, `extrapolate` estimates. The real images are taken as given.

  Plain resampling fails here: a resample holds 63% of the images, so that its
  distance is biased once more, beyond the interval, and spreads up to 2.5 times
  too far where images are 5 times the features. Resampled instead is the
  first-order term of the distance, a mean over images, which has neither fault
  and takes one decomposition in all. In simulations of Gaussians with images
  1.2 to 25 times the features, it covered 92 to 99%.

  Args:
    real: `Statistics` of the real images.
    fake_features: [N, F].
    seed: of the 1,000 resamples.

  Returns:
    `(low, high)`, around the distance.

  Raises:
    ConfigError: as `frechet_distance`.
  """
  fake = statistics.from_features(fake_features)
  distance = frechet_distance(real, fake)
  influence = _influence(real, fake, fake_features)
  rng = np.random.default_rng(seed)
  shifts = [
    np.mean(influence[rng.integers(fake.num, size=fake.num)])
    for _ in range(1000)
  ]
  low, high = np.quantile(shifts, [0.025, 0.975])
  # What resamples exceed the sample by, the sample exceeds the average by.
  return float(distance - high), float(distance - low)


def extrapolate(real, fake_features, seed=0):
  """Returns the distance at infinitely many generated images, FID-infinity.

  The bias falls as 1 / N: a line is fitted to the distances of 15 random
  subsets, from 5,000 images (at 2,048 features) to all (Chong and Forsyth
  2020). The result varies somewhat more than the distance at N, falls short by
  what the bias has beyond 1 / N, and keeps that of the real images' number.

  Args:
    real: `Statistics` of the real images.
    fake_features: [N, F].
    seed: of the choice of subsets.

  Raises:
    ConfigError: if there are not twice as many images as in the least subset;
      else as `frechet_distance`.
  """
  fake_features = np.asarray(fake_features)
  num, num_features = fake_features.shape
  _check(real, num, num_features)
  smallest = _smallest_subset(num_features)
  if not can_extrapolate(num, num_features):
    raise ConfigError(
      f"extrapolation from {num:,} generated images is not possible with "
      f"{num_features:,} features: generate at least {2 * smallest:,}"
    )
  rng = np.random.default_rng(seed)
  real_root = _root(real.cov)
  sizes = np.linspace(smallest, num, 15).astype(int)
  distances = []
  for size in sizes:
    subset = fake_features[rng.choice(num, size, replace=False)]
    fake = statistics.from_features(subset)
    distances.append(_distance(real, real_root, fake))
  _, intercept = np.polyfit(1 / sizes, distances, 1)
  return float(intercept)


def can_extrapolate(num, num_features):
  """Says whether `extrapolate` has enough generated images."""
  return num >= 2 * _smallest_subset(num_features)


def _smallest_subset(num_features):
  return 5000 * num_features // 2048  # below, 1 / N is a poor fit


def least_images(num_features):
  """Returns how many images of either kind a distance needs."""
  return num_features + 1  # the mean takes one degree of freedom


def _check(real, num_fake, num_features):
  if len(real.mean) != num_features:
    raise ConfigError(
      f"the real images have {len(real.mean):,} features and the generated "
      f"ones {num_features:,}: compute both with the same network"
    )
  needed = least_images(num_features)
  for kind, num in (("real", real.num), ("generated", num_fake)):
    if num < needed:
      raise ConfigError(
        f"{num:,} {kind} images are too few for a Fréchet distance of "
        f"{num_features:,} features, as their covariance is singular: take at "
        f"least {needed:,}"
      )


def _root(cov):
  """Returns R with R R^T = cov, also where cov is singular."""
  eigenvalues, vectors = np.linalg.eigh(cov)
  # Rounding can take those that should be 0 below it.
  return vectors * np.sqrt(np.maximum(eigenvalues, 0))


def _distance(real, real_root, fake):
  # A B and the symmetric R^T B R, with R R^T = A, have the same eigenvalues;
  # only of the latter are they real and positive in finite precision too.
  eigenvalues = np.linalg.eigvalsh(real_root.T @ fake.cov @ real_root)
  return float(
    np.sum(np.square(real.mean - fake.mean))
    + np.trace(real.cov)
    + np.trace(fake.cov)
    - 2 * np.sum(np.sqrt(np.maximum(eigenvalues, 0)))
  )


def _influence(real, fake, fake_features):
  """Returns what each generated image adds to the distance, [N], mean 0.

  The derivative of the distance is 2 (n - m) by the mean and I - T by the
  covariance, where T = R (R^T B R)^(-1/2) R^T is the matrix of the optimal
  transport from N(n, B) to N(m, A).
  """
  root = _root(real.cov)
  eigenvalues, vectors = np.linalg.eigh(root.T @ fake.cov @ root)
  # Where no image varies, as with features that are always 0, none counts.
  varies = eigenvalues > eigenvalues[-1] * len(root) * np.finfo(float).eps
  half = root @ (vectors[:, varies] * eigenvalues[varies] ** -0.25)  # T = H H^T
  centred = np.asarray(fake_features) - fake.mean
  moved = centred @ half
  values = 2 * centred @ (fake.mean - real.mean)
  values += np.einsum("nf,nf->n", centred, centred)
  values -= np.einsum("nf,nf->n", moved, moved)
  return values - np.mean(values)
