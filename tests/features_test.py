import jax
import numpy as np
import pytest

from tests import toy_features
from tests.datasets import noise
from vitgan_jax import partitioning
from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics import features, inception


def extractor(num_devices):
  mesh = partitioning.create_mesh(jax.devices()[:num_devices])
  return features.Extractor(toy_features.tiny(), mesh)


@pytest.mark.parametrize("num_devices", [1, 2, 8])
@pytest.mark.parametrize("per_device", [1, 6, 16])
def test_features_are_those_of_each_image(num_devices, per_device):
  images = noise(num_devices * per_device, 8, 8, 3)
  extract = extractor(num_devices)
  batch = partitioning.global_batch(extract.mesh, images)
  result = extract(batch)
  np.testing.assert_allclose(
    result.features,
    toy_features.features_of(images),
    atol=1e-5,  # float32
  )
  np.testing.assert_allclose(
    result.logits, result.features @ toy_features.PARAMS["head"], atol=1e-5
  )


@pytest.mark.parametrize("num_images, count", [(37, 37), (37, 20), (5, 1)])
def test_every_image_is_seen_once_in_the_order_that_is_told(
  num_images, count, monkeypatch
):
  monkeypatch.setattr(features, "BATCH_SIZE", 2)
  images = noise(num_images, 8, 8, 3)
  result = features.concatenate(
    features.of_images(extractor(8), images, count, "real")
  )
  order = features.order(images, count)
  assert len(set(order.tolist())) == count
  np.testing.assert_allclose(
    result.features, toy_features.features_of(images[order]), atol=1e-5
  )


def test_missing_inception_says_what_else_there_is(monkeypatch):
  def fail(path):
    raise ConfigError("no weights")

  monkeypatch.setattr(inception, "load", fail)
  with pytest.raises(
    ConfigError, match=r"no weights.*--features=efficientnet.*no FID"
  ):
    features.load_network("inception")


def test_networks_are_loaded_by_name(monkeypatch):
  monkeypatch.setattr(inception, "load", lambda path: path)
  assert features.load_network("inception", "file") == "file"
  assert features.load_network("efficientnet").num_features == 1280
