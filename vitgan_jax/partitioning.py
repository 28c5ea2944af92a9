"""The device mesh, shardings, and batches that span devices and processes."""

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def create_mesh(devices=None):
  """Returns a mesh of one axis, `data`, over all devices of all processes."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh(
    # Auto: the default, Explicit, would ask for shardings in every operation.
    (len(devices),),
    ("data",),
    axis_types=(AxisType.Auto,),
    devices=devices,
  )


def replicated(mesh):
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh, axis=0):
  """Returns the sharding of an array whose `axis` is split over devices."""
  return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "data"))


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
