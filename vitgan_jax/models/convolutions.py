"""Convolutions of StyleGAN2 (Karras et al. 2020): resampling, modulated.

Images are [B, H, H, C]. They double and halve by the filter [1, 3, 3, 1].
"""

from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from vitgan_jax.models.layers import Dense, Equalized, conv3x3, leaky_relu


def _filter(size, padding):
  """Returns the matrix that filters `size` numbers with zeros around them."""
  rows = size + 2 * padding - 3
  weights = (0.125, 0.375, 0.375, 0.125)
  return sum(
    weight * np.eye(rows, size, i - padding, dtype=np.float32)
    for i, weight in enumerate(weights)
  )


def _resample(x, matrix):
  """Applies a matrix [out, in] to columns and rows of images."""
  matrix = matrix.astype(x.dtype)
  x = jnp.einsum("ph,bhwi->bpwi", matrix, x)
  return jnp.einsum("qw,bpwi->bpqi", matrix, x)


def upsample(x):
  """Doubles images: zeros between their pixels, then the filter."""
  return _resample(x, 2.0 * _filter(2 * x.shape[1] - 1, 2)[:, ::2])


def downsample(x):
  """Halves images: the filter, then every second pixel."""
  return _resample(x, _filter(x.shape[1], 1)[::2])


def convolve(x, kernel, resample=None):
  """Convolves [B, H, H, in] with [3, 3, in, out], zero-padded, or [1, 1, ...].

  Resampling is products with matrices along the axes, for the reason given at
  `layers.conv3x3`.

  Args:
    x: images.
    kernel: of the same type.
    resample: "up" doubles the images, by a transposed convolution of stride 2
      before the filter; "down" halves them, by a strided one after it.
  """
  size = x.shape[1]
  if kernel.shape[:2] == (1, 1):
    return x @ kernel[0, 0]
  if resample == "up":
    # Pixel i gets to 2 i + 2 - a by tap a of the kernel.
    filters = 2.0 * _filter(2 * size + 1, 1)
    taps = np.stack(
      [filters[:, 2 - a : 2 * size + 1 - a : 2] for a in range(3)]
    )
    taps = taps.astype(x.dtype)
    x = jnp.einsum("bhwi,yxio->bhywxo", x, kernel)
    x = jnp.einsum("yph,bhywxo->bpwxo", taps, x)
    return jnp.einsum("xqw,bpwxo->bpqo", taps, x)
  if resample == "down":
    filters = _filter(size, 2)
    taps = np.stack([filters[a : a + size - 1 : 2] for a in range(3)])
    taps = taps.astype(x.dtype)
    x = jnp.einsum("yph,bhwi->bpwyi", taps, x)
    x = jnp.einsum("xqw,bpwyi->bpqyxi", taps, x)
    return jnp.einsum("bpqyxi,yxio->bpqo", x, kernel)
  return conv3x3(x, kernel)


class Conv(Equalized):
  """A 3x3 convolution with equalized learning rate.

  Attributes:
    resample: see `convolve`.
  """

  resample: str | None = None

  def __call__(self, x):
    """Maps [B, H, H, in] to images of `features` channels."""
    weights = self.weights(3, 3, x.shape[-1])
    kernel = weights.kernel.astype(self.dtype)
    y = convolve(x.astype(self.dtype), kernel, self.resample)
    return y if weights.bias is None else y + weights.bias.astype(y.dtype)


def modulated(x, style, weights, resample=None):
  """Convolves images whose input channels are scaled, and demodulates.

  Demodulation brings the output channels back to the variance that they have
  without scales (Karras et al. 2020, equations 1 and 3). The activations are
  scaled in place of the kernel, which is equal, and lets the whole batch share
  one convolution.

  Args:
    x: [B, H, H, in], of the computation's type.
    style: the scales [B, in].
    weights: `Linear` of a kernel [K, K, in, out]; its bias is not added.
    resample: see `convolve`.
  """
  squared = jnp.sum(jnp.square(weights.kernel), axis=(0, 1))
  demodulation = lax.rsqrt(
    jnp.square(style.astype(jnp.float32)) @ squared + 1e-8
  )
  y = convolve(
    x * style[:, None, None], weights.kernel.astype(x.dtype), resample
  )
  return y * demodulation[:, None, None].astype(x.dtype)


class StyledConv(nn.Module):
  """A convolution that w modulates; noise; a leaky ReLU.

  An affine map of w gives the scales of `modulated`.

  Attributes:
    features: output channels.
    resample: see `convolve`; of 3x3 kernels alone.
    dtype: of the computation.
    size: pixels along a side of the kernel, 3 or 1.
  """

  features: int
  resample: str | None = None
  dtype: Any = jnp.float32
  size: int = 3

  @nn.compact
  def __call__(self, x, w, noise=None):
    """Maps x [B, H, H, in] and w [B, W] to images of `features` channels.

    The noise is of `draw_noise`, for the resolution that comes out.
    """
    fan_in = x.shape[-1]
    conv = Conv(self.features, name="conv")
    weights = conv.weights(self.size, self.size, fan_in)
    style = Dense(fan_in, bias_init=1.0, dtype=self.dtype, name="style")(w)
    y = modulated(x.astype(self.dtype), style, weights, self.resample)
    noise_scale = self.param("noise_scale", nn.initializers.zeros, ())
    if noise is not None:
      y = y + (noise_scale * noise).astype(self.dtype)
    return leaky_relu(y + weights.bias.astype(self.dtype))


class ToRGB(nn.Module):
  """Maps pixels to colours; w scales the input channels, not demodulated."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, w):
    """Maps x [B, H, H, in] and w [B, W] to [B, H, H, 3]."""
    style = Dense(x.shape[-1], bias_init=1.0, dtype=self.dtype, name="style")(w)
    return Dense(3, dtype=self.dtype, name="rgb")(x * style[:, None, None])


def draw_noise(keys, resolutions):
  """Draws noise for `StyledConv` at some resolutions.

  Args:
    keys: [B]; with None there is none.
    resolutions: pixels along a side, R, of each layer.

  Returns:
    [B, R, R, 1] for each, or None.
  """
  if keys is None:
    return [None] * len(resolutions)
  sizes = np.square(resolutions)
  # All in one call: on a TPU a call takes longer than its numbers.
  noise = jax.vmap(lambda key: jax.random.normal(key, (sum(sizes),)))(keys)
  parts = jnp.split(noise, np.cumsum(sizes)[:-1], axis=1)
  return [x.reshape(-1, r, r, 1) for x, r in zip(parts, resolutions)]
