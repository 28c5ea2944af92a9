"""XManager has an environment of its own, so its launcher runs as a command."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from tests import runs

XMANAGER = runs.ROOT / ".venv" / "tools" / "xmanager" / "bin" / "xmanager"

pytestmark = pytest.mark.skipif(
  not XMANAGER.exists(),
  reason="XManager is not there: make .venv/tools/xmanager/installed",
)


@pytest.fixture
def launch(tmp_path):
  """Calls launch/xm.py; its database is in a home of its own."""
  (tmp_path / "two.py").write_text(
    "def sweep(add):\n  for seed in (0, 1):\n    add({'seed': seed})"
  )

  def call(*arguments):
    return subprocess.run(
      [
        XMANAGER,
        "launch",
        runs.ROOT / "launch" / "xm.py",
        "--",
        "--config=configs/digits.py:smoke",
        f"--sweep={tmp_path}/two.py",
        f"--python={sys.executable}",
        *arguments,
      ],
      cwd=runs.ROOT,
      env={**os.environ, "HOME": str(tmp_path)},
      capture_output=True,
      text=True,
      timeout=300,
    )

  return call


def test_a_dry_run_prints_what_the_units_are(launch, tmp_path):
  workdir = f"{tmp_path}/a b$(touch pwned)"
  process = launch("--dry-run", f"--workdir={workdir}", "--config.fsdp=2")
  assert process.returncode == 0, process.stderr
  commands = [shlex.split(line) for line in process.stdout.splitlines()]
  assert commands == [
    [
      sys.executable,
      "-m",
      "vitgan_jax.main",
      "--config=configs/digits.py:smoke",
      f"--workdir={workdir}/seed={seed}",
      "--config.fsdp=2",
      f"--config.seed={seed}",
    ]
    for seed in (0, 1)
  ]
  assert [path.name for path in tmp_path.iterdir()] == ["two.py"]


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--config.sed=1"], "sed"),
    (["--config.seed=1"], "leave --config.seed out"),
    (["word"], "not a flag: word"),
    (["--executor=vertex"], "needs --accelerator"),
    (["--executor=vertex", "--accelerator=a1=1"], "must be as a100=8"),
  ],
)
def test_bad_input_is_answered(arguments, words, launch):
  process = launch(*arguments)
  assert process.returncode == 78
  (line,) = process.stderr.strip().splitlines()
  assert line.startswith("error: ") and words in line


@pytest.mark.parametrize("kind, extra", [("tpu_v3", "tpu"), ("a100", "cuda")])
def test_the_container_is_for_the_accelerator(kind, extra, tmp_path):
  code = f"""
import sys
from launch import xm
print(xm._write_dockerfile(sys.argv.pop(), {kind!r}))
"""
  process = subprocess.run(
    [XMANAGER.with_name("python"), "-c", code, str(tmp_path)],
    cwd=runs.ROOT,
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  lines = pathlib.Path(process.stdout.strip()).read_text().splitlines()
  plain = (runs.ROOT / "launch" / "Dockerfile").read_text().splitlines()
  (changed,) = [line for line in lines if line.startswith("ARG")]
  assert changed == f"ARG ACCELERATOR={extra}"
  assert [line for line in lines if line != changed] == [
    line for line in plain if not line.startswith("ARG")
  ]


@pytest.mark.slow
def test_a_sweep_runs_on_this_machine_and_failures_are_named(launch, tmp_path):
  workdir = tmp_path / "a b"
  process = launch(f"--workdir={workdir}", "--jobs=2")
  assert process.returncode == 0, process.stderr
  for seed in (0, 1):
    folder = workdir / f"seed={seed}"
    assert json.loads((folder / "config.json").read_text())["seed"] == seed
    assert (folder / "grid.png").exists()
  assert process.stdout.count("Done. The last samples are in") == 2
  # The run of another config is refused.
  shutil.copy(workdir / "seed=0" / "config.json", workdir / "seed=1")
  process = launch(f"--workdir={workdir}")
  assert process.returncode == 1
  assert "1 of 2 work units failed: seed=1;" in process.stderr
