"""The ViTGAN generator: w-modulated transformer, implicit patch decoder."""

import functools
from typing import Any

from flax import linen as nn
import jax.numpy as jnp

from vitgan_jax.errors import ConfigError, check_fields
from vitgan_jax.kernels import attention
from vitgan_jax.kernels.rows import apply_rows
from vitgan_jax.models.layers import (
  Dense,
  LayerNorm,
  SelfModulatedLayerNorm,
  SineEmbedding,
  normalise,
  w_of_layer,
)
from vitgan_jax.models.mapping import MappedGenerator
from vitgan_jax.models.patch_decoder import (
  ConcatDecoder,
  ConvDecoder,
  ImplicitDecoder,
  LinearDecoder,
)
from vitgan_jax.models.transformer import TransformerBlock, check_transformer


class Generator(MappedGenerator):
  """ViT generator (ViTGAN, section 3.3), latents to images.

  What it draws at random is the noise of the convolutional decoder.

  Attributes, beside those of all networks (see `networks`):
    patch_size: P; divides S. The generator has (S / P)**2 tokens.
    width: D, of the tokens.
    depth: number of transformer blocks.
    num_heads: attention heads; divides the width.
    mlp_dim: hidden width of the blocks' MLPs.
    latent_dim: of z and w.
    mapping_depth: layers of the mapping network.
    mapping_lr_multiplier: its relative learning rate.
    latent_injection: where w enters: "sln" (self-modulated LayerNorm, ViTGAN),
      "add" (to every position embedding) or "token" (one more token); the last
      two are A and B of the paper's ablation and use plain LayerNorm.
    attention: "dot" or "l2".
    qk_gain: see `transformer.MultiHeadAttention`.
    conv_qkv: whether query, key and value are 3x3 convolutions.
    patch_decoder: "implicit" (modulated), "implicit_concat", "linear", "conv".
    decoder_dim: hidden width of the patch decoder.
    position_scale: see `layers.SineEmbedding.scale`, for the tokens.
    fourier_scale: the same for the pixels of a patch.
    grey: whether images are grey: the mean of what the decoder draws in its
      three channels. A trace of colour tells them from images without any.
  """

  image_size: int
  num_classes: int
  patch_size: int
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  latent_dim: int
  mapping_depth: int
  mapping_lr_multiplier: float
  latent_injection: str
  attention: str
  qk_gain: float
  conv_qkv: bool
  patch_decoder: str
  decoder_dim: int
  position_scale: float
  fourier_scale: float
  grey: bool
  remat: bool = False
  implementation: str = "xla"
  dtype: Any = jnp.float32

  @staticmethod
  def check(fields, image_size, where):
    """Raises a ConfigError if these fields make no generator."""
    check_transformer(fields, image_size, where)
    check_fields(
      fields,
      where,
      choices={
        "latent_injection": ("sln", "add", "token"),
        "patch_decoder": ("implicit", "implicit_concat", "linear", "conv"),
      },
      positive=(
        "latent_dim",
        "mapping_depth",
        "mapping_lr_multiplier",
        "decoder_dim",
      ),
    )
    is_power_of_two = fields.patch_size & (fields.patch_size - 1) == 0
    if fields.patch_decoder == "conv" and not is_power_of_two:
      raise ConfigError(
        f"{where}patch_size={fields.patch_size} must be a power of two for "
        "patch_decoder='conv', which doubles the resolution"
      )

  @property
  def num_styles(self):
    """L: one for each block, and one more for what follows; else 1."""
    return self.depth + 1 if self.latent_injection == "sln" else 1

  @nn.compact
  def synthesize(self, w, keys=None, train=False):
    """Maps w [B, latent_dim] to images [B, S, S, 3], about [-1, 1].

    Where `num_styles` is above 1, w may be that of each layer, [B, L,
    latent_dim]. The output is not squashed; it is clipped where an image is
    written.
    """
    grid = self.image_size // self.patch_size
    positions = SineEmbedding(
      grid, self.width, self.position_scale, name="positions"
    )()
    h = jnp.broadcast_to(positions, (w.shape[0], *positions.shape))
    group = attention.group_size(self.implementation)
    if self.latent_injection == "sln":
      norm = functools.partial(SelfModulatedLayerNorm, dtype=self.dtype)
      conditions = [(w_of_layer(w, i),) for i in range(self.num_styles)]
    else:
      norm, conditions = LayerNorm, [()] * (self.depth + 1)
      token = Dense(self.width, name="latent_token")(w)[:, None, :]
      if self.latent_injection == "add":
        h = h + token
      else:
        h = attention.pack(h, token, group)
    h = h.astype(self.dtype)
    block = nn.remat(TransformerBlock) if self.remat else TransformerBlock
    for i in range(self.depth):
      h = block(
        norm=norm,
        mlp_dim=self.mlp_dim,
        attention=dict(
          num_heads=self.num_heads,
          num_patches=grid**2,
          kind=self.attention,
          conv=self.conv_qkv,
          qk_gain=self.qk_gain,
        ),
        implementation=self.implementation,
        dtype=self.dtype,
        name=f"block{i}",
      )(h, *conditions[i])
    if self.latent_injection == "token":
      h, _ = attention.unpack(h, grid**2, group)
    norm = norm(name="norm_out").weights(self.width, *conditions[-1])
    y = apply_rows(normalise, h, norm, implementation=self.implementation)
    images = self._decode(y, w_of_layer(w, -1), keys).astype(jnp.float32)
    if self.grey:
      grey = jnp.mean(images, axis=-1, keepdims=True)
      images = jnp.broadcast_to(grey, images.shape)
    return images

  def _decode(self, embeddings, w, keys):
    if self.patch_decoder == "linear":
      decoder = LinearDecoder(self.patch_size, self.dtype, name="decoder")
      return decoder(embeddings)
    if self.patch_decoder == "conv":
      decoder = ConvDecoder(
        self.patch_size, self.decoder_dim, self.dtype, name="decoder"
      )
      return decoder(embeddings, w, keys)
    common = (self.patch_size, self.decoder_dim, self.fourier_scale)
    if self.patch_decoder == "implicit_concat":
      return ConcatDecoder(*common, self.dtype, name="decoder")(embeddings)
    decoder = ImplicitDecoder(
      *common, self.implementation, self.dtype, name="decoder"
    )
    return decoder(embeddings)
