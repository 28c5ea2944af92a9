import numpy as np
import pytest

from tests.reference import normal
from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics import precision_recall as module
from vitgan_jax.metrics.precision_recall import precision_recall


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Parts the sets of these tests into several blocks, the last one smaller."""
  monkeypatch.setattr(module, "_ROWS", 64)


def distances(x, y):
  """Returns |x_i - y_j| in float64, by differences, so that nothing cancels."""
  x, y = x.astype(np.float64), y.astype(np.float64)
  return np.array([np.sqrt(np.sum(np.square(y - row), axis=1)) for row in x])


def brute_force(real, fake):
  def radii(features, k):
    return np.sort(distances(features, features), axis=1)[:, k]

  between = distances(real, fake)
  within_real = between <= radii(real, 3)[:, None]
  within_fake = between <= radii(fake, 3)
  dense = between <= radii(real, 5)[:, None]
  return {
    "precision": np.mean(within_real.any(0)),
    "recall": np.mean(within_fake.any(1)),
    "density": np.sum(dense) / (5 * len(fake)),
    "coverage": np.mean(dense.any(1)),
  }


NUM_REAL, NUM_FAKE = 200, 150


def cloud(num, width, seed, scale=1.0, offset=0.0):
  return scale * normal(num, width, seed=seed) + np.float32(offset)


def overlapping():
  return cloud(NUM_REAL, 16, 1), cloud(NUM_FAKE, 16, 2, 0.8, 0.1)


def far_from_zero():
  # |x|^2 is 10^8, the squared distances about 100, and float32 has 7 digits.
  return cloud(NUM_REAL, 64, 1, 1, 1000), cloud(NUM_FAKE, 64, 2, 1, 1000)


def copies():
  # Ten real images over and over: balls of radius 0, that hold their copies.
  real = cloud(NUM_REAL, 32, 1)
  return real, np.tile(real[:10], (15, 1))


def near_copies():
  real = cloud(NUM_REAL, 32, 1)
  return real, real[:NUM_FAKE] + cloud(NUM_FAKE, 32, 2, 0.01)


def outliers():
  # One far image of each kind. The real one's ball reaches over all others.
  real, fake = overlapping()
  real[0] += 100.0
  fake[0] -= 100.0
  return real, fake


@pytest.mark.parametrize(
  "make", [overlapping, far_from_zero, copies, near_copies, outliers]
)
def test_neighbours_are_those_of_float64(make):
  real, fake = make()
  actual, expected = precision_recall(real, fake), brute_force(real, fake)
  assert actual.keys() == expected.keys()
  for name in expected:
    # Shares of at most 1,000 decisions: not one of them may differ.
    np.testing.assert_allclose(
      actual[name], expected[name], rtol=1e-6, err_msg=name
    )


def test_precision_and_recall_equal_torch_fidelity():
  from tests import fidelity  # late: where torch is missing, it skips

  real, fake = overlapping()
  theirs = fidelity.load("metric_prc").prc_features_to_metric(
    fidelity.torch.from_numpy(fake).double(),
    fidelity.torch.from_numpy(real).double(),
    prc_neighborhood=3,
    verbose=False,
  )
  actual = precision_recall(real, fake)
  for name in ("precision", "recall"):
    # Theirs are means in float32.
    np.testing.assert_allclose(actual[name], theirs[name], rtol=1e-6)


def test_density_and_coverage_equal_prdc():
  prdc = pytest.importorskip("prdc")
  real, fake = overlapping()
  theirs = prdc.compute_prdc(
    real.astype(np.float64), fake.astype(np.float64), nearest_k=5
  )
  actual = precision_recall(real, fake)
  for name in ("density", "coverage"):
    np.testing.assert_allclose(actual[name], theirs[name], rtol=1e-12)


def test_disjoint_sets_score_0_and_identical_sets_1():
  real = cloud(NUM_REAL, 8, 1)
  assert set(precision_recall(real, real + 100).values()) == {0.0}
  scores = precision_recall(real, real)
  # Each ball holds its own image and its five neighbours.
  assert scores.pop("density") >= 1.2
  assert set(scores.values()) == {1.0}


def test_dropped_modes_cost_recall_and_coverage_alone():
  # Four far modes, of which two are generated.
  modes = 100.0 * np.eye(8)[np.arange(NUM_REAL) % 4]
  real = (cloud(NUM_REAL, 8, 1) + modes).astype(np.float32)
  fake = (cloud(NUM_REAL, 8, 2) + modes).astype(np.float32)
  both = precision_recall(real, fake)
  dropped = precision_recall(real, fake[np.arange(NUM_REAL) % 4 < 2])
  assert dropped["precision"] > both["precision"] - 0.05
  assert dropped["density"] > both["density"] - 0.05
  for name in ("recall", "coverage"):
    np.testing.assert_allclose(dropped[name], both[name] / 2, atol=0.05)
    assert both[name] > 0.8


def test_an_outlier_lifts_precision_but_neither_density_nor_coverage():
  # Samples around one real outlier, whose ball reaches back to the others.
  real = cloud(NUM_REAL, 8, 1)
  real[0] += 50.0
  fake = cloud(NUM_FAKE, 8, 2, scale=1.0, offset=50.0)
  scores = precision_recall(real, fake)
  assert scores["precision"] == 1.0
  np.testing.assert_allclose(scores["density"], 1 / 5)  # one ball, not five
  np.testing.assert_allclose(scores["coverage"], 1 / NUM_REAL)


def test_coverage_of_equal_distributions_is_its_expectation():
  # Of k and more real images among the nearest ones of each (Naeem et al.
  # 2020): 1 - prod_i (N - i) / (2 N - i) for N of either, in any space.
  i = np.arange(1, 6)
  expected = 1 - np.prod((200 - i) / (400 - i))
  values = [
    precision_recall(cloud(200, 4, 2 * s), cloud(200, 4, 2 * s + 1))["coverage"]
    for s in range(10)
  ]
  # 2,000 images, of which 3% are not covered: deviation 0.004, and somewhat
  # more as neighbours are dependent.
  np.testing.assert_allclose(np.mean(values), expected, atol=0.012)


def test_too_few_images_are_refused():
  enough, too_few = cloud(6, 4, 1), cloud(5, 4, 2)
  precision_recall(enough, enough)
  for pair in [(enough, too_few), (too_few, enough)]:
    with pytest.raises(ConfigError, match="5 images are too few"):
      precision_recall(*pair)
