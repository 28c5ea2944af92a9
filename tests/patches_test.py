"""Tests of the cutting of images and of their reassembly, against loops."""

import jax
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pytest

from tests.reference import normal
from vitgan_jax.models.patches import overlapping_patches, unpatchify

# Size, patch, overlap: none, one pixel, half a patch, a patch, more, much more.
GEOMETRIES = [
  (8, 4, 0),
  (8, 4, 1),
  (12, 4, 2),
  (8, 4, 4),
  (8, 4, 5),
  (6, 2, 5),
  (6, 6, 3),
  (4, 1, 1),
]


def windows(size, patch_size, overlap):
  """Yields (index of the patch, its window in the padded image)."""
  grid = size // patch_size
  for i, j in np.ndindex(grid, grid):
    rows, columns = (
      slice(k * patch_size, (k + 1) * patch_size + 2 * overlap) for k in (i, j)
    )
    yield grid * i + j, (slice(None), rows, columns)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_patches_are_windows_of_the_zero_padded_image(geometry):
  size, patch_size, overlap = geometry
  images = normal(2, size, size, 3)
  border = (overlap, overlap)
  padded = np.pad(images, [(0, 0), border, border, (0, 0)])
  patches = overlapping_patches(images, patch_size, overlap)
  assert patches.shape[1] == (size // patch_size) ** 2
  for i, window in windows(*geometry):
    assert_array_equal(patches[:, i], padded[window].reshape(2, -1))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gradient_of_patches_adds_windows_up(geometry):
  size, patch_size, overlap = geometry
  images = normal(2, size, size, 3)
  patches, vjp = jax.vjp(
    lambda x: overlapping_patches(x, patch_size, overlap), images
  )
  cotangents = normal(*patches.shape, seed=1)
  window_size = patch_size + 2 * overlap
  padded_size = size + 2 * overlap
  expected = np.zeros((2, padded_size, padded_size, 3))
  for i, window in windows(*geometry):
    expected[window] += cotangents[:, i].reshape(2, window_size, window_size, 3)
  inside = slice(overlap, overlap + size)
  # Sums of up to 36 float32 numbers.
  assert_allclose(vjp(cotangents)[0], expected[:, inside, inside], atol=1e-5)


@pytest.mark.parametrize("grid, patch_size", [(1, 3), (2, 4), (3, 2), (4, 1)])
def test_unpatchify_lays_tiles_out_in_rows(grid, patch_size):
  patches = normal(2, grid**2, patch_size, patch_size, 3)
  images = unpatchify(patches.reshape(2, grid**2, -1), patch_size)
  assert images.shape == (2, grid * patch_size, grid * patch_size, 3)
  for i, window in windows(grid * patch_size, patch_size, 0):
    assert_array_equal(images[window], patches[:, i])
