"""Differentiable augmentation (Zhao et al. 2020) with the scaling of ViTGAN.

Each transformation draws its own strength for every image and is applied to it
with probability `probability`, independently. Everything here is of one image
[S, S, 3], about [-1, 1]; `jax.vmap` makes it one of a batch. Several levels of
an image, [S, S, 3 * levels], are augmented alike. What comes in from outside of
an image is 0, mid-grey.
"""

import jax
import jax.numpy as jnp


def augment(key, image, **strengths):
  """Returns an augmented image [S, S, 3]; see `draw` for the arguments."""
  transforms = {"color": color, "geometry": geometry, "cutout": cut_out}
  for name, arguments in draw(key, len(image), **strengths).items():
    image = transforms[name](image, *arguments)
  return image


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
    {transform: tuple of its arguments}, in the order in which they come.
  """
  # All in one call: on a TPU a call takes longer than its numbers.
  coins, uniform = jax.random.uniform(key, (2, 8))
  applied = coins < probability

  def strength(i, limit):
    return jnp.where(applied[i], (2.0 * uniform[i] - 1.0) * limit, 0.0)

  def integers(i, count):
    """Returns a pair of integers from 0 to count - 1."""
    return jnp.floor(uniform[i : i + 2] * count)

  draws = {}
  if brightness or saturation or contrast:
    limits = (brightness, saturation, contrast)
    draws["color"] = tuple(strength(i, limit) for i, limit in enumerate(limits))
  if translation or scaling:
    zoom = 1.0 + strength(3, scaling)
    limit = round(size * translation)
    shift = jnp.where(applied[4], integers(4, 2 * limit + 1) - limit, 0.0)
    # Output pixel y shows the input at (y + 0.5 - offset) / zoom - 0.5.
    draws["geometry"] = (zoom, shift + 0.5 * size * (1.0 - zoom))
  if cutout:
    side = round(size * cutout)
    # An even side is centred between pixels: one place more, and no border of
    # the image is hidden more often than the one across.
    start = integers(6, size + 1 - side % 2)[:, None] - side // 2
    position = jnp.arange(size)
    rows, columns = (position >= start) & (position < start + side)
    draws["cutout"] = (applied[6] & rows[:, None] & columns,)
  return draws


def color(image, brightness, saturation, contrast):
  """Changes brightness, then saturation, then contrast, of each level alike."""
  x = image.reshape(*image.shape[:2], -1, 3) + brightness
  grey = jnp.mean(x, axis=-1, keepdims=True)
  x = grey + (x - grey) * (1.0 + saturation)
  mean = jnp.mean(x, axis=(0, 1, 3), keepdims=True)
  x = mean + (x - mean) * (1.0 + contrast)
  return x.reshape(image.shape)


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


def cut_out(image, inside):
  """Replaces a square, given as a mask [S, S], with mid-grey."""
  return jnp.where(inside[..., None], 0.0, image)
