"""Writes small datasets as their publishers format them."""

import io
import os
import tarfile
import zipfile

from etils import epath
import lmdb
import ml_collections
import numpy as np
from PIL import Image, ImageCms
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import resource

from configs import common


def data_config(data_dir, dataset, **fields):
  """Returns a config's `data`; images of 8 pixels unless said otherwise."""
  data = common.get_config().data.to_dict()
  data |= {"data_dir": str(data_dir), "dataset": dataset, "image_size": 8}
  return ml_collections.ConfigDict(data | fields)


def noise(*shape, seed=0):
  """Returns random uint8 numbers."""
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(image, kind="PNG", **options):
  """Returns an image, uint8 or of PIL, as the bytes of a file."""
  if not isinstance(image, Image.Image):
    image = Image.fromarray(image)
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def swapped_profile(name="mine"):
  """Returns an ICC profile with the blue of sRGB as red; 4 letters of name."""
  profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
  profile = profile.replace(
    "sRGB".encode("utf-16-be"), name.encode("utf-16-be")
  )
  for old, new in [(b"rXYZ", b"-XYZ"), (b"bXYZ", b"rXYZ"), (b"-XYZ", b"bXYZ")]:
    profile = profile.replace(old, new)
  return profile


def write_folder(path, files):
  """Writes {name: bytes} into a folder."""
  for name, content in files.items():
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(content)
  return path


def write_zip(path, files):
  """Writes {name: bytes} into a zip."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in files.items():
      archive.writestr(name, content)
  return path


def write_lmdb(path, values):
  """Writes {key: bytes} as an LMDB of one folder."""
  path.mkdir(parents=True)
  with lmdb.open(str(path), map_size=2**24) as environment:
    with environment.begin(write=True) as transaction:
      for key, value in values.items():
        transaction.put(key, value)
  return path


def place_download(data_dir, dataset, url, content):
  """Writes a file where TFDS would look for it after a download."""
  builder = tfds.builder(dataset, data_dir=str(data_dir))
  url_info = builder.url_infos[url]
  path = epath.Path(data_dir) / "downloads"
  path.mkdir(parents=True, exist_ok=True)
  path /= resource.get_dl_fname(url, url_info.checksum)
  path.write_bytes(content)
  name = dataset.split("/")[0]
  resource.write_info_file(url, path, name, os.path.basename(url), url_info)


def write_cifar10(folder, images, labels):
  """Writes images [6 n, 32, 32, 3] as the archive that cifar10 downloads."""
  builder = tfds.builder("cifar10", data_dir=str(folder))
  names = [*builder._cifar_info.train_files, *builder._cifar_info.test_files]
  # Each record: a byte of label, then 1,024 bytes each of red, green, blue.
  records = np.concatenate(
    [labels[:, None], images.transpose(0, 3, 1, 2).reshape(len(images), -1)],
    axis=1,
  ).astype(np.uint8)
  files = dict(zip(names, [x.tobytes() for x in np.split(records, len(names))]))
  files["batches.meta.txt"] = "\n".join(f"class{i}" for i in range(10)).encode()
  content = io.BytesIO()
  with tarfile.open(fileobj=content, mode="w:gz") as archive:
    for name, file in files.items():
      info = tarfile.TarInfo(builder._cifar_info.prefix + name)
      info.size = len(file)
      archive.addfile(info, io.BytesIO(file))
  url = builder._cifar_info.url
  place_download(folder, "cifar10", url, content.getvalue())


def write_imagenet32(folder, images, labels):
  """Writes images [n, 32, 32, 3] as the zips of ImageNet at 32 pixels."""
  rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
  content = io.BytesIO()
  np.savez(content, data=rows, labels=labels + 1)  # published from 1 on
  for split in ("train", "val"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
      archive.writestr(f"{split}_data.npz", content.getvalue())
    place_download(
      folder,
      "imagenet_resized/32x32",
      f"http://www.image-net.org/data/downsample//Imagenet32_{split}_npz.zip",
      file.getvalue(),
    )
