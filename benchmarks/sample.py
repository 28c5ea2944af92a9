"""Speed of sampling, from latents to images on the host, beside PyTorch."""

import jax
import numpy as np

from benchmarks import peer, turns
from vitgan_jax import config as config_lib
from vitgan_jax import partitioning
from vitgan_jax.models import networks
from vitgan_jax.sample import BATCH_SIZE, make_sampler
from vitgan_jax.train_state import init_train_state


def run(config, seconds):
  """Times the sampler of a config; returns a list of one dict of figures.

  Args:
    config: of `configs/`.
    seconds: to measure each contestant for; a first call comes on top.
  """
  config_lib.validate(config)
  mesh = partitioning.create_mesh()
  nets = networks.build(config)
  variables = init_train_state(config, nets, mesh).g_ema_variables
  batch_size = BATCH_SIZE * mesh.size
  theirs, note = peer.contestants(
    config,
    lambda compiled: _their_sampler(
      config, variables["params"], batch_size, compiled
    ),
  )
  sampler = make_sampler(nets, mesh)

  def ours():
    np.asarray(sampler(variables, 0, 0))

  medians, calls = turns.median_seconds([ours, *theirs.values()], seconds)
  return [
    {
      "device": f"{mesh.size} x {jax.devices()[0].device_kind}",
      "dtype": config.dtype,
      "image_size": config.data.image_size,
      "batch_size": batch_size,
      "calls": calls,
      "samples_per_sec": round(batch_size / medians[0], 1),
      **note,
      **peer.figures(
        "samples_per_sec",
        batch_size,
        medians[0],
        dict(zip(theirs, medians[1:])),
      ),
    }
  ]


def _their_sampler(config, g_params, batch_size, compiled):
  """Returns a function that draws a batch, uint8 [B, S, S, 3], in numpy."""
  import torch

  from benchmarks import torch_vitgan

  generator = torch_vitgan.Generator(config)
  torch_vitgan.load_from_jax(generator, g_params)

  def sample():
    images = generator(torch.randn(batch_size, config.generator.latent_dim))
    images = ((images.clamp(-1.0, 1.0) + 1.0) * 127.5).round().byte()
    return images.permute(0, 2, 3, 1).contiguous()

  sample = peer.compile_function(compiled)(sample)

  def to_host():
    with torch.inference_mode():
      return sample().cpu().numpy()

  return to_host
