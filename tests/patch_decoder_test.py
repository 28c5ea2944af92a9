"""Tests of the patch decoders, against weights built patch by patch."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pytest

from tests.reference import apply, dense, init_params, normal
from vitgan_jax.models.convolutions import draw_noise
from vitgan_jax.models.patch_decoder import (
  ConcatDecoder,
  ConvDecoder,
  ImplicitDecoder,
  LinearDecoder,
)

torch_stylegan2 = pytest.importorskip("tests.torch_stylegan2")
to_nchw, to_torch = torch_stylegan2.to_nchw, torch_stylegan2.to_torch


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


def test_conv_decoder_doubles_by_the_layers_of_stylegan2():
  y, w = normal(2, 4, 5), normal(2, 6, seed=1)
  keys = jax.random.split(jax.random.key(0), 2)
  decoder = ConvDecoder(patch_size=4, hidden_dim=8)
  params = init_params(decoder, y, w, keys)
  images = apply(decoder, params, y, w, keys)
  noise = map(to_nchw, draw_noise(keys, [4, 4, 8, 8]))
  params, w = to_torch((params, w))
  x = to_nchw(y.reshape(2, 2, 2, 5))
  for i, layer_noise in enumerate(noise):
    x = torch_stylegan2.styled_conv(
      params[f"conv{i}"], x, w, layer_noise, None if i % 2 else "up"
    )
  expected = torch_stylegan2.to_rgb(params["rgb"], x, w).permute(0, 2, 3, 1)
  assert_allclose(images, expected, rtol=1e-4, atol=1e-4)


def test_conv_decoder_has_fewer_channels_above_64_pixels():
  y, w = jnp.zeros((1, 16**2, 5)), jnp.zeros((1, 6))
  variables = jax.eval_shape(ConvDecoder(8, 384).init, jax.random.key(0), y, w)
  kernels = [
    variables["params"][f"conv{i}"]["conv"]["kernel"] for i in range(6)
  ]
  assert [x.shape[-1] for x in kernels] == [384, 384, 384, 384, 192, 192]


@pytest.mark.parametrize("decoder_class", [ImplicitDecoder, ConcatDecoder])
def test_images_start_at_the_scale_of_the_data(decoder_class):
  y = normal(4, 4, 64)
  decoder = decoder_class(4, 64, 3.0)
  images, _ = jax.jit(decoder.init_with_output)(jax.random.key(0), y)
  assert 0.3 < jnp.std(images) < 3.0
