import math

import jax
import numpy as np
import pytest
import torch
from torch.nn import functional

from configs import ganformer_cifar10
from vitgan_jax.errors import ConfigError
from vitgan_jax.models import ganformer, networks

SIZE, LATENTS, DIM = 8, 3, 8
GENERATOR = ganformer.Generator(
  image_size=SIZE,
  num_classes=0,
  num_latents=LATENTS,
  component_dim=DIM,
  mapping_depth=2,
  mapping_lr_multiplier=0.01,
  attention_dropout=0.3,
  base_channels=32,  # 6 channels at 4 px, 4 at 8
  max_channels=6,
)
Z = np.random.default_rng(0).normal(size=(2, GENERATOR.latent_dim))
Z = Z.astype(np.float32)


def dense(p, x, lr=1.0):
  weight = torch.tensor(p["kernel"]).T * lr / len(p["kernel"]) ** 0.5
  bias = torch.tensor(p["bias"]) * lr if "bias" in p else None
  return functional.linear(x, weight, bias)


def lrelu(x):
  return functional.leaky_relu(x, 0.2) * 2**0.5


def attend(p, x, latents, x_positions, positions):
  """[B, N, C], each cell by itself."""
  queries = dense(p["query"], x) + dense(p["query_position"], x_positions)
  keys = dense(p["key"], latents) + dense(p["key_position"], positions)
  values = dense(p["value"], latents)
  found = functional.scaled_dot_product_attention(queries, keys, values)
  x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-8)
  return x * (dense(p["scale"], found) + 1)


def mapping(p, x, positions=None):
  for i in range(2):
    y = x
    if positions is not None:
      y = attend(p[f"attention{i}"], x, x, positions, positions)
    y = lrelu(dense(p[f"dense{i}_0"], y, 0.01))
    x = functional.leaky_relu(x + dense(p[f"dense{i}_1"], y, 0.01), 0.2)
  return lrelu(dense(p["dense_out"], x, 0.01))


def spaced(x):
  """Filters an image [B, C, H, W] with zeros between its pixels, times four."""
  weights = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
  kernel = torch.outer(weights, weights)[None, None]
  channels = x.shape[1]
  kernel = kernel.expand(channels, 1, 4, 4)
  return functional.conv_transpose2d(
    x, kernel, stride=2, padding=1, groups=channels
  )


def convolve(p, x, style, up=False):
  """A kernel for each image of [B, C, H, W], demodulated as it stands."""
  kernel = torch.tensor(p["kernel"]).permute(3, 2, 0, 1)
  kernel = kernel / math.prod(p["kernel"].shape[:3]) ** 0.5
  kernels = kernel[None] * style[:, None, :, None, None]
  norms = torch.sqrt(kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8)
  images = []
  for image, own in zip(x, kernels / norms):
    if not up:
      images.append(functional.conv2d(image[None], own, padding=1))
      continue
    wide = functional.conv_transpose2d(
      image[None], own.flip(2, 3).transpose(0, 1), stride=2
    )
    weights = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
    blur = torch.outer(weights, weights).expand(len(own), 1, 4, 4)
    wide = functional.pad(wide, (1, 1, 1, 1))
    images.append(functional.conv2d(wide, blur, groups=len(own)))
  return torch.cat(images)


def positions_of(size):
  """Written cell by cell."""
  rows = []
  for y in np.linspace(-1, 1, size):
    for x in np.linspace(-1, 1, size):
      row = []
      for c in (x, y):
        angles = [c / 10_000 ** (4 * i / DIM) for i in range(DIM // 4)]
        row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
      rows.append(row)
  return torch.tensor(rows, dtype=torch.float32)


def layer(p, x, w, positions, noise, up=False, gain=1.0):
  x = convolve(p["conv"], x, dense(p["style"], w[:, -1]), up)
  cells = x.flatten(2).transpose(1, 2)
  cells = attend(
    p["attention"], cells, w[:, :-1], positions_of(x.shape[-1]), positions
  )
  x = cells.transpose(1, 2).reshape(x.shape)
  x = x + float(p["noise_scale"]) * torch.tensor(noise).permute(0, 3, 1, 2)
  bias = torch.tensor(p["conv"]["bias"])[None, :, None, None]
  return gain * lrelu(x + bias)


def torch_images(p, noise):
  z = torch.tensor(Z).reshape(2, LATENTS + 1, DIM)
  z = z / torch.sqrt(z.square().mean(-1, keepdim=True) + 1e-8)
  positions = torch.tensor(p["positions"])
  local = mapping(p["local_mapping"], z[:, :-1], positions)
  w = torch.cat([local, mapping(p["global_mapping"], z[:, -1:])], dim=1)
  x = torch.tensor(p["constant"]).permute(2, 0, 1).expand(2, -1, -1, -1)
  x = layer(p["layer0"], x, w, positions, noise[0])
  y = layer(p["layer1"], x, w, positions, noise[1], up=True)
  y = layer(p["layer2"], y, w, positions, noise[2], gain=0.5**0.5)
  branch = dense(p["branch8"], x.movedim(1, -1)).movedim(-1, 1)
  x = spaced(branch) * 0.5**0.5 + y
  x = convolve(p["conv_last"], x, dense(p["style"], w[:, -1]))
  style = dense(p["rgb"]["style"], w[:, -1])[:, None, None]
  return dense(p["rgb"]["rgb"], x.movedim(1, -1) * style).numpy()


@pytest.fixture(scope="module")
def params():
  shapes = jax.eval_shape(GENERATOR.init, jax.random.key(0), Z)["params"]
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: rng.normal(0.2, 0.7, x.shape).astype(np.float32), shapes
  )


def test_generator_equals_its_torch_twin(params, monkeypatch):
  rng = np.random.default_rng(2)
  noise = [rng.normal(size=(2, r, r, 1)).astype(np.float32) for r in (4, 8, 8)]
  monkeypatch.setattr(ganformer, "draw_noise", lambda keys, sizes: noise)
  images = jax.jit(lambda params: GENERATOR.apply({"params": params}, Z))(
    params
  )
  expected = torch_images(params, noise)
  np.testing.assert_allclose(
    images, expected, rtol=1e-4, atol=1e-4 * np.std(expected)
  )


def test_a_latent_reaches_pixels_by_attention_alone(params):
  """Without what scales them, only the global latent is seen."""
  blind = jax.tree_util.tree_map_with_path(
    lambda path, x: 0 * x if "scale" in jax.tree_util.keystr(path) else x,
    params,
  )
  w = GENERATOR.apply({"params": params}, Z, method="mapping")

  def images(params, w):
    return GENERATOR.apply({"params": params}, w, method="synthesize")

  local, last = w.at[:, 0].add(1.0), w.at[:, -1].add(1.0)
  assert np.abs(images(params, local) - images(params, w)).max() > 1e-3
  np.testing.assert_array_equal(images(blind, local), images(blind, w))
  assert np.abs(images(blind, last) - images(blind, w)).max() > 1e-3


def test_attention_is_dropped_in_training_alone_and_keeps_its_mean(params):
  keys = jax.random.split(jax.random.key(0), 2)
  w = GENERATOR.apply({"params": params}, Z, method="mapping")

  def images(train):
    return GENERATOR.apply(
      {"params": params}, w, keys, train, method="synthesize"
    )

  assert np.abs(images(True) - images(False)).max() > 1e-3
  mask = ganformer.LatentAttention(dropout=0.3)._mask
  masks = jax.vmap(lambda key: mask(key, (50, 4)))(
    jax.random.split(jax.random.key(1), 4000)
  )
  assert np.mean(masks) == pytest.approx(1.0, abs=0.01)
  dropped = np.asarray(masks) == 0
  assert np.mean(dropped.all(axis=1)) == pytest.approx(0.15, abs=0.01)
  assert np.mean(dropped) == pytest.approx(1 - 0.85**2, abs=0.01)


@pytest.mark.parametrize(
  "size, layers, millions", [(32, 7, 24.14), (64, 9, 30.38)]
)
def test_parameters_are_those_of_the_released_code(size, layers, millions):
  config = ganformer_cifar10.get_config()
  config.data.image_size = size
  generator = networks.build(config).generator
  latents = np.zeros((1, 17 * 32), np.float32)
  shapes = jax.eval_shape(generator.init, jax.random.key(0), latents)
  count = sum(x.size for x in jax.tree.leaves(shapes["params"]))
  # Of the duplex attention there: a weight for each of 2 * 512 features, and as
  # many for the centroid of each of 16 latents.
  duplex = layers * (1 + 16) * 2 * 512
  assert round((count + duplex) / 1e6, 2) == millions


@pytest.mark.parametrize(
  "field, value", [("component_dim", 30), ("num_latents", 0)]
)
def test_fields_that_cannot_be_are_refused(field, value):
  config = ganformer_cifar10.get_config("smoke")
  config.generator[field] = value
  with pytest.raises(ConfigError, match=f"generator.{field}={value} must be"):
    networks.check(config)
  config = ganformer_cifar10.get_config("smoke")
  config.data.num_classes = 10
  with pytest.raises(ConfigError, match="num_classes"):
    networks.check(config)
