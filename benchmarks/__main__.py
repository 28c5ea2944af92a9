"""Measures speed: `python -m benchmarks NAME`.

  python -m benchmarks train --config=configs/digits.py
  python -m benchmarks train --config=configs/cifar10.py:smoke --json
  python -m benchmarks sample --config=configs/digits.py
  python -m benchmarks data
  python -m benchmarks metrics
  python -m benchmarks tpu --config=configs/cifar10.py
  python -m benchmarks cost --config=configs/cifar10.py

`train` times the training step of a config on random images, `sample` the
drawing of samples, both beside the same networks and objective in PyTorch,
eager and compiled, if torch is installed. `data` times the reading of
prepared images, beside tf.data; `metrics` that of Inception's features and the
metrics, beside torch-fidelity. All that is compared takes turns. `tpu` measures
nothing: it asks the TPU compiler what it expects of a slice of TPUs, which need
not be there. Nothing is left on the disk.

PyTorch's threads wait in busy loops. On a machine that does other things, set
OMP_WAIT_POLICY=passive: without it, PyTorch may be thirty times as slow.
"""

import importlib
import json
import os

from absl import flags
from ml_collections import config_flags

from vitgan_jax import cli
from vitgan_jax.errors import ConfigError

_FLAGS = {
  "train": ("config", "seconds"),
  "sample": ("config", "seconds"),
  "data": ("seconds",),
  "metrics": ("seconds",),
  "tpu": ("config", "topology", "batch_per_chip"),
  "cost": ("config", "topology", "batch_per_chip"),
}
_NEEDS_CONFIG = [name for name, needed in _FLAGS.items() if "config" in needed]
# Read when JAX or libtpu is loaded. Without them libtpu asks the network for
# its machine, and keeps every other process from loading it.
_COMPILER_ONLY = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  # Any machine does, whatever the topology; without one libtpu prints errors.
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}


def main(arguments):
  """Prints the figures of one benchmark."""
  name = arguments[0] if len(arguments) == 1 else None
  if name not in _FLAGS or (
    name in _NEEDS_CONFIG and flags.FLAGS.config is None
  ):
    raise ConfigError(
      "usage: python -m benchmarks "
      f"{{{','.join(_FLAGS)}}} [--config=configs/<name>.py] [--json]; "
      f"{', '.join(_NEEDS_CONFIG)} need a config"
    )
  if name in ("tpu", "cost"):
    os.environ.update(_COMPILER_ONLY)
  module = importlib.import_module(f"benchmarks.{name}")
  results = module.run(*(flags.FLAGS[flag].value for flag in _FLAGS[name]))
  if flags.FLAGS.json:
    print(json.dumps(list(results)))
    return
  for figures in results:
    for key, value in figures.items():
      if isinstance(value, list):
        print(key, *_lines(value), sep="\n  ")
      else:
        print(f"{key:<40}{value}")
    print(flush=True)


def _lines(values):
  """Returns the lines of a list; dicts, which share their keys, as a table."""
  if not values or not isinstance(values[0], dict):
    return values or ["none"]
  columns = [[key, *(str(row[key]) for row in values)] for key in values[0]]
  widths = [max(map(len, column)) for column in columns]
  return [
    "  ".join(map(str.ljust, line, widths)).rstrip() for line in zip(*columns)
  ]


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "Config file.")
  flags.DEFINE_bool("json", False, "Print one line of JSON instead.")
  flags.DEFINE_float("seconds", 20.0, "Measure at least this long.")
  flags.DEFINE_string("topology", "v5e:2x4", "Slice of TPUs to compile for.")
  flags.DEFINE_integer("batch_per_chip", 128, "Images of a step on each chip.")
  cli.run(main)
