"""What the feature networks share: their interface, and torch's files.

The published weights are files of torch, which is not needed to read them: a
file is a pickle of a dict whose tensors are views of raw arrays.
"""

import collections
import hashlib
import io
import pickle
from typing import Any, NamedTuple
import zipfile

from jax import lax
import jax.numpy as jnp
import numpy as np

from vitgan_jax.config import ConfigError

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


def verify(path, sha256, remedy):
  """Checks that a file is the one that everybody uses.

  Args:
    path: the file.
    sha256: what its checksum must be.
    remedy: what the user can do if it is not, the end of the message.

  Raises:
    ConfigError: if the file is missing, unreadable or another one.
  """
  try:
    with open(path, "rb") as file:
      found = hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise ConfigError(
      f"cannot read the weights {path}: {error.strerror}. {remedy}"
    ) from error
  if found != sha256:
    raise ConfigError(
      f"{path} holds other weights: its sha256 is {found} and must be "
      f"{sha256}. {remedy}"
    )


def read_state_dict(path):
  """Returns the arrays of a file of torch.save by name, whichever they are.

  Both formats are read: the zip file of torch 1.6 and later, and the one
  before it, which published weights are often in.

  Raises:
    pickle.UnpicklingError: if the file holds more than tensors.
  """
  with open(path, "rb") as file:
    is_zip = file.read(2) == b"PK"
    file.seek(0)
    return _read_zip(file) if is_zip else _read_legacy(file)


def convolution(state_dict, conv, norm):
  """Returns one layer of a convolution and the BatchNorm behind it.

  Args:
    state_dict: of `read_state_dict`.
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


class _Unpickler(pickle.Unpickler):
  """Reads tensors as numpy arrays, and refuses everything else.

  A pickle may call any function by its name; here it finds these alone.

  Attributes:
    storages: key -> flat array, uninitialised: the caller fills it, after
      which the tensors, which are views of it, are complete.
  """

  _GLOBALS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "FloatStorage"): np.float32,
    ("torch", "LongStorage"): np.int64,
  }

  def __init__(self, file):
    super().__init__(file)
    self.storages = {}

  def find_class(self, module, name):
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return _view
    if (module, name) in self._GLOBALS:
      return self._GLOBALS[module, name]
    raise pickle.UnpicklingError(f"{module}.{name} has no place in weights")

  def persistent_load(self, pid):
    _, dtype, key, _, size, *_ = pid
    return self.storages.setdefault(key, np.empty(size, dtype))


def _view(storage, offset, shape, strides, *unused_autograd):
  # Transposed tensors are common. The constructor checks the bounds.
  size = storage.itemsize
  strides = [size * stride for stride in strides]
  return np.ndarray(shape, storage.dtype, storage, size * offset, strides)


def _read_zip(file):
  with zipfile.ZipFile(file) as archive:
    name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
    unpickler = _Unpickler(io.BytesIO(archive.read(name)))
    state_dict = unpickler.load()
    folder = name.removesuffix("data.pkl") + "data/"
    for key, storage in unpickler.storages.items():
      storage[:] = np.frombuffer(archive.read(folder + key), storage.dtype)
  return state_dict


def _read_legacy(file):
  for _ in range(3):  # magic number, version, and properties of the system
    _Unpickler(file).load()
  unpickler = _Unpickler(file)
  state_dict = unpickler.load()
  for key in _Unpickler(file).load():
    file.seek(8, io.SEEK_CUR)  # the size, which is known
    storage = unpickler.storages[key]
    storage[:] = np.frombuffer(file.read(storage.nbytes), storage.dtype)
  return state_dict
