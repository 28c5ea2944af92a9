"""Nearest real images of generated ones, in feature space."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

_ROWS = 1000  # whose distances are in memory at once


def nearest(queries, features, k):
  """Returns the indices [Q, k] of the nearest features, the nearest first.

  Args:
    queries: [Q, F].
    features: [N, F], N >= k.
    k: how many.
  """
  # Distances do not change when both sets move, and float32 keeps more of them.
  centre = np.mean(features, axis=0)
  features = jnp.asarray(features - centre)
  return np.concatenate(
    [
      _nearest(jnp.asarray(queries[i : i + _ROWS] - centre), features, k)
      for i in range(0, len(queries), _ROWS)
    ]
  )


@functools.partial(jax.jit, static_argnums=2)
def _nearest(queries, features, k):
  products = jnp.matmul(
    queries, features.T, precision=jax.lax.Precision.HIGHEST
  )
  # The norm of the query is the same for all.
  return jax.lax.top_k(2 * products - jnp.sum(features**2, axis=1), k)[1]


def class_shares(queries, features, labels, num_classes, k=5):
  """Returns the share [num_classes] of queries that neighbours vote into each.

  Args:
    queries: [Q, F], of generated images.
    features: [N, F], of real images.
    labels: [N], the classes of these, from 0.
    num_classes: how many there are.
    k: how many neighbours vote; of equal counts the lower class wins.
  """
  votes = np.asarray(labels)[nearest(queries, features, k)]
  counts = np.stack([np.sum(votes == c, 1) for c in range(num_classes)], 1)
  winners = np.argmax(counts, axis=1)
  return np.bincount(winners, minlength=num_classes) / len(queries)
