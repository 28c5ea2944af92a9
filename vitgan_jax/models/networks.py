"""The kinds of networks: what a config holds of each, and where each is.

Both kinds are Linen modules with the fields `image_size` (S), `num_classes` (0:
none), `dtype`, `remat`, and those of their part of the config. They are called
alike, with B images:

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

A network whose class has a field `implementation` computes by `kernels`, too.
What it sows into "intermediates" is drawn by `diagnostics`.

To add a network, write its class, with `check`, and an entry here. Nothing here
imports JAX before a network is built: configs are plain data.
"""

import copy
import pkgutil
from typing import NamedTuple

import ml_collections

from vitgan_jax.config import ConfigError
from vitgan_jax.kernels import UnsupportedError


class Kind(NamedTuple):
  """A kind of network.

  Attributes:
    path: of its class, "module:Class". The class has a static method
      `check(fields, image_size, where)`, which raises a ConfigError that names
      a field `where` + its name.
    fields: {name: value}, the defaults of its part of the config.
    smoke: those that `:smoke` changes, to train within seconds.
    tiny: those that `:tiny` changes, for two cores to learn 16 px.
    loss: those of `config.loss` that it cannot do without; who chooses the kind
      by `g=` or `d=` gets them.
    later: fields that came later, and what stands for them in older runs.
  """

  path: str
  fields: dict
  smoke: dict
  tiny: dict = {}
  loss: dict = {}
  later: dict = {}

  def load(self):
    """Returns the class."""
    return pkgutil.resolve_name(self.path)


_TINY = dict(width=64, depth=2, num_heads=4, mlp_dim=256, position_scale=2.0)
_SMALL = dict(width=32, depth=1, num_heads=2, mlp_dim=64)
# StyleGAN2's largest: base_channels / resolution, at most max_channels
_CONFIG_F = dict(base_channels=32768, max_channels=512)
_TINY_CONFIG_F = dict(base_channels=512, max_channels=64, mapping_depth=2)
# Size S; B is of width 768 and 12 heads, L of 1024, 16 and depth 24.
_GAT = dict(patch_size=2, width=384, depth=12, num_heads=6, num_levels=4)
_TINY_GAT = dict(patch_size=4, width=64, depth=4, num_heads=4)
_SMALL_GAT = dict(patch_size=4, width=32, depth=2, num_heads=2, num_levels=2)

GENERATORS = {
  "vitgan": Kind(
    "vitgan_jax.models.generator:Generator",
    dict(
      patch_size=4,
      width=384,
      depth=4,
      num_heads=6,
      mlp_dim=1536,
      latent_dim=384,
      mapping_depth=8,
      mapping_lr_multiplier=0.01,
      latent_injection="sln",  # "sln", "add" or "token"
      attention="dot",  # "dot" or "l2"
      qk_gain=0.0,  # of query and key at init; 0 is 1 for "dot", 0.4 for "l2"
      conv_qkv=False,  # 3x3 convolutions for query, key, value
      # "implicit" (modulated), "implicit_concat", "linear" or "conv"
      patch_decoder="implicit",
      decoder_dim=384,
      position_scale=3.0,
      fourier_scale=3.0,
      grey=False,  # whether to draw grey images, for data without colour
    ),
    dict(**_SMALL, latent_dim=32, mapping_depth=2, decoder_dim=32),
    dict(
      **_TINY,
      latent_dim=64,
      mapping_depth=4,
      decoder_dim=64,
      fourier_scale=2.0,
    ),
    later=dict(grey=False),
  ),
  "stylegan2": Kind(
    "vitgan_jax.models.stylegan2:Generator",
    dict(
      latent_dim=512,
      mapping_depth=8,
      mapping_lr_multiplier=0.01,
      **_CONFIG_F,
      style_mixing=0.9,  # probability, in training
    ),
    dict(latent_dim=32, mapping_depth=2, max_channels=16),
    dict(**_TINY_CONFIG_F, latent_dim=64, style_mixing=0.0),
  ),
  "cips": Kind(
    "vitgan_jax.models.cips:Generator",
    dict(
      latent_dim=512,
      mapping_depth=8,
      mapping_lr_multiplier=0.01,
      **_CONFIG_F,
    ),
    dict(latent_dim=32, mapping_depth=2, max_channels=16),
    dict(**_TINY_CONFIG_F, latent_dim=64),
  ),
  "ganformer": Kind(
    "vitgan_jax.models.ganformer:Generator",
    dict(
      num_latents=16,  # that pixels attend to, beside the global one
      component_dim=32,  # numbers in each
      mapping_depth=4,  # pairs of layers
      mapping_lr_multiplier=0.01,
      attention_dropout=0.12,
      **_CONFIG_F,
    ),
    dict(num_latents=3, component_dim=8, mapping_depth=1, max_channels=16),
    dict(**_TINY_CONFIG_F, num_latents=8, component_dim=16),
  ),
  "biggan": Kind(
    "vitgan_jax.models.biggan:Generator",
    dict(
      latent_dim=128,
      channels=(256, 256, 256, 256),  # at 4 px, and of each doubling
      attention_resolution=0,  # pixels; 0 is none
      kernel_init="normal",  # or "orthogonal"
    ),
    dict(latent_dim=16, channels=(8, 8, 8, 8)),
    dict(latent_dim=64, channels=(64, 64, 64)),
  ),
  "transgan": Kind(
    "vitgan_jax.models.transgan:Generator",
    dict(width=1024, depths=(5, 4, 2), num_heads=4, latent_dim=256),
    dict(width=64, depths=(1, 1, 1), num_heads=2, latent_dim=32),
    dict(width=64, depths=(2, 2), latent_dim=32),
  ),
  "gat": Kind(
    "vitgan_jax.models.gat:Generator",
    dict(**_GAT, latent_dim=64),
    dict(**_SMALL_GAT, latent_dim=32),
    _TINY_GAT,
  ),
}

DISCRIMINATORS = {
  "vitgan": Kind(
    "vitgan_jax.models.discriminator:Discriminator",
    dict(
      patch_size=4,
      overlap=2,  # pixels on every side; half a patch
      width=384,
      depth=4,
      num_heads=6,
      mlp_dim=1536,
      attention="l2",  # "l2" or "dot"
      qk_gain=0.0,  # of query and key at init; 0 is 0.4 for "l2", 1 for "dot"
      conv_qkv=False,
      spectral_norm="isn",  # "isn", "sn" or "none"
      position_scale=3.0,
    ),
    _SMALL,
    dict(**_TINY, qk_gain=0.35),
  ),
  "stylegan2": Kind(
    "vitgan_jax.models.stylegan2:Discriminator",
    dict(
      **_CONFIG_F,
      architecture="resnet",  # or "orig", without the linear branches
      group_size=4,  # neighbours that minibatch deviation compares
      mapping_depth=8,  # of the classes
      mapping_lr_multiplier=0.01,
    ),
    dict(max_channels=16, group_size=1, mapping_depth=2),
    dict(**_TINY_CONFIG_F, group_size=4),
    # Nothing else bounds its slope. The gamma of DiffAugment's StyleGAN2.
    loss=dict(r1_gamma=0.1),
  ),
  "biggan": Kind(
    "vitgan_jax.models.biggan:Discriminator",
    dict(
      channels=(256, 256, 256, 256),
      num_halvings=2,  # blocks that halve the resolution
      attention_resolution=0,
      kernel_init="normal",
    ),
    dict(channels=(8, 8)),
    dict(channels=(64, 64, 64)),
  ),
  "transgan": Kind(
    "vitgan_jax.models.transgan:Discriminator",
    dict(width=384, depths=(3, 3, 1), num_heads=4),
    dict(width=32, depths=(1, 1, 1), num_heads=2),
    dict(width=64, depths=(1, 1, 1)),
  ),
  "gat": Kind(
    "vitgan_jax.models.gat:Discriminator",
    dict(**_GAT, head_dim=2048),  # features before a class comes in
    dict(**_SMALL_GAT, head_dim=64),
    dict(**_TINY_GAT, head_dim=512),
  ),
}

TABLES = {"generator": GENERATORS, "discriminator": DISCRIMINATORS}


def kind_of(network, name):
  """Returns the Kind of a name.

  Args:
    network: "generator" or "discriminator".
    name: what the config calls it.

  Raises:
    ConfigError: if there is none.
  """
  table = TABLES[network]
  if not isinstance(name, str) or name not in table:
    shown = " ".join(repr(name).split())  # of a ConfigDict it has many lines
    raise ConfigError(
      f"config.{network}.kind={shown} must be one of {', '.join(table)}"
    )
  return table[name]


def fields_of(network, name):
  """Returns a config's part for a kind of network: its kind and defaults."""
  return {"kind": name, **kind_of(network, name).fields}


def later_fields(values):
  """Returns what came later to the networks of a config, by dotted names.

  Args:
    values: of the config, as `config.flatten` returns them.
  """
  return {
    f"{network}.{name}": value
    for network, table in TABLES.items()
    for kind in table
    if values.get(f"{network}.kind") == kind
    for name, value in table[kind].later.items()
  }


def different_fields(config, network):
  """Returns the fields that a network lacks of its kind's, or has beyond them.

  They are sorted, as "generator.width".
  """
  fields = config.get(network)
  if not isinstance(fields, ml_collections.ConfigDict) or "kind" not in fields:
    return [f"{network}.kind"]
  names = set(fields_of(network, fields["kind"])) ^ set(fields)
  return sorted(f"{network}.{name}" for name in names)


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
  for network in TABLES:
    fields = config[network]
    kind = kind_of(network, fields.kind)
    if different := different_fields(config, network):
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
  levels = [config[network].get("num_levels", 1) for network in TABLES]
  if 1 not in levels and len(set(levels)) > 1:
    raise ConfigError(
      f"config.generator.num_levels={levels[0]} and "
      f"config.discriminator.num_levels={levels[1]} must be equal, or one of "
      "them 1"
    )
  kind = config.generator.kind
  has_styles = hasattr(kind_of("generator", kind).load(), "styles")
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
    return kind_of(network, fields.pop("kind")).load()(
      **fields,
      image_size=config.data.image_size,
      num_classes=config.data.num_classes,
      remat=config.remat,
      dtype=jnp.dtype(config.dtype),
    )

  modules = [module(network) for network in TABLES]
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
  for name in TABLES:
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
