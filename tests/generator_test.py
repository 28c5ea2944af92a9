"""Tests of the mapping network and of the generator as a whole."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose
import pytest

from tests.reference import (
  apply,
  dense,
  init_params,
  leaves,
  normal,
  standardise,
)
from vitgan_jax.models import kinds
from vitgan_jax.models.generator import Generator
from vitgan_jax.models.mapping import MappingNetwork

SMALL = dict(
  image_size=8,
  patch_size=4,
  width=16,
  depth=1,
  num_heads=2,
  mlp_dim=24,
  latent_dim=12,
  mapping_depth=2,
  decoder_dim=20,
)


def make_generator(**overrides):
  """Returns the default generator with other fields."""
  fields = kinds.GENERATORS["vitgan"].fields
  return Generator(**{**fields, "num_classes": 0, **overrides})


def reference_mapping(params, latents, lr_multiplier, labels=None):
  def unit(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))

  params, w = dict(params), unit(latents)
  if labels is not None:
    layer = params.pop("class_embedding")
    embedding = layer["kernel"][labels] / np.sqrt(len(layer["kernel"]))
    w = np.concatenate([w, unit(embedding + layer["bias"])], axis=-1)
  for i in range(len(params)):
    y = dense(params[f"dense{i}"], w, lr_multiplier=lr_multiplier)
    w = np.sqrt(2.0) * np.where(y > 0, y, 0.2 * y)
  return w


@pytest.mark.parametrize("labels", [None, np.array([2, 0, 2, 1])])
@pytest.mark.parametrize("lr_multiplier", [1.0, 0.01])
def test_mapping_matches_numpy(lr_multiplier, labels):
  latents = 3.0 * normal(4, 6)
  num_classes = 0 if labels is None else 3
  mapping = MappingNetwork(6, 3, lr_multiplier, num_classes)
  params = init_params(mapping, latents, labels)
  expected = reference_mapping(params, latents, lr_multiplier, labels)
  w = apply(mapping, params, latents, labels)
  assert_allclose(w, expected, rtol=1e-4, atol=1e-5)


def test_mapping_keeps_the_scale_of_w_through_eight_layers():
  latents = normal(256, 256)
  w, _ = jax.jit(MappingNetwork(256, 8, 0.01).init_with_output)(
    jax.random.key(0), latents
  )
  # A layer with the gain sqrt(2) multiplies the mean square by 1.04, one
  # without it by 0.52, which leaves a standard deviation of 0.07.
  assert_allclose(np.std(w), 1.0, rtol=0.3)
  # What is left for the latents is less, as all w come to share a mean.
  assert np.std(w, axis=0).mean() > 0.5


@pytest.mark.parametrize("latent_injection", ["sln", "add", "token"])
def test_generator_without_blocks_matches_numpy(latent_injection):
  generator = make_generator(
    **{**SMALL, "depth": 0, "image_size": 12},
    latent_injection=latent_injection,
    patch_decoder="linear",
    position_scale=2.0,
  )
  latents = normal(2, 12)
  params = init_params(generator, latents)
  w = reference_mapping(params["mapping"], latents, 0.01)
  images = apply(generator, params, latents)
  assert images.shape == (2, 12, 12, 3)
  norm = params["norm_out"]
  for b, i, j in np.ndindex(2, 3, 3):
    centre = np.array([2 * i - 2, 2 * j - 2]) / 3
    positions = params["positions"]
    h = np.sin(2.0 * centre @ positions["frequencies"] + positions["phase"])
    if latent_injection == "add":
      h = h + dense(params["latent_token"], w[b])
    if latent_injection == "sln":
      gamma, beta = np.split(dense(norm["modulation"], w[b]), 2)
      y = gamma * standardise(h) + beta
    else:
      y = standardise(h) * norm["scale"] + norm["bias"]
    tile = dense(params["decoder"]["rgb"], y).reshape(4, 4, 3)
    pixels = images[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
    assert_allclose(pixels, tile, rtol=1e-4, atol=1e-4)


def test_latent_token_reaches_the_patches():
  generator = make_generator(**SMALL, latent_injection="token")
  latents = normal(8, 12)
  images = apply(generator, init_params(generator, latents), latents)
  assert images.std(axis=0).mean() > 0.01


def test_images_vary_over_latents_as_much_as_over_pixels_at_init():
  generator = make_generator(
    image_size=16,
    width=128,
    depth=2,
    num_heads=4,
    mlp_dim=256,
    latent_dim=128,
    decoder_dim=128,
  )
  init = jax.jit(generator.init_with_output)
  latents = normal(32, 128)
  # One draw of the weights scatters by a quarter.
  images = np.stack(
    [init(jax.random.key(seed), latents)[0] for seed in range(6)]
  )
  mean_images = images.mean(axis=1)
  assert images.std(axis=1).mean() > mean_images.std(axis=(1, 2, 3)).mean()


@pytest.mark.parametrize(
  "patch_decoder", ["implicit", "implicit_concat", "linear", "conv"]
)
@pytest.mark.parametrize("latent_injection", ["sln", "add", "token"])
def test_every_switch_traces_to_images(latent_injection, patch_decoder):
  for attention, conv_qkv in itertools.product(["dot", "l2"], [False, True]):
    generator = make_generator(
      **SMALL,
      latent_injection=latent_injection,
      attention=attention,
      conv_qkv=conv_qkv,
      patch_decoder=patch_decoder,
    )
    images, variables = jax.eval_shape(
      generator.init_with_output, jax.random.key(0), normal(3, 12)
    )
    assert images.shape == (3, 8, 8, 3)
    assert images.dtype == jnp.float32
    assert set(variables) == {"params"}


@pytest.mark.parametrize(
  "conv_qkv, millions, rtol", [(False, 16.1, 5e-3), (True, 37.3, 0.03)]
)
def test_vitgan_64_has_the_published_number_of_parameters(
  conv_qkv, millions, rtol
):
  generator = make_generator(
    image_size=64,
    patch_size=8,
    width=384,
    depth=6,
    num_heads=6,
    mlp_dim=1536,
    latent_dim=384,
    mapping_depth=8,
    decoder_dim=384,
    conv_qkv=conv_qkv,
  )
  variables = jax.eval_shape(
    generator.init, jax.random.key(0), np.zeros((1, 384))
  )
  count = sum(leaf.size for leaf in jax.tree.leaves(variables))
  assert_allclose(count, millions * 1e6, rtol=rtol)


@pytest.fixture(scope="module")
def small():
  """Returns (generator, parameters, latents) of the toy size."""
  generator, latents = make_generator(**SMALL), normal(4, 12)
  return generator, init_params(generator, latents), latents


def test_images_are_not_squashed(small):
  generator, params, latents = small
  rgb = params["decoder"]["rgb"]
  brighter = {**rgb, "bias": rgb["bias"] + 5.0}
  brighter = {**params, "decoder": {**params["decoder"], "rgb": brighter}}
  images = apply(generator, params, latents)
  assert_allclose(
    apply(generator, brighter, latents), images + 5.0, rtol=1e-4, atol=1e-4
  )


def test_every_parameter_is_trained(small):
  generator, params, latents = small

  @jax.jit
  @jax.grad
  def gradient(params):
    return jnp.mean(generator.apply({"params": params}, latents) ** 2)

  for name, leaf in leaves(gradient(params)).items():
    assert np.any(leaf != 0), name


def test_second_call_makes_no_parameters(small):
  generator, params, latents = small
  _, variables = jax.eval_shape(
    lambda p: generator.apply({"params": p}, latents, mutable=True), params
  )
  assert leaves(variables["params"]).keys() == leaves(params).keys()


def test_bfloat16_images_are_close_to_float32_ones(small):
  generator, params, latents = small
  bfloat16 = generator.clone(dtype=jnp.bfloat16)
  variables = jax.eval_shape(bfloat16.init, jax.random.key(0), latents)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  expected = apply(generator, params, latents)
  images = apply(bfloat16, params, latents)
  assert images.dtype == jnp.float32
  error = np.std(images - expected) / np.std(expected)
  # Some twenty roundings by 2**-9 one after the other. Were it 1e-6, nothing
  # would have been computed in bfloat16.
  assert 1e-4 < error < 0.02


@pytest.mark.parametrize("decoder", ["implicit", "linear"])
def test_grey_images_are_the_mean_of_the_channels(decoder):
  coloured, grey = (
    make_generator(**SMALL, patch_decoder=decoder, grey=is_grey)
    for is_grey in (False, True)
  )
  params = init_params(coloured, normal(4, 12))
  images, others = (apply(x, params, normal(4, 12)) for x in (coloured, grey))
  assert np.ptp(images, axis=-1).max() > 0.1
  mean = images.mean(axis=-1, keepdims=True)
  assert_allclose(others, np.repeat(mean, 3, axis=-1), atol=1e-6)
