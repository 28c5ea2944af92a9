"""The ViTGAN discriminator: overlapping patches, L2 attention, ISN."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from vitgan_jax.models import fused_attention, fused_rows
from vitgan_jax.models.attention import TransformerBlock
from vitgan_jax.models.layers import Dense, LayerNorm, SineEmbedding
from vitgan_jax.models.patches import overlapping_patches


class Discriminator(nn.Module):
  """ViT discriminator (ViTGAN, section 3.2), images to logits.

  Attributes:
    image_size: S, pixels along a side.
    patch_size: P; divides S.
    overlap: pixels that a patch shares with each neighbour; P / 2 in the paper.
    width: D, of the tokens.
    depth: number of transformer blocks.
    num_heads: attention heads; divides the width.
    mlp_dim: hidden width of the blocks' MLPs.
    attention: "l2" or "dot".
    qk_gain: gain of the query and key projections at init. Spectral
      normalisation freezes the scale that this sets: at 1, L2 attention starts
      as the identity and cannot leave it (see the configs for the measure).
    conv_qkv: whether query, key and value are 3x3 convolutions.
    spectral_norm: of every dense layer: "isn", "sn" or "none".
    position_scale: see `layers.SineEmbedding.scale`.
    remat: whether the backward pass computes the blocks' insides again, which
      takes time and saves memory.
    mesh: TPU devices that share the batch, to attend by
      `fused_attention` on them; None is the plain form, on any device.
    dtype: of the computation; parameters, sigma and logits are float32.
  """

  image_size: int
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
  remat: bool = False
  mesh: Any = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images):
    """Maps images [B, S, S, 3] to logits [B]; no activation is applied."""
    batch = images.shape[0]
    common = dict(spectral_norm=self.spectral_norm, dtype=self.dtype)
    patches = overlapping_patches(
      images.astype(self.dtype), self.patch_size, self.overlap
    )
    embedding = Dense(self.width, name="embedding", **common)
    grid = self.image_size // self.patch_size
    positions = SineEmbedding(
      grid, self.width, self.position_scale, name="positions"
    )()
    class_token = self.param(
      "class_token", nn.initializers.normal(1.0), (1, 1, self.width)
    )
    is_packed = not self.conv_qkv and fused_attention.can_attend(
      self.mesh, batch, grid**2, self.width, self.num_heads, self.dtype
    )
    if is_packed:
      features = patches.shape[-1]
      group = fused_attention.GROUP_SIZE * grid**2
      h = fused_rows.apply(
        _embed_and_pack,
        patches.reshape(-1, group, features),
        {},
        dict(
          embedding=embedding.weights(features),
          positions=positions,
          class_token=class_token[0],
        ),
        dtype=self.dtype,
        mesh=self.mesh,
        max_rows=group,
      )
    else:
      patches = embedding(patches) + positions.astype(self.dtype)
      class_token = jnp.broadcast_to(class_token, (batch, 1, self.width))
      h = jnp.concatenate([class_token.astype(self.dtype), patches], axis=1)
    block = nn.remat(TransformerBlock) if self.remat else TransformerBlock
    for i in range(self.depth):
      h = block(
        norm=LayerNorm,
        mlp_dim=self.mlp_dim,
        attention=dict(
          num_heads=self.num_heads,
          kind=self.attention,
          qk_gain=self.qk_gain,
          conv=self.conv_qkv,
          num_patches=grid**2,
        ),
        mesh=self.mesh if is_packed else None,
        name=f"block{i}",
        **common,
      )(h)
    if is_packed:
      _, class_token = fused_attention.unpack(h, grid**2)
    else:
      class_token = h[:, :1]
    y = LayerNorm(self.dtype, name="norm_out")(class_token[:, 0])
    y = jax.nn.gelu(Dense(self.width, name="head_in", **common)(y))
    # The last layer is float32: a bfloat16 logit has three digits.
    common["dtype"] = jnp.float32
    return Dense(1, name="head_out", **common)(y)[:, 0]


def _embed_and_pack(layer, patches, embedding, positions, class_token):
  """Embeds patches [groups of images and their patches, F]; see `pack`."""
  y = layer(patches, *embedding)
  y = y.reshape(-1, *positions.shape) + positions
  y = y.reshape(-1, fused_attention.GROUP_SIZE, *positions.shape)
  class_tokens = jnp.broadcast_to(class_token, (*y.shape[:2], 1, y.shape[-1]))
  y = fused_attention.pack(
    y.reshape(-1, *positions.shape), class_tokens.reshape(-1, 1, y.shape[-1])
  )
  return y.reshape(-1, y.shape[-1])
