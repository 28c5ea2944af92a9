"""Both networks with kernels, interpreted on a CPU, against the plain ones."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import leaves, normal
from vitgan_jax.kernels import UnsupportedError
from vitgan_jax.kernels.attention import GROUP_SIZE
from vitgan_jax.models import gat, kinds
from vitgan_jax.models.discriminator import Discriminator
from vitgan_jax.models.generator import Generator

BATCH = 2 * GROUP_SIZE
NETWORK = dict(
  image_size=16, num_classes=0, width=32, depth=1, num_heads=2, mlp_dim=32
)


def make_discriminator(**overrides):
  fields = kinds.DISCRIMINATORS["vitgan"].fields
  return Discriminator(**{**fields, **NETWORK, **overrides})


def make_generator(**overrides):
  fields = kinds.GENERATORS["vitgan"].fields
  small = dict(latent_dim=8, mapping_depth=1, decoder_dim=8)
  return Generator(**{**fields, **NETWORK, **small, **overrides})


GAT = dict(
  image_size=16,
  num_classes=0,
  patch_size=4,
  width=32,
  depth=1,
  num_heads=2,
  num_levels=1,
)
DISCRIMINATORS = Discriminator, gat.Discriminator


@functools.cache
def inputs_of(network):
  if isinstance(network, DISCRIMINATORS):
    size = network.image_size
    return normal(BATCH, size, size, 3)
  return normal(BATCH, network.latent_dim)


def loss(network, variables, params):
  y = network.apply({**variables, "params": params}, inputs_of(network))
  return jnp.sum(jnp.sin(y)), y


NETWORKS = pytest.mark.parametrize(
  "network",
  [
    make_discriminator(),
    pytest.param(make_discriminator(pooling="mean"), marks=pytest.mark.slow),
    make_generator(),
    pytest.param(
      make_generator(latent_injection="token"), marks=pytest.mark.slow
    ),
    gat.Discriminator(**GAT, head_dim=8),
    gat.Generator(**GAT, latent_dim=8),
  ],
  ids=[
    "discriminator",
    "discriminator that reads patches",
    "generator",
    "generator with a token",
    "GAT's discriminator",
    "GAT's generator",
  ],
)


@NETWORKS
def test_network_of_kernels_is_the_plain_one_with_its_gradients(network):
  x = inputs_of(network)
  variables = jax.jit(network.init)(jax.random.key(0), x[:1])

  def gradients_and_output(network):
    gradient = jax.grad(
      functools.partial(loss, network, variables), has_aux=True
    )
    return jax.jit(gradient)(variables["params"])

  expected, y = gradients_and_output(network)
  gradients, kernel_y = gradients_and_output(
    network.clone(implementation="interpret")
  )
  np.testing.assert_allclose(kernel_y, y, atol=1e-5)
  gradients = leaves(gradients)
  for name, gradient in leaves(expected).items():
    assert np.any(gradient != 0), name
    # Sums over images and tokens in another order.
    atol = 2e-5 * max(1.0, np.abs(gradient).max())
    np.testing.assert_allclose(gradients[name], gradient, atol=atol)


@NETWORKS
def test_all_that_has_a_kernel_runs_as_one(network):
  network = network.clone(implementation="interpret")
  x = inputs_of(network)
  variables = jax.eval_shape(network.init, jax.random.key(0), x)
  text = str(
    jax.make_jaxpr(
      lambda v: jax.grad(functools.partial(loss, network, v), has_aux=True)(
        v["params"]
      )
    )(variables)
  )
  names = {
    name.removesuffix("_of_rows") for name in re.findall(r"name=(\w+)", text)
  }
  functions = {"project", "attention"}
  if type(network).__module__ == gat.__name__:
    functions |= {"gated_mlp"}
  elif isinstance(network, Discriminator):
    functions |= {"mlp", "embed"}
  else:
    functions |= {"mlp", "normalise", "modulated_pixels"}
  for name in functions:
    assert {name, f"{name}_backward"} <= names


@pytest.mark.parametrize(
  "network, change, reason",
  [
    (make_discriminator, {"conv_qkv": True}, "convolutional projections"),
    (make_generator, {"conv_qkv": True}, "convolutional projections"),
    (make_discriminator, {"image_size": 24}, "36 tokens an image are not"),
    (make_generator, {"image_size": 24}, "36 tokens an image are not"),
    (
      make_discriminator,
      {"image_size": 128, "width": 384},
      "16384 rows that belong together do not fit",
    ),
    (
      make_generator,
      {"image_size": 128, "latent_injection": "add"},
      "1024 tokens an image do not fit",
    ),
    (make_discriminator, {"mlp_dim": 10**6}, "the weights do not fit"),
    (make_generator, {"mlp_dim": 10**6}, "the weights do not fit"),
  ],
)
def test_network_that_has_no_kernel_says_why(network, change, reason):
  network = network(**change, implementation="interpret")
  with pytest.raises(UnsupportedError, match=reason):
    jax.eval_shape(network.init, jax.random.key(0), inputs_of(network))


@pytest.mark.parametrize("network", [make_discriminator(), make_generator()])
def test_images_that_fall_into_no_groups_are_refused(network):
  network = network.clone(implementation="interpret")
  with pytest.raises(UnsupportedError, match="31 images are not a multiple"):
    jax.eval_shape(network.init, jax.random.key(0), inputs_of(network)[1:])
