import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from configs import transgan_cifar10
from tests import tiny
from vitgan_jax import gan_step, partitioning, train_state
from vitgan_jax.errors import ConfigError
from vitgan_jax.models import networks, transgan

HEADS = 2
GENERATOR = transgan.Generator(
  image_size=16,
  num_classes=0,
  width=32,
  depths=(1, 2),
  num_heads=HEADS,
  latent_dim=6,
)
DISCRIMINATOR = transgan.Discriminator(
  image_size=8, num_classes=0, width=16, depths=(2, 1, 1), num_heads=HEADS
)
RNG = np.random.default_rng(0)
LATENTS = RNG.normal(size=(3, 6)).astype(np.float32)
IMAGES = RNG.normal(size=(3, 8, 8, 3)).astype(np.float32)


@functools.cache
def params_of(network, *shape):
  shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(shape))
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: rng.normal(0.1, 0.3, x.shape).astype(np.float32), shapes["params"]
  )


def linear(p, x):
  y = x @ torch.tensor(p["kernel"])
  return y + torch.tensor(p["bias"]) if "bias" in p else y


def norm(p, x):
  scale, shift = torch.tensor(p["scale"]), torch.tensor(p["bias"])
  return functional.layer_norm(x, x.shape[-1:], scale, shift, 1e-5)


def block(p, x):
  """A block whose bias is looked up offset by offset."""
  width, count = x.shape[-1], x.shape[1]
  qkv = linear(p["qkv"], norm(p["norm_attention"], x))
  queries, keys, values = (
    y.reshape(-1, count, HEADS, width // HEADS).transpose(1, 2)
    for y in qkv.chunk(3, dim=-1)
  )
  bias = None
  if "position_bias" in p:
    grid = round(count**0.5)
    bias = torch.zeros(HEADS, count, count)
    for i, j in np.ndindex(count, count):
      rows, columns = i // grid - j // grid, i % grid - j % grid
      index = (rows + grid - 1) * (2 * grid - 1) + columns + grid - 1
      bias[:, i, j] = torch.tensor(p["position_bias"][index])
  y = functional.scaled_dot_product_attention(queries, keys, values, bias)
  x = x + linear(p["out"], y.transpose(1, 2).flatten(2))
  y = functional.gelu(linear(p["mlp_in"], norm(p["norm_mlp"], x)))
  return x + linear(p["mlp_out"], y)


def torch_generator(p, latents):
  x = linear(p["stem"], torch.tensor(latents)).reshape(-1, 64, 32)
  x = block(p["stage0_block0"], x + torch.tensor(p["positions0"]))
  x = x.transpose(1, 2).reshape(-1, 32, 8, 8)
  x = functional.pixel_shuffle(x, 2).flatten(2).transpose(1, 2)
  x = x + torch.tensor(p["positions1"])
  x = block(p["stage1_block1"], block(p["stage1_block0"], x))
  return linear(p["rgb"], x).reshape(-1, 16, 16, 3)


def patches(images, side):
  grid = images.shape[1] // side
  x = images.reshape(-1, grid, side, grid, side, 3).transpose(2, 3)
  return x.reshape(-1, grid**2, side**2 * 3)


def torch_discriminator(p, images):
  images = torch.tensor(images)
  x = linear(p["embedding0"], patches(images, 2)) + torch.tensor(
    p["positions0"]
  )
  x = block(p["stage0_block1"], block(p["stage0_block0"], x))
  x = functional.avg_pool2d(x.transpose(1, 2).reshape(-1, 12, 4, 4), 2)
  x = x.flatten(2).transpose(1, 2)
  x = torch.cat([x, linear(p["embedding1"], patches(images, 4))], dim=-1)
  x = block(p["stage1_block0"], x + torch.tensor(p["positions1"]))
  token = torch.tensor(p["class_token"]).expand(len(x), -1, -1)
  x = block(p["stage2_block0"], torch.cat([x, token], dim=1))
  return linear(p["logit"], norm(p["norm_out"], x[:, -1]))[:, 0]


def test_generator_equals_its_torch_twin():
  params = params_of(GENERATOR, 3, 6)
  images = jax.jit(GENERATOR.apply)({"params": params}, LATENTS)
  expected = torch_generator(params, LATENTS).numpy()
  np.testing.assert_allclose(
    images, expected, rtol=1e-4, atol=1e-4 * np.std(expected)
  )


def test_discriminator_equals_its_torch_twin():
  params = params_of(DISCRIMINATOR, 3, 8, 8, 3)
  discriminate = jax.jit(DISCRIMINATOR.apply, static_argnames="train")
  logits = discriminate({"params": params}, IMAGES)
  expected = torch_discriminator(params, IMAGES).numpy()
  assert np.std(expected) > 1e-2
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
  # Noise is for training alone, of a strength that starts at 0.
  keys = jax.random.split(jax.random.key(0), 3)
  noisy = discriminate({"params": params}, IMAGES, None, keys, train=True)
  assert np.all(noisy != logits)
  strengths = {
    name: value
    for name, value in tiny.leaves_by_name(
      jax.jit(DISCRIMINATOR.init)(jax.random.key(0), IMAGES)["params"]
    ).items()
    if name.endswith("noise_strength")
  }
  assert len(strengths) == 4 and not any(strengths.values())


def test_windows_are_those_of_a_loop_and_back():
  x = RNG.normal(size=(2, 64, 3)).astype(np.float32)
  windows = np.asarray(transgan.to_windows(x, 4)).reshape(2, 4, 16, 3)
  image = x.reshape(2, 8, 8, 3)
  for i, (row, column) in enumerate(np.ndindex(2, 2)):
    window = image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
    np.testing.assert_array_equal(windows[:, i], window.reshape(2, 16, 3))
  np.testing.assert_array_equal(
    transgan.from_windows(windows.reshape(8, 16, 3), 8), x
  )


def test_tokens_of_large_grids_attend_within_their_window():
  block = transgan.Block(num_heads=2, grid=2, like_torch=True)
  x = RNG.normal(size=(1, 16, 4)).astype(np.float32)
  params = jax.jit(block.init)(jax.random.key(0), x)
  slope = jax.jit(jax.jacobian(lambda x: block.apply(params, x)[0, 0]))(x)
  reached = np.flatnonzero(np.any(slope != 0, axis=(0, 1, 3)))
  assert list(reached) == [0, 1, 4, 5]


def test_parameters_are_those_of_the_released_code():
  config = transgan_cifar10.get_config()
  nets = networks.build(config)
  state = jax.eval_shape(lambda: train_state.create_train_state(config, nets))
  count = [
    sum(x.size for x in jax.tree.leaves(params))
    for params in (state.g_params, state.d_params)
  ]
  assert [round(n / 1e6, 2) for n in count] == [83.31, 10.21]


def test_step_takes_four_of_the_discriminator_with_its_penalties():
  config = transgan_cifar10.get_config("smoke")
  nets = networks.build(config)
  mesh = partitioning.create_mesh(jax.devices()[:1])
  train_steps = gan_step.make_train_steps(config, nets, mesh)
  state = jax.eval_shape(lambda: train_state.create_train_state(config, nets))
  batch = {"images": tiny.random_images(config, 2, 4), "labels": None}
  after, metrics = jax.eval_shape(train_steps, state, batch, 0)
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
  assert {"penalty/gp", "penalty/drift"} < metrics.keys()


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"data.image_size": 64},
      "of 3 stages from 8 x 8, makes 32 px, .* one depth more than doublings",
    ),
    ({"generator.depths": (1, 0, 1)}, r"depths=\(1, 0, 1\) must be positive"),
    ({"generator.width": 40}, "multiple of 16 times .*num_heads=2"),
    ({"discriminator.depths": (1, 1)}, "must be three"),
    ({"discriminator.width": 30}, "must be a multiple of 4"),
    ({"data.num_classes": 10}, "'transgan' takes no classes"),
  ],
)
def test_what_cannot_be_is_refused(changes, message):
  config = transgan_cifar10.get_config("smoke")
  config.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=message):
    networks.check(config)


@pytest.mark.parametrize("size, fits", [(64, True), (80, False), (96, True)])
def test_images_that_windows_do_not_tile_are_refused(size, fits):
  fields = transgan_cifar10.get_config("smoke").discriminator
  checked = contextlib.nullcontext()
  if not fits:
    checked = pytest.raises(ConfigError, match="40 x 40 tokens, which windows")
  with checked:
    transgan.Discriminator.check(fields, size, "config.discriminator.")
