"""From patch embeddings to pixels: implicit, linear and convolutional decoders.

Each decoder maps embeddings [B, N, D] of a square grid of patches to images
[B, S, S, 3] (ViTGAN, section 3.3 and its appendix).
"""

from typing import Any

from flax import linen as nn
from jax import lax
import jax.numpy as jnp
import numpy as np

from vitgan_jax.kernels.rows import apply_rows
from vitgan_jax.models.convolutions import StyledConv, ToRGB, draw_noise
from vitgan_jax.models.layers import Dense, Linear, SineEmbedding, leaky_relu
from vitgan_jax.models.patches import unpatchify

NUM_CHANNELS = 3


def modulated_pixels(y, features, hidden_style, hidden, rgb_style, rgb):
  """Maps patches to their pixels by two modulated dense layers.

  The first is demodulated: with style s and Fourier features e_p, pixel p gets
  `demod * (W^T (s * e_p))`, `demod = rsqrt((W * W)^T (s * s) + 1e-8)` (Karras
  et al. 2020, equations 1 and 3).

  Args:
    y: [T, D], embeddings of patches.
    features: [P * P, F], e, of the pixels of a patch.
    hidden_style: `Linear` from y to s [T, F].
    hidden: `Linear` from F to H, W and its bias.
    rgb_style: `Linear` from y to the scales of the next layer [T, H].
    rgb: `Linear` from H to colours.

  Returns:
    [T, P * P * 3].
  """
  style = hidden_style(y)
  product = hidden.replace(bias=None)
  squared = product.replace(kernel=jnp.square(hidden.kernel))
  demodulation = lax.rsqrt(squared(jnp.square(style)) + 1e-8)
  scale = rgb_style(y)
  pixels = []
  for feature in features.astype(style.dtype):
    x = product(style * feature) * demodulation
    x = leaky_relu(x + hidden.bias.astype(x.dtype))
    pixels.append(rgb(x * scale))
  return jnp.concatenate(pixels, axis=-1)


class ImplicitDecoder(nn.Module):
  """A two-layer MLP from a pixel's position to its colour, one per patch.

  The patch's embedding scales the input channels of both layers.

  Attributes:
    patch_size: pixels along the side of a patch.
    hidden_dim: width of the Fourier features and of the hidden layer.
    fourier_scale: see `layers.SineEmbedding.scale`.
    implementation: of `kernels`: "xla", "pallas" or "interpret".
    dtype: of the computation.
  """

  patch_size: int
  hidden_dim: int
  fourier_scale: float
  implementation: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, embeddings):
    """Maps embeddings [B, N, D] to images [B, S, S, 3]."""
    width = embeddings.shape[-1]
    features = SineEmbedding(
      self.patch_size, self.hidden_dim, self.fourier_scale, name="fourier"
    )()

    def linear(name, features, fan_in, **options):
      layer = Dense(features, dtype=self.dtype, name=name, **options)
      return layer.weights(fan_in)

    shape = (self.hidden_dim, self.hidden_dim)
    kernel = self.param("hidden_kernel", nn.initializers.normal(1.0), shape)
    bias = self.param("hidden_bias", nn.initializers.zeros, shape[:1])
    pixels = apply_rows(
      modulated_pixels,
      embeddings,
      features=features,
      hidden_style=linear(
        "hidden_style", self.hidden_dim, width, bias_init=1.0
      ),
      hidden=Linear(kernel / np.sqrt(self.hidden_dim), bias, self.dtype),
      rgb_style=linear("rgb_style", self.hidden_dim, width, bias_init=1.0),
      rgb=linear("rgb", NUM_CHANNELS, self.hidden_dim),
      implementation=self.implementation,
      # A kernel of all pixels of a patch would take minutes to compile.
      split=("features", 16),
      max_rows=128,
    )
    return unpatchify(pixels, self.patch_size)


class ConcatDecoder(nn.Module):
  """ImplicitDecoder's variant that concatenates embedding and features.

  Attributes: see there.
  """

  patch_size: int
  hidden_dim: int
  fourier_scale: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, embeddings):
    """Maps embeddings [B, N, D] to images [B, S, S, 3]."""
    features = SineEmbedding(
      self.patch_size, self.hidden_dim, self.fourier_scale, name="fourier"
    )()
    # A dense layer on a concatenation is the sum of one on each part; the
    # part of the pixels is then computed once for all patches.
    common = dict(gain=np.sqrt(0.5), dtype=self.dtype)
    part = Dense(self.hidden_dim, name="hidden_y", **common)(embeddings)
    pixel_part = Dense(
      self.hidden_dim, use_bias=False, name="hidden_e", **common
    )(features)
    hidden = leaky_relu(part[:, :, None, :] + pixel_part)
    pixels = Dense(NUM_CHANNELS, dtype=self.dtype, name="rgb")(hidden)
    pixels = pixels.reshape(*embeddings.shape[:2], -1)
    return unpatchify(pixels, self.patch_size)


class LinearDecoder(nn.Module):
  """One dense layer from an embedding to its P * P * 3 values."""

  patch_size: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, embeddings):
    """Maps embeddings [B, N, D] to images [B, S, S, 3]."""
    features = self.patch_size**2 * NUM_CHANNELS
    pixels = Dense(features, dtype=self.dtype, name="rgb")(embeddings)
    return unpatchify(pixels, self.patch_size)


class ConvDecoder(nn.Module):
  """Two modulated 3x3 convolutions per octave, up to the image's resolution.

  The variant that the authors' code offers for faster convergence, of the
  layers of StyleGAN2. Each octave doubles the resolution, and above 64 pixels
  halves the channels.

  Attributes:
    patch_size: a power of two: log2 of it is the number of octaves.
    hidden_dim: channels.
    dtype: of the computation.
  """

  patch_size: int
  hidden_dim: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, embeddings, w, keys=None):
    """Maps embeddings [B, N, D] and w [B, W] to images [B, S, S, 3].

    The keys [B] are those of the noise; None adds none.
    """
    batch, num_tokens, width = embeddings.shape
    grid = int(np.sqrt(num_tokens))
    x = embeddings.reshape(batch, grid, grid, width)
    octaves = range(1, self.patch_size.bit_length())
    layers = [grid << octave for octave in octaves for _ in range(2)]
    for i, noise in enumerate(draw_noise(keys, layers)):
      x = StyledConv(
        self.hidden_dim // max(1, layers[i] // 64),
        None if i % 2 else "up",
        self.dtype,
        name=f"conv{i}",
      )(x, w, noise)
    return ToRGB(self.dtype, name="rgb")(x, w)
