"""BigGAN: residual convolutions, class-conditional batch statistics, hinge.

Brock et al. 2019, in the form of the authors' PyTorch code for CIFAR-10 and
64 x 64; self-attention is Zhang et al. 2019's, projection Miyato and Koyama
2018's. All kernels of both networks are spectrally normalised.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from vitgan_jax.errors import ConfigError, check_fields
from vitgan_jax.models.layers import conv3x3
from vitgan_jax.models.mapping import LatentGenerator
from vitgan_jax.models.spectral_norm import SpectralNorm
from vitgan_jax.partitioning import BATCH_AXES

_INITS = {
  "orthogonal": nn.initializers.orthogonal(),
  "normal": nn.initializers.normal(0.02),
}


def check_biggan(fields, where, channels_at):
  """Checks what both networks' parts of a config have in common.

  Args:
    fields: of the network.
    where: see `check_fields`.
    channels_at: of each resolution that self-attention may have, pixels along
      a side.

  Raises:
    ConfigError: says which field is wrong, and what is allowed.
  """
  check_fields(fields, where, choices={"kernel_init": tuple(_INITS)})
  if fields.attention_resolution not in (0, *channels_at):
    raise ConfigError(
      f"{where}attention_resolution={fields.attention_resolution} must be one "
      f"of {', '.join(map(str, (0, *channels_at)))}"
    )
  if not all(isinstance(c, int) and c > 0 for c in fields.channels):
    raise ConfigError(
      f"{where}channels={tuple(fields.channels)} must be positive numbers"
    )
  if channels_at.get(fields.attention_resolution, 8) < 8:
    raise ConfigError(
      f"{where}channels={tuple(fields.channels)} must have at least 8 at "
      f"{where}attention_resolution={fields.attention_resolution}, whose "
      "queries are an eighth of them; 0 is without attention"
    )


class Conv(nn.Module):
  """A convolution, or with a `size` of 0 a dense layer, of sigma 1.

  Attributes:
    features: output channels.
    size: pixels along a side of the kernel, 1 or 3, or 0.
    kernel_init: "orthogonal" or "normal", of standard deviation 0.02.
    use_bias: whether there is a bias, 0 at init.
    dtype: of the computation.
  """

  features: int
  size: int
  kernel_init: str
  use_bias: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Maps [B, H, W, in], or rows [B, in], to `features` channels."""
    shape = (*(self.size,) * 2 * bool(self.size), x.shape[-1], self.features)
    kernel = self.param("kernel", _INITS[self.kernel_init], shape)
    kernel = SpectralNorm("sn", name="norm")(kernel).astype(self.dtype)
    x = x.astype(self.dtype)
    if self.size == 3:
      x = conv3x3(x, kernel)
    else:
      x = x @ kernel.reshape(-1, self.features)
    if not self.use_bias:
      return x
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    return x + bias.astype(x.dtype)


class BatchNorm(nn.Module):
  """Batch norm whose gain and bias are those of a class, if there are any.

  Statistics are those of the whole batch, or of a micro-batch, over all
  devices. The sampler takes their running means.

  Attributes:
    kernel_init: of the classes' gains, less 1, and biases.
    dtype: of the result.
  """

  kernel_init: str
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, one_hot, train):
    """Normalises [B, H, W, C]; one_hot is [B, classes], or None."""
    y = nn.BatchNorm(
      not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype=jnp.float32,
      use_scale=one_hot is None,
      use_bias=one_hot is None,
      axis_name=BATCH_AXES,
      name="norm",
    )(x)
    if one_hot is not None:
      shape = (one_hot.shape[-1], x.shape[-1])
      gain, bias = (
        one_hot @ self.param(name, _INITS[self.kernel_init], shape)
        for name in ("gain", "bias")
      )
      y = (1.0 + gain[:, None, None]) * y + bias[:, None, None]
    return y.astype(self.dtype)


class SelfAttention(nn.Module):
  """Attention of all pixels to a quarter of them (Zhang et al. 2019).

  Attributes: see `Conv`.
  """

  kernel_init: str
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Maps [B, H, W, C] to the same shape; the identity at init."""
    batch, channels = x.shape[0], x.shape[-1]

    def project(x, features, name):
      conv = Conv(features, 1, self.kernel_init, False, self.dtype, name=name)
      return conv(x)

    def pooled(features, name):
      y = nn.max_pool(project(x, features, name), (2, 2), (2, 2))
      return y.reshape(batch, -1, features)

    queries = project(x, channels // 8, "query")
    queries = queries.reshape(batch, -1, channels // 8)
    keys, values = pooled(channels // 8, "key"), pooled(channels // 2, "value")
    logits = jnp.einsum(
      "bqc,bkc->bqk", queries, keys, preferred_element_type=jnp.float32
    )
    weights = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
    y = jnp.einsum("bqk,bkc->bqc", weights, values)
    y = project(y.reshape(*x.shape[:3], -1), channels, "out")
    strength = self.param("strength", nn.initializers.zeros, ())
    return x + strength.astype(x.dtype) * y


def upsample(x):
  """Doubles images [B, H, W, C] by repeating pixels."""
  return x.repeat(2, axis=1).repeat(2, axis=2)


def downsample(x):
  """Halves images [B, H, W, C] by the mean of 2 x 2 pixels."""
  return nn.avg_pool(x, (2, 2), (2, 2))


class GeneratorBlock(nn.Module):
  """Two convolutions at twice the resolution, beside a linear branch.

  Attributes: see `Conv`.
  """

  features: int
  kernel_init: str
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, one_hot, train):
    """Maps [B, H, W, in] to [B, 2 H, 2 W, features]."""
    common = dict(kernel_init=self.kernel_init, dtype=self.dtype)
    y = nn.relu(BatchNorm(name="norm0", **common)(x, one_hot, train))
    y = Conv(self.features, 3, name="conv0", **common)(upsample(y))
    y = nn.relu(BatchNorm(name="norm1", **common)(y, one_hot, train))
    y = Conv(self.features, 3, name="conv1", **common)(y)
    # A 1 x 1 convolution and the doubling can change places.
    return y + upsample(Conv(self.features, 1, name="branch", **common)(x))


class Generator(LatentGenerator):
  """BigGAN's generator, latents to images.

  Neither the embedding that all layers share nor the latent's parts for each
  layer, of the model for ImageNet, are here. There is no mapping network: the
  latent itself, beside the class, is what truncation draws to its mean.

  Attributes, beside those of all networks (see `networks`):
    image_size: S = 4 * 2**(len(channels) - 1).
    latent_dim: of z.
    channels: at 4 x 4 pixels, and of each doubling.
    attention_resolution: pixels along a side where self-attention comes in; 0
      is nowhere.
    kernel_init: "orthogonal" or "normal", of standard deviation 0.02.
  """

  image_size: int
  num_classes: int
  latent_dim: int
  channels: tuple
  attention_resolution: int
  kernel_init: str
  remat: bool = False
  dtype: Any = jnp.float32

  @staticmethod
  def check(fields, image_size, where):
    """Raises a ConfigError if these fields make no generator."""
    doubled = enumerate(fields.channels[1:], start=1)
    check_biggan(fields, where, {4 * 2**i: c for i, c in doubled})
    check_fields(fields, where, positive=("latent_dim",))
    size = 2 ** (len(fields.channels) + 1)
    if size != image_size:
      raise ConfigError(
        f"{where}channels={tuple(fields.channels)} doubles 4 x 4 to {size} px, "
        f"not config.data.image_size={image_size}: give one number more than "
        "doublings"
      )

  @nn.nowrap
  def mapping(self, latents, labels=None):
    """Returns the latents, and beside them the classes as one-hot vectors."""
    if not self.num_classes:
      return latents
    one_hot = jax.nn.one_hot(labels, self.num_classes)
    return jnp.concatenate([latents, one_hot], axis=-1)

  @nn.compact
  def synthesize(self, w, keys=None, train=False):
    """Maps what `mapping` returns to images [B, S, S, 3] in [-1, 1]."""
    common = dict(kernel_init=self.kernel_init, dtype=self.dtype)
    latents, one_hot = jnp.split(w, [self.latent_dim], axis=-1)
    if not self.num_classes:
      one_hot = None
    x = Conv(16 * self.channels[0], 0, name="stem", **common)(latents)
    x = x.reshape(-1, 4, 4, self.channels[0])
    block = GeneratorBlock
    if self.remat:
      block = nn.remat(GeneratorBlock, static_argnums=(3,))
    for i, features in enumerate(self.channels[1:]):
      x = block(features, name=f"block{i}", **common)(x, one_hot, train)
      if x.shape[1] == self.attention_resolution:
        x = SelfAttention(name="attention", **common)(x)
    x = nn.relu(BatchNorm(name="norm_out", **common)(x, None, train))
    x = Conv(3, 3, name="rgb", **common)(x)
    return jnp.tanh(x.astype(jnp.float32))


class DiscriminatorBlock(nn.Module):
  """Two convolutions, and maybe a halving, beside a linear branch.

  Attributes:
    features: output channels.
    is_first: of images, which no activation comes before.
    halves: whether the resolution is halved.
    kernel_init: see `Conv`.
    dtype: of the computation.
  """

  features: int
  is_first: bool
  halves: bool
  kernel_init: str
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Maps [B, H, W, in] to [B, H, W, features], or half of H and W."""
    common = dict(kernel_init=self.kernel_init, dtype=self.dtype)
    y = x if self.is_first else nn.relu(x)
    y = nn.relu(Conv(self.features, 3, name="conv0", **common)(y))
    y = Conv(self.features, 3, name="conv1", **common)(y)
    if self.halves:
      x, y = downsample(x), downsample(y)
    if self.halves or x.shape[-1] != self.features:
      x = Conv(self.features, 1, name="branch", **common)(x)
    return x + y


class Discriminator(nn.Module):
  """BigGAN's discriminator, images to logits.

  Attributes, beside those of all networks (see `networks`):
    image_size: S, a multiple of 2**num_halvings.
    channels: of each block.
    num_halvings: so many blocks, the first ones, halve the resolution.
    attention_resolution: pixels along a side to which self-attention follows
      the halving; 0 is nowhere.
    kernel_init: "orthogonal" or "normal", of standard deviation 0.02.
  """

  image_size: int
  num_classes: int
  channels: tuple
  num_halvings: int
  attention_resolution: int
  kernel_init: str
  remat: bool = False
  dtype: Any = jnp.float32

  @staticmethod
  def check(fields, image_size, where):
    """Raises a ConfigError if these fields make no discriminator."""
    if fields.num_halvings not in range(len(fields.channels) + 1):
      raise ConfigError(
        f"{where}num_halvings={fields.num_halvings} must be from 0 to "
        f"{len(fields.channels)}, the number of {where}channels"
      )
    halved = enumerate(fields.channels[: fields.num_halvings], start=1)
    check_biggan(fields, where, {image_size // 2**i: c for i, c in halved})
    if image_size % 2**fields.num_halvings:
      raise ConfigError(
        f"config.data.image_size={image_size} must be a multiple of "
        f"{2**fields.num_halvings}, for {where}num_halvings="
        f"{fields.num_halvings}"
      )

  @nn.compact
  def __call__(self, images, labels=None, keys=None, train=False):
    """Maps images [B, S, S, 3] to logits [B]."""
    common = dict(kernel_init=self.kernel_init, dtype=self.dtype)
    block = nn.remat(DiscriminatorBlock) if self.remat else DiscriminatorBlock
    x = images.astype(self.dtype)
    for i, features in enumerate(self.channels):
      halves = i < self.num_halvings
      x = block(features, i == 0, halves, name=f"block{i}", **common)(x)
      if halves and x.shape[1] == self.attention_resolution:
        x = SelfAttention(name="attention", **common)(x)
    # A bfloat16 logit has three digits.
    x = jnp.sum(nn.relu(x).astype(jnp.float32), axis=(1, 2))
    logits = Conv(1, 0, self.kernel_init, name="logit")(x)[:, 0]
    if self.num_classes:
      embed = Conv(
        x.shape[-1], 0, self.kernel_init, False, name="class_embedding"
      )
      one_hot = jax.nn.one_hot(labels, self.num_classes)
      logits += jnp.sum(embed(one_hot) * x, axis=-1)
    return logits
