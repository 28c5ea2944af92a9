"""Both networks of a config: what they offer, their checks, how they compute.

Both are Linen modules with these fields, and those of their part of the config:

  image_size: S, pixels along a side.
  num_classes: 0 is none.
  dtype: of the computation; parameters, images and logits are float32.
  remat: whether the backward pass computes the blocks' insides again, which
    takes time and saves memory.
  implementation: of `kernels`; only of classes that compute by them, too.

They are called alike, with B images:

  generator(latents, labels, keys, train) -> images [B, S, S, 3]
  discriminator(images, labels, keys, train) -> logits [B]

  latents: [B, latent_dim]; a generator has this field.
  labels: int32 [B], or None without classes.
  keys: [B], a key for each image, for what is drawn at random inside (noise,
    dropout); None draws nothing.
  train: whether this is training: batch statistics then are those of the batch.

A generator is `synthesize(mapping(latents, labels), keys, train)`, where the
latent w is between; one without a mapping network returns the latents. One that
mixes styles has `styles(latents, labels, keys, train)`, and synthesizes what
this returns, w of each layer [B, L, W]; the path length penalty is for these.
One whose layers can each take a w of their own has L of them in `num_styles`,
above 1, and synthesizes [B, L, W], too, with or without `styles`.
With a field `num_levels`, it gives so many levels of each image to train with,
[B, S, S, 3 * levels], the image itself last. A discriminator with this field
takes them, any other the last one; one level stands for all.

A class with `takes_classes = False` is refused where there are classes.

What a network keeps beside its parameters lies in variable collections, and is
the training state's `model_state`. A discriminator may be given real and
generated images in one call, one kind after the other: a layer that compares
images looks at neighbours. Their number, a field `group_size`, divides what a
device has of a batch.

What a network sows into "intermediates" is drawn by `diagnostics`.

To add a network, write its class, with `check`, and an entry in `kinds`.
Nothing here imports JAX before a network is built: configs are plain data.
"""

import copy
from typing import NamedTuple

from vitgan_jax.errors import ConfigError
from vitgan_jax.kernels import UnsupportedError
from vitgan_jax.models import kinds


def check(config):
  """Checks the networks' parts of a config.

  Raises:
    ConfigError: says which field is wrong, and what is allowed.
  """
  try:
    _check(config)
  except ConfigError as error:
    # What follows from the size, as patches may, nobody wrote.
    if not (sizes := _sizes_nearby(config)):
      raise
    raise ConfigError(
      f"config.data.image_size={config.data.image_size} does not fit; the "
      f"nearest that do: {', '.join(map(str, sizes))} ({error})"
    ) from error


def _sizes_nearby(config):
  """Returns the next smaller and larger image sizes that pass, if any do."""
  other = copy.deepcopy(config)  # in which others still follow from the size
  size = config.data.image_size

  def passes(candidate):
    other.data.image_size = candidate
    try:
      _check(other)
    except ConfigError:
      return False
    return True

  below = next(filter(passes, range(size - 1, max(0, size - 64), -1)), None)
  above = next(filter(passes, range(size + 1, size + 64)), None)
  return [found for found in (below, above) if found]


def _check(config):
  for network in kinds.TABLES:
    fields = config[network]
    kind = kinds.kind_of(network, fields.kind)
    if different := kinds.different_fields(config, network):
      raise ConfigError(
        f"config.{network}.kind={fields.kind!r} has other fields "
        f"({', '.join(different)}): --config=FILE.py:{network[0]}="
        f"{fields.kind} chooses it with them"
      )
    network_class = kind.load()
    network_class.check(fields, config.data.image_size, f"config.{network}.")
    if config.data.num_classes and not getattr(
      network_class, "takes_classes", True
    ):
      raise ConfigError(
        f"config.{network}.kind={fields.kind!r} takes no classes: give "
        "config.data.num_classes=0"
      )
  levels = [config[network].get("num_levels", 1) for network in kinds.TABLES]
  if 1 not in levels and len(set(levels)) > 1:
    raise ConfigError(
      f"config.generator.num_levels={levels[0]} and "
      f"config.discriminator.num_levels={levels[1]} must be equal, or one of "
      "them 1"
    )
  kind = config.generator.kind
  has_styles = hasattr(kinds.kind_of("generator", kind).load(), "styles")
  if config.loss.path_length_weight and not has_styles:
    raise ConfigError(
      f"config.loss.path_length_weight={config.loss.path_length_weight} must "
      f"be 0: config.generator.kind={kind!r} has no styles of its layers"
    )


class Networks(NamedTuple):
  """Both networks of a config, in the plain form; see `with_kernels`.

  Attributes:
    generator: Linen module.
    discriminator: Linen module.
    implementation: what the config asks for: "auto", or one of `kernels`.
  """

  generator: object
  discriminator: object
  implementation: str


def build(config):
  """Returns the Networks that a config describes."""
  import jax.numpy as jnp

  def module(network):
    fields = dict(config[network])
    return kinds.kind_of(network, fields.pop("kind")).load()(
      **fields,
      image_size=config.data.image_size,
      num_classes=config.data.num_classes,
      remat=config.remat,
      dtype=jnp.dtype(config.dtype),
    )

  modules = [module(network) for network in kinds.TABLES]
  return Networks(*modules, config.implementation)


def plain(network):
  """Returns a network in its plain form, which has a second derivative."""
  if not hasattr(network, "implementation"):
    return network
  return network.clone(implementation="xla")


def with_kernels(nets, mesh, batch_size, num_parts=1):
  """Chooses how the networks compute.

  "auto" takes kernels on TPUs, where they take these shapes.

  Args:
    nets: Networks.
    mesh: of the devices.
    batch_size: of the smallest call, over all devices.
    num_parts: micro-batches that each device takes its share in.

  Returns:
    (Networks; a line for each of them that says what was chosen, and why not
    kernels).

  Raises:
    ConfigError: if the config asks for kernels that cannot be had.
  """
  platform = mesh.devices.flat[0].platform
  wanted = nets.implementation
  if wanted == "pallas" and platform != "tpu":
    raise ConfigError(
      "config.implementation='pallas' is for TPUs, and these devices are of "
      f"{platform}: give auto, xla or interpret"
    )
  chosen, lines = {}, []
  for name in kinds.TABLES:
    network = getattr(nets, name)
    implementation, reason = wanted, ""
    if not hasattr(network, "implementation"):
      implementation, reason = "xla", "this kind has no kernels"
    elif wanted == "auto":
      implementation = "pallas" if platform == "tpu" else "xla"
    if implementation != "xla":
      parts = mesh.size * num_parts
      reason = _obstacle(network, name, implementation, batch_size, parts)
      if reason and wanted != "auto":
        raise ConfigError(
          f"config.implementation={wanted!r} is not for this {name}: {reason}"
        )
      implementation = "xla" if reason else implementation
    if hasattr(network, "implementation"):
      network = network.clone(implementation=implementation)
    chosen[name] = network
    lines.append(f"{name}: {implementation}" + (f" ({reason})" * bool(reason)))
  return Networks(**chosen, implementation=wanted), lines


def _obstacle(network, name, implementation, batch_size, num_parts):
  """Returns why kernels cannot take parts of a batch; "" if they can.

  The next larger batch is named, if that would do.
  """
  import jax
  import jax.numpy as jnp

  from vitgan_jax.kernels.attention import GROUP_SIZE

  network = network.clone(implementation=implementation)

  def trace(num_images):
    size = network.image_size
    shape = (
      (num_images, network.latent_dim)
      if name == "generator"
      else (num_images, size, size, 3)
    )
    labels = jnp.zeros(num_images, int) if network.num_classes else None
    try:
      jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(shape), labels)
    except UnsupportedError as error:
      return str(error)
    return ""

  num_images = batch_size // num_parts
  reason = trace(num_images)
  more = -(-num_images // GROUP_SIZE) * GROUP_SIZE
  if reason and more != num_images and not trace(more):
    reason += f"; config.batch_size={more * num_parts} would do"
  return reason
