"""Images to overlapping patches, and patches back to images."""

import math

from jax import lax
import jax.numpy as jnp


def overlapping_patches(images, patch_size, overlap):
  """Cuts images into patches that overlap on every side (ViTGAN, section 3.2).

  Windows of `patch_size + 2 * overlap` pixels at stride `patch_size`, over
  images that are zero-padded by `overlap` pixels. Made of reshapes and slices:
  the gradient of `lax.conv_general_dilated_patches` is over ten times slower
  on a CPU than the rest of a training step.

  Args:
    images: [B, S, S, C].
    patch_size: stride of the windows; divides S.
    overlap: pixels that a window reaches beyond its patch on each side.

  Returns:
    [B, (S / patch_size)**2, (patch_size + 2 * overlap)**2 * C], row-major.
  """
  batch, size, _, channels = images.shape
  grid = size // patch_size
  window = patch_size + 2 * overlap
  num_chunks = -(-window // patch_size)
  padding = (overlap, (num_chunks - 1) * patch_size - overlap)
  x = jnp.pad(images, ((0, 0), padding, padding, (0, 0)))

  def split(x, axis):
    """Splits a padded axis into [grid, window]."""
    shape = (*x.shape[:axis], grid, patch_size, *x.shape[axis + 1 :])
    starts = range(0, num_chunks * patch_size, patch_size)
    chunks = [
      lax.slice_in_dim(x, start, start + size, axis=axis).reshape(shape)
      for start in starts
    ]
    x = jnp.concatenate(chunks, axis=axis + 1)
    return lax.slice_in_dim(x, 0, window, axis=axis + 1)

  x = split(split(x, 1), 3)  # [B, grid, window, grid, window, C]
  x = x.swapaxes(2, 3)
  return x.reshape(batch, grid**2, window**2 * channels)


def unpatchify(patches, patch_size):
  """Lays patches [B, N, P * P * C], row-major, out as images [B, S, S, C]."""
  batch, num_patches = patches.shape[:2]
  grid = math.isqrt(num_patches)
  size = grid * patch_size
  x = patches.reshape(batch, grid, grid, patch_size, patch_size, -1)
  return x.swapaxes(2, 3).reshape(batch, size, size, -1)
