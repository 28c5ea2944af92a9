"""Scalars and images for TensorBoard, written without TensorFlow."""

import os
import socket
import time

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
