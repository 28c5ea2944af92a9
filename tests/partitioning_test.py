import jax
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from vitgan_jax import partitioning


def test_mesh_spans_all_devices_along_one_axis():
  mesh = partitioning.create_mesh()
  assert mesh.axis_names == ("data",)
  assert len(jax.devices()) == 8 and mesh.devices.tolist() == jax.devices()


def test_mesh_spans_the_given_devices_only():
  devices = jax.devices()[2:4]
  assert partitioning.create_mesh(devices).devices.tolist() == devices


def test_replicated_array_is_whole_on_every_device():
  mesh = partitioning.create_mesh()
  x = np.arange(5.0)
  shards = jax.device_put(x, partitioning.replicated(mesh)).addressable_shards
  assert {shard.device for shard in shards} == set(jax.devices())
  for shard in shards:
    np.testing.assert_array_equal(shard.data, x)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_global_batch_splits_its_axis_over_the_devices_in_order(axis):
  mesh = partitioning.create_mesh()
  x = np.random.default_rng(0).normal(size=(16, 16, 16)).astype(np.float32)
  batch = partitioning.global_batch(mesh, x, axis=axis)
  np.testing.assert_array_equal(batch, x)
  parts = np.split(x, 8, axis=axis)
  by_device = {shard.device: shard.data for shard in batch.addressable_shards}
  for device, part in zip(jax.devices(), parts):
    np.testing.assert_array_equal(by_device[device], part)


@pytest.mark.parametrize("axis", [0, 1])
def test_batch_sharding_names_only_the_batch_axis(axis):
  sharding = partitioning.batch_sharding(partitioning.create_mesh(), axis)
  assert sharding.spec == PartitionSpec(*[None] * axis, "data")


def test_global_batch_keeps_the_type_of_the_images():
  mesh = partitioning.create_mesh()
  images = np.zeros((8, 4, 4, 3), np.uint8)
  assert partitioning.global_batch(mesh, images).dtype == np.uint8


def test_batch_that_the_devices_cannot_share_is_an_error():
  mesh = partitioning.create_mesh()
  with pytest.raises(ValueError, match="evenly divide"):
    partitioning.global_batch(mesh, np.zeros((12, 2)))
