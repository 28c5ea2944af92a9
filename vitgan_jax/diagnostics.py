"""What tells a healthy run from a stuck one, measured at every sample grid."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vitgan_jax import partitioning
from vitgan_jax.gan_step import to_float
from vitgan_jax.train_state import build_models


class Insides(NamedTuple):
  """What the discriminator's layers do, for pictures.

  Attributes:
    attention: [B, blocks, G, G], the share of the class token's attention that
      goes to each of the G x G patches, the mean over heads. The class token
      itself has the rest.
    growth: {"block0/mlp_in": sigma(W) / sigma(W_init), ...}, a scalar for each
      kernel that is normalised.
  """

  attention: Any
  growth: Any


def make_diagnostics(config, mesh):
  """Returns the jitted `diagnostics(state, images, latents)`.

  Takes uint8 images [B, S, S, 3] for the discriminator, real ones in a training
  run, and latents [B, latent_dim]; returns (scalars, `Insides`). The scalars:

  attention/entropy_min, attention/entropy_mean: of the discriminator's blocks,
    as a share of log N. Near 0 each token attends to itself alone.
  sigma/growth_max: the largest sigma(W) / sigma(W_init) of its kernels, if
    they are normalised.
  diversity/std_over_latents: standard deviation of the averaged generator's
    images over latents, the mean over pixels. It falls to 0 where all latents
    give one image; diversity/std_of_mean_image is there to compare.
  """
  generator, discriminator = build_models(config)  # the plain form: see there

  def diagnostics(state, images, latents):
    _, collections = discriminator.apply(
      {"params": state.d_params, "spectral": state.d_spectral},
      to_float(images),
      mutable=["intermediates"],
    )
    fake_images = generator.apply({"params": state.g_ema_params}, latents)
    entropy = list(_sown(collections, "attention_entropy").values())
    growth = _sown(collections, "sigma_growth")
    weights = _sown(collections, "attention_weights")
    maps = [
      jnp.mean(weights[f"block{i}/attention"][:, :, 0, 1:], axis=1)
      for i in range(config.discriminator.depth)
    ]
    grid = config.data.image_size // config.discriminator.patch_size
    maps = jnp.stack(maps, axis=1).reshape(len(images), -1, grid, grid)
    scalars = {
      "attention/entropy_min": jnp.min(jnp.stack(entropy)),
      "attention/entropy_mean": jnp.mean(jnp.stack(entropy)),
      "diversity/std_over_latents": jnp.mean(jnp.std(fake_images, axis=0)),
      "diversity/std_of_mean_image": jnp.std(jnp.mean(fake_images, axis=0)),
    }
    if growth:
      scalars["sigma/growth_max"] = jnp.max(jnp.stack(list(growth.values())))
    return scalars, Insides(maps, growth)

  return jax.jit(diagnostics, out_shardings=partitioning.replicated(mesh))


def _sown(collections, name):
  """Returns {layer: value} of all values that were sown under a name."""
  values = {}
  for path, value in jax.tree.leaves_with_path(collections["intermediates"]):
    *layer, last, _ = (getattr(part, "key", None) for part in path)
    if last == name:
      values["/".join(layer).removesuffix("/norm")] = value
  return values
