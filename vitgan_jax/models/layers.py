"""Equalized layers, self-modulated LayerNorm and sine position embedding.

Parameters are stored as N(0, 1 / lr_multiplier) and scaled at run time, so
that Adam moves every layer at the same relative rate (Karras et al. 2018).

A module keeps the parameters; `weights` returns them as they are applied: a
`Linear` or a `Norm`, which is a pytree and a function of rows at once. So a
transformer block is plain functions of rows (`kernels.rows`).
"""

import functools
from typing import Any

import flax
from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from vitgan_jax.models.spectral_norm import SpectralNorm

LAYER_NORM_EPSILON = 1e-6


def leaky_relu(x):
  """Leaky ReLU of slope 0.2 with the gain sqrt(2) that preserves the scale."""
  return jax.nn.leaky_relu(x, 0.2) * 2.0**0.5


@flax.struct.dataclass
class Linear:
  """`x @ kernel + bias`, of rows x [R, in].

  The factors of the product have `dtype`; the result has the type of x.

  Attributes:
    kernel: [in, out], float32.
    bias: [out] or [1, out], float32, or None.
    dtype: of the factors.
  """

  kernel: Any
  bias: Any
  dtype: Any = flax.struct.field(pytree_node=False, default=jnp.float32)

  def __call__(self, x):
    """Maps [R, in] to [R, out]."""
    return dense(x, self.kernel, self.bias, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dense(x, kernel, bias, dtype):
  """Returns `x @ kernel + bias`; see `Linear`.

  Gradients of kernel and bias are float32 whatever the types: they are sums
  over all rows, and then over all devices.
  """
  y = _dot(x, kernel, 1, 0, dtype, x.dtype)
  return y if bias is None else y + bias.astype(y.dtype)


def _dense_forward(x, kernel, bias, dtype):
  return dense(x, kernel, bias, dtype), (x, kernel, bias)


def _dense_backward(dtype, inputs, dy):
  x, kernel, bias = inputs
  dx = _dot(dy, kernel, 1, 1, dtype, x.dtype)
  d_kernel = _dot(x, dy, 0, 0, dtype, jnp.float32)
  if bias is None:
    return dx, d_kernel, None
  d_bias = jnp.sum(dy.astype(jnp.float32), axis=0)
  return dx, d_kernel, d_bias.reshape(bias.shape)


dense.defvjp(_dense_forward, _dense_backward)


def _dot(a, b, a_axis, b_axis, dtype, result_dtype):
  dimensions = (((a_axis,), (b_axis,)), ((), ()))
  return lax.dot_general(
    a.astype(dtype),
    b.astype(dtype),
    dimensions,
    preferred_element_type=result_dtype,
  )


class Equalized(nn.Module):
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
    """Returns the `Linear` of a kernel [*fan_in, features].

    As it is applied: scaled, the kernel normalised.
    """
    init = nn.initializers.normal(1.0 / self.lr_multiplier)
    shape = (*fan_in, self.features)
    kernel = self.param("kernel", init, shape, jnp.float32)
    scale = self.gain * self.lr_multiplier / np.sqrt(np.prod(fan_in))
    kernel = SpectralNorm(self.spectral_norm, name="norm")(kernel * scale)
    if not self.use_bias:
      return Linear(kernel, None, self.dtype)

    init = nn.initializers.constant(
      np.divide(self.bias_init, self.lr_multiplier)
    )
    bias = self.param("bias", init, (self.features,), jnp.float32)
    return Linear(kernel, bias * self.lr_multiplier, self.dtype)


class Dense(Equalized):
  """A dense layer with equalized learning rate."""

  def __call__(self, x):
    """Maps [..., in] to [..., features]."""
    fan_in = x.shape[-1]
    # A matrix product with one batch dimension: the weight gradient of the
    # [B, N, D] form runs at half the speed on a CPU.
    rows = x.reshape(-1, fan_in).astype(self.dtype)
    return self.weights(fan_in)(rows).reshape(*x.shape[:-1], self.features)


class TokenConv(Equalized):
  """A 3x3 convolution over a square grid of tokens.

  A class or latent token that comes after the grid has no neighbours: the
  kernel's centre alone acts on it. The spectral norm is that of the kernel as
  a [9 * in, features] matrix.
  """

  def __call__(self, x):
    """Maps [B, N, in] to [B, N, features], or [B, N + 1, ...] likewise."""
    batch, num_tokens, width = x.shape
    grid = int(np.sqrt(num_tokens))  # one token more does not change the floor
    weights = self.weights(3, 3, width)
    kernel = weights.kernel.astype(self.dtype)
    patches, extra = jnp.split(x.astype(self.dtype), [grid**2], axis=1)
    patches = conv3x3(patches.reshape(batch, grid, grid, width), kernel)
    patches = patches.reshape(batch, grid**2, self.features)
    y = jnp.concatenate([patches, extra @ kernel[1, 1]], axis=1)
    return y if weights.bias is None else y + weights.bias.astype(y.dtype)


def conv3x3(x, kernel):
  """Convolves [B, H, W, in] with [3, 3, in, out], zero-padded."""
  # In loops, as that of the training steps, XLA's gradients of a convolution
  # take a CPU dozens of times as long as these products.
  return lax.platform_dependent(
    x, kernel, cpu=nine_products, default=convolution
  )


def convolution(x, kernel):
  """`conv3x3` as XLA has it."""
  return lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def nine_products(x, kernel):
  """`conv3x3` as a product with each of the kernel's nine matrices."""
  _, height, width, fan_in = x.shape
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  # As rows: see `Dense`.
  y = sum(
    padded[:, i : i + height, j : j + width].reshape(-1, fan_in) @ kernel[i, j]
    for i in range(3)
    for j in range(3)
  )
  return y.reshape(*x.shape[:3], -1)


@flax.struct.dataclass
class Norm:
  """The LayerNorm of each row of x [R, D], modulated.

  Statistics are float32; the result has the type of x.

  Attributes:
    scale: [k, D], for the rows of each of k images, one image after the other;
      k = 1 is one scale for all.
    shift: likewise.
  """

  scale: Any
  shift: Any

  def __call__(self, x):
    """Maps [R, D] to [R, D]."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
    y = y * lax.rsqrt(variance + LAYER_NORM_EPSILON)
    y = y.reshape(self.scale.shape[0], -1, y.shape[-1])
    y = self.scale[:, None] * y + self.shift[:, None]
    return y.reshape(x.shape).astype(x.dtype)


def normalise(x, norm):
  """Returns `norm(x)`, a function of rows for `apply_rows`."""
  return norm(x)


class LayerNorm(nn.Module):
  """LayerNorm with float32 statistics."""

  @nn.compact
  def weights(self, width):
    """Returns a `Norm` for all rows."""
    scale = self.param("scale", nn.initializers.ones, (width,), jnp.float32)
    shift = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
    return Norm(scale[None], shift[None])


class SelfModulatedLayerNorm(nn.Module):
  """SLN(h, w) = gamma(w) * (h - mean) / std + beta(w) (ViTGAN, equation 17).

  gamma and beta are affine maps of w; their biases start at 1 and 0.

  Attributes:
    dtype: of the maps.
  """

  dtype: Any = jnp.float32

  @nn.compact
  def weights(self, width, w):
    """Returns a `Norm` for the rows of each image, for w [B, W]."""
    modulation = Dense(
      2 * width,
      bias_init=np.repeat([1.0, 0.0], width),
      dtype=self.dtype,
      name="modulation",
    )(w)
    return Norm(*jnp.split(modulation, 2, axis=-1))


class SineEmbedding(nn.Module):
  """sin(M c + b) of the cell centres c of a square grid over [-1, 1]^2.

  Serves as the position embedding of the tokens and as the Fourier features
  of the pixels in a patch (ViTGAN, section 3.3). M and the phase b are learned.
  Without b the embeddings of c and -c would be opposite, and only half of the
  cells could be told apart by a linear map.

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
    phase = self.param("phase", uniform(np.pi), (self.features,))
    angles = cell_centres(self.grid_size) @ (self.scale * frequencies)
    return jnp.sin(angles + phase)


def w_of_layer(w, i):
  """Returns w [B, W] of layer i, of one for all, or of each [B, L, W]."""
  return w if w.ndim == 2 else w[:, i]


def uniform(limit):
  """Returns an initialiser, uniform within -limit and limit."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -limit, limit)

  return init


def cell_centres(grid_size):
  """Returns the (y, x) centres [grid_size**2, 2] of a grid over [-1, 1]^2."""
  axis = (2.0 * np.arange(grid_size) + 1.0) / grid_size - 1.0
  grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
  return grid.reshape(-1, 2).astype(np.float32)
