"""Equalized layers, self-modulated LayerNorm and sine position embedding.

Parameters are stored as N(0, 1 / lr_multiplier) and scaled at run time, so
that Adam moves every layer at the same relative rate (Karras et al. 2018).
"""

from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from vitgan_jax.models import fused_rows
from vitgan_jax.models.spectral_norm import SpectralNorm

LAYER_NORM_EPSILON = 1e-6


def leaky_relu(x):
  """Leaky ReLU of slope 0.2 with the gain sqrt(2) that preserves the scale."""
  return jax.nn.leaky_relu(x, 0.2) * 2.0**0.5


class _Equalized(nn.Module):
  """What dense and convolutional layers share: kernel, bias and their scales.

  Attributes:
    features: output channels.
    use_bias: whether a bias is added.
    bias_init: a number, or a sequence of `features` numbers.
    gain: standard deviation of the output for input of unit variance.
    lr_multiplier: how much slower than the rest of the network it learns.
    spectral_norm: "isn", "sn" or "none".
    dtype: of the computation; parameters are float32.
  """

  features: int
  use_bias: bool = True
  bias_init: Any = 0.0
  gain: float = 1.0
  lr_multiplier: float = 1.0
  spectral_norm: str = "none"
  dtype: Any = jnp.float32

  @nn.compact
  def weights(self, *fan_in):
    """Returns (kernel [*fan_in, features], bias [features] or None), float32.

    As they are applied: scaled, the kernel normalised.
    """
    init = nn.initializers.normal(1.0 / self.lr_multiplier)
    shape = (*fan_in, self.features)
    kernel = self.param("kernel", init, shape, jnp.float32)
    scale = self.gain * self.lr_multiplier / np.sqrt(np.prod(fan_in))
    kernel = SpectralNorm(self.spectral_norm, name="norm")(kernel * scale)
    if not self.use_bias:
      return kernel, None

    def init_bias(unused_key, shape, dtype):
      value = jnp.asarray(self.bias_init, dtype) / self.lr_multiplier
      return jnp.broadcast_to(value, shape)

    bias = self.param("bias", init_bias, (self.features,), jnp.float32)
    return kernel, bias * self.lr_multiplier


class Dense(_Equalized):
  """A dense layer with equalized learning rate."""

  def __call__(self, x):
    """Maps [..., in] to [..., features]."""
    fan_in = x.shape[-1]
    # A matrix product with one batch dimension: the weight gradient of the
    # [B, N, D] form runs at half the speed on a CPU.
    rows = x.reshape(-1, fan_in).astype(self.dtype)
    y = fused_rows.dense(rows, *self.weights(fan_in), self.dtype, self.dtype)
    return y.reshape(*x.shape[:-1], self.features)


class TokenConv(_Equalized):
  """A 3x3 convolution over a square grid of tokens.

  A class or latent token that comes before the grid has no neighbours: the
  kernel's centre alone acts on it. The spectral norm is that of the kernel as
  a [9 * in, features] matrix.
  """

  def __call__(self, x):
    """Maps [B, N, in] to [B, N, features], or [B, 1 + N, ...] likewise."""
    batch, num_tokens, width = x.shape
    grid = int(np.sqrt(num_tokens))  # a leading token does not change the floor
    kernel, bias = self.weights(3, 3, width)
    kernel = kernel.astype(self.dtype)
    extra, patches = jnp.split(
      x.astype(self.dtype), [num_tokens - grid**2], axis=1
    )
    patches = conv3x3(patches.reshape(batch, grid, grid, width), kernel)
    patches = patches.reshape(batch, grid**2, self.features)
    y = jnp.concatenate([extra @ kernel[1, 1], patches], axis=1)
    return y if bias is None else y + bias.astype(y.dtype)


def conv3x3(x, kernel):
  """Convolves [B, H, W, in] with [3, 3, in, out], zero-padded."""
  return lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def modulated_norm(unused_layer, x, scale, shift):
  """Returns the LayerNorm of each row of x [R, D], modulated, in float32.

  Args:
    unused_layer: see `fused_rows.apply`.
    x: [R, D], the rows of k images, one image after the other.
    scale: [k, D], for the rows of each image, or [1, D], for all.
    shift: likewise.
  """
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
  y = y * lax.rsqrt(variance + LAYER_NORM_EPSILON)
  y = y.reshape(len(scale), -1, y.shape[-1])
  y = scale[:, None] * y + shift[:, None]
  return y.reshape(x.shape)


class _Norm(nn.Module):
  """What both norms share: how they are applied by themselves.

  Attributes:
    dtype: of the result.
    mesh: see `fused_rows.apply`.
  """

  dtype: Any = jnp.float32
  mesh: Any = None

  def __call__(self, x, *w):
    """Maps [..., D] to [..., D]; w as in `weights`."""
    rows, shared = self.weights(x.shape[-1], *w)
    return fused_rows.apply(
      modulated_norm, x, rows, shared, dtype=self.dtype, mesh=self.mesh
    )


class LayerNorm(_Norm):
  """LayerNorm with float32 statistics."""

  @nn.compact
  def weights(self, width):
    """Returns ({}, {"scale", "shift"}) of `modulated_norm`: for all rows."""
    scale = self.param("scale", nn.initializers.ones, (width,), jnp.float32)
    shift = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
    return {}, {"scale": scale[None], "shift": shift[None]}


class SelfModulatedLayerNorm(_Norm):
  """SLN(h, w) = gamma(w) * (h - mean) / std + beta(w) (ViTGAN, equation 17).

  gamma and beta are affine maps of w; their biases start at 1 and 0.
  """

  @nn.compact
  def weights(self, width, w):
    """Returns ({"scale", "shift"}, {}) of `modulated_norm`, for w [B, W]."""
    modulation = Dense(
      2 * width,
      bias_init=np.repeat([1.0, 0.0], width),
      dtype=self.dtype,
      name="modulation",
    )(w)
    scale, shift = jnp.split(modulation, 2, axis=-1)
    return {"scale": scale, "shift": shift}, {}


class SineEmbedding(nn.Module):
  """sin(M c) of the cell centres c of a square grid over [-1, 1]^2, M learned.

  Serves as the position embedding of the tokens and as the Fourier features
  of the pixels in a patch (ViTGAN, section 3.3).

  Attributes:
    grid_size: cells along one side.
    features: length of each embedding.
    scale: standard deviation of the frequencies in M at init, radians per
      unit; half the grid is one unit.
  """

  grid_size: int
  features: int
  scale: float

  @nn.compact
  def __call__(self):
    """Returns [grid_size**2, features] in row-major order, float32."""
    frequencies = self.param(
      "frequencies", nn.initializers.normal(1.0), (2, self.features)
    )
    return jnp.sin(cell_centres(self.grid_size) @ (self.scale * frequencies))


def cell_centres(grid_size):
  """Returns the (y, x) centres [grid_size**2, 2] of a grid over [-1, 1]^2."""
  axis = (2.0 * np.arange(grid_size) + 1.0) / grid_size - 1.0
  grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
  return grid.reshape(-1, 2).astype(np.float32)
