import os
import subprocess
import sys

from tests import runs

COUNT = 300


def test_few_odd_inputs_of_each_kind_are_read_or_refused(tmp_path):
  # In a process of its own, as it forks.
  result = subprocess.run(
    [
      *(sys.executable, "-m", "tests.fuzz"),
      *(f"--count={COUNT}", f"--output={tmp_path}"),
    ],
    cwd=runs.ROOT,
    env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  assert " inputs, 0 findings" in result.stdout.splitlines()[-1]
