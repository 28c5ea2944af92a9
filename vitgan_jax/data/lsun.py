"""LSUN from the LMDBs that its authors publish, read in place.

The builder of TFDS reads them with tensorflow-io, which does not load beside
recent versions of TensorFlow.
"""

import pathlib
import shutil
import zipfile

import numpy as np
from tqdm import tqdm

from vitgan_jax import files
from vitgan_jax.data import archives, source
from vitgan_jax.data.paths import data_dir, downloading, manual_dir
from vitgan_jax.errors import ConfigError

_SCENES = (
  "classroom bedroom bridge church_outdoor conference_room dining_room kitchen "
  "living_room restaurant tower"
).split()
_OBJECTS = (
  "airplane bicycle bird boat bottle bus car cat chair cow dining_table dog "
  "horse motorbike person potted_plant sheep sofa train tv-monitor"
).split()


def open_category(data):
  """Returns the Source of data.dataset, as lsun/bedroom, from LMDBs or zips.

  They are at data.path, or where TFDS keeps downloads, or are downloaded.

  Raises:
    ConfigError: if there is no such category, or it cannot be had.
  """
  category = data.dataset.removeprefix("lsun/")
  if category in _SCENES:
    names = {
      "train": f"scenes/{category}_train_lmdb",
      "validation": f"scenes/{category}_val_lmdb",
    }
  elif category in _OBJECTS:
    names = {"train": f"objects/{category}"}
  else:
    raise ConfigError(
      f"config.data.dataset={data.dataset!r}: the categories of LSUN are "
      f"{', '.join(_SCENES + _OBJECTS)}, as lsun/bedroom"
    )
  if data.path:
    folders = {"train": _folder_of(data, data.path)}
  else:
    folders = {
      split: _find(data, name)
      for split, name in names.items()
      if split in data.split or data.split == "all"  # or "train[:50%]"
    }
  if not folders:
    raise ConfigError(
      f"config.data.split={data.split!r}: LSUN {category} has "
      f"{', '.join(names)} and parts like 'train[:90%]'"
    )
  splits = {}
  for split, folder in folders.items():
    archive = archives.open_archive(folder)
    splits[split] = (archive, np.arange(len(archive.names)))
  licence = "not stated by its authors, see https://www.yf.io/p/lsun"
  return source.of_archives(f"lsun_{category}", folder, licence, splits)


def _find(data, published_name):
  """Returns the folder of an LMDB: found, extracted or downloaded."""
  name = published_name.split("/")[1]
  for path in (manual_dir(data) / name, manual_dir(data) / f"{name}.zip"):
    if path.exists():
      return _folder_of(data, path)
  import tensorflow_datasets as tfds  # late: it is slow, and few need it

  url = f"http://dl.yf.io/lsun/{published_name}.zip"
  published = tfds.builder_cls("lsun")
  advice = (
    f"Download {url} and put it, or the folder that it holds, into "
    f"{manual_dir(data)}; or give the path as config.data.path"
  )
  with downloading(data, advice):
    manager = tfds.download.DownloadManager(
      download_dir=data_dir(data) / "downloads",
      url_infos=published.url_infos,  # with the checksums
      dataset_name=published.name,
    )
    path = manager.download(url)
  return _folder_of(data, path)


def _folder_of(data, path):
  """Returns the folder with data.mdb of an LSUN folder or zip."""
  path = pathlib.Path(files.expand(path))
  if path.is_dir():
    found = sorted(path.rglob("data.mdb"))
    if len(found) == 1:
      return found[0].parent
    raise ConfigError(
      f"{path} should hold one data.mdb, as the LMDBs of LSUN do; it has "
      f"{len(found)}"
    )
  if not zipfile.is_zipfile(path):
    raise ConfigError(f"no LMDB, nor a whole zip of one, at {path}")
  name = f"lsun-{archives.fingerprint(path)}"
  folder = data_dir(data) / "downloads" / "extracted" / name
  if not folder.exists():
    with archives.reading_zip(path):
      _extract(path, folder)
  return folder


def _extract(path, folder):
  """Extracts data.mdb, which is tens of gigabytes, of a zip."""
  with zipfile.ZipFile(path) as archive:
    names = [name for name in archive.namelist() if name.endswith("data.mdb")]
    if len(names) != 1:
      raise ConfigError(
        f"{path} should hold one data.mdb, as the zips of LSUN do; it has "
        f"{len(names)}"
      )
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with (
      archive.open(names[0]) as source,
      open(partial / "data.mdb", "wb") as target,
      tqdm.wrapattr(
        source,
        "read",
        total=archive.getinfo(names[0]).file_size,
        desc=f"Extracting {path.name}",
      ) as progress,
    ):
      shutil.copyfileobj(progress, target, 2**20)
  partial.rename(folder)  # a folder of this name is whole
