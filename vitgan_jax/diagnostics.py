"""What tells a healthy run from a stuck one, measured at every sample grid."""

import jax
import jax.numpy as jnp

from vitgan_jax.gan_step import to_float
from vitgan_jax.train_state import build_models


def make_diagnostics(config):
  """Returns the jitted `diagnostics(state, real_images, latents)`.

  Takes uint8 images [B, S, S, 3] and latents [B, latent_dim]; returns scalars:

  attention/entropy_min, attention/entropy_mean: of the discriminator's blocks,
    as a share of log N. Near 0 each token attends to itself alone.
  sigma/growth_max: the largest sigma(W) / sigma(W_init) of its kernels, if
    they are normalised.
  diversity/std_over_latents: standard deviation of the averaged generator's
    images over latents, the mean over pixels. It falls to 0 where all latents
    give one image; diversity/std_of_mean_image is there to compare.
  """
  generator, discriminator = build_models(config)

  @jax.jit
  def diagnostics(state, real_images, latents):
    _, collections = discriminator.apply(
      {"params": state.d_params, "spectral": state.d_spectral},
      to_float(real_images),
      mutable=["intermediates"],
    )
    fake_images = generator.apply({"params": state.g_ema_params}, latents)
    entropy = _sown(collections, "attention_entropy")
    growth = _sown(collections, "sigma_growth")
    scalars = {
      "attention/entropy_min": jnp.min(jnp.stack(entropy)),
      "attention/entropy_mean": jnp.mean(jnp.stack(entropy)),
      "diversity/std_over_latents": jnp.mean(jnp.std(fake_images, axis=0)),
      "diversity/std_of_mean_image": jnp.std(jnp.mean(fake_images, axis=0)),
    }
    if growth:
      scalars["sigma/growth_max"] = jnp.max(jnp.stack(growth))
    return scalars

  return diagnostics


def _sown(collections, name):
  """Returns all values that were sown under a name."""
  return [
    value
    for path, value in jax.tree.leaves_with_path(collections["intermediates"])
    if jax.tree_util.DictKey(name) in path
  ]
