"""Differentiable augmentation (Zhao et al. 2020) with the scaling of ViTGAN.

Each transformation draws its own strength for every image and is applied to it
with probability `probability`, independently. Images are [B, S, S, 3], about
[-1, 1]; what comes in from outside of an image is 0, mid-grey.
"""

import jax
import jax.numpy as jnp


def augment(
  key,
  images,
  *,
  probability,
  brightness,
  saturation,
  contrast,
  translation,
  scaling,
  cutout,
):
  """Returns augmented images [B, S, S, 3]; a strength of 0 is off.

  Args:
    key: of the whole batch.
    images: [B, S, S, 3].
    probability: of each of colour, geometry's two parts, and cutout.
    brightness: added to all channels: up to this, either sign.
    saturation: distance from grey is multiplied by 1 +- up to this.
    contrast: distance from the mean is multiplied by 1 +- up to this.
    translation: whole pixels, up to this share of the side, on each axis.
    scaling: zoom about the centre by a factor of 1 +- up to this.
    cutout: side of the grey square, as a share of the image's.
  """
  color_key, geometry_key, cutout_key = jax.random.split(key, 3)
  if brightness or saturation or contrast:
    images = color(
      color_key, images, probability, brightness, saturation, contrast
    )
  if translation or scaling:
    images = geometry(geometry_key, images, probability, translation, scaling)
  if cutout:
    images = cut_out(cutout_key, images, probability, cutout)
  return images


def color(key, images, probability, brightness, saturation, contrast):
  """Changes brightness, then saturation, then contrast."""
  keys = jax.random.split(key, 4)
  per_image = (images.shape[0], 1, 1, 1)
  applied = jax.random.bernoulli(keys[0], probability, per_image)

  def strength(key, limit):
    x = jax.random.uniform(key, per_image, minval=-limit, maxval=limit)
    return jnp.where(applied, x, 0.0)

  x = images + strength(keys[1], brightness)
  grey = jnp.mean(x, axis=-1, keepdims=True)
  x = grey + (x - grey) * (1.0 + strength(keys[2], saturation))
  mean = jnp.mean(x, axis=(1, 2, 3), keepdims=True)
  return mean + (x - mean) * (1.0 + strength(keys[3], contrast))


def geometry(key, images, probability, translation, scaling):
  """Zooms about the centre and shifts by whole pixels, in one resampling.

  Bilinear and separable: two small matrix products per image, so that forward
  and backward pass avoid gathers and scatters, which are slow on a TPU.
  """
  batch, size = images.shape[:2]
  keys = jax.random.split(key, 4)
  zoom = 1.0 + jnp.where(
    jax.random.bernoulli(keys[0], probability, (batch, 1)),
    jax.random.uniform(keys[1], (batch, 1), minval=-scaling, maxval=scaling),
    0.0,
  )
  limit = round(size * translation)
  shift = jnp.where(
    jax.random.bernoulli(keys[2], probability, (batch, 1)),
    jax.random.randint(keys[3], (batch, 2), -limit, limit + 1),
    0,
  )
  # Output pixel y shows the input at (y + 0.5 - offset) / zoom - 0.5.
  offset = shift + 0.5 * size * (1.0 - zoom)

  def resample(image, zoom, offset):
    return jax.image.scale_and_translate(
      image,
      image.shape,
      (0, 1),
      jnp.broadcast_to(zoom, (2,)),
      offset,
      method="linear",
      antialias=False,
    )

  return jax.vmap(resample)(images, zoom, offset)


def cut_out(key, images, probability, cutout):
  """Replaces a square, centred anywhere in the image, with mid-grey."""
  batch, size = images.shape[:2]
  applied_key, centre_key = jax.random.split(key)
  applied = jax.random.bernoulli(applied_key, probability, (batch, 1, 1))
  side = round(size * cutout)
  start = jax.random.randint(centre_key, (2, batch, 1), 0, size) - side // 2
  position = jnp.arange(size)
  rows, columns = (position >= start) & (position < start + side)
  inside = applied & rows[:, :, None] & columns[:, None, :]
  return jnp.where(inside[..., None], 0.0, images)
