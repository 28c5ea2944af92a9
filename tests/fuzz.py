r"""Gives readers what is damaged or odd, and sees that they say so in a line.

  make fuzz
  python -m tests.fuzz --count=100000 --output=runs/fuzz
  python -m tests.fuzz --target=zip --count=1000

Each target reads what hypothesis made: a small valid file with bytes flipped,
cut, put in or doubled, values of JSON replaced by odd ones, or mere noise. It
may be read, or refused with a ConfigError of one line. Anything else is a
finding: another exception, 10 s of the processor without an end, the death of
the process, or a file written beside the target's folder. The first input of
each finding is kept in --output/findings.

Most inputs go to the targets that take a millisecond. Where files have
checksums, one target damages them as a disk does, and another one writes the
checksums anew, so that what reads behind them is met.

Batches of a target run in a child of this process. What is in --output counts:
a harness that was stopped goes on.
"""

import collections
import contextlib
import copy
import datetime
import faulthandler
import io
import json
import os
import pathlib
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from typing import Any, NamedTuple
import zlib

from absl import flags
from etils import epath
import hypothesis
from hypothesis import strategies as st
import jax
from PIL import Image

from tests import datasets, runs, tiny
from vitgan_jax import checkpoint, cli, files, partitioning, results, trained
from vitgan_jax import config as config_lib
from vitgan_jax.data import archives, decode, lsun, pipeline, prepare
from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics import efficientnet, torch_files
from vitgan_jax.models import kinds, networks
from vitgan_jax.train_state import create_train_state

_BATCH = 500  # inputs of one child, at most
_BATCH_SECONDS = 30.0
_HANG_SECONDS = 10  # of the processor, as others may be busy on it
_WAIT_SECONDS = 600  # of the clock
_MEMORY = 16 * 2**30  # of the address space; JAX reserves some of it


class Target(NamedTuple):
  """What is fuzzed.

  Attributes:
    share: of all inputs, in relation to the other targets.
    inputs: strategy.
    read: function of a new folder and an input.
  """

  share: float
  inputs: Any
  read: Any


# Strategies.

_NUMBERS = st.one_of(
  st.integers(-4, 600),
  st.floats(),
  st.sampled_from([2**31, 2**63, -(2**64), 10**30, 1e308, 1e-308]),
)
_TEXTS = st.one_of(st.text(max_size=8), st.sampled_from(["x" * 10_000, "../x"]))
_ODD = st.one_of(
  st.none(),
  st.booleans(),
  _NUMBERS,
  _TEXTS,
  st.lists(_NUMBERS, max_size=5),
  st.dictionaries(_TEXTS, _NUMBERS, max_size=2),
)


@st.composite
def _changed(draw, contents):
  """Draws one of some bytes, with up to four changes."""
  content = bytearray(draw(st.sampled_from(contents)))
  for _ in range(draw(st.integers(1, 4))):
    at = draw(st.integers(0, len(content)))
    end = min(len(content), at + draw(st.integers(1, 64)))
    change = draw(st.sampled_from(["flip", "cut", "end", "insert", "double"]))
    if change == "flip" and at < end:
      content[at] ^= draw(st.integers(1, 255))
    elif change == "cut":
      del content[at:end]
    elif change == "end":
      del content[at:]
    elif change == "insert":
      content[at:at] = draw(st.binary(min_size=1, max_size=16))
    elif change == "double":
      content[at:at] = content[at:end]
  return bytes(content)


def _bytes(contents):
  """Strategy of bytes: mostly some that are `_changed`."""
  changed = _changed(contents)
  return st.one_of(changed, changed, changed, st.binary(max_size=200))


def _places(value):
  """Returns (container, key) of all that is in a value of JSON."""
  pairs = list(
    value.items()
    if isinstance(value, dict)
    else enumerate(value)
    if isinstance(value, list)
    else ()
  )
  return [(value, key) for key, _ in pairs] + [
    place for _, inner in pairs for place in _places(inner)
  ]


@st.composite
def _altered(draw, values):
  """Draws the JSON of one of some values, of which up to three are odd."""
  value = copy.deepcopy(draw(st.sampled_from(values)))
  for _ in range(draw(st.integers(1, 3))):
    places = _places(value)
    if not places or draw(st.integers(0, 20)) == 0:
      value = draw(_ODD)
      break
    container, key = places[draw(st.integers(0, len(places) - 1))]
    if draw(st.integers(0, 4)) == 0:
      del container[key]
    else:
      container[key] = draw(_ODD)
  return json.dumps(value).encode()


def _json(values):
  """Strategy of bytes that are JSON, or not quite."""
  deep = st.integers(1, 100_000).map(lambda n: b"[" * n)
  altered = _altered(values)
  return st.one_of(
    altered, altered, _bytes([json.dumps(x).encode() for x in values]), deep
  )


def _of_folder(folder):
  """Strategy of {name: bytes, or None of one that is missing} of a folder.

  Only those that differ are in it.
  """
  contents = {k: v for k, v in runs.snapshot(folder).items() if v}
  changed = [
    st.tuples(st.just(name), st.one_of(st.none(), _changed([content])))
    for name, content in contents.items()
  ]
  return st.lists(st.one_of(changed), min_size=1, max_size=2).map(dict)


def _write(folder, changes):
  for name, content in changes.items():
    if content is None:
      (folder / name).unlink()
    else:
      (folder / name).write_bytes(content)


# What is valid.


def _configs():
  """Returns a small config of each kind of network."""
  from configs import digits

  names = [("g", x) for x in kinds.GENERATORS]
  names += [("d", x) for x in kinds.DISCRIMINATORS]
  return [digits.get_config(f"smoke,{k}={x}") for k, x in names]


def _log():
  """Returns the lines of metrics.jsonl and those of scores.jsonl."""
  metrics = [
    {"step": 10 * i, "kimg": 0.5 * i, "images_per_sec": 90.0, "loss/d": 1.5}
    for i in range(1, 4)
  ]
  protocol = {
    "network": "efficientnet-lite0",
    "network_sha256": "57934424",
    "num_fake": 2000,
    "num_real": 1497,
    "generator": "moving average",
    "seed": 0,
    "images_sha256": "0123456789abcdef",
    "dataset": "sklearn_digits",
    "split": "train",
    "image_size": 8,
    "filter": "lanczos, antialiased",
    "crop": "largest centred square",
  }
  scores = [
    {
      "step": 10 * i,
      "kimg": 0.5 * i,
      "scores": {"fd_efficientnet": 90.5 / i, "precision": 0.5, "recall": 0.25},
      "protocol": protocol,
      "class_agreement": {"fake": 0.5, "real": 0.9, "chance": 0.1},
    }
    for i in range(1, 4)
  ]
  return metrics, scores


def _images():
  """Returns small files of many formats and modes."""
  rgb, grey = datasets.noise(12, 16, 3), datasets.noise(12, 16)
  profile = datasets.swapped_profile()
  result = [
    datasets.encode(rgb, kind)
    for kind in "PNG JPEG WEBP BMP GIF ICO PCX PPM QOI SGI TGA TIFF".split()
  ]
  result += [datasets.encode(grey, kind) for kind in ("PNG", "JPEG", "TIFF")]
  result.append(datasets.encode(datasets.noise(12, 16, 4)))
  result.append(datasets.encode(grey.astype("uint16") * 257))
  for kind in ("PNG", "JPEG", "TIFF"):
    result.append(datasets.encode(rgb, kind, icc_profile=profile))
  exif = Image.Exif()
  exif[0x0112] = 6
  return [*result, datasets.encode(rgb, "JPEG", exif=exif)]


def make_seeds(folder):
  """Writes the files that the inputs are made of.

  Args:
    folder: pathlib.Path, not there yet.
  """
  import torch

  partial = folder.with_name("seeds.partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  config = tiny.tiny_config()
  nets = networks.build(config)
  shapes = jax.eval_shape(lambda: create_train_state(config, nets))
  mesh = partitioning.create_mesh(jax.devices()[:1])
  state = tiny.random_state(shapes, mesh, step=3)
  config_lib.claim_workdir(config, partial / "run")
  with checkpoint.create_manager(partial / "run") as manager:
    checkpoint.save(manager, state, {"next_image": 24})
  export = epath.Path(partial / "export")
  config_lib.claim_workdir(config, export)
  generator = trained.TrainedGenerator(config, [], 3, state.g_ema_variables)
  trained.save(export, generator, "float32")
  files.write_checksums(export, list(export.iterdir()))
  (partial / "weights").mkdir()
  tensors = {"a.weight": torch.ones(3, 2).T, "b.step": torch.arange(4)}
  for is_zip in (False, True):
    torch.save(
      tensors,
      partial / "weights" / f"{is_zip}.pth",
      _use_new_zipfile_serialization=is_zip,
    )
  image = datasets.encode(datasets.noise(8, 8, 3))
  # Some in pages of their own, the others in several leaves of a tree.
  values = {b"key%d" % i: image * (1 + 20 * (i % 10 == 0)) for i in range(40)}
  lmdb = datasets.write_lmdb(partial / "lmdb", values) / "data.mdb"
  datasets.write_zip(
    partial / "zip_of_lmdb" / "x.zip", {"x_lmdb/data.mdb": lmdb.read_bytes()}
  )
  (partial / "zip").mkdir()
  labels = {"labels": [["a/1.png", 0], ["b/2.png", 1]]}
  members = {"a/1.png": image, "b/2.png": image, "c/3": image, "c/4": b"no"}
  datasets.write_zip(partial / "zip" / "plain.zip", members)
  datasets.write_zip(
    partial / "zip" / "odd.zip",
    {
      "../../up.png": image,
      "/root/x.png": image,
      "a\\b\\1.png": image,
      "x/../../y.png": image,
      "a.png/": image,
      "ü.png": image,
      "a/": b"",
      "dataset.json": json.dumps(labels).encode(),
    },
  )
  data = datasets.data_config(
    partial / "datasets", "folder", path=str(partial / "zip" / "plain.zip")
  )
  prepare.prepare(data).rename(partial / "prepared")
  partial.rename(folder)


# Targets.


def _config_values(configs):
  @st.composite
  def draw_values(draw):
    index = draw(st.integers(0, len(configs) - 1))
    fields = config_lib.flatten(configs[index])
    values = {}
    for _ in range(draw(st.integers(1, 3))):
      name = draw(st.sampled_from(sorted(fields)))
      kind = type(fields[name])
      values[name] = draw(
        {
          int: st.one_of(st.integers(-4, 600), st.integers()),
          float: _NUMBERS.map(float),
          str: _TEXTS,
          tuple: st.lists(_ODD, max_size=5).map(tuple),
        }.get(kind, _ODD)
      )
    return index, values

  return draw_values()


def _read_config_json(folder, content):
  (folder / "config.json").write_bytes(content)
  config_lib.load(folder)


def _read_classes(folder, content):
  (folder / "classes.json").write_bytes(content)
  assert all(isinstance(x, str) for x in config_lib.class_names(folder))


def _read_image(unused_folder, content):
  decode.is_image(io.BytesIO(content))
  try:
    image = decode.decode(content, max_pixels=2**20)
    image = decode.crop_and_resize(image, 8)
  except Exception:  # who prepares a dataset skips it, whatever the kind
    return
  assert image.shape == (8, 8, 3) and image.dtype == "uint8"


def _read_archive(path):
  archive = archives.open_archive(path)
  archives.fingerprint(path)
  archive.class_labels()
  for i in range(len(archive.names)):
    assert isinstance(archive.read(i), bytes)


def _read_zip(folder, content):
  (folder / "x.zip").write_bytes(content)
  _read_archive(folder / "x.zip")


def _read_zip_of_lmdb(folder, content):
  (folder / "x.zip").write_bytes(content)
  data = datasets.data_config(
    folder / "data", "lsun/bedroom", path=str(folder / "x.zip")
  )
  source = lsun.open_category(data)
  for _ in source.read("train", 0, source.sizes["train"]):
    pass


def _read_lmdb(folder, content):
  (folder / "data.mdb").write_bytes(content)
  _read_archive(folder)


def _read_records(folder, contents):
  for name, lines in contents.items():
    (folder / name).write_bytes(b"\n".join(lines))
  (run,) = results.find_runs([folder])
  rows = results.group([run])
  for protocol, records in results.by_protocol([run]):
    files.describe_protocol(protocol)
    for chosen in results.choose(rows, records).values():
      results.table(chosen)
  str(run.state)


def _read_page(folder, contents):
  _read_records(folder, contents)
  results.write(results.find_runs([folder]), folder / "page", "command")


def _records(config):
  config = config.to_json()
  metrics, scores = (
    st.lists(
      st.one_of(
        st.sampled_from([json.dumps(x).encode() for x in xs]), _json(xs)
      ),
      max_size=4,
    )
    for xs in _log()
  )
  return st.fixed_dictionaries(
    {
      "config.json": st.one_of(
        st.just([config.encode()]),
        st.just([config.encode()]),
        _json([json.loads(config)]).map(lambda x: [x]),
      ),
      "metrics.jsonl": metrics,
      "scores.jsonl": scores,
    }
  )


def _read_weights(folder, content):
  path = folder / "x.pth"
  path.write_bytes(content)
  for read in (torch_files.read_state_dict, efficientnet.load):
    try:
      read(path)
    except ConfigError as error:
      _check_line(error)


def targets(seeds):
  """Returns {name: Target}.

  Args:
    seeds: folder of `make_seeds`.
  """
  configs = _configs()
  as_json = [json.loads(x.to_json()) for x in configs]
  card = json.loads((seeds / "prepared" / "card.json").read_text())

  def contents(name):
    return [x.read_bytes() for x in sorted((seeds / name).iterdir())]

  def read_copy(name, read, forged=False):
    """Returns a function that reads a copy of a seed with some changes."""

    def read_changed(folder, changes):
      copied = shutil.copytree(seeds / name, folder / name)
      _write(copied, changes)
      if forged:
        for path in copied.rglob(files.CHECKSUMS):
          others = [x for x in path.parent.rglob("*") if x.is_file()]
          files.write_checksums(path.parent, [x for x in others if x != path])
      read(epath.Path(copied))

    return read_changed

  def read_prepared(folder):
    prepare.summary(folder)
    images = pipeline.PreparedImages(folder)
    images[:4]
    assert len(images.fingerprint) == 64
    if "classes" in images.card:
      images.labels()
    prepare.verify(folder)

  def read_card(folder, content):
    read_copy("prepared", read_prepared)(folder, {"card.json": content})

  def read_values(unused_folder, values):
    index, values = values
    config = configs[index].copy_and_resolve_references()
    try:
      config.update_from_flattened_dict(values)
    except (TypeError, ValueError):  # of ml_collections, as of a flag
      return
    config_lib.validate(config)
    config_lib.total_steps(config)

  of_run = _of_folder(seeds / "run")
  of_export = _of_folder(seeds / "export")
  return {
    "config": Target(10, _config_values(configs), read_values),
    "config_json": Target(10, _json(as_json), _read_config_json),
    "classes": Target(10, _json([["a", "b"]]), _read_classes),
    "records": Target(10, _records(configs[0]), _read_records),
    "page": Target(0.1, _records(configs[0]), _read_page),
    "card": Target(7, _json([card]), read_card),
    "prepared": Target(
      3, _of_folder(seeds / "prepared"), read_copy("prepared", read_prepared)
    ),
    "image": Target(20, _bytes(_images()), _read_image),
    "zip": Target(10, _bytes(contents("zip")), _read_zip),
    "zip_of_lmdb": Target(
      1, _bytes(contents("zip_of_lmdb")), _read_zip_of_lmdb
    ),
    "lmdb": Target(5, _bytes(contents("lmdb")), _read_lmdb),
    "weights": Target(15, _bytes(contents("weights")), _read_weights),
    "checkpoint": Target(3, of_run, read_copy("run", checkpoint.whole_steps)),
    "checkpoint_forged": Target(
      0.2, of_run, read_copy("run", checkpoint.load_run, forged=True)
    ),
    "export": Target(1, of_export, read_copy("export", trained.load)),
    "export_forged": Target(
      0.3, of_export, read_copy("export", trained.load, forged=True)
    ),
  }


# The harness.


class HangError(BaseException):
  """An input took too long."""


def _hang(*unused):
  raise HangError(f"no end in {_HANG_SECONDS} s")


def _check_line(error):
  if "\n" in str(error):
    raise AssertionError(f"a message of several lines: {error}") from error


def problem(target, base, value):
  """Has a target read an input; returns what is a finding about it, or "".

  Args:
    target: Target.
    base: an empty folder, in which what it writes beside its own is seen.
    value: the input.
  """
  folder = base / "a" / "in"
  folder.mkdir(parents=True)
  files.tell.cache_clear()
  faulthandler.dump_traceback_later(_WAIT_SECONDS, exit=True)
  signal.setitimer(signal.ITIMER_PROF, _HANG_SECONDS)
  try:
    try:
      target.read(folder, value)
    except ConfigError as error:
      _check_line(error)
    found = [x.name for x in (*base.iterdir(), *folder.parent.iterdir())]
    return "" if found == ["a", "in"] else f"written beside it: {found}"
  except KeyboardInterrupt:
    raise
  except BaseException as error:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [x for x in frames if f"{os.sep}vitgan_jax{os.sep}" in x.filename]
    place = (ours or frames)[-1]
    name = pathlib.Path(place.filename).name
    text = " ".join(str(error).split())[:200]
    return f"{name}: {place.name}: {type(error).__name__}: {text}"
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    faulthandler.cancel_dump_traceback_later()
    shutil.rmtree(base / "a", ignore_errors=True)


def kind_of(text):
  """Returns what a finding shares with others: its place and its type."""
  return ": ".join(text.split(": ")[:3])


def run_batch(target, count, seed, current):
  """Gives a target inputs.

  Args:
    target: Target.
    count: how many; fewer after _BATCH_SECONDS.
    seed: of hypothesis.
    current: path for the input that is being read, should it kill the process.

  Returns:
    (how many they were, {kind: (what was found, the first input of it)}).
  """
  done, found, begun = 0, {}, time.process_time()
  signal.signal(signal.SIGPROF, _hang)

  @hypothesis.seed(seed)
  @hypothesis.settings(
    max_examples=count,
    database=None,
    deadline=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(target.inputs)
  def give(value):
    nonlocal done
    if time.process_time() - begun > _BATCH_SECONDS:
      return
    current.write_bytes(pickle.dumps(value))
    if text := problem(target, base, value):
      found.setdefault(kind_of(text), (text, value))
    done += 1

  with tempfile.TemporaryDirectory() as name:
    base = pathlib.Path(name)
    with contextlib.chdir(base):
      give()
  current.unlink(missing_ok=True)
  return done, found


class Harness:
  """The inputs and findings of an output folder."""

  def __init__(self, output, only=None):
    """Reads what is there.

    Args:
      output: pathlib.Path.
      only: name of the one target; None is all.
    """
    self._output = output.absolute()
    self._path = self._output / "fuzz.jsonl"
    (self._output / "findings").mkdir(parents=True, exist_ok=True)
    self._seeds = self._output / "seeds"
    # Whatever a config says of it.
    programs = self._output / "programs"
    jax.config.update("jax_compilation_cache_dir", str(programs))
    if not self._seeds.exists() and self._in_child(make_seeds, self._seeds):
      raise RuntimeError(
        f"no seeds can be made, see {self._output / 'log.txt'}"
      )
    self.targets = targets(self._seeds)
    if only is not None and only not in self.targets:
      raise ConfigError(
        f"--target={only} must be one of {', '.join(self.targets)}"
      )
    if only is not None:
      self.targets = {only: self.targets[only]}
    self.done, self.findings = collections.Counter(), collections.Counter()
    self._read()

  def _read(self):
    self.done.clear()
    self.findings.clear()
    for line in files.read_records(self._path, {"target": str}):
      if line["target"] in self.targets:
        self.done[line["target"]] += line["inputs"]
        self.findings.update(f"{line['target']}: {x}" for x in line["findings"])

  def run(self, count):
    """Gives inputs until they are `count`, those before among them."""
    shares = sum(x.share for x in self.targets.values())
    wanted = {
      name: max(1, round(count * target.share / shares))
      for name, target in self.targets.items()
    }
    begun, before = time.monotonic(), self.done.total()
    while True:
      left = {x: n - self.done[x] for x, n in wanted.items()}
      name = max(left, key=lambda x: left[x] / wanted[x])
      if left[name] <= 0:
        return
      self._give(name, min(_BATCH, left[name]))
      self._read()
      done, total = self.done.total(), sum(wanted.values())
      rate = (done - before) / (time.monotonic() - begun)
      eta = round((total - done) / rate) if rate else 0
      print(
        f"{done}/{total} inputs  {rate:.1f}/s  "
        f"ETA {datetime.timedelta(seconds=eta)}  "
        f"{len(self.findings)} findings  {name}",
        flush=True,
      )

  def _give(self, name, count):
    """Gives a target a batch, in a child, and notes what came of it."""
    current = self._output / f"{name}.current"
    done = self.done[name]

    def batch():
      number, found = run_batch(
        self.targets[name],
        count,
        zlib.crc32(f"{name} {done}".encode()),
        current,
      )
      for text, value in found.values():
        self._keep(name, text, pickle.dumps(value))
      line = {"target": name, "inputs": number, "findings": [*found]}
      files.append_record(self._path, line)

    if code := self._in_child(batch):
      if not current.exists():
        raise RuntimeError(f"{name} ends with {code} outside of an input")
      text = f"the process died with {code}"
      self._keep(name, text, current.read_bytes())
      current.unlink()
      line = {"target": name, "inputs": 1, "findings": [text]}
      files.append_record(self._path, line)

  def _keep(self, name, text, pickled):
    kind = zlib.crc32(kind_of(text).encode())
    path = self._output / "findings" / f"{name}-{kind:08x}.pickle"
    if not path.exists():
      path.write_bytes(pickled)
      path.with_suffix(".txt").write_text(text + "\n")

  def _in_child(self, function, *arguments):
    """Calls a function in a child; returns the code that it ended with."""
    sys.stdout.flush()
    if child := os.fork():
      try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
      except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    code = 1
    try:
      limit = resource.getrlimit(resource.RLIMIT_AS)[1]
      resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, limit))
      log = os.open(
        self._output / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC
      )
      os.dup2(log, 1)
      os.dup2(log, 2)
      function(*arguments)
      code = 0
    except BaseException:
      traceback.print_exc()
    finally:
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)

  def __str__(self):
    """Says how many inputs each target got, and what was found."""
    lines = [f"{name:<18}{self.done[name]:>9,}" for name in self.targets]
    lines += [f"{n} x {text}" for text, n in sorted(self.findings.items())]
    return "\n".join(lines)


def main(arguments):
  """Fuzzes, and says what came of it."""
  cli.no_arguments(arguments)
  output = pathlib.Path(flags.FLAGS.output)
  with files.hold(output, "--output"):
    harness = Harness(output, flags.FLAGS.target)
    harness.run(flags.FLAGS.count)
  print(harness)
  print(f"{harness.done.total():,} inputs, {len(harness.findings)} findings")
  if harness.findings:
    cli.fail(f"see {output / 'findings'}", cli.EXIT_FAILED)


if __name__ == "__main__":
  flags.DEFINE_integer(
    "count", 100_000, "Inputs, those in --output among them."
  )
  cli.define_path("output", "runs/fuzz", "Folder of what was found.")
  flags.DEFINE_string("target", None, "One of them alone, by its name.")
  cli.run(main)
