"""Trains ViTGAN, and draws samples from what was trained.

Train, or go on where an earlier run of the same command stopped:
  python -m vitgan_jax.main --config=configs/digits.py
  python -m vitgan_jax.main --config=configs/celeba64.py --workdir=runs/faces

Change any field of the config, or shrink it to seconds:
  python -m vitgan_jax.main --config=configs/cifar10.py --config.batch_size=64
  python -m vitgan_jax.main --config=configs/cifar10.py:smoke

Write samples of the last checkpoint as PNGs:
  python -m vitgan_jax.main --mode=sample --workdir=runs/digits --num_samples=64
"""

import os
import pathlib

from absl import flags
from ml_collections import config_flags

from vitgan_jax import cli
from vitgan_jax.config import ConfigError

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, e.g. configs/digits.py; add :smoke to shrink."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; default runs/<config name>."
)
_MODE = flags.DEFINE_enum("mode", "train", ["train", "sample"], "What to do.")
_NUM_SAMPLES = flags.DEFINE_integer(
  "num_samples", 64, "Images to write, with --mode=sample."
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Of the latents, with --mode=sample; training has config.seed."
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "New folder for them; default <workdir>/samples_seed<seed>."
)


def main(arguments):
  """Dispatches to the mode's function."""
  cli.no_arguments(arguments)
  if _MODE.value == "train":
    _train()
  else:
    _sample()


def _train():
  if _CONFIG.value is None:
    raise ConfigError("--config=configs/<name>.py is required; see --help")
  # Late: --help and a wrong flag need not wait for JAX.
  from vitgan_jax import train

  train.train_and_evaluate(_CONFIG.value, _workdir())


def _sample():
  if _WORKDIR.value is None and _CONFIG.value is None:
    raise ConfigError(
      "--mode=sample needs --workdir=<folder of a run>; see --help"
    )
  from vitgan_jax import sample

  output = _OUTPUT.value or f"{_workdir()}/samples_seed{_SEED.value}"
  sample.sample(_workdir(), _NUM_SAMPLES.value, _SEED.value, output)


def _workdir():
  """Returns --workdir, or runs/digits-smoke for configs/digits.py:smoke."""
  if _WORKDIR.value is not None:
    return _WORKDIR.value
  path, *argument = config_flags.get_config_filename(
    flags.FLAGS["config"]
  ).split(":")
  return os.path.join("runs", "-".join([pathlib.Path(path).stem, *argument]))


if __name__ == "__main__":
  cli.run(main)
