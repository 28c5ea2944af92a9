"""Differentiable augmentation (Zhao et al. 2020) with the scaling of ViTGAN.

Each transformation draws its own strength for every image and is applied to it
with probability `probability`, independently. Images are [B, S, S, 3], about
[-1, 1]; what comes in from outside of an image is 0, mid-grey.
"""

import jax
import jax.numpy as jnp


def augment(key, images, **strengths):
  """Returns augmented images [B, S, S, 3]; see `draw` for the arguments."""
  return apply(draw(key, *images.shape[:2], **strengths), images)


def draw(
  key,
  batch,
  size,
  *,
  probability,
  brightness,
  saturation,
  contrast,
  translation,
  scaling,
  cutout,
):
  """Draws what is done to each image of a batch; a strength of 0 is off.

  Args:
    key: of the whole batch.
    batch: B.
    size: S, pixels along a side.
    probability: of each of colour, geometry's two parts, and cutout.
    brightness: added to all channels: up to this, either sign.
    saturation: distance from grey is multiplied by 1 +- up to this.
    contrast: distance from the mean is multiplied by 1 +- up to this.
    translation: whole pixels, up to this share of the side, on each axis.
    scaling: zoom about the centre by a factor of 1 +- up to this.
    cutout: side of the grey square, as a share of the image's.

  Returns:
    {name: arrays [B, ...]} for `apply`, which may also have a part of them.
  """
  color_key, geometry_key, cutout_key = jax.random.split(key, 3)
  draws = {}
  if brightness or saturation or contrast:
    draws["color"] = _draw_color(
      color_key, batch, probability, brightness, saturation, contrast
    )
  if translation or scaling:
    draws["geometry"] = _draw_geometry(
      geometry_key, batch, size, probability, translation, scaling
    )
  if cutout:
    draws["cutout"] = _draw_cutout(cutout_key, batch, size, probability, cutout)
  return draws


def apply(draws, images):
  """Returns images [B, S, S, 3], augmented as `draw` says."""
  for name, transform in (
    ("color", color),
    ("geometry", geometry),
    ("cutout", cut_out),
  ):
    if name in draws:
      images = transform(images, *draws[name])
  return images


def _draw_color(key, batch, probability, brightness, saturation, contrast):
  keys = jax.random.split(key, 4)
  per_image = (batch, 1, 1, 1)
  applied = jax.random.bernoulli(keys[0], probability, per_image)

  def strength(key, limit):
    x = jax.random.uniform(key, per_image, minval=-limit, maxval=limit)
    return jnp.where(applied, x, 0.0)

  return (
    strength(keys[1], brightness),
    strength(keys[2], saturation),
    strength(keys[3], contrast),
  )


def color(images, brightness, saturation, contrast):
  """Changes brightness, then saturation, then contrast, by [B, 1, 1, 1]."""
  x = images + brightness
  grey = jnp.mean(x, axis=-1, keepdims=True)
  x = grey + (x - grey) * (1.0 + saturation)
  mean = jnp.mean(x, axis=(1, 2, 3), keepdims=True)
  return mean + (x - mean) * (1.0 + contrast)


def _draw_geometry(key, batch, size, probability, translation, scaling):
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
  return zoom, shift + 0.5 * size * (1.0 - zoom)


def geometry(images, zoom, offset):
  """Zooms about the centre and shifts by whole pixels, in one resampling.

  Bilinear and separable: two small matrix products per image, so that forward
  and backward pass avoid gathers and scatters, which are slow on a TPU.

  Args:
    images: [B, S, S, 3].
    zoom: factor [B, 1].
    offset: where the upper left corner comes to lie, pixels [B, 2].
  """

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


def _draw_cutout(key, batch, size, probability, cutout):
  applied_key, centre_key = jax.random.split(key)
  applied = jax.random.bernoulli(applied_key, probability, (batch, 1, 1))
  side = round(size * cutout)
  start = jax.random.randint(centre_key, (2, batch, 1), 0, size) - side // 2
  position = jnp.arange(size)
  rows, columns = (position >= start) & (position < start + side)
  return (applied & rows[:, :, None] & columns[:, None, :],)


def cut_out(images, inside):
  """Replaces a square [B, S, S] of each image with mid-grey."""
  return jnp.where(inside[..., None], 0.0, images)
