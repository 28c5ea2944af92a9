"""Repeats a step that a run could not take, and names what went bad first."""

import contextlib
import functools
import itertools

from etils import epath
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitgan_jax import checkpoint, compilation, gan_step, partitioning
from vitgan_jax import config as config_lib
from vitgan_jax.data import pipeline
from vitgan_jax.errors import ConfigError
from vitgan_jax.models import networks


def folder(workdir):
  """Returns where a run keeps the state before a step that it did not take."""
  return epath.Path(workdir) / "nonfinite"


def replay(workdir):
  """Repeats the step, and prints the first tensors that are not finite.

  In the order in which a step computes: the state before it, what the modules
  of the networks return, the losses, the gradients.

  Args:
    workdir: of a run that stopped at a number that is not finite.

  Returns:
    The names of the first of them, one for each of those that has any.

  Raises:
    ConfigError: if the run has none, or its data are not there.
  """
  config = config_lib.load(workdir)
  if not checkpoint.has_any(folder(workdir)):
    raise ConfigError(
      f"{workdir} has no step to replay: none had numbers that were not finite"
    )
  compilation.use_cache(config.compilation_cache)
  mesh = partitioning.create_mesh(fsdp=config.fsdp)
  nets, _ = networks.with_kernels(
    networks.build(config), mesh, config.batch_size, config.accumulation
  )
  with checkpoint.open_manager(folder(workdir)) as manager:
    state, data_state = checkpoint.restore_last(manager, config, nets, mesh)
  images = pipeline.load_images(config.data)
  batches = pipeline.ShuffledBatches(
    images,
    config_lib.images_per_step(config),
    config.seed,
    held_out=config.data.held_out,
  )
  step = batches.step_of(data_state)
  print(f"Replaying step {step} of {workdir}", flush=True)
  indices = batches.indices(step).reshape(config.d_steps, -1)
  labels = images.labels()[indices] if config.data.num_classes else None
  batch = partitioning.global_batch(
    mesh, {"images": images[indices], "labels": labels}, axis=1
  )
  key = jax.random.fold_in(state.key, step)
  d_batches, g_batch = gan_step.with_keys(batch, key, config)
  options = dict(config=config, nets=nets, mesh=mesh)
  found = _tell("the state before it", _bad_leaves(state))
  d_step = jax.jit(functools.partial(gan_step.d_step, **options))
  for i in range(config.d_steps):
    d_batch = jax.tree.map(lambda x, i=i: x[i], d_batches)
    name = f"update {i + 1} of the discriminator"
    found += _update(
      name, gan_step.d_loss, state.d_params, d_batch, state, options
    )
    state, _ = d_step(state, d_batch)
  name = "the update of the generator"
  found += _update(
    name, gan_step.g_loss, state.g_params, g_batch, state, options
  )
  if not found:
    print(
      "All numbers are finite here: what went bad did not come of the numbers "
      "alone. Other devices add up in another order"
    )
  return found


def _update(name, loss, params, batch, state, options):
  """Computes a gradient; tells what is bad of it, and returns the first."""
  recorder = _Recorder()

  @jax.jit
  def gradient(params, batch, state):
    return partitioning.gradient(
      functools.partial(loss, config=options["config"], nets=options["nets"]),
      params,
      batch,
      state,
      mesh=options["mesh"],
      num_parts=options["config"].accumulation,
    )

  with recorder.listening():
    gradients, (metrics, model_state) = gradient(
      params, batch, state.without_optimizers()
    )
    jax.block_until_ready(gradients)
    jax.effects_barrier()
  return (
    _tell(f"{name}: modules return", recorder.bad())
    + _tell(f"{name}: losses", _bad_leaves(metrics))
    + _tell(f"{name}: gradients", _bad_leaves(gradients))
    + _tell(f"{name}: what the network keeps", _bad_leaves(model_state))
  )


class _Recorder:
  """Notes how many numbers that modules return are not finite."""

  def __init__(self):
    self._names = []  # of what modules returned, in the order of the calls
    self._counts = {}  # by their place there
    self._network = ""

  @contextlib.contextmanager
  def listening(self):
    """Notes what modules return that are traced within."""
    with nn.intercept_methods(self._intercept):
      yield

  def bad(self):
    """Returns [(name, numbers that are not finite, all)], in that order."""
    return [
      (self._names[i], *counts)
      for i, counts in sorted(self._counts.items())
      if counts[0]
    ]

  def _intercept(self, call, args, kwargs, context):
    path = context.module.path
    if not path:
      self._network = type(context.module).__name__
    outputs = call(*args, **kwargs)
    if context.method_name != "setup" and (leaves := _floating(outputs)):
      number = len(self._names)
      self._names.append("/".join((self._network, *path)))
      size = sum(x.size for x in leaves)
      jax.debug.callback(
        functools.partial(self._note, number, size),
        sum(jnp.sum(~jnp.isfinite(x)) for x in leaves),
      )
    return outputs

  def _note(self, number, size, count):
    # Of all devices, and of all parts of the batch.
    before = self._counts.get(number, (0, 0))
    self._counts[number] = (before[0] + int(count), before[1] + size)


def _floating(tree):
  return [
    x
    for x in jax.tree.leaves(tree)
    if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
  ]


def _bad_leaves(tree):
  """Returns [(name, numbers that are not finite, all)] of bad leaves."""
  leaves = [
    (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  counts = [(name, int(np.sum(~np.isfinite(x))), x.size) for name, x in leaves]
  return [bad for bad in counts if bad[1]]


def _tell(what, bad, shown=3):
  """Prints the first of what is bad; returns the name of the very first."""
  for name, count, size in itertools.islice(bad, shown):
    print(f"{what}: {name}: {count:,} of {size:,} numbers are not finite")
  if len(bad) > shown:
    print(f"{what}: and {len(bad) - shown} more")
  return [name for name, *_ in bad[:1]]
