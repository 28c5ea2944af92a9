import functools
from unittest import mock

import numpy as np
import pytest

from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics import compute, fid, kid, statistics
from vitgan_jax.metrics.feature_network import Features
from vitgan_jax.metrics.reference import Reference


def sets(num_real=1200, num_fake=1000):
  rng = np.random.default_rng(0)
  real = rng.normal(size=(num_real, 16)).astype(np.float32)
  fake = (rng.normal(size=(num_fake, 16)) + 0.5).astype(np.float32)
  logits = rng.normal(size=(num_fake, 20)).astype(np.float32)
  moments = statistics.from_features(real)
  return Reference(moments, real, None), Features(fake, logits)


def test_names_of_inception_are_the_usual_ones_with_the_count():
  result = compute.scores("inception", *sets(), long=True)
  assert list(result) == [
    "fid1k",
    "fid1k_low",
    "fid1k_high",
    "fid_inf",
    "is1k",
    "is1k_std",
    "kid1k",
    "kid1k_std",
    "precision1k",
    "recall1k",
    "density1k",
    "coverage1k",
  ]
  assert result["fid1k_low"] < result["fid1k"] < result["fid1k_high"]
  assert result["fid_inf"] < result["fid1k"]


def test_names_of_another_network_never_say_fid():
  result = compute.scores("efficientnet", *sets(num_fake=1001))
  assert list(result) == [
    "fd_efficientnet1001",
    "kd_efficientnet1001",
    "kd_efficientnet1001_std",
    "precision_efficientnet1001",
    "recall_efficientnet1001",
    "density_efficientnet1001",
    "coverage_efficientnet1001",
  ]
  real, fake = sets(num_fake=1001)
  moments = statistics.from_features(fake.features)
  assert result["fd_efficientnet1001"] == fid.frechet_distance(
    real.statistics, moments
  )
  table = compute.table(result, "the note")
  assert "fd_efficientnet1001" in table and "the note" in table
  assert "--features=inception" in table and "no FID" in table
  assert "no FID" not in compute.table({"fid1k": 3.0}, "")


@pytest.mark.parametrize("num_fake", [10, 500])
def test_too_few_images_are_an_error_of_one_line(num_fake):
  with pytest.raises(ConfigError, match="too few") as error:
    compute.scores("inception", *sets(num_fake=num_fake))
  assert "\n" not in str(error.value)


def test_classes_are_scored_by_themselves_and_few_are_left_out():
  rng = np.random.default_rng(0)
  real_labels = np.repeat([0, 1, 2, 3], [60, 200, 49, 80])
  fake_labels = np.repeat([3, 2, 1], [50, 500, 70])
  real = rng.normal(size=(389, 64)).astype(np.float32)
  fake = (rng.normal(size=(620, 64)) + 0.5).astype(np.float32)
  values, skipped = compute.class_scores(
    "efficientnet-1", (real, real_labels), (fake, fake_labels), list("abcd")
  )
  assert list(values) == ["b", "d"]
  assert "2 classes with fewer than 50 samples" in skipped
  a, b = real[real_labels == 1], fake[fake_labels == 1]
  assert values["b"] == {
    "fd_efficientnet": pytest.approx(
      fid.frechet_distance(*map(statistics.from_features, (a, b))), rel=1e-6
    ),
    "num_fake": 70,
    "num_real": 200,
  }
  assert (values["d"]["num_fake"], values["d"]["num_real"]) == (50, 80)
  assert np.isfinite(values["d"]["fd_efficientnet"])


def test_first_twenty_classes_are_scored_where_there_are_many():
  labels = np.arange(30).repeat(50)
  features = np.random.default_rng(0).normal(size=(1500, 4))
  names = [f"class{c}" for c in range(30)]
  values, skipped = compute.class_scores(
    "inception", (features, labels), (features, labels), names
  )
  assert list(values) == names[:20]
  assert all(abs(value["fid"]) < 1e-6 for value in values.values())
  assert skipped == "10 classes after the first 20"


def test_agreement_is_the_share_of_samples_beside_the_mean_of_their_class():
  # Of clusters as round as these, the linear discriminant is the nearest mean.
  rng = np.random.default_rng(0)
  means = rng.normal(size=(3, 16))
  labels = np.arange(900) % 3
  real = means[labels] + rng.normal(size=(900, 16))
  asked = np.repeat([0, 1, 2], 200)
  made = np.where(rng.random(600) < 0.7, asked, (asked + 1) % 3)
  fake = means[made] + rng.normal(size=(600, 16))
  values = compute.class_agreement((real, labels), (fake, asked), 3)

  def nearest(x):
    return np.argmin(((x[:, None] - means) ** 2).sum(axis=2), axis=1)

  assert values["fake"] == pytest.approx(
    np.mean(nearest(fake) == asked), abs=0.02
  )
  assert values["real"] == pytest.approx(
    np.mean(nearest(real) == labels), abs=0.02
  )
  assert 0.6 < values["fake"] < 0.75 < values["real"]
  assert values["chance"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("labels", [np.zeros(200), np.arange(200) // 160])
def test_no_classifier_is_fitted_to_few_images_or_one_class(labels):
  features = np.random.default_rng(0).normal(size=(200, 4))
  labelled = features, labels.astype(int)
  assert compute.class_agreement(labelled, labelled, 2) is None


def test_no_classifier_is_fitted_where_a_class_has_no_images():
  labelled = np.random.default_rng(0).normal(size=(200, 3)), np.arange(200) % 2
  assert compute.class_agreement(labelled, labelled, 2) is not None
  assert compute.class_agreement(labelled, labelled, 3) is None


@pytest.mark.parametrize(
  "count, name", [(50_000, "50k"), (2_000, "2k"), (1497, "1497"), (999, "999")]
)
def test_count_is_named(count, name):
  assert compute.count_name(count) == name


@pytest.mark.parametrize("num_features", [8, 40])
def test_images_that_are_enough_are_known_before(num_features, monkeypatch):
  small = functools.partial(kid.kernel_distance, subset_size=20)
  monkeypatch.setattr(kid, "kernel_distance", small)
  monkeypatch.setattr(kid, "SUBSET_SIZE", 20)
  network = mock.Mock(num_features=num_features)
  rng = np.random.default_rng(0)
  features = rng.normal(size=(50, num_features))

  def scores(num_real, num_fake):
    moments = statistics.from_features(features[:num_real])
    reference = Reference(moments, features[:num_real], None)
    return compute.scores(
      "tiny", reference, Features(features[:num_fake], None)
    )

  enough = {8: 20, 40: 41}[num_features]
  compute.check_count(network, "real", enough)
  assert scores(enough, enough)
  for kind, counts in (
    ("real", (enough - 1, enough)),
    ("generated", (enough, enough - 1)),
  ):
    with pytest.raises(ConfigError, match="too few"):
      scores(*counts)
    with pytest.raises(
      ConfigError, match=f"{kind} images are too few.*{enough:,}$"
    ):
      compute.check_count(network, kind, enough - 1)
