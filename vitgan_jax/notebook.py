"""What a notebook needs beside the package: training to look at, and pictures.

from vitgan_jax import notebook
notebook.train("configs/digits.py", "runs/digits", "--config.total_kimg=100")
"""

import collections
import subprocess
import sys

from etils import epath
from IPython import display
from PIL import Image

from vitgan_jax import cli, files, pictures
from vitgan_jax.errors import ConfigError

_NUM_LINES = 3  # of the command's output, below the grid


def show(image, min_side=512):
  """Shows a uint8 image [H, W, 3], enlarged by whole pixels."""
  display.display(Image.fromarray(pictures.enlarge(image, min_side)))


def train(config, workdir, *flags):
  """Trains by the command line; shows the newest samples and progress below.

  It runs in a process of its own, which gives the accelerator back when it
  ends. Interrupting the cell saves and ends the run; the same call resumes it.

  Args:
    config: file of a config, as on the command line.
    workdir: folder of the run.
    *flags: of `vitgan_jax.main`, more of them.

  Raises:
    ConfigError: with what the command says, if it fails.
  """
  command = [sys.executable, "-m", "vitgan_jax.main"]
  flags = [f"--config={config}", f"--workdir={workdir}", *flags]
  grid, text = display.DisplayHandle(), display.DisplayHandle()
  grid.display(display.Pretty(""))
  text.display(display.Pretty("Starting"))
  lines = collections.deque(maxlen=_NUM_LINES)
  newest, shown = epath.Path(files.expand(workdir)) / "grid.png", None
  with subprocess.Popen(
    command + flags,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,  # or the interruption would reach it twice
  ) as process:
    while True:
      try:
        if not (line := process.stdout.readline()):
          break
        lines.append(line.rstrip())
        text.update(display.Pretty("\n".join(lines)))
        png = newest.read_bytes() if newest.exists() else None
        if png != shown:
          grid.update(display.Image(png))
          shown = png
      except KeyboardInterrupt:
        process.terminate()  # it saves first
  if process.returncode < 0:  # as for want of memory
    raise ConfigError(
      f"the training was killed by signal {-process.returncode}: the same call "
      "resumes it"
    )
  if process.returncode not in (0, cli.EXIT_STOPPED):
    raise ConfigError(lines[-1].removeprefix("error: "))
