"""Tests of the dense and equalized layers, norms and the sine embedding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import optax
import pytest

from tests.reference import apply, init_params, normal, standardise
from vitgan_jax.models.layers import (
  Dense,
  LayerNorm,
  Linear,
  Norm,
  SelfModulatedLayerNorm,
  SineEmbedding,
  TokenConv,
  cell_centres,
  convolution,
  dense,
  leaky_relu,
  nine_products,
)


def effective_kernel(layer, params):
  """Returns the matrix by which a dense layer acts on its input."""
  identity = np.eye(params["kernel"].shape[0], dtype=np.float32)
  return apply(layer, params, identity) - apply(layer, params, 0 * identity)


def test_leaky_relu_has_slope_0_2_and_gain_sqrt_2():
  x = np.array([-2.0, -1.0, 0.0, 3.0])
  expected = np.sqrt(2.0) * np.array([-0.4, -0.2, 0.0, 3.0])
  assert_allclose(leaky_relu(x), expected, rtol=1e-6)


def test_linear_rounds_its_factors_but_not_the_result():
  x, kernel, bias = normal(5, 64), normal(64, 3), normal(3)
  y = Linear(kernel, bias, jnp.bfloat16)(x)
  assert y.dtype == jnp.float32
  x, kernel = (
    np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, kernel)
  )
  assert_allclose(y, x @ kernel + bias, rtol=1e-5, atol=1e-5)


def test_dense_sums_gradients_of_weights_in_float32():
  x = jnp.asarray(normal(4096, 2) + 1.0, jnp.bfloat16)
  kernel, bias = normal(2, 3), normal(3)

  def loss(kernel, bias):
    y = dense(x, kernel, bias, jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    return jnp.sum(y.astype(jnp.float32))

  d_kernel, d_bias = jax.grad(loss, (0, 1))(kernel, bias)
  expected = np.sum(np.asarray(x, np.float64), axis=0)
  # bfloat16 would round them by up to 2e-3.
  assert_allclose(
    d_kernel, np.broadcast_to(expected[:, None], (2, 3)), rtol=1e-5
  )
  assert_array_equal(d_bias, [4096] * 3)


def test_dense_has_a_second_derivative():
  x, kernel = normal(5, 3), normal(3, 4)

  def gradient(layer):
    def inner(x):
      return jnp.sum(jnp.sin(layer(x)))

    return jax.grad(lambda x: jnp.sum(jax.grad(inner)(x) ** 2))(x)

  actual = gradient(lambda x: dense(x, kernel, None, jnp.float32))
  expected = gradient(lambda x: x @ kernel)
  assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lr_multiplier", [1.0, 0.01])
@pytest.mark.parametrize("gain", [1.0, 0.4])
def test_dense_scales_its_parameters_at_run_time(gain, lr_multiplier):
  layer = Dense(5, gain=gain, lr_multiplier=lr_multiplier)
  x = normal(2, 3, 7)
  params = init_params(layer, x)
  kernel = params["kernel"] * gain * lr_multiplier / np.sqrt(7)
  expected = x @ kernel + params["bias"] * lr_multiplier
  assert_allclose(apply(layer, params, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lr_multiplier", [1.0, 0.01])
def test_kernels_are_stored_with_the_inverse_multiplier_as_std(lr_multiplier):
  layer = Dense(300, gain=0.5, lr_multiplier=lr_multiplier)
  params = layer.init(jax.random.key(0), np.zeros((1, 200)))["params"]
  # The standard error of a standard deviation over n numbers is its 1 /
  # sqrt(2 n), here 0.3 %; the tolerance is four of them.
  rtol = 4.0 / np.sqrt(2 * 200 * 300)
  assert_allclose(params["kernel"].std(), 1.0 / lr_multiplier, rtol=rtol)
  kernel = effective_kernel(layer, params)
  assert_allclose(kernel.std(), 0.5 / np.sqrt(200), rtol=rtol)


@pytest.mark.parametrize("lr_multiplier", [1.0, 0.01])
def test_bias_starts_at_bias_init(lr_multiplier):
  bias = [1.0, 0.0, -2.0]
  layer = Dense(3, bias_init=bias, lr_multiplier=lr_multiplier)
  y, _ = layer.init_with_output(jax.random.key(0), np.zeros((1, 4)))
  assert_allclose(y, [bias], rtol=1e-6)


@pytest.mark.parametrize("fan_in, lr_multiplier", [(16, 1.0), (64, 0.1)])
def test_first_adam_step_moves_the_layer_by_its_multiplier(
  fan_in, lr_multiplier
):
  layer = Dense(4, lr_multiplier=lr_multiplier)
  x, learning_rate = normal(8, fan_in), 0.01
  params = layer.init(jax.random.key(0), x)["params"]
  gradients = jax.grad(lambda p: jnp.sum(layer.apply({"params": p}, x) ** 2))(
    params
  )
  optimizer = optax.adam(learning_rate)
  updates, _ = optimizer.update(gradients, optimizer.init(params))
  new_params = optax.apply_updates(params, updates)
  step = effective_kernel(layer, new_params) - effective_kernel(layer, params)
  expected = learning_rate * lr_multiplier / np.sqrt(fan_in)
  # Float32 rounds the stored kernel, whose size is 1 / lr_multiplier.
  assert_allclose(np.abs(step), expected, rtol=2e-3)


def test_layer_without_bias_has_none():
  params = Dense(3, use_bias=False).init(jax.random.key(0), np.zeros((1, 4)))
  assert set(params["params"]) == {"kernel"}


def convolve(x, kernel):
  """Returns the 3x3 convolution of a token grid [B, G, G, in], by loops."""
  grid = x.shape[1]
  y = np.zeros((*x.shape[:3], kernel.shape[-1]))
  for i, j, di, dj in itertools.product(
    range(grid), range(grid), *[[0, 1, 2]] * 2
  ):
    source = i + di - 1, j + dj - 1
    if min(source) >= 0 and max(source) < grid:
      y[:, i, j] += x[:, *source] @ kernel[di, dj]
  return y


@pytest.mark.parametrize("num_extra", [0, 1])
def test_token_conv_matches_loops(num_extra):
  grid, width = 4, 5
  x = normal(2, grid**2 + num_extra, width)
  layer = TokenConv(3, gain=0.7)
  params = init_params(layer, x)
  kernel = 0.7 / np.sqrt(9 * width) * params["kernel"]
  patches, extra = np.split(x, [grid**2], axis=1)
  patches = convolve(patches.reshape(2, grid, grid, width), kernel)
  expected = np.concatenate(
    [patches.reshape(2, grid**2, 3), extra @ kernel[1, 1]], axis=1
  )
  expected += params["bias"]
  assert_allclose(apply(layer, params, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_images", [1, 3])
def test_norm_matches_numpy(num_images):
  x = 3.0 + 2.0 * normal(6, 8)
  scale, shift = normal(2, num_images, 8, seed=1)
  y = Norm(scale, shift)(x)
  scale, shift = (np.repeat(a, 6 // num_images, axis=0) for a in (scale, shift))
  assert_allclose(y, standardise(x) * scale + shift, rtol=1e-4, atol=1e-5)


def test_norm_has_float32_statistics_under_bfloat16():
  x = jnp.asarray(30.0 + normal(4, 256), jnp.bfloat16)
  y = Norm(np.ones((1, 256)), np.zeros((1, 256)))(x)
  assert y.dtype == jnp.bfloat16
  expected = standardise(np.asarray(x, np.float64))
  # One rounding to eight bits; statistics in bfloat16 would be off by 0.1.
  assert_allclose(y.astype(np.float32), expected, rtol=2.0**-8, atol=1e-4)


def test_layer_norm_is_the_same_for_all_rows():
  params = {"scale": normal(8), "bias": normal(8, seed=1)}
  norm = LayerNorm().apply({"params": params}, 8, method="weights")
  assert_array_equal(norm.scale, params["scale"][None])
  assert_array_equal(norm.shift, params["bias"][None])


def test_layer_norm_starts_as_the_plain_norm():
  norm, _ = LayerNorm().init_with_output(jax.random.key(0), 8, method="weights")
  x = normal(6, 8)
  assert_allclose(norm(x), standardise(x), rtol=1e-4, atol=1e-5)


def test_w_modulates_the_norm_of_its_image():
  w = normal(3, 6)
  params = {"kernel": normal(6, 16), "bias": normal(16)}
  norm = SelfModulatedLayerNorm().apply(
    {"params": {"modulation": params}}, 8, w, method="weights"
  )
  expected = w @ params["kernel"] / np.sqrt(6) + params["bias"]
  assert_allclose(norm.scale, expected[:, :8], rtol=1e-4, atol=1e-5)
  assert_allclose(norm.shift, expected[:, 8:], rtol=1e-4, atol=1e-5)


def test_gamma_starts_around_one_and_beta_around_zero():
  norm, _ = SelfModulatedLayerNorm().init_with_output(
    jax.random.key(0), 256, normal(64, 32), method="weights"
  )
  # Means over 64 x 256 numbers of variance 1, 256 of them independent for a w.
  assert_allclose(np.mean(norm.scale), 1.0, atol=0.05)
  assert_allclose(np.mean(norm.shift), 0.0, atol=0.05)


def test_cell_centres_are_row_major_and_span_minus_one_to_one():
  expected = [[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]
  assert_allclose(cell_centres(2), expected)
  assert_allclose(
    cell_centres(8)[[0, 7, 63]],
    [[-7 / 8, -7 / 8], [-7 / 8, 7 / 8], [7 / 8, 7 / 8]],
  )


def test_sine_embedding_matches_numpy():
  module = SineEmbedding(grid_size=3, features=4, scale=2.5)
  params = init_params(module)
  embedding = apply(module, params)
  for i, j in np.ndindex(3, 3):
    centre = np.array([(2 * i + 1) / 3 - 1, (2 * j + 1) / 3 - 1])
    expected = np.sin(2.5 * centre @ params["frequencies"] + params["phase"])
    assert_allclose(embedding[3 * i + j], expected, rtol=1e-5, atol=1e-6)


def test_sine_embedding_frequencies_are_stored_with_std_one():
  module = SineEmbedding(grid_size=2, features=5000, scale=2.5)
  frequencies = module.init(jax.random.key(0))["params"]["frequencies"]
  assert_allclose(frequencies.std(), 1.0, rtol=4.0 / np.sqrt(2 * 10_000))


@pytest.mark.parametrize("grid_size, rank", [(4, 16), (8, 50)])
def test_sine_embeddings_of_cells_are_linearly_independent(grid_size, rank):
  # Without a phase those of opposite cells are opposite: ranks of 8 and 32.
  module = SineEmbedding(grid_size, features=128, scale=3.0)
  embedding, _ = module.init_with_output(jax.random.key(0))
  assert np.linalg.matrix_rank(embedding) >= rank


def test_convolution_of_accelerators_and_that_of_cpus_are_one():
  x, kernel = normal(2, 4, 6, 3), normal(3, 3, 3, 5, seed=1)
  assert_allclose(
    jax.jit(nine_products)(x, kernel),
    jax.jit(convolution)(x, kernel),
    rtol=1e-4,
    atol=1e-5,
  )
