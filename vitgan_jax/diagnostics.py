"""What tells a healthy run from a stuck one, measured at every sample grid.

The networks sow what they have to show; what one does not sow is left out.
"""

import functools
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from vitgan_jax import compilation, partitioning, pictures
from vitgan_jax.gan_step import augmentation
from vitgan_jax.models import networks
from vitgan_jax.pixels import to_float


class Intermediates(NamedTuple):
  """What the discriminator's layers do, for pictures.

  Attributes:
    attention: [B, blocks, G, G], the share of the class token's attention that
      goes to each of the G x G patches, the mean over heads. The class token
      itself has the rest. None if it shows no attention to a grid.
    growth: {"block0/mlp_in": sigma(W) / sigma(W_init), ...}, a scalar for each
      kernel that is normalised.
  """

  attention: Any
  growth: Any


@compilation.once_per_config
def make_diagnostics(config, nets, mesh):
  """Returns the jitted `diagnostics(state, images, latents, labels)`.

  Takes uint8 images [B, S, S, 3] for the discriminator, real ones in a training
  run, latents [B, latent_dim], and labels [B], or None without classes; returns
  (scalars, `Intermediates`). The scalars:

  attention/entropy_min, attention/entropy_mean: of the discriminator's blocks,
    as a share of log N, if it shows any. Near 0 each token attends to itself
    alone. attention/g_entropy_min, attention/g_entropy_mean: of the generator.
  borders/step_ratio: mean |difference| of neighbouring pixels of the averaged
    generator's images across the borders of its patches over that inside, if it
    has patches; borders/step_ratio_real: of the images, to compare.
  sigma/growth_max: the largest sigma(W) / sigma(W_init) of its kernels, if
    they are normalised.
  sigma/stable_rank_min: the least |W|_F**2 / sigma(W)**2 of these kernels, as a
    share of the full rank: of how many directions it makes use.
  auc/clean: the share of pairs of an image and one of the generator itself (not
    of its average) in which the discriminator puts the former above. 1/2 is a
    blind one, 1 one that has won. auc/augmented: the same as the losses have
    them, augmented. With 64 of each they are within 0.1, 19 times of 20.
  diversity/std_over_latents: standard deviation of the averaged generator's
    images over latents, the mean over pixels. It falls to 0 where all latents
    give one image; diversity/std_over_images, the same of the images, and
    diversity/std_of_mean_image are there to compare.
  """
  generator, discriminator = map(networks.plain, nets[:2])

  def diagnostics(state, images, latents, labels=None):
    images = to_float(images)
    real_logits, collections = discriminator.apply(
      state.d_variables, images, labels, mutable=["intermediates"]
    )
    raw_images = generator.apply(state.g_variables, latents, labels)
    discriminate = functools.partial(
      discriminator.apply, state.d_variables, labels=labels
    )
    augment = augmentation(config, state)

    def keys_of(seed, images):  # the same each time: only the networks change
      return jax.random.split(jax.random.key(seed), len(images))

    fake_images, g_collections = generator.apply(
      state.g_ema_variables, latents, labels, mutable=["intermediates"]
    )
    scalars = {
      "auc/clean": area_under_curve(real_logits, discriminate(raw_images)),
      "auc/augmented": area_under_curve(
        discriminate(augment(keys_of(0, images), images)),
        discriminate(augment(keys_of(1, raw_images), raw_images)),
      ),
      "diversity/std_over_latents": jnp.mean(jnp.std(fake_images, axis=0)),
      "diversity/std_over_images": jnp.mean(jnp.std(images, axis=0)),
      "diversity/std_of_mean_image": jnp.std(jnp.mean(fake_images, axis=0)),
    }
    for prefix, shown in (("", collections), ("g_", g_collections)):
      if entropy := list(_sown(shown, "attention_entropy").values()):
        entropy = jnp.stack(entropy)
        scalars[f"attention/{prefix}entropy_min"] = jnp.min(entropy)
        scalars[f"attention/{prefix}entropy_mean"] = jnp.mean(entropy)
    if patch_size := getattr(generator, "patch_size", None):
      for suffix, shown in (("", fake_images), ("_real", images)):
        ratio = border_step_ratio(jnp.clip(shown, -1.0, 1.0), patch_size)
        scalars[f"borders/step_ratio{suffix}"] = ratio
    if growth := _sown(collections, "sigma_growth"):
      scalars["sigma/growth_max"] = jnp.max(jnp.stack(list(growth.values())))
      ranks = _sown(collections, "stable_rank").values()
      scalars["sigma/stable_rank_min"] = jnp.min(jnp.stack(list(ranks)))
    return scalars, Intermediates(_attention_maps(collections), growth)

  return jax.jit(diagnostics, out_shardings=partitioning.replicated(mesh))


def area_under_curve(real_logits, fake_logits):
  """Returns the area under the ROC curve of logits [A] above logits [B].

  That is the share of pairs that are in order; a tie counts half.
  """
  difference = real_logits[:, None] - fake_logits
  return jnp.mean((1.0 + jnp.sign(difference)) / 2.0)


def border_step_ratio(images, patch_size):
  """Returns how much larger steps across patch borders are than those inside.

  1 is images without a grid.

  Args:
    images: [B, S, S, C].
    patch_size: distance of the borders.
  """
  is_border = np.arange(1, images.shape[1]) % patch_size == 0
  columns = jnp.abs(jnp.diff(images, axis=2))
  rows = jnp.abs(jnp.diff(images, axis=1)).swapaxes(1, 2)
  steps = jnp.mean(columns + rows, axis=(0, 1, 3))
  # An image of one colour has no steps.
  return jnp.mean(steps[is_border]) / (jnp.mean(steps[~is_border]) + 1e-8)


def _attention_maps(collections):
  """Returns `Intermediates.attention`.

  Blocks are in the order of their names; the class token is the last of N.
  """
  weights = _sown(collections, "attention_weights")
  maps = [
    jnp.mean(weights[name][:, :, -1, :-1], axis=1)
    for name in sorted(weights, key=pictures.natural_key)
  ]
  if not maps or len({x.shape for x in maps}) > 1:
    return None
  maps = jnp.stack(maps, axis=1)
  grid = round(maps.shape[-1] ** 0.5)
  if grid**2 != maps.shape[-1]:
    return None
  return maps.reshape(*maps.shape[:-1], grid, grid)


def _sown(collections, name):
  """Returns {layer: value} of all values that were sown under a name."""
  sown = traverse_util.flatten_dict(collections.get("intermediates", {}))
  return {
    "/".join(layer).removesuffix("/norm"): value
    for (*layer, last), (*_, value) in sown.items()
    if last == name
  }
