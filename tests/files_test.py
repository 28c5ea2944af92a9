import json
import os
import pathlib
import pwd
import subprocess
import sys
import threading
import time

from etils import epath
import pytest

from vitgan_jax import files
from vitgan_jax.errors import ConfigError


@pytest.fixture(autouse=True)
def told_anew():
  files.tell.cache_clear()


@pytest.mark.parametrize(
  "path, expected",
  [
    ("~", "/home/me"),
    ("~/x", "/home/me/x"),
    ("x/~", "x/~"),
    ("gs://bucket/~x", "gs://bucket/~x"),
    (pathlib.Path("a/b"), "a/b"),
  ],
)
def test_home_folder_is_put_in_where_a_path_begins_with_it(
  path, expected, monkeypatch
):
  monkeypatch.setenv("HOME", "/home/me")
  assert files.expand(path) == expected


@pytest.mark.parametrize("home", [None, ""])
@pytest.mark.parametrize("path", ["~", "~/x", "~nobody-of-this-name/x"])
def test_home_folder_that_is_not_there_is_an_error(path, home, monkeypatch):
  def getpwuid(uid):  # as of a container's user without an entry
    raise KeyError(uid)

  monkeypatch.delenv("HOME")
  monkeypatch.setattr(pwd, "getpwuid", getpwuid)
  if home is not None:
    monkeypatch.setenv("HOME", home)
  with pytest.raises(ConfigError, match="set HOME, or give --flag") as error:
    files.expand(path, "--flag=FOLDER")
  assert path in str(error.value)


@pytest.mark.parametrize("path", ["", " "])
def test_empty_path_is_an_error(path):
  with pytest.raises(ConfigError, match="empty"):
    files.expand(path)


@pytest.mark.parametrize("cut", range(1, 9))  # all but the first byte
def test_torn_line_is_left_out_and_not_written_to(cut, tmp_path, capsys):
  path = tmp_path / "log.jsonl"
  assert files.read_records(path) == []
  files.append_record(path, {"a": 1})
  files.append_record(path, {"a": 2})
  torn = path.read_bytes()[:-cut]  # of the second line, {"a": 2}
  path.write_bytes(torn)
  files.append_record(path, {"a": 3})
  values = [record["a"] for record in files.read_records(path, {"a": int})]
  assert values == ([1, 2, 3] if cut == 1 else [1, 3])
  assert path.read_bytes().startswith(torn)  # nothing is lost
  errors = capsys.readouterr().err
  assert "ends in the midst of a line" in errors
  assert ("Line 2 of" in errors) == (cut > 1)


def test_lines_of_other_content_are_left_out_and_told_of_once(tmp_path, capsys):
  path = tmp_path / "log.jsonl"
  lines = [b'{"a": 1}', b"3", b'{"b": 2}', b"\xff\x00", b'{"a"', b""]
  path.write_bytes(b"\n".join(lines))
  for _ in range(2):
    assert files.read_records(path, {"a": int}) == [{"a": 1}]
  told = capsys.readouterr().err.splitlines()
  assert [line.split()[1] for line in told] == ["2", "3", "4", "5"]


@pytest.mark.parametrize(
  "value, form, expected",
  [
    (3, int, True),
    ("3", files.NUMBER, False),
    ([1, 2.0], [files.NUMBER], True),
    ([1, "2"], [files.NUMBER], False),
    ({"a": 1, "b": "x"}, {"a": int}, True),
    ({"b": 1}, {"a": int}, False),
    ({"a": {"b": 1}}, {"a": {"b": str}}, False),
    ({"a": "x", "b": 1}, {"a": str, ...: int}, True),
    ({"a": "x", "b": "y"}, {"a": str, ...: int}, False),
    ({"a": "x"}, {"a": str, ...: int}, False),  # others are to be there
    ([], {...: int}, False),
  ],
)
def test_form_of_a_value_is_seen(value, form, expected):
  assert files.has_form(value, form) == expected


def test_line_without_an_end_of_its_depth_is_left_out(tmp_path):
  path = tmp_path / "log.jsonl"
  path.write_text("[" * 100_000 + '\n{"a": 1}\n')
  assert files.read_records(path) == [{"a": 1}]


def test_whole_file_is_only_added_to(tmp_path, capsys):
  path = tmp_path / "log.jsonl"
  path.touch()
  for i in range(3):
    files.append_record(path, {"a": i})
  lines = path.read_text().splitlines()
  assert [json.loads(line) for line in lines] == [{"a": i} for i in range(3)]
  assert not capsys.readouterr().err


def test_folder_is_held_by_one_process_until_it_dies(tmp_path):
  program = (
    "import sys, time; from vitgan_jax import files\n"
    "with files.hold(sys.argv[1], '--workdir'):\n"
    "  print(flush=True); time.sleep(99)"
  )
  other = subprocess.Popen(
    [sys.executable, "-c", program, str(tmp_path / "run")],
    stdout=subprocess.PIPE,
  )
  other.stdout.readline()
  with pytest.raises(ConfigError) as error:
    with files.hold(tmp_path / "run", "--workdir"):
      pass
  assert f"in use by process {other.pid} of " in str(error.value)
  assert "\n" not in str(error.value)
  other.kill()
  other.communicate()
  for _ in range(2):
    with files.hold(tmp_path / "run", "--workdir"):
      text = (tmp_path / "run" / ".lock").read_text()
      assert text.startswith(f"process {os.getpid()} of ")


def test_folder_that_is_held_can_be_waited_for(tmp_path):
  order = []

  def second():
    with files.hold(tmp_path, "--workdir", wait=True):
      order.append("second")

  thread = threading.Thread(target=second)
  with files.hold(tmp_path, "--workdir"):
    thread.start()
    time.sleep(0.2)
    order.append("first")
  thread.join()
  assert order == ["first", "second"]


def test_folder_that_cannot_be_held_is_an_error_of_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(
    ConfigError, match=r"cannot write into --workdir=.*file/run"
  ):
    with files.hold(tmp_path / "file" / "run", "--workdir"):
      pass


def test_url_is_not_held():
  with files.hold("gs://bucket/run", "--workdir"):
    assert not os.path.exists("gs:")


def test_two_may_write_a_file_that_is_shared_at_once(tmp_path):
  path = tmp_path / "file"
  with files.whole(path, shared=True) as second:
    with files.whole(path, shared=True) as first:
      for partial, text in ((second, "long"), (first, "a")):
        partial.write_text(text)
    assert path.read_text() == "a"
  assert path.read_text() == "long"
  assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_of_a_file_is_written_over(tmp_path):
  (tmp_path / "file.partial").write_text("half")
  with files.whole(tmp_path / "file") as partial:
    partial.write_text("whole")
  assert [x.name for x in tmp_path.iterdir()] == ["file"]


def test_names_that_are_numbers_are_found(tmp_path):
  for name in ("8", "12", "8.damaged", "²"):
    (tmp_path / name).mkdir()
  assert files.numbers_in(tmp_path) == {8, 12}
  assert files.numbers_in(tmp_path / "nothing") == set()


def test_new_folder_appears_when_it_is_whole(tmp_path):
  output = epath.Path(tmp_path) / "a" / "new"
  (output.parent / "new.partial").mkdir(parents=True)
  (output.parent / "new.partial" / "old").write_text("of a crash")
  with files.new_folder(output) as folder:
    (folder / "file").write_text("new")
    assert not output.exists()
  assert [x.name for x in output.iterdir()] == ["file"]
  assert [x.name for x in output.parent.iterdir()] == ["new"]


def test_folder_that_one_stands_in_is_no_new_one(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError, match="has no name"):
    with files.new_folder(epath.Path(".")):
      pass


def test_url_is_no_path_of_this_machine(tmp_path):
  assert files.local(str(tmp_path), "--output") == tmp_path
  with pytest.raises(ConfigError, match="--output=gs://b/x must be a path of"):
    files.local("gs://b/x", "--output")


def test_new_folder_of_a_failure_is_none(tmp_path):
  output = epath.Path(tmp_path) / "new"
  with pytest.raises(ZeroDivisionError):
    with files.new_folder(output) as folder:
      (folder / "file").write_text("half")
      raise ZeroDivisionError
  assert not list(tmp_path.iterdir())


def test_folder_that_is_not_empty_is_not_new(tmp_path):
  output = epath.Path(tmp_path)
  with files.new_folder(output / "empty") as folder:
    pass
  assert folder.name == "empty.partial"
  with files.new_folder(output / "empty"):  # an empty one may be there
    pass
  with pytest.raises(ConfigError, match="is there and not empty"):
    with files.new_folder(output):
      pass


def test_checksums_tell_what_is_not_as_it_was(tmp_path):
  folder = epath.Path(tmp_path)
  assert files.fault_of(folder) == "checksums.json is missing"
  for name in ("a", "b"):
    (folder / name).write_text(name)
  files.write_checksums(folder, [folder / "a", folder / "b"])
  assert files.fault_of(folder) is None
  (folder / "b").write_text("c")
  assert files.fault_of(folder) == "b is not what was written"
  (folder / "a").unlink()
  assert files.fault_of(folder) == "a is missing"
  (folder / "checksums.json").write_text("[")
  assert files.fault_of(folder) == "checksums.json is not what was written"


def test_what_takes_long_is_said_and_what_does_not_is_not(capsys):
  with files.waiting("counting sheep", seconds=0.05, every=0.1):
    time.sleep(0.4)
  lines = capsys.readouterr().err.splitlines()
  assert 2 <= len(lines) <= 4
  assert set(lines) == {"Still counting sheep, for 0 s"}
  with pytest.raises(KeyError), files.waiting("counting sheep"):
    raise KeyError
  assert not capsys.readouterr().err
