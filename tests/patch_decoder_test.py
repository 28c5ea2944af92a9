"""Tests of the patch decoders, against weights built patch by patch."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pytest

from tests.reference import apply, init_params, normal
from vitgan_jax.models.patch_decoder import (
  ConcatDecoder,
  ConvDecoder,
  ImplicitDecoder,
  LinearDecoder,
  ModulatedConv,
)


def dense(params, x):
  kernel = params["kernel"]
  return x @ kernel / np.sqrt(len(kernel)) + params["bias"]


def leaky_relu(x):
  return np.sqrt(2.0) * np.where(x > 0, x, 0.2 * x)


def modulate(kernel, style):
  """Returns one patch's own kernel [..., in, out], demodulated."""
  kernel = kernel * style[:, None]
  axes = tuple(range(kernel.ndim - 1))
  return kernel / np.sqrt(np.sum(kernel**2, axis=axes) + 1e-8)


def fourier_features(params, patch_size, scale):
  axis = (np.arange(patch_size) + 0.5) * 2 / patch_size - 1
  centres = np.array([(y, x) for y in axis for x in axis])
  fourier = params["fourier"]
  return np.sin(scale * centres @ fourier["frequencies"] + fourier["phase"])


def assert_tiles(images, tiles):
  """Asserts that images [B, S, S, 3] show tiles [B, N, P * P, 3] in rows."""
  batch, num_tokens, _, _ = tiles.shape
  grid = int(np.sqrt(num_tokens))
  size = images.shape[1] // grid
  for i, j in np.ndindex(grid, grid):
    rows, columns = (slice(k * size, (k + 1) * size) for k in (i, j))
    tile = images[:, rows, columns].reshape(batch, size**2, 3)
    assert_allclose(tile, tiles[:, grid * i + j], rtol=1e-4, atol=1e-4)


def test_modulated_decoder_matches_weights_per_patch():
  y = normal(2, 4, 5)
  decoder = ImplicitDecoder(3, 8, 2.0)
  params = init_params(decoder, y)
  features = fourier_features(params, 3, 2.0)
  kernel = params["hidden_kernel"] / np.sqrt(8)
  rgb = params["rgb"]
  tiles = np.empty((2, 4, 9, 3))
  for patch in np.ndindex(2, 4):
    weights = modulate(kernel, dense(params["hidden_style"], y[patch]))
    hidden = leaky_relu(features @ weights + params["hidden_bias"])
    style = dense(params["rgb_style"], y[patch])
    weights = rgb["kernel"] / np.sqrt(8) * style[:, None]  # not demodulated
    tiles[patch] = hidden @ weights + rgb["bias"]
  assert_tiles(apply(decoder, params, y), tiles)


def test_concat_decoder_matches_a_layer_on_the_concatenation():
  y = normal(2, 4, 8)
  decoder = ConcatDecoder(3, 8, 2.0)
  params = init_params(decoder, y)
  features = fourier_features(params, 3, 2.0)
  layer = {
    "kernel": np.concatenate(
      [params["hidden_e"]["kernel"], params["hidden_y"]["kernel"]]
    ),
    "bias": params["hidden_y"]["bias"],
  }
  tiles = np.empty((2, 4, 9, 3))
  for patch in np.ndindex(2, 4):
    embedding = np.broadcast_to(y[patch], (9, 8))
    inputs = np.concatenate([features, embedding], axis=-1)
    tiles[patch] = dense(params["rgb"], leaky_relu(dense(layer, inputs)))
  assert_tiles(apply(decoder, params, y), tiles)


def test_linear_decoder_is_a_dense_layer_per_patch():
  y = normal(2, 4, 5)
  params = init_params(LinearDecoder(3), y)
  tiles = dense(params["rgb"], y).reshape(2, 4, 9, 3)
  assert_tiles(apply(LinearDecoder(3), params, y), tiles)


@pytest.mark.parametrize(
  "decoder",
  [
    ImplicitDecoder(4, 8, 2.0),
    ConcatDecoder(4, 8, 2.0),
    LinearDecoder(4),
  ],
)
def test_token_owns_the_pixels_of_its_tile(decoder):
  y = normal(9, 9, 5)
  params = init_params(decoder, y)
  changed = y.copy()
  tokens = np.arange(9)
  changed[tokens, tokens] += 1.0  # of image i, token i
  difference = apply(decoder, params, changed) - apply(decoder, params, y)
  expected = np.zeros((9, 12, 12), bool)
  for i in tokens:
    row, column = divmod(4 * i, 12)
    expected[i, 4 * row : 4 * row + 4, column : column + 4] = True
  assert_array_equal(np.any(difference != 0, axis=-1), expected)


def reference_modulated_conv(params, x, w):
  """Convolves each image with its own modulated kernel, pixel by pixel."""
  height, width, fan_in = x.shape[1:]
  kernel = params["kernel"] / np.sqrt(9 * fan_in)
  padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
  y = np.empty((*x.shape[:3], kernel.shape[-1]))
  for b, i, j in np.ndindex(len(x), height, width):
    weights = modulate(kernel, dense(params["style"], w[b]))
    window = padded[b, i : i + 3, j : j + 3]
    y[b, i, j] = np.sum(window[..., None] * weights, axis=(0, 1, 2))
  return y + params["bias"]


def test_modulated_conv_matches_weights_per_image():
  x, w = normal(2, 4, 4, 5), normal(2, 6, seed=1)
  params = init_params(ModulatedConv(3), x, w)
  y = apply(ModulatedConv(3), params, x, w)
  expected = reference_modulated_conv(params, x, w)
  assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def double(x, axis):
  """Doubles an axis bilinearly: the near pixel counts 3/4, the far one 1/4."""
  x = np.moveaxis(x, axis, 0)
  before = np.concatenate([x[:1], x[:-1]])
  after = np.concatenate([x[1:], x[-1:]])
  pairs = np.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis=1)
  return np.moveaxis(pairs.reshape(-1, *x.shape[1:]), 0, axis)


def test_conv_decoder_matches_numpy():
  y, w = normal(2, 4, 5), normal(2, 6, seed=1)
  decoder = ConvDecoder(patch_size=4, hidden_dim=16)
  params = init_params(decoder, y, w)
  x = y.reshape(2, 2, 2, 5)
  for octave, channels in enumerate([16, 8]):
    x = double(double(x, 1), 2)
    for i in range(2):
      layer = params[f"octave{octave}_conv{i}"]
      x = leaky_relu(reference_modulated_conv(layer, x, w))
    assert x.shape[-1] == channels
  images = apply(decoder, params, y, w)
  assert_allclose(images, dense(params["rgb"], x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoder_class", [ImplicitDecoder, ConcatDecoder])
def test_images_start_at_the_scale_of_the_data(decoder_class):
  y = normal(4, 4, 64)
  decoder = decoder_class(4, 64, 3.0)
  images, _ = jax.jit(decoder.init_with_output)(jax.random.key(0), y)
  assert 0.3 < jnp.std(images) < 3.0
