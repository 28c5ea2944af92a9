"""Images where they lie: in a folder, a zip, or an LMDB."""

import collections
import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import pathlib
import posixpath
import re
import stat
import zipfile

import numpy as np
from tqdm import tqdm

from vitgan_jax import files
from vitgan_jax.data import decode, lmdb_file
from vitgan_jax.errors import ConfigError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LABELS = "dataset.json"  # of StyleGAN's dataset tool


def open_archive(path):
  """Opens a folder or zip of images, or an LMDB.

  An image is what has one of the SUFFIXES, though it may be damaged, and
  whatever else Pillow knows by its content.

  Args:
    path: a folder with images at any depth, a zip of them, or a folder that
      holds `data.mdb`.

  Returns:
    An object with `names`, of all images in a fixed order; `read(index)`, the
    bytes of one, empty if they cannot be read; `class_labels()`, see there; and
    `unused`, {kind: names} of what else is there.

  Raises:
    ConfigError: if there are no images there, or all of them are encrypted.
  """
  path = _existing(path)
  if path.is_dir():
    archive = Lmdb(path) if (path / "data.mdb").exists() else Folder(path)
  else:
    archive = Zip(path)
  if not len(archive.names):
    raise ConfigError(
      f"no images in {path}: there is no {', '.join(SUFFIXES)} file in it, and "
      "no other that Pillow reads"
    )
  return archive


def _existing(path):
  path = pathlib.Path(files.expand(path))
  if not path.exists():
    raise ConfigError(
      f"no folder or zip at {path}; give its path as config.data.path"
    )
  return path


def fingerprint(path, cache=None):
  """Returns a short text that changes when an archive's images do.

  It is of names and contents. The place and the times do not matter.

  Args:
    path: of the archive.
    cache: folder of the fingerprints that are known. The files of a folder are
      read once, and again when a size or a time of one of them has changed.

  Raises:
    ConfigError: if there is nothing there.
  """
  path = _existing(path)
  if not path.is_dir():  # a zip has the checksums in its list of contents
    members = _open_zip(path).infolist()
    return _digest((x.filename, x.file_size, x.CRC) for x in members)
  folder = Folder(path)
  labels_and_lmdbs = [
    name for name in folder.files if name.endswith((LABELS, ".mdb"))
  ]
  names = [*folder.names, *labels_and_lmdbs]
  paths = [os.path.join(path, name) for name in names]
  # A program may set the other times, but not the last.
  known = _digest(
    (name, x.st_ino, x.st_size, x.st_mtime_ns, x.st_ctime_ns)
    for name, x in zip(names, map(os.stat, paths))
  )
  if cache and (cache / known).exists():
    return (cache / known).read_text()
  with concurrent.futures.ThreadPoolExecutor() as pool:
    hashes = tqdm(
      pool.map(_sha256, paths),
      f"Reading {path} to know it again",
      total=len(paths),
      unit=" files",
      delay=2,
    )
    result = _digest(zip(names, hashes))
  if cache:
    with contextlib.suppress(OSError):  # of a disk that is only read
      cache.mkdir(parents=True, exist_ok=True)
      with files.whole(cache / known, shared=True) as partial:
        partial.write_text(result)
  return result


def _digest(entries):
  # repr() escapes what is no UTF-8 in a name.
  text = "\n".join(map(repr, entries)).encode()
  return hashlib.sha256(text).hexdigest()[:12]


def _sha256(path):
  try:
    return files.sha256(path)
  except OSError:  # it will be named as a corrupt image
    return ""


def class_labels(names):
  """Returns the class of each image by the folder that it is in.

  Args:
    names: of images, with slashes.

  Returns:
    The names of the classes, sorted, and the class [N] of each image; or two
    Nones, where not all images are in class folders, there is one class, or
    folders only number the images, as 00012/img00012345.png.
  """
  parts = [name.split("/") for name in names]
  # A single folder around everything is not a class.
  while all(len(part) > 1 for part in parts) and (
    len({part[0] for part in parts}) == 1
  ):
    parts = [part[1:] for part in parts]
  if not all(len(part) > 1 for part in parts) or all(map(_is_numbered, parts)):
    return None, None
  classes, labels = np.unique([part[0] for part in parts], return_inverse=True)
  return [shown(name) for name in classes.tolist()], labels


def _is_numbered(part):
  """Tells whether a folder is the thousand, or 1,000 times it, of its image."""
  number = re.fullmatch(r"\D*(\d+)", pathlib.PurePosixPath(part[-1]).stem)
  if not number or not part[0].isdecimal():
    return False
  thousand = int(number[1]) // 1000
  return int(part[0]) in (thousand, thousand * 1000)


def shown(name):
  """Returns a name as text, where it may be bytes that are no UTF-8."""
  return os.fsencode(name).decode(errors="replace")


class _Files:
  """Image files among others."""

  def __init__(self, files, unused):
    """Sorts the files into images and what is not used.

    Args:
      files: {name: what tells a subclass about it}.
      unused: {kind: names}, of what is none of them.
    """
    self.files = dict(sorted(files.items()))
    self.unused = collections.defaultdict(list, unused)
    self.names = []
    for name in self.files:
      if _is_hidden(name):
        self.unused["hidden"].append(name)
      elif self._is_grid(name):
        self.unused["grid of samples"].append(name)
      elif name.lower().endswith(SUFFIXES) or self._is_image(name):
        self.names.append(name)
      else:
        self.unused["no image"].append(name)

  def _is_grid(self, name):
    """Tells whether `--mode=sample` laid it beside its samples."""
    folder, name = posixpath.split(name)
    first = posixpath.join(folder, "000000.png")
    return name == "grid.png" and first in self.files

  def _is_image(self, name):
    try:
      with self._open(name) as file:
        return decode.is_image(file)
    except Exception:  # zipfile raises many kinds for what is damaged
      return False

  def read(self, index):
    """Returns the bytes of an image."""
    try:
      with self._open(self.names[index]) as file:
        return file.read()
    except Exception:
      return b""

  def class_labels(self):
    """Returns the classes by dataset.json, else as `class_labels` does."""
    others = self.unused["no image"]
    found = [x for x in others if posixpath.basename(x) == LABELS]
    if found:
      name = min(found, key=lambda name: name.count("/"))
      try:
        with self._open(name) as file:
          labels = json.load(file)["labels"]
      except Exception:
        pass  # of another tool, or damaged
      else:
        others.remove(name)
        return self._listed_classes(name, labels)
    return class_labels(self.names)

  def _listed_classes(self, name, labels):
    """Returns the classes of the images by [[name, class], ...] or None."""
    if labels is None:
      return None, None
    folder = posixpath.dirname(name)
    try:
      known = {_normal(f"{folder}/{image}"): label for image, label in labels}
      found = np.array([known[image] for image in self.names])
    except (KeyError, TypeError, ValueError):
      found = np.zeros(0)
    # Some list probabilities, which are no classes.
    if found.ndim != 1 or found.dtype.kind != "i":
      self.unused["labels"].append(f"{name}: not one class for each image")
      return None, None
    classes, found = np.unique(found, return_inverse=True)
    return [str(x) for x in classes], found


def _normal(name):
  """Returns a name without backslashes, ./, ../ and what else some write."""
  return posixpath.normpath("/" + name.replace("\\", "/")).lstrip("/")


def _is_hidden(name):
  # Archives made on a Mac hold a hidden twin of each file.
  return any(x.startswith((".", "__MACOSX")) for x in name.split("/"))


class Folder(_Files):
  """A folder of images."""

  def __init__(self, path):
    """Lists the folder. Links are followed; no file is taken twice."""
    self._path = str(path)
    self._listed = {}
    self._rest = collections.defaultdict(list)
    self._seen = set()
    # Links wait until all that they may lead to has its own name.
    links = collections.deque([self._path])
    while links:
      self._list(links.popleft(), links)
    super().__init__(self._listed, self._rest)

  def _list(self, start, links):
    """Lists a file, or a folder but the links in it, which it adds to those."""
    if not os.path.isdir(start):
      self._is_new(start)
      return
    for parent, folders, names in os.walk(start, onerror=self._not_listed):
      children = [os.path.join(parent, x) for x in sorted(folders + names)]
      folders[:] = sorted(x for x in folders if not _is_hidden(x))
      if not self._is_new(parent):
        folders.clear()
        continue
      for child in children:
        if _is_hidden(os.path.basename(child)):
          self._rest["hidden"].append(self._name(child))
        elif os.path.islink(child):
          links.append(child)
        elif not os.path.isdir(child):
          self._is_new(child)

  def _is_new(self, place):
    """Notes a file or folder; tells whether it is there, and there first."""
    name = self._name(place)
    try:
      state = os.stat(place)
    except OSError:
      self._rest["dangling link"].append(name)
      return False
    is_folder = stat.S_ISDIR(state.st_mode)
    key = state.st_dev, state.st_ino
    if key in self._seen and (is_folder or os.path.islink(place)):
      self._rest["doubled"].append(name)
      return False
    self._seen.add(key)
    if stat.S_ISREG(state.st_mode):
      self._listed[name] = None
    elif not is_folder:
      self._rest["no file"].append(name)
    return True

  def _not_listed(self, error):
    self._rest["unreadable folder"].append(self._name(error.filename))

  def _name(self, place):
    return place.removeprefix(self._path).lstrip("/")

  def _open(self, name):
    return open(os.path.join(self._path, name), "rb")


@contextlib.contextmanager
def reading_zip(path):
  """Raises a ConfigError for what zipfile raises of what is no whole zip."""
  try:
    yield
  except Exception as error:
    of_system = isinstance(error, OSError) and error.errno != errno.EINVAL
    if of_system or isinstance(error, ConfigError):
      raise
    reason = " ".join(str(error).split())
    raise ConfigError(
      f"{path} is neither a folder nor a whole zip file ({reason})"
    ) from error


def _open_zip(path):
  with reading_zip(path):
    return zipfile.ZipFile(path)


class Zip(_Files):
  """A zip file of images."""

  def __init__(self, path):
    """Lists the zip. Of members of one name the last counts, as in unzip."""
    self._file = _open_zip(path)  # safe for threads that read
    files, unused = {}, collections.defaultdict(list)
    for member in self._file.infolist():
      if member.filename.endswith(("/", "\\")):
        continue
      name = _normal(member.filename)
      if member.flag_bits & 1:
        unused["encrypted"].append(name)
        continue
      if name in files:
        unused["doubled"].append(name)
      files[name] = member
    super().__init__(files, unused)
    if unused["encrypted"] and not self.names:
      raise ConfigError(
        f"{path} is encrypted: extract it with its password, and give the "
        "folder"
      )

  def _open(self, name):
    return self._file.open(self.files[name])


class Lmdb:
  """An LMDB of encoded images, as LSUN is published."""

  unused = {}

  def __init__(self, path):
    """Lists the keys of the LMDB."""
    try:
      self._file = lmdb_file.LmdbFile(path / "data.mdb")
    except ValueError as error:
      raise ConfigError(f"{path} holds no LMDB that opens: {error}") from error
    self.names = self._file.keys

  def read(self, index):
    """Returns the bytes of an image."""
    try:
      return self._file.read(index)
    except OSError:
      return b""

  def class_labels(self):
    """Returns two Nones: there are no classes."""
    return None, None
