import numpy as np
import pytest

from configs import digits
from tests import runs
from vitgan_jax import config as config_lib
from vitgan_jax import judge_digits
from vitgan_jax.errors import ConfigError


class Oracle:
  """A classifier that finds the class in the first pixel, as sure as 0.7."""

  def predict_proba(self, features):
    classes = np.rint(features[:, 0] * 255).astype(int)
    return np.where(np.arange(10) == classes[:, None], 0.7, 0.3 / 9)


def test_judge_counts_classes_and_averages_their_confidence():
  images = np.zeros((5, 2, 2, 3), np.uint8)
  images[:, 0, 0] = np.array([1, 1, 1, 9, 0])[:, None]
  counts, per_class, confidence = judge_digits.judge(Oracle(), images)
  np.testing.assert_array_equal(counts, [1, 3, 0, 0, 0, 0, 0, 0, 0, 1])
  np.testing.assert_allclose(per_class[[0, 1, 9]], 0.7)
  assert np.isnan(per_class[2])
  np.testing.assert_allclose(confidence, 0.7)


def test_classifier_knows_digits_and_doubts_what_is_none():
  data = digits.get_config().data
  classifier = judge_digits.fit_classifier(
    *judge_digits.labelled(data, "train")
  )
  images, labels = judge_digits.labelled(data, "test")
  counts, _, confidence = judge_digits.judge(classifier, images)
  assert np.sum(counts) == 300
  assert classifier.score(judge_digits._features(images), labels) > 0.95
  assert confidence > 0.8
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, images.shape, np.uint8)
  averages = (images.astype(int) + images[rng.permutation(300)]) // 2
  assert judge_digits.judge(classifier, noise)[2] < 0.5
  assert judge_digits.judge(classifier, averages.astype(np.uint8))[2] < 0.65


def test_scores_of_a_run_make_a_table(digits_run):
  scores = judge_digits.evaluate(digits_run.workdir)
  assert scores["step"] == int(digits_run.state.step)
  np.testing.assert_allclose(sum(scores["class_share"]), 1.0)
  np.testing.assert_allclose(
    scores["relative_confidence"] * scores["real_confidence"],
    scores["mean_confidence"],
  )
  table = judge_digits.table(scores)
  assert table.count("\n| ") == 10 and "1000 samples" in table


def test_run_on_another_dataset_is_refused(digits_run, tmp_path):
  config = config_lib.load(digits_run.workdir).unlock()
  config.data.dataset = "cifar10"
  config_lib.claim_workdir(config, tmp_path)
  with pytest.raises(ConfigError, match="cifar10, not on the dig"):
    judge_digits.evaluate(tmp_path)
  assert runs.snapshot(tmp_path).keys() == {"config.json"}
