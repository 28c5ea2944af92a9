r"""Runs one config, or a sweep, on the machine at hand.

  python -m launch.local --config=configs/digits.py
  python -m launch.local --config=configs/digits.py \
    --sweep=configs/sweeps/seeds.py --jobs=2

Each work unit is a process with a folder of its own; what it prints is in
log.txt there. One that dies is started again and goes on from its last
checkpoint, unless its exit code says that it would end so again. GPUs are
shared out among the jobs.

Watch: the table, or `tail -f runs/digits-seeds/*/log.txt`, or
`tensorboard --logdir=runs/digits-seeds`. Stop: Ctrl-C, upon which each unit
saves; the same command goes on from there. Delete: the folder.
"""

import os
import pathlib
import signal
import subprocess
import sys
import time

from absl import flags
from rich.console import Console
from rich.live import Live
from rich.text import Text

from launch import units
from vitgan_jax import cli, files
from vitgan_jax.errors import ConfigError

# Of Linux's C library, read when a process starts: a gain on CPUs.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_POLL_SECONDS = 0.5
_STYLES = {"running": "cyan", "done": "green", "failed": "red"}


class _Job:
  """A work unit, and its process while it has one."""

  def __init__(self, unit):
    self.unit = unit
    self.state = "waiting"  # then running, and done, failed or stopped
    self.starts = 0
    self.slot = None  # which of the --jobs it is
    self._seconds = 0.0
    self._process = None

  @property
  def log(self):
    return pathlib.Path(self.unit.workdir) / "log.txt"

  def start(self, slot, variables):
    """Starts the process, which goes on from its last checkpoint."""
    self.log.parent.mkdir(parents=True, exist_ok=True)
    with self.log.open("ab") as log:
      self._process = subprocess.Popen(
        [sys.executable, "-m", "vitgan_jax.main", *self.unit.arguments],
        env={**_HUGE_PAGES, **os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        # Ctrl-C is for this process, which passes it on.
        start_new_session=True,
      )
    self.state = "running"
    self.starts += 1
    self.slot = slot
    self._begin = time.monotonic()

  def poll(self, restarts, stopping):
    """Sees whether the process has ended, and how."""
    if self.state != "running" or self._process.poll() is None:
      return
    self._seconds = self.seconds
    if stopping:
      self.state = "stopped"
    elif self._process.returncode == 0:
      self.state = "done"
    elif self.starts <= restarts and self._process.returncode != cli.EXIT_FINAL:
      self.state = "waiting"
    else:
      self.state = "failed"

  def signal(self, signum):
    """Sends a signal to the process, if there is one."""
    if self.state == "running":
      self._process.send_signal(signum)

  @property
  def seconds(self):
    """How long it has run, all its starts together."""
    if self.state != "running":
      return self._seconds
    return self._seconds + time.monotonic() - self._begin

  @property
  def last_line(self):
    """What the unit printed last; "" if nothing."""
    if not self.starts:
      return ""
    with self.log.open("rb") as file:
      file.seek(max(0, os.path.getsize(self.log) - 4096))
      lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in lines[::-1] if line.strip()), "")


def run(jobs, num_slots, restarts, console):
  """Runs jobs to their end, and shows them in a table.

  Args:
    jobs: `_Job`s, all of them waiting.
    num_slots: how many may run at the same time.
    restarts: how often one that dies is started again.
    console: of rich, to show the table on.
  """
  slots = _slots(num_slots)
  with _Stop(jobs) as stop, Live(console=console, auto_refresh=False) as live:
    states = None
    while True:
      for job in jobs:
        job.poll(restarts, stop.requested)
      free = set(range(num_slots)) - {
        job.slot for job in jobs if job.state == "running"
      }
      for job in jobs:
        if job.state == "waiting" and free and not stop.requested:
          slot = min(free)
          free.remove(slot)
          job.start(slot, slots[slot])
      new_states = [(job.state, job.starts) for job in jobs]
      if not console.is_terminal and new_states != states:
        # A file has no picture that moves, and no width.
        console.print(_table(jobs), soft_wrap=True)
      states = new_states
      live.update(_table(jobs) if console.is_terminal else "", refresh=True)
      if not any(job.state == "running" for job in jobs):
        return
      time.sleep(_POLL_SECONDS)


def _table(jobs):
  """Returns the table, of which a narrow terminal cuts the last column."""
  rows = [("work unit", "state", "starts", "time", "last line")]
  for job in jobs:
    minutes, seconds = divmod(int(job.seconds), 60)
    clock = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    rows.append(
      (job.unit.name, job.state, str(job.starts), clock, job.last_line)
    )
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = []
  for name, state, *others in rows:
    style = _STYLES.get(state, "dim")
    cells = [name.ljust(widths[0]), (state.ljust(widths[1]), style)]
    cells += map(str.ljust, others[:-1], widths[2:])
    cells.append(others[-1])
    lines.append(Text("  ").join(map(Text.assemble, cells)))
  return Text("\n", no_wrap=True, overflow="ellipsis").join(lines)


def _slots(count):
  """Returns the environment of each job that runs at the same time.

  Raises:
    ConfigError: if there are GPUs, but fewer than jobs: JAX takes a GPU whole.
  """
  gpus = _gpus()
  if count == 1 or not gpus:
    return [{}] * count
  if len(gpus) < count:
    raise ConfigError(
      f"--jobs={count} must be at most the {len(gpus)} GPUs of this machine"
    )
  return [
    {"CUDA_VISIBLE_DEVICES": ",".join(gpus[i::count])} for i in range(count)
  ]


def _gpus():
  """Returns the names of the GPUs that may be used."""
  if "CUDA_VISIBLE_DEVICES" in os.environ:
    return [g for g in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if g]
  try:
    listed = subprocess.run(
      ["nvidia-smi", "--list-gpus"], capture_output=True, text=True
    ).stdout
  except OSError:
    return []
  return [str(i) for i in range(listed.count("GPU "))]


class _Stop:
  """Passes Ctrl-C, SIGTERM and SIGHUP on: the first saves, the second kills.

  A terminal that closes may send several SIGHUP: these kill nothing.
  """

  def __init__(self, jobs):
    self.requested = False
    self._jobs = jobs

  def _request(self, signum, unused_frame):
    final = self.requested and signum != signal.SIGHUP
    for job in self._jobs if final or not self.requested else ():
      job.signal(signal.SIGKILL if final else signal.SIGTERM)
    self.requested = True

  def __enter__(self):
    self._before = {
      signum: signal.signal(signum, self._request)
      for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
      if signal.getsignal(signum) != signal.SIG_IGN  # as nohup wants it
    }
    return self

  def __exit__(self, *unused_exception):
    for signum, handler in self._before.items():
      signal.signal(signum, handler)
    for job in self._jobs:  # after an error here, none is left behind
      job.signal(signal.SIGTERM)


def main(arguments):
  """Runs what the flags ask for; exits with 1 if a unit failed."""
  cli.no_arguments(arguments)
  work = units.from_flags()
  if flags.FLAGS["dry-run"].value:
    print("\n".join(unit.command for unit in work))
    return
  files.local(work[0].workdir, "--workdir")
  jobs = [_Job(unit) for unit in work]
  folder = os.path.commonpath([os.path.abspath(u.workdir) for u in work])
  # Of one unit it is the workdir, which the unit itself holds, too.
  with files.hold(folder, "--workdir", ".launch.lock"):
    num_slots = min(flags.FLAGS.jobs, len(jobs))
    run(jobs, num_slots, flags.FLAGS.restarts, Console())
  failed = [job for job in jobs if job.state == "failed"]
  if any(job.state in ("stopped", "waiting") for job in jobs):
    print("Stopped. The same command goes on from here.")
  elif not failed:
    print(f"Done. The runs are in {folder}")
  if failed:
    cli.fail(
      f"{len(failed)} of {len(jobs)} work units failed; see "
      + ", ".join(str(job.log) for job in failed),
      cli.EXIT_FAILED,
    )


if __name__ == "__main__":
  units.define_flags()
  flags.adopt_module_key_flags(units)  # for --help
  flags.DEFINE_integer("jobs", 1, "Work units at the same time.", lower_bound=1)
  flags.DEFINE_integer(
    "restarts", 2, "How often a unit that dies is started again.", lower_bound=0
  )
  flags.DEFINE_bool("dry-run", False, "Only print the commands.")
  cli.run(main)
