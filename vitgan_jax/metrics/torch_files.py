"""Reads weights that torch has saved, without torch.

A file is a pickle of a dict whose tensors are views of raw arrays.
"""

import collections
import io
import pickle
import zipfile

import numpy as np

from vitgan_jax.errors import ConfigError


def read_state_dict(path):
  """Returns the arrays of a file of torch.save by name, whichever they are.

  Both formats are read: the zip file of torch 1.6 and later, and the one
  before it, which published weights are often in.

  Raises:
    ConfigError: if the file is damaged, or holds more than tensors.
  """
  with open(path, "rb") as file:
    is_zip = file.read(2) == b"PK"
    file.seek(0)
    try:
      return _read_zip(file) if is_zip else _read_legacy(file)
    except Exception as error:  # a pickle may raise any kind
      reason = " ".join(str(error).split()) or type(error).__name__
      raise ConfigError(
        f"{path} holds no weights that torch saved: {reason}"
      ) from error


class _Unpickler(pickle._Unpickler):
  """Reads tensors as numpy arrays, and refuses everything else.

  A pickle may call any function by its name; here it finds these alone. It is
  the unpickler in Python: that in C takes as much memory as a damaged number
  says.

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
      content = archive.read(folder + key)
      storage[:] = np.frombuffer(content, storage.dtype, storage.size)
  return state_dict


def _read_legacy(file):
  for _ in range(3):  # magic number, version, and properties of the system
    _Unpickler(file).load()
  unpickler = _Unpickler(file)
  state_dict = unpickler.load()
  for key in _Unpickler(file).load():
    file.seek(8, io.SEEK_CUR)  # the size, which is known
    storage = unpickler.storages[key]
    # With a count a part of them is an error, and not one number for all.
    content = file.read(storage.nbytes)
    storage[:] = np.frombuffer(content, storage.dtype, storage.size)
  return state_dict
