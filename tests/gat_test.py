import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from configs import gat_cifar10
from tests import tiny
from vitgan_jax import gan_step, partitioning, train_state
from vitgan_jax.errors import ConfigError
from vitgan_jax.models import gat, networks

GRID, WIDTH, HEADS, LEVELS, CLASSES = 3, 24, 3, 2, 4
SIZES = dict(
  image_size=6,
  num_classes=CLASSES,
  patch_size=2,
  width=WIDTH,
  depth=4,
  num_heads=HEADS,
  num_levels=LEVELS,
)
GENERATOR = gat.Generator(**SIZES, latent_dim=8)
DISCRIMINATOR = gat.Discriminator(**SIZES, head_dim=20)
RNG = np.random.default_rng(0)
LATENTS = RNG.normal(size=(3, 8)).astype(np.float32)
IMAGES = RNG.normal(size=(3, 6, 6, 3 * LEVELS)).astype(np.float32)
LABELS = np.array([0, 3, 1], np.int32)


@functools.cache
def params_of(network, *inputs_of):
  """Returns parameters that are all away from where they start."""
  inputs = LATENTS if network is GENERATOR else IMAGES
  shapes = jax.eval_shape(network.init, jax.random.key(0), inputs, LABELS)
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: rng.normal(0.3, 0.5, x.shape).astype(np.float32), shapes["params"]
  )


def linear(p, x):
  return x @ torch.tensor(p["kernel"]) + torch.tensor(p["bias"])


def slow_linear(p, x):
  return 0.01 * linear(p, x)


def rms(x, p=None):
  scale = None if p is None else torch.tensor(p["scale"])
  return functional.rms_norm(x, x.shape[-1:], scale, 1e-6)


def positions():
  """Sine and cosine of row and column, token by token."""
  rows = []
  for i, j in np.ndindex(GRID, GRID):
    row = [f(i / 1e4 ** (k / 6)) for f in (np.sin, np.cos) for k in range(6)]
    row += [f(j / 1e4 ** (k / 6)) for f in (np.sin, np.cos) for k in range(6)]
    rows.append(row)
  return torch.tensor(np.float32(rows))


def turned(x):
  """Rotary positions as a product of complex numbers; x is [B, N, H, 8]."""
  angles = [
    [i / 1e4 ** (k / 2) for k in range(2)]
    + [j / 1e4 ** (k / 2) for k in range(2)]
    for i, j in np.ndindex(GRID, GRID)
  ]
  angles += [[0.0] * 4] * (x.shape[1] - GRID**2)  # of the class token
  factor = torch.polar(torch.ones(len(angles), 4), torch.tensor(angles))
  y = torch.complex(x[..., :4], x[..., 4:]) * factor[:, None]
  return torch.cat([y.real, y.imag], dim=-1)


def attention(p, x):
  heads = {
    name: linear(p[name], x).reshape(*x.shape[:2], HEADS, -1)
    for name in ("query", "key", "value")
  }
  queries, keys = (
    turned(rms(heads[name], p[f"{name}_norm"])) for name in ("query", "key")
  )
  y = functional.scaled_dot_product_attention(
    *(x.transpose(1, 2) for x in (queries, keys, heads["value"]))
  )
  return linear(p["out"], y.transpose(1, 2).flatten(2))


def swiglu(p, x):
  y = functional.silu(linear(p["gate"], x)) * linear(p["in"], x)
  return linear(p["out"], y)


def embedded(p, labels):
  return torch.tensor(p["embedding"])[labels]


def of_moment_one(x):
  return x / torch.sqrt(torch.mean(x**2, -1, keepdim=True) + 1e-8)


def mapped(p, x):
  return slow_linear(p["dense1"], functional.silu(slow_linear(p["dense0"], x)))


def torch_generator(p, latents, labels):
  z = of_moment_one(torch.tensor(latents))
  classes = of_moment_one(embedded(p["classes"], labels))
  w = functional.silu(mapped(p["to_w"], torch.cat([z, classes], -1)))
  x = positions().expand(len(z), -1, -1)
  images, image = [], 0.0
  for i in range(4):
    block = p[f"block{i}"]
    scale1, gate1, scale2, gate2 = linear(block["modulation"], w)[
      :, None
    ].chunk(4, dim=-1)
    x = x + gate1 * attention(block["attention"], rms(x) * (1 + scale1))
    x = x + gate2 * swiglu(block["mlp"], rms(x) * (1 + scale2))
    if i % 2:
      head = f"head{i // 2}"
      scale = 1 + linear(p[f"{head}_modulation"], w)[:, None]
      pixels = linear(p[f"{head}_rgb"], rms(x) * scale)
      pixels = pixels.reshape(-1, GRID, GRID, 2, 2, 3).transpose(2, 3)
      image = image + pixels.reshape(-1, 6, 6, 3)
      images.append(image)
  return torch.cat(images, dim=-1)


def torch_discriminator(p, images, labels):
  x = torch.tensor(images).reshape(-1, GRID, 2, GRID, 2, 3 * LEVELS)
  x = x.transpose(2, 3).reshape(-1, GRID**2, 4 * 3 * LEVELS)
  x = linear(p["embedding"], x) + positions()
  token = torch.tensor(p["class_token"]).expand(len(x), -1, -1)
  x = torch.cat([x, token], dim=1)
  for i in range(4):
    block = p[f"block{i}"]
    for name, branch in (("attention", attention), ("mlp", swiglu)):
      gate = torch.tensor(block[f"{name}_scale"])
      x = x + gate * branch(block[name], rms(x, block[f"{name}_rms"]))
  y = linear(p["features"], rms(x[:, -1], p["rms_out"]))
  classes = mapped(p["class_mapping"], embedded(p["classes"], labels))
  return torch.sum(y * classes, dim=-1) / 20**0.5


def test_generator_equals_its_torch_twin():
  params = params_of(GENERATOR)
  generate = jax.jit(GENERATOR.apply, static_argnames="train")
  levels = generate({"params": params}, LATENTS, LABELS, train=True)
  expected = torch_generator(params, LATENTS, LABELS).numpy()
  assert levels.shape == (3, 6, 6, 3 * LEVELS)
  assert np.std(expected[..., :3] - expected[..., 3:]) > 0.1
  scale = np.std(expected)
  np.testing.assert_allclose(levels, expected, rtol=1e-4, atol=1e-4 * scale)
  image = generate({"params": params}, LATENTS, LABELS)
  np.testing.assert_allclose(image, levels[..., -3:], rtol=1e-6)


def test_discriminator_equals_its_torch_twin():
  params = params_of(DISCRIMINATOR)
  discriminate = jax.jit(DISCRIMINATOR.apply)
  logits = discriminate({"params": params}, IMAGES, LABELS)
  expected = torch_discriminator(params, IMAGES, LABELS).numpy()
  assert np.std(expected) > 1e-6
  np.testing.assert_allclose(
    logits, expected, rtol=1e-4, atol=1e-4 * np.std(expected)
  )
  # One level stands for all.
  single = discriminate({"params": params}, IMAGES[..., 3:], LABELS)
  doubled = discriminate(
    {"params": params}, np.tile(IMAGES[..., 3:], 2), LABELS
  )
  np.testing.assert_array_equal(single, doubled)


def test_rotary_positions_count_by_their_distance_alone():
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 8)).astype(np.float32)
  angles = gat.rotary_angles(5, 8)
  queries, keys = (
    np.asarray(gat.rotate(jnp.broadcast_to(x, (25, 8)), angles, 1))
    for x in (q, k)
  )
  products = (queries @ keys.T).reshape(5, 5, 5, 5)
  np.testing.assert_allclose(
    products[:-1, :-1, :-1, :-1], products[1:, 1:, 1:, 1:], rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(products[2, 2, 2, 2], q @ k, rtol=1e-5)
  assert np.std(products[0, 0]) > 0.1


def test_blocks_start_near_the_identity_and_layers_at_xaviers_limits():
  attention = dict(num_heads=2, angles=gat.rotary_angles(2, 16), num_patches=4)
  block = gat.Block(attention)
  x, w = jnp.zeros((1, 4, 32)), jnp.zeros((1, 32))
  params = jax.jit(block.init)(jax.random.key(0), x, w)["params"]
  modulation = params["modulation"]["kernel"]
  limit = np.sqrt(6 / (32 + 128))
  assert 0.09 < np.max(np.abs(modulation)) / limit <= 0.1
  query = params["attention"]["query"]["kernel"]
  assert 0.98 < np.max(np.abs(query)) / np.sqrt(6 / 64) <= 1.0
  params = jax.jit(GENERATOR.init)(jax.random.key(0), LATENTS, LABELS)["params"]
  modulation = params["head0_modulation"]["kernel"]
  assert 0.09 < np.max(np.abs(modulation)) / np.sqrt(6 / (2 * WIDTH)) <= 0.1


def test_mapping_learns_a_hundred_times_slower_than_other_layers():
  """A step of Adam's is one size for all: what counts is the weight's own."""
  layer, slow = gat.XavierDense(64), gat.XavierDense(64, lr_multiplier=0.01)
  x = RNG.normal(size=(5, 64)).astype(np.float32)
  params = jax.jit(slow.init)(jax.random.key(0), x)["params"]
  assert 0.98 < np.max(np.abs(params["kernel"])) / np.sqrt(6 / 128) / 100 <= 1.0
  moved = jax.tree.map(lambda p: p + 0.01, params)
  fast = jax.tree.map(lambda p: p / 100, params)
  moved_fast = jax.tree.map(lambda p: p + 0.01 / 100, fast)
  for before, after in ((params, fast), (moved, moved_fast)):
    np.testing.assert_allclose(
      slow.apply({"params": before}, x),
      layer.apply({"params": after}, x),
      rtol=1e-4,
      atol=1e-5,
    )


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_noise_of_the_levels_has_its_covariance(levels):
  keys = jax.random.split(jax.random.key(0), 400)
  images = jnp.ones((400, 16, 16, 3 * levels))
  shown = np.asarray(gat.add_level_noise(keys, images, levels))
  shown = shown.reshape(-1, levels, 3).swapaxes(1, 2).reshape(-1, levels)
  t = {1: [0.01], 2: [0.885, 0.01], 4: [0.885, 0.76, 0.51, 0.01]}[levels]
  np.testing.assert_allclose(np.mean(shown, axis=0), 1 - np.array(t), atol=6e-3)
  # A level is the next one, shrunk by r, behind more noise: r t^2 of that.
  expected = np.empty((levels, levels))
  for i, j in np.ndindex(levels, levels):
    coarse, fine = t[min(i, j)], t[max(i, j)]
    expected[i, j] = (1 - coarse) / (1 - fine) * fine**2
  np.testing.assert_allclose(np.cov(shown.T), expected, rtol=0.02, atol=1e-3)


def config_of(arg, **changes):
  config = gat_cifar10.get_config(f"smoke,{arg}" if arg else "smoke")
  config.batch_size = 8
  config.augment.probability = 1.0
  config.update_from_flattened_dict({"data.image_size": 8, **changes})
  networks.check(config)
  return config


def start(arg):
  """Returns (train_steps, state, batch) of what trains."""
  config = config_of(arg)
  nets = networks.build(config)
  mesh = partitioning.create_mesh(jax.devices()[:1])
  batch = {"images": tiny.random_images(config, 2, 1), "labels": None}
  state = jax.eval_shape(lambda: train_state.create_train_state(config, nets))
  return gan_step.make_train_steps(config, nets, mesh), state, batch


@pytest.mark.parametrize(
  "arg", ["d=vitgan", pytest.param("g=vitgan", marks=pytest.mark.slow)]
)
def test_pairs_of_one_level_and_of_many_fit(arg):
  train_steps, state, batch = start(arg)
  after, metrics = jax.eval_shape(train_steps, state, batch, 0)
  assert metrics["penalty/r1"].shape == ()
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


@pytest.mark.slow
def test_all_parameters_are_trained():
  train_steps, _, batch = start("")
  config = config_of("")
  mesh = partitioning.create_mesh(jax.devices()[:1])
  state = train_state.init_train_state(config, networks.build(config), mesh)
  before = tiny.to_host({"g": state.g_params, "d": state.d_params})
  after, metrics = train_steps(state, batch, 0)
  assert all(np.isfinite(value) for value in metrics.values())
  moved = tiny.to_host({"g": after.g_params, "d": after.d_params})
  for name, leaf in tiny.leaves_by_name(moved).items():
    # The last bias cancels in pairs, but for rounding.
    if name != "d/logit/bias":
      assert np.any(leaf != tiny.leaves_by_name(before)[name]), name


def test_other_levels_than_those_of_the_other_network_are_refused():
  with pytest.raises(ConfigError, match="must be equal, or one"):
    config_of("", **{"generator.num_levels": 2, "discriminator.num_levels": 3})


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"generator.num_heads": 16}, "multiple of 4 times .*num_heads=16"),
    ({"generator.depth": 3}, "num_levels=2 must divide .*depth=3"),
    ({"discriminator.patch_size": 3}, "patch_size=3 must divide"),
  ],
)
def test_sizes_that_cannot_be_are_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    config_of("", **changes)
