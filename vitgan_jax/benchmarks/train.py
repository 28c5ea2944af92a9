"""Speed of the training step, on random images."""

import time

import jax
import numpy as np

from vitgan_jax import config as config_lib
from vitgan_jax import partitioning
from vitgan_jax.gan_step import make_train_steps
from vitgan_jax.train_state import init_train_state


def run(config, seconds):
  """Times `train_steps` of a config; returns a list of one dict of figures.

  Args:
    config: of `configs/`.
    seconds: to measure for; compilation and a first call come on top.
  """
  config_lib.validate(config)
  mesh = partitioning.create_mesh(fsdp=config.fsdp)
  state = init_train_state(config, mesh)
  size = config.data.image_size
  shape = (config.steps_per_call, config.batch_size, size, size, 3)
  images = partitioning.global_batch(
    mesh, np.random.default_rng(0).integers(0, 256, shape, np.uint8), axis=1
  )
  start = time.perf_counter()
  train_steps = make_train_steps(config, mesh).lower(state, images).compile()
  compile_seconds = time.perf_counter() - start
  state, metrics = train_steps(state, images)  # the first call is slower
  jax.block_until_ready(metrics)
  durations = []
  while len(durations) < 3 or sum(durations) < seconds:
    start = time.perf_counter()
    state, metrics = train_steps(state, images)
    jax.block_until_ready((state, metrics))
    durations.append(time.perf_counter() - start)
  step_seconds = float(np.median(durations)) / config.steps_per_call
  return [
    {
      "device": f"{mesh.size} x {jax.devices()[0].device_kind}",
      "dtype": config.dtype,
      "image_size": size,
      "batch_size": config.batch_size,
      "steps_per_call": config.steps_per_call,
      "calls": len(durations),
      "compile_seconds": round(compile_seconds, 2),
      "step_ms": round(1000 * step_seconds, 3),
      "images_per_sec": round(config.batch_size / step_seconds, 1),
    }
  ]
