import dataclasses
import io
import json
import os
import re
import signal
import subprocess
from unittest import mock

import pytest
from rich.console import Console

from launch import local, units
from tests import runs
from vitgan_jax.errors import ConfigError


class Fake:
  """A command in place of vitgan_jax.main, which runs what it is given."""

  def __init__(self, folder, monkeypatch):
    self._folder = folder
    package = folder / "vitgan_jax"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "main.py").write_text("import sys; exec(sys.argv[1])")
    monkeypatch.chdir(folder)

  def jobs(self, *programs):
    return [
      local._Job(units.Unit(f"unit{i}", str(self._folder / f"{i}"), (program,)))
      for i, program in enumerate(programs)
    ]


@pytest.fixture
def fake(tmp_path, monkeypatch):
  monkeypatch.setattr(local, "_POLL_SECONDS", 0.02)
  return Fake(tmp_path, monkeypatch)


def run(jobs, num_slots=2, restarts=2):
  with open(os.devnull, "w") as file:
    local.run(jobs, num_slots, restarts, Console(file=file))
  return [job.state for job in jobs]


def test_all_units_run_and_their_words_are_in_their_logs(fake):
  jobs = fake.jobs(*[f"print('this is {i}')" for i in range(5)])
  assert run(jobs) == ["done"] * 5
  assert [job.log.read_text() for job in jobs] == [
    f"this is {i}\n" for i in range(5)
  ]


def test_no_more_run_at_the_same_time_than_were_asked_for(fake):
  clock = (
    "import time; a = time.monotonic(); time.sleep(.3); "
    "print(a, time.monotonic())"
  )
  jobs = fake.jobs(*[clock] * 5)
  run(jobs, num_slots=2)
  spans = [tuple(map(float, job.last_line.split())) for job in jobs]
  together = [
    sum(other[0] <= begin < other[1] for other in spans) for begin, _ in spans
  ]
  assert max(together) == 2


def test_one_that_dies_is_started_again_and_one_that_would_again_is_not(fake):
  dies_once = (
    "import os, signal; print('try', flush=True);"
    "os.path.exists('died') or (open('died', 'w'), os.kill(os.getpid(), 9))"
  )
  jobs = fake.jobs(
    dies_once,
    "raise SystemExit('error: no answer')",
    "print('error: seed is bad'); raise SystemExit(78)",
  )
  assert run(jobs, num_slots=1) == ["done", "failed", "failed"]
  assert [job.starts for job in jobs] == [2, 3, 1]
  assert jobs[0].log.read_text() == "try\n" * 2
  assert jobs[2].last_line == "error: seed is bad"


@pytest.mark.parametrize("given", [None, "", "glibc.malloc.check=0"])
def test_units_have_huge_pages_unless_the_user_says_otherwise(
  given, fake, monkeypatch
):
  monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
  if given is not None:
    monkeypatch.setenv("GLIBC_TUNABLES", given)
  (job,) = jobs = fake.jobs("import os; print(os.environ['GLIBC_TUNABLES'])")
  run(jobs)
  expected = "glibc.malloc.hugetlb=1" if given is None else given
  assert job.last_line == expected


def test_gpus_are_shared_out_among_the_jobs():
  # On a machine of five: JAX would take all of each that it sees.
  listed = mock.Mock(stdout="".join(f"GPU {i}: H100\n" for i in range(5)))
  with (
    mock.patch.dict(os.environ),
    mock.patch.object(local.subprocess, "run", return_value=listed),
  ):
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    slots = [slot["CUDA_VISIBLE_DEVICES"] for slot in local._slots(2)]
    assert slots == ["0,2,4", "1,3"]
    assert local._slots(1) == [{}]
    with pytest.raises(ConfigError, match="at most the 5 GPUs"):
      local._slots(6)
    os.environ["CUDA_VISIBLE_DEVICES"] = "3,7"
    slots = [slot["CUDA_VISIBLE_DEVICES"] for slot in local._slots(2)]
    assert slots == ["3", "7"]


def start(*arguments, cwd):
  program = ("-m", "launch.local")
  return runs.start_main(
    *arguments, cwd=cwd, program=program, JAX_NUM_CPU_DEVICES="1"
  )


ARGUMENTS = (
  f"--config={runs.ROOT}/configs/digits.py:smoke",
  f"--sweep={runs.ROOT}/configs/sweeps/seeds.py",
  "--workdir=sweep",
)


def children(process):
  listed = subprocess.run(
    ["ps", "-o", "pid=", "--ppid", str(process.pid)],
    capture_output=True,
    text=True,
  )
  return [int(pid) for pid in listed.stdout.split()]


@pytest.mark.slow
def test_a_sweep_with_a_killed_unit_ends_complete(tmp_path):
  (tmp_path / "two.py").write_text(
    "def sweep(add):\n  for seed in (0, 1):\n    add({'seed': seed})"
  )
  process = start(*ARGUMENTS, "--sweep=two.py", "--jobs=2", cwd=tmp_path)
  checkpoints = tmp_path / "sweep" / "seed=0" / "checkpoints"
  runs.wait_until(lambda: list(checkpoints.glob("[0-9]*")), seconds=120)
  os.kill(min(children(process)), signal.SIGKILL)
  output, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors
  assert "Done. The runs are in" in output
  states = {
    line.split()[0]: line.split()[1:3]
    for line in output.split("\n")
    if line.startswith("seed=")
  }
  assert set(states) == {"seed=0", "seed=1"}
  assert all(state == "done" for state, _ in states.values())
  assert sum(int(starts) for _, starts in states.values()) == 3
  for i in range(2):
    folder = tmp_path / "sweep" / f"seed={i}"
    assert json.loads((folder / "config.json").read_text())["seed"] == i
    assert "Done." in (folder / "log.txt").read_text()
    assert (folder / "grid.png").exists()


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
  arguments = (*ARGUMENTS, "--jobs=2", "--config.total_kimg=1000")
  process = start(*arguments, cwd=tmp_path)
  logs = [tmp_path / "sweep" / f"seed={i}" / "log.txt" for i in (0, 1)]
  runs.wait_until(
    lambda: all(p.exists() and "ETA" in p.read_text() for p in logs),
    seconds=120,
  )
  second = start(*arguments, cwd=tmp_path)
  _, errors = second.communicate(timeout=60)
  assert (
    second.returncode == 78 and f"in use by process {process.pid}" in errors
  )
  process.send_signal(signal.SIGINT)
  output, errors = process.communicate(timeout=120)
  assert (process.returncode, errors) == (0, "")
  assert "Stopped. The same command goes on from here." in output
  for log in logs:
    assert log.read_text().endswith("The same command goes on from here.\n")
    steps = [int(p.name) for p in log.parent.glob("checkpoints/[0-9]*")]
    assert max(steps) > 0
  assert not (tmp_path / "sweep" / "seed=2").exists()
  again = start(*arguments, cwd=tmp_path)
  runs.wait_until(
    lambda: all("Resuming at step" in p.read_text() for p in logs),
    seconds=120,
  )
  again.send_signal(signal.SIGTERM)
  again.communicate(timeout=120)


def test_a_dry_run_only_prints_what_the_units_are(tmp_path):
  code, output, errors = runs.call(
    "launch.local", *ARGUMENTS, "--dry-run", cwd=tmp_path
  )
  assert (code, errors) == (0, "")
  _, listed, _ = runs.call("launch.units", *ARGUMENTS, cwd=tmp_path)
  assert output.splitlines() == [
    line.split("\t")[2] for line in listed.splitlines()
  ]
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--jobs=0"], "jobs"),
    (["--workdir=gs://bucket/x"], "must be a path of this machine"),
    (["--config.sed=1"], "sed"),
  ],
)
def test_bad_input_is_answered_in_one_line(arguments, words, tmp_path):
  assert words in runs.refusal(
    "launch.local", *ARGUMENTS, *arguments, cwd=tmp_path
  )
  assert not list(tmp_path.iterdir())


def test_failed_units_are_named_and_may_be_started_again(fake, monkeypatch):
  monkeypatch.setattr(
    units, "from_flags", lambda: [job.unit for job in fake.jobs("1 / 0", "")]
  )
  code, _, errors = runs.call("launch.local", "--restarts=0", cwd=".")
  assert code == 1
  assert errors.startswith("error: 1 of 2 work units failed; see ")
  assert errors.endswith("/0/log.txt\n")


def test_a_single_unit_can_hold_its_workdir(fake, monkeypatch):
  """The folder of all units is that of the only one."""
  jobs = fake.jobs(
    "import fcntl; file = open('0/.lock', 'a'); "
    "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)"
  )
  monkeypatch.setattr(units, "from_flags", lambda: [job.unit for job in jobs])
  code, output, errors = runs.call("launch.local", cwd=".")
  assert (code, errors) == (0, "") and "Done." in output


@pytest.mark.parametrize("is_terminal", [True, False])
def test_table_is_whole_in_80_columns(fake, is_terminal):
  (job,) = jobs = fake.jobs("print('word ' * 40)")
  job.unit = dataclasses.replace(job.unit, name="learning_rate=0.001,width=640")
  output = io.StringIO()
  console = Console(file=output, width=80, force_terminal=is_terminal)
  local.run(jobs, 1, 0, console)
  text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", output.getvalue())
  row = [x for x in text.splitlines() if x.startswith(job.unit.name)][-1]
  name, state, starts, clock, words = row.split(maxsplit=4)
  assert (name, state, starts) == (job.unit.name, "done", "1")
  assert re.fullmatch(r"0:00:\d\d", clock)
  # The last column alone is cut, and that in a terminal only.
  assert words.startswith("word word word ")
  assert (len(row) == 80) == is_terminal
  assert is_terminal or words.count("word") == 40


def test_terminal_that_closes_lets_the_units_save(heard):
  job = mock.Mock()
  with local._Stop([job]) as stop:
    for _ in range(3):
      signal.raise_signal(signal.SIGHUP)
    assert stop.requested
    job.signal.assert_called_once_with(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    job.signal.assert_called_with(signal.SIGKILL)
