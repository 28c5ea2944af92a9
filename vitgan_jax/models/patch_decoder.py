"""From patch embeddings to pixels: implicit, linear and convolutional decoders.

Each decoder maps embeddings [B, N, D] of a square grid of patches to images
[B, S, S, 3] (ViTGAN, section 3.3 and its appendix).
"""

from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from vitgan_jax.models.layers import (
  Dense,
  SineEmbedding,
  conv3x3,
  leaky_relu,
)
from vitgan_jax.models.patches import unpatchify

NUM_CHANNELS = 3


def modulated_hidden(features, styles, kernel):
  """Applies a modulated, demodulated dense layer to every pixel of a patch.

  With style s and Fourier features e_p, pixel p gets `demod * (W^T (s * e_p))`,
  `demod = rsqrt((W * W)^T (s * s) + 1e-8)` (Karras et al. 2020, equations 1 and
  3). As the e_p are the same for all patches, `(W * e_p)^T s` is one matrix
  product for all pixels, and no weights per patch are ever built.

  Args:
    features: [P * P, F], e.
    styles: [T, F], s, a row per patch.
    kernel: [F, H], W.

  Returns:
    [T, P * P, H].
  """
  num_pixels, num_features = features.shape
  hidden_dim = kernel.shape[-1]
  weights = features.T[:, :, None] * kernel[:, None, :]
  hidden = styles @ weights.reshape(num_features, num_pixels * hidden_dim)
  hidden = hidden.reshape(-1, num_pixels, hidden_dim)
  demodulation = lax.rsqrt(
    jnp.square(styles.astype(jnp.float32))
    @ jnp.square(kernel.astype(jnp.float32))
    + 1e-8
  )
  return hidden * demodulation[:, None, :].astype(hidden.dtype)


class ImplicitDecoder(nn.Module):
  """A two-layer MLP from a pixel's position to its colour, one per patch.

  Attributes:
    patch_size: pixels along the side of a patch.
    hidden_dim: width of the Fourier features and of the hidden layer.
    fourier_scale: see `layers.SineEmbedding.scale`.
    condition: how the patch embedding enters: "modulate" (it scales the input
      channels of both layers; the hidden layer is demodulated) or "concat"
      (it is concatenated to the Fourier features).
    dtype: of the computation.
  """

  patch_size: int
  hidden_dim: int
  fourier_scale: float
  condition: str
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, embeddings):
    """Maps embeddings [B, N, D] to images [B, S, S, 3]."""
    batch, num_tokens, width = embeddings.shape
    y = embeddings.reshape(-1, width).astype(self.dtype)
    features = SineEmbedding(
      self.patch_size, self.hidden_dim, self.fourier_scale, name="fourier"
    )().astype(self.dtype)
    if self.condition == "modulate":
      style = Dense(
        self.hidden_dim, bias_init=1.0, dtype=self.dtype, name="hidden_style"
      )
      shape = (self.hidden_dim, self.hidden_dim)
      kernel = self.param("hidden_kernel", nn.initializers.normal(1.0), shape)
      kernel = (kernel / np.sqrt(self.hidden_dim)).astype(self.dtype)
      hidden = modulated_hidden(features, style(y), kernel)
      bias = self.param(
        "hidden_bias", nn.initializers.zeros, (self.hidden_dim,)
      )
      hidden = leaky_relu(hidden + bias.astype(self.dtype))
      style = Dense(
        self.hidden_dim, bias_init=1.0, dtype=self.dtype, name="rgb_style"
      )
      hidden = hidden * style(y)[:, None, :]
    else:
      # A dense layer on a concatenation is the sum of one on each part; the
      # part of the pixels is then computed once for all patches.
      part = Dense(
        self.hidden_dim, gain=np.sqrt(0.5), dtype=self.dtype, name="hidden_y"
      )(y)
      pixel_part = Dense(
        self.hidden_dim,
        gain=np.sqrt(0.5),
        use_bias=False,
        dtype=self.dtype,
        name="hidden_e",
      )(features)
      hidden = leaky_relu(part[:, None, :] + pixel_part[None])
    pixels = Dense(NUM_CHANNELS, dtype=self.dtype, name="rgb")(hidden)
    return _to_images(pixels, batch, num_tokens, self.patch_size)


class LinearDecoder(nn.Module):
  """One dense layer from an embedding to its P * P * 3 values."""

  patch_size: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, embeddings):
    """Maps embeddings [B, N, D] to images [B, S, S, 3]."""
    batch, num_tokens, _ = embeddings.shape
    features = self.patch_size**2 * NUM_CHANNELS
    pixels = Dense(features, dtype=self.dtype, name="rgb")(embeddings)
    return _to_images(pixels, batch, num_tokens, self.patch_size)


def _to_images(pixels, batch, num_tokens, patch_size):
  tiles = pixels.reshape(
    batch, num_tokens, patch_size, patch_size, NUM_CHANNELS
  )
  return unpatchify(tiles, int(np.sqrt(num_tokens)))


class ConvDecoder(nn.Module):
  """Two modulated 3x3 convolutions per octave, up to the image's resolution.

  The variant that the authors' code offers for faster convergence. Each octave
  doubles the resolution and, but for the first, halves the channels; styles are
  affine maps of w.

  Attributes:
    patch_size: a power of two: log2 of it is the number of octaves.
    hidden_dim: channels of the first octave.
    dtype: of the computation.
  """

  patch_size: int
  hidden_dim: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, embeddings, w):
    """Maps embeddings [B, N, D] and w [B, W] to images [B, S, S, 3]."""
    batch, num_tokens, width = embeddings.shape
    grid = int(np.sqrt(num_tokens))
    x = embeddings.reshape(batch, grid, grid, width)
    for octave in range(int(np.log2(self.patch_size))):
      x = jax.image.resize(
        x, (batch, 2 * x.shape[1], 2 * x.shape[2], x.shape[3]), "bilinear"
      )
      channels = max(self.hidden_dim >> octave, 8)
      for i in range(2):
        name = f"octave{octave}_conv{i}"
        x = ModulatedConv(channels, dtype=self.dtype, name=name)(x, w)
        x = leaky_relu(x)
    return Dense(NUM_CHANNELS, dtype=self.dtype, name="rgb")(x)


class ModulatedConv(nn.Module):
  """A 3x3 convolution whose input channels w scales, demodulated.

  Scales the activations in place of the weights, which is equal (Karras et al.
  2020, section 2.2) and lets the whole batch share one convolution.
  """

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, w):
    """Maps x [B, H, W, in] and w [B, W] to [B, H, W, features]."""
    fan_in = x.shape[-1]
    styles = Dense(fan_in, bias_init=1.0, dtype=self.dtype, name="style")(w)
    kernel = self.param(
      "kernel", nn.initializers.normal(1.0), (3, 3, fan_in, self.features)
    ) / np.sqrt(9 * fan_in)
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    squared = jnp.sum(jnp.square(kernel), axis=(0, 1))
    demodulation = lax.rsqrt(
      jnp.square(styles.astype(jnp.float32)) @ squared + 1e-8
    )
    x = x.astype(self.dtype) * styles[:, None, None, :]
    y = conv3x3(x, kernel.astype(self.dtype))
    y = y * demodulation[:, None, None, :].astype(self.dtype)
    return y + bias.astype(self.dtype)
