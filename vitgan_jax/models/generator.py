"""The ViTGAN generator: w-modulated transformer, implicit patch decoder."""

import functools
from typing import Any

from flax import linen as nn
from jax import lax
import jax.numpy as jnp

from vitgan_jax.kernels import attention
from vitgan_jax.kernels.rows import apply_rows
from vitgan_jax.models.layers import (
  Dense,
  LayerNorm,
  SelfModulatedLayerNorm,
  SineEmbedding,
  leaky_relu,
  normalise,
)
from vitgan_jax.models.patch_decoder import (
  ConcatDecoder,
  ConvDecoder,
  ImplicitDecoder,
  LinearDecoder,
)
from vitgan_jax.models.transformer import TransformerBlock


class MappingNetwork(nn.Module):
  """Normalises z and maps it to w by an MLP with equalized learning rate.

  Every layer ends in a leaky ReLU with gain sqrt(2). Without the gain w shrinks
  from layer to layer, the images hardly depend on z, and training ends at one
  image for all latents.
  """

  depth: int
  lr_multiplier: float

  @nn.compact
  def __call__(self, latents):
    """Maps z [B, latent_dim] to w [B, latent_dim], float32."""
    mean_square = jnp.mean(jnp.square(latents), axis=-1, keepdims=True)
    w = latents * lax.rsqrt(mean_square + 1e-8)
    for i in range(self.depth):
      layer = Dense(
        w.shape[-1], lr_multiplier=self.lr_multiplier, name=f"dense{i}"
      )
      w = leaky_relu(layer(w))
    return w


class Generator(nn.Module):
  """ViT generator (ViTGAN, section 3.3), latents to images.

  Attributes:
    image_size: S, pixels along a side.
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
    conv_qkv: whether query, key and value are 3x3 convolutions.
    patch_decoder: "implicit" (modulated), "implicit_concat", "linear", "conv".
    decoder_dim: hidden width of the patch decoder.
    position_scale: see `layers.SineEmbedding.scale`, for the tokens.
    fourier_scale: the same for the pixels of a patch.
    remat: whether the backward pass computes the blocks' insides again, which
      takes time and saves memory.
    implementation: of `kernels`: "xla", "pallas" or "interpret".
    dtype: of the computation; parameters and images are float32.
  """

  image_size: int
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
  conv_qkv: bool
  patch_decoder: str
  decoder_dim: int
  position_scale: float
  fourier_scale: float
  remat: bool = False
  implementation: str = "xla"
  dtype: Any = jnp.float32

  def setup(self):
    """Makes what is used by itself; `synthesize` makes the rest."""
    self.mapping = MappingNetwork(
      self.mapping_depth, self.mapping_lr_multiplier
    )

  def __call__(self, latents):
    """Maps latents [B, latent_dim] to images; see `synthesize`."""
    return self.synthesize(self.mapping(latents))

  def truncated(self, latents, psi, mean_w):
    """Maps latents to images nearer to their mean (Karras et al. 2019, B).

    Args:
      latents: [B, latent_dim].
      psi: 1 leaves w as it is, to the last bit; 0 takes its mean for all.
      mean_w: [latent_dim], the mean of w over latents.

    Returns:
      [B, S, S, 3], as `synthesize` does.
    """
    w = self.mapping(latents)
    return self.synthesize(psi * w + (1.0 - psi) * mean_w)

  @nn.compact
  def synthesize(self, w):
    """Maps w [B, latent_dim] to images [B, S, S, 3], about [-1, 1].

    The output is not squashed; it is clipped where an image is written.
    """
    grid = self.image_size // self.patch_size
    positions = SineEmbedding(
      grid, self.width, self.position_scale, name="positions"
    )()
    h = jnp.broadcast_to(positions, (len(w), *positions.shape))
    group = attention.group_size(self.implementation)
    if self.latent_injection == "sln":
      norm = functools.partial(SelfModulatedLayerNorm, dtype=self.dtype)
      condition = (w,)
    else:
      norm, condition = LayerNorm, ()
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
        ),
        implementation=self.implementation,
        dtype=self.dtype,
        name=f"block{i}",
      )(h, *condition)
    if self.latent_injection == "token":
      h, _ = attention.unpack(h, grid**2, group)
    norm = norm(name="norm_out").weights(self.width, *condition)
    y = apply_rows(normalise, h, norm, implementation=self.implementation)
    return self._decode(y, w).astype(jnp.float32)

  def _decode(self, embeddings, w):
    if self.patch_decoder == "linear":
      decoder = LinearDecoder(self.patch_size, self.dtype, name="decoder")
      return decoder(embeddings)
    if self.patch_decoder == "conv":
      decoder = ConvDecoder(
        self.patch_size, self.decoder_dim, self.dtype, name="decoder"
      )
      return decoder(embeddings, w)
    common = (self.patch_size, self.decoder_dim, self.fourier_scale)
    if self.patch_decoder == "implicit_concat":
      return ConcatDecoder(*common, self.dtype, name="decoder")(embeddings)
    decoder = ImplicitDecoder(
      *common, self.implementation, self.dtype, name="decoder"
    )
    return decoder(embeddings)
