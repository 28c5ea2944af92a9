"""The kinds of networks: what a config holds of each, and where each is.

Plain data, which imports no JAX. `networks` says what a network must offer.
"""

import contextlib
import pkgutil
from typing import NamedTuple

import ml_collections

from vitgan_jax.errors import ConfigError


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
    of_classes: names of those that do nothing where there are no classes.
  """

  path: str
  fields: dict
  smoke: dict
  tiny: dict = {}
  loss: dict = {}
  later: dict = {}
  of_classes: tuple = ()

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
      pooling="token",  # or "mean", of the logits of all patches
    ),
    _SMALL,
    dict(**_TINY, qk_gain=0.35),
    later=dict(pooling="token"),
  ),
  "stylegan2": Kind(
    "vitgan_jax.models.stylegan2:Discriminator",
    dict(
      **_CONFIG_F,
      architecture="resnet",  # or "orig", without the linear branches
      group_size=4,  # neighbours that minibatch deviation compares
      mapping_depth=8,
      mapping_lr_multiplier=0.01,
    ),
    dict(max_channels=16, group_size=1, mapping_depth=2),
    dict(**_TINY_CONFIG_F, group_size=4),
    # Nothing else bounds its slope. The gamma of DiffAugment's StyleGAN2.
    loss=dict(r1_gamma=0.1),
    of_classes=("mapping_depth", "mapping_lr_multiplier"),
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
    of_classes=("head_dim",),
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
    for network, kind in _kinds_of(values)
    for name, value in kind.later.items()
  }


def idle_fields(values):
  """Returns the dotted names of fields that do nothing in a config."""
  if values.get("data.num_classes"):
    return []
  return [
    f"{network}.{name}"
    for network, kind in _kinds_of(values)
    for name in kind.of_classes
  ]


def _kinds_of(values):
  """Yields network and Kind of a config, of those that there are."""
  for network in TABLES:
    with contextlib.suppress(ConfigError):
      yield network, kind_of(network, values.get(f"{network}.kind"))


def different_fields(config, network):
  """Returns the fields that a network lacks of its kind's, or has beyond them.

  They are sorted, as "generator.width".
  """
  fields = config.get(network)
  if not isinstance(fields, ml_collections.ConfigDict) or "kind" not in fields:
    return [f"{network}.kind"]
  names = set(fields_of(network, fields["kind"])) ^ set(fields)
  return sorted(f"{network}.{name}" for name in names)
