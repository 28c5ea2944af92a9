r"""Kills training at random moments, and looks at what it comes to.

  make kills
  python -m tests.kills --count=500 --output=runs/kills

A run is the command of configs/digits.py:smoke with four checkpoints, two of
which are deleted again, and a folder of datasets of its own. It is started,
killed, and started again until it comes to its end. Then the state in its last
checkpoint, grid.png, and what was logged of each step must be those of a run
that was let be, to the last bit; pictures and images must read as whole; and
nothing must be left under the name of something unfinished. The first run that
is otherwise ends all, and its folder stays.

A third of the moments are drawn evenly from the seconds of the processor that a
whole run takes, as those of the clock depend on what else the machine does;
others are when some file of the run has changed, for the nth time. A kill
counts if the process died of it.

The rest is by torn.c, where there is a C compiler: within the nth write to a
file, of which half is done. In one of four cases the process is not killed;
the disk is full from there on, and the run has to end with a line that says so,
and to come to the same end when there is room again. These count by themselves.

Every 20th run is scored by EfficientNet at its end, which takes longer than all
the rest. These share the folder of datasets, and so the features of the real
images.

What is in --output counts: a harness that was stopped goes on.
"""

import datetime
import errno
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

from absl import flags
from PIL import Image

from vitgan_jax import cli, files

ROOT = pathlib.Path(__file__).parent.parent
PHASES = ("start", "preparation", "steps", "save", "evaluation", "end")
_FULL = os.strerror(errno.ENOSPC)
_SCORED_EVERY = 20  # runs
_POLL_SECONDS = 0.005
_UNFINISHED = re.compile(r"partial|\.tmp|orbax-checkpoint-tmp")


def _command(folder, scored):
  """Returns the command line of a run in a folder."""
  output = folder.parent
  data_dir = output / "scored-datasets" if scored else folder / "datasets"
  every_kimg = 0.064 if scored else 0.0  # at the end
  return [
    *(sys.executable, "-m", "vitgan_jax.main"),
    f"--config={ROOT / 'configs' / 'digits.py'}:smoke",
    f"--workdir={folder / 'run'}",
    f"--config.data.data_dir={data_dir}",
    f"--config.compilation_cache={output / 'programs'}",
    "--config.checkpoint_every_kimg=0.016",
    "--config.keep_checkpoints=2",
    "--config.loss.bcr_weight=0",  # compiles in half of the time
    f"--config.evaluation.every_kimg={every_kimg}",
    "--config.evaluation.num_samples=1281",
  ]


def _look(*folders):
  """Returns {path: (time of its last change, size)} of what is in folders."""
  found, waiting = {}, [*folders]
  while waiting:
    try:
      with os.scandir(waiting.pop()) as entries:
        for entry in entries:
          state = entry.stat(follow_symlinks=False)
          found[entry.path] = state.st_mtime_ns, state.st_size
          if entry.is_dir(follow_symlinks=False):
            waiting.append(entry.path)
    except OSError:  # deleted meanwhile, or not made yet
      pass
  return found


def _never(process):
  return False


class _Process:
  """A started command.

  Attributes:
    seconds: of the processor that it has taken.
    changes: how often its files were seen to have changed.
    writes: how many, where they are counted.
    code: that it ended with; negative is the signal that killed it.
    phase: in which that was, one of PHASES.
  """

  def __init__(self, folder, scored, env, until=_never):
    """Waits for the end, or kills it when `until(self)` is true.

    Args:
      folder: of the run.
      scored: whether it is, at its end.
      env: variables of its environment, beside those here.
      until: of `self`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counter = folder.parent / "writes"
    counter.write_bytes(bytes(8))
    self.seconds, self.changes = 0.0, 0
    places = folder, folder.parent / "scored-datasets"
    self._before = _look(*places)
    last = self._before
    with (
      open(log_of(folder), "w") as log,
      subprocess.Popen(
        _command(folder, scored),
        cwd=folder,
        env={
          **os.environ,
          "JAX_NUM_CPU_DEVICES": "1",
          "PYTHONPATH": str(ROOT),
          "TORN_ROOT": f"{folder}/",
          "TORN_COUNTER": str(counter),
          **env,
        },
        stdout=log,
        stderr=subprocess.STDOUT,
      ) as process,
    ):
      try:
        while process.poll() is None and not until(self):
          time.sleep(_POLL_SECONDS)
          self._see(process)
          found = _look(*places)
          self.changes += found != last
          last = found
      finally:
        process.kill()  # nothing, if it has ended
    self.code = process.returncode
    self.log = log_of(folder).read_text(errors="replace")
    self.writes = int.from_bytes(counter.read_bytes(), sys.byteorder)
    self.phase = self._phase(_look(*places))

  def _see(self, process):
    try:
      # The clock of a process's processor time, as Linux numbers it.
      self.seconds = time.clock_gettime((~process.pid << 3) | 2)
    except OSError:  # it has ended
      pass

  def _phase(self, found):
    """Returns where it ended, by its log and the files that it wrote."""
    new = [path for path in found if found[path] != self._before.get(path)]
    if "Done." in self.log:
      return "end"
    if not re.search("Starting:|Resuming at", self.log):
      return "preparation" if any("datasets" in x for x in new) else "start"
    if any("checkpoint-tmp" in path for path in new):
      return "save"
    return "evaluation" if "Features of" in self.log else "steps"


def log_of(folder):
  """Returns the path of what the last process of a run's folder printed."""
  return folder.with_suffix(".txt")


def state_hash(workdir):
  """Returns a hash of all leaves of a workdir's last checkpoint, and its step.

  Raises:
    ConfigError: if it cannot be read.
  """
  import jax

  from tests import tiny
  from vitgan_jax import checkpoint

  state = checkpoint.load_run(workdir, jax.devices()[:1]).state
  result = hashlib.sha256()
  for name, leaf in tiny.leaves_by_name(tiny.to_host(state)).items():
    result.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
    result.update(leaf.tobytes())
  return f"{result.hexdigest()} of step {int(state.step)}"


def outcome(folder):
  """Returns what a run must come to alike, however it came to its end."""
  from vitgan_jax import evaluate

  workdir = folder / "run"
  log = {}
  for line in files.read_records(workdir / "metrics.jsonl", files.METRICS):
    line.pop("images_per_sec", None)
    log.setdefault(str(line["step"]), {}).update(line)
  found = {
    "grid": (workdir / "grid.png").read_bytes().hex(),
    "log": log,
    "scores": [
      (x["step"], x["scores"]) for x in evaluate.read_records(workdir)
    ],
  }
  return {"state": state_hash(workdir)} | {
    key: hashlib.sha256(json.dumps(x, sort_keys=True).encode()).hexdigest()
    for key, x in found.items()
  }


def fault_of(folder, expected):
  """Returns what is wrong with a finished run, or "".

  Args:
    folder: with the workdir and, if it is not scored, its datasets.
    expected: `outcome` of one that was let be.
  """
  from vitgan_jax import results
  from vitgan_jax.data import prepare

  try:
    found = outcome(folder)
    for key, value in expected.items():
      if found[key] != value:
        return f"{key} is {found[key]}, not {value}"
    for path in folder.rglob("*"):
      if _UNFINISHED.search(path.name):
        return f"{path} is left"
      if path.suffix == ".png":
        with Image.open(path) as image:
          image.load()
    for path in folder.glob("datasets/vitgan_jax/sklearn_digits-*"):
      prepare.verify(path)
    run = results.read_run(folder / "run")
    if run.state not in ("", "not scored"):
      return f"it {run.state}"
    if run.records:
      state_hash(folder / "run" / "best")
  except Exception as error:  # whatever a reader raises
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
  return ""


class Harness:
  """The kills and runs of an output folder."""

  def __init__(self, output):
    """Reads what is there.

    Args:
      output: pathlib.Path.
    """
    self._output = output.absolute()
    self._path = self._output / "kills.jsonl"
    self._output.mkdir(parents=True, exist_ok=True)
    self._lines = files.read_records(self._path)
    shim = _compile_shim(self._output)
    self._shim_env = {"LD_PRELOAD": str(shim)} if shim else {}

  @property
  def kills(self):
    """{phase: how many}."""
    phases = [x["phase"] for x in self._lines if "phase" in x]
    return {x: phases.count(x) for x in PHASES if x in phases}

  @property
  def runs(self):
    """How many were killed and came to a right end."""
    return sum("run" in x for x in self._lines)

  def run(self, count):
    """Kills until there were `count`; returns what is wrong, or "".

    Args:
      count: of kills, those of earlier calls among them. The run that the last
        one hits comes to its end, too.
    """
    begun, before = time.monotonic(), sum(self.kills.values())
    while True:
      folder = self._output / f"run{self.runs}"
      scored = self.runs % _SCORED_EVERY == _SCORED_EVERY - 1
      whole = self._whole(scored)
      num_kills = sum(self.kills.values())
      if num_kills >= count and not folder.exists():
        return ""
      moment, until, env = self._moment(whole, num_kills < count)
      process = _Process(folder, scored, self._shim_env | env, until)
      full = "TORN_ERRNO" in env and process.writes >= moment["write"]
      if process.code == -signal.SIGKILL:
        self._add({"phase": process.phase, **moment})
      elif full and _FULL not in process.log:
        return f"{folder}: it does not say that the disk is full"
      elif full and process.code in (0, cli.EXIT_FINAL):
        self._add({"full": process.phase, **moment})
      elif process.code:
        return f"{folder}: it ended with {process.code}, see {log_of(folder)}"
      elif fault := fault_of(folder, whole["outcome"]):
        return f"{folder}: {fault}"
      else:
        self._add({"run": self.runs, "scored": scored})
        shutil.rmtree(folder)
        log_of(folder).unlink()
      num_kills = sum(self.kills.values())
      rate = (num_kills - before) / (time.monotonic() - begun)
      eta = round((count - num_kills) / rate) if rate else 0
      print(
        f"{num_kills}/{count} kills  {rate * 60:.1f}/min  "
        f"ETA {datetime.timedelta(seconds=max(0, eta))}  {self}",
        flush=True,
      )

  def __str__(self):
    """Says how many kills were in which phases, and how many runs."""
    phases = ", ".join(f"{k} {v}" for k, v in self.kills.items())
    torn = sum("write" in x and "phase" in x for x in self._lines)
    full = sum("full" in x for x in self._lines)
    return (
      f"{self.runs} runs came to the same end; killed at: {phases}; "
      f"{torn} within a write; {full} times the disk was full"
    )

  def _add(self, line):
    files.append_record(self._path, line)
    self._lines.append(line)

  def _whole(self, scored):
    """Returns the record of the run that is let be, made if there is none."""
    known = [x for x in self._lines if x.get("whole") == scored]
    if known:
      return known[0]
    folder = self._output / "whole"
    # The first one compiles, which no other does.
    for _ in range(1 if self._lines else 2):
      shutil.rmtree(folder, ignore_errors=True)
      process = _Process(folder, scored, self._shim_env)
      if process.code:
        raise RuntimeError(f"a run that is let be fails: {process.log}")
    self._add(
      {
        "whole": scored,
        "seconds": process.seconds,
        "changes": process.changes,
        "writes": process.writes,
        "outcome": outcome(folder),
      }
    )
    return self._lines[-1]

  def _moment(self, whole, wanted):
    """Draws when to end a process.

    Args:
      whole: record of a run that was let be.
      wanted: whether it is to be ended at all.

    Returns:
      A record, a function of _Process that says when to kill it, and
      variables of its environment.
    """
    if not wanted:
      return {}, _never, {}
    # The same after a restart, and another after each kill and each run.
    rng = random.Random(len(self._lines))
    kinds = ["seconds", "changes", "write"]
    kind = rng.choice(kinds if self._shim_env else kinds[:-1])
    if kind == "seconds":
      seconds = rng.uniform(0, whole["seconds"])
      return {kind: round(seconds, 3)}, lambda x: x.seconds >= seconds, {}
    if kind == "changes":
      changes = rng.randint(1, whole["changes"])
      return {kind: changes}, lambda x: x.changes >= changes, {}
    write = rng.randint(1, whole["writes"])
    env = {"TORN_AT": str(write)}
    if rng.random() < 0.25:
      env["TORN_ERRNO"] = str(errno.ENOSPC)
    return {kind: write}, _never, env


def _compile_shim(output):
  """Returns the path of torn.c, compiled; None without a C compiler."""
  if (compiler := shutil.which("cc")) is None:
    return None
  shim = output / "torn.so"
  source = pathlib.Path(__file__).with_name("torn.c")
  subprocess.run(
    [compiler, "-O1", "-Wall", "-shared", "-fPIC", source, "-o", shim, "-ldl"],
    check=True,
  )
  return shim


def main(arguments):
  """Kills, and says what came of it."""
  cli.no_arguments(arguments)
  signal.signal(signal.SIGTERM, lambda *unused: sys.exit(cli.EXIT_FAILED))
  output = pathlib.Path(flags.FLAGS.output)
  with files.hold(output, "--output"):
    harness = Harness(output)
    fault = harness.run(flags.FLAGS.count)
  print(f"{sum(harness.kills.values())} kills: {harness}")
  if fault:
    cli.fail(fault, cli.EXIT_FAILED)


if __name__ == "__main__":
  flags.DEFINE_integer("count", 500, "Kills, those in --output among them.")
  cli.define_path("output", "runs/kills", "Folder of what was found.")
  cli.run(main)
