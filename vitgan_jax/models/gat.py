"""GAT: a generator and a discriminator of modern transformers, at any width.

Hyun et al. 2025, "Scalable GANs with Transformers" (arXiv 2509.24935), on
pixels in place of a VAE's latents. RMS norms, rotary positions, normalised
queries and keys and SwiGLU take the place of ViTGAN's layers, and nothing is
spectrally normalised: the relativistic loss with R1 and R2 holds the
discriminator. Where the paper leaves something open, the docstrings say what
was chosen.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitgan_jax.config import ConfigError, check_fields
from vitgan_jax.kernels import attention
from vitgan_jax.models.generator import normalise_second_moment
from vitgan_jax.models.layers import Dense, w_of_layer
from vitgan_jax.models.patches import overlapping_patches, unpatchify
from vitgan_jax.models.transformer import check_grid, sow_attention

EPSILON = 1e-6
_XAVIER = nn.initializers.xavier_uniform()


def check_gat(fields, image_size, where):
  """Checks what both networks' parts of a config have in common.

  Raises:
    ConfigError: says which field is wrong, and what is allowed.
  """
  positive = ("patch_size", "width", "depth", "num_heads", "num_levels")
  check_fields(fields, where, positive=positive)
  check_grid(fields, image_size, where)
  if fields.width // fields.num_heads % 4:
    raise ConfigError(
      f"{where}width={fields.width} must be a multiple of 4 times "
      f"{where}num_heads={fields.num_heads}, for rotary positions on two axes"
    )


def sine_cosine_positions(grid, width):
  """Returns fixed position embeddings [grid**2, width], row-major.

  A quarter of the width each: sine and cosine of the row, then of the column
  (the two-dimensional form of Vaswani et al. 2017).
  """
  frequencies = 1e4 ** (-np.arange(width // 4) / (width // 4))
  rows, columns = np.indices((grid, grid)).reshape(2, -1, 1) * frequencies
  parts = (np.sin(rows), np.cos(rows), np.sin(columns), np.cos(columns))
  return np.concatenate(parts, axis=-1).astype(np.float32)


def rotary_angles(grid, head_dim):
  """Returns the angles [grid**2, head_dim / 2] of rotary positions, row-major.

  The first half turns with the row, the second with the column (Heo et al.
  2024, axial form, whose base of 100 this takes).
  """
  frequencies = 100.0 ** (-np.arange(head_dim // 4) / (head_dim // 4))
  rows, columns = np.indices((grid, grid)).reshape(2, -1, 1) * frequencies
  return np.concatenate([rows, columns], axis=-1).astype(np.float32)


def rotate(x, angles):
  """Rotates the pairs (x_i, x_(i + d/2)) of heads x [B, N, H, d] (Su et al.).

  Args:
    x: queries or keys.
    angles: [N, d / 2]; 0 leaves a token as it is.
  """
  cosine = jnp.cos(angles)[:, None].astype(x.dtype)
  sine = jnp.sin(angles)[:, None].astype(x.dtype)
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([a * cosine - b * sine, a * sine + b * cosine], -1)


class Attention(nn.Module):
  """Dot-product attention of normalised, rotated queries and keys.

  Attributes:
    num_heads: must divide D.
    angles: [N, D / num_heads / 2], of `rotary_angles`.
    dtype: of the computation; logits and softmax are float32.
  """

  num_heads: int
  angles: Any
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Maps tokens [B, N, D] to [B, N, D]."""
    width = x.shape[-1]
    common = dict(kernel_init=_XAVIER, dtype=self.dtype)

    def heads(name):
      y = nn.Dense(width, name=name, **common)(x)
      y = y.reshape(*y.shape[:2], self.num_heads, -1)
      y = nn.RMSNorm(EPSILON, dtype=self.dtype, name=f"{name}_norm")(y)
      return rotate(y, self.angles).reshape(x.shape)

    queries, keys = heads("query"), heads("key")
    values = nn.Dense(width, name="value", **common)(x)
    sow_attention(self, queries, keys, self.num_heads, "dot")
    attended = attention.attend(
      queries,
      keys,
      values,
      num_patches=x.shape[1],
      num_heads=self.num_heads,
      kind="dot",
      implementation="xla",
    )
    return nn.Dense(width, name="out", **common)(attended)


class SwiGLU(nn.Module):
  """W_out(silu(W_gate x) * W_in x), of hidden width 8/3 D (Shazeer 2020)."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Maps tokens [B, N, D] to [B, N, D]."""
    width = x.shape[-1]
    hidden = width * 8 // 3
    common = dict(kernel_init=_XAVIER, dtype=self.dtype)
    gate = nn.silu(nn.Dense(hidden, name="gate", **common)(x))
    y = gate * nn.Dense(hidden, name="in", **common)(x)
    return nn.Dense(width, name="out", **common)(y)


class Block(nn.Module):
  """x += gate * f(norm(x) * scale), for attention, then for a SwiGLU.

  Four affine maps of w are 1 + scale and gate of either; they start small, so
  that a block starts near the identity. Without w, the norms have scales of
  their own, and the gates are LayerScale's (Touvron et al. 2021), 0.1 at init.

  Attributes: see `Attention`.
  """

  num_heads: int
  angles: Any
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, w=None):
    """Maps tokens [B, N, D] and w [B, W], or none, to [B, N, D]."""
    width = x.shape[-1]
    branches = {
      "attention": Attention(
        self.num_heads, self.angles, self.dtype, name="attention"
      ),
      "mlp": SwiGLU(self.dtype, name="mlp"),
    }
    if w is not None:
      modulation = nn.Dense(
        4 * width,
        # A tenth of Xavier's limit.
        kernel_init=nn.initializers.variance_scaling(
          0.01, "fan_avg", "uniform"
        ),
        dtype=self.dtype,
        name="modulation",
      )(w)[:, None]
      scales_and_gates = jnp.split(modulation, 4, axis=-1)
    for i, (name, branch) in enumerate(branches.items()):
      y = nn.RMSNorm(
        EPSILON, dtype=self.dtype, use_scale=w is None, name=f"{name}_rms"
      )(x)
      if w is None:
        gate = self.param(
          f"{name}_scale", nn.initializers.constant(0.1), (width,)
        ).astype(self.dtype)
      else:
        scale, gate = scales_and_gates[2 * i : 2 * i + 2]
        y = y * (1.0 + scale)
      x = x + gate * branch(y)
    return x


class ClassEmbedding(nn.Module):
  """An embedding of the classes, of second moment 1."""

  num_classes: int
  features: int

  @nn.compact
  def __call__(self, labels):
    """Maps labels [B] to [B, features]."""
    embed = nn.Embed(
      self.num_classes,
      self.features,
      embedding_init=nn.initializers.normal(0.02),
      name="embed",
    )
    return normalise_second_moment(embed(labels))


class Mapping(nn.Module):
  """Two dense layers with a SiLU between, a hundred times slower than others.

  Attributes:
    width: of both layers.
  """

  width: int

  @nn.compact
  def __call__(self, x):
    """Maps [B, F] to [B, width], float32."""
    x = Dense(self.width, lr_multiplier=0.01, name="dense0")(x)
    return Dense(self.width, lr_multiplier=0.01, name="dense1")(nn.silu(x))


class Generator(nn.Module):
  """GAT's generator, latents to images.

  A head follows each of `num_levels` equal parts of the blocks. What it gives
  is added to the image of the head before; the last image is the generator's.
  In training all of them are returned, for a discriminator that takes as many.
  It draws nothing at random.

  Attributes:
    image_size: S, pixels along a side.
    num_classes: 0 is none.
    patch_size: P; divides S. There are (S / P)**2 tokens.
    width: D, of the tokens and of w; the rate should fall with 1 / D.
    depth: number of blocks.
    num_heads: D / num_heads is a multiple of 4.
    latent_dim: of z, and of the class embedding beside it.
    num_levels: images; divides the depth.
    remat: whether the backward pass computes the blocks' insides again.
    dtype: of the computation; parameters and images are float32.
  """

  image_size: int
  num_classes: int
  patch_size: int
  width: int
  depth: int
  num_heads: int
  latent_dim: int
  num_levels: int
  remat: bool = False
  dtype: Any = jnp.float32

  @staticmethod
  def check(fields, image_size, where):
    """Raises a ConfigError if these fields make no generator."""
    check_gat(fields, image_size, where)
    check_fields(fields, where, positive=("latent_dim",))
    if fields.depth % fields.num_levels:
      raise ConfigError(
        f"{where}num_levels={fields.num_levels} must divide "
        f"{where}depth={fields.depth}"
      )

  def setup(self):
    """Makes what is used by itself; `synthesize` makes the rest."""
    self.to_w = Mapping(self.width)
    if self.num_classes:
      self.classes = ClassEmbedding(self.num_classes, self.latent_dim)

  @property
  def num_styles(self):
    """L: one for each block, whose head has the same."""
    return self.depth

  def mapping(self, latents, labels=None):
    """Maps latents [B, latent_dim] and labels [B] to w [B, D]."""
    x = normalise_second_moment(latents)
    if self.num_classes:
      x = jnp.concatenate([x, self.classes(labels)], axis=-1)
    return self.to_w(x)

  def __call__(self, latents, labels=None, keys=None, train=False):
    """Maps latents [B, latent_dim] to images; see `synthesize`."""
    return self.synthesize(self.mapping(latents, labels), keys, train)

  @nn.compact
  def synthesize(self, w, keys=None, train=False):
    """Maps w [B, D] to images [B, S, S, 3], in training [B, S, S, 3 * levels].

    The levels come one after the other, the image itself last. w may be that of
    each block, [B, L, D].
    """
    grid = self.image_size // self.patch_size
    angles = rotary_angles(grid, self.width // self.num_heads)
    positions = sine_cosine_positions(grid, self.width)
    x = jnp.broadcast_to(positions, (w.shape[0], *positions.shape))
    x, w = x.astype(self.dtype), w.astype(self.dtype)
    block = nn.remat(Block) if self.remat else Block
    image, levels = 0.0, []
    for i in range(self.depth):
      layer_w = w_of_layer(w, i)
      x = block(self.num_heads, angles, self.dtype, name=f"block{i}")(
        x, layer_w
      )
      if (i + 1) % (self.depth // self.num_levels) == 0:
        image = image + self._head(len(levels), x, layer_w, grid)
        levels.append(image)
    return jnp.concatenate(levels, axis=-1) if train else image

  def _head(self, level, x, w, grid):
    """Maps tokens [B, N, D] and w to an image [B, S, S, 3], float32."""
    common = dict(kernel_init=_XAVIER, dtype=self.dtype)
    name = f"head{level}"
    scale = nn.Dense(self.width, name=f"{name}_modulation", **common)(w)
    y = nn.RMSNorm(
      EPSILON, dtype=self.dtype, use_scale=False, name=f"{name}_rms"
    )(x)
    y = y * (1.0 + scale[:, None])
    y = nn.Dense(3 * self.patch_size**2, name=f"{name}_rgb", **common)(y)
    y = y.reshape(*y.shape[:2], self.patch_size, self.patch_size, 3)
    return unpatchify(y, grid).astype(jnp.float32)


def noise_scales(num_levels):
  """Returns t [levels]: level k is shown as `(1 - t_k) x_k + t_k noise`.

  The early ones are the noisiest; the image itself keeps a hundredth.
  """
  # From 1, of the first level, to 0; of one level the last counts.
  left = np.linspace(0.0, 1.0, num_levels)[::-1]
  return 1.0 - 0.125**left + 0.01


def add_level_noise(keys, images, num_levels):
  """Hides the levels of images behind noise, multi-level noise guidance.

  The noise of a level is that of the finer one, shrunk as the image is, and a
  fresh part, such that its variance is t_k**2: a coarse level is never clearer
  than a fine one.

  Args:
    keys: [B].
    images: [B, S, S, 3 * levels], the finest last.
    num_levels: how many.
  """
  scales = noise_scales(num_levels)
  shape = (*images.shape[1:3], 3)
  fresh = jax.vmap(lambda key: jax.random.normal(key, (num_levels, *shape)))(
    keys
  )
  noise, finer, levels = 0.0, 0.0, []
  split = jnp.split(images, num_levels, axis=-1)
  for k in reversed(range(num_levels)):
    t = scales[k]
    shrunk = (1.0 - t) / (1.0 - finer)
    added = np.sqrt(t**2 - (shrunk * finer) ** 2)
    noise = shrunk * noise + added * fresh[:, k]
    levels.append((1.0 - t) * split[k] + noise)
    finer = t
  return jnp.concatenate(levels[::-1], axis=-1)


class Discriminator(nn.Module):
  """GAT's discriminator, images of several levels to logits.

  An image of one level stands for all of them. In training the levels are
  behind noise, see `add_level_noise`. A class enters by the product of the
  mapped embedding with the last features, over the root of their number (ours).

  Attributes:
    image_size: S, pixels along a side.
    num_classes: 0 is none.
    patch_size: P; divides S.
    width: D, of the tokens; the rate should fall with 1 / D.
    depth: number of blocks.
    num_heads: D / num_heads is a multiple of 4.
    num_levels: of the images.
    head_dim: features before the class comes in.
    remat: whether the backward pass computes the blocks' insides again.
    dtype: of the computation; parameters and logits are float32.
  """

  image_size: int
  num_classes: int
  patch_size: int
  width: int
  depth: int
  num_heads: int
  num_levels: int
  head_dim: int
  remat: bool = False
  dtype: Any = jnp.float32

  @staticmethod
  def check(fields, image_size, where):
    """Raises a ConfigError if these fields make no discriminator."""
    check_gat(fields, image_size, where)
    check_fields(fields, where, positive=("head_dim",))

  @nn.compact
  def __call__(self, images, labels=None, keys=None, train=False):
    """Maps images [B, S, S, 3 or 3 * levels] to logits [B]."""
    images = jnp.tile(images, 3 * self.num_levels // images.shape[-1])
    if train and keys is not None and self.num_levels > 1:
      images = add_level_noise(keys, images, self.num_levels)
    grid = self.image_size // self.patch_size
    common = dict(kernel_init=_XAVIER, dtype=self.dtype)
    patches = overlapping_patches(images, self.patch_size, 0)
    x = nn.Dense(self.width, name="embedding", **common)(patches)
    x = x + sine_cosine_positions(grid, self.width).astype(self.dtype)
    class_token = self.param(
      "class_token", nn.initializers.normal(0.02), (1, 1, self.width)
    )
    class_token = jnp.broadcast_to(class_token, (len(x), 1, self.width))
    # Last, and turned by nothing: it has no position.
    x = jnp.concatenate([x, class_token.astype(self.dtype)], axis=1)
    angles = rotary_angles(grid, self.width // self.num_heads)
    angles = np.pad(angles, ((0, 1), (0, 0)))
    block = nn.remat(Block) if self.remat else Block
    for i in range(self.depth):
      x = block(self.num_heads, angles, self.dtype, name=f"block{i}")(x)
    y = nn.RMSNorm(EPSILON, dtype=self.dtype, name="rms_out")(x[:, -1])
    # A bfloat16 logit has three digits.
    y, common["dtype"] = y.astype(jnp.float32), jnp.float32
    if not self.num_classes:
      return nn.Dense(1, name="logit", **common)(y)[:, 0]
    y = nn.Dense(self.head_dim, name="features", **common)(y)
    embedding = ClassEmbedding(self.num_classes, self.width, name="classes")(
      labels
    )
    embedding = Mapping(self.head_dim, name="class_mapping")(embedding)
    return jnp.sum(y * embedding, axis=-1) / np.sqrt(self.head_dim)
