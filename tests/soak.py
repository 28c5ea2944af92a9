r"""Trains the digits for hours, and looks whether it takes ever more.

  make soak
  python -m tests.soak --hours=2 --output=runs/soak

Memory, open files and threads of the process are noted every 10 s, and what it
compiles; checkpoints, samples and scores come every few minutes. All until the
second scores, and a third of the time at least, counts as a start. Of the rest,
the line that fits memory best has a slope, in MB an hour; nothing must be
compiled; and open files and threads must end where they began. soak.jsonl in
--output has all of it, for a plot.
"""

import datetime
import os
import pathlib
import signal
import subprocess
import sys
import time

from absl import flags
import numpy as np

from vitgan_jax import cli, files

ROOT = pathlib.Path(__file__).parent.parent
SECONDS = 10.0  # from one look to the next
_START_SCORES = 2  # until then, things happen for the first time
_COMPILED = "Finished XLA compilation"  # what JAX says of each program


def command(output):
  """Returns the command line of a run that has no end of its own."""
  return [
    *(sys.executable, "-m", "vitgan_jax.main"),
    f"--config={ROOT / 'configs' / 'digits.py'}",
    f"--workdir={output / 'run'}",
    "--config.total_kimg=1e6",
    "--config.log_every_kimg=2",
    "--config.checkpoint_every_kimg=8",
    "--config.sample_every_kimg=8",
    "--config.evaluation.every_kimg=32",
    "--config.evaluation.num_samples=1281",
    # Programs that are read from a cache are not compiled.
    "--config.compilation_cache=",
    "--verbosity=-1",  # JAX tells of them as of warnings
  ]


def look(pid, log, scores):
  """Returns what a process takes: memory in MB, open files, threads, programs.

  Args:
    pid: of the process.
    log: path of what it printed.
    scores: path of its scores, which need not be there yet; counted, too.
  """
  status = pathlib.Path(f"/proc/{pid}/status").read_text()
  fields = dict(line.split(":", 1) for line in status.splitlines())
  return {
    "memory": int(fields["VmRSS"].split()[0]) / 1024,
    "files": len(os.listdir(f"/proc/{pid}/fd")),
    "threads": int(fields["Threads"]),
    "programs": log.read_text(errors="replace").count(_COMPILED),
    "scores": len(scores.read_text().splitlines()) if scores.exists() else 0,
  }


def summary(records):
  """Returns what the records of all but the start come to.

  Args:
    records: of `look`, each with its "seconds".

  Raises:
    ValueError: there were no second scores.

  Returns:
    {"hours", "memory", "memory_slope" in MB an hour, "files", "threads": (at
    first, at last) as medians of a tenth of the time, "programs": compiled}.
  """
  third = max((x["seconds"] for x in records), default=0.0) / 3
  records = [
    x for x in records if x["seconds"] >= third and x["scores"] >= _START_SCORES
  ]
  if not records:
    raise ValueError(f"not scored {_START_SCORES} times; give it more --hours")
  columns = {
    name: np.array([x[name] for x in records])
    for name in ("seconds", "memory", "files", "threads", "programs")
  }
  part = max(1, len(records) // 10)

  def ends(name):
    values = columns[name]
    return float(np.median(values[:part])), float(np.median(values[-part:]))

  slope, _ = np.polyfit(columns["seconds"] / 3600, columns["memory"], 1)
  programs = columns["programs"]
  return {
    "hours": float(np.ptp(columns["seconds"]) / 3600),
    "memory": ends("memory"),
    "memory_slope": float(slope),
    "files": ends("files"),
    "threads": ends("threads"),
    "programs": int(programs[-1] - programs[0]),
  }


def soak(hours, output):
  """Trains for so long; returns the records, and the process's exit code."""
  log, records = output / "log.txt", []
  scores = output / "run" / "scores.jsonl"
  begin = time.monotonic()
  env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_LOG_COMPILES": "1"}
  with (
    open(log, "w") as file,
    subprocess.Popen(
      command(output), env=env, stdout=file, stderr=subprocess.STDOUT
    ) as process,
  ):
    try:
      while (seconds := time.monotonic() - begin) < 3600 * hours:
        time.sleep(SECONDS)
        if process.poll() is not None:
          break
        record = {"seconds": seconds, **look(process.pid, log, scores)}
        files.append_record(output / "soak.jsonl", record)
        records.append(record)
        if len(records) % 30 == 0:
          left = datetime.timedelta(seconds=round(3600 * hours - seconds))
          print(f"ETA {left}  {record}", flush=True)
    finally:
      process.terminate()
  return records, process.returncode


def main(arguments):
  """Trains, and says what it took."""
  cli.no_arguments(arguments)
  signal.signal(signal.SIGTERM, lambda *unused: sys.exit(cli.EXIT_FAILED))
  output = pathlib.Path(flags.FLAGS.output).absolute()
  files.check_new(output)
  output.mkdir(parents=True, exist_ok=True)
  records, code = soak(flags.FLAGS.hours, output)
  if code != cli.EXIT_STOPPED:
    cli.fail(f"it ended with {code}: see {output}/log.txt", cli.EXIT_FAILED)
  try:
    taken = summary(records)
  except ValueError as error:
    cli.fail(str(error), cli.EXIT_FAILED)
  for name, value in taken.items():
    print(f"{name}: {value}")


if __name__ == "__main__":
  flags.DEFINE_float("hours", 2.0, "How long.", lower_bound=0.0)
  cli.define_path("output", "runs/soak", "New folder of what was seen.")
  cli.run(main)
