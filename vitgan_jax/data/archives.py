"""Images where they lie: in a folder, a zip, or an LMDB."""

import hashlib
import os
import pathlib
import zipfile

import numpy as np

from vitgan_jax.config import ConfigError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def open_archive(path):
  """Opens a folder or zip of images, or an LMDB.

  Args:
    path: a folder with images at any depth, a zip of them, or a folder that
      holds `data.mdb`.

  Returns:
    An object with `names`, of all images in a fixed order, and `read(index)`,
    the bytes of one, empty if they cannot be read.

  Raises:
    ConfigError: if there are no images there.
  """
  path = _existing(path)
  if path.is_dir():
    archive = Lmdb(path) if (path / "data.mdb").exists() else Folder(path)
  elif zipfile.is_zipfile(path):
    archive = Zip(path)
  else:
    raise ConfigError(f"{path} is neither a folder nor a whole zip file")
  if not len(archive.names):
    raise ConfigError(
      f"no images in {path}: there is no {', '.join(SUFFIXES)} file in it"
    )
  return archive


def _existing(path):
  path = pathlib.Path(path).expanduser()
  if not path.exists():
    raise ConfigError(
      f"no folder or zip at {path}; give its path as config.data.path"
    )
  return path


def fingerprint(path):
  """Returns a short text that changes when an archive's images do.

  It looks at names and sizes in a folder, and at the list of contents, which
  has the checksums, in a zip. The place and the times do not matter.

  Raises:
    ConfigError: if there is nothing there.
  """
  path = _existing(path)
  if path.is_dir():
    names = _list_files(path, (*SUFFIXES, ".mdb"))
    content = repr([(name, (path / name).stat().st_size) for name in names])
    content = content.encode()
  else:
    with open(path, "rb") as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(max(0, size - 2**16))
      content = f"{size}".encode() + file.read()
  return hashlib.sha256(content).hexdigest()[:12]


def class_labels(names):
  """Returns the class of each image by the folder that it is in.

  Args:
    names: of images, with slashes.

  Returns:
    The names of the classes, sorted, and the class [N] of each image; or two
    Nones, where not all images are in class folders or there is one class.
  """
  parts = [str(name).split("/") for name in names]
  # A single folder around everything is not a class.
  while all(len(part) > 1 for part in parts) and (
    len({part[0] for part in parts}) == 1
  ):
    parts = [part[1:] for part in parts]
  if not all(len(part) > 1 for part in parts):
    return None, None
  classes, labels = np.unique([part[0] for part in parts], return_inverse=True)
  return classes.tolist(), labels


def _list_files(folder, suffixes=SUFFIXES):
  """Returns the names of a folder's files at any depth, links followed."""
  names = (
    (pathlib.Path(parent).relative_to(folder) / file).as_posix()
    for parent, _, files in os.walk(folder, followlinks=True)
    for file in files
  )
  return sorted(name for name in names if _is_one_of(name, suffixes))


def _is_one_of(name, suffixes=SUFFIXES):
  # Archives made on a Mac hold a hidden twin of each file.
  hidden = any(p.startswith((".", "__MACOSX")) for p in name.split("/"))
  return name.lower().endswith(suffixes) and not hidden


class Folder:
  """A folder of images."""

  def __init__(self, path):
    """Lists the folder."""
    self._path = path
    self.names = _list_files(path)

  def read(self, index):
    """Returns the bytes of an image."""
    try:
      return (self._path / self.names[index]).read_bytes()
    except OSError:
      return b""


class Zip:
  """A zip file of images."""

  def __init__(self, path):
    """Lists the zip."""
    self._file = zipfile.ZipFile(path)  # safe for threads that read
    self.names = sorted(filter(_is_one_of, self._file.namelist()))

  def read(self, index):
    """Returns the bytes of an image."""
    try:
      return self._file.read(self.names[index])
    except Exception:  # zipfile raises many kinds for what is damaged
      return b""


class Lmdb:
  """An LMDB of encoded images, as LSUN is published."""

  def __init__(self, path):
    """Lists the keys of the LMDB."""
    import lmdb  # late: few need it

    try:
      self._environment = lmdb.open(
        str(path), readonly=True, lock=False, readahead=False, subdir=True
      )
      with self._environment.begin() as transaction:
        keys = transaction.cursor().iternext(values=False)
        # Millions of them: as an array they take a third of the memory.
        self.names = np.array(list(keys), np.bytes_)
    except lmdb.Error as error:
      raise ConfigError(f"{path} holds no LMDB that opens: {error}") from error

  def read(self, index):
    """Returns the bytes of an image."""
    with self._environment.begin() as transaction:
      return transaction.get(bytes(self.names[index]))
