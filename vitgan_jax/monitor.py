"""What a training run shows: progress line, scalars, sample grids."""

import contextlib
import datetime
import sys
import time

from etils import epath
import jax
import numpy as np

from vitgan_jax import config as config_lib
from vitgan_jax import files, pictures, processes, visualize
from vitgan_jax import sample as sample_lib
from vitgan_jax.diagnostics import make_diagnostics
from vitgan_jax.errors import ConfigError, storage_errors, storage_fault
from vitgan_jax.events import EventWriter, WandbWriter
from vitgan_jax.watchdog import Watchdog

_FIRST_PROFILED_CALL = 2  # the first one compiles; the second fills buffers
_NUM_PROFILED_CALLS = 3
_LONGEST_SILENCE = 60.0  # seconds

SAMPLE_SEED = 0  # the grids of a run show the same latents from first to last


class Progress:
  """Measures the rate and prints the progress line."""

  def __init__(self, config, first_step, total_steps):
    """Starts without a clock: the first call compiles, and does not count."""
    self._config = config
    self._total_steps = total_steps
    self._last = (first_step, None)
    self._printed = time.monotonic()

  def is_due(self):
    """Says whether a line would break a long silence."""
    return time.monotonic() - self._printed >= _LONGEST_SILENCE

  def report(self, step, metrics, is_logged=True):
    """Prints a line; returns {"images_per_sec"} and kimg as metrics.

    The rate is that since the last line that was logged.
    """
    images_per_step = config_lib.images_per_step(self._config)
    now = self._printed = time.monotonic()
    last_step, last_time = self._last
    if is_logged or last_time is None:
      self._last = (step, now)
    result = {"kimg": config_lib.kimg(self._config, step)}
    line = f"{result['kimg']:.6g}/{self._config.total_kimg:g} kimg"
    if last_time is not None and step > last_step:
      rate = (step - last_step) / (now - last_time)
      seconds = round((self._total_steps - step) / rate)
      result["images_per_sec"] = rate * images_per_step
      line += (
        f"  {rate * images_per_step:.0f} images/s  "
        f"ETA {datetime.timedelta(seconds=seconds)}"
      )
    line += "".join(f"  {k} {v:.3f}" for k, v in sorted(metrics.items()))
    if processes.is_primary():
      print(line, flush=True)
    return result


class Profiler:
  """Records what a few calls do, on the host and on its devices.

  Writes into `plugins/profile` of the workdir, where TensorBoard looks for it.
  A run of few calls records those that it has.
  """

  def __init__(self, config, workdir):
    """Records nothing unless config.profile, and in the first process only."""
    self._folder = epath.Path(workdir)
    self._wanted = config.profile and processes.is_primary()
    self._calls = 0
    self._running = False

  def before_call(self, state):
    """Starts or ends the recording, where it is time to.

    Args:
      state: GANState that the call before this one returned; what is recorded
        is whole calls, so it is waited for.
    """
    if self._wanted and self._calls == _FIRST_PROFILED_CALL:
      jax.block_until_ready(state)
      jax.profiler.start_trace(self._folder)
      self._running = True
    elif self._calls == _FIRST_PROFILED_CALL + _NUM_PROFILED_CALLS:
      self._stop(state)
    self._calls += 1

  def _stop(self, state=None):
    if self._running:
      self._running = False
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
      print(f"The profile is in {self._folder}/plugins/profile", flush=True)

  def __enter__(self):
    return self

  def __exit__(self, *unused_exception):
    self._stop()


class MetricWriter:
  """Scalars to TensorBoard and, a line at a time, to metrics.jsonl.

  To Weights & Biases, too, if the config names a project there. Only the first
  process writes. What cannot be written ends no run.
  """

  def __init__(self, workdir, config=None):
    """Opens no file yet.

    Args:
      workdir: folder of the run.
      config: of the run, for Weights & Biases; None is without.
    """
    self._workdir = epath.Path(workdir)
    self._config = config
    self._wandb = None
    self._uses_wandb = config is not None and bool(config.wandb)
    self._events = None
    self._told = set()

  def write(self, step, scalars, images=None):
    """Writes a dict of scalars and a dict of images, uint8 [H, W, 3]."""
    if not processes.is_primary():
      return
    with self.spared("TensorBoard's events"):
      self._events = self._events or EventWriter(self._workdir)
      try:
        self._events.write(step, scalars, images or {})
      except storage_errors():
        self._close()  # behind half an event, none is read
        raise
    with self.spared("metrics.jsonl"):
      files.append_record(
        self._workdir / "metrics.jsonl", {"step": step, **scalars}
      )
    if self._uses_wandb:
      with self.spared("Weights & Biases"):
        self._uses_wandb = False  # to try again may take minutes each time
        self._wandb = self._wandb or WandbWriter(self._workdir, self._config)
        self._wandb.write(step, scalars, images or {})
        self._uses_wandb = True

  @contextlib.contextmanager
  def spared(self, what):
    """Has a file that cannot be written not end the run; says so once."""
    try:
      yield
    except (*storage_errors(), ConfigError) as error:
      if what not in self._told:
        self._told.add(what)
        print(
          f"The run goes on without {what}: {storage_fault(error)}",
          file=sys.stderr,
          flush=True,
        )

  def _close(self):
    if self._events:
      with contextlib.suppress(OSError):
        self._events.close()
    self._events = None

  def __enter__(self):
    return self

  def __exit__(self, *unused_exception):
    self._close()
    if self._wandb:
      with self.spared("Weights & Biases"):
        self._wandb.close()


class SampleWriter:
  """Draws the same latents again and again, and measures the diagnostics.

  With classes each has a row of the grid; see `sample.grid_classes`.
  """

  def __init__(self, config, workdir, nets, mesh, images, labels, writer):
    """Compiles nothing yet.

    Args:
      config: of the run.
      workdir: its folder.
      nets: its Networks.
      mesh: the devices to sample on.
      images: uint8 [N, S, S, 3], real ones that are looked at.
      labels: [N], their classes, or None without.
      writer: a MetricWriter.
    """
    self.latest = epath.Path(workdir) / "grid.png"
    self._folder = epath.Path(workdir) / "samples"
    self._count = config.num_sample_images
    self._sampler = sample_lib.make_sampler(nets, mesh)
    self._classes = sample_lib.grid_classes(nets.generator, self._count)
    self._grid_labels = sample_lib.labels_of(
      nets.generator, np.arange(self._count), self._classes
    )
    self._diagnostics = make_diagnostics(config, nets, mesh)
    self._watchdog = Watchdog()
    self._real_images = images
    self._labels = labels
    self._latents = jax.random.normal(
      jax.random.key(SAMPLE_SEED), (len(images), nets.generator.latent_dim)
    )
    self._writer = writer

  def write(self, step, state, metrics):
    """Writes samples/<step>.png, grid.png, and the same to TensorBoard.

    TensorBoard gets pictures of what the discriminator does as well, and the
    watchdog what is measured.

    Args:
      step: of the training.
      state: GANState.
      metrics: of the last call of the training, floats.
    """
    # All processes take part in drawing; one writes.
    batches = sample_lib.sample_images(
      self._sampler,
      state.g_ema_variables,
      SAMPLE_SEED,
      self._count,
      self._classes,
    )
    grid = pictures.class_grid(np.concatenate(list(batches)), self._grid_labels)
    scalars, shown = self._diagnostics(
      state, self._real_images, self._latents, self._labels
    )
    if not processes.is_primary():
      return
    with self._writer.spared("samples"):
      self._folder.mkdir(exist_ok=True)
      path = self._folder / f"{step:08d}.png"
      pictures.write_png(path, grid, min_side=512)
      # Whole at any time, for those who look while it is written.
      with files.whole(self.latest) as partial:
        path.copy(partial, overwrite=True)
    drawn = visualize.discriminator_pictures(self._real_images, shown)
    drawn["samples"] = grid
    scalars = {key: float(value) for key, value in scalars.items()}
    scalars |= self._watchdog.judge(step, {**metrics, **scalars})
    self._writer.write(step, scalars, drawn)
