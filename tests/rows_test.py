"""Functions of rows as kernels, interpreted on a CPU, against the plain way."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import normal
from vitgan_jax import partitioning
from vitgan_jax.models import fused_rows

WIDTH, HIDDEN = 8, 24


def mlp(layer, x, shift, weights):
  """Takes one shift for several rows, and has two results."""
  first, second = weights
  y = x.reshape(len(shift), -1, WIDTH) + shift[:, None]
  y = jnp.tanh(layer(y.reshape(x.shape), *first))
  return {"y": x + layer(y, *second), "square": y * y}


def weights(scale=0.3):
  return (
    (scale * normal(WIDTH, HIDDEN), normal(HIDDEN)),
    (scale * normal(HIDDEN, WIDTH, seed=1), None),
  )


def apply(x, shift, weights, num_devices=0, **options):
  options = {"dtype": jnp.float32, **options}
  if num_devices:
    mesh = partitioning.create_mesh(jax.devices()[:num_devices])
    options.update(mesh=mesh, interpret=True)

  @jax.jit  # the kernel's gradients are not known outside
  def run(x, shift, weights):
    return fused_rows.apply(
      mlp, x, {"shift": shift}, {"weights": weights}, **options
    )

  return run(x, shift, weights)


def assert_close(actual, expected, atol):
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    assert np.std(b) > 0.01
    np.testing.assert_allclose(a, b, atol=atol)


# One tile on each of two devices, and four on one.
@pytest.mark.parametrize("num_devices, max_rows", [(2, 512), (1, 32)])
def test_kernel_is_the_function_with_its_gradients(num_devices, max_rows):
  args = normal(8, 16, WIDTH), normal(8, WIDTH, seed=2), weights()
  expected, vjp = jax.vjp(apply, *args)
  actual, kernel_vjp = jax.vjp(
    functools.partial(apply, num_devices=num_devices, max_rows=max_rows), *args
  )
  assert expected["square"].shape == (8, 16, HIDDEN)
  assert_close(actual, expected, 1e-5)
  dy = jax.tree.map(lambda y: normal(*y.shape, seed=3), expected)
  # Sums over 128 rows in another order.
  assert_close(kernel_vjp(dy), vjp(dy), 1e-4)


def test_what_is_shared_has_a_gradient_only_if_it_is_asked_for():
  args = normal(2, 16, WIDTH), normal(2, WIDTH, seed=2), weights()

  def loss(*args):
    # Of one result alone: the other's gradient is a symbolic zero.
    return jnp.sum(jnp.sin(apply(*args, num_devices=1)["y"]))

  def names(argnums):
    text = str(jax.make_jaxpr(jax.grad(loss, argnums))(*args))
    return set(re.findall(r"mlp_backward\w*", text))

  assert names((0, 1)) == {"mlp_backward_of_rows"}
  assert names((0, 1, 2)) == {"mlp_backward"}
  alone, together = (
    jax.grad(loss, (0, 1))(*args),
    jax.grad(loss, (0, 1, 2))(*args),
  )
  assert_close(alone, together[:2], 1e-6)


def test_bfloat16_is_as_near_to_float32_as_the_plain_way():
  args = normal(4, 16, WIDTH), normal(4, WIDTH, seed=2), weights()
  exact = apply(*args)["y"]
  args = *(jnp.asarray(x, jnp.bfloat16) for x in args[:2]), args[2]
  errors = []
  for num_devices in (0, 1):
    y = apply(*args, num_devices=num_devices, dtype=jnp.bfloat16)["y"]
    assert y.dtype == jnp.bfloat16
    errors.append(np.abs(y.astype(jnp.float32) - exact).max())
  assert 0 < errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize(
  "num_rows, num_shifts, factor, num_tiles",
  [
    (4096, 4096, 1, 4),  # of 512 rows on each of two devices
    (4096, 2, 1, None),  # a shift is not to be cut
    (4096, 8, 1, 4),
    (4160, 4160, 1, 5),  # of 416 rows
    (24, 24, 1, None),  # no whole registers
    (2048, 2048, 8000, 8),  # more weights: fewer rows
    (2048, 2048, 10_000, None),  # weights that do not fit
  ],
)
def test_tiles_are_as_few_as_fit(num_rows, num_shifts, factor, num_tiles):
  tiled = np.zeros((num_rows, 384)), {"shift": np.zeros((num_shifts, 384))}
  shared = {"w": jax.ShapeDtypeStruct((factor, 1024), jnp.float32)}
  assert fused_rows._num_tiles(tiled, shared, 2, 512) == num_tiles


def test_dense_sums_gradients_of_weights_in_float32():
  x = jnp.asarray(normal(4096, 2) + 1.0, jnp.bfloat16)
  kernel, bias = normal(2, 3), normal(3)

  def loss(kernel, bias):
    y = fused_rows.dense(x, kernel, bias, jnp.bfloat16, jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    return jnp.sum(y.astype(jnp.float32))

  d_kernel, d_bias = jax.grad(loss, (0, 1))(kernel, bias)
  expected = np.sum(np.asarray(x, np.float64), axis=0)
  # bfloat16 would round them by up to 2e-3.
  np.testing.assert_allclose(
    d_kernel, np.broadcast_to(expected[:, None], (2, 3)), rtol=1e-5
  )
  np.testing.assert_array_equal(d_bias, [4096] * 3)


def test_dense_has_a_second_derivative():
  x, kernel = normal(5, 3), normal(3, 4)

  def gradient(layer):
    def inner(x):
      return jnp.sum(jnp.sin(layer(x, kernel)))

    return jax.grad(lambda x: jnp.sum(jax.grad(inner)(x) ** 2))(x)

  def layer(x, kernel):
    return fused_rows.dense(x, kernel, None, jnp.float32, jnp.float32)

  np.testing.assert_allclose(
    gradient(layer), gradient(lambda x, w: x @ w), rtol=1e-4, atol=1e-5
  )
