import types

from flax import linen as nn
import jax
import numpy as np
import pytest

from configs import cifar10, digits, folder
from vitgan_jax import partitioning, sample
from vitgan_jax.errors import ConfigError
from vitgan_jax.models import kinds, networks

CPU = partitioning.create_mesh(jax.devices()[:1])
# Nothing but the platform is asked for, and nothing runs.
TPU = types.SimpleNamespace(
  devices=np.array([types.SimpleNamespace(platform="tpu")]), size=1
)


def build(**fields):
  """Returns the networks of the demo's smoke size, 16 tokens an image."""
  config = digits.get_config("smoke")
  config.update_from_flattened_dict(fields)
  return networks.build(config)


def implementations(nets):
  return nets.generator.implementation, nets.discriminator.implementation


@pytest.mark.parametrize(
  "asked, mesh, batch_size, chosen",
  [
    ("auto", CPU, 16, "xla"),
    ("auto", TPU, 16, "pallas"),
    ("xla", TPU, 16, "xla"),
    ("interpret", CPU, 16, "interpret"),
    ("interpret", TPU, 32, "interpret"),
    ("pallas", TPU, 64, "pallas"),
  ],
)
def test_implementation_is_that_of_config_devices_and_batch(
  asked, mesh, batch_size, chosen
):
  nets, lines = networks.with_kernels(
    build(implementation=asked), mesh, batch_size
  )
  assert implementations(nets) == (chosen, chosen)
  assert lines == [f"generator: {chosen}", f"discriminator: {chosen}"]


def test_auto_says_why_a_batch_gets_no_kernels_and_which_would():
  nets, lines = networks.with_kernels(build(), TPU, 24)
  assert implementations(nets) == ("xla", "xla")
  for name, line in zip(kinds.TABLES, lines, strict=True):
    assert line.startswith(f"{name}: xla (")
    assert line.endswith("; config.batch_size=32 would do)")
  _, (line, _) = networks.with_kernels(build(), TPU, 32, num_parts=4)
  assert line.endswith("; config.batch_size=64 would do)")


def test_auto_chooses_for_each_network():
  nets = build(**{"discriminator.conv_qkv": True})
  nets, lines = networks.with_kernels(nets, TPU, 16)
  assert implementations(nets) == ("pallas", "xla")
  assert lines == [
    "generator: pallas",
    "discriminator: xla (convolutional projections have no kernel)",
  ]


@pytest.mark.parametrize("asked, mesh", [("interpret", CPU), ("pallas", TPU)])
def test_kernels_that_do_not_take_the_batch_are_refused(asked, mesh):
  with pytest.raises(ConfigError) as error:
    networks.with_kernels(build(implementation=asked), mesh, 8)
  message = str(error.value)
  assert f"config.implementation='{asked}' is not for this generator" in message
  assert "8 images are not a multiple of 16" in message
  assert "config.batch_size=16 would do" in message
  assert "\n" not in message


def test_kernels_of_other_devices_are_refused():
  with pytest.raises(ConfigError, match=r"'pallas' is for TPUs.* cpu"):
    networks.with_kernels(build(implementation="pallas"), CPU, 16)


class Plain(nn.Module):
  """A kind of network without kernels."""


@pytest.mark.parametrize("asked, mesh", [("auto", TPU), ("interpret", CPU)])
def test_kind_without_kernels_is_left_as_it_is(asked, mesh):
  nets = build(implementation=asked)._replace(discriminator=Plain())
  chosen, lines = networks.with_kernels(nets, mesh, 16)
  assert chosen.discriminator == nets.discriminator
  assert chosen.generator.implementation != "xla"
  assert lines[1] == "discriminator: xla (this kind has no kernels)"


def test_plain_form_differs_in_the_implementation_alone():
  nets, _ = networks.with_kernels(build(), TPU, 16)
  for network, built in zip(nets[:2], build()[:2]):
    assert network != built and networks.plain(network) == built
  assert networks.plain(Plain()) == Plain()


def test_networks_have_what_the_config_says():
  config = digits.get_config()
  config.update(dtype="bfloat16", remat=True, data=dict(num_classes=10))
  nets = networks.build(config)
  for name in kinds.TABLES:
    network = getattr(nets, name)
    for field, value in config[name].items():
      assert field == "kind" or getattr(network, field) == value, field
    assert (network.image_size, network.num_classes) == (16, 10)
    assert (network.remat, network.dtype) == (True, np.dtype("bfloat16"))


def sized(module, image_size):
  config = module.get_config()
  config.data.image_size = image_size
  return config


@pytest.mark.parametrize("image_size", [*range(8, 257, 8), 512, 1000])
def test_every_multiple_of_8_is_a_size_of_the_users_own_images(image_size):
  config = sized(folder, image_size)
  networks.check(config)
  for network in (config.generator, config.discriminator):
    assert (image_size / network.patch_size) ** 2 == 64
  assert config.discriminator.overlap == image_size // 16


@pytest.mark.parametrize(
  "module, image_size, nearest",
  [(folder, 100, "96, 104"), (cifar10, 18, "16, 20"), (folder, 5, "8")],
)
def test_size_that_does_not_fit_is_refused_with_the_nearest_that_do(
  module, image_size, nearest
):
  config = sized(module, image_size)
  with pytest.raises(ConfigError) as error:
    networks.check(config)
  start = f"config.data.image_size={image_size} does not fit; the nearest that "
  assert str(error.value).startswith(f"{start}do: {nearest} (")
  assert config.data.image_size == image_size
  for size in nearest.split(", "):
    networks.check(sized(module, int(size)))


@pytest.mark.parametrize(
  "kind, num_styles", [("vitgan", 2), ("stylegan2", 6), ("cips", 7), ("gat", 2)]
)
def test_each_layer_takes_a_w_of_its_own(kind, num_styles):
  config = digits.get_config(f"smoke,g={kind}")
  generator = networks.build(config).generator
  assert generator.num_styles == num_styles
  z = jax.random.normal(jax.random.key(0), (2, generator.latent_dim))
  variables = jax.jit(generator.init)(jax.random.key(1), z)
  leaves, tree = jax.tree.flatten(variables)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  variables = tree.unflatten(  # of which some are zero at first
    x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)
  )
  w = generator.apply(variables, z, None, method=sample.mapping)

  @jax.jit
  def slopes(w):
    def loss(w):
      return (generator.apply(variables, w, method="synthesize") ** 2).sum()

    return jax.value_and_grad(loss)(w)

  value, of_all = slopes(w)
  repeated = w[:, None].repeat(num_styles, axis=1)
  same, of_each = slopes(repeated)
  np.testing.assert_allclose(same, value, rtol=1e-5)
  # By the chain rule; and no layer is passed by.
  np.testing.assert_allclose(
    of_each.sum(axis=1), of_all, rtol=2e-3, atol=1e-4 * np.abs(of_all).max()
  )
  assert np.abs(of_each).max(axis=-1).min() > 1e-4 * np.abs(of_all).max()
