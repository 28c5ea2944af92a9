import contextlib
import io
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests import runs
from vitgan_jax import checkpoint
from vitgan_jax.errors import ConfigError

pytest.importorskip(
  "IPython", reason="IPython is not installed: pip install -e '.[test]'"
)
from vitgan_jax import notebook


def test_picture_is_enlarged_by_whole_pixels(monkeypatch):
  shown = []
  monkeypatch.setattr(notebook.display, "display", shown.append)
  image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
  notebook.show(image, min_side=13)
  np.testing.assert_array_equal(
    shown[0], np.kron(image, np.ones((3, 3, 1), np.uint8))
  )


def test_what_the_command_refuses_is_raised(tmp_path, monkeypatch):
  monkeypatch.chdir(runs.ROOT)
  with (
    contextlib.redirect_stdout(io.StringIO()),
    pytest.raises(ConfigError, match="'large' must be one of tiny, smoke"),
  ):
    notebook.train("configs/digits.py:large", tmp_path / "run")
  assert not list(tmp_path.iterdir())


def test_training_that_is_killed_is_told_of(tmp_path, monkeypatch):
  package = tmp_path / "vitgan_jax"
  package.mkdir()
  (package / "__init__.py").touch()
  (package / "main.py").write_text("import os; os.kill(os.getpid(), 9)")
  monkeypatch.chdir(tmp_path)
  with (
    contextlib.redirect_stdout(io.StringIO()),
    pytest.raises(ConfigError, match="killed by signal 9"),
  ):
    notebook.train("configs/digits.py", tmp_path / "run")


@pytest.mark.slow
def test_interruption_saves_and_ends_the_run(tmp_path):
  workdir = tmp_path / "run"
  code = (
    "from vitgan_jax import notebook; "
    f"notebook.train('configs/digits.py:smoke', {str(workdir)!r}, "
    "'--config.total_kimg=100'); print('went on')"
  )
  with subprocess.Popen(
    [sys.executable, "-u", "-m", "IPython", "--simple-prompt", "-c", code],
    cwd=runs.ROOT,
    env={**os.environ, "IPYTHONDIR": str(tmp_path / "ipython")},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    try:
      while "kimg  " not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
      process.send_signal(signal.SIGINT)
      output, errors = process.communicate(timeout=120)
    finally:
      process.kill()
  assert process.returncode == 0, output + errors
  assert "Stopped." in output and output.endswith("went on\n")
  with checkpoint.open_manager(workdir) as manager:
    assert manager.latest_step() > 0
