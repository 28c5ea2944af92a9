"""Measures speed: `python -m vitgan_jax.benchmark {train,sample,data,metrics}`.

  python -m vitgan_jax.benchmark train --config=configs/digits.py
  python -m vitgan_jax.benchmark train --config=configs/cifar10.py:smoke --json
  python -m vitgan_jax.benchmark sample --config=configs/digits.py
  python -m vitgan_jax.benchmark data
  python -m vitgan_jax.benchmark metrics

`train` times the training step of a config on random images, `sample` the
drawing of samples, both beside the same networks and objective in PyTorch,
eager and compiled, on a CPU, if torch is installed. `data` times the reading of
prepared images, beside tf.data; `metrics` that of Inception's features and the
metrics, beside torch-fidelity. All that is compared takes turns. Nothing is
left on the disk.

PyTorch's threads wait in busy loops. On a machine that does other things, set
OMP_WAIT_POLICY=passive: without it, PyTorch may be thirty times as slow.
"""

import importlib
import json

from absl import flags
from ml_collections import config_flags

from vitgan_jax import cli
from vitgan_jax.config import ConfigError

_NEEDS_CONFIG = {
  "train": True,
  "sample": True,
  "data": False,
  "metrics": False,
}


def main(arguments):
  """Prints the figures of one benchmark."""
  name = arguments[0] if len(arguments) == 1 else None
  if name not in _NEEDS_CONFIG or (
    _NEEDS_CONFIG[name] and flags.FLAGS.config is None
  ):
    raise ConfigError(
      "usage: python -m vitgan_jax.benchmark "
      f"{{{','.join(_NEEDS_CONFIG)}}} [--config=configs/<name>.py] [--json]; "
      "train and sample need a config"
    )
  module = importlib.import_module(f"vitgan_jax.benchmarks.{name}")
  results = module.run(flags.FLAGS.config, flags.FLAGS.seconds)
  if flags.FLAGS.json:
    print(json.dumps(results))
    return
  for figures in results:
    for key, value in figures.items():
      print(f"{key:<40}{value}")
    print()


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "Config file.")
  flags.DEFINE_bool("json", False, "Print one line of JSON instead.")
  flags.DEFINE_float("seconds", 20.0, "Measure at least this long.")
  cli.run(main)
