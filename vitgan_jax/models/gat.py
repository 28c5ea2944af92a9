"""GAT: a generator and a discriminator of modern transformers, at any width.

Hyun et al. 2025, "Scalable GANs with Transformers" (arXiv 2509.24935), on
pixels in place of a VAE's latents. RMS norms, rotary positions, normalised
queries and keys and SwiGLU take the place of ViTGAN's layers, and nothing is
spectrally normalised: the relativistic loss with R1 and R2 holds the
discriminator. Where the paper leaves something open, the docstrings say what
was chosen.
"""

from typing import Any

import flax
from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from vitgan_jax.errors import ConfigError, check_fields
from vitgan_jax.kernels import attention
from vitgan_jax.kernels.rows import apply_rows
from vitgan_jax.models.layers import Linear, normalise, w_of_layer
from vitgan_jax.models.mapping import LatentGenerator, normalise_second_moment
from vitgan_jax.models.patches import overlapping_patches, unpatchify
from vitgan_jax.models.transformer import attend, check_grid, project

EPSILON = 1e-6


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
  2024, axial form), with the base of 10,000 that the authors' code has.
  """
  frequencies = 1e4 ** (-np.arange(head_dim // 4) / (head_dim // 4))
  rows, columns = np.indices((grid, grid)).reshape(2, -1, 1) * frequencies
  return np.concatenate([rows, columns], axis=-1).astype(np.float32)


def rotate(x, angles, num_heads):
  """Rotates the pairs (x_i, x_(i + d/2)) of each head (Su et al. 2021).

  By cos(angle) x + sin(angle) J x, where J turns all pairs by a right angle: a
  matrix product costs a TPU less than to take heads of 64 numbers apart.

  Args:
    x: queries or keys [..., R, D].
    angles: [R, D / num_heads / 2]; 0 leaves a token as it is.
    num_heads: divides D.
  """
  half = np.eye(angles.shape[-1])
  right_angle = np.kron([[0, 1], [-1, 0]], half).astype(x.dtype)
  # Made of small parts in the program, which would hold them for each layer.
  right_angle = jnp.kron(jnp.eye(num_heads, dtype=x.dtype), right_angle)
  cosine, sine = (
    jnp.tile(f(angles).astype(x.dtype), (1, 2 * num_heads))
    for f in (np.cos, np.sin)
  )
  turned = x.reshape(-1, x.shape[-1]) @ right_angle
  return x * cosine + turned.reshape(x.shape) * sine


@flax.struct.dataclass
class Scale:
  """A product with one number for each channel.

  Attributes:
    scale: [k, D], for the rows of each of k images, one image after the other;
      k = 1 is one scale for all.
  """

  scale: Any

  def __call__(self, x):
    """Maps rows [R, D] to [R, D]."""
    y = x.reshape(self.scale.shape[0], -1, x.shape[-1])
    return (y * self.scale[:, None].astype(x.dtype)).reshape(x.shape)


@flax.struct.dataclass
class RMSNorm(Scale):
  """x / sqrt(mean(x^2)) of each row, scaled (Zhang and Sennrich 2019).

  Statistics are float32; the result has the type of x.
  """

  def __call__(self, x):
    """Maps rows [R, D] to [R, D]."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + EPSILON)
    return super().__call__(y).astype(x.dtype)


@flax.struct.dataclass
class NormalisedHeads:
  """A dense layer, and the RMS norm of each head of what it gives.

  Attributes:
    linear: `Linear`.
    scale: [1, D], of the norms.
    num_heads: divides D.
  """

  linear: Any
  scale: Any
  num_heads: int = flax.struct.field(pytree_node=False)

  def __call__(self, x):
    """Maps rows [R, in] to [R, D]."""
    y = self.linear(x)
    width = y.shape[-1]
    head_dim = width // self.num_heads
    head, other = (
      lax.broadcasted_iota(jnp.int32, (width, width), i) // head_dim
      for i in (0, 1)
    )
    # The mean over each head, as a product: see `rotate`.
    mean = jnp.where(head == other, 1.0 / head_dim, 0.0)
    dtype = self.linear.dtype
    mean_square = jnp.dot(
      jnp.square(y.astype(jnp.float32)).astype(dtype),
      mean.astype(dtype),
      preferred_element_type=jnp.float32,
    )
    y = y * lax.rsqrt(mean_square + EPSILON) * self.scale
    return y.astype(x.dtype)


class LearnedRMSNorm(nn.Module):
  """RMS norm with a scale of its own, for all rows."""

  @nn.compact
  def weights(self, width):
    """Returns the `RMSNorm`."""
    scale = self.param("scale", nn.initializers.ones, (width,))
    return RMSNorm(scale[None])


class XavierDense(nn.Module):
  """A dense layer that starts within Xavier's limit, with a bias of 0.

  Attributes:
    features: output channels.
    variance: of the kernel at init, relative to Xavier's.
    dtype: of the computation; parameters are float32.
    lr_multiplier: how much slower than the other layers it learns.
  """

  features: int
  variance: float = 1.0
  dtype: Any = jnp.float32
  lr_multiplier: float = 1.0

  @nn.compact
  def weights(self, fan_in):
    """Returns the `Linear` of a kernel [fan_in, features]."""
    slower = self.lr_multiplier
    init = nn.initializers.variance_scaling(
      self.variance / slower**2, "fan_avg", "uniform"
    )
    kernel = self.param("kernel", init, (fan_in, self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    return Linear(kernel * slower, bias * slower, self.dtype)

  def __call__(self, x):
    """Maps [..., in] to [..., features]."""
    # As rows: see `layers.Dense`.
    rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
    y = self.weights(x.shape[-1])(rows)
    return y.reshape(*x.shape[:-1], self.features)


class Attention(nn.Module):
  """Dot-product attention of normalised, rotated queries and keys.

  Attributes:
    num_heads: must divide D.
    angles: [R, D / num_heads / 2], of `rotary_angles`, for the tokens in their
      order.
    num_patches: tokens of an image, without a class token.
    implementation: of `kernels`: "xla", "pallas" or "interpret".
    dtype: of the computation; logits and softmax are float32.
  """

  num_heads: int
  angles: Any
  num_patches: int
  implementation: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, norm):
    """Attends.

    Args:
      x: tokens [B, N, D], or packed ones, see `kernels.attention.pack`.
      norm: `RMSNorm`, by which they are normalised first.

    Returns:
      (x; the attended values, of its shape; the layer that comes next).
    """
    width = x.shape[-1]

    def layer(name):
      return XavierDense(width, dtype=self.dtype, name=name).weights(width)

    def heads(name):
      norm = LearnedRMSNorm(name=f"{name}_norm")
      scale = norm.weights(width // self.num_heads).scale
      scale = jnp.tile(scale, (1, self.num_heads))
      return NormalisedHeads(layer(name), scale, self.num_heads)

    layers = [heads("query"), heads("key"), layer("value")]
    x, queries, keys, values = apply_rows(
      project, x, norm, layers=layers, implementation=self.implementation
    )
    queries, keys = (
      rotate(y, self.angles, self.num_heads) for y in (queries, keys)
    )
    return x, attend(self, queries, keys, values, "dot"), layer("out")


def swiglu(x, mlp_gate, mlp_in, mlp_out):
  """Returns W_out(silu(W_gate x) * W_in x), of rows (Shazeer 2020)."""
  return mlp_out(nn.silu(mlp_gate(x)) * mlp_in(x))


def gated_mlp(x, attended, norm, gates, out, **layers):
  """Returns the rest of a block after its attention, of rows [R, D]."""
  x = x + gates[0](out(attended))
  return x + gates[1](swiglu(norm(x), **layers))


class SwiGLU(nn.Module):
  """Layers of `swiglu`, of hidden width 8/3 D."""

  dtype: Any = jnp.float32

  @nn.compact
  def weights(self, width):
    """Returns them, by name."""
    hidden = width * 8 // 3

    def layer(name, fan_in, features):
      return XavierDense(features, dtype=self.dtype, name=name).weights(fan_in)

    return {
      "mlp_gate": layer("gate", width, hidden),
      "mlp_in": layer("in", width, hidden),
      "mlp_out": layer("out", hidden, width),
    }


class Block(nn.Module):
  """x += gate * f(norm(x) * scale), for attention, then for a SwiGLU.

  Four affine maps of silu(w) are scale - 1 and gate of either; they start
  small, so that a block starts near the identity. Without w, the norms have
  scales of their own, and the gates are LayerScale's (Touvron et al. 2021), 0.1
  at init.

  Attributes:
    attention: keyword arguments of `Attention`, but for the rest.
    select: see `transformer.TransformerBlock`.
    implementation: see `Attention`.
    dtype: of the computation.
  """

  attention: Any
  select: Any = None
  implementation: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, w=None):
    """Maps tokens [B, N, D] and silu(w) [B, W], or none, to [B, N, D]."""
    width = x.shape[-1]
    if w is None:
      norms, gates = [], []
      for name in ("attention", "mlp"):
        norms.append(LearnedRMSNorm(name=f"{name}_rms").weights(width))
        small = nn.initializers.constant(0.1)
        gates.append(self.param(f"{name}_scale", small, (width,))[None])
    else:
      modulation = XavierDense(4 * width, 0.01, self.dtype, name="modulation")
      scale1, gate1, scale2, gate2 = jnp.split(modulation(w), 4, axis=-1)
      norms = [RMSNorm(1.0 + scale) for scale in (scale1, scale2)]
      gates = [gate1, gate2]
    x, attended, out = Attention(
      **self.attention,
      implementation=self.implementation,
      dtype=self.dtype,
      name="attention",
    )(x, norms[0])
    if self.select is not None:
      x, attended = self.select(x), self.select(attended)
    return apply_rows(
      gated_mlp,
      x,
      attended,
      norms[1],
      [Scale(gate) for gate in gates],
      out=out,
      **SwiGLU(self.dtype, name="mlp").weights(width),
      implementation=self.implementation,
    )


def class_embedding(num_classes, features, name):
  """Returns a layer that maps labels [B] to [B, features]."""
  return nn.Embed(
    num_classes,
    features,
    embedding_init=nn.initializers.normal(0.02),
    name=name,
  )


class Mapping(nn.Module):
  """Two dense layers with a SiLU between, a hundred times slower than others.

  Attributes:
    width: of both layers.
  """

  width: int

  @nn.compact
  def __call__(self, x):
    """Maps [B, F] to [B, width], float32."""
    x = XavierDense(self.width, lr_multiplier=0.01, name="dense0")(x)
    return XavierDense(self.width, lr_multiplier=0.01, name="dense1")(
      nn.silu(x)
    )


class Generator(LatentGenerator):
  """GAT's generator, latents to images.

  A head follows each of `num_levels` equal parts of the blocks. What it gives
  is added to the image of the head before; the last image is the generator's.
  In training all of them are returned, for a discriminator that takes as many.
  It draws nothing at random.

  Attributes, beside those of all networks (see `networks`):
    patch_size: P; divides S. There are (S / P)**2 tokens.
    width: D, of the tokens and of w; the rate should fall with 1 / D.
    depth: number of blocks.
    num_heads: D / num_heads is a multiple of 4.
    latent_dim: of z, and of the class embedding beside it.
    num_levels: images; divides the depth.
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
  implementation: str = "xla"
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
      self.classes = class_embedding(self.num_classes, self.latent_dim, None)

  @property
  def num_styles(self):
    """L: one for each block, whose head has the same."""
    return self.depth

  def mapping(self, latents, labels=None):
    """Maps latents [B, latent_dim] and labels [B] to w [B, D]."""
    x = normalise_second_moment(latents)
    if self.num_classes:
      classes = normalise_second_moment(self.classes(labels))
      x = jnp.concatenate([x, classes], axis=-1)
    return self.to_w(x)

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
    x, w = x.astype(self.dtype), nn.silu(w).astype(self.dtype)
    block = nn.remat(Block) if self.remat else Block
    image, levels = 0.0, []
    for i in range(self.depth):
      layer_w = w_of_layer(w, i)
      x = block(
        dict(num_heads=self.num_heads, angles=angles, num_patches=grid**2),
        implementation=self.implementation,
        dtype=self.dtype,
        name=f"block{i}",
      )(x, layer_w)
      if (i + 1) % (self.depth // self.num_levels) == 0:
        image = image + self._head(len(levels), x, layer_w)
        levels.append(image)
    return jnp.concatenate(levels, axis=-1) if train else image

  def _head(self, level, x, w):
    """Maps tokens [B, N, D] and silu(w) to an image [B, S, S, 3], float32."""
    name = f"head{level}"
    scale = XavierDense(self.width, 0.01, self.dtype, name=f"{name}_modulation")
    y = apply_rows(normalise, x, RMSNorm(1.0 + scale(w)))
    y = XavierDense(
      3 * self.patch_size**2, 1.0, self.dtype, name=f"{name}_rgb"
    )(y)
    return unpatchify(y, self.patch_size).astype(jnp.float32)


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

  Attributes, beside those of all networks (see `networks`):
    patch_size: P; divides S.
    width: D, of the tokens; the rate should fall with 1 / D.
    depth: number of blocks.
    num_heads: D / num_heads is a multiple of 4.
    num_levels: of the images.
    head_dim: features before the class comes in.
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
  implementation: str = "xla"
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
    num_patches, group = grid**2, attention.group_size(self.implementation)
    patches = overlapping_patches(images, self.patch_size, 0)
    x = XavierDense(self.width, 1.0, self.dtype, name="embedding")(patches)
    x = x + sine_cosine_positions(grid, self.width).astype(self.dtype)
    class_token = self.param(
      "class_token", nn.initializers.normal(0.02), (1, 1, self.width)
    )
    class_token = jnp.broadcast_to(class_token, (len(x), 1, self.width))
    x = attention.pack(x, class_token.astype(self.dtype), group)
    angles = rotary_angles(grid, self.width // self.num_heads)
    # A class token has no position: it is turned by nothing.
    angles = np.pad(np.tile(angles, (group, 1)), ((0, group), (0, 0)))

    def class_tokens(tokens):
      return attention.unpack(tokens, num_patches, group)[1]

    block = nn.remat(Block) if self.remat else Block
    for i in range(self.depth):
      x = block(
        dict(num_heads=self.num_heads, angles=angles, num_patches=num_patches),
        # The head looks at nothing else.
        select=class_tokens if i == self.depth - 1 else None,
        implementation=self.implementation,
        dtype=self.dtype,
        name=f"block{i}",
      )(x)
    y = LearnedRMSNorm(name="rms_out").weights(self.width)(x[:, 0])
    # A bfloat16 logit has three digits.
    y = y.astype(jnp.float32)
    if not self.num_classes:
      return XavierDense(1, name="logit")(y)[:, 0]
    y = XavierDense(self.head_dim, name="features")(y)
    embed = class_embedding(self.num_classes, self.head_dim, "classes")
    embedding = Mapping(self.head_dim, name="class_mapping")(embed(labels))
    return jnp.sum(y * embedding, axis=-1) / np.sqrt(self.head_dim)
