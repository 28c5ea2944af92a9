"""What a training run takes of TPUs, in a minute or two.

`benchmarks.tpu` has the compiler's own estimate of time, for which it makes the
code of every operation: ten minutes to an hour. Here it is stopped as soon as
it has ordered the operations and given each its place in memory, and time
follows from arithmetic: the model FLOPs of a step at `MFU` of the chip's peak.
R1 and path length count as often as they come; `benchmarks.tpu` compiles, and
times, a step that has them. docs/tpu.md has both for the configs that were
compiled to the end. Networks too small to fill a chip's matrix units are far
from any such share.
"""

import multiprocessing
import os
import pathlib
import re
import tempfile

import optax

from benchmarks import tpu
from benchmarks.flops import model_flops
from vitgan_jax import config as config_lib
from vitgan_jax import gan_step
from vitgan_jax.errors import ConfigError

MFU = 0.4  # model FLOPs utilisation, assumed
_REPORT = "*jit_train_steps*.after_optimizations-memory-usage-report.txt"
_NEXT = "*jit_train_steps*.after_optimizations_after_buffer_assignment.txt"


def run(config, topology, batch_per_chip):
  """Yields the figures of the training step, a dict.

  Args:
    config: of `configs/`.
    topology: as "v5e:2x2".
    batch_per_chip: images of a training step on each chip.

  Raises:
    ConfigError: if libtpu is missing, the topology is none, or the step does
      not fit into the memory of its chips.
  """
  with tempfile.TemporaryDirectory() as dump:
    process = multiprocessing.get_context("spawn").Process(
      target=_compile, args=(config, topology, batch_per_chip, dump)
    )
    process.start()
    try:
      config = tpu.for_chips(config, batch_per_chip)
      flops = _mean_flops(config)
      state = next(tpu.plain_programs(config, batch_per_chip)).args[0]
      memory = _memory(process, pathlib.Path(dump))
    finally:
      process.kill()
      process.join()
  chip = tpu.CHIPS[topology.split(":")[0]]
  images = config_lib.images_per_step(config)
  rate = images / (flops / MFU / chip.flops)
  yield {
    "source": "the TPU compiler's memory, and arithmetic: nothing was measured",
    "chip": topology.split(":")[0],
    "images_per_chip": images,
    "g_parameters": optax.tree.size(state.g_params),
    "d_parameters": optax.tree.size(state.d_params),
    "mean_model_tflop_per_chip": round(flops / 1e12, 4),
    "assumed_mfu": MFU,
    "estimated_images_per_sec_and_chip": round(rate, 1),
    "estimated_chip_hours_of_the_run": round(
      config.total_kimg * 1e3 / rate / 3600, 4
    ),
    "estimated_hbm_gb": round(memory / 1e9, 4),
    "estimated_hbm_headroom_gb": round((chip.memory - memory) / 1e9, 4),
  }


def _mean_flops(config):
  """Returns the model FLOPs of a step, with its share of what comes rarely."""

  def flops(without=()):
    some = config.copy_and_resolve_references()
    some.loss.update(dict.fromkeys(without, 0.0))
    step = next(tpu.plain_programs(some, config.batch_size))
    return model_flops(step.function, *step.args)

  rare = {
    ("r1_gamma", "r2_gamma"): gan_step.gradient_penalty_every(config),
    ("path_length_weight",): config.loss.path_length_every,
  }
  dearest = mean = flops()  # a step with all of them
  for weights, every in rare.items():
    if every > 1 and any(config.loss[name] for name in weights):
      mean -= (1.0 - 1.0 / every) * (dearest - flops(without=weights))
  return mean


def _compile(config, topology, batch_per_chip, dump):
  """Compiles the step in a process of its own, until that is ended."""
  tempfile.tempdir = dump  # what it leaves goes with the folder
  os.environ["XLA_FLAGS"] = f"--xla_dump_to={dump} --xla_dump_hlo_as_text=true"
  try:
    next(tpu.run(config, topology, batch_per_chip))
  except ConfigError as error:
    (pathlib.Path(dump) / "error").write_text(str(error))


def _memory(process, dump):
  """Returns the bytes of HBM that a process's compiler lays out.

  Raises:
    ConfigError: that the compiler ended with.
  """
  while process.is_alive() and not any(dump.glob(_NEXT)):
    process.join(timeout=0.5)
  if not any(dump.glob(_NEXT)):
    error = dump / "error"
    raise ConfigError(
      error.read_text()
      if error.exists()
      else f"the TPU compiler ended with {process.exitcode}"
    )
  report = next(dump.glob(_REPORT)).read_text()
  return int(re.search(r"\(color=0\)\nTotal bytes: (\d+)", report)[1])
