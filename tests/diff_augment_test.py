import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vitgan_jax.diff_augment import augment

NUM_IMAGES = 4096
# Draws of probability 0.8 over so many images: five standard deviations.
RATE_TOLERANCE = 5 * np.sqrt(0.8 * 0.2 / NUM_IMAGES)

ALL_STRENGTHS = dict(
  brightness=0.5,
  saturation=1.0,
  contrast=0.5,
  translation=0.25,
  scaling=0.2,
  cutout=0.5,
)


@functools.partial(jax.jit, static_argnames=[*ALL_STRENGTHS, "probability"])
def apply(key, images, probability=0.8, **strengths):
  """Augments images, each by a key of its own; strengths not given are off."""
  strengths = dict.fromkeys(ALL_STRENGTHS, 0.0) | strengths
  transform = functools.partial(augment, probability=probability, **strengths)
  return jax.vmap(transform)(jax.random.split(key, len(images)), images)


def run(images, seed=0, **kwargs):
  return np.asarray(apply(jax.random.key(seed), jnp.asarray(images), **kwargs))


def random_batch(size=8, num_images=NUM_IMAGES):
  shape = (num_images, size, size, 3)
  x = np.random.default_rng(0).uniform(-1, 1, shape)
  return x.astype(np.float32)


def copies(size=8):
  """Returns one image many times, so that only the draws can differ."""
  return np.repeat(random_batch(size, 1), NUM_IMAGES, axis=0)


# How strongly each image was changed, recovered from what came out; 0 where it
# was not. The recovery also asserts that nothing else has changed.


def brightness_shift(before, after):
  shift = np.mean(after - before, axis=(1, 2, 3))
  np.testing.assert_allclose(
    after, before + shift[:, None, None, None], atol=2e-6
  )
  return shift


def factor_about(centre, before, after):
  """Least-squares factor of the distance from `centre`."""
  x, y = before - centre, after - centre
  factor = np.sum(x * y, axis=(1, 2, 3)) / np.sum(x * x, axis=(1, 2, 3))
  np.testing.assert_allclose(y, x * factor[:, None, None, None], atol=5e-6)
  return factor - 1


def saturation_change(before, after):
  return factor_about(before.mean(-1, keepdims=True), before, after)


def contrast_change(before, after):
  return factor_about(before.mean((1, 2, 3), keepdims=True), before, after)


RECOVER = {
  "brightness": brightness_shift,
  "saturation": saturation_change,
  "contrast": contrast_change,
}


@pytest.mark.parametrize("name", RECOVER)
def test_color_change_is_uniform_within_its_limits(name):
  limit = 0.4
  before = random_batch()
  change = RECOVER[name](before, run(before, probability=1.0, **{name: limit}))
  # Recovered in float32, to about 1e-6.
  assert np.max(np.abs(change)) <= limit + 1e-5
  # Quartiles of a uniform distribution: five standard errors.
  np.testing.assert_allclose(
    np.quantile(change, [0.0, 0.25, 0.5, 0.75, 1.0]),
    np.linspace(-limit, limit, 5),
    atol=5 * 2 * limit * 0.5 / np.sqrt(NUM_IMAGES),
  )


def shifted(images, dy, dx):
  """Moves images down and to the right, filling with zeros."""
  size = images.shape[1]
  padded = np.pad(images, ((0, 0), (size, size), (size, size), (0, 0)))
  return padded[:, size - dy : 2 * size - dy, size - dx : 2 * size - dx]


@pytest.mark.parametrize(
  "size, translation, limit", [(16, 0.125, 2), (8, 0.2, 2), (8, 0.05, 0)]
)
def test_translation_is_a_zero_filled_shift_by_whole_pixels(
  size, translation, limit
):
  before = random_batch(size)
  after = run(before, probability=1.0, translation=translation)
  steps = range(-limit, limit + 1)
  # Bit for bit: a resampling by whole pixels must not blur.
  counts = [
    np.sum(np.all(after == shifted(before, dy, dx), axis=(1, 2, 3)))
    for dy in steps
    for dx in steps
  ]
  assert sum(counts) == len(before)
  # All shifts are as likely: six standard deviations, to allow for their
  # number.
  mean = len(before) / len(counts)
  np.testing.assert_allclose(counts, mean, atol=6 * np.sqrt(mean))


def ramps(size):
  """Returns images of distance from the centre (y, then x), and noise."""
  axis = np.arange(size) - (size - 1) / 2
  before = random_batch(size)
  before[..., 0] = axis[:, None]
  before[..., 1] = axis
  return before


def recover_geometry(after):
  """Returns zooms [B], shifts [B, 2] of what `ramps` became.

  An output pixel y shows (y - shift) / zoom, counted from the centre.
  """
  centre = after.shape[1] // 2
  rows, columns = after[:, :, centre, 0], after[:, centre, :, 1]
  slopes = np.stack(
    [x[:, centre] - x[:, centre - 1] for x in (rows, columns)], axis=-1
  )
  values = np.stack([x[:, centre] for x in (rows, columns)], axis=-1)
  np.testing.assert_allclose(slopes[:, 0], slopes[:, 1], atol=1e-5)
  zoom = 1 / slopes.mean(-1)
  return zoom, 0.5 - values * zoom[:, None]


def numpy_resample(image, zoom, shift):
  """Bilinear, pixel by pixel; zero beyond the outer edges of the pixels."""
  size = image.shape[0]
  middle = (size - 1) / 2
  result = np.zeros_like(image)
  for y in range(size):
    for x in range(size):
      source = (np.array([y, x]) - middle - shift) / zoom + middle
      if np.any(source < -0.5) or np.any(source > size - 0.5):
        continue
      low = np.floor(source).astype(int)
      share = source - low
      # Half a pixel about the border there is but one neighbour.
      (y0, x0), (y1, x1) = (np.clip(low + i, 0, size - 1) for i in (0, 1))
      result[y, x] = (1 - share[0]) * (
        (1 - share[1]) * image[y0, x0] + share[1] * image[y0, x1]
      ) + share[0] * ((1 - share[1]) * image[y1, x0] + share[1] * image[y1, x1])
  return result


@pytest.mark.parametrize("translation", [0.0, 0.125])
def test_scaling_is_a_bilinear_zoom_about_the_centre(translation):
  limit, size = 0.3, 16
  before = ramps(size)
  after = run(before, probability=1.0, scaling=limit, translation=translation)
  zoom, shift = recover_geometry(after)
  # The ramp reaches 8: float32 gives its slope, and the zoom, to about 1e-6.
  assert np.max(np.abs(zoom - 1)) <= limit + 1e-5
  assert np.min(zoom) < 1 - 0.99 * limit and np.max(zoom) > 1 + 0.99 * limit
  np.testing.assert_allclose(shift, np.round(shift), atol=1e-4)
  assert np.max(np.abs(shift)) <= round(size * translation) + 1e-4
  for i in range(16):
    np.testing.assert_allclose(
      after[i],
      numpy_resample(before[i], zoom[i], np.round(shift[i])),
      atol=1e-4,  # The error of the recovered zoom, over slopes of up to 2.
    )


@pytest.mark.parametrize("cutout, side", [(0.5, 4), (0.4, 3), (0.25, 2)])
def test_cutout_is_a_grey_square_centred_anywhere_in_the_image(cutout, side):
  size = 8
  before = random_batch(size)
  after = run(before, probability=1.0, cutout=cutout)
  kept = np.all(after == before, axis=-1)
  assert np.all(after[~kept] == 0)
  position = np.arange(size)
  # An even side has one place more, and so either border the same share.
  starts = np.arange(size + 1 - side % 2) - side // 2
  strips = (position >= starts[:, None]) & (position < starts[:, None] + side)
  counts = [
    np.sum(np.all(~kept == (rows[:, None] & columns), axis=(1, 2)))
    for rows in strips
    for columns in strips
  ]
  assert sum(counts) == len(before)
  mean = len(before) / len(counts)
  np.testing.assert_allclose(counts, mean, atol=6 * np.sqrt(mean))


def change_of(name, strength, seed=0, **kwargs):
  """Returns one number [B] that tells the draws of a batch of copies apart."""
  if name in ("translation", "scaling"):
    before = ramps(16)
    zoom, shift = recover_geometry(
      run(before, seed, **{name: strength}, **kwargs)
    )
    if name == "scaling":
      return zoom - 1
    return np.round(shift[:, 0]) * 100 + np.round(shift[:, 1])
  before = copies()
  after = run(before, seed, **{name: strength}, **kwargs)
  if name == "cutout":
    return np.argmax(np.all(after == 0, axis=-1).reshape(NUM_IMAGES, -1), 1) + (
      np.any(after != before, axis=(1, 2, 3))
    )
  return RECOVER[name](before, after)


def assert_uncorrelated(*draws):
  """Asserts that no two draws [B] correlate, to five standard errors."""
  correlations = np.corrcoef(draws)[np.triu_indices(len(draws), 1)]
  assert np.max(np.abs(correlations)) < 5 / np.sqrt(len(draws[0]))


@pytest.mark.parametrize("name", ALL_STRENGTHS)
def test_application_rate_is_the_probability(name):
  change = change_of(name, 0.25)
  rate = np.mean(np.abs(change) > 1e-5)
  # One of the 9 x 9 shifts of up to 4 of 16 pixels is none at all.
  invisible = 1 / 81 if name == "translation" else 0.0
  np.testing.assert_allclose(rate, 0.8 * (1 - invisible), atol=RATE_TOLERANCE)


@pytest.mark.parametrize("name", ALL_STRENGTHS)
def test_each_image_of_a_batch_has_its_own_draw(name):
  change = change_of(name, 0.25, probability=1.0)
  counts = np.unique(np.round(change, 5), return_counts=True)[1]
  assert len(counts) > 40 and np.max(counts) < NUM_IMAGES / 10
  assert_uncorrelated(change[:-1], change[1:])  # neighbours


@pytest.mark.parametrize("name", ALL_STRENGTHS)
def test_draws_depend_on_the_key_and_on_nothing_else(name):
  first, again = (change_of(name, 0.25, seed=0) for _ in range(2))
  np.testing.assert_array_equal(first, again)
  assert_uncorrelated(first, change_of(name, 0.25, seed=1))


def test_image_is_augmented_alike_alone_and_anywhere_in_a_batch():
  images = random_batch(num_images=4)
  keys = jax.random.split(jax.random.key(0), 4)
  transform = functools.partial(augment, probability=1.0, **ALL_STRENGTHS)
  alone = jax.jit(transform)
  batch = jax.jit(jax.vmap(transform))
  order = np.array([2, 0, 3, 1])
  expected = np.stack([alone(*pair) for pair in zip(keys, images)])
  assert np.all(np.std(expected - images, axis=(1, 2, 3)) > 0.1)
  np.testing.assert_allclose(batch(keys, images), expected, atol=2e-6)
  np.testing.assert_allclose(
    batch(keys[order], images[order]), expected[order], atol=2e-6
  )


def test_color_zoom_and_shift_are_independent():
  before = ramps(16)
  before[..., 2] = 0.0  # shows brightness, the ramps zoom and shift
  after = run(before, brightness=0.5, scaling=0.2, translation=0.125)
  brightness = after[:, 8, 8, 2]
  zoom, shift = recover_geometry(after - brightness[:, None, None, None])
  zoom, shift = zoom - 1, np.round(shift)
  draws = brightness, zoom, shift[:, 0], shift[:, 1]
  assert_uncorrelated(*draws)
  applied = [
    np.abs(x) > 1e-5 for x in (brightness, zoom, np.any(shift != 0, axis=-1))
  ]
  assert_uncorrelated(*applied)


def test_colors_three_draws_and_their_coins_are_independent():
  before = random_batch()
  after = run(before, brightness=0.3, saturation=0.9, contrast=0.4)
  brightness = after.mean((1, 2, 3)) - before.mean((1, 2, 3))
  after = after - brightness[:, None, None, None]
  # Saturation keeps the grey of each pixel, contrast the mean of the image.
  grey_before, grey_after = (x.mean(-1, keepdims=True) for x in (before, after))
  contrast = contrast_change(grey_before, grey_after)
  both = saturation_change(before - grey_before, after - grey_after)
  saturation = (1 + both) / (1 + contrast) - 1
  draws = brightness, saturation, contrast
  applied = [np.abs(draw) > 1e-4 for draw in draws]
  np.testing.assert_allclose(np.mean(applied, axis=1), 0.8, atol=RATE_TOLERANCE)
  assert_uncorrelated(*applied)
  assert_uncorrelated(*draws)


def test_strength_zero_is_the_identity():
  before = random_batch(num_images=16)
  np.testing.assert_array_equal(run(before, probability=1.0), before)


def test_probability_zero_is_the_identity():
  before = random_batch(num_images=16)
  after = run(before, probability=0.0, **ALL_STRENGTHS)
  np.testing.assert_allclose(after, before, atol=1e-6)


def test_gradient_is_the_adjoint_of_the_transformation():
  # For one key the transformation is affine in the image, T(x + d) - T(x) = A d
  # exactly, so back-propagation must give <A d, y> = <d, A^T y>.
  rng = np.random.default_rng(0)
  shape = (32, 8, 8, 3)
  x, d, y = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
  transform = functools.partial(apply, jax.random.key(0), **ALL_STRENGTHS)
  after, vjp = jax.vjp(transform, x)
  (gradient,) = vjp(y)
  moved = np.asarray(transform(x + d), np.float64) - np.asarray(after)
  axes = (1, 2, 3)
  by_difference = np.sum(moved * y, axes)
  by_gradient = np.sum(d * np.asarray(gradient, np.float64), axes)
  # float32 rounding of 192 terms of about 1.
  np.testing.assert_allclose(by_gradient, by_difference, atol=1e-4)
  assert np.all(np.sum(np.abs(gradient), axes) > 1.0)


def test_defaults_of_the_configs_keep_shape_and_type():
  image = jax.ShapeDtypeStruct((8, 8, 3), jnp.float32)
  transform = functools.partial(augment, **tiny.tiny_config().augment)
  after = jax.eval_shape(transform, jax.random.key(0), image)
  assert (after.shape, after.dtype) == (image.shape, image.dtype)
