"""Precision, recall, density and coverage of features.

A set's manifold is the union of balls around its images, each reaching to the
k-th nearest other image of the set.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vitgan_jax.errors import ConfigError

K_PRECISION_RECALL = 3  # of Kynkäänniemi et al. 2019
K_DENSITY_COVERAGE = 5  # of Naeem et al. 2020
_ROWS = 1000  # whose distances are in memory at once
# Of squared distances in float32, by squared norms: what two that are equal can
# differ by. Copies of an image must not fall out of balls by chance.
_ROUNDING = 4e-6


def precision_recall(real_features, fake_features):
  """Returns what share of images lies in the manifold of the other kind.

  Distances are float32, in blocks, on JAX's device.

  Args:
    real_features: [N, F].
    fake_features: [M, F].

  Returns:
    A dict of floats:
      precision: the share of generated images in a real ball.
      recall: the share of real images in a generated ball.
      density: in how many real balls a generated image lies, over k. About 1
        for equal distributions, but not bounded.
      coverage: the share of real balls that hold a generated image.

  Raises:
    ConfigError: if there are not more than k images of each kind.
  """
  num = min(len(real_features), len(fake_features))
  if num <= K_DENSITY_COVERAGE:
    raise ConfigError(
      f"{num} images are too few for the {K_DENSITY_COVERAGE} neighbours of "
      "density and coverage: take more images"
    )
  real_features, fake_features = map(np.asarray, (real_features, fake_features))
  # Distances do not change when both sets move, but their rounding does: it
  # grows with the norms.
  centre = np.mean(real_features, axis=0, dtype=np.float64)
  real = jnp.asarray(real_features - centre, jnp.float32)
  fake = jnp.asarray(fake_features - centre, jnp.float32)
  real_radii, fake_radii = _radii(real), _radii(fake)

  in_real_ball = np.zeros(len(fake), bool)
  recalled, covered, inside = [], [], []
  for start in range(0, len(real), _ROWS):
    rows = slice(start, start + _ROWS)
    block = _compare(real[rows], fake, real_radii[rows], fake_radii)
    in_real_ball |= np.asarray(block["in_real_ball"])
    recalled.append(block["recalled"])
    covered.append(block["num_inside"] > 0)
    inside.append(block["num_inside"])
  return {
    "precision": float(np.mean(in_real_ball)),
    "recall": float(np.mean(np.concatenate(recalled))),
    "density": float(
      np.sum(np.concatenate(inside), dtype=np.int64)
      / (K_DENSITY_COVERAGE * len(fake))
    ),
    "coverage": float(np.mean(np.concatenate(covered))),
  }


def _squared_distances(x, y):
  """Returns |x_i - y_j|^2, [N, M], of rows [N, F] and [M, F]."""
  # The matrix units of GPUs and TPUs would else round factors to few bits.
  products = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
  norms = jnp.sum(jnp.square(x), 1)[:, None] + jnp.sum(jnp.square(y), 1)
  return norms - 2 * products


def _radii(features):
  """Returns the squared radii of the balls to the k-th other, [N, k + 1]."""
  return jnp.concatenate(
    [
      _reach(features[start : start + _ROWS], features)
      for start in range(0, len(features), _ROWS)
    ]
  )


@jax.jit
def _reach(rows, features):
  """Returns the squared radii of some images, ascending from k = 0, itself."""
  negative, _ = jax.lax.top_k(
    -_squared_distances(rows, features), K_DENSITY_COVERAGE + 1
  )
  norms = jnp.sum(jnp.square(rows), axis=1, keepdims=True)
  return -negative + _ROUNDING * (norms - negative)


@jax.jit
def _compare(real, fake, real_radii, fake_radii):
  """Compares some real images with all generated ones, in both's balls."""
  distances = _squared_distances(real, fake)
  within_real = distances <= real_radii[:, K_PRECISION_RECALL, None]
  within_fake = distances <= fake_radii[:, K_PRECISION_RECALL]
  within_dense = distances <= real_radii[:, K_DENSITY_COVERAGE, None]
  return {
    "in_real_ball": jnp.any(within_real, axis=0),
    "recalled": jnp.any(within_fake, axis=1),
    "num_inside": jnp.sum(within_dense, axis=1),
  }
