"""Files as people name them, and as crashes and bad disks leave them."""

import contextlib
import datetime
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid

from etils import epath

from vitgan_jax.errors import ConfigError, storage_errors, storage_fault

# Forms of what lines of JSON hold; see `has_form`.
NUMBER = (int, float)
METRICS = {"step": NUMBER, ...: NUMBER}  # of metrics.jsonl
SCORES = {"step": NUMBER, "scores": {...: NUMBER}, "protocol": dict}
CHECKSUMS = "checksums.json"  # {file: SHA-256} of those beside it


def expand(path, remedy="a path without ~"):
  """Returns a path, as text, with the home folder for the "~" it begins with.

  All paths that people give, in flags and in fields of configs, come through
  here.

  Args:
    path: of this machine, or a URL as gs://bucket/run.
    remedy: what to give where the user has no home folder, for the message.

  Raises:
    ConfigError: if the path is empty, or there is no such home folder.
  """
  path = os.fspath(path)
  if not path.strip():
    raise ConfigError("the path is empty: give one, or leave it out")
  if not path.startswith("~"):
    return path
  expanded = os.path.expanduser(path)
  # An empty HOME would make it a folder at the root.
  if expanded == path or os.environ.get("HOME") == "":
    raise ConfigError(
      f"there is no home folder for {path}: set HOME, or give {remedy}"
    )
  return expanded


def sha256(path):
  """Returns the SHA-256 of a file, in hexadecimal."""
  with epath.Path(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder, paths):
  """Writes checksums.json into a folder: {file: SHA-256} of some within it."""
  checksums = {str(path.relative_to(folder)): sha256(path) for path in paths}
  (folder / CHECKSUMS).write_text(json.dumps(checksums))


def fault_of(folder):
  """Returns what is wrong with the files in checksums.json; None if nothing."""
  name = CHECKSUMS
  try:
    checksums = parse_json((folder / CHECKSUMS).read_text())
    for name, checksum in checksums.items():
      if sha256(folder / name) != checksum:
        return f"{name} is not what was written"
  except FileNotFoundError:
    return f"{name} is missing"
  except OSError as error:
    return f"it cannot be read: {storage_fault(error)}"
  except (AttributeError, ValueError):
    return f"{CHECKSUMS} is not what was written"
  return None


@contextlib.contextmanager
def writing_into(folder, flag, remedy=""):
  """Says of a fault of storage within the block where nothing can be written.

  Args:
    folder: for the message.
    flag: that gave it, for the message.
    remedy: what else to do, the end of the message.

  Raises:
    ConfigError: in place of one of the `storage_errors`.
  """
  try:
    yield
  except storage_errors() as error:
    raise ConfigError(
      f"cannot write into {flag}={folder}: {storage_fault(error)}{remedy}"
    ) from error


def local(path, flag):
  """Returns the pathlib.Path of a flag's value.

  Raises:
    ConfigError: if it is a URL, as gs://bucket/run.
  """
  if "://" in os.fspath(path):
    raise ConfigError(f"{flag}={path} must be a path of this machine")
  return pathlib.Path(path)


def check_writable(folder, flag, remedy=""):
  """Makes a folder, and sees whether files can be written into it.

  Args:
    folder: epath.Path.
    flag: that gave it, for the message.
    remedy: what else to do, the end of the message.

  Raises:
    ConfigError: if it cannot.
  """
  probe = folder / f"writable{os.getpid()}"
  with writing_into(folder, flag, remedy):
    folder.mkdir(parents=True, exist_ok=True)
    try:
      probe.write_bytes(b"\0" * 4096)  # a full disk takes names alone
    finally:
      probe.unlink(missing_ok=True)  # of a process of another host, it may be


def check_new(output):
  """Raises a ConfigError if --output is there and no empty folder."""
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise ConfigError(
      f"--output={output} is there and not empty; choose a new folder"
    )


@contextlib.contextmanager
def new_folder(output):
  """Yields a folder to write into, which becomes --output when it is whole.

  Args:
    output: epath.Path, of no folder or an empty one.

  Raises:
    ConfigError: if it cannot be written.
  """
  check_new(output)
  if not output.name:
    raise ConfigError(f"--output={output} has no name: give a new folder")
  partial = output.with_name(f"{output.name}.partial")
  if partial.exists():
    partial.rmtree()
  check_writable(partial, "--output", "; give another --output")
  try:
    yield partial
    if output.exists():
      output.rmdir()
    partial.rename(output)
  finally:
    if partial.exists():
      partial.rmtree()


@functools.cache
def tell(line):
  """Prints a line on standard error, once in a process."""
  print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def waiting(what, seconds=10.0, every=60.0):
  """Says on standard error what takes long within the block.

  Args:
    what: as "compiling the training step".
    seconds: until the first line.
    every: from one line to the next.
  """
  begin, is_over = time.monotonic(), threading.Event()

  def speak():
    pause = seconds
    while not is_over.wait(pause):
      seen = time.monotonic() - begin
      print(f"Still {what}, for {seen:.0f} s", file=sys.stderr, flush=True)
      pause = every

  thread = threading.Thread(target=speak, daemon=True)
  thread.start()
  try:
    yield
  finally:
    is_over.set()
    thread.join()


@contextlib.contextmanager
def whole(path, shared=False):
  """Yields another path, to write to; what is there then gets its name.

  If that fails, nothing is left of it. What a kill leaves, the next to write
  the file writes over, unless it is shared.

  Args:
    path: pathlib.Path or epath.Path.
    shared: whether other processes may write it at the same time.
  """
  own = f".{uuid.uuid4().hex}" if shared else ""
  partial = path.with_name(f"{path.name}{own}.partial")
  try:
    yield partial
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


def numbers_in(folder):
  """Returns the names in a folder that are numbers, as those of steps: a set.

  A folder that is not there has none.
  """
  names = [path.name for path in epath.Path(folder).glob("*")]
  return {int(name) for name in names if name.isdecimal()}


def parse_json(text, **options):
  """Returns the value of a text of JSON, str or bytes.

  Raises:
    ValueError: if it is none, or of lists within lists without end.
  """
  try:
    return json.loads(text, **options)
  except RecursionError as error:
    raise ValueError("too deep") from error


def has_form(value, form):
  """Tells whether a value of JSON is of a form.

  Args:
    value: what was read.
    form: a type, or a tuple of types; [form] of a list; or {key: form} of a
      dict that has these keys, and with the key `...` others, too, of a form.
  """
  if isinstance(form, dict):
    known = form.keys() - {...}
    return (
      isinstance(value, dict)
      and value.keys() >= known
      and (... not in form or value.keys() > known)
      and all(
        has_form(inner, form.get(key, form.get(..., object)))
        for key, inner in value.items()
      )
    )
  if isinstance(form, list):
    return isinstance(value, list) and all(has_form(x, form[0]) for x in value)
  return isinstance(value, form)


def read_records(path, form=dict):
  """Returns the records of a file of JSON lines, dicts, oldest first.

  Lines of another form, as a crash leaves them, are told of and left out. A
  file that is not there has none.

  Args:
    path: of the file.
    form: of a record; see `has_form`.
  """
  path, records = epath.Path(path), []
  lines = path.read_bytes().split(b"\n") if path.exists() else []
  for number, line in enumerate(lines, 1):
    try:
      record = parse_json(line)
    except ValueError:
      record = None
    if has_form(record, form):
      records.append(record)
    elif line.strip():
      tell(f"Line {number} of {path} is damaged: it is left out")
  return records


def describe_protocol(protocol):
  """Returns a line on how the scores of a record in scores.jsonl came about."""
  return (
    f"{protocol['num_fake']:,} samples of seed {protocol['seed']} against the "
    f"{protocol['num_real']:,} images of {protocol['dataset']} "
    f"{protocol['split']} (`{protocol['images_sha256'][:12]}`) at "
    f"{protocol['image_size']} px; features of {protocol['network']}"
  )


def append_record(path, record):
  """Adds a dict to a file of JSON lines, on a line of its own."""
  path, line = epath.Path(path), json.dumps(record) + "\n"
  if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
    tell(f"{path} ends in the midst of a line: what follows begins a new one")
    line = "\n" + line
  with path.open("a") as file:
    file.write(line)


@contextlib.contextmanager
def hold(folder, flag, name=".lock", wait=False):
  """Keeps a folder for this process, so that no other one holds it.

  What a process held is free again when it ends, however it does. A URL, as
  gs://bucket/run, and a file system without locks cannot be held.

  Args:
    folder: of this machine, made if it is not there; or a URL.
    flag: that gave it, for messages.
    name: of the file within that is locked.
    wait: whether to wait for another process that holds it.

  Raises:
    ConfigError: if another process holds it, and which; or if it cannot be
      written into.
  """
  path = os.path.join(os.fspath(folder), name)
  if "://" in path:
    yield
    return
  with writing_into(folder, flag):
    os.makedirs(folder, exist_ok=True)
    file = open(path, "a+", encoding="utf-8")
  with file:
    try:
      with waiting(f"waiting for another process, which holds {folder}"):
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
      file.seek(0)
      raise ConfigError(
        f"{flag}={folder} is in use by {file.read() or 'another process'}: "
        f"stop that one, or choose another {flag}"
      ) from error
    except OSError as error:
      tell(f"{folder} cannot be locked ({error.strerror}): start no second run")
    file.truncate(0)
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} of {socket.gethostname()}, since {now}")
    file.flush()
    yield
