"""StyleGAN2 (Karras et al. 2020), with the classes of its ADA version."""

import math
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from vitgan_jax.errors import ConfigError, check_fields
from vitgan_jax.models.convolutions import (
  Conv,
  StyledConv,
  ToRGB,
  downsample,
  draw_noise,
  upsample,
)
from vitgan_jax.models.layers import Dense, leaky_relu, w_of_layer
from vitgan_jax.models.mapping import MappedGenerator, MappingNetwork
from vitgan_jax.partitioning import BATCH_AXES

W_AVG_DECAY = 0.995  # a step


def channels(image_size, base_channels, max_channels):
  """Returns {resolution: channels} of 4, 8, ... image_size pixels."""
  resolutions = [2**i for i in range(2, image_size.bit_length())]
  return {r: min(max_channels, base_channels // r) for r in resolutions}


def check_resolutions(fields, image_size, where, **ranges):
  """Checks what networks of `channels` have; `ranges` as in `check_fields`."""
  if image_size < 8 or image_size & (image_size - 1):
    raise ConfigError(
      f"{where}kind={fields.kind!r} doubles from 4 pixels on: config.data."
      f"image_size={image_size} must be a power of two, 8 or more"
    )
  positive = ("max_channels", "mapping_depth", "mapping_lr_multiplier")
  check_fields(fields, where, positive=positive)
  check_fields(fields, where, **ranges)
  if fields.base_channels < image_size:
    raise ConfigError(
      f"{where}base_channels={fields.base_channels} must be "
      f"config.data.image_size={image_size} or more: it is divided by the "
      "resolution"
    )


class Generator(MappedGenerator):
  """The skip generator of StyleGAN2, latents to images.

  It keeps the running mean of w in the collection `averages`, which
  `sample.mean_w` takes for truncation.

  Attributes, beside those of all networks (see `networks`):
    image_size: S, pixels along a side; a power of two.
    latent_dim: of z and w.
    mapping_depth: layers of the mapping network.
    mapping_lr_multiplier: its relative learning rate.
    base_channels: divided by the resolution, the channels at it ...
    max_channels: ... but for these at most.
    style_mixing: probability, in training, that the w of another latent takes
      over from some layer on.
  """

  image_size: int
  num_classes: int
  latent_dim: int
  mapping_depth: int
  mapping_lr_multiplier: float
  base_channels: int
  max_channels: int
  style_mixing: float
  remat: bool = False
  dtype: Any = jnp.float32

  @staticmethod
  def check(fields, image_size, where):
    """Raises a ConfigError if these fields make no generator."""
    check_resolutions(
      fields,
      image_size,
      where,
      positive=("latent_dim",),
      shares=("style_mixing",),
    )

  def setup(self):
    """Makes what `styles` uses; `synthesize` makes the rest."""
    super().setup()
    self.w_avg = self.variable(
      "averages", "w_avg", jnp.zeros, (self.latent_dim,)
    )

  @property
  def num_styles(self):
    """L: one for each convolution, and one more for the last colours."""
    return 2 * self.image_size.bit_length() - 4

  def __call__(self, latents, labels=None, keys=None, train=False):
    """Maps latents [B, latent_dim] to images; see `synthesize`."""
    w = self.styles(latents, labels, keys, train)
    return self.synthesize(w, keys, train)

  def styles(self, latents, labels=None, keys=None, train=False):
    """Maps latents [B, latent_dim] to w of each layer [B, L, latent_dim].

    In training styles are mixed (Karras et al. 2019, section 3.1), by latents
    that are drawn by the keys.
    """
    w = self.mapping(latents, labels)
    if train and self.is_mutable_collection("averages"):
      mean = lax.pmean(jnp.mean(w, axis=0), BATCH_AXES)
      self.w_avg.value = mean + (self.w_avg.value - mean) * W_AVG_DECAY
    w = jnp.repeat(w[:, None], self.num_styles, axis=1)
    if not train or keys is None or not self.style_mixing:
      return w

    def draw(key):
      # The noise is drawn by the key itself.
      z_key, coin_key, layer_key = jax.random.split(
        jax.random.fold_in(key, 1), 3
      )
      layer = jax.random.randint(layer_key, (), 1, self.num_styles)
      mixed = jax.random.bernoulli(coin_key, self.style_mixing)
      latents = jax.random.normal(z_key, (self.latent_dim,))
      return latents, mixed & (jnp.arange(self.num_styles) >= layer)

    latents, is_other = jax.vmap(draw)(keys)
    other = self.mapping(latents, labels)
    return jnp.where(is_other[..., None], other[:, None], w)

  @nn.compact
  def synthesize(self, w, keys=None, train=False):
    """Maps w to images [B, S, S, 3], about [-1, 1].

    The output is not squashed; it is clipped where an image is written.

    Args:
      w: [B, latent_dim], or [B, L, latent_dim], of each layer.
      keys: [B], of the noise; None adds none.
      train: is not used.
    """
    conv = nn.remat(StyledConv) if self.remat else StyledConv
    widths = channels(self.image_size, self.base_channels, self.max_channels)
    shape = (4, 4, widths[4])
    x = self.param("constant", nn.initializers.normal(1.0), shape)
    x = jnp.broadcast_to(x.astype(self.dtype), (w.shape[0], *shape))
    layers = [4] + [r for r in widths if r > 4 for _ in range(2)]
    noise, images = draw_noise(keys, layers), None
    for i, resolution in enumerate(layers):
      is_last = i % 2 == 0  # at this resolution
      x = conv(
        widths[resolution],
        None if is_last else "up",
        self.dtype,
        name=f"conv{i}",
      )(x, w_of_layer(w, i), noise[i])
      if is_last:
        rgb = ToRGB(self.dtype, name=f"rgb{resolution}")(
          x, w_of_layer(w, i + 1)
        )
        rgb = rgb.astype(jnp.float32)
        images = rgb if images is None else upsample(images) + rgb
    return images


def minibatch_deviation(x, group_size):
  """Appends a channel: how much the images of a group differ.

  The standard deviation over the group, the mean over pixels and channels
  (Karras et al. 2018, section 3). A group is of neighbours, so that it lies
  within what one device has, and within one kind of images; NVIDIA's code takes
  images that are a stride apart. An incomplete group makes all of them smaller.

  Args:
    x: [B, H, W, C].
    group_size: images in a group.

  Returns:
    [B, H, W, C + 1].
  """
  size = math.gcd(group_size, len(x))
  groups = x.astype(jnp.float32).reshape(-1, size, *x.shape[1:])
  deviation = jnp.sqrt(jnp.var(groups, axis=1) + 1e-8)
  channel = jnp.repeat(jnp.mean(deviation, axis=(1, 2, 3)), size)
  channel = channel[:, None, None, None].astype(x.dtype)
  channel = jnp.broadcast_to(channel, (*x.shape[:3], 1))
  return jnp.concatenate([x, channel], axis=-1)


class Block(nn.Module):
  """Two convolutions, the second of which halves the images.

  Attributes:
    features: output channels.
    is_residual: whether a linear branch is added.
    dtype: of the computation.
  """

  features: int
  is_residual: bool
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Maps [B, H, W, in] to [B, H / 2, W / 2, features]."""
    common = dict(dtype=self.dtype)
    y = leaky_relu(Conv(x.shape[-1], name="conv0", **common)(x))
    y = Conv(self.features, resample="down", name="conv1", **common)(y)
    y = leaky_relu(y)
    if not self.is_residual:
      return y
    branch = Dense(self.features, use_bias=False, name="branch", **common)
    return (y + branch(downsample(x))) * 0.5**0.5


class Discriminator(nn.Module):
  """The discriminator of StyleGAN2, images to logits.

  It draws nothing at random. With classes the logit is the projection of the
  last layer on the mapped class (Karras et al. 2020, ADA code).

  Attributes, beside those of all networks (see `networks`):
    image_size: S, pixels along a side; a power of two.
    base_channels: divided by the resolution, the channels at it ...
    max_channels: ... but for these at most.
    architecture: of the blocks: "resnet" or "orig", without the linear branch.
    group_size: see `minibatch_deviation`.
    mapping_depth: layers of the classes' mapping network.
    mapping_lr_multiplier: its relative learning rate.
  """

  image_size: int
  num_classes: int
  base_channels: int
  max_channels: int
  architecture: str
  group_size: int
  mapping_depth: int
  mapping_lr_multiplier: float
  remat: bool = False
  dtype: Any = jnp.float32

  @staticmethod
  def check(fields, image_size, where):
    """Raises a ConfigError if these fields make no discriminator."""
    check_resolutions(
      fields,
      image_size,
      where,
      choices={"architecture": ("resnet", "orig")},
      positive=("group_size",),
    )

  @nn.compact
  def __call__(self, images, labels=None, keys=None, train=False):
    """Maps images [B, S, S, 3] to logits [B]; no activation is applied."""
    widths = channels(self.image_size, self.base_channels, self.max_channels)
    block = nn.remat(Block) if self.remat else Block
    common = dict(dtype=self.dtype)
    x = Dense(widths[self.image_size], name="from_rgb", **common)(images)
    x = leaky_relu(x)
    for resolution in sorted(widths, reverse=True)[:-1]:
      x = block(
        widths[resolution // 2],
        self.architecture == "resnet",
        name=f"block{resolution}",
        **common,
      )(x)
    x = minibatch_deviation(x, self.group_size)
    x = leaky_relu(Conv(widths[4], name="conv", **common)(x))
    x = x.reshape(len(x), -1)
    x = leaky_relu(Dense(widths[4], name="head_in", **common)(x))
    # The last layer is float32: a bfloat16 logit has three digits.
    x = x.astype(jnp.float32)
    if not self.num_classes:
      return Dense(1, name="head_out")(x)[:, 0]
    x = Dense(widths[4], name="head_out")(x)
    classes = MappingNetwork(
      widths[4],
      self.mapping_depth,
      self.mapping_lr_multiplier,
      self.num_classes,
      name="mapping",
    )(None, labels)
    return jnp.sum(x * classes, axis=-1) / widths[4] ** 0.5
