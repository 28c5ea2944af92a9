"""The ViTGAN discriminator: overlapping patches, L2 attention, ISN."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from vitgan_jax.errors import check_fields
from vitgan_jax.kernels import attention
from vitgan_jax.kernels.rows import apply_rows
from vitgan_jax.models.layers import Dense, LayerNorm, SineEmbedding
from vitgan_jax.models.patches import overlapping_patches
from vitgan_jax.models.transformer import TransformerBlock, check_transformer


def embed(patches, embedding, positions, class_tokens):
  """Embeds patches and lays them out as `kernels.attention.pack` does.

  Args:
    patches: rows [T, F], those of whole groups of g images.
    embedding: `Linear` from F to D.
    positions: [N, D].
    class_tokens: [g, D], one for each image of a group.

  Returns:
    Rows [T + T / N, D]: of each group all patches, then the class tokens.
  """
  y = embedding(patches).reshape(-1, *positions.shape) + positions
  y = y.reshape(-1, len(class_tokens) * len(positions), y.shape[-1])
  class_tokens = jnp.broadcast_to(class_tokens, (len(y), *class_tokens.shape))
  return jnp.concatenate([y, class_tokens], axis=1).reshape(-1, y.shape[-1])


class Discriminator(nn.Module):
  """ViT discriminator (ViTGAN, section 3.2), images to logits.

  It draws nothing at random. A class adds to the logit the projection of its
  embedding on what the head reads (Miyato and Koyama 2018), over sqrt(D).

  Attributes, beside those of all networks (see `networks`):
    patch_size: P; divides S.
    overlap: pixels that a patch shares with each neighbour; P / 2 in the paper.
    width: D, of the tokens.
    depth: number of transformer blocks.
    num_heads: attention heads; divides the width.
    mlp_dim: hidden width of the blocks' MLPs.
    attention: "l2" or "dot".
    qk_gain: see `transformer.MultiHeadAttention`. Spectral normalisation keeps
      the scale that this sets; only that of the norm before it can change it.
    conv_qkv: whether query, key and value are 3x3 convolutions.
    spectral_norm: of every dense layer: "isn", "sn" or "none".
    position_scale: see `layers.SineEmbedding.scale`.
    pooling: what the head reads: "token", the class token, as in the paper; or
      "mean", every patch, of whose logits the mean is taken.
  """

  image_size: int
  num_classes: int
  patch_size: int
  overlap: int
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  attention: str
  qk_gain: float
  conv_qkv: bool
  spectral_norm: str
  position_scale: float
  pooling: str
  remat: bool = False
  implementation: str = "xla"
  dtype: Any = jnp.float32

  @staticmethod
  def check(fields, image_size, where):
    """Raises a ConfigError if these fields make no discriminator."""
    check_transformer(fields, image_size, where)
    check_fields(
      fields,
      where,
      choices={
        "spectral_norm": ("isn", "sn", "none"),
        "pooling": ("token", "mean"),
      },
      not_negative=("overlap",),
    )

  @nn.compact
  def __call__(self, images, labels=None, keys=None, train=False):
    """Maps images [B, S, S, 3] to logits [B]; no activation is applied."""
    common = dict(spectral_norm=self.spectral_norm, dtype=self.dtype)
    patches = overlapping_patches(
      images.astype(self.dtype), self.patch_size, self.overlap
    )
    _, num_patches, features = patches.shape
    positions = SineEmbedding(
      self.image_size // self.patch_size,
      self.width,
      self.position_scale,
      name="positions",
    )()
    class_token = self.param(
      "class_token", nn.initializers.normal(1.0), (1, 1, self.width)
    )
    group = attention.group_size(self.implementation)
    h = apply_rows(
      embed,
      attention.group_images(patches, group),
      embedding=Dense(self.width, name="embedding", **common).weights(features),
      positions=positions,
      class_tokens=jnp.broadcast_to(class_token[0], (group, self.width)),
      implementation=self.implementation,
      unit=group * num_patches,
    )

    def read(tokens):
      patches, class_token = attention.unpack(tokens, num_patches, group)
      return class_token if self.pooling == "token" else patches

    block = nn.remat(TransformerBlock) if self.remat else TransformerBlock
    for i in range(self.depth):
      h = block(
        norm=LayerNorm,
        mlp_dim=self.mlp_dim,
        attention=dict(
          num_heads=self.num_heads,
          num_patches=num_patches,
          kind=self.attention,
          conv=self.conv_qkv,
          qk_gain=self.qk_gain,
        ),
        # The head looks at nothing else.
        select=read if i == self.depth - 1 else None,
        implementation=self.implementation,
        name=f"block{i}",
        **common,
      )(h)
    tokens = LayerNorm(name="norm_out").weights(self.width)(h)
    y = jax.nn.gelu(Dense(self.width, name="head_in", **common)(tokens))
    # The last layer is float32: a bfloat16 logit has three digits.
    common["dtype"] = jnp.float32
    logits = jnp.mean(Dense(1, name="head_out", **common)(y)[..., 0], axis=1)
    if self.num_classes:
      embedding = Dense(
        self.width,
        use_bias=False,
        # Of which one row is taken: numbers of deviation 0.1, however many
        # classes. That is as large as logits are; ISN keeps the scale.
        gain=0.1 * self.num_classes**0.5,
        name="class_embedding",
        **common,
      )(jax.nn.one_hot(labels, self.num_classes))
      projections = jnp.sum(embedding[:, None] * tokens, axis=-1)
      logits += jnp.mean(projections, axis=1) / self.width**0.5
    return logits
