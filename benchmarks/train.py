"""Speed of the training step, on random images, beside the same in PyTorch."""

import time

import jax
import numpy as np

from benchmarks import peer, turns
from vitgan_jax import config as config_lib
from vitgan_jax import partitioning
from vitgan_jax.gan_step import make_train_steps
from vitgan_jax.models import networks
from vitgan_jax.train_state import init_train_state


def run(config, seconds):
  """Times the training of a config; returns a list of one dict of figures.

  Args:
    config: of `configs/`.
    seconds: to measure each contestant for; compilation and a first call come
      on top.
  """
  config_lib.validate(config)
  mesh = partitioning.create_mesh(fsdp=config.fsdp)
  nets, _ = networks.with_kernels(
    networks.build(config), mesh, config.batch_size, config.accumulation
  )
  state = init_train_state(config, nets, mesh)
  size = config.data.image_size
  images_per_step = config_lib.images_per_step(config)
  shape = (config.steps_per_call, config.d_steps, config.batch_size)
  shape = (*shape, size, size, 3)
  host_images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  labels = None
  if config.data.num_classes:
    labels = np.zeros(shape[:3], np.int32)
  batch = {"images": host_images, "labels": labels}
  batch = partitioning.global_batch(mesh, batch, axis=2)
  theirs, note = peer.contestants(
    config,
    lambda compiled: _their_steps(config, state, host_images[:, 0], compiled),
  )
  lowered = make_train_steps(config, nets, mesh).lower(state, batch, 0)
  start = time.perf_counter()
  train_steps = lowered.compile()
  compile_seconds = time.perf_counter() - start

  def ours():
    nonlocal state
    state, metrics = train_steps(state, batch, int(state.step))
    jax.block_until_ready((state, metrics))

  medians, calls = turns.median_seconds([ours, *theirs.values()], seconds)
  step_seconds = medians[0] / config.steps_per_call
  return [
    {
      "device": f"{mesh.size} x {jax.devices()[0].device_kind}",
      "dtype": config.dtype,
      "image_size": size,
      "batch_size": config.batch_size,
      "steps_per_call": config.steps_per_call,
      "calls": calls,
      "compile_seconds": round(compile_seconds, 2),
      "step_ms": round(1000 * step_seconds, 3),
      "images_per_sec": round(images_per_step / step_seconds, 1),
      **note,
      **peer.figures(
        "images_per_sec",
        config.steps_per_call * images_per_step,
        medians[0],
        dict(zip(theirs, medians[1:])),
      ),
    }
  ]


def _their_steps(config, state, images, compiled):
  """Returns a function that takes the steps of one call of ours."""
  import torch

  from benchmarks import torch_train

  trainer = torch_train.Trainer(config, state, peer.compile_function(compiled))
  batches = torch.asarray(images, device=torch.get_default_device()).unbind()

  def steps():
    for batch in batches:
      trainer.step(batch)

  return steps
