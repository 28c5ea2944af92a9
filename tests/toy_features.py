"""A feature network of a few numbers, and what it says in plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from vitgan_jax.metrics.feature_network import FeatureNetwork, Features

NUM_FEATURES = 6
_RNG = np.random.default_rng(0)
PARAMS = {
  "kernel": _RNG.normal(size=(12, NUM_FEATURES)).astype(np.float32),
  "head": _RNG.normal(size=(NUM_FEATURES, 10)).astype(np.float32),
}


def _pooled(images, xp):
  batch, height, width, _ = images.shape
  x = images.reshape(batch, 2, height // 2, 2, width // 2, 3)
  return xp.mean(x, axis=(2, 4)).reshape(batch, -1)


def _apply(params, images):
  x = _pooled(images.astype(jnp.float32) / 255, jnp)
  features = jnp.matmul(
    x, params["kernel"], precision=jax.lax.Precision.HIGHEST
  )
  features = jnp.sin(3 * features)
  return Features(features, features @ params["head"])


def features_of(images):
  """Returns the features [N, F] of images, in float64."""
  x = _pooled(np.asarray(images) / 255.0, np)
  return np.sin(3 * x @ PARAMS["kernel"].astype(np.float64))


def tiny(name="tiny-1", sha256="0" * 64):
  """Returns the FeatureNetwork."""
  return FeatureNetwork(name, sha256, NUM_FEATURES, PARAMS, _apply)
