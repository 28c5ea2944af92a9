import jax
import numpy as np
from numpy.testing import assert_allclose
import pytest
from scipy import signal

from tests.reference import apply, init_params, normal
from vitgan_jax.models.convolutions import (
  Conv,
  StyledConv,
  ToRGB,
  downsample,
  draw_noise,
  upsample,
)

torch_stylegan2 = pytest.importorskip("tests.torch_stylegan2")
to_nchw, to_torch = torch_stylegan2.to_nchw, torch_stylegan2.to_torch

FILTER = np.array([1, 3, 3, 1]) / 8


def assert_equals_torch(actual, expected):
  expected = expected.permute(0, 2, 3, 1).numpy()
  assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_upsampling_is_that_of_scipy():
  x = normal(2, 6, 6, 3)
  expected = x.astype(np.float64)
  for axis in (1, 2):
    expected = signal.upfirdn(2 * FILTER, expected, up=2, axis=axis)
    expected = np.take(expected, range(1, 13), axis)
  assert_allclose(jax.jit(upsample)(x), expected, atol=1e-6)


def test_downsampling_is_that_of_scipy():
  x = normal(2, 6, 6, 3)
  expected = x.astype(np.float64)
  for axis in (1, 2):
    expected = signal.upfirdn(FILTER, expected, axis=axis)
    expected = np.take(expected, range(2, 7, 2), axis)
  assert_allclose(jax.jit(downsample)(x), expected, atol=1e-6)


@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_convolution_is_that_of_torch(resample):
  x, layer = normal(2, 6, 6, 3), Conv(5, resample=resample)
  params = init_params(layer, x)
  expected = torch_stylegan2.conv(to_torch(params), to_nchw(x), resample)
  assert_equals_torch(apply(layer, params, x), expected)


@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_styled_convolution_has_weights_of_its_own_for_each_image(resample):
  x, w = normal(3, 6, 6, 4), normal(3, 7, seed=1)
  size = {None: 6, "up": 12, "down": 3}[resample]
  noise = normal(3, size, size, 1, seed=2)
  layer = StyledConv(5, resample)
  params = init_params(layer, x, w, noise)
  expected = torch_stylegan2.styled_conv(
    to_torch(params), to_nchw(x), to_torch(w), to_nchw(noise), resample
  )
  assert_equals_torch(apply(layer, params, x, w, noise), expected)


def test_styled_convolution_keeps_the_variance_whatever_the_style():
  x, w = normal(4, 8, 8, 64), 10.0 * normal(4, 64, seed=1)
  y, _ = jax.jit(StyledConv(64).init_with_output)(jax.random.key(0), x, w)
  # 1 with the leaky ReLU's gain, and some less at the borders.
  assert 0.6 < np.mean(np.square(y)) < 1.2


def test_colours_are_modulated_but_not_demodulated():
  x, w = normal(2, 4, 4, 6), normal(2, 7, seed=1)
  params = init_params(ToRGB(), x, w)
  expected = torch_stylegan2.to_rgb(to_torch(params), to_nchw(x), to_torch(w))
  assert_equals_torch(apply(ToRGB(), params, x, w), expected)


def test_noise_is_normal_and_that_of_each_key_and_layer():
  keys = jax.random.split(jax.random.key(0), 3)
  layers = draw_noise(keys, [4, 16, 16])
  assert [x.shape for x in layers] == [(3, r, r, 1) for r in (4, 16, 16)]
  flat = np.concatenate([np.reshape(x, (3, -1)) for x in layers], axis=1)
  assert_allclose(np.mean(flat), 0.0, atol=5 / flat.size**0.5)
  assert_allclose(np.std(flat), 1.0, atol=5 / (2 * flat.size) ** 0.5)
  assert len(np.unique(flat)) == flat.size
  alone = draw_noise(keys[1:2], [4, 16, 16])
  np.testing.assert_array_equal(alone[1], layers[1][1:2])
  assert draw_noise(None, [4, 8]) == [None, None]
