import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import normal
from vitgan_jax.metrics import statistics

# Uneven, as the last batch of a set is, and a single image.
SIZES = [7, 32, 1, 60]


def batches_at(offset):
  """Returns batches of features with unit deviations around an offset."""
  return [
    offset + normal(size, 6, seed=i).astype(np.float64)
    for i, size in enumerate(SIZES)
  ]


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_one_pass_equals_numpy_on_all_features(offset):
  batches = batches_at(offset)
  actual = statistics.from_batches(iter(batches))
  features = np.concatenate(batches)
  assert actual.num == sum(SIZES)
  np.testing.assert_allclose(actual.mean, features.mean(0), atol=1e-13)
  # Features at 1e6 are rounded to 1e-10; sums of their squares would have to
  # be 1e14 with a rounding of 0.02, and leave errors of 1e-4.
  np.testing.assert_allclose(
    actual.cov, np.cov(features.T), rtol=1e-12, atol=1e-16 + 1e-15 * offset
  )


def test_sets_merge_in_any_order_and_grouping():
  a, b, c, d = map(statistics.from_features, batches_at(10.0))
  merge = statistics.merge
  left = functools.reduce(merge, [a, b, c, d])
  for other in (
    merge(merge(a, b), merge(c, d)),
    merge(merge(d, a), merge(c, b)),
  ):
    assert other.num == left.num
    np.testing.assert_allclose(other.mean, left.mean, rtol=1e-14)
    np.testing.assert_allclose(other.scatter, left.scatter, rtol=0, atol=1e-12)


def test_merge_leaves_its_arguments():
  a, b = map(statistics.from_features, batches_at(1.0)[:2])
  before = a.scatter.copy(), b.scatter.copy()
  statistics.merge(a, b)
  np.testing.assert_array_equal((a.scatter, b.scatter), before)


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_float32_features_are_accumulated_in_float64(asarray):
  features = 100 + normal(5000, 3)
  halves = np.split(features, 2)
  actual = statistics.from_batches(asarray(half) for half in halves)
  assert actual.mean.dtype == actual.cov.dtype == np.float64
  # float32 sums are 1e-7 off, at best.
  exact = features.astype(np.float64)
  np.testing.assert_allclose(actual.mean, exact.mean(0), rtol=1e-13)
  np.testing.assert_allclose(
    actual.cov, np.cov(exact.T), rtol=1e-10, atol=1e-12
  )
