"""CIPS, a generator whose pixels do not see one another.

Anokhin et al. 2021, the form with a skip to the colours. Reduced to a patch and
two layers it is ViTGAN's implicit decoder.
"""

from typing import Any

from flax import linen as nn
import jax.numpy as jnp
import numpy as np

from vitgan_jax.models.convolutions import StyledConv, ToRGB, draw_noise
from vitgan_jax.models.layers import uniform, w_of_layer
from vitgan_jax.models.mapping import MappedGenerator
from vitgan_jax.models.stylegan2 import channels, check_resolutions


class Generator(MappedGenerator):
  """Fourier features and an embedding of each pixel, through modulated layers.

  Layers are 1x1 convolutions with noise; colours are the sum of those after
  every second layer.

  Attributes, beside those of all networks (see `networks`):
    image_size: S, pixels along a side; a power of two.
    latent_dim: of z and w.
    mapping_depth: layers of the mapping network.
    mapping_lr_multiplier: its relative learning rate.
    base_channels: divided by 4, 8, ... S, the channels of two layers each ...
    max_channels: ... but for these at most; also the number of the Fourier
      features, and of the embedding's.
  """

  image_size: int
  num_classes: int
  latent_dim: int
  mapping_depth: int
  mapping_lr_multiplier: float
  base_channels: int
  max_channels: int
  remat: bool = False
  dtype: Any = jnp.float32

  @staticmethod
  def check(fields, image_size, where):
    """Raises a ConfigError if these fields make no generator."""
    check_resolutions(fields, image_size, where, positive=("latent_dim",))

  @property
  def num_styles(self):
    """L: one for each layer."""
    return 2 * self.image_size.bit_length() - 3

  @nn.compact
  def synthesize(self, w, keys=None, train=False):
    """Maps w [B, latent_dim] to images [B, S, S, 3], about [-1, 1].

    Args:
      w: [B, latent_dim], or [B, L, latent_dim], of each layer.
      keys: [B], of the noise; None adds none.
      train: is not used.
    """
    size, features = self.image_size, self.max_channels
    axis = np.linspace(-1.0, 1.0, size, dtype=np.float32)
    coordinates = np.stack(np.meshgrid(axis, axis), axis=-1)  # x, then y
    shape = (2, features)
    frequencies = self.param("frequencies", uniform(4.5**0.5), shape)
    phase = self.param("phase", uniform(0.5**0.5), (features,))
    embedding = self.param(
      "embedding", nn.initializers.normal(1.0), (size, size, features)
    )
    waves = jnp.sin(coordinates @ frequencies + phase)
    x = jnp.concatenate([waves, embedding], axis=-1).astype(self.dtype)
    x = jnp.broadcast_to(x, (w.shape[0], *x.shape))
    layer = nn.remat(StyledConv) if self.remat else StyledConv
    stages = channels(size, self.base_channels, self.max_channels)
    widths = [features, *np.repeat(list(stages.values()), 2).tolist()]
    noise = draw_noise(keys, [size] * len(widths))
    images = 0.0
    for i, width in enumerate(widths):
      name = f"layer{i}"
      layer_w = w_of_layer(w, i)
      x = layer(width, dtype=self.dtype, size=1, name=name)(
        x, layer_w, noise[i]
      )
      if i and i % 2 == 0:
        rgb = ToRGB(self.dtype, name=f"rgb{i}")(x, layer_w)
        images = images + rgb.astype(jnp.float32)
    return images
