"""Differentiable augmentation (Zhao et al. 2020) with the scaling of ViTGAN.

Each transformation draws its own strength for every image and is applied to it
with probability `probability`, independently. Everything here is of one image
[S, S, 3], about [-1, 1]; `jax.vmap` makes it one of a batch. What comes in from
outside of an image is 0, mid-grey.
"""

import jax
import jax.numpy as jnp


def augment(key, image, **strengths):
  """Returns an augmented image [S, S, 3]; see `draw` for the arguments."""
  return apply(draw(key, len(image), **strengths), image)


def draw(
  key,
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
  """Draws what is done to an image; a strength of 0 is off.

  Args:
    key: of the image.
    size: S, pixels along a side.
    probability: of each of them.
    brightness: added to all channels: up to this, either sign.
    saturation: distance from grey is multiplied by 1 +- up to this.
    contrast: distance from the mean is multiplied by 1 +- up to this.
    translation: whole pixels, up to this share of the side, on each axis.
    scaling: zoom about the centre by a factor of 1 +- up to this.
    cutout: side of the grey square, as a share of the image's.

  Returns:
    {name: tuple of arguments} for `apply`, which may also have a part of them.
  """
  color_key, geometry_key, cutout_key = jax.random.split(key, 3)
  draws = {}
  if brightness or saturation or contrast:
    draws["color"] = _draw_color(
      color_key, probability, brightness, saturation, contrast
    )
  if translation or scaling:
    draws["geometry"] = _draw_geometry(
      geometry_key, size, probability, translation, scaling
    )
  if cutout:
    draws["cutout"] = _draw_cutout(cutout_key, size, probability, cutout)
  return draws


def apply(draws, image):
  """Returns an image [S, S, 3], augmented as `draw` says."""
  for name, transform in (
    ("color", color),
    ("geometry", geometry),
    ("cutout", cut_out),
  ):
    if name in draws:
      image = transform(image, *draws[name])
  return image


def _draw_color(key, probability, *limits):
  """Returns a strength within each of the limits, or 0: each has its coin."""

  def strength(key, limit):
    coin_key, key = jax.random.split(key)
    x = jax.random.uniform(key, minval=-limit, maxval=limit)
    return jnp.where(jax.random.bernoulli(coin_key, probability), x, 0.0)

  return tuple(map(strength, jax.random.split(key, len(limits)), limits))


def color(image, brightness, saturation, contrast):
  """Changes brightness, then saturation, then contrast."""
  x = image + brightness
  grey = jnp.mean(x, axis=-1, keepdims=True)
  x = grey + (x - grey) * (1.0 + saturation)
  mean = jnp.mean(x)
  return mean + (x - mean) * (1.0 + contrast)


def _draw_geometry(key, size, probability, translation, scaling):
  keys = jax.random.split(key, 4)
  zoom = 1.0 + jnp.where(
    jax.random.bernoulli(keys[0], probability),
    jax.random.uniform(keys[1], minval=-scaling, maxval=scaling),
    0.0,
  )
  limit = round(size * translation)
  shift = jnp.where(
    jax.random.bernoulli(keys[2], probability),
    jax.random.randint(keys[3], (2,), -limit, limit + 1),
    0,
  )
  # Output pixel y shows the input at (y + 0.5 - offset) / zoom - 0.5.
  return zoom, shift + 0.5 * size * (1.0 - zoom)


def geometry(image, zoom, offset):
  """Zooms about the centre and shifts by whole pixels, in one resampling.

  Bilinear and separable: two small matrix products, so that forward and
  backward pass avoid gathers and scatters, which are slow on a TPU.

  Args:
    image: [S, S, 3].
    zoom: factor.
    offset: where the upper left corner comes to lie, pixels [2].
  """
  return jax.image.scale_and_translate(
    image,
    image.shape,
    (0, 1),
    jnp.broadcast_to(zoom, (2,)),
    offset,
    method="linear",
    antialias=False,
  )


def _draw_cutout(key, size, probability, cutout):
  applied_key, centre_key = jax.random.split(key)
  applied = jax.random.bernoulli(applied_key, probability)
  side = round(size * cutout)
  # An even side is centred between pixels: one place more, and no border of the
  # image is hidden more often than the one across.
  centres = size + 1 - side % 2
  start = jax.random.randint(centre_key, (2, 1), 0, centres) - side // 2
  position = jnp.arange(size)
  rows, columns = (position >= start) & (position < start + side)
  return (applied & rows[:, None] & columns,)


def cut_out(image, inside):
  """Replaces a square, given as a mask [S, S], with mid-grey."""
  return jnp.where(inside[..., None], 0.0, image)
