import ctypes
import gc
import os
import pathlib
import shutil
import signal
import sys
import weakref

import pytest

from configs import digits
from tests import monitor_test, runs
from vitgan_jax import cli, evaluate, processes
from vitgan_jax.errors import ConfigError

DIGITS = f"--config={runs.ROOT}/configs/digits.py:smoke"

# The command line, with the tests' own feature network.
_TINY_NETWORK = """
from tests import toy_features
from vitgan_jax import cli, main
from vitgan_jax.metrics import features
features.load_network = lambda name, weights="": toy_features.tiny()
cli.run(main.main)
"""

_IMPATIENT = """
from vitgan_jax import cli, main, processes
processes._CONNECT_SECONDS = 2
cli.run(main.main)
"""


def losses(workdir):
  """Returns {step: {name: value}} of what a run logged of its losses."""
  return {
    line["step"]: {k: v for k, v in line.items() if "/" in k}
    for line in monitor_test.read_lines(workdir)
    if "loss/d" in line
  }


def assert_losses_equal(actual, expected):
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    # Sums in another order: 1e-6 in a logit, and what Adam, which divides by
    # the gradient, makes of that in a step.
    assert actual[name] == pytest.approx(value, rel=1e-4, abs=2e-5), name


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """(workdir, results) of two processes, of which the second got SIGTERM."""
  folder = tmp_path_factory.mktemp("stopped")
  started = runs.start_processes(
    2, DIGITS, "--config.total_kimg=1000", "--workdir=run", cwd=folder
  )
  for line in started[0].stdout:
    if "kimg  " in line:  # the first call is done
      started[1].send_signal(signal.SIGTERM)
      break
  return folder / "run", runs.wait_for(started)


def last_step(workdir):
  return runs.saved_steps(workdir)[-1]


def test_signal_to_one_process_stops_and_saves_all(stopped):
  workdir, ((code, output, errors), (other_code, other_output, _)) = stopped
  assert code == other_code == cli.EXIT_STOPPED, errors
  assert "Stopping: saving first" in output
  assert output.endswith("Stopped. The same command goes on from here.\n")
  # The first one speaks for all.
  assert not any(word in other_output for word in ("Total", "kimg", "Stop"))
  step = last_step(workdir)
  assert max(losses(workdir)) == step
  assert (workdir / "samples" / f"{step:08d}.png").exists()


def test_two_processes_train_as_one(stopped, digits_run):
  expected = losses(digits_run.workdir)
  assert_losses_equal(losses(stopped[0])[2], expected[2])


@pytest.mark.slow
def test_two_processes_go_on_and_score_as_one(stopped, tmp_path):
  step = last_step(stopped[0])
  kimg = (step + 2) * 8 / 1000
  for name in ("one", "two"):
    shutil.copytree(stopped[0], tmp_path / name)
  config = digits.get_config("smoke")
  config.total_kimg = kimg
  one = runs.train_quietly(config, tmp_path / "one")
  started = runs.start_processes(
    2,
    DIGITS,
    f"--config.total_kimg={kimg}",
    f"--config.evaluation.every_kimg={kimg}",
    "--config.evaluation.num_samples=1000",
    "--workdir=two",
    cwd=tmp_path,
    program=("-c", _TINY_NETWORK),
  )
  results = runs.wait_for(started)
  assert [code for code, *_ in results] == [0, 0], results
  assert f"Resuming at step {step}: " in results[0][1]
  last = step + 2
  assert last_step(one.workdir) == last_step(tmp_path / "two") == last
  assert_losses_equal(losses(tmp_path / "two")[last], losses(one.workdir)[last])
  (record,) = evaluate.read_records(tmp_path / "two")
  assert record["step"] == last and record["protocol"]["num_fake"] == 1000
  assert last_step(tmp_path / "two" / "best") == last


def test_error_of_one_process_ends_all(stopped, tmp_path):
  before = runs.snapshot(stopped[0])
  results = runs.wait_for(
    runs.start_processes(
      2, DIGITS, "--config.seed=3", f"--workdir={stopped[0]}", cwd=tmp_path
    )
  )
  for code, _, errors in results:
    assert code == 78 and "Traceback" not in errors
    (line,) = [x for x in errors.splitlines() if x.startswith("error:")]
    assert "was made by another config: seed is 0 there and 3 here" in line
  assert runs.snapshot(stopped[0]) == before


def test_process_that_finds_no_other_ends_with_one_line(tmp_path):
  with runs.free_port() as port:
    code, _, errors = runs.run_main(
      "--mode=sample",
      "--workdir=run",
      f"--coordinator_address=localhost:{port}",
      "--num_processes=2",
      "--process_id=1",
      cwd=tmp_path,
      program=("-c", _IMPATIENT),
    )
  assert code == 1
  assert errors.startswith("error: the processes did not find each other in 2")
  assert errors.count("\n") == 1


@pytest.mark.parametrize(
  "flags, message",
  [
    ((False, "host:1", 2, None), "all together"),
    ((False, None, None, 0), "all together"),
    ((True, "host:1", 2, 0), "without --distributed"),
    ((False, "host", 2, 0), "HOST:PORT"),
    ((False, "host:one", 2, 0), "HOST:PORT"),
    ((False, "host:1", 2, 2), "--process_id=2"),
    ((False, "host:1", 0, 0), "--num_processes is 0"),
  ],
)
def test_flags_that_do_not_go_together_are_errors(flags, message):
  with pytest.raises(ConfigError, match=message) as error:
    processes.initialize(*flags, preemptible=True)
  assert "\n" not in str(error.value)


def test_single_process_needs_no_flags():
  processes.initialize(False, None, None, None, preemptible=True)
  with pytest.raises(ConfigError, match="mine"):
    with processes.raise_together():
      raise ConfigError("mine")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_is_final(signum, heard):
  with processes.StopSignal() as stop:
    assert not stop.requested(2, 2)
    signal.raise_signal(signum)
    assert stop.requested(4, 2) and not heard
    signal.raise_signal(signum)
    assert heard == [signum]


def test_signals_are_caught_during_the_run_only(heard):
  with processes.StopSignal():
    pass
  signal.raise_signal(signal.SIGINT)
  signal.raise_signal(signal.SIGTERM)
  assert heard == [signal.SIGINT, signal.SIGTERM]


def test_terminal_that_closes_may_send_several_signals(heard):
  with processes.StopSignal() as stop:
    for _ in range(3):
      signal.raise_signal(signal.SIGHUP)
      assert stop.requested(2, 2) and not heard
  signal.raise_signal(signal.SIGHUP)
  assert heard == [signal.SIGHUP]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_signal_that_is_ignored_stays_so(signum, heard):
  signal.signal(signum, signal.SIG_IGN)
  with processes.StopSignal() as stop:
    signal.raise_signal(signum)
    assert not stop.requested(2, 2)
    signal.raise_signal(signal.SIGTERM)
    assert stop.requested(4, 2)
  assert signal.getsignal(signum) == signal.SIG_IGN


@pytest.mark.slow
def test_four_processes_share_a_state_and_train_and_sample_as_one(tmp_path):
  fields = {
    "total_kimg": 0.032,
    "batch_size": 16,
    "generator.mlp_dim": 2048,  # large enough to be shared
    "discriminator.mlp_dim": 2048,
  }
  config = digits.get_config("smoke")
  config.update_from_flattened_dict(fields)
  one = runs.train_quietly(config, tmp_path / "one")
  command = [
    DIGITS,
    *(f"--config.{field}={value}" for field, value in fields.items()),
    "--config.fsdp=4",
    "--config.accumulation=2",
  ]
  for arguments in (command, ["--mode=sample", "--num_samples=3"]):
    results = runs.wait_for(
      runs.start_processes(4, *arguments, "--workdir=four", cwd=tmp_path)
    )
    assert [code for code, *_ in results] == [0] * 4, results
  four = tmp_path / "four"
  assert_losses_equal(losses(four)[2], losses(one.workdir)[2])
  assert last_step(four) == last_step(one.workdir) == 2
  names = {path.name for path in (four / "samples_seed0").iterdir()}
  assert names == {"000000.png", "000001.png", "000002.png", "grid.png"}


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux's C library")
def test_freed_memory_goes_back_to_the_system():
  libc = ctypes.CDLL(None)
  libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  libc.free.argtypes = [ctypes.c_void_p]

  def megabytes():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20

  # Too small to be given back one by one; the last one holds the heap's end.
  blocks = [libc.malloc(100_000) for _ in range(1000)]
  for block in blocks:
    ctypes.memset(block, 1, 100_000)
  for block in blocks[:-1]:
    libc.free(block)
  kept = megabytes()
  processes.release_memory()
  released = kept - megabytes()
  libc.free(blocks[-1])
  assert released > 80


def test_what_refers_to_itself_is_released():
  class Circle:
    pass

  circle = Circle()
  circle.itself = circle
  seen = weakref.ref(circle)
  gc.disable()  # it may run at any time
  try:
    del circle
    assert seen() is not None
    processes.release_memory()
  finally:
    gc.enable()
  assert seen() is None
