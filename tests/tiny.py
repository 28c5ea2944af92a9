"""Configurations, images and pytree helpers small enough for a test."""

import jax
import numpy as np

from configs import common
from vitgan_jax import partitioning

NO_AUGMENTATION = {
  f"augment.{name}": 0.0
  for name in (
    "brightness",
    "saturation",
    "contrast",
    "translation",
    "scaling",
    "cutout",
  )
}


def tiny_config(overrides=(), **more_overrides):
  """Returns the default config at toy size.

  Args:
    overrides: values by dotted name, `{"loss.r1_gamma": 1.0}`.
    **more_overrides: of fields at the top, `dtype="bfloat16"`.
  """
  config = common.get_config()
  config.batch_size = 8
  config.total_kimg = 0.064
  config.steps_per_call = 2
  config.data.image_size = 8
  for network in (config.generator, config.discriminator):
    network.update(width=16, depth=1, num_heads=2, mlp_dim=32)
  config.generator.update(latent_dim=16, mapping_depth=2, decoder_dim=16)
  config.update_from_flattened_dict({**dict(overrides), **more_overrides})
  return config.lock()


def random_images(config, *leading, seed=0):
  """Returns uint8 images [*leading, B, S, S, 3]."""
  size = config.data.image_size
  shape = (*leading, config.batch_size, size, size, 3)
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def random_state(shapes, mesh, step, seed=0):
  """Returns a GANState in which no two leaves are alike, nor as at init.

  Args:
    shapes: that of `jax.eval_shape`.
    mesh: of the devices that have a copy each.
    step: its own.
    seed: of the rest.
  """
  rng = np.random.default_rng(seed)

  def fill(leaf):
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.key(rng.integers(2**31))
    return rng.integers(1, 2**20, leaf.shape).astype(leaf.dtype)

  state = jax.tree.map(fill, shapes).replace(step=np.int32(step))
  return jax.device_put(state, partitioning.replicated(mesh))


def leaves_by_name(tree):
  """Returns {"block0/attention/out/kernel": leaf, ...}."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def to_host(tree):
  """Copies a pytree to numpy arrays, typed random keys as their data."""
  return jax.tree.map(lambda x: np.array(_without_key_type(x)), tree)


def from_host(tree, like):
  """Inverse of `to_host`: new device arrays, typed as those of `like`."""

  def restore(host, leaf):
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(host)
    return jax.numpy.array(host)

  return jax.tree.map(restore, tree, like)


def assert_bit_equal(actual, expected):
  """Asserts that two pytrees have equal names, types and bits."""
  actual, expected = (
    leaves_by_name(to_host(tree)) for tree in (actual, expected)
  )
  assert actual.keys() == expected.keys()
  for name, leaf in expected.items():
    assert actual[name].dtype == leaf.dtype, name
    np.testing.assert_array_equal(actual[name], leaf, err_msg=name)


def _without_key_type(x):
  if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.random.key_data(x)
  return x


def assert_golden(metrics, expected, message):
  """Fails with the message unless metrics are the expected, to round-off.

  Norms of gradients are left out: they are not as exact from CPU to CPU.
  """
  metrics = {k: v for k, v in metrics.items() if "gradients/" not in k}
  assert metrics.keys() == expected.keys(), message
  np.testing.assert_allclose(
    # The order of sums, which differs from one CPU to another, moves float32
    # logits by about 1e-6.
    list(metrics.values()),
    [expected[key] for key in metrics],
    rtol=1e-5,
    atol=5e-6,
    err_msg=message,
  )
