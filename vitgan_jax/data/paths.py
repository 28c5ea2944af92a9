"""Where datasets live on this machine."""

import contextlib
import os

from vitgan_jax import files
from vitgan_jax.errors import ConfigError

_CONNECT_SECONDS = 10
_READ_SECONDS = 30  # without a byte


def data_dir(data):
  """Returns the folder of datasets, as a pathlib.Path.

  Raises:
    ConfigError: if it is not a path of this machine.
  """
  default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  folder = files.expand(
    data.data_dir or default,
    "a folder as --config.data.data_dir or TFDS_DATA_DIR",
  )
  # Images are memory-mapped.
  return files.local(folder, "config.data.data_dir")


def manual_dir(data):
  """Returns where files that are downloaded by hand belong."""
  return data_dir(data) / "downloads" / "manual"


@contextlib.contextmanager
def downloading(data, advice):
  """Has a download by TFDS, inside, end soon where there is no network.

  TFDS waits for a host that does not answer without end, and asks one that is
  not found ten times, over 200 s. Here it is two times, and some seconds each.

  Raises:
    ConfigError: whatever TFDS raises, with advice on what to do.
  """
  import requests  # late: few need it

  adapter = requests.adapters.HTTPAdapter
  send = adapter.send

  def send_or_give_up(self, request, **kwargs):
    self.max_retries = self.max_retries.new(connect=1, read=0)
    kwargs["timeout"] = (_CONNECT_SECONDS, _READ_SECONDS)
    return send(self, request, **kwargs)

  adapter.send = send_or_give_up
  try:
    yield
  except Exception as error:  # network, quota, checksum, disk, manual files
    reason = (str(error).strip() or "no reason given").split("\n")[0]
    raise ConfigError(
      f"dataset {data.dataset!r} is not in {data_dir(data)} and could not be "
      f"downloaded ({type(error).__name__}: {reason}). {advice}"
    ) from error
  finally:
    adapter.send = send
