import subprocess
import sys

import pytest

from tests import runs
from vitgan_jax import cli
from vitgan_jax.config import ConfigError


def run_module(name, *arguments, cwd):
  """Runs a command of the package; returns the CompletedProcess."""
  return subprocess.run(
    [sys.executable, "-m", f"vitgan_jax.{name}", *arguments],
    cwd=cwd,
    env={**runs.os.environ, "PYTHONPATH": str(runs.ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_words_that_are_no_flags_are_refused():
  cli.no_arguments([])
  with pytest.raises(ConfigError, match="not a flag: workdir=a b"):
    cli.no_arguments(["workdir=a", "b"])


@pytest.mark.parametrize(
  "name, arguments, words",
  [
    ("benchmark", [], "usage"),
    ("benchmark", ["trian", "--config=x.py"], "x.py"),
    ("visualize", ["--workdir=nowhere"], "nowhere is not a workdir"),
    ("metrics.digits", ["--workdir=nowhere"], "nowhere is not a workdir"),
    ("metrics.digits", ["--wrokdir=nowhere"], "wrokdir"),
  ],
)
def test_every_command_answers_bad_input_in_one_line(
  name, arguments, words, tmp_path
):
  process = run_module(name, *arguments, cwd=tmp_path)
  assert process.returncode == 1
  (line,) = process.stderr.strip().splitlines()
  assert line.startswith("error: ") and words in line
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["main", "benchmark", "visualize", "demo"])
def test_help_shows_examples_and_flags(name, tmp_path):
  process = run_module(name, "--help", cwd=tmp_path)
  assert f"python -m vitgan_jax.{name}" in process.stdout
  assert "--workdir" in process.stdout or "--config" in process.stdout
