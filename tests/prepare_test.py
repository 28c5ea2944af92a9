import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest

from tests import datasets, runs
from tests.datasets import data_config, encode, noise
from vitgan_jax.data import (
  archives,
  decode,
  pipeline,
  prepare,
  shards,
  source,
)
from vitgan_jax.errors import ConfigError


def write_images(path, num_images, size=8):
  """Writes a folder of numbered images; returns {name: uint8 image}."""
  images = {
    f"{i:05d}.png": noise(size, size, 3, seed=i) for i in range(num_images)
  }
  datasets.write_folder(
    path, {name: encode(image) for name, image in images.items()}
  )
  return images


@pytest.fixture
def small_shards(monkeypatch):
  monkeypatch.setattr(prepare, "_MIN_SHARD_IMAGES", 4)


@pytest.fixture
def data(tmp_path, small_shards):
  """A folder of 18 images, to be prepared in five shards."""
  write_images(tmp_path / "images", 18)
  return data_config(tmp_path / "data", "folder", path=str(tmp_path / "images"))


def test_arrays_are_the_images_with_a_card_and_a_picture(data):
  path = prepare.prepare(data)
  names = [f"images-{k:05d}.npy" for k in range(5)]
  assert sorted(file.name for file in path.iterdir()) == sorted(
    [*names, "card.json", "contact_sheet.png"]
  )
  arrays = [np.load(path / name) for name in names]
  assert [len(array) for array in arrays] == [4, 4, 4, 3, 3]
  assert all(array.dtype == np.uint8 for array in arrays)
  expected = [noise(8, 8, 3, seed=i) for i in range(18)]
  np.testing.assert_array_equal(np.concatenate(arrays), expected)
  card = prepare.read_card(path)
  files = [(path / name).read_bytes() for name in names]
  assert card.pop("shards") == [
    {
      "file": name,
      "num_images": len(array),
      "sha256": hashlib.sha256(file).hexdigest(),
    }
    for name, array, file in zip(names, arrays, files)
  ]
  assert card == {
    "dataset": "folder/1.0.0",
    "source": data.path,
    "licence": "that of your images",
    "split": "train",
    "image_size": 8,
    "crop": "largest centred square",
    "colours": "sRGB; those of other ICC profiles are converted",
    "filter": "lanczos, antialiased",
    "num_images": 18,
    "skipped": [],
  }
  with Image.open(path / "contact_sheet.png") as sheet:
    pixels = np.asarray(sheet)
  factor = 512 // (4 * 8) + 1  # rows of five; no gaps at this size
  np.testing.assert_array_equal(
    pixels[: 8 * factor : factor, 0], expected[0][:, 0]
  )


def test_nothing_is_left_beside_the_prepared_folder(data):
  path = prepare.prepare(data)
  names = {file.name for file in path.parent.iterdir()}
  assert names == {path.name, ".lock", ".fingerprints"}


def test_is_prepared_once(data, monkeypatch):
  path = prepare.prepare(data)
  monkeypatch.setattr(prepare, "_prepare", None)
  assert prepare.prepare(data) == path


@pytest.mark.parametrize(
  "field, value",
  [
    ("dataset", "ffhq"),
    ("split", "train[1:]"),
    ("image_size", 4),
    ("data_dir", "elsewhere"),
    ("crop", (0, 0, 6, 6)),
    ("path", ""),
  ],
)
def test_each_choice_of_data_has_its_own_folder(
  data, field, value, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  path = prepare.prepared_path(data)
  data[field] = value
  assert prepare.prepared_path(data) != path


def test_crop_box_is_applied(data):
  data.crop = (1, 2, 7, 8)
  prepared = pipeline.load_images(data)
  image = Image.fromarray(noise(8, 8, 3, seed=3))
  np.testing.assert_array_equal(
    prepared[3], decode.crop_and_resize(image, 8, (1, 2, 7, 8))
  )
  assert prepared.card["crop"] == [1, 2, 7, 8]


def test_data_dir_defaults_to_the_one_of_tfds(data, monkeypatch):
  data.data_dir = ""
  monkeypatch.setenv("TFDS_DATA_DIR", "/somewhere")
  assert prepare.prepared_path(data).is_relative_to("/somewhere")
  monkeypatch.delenv("TFDS_DATA_DIR")
  home = os.path.expanduser("~/tensorflow_datasets")
  assert prepare.prepared_path(data).is_relative_to(home)


def test_number_of_shards_is_bounded(data, monkeypatch):
  # A memory map keeps its file open, and a process may open 1,024.
  assert prepare._MAX_SHARDS < 512
  monkeypatch.setattr(prepare, "_MAX_SHARDS", 2)
  card = prepare.read_card(prepare.prepare(data))
  assert [shard["num_images"] for shard in card["shards"]] == [9, 9]


def cut_off_after(count, monkeypatch, error):
  """Makes the decoding of image `count` raise."""
  calls = iter(range(10_000))
  crop_and_resize = decode.crop_and_resize

  def failing(*args):
    if next(calls) == count:
      raise error
    return crop_and_resize(*args)

  monkeypatch.setattr(decode, "crop_and_resize", failing)


def test_preparing_that_is_cut_off_goes_on_where_it_was(
  data, tmp_path, monkeypatch
):
  other = data.copy_and_resolve_references()
  other.data_dir = str(tmp_path / "whole")
  whole = runs.snapshot(prepare.prepare(other))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(shards, "_num_cores", lambda: 1)
    cut_off_after(10, patch, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
      prepare.prepare(data)
  path = prepare.prepared_path(data)
  partial = path.with_name(path.name + ".partial")
  done = [name for name in os.listdir(partial) if name.endswith(".npy")]
  assert not path.exists() and len(done) == 2
  decoded = []
  decode_file = decode.decode
  monkeypatch.setattr(
    decode, "decode", lambda x, *bound: decoded.append(x) or decode_file(x)
  )
  prepare.prepare(data)
  assert len(decoded) == 18 - 2 * 4
  assert runs.snapshot(path) == whole
  assert not partial.exists()


def test_what_another_plan_left_is_not_used(data, monkeypatch):
  data.image_size = 4
  path = prepare.prepared_path(data)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(shards, "_num_cores", lambda: 1)
    cut_off_after(10, patch, KeyboardInterrupt)
    patch.setattr(decode, "FILTER", Image.Resampling.NEAREST)
    with pytest.raises(KeyboardInterrupt):
      prepare.prepare(data)
  prepared = pipeline.load_images(data)
  expected = [
    decode.crop_and_resize(Image.fromarray(noise(8, 8, 3, seed=i)), 4)
    for i in range(18)
  ]
  np.testing.assert_array_equal(prepared[:], expected)
  assert prepared.path == path


@pytest.mark.slow
def test_killed_preparation_ends_with_the_same_bytes(tmp_path):
  write_images(tmp_path / "images", 600, size=64)
  program = (
    "import sys; from vitgan_jax.data import prepare; "
    "prepare._MIN_SHARD_IMAGES = 20; "
    "from configs import folder; data = folder.get_config().data; "
    "data.path, data.data_dir = sys.argv[1:]; prepare.prepare(data)"
  )

  def start(data_dir):
    return subprocess.Popen(
      [sys.executable, "-c", program, tmp_path / "images", data_dir],
      cwd=runs.ROOT,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )

  with start(tmp_path / "killed") as process:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
      if len(list((tmp_path / "killed").rglob("*.json"))) > 4:
        process.send_signal(signal.SIGKILL)
        break
      time.sleep(0.002)
    assert process.wait(timeout=60) == -signal.SIGKILL
  (partial,) = (tmp_path / "killed" / "vitgan_jax").glob("*.partial")
  assert 0 < len(list(partial.glob("*.npy"))) < 30
  for name in ("killed", "whole"):
    with start(tmp_path / name) as process:
      assert process.wait(timeout=300) == 0
  killed, whole = (
    next((tmp_path / name / "vitgan_jax").glob("folder-*"))
    for name in ("killed", "whole")
  )
  assert killed.name == whole.name
  assert runs.snapshot(killed) == runs.snapshot(whole)


def test_two_preparations_at_once_share_the_work(data, monkeypatch):
  path = prepare.prepared_path(data)
  program = (
    "import fcntl, sys, time; file = open(sys.argv[1], 'w'); "
    "fcntl.flock(file, fcntl.LOCK_EX); print('locked', flush=True); "
    "sys.stdin.read(1); import os; os.rename(sys.argv[2], sys.argv[3])"
  )
  # Another process that has nearly done it.
  twin = data.copy_and_resolve_references()
  twin.data_dir = str(path.parent.parent / "twin")
  done = prepare.prepare(twin)
  with subprocess.Popen(
    [sys.executable, "-c", program, path.parent / ".lock", done, path],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == "locked\n"
    monkeypatch.setattr(prepare, "_prepare", None)
    monkeypatch.setattr(
      "builtins.print",
      lambda *args, **kwargs: (process.stdin.write("."), process.stdin.flush()),
    )
    assert prepare.prepare(data) == path  # it waited, and made nothing


def test_two_folders_of_the_same_names_and_sizes_are_two_datasets(data):
  whole = pipeline.load_images(data)
  images = [noise(8, 8, 3, seed=i + 100) for i in range(18)]
  for i, image in enumerate(images):
    path = os.path.join(data.path, f"{i:05d}.png")
    assert os.path.getsize(path) == len(encode(image))
    with open(path, "wb") as file:
      file.write(encode(image))
  others = pipeline.load_images(data)
  assert others.path != whole.path
  np.testing.assert_array_equal(others[:], images)
  with pytest.raises(ConfigError, match="not the same"):
    state = pipeline.ShuffledBatches(whole, 4, 0).state_at(1)
    pipeline.ShuffledBatches(others, 4, 0).step_of(state)


def test_known_folder_is_not_read_again(data, monkeypatch):
  path = prepare.prepare(data)
  monkeypatch.setattr(archives, "_sha256", None)
  assert prepare.prepared_path(data) == path


def test_whole_dataset_is_opened_without_its_source(data, capsys):
  prepared = pipeline.load_images(data)
  cropped = data.copy_and_resolve_references()
  cropped.crop = (0, 0, 8, 8)
  pipeline.load_images(cropped)  # another one of the same source
  os.rename(data.path, f"{data.path}.away")
  assert prepare.prepared_path(data) == prepared.path
  output = capsys.readouterr().out
  assert f"Nothing is at {data.path} to compare with: {prepared.path}" in output
  np.testing.assert_array_equal(pipeline.load_images(data)[:], prepared[:])
  data.split = "train[:4]"  # of which nothing is prepared
  with pytest.raises(ConfigError, match="no folder or zip at"):
    prepare.prepare(data)
  data.update(split="train", path=f"{data.path}.other")
  with pytest.raises(ConfigError, match="no folder or zip at"):
    prepare.prepare(data)


def test_of_what_was_prepared_from_a_source_that_is_gone_the_last_counts(data):
  first = prepare.prepare(data)
  os.unlink(os.path.join(data.path, "00000.png"))
  last = prepare.prepare(data)
  os.utime(first, (1, 1))
  shutil.rmtree(data.path)
  assert prepare.prepared_path(data) == last != first


def test_shard_asks_for_no_images_of_a_part_that_has_none_for_it(data):
  """TFDS does not answer."""

  def read(split, start, stop):
    assert start < stop
    yield from ((f"{split}{i}", b"", None) for i in range(start, stop))

  data.split = "train+test"
  few = source.Source("x/1.0.0", "", "", {"train": 9, "test": 2}, read)
  maker = shards.ShardMaker(few, data, None, 4)
  names = [name for k in range(4) for name, *_ in maker._read(k)]
  assert sorted(names) == sorted(
    [*(f"train{i}" for i in range(9)), "test0", "test1"]
  )


def test_summary_names_what_was_not_used(tmp_path, small_shards):
  write_images(tmp_path / "images", 100)
  folder = tmp_path / "images"
  (folder / "loop").symlink_to(folder)
  (folder / "00007.png").write_bytes(b"no image")
  for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
    (folder / name).write_text("text")
  (folder / "nowhere.png").symlink_to("nothing")
  data = data_config(tmp_path / "data", "folder", path=str(folder))
  path = prepare.prepare(data)
  assert prepare.summary(path) == (
    "106 found, 99 used; not used: 1 doubled (loop); 1 dangling link "
    "(nowhere.png); 4 no image (a.txt, b.txt, c.txt, ...); 1 corrupt "
    "(00007.png: no image that Pillow reads); all names are in "
    f"{path / 'unused.json'}"
  )
  names = json.loads((path / "unused.json").read_text())
  assert names["no image"] == ["a.txt", "b.txt", "c.txt", "d.txt"]
  (path / "unused.json").unlink()  # as older versions prepared it
  assert "100 found, 99 used; not used: 1 corrupt" in prepare.summary(path)


def corrupt(data, names, content=b"no image"):
  for name in names:
    with open(os.path.join(data.path, name), "wb") as file:
      file.write(content)


def test_corrupt_image_is_skipped_and_named(tmp_path, small_shards, capfd):
  write_images(tmp_path / "images", 200)
  data = data_config(tmp_path / "data", "folder", path=str(tmp_path / "images"))
  whole = encode(noise(8, 8, 3))
  corrupt(data, ["00007.png"])
  corrupt(data, ["00190.png"], whole[:-40])
  prepared = pipeline.load_images(data)
  expected = [noise(8, 8, 3, seed=i) for i in range(200) if i not in (7, 190)]
  np.testing.assert_array_equal(prepared[:], expected)
  skipped = prepared.card["skipped"]
  assert [line.split(":")[0] for line in skipped] == ["00007.png", "00190.png"]
  assert skipped[0] == "00007.png: no image that Pillow reads"
  output = capfd.readouterr()
  assert skipped[0] in output.out + output.err


def test_too_many_corrupt_images_are_an_error(tmp_path, small_shards):
  write_images(tmp_path / "images", 100)
  data = data_config(tmp_path / "data", "folder", path=str(tmp_path / "images"))
  corrupt(data, ["00007.png"])  # one in a hundred may be
  assert len(pipeline.load_images(data)) == 99
  corrupt(data, ["00008.png"])
  with pytest.raises(ConfigError, match=r"0000[78]\.png.*1%") as error:
    pipeline.load_images(data)
  assert "\n" not in str(error.value)
  left = [path.name for path in (tmp_path / "data").rglob("*.partial")]
  assert not left


def test_shard_of_corrupt_images_alone_can_be_read(tmp_path, small_shards):
  write_images(tmp_path / "images", 400)
  data = data_config(tmp_path / "data", "folder", path=str(tmp_path / "images"))
  corrupt(data, [f"{i:05d}.png" for i in range(8, 12)])
  prepared = pipeline.load_images(data)
  assert [s["num_images"] for s in prepared.card["shards"]][1:4] == [4, 0, 4]
  assert len(prepared) == 396
  np.testing.assert_array_equal(prepared[8], noise(8, 8, 3, seed=12))


def test_images_smaller_than_the_crop_are_named(tmp_path, small_shards):
  write_images(tmp_path / "images", 8)
  data = data_config(
    tmp_path / "data",
    "folder",
    path=str(tmp_path / "images"),
    crop=(0, 0, 9, 9),
  )
  with pytest.raises(ConfigError, match="8 x 8 pixels"):
    pipeline.load_images(data)


def test_dataset_that_lacks_images_is_not_filled_up(data, monkeypatch):
  def read(self, k, read=shards.ShardMaker._read):
    return list(read(self, k))[:-1]

  monkeypatch.setattr(shards.ShardMaker, "_read", read)
  with pytest.raises(ConfigError, match="13 images of the 18"):
    pipeline.load_images(data)
  assert not prepare.prepared_path(data).exists()


def test_disk_that_is_too_small_is_said_before_the_work(data, monkeypatch):
  usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  monkeypatch.setattr(decode, "decode", None)
  with pytest.raises(ConfigError, match=r"0\.0 GB are free") as error:
    pipeline.load_images(data)
  assert "config.data.data_dir" in str(error.value)


def test_disk_that_fills_up_is_an_error_and_keeps_what_is_done(
  data, monkeypatch
):
  class FullDisk(io.BytesIO):
    def write(self, content):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  def open_file(path, mode="r"):
    full = mode == "wb" and "00003" in str(path)
    return FullDisk() if full else open(path, mode)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(shards, "_num_cores", lambda: 1)
    patch.setattr(shards, "open", open_file, raising=False)
    with pytest.raises(ConfigError, match="No space left") as error:
      pipeline.load_images(data)
  assert "\n" not in str(error.value)
  path = prepare.prepared_path(data)
  partial = path.with_name(path.name + ".partial")
  assert len(list(partial.glob("*.npy"))) == 3
  assert len(pipeline.load_images(data)) == 18


def test_folder_that_cannot_be_written_is_an_error(data, tmp_path):
  (tmp_path / "file").write_text("in the way")
  data.data_dir = str(tmp_path / "file")
  with pytest.raises(ConfigError, match="cannot prepare"):
    pipeline.load_images(data)


def test_command_prepares_then_verifies(tmp_path):
  write_images(tmp_path / "images", 18)
  arguments = [
    f"--config={runs.ROOT}/configs/folder.py",
    f"--config.data.path={tmp_path / 'images'}",
    "--config.data.image_size=32",
    "--data_dir=data",
  ]
  command = ("vitgan_jax.data.prepare", *arguments)
  code, output, errors = runs.call(*command, cwd=tmp_path)
  assert code == 0, errors
  assert "18/18" in errors  # the progress bar
  (path,) = (tmp_path / "data" / "vitgan_jax").glob("folder-*")
  for words in ("lanczos", "largest centred square", "that of your images"):
    assert words in output
  sheet = f"data/vitgan_jax/{path.name}/contact_sheet.png"
  assert sheet in output and (tmp_path / sheet).exists()
  assert output.splitlines()[-1] == "images    18 found, all of them used"
  before = runs.snapshot(path)

  code, _, errors = runs.call(*command, cwd=tmp_path)
  assert code == 0, errors
  assert "Verifying" in errors
  assert runs.snapshot(path) == before

  with open(path / "images-00000.npy", "r+b") as file:
    file.seek(5000)
    file.write(b"\0\1\2\3")
  code, _, errors = runs.call(*command, cwd=tmp_path)
  assert code == 78
  assert errors.splitlines()[-1].startswith("error: ")
  assert "images-00000.npy is damaged" in errors


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "--config=configs/<name>.py is required"),
    (["--config=CONFIGS/folder.py"], "--config.data.path"),
    (["--config=CONFIGS/folder.py", "word"], "not a flag: word"),
    (["--config=CONFIGS/none.py"], "none.py"),
  ],
)
def test_bad_command_is_one_line(tmp_path, arguments, message):
  configs = str(runs.ROOT / "configs")
  code, _, errors = runs.call(
    "vitgan_jax.data.prepare",
    *[argument.replace("CONFIGS", configs) for argument in arguments],
    cwd=tmp_path,
  )
  assert code == 78
  assert message in errors and len(errors.splitlines()) == 1


def test_card_is_readable_json_with_an_end_of_line(data):
  text = (prepare.prepare(data) / "card.json").read_text()
  assert text.endswith("}\n") and len(text.splitlines()) > 10
  json.loads(text)
