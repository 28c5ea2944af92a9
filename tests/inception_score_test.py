import numpy as np
import pytest

from tests.reference import normal
from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics.inception_score import inception_score

# Does not divide by 10: splits of 20 and of 21 images.
LOGITS = 3 * normal(207, 12)


def sure(classes, num_classes=10):
  """Returns logits that leave no doubt; others' exp underflows to 0."""
  return 1000.0 * np.eye(num_classes)[classes]


def test_known_scores():
  balanced = np.tile(np.arange(10), 20)
  np.testing.assert_allclose(inception_score(np.zeros((50, 10))), (1, 0))
  np.testing.assert_allclose(
    inception_score(sure(balanced)), (10, 0), atol=1e-12
  )
  np.testing.assert_allclose(
    inception_score(sure(np.full(200, 3))), (1, 0), atol=1e-12
  )
  # Each split sees one class of ten.
  np.testing.assert_allclose(
    inception_score(sure(np.sort(balanced))), (1, 0), atol=1e-12
  )


def test_splits_are_scored_apart():
  collapsed, diverse = np.zeros(50, int), np.tile(np.arange(10), 5)
  logits = sure(np.concatenate([collapsed, diverse]))
  mean, std = inception_score(logits, splits=2)
  np.testing.assert_allclose((mean, std), (5.5, 4.5))


def test_score_matches_loops_over_probabilities():
  scores = []
  for i in range(10):
    logits = LOGITS[i * 207 // 10 : (i + 1) * 207 // 10].astype(np.float64)
    p = np.array([np.exp(row) / sum(np.exp(row)) for row in logits])
    marginal = p.mean(0)
    divergences = [sum(row * np.log(row / marginal)) for row in p]
    scores.append(np.exp(np.mean(divergences)))
  np.testing.assert_allclose(
    inception_score(LOGITS), (np.mean(scores), np.std(scores)), rtol=1e-12
  )


@pytest.mark.parametrize("shuffle", [False, True])
def test_score_equals_torch_fidelity(shuffle):
  from tests import fidelity  # late: where torch is missing, it skips

  theirs = fidelity.load("metric_isc").isc_features_to_metric(
    fidelity.torch.from_numpy(LOGITS), shuffle=shuffle, rng_seed=2020
  )
  order = np.arange(len(LOGITS))
  if shuffle:
    order = np.random.RandomState(2020).permutation(len(LOGITS))
  np.testing.assert_allclose(
    inception_score(LOGITS[order]),
    (theirs["inception_score_mean"], theirs["inception_score_std"]),
    rtol=1e-12,
  )


def test_fewer_images_than_splits_are_refused():
  inception_score(LOGITS[:10])
  with pytest.raises(ConfigError, match="9 images"):
    inception_score(LOGITS[:9])
