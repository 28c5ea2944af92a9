import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose
import pytest

from configs import (
  celeba64,
  cifar10,
  digits,
  hybrid_cifar10,
  lsun_bedroom128,
  stylegan2_cifar10,
)
from tests import tiny
from tests.reference import normal
from vitgan_jax import config as config_lib
from vitgan_jax import gan_step, partitioning, sample, train, train_state
from vitgan_jax.errors import ConfigError
from vitgan_jax.models import kinds, networks, stylegan2
from vitgan_jax.models.convolutions import draw_noise

torch_stylegan2 = pytest.importorskip("tests.torch_stylegan2")
to_nchw, to_torch = torch_stylegan2.to_nchw, torch_stylegan2.to_torch

BOTH = "g=stylegan2,d=stylegan2"
LABELS = np.array([2, 0, 1, 1, 0, 2, 2, 1], np.int32)
KEYS = jax.random.split(jax.random.key(7), 8)


def small_config(**overrides):
  """Returns the config of images of 16 px, 8 channels at most at that size."""
  config = digits.get_config(BOTH)
  for network in (config.generator, config.discriminator):
    network.update(base_channels=128, max_channels=12, mapping_depth=2)
  config.generator.latent_dim = 6
  config.batch_size = 8
  config.update_from_flattened_dict(overrides)
  return config


def init(network, *args):
  """Returns variables with noise on all, also on those that start at zero."""
  variables = jax.jit(network.init)(jax.random.key(0), *args)
  return jax.tree.map(lambda x: x + 0.3 * normal(*x.shape), variables)


def test_generator_is_that_of_torch():
  generator = networks.build(small_config(**{"data.num_classes": 3})).generator
  z = normal(8, 6)
  variables = init(generator, z, LABELS)
  images = jax.jit(generator.apply)(variables, z, LABELS, KEYS)
  noise = list(map(to_nchw, draw_noise(KEYS, [4, 8, 8, 16, 16])))
  params = to_torch(variables["params"])
  w = torch_stylegan2.mapping(
    params["mapping"], to_torch(z), to_torch(LABELS).long()
  )
  expected = torch_stylegan2.generator(
    params, w[:, None].expand(-1, 6, -1), noise
  )
  expected = expected.permute(0, 2, 3, 1).numpy()
  assert np.std(expected) > 0.1
  assert_allclose(images, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  "architecture, num_classes", [("resnet", 3), ("orig", 0)]
)
def test_discriminator_is_that_of_torch(architecture, num_classes):
  config = small_config(
    **{
      "data.num_classes": num_classes,
      "discriminator.architecture": architecture,
    }
  )
  discriminator = networks.build(config).discriminator
  images, labels = normal(8, 16, 16, 3), LABELS if num_classes else None
  variables = init(discriminator, images, labels)
  logits = jax.jit(discriminator.apply)(variables, images, labels)
  expected = torch_stylegan2.discriminator(
    to_torch(variables["params"]),
    to_nchw(images),
    4,
    to_torch(LABELS).long() if num_classes else None,
  ).numpy()
  assert np.std(expected) > 0.01
  assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", kinds.TABLES)
def test_bfloat16_and_remat_reach_layers_and_not_what_comes_out(name):
  config = small_config()
  network = getattr(networks.build(config), name)
  inputs = {"generator": normal(8, 6), "discriminator": normal(8, 16, 16, 3)}
  variables = init(network, inputs[name])
  exact = jax.jit(network.apply)(variables, inputs[name])
  rounded = network.clone(dtype=jnp.bfloat16, remat=True)
  actual = jax.jit(rounded.apply)(variables, inputs[name])
  assert actual.dtype == jnp.float32
  # Rounded at the end, all would have the last 16 bits zero.
  assert np.any(np.asarray(actual).view(np.uint32) & 0xFFFF)
  # Layers round by 2**-9 each; logits differ little from image to image.
  error = np.std(actual - exact) / np.std(exact)
  assert 1e-4 < error < 0.2


def millions(config):
  state = jax.eval_shape(
    lambda: train_state.create_train_state(config, networks.build(config))
  )
  return tuple(
    round(sum(math.prod(x.shape) for x in jax.tree.leaves(params)) / 1e6, 2)
    for params in (state.g_params, state.d_params)
  )


# In millions, counted from NVIDIA's and the ViTGAN authors' code.
@pytest.mark.parametrize(
  "config_file, argument, base_channels, counts",
  [
    (cifar10, BOTH, 32768, (21.52, 21.51)),
    (stylegan2_cifar10, "", 32768, (19.95, 20.72)),
    (cifar10, BOTH, 4096, (13.51, 13.92)),  # DiffAugment's
    (celeba64, BOTH, 32768, (27.03, 26.49)),
    (celeba64, BOTH, 16384, (23.82, 23.41)),  # config E
    (lsun_bedroom128, BOTH, 32768, (29.33, 28.39)),
    (hybrid_cifar10, "", None, (16.99, 13.92)),
  ],
)
def test_networks_have_the_published_size(
  config_file, argument, base_channels, counts
):
  config = config_file.get_config(argument)
  if base_channels:
    config.generator.base_channels = base_channels
    config.discriminator.base_channels = base_channels
  assert millions(config) == counts


@pytest.mark.parametrize("num_devices", [1, 8])
def test_deviation_is_that_of_neighbours_on_any_number_of_devices(num_devices):
  x = (
    normal(32, 3, 3, 2)
    * np.arange(1.0, 33.0, dtype=np.float32)[:, None, None, None]
  )
  mesh = partitioning.create_mesh(jax.devices()[:num_devices])
  spec = jax.P(partitioning.BATCH_AXES)
  function = functools.partial(stylegan2.minibatch_deviation, group_size=4)
  function = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec)
  y = jax.jit(function)(x)
  np.testing.assert_array_equal(y[..., :2], x)
  for start in range(0, 32, 4):
    group = x[start : start + 4].astype(np.float64)
    total = 0.0
    for i, j, c in np.ndindex(3, 3, 2):
      values = group[:, i, j, c]
      total += np.sqrt(np.mean((values - values.mean()) ** 2) + 1e-8)
    assert_allclose(y[start : start + 4, ..., 2], total / 18, rtol=1e-5)


def test_deviation_of_an_incomplete_group_is_that_of_smaller_ones():
  x = normal(6, 2, 2, 3)
  deviation = functools.partial(stylegan2.minibatch_deviation, x)
  np.testing.assert_array_equal(deviation(4), deviation(2))
  assert_allclose(deviation(1)[..., 3], 1e-4, rtol=1e-5)  # of one: none


def test_styles_are_mixed_in_training_alone():
  config = small_config(
    **{"generator.style_mixing": 0.75, "generator.mapping_depth": 0}
  )
  generator = networks.build(config).generator
  z, keys = normal(4096, 6), jax.random.split(jax.random.key(0), 4096)
  variables = jax.jit(generator.init)(jax.random.key(0), z[:1])
  styles = jax.jit(
    functools.partial(generator.apply, method="styles"), static_argnums=4
  )
  plain = np.asarray(styles(variables, z, None, keys, False))
  np.testing.assert_array_equal(plain, plain[:, :1].repeat(6, axis=1))
  np.testing.assert_array_equal(styles(variables, z, None, None, True), plain)
  mixed = np.asarray(styles(variables, z, None, keys, True))
  is_own = np.all(mixed == plain, axis=-1)
  first = np.sum(is_own, axis=1)  # the layer that the other begins with
  np.testing.assert_array_equal(is_own, np.arange(6) < first[:, None])
  assert np.min(first) == 1
  for i, other in enumerate(mixed[:8]):  # is one for all layers that are left
    assert np.all(other[first[i] :] == other[-1])
  # Five standard deviations; with the coin, each layer is as probable.
  share = np.bincount(first, minlength=7)[1:] / 4096
  assert_allclose(share, [0.15] * 5 + [0.25], atol=5 * 0.5 / 64)
  others = mixed[first < 6, -1]
  assert len(np.unique(others, axis=0)) == len(others)


@functools.cache
def setting(num_devices):
  """Returns the options of a step, a state, and a batch, at a turn of all."""
  config = small_config(
    **tiny.NO_AUGMENTATION,
    **{
      "batch_size": 32,
      "data.image_size": 8,
      "loss.bcr_weight": 0.0,
      "loss.path_length_weight": 2.0,
    },
  )
  options = dict(
    config=config,
    nets=networks.build(config),
    mesh=partitioning.create_mesh(jax.devices()[:num_devices]),
  )
  state = train_state.init_train_state(**options)
  keys = jax.random.split(jax.random.key(1), 32)
  images = tiny.random_images(config)
  batch = {"images": images, "labels": None, "keys": keys}
  batch = jax.device_put(batch, partitioning.batch_sharding(options["mesh"]))
  return options, state.replace(path_length=jnp.float32(0.5)), batch


@functools.cache
def generator_step(num_devices):
  options, state, batch = setting(num_devices)
  return jax.jit(functools.partial(gan_step.g_step, **options))(state, batch)


def both_steps(num_devices):
  options, state, batch = setting(num_devices)
  step = jax.jit(functools.partial(gan_step.d_step, **options))
  state_after_d, metrics = step(state, batch)
  state, g_metrics = generator_step(num_devices)
  return state.replace(d_opt_state=state_after_d.d_opt_state), {
    **metrics,
    **g_metrics,
  }


@pytest.mark.slow  # minibatch deviation and the generator are shown apart
def test_devices_compute_what_one_does():
  (one, metrics), (many, many_metrics) = both_steps(1), both_steps(8)
  for name, value in metrics.items():
    assert_allclose(
      many_metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name
    )
  # Without momentum the first moment of Adam is the gradient.
  one, many = (
    tiny.leaves_by_name(
      tiny.to_host(
        (
          state.g_model_state,
          state.path_length,
          state.g_opt_state[0].mu,
          state.d_opt_state[0].mu,
        )
      )
    )
    for state in (one, many)
  )
  for name, value in one.items():
    assert np.any(value != 0), name
    atol = 1e-5 * np.max(np.abs(value))
    assert_allclose(many[name], value, rtol=1e-3, atol=atol, err_msg=name)


@pytest.mark.slow
def test_mean_of_w_and_path_length_move_in_the_generators_step():
  options, before, batch = setting(1)
  after, metrics = generator_step(1)
  generator = options["nets"].generator
  z_keys, _, _, _, g_keys, _, noise_keys = gan_step.split_keys(batch["keys"], 7)
  z = gan_step.draw_latents(z_keys, 6)
  params = to_torch(before.g_params["mapping"])
  w = torch_stylegan2.mapping(params, to_torch(z)).numpy()
  assert_allclose(
    after.g_model_state["averages"]["w_avg"], 0.005 * w.mean(0), atol=1e-6
  )
  # Its own average follows, and is what truncation goes to.
  average = after.g_ema_model_state["averages"]["w_avg"]
  assert np.any(average)
  mean_w = sample.mean_w(options["nets"], after.g_ema_variables)
  np.testing.assert_array_equal(mean_w, average)

  @jax.jit
  def lengths(params):
    """Those of the whole Jacobian [S, S, 3, L, W] of each image."""
    variables = {"params": params, **before.g_model_state}
    w = generator.apply(variables, z, None, g_keys, True, method="styles")

    def jacobian(w, key):
      return jax.jacrev(
        lambda w: generator.apply(
          variables, w[None], key[None], method="synthesize"
        )[0]
      )(w)

    noise = jax.vmap(lambda key: jax.random.normal(key, (8, 8, 3)))(noise_keys)
    slopes = jnp.einsum(
      "bhwc,bhwcls->bls", noise, jax.vmap(jacobian)(w, g_keys)
    )
    return jnp.sqrt(jnp.sum(slopes**2, axis=(1, 2)) / 4) / 8

  expected = np.asarray(lengths(before.g_params), np.float64)
  assert_allclose(metrics["path_length/mean"], expected.mean(), rtol=1e-4)
  assert_allclose(
    metrics["penalty/path_length"],
    4 * np.mean((expected - 0.5) ** 2),  # lazy: four times at every fourth
    rtol=1e-4,
  )
  assert_allclose(
    after.path_length, 0.99 * 0.5 + 0.01 * expected.mean(), rtol=1e-5
  )


def test_group_must_be_whole_on_each_device(tmp_path):
  config = small_config(**{"discriminator.group_size": 4, "batch_size": 16})
  with pytest.raises(
    ConfigError,
    match=r"=16 must be a multiple of the 8 devices times "
    r"config\.discriminator\.group_size=4",
  ):
    train.train_and_evaluate(config, tmp_path / "run")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("network", ["generator", "discriminator"])
@pytest.mark.parametrize("size", [4, 24, 48])
def test_size_of_images_must_be_a_power_of_two(network, size):
  config = digits.get_config(f"{network[0]}=stylegan2")
  config.data.image_size = size
  for name in kinds.TABLES:
    if config[name].kind == "vitgan":
      config[name].patch_size = 4
  with pytest.raises(ConfigError) as error:
    config_lib.validate(config)
  message = str(error.value)
  assert f"config.{network}.kind='stylegan2'" in message
  assert f"image_size={size} must be a power of two" in message
  assert "\n" not in message


@pytest.mark.parametrize(
  "field, value",
  [
    ("generator.style_mixing", 1.5),
    ("generator.latent_dim", 0),
    ("generator.base_channels", 8),
    ("generator.mapping_depth", -1),
    ("discriminator.max_channels", 0),
    ("discriminator.group_size", 0),
    ("discriminator.architecture", "skip"),
    ("loss.path_length_every", 0),
    ("loss.path_length_weight", -1.0),
  ],
)
def test_field_out_of_range_is_named(field, value):
  with pytest.raises(ConfigError, match=f"{field}={value!r}"):
    config_lib.validate(small_config(**{field: value}))


def test_path_length_wants_a_generator_with_styles():
  config = digits.get_config()
  config.loss.path_length_weight = 2.0
  with pytest.raises(ConfigError, match=r"kind='vitgan' has no styles"):
    config_lib.validate(config)


def test_discriminator_brings_the_penalty_that_it_needs():
  assert digits.get_config("d=stylegan2").loss.r1_gamma == 0.1
  assert digits.get_config("g=stylegan2").loss.r1_gamma == 0.0
  # A config that chose one keeps it.
  assert stylegan2_cifar10.get_config("d=stylegan2").loss.r1_gamma == 0.01
