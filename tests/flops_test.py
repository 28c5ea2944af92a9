import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.flops import model_flops
from configs import cifar10
from vitgan_jax import partitioning
from vitgan_jax.models import networks

X, W = np.ones((8, 6), np.float32), np.ones((6, 6), np.float32)
PRODUCT = 2 * 8 * 6 * 6  # of X @ W, and of each product in its gradients


def twice(x, w):
  return x @ w @ w


def loss(x, w):
  return jnp.sum(jnp.tanh(x @ w))


def squared_slope(x, w):
  return jnp.sum(jax.grad(loss)(x, w) ** 2)


@jax.custom_vjp
def product(x, w):
  return x @ w


product.defvjp(
  lambda x, w: (x @ w, (x, w)),
  lambda inputs, dy: (dy @ inputs[1].T, inputs[0].T @ dy),
)


def over_eight_devices(x_spec):
  mesh = partitioning.create_mesh()
  assert mesh.size == 8
  specs = dict(in_specs=(x_spec, jax.P()), out_specs=x_spec)
  return jax.shard_map(jnp.matmul, mesh=mesh, **specs)


FUNCTIONS = {
  "dense": (lambda x, w: jnp.tanh(x @ w) + 1.0, 1),
  "jit": (jax.jit(twice), 2),
  "custom_vjp": (lambda x, w: product(x, w), 1),
  "scan": (lambda x, w: lax.scan(lambda x, _: (x @ w, 0), x, length=5), 5),
  "cond": (lambda x, w: lax.cond(x[0, 0] > 0, twice, product, x, w), 2),
  "while": (lambda x, w: lax.while_loop(jnp.any, jnp.tanh, x) @ w, 1),
  "grad of x": (jax.grad(loss), 2),
  "grad of both": (jax.grad(loss, (0, 1)), 3),
  # Forward, the slope, and backward through both, which w enters in two places.
  "grad of a slope": (jax.grad(squared_slope, 1), 5),
  "unused grad": (jax.grad(lambda x, w: jnp.sum(product(x, w) ** 2)), 2),
  "remat": (jax.value_and_grad(jax.checkpoint(loss), (0, 1)), 4),
  "split": (over_eight_devices(jax.P(partitioning.BATCH_AXES)), 1),
  "copied": (over_eight_devices(jax.P()), 8),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_products_are_counted_as_often_as_they_are_taken(name):
  function, products = FUNCTIONS[name]
  assert model_flops(function, X, W) == products * PRODUCT


def test_batched_products_are_counted():
  def scores(queries, keys):
    return jnp.einsum("bhnd,bhmd->bhnm", queries, keys)

  x = jnp.zeros((2, 3, 5, 4))  # [B, H, N, d]
  assert model_flops(scores, x, x) == 2 * (2 * 3) * 5 * 5 * 4


@pytest.mark.parametrize(
  "kernel, options, multiply_adds",
  [
    ((3, 3, 6, 10), {}, 2 * 8 * 8 * 10 * (3 * 3 * 6)),
    ((4, 4, 6, 5), {"window_strides": (2, 2)}, 2 * 4 * 4 * 5 * (4 * 4 * 6)),
    ((3, 3, 2, 9), {"feature_group_count": 3}, 2 * 8 * 8 * 9 * (3 * 3 * 2)),
    # To 16 x 16, the transposed of a convolution from there to 8 x 8.
    (
      (4, 4, 6, 5),
      {"lhs_dilation": (2, 2), "padding": [(2, 2), (2, 2)]},
      2 * 8 * 8 * 6 * (4 * 4 * 5),
    ),
  ],
)
def test_convolutions_and_their_gradients_are_counted(
  kernel, options, multiply_adds
):
  images, kernel = jnp.zeros((2, 8, 8, 6)), jnp.zeros(kernel)
  options = {"window_strides": (1, 1), "padding": "SAME", **options}

  def convolve(images, kernel):
    return lax.conv_general_dilated(
      images, kernel, **options, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  def squares(images, kernel):
    return jnp.sum(convolve(images, kernel) ** 2)

  assert model_flops(convolve, images, kernel) == 2 * multiply_adds
  counted = model_flops(jax.grad(squares, (0, 1)), images, kernel)
  assert counted == 3 * 2 * multiply_adds


@pytest.mark.parametrize(
  "function",
  [
    lambda x: lax.while_loop(lambda x: jnp.any(x > 1), lambda x: x @ W, x),
    pl.pallas_call(
      lambda x, y: y.__setitem__(..., x[...] @ x[...].T),
      out_shape=jax.ShapeDtypeStruct((8, 8), np.float32),
    ),
  ],
)
def test_products_that_cannot_be_counted_are_refused(function):
  with pytest.raises(ValueError, match=r"(while|pallas_call) cannot be"):
    model_flops(function, X)


@pytest.mark.parametrize(
  "network, overrides",
  [
    ("generator", {}),
    ("generator", {"patch_decoder": "linear"}),
    ("generator", {"patch_decoder": "conv"}),
    ("generator", {"patch_decoder": "implicit_concat"}),
    ("generator", {"latent_injection": "token", "attention": "l2"}),
    ("discriminator", {}),
    ("discriminator", {"attention": "dot", "spectral_norm": "none"}),
  ],
  ids=str,
)
def test_networks_have_the_flops_that_xla_counts(network, overrides):
  config = cifar10.get_config()
  config[network].update(overrides)
  batch = {
    "generator": jnp.zeros((2, config.generator.latent_dim)),
    "discriminator": jnp.zeros((2, 32, 32, 3)),
  }[network]
  model = getattr(networks.build(config), network)
  variables = jax.eval_shape(model.init, jax.random.key(0), batch)
  lowered = jax.jit(model.apply).lower(variables, batch)
  # XLA counts elementwise operations too, and no products with padding, which
  # are a twentieth of those of the convolutional decoder.
  np.testing.assert_allclose(
    model_flops(model.apply, variables, batch),
    lowered.cost_analysis()["flops"],
    rtol=0.05,
  )
