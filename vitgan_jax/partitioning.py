"""The device mesh, shardings, batches that span devices, and their gradient."""

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vitgan_jax.errors import ConfigError

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
  """Makes sharded arrays of what each process holds of them.

  Args:
    mesh: of `create_mesh`.
    local_batch: pytree of numpy arrays, this process's share along `axis`.
    axis: the batch axis.
  """
  sharding = batch_sharding(mesh, axis)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), local_batch
  )


def gradient(loss_fn, params, batch, state, *, mesh, num_parts=1):
  """Differentiates a loss that is a mean over the images of a batch.

  Each device differentiates its own images, one part after the other; then one
  sum goes over the devices, however many parts there are. A loss that is not a
  mean over images, or over pairs of them, must itself take means over
  `BATCH_AXES`.

  Args:
    loss_fn: (params, batch, state) to (loss, (metrics, model_state)), of the
      images of one part: scalars that are means over them, and what the
      network keeps, which must not depend on them, or be averaged over
      `BATCH_AXES`.
    params: pytree, whole on each device inside.
    batch: pytree of arrays [B, ...].
    state: pytree of whatever else it needs, likewise whole.
    mesh: of `create_mesh`.
    num_parts: micro-batches of each device.

  Returns:
    (gradients, (metrics, model_state)); the model_state of the last part.
  """
  gradient_fn = jax.grad(loss_fn, has_aux=True)

  def local(params, batch, state):
    if num_parts == 1:
      gradients, (metrics, model_state) = gradient_fn(params, batch, state)
    else:
      parts = jax.tree.map(
        lambda x: x.reshape(num_parts, -1, *x.shape[1:]), batch
      )

      def add(sums, part):
        gradients, (metrics, model_state) = gradient_fn(params, part, state)
        return jax.tree.map(jnp.add, sums, (gradients, metrics)), model_state

      first = jax.tree.map(lambda x: x[0], parts)
      gradients, (metrics, _) = jax.eval_shape(
        gradient_fn, params, first, state
      )
      zeros = jax.tree.map(jnp.zeros_like, (gradients, metrics))
      sums, model_states = lax.scan(add, zeros, parts)
      gradients, metrics = jax.tree.map(lambda x: x / num_parts, sums)
      model_state = jax.tree.map(lambda x: x[-1], model_states)
    return lax.pmean((gradients, metrics), BATCH_AXES), model_state

  whole, split = PartitionSpec(), PartitionSpec(BATCH_AXES)
  (gradients, metrics), model_state = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(whole, split, whole),
    out_specs=whole,
    check_vma=False,  # a kernel's outputs have no such types
  )(params, batch, state)
  return gradients, (metrics, model_state)
