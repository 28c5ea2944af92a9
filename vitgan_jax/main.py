r"""Trains ViTGAN, and draws samples from what was trained.

Train, or go on where an earlier run of the same command stopped:
  python -m vitgan_jax.main --config=configs/digits.py
  python -m vitgan_jax.main --config=configs/celeba64.py --workdir=runs/faces

Change any field of the config, or shrink it to seconds:
  python -m vitgan_jax.main --config=configs/cifar10.py --config.batch_size=64
  python -m vitgan_jax.main --config=configs/cifar10.py:smoke

Score the last checkpoint; or each new one, beside a training run:
  python -m vitgan_jax.main --mode=evaluate --workdir=runs/digits
  python -m vitgan_jax.main --mode=evaluate --workdir=runs/faces \
    --checkpoint=watch --num_samples=50000

On many hosts, the same command on each, with a workdir that all of them see:
  python -m vitgan_jax.main --config=configs/celeba64.py \
    --workdir=gs://bucket/run --distributed
or, where they cannot find each other, on host I of N:
    --coordinator_address=HOST0:1234 --num_processes=N --process_id=I

Find where a number came from that was not finite, after a run that it ended:
  python -m vitgan_jax.main --mode=replay --workdir=runs/faces

Write samples of the last checkpoint as PNGs:
  python -m vitgan_jax.main --mode=sample --workdir=runs/digits --num_samples=64
of a run with classes, those of some:
  python -m vitgan_jax.main --mode=sample --workdir=runs/cifar10_cond \
    --classes=cat,dog
"""

import os
import sys

from absl import flags
from ml_collections import config_flags

from vitgan_jax import cli
from vitgan_jax.config import MACHINE_FIELDS, total_steps
from vitgan_jax.errors import ConfigError

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, e.g. configs/digits.py; add :smoke to shrink."
)
_WORKDIR = cli.define_path(
  "workdir", None, "Folder of the run; default runs/<config name>."
)
_MODE = flags.DEFINE_enum(
  "mode", "train", ["train", "evaluate", "sample", "replay"], "What to do."
)
# What belongs to other modes than these is refused, not ignored.
_MODES_OF = {
  "num_samples": ("evaluate", "sample"),
  "seed": ("evaluate", "sample"),
  "checkpoint": ("evaluate",),
  "reference": ("evaluate",),
  "features": ("evaluate",),
  "inception_weights": ("evaluate",),
  "output": ("sample",),
  "classes": ("sample",),
}
_NUM_SAMPLES = flags.DEFINE_integer(
  "num_samples",
  None,
  "Images to generate; default 64 with --mode=sample, and the config's "
  "evaluation.num_samples with --mode=evaluate.",
)
_SEED = flags.DEFINE_integer(
  "seed",
  0,
  "Seed of the latents, with --mode=sample and --mode=evaluate; training has "
  "--config.seed.",
)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  "last",
  "What to score, with --mode=evaluate: last, all, watch (all, and each new "
  "one until the run is at its end), or a step.",
)
_FEATURES = flags.DEFINE_enum(
  "features",
  None,
  ["inception", "efficientnet"],
  "Network of the metrics, with --mode=evaluate; default the config's. FID is "
  "by inception; efficientnet needs no download.",
)
_INCEPTION_WEIGHTS = cli.define_path(
  "inception_weights",
  None,
  "File of Inception's weights, pt_inception-2015-12-05-6726825d.pth, with "
  "--mode=evaluate; by default downloaded into ~/.cache/vitgan_jax.",
)
_REFERENCE = cli.define_path(
  "reference",
  None,
  "Other real images to score against than those trained on, with "
  "--mode=evaluate: a folder that vitgan_jax.data.prepare made, of images held "
  "out for one.",
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Whether this is one of many processes, started by Cloud TPU, GKE, Slurm or "
  "MPI, from which each finds the others.",
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
  "coordinator_address",
  None,
  "HOST:PORT of the first of many processes that are started by hand.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Number of processes, with --coordinator_address."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id",
  None,
  "Number of this process, from 0, with --coordinator_address.",
)
_OUTPUT = cli.define_path(
  "output",
  None,
  "New folder for the samples, with --mode=sample; default "
  "<workdir>/samples_seed<seed>.",
)
_CLASSES = flags.DEFINE_list(
  "classes",
  None,
  "Names or numbers of classes, with --mode=sample: sample i is of number i "
  "modulo how many they are. Default all of the run's, in turn.",
)


def main(arguments):
  """Dispatches to the mode's function."""
  cli.no_arguments(arguments)
  if _MODE.value == "train" and _CONFIG.value is None:
    raise ConfigError("--config=configs/<name>.py is required; see --help")
  for name, modes in _MODES_OF.items():
    if flags.FLAGS[name].present and _MODE.value not in modes:
      raise ConfigError(
        f"--{name} is for --mode={' and --mode='.join(modes)}, not for "
        f"--mode={_MODE.value}; see --help"
      )
  if _CONFIG.value is not None and _MODE.value != "train":
    given = set(config_flags.get_override_values(flags.FLAGS["config"]))
    used = MACHINE_FIELDS if _MODE.value == "evaluate" else ()
    if unused := given.difference(used):
      raise ConfigError(
        f"--config.{min(unused)} is for --mode=train; --mode={_MODE.value} "
        "takes it from the run; see --help"
      )
  # Late: --help and a wrong flag need not wait for JAX.
  from vitgan_jax import processes

  processes.initialize(
    _DISTRIBUTED.value,
    _COORDINATOR_ADDRESS.value,
    _NUM_PROCESSES.value,
    _PROCESS_ID.value,
    preemptible=_MODE.value == "train",
  )
  modes = {
    "train": _train,
    "evaluate": _evaluate,
    "sample": _sample,
    "replay": _replay,
  }
  modes[_MODE.value]()


def _train():
  from vitgan_jax import train

  try:
    state = train.train_and_evaluate(_CONFIG.value, _workdir())
  except train.TrainingDivergedError as error:
    cli.fail(error)
  if int(state.step) < total_steps(_CONFIG.value):
    sys.exit(cli.EXIT_STOPPED)


def _evaluate():
  workdir = _workdir()
  from vitgan_jax import evaluate

  evaluate.evaluate(
    workdir,
    _CHECKPOINT.value,
    _FEATURES.value,
    _INCEPTION_WEIGHTS.value,
    _NUM_SAMPLES.value,
    _SEED.value,
    _CONFIG.value,
    _REFERENCE.value,
  )


def _sample():
  workdir = _workdir()
  from vitgan_jax import sample

  count = 64 if _NUM_SAMPLES.value is None else _NUM_SAMPLES.value
  output = _OUTPUT.value or f"{workdir}/samples_seed{_SEED.value}"
  sample.sample(workdir, count, _SEED.value, output, _CLASSES.value)


def _replay():
  from vitgan_jax import replay

  replay.replay(_workdir())


def _workdir():
  """Returns --workdir, or runs/digits-smoke for configs/digits.py:smoke."""
  if _WORKDIR.value is not None:
    return _WORKDIR.value
  if _CONFIG.value is None:
    raise ConfigError(
      f"--mode={_MODE.value} needs --workdir=<folder of a run>; see --help"
    )
  path = config_flags.get_config_filename(flags.FLAGS["config"])
  return os.path.join("runs", cli.config_stem(path))


if __name__ == "__main__":
  cli.run(main)
