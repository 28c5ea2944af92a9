"""TransGAN: a generator and a discriminator of transformers without tricks.

Jiang et al. 2021, as the authors released it for CIFAR-10: the generator
doubles its grid by pixel shuffle from stage to stage, the discriminator sees
patches of two sizes, and both have relative position biases. Neither takes
classes.
"""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitgan_jax.errors import ConfigError, check_fields
from vitgan_jax.models.layers import uniform
from vitgan_jax.models.mapping import LatentGenerator
from vitgan_jax.models.patches import overlapping_patches
from vitgan_jax.models.transformer import relative_entropy

EPSILON = 1e-5  # of LayerNorm
MIN_GRID = 8  # of the generator's first stage
MAX_GRID = 32  # of global attention; larger grids are cut into windows
WINDOW = 16  # their side

_small = nn.initializers.truncated_normal(0.02)
# PyTorch's defaults of a dense layer: both uniform, within 1 / sqrt(fan_in).
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _dense(features, like_torch, dtype, name, fan_in=None, use_bias=True):
  """Returns a dense layer as the authors initialise it.

  Args:
    features: output channels.
    like_torch: whether by PyTorch's defaults, as in their generator; in their
      discriminator kernels are small and biases 0.
    dtype: of the computation.
    name: of the layer.
    fan_in: input channels, for PyTorch's bias.
    use_bias: whether there is one.
  """
  bias_init = nn.initializers.zeros
  if like_torch and use_bias:
    bias_init = uniform(fan_in**-0.5)
  return nn.Dense(
    features,
    use_bias=use_bias,
    kernel_init=_uniform if like_torch else _small,
    bias_init=bias_init,
    dtype=dtype,
    name=name,
  )


def relative_positions(grid):
  """Returns the indices [N, N] of the offsets between the cells of a grid.

  N = grid**2, row-major; the offset of rows counts 2 * grid - 1 times as much
  as that of columns.
  """
  cells = np.indices((grid, grid)).reshape(2, -1)
  rows, columns = cells[:, :, None] - cells[:, None, :] + grid - 1
  return rows * (2 * grid - 1) + columns


def to_windows(x, side):
  """Cuts tokens [B, N, C] of a grid into windows [B * k, side**2, C]."""
  grid = round(x.shape[1] ** 0.5)
  count = grid // side
  x = x.reshape(-1, count, side, count, side, x.shape[-1])
  return x.swapaxes(2, 3).reshape(-1, side**2, x.shape[-1])


def from_windows(x, grid):
  """Inverse of `to_windows`: tokens [B, grid**2, C]."""
  side = round(x.shape[1] ** 0.5)
  count = grid // side
  x = x.reshape(-1, count, count, side, side, x.shape[-1])
  return x.swapaxes(2, 3).reshape(-1, grid**2, x.shape[-1])


def pixel_shuffle(x):
  """Doubles the grid of tokens [B, N, C] to [B, 4 N, C / 4].

  Channel 4 c + 2 i + j is channel c of the cell (i, j) below (Shi et al. 2016).
  """
  batch, count, channels = x.shape
  grid = round(count**0.5)
  x = x.reshape(batch, grid, grid, channels // 4, 2, 2)
  return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, 4 * count, channels // 4)


class Block(nn.Module):
  """A pre-norm block with relative position bias.

  Attributes:
    num_heads: must divide C.
    grid: tokens along a side of the windows of attention, which are all tokens
      unless there are more; 0 is attention without bias.
    like_torch: see `_dense`.
    noise: whether the attention's input gets noise, of a learned strength.
    dtype: of the computation; logits and softmax are float32.
  """

  num_heads: int
  grid: int
  like_torch: bool
  noise: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, keys=None):
    """Maps tokens [B, N, C] to [B, N, C]; keys [B] are those of the noise."""
    width = x.shape[-1]
    dense = functools.partial(
      _dense, like_torch=self.like_torch, dtype=self.dtype
    )
    norm = functools.partial(nn.LayerNorm, EPSILON, dtype=self.dtype)
    y = norm(name="norm_attention")(x)
    if self.noise:
      strength = self.param("noise_strength", nn.initializers.zeros, ())
      if keys is not None:
        draw = functools.partial(jax.random.normal, shape=(x.shape[1], 1))
        y = y + strength.astype(y.dtype) * jax.vmap(draw)(keys).astype(y.dtype)
    y = self._attend(y, dense)
    x = x + dense(width, name="out", fan_in=width)(y)
    y = norm(name="norm_mlp")(x)
    y = dense(4 * width, name="mlp_in", fan_in=width)(y)
    y = nn.gelu(y, approximate=False)
    return x + dense(width, name="mlp_out", fan_in=4 * width)(y)

  def _attend(self, x, dense):
    width, num_tokens = x.shape[-1], x.shape[1]
    windowed = self.grid and self.grid**2 < num_tokens
    if windowed:
      x = to_windows(x, self.grid)
    qkv = dense(3 * width, use_bias=False, name="qkv")(x)
    queries, keys, values = (
      part.reshape(*x.shape[:2], self.num_heads, -1)
      for part in jnp.split(qkv, 3, axis=-1)
    )
    logits = (
      jnp.einsum(
        "bqhd,bkhd->bhqk", queries, keys, preferred_element_type=jnp.float32
      )
      * (width // self.num_heads) ** -0.5
    )
    if self.grid:
      count = (2 * self.grid - 1) ** 2
      table = self.param("position_bias", _small, (count, self.num_heads))
      bias = table[relative_positions(self.grid)]  # [N, N, H]
      logits = logits + bias.transpose(2, 0, 1)
    weights = jax.nn.softmax(logits, axis=-1)
    self.sow("intermediates", "attention_entropy", relative_entropy(weights))
    y = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(x.dtype), values)
    y = y.reshape(*x.shape[:2], width)
    return from_windows(y, round(num_tokens**0.5)) if windowed else y


def check_stages(fields, image_size, where, first_grid):
  """Checks the fields `width`, `num_heads` and `depths`.

  Args:
    fields: of a network.
    image_size: pixels along a side.
    where: comes before a field's name in messages.
    first_grid: tokens along a side of the generator's first stage, or None.

  Raises:
    ConfigError: says which field is wrong, and what is allowed.
  """
  check_fields(fields, where, positive=("width", "num_heads"))
  if not all(isinstance(depth, int) and depth > 0 for depth in fields.depths):
    raise ConfigError(
      f"{where}depths={tuple(fields.depths)} must be positive numbers of blocks"
    )
  if first_grid:
    stages = len(fields.depths)
    size = first_grid * 2 ** (stages - 1)
    if size != image_size:
      raise ConfigError(
        f"{where}depths={tuple(fields.depths)}, of {stages} stages from "
        f"{first_grid} x {first_grid}, makes {size} px, not "
        f"config.data.image_size={image_size}: give one depth more than "
        "doublings"
      )


class Generator(LatentGenerator):
  """TransGAN's generator, latents to images.

  It draws nothing at random.

  Attributes, beside those of all networks (see `networks`):
    image_size: S = 8 * 2**(stages - 1).
    width: of the first stage, of 8 x 8 tokens; each stage has a quarter of the
      one before.
    depths: blocks of each stage.
    num_heads: divides all widths.
    latent_dim: of z.
  """

  image_size: int
  num_classes: int
  width: int
  depths: tuple
  num_heads: int
  latent_dim: int
  remat: bool = False
  dtype: Any = jnp.float32
  takes_classes = False

  @staticmethod
  def check(fields, image_size, where):
    """Raises a ConfigError if these fields make no generator."""
    check_stages(fields, image_size, where, MIN_GRID)
    check_fields(fields, where, positive=("latent_dim",))
    last = 4 ** (len(fields.depths) - 1)
    if fields.width % (last * fields.num_heads):
      raise ConfigError(
        f"{where}width={fields.width} must be a multiple of {last} times "
        f"{where}num_heads={fields.num_heads}: each stage has a quarter of the "
        "one before"
      )

  @nn.nowrap
  def mapping(self, latents, labels=None):
    """Returns the latents: there is no mapping network."""
    return latents

  @nn.compact
  def synthesize(self, w, keys=None, train=False):
    """Maps latents [B, latent_dim] to images [B, S, S, 3], about [-1, 1]."""
    grid, width = MIN_GRID, self.width
    dense = functools.partial(_dense, like_torch=True, dtype=self.dtype)
    stem = dense(grid**2 * width, name="stem", fan_in=self.latent_dim)
    x = stem(w).reshape(-1, grid**2, width)
    block = nn.remat(Block) if self.remat else Block
    for stage, depth in enumerate(self.depths):
      if stage:
        x = pixel_shuffle(x)
        grid, width = 2 * grid, width // 4
      positions = self.param(f"positions{stage}", _small, (grid**2, width))
      x = x + positions.astype(x.dtype)
      for i in range(depth):
        x = block(
          self.num_heads,
          grid if grid <= MAX_GRID else WINDOW,
          like_torch=True,
          dtype=self.dtype,
          name=f"stage{stage}_block{i}",
        )(x)
    rgb = nn.Dense(
      3,
      kernel_init=nn.initializers.xavier_uniform(),
      dtype=self.dtype,
      name="rgb",
    )
    return rgb(x).reshape(-1, grid, grid, 3).astype(jnp.float32)


class Discriminator(nn.Module):
  """TransGAN's discriminator, images to logits.

  Three quarters of the width look at patches of 2 x 2 pixels; then the grid is
  halved, and patches of 4 x 4 fill the rest. A class token joins for the blocks
  at the end. In training each attention sees some noise.

  Attributes, beside those of all networks (see `networks`):
    image_size: S, a multiple of 4.
    width: of the second stage; a multiple of 4.
    depths: blocks of the two stages, and of the end.
    num_heads: divides the width and 3/4 of it.
  """

  image_size: int
  num_classes: int
  width: int
  depths: tuple
  num_heads: int
  remat: bool = False
  dtype: Any = jnp.float32
  takes_classes = False

  @staticmethod
  def check(fields, image_size, where):
    """Raises a ConfigError if these fields make no discriminator."""
    check_stages(fields, image_size, where, None)
    if len(fields.depths) != 3:
      raise ConfigError(
        f"{where}depths={tuple(fields.depths)} must be three: of the two "
        "stages, and of the end"
      )
    if image_size % 4 or fields.width % (4 * fields.num_heads):
      raise ConfigError(
        f"config.data.image_size={image_size} must be a multiple of 4, and "
        f"{where}width={fields.width} one of 4 times "
        f"{where}num_heads={fields.num_heads}"
      )
    for grid in (image_size // 2, image_size // 4):
      if grid > MAX_GRID and grid % WINDOW:
        raise ConfigError(
          f"config.data.image_size={image_size} gives {where[:-1]} {grid} x "
          f"{grid} tokens, which windows of {WINDOW} do not tile"
        )

  @nn.compact
  def __call__(self, images, labels=None, keys=None, train=False):
    """Maps images [B, S, S, 3] to logits [B]."""
    dense = functools.partial(_dense, like_torch=False, dtype=self.dtype)
    block = nn.remat(Block) if self.remat else Block

    def blocks(x, stage, grid):
      for i in range(self.depths[stage]):
        name = f"stage{stage}_block{i}"
        own = None
        if train and keys is not None:
          fold_in = jax.vmap(jax.random.fold_in, (0, None))
          own = fold_in(keys, 1000 * stage + i)
        x = block(
          self.num_heads,
          grid if grid <= MAX_GRID else WINDOW,
          like_torch=False,
          noise=True,
          dtype=self.dtype,
          name=name,
        )(x, own)
      return x

    def embed(stage, patch_size, width):
      patches = overlapping_patches(images.astype(self.dtype), patch_size, 0)
      return dense(width, name=f"embedding{stage}")(patches)

    def positions(stage, shape):
      return self.param(f"positions{stage}", _small, shape).astype(self.dtype)

    grid, width = self.image_size // 2, self.width * 3 // 4
    x = embed(0, 2, width) + positions(0, (grid**2, width))
    x = blocks(x, 0, grid)
    x = nn.avg_pool(x.reshape(-1, grid, grid, width), (2, 2), (2, 2))
    grid //= 2
    x = x.reshape(-1, grid**2, width)
    x = jnp.concatenate([x, embed(1, 4, self.width - width)], axis=-1)
    x = x + positions(1, (grid**2, self.width))
    x = blocks(x, 1, grid)
    class_token = self.param("class_token", _small, (1, 1, self.width))
    class_token = jnp.broadcast_to(class_token, (len(x), 1, self.width))
    x = jnp.concatenate([x, class_token.astype(x.dtype)], axis=1)
    x = blocks(x, 2, 0)
    y = nn.LayerNorm(EPSILON, dtype=self.dtype, name="norm_out")(x[:, -1])
    # A bfloat16 logit has three digits.
    logit = _dense(1, False, jnp.float32, "logit")
    return logit(y.astype(jnp.float32))[:, 0]
