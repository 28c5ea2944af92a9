import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from vitgan_jax import partitioning
from vitgan_jax.errors import ConfigError


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_mesh_spans_all_devices(fsdp):
  mesh = partitioning.create_mesh(fsdp=fsdp)
  assert mesh.axis_names == ("data", "fsdp")
  assert mesh.devices.shape == (8 // fsdp, fsdp)
  assert mesh.devices.flatten().tolist() == jax.devices()


def test_state_is_shared_by_a_divisor_of_the_devices_only():
  with pytest.raises(ConfigError, match=r"fsdp=3 must divide .* devices, 8"):
    partitioning.create_mesh(fsdp=3)


@pytest.mark.parametrize(
  "shape, spec",
  [
    ((256, 1024), (None, "fsdp")),
    ((1024, 256), ("fsdp",)),
    ((3, 3, 128, 256), (None, None, None, "fsdp")),
    ((1001, 256), (None, "fsdp")),  # four do not divide 1001
    ((1001, 333), ()),
    ((255, 257), ()),  # small
    ((4, 2**14), (None, "fsdp")),  # just large enough
    ((), ()),
  ],
)
def test_large_arrays_are_split_along_their_largest_divisible_axis(shape, spec):
  mesh = partitioning.create_mesh(fsdp=4)
  x = jax.ShapeDtypeStruct(shape, np.float32)
  assert partitioning.state_shardings(mesh, {"x": x})["x"].spec == (
    PartitionSpec(*spec)
  )
  plain = partitioning.state_shardings(partitioning.create_mesh(), x)
  assert plain.is_fully_replicated


def test_mesh_spans_the_given_devices_only():
  devices = jax.devices()[2:4]
  assert partitioning.create_mesh(devices).devices.flatten().tolist() == devices


def test_replicated_array_is_whole_on_every_device():
  mesh = partitioning.create_mesh()
  x = np.arange(5.0)
  shards = jax.device_put(x, partitioning.replicated(mesh)).addressable_shards
  assert {shard.device for shard in shards} == set(jax.devices())
  for shard in shards:
    np.testing.assert_array_equal(shard.data, x)


@pytest.mark.parametrize("axis, fsdp", [(0, 1), (1, 1), (2, 1), (0, 4)])
def test_global_batch_splits_its_axis_over_the_devices_in_order(axis, fsdp):
  mesh = partitioning.create_mesh(fsdp=fsdp)
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
  assert sharding.spec == PartitionSpec(*[None] * axis, ("data", "fsdp"))


def test_global_batch_keeps_the_type_of_the_images():
  mesh = partitioning.create_mesh()
  images = np.zeros((8, 4, 4, 3), np.uint8)
  assert partitioning.global_batch(mesh, images).dtype == np.uint8


def test_batch_that_the_devices_cannot_share_is_an_error():
  mesh = partitioning.create_mesh()
  with pytest.raises(ValueError, match="evenly divide"):
    partitioning.global_batch(mesh, np.zeros((12, 2)))


WEIGHTS = {"w": np.array([0.5, -2.0, 1.0], np.float32), "b": np.float32(0.25)}
POINTS = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)


def squared_error(params, batch, state):
  """A loss whose network keeps the last part and the calls of a step."""
  x, y = batch["points"][:, :3], batch["points"][:, 3]
  error = x @ params["w"] + params["b"] - y
  loss = state["weight"] * jnp.mean(jnp.square(error))
  kept = {"calls": state["calls"] + 1, "part": batch["part"][0]}
  return loss, ({"loss": loss, "error": jnp.mean(error)}, kept)


def compile_gradient(num_devices, num_parts):
  """Returns the compiled `gradient` of a squared error, and its arguments."""
  mesh = partitioning.create_mesh(jax.devices()[:num_devices])
  parts = np.repeat(np.arange(num_parts), 32 // num_devices // num_parts)
  batch = {"points": POINTS, "part": np.tile(parts, num_devices)}
  state = {"weight": np.float32(3.0), "calls": np.int32(5)}
  args = (
    *jax.device_put((WEIGHTS,), partitioning.replicated(mesh)),
    partitioning.global_batch(mesh, batch),
    jax.device_put(state, partitioning.replicated(mesh)),
  )

  def gradient(*args):
    return partitioning.gradient(
      squared_error, *args, mesh=mesh, num_parts=num_parts
    )

  return jax.jit(gradient).lower(*args).compile(), args


@pytest.mark.parametrize("num_parts", [1, 4])
@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_gradient_is_that_of_the_whole_batch(num_devices, num_parts):
  compiled, args = compile_gradient(num_devices, num_parts)
  gradients, (metrics, model_state) = compiled(*args)
  x, y = np.split(POINTS.astype(np.float64), [3], axis=1)
  error = x @ WEIGHTS["w"] + WEIGHTS["b"] - y[:, 0]
  for actual, expected in (
    (gradients["w"], 6 * error @ x / 32),
    (gradients["b"], 6 * np.mean(error)),
    (metrics["loss"], 3 * np.mean(error**2)),
    (metrics["error"], np.mean(error)),
  ):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
  # What the network keeps is that of the last part, not a mean, and each part
  # started from the same.
  assert model_state == {"calls": 6, "part": num_parts - 1}
  assert model_state["part"].dtype == np.int32


def test_devices_meet_in_one_sum_after_the_last_part():
  sums = {}
  for num_parts in (1, 4):
    text = compile_gradient(4, num_parts)[0].as_text()
    for operation in ("all-gather", "all-to-all", "collective-permute"):
      assert operation not in text
    entry = text[text.index("\nENTRY") :]
    is_sum = re.compile(r"= .* all-reduce(-start)?\(")
    sums[num_parts] = len(is_sum.findall(entry))
    assert len(is_sum.findall(text)) == sums[num_parts]  # none in a loop
  assert sums == {1: 1, 4: 1}
