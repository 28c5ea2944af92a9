import os
import shutil

import numpy as np
import pytest

from tests.datasets import write_folder, write_lmdb, write_zip
from vitgan_jax import config as config_lib
from vitgan_jax.data import archives

FILES = {
  "b/2.PNG": b"two",
  "a/deep/1.jpg": b"one",
  "a/3.webp": b"three",
  "0.jpeg": b"zero",
}
OTHERS = {
  "readme.txt": b"text",
  "b/.2.png": b"hidden",
  ".thumbnails/2.png": b"hidden",
  "__MACOSX/b/._2.png": b"hidden",
}


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_images_at_any_depth_are_found_in_order(tmp_path, write):
  archive = archives.open_archive(write(tmp_path / "x", FILES | OTHERS))
  assert list(archive.names) == sorted(FILES)
  for i, name in enumerate(archive.names):
    assert archive.read(i) == FILES[name]


def test_links_are_followed(tmp_path):
  write_folder(tmp_path / "elsewhere", {"1.png": b"one"})
  (tmp_path / "x").mkdir()
  (tmp_path / "x" / "linked").symlink_to(tmp_path / "elsewhere")
  archive = archives.open_archive(tmp_path / "x")
  assert archive.names == ["linked/1.png"] and archive.read(0) == b"one"


def test_lmdb_is_read_by_key(tmp_path):
  values = {f"{i:040x}".encode(): f"image {i}".encode() for i in (7, 3, 5)}
  archive = archives.open_archive(write_lmdb(tmp_path / "x", values))
  assert [archive.names[i] for i in range(3)] == sorted(values)
  assert [archive.read(i) for i in range(3)] == [
    values[key] for key in sorted(values)
  ]


def test_file_that_cannot_be_read_is_empty(tmp_path):
  folder = write_folder(tmp_path / "x", FILES)
  archive = archives.open_archive(folder)
  (folder / archive.names[1]).unlink()
  assert archive.read(1) == b"" and archive.read(0) == b"zero"
  path = write_zip(tmp_path / "x.zip", FILES)
  content = path.read_bytes()
  path.write_bytes(content.replace(b"two", b"TWO"))  # the checksum is wrong
  archive = archives.open_archive(path)
  assert [archive.read(i) for i in range(4)] == [b"zero", b"three", b"one", b""]


@pytest.mark.parametrize(
  "write", [lambda path: None, lambda path: path.write_bytes(b"no zip")]
)
def test_wrong_path_is_an_error_that_names_it(tmp_path, write):
  write(tmp_path / "x")
  with pytest.raises(config_lib.ConfigError, match=str(tmp_path / "x")):
    archives.open_archive(tmp_path / "x")


@pytest.mark.parametrize("write", [write_folder, write_zip])
@pytest.mark.parametrize("files", [{"sub/readme.txt": b"text"}, OTHERS])
def test_archive_without_images_is_an_error_that_says_which_are(
  tmp_path, write, files
):
  path = write(tmp_path / "x", files)
  with pytest.raises(config_lib.ConfigError, match=r"\.png, \.jpg"):
    archives.open_archive(path)


def test_damaged_lmdb_is_an_error(tmp_path):
  write_folder(tmp_path / "x", {"data.mdb": b"no database"})
  with pytest.raises(config_lib.ConfigError, match="no LMDB"):
    archives.open_archive(tmp_path / "x")


@pytest.mark.parametrize(
  "names, classes, labels",
  [
    (["a/1", "a/2", "b/1"], ["a", "b"], [0, 0, 1]),
    (["all/b/1", "all/a/x/1", "all/b/2"], ["a", "b"], [1, 0, 1]),
    (["a/1", "a/2"], None, None),
    (["1", "2"], None, None),
    (["a/1", "b/1", "2"], None, None),
    (["all/1", "all/a/2"], None, None),
  ],
)
def test_class_folders_are_labels(names, classes, labels):
  found_classes, found = archives.class_labels(names)
  assert found_classes == classes
  if labels is None:
    assert found is None
  else:
    np.testing.assert_array_equal(found, labels)


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_fingerprint_changes_with_the_images_alone(tmp_path, write):
  original = write(tmp_path / "x", FILES)
  fingerprint = archives.fingerprint(original)
  copy = tmp_path / "elsewhere" / "y"
  copy.parent.mkdir()
  if original.is_dir():
    shutil.copytree(original, copy)
  else:
    shutil.copyfile(original, copy)
  os.utime(copy, (0, 0))
  assert archives.fingerprint(copy) == fingerprint
  changes = [
    FILES | {"c.png": b"more"},
    FILES | {"0.jpeg": b"other content"},
    {name: FILES[name] for name in list(FILES)[:-1]},
  ]
  others = {
    archives.fingerprint(write(tmp_path / f"z{i}", files))
    for i, files in enumerate(changes)
  }
  assert len(others | {fingerprint}) == 4


def test_fingerprint_of_an_lmdb_is_of_its_file(tmp_path):
  write_lmdb(tmp_path / "x", {b"1": b"one"})
  before = archives.fingerprint(tmp_path / "x")
  write_lmdb(tmp_path / "y", {f"{i}".encode(): bytes(9999) for i in range(9)})
  assert archives.fingerprint(tmp_path / "y") != before
