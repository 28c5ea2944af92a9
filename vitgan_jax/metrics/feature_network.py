"""What the pretrained networks of the metrics share."""

from typing import Any, NamedTuple

from jax import lax
import jax.numpy as jnp
import numpy as np

from vitgan_jax import files
from vitgan_jax.errors import ConfigError

BATCH_NORM_EPSILON = 1e-3


class Features(NamedTuple):
  """What a network says of images: [B, num_features] and [B, num_classes]."""

  features: Any
  logits: Any


class FeatureNetwork(NamedTuple):
  """A pretrained network, images to features.

  Attributes:
    name: for the protocol of a figure.
    sha256: of the file that the weights came from, for the protocol too.
    num_features: length of the features of one image.
    params: numpy arrays; put them on the devices once, not at each call.
    apply: a pure function of (params, images uint8 [B, H, W, 3]) that returns
      `Features` in float32. To be jitted; the batch may be sharded.
  """

  name: str
  sha256: str
  num_features: int
  params: Any
  apply: Any


def verify(path, expected, remedy):
  """Checks that a file is the one that everybody uses.

  Args:
    path: the file.
    expected: what its SHA-256 must be.
    remedy: what the user can do if it is not, the end of the message.

  Raises:
    ConfigError: if the file is missing, unreadable or another one.
  """
  try:
    found = files.sha256(path)
  except OSError as error:
    raise ConfigError(
      f"cannot read the weights {path}: {error.strerror}. {remedy}"
    ) from error
  if found != expected:
    raise ConfigError(
      f"{path} holds other weights: its sha256 is {found} and must be "
      f"{expected}. {remedy}"
    )


def convolution(state_dict, conv, norm):
  """Returns one layer of a convolution and the BatchNorm behind it.

  Args:
    state_dict: of `torch_files.read_state_dict`.
    conv: name of the convolution, which has no bias.
    norm: name of the BatchNorm.

  Returns:
    A dict of kernel [H, W, in, out] and bias [out].
  """
  scale = state_dict[f"{norm}.weight"] / np.sqrt(
    state_dict[f"{norm}.running_var"] + BATCH_NORM_EPSILON
  )
  bias = state_dict[f"{norm}.bias"] - state_dict[f"{norm}.running_mean"] * scale
  kernel = state_dict[f"{conv}.weight"].transpose(2, 3, 1, 0) * scale
  return dict(kernel=np.ascontiguousarray(kernel), bias=bias)


def convolve(layer, x, stride=1, padding="SAME"):
  """Applies a layer of `convolution` to [B, H, W, in]."""
  kernel, bias = layer["kernel"], layer["bias"]
  # A GPU or TPU would else multiply with 8 to 11 bits: another figure.
  precision = lax.Precision.HIGHEST
  if kernel.shape[:2] == (1, 1) and stride == 1:
    # On a CPU up to twice as fast as the convolution.
    return jnp.tensordot(x, kernel[0, 0], 1, precision=precision) + bias
  y = lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=precision,
  )
  return y + bias
