import os
import pathlib
import subprocess
import sys

import pytest

from tests import runs
from vitgan_jax import cli
from vitgan_jax.config import ConfigError


def run_module(name, *arguments, cwd):
  """Runs a command; returns the CompletedProcess."""
  return subprocess.run(
    [sys.executable, "-m", name, *arguments],
    cwd=cwd,
    env={**runs.os.environ, "PYTHONPATH": str(runs.ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
  )


HUGE_PAGES = """
import ctypes, re, sys
from vitgan_jax import cli

def main(arguments):
  malloc = ctypes.CDLL(None).malloc
  malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  ctypes.memset(malloc(2**26), 1, 2**26)
  smaps = open("/proc/self/smaps_rollup").read()
  print(arguments, re.search(r"AnonHugePages: +([0-9]+)", smaps)[1])

cli.run(main)
"""


@pytest.mark.skipif(
  not pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()
  or not pathlib.Path("/proc/self/smaps_rollup").exists(),
  reason="this kernel has no huge pages",
)
@pytest.mark.parametrize("tunables, kilobytes", [(None, 2**15), ("", 0)])
def test_large_memory_is_in_huge_pages(tunables, kilobytes, tmp_path):
  environment = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
  environment.pop("GLIBC_TUNABLES", None)
  if tunables is not None:  # those of the user stay
    environment["GLIBC_TUNABLES"] = tunables
  process = subprocess.run(
    [sys.executable, "-c", HUGE_PAGES, "a b"],
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
  )
  arguments, huge = process.stdout.rsplit(" ", 1)
  assert arguments == "['a b']"
  enabled = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
  if "[madvise]" in enabled.read_text():
    assert int(huge) >= kilobytes and (kilobytes or int(huge) < 2**14)


def test_words_that_are_no_flags_are_refused():
  cli.no_arguments([])
  with pytest.raises(ConfigError, match="not a flag: workdir=a b"):
    cli.no_arguments(["workdir=a", "b"])


@pytest.mark.parametrize(
  "name, arguments, words",
  [
    ("benchmarks", [], "usage"),
    ("benchmarks", ["trian", "--config=x.py"], "x.py"),
    ("vitgan_jax.visualize", ["--workdir=nowhere"], "nowhere is not a"),
    ("vitgan_jax.metrics.digits", ["--workdir=nowhere"], "nowhere is not a"),
    ("vitgan_jax.metrics.digits", ["--wrokdir=nowhere"], "wrokdir"),
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


@pytest.mark.parametrize(
  "name",
  ["vitgan_jax.main", "vitgan_jax.visualize", "vitgan_jax.demo", "benchmarks"],
)
def test_help_shows_examples_and_flags(name, tmp_path):
  process = run_module(name, "--help", cwd=tmp_path)
  assert f"python -m {name}" in process.stdout
  assert "--workdir" in process.stdout or "--config" in process.stdout
