import numpy as np
import pytest
import scipy.linalg

from tests.reference import normal
from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics import fid
from vitgan_jax.metrics.statistics import Statistics, from_features


def gaussian(mean, cov, num=1_000_000):
  """Returns the statistics of a set with just these moments."""
  mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
  return Statistics(num, mean, cov * (num - 1))


def rotation(size):
  return np.linalg.qr(np.random.default_rng(3).normal(size=(size, size)))[0]


def correlated(num, width, seed):
  """Returns features with deviations from 1 to 1 / width, rotated."""
  deviations = 1 / np.arange(1.0, width + 1)
  features = normal(num, width, seed=seed) * deviations + 0.3 * seed
  return features.astype(np.float64) @ rotation(width)


@pytest.mark.parametrize("rotate", [np.eye(3), rotation(3)])
def test_distance_of_gaussians_with_the_same_axes(rotate):
  a, b = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.0])
  actual = fid.frechet_distance(
    gaussian([1.0, 2.0, 3.0], rotate @ np.diag(a) @ rotate.T),
    gaussian([1.0, 0.0, 6.0], rotate @ np.diag(b) @ rotate.T),
  )
  # |m - n|^2 + sum (sqrt a - sqrt b)^2 = 13 + 2^2 + 1^2 + 0.5^2. The third
  # deviation of b is 0 up to the root of rounding.
  np.testing.assert_allclose(actual, 18.25, rtol=1e-8)


@pytest.mark.parametrize("num_real, num_fake", [(20, 9), (9, 20), (50, 9)])
def test_distance_of_few_images_is_that_of_their_singular_covariances(
  num_real, num_fake
):
  real, fake = correlated(num_real, 32, 1), correlated(num_fake, 32, 2)
  actual = fid.frechet_distance_of_few(real, fake)
  # tr (A B)^(1/2) is the sum of the singular values of X Y^T, with A = X^T X.
  x, y = ((v - v.mean(0)) / np.sqrt(len(v) - 1) for v in (real, fake))
  trace_root = np.linalg.norm(x @ y.T, "nuc")
  expected = np.sum((real.mean(0) - fake.mean(0)) ** 2)
  expected += np.sum(x**2) + np.sum(y**2) - 2 * trace_root
  np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_distance_of_gaussians_with_different_axes():
  a = np.array([[2.0, 0.5], [0.5, 1.0]])
  b = np.array([[1.0, -0.7], [-0.7, 3.0]])
  actual = fid.frechet_distance(gaussian([0, 0], a), gaussian([0, 2], b))
  # Of 2 x 2 matrices, tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
  trace_root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
  np.testing.assert_allclose(actual, 4 + 7 - 2 * trace_root, rtol=1e-12)


def test_distance_equals_the_trace_of_the_matrix_square_root():
  real, fake = correlated(300, 32, seed=1), correlated(200, 32, seed=2)
  actual = fid.frechet_distance(from_features(real), from_features(fake))
  root = scipy.linalg.sqrtm(np.cov(real.T) @ np.cov(fake.T)).real
  np.testing.assert_allclose(
    actual,
    np.sum((real.mean(0) - fake.mean(0)) ** 2)
    + np.trace(np.cov(real.T) + np.cov(fake.T) - 2 * root),
    rtol=1e-10,
  )


def test_distance_equals_torch_fidelity():
  from tests import fidelity  # late: where torch is missing, it skips

  real, fake = correlated(300, 32, seed=1), correlated(200, 32, seed=2)
  actual = fid.frechet_distance(from_features(real), from_features(fake))
  metric_fid = fidelity.load("metric_fid")
  theirs = metric_fid.fid_statistics_to_metric(
    *(
      metric_fid.fid_features_to_statistics(fidelity.torch.from_numpy(features))
      for features in (fake, real)
    ),
    verbose=False,
  )
  np.testing.assert_allclose(
    actual, theirs["frechet_inception_distance"], rtol=1e-10
  )


# scipy's sqrtm is called as it was before; and torchvision's own.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_distance_equals_pytorch_fid():
  from tests import fidelity  # late: where torch is missing, it skips

  real, fake = correlated(300, 32, seed=1), correlated(200, 32, seed=2)
  theirs = fidelity.load_pytorch_fid("fid_score").calculate_frechet_distance(
    np.mean(fake, 0), np.cov(fake.T), np.mean(real, 0), np.cov(real.T)
  )
  actual = fid.frechet_distance(from_features(real), from_features(fake))
  np.testing.assert_allclose(actual, theirs, rtol=1e-10)


@pytest.mark.parametrize("rotate", [np.eye(32), rotation(32)])
def test_equal_sets_have_no_distance_though_features_depend(rotate):
  features = correlated(200, 32, seed=1)
  features[:, :5] = 0.0  # as units that never fire
  features[:, 5] = features[:, 6]
  stats = from_features(features @ rotate)
  # Six roots of what rounding leaves of an eigenvalue of 0: 1e-17 of 1.
  assert abs(fid.frechet_distance(stats, stats)) < 1e-7


def test_distance_is_symmetric():
  a = from_features(correlated(100, 8, seed=1))
  b = from_features(correlated(50, 8, seed=2))
  np.testing.assert_allclose(
    fid.frechet_distance(a, b), fid.frechet_distance(b, a), rtol=1e-10
  )


@pytest.mark.parametrize("kind", ["real", "generated"])
def test_as_many_images_as_features_are_refused(kind):
  enough, too_few = (
    from_features(correlated(num, 16, seed=0)) for num in (17, 16)
  )
  assert np.linalg.matrix_rank(enough.cov) == 16
  assert np.linalg.matrix_rank(too_few.cov) == 15
  fid.frechet_distance(enough, enough)
  pair = (too_few, enough) if kind == "real" else (enough, too_few)
  with pytest.raises(ConfigError, match=f"16 {kind} images .* at least 17"):
    fid.frechet_distance(*pair)


def test_features_of_two_networks_are_refused():
  with pytest.raises(ConfigError, match="same network"):
    fid.frechet_distance(gaussian([0], [[1]]), gaussian([0, 0], np.eye(2)))


# Gaussians of 12 features, 0.8 apart, of which five times as many images are
# drawn: as few as 10,000 are for 2,048 features.
WIDTH, NUM = 12, 60
REAL = gaussian(np.zeros(WIDTH), np.diag(1 / np.arange(1.0, WIDTH + 1)))
FAKE = gaussian(np.full(WIDTH, 0.2), 1.5 * REAL.cov)


def draw_fake(rng, num):
  return FAKE.mean + rng.normal(size=(num, WIDTH)) * np.sqrt(np.diag(FAKE.cov))


def test_first_order_term_is_the_derivative_by_the_weight_of_an_image():
  images = draw_fake(np.random.default_rng(0), NUM)
  fake = from_features(images)
  fake = gaussian(fake.mean, fake.scatter / NUM)  # of the images themselves

  def distance(i, weight):
    """Gives image i more weight at the expense of all, itself too."""
    offset = images[i] - fake.mean
    cov = (1 - weight) * fake.cov + weight * (1 - weight) * np.outer(
      offset, offset
    )
    mean = fake.mean + weight * offset
    return fid.frechet_distance(REAL, gaussian(mean, cov))

  h = 1e-4
  slopes = [(distance(i, h) - distance(i, -h)) / (2 * h) for i in range(NUM)]
  np.testing.assert_allclose(
    fid._influence(REAL, fake, images), slopes, rtol=1e-4, atol=1e-4
  )


def test_interval_covers_the_average_distance_of_as_many_images():
  rng = np.random.default_rng(0)
  distances = [
    fid.frechet_distance(REAL, from_features(draw_fake(rng, NUM)))
    for _ in range(1000)
  ]
  bias = np.mean(distances) - fid.frechet_distance(REAL, FAKE)
  intervals = np.array(
    [fid.bootstrap_interval(REAL, draw_fake(rng, NUM)) for _ in range(100)]
  )
  low, high = intervals.T
  covered = np.sum((low < np.mean(distances)) & (np.mean(distances) < high))
  # A first-order term, of only 60 images: 95 of 100, within three deviations.
  assert 88 <= covered <= 100
  # As wide as distances really spread. Resampled distances are both wider and
  # too large by about the bias, which is no small part of the interval.
  width = np.mean(high - low)
  np.testing.assert_allclose(width, 2 * 1.96 * np.std(distances), rtol=0.1)
  assert bias > 0.2 * width


def test_interval_is_around_the_distance_and_repeats_by_seed():
  features = draw_fake(np.random.default_rng(1), NUM)
  distance = fid.frechet_distance(REAL, from_features(features))
  low, high = fid.bootstrap_interval(REAL, features, seed=1)
  assert low < distance < high
  assert (low, high) == fid.bootstrap_interval(REAL, features, seed=1)
  assert (low, high) != fid.bootstrap_interval(REAL, features, seed=2)


def test_interval_of_features_that_are_dead_on_either_side():
  features = draw_fake(np.random.default_rng(1), NUM)
  expected = fid.bootstrap_interval(REAL, features)
  zeros = np.zeros((NUM, 3))
  padded = gaussian(np.pad(REAL.mean, (0, 3)), np.pad(REAL.cov, (0, 3)))
  actual = fid.bootstrap_interval(padded, np.hstack([features, zeros]))
  np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_extrapolation_removes_the_bias():
  # So close that the bias is most of the distance.
  real = gaussian(np.zeros(WIDTH), np.eye(WIDTH))
  exact = fid.frechet_distance(real, gaussian(np.zeros(WIDTH), 1.1 * real.cov))
  sets = np.sqrt(1.1) * normal(60, 40 * WIDTH, WIDTH).astype(np.float64)
  biases = [fid.frechet_distance(real, from_features(x)) - exact for x in sets]
  errors = [fid.extrapolate(real, x) - exact for x in sets]
  deviation = np.std(errors) / np.sqrt(len(sets))
  assert np.mean(biases) > 10 * deviation
  # The terms beyond 1 / N, at 2.4 images a feature, leave a fifth.
  assert abs(np.mean(errors)) < 0.25 * np.mean(biases)


def test_extrapolation_from_few_images_is_refused():
  features = draw_fake(np.random.default_rng(0), 57)
  with pytest.raises(ConfigError, match="at least 58"):
    fid.extrapolate(REAL, features)
  with pytest.raises(ConfigError, match="12 generated images"):
    fid.extrapolate(REAL, features[:12])
