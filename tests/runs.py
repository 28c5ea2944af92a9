"""Training runs and commands, as the tests start them."""

import contextlib
import dataclasses
import io
import os
import pathlib
import runpy
import socket
import subprocess
import sys
import time
from typing import Any
from unittest import mock
import warnings

from absl import app
from absl.testing import flagsaver
import jax

from vitgan_jax import partitioning, sample, train

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run left behind."""

  workdir: pathlib.Path
  config: Any
  state: Any
  output: str  # what it printed


def train_quietly(config, workdir, num_devices=8):
  """Trains, with few images in a batch of samples; returns the Run."""
  output = io.StringIO()
  mesh = partitioning.create_mesh(jax.devices()[:num_devices])
  with (
    contextlib.redirect_stdout(output),
    mock.patch.object(partitioning, "create_mesh", lambda fsdp=1: mesh),
    mock.patch.object(sample, "BATCH_SIZE", 16 // num_devices),
  ):
    state = train.train_and_evaluate(config, workdir)
  return Run(pathlib.Path(workdir), config, state, output.getvalue())


def call(module, *arguments, cwd):
  """Runs a command in this process, as `python -m` would in one of its own.

  Args:
    module: that of the command, as "vitgan_jax.main".
    *arguments: of the command line.
    cwd: folder to stand in.

  Returns:
    (exit code, stdout, stderr). An exception that is no exit is raised.
  """
  path = ROOT / module.replace(".", "/")
  path = str(path / "__main__.py" if path.is_dir() else f"{path}.py")
  code = None
  app.define_help_flags()
  with (
    contextlib.chdir(cwd),
    contextlib.redirect_stdout(io.StringIO()) as output,
    contextlib.redirect_stderr(io.StringIO()) as errors,
    flagsaver.flagsaver(),  # the command's own flags go again
    mock.patch.dict(os.environ),
    warnings.catch_warnings(),
    mock.patch.object(sys, "argv", [path, *arguments]),
    # What absl does once in a process has no place in that of the tests.
    mock.patch.object(
      app, "run", lambda main, flags_parser: main(flags_parser(sys.argv))
    ),
  ):
    # Of ml_collections, which loads a config file so.
    warnings.filterwarnings(
      "ignore", r"the load_module\(\) method is deprecated"
    )
    try:
      runpy.run_path(path, run_name="__main__")
    except SystemExit as error:
      code = error.code
  return code or 0, output.getvalue(), errors.getvalue()


def refusal(module, *arguments, cwd):
  """Returns the one line with which a command refuses its arguments."""
  code, output, errors = call(module, *arguments, cwd=cwd)
  assert code == 78 and not output, errors
  (line,) = errors.splitlines()
  assert line.startswith("error: ")
  return line


def start_main(*arguments, cwd, program=("-m", "vitgan_jax.main"), **variables):
  """Starts the command line on eight devices; returns the Popen."""
  path = os.pathsep.join([*variables.pop("path", ()), str(ROOT)])
  return subprocess.Popen(
    [sys.executable, *program, *arguments],
    cwd=cwd,
    env={
      **os.environ,
      "JAX_NUM_CPU_DEVICES": "8",
      "PYTHONPATH": path,
      **variables,
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run_main(*arguments, cwd, **variables):
  """Runs the command line to its end; returns (exit code, stdout, stderr)."""
  with start_main(*arguments, cwd=cwd, **variables) as process:
    try:
      output, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
      process.kill()
      raise
  return process.returncode, output, errors


def start_processes(count, *arguments, **kwargs):
  """Starts the command line as many processes of two devices each."""
  with free_port() as port:
    flags = [
      f"--coordinator_address=localhost:{port}",
      f"--num_processes={count}",
    ]
    return [
      start_main(
        *arguments,
        *flags,
        f"--process_id={i}",
        JAX_NUM_CPU_DEVICES="2",
        **kwargs,
      )
      for i in range(count)
    ]


def wait_for(processes):
  """Waits for processes to end; returns [(exit code, stdout, stderr), ...]."""
  try:
    results = [process.communicate(timeout=300) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(p.returncode, *result) for p, result in zip(processes, results)]


def wait_until(condition, seconds=60):
  """Waits for a condition to return what is true; returns that."""
  deadline = time.monotonic() + seconds
  while not (value := condition()):
    assert time.monotonic() < deadline
    time.sleep(0.05)
  return value


def snapshot(folder):
  """Returns {path: content, or None of a folder} of all that is in a folder."""
  return {
    str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
    for path in sorted(pathlib.Path(folder).rglob("*"))
  }


def saved_steps(workdir):
  """Returns the steps of a workdir's checkpoints, rising."""
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@contextlib.contextmanager
def free_port():
  """Yields a port that no server has, while nobody else can take it."""
  with socket.socket() as server:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    server.bind(("localhost", 0))
    yield server.getsockname()[1]
