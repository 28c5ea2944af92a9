import numpy as np
import pytest

from tests.reference import normal
from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics.kid import kernel_distance


def kernel(x, y):
  return (np.dot(x, y) / len(x) + 1) ** 3


def mean_kernel(x, y):
  """Returns the mean over all pairs of different images, by loops."""
  values = [
    kernel(a, b)
    for i, a in enumerate(x)
    for j, b in enumerate(y)
    if x is not y or i != j
  ]
  return np.mean(values)


def one_subset(real, fake):
  """Returns the distance of two whole sets."""
  distance, std = kernel_distance(
    real, fake, num_subsets=1, subset_size=len(real)
  )
  assert std == 0.0
  return distance


def test_distance_matches_loops_over_pairs():
  real, fake = 1 + normal(9, 5, seed=1), normal(9, 5, seed=2)
  x, y = real.astype(np.float64), fake.astype(np.float64)
  expected = mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)
  # Float32 features: so are their products.
  np.testing.assert_allclose(one_subset(real, fake), expected, rtol=1e-6)
  np.testing.assert_allclose(one_subset(x, y), expected, rtol=1e-12)


def test_distance_of_two_points():
  a, b = normal(2, 7).astype(np.float64)
  np.testing.assert_allclose(
    one_subset(np.tile(a, (6, 1)), np.tile(b, (6, 1))),
    kernel(a, a) + kernel(b, b) - 2 * kernel(a, b),
    rtol=1e-12,
  )


def test_distance_is_unbiased():
  distances = np.array(
    [
      one_subset(normal(20, 4, seed=2 * i), normal(20, 4, seed=2 * i + 1))
      for i in range(400)
    ]
  )
  error = np.std(distances) / np.sqrt(len(distances))
  assert abs(np.mean(distances)) < 3 * error
  # With the diagonals, as in the biased estimate, it would be (E k(x, x) -
  # E k(x, y)) / 20 from either side; E k(x, x) > 8 by |x|^2 = 4 on average.
  assert 3 * error < 2 * (8 - 2) / 20


def test_small_distance_of_float32_features_keeps_its_digits():
  # Of one distribution, far from 0: the kernel is near 100, the distance near
  # 0, and sums in float32 would leave it three digits.
  real, fake = 2 + normal(100, 64, seed=1), 2 + normal(100, 64, seed=2)
  x, y = real.astype(np.float64), fake.astype(np.float64)
  expected = mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)
  assert abs(expected) < 0.3
  # Products in float32 are 1e-7 off, each by itself: less in sums.
  np.testing.assert_allclose(one_subset(real, fake), expected, rtol=1e-5)


def test_subsets_and_distances_are_those_of_torch_fidelity():
  from tests import fidelity  # late: where torch is missing, it skips

  real = normal(70, 16, seed=1).astype(np.float64)
  fake = 0.3 + normal(50, 16, seed=2).astype(np.float64)
  theirs = fidelity.load("metric_kid").kid_features_to_metric(
    fidelity.torch.from_numpy(fake),
    fidelity.torch.from_numpy(real),
    kid_subsets=20,
    kid_subset_size=30,
    rng_seed=2020,
    verbose=False,
  )
  np.testing.assert_allclose(
    kernel_distance(real, fake, num_subsets=20, subset_size=30),
    (
      theirs["kernel_inception_distance_mean"],
      theirs["kernel_inception_distance_std"],
    ),
    rtol=1e-10,
  )


def test_the_seed_chooses_the_subsets():
  features = normal(40, 3, seed=1), normal(40, 3, seed=2)
  sizes = {"num_subsets": 3, "subset_size": 10}
  first = kernel_distance(*features, seed=1, **sizes)
  assert first == kernel_distance(*features, seed=1, **sizes)
  assert first != kernel_distance(*features, seed=2, **sizes)


@pytest.mark.parametrize("nums", [(999, 1000), (1000, 999)])
def test_fewer_images_than_a_subset_are_refused(nums):
  real, fake = (normal(num, 2) for num in nums)
  with pytest.raises(ConfigError, match=r"999 images .* 1,000"):
    kernel_distance(real, fake)
