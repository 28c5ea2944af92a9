"""GANformer, a StyleGAN2 whose pixels attend to several latents.

Hudson and Zitnick 2021, with simplex attention (the latents inform the pixels,
not the other way) and multiplicative integration.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitgan_jax.errors import ConfigError
from vitgan_jax.models.convolutions import (
  Conv,
  ToRGB,
  draw_noise,
  modulated,
  upsample,
)
from vitgan_jax.models.layers import Dense, leaky_relu
from vitgan_jax.models.mapping import LatentGenerator, normalise_second_moment
from vitgan_jax.models.stylegan2 import channels, check_resolutions


def grid_positions(size, features):
  """Returns sines and cosines of the cells of a grid, [size^2, features].

  Of x, then of y, for `features` / 4 frequencies each, the coordinates from -1
  to 1 (Vaswani et al. 2017, in two dimensions).
  """
  coordinates = np.linspace(-1.0, 1.0, size)
  wavelengths = 10_000.0 ** (4.0 * np.arange(features // 4) / features)
  angles = coordinates[:, None] / wavelengths
  waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
  shape = (size, size, waves.shape[-1])
  x = np.broadcast_to(waves[None], shape)
  y = np.broadcast_to(waves[:, None], shape)
  positions = np.concatenate([x, y], axis=-1).reshape(size**2, -1)
  return positions.astype(np.float32)


class LatentAttention(nn.Module):
  """Cells attend to latents, and are scaled by what they find.

  Attributes:
    dropout: of the attention, in training: half of it for single weights, half
      for latents, of which then no cell sees anything.
    dtype: of the computation.
  """

  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, latents, x_positions, positions, keys=None):
    """Maps x [B, N, C], by latents [B, K, W], to [B, N, C].

    Args:
      x: cells, or the latents themselves.
      latents: what they attend to.
      x_positions: [N, P], of the cells.
      positions: [K, P], of the latents.
      keys: [B], of the dropout; None drops nothing.
    """
    width = x.shape[-1]

    def dense(name, inputs):
      return Dense(width, dtype=self.dtype, name=name)(inputs)

    queries = dense("query", x) + dense("query_position", x_positions)
    key = dense("key", latents) + dense("key_position", positions)
    logits = jnp.einsum("bnc,bkc->bnk", queries, key).astype(jnp.float32)
    weights = jax.nn.softmax(logits / np.sqrt(width))
    if keys is not None and self.dropout:
      weights *= jax.vmap(self._mask, (0, None))(keys, weights.shape[1:])
    values = dense("value", latents)
    found = jnp.einsum("bnk,bkc->bnc", weights.astype(self.dtype), values)
    mean_square = jnp.mean(
      jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True
    )
    x = x * jax.lax.rsqrt(mean_square + 1e-8).astype(x.dtype)
    return x * (1.0 + dense("scale", found))

  def _mask(self, key, shape):
    """Returns factors [N, K] of mean 1."""
    kept = 1.0 - self.dropout / 2
    weight_key, latent_key = jax.random.split(key)
    mask = jax.random.bernoulli(weight_key, kept, shape)
    mask &= jax.random.bernoulli(latent_key, kept, shape[1:])
    return mask / kept**2


class ResidualMLP(nn.Module):
  """The mapping network: pairs of layers around a residual, and one layer more.

  Attributes:
    depth: pairs of layers.
    lr_multiplier: their relative learning rate.
    attends: whether the latents of an image attend to one another before each
      pair.
  """

  depth: int
  lr_multiplier: float
  attends: bool

  @nn.compact
  def __call__(self, x, positions=None):
    """Maps z [B, K, W], with positions [K, W], to w of that shape."""
    dense = dict(features=x.shape[-1], lr_multiplier=self.lr_multiplier)
    for i in range(self.depth):
      y = x
      if self.attends:
        attention = LatentAttention(name=f"attention{i}")
        y = attention(x, x, positions, positions)
      y = leaky_relu(Dense(**dense, name=f"dense{i}_0")(y))
      y = Dense(**dense, name=f"dense{i}_1")(y)
      x = jax.nn.leaky_relu(x + y, 0.2)
    return leaky_relu(Dense(**dense, name="dense_out")(x))


class Layer(nn.Module):
  """A convolution that one latent modulates; attention to others; noise.

  Attributes:
    features: output channels.
    dropout: of the attention.
    resample: see `convolutions.convolve`.
    gain: of what comes out.
    dtype: of the computation.
  """

  features: int
  dropout: float
  resample: str | None = None
  gain: float = 1.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, w, positions, noise=None, keys=None):
    """Maps x [B, H, H, in] to images of `features` channels.

    Args:
      x: images.
      w: [B, K + 1, W], the last of them the one that modulates.
      positions: [K, W], of the others.
      noise: of `convolutions.draw_noise`.
      keys: see `LatentAttention`.
    """
    fan_in = x.shape[-1]
    weights = Conv(self.features, name="conv").weights(3, 3, fan_in)
    style = Dense(fan_in, bias_init=1.0, dtype=self.dtype, name="style")
    x = modulated(x.astype(self.dtype), style(w[:, -1]), weights, self.resample)
    size = x.shape[1]
    attention = LatentAttention(self.dropout, self.dtype, name="attention")
    x = attention(
      x.reshape(x.shape[0], size**2, -1),
      w[:, :-1],
      grid_positions(size, w.shape[-1]),
      positions,
      keys,
    ).reshape(x.shape)
    noise_scale = self.param("noise_scale", nn.initializers.zeros, ())
    if noise is not None:
      x = x + (noise_scale * noise).astype(self.dtype)
    return self.gain * leaky_relu(x + weights.bias.astype(self.dtype))


class Generator(LatentGenerator):
  """The generator of GANformer, with residual blocks, latents to images.

  A latent is `num_latents` parts that pixels attend to, and a global one, which
  modulates all convolutions.

  Attributes, beside those of all networks (see `networks`):
    image_size: S, pixels along a side; a power of two.
    num_latents: parts of a latent, beside the global one.
    component_dim: W, numbers in each; a multiple of 4.
    mapping_depth: pairs of layers of the two mapping networks.
    mapping_lr_multiplier: their relative learning rate.
    attention_dropout: in training.
    base_channels: divided by the resolution, the channels at it ...
    max_channels: ... but for these at most.
  """

  image_size: int
  num_classes: int
  num_latents: int
  component_dim: int
  mapping_depth: int
  mapping_lr_multiplier: float
  attention_dropout: float
  base_channels: int
  max_channels: int
  remat: bool = False
  dtype: Any = jnp.float32

  takes_classes = False

  @staticmethod
  def check(fields, image_size, where):
    """Raises a ConfigError if these fields make no generator."""
    check_resolutions(
      fields,
      image_size,
      where,
      positive=("num_latents", "component_dim"),
      shares=("attention_dropout",),
    )
    if fields.component_dim % 4:
      raise ConfigError(
        f"{where}component_dim={fields.component_dim} must be a multiple of 4: "
        "positions are sines and cosines of x and of y"
      )

  @property
  def latent_dim(self):
    """Numbers in a latent, of all its parts."""
    return (self.num_latents + 1) * self.component_dim

  def setup(self):
    """Makes what is used by itself; `synthesize` makes the rest."""
    mlp = (self.mapping_depth, self.mapping_lr_multiplier)
    self.local_mapping = ResidualMLP(*mlp, attends=True)
    self.global_mapping = ResidualMLP(*mlp, attends=False)
    # From 0 to 1, as released.
    self.positions = self.param(
      "positions",
      nn.initializers.uniform(1.0),
      (self.num_latents, self.component_dim),
    )

  def mapping(self, latents, labels=None):
    """Maps latents [B, latent_dim] to w [B, num_latents + 1, W]."""
    z = latents.reshape(latents.shape[0], -1, self.component_dim)
    z = normalise_second_moment(z)
    local = self.local_mapping(z[:, :-1], self.positions)
    return jnp.concatenate([local, self.global_mapping(z[:, -1:])], axis=1)

  @nn.compact
  def synthesize(self, w, keys=None, train=False):
    """Maps w to images [B, S, S, 3], about [-1, 1].

    Args:
      w: [B, num_latents + 1, W].
      keys: [B], of the noise, and in training of the dropout; None has neither.
      train: whether attention is dropped.
    """
    make = nn.remat(Layer) if self.remat else Layer
    widths = channels(self.image_size, self.base_channels, self.max_channels)
    layers = [4] + [r for r in widths if r > 4 for _ in range(2)]
    noise = draw_noise(keys, layers)
    is_dropping = train and keys is not None

    def layer(i, x, **options):
      drop_keys = None
      if is_dropping:
        drop_keys = jax.vmap(lambda key: jax.random.fold_in(key, i + 1))(keys)
      width = widths[layers[i]]
      module = make(
        width,
        self.attention_dropout,
        dtype=self.dtype,
        name=f"layer{i}",
        **options,
      )
      return module(x, w, self.positions, noise[i], drop_keys)

    shape = (4, 4, widths[4])
    x = self.param("constant", nn.initializers.normal(1.0), shape)
    x = jnp.broadcast_to(x.astype(self.dtype), (w.shape[0], *shape))
    x = layer(0, x)
    for i in range(1, len(layers), 2):
      resolution = layers[i]
      branch = Dense(
        widths[resolution],
        use_bias=False,
        dtype=self.dtype,
        name=f"branch{resolution}",
      )
      y = layer(i, x, resample="up")
      y = layer(i + 1, y, gain=0.5**0.5)
      x = 0.5**0.5 * upsample(branch(x)) + y
    last = w[:, -1]
    style = Dense(x.shape[-1], bias_init=1.0, dtype=self.dtype, name="style")
    conv = Conv(x.shape[-1], use_bias=False, name="conv_last")
    x = modulated(x, style(last), conv.weights(3, 3, x.shape[-1]))
    return ToRGB(self.dtype, name="rgb")(x, last).astype(jnp.float32)
