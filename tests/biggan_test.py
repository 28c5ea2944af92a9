import functools

import jax
from jax.sharding import PartitionSpec
import numpy as np
import pytest
import torch
from torch.nn import functional

from configs import biggan_cifar10
from tests import tiny
from vitgan_jax import gan_step, partitioning, train_state
from vitgan_jax.errors import ConfigError
from vitgan_jax.models import biggan, networks

CLASSES = 3
COMMON = dict(num_classes=CLASSES, attention_resolution=8, kernel_init="normal")
GENERATOR = biggan.Generator(
  image_size=8, latent_dim=6, channels=(8, 16), **COMMON
)
DISCRIMINATOR = biggan.Discriminator(
  image_size=16, channels=(8, 16, 16), num_halvings=1, **COMMON
)
RNG = np.random.default_rng(0)
LATENTS = RNG.normal(size=(8, 6)).astype(np.float32)
IMAGES = RNG.normal(size=(8, 16, 16, 3)).astype(np.float32)
LABELS = np.array([0, 2, 1, 1, 0, 2, 0, 1], np.int32)


@functools.cache
def variables_of(network):
  inputs = LATENTS if network is GENERATOR else IMAGES
  shapes = jax.eval_shape(network.init, jax.random.key(0), inputs, LABELS)
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda x: (
      rng.uniform(0.2, 1.0, x.shape).astype(np.float32)
      * rng.choice([-1, 1], x.shape).astype(np.float32) ** (x.ndim > 0)
    ),
    shapes,
  )
  if network is GENERATOR:
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
  return variables


def conv(p, spectral, x):
  """A convolution of the kernel over its norm, as u shows it; x is NCHW."""
  kernel = torch.tensor(p["kernel"], dtype=torch.float64)
  matrix = kernel.reshape(-1, kernel.shape[-1])
  u = torch.tensor(spectral["norm"]["u"], dtype=torch.float64)
  v = matrix @ u
  v /= torch.linalg.norm(v)
  kernel = kernel / (v @ matrix @ u)
  bias = torch.tensor(p["bias"], dtype=torch.float64) if "bias" in p else None
  if kernel.ndim == 2:
    return functional.linear(x, kernel.T, bias)
  return functional.conv2d(x, kernel.permute(3, 2, 0, 1), bias, padding="same")


def attend(p, spectral, x):
  def part(name, pooled=False):
    y = conv(p[name], spectral[name], x)
    return (functional.max_pool2d(y, 2) if pooled else y).flatten(2)

  query, key, value = part("query"), part("key", True), part("value", True)
  weights = torch.softmax(query.transpose(1, 2) @ key, dim=-1)
  y = (value @ weights.transpose(1, 2)).reshape(len(x), -1, *x.shape[2:])
  return x + float(p["strength"]) * conv(p["out"], spectral["out"], y)


def torch_generator(variables, latents, labels, train):
  p, spectral = variables["params"], variables["spectral"]
  statistics = variables["batch_stats"]

  def norm(x, name, *where):
    own, kept = p, statistics
    for part in (*where, name):
      own, kept = own[part], kept[part]
    kept = {
      k: torch.tensor(v, dtype=torch.float64) for k, v in kept["norm"].items()
    }
    x = functional.batch_norm(x, kept["mean"], kept["var"], training=train)
    if "gain" in own:
      gain, bias = (torch.tensor(own[k])[labels] for k in ("gain", "bias"))
      return (1 + gain[:, :, None, None]) * x + bias[:, :, None, None]
    scale, shift = (torch.tensor(own["norm"][k]) for k in ("scale", "bias"))
    return scale[:, None, None] * x + shift[:, None, None]

  x = conv(
    p["stem"], spectral["stem"], torch.tensor(latents, dtype=torch.float64)
  )
  x = x.reshape(-1, 4, 4, 8).permute(0, 3, 1, 2)
  block, u = p["block0"], spectral["block0"]
  y = functional.interpolate(
    functional.relu(norm(x, "norm0", "block0")), scale_factor=2
  )
  y = conv(block["conv0"], u["conv0"], y)
  y = conv(
    block["conv1"], u["conv1"], functional.relu(norm(y, "norm1", "block0"))
  )
  x = y + conv(
    block["branch"], u["branch"], functional.interpolate(x, scale_factor=2)
  )
  x = attend(p["attention"], spectral["attention"], x)
  x = conv(p["rgb"], spectral["rgb"], functional.relu(norm(x, "norm_out")))
  return torch.tanh(x).permute(0, 2, 3, 1).numpy()


def torch_discriminator(variables, images, labels):
  p, spectral = variables["params"], variables["spectral"]
  x = torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2)
  for i in range(3):
    block, u = p[f"block{i}"], spectral[f"block{i}"]
    y = functional.relu(x) if i else x
    y = functional.relu(conv(block["conv0"], u["conv0"], y))
    y = conv(block["conv1"], u["conv1"], y)
    if "branch" in block:
      x = conv(block["branch"], u["branch"], x)
    x = x + y
    if i == 0:
      x = attend(
        p["attention"], spectral["attention"], functional.avg_pool2d(x, 2)
      )
  x = functional.relu(x).sum(dim=(2, 3))
  classes = torch.eye(CLASSES, dtype=torch.float64)[labels]
  classes = conv(p["class_embedding"], spectral["class_embedding"], classes)
  logits = conv(p["logit"], spectral["logit"], x)[:, 0]
  return (logits + torch.sum(classes * x, dim=-1)).numpy()


@pytest.mark.parametrize("num_devices", [1, 8])
def test_generator_in_training_has_the_statistics_of_the_whole_batch(
  num_devices,
):
  variables = variables_of(GENERATOR)
  mesh = partitioning.create_mesh(jax.devices()[:num_devices])
  whole, split = PartitionSpec(), PartitionSpec(partitioning.BATCH_AXES)

  def generate(variables, latents, labels):
    return GENERATOR.apply(
      variables, latents, labels, train=True, mutable=["batch_stats"]
    )

  images, updates = jax.jit(
    jax.shard_map(
      generate,
      mesh=mesh,
      in_specs=(whole, split, split),
      out_specs=(split, whole),
    )
  )(variables, LATENTS, LABELS)
  expected = torch_generator(variables, LATENTS, LABELS, train=True)
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(images, expected, rtol=1e-4, atol=1e-4)
  kept = tiny.leaves_by_name(variables["batch_stats"])
  for name, value in tiny.leaves_by_name(updates["batch_stats"]).items():
    assert np.all(value != kept[name]), name


def test_generator_samples_by_its_standing_statistics():
  variables = variables_of(GENERATOR)
  images = jax.jit(GENERATOR.apply)(variables, LATENTS, LABELS)
  expected = torch_generator(variables, LATENTS, LABELS, train=False)
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(images, expected, rtol=1e-4, atol=1e-4)


def test_discriminator_equals_its_torch_twin():
  variables = variables_of(DISCRIMINATOR)
  logits = jax.jit(DISCRIMINATOR.apply)(variables, IMAGES, LABELS)
  expected = torch_discriminator(variables, IMAGES, LABELS)
  np.testing.assert_allclose(
    logits, expected, rtol=1e-4, atol=1e-4 * np.std(expected)
  )


def sizes_of(config):
  nets = networks.build(config)
  state = jax.eval_shape(lambda: train_state.create_train_state(config, nets))
  return [
    round(sum(x.size for x in jax.tree.leaves(params)) / 1e6, 2)
    for params in (state.g_params, state.d_params)
  ]


def test_parameters_are_those_of_the_released_code():
  assert sizes_of(biggan_cifar10.get_config()) == [4.30, 4.21]
  config = biggan_cifar10.get_config()
  config.data.image_size = 64
  config.data.num_classes = 1
  config.generator.channels = (1024, 1024, 512, 256, 128)
  config.discriminator.channels = (64, 128, 256, 512, 1024)
  config.discriminator.num_halvings = 4
  assert sizes_of(config) == [32.03, 19.54]


def test_step_keeps_the_state_in_shape_and_updates_its_statistics():
  config = biggan_cifar10.get_config("smoke")
  nets = networks.build(config)
  mesh = partitioning.create_mesh(jax.devices()[:1])
  train_steps = gan_step.make_train_steps(config, nets, mesh)
  state = jax.eval_shape(lambda: train_state.create_train_state(config, nets))
  batch = {
    "images": tiny.random_images(config, 2, 4),
    "labels": np.zeros((2, 4, config.batch_size), np.int32),
  }
  after, _ = jax.eval_shape(train_steps, state, batch, 0)
  assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, state)
  assert {"batch_stats", "spectral"} == after.g_model_state.keys()
  assert "batch_stats" in after.g_ema_model_state


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"data.image_size": 64}, "doubles 4 x 4 to 32 px"),
    ({"generator.channels": (8, 0, 8, 8)}, "must be positive numbers"),
    ({"generator.kernel_init": "he"}, "kernel_init='he' must be"),
    ({"discriminator.num_halvings": 3}, "must be from 0 to 2, the number of"),
    ({"data.image_size": 34}, "doubles 4 x 4 to 32 px, not .*=34"),
    ({"generator.attention_resolution": 4}, "one of 0, 8, 16, 32"),
    ({"discriminator.attention_resolution": 32}, "one of 0, 16, 8"),
    (
      {
        "generator.channels": (8, 8, 4, 8),
        "generator.attention_resolution": 16,
      },
      "generator.channels=.* must have at least 8 at .*=16",
    ),
    (
      {
        "discriminator.channels": (8, 4),
        "discriminator.attention_resolution": 8,
      },
      "discriminator.channels=.* must have at least 8 at .*=8",
    ),
  ],
)
def test_what_cannot_be_is_refused(changes, message):
  config = biggan_cifar10.get_config("smoke")
  config.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=message):
    networks.check(config)


def test_images_that_cannot_be_halved_as_often_are_refused():
  fields = biggan_cifar10.get_config("smoke").discriminator
  with pytest.raises(ConfigError, match="must be a multiple of 4"):
    biggan.Discriminator.check(fields, 34, "config.discriminator.")
