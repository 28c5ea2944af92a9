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
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

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


def main(argv):
  """Dispatches to the mode's function; bad input ends as one line."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  try:
    if len(argv) > 1:
      raise ConfigError(f"not a flag: {' '.join(argv[1:])}; see --help")
    if _MODE.value == "train":
      _train()
    else:
      _sample()
  except ConfigError as error:
    sys.exit(f"error: {error}")


def _train():
  if _CONFIG.value is None:
    raise ConfigError("--config=configs/<name>.py is required; see --help")
  # Late: --help and a wrong flag need no JAX.
  from vitgan_jax import train

  try:
    train.train_and_evaluate(_CONFIG.value, _workdir())
  except train.TrainingDivergedError as error:
    sys.exit(f"error: {error}")


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


def _parse_flags(argv):
  """Parses the flags; a wrong flag, or a config that fails, is one line."""
  try:
    arguments = flags.FLAGS(argv)
    if _CONFIG.value is not None:
      _CONFIG.value.keys()  # a file that does not load is reported here
  except (AttributeError, KeyError) as error:  # an override of no field
    field = re.sub(r"[\\'\"]", "", re.sub(r"\\n|\n", ". ", str(error)))
    sys.exit(f"error: no such field in the config: {field}")
  except Exception as error:  # whatever else a config file raises
    # A message may end in a whole traceback: the cause is in its last line.
    reason = [line for line in str(error).splitlines() if line.strip()][-1]
    sys.exit(f"error: {reason.strip()}; see --help")
  return arguments


if __name__ == "__main__":
  # TensorFlow only reads datasets and writes events here: keep it quiet.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  app.run(main, flags_parser=_parse_flags)
