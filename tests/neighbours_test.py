import numpy as np
import pytest

from vitgan_jax.metrics import neighbours


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_nearest_are_those_of_brute_force(offset, monkeypatch):
  monkeypatch.setattr(neighbours, "_ROWS", 7)
  rng = np.random.default_rng(0)
  features = (rng.normal(size=(60, 16)) + offset).astype(np.float32)
  queries = (rng.normal(size=(20, 16)) + offset).astype(np.float32)
  difference = queries[:, None].astype(np.float64) - features
  expected = np.argsort(np.sum(difference**2, -1), axis=1)[:, :5]
  np.testing.assert_array_equal(
    neighbours.nearest(queries, features, 5), expected
  )


def test_image_is_its_own_nearest():
  features = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
  nearest = neighbours.nearest(features, features, 1)[:, 0]
  np.testing.assert_array_equal(nearest, np.arange(30))


def test_neighbours_vote_for_the_class():
  rng = np.random.default_rng(0)
  centres = 10 * np.eye(4)[:3]
  labels = np.repeat([0, 1, 2], 20)
  features = centres[labels] + rng.normal(size=(60, 4))
  wrong = labels.copy()
  wrong[::10] = 2  # outvoted
  queries = centres[[0, 0, 0, 1]] + 0.1 * rng.normal(size=(4, 4))
  shares = neighbours.class_shares(queries, features, wrong, 4)
  np.testing.assert_array_equal(shares, [0.75, 0.25, 0, 0])
