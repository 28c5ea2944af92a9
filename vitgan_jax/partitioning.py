"""The device mesh, shardings, and batches that span devices and processes."""

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vitgan_jax.config import ConfigError

BATCH_AXES = ("data", "fsdp")  # of the mesh; together they split every batch
# Smaller arrays are copied to all devices: 256 kB in float32 are not worth the
# time of gathering them.
MIN_SHARDED_SIZE = 2**16


def create_mesh(devices=None, fsdp=1):
  """Returns a mesh over devices, with the axes `data` and `fsdp`.

  Args:
    devices: None is all devices of all processes.
    fsdp: neighbouring devices that share one copy of the state.

  Raises:
    ConfigError: if fsdp does not divide the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  if len(devices) % fsdp:
    raise ConfigError(
      f"config.fsdp={fsdp} must divide the number of devices, {len(devices)}"
    )
  return jax.make_mesh(
    (len(devices) // fsdp, fsdp),
    BATCH_AXES,
    # Auto: the default, Explicit, would ask for shardings in every operation.
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=devices,
  )


def replicated(mesh):
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh, axis=0):
  """Returns the sharding of an array whose `axis` is split over devices."""
  return NamedSharding(mesh, PartitionSpec(*(None,) * axis, BATCH_AXES))


def state_shardings(mesh, state):
  """Returns the shardings of a pytree of parameters and what goes with them.

  An array of at least `MIN_SHARDED_SIZE` numbers is split over the axis `fsdp`
  of the mesh, along its largest dimension that this divides. All others are
  replicated. The same shape has the same sharding: so have a parameter, its
  moving average and its moments.

  Args:
    mesh: of `create_mesh`.
    state: pytree of arrays or `jax.ShapeDtypeStruct`s.
  """
  fsdp = mesh.shape["fsdp"]

  def sharding(leaf):
    divisible = [n for n in leaf.shape if n % fsdp == 0]
    if fsdp == 1 or leaf.size < MIN_SHARDED_SIZE or not divisible:
      return replicated(mesh)
    axis = leaf.shape.index(max(divisible))
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))

  return jax.tree.map(sharding, state)


def global_batch(mesh, local_batch, axis=0):
  """Makes one sharded array of what each process holds of it.

  Args:
    mesh: of `create_mesh`.
    local_batch: numpy array, this process's share along `axis`.
    axis: the batch axis.
  """
  return jax.make_array_from_process_local_data(
    batch_sharding(mesh, axis), local_batch
  )
