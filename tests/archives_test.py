import json
import os
import shutil
import zipfile

import numpy as np
import pytest

from tests.datasets import encode, noise, write_folder, write_lmdb, write_zip
from vitgan_jax.data import archives
from vitgan_jax.errors import ConfigError

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


def names_of(path):
  """Returns the names of the images of an archive, and what is not used."""
  archive = archives.open_archive(path)
  return list(archive.names), {k: v for k, v in archive.unused.items() if v}


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_what_is_not_used_is_named_by_kind(tmp_path, write):
  _, unused = names_of(write(tmp_path / "x", FILES | OTHERS))
  assert unused.pop("no image") == ["readme.txt"]
  assert {name.split("/")[0] for name in unused.pop("hidden")} == {
    "b",
    ".thumbnails",
    "__MACOSX",
  }
  assert not unused


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_image_is_known_by_its_content(tmp_path, write):
  files = {
    "1.jfif": encode(noise(4, 4, 3), "JPEG"),
    "2.bmp": encode(noise(4, 4, 3), "BMP"),
    "3.TIF": encode(noise(4, 4, 3), "TIFF"),
    "4": encode(noise(4, 4, 3)),
    "5.dat": encode(noise(4, 4), "GIF"),
  }
  texts = {"6.txt": b"Python", "7": b"P1 and P2", "8": b"", "9": b"BM"}
  names, unused = names_of(write(tmp_path / "x", files | texts))
  assert names == list(files)
  assert unused == {"no image": list(texts)}


@pytest.mark.parametrize("target", [".", "..", "sub", "../sub", "../../x"])
def test_link_to_the_same_files_adds_none(tmp_path, target):
  write_folder(tmp_path / "x", {"sub/1.png": b"one", "zoo/2.png": b"two"})
  link = tmp_path / "x" / "sub" / "again"
  link.symlink_to(target)
  if target == "sub":
    link.unlink()
    (tmp_path / "x" / "again").symlink_to(target)  # read before it
  names, unused = names_of(tmp_path / "x")
  assert names == ["sub/1.png", "zoo/2.png"]
  (doubled,) = unused["doubled"]
  assert doubled.endswith("again")


def test_links_to_files_are_followed_once(tmp_path):
  write_folder(tmp_path, {"blobs/1": encode(noise(4, 4)), "x/2.png": b"two"})
  for name, target in [
    ("0.png", "2.png"),
    ("1.png", "../blobs/1"),
    ("3.png", "../blobs/1"),
    ("4.png", "nowhere"),
    ("5.png", "5.png"),
  ]:
    (tmp_path / "x" / name).symlink_to(target)
  names, unused = names_of(tmp_path / "x")
  assert names == ["1.png", "2.png"]
  assert unused == {
    "doubled": ["0.png", "3.png"],
    "dangling link": ["4.png", "5.png"],
  }
  archives.fingerprint(tmp_path / "x")


def test_what_is_no_file_is_not_opened(tmp_path):
  write_folder(tmp_path / "x", FILES)
  os.mkfifo(tmp_path / "x" / "pipe.png")
  assert names_of(tmp_path / "x") == (sorted(FILES), {"no file": ["pipe.png"]})


def test_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
  path = write_folder(tmp_path / "x", FILES)

  def scandir(place, scandir=os.scandir):
    if str(place).endswith("deep"):
      raise PermissionError(13, "Permission denied", place)
    return scandir(place)

  monkeypatch.setattr(os, "scandir", scandir)
  names, unused = names_of(path)
  assert "a/deep/1.jpg" not in names and len(names) == 3
  assert unused == {"unreadable folder": ["a/deep"]}


def test_name_that_is_no_utf_8_is_shown_as_text(tmp_path):
  path = write_folder(tmp_path / "x", FILES)
  with open(os.path.join(os.fsencode(path), b"\xff.png"), "wb") as file:
    file.write(b"five")
  archive = archives.open_archive(path)
  assert archive.read(len(FILES)) == b"five"
  assert archives.shown(archive.names[-1]) == "\ufffd.png"
  archives.fingerprint(path)


def test_names_in_a_zip_are_brought_to_one_form(tmp_path):
  files = {"./a/1.png": b"one", "a\\2.png": b"two", "/b/../a/3.png": b"three"}
  path = write_zip(tmp_path / "x", files | {"../4.png": b"four", "c\\": b""})
  archive = archives.open_archive(path)
  assert archive.names == ["4.png", "a/1.png", "a/2.png", "a/3.png"]
  content = [archive.read(i) for i in range(4)]
  assert content == [b"four", b"one", b"two", b"three"]


def test_last_of_a_zip_s_members_of_one_name_counts(tmp_path):
  path = tmp_path / "x.zip"
  with pytest.warns(UserWarning, match="Duplicate"):
    with zipfile.ZipFile(path, "w") as file:
      for content in (b"old", b"new"):
        file.writestr("1.png", content)
  archive = archives.open_archive(path)
  assert archive.names == ["1.png"] and archive.read(0) == b"new"
  assert archive.unused == {"doubled": ["1.png"]}


def encrypted(path, *members):
  """Marks members of a zip, by their place in its list, as encrypted."""
  content, member = bytearray(path.read_bytes()), -1
  for i in range(len(content)):
    if content[i : i + 4] == b"PK\1\2":  # of the list of contents
      member += 1
      content[i + 8] |= member in members
  path.write_bytes(content)
  return path


def test_encrypted_members_are_left_out_and_named(tmp_path):
  files = {f"{i}.png": encode(noise(4, 4, 3)) for i in range(3)}
  path = encrypted(write_zip(tmp_path / "x.zip", files), 1)
  archive = archives.open_archive(path)
  assert archive.names == ["0.png", "2.png"]
  assert archive.unused["encrypted"] == ["1.png"]


def test_encrypted_zip_is_an_error_that_says_so(tmp_path):
  path = write_zip(tmp_path / "x.zip", FILES)
  encrypted(path, *range(len(FILES)))
  with pytest.raises(ConfigError, match=r"x\.zip is encrypted"):
    archives.open_archive(path)


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
  with pytest.raises(ConfigError, match=str(tmp_path / "x")):
    archives.open_archive(tmp_path / "x")


@pytest.mark.parametrize("write", [write_folder, write_zip])
@pytest.mark.parametrize("files", [{"sub/readme.txt": b"text"}, OTHERS])
def test_archive_without_images_is_an_error_that_says_which_are(
  tmp_path, write, files
):
  path = write(tmp_path / "x", files)
  with pytest.raises(ConfigError, match=r"\.png, \.jpg"):
    archives.open_archive(path)


def test_damaged_lmdb_is_an_error(tmp_path):
  write_folder(tmp_path / "x", {"data.mdb": b"no database"})
  with pytest.raises(ConfigError, match="no LMDB"):
    archives.open_archive(tmp_path / "x")


@pytest.mark.parametrize("num_values", [0, 1, 400])
@pytest.mark.parametrize("largest", [0, 500, 9000])
def test_lmdb_of_any_size_is_read(num_values, largest, tmp_path):
  rng = np.random.default_rng(0)
  values = {
    str(i).encode(): rng.bytes(rng.integers(largest + 1))
    for i in rng.integers(10**18, size=num_values)
  }
  folder = write_lmdb(tmp_path / "x", values)
  if not values:
    with pytest.raises(ConfigError, match="no images"):
      archives.open_archive(folder)
    return
  archive = archives.open_archive(folder)
  assert archive.names.tolist() == sorted(values)
  for i, key in enumerate(sorted(values)):
    assert archive.read(i) == values[key]


def test_lmdb_that_is_cut_off_ends_no_process(tmp_path):
  values = {b"%03d" % i: bytes(100 * i) for i in range(100)}
  folder = write_lmdb(tmp_path / "x", values)
  content = (folder / "data.mdb").read_bytes()
  lost = 0
  for size in range(0, len(content), 60_000):
    (folder / "data.mdb").write_bytes(content[:size])
    try:
      archive = archives.open_archive(folder)
    except ConfigError as error:
      assert "holds no LMDB that opens" in str(error)
      continue
    read = [archive.read(i) for i in range(100)]
    assert all(x in (b"", values[b"%03d" % i]) for i, x in enumerate(read))
    lost += sum(not x for x in read[1:])
  assert lost  # where the tree is whole, but not all of its values


@pytest.mark.parametrize(
  "names, classes, labels",
  [
    (["a/1", "a/2", "b/1"], ["a", "b"], [0, 0, 1]),
    (["all/b/1", "all/a/x/1", "all/b/2"], ["a", "b"], [1, 0, 1]),
    (["a/1", "a/2"], None, None),
    (["1", "2"], None, None),
    (["a/1", "b/1", "2"], None, None),
    (["all/1", "all/a/2"], None, None),
    (["00000/img00000999.png", "00001/img00001000.png"], None, None),
    (["00000/00999.png", "01000/01000.png"], None, None),
    (["x/00000/1.png", "x/00012/12345.png"], None, None),
    (["0/1.png", "1/2.png"], ["0", "1"], [0, 1]),  # digits, as classes
    (["a/1", "\udcff/1"], ["a", "\ufffd"], [0, 1]),  # no UTF-8
    (["00000/00001_2.ppm", "00001/00000_1.ppm"], ["00000", "00001"], [0, 1]),
  ],
)
def test_class_folders_are_labels(names, classes, labels):
  found_classes, found = archives.class_labels(names)
  assert found_classes == classes
  if labels is None:
    assert found is None
  else:
    np.testing.assert_array_equal(found, labels)


STYLEGAN = [f"{i // 1000:05d}/img{i:08d}.png" for i in (0, 1, 1000, 1001)]


@pytest.mark.parametrize("write", [write_folder, write_zip])
@pytest.mark.parametrize(
  "labels, classes, expected",
  [
    ([7, 3, 3, 12], ["3", "7", "12"], [1, 0, 0, 2]),
    (None, None, None),
    ([[0.5, 0.5]] * 4, None, None),
    ([7, 3, 3], None, None),  # and none of the last
  ],
)
@pytest.mark.parametrize("folder", ["", "faces/"])
def test_classes_of_stylegan_s_tool_are_read(
  tmp_path, write, labels, classes, expected, folder
):
  if labels is not None:
    labels = [list(pair) for pair in zip(STYLEGAN[::-1], labels[::-1])]
  files = dict.fromkeys(STYLEGAN, b"x")
  files["dataset.json"] = json.dumps({"labels": labels}).encode()
  files = {folder + name: content for name, content in files.items()}
  archive = archives.open_archive(write(tmp_path / "x", files))
  found_classes, found = archive.class_labels()
  assert found_classes == classes
  np.testing.assert_array_equal(found, expected)
  unused = {kind for kind, names in archive.unused.items() if names}
  assert unused == (set() if labels is None or expected else {"labels"})


def test_dataset_json_of_another_tool_is_no_list_of_classes(tmp_path):
  files = {"a/1.png": b"", "b/2.png": b"", "dataset.json": b'["labels"]'}
  archive = archives.open_archive(write_folder(tmp_path / "x", files))
  assert archive.class_labels()[0] == ["a", "b"]


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_grid_beside_samples_is_none_of_the_images(tmp_path, write):
  names = ["a/000000.png", "a/000001.png", "a/grid.png", "b/grid.png"]
  files = dict.fromkeys([*names, "a/my_grid.png"], b"x")
  names, unused = names_of(write(tmp_path / "x", files))
  assert unused == {"grid of samples": ["a/grid.png"]}
  assert len(names) == 4


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_fingerprint_is_of_all_content(tmp_path, write):
  files = {f"{i:05d}.png": b"%5d" % i for i in range(2000)}
  fingerprint = archives.fingerprint(write(tmp_path / "x", files))
  for name in ("00000.png", "01999.png"):  # of the same size
    other = write(tmp_path / name, files | {name: b"other"})
    assert archives.fingerprint(other) != fingerprint
  labels = write(tmp_path / "y", files | {"dataset.json": b"{}"})
  assert archives.fingerprint(labels) != fingerprint


def test_folder_is_read_anew_when_it_was_edited_in_place(tmp_path, monkeypatch):
  path, cache = write_folder(tmp_path / "x", FILES), tmp_path / "cache"
  before = archives.fingerprint(path, cache)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(archives, "_sha256", None)
    assert archives.fingerprint(path, cache) == before
  file = path / "0.jpeg"
  times = file.stat()
  file.write_bytes(b"ZERO")
  os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
  changed = archives.fingerprint(path, cache)
  assert changed not in (before, archives.fingerprint(tmp_path / "x" / "a"))
  assert changed == archives.fingerprint(path)


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
