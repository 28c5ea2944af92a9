import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from configs import digits
from tests import tiny
from tests.reference import standardise
from vitgan_jax import partitioning, visualize
from vitgan_jax.diagnostics import (
  area_under_curve,
  border_step_ratio,
  make_diagnostics,
)
from vitgan_jax.models import networks
from vitgan_jax.train_state import GANState, create_train_state

CONFIG = digits.get_config("smoke")
CONFIG.discriminator.depth = 2
NETS = networks.build(CONFIG)
IMAGES = tiny.random_images(CONFIG)
LATENTS = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def state(digits_run):
  """Returns a trained state whose discriminator has its block twice."""
  trained = digits_run.state

  def twice(tree):
    return {**tree, "block1": jax.tree.map(jnp.copy, tree["block0"])}

  return trained.replace(
    d_params=twice(trained.d_params),
    d_model_state={"spectral": twice(trained.d_model_state["spectral"])},
  )


@pytest.fixture(scope="module")
def diagnose():
  diagnostics = make_diagnostics(CONFIG, NETS, partitioning.create_mesh())

  def scalars_of(state):
    scalars, scalars_of.shown = diagnostics(state, IMAGES, LATENTS)
    return {key: float(value) for key, value in scalars.items()}

  return scalars_of


def scale_d_kernel(state, factor, *path):
  """Returns the state with one kernel of the discriminator scaled."""

  def scale(tree, path):
    if not path:
      return tree * factor
    return {**tree, path[0]: scale(tree[path[0]], path[1:])}

  return state.replace(d_params=scale(state.d_params, (*path, "kernel")))


def set_query_gain(state, gain, block):
  """Scales query and key of a block, whose norm ISN would else restore."""
  query = (f"block{block}", "attention", "query")
  spectral = jax.tree.map(jnp.copy, state.d_model_state["spectral"])
  norm = spectral[query[0]][query[1]][query[2]]["norm"]
  norm["sigma_init"] = norm["sigma_init"] * gain
  return state.replace(d_model_state={"spectral": spectral})


def test_attention_to_all_tokens_alike_has_entropy_one(state, diagnose):
  for block in range(2):
    state = set_query_gain(state, 0.0, block)
  scalars = diagnose(state)
  np.testing.assert_allclose(scalars["attention/entropy_min"], 1, rtol=1e-5)
  np.testing.assert_allclose(scalars["attention/entropy_mean"], 1, rtol=1e-5)


def test_attention_of_each_token_to_itself_has_entropy_zero(state, diagnose):
  for block in range(2):
    state = set_query_gain(state, 1e3, block)
  scalars = diagnose(state)
  assert abs(scalars["attention/entropy_mean"]) < 1e-5


def test_least_entropy_of_the_blocks_and_their_mean_are_told_apart(
  state, diagnose
):
  state = set_query_gain(set_query_gain(state, 0.0, 0), 1e3, 1)
  scalars = diagnose(state)
  np.testing.assert_allclose(scalars["attention/entropy_min"], 0, atol=1e-5)
  np.testing.assert_allclose(scalars["attention/entropy_mean"], 0.5, atol=1e-5)


@pytest.mark.parametrize("layer", ["embedding", "block0/mlp_in", "head_out"])
def test_growth_is_that_of_the_kernel_that_grew_most(state, diagnose, layer):
  state = scale_d_kernel(state, 0.1, "block1", "attention", "out")
  state = scale_d_kernel(state, 3.0, *layer.split("/"))
  spectral = tiny.leaves_by_name(state.d_model_state["spectral"])
  growth = {}
  for name, kernel in tiny.leaves_by_name(state.d_params).items():
    if name.endswith("/kernel"):
      name = name.removesuffix("/kernel")
      gain = CONFIG.discriminator.qk_gain if name.endswith("/query") else 1.0
      sigma = np.linalg.norm(kernel, ord=2) * gain / np.sqrt(len(kernel))
      growth[name] = sigma / spectral[f"{name}/norm/sigma_init"]
  assert max(growth, key=growth.get) == layer
  # One power iteration a step: the estimate is from below, and close.
  np.testing.assert_allclose(
    diagnose(state)["sigma/growth_max"], growth[layer], rtol=0.01
  )
  assert diagnose.shown.growth.keys() == growth.keys()
  for name, value in diagnose.shown.growth.items():
    # 4%: the estimate of one that was scaled down, and so moves faster.
    np.testing.assert_allclose(value, growth[name], rtol=0.04, err_msg=name)


def test_stable_rank_is_the_least_of_the_kernels(state, diagnose):
  # One large direction: its kernel has about one.
  kernel = state.d_params["block1"]["mlp_in"]["kernel"]
  one = 100.0 * np.outer(np.ones(len(kernel)), np.ones(kernel.shape[1]))
  params = {**state.d_params}
  params["block1"] = {
    **params["block1"],
    "mlp_in": {**params["block1"]["mlp_in"], "kernel": kernel + one},
  }
  spectral = jax.tree.map(jnp.copy, state.d_model_state["spectral"])
  u = np.linalg.svd(kernel + one)[2][0]
  spectral["block1"]["mlp_in"]["norm"]["u"] = u
  changed = state.replace(d_params=params, d_model_state={"spectral": spectral})
  values = np.linalg.svd(kernel + one, compute_uv=False)
  expected = np.sum(values**2) / values[0] ** 2 / len(values)
  assert expected < 1.01 / 32
  np.testing.assert_allclose(
    diagnose(changed)["sigma/stable_rank_min"], expected, rtol=1e-3
  )


def test_area_under_the_curve_is_that_of_scikit_learn():
  rng = np.random.default_rng(0)
  real, fake = rng.integers(0, 9, size=60) + 2, rng.integers(0, 9, size=40)
  expected = metrics.roc_auc_score(
    np.repeat([1, 0], [60, 40]), np.concatenate([real, fake])
  )
  assert 0.55 < expected < 0.95
  value = area_under_curve(jnp.float32(real), jnp.float32(fake))
  np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_area_under_the_curve_is_of_images_as_they_are_and_augmented(
  state, diagnose
):
  scalars = diagnose(state)
  discriminate = jax.jit(NETS.discriminator.apply)
  images = [
    IMAGES / 127.5 - 1.0,
    jax.jit(NETS.generator.apply)(state.g_variables, LATENTS),
  ]
  logits = [discriminate(state.d_variables, x) for x in images]
  pairs = [a > b for a in np.asarray(logits[0]) for b in np.asarray(logits[1])]
  np.testing.assert_allclose(scalars["auc/clean"], np.mean(pairs), atol=1e-3)
  assert scalars["auc/augmented"] != scalars["auc/clean"]


def normalised(state, gain, *path):
  """Returns a kernel of the discriminator as it is applied, in float64."""
  kernel, spectral = state.d_params, state.d_model_state["spectral"]
  for name in path:
    kernel, spectral = kernel[name], spectral[name]
  kernel = np.asarray(kernel["kernel"], np.float64)
  kernel *= gain / np.sqrt(len(kernel))
  u = np.asarray(spectral["norm"]["u"], np.float64)
  sigma = np.linalg.norm(kernel @ u)
  return kernel * spectral["norm"]["sigma_init"] / sigma


def test_attention_maps_are_those_of_the_class_token(state, diagnose):
  diagnose(state)
  maps = np.asarray(diagnose.shown.attention)
  assert maps.shape == (len(IMAGES), 2, 4, 4)
  params = jax.device_get(state.d_params)
  padded = np.pad(IMAGES / 127.5 - 1.0, ((0, 0), (2, 2), (2, 2), (0, 0)))
  embedding = normalised(state, 1.0, "embedding")
  tokens = [np.tile(params["class_token"][0, 0], (len(IMAGES), 1))]
  for i, j in np.ndindex(4, 4):
    window = padded[:, 4 * i : 4 * i + 8, 4 * j : 4 * j + 8]
    centre = np.array([i - 1.5, j - 1.5]) / 2
    scale = CONFIG.discriminator.position_scale
    positions = params["positions"]
    position = np.sin(
      scale * centre @ positions["frequencies"] + positions["phase"]
    )
    tokens.append(
      window.reshape(len(IMAGES), -1) @ embedding
      + params["embedding"]["bias"]
      + position
    )
  block = params["block0"]
  y = standardise(np.stack(tokens, axis=1))
  y = y * block["norm_attention"]["scale"] + block["norm_attention"]["bias"]
  gain = CONFIG.discriminator.qk_gain
  queries = y @ normalised(state, gain, "block0", "attention", "query")
  expected = 0
  for q in np.split(queries, 2, axis=-1):  # heads
    distances = np.sum((q[:, :1] - q) ** 2, axis=-1) / np.sqrt(q.shape[-1])
    share = np.exp(-distances)
    expected += share / share.sum(axis=-1, keepdims=True) / 2
  np.testing.assert_allclose(
    maps[:, 0], expected[:, 1:].reshape(-1, 4, 4), rtol=1e-3, atol=1e-6
  )


def test_attention_to_all_tokens_alike_makes_even_maps(state, diagnose):
  diagnose(set_query_gain(state, 0.0, 1))
  maps = diagnose.shown.attention
  np.testing.assert_allclose(maps[:, 1], 1 / 17, rtol=1e-5)
  assert np.std(maps[:, 0]) > 1e-3


def test_diversity_is_that_of_the_averaged_generator(state, diagnose):
  generate = jax.jit(NETS.generator.apply)
  images = np.asarray(generate(state.g_ema_variables, LATENTS), np.float64)
  state = state.replace(
    g_params=jax.tree.map(lambda x: x * jnp.nan, state.g_params)
  )
  scalars = diagnose(state)
  mean = sum(images) / len(images)
  variance = sum((image - mean) ** 2 for image in images) / len(images)
  np.testing.assert_allclose(
    scalars["diversity/std_over_latents"], np.sqrt(variance).mean(), rtol=1e-4
  )
  np.testing.assert_allclose(
    scalars["diversity/std_of_mean_image"],
    np.sqrt(((mean - mean.mean()) ** 2).mean()),
    rtol=1e-4,
  )


def test_one_image_for_all_latents_has_no_diversity(state, diagnose):
  blind = jax.tree.map(jnp.copy, state.g_ema_params)
  blind["mapping"] = jax.tree.map(jnp.zeros_like, blind["mapping"])
  scalars = diagnose(state.replace(g_ema_params=blind))
  assert scalars["diversity/std_over_latents"] < 1e-6
  assert scalars["diversity/std_of_mean_image"] > 0.01


def test_measuring_leaves_the_power_iteration_alone(state, diagnose):
  before = tiny.to_host(state)
  assert diagnose(state) == diagnose(state)
  tiny.assert_bit_equal(state, before)


def test_without_spectral_normalisation_the_scalars_are_finite():
  config = tiny.tiny_config({"discriminator.spectral_norm": "none"})
  nets = networks.build(config)
  shapes = jax.eval_shape(lambda: create_train_state(config, nets))
  rng = np.random.default_rng(0)
  state = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32),
    shapes.replace(step=None, key=None),
  )
  images = tiny.random_images(config)
  scalars, shown = make_diagnostics(config, nets, partitioning.create_mesh())(
    state, images, LATENTS[:, :16]
  )
  # A NaN would also make a line that strict readers of JSON refuse.
  assert all(np.isfinite(value) for value in scalars.values()), scalars
  assert "sigma/growth_max" not in scalars and not shown.growth


class Painter(nn.Module):
  """A generator of one grey for each class."""

  @nn.compact
  def __call__(self, latents, labels):
    grey = labels[:, None, None, None] / 4.0
    return jnp.broadcast_to(grey, (len(latents), 4, 4, 3))


class Block(nn.Module):
  """Shows attention of two heads among as many tokens."""

  num_tokens: int

  @nn.compact
  def __call__(self, images):
    shape = (len(images), 2, self.num_tokens, self.num_tokens)
    self.sow("intermediates", "attention_weights", jnp.ones(shape))


class Blocks(nn.Module):
  """A discriminator of blocks of so many tokens each."""

  tokens: tuple

  @nn.compact
  def __call__(self, images, labels):
    for i, num_tokens in enumerate(self.tokens):
      Block(num_tokens, name=f"block{i}")(images)
    return jnp.zeros(len(images))


@pytest.mark.parametrize(
  "tokens, shape",
  [
    ((), None),
    ((17, 17), (8, 2, 4, 4)),
    ((17, 10), None),  # no picture of grids of different sizes
    ((9, 9), None),  # nor of what is no grid
  ],
)
def test_what_networks_do_not_show_is_left_out(tokens, shape):
  nets = networks.Networks(Painter(), Blocks(tokens), "auto")
  state = GANState(**{x.name: {} for x in dataclasses.fields(GANState)})
  diagnose = make_diagnostics(CONFIG, nets, partitioning.create_mesh())
  labels = np.arange(32) % 4
  scalars, shown = diagnose(state, IMAGES, LATENTS, labels)
  assert scalars == {
    "auc/clean": pytest.approx(0.5),
    "auc/augmented": pytest.approx(0.5),
    "diversity/std_over_latents": pytest.approx(np.std([0, 0.25, 0.5, 0.75])),
    "diversity/std_over_images": pytest.approx(
      np.mean(np.std(IMAGES / 127.5, axis=0)), rel=1e-5
    ),
    "diversity/std_of_mean_image": pytest.approx(0.0),
  }
  assert shown.growth == {}
  assert (None if shown.attention is None else shown.attention.shape) == shape
  drawn = visualize.discriminator_pictures(IMAGES, shown)
  assert drawn.keys() == (set() if shape is None else {"attention"})


def test_border_step_ratio_is_that_of_a_loop():
  rng = np.random.default_rng(0)
  images = rng.normal(size=(2, 8, 8, 3))
  tiles = np.repeat(np.repeat(rng.normal(size=(2, 2, 2, 3)), 4, 1), 4, 2)
  images += 3.0 * tiles
  border, inside = [], []
  for i, j, k in np.ndindex(7, 8, 3):
    steps = border if i == 3 else inside
    steps += list(np.abs(images[:, i + 1, j, k] - images[:, i, j, k]))
    steps += list(np.abs(images[:, j, i + 1, k] - images[:, j, i, k]))
  expected = np.mean(border) / np.mean(inside)
  assert expected > 1.5
  ratio = border_step_ratio(jnp.asarray(images), 4)
  np.testing.assert_allclose(ratio, expected, rtol=1e-5)
  even = border_step_ratio(jnp.asarray(rng.normal(size=(50, 8, 8, 3))), 4)
  np.testing.assert_allclose(even, 1.0, atol=0.05)
