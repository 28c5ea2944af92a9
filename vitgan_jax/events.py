"""Scalars and images for TensorBoard, without TensorFlow, and for W&B."""

import contextlib
import os
import socket
import time
import uuid

from etils import epath

from vitgan_jax import pictures


class EventWriter:
  """A new file of events in a folder; whole after each write."""

  def __init__(self, folder):
    """Opens the file, and makes the folder if there is none."""
    # Late: it takes half a second.
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    self._event = event_pb2.Event
    self._summary = summary_pb2.Summary
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads files in the order of their names.
    name = f"{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
    path = folder / f"events.out.tfevents.{name}"
    self._records = RecordWriter(path.open("wb"))
    self._write(file_version="brain.Event:2")

  def write(self, step, scalars, images):
    """Writes a dict of scalars and a dict of images, uint8 [H, W, 3]."""
    values = [
      self._summary.Value(tag=tag, simple_value=value)
      for tag, value in scalars.items()
    ]
    for tag, image in images.items():
      height, width, _ = image.shape
      png = self._summary.Image(
        height=height,
        width=width,
        colorspace=3,
        encoded_image_string=pictures.encode_png(image),
      )
      values.append(self._summary.Value(tag=tag, image=png))
    self._write(step=step, summary=self._summary(value=values))

  def _write(self, **fields):
    event = self._event(wall_time=time.time(), **fields)
    self._records.write(event.SerializeToString())
    self._records.flush()

  def close(self):
    """Closes the file."""
    self._records.close()


class WandbWriter:
  """A run at Weights & Biases, or kept for it in the folder `wandb`.

  What wandb raises, of whatever kind, is an OSError: it has many causes, and
  none is worth a training run. WANDB_MODE=offline asks nobody; `wandb sync`
  sends it later.
  """

  def __init__(self, workdir, config):
    """Begins the run, or goes on with that of the workdir.

    Args:
      workdir: folder of the run, which names it.
      config: of the run; `config.wandb` is the project at W&B.

    Raises:
      OSError: if there is no package, no account or no network.
    """
    workdir = epath.Path(workdir)
    with _as_os_error():
      import wandb

      id_path = workdir / "wandb_id"
      if not id_path.exists():
        id_path.write_text(uuid.uuid4().hex)
      self._run = wandb.init(
        project=config.wandb,
        name=workdir.name,
        id=id_path.read_text(),
        resume="allow",
        dir=os.fspath(workdir),
        config=config.to_dict(),
        settings=wandb.Settings(silent=True, console="off"),
      )
      # Steps may be done again, after a crash.
      self._run.define_metric("*", step_metric="step")
      self._image = wandb.Image

  def write(self, step, scalars, images):
    """Writes a dict of scalars and a dict of images, uint8 [H, W, 3]."""
    with _as_os_error():
      pictures_of = {name: self._image(x) for name, x in images.items()}
      self._run.log({"step": step, **scalars, **pictures_of})

  def close(self):
    """Sends what is left."""
    with _as_os_error():
      self._run.finish()


@contextlib.contextmanager
def _as_os_error():
  try:
    yield
  except Exception as error:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ImportError):
      reason += "; pip install -e '.[wandb]'"
    raise OSError(reason) from error
