"""InceptionV3 of December 2015, the network of FID, IS and KID.

It is TensorFlow's first release of the network (Szegedy et al. 2016), not the
one that torchvision has: images are resized without half-pixel centres,
average pools leave the padding out, the last block pools by maximum, there are
1008 classes, and the logits are used without their bias.
"""

import functools
import pathlib
import shutil
import sys
import urllib.request

from flax import traverse_util
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from vitgan_jax import files
from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics import feature_network, torch_files

URL = (
  "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
  "pt_inception-2015-12-05-6726825d.pth"
)
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
IMAGE_SIZE = 299


def load(path=""):
  """Returns the `FeatureNetwork` with the published weights.

  Args:
    path: their file; "" for the one in ~/.cache/vitgan_jax, which is
      downloaded when it is not there.

  Raises:
    ConfigError: if the file cannot be had, or is not the published one.
  """
  remedy = f"Fetch {URL} and give its path as --inception_weights=FILE"
  if not path:
    folder = files.expand("~/.cache/vitgan_jax", "--inception_weights=FILE")
    path = pathlib.Path(folder) / URL.split("/")[-1]
    if not path.exists():
      _download(path, remedy)
  feature_network.verify(path, SHA256, remedy)
  return feature_network.FeatureNetwork(
    name="inception-2015-12-05",
    sha256=SHA256,
    num_features=2048,
    params=from_state_dict(torch_files.read_state_dict(path)),
    apply=apply,
  )


def _download(path, remedy):
  print(f"Downloading {URL}", file=sys.stderr, flush=True)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path, shared=True) as partial:
      with (
        urllib.request.urlopen(URL, timeout=15) as response,
        open(partial, "wb") as file,
        tqdm.wrapattr(
          response,
          "read",
          total=int(response.headers.get("Content-Length", 0)) or None,
          desc="Inception",
        ) as progress,
      ):
        shutil.copyfileobj(progress, file)
      feature_network.verify(partial, SHA256, remedy)
  except OSError as error:
    raise ConfigError(
      f"cannot download the Inception weights to {path}: {error}. {remedy}"
    ) from error


def from_state_dict(state_dict):
  """Returns the parameters: nested dicts with the names of the file."""
  names = [
    name.removesuffix(".conv.weight")
    for name in state_dict
    if name.endswith(".conv.weight")
  ]
  layers = {
    name: feature_network.convolution(state_dict, f"{name}.conv", f"{name}.bn")
    for name in names
  }
  layers["fc"] = np.ascontiguousarray(state_dict["fc.weight"].T)
  return traverse_util.unflatten_dict(layers, sep=".")


def apply(params, images):
  """Returns `Features`: pool3 [B, 2048] and logits without bias [B, 1008].

  Args:
    params: of `from_state_dict`.
    images: uint8 [B, H, W, 3].
  """
  features = activations(params, images)["Mixed_7c"].mean(axis=(1, 2))
  logits = jnp.matmul(features, params["fc"], precision=lax.Precision.HIGHEST)
  return feature_network.Features(features, logits)


def activations(params, images):
  """Returns the output of each block by name, float32 [B, H, W, C]."""
  x = (resize(images) - 128.0) / 128.0
  x = _conv(params["Conv2d_1a_3x3"], x, 2, "VALID")
  x = _conv_unpadded(params["Conv2d_2a_3x3"], x)
  x = _conv(params["Conv2d_2b_3x3"], x)
  outputs = dict(MaxPool_1=_pool(x, jnp.maximum, 2))
  x = _conv(params["Conv2d_3b_1x1"], outputs["MaxPool_1"])
  x = _conv_unpadded(params["Conv2d_4a_3x3"], x)
  x = outputs["MaxPool_2"] = _pool(x, jnp.maximum, 2)
  for name, block in _BLOCKS.items():
    x = outputs[name] = block(params[name], x)
  return outputs


def resize(images):
  """Resizes [B, H, W, 3] to [B, 299, 299, 3] as TensorFlow 1 did, float32.

  Pixel i of the result lies at i * H / 299 of the image, not at the centre of
  its cell, and images that become smaller are not smoothed. The order of
  operations is TensorFlow's as well.
  """
  x = images.astype(jnp.float32)
  for axis in (2, 1):
    size = x.shape[axis]
    position = np.arange(IMAGE_SIZE, dtype=np.float32) * np.float32(
      size / IMAGE_SIZE
    )
    low = position.astype(np.int32)
    low_pixels = jnp.take(x, low, axis, mode="clip")
    high_pixels = jnp.take(x, low + 1, axis, mode="clip")
    share = (position - low).reshape(-1, *(1,) * (3 - axis))
    x = low_pixels + (high_pixels - low_pixels) * share
  return x


def _conv(layer, x, stride=1, padding="SAME"):
  return jax.nn.relu(feature_network.convolve(layer, x, stride, padding))


def _conv_unpadded(layer, x):
  # Padded, and the border cut off: an unpadded convolution takes XLA three
  # times as long on a CPU (jaxlib 0.10).
  return _conv(layer, x)[:, 1:-1, 1:-1]


def _series(params, x, *names):
  for name in names:
    x = _conv(params[name], x)
  return x


def _pointwise(params, x, *names):
  """Returns several 1x1 convolutions of x, computed as one.

  The one named branch_pool follows an average pool in the published graph. It
  comes first here: the two commute, and the pool has fewer channels to do.
  """
  layers = [params[name] for name in names]
  together = jax.tree.map(lambda *xs: jnp.concatenate(xs, -1), *layers)
  ends = np.cumsum([layer["bias"].size for layer in layers])
  outputs = jnp.split(feature_network.convolve(together, x), ends[:-1], -1)
  return [
    jax.nn.relu(_average_pool(y) if name == "branch_pool" else y)
    for name, y in zip(names, outputs)
  ]


def _pool(x, combine, stride):
  """Combines each 3x3 window that lies inside x."""
  # Rows, then columns: several times faster than reduce_window on a CPU.
  for axis in (1, 2):
    size = x.shape[axis]
    x = functools.reduce(
      combine,
      [
        lax.slice_in_dim(x, start, size - 2 + start, stride, axis)
        for start in range(3)
      ],
    )
  return x


def _average_pool(x):
  """Averages over 3x3, at the border over those pixels that are there."""

  def window_sum(y):
    return _pool(_pad(y, 0.0), jnp.add, 1)

  return window_sum(x) / window_sum(jnp.ones_like(x[:1, :, :, :1]))


def _pad(x, value):
  return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=value)


def _block_a(params, x):
  ones, fives, threes, pooled = _pointwise(
    params, x, "branch1x1", "branch5x5_1", "branch3x3dbl_1", "branch_pool"
  )
  fives = _conv(params["branch5x5_2"], fives)
  threes = _series(params, threes, "branch3x3dbl_2", "branch3x3dbl_3")
  return jnp.concatenate([ones, fives, threes, pooled], -1)


def _block_b(params, x):
  threes = _series(params, x, "branch3x3dbl_1", "branch3x3dbl_2")
  return jnp.concatenate(
    [
      _conv(params["branch3x3"], x, 2, "VALID"),
      _conv(params["branch3x3dbl_3"], threes, 2, "VALID"),
      _pool(x, jnp.maximum, 2),
    ],
    -1,
  )


def _block_c(params, x):
  ones, sevens, double, pooled = _pointwise(
    params, x, "branch1x1", "branch7x7_1", "branch7x7dbl_1", "branch_pool"
  )
  sevens = _series(params, sevens, "branch7x7_2", "branch7x7_3")
  double = _series(params, double, *[f"branch7x7dbl_{i}" for i in range(2, 6)])
  return jnp.concatenate([ones, sevens, double, pooled], -1)


def _block_d(params, x):
  threes, sevens = _pointwise(params, x, "branch3x3_1", "branch7x7x3_1")
  sevens = _series(params, sevens, "branch7x7x3_2", "branch7x7x3_3")
  return jnp.concatenate(
    [
      _conv(params["branch3x3_2"], threes, 2, "VALID"),
      _conv(params["branch7x7x3_4"], sevens, 2, "VALID"),
      _pool(x, jnp.maximum, 2),
    ],
    -1,
  )


def _block_e(params, x, pool_by_maximum):
  names = ["branch1x1", "branch3x3_1", "branch3x3dbl_1"]
  if pool_by_maximum:
    ones, threes, double = _pointwise(params, x, *names)
    pooled = _pool(_pad(x, -np.inf), jnp.maximum, 1)
    pooled = _conv(params["branch_pool"], pooled)
  else:
    ones, threes, double, pooled = _pointwise(params, x, *names, "branch_pool")
  double = _conv(params["branch3x3dbl_2"], double)
  return jnp.concatenate(
    [
      ones,
      _conv(params["branch3x3_2a"], threes),
      _conv(params["branch3x3_2b"], threes),
      _conv(params["branch3x3dbl_3a"], double),
      _conv(params["branch3x3dbl_3b"], double),
      pooled,
    ],
    -1,
  )


_BLOCKS = {
  **{f"Mixed_5{i}": _block_a for i in "bcd"},
  "Mixed_6a": _block_b,
  **{f"Mixed_6{i}": _block_c for i in "bcde"},
  "Mixed_7a": _block_d,
  "Mixed_7b": functools.partial(_block_e, pool_by_maximum=False),
  "Mixed_7c": functools.partial(_block_e, pool_by_maximum=True),
}
