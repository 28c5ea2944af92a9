"""ViTGAN of the default switches in plain PyTorch, to be measured against.

The same networks, objective and step as ours, written as PyTorch runs them
fast: of two ways to compute a thing, here is the one that took less time on a
CPU. Images are [B, 3, S, S], about [-1, 1]; modules have the names of ours, and
their parameters come from ours. Needs torch.
"""

import math

import jax
import numpy as np
import torch
from torch import nn
import torch.nn.functional as F  # noqa: N812

from vitgan_jax import config as config_lib
from vitgan_jax.errors import ConfigError
from vitgan_jax.models.layers import LAYER_NORM_EPSILON, cell_centres
from vitgan_jax.models.transformer import QK_GAINS

_SWITCHES = {
  "generator.kind": "vitgan",
  "discriminator.kind": "vitgan",
  "data.num_classes": 0,
  "d_steps": 1,
  **{
    f"{network}_optimizer.{field}": value
    for network in "gd"
    for field, value in (
      ("name", "adam"),
      ("warmup_kimg", 0.0),
      ("decay", "constant"),
      ("clip_norm", 0.0),
      ("freeze", ""),
    )
  },
  "accumulation": 1,
  "remat": False,
  "generator.latent_injection": "sln",
  "generator.attention": "dot",
  "generator.conv_qkv": False,
  "generator.patch_decoder": "implicit",
  "discriminator.attention": "l2",
  "discriminator.conv_qkv": False,
  "discriminator.spectral_norm": "isn",
  "discriminator.pooling": "token",
  "loss.adversarial": "non_saturating",
  "loss.bcr_anchor": "clean",
  "loss.r1_gamma": 0.0,
  "loss.r2_gamma": 0.0,
  "loss.gp_weight": 0.0,
  "loss.drift_weight": 0.0,
  "loss.lecam_weight": 0.0,
  "loss.path_length_weight": 0.0,
  "ada.target": 0.0,
}


def check(config):
  """Raises a ConfigError for a config that this module does not implement."""
  values = config_lib.flatten(config)
  for field, value in _SWITCHES.items():
    if values[field] != value:
      raise ConfigError(
        f"the PyTorch ViTGAN has no config.{field}={values[field]!r}, only "
        f"{value!r}"
      )


def load_from_jax(module, params, spectral=None):
  """Copies parameters of ours, and their `spectral`, into a module."""
  module.load_state_dict(state_dict_of(params, spectral))


def state_dict_of(params, spectral=None):
  """Returns the state dict of a network of ours, copied; all its names match.

  Args:
    params: of the generator or the discriminator.
    spectral: the discriminator's collection of that name.
  """
  state = {}
  leaves = jax.tree_util.tree_leaves_with_path((params, spectral or {}))
  for (_, *path), leaf in leaves:
    *parents, name = [entry.key for entry in path if entry.key != "norm"]
    value = torch.from_numpy(np.array(leaf))
    if name == "kernel":
      value = value.T
      if parents == ["embedding"]:  # [D, P' * P' * 3], a convolution's weight
        size = round((value.shape[1] / 3) ** 0.5)
        value = value.unflatten(1, (size, size, 3)).permute(0, 3, 1, 2)
    name = {"kernel": "weight", "scale": "weight"}.get(name, name)
    state[".".join([*parents, name])] = value.contiguous()
  return state


def _leaky_relu(x):
  return F.leaky_relu(x, 0.2) * 2.0**0.5


class Dense(nn.Module):
  """A dense layer with equalized learning rate.

  In the discriminator its weight is normalised spectrally; u takes a step of
  power iteration in training mode.
  """

  def __init__(
    self, shape, bias=True, gain=1.0, lr_multiplier=1.0, spectral_norm=False
  ):
    super().__init__()
    self.weight = nn.Parameter(torch.zeros(shape))
    self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None
    # Of Python: torch.compile takes a number of numpy for a tensor.
    self.scale = gain * lr_multiplier / math.prod(shape[1:]) ** 0.5
    self.lr_multiplier = lr_multiplier
    self.spectral_norm = spectral_norm
    if spectral_norm:
      self.register_buffer("u", torch.zeros(shape[0]))
      self.register_buffer("sigma_init", torch.zeros(()))

  def scaled(self):
    """Returns the weight and the bias as they are applied."""
    weight, bias = self.weight * self.scale, self.bias
    if self.spectral_norm:
      matrix = weight.flatten(1)
      with torch.no_grad():
        if self.training:
          v = F.normalize(self.u @ matrix, dim=0)
          self.u.copy_(F.normalize(matrix @ v, dim=0))
        v = F.normalize(self.u @ matrix, dim=0)
      sigma = torch.dot(self.u, matrix @ v)
      weight = weight * (self.sigma_init / sigma)
    if self.lr_multiplier != 1.0:
      bias = bias * self.lr_multiplier
    return weight, bias

  def forward(self, x):
    """Maps [..., in] to [..., out]."""
    return F.linear(x, *self.scaled())


class PatchEmbedding(Dense):
  """A dense layer on overlapping patches: a convolution."""

  def __init__(self, width, patch_size, overlap):
    window = patch_size + 2 * overlap
    super().__init__((width, 3, window, window), spectral_norm=True)
    self.conv = dict(stride=patch_size, padding=overlap)

  def forward(self, images):
    """Maps [B, 3, S, S] to [B, N, D]."""
    return F.conv2d(images, *self.scaled(), **self.conv).flatten(2).mT


class SineEmbedding(nn.Module):
  """sin(M c + b) of the cell centres c of a square grid, M and b learned."""

  def __init__(self, grid_size, features, scale):
    super().__init__()
    self.frequencies = nn.Parameter(torch.zeros(2, features))
    self.phase = nn.Parameter(torch.zeros(features))
    centres = torch.tensor(scale * cell_centres(grid_size))
    self.register_buffer("centres", centres, persistent=False)

  def forward(self):
    """Returns [grid_size**2, features]."""
    return torch.sin(self.centres @ self.frequencies + self.phase)


class SelfModulatedLayerNorm(nn.Module):
  """LayerNorm whose gain and bias are affine maps of w."""

  def __init__(self, width, latent_dim):
    super().__init__()
    self.modulation = Dense((2 * width, latent_dim))

  def forward(self, h, w):
    """Maps h [B, N, D] and w [B, W] to [B, N, D]."""
    gamma, beta = self.modulation(w)[:, None].chunk(2, dim=-1)
    h = F.layer_norm(h, h.shape[-1:], eps=LAYER_NORM_EPSILON)
    return torch.addcmul(beta, gamma, h)


class Attention(nn.Module):
  """Multi-head attention by dot product, or by L2 distance with tied weights.

  With L2, the discriminator's, all layers are normalised spectrally.
  """

  def __init__(self, width, num_heads, l2, qk_gain):
    super().__init__()
    self.num_heads, self.l2 = num_heads, l2
    shape = (width, width)
    gain = qk_gain or QK_GAINS["l2" if l2 else "dot"]
    self.query = Dense(shape, not l2, gain=gain, spectral_norm=l2)
    self.key = None if l2 else Dense(shape, bias=False, gain=gain)
    self.value = Dense(shape, spectral_norm=l2)
    self.out = Dense(shape, spectral_norm=l2)

  def forward(self, x):
    """Maps [B, N, D] to [B, N, D]."""

    def heads(y):
      return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    query, value = heads(self.query(x)), heads(self.value(x))
    if self.l2:
      # ||q_i||^2 is the same for all keys: the softmax does not need it.
      query, value = query.flatten(0, 1), value.flatten(0, 1)
      scale = query.shape[-1] ** -0.5
      squared_norms = query.square().sum(-1)[:, None]
      logits = torch.baddbmm(
        squared_norms, query, query.mT, beta=-scale, alpha=2.0 * scale
      )
      y = torch.bmm(logits.softmax(-1), value)
      y = y.unflatten(0, (-1, self.num_heads))
    else:
      y = F.scaled_dot_product_attention(query, heads(self.key(x)), value)
    return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
  """A pre-norm transformer block."""

  def __init__(self, make_norm, attention, width, mlp_dim):
    super().__init__()
    sn = attention.l2
    self.norm_attention, self.norm_mlp = make_norm(), make_norm()
    self.attention = attention
    self.mlp_in = Dense((mlp_dim, width), spectral_norm=sn)
    self.mlp_out = Dense((width, mlp_dim), spectral_norm=sn)

  def forward(self, h, *w):
    """Maps h [B, N, D] to [B, N, D]; `w` are arguments for the norms."""
    h = h + self.attention(self.norm_attention(h, *w))
    y = F.gelu(self.mlp_in(self.norm_mlp(h, *w)), approximate="tanh")
    return h + self.mlp_out(y)


class ImplicitDecoder(nn.Module):
  """A modulated MLP from a pixel's position to its colour, one per patch."""

  def __init__(self, patch_size, width, hidden_dim, fourier_scale):
    super().__init__()
    self.patch_size = patch_size
    self.fourier = SineEmbedding(patch_size, hidden_dim, fourier_scale)
    self.hidden_style = Dense((hidden_dim, width))
    self.hidden_kernel = nn.Parameter(torch.zeros(hidden_dim, hidden_dim))
    self.hidden_bias = nn.Parameter(torch.zeros(hidden_dim))
    self.rgb_style = Dense((hidden_dim, width))
    self.rgb = Dense((3, hidden_dim))

  def forward(self, embeddings):
    """Maps [B, N, D] to images [B, 3, S, S]."""
    batch, num_tokens, _ = embeddings.shape
    grid, size = round(num_tokens**0.5), self.patch_size
    y = embeddings.flatten(0, 1)
    styles = self.hidden_style(y)
    kernel = self.hidden_kernel / self.hidden_kernel.shape[0] ** 0.5
    # All pixels of a patch in one matrix product, without weights per patch.
    weights = self.fourier().T[:, :, None] * kernel[:, None]
    hidden = (styles @ weights.flatten(1)).unflatten(1, (size**2, -1))
    demodulation = torch.rsqrt(styles.square() @ kernel.square() + 1e-8)
    hidden = _leaky_relu(hidden * demodulation[:, None] + self.hidden_bias)
    pixels = self.rgb(hidden * self.rgb_style(y)[:, None])
    pixels = pixels.reshape(batch, grid, grid, size, size, 3)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(
      batch, 3, grid * size, grid * size
    )


class Generator(nn.Module):
  """Mapping network, blocks modulated by w, implicit decoder."""

  def __init__(self, config):
    super().__init__()
    c, latent_dim = config.generator, config.generator.latent_dim
    self.grey = c.grey
    self.mapping = nn.ModuleDict(
      {
        f"dense{i}": Dense(
          (latent_dim, latent_dim), lr_multiplier=c.mapping_lr_multiplier
        )
        for i in range(c.mapping_depth)
      }
    )
    grid = config.data.image_size // c.patch_size
    self.positions = SineEmbedding(grid, c.width, c.position_scale)

    def make_norm():
      return SelfModulatedLayerNorm(c.width, latent_dim)

    self.blocks = []
    for i in range(c.depth):
      attention = Attention(c.width, c.num_heads, False, c.qk_gain)
      block = Block(make_norm, attention, c.width, c.mlp_dim)
      self.add_module(f"block{i}", block)
      self.blocks.append(block)
    self.norm_out = make_norm()
    self.decoder = ImplicitDecoder(
      c.patch_size, c.width, c.decoder_dim, c.fourier_scale
    )

  def forward(self, latents):
    """Maps [B, latent_dim] to images [B, 3, S, S]."""
    mean_square = latents.square().mean(dim=-1, keepdim=True)
    w = latents * torch.rsqrt(mean_square + 1e-8)
    for layer in self.mapping.values():
      w = _leaky_relu(layer(w))
    h = self.positions().expand(len(w), -1, -1)
    for block in self.blocks:
      h = block(h, w)
    images = self.decoder(self.norm_out(h, w))
    return (
      images.mean(1, keepdim=True).expand_as(images) if self.grey else images
    )


class Discriminator(nn.Module):
  """Overlapping patches, L2 attention, spectral normalisation."""

  def __init__(self, config):
    super().__init__()
    c = config.discriminator
    self.embedding = PatchEmbedding(c.width, c.patch_size, c.overlap)
    grid = config.data.image_size // c.patch_size
    self.positions = SineEmbedding(grid, c.width, c.position_scale)
    self.class_token = nn.Parameter(torch.zeros(1, 1, c.width))

    def make_norm():
      return nn.LayerNorm(c.width, eps=LAYER_NORM_EPSILON)

    self.blocks = []
    for i in range(c.depth):
      attention = Attention(c.width, c.num_heads, True, c.qk_gain)
      block = Block(make_norm, attention, c.width, c.mlp_dim)
      self.add_module(f"block{i}", block)
      self.blocks.append(block)
    self.norm_out = make_norm()
    self.head_in = Dense((c.width, c.width), spectral_norm=True)
    self.head_out = Dense((1, c.width), spectral_norm=True)

  def forward(self, images):
    """Maps [B, 3, S, S] to logits [B]."""
    patches = self.embedding(images) + self.positions()
    token = self.class_token.expand(len(images), -1, -1)
    h = torch.cat([token, patches], dim=1)
    for block in self.blocks:
      h = block(h)
    y = self.head_in(self.norm_out(h[:, 0]))
    return self.head_out(F.gelu(y, approximate="tanh"))[:, 0]
