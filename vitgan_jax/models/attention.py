"""Dot-product and tied L2 attention, and the transformer block of both nets."""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitgan_jax.models import fused_attention, fused_rows
from vitgan_jax.models.layers import Dense, TokenConv, modulated_norm


def attention_weights(queries, keys, kind):
  """Returns the attention weights [B, N, M], float32; each row sums to one.

  "l2": softmax(-||q_i - k_j||^2 / sqrt(d)) (Kim et al. 2021; the ViTGAN paper
  prints the distance without its sign, which would attend to the farthest
  token). "dot": softmax(q_i . k_j / sqrt(d)).

  Args:
    queries: [B, N, d]. The logits are float32 whatever its type.
    keys: [B, M, d].
    kind: "l2" or "dot".
  """
  logits = jnp.einsum(
    "bnd,bmd->bnm", queries, keys, preferred_element_type=jnp.float32
  )
  if kind == "l2":
    # ||q_i - k_j||^2 = ||q_i||^2 - 2 q_i . k_j + ||k_j||^2, and a term that is
    # the same for all j, ||q_i||^2, leaves a softmax over j unchanged.
    squared_norms = jnp.sum(jnp.square(keys.astype(jnp.float32)), axis=-1)
    logits = 2.0 * logits - squared_norms[:, None, :]
  return jax.nn.softmax(logits / np.sqrt(queries.shape[-1]), axis=-1)


def relative_entropy(weights):
  """Returns the mean entropy of attention rows [..., M] over its maximum log M.

  1 is attention to all tokens alike, 0 to a single one.
  """
  entropy = -jnp.sum(weights * jnp.log(weights + 1e-12), axis=-1)
  return jnp.mean(entropy) / np.log(weights.shape[-1])


class MultiHeadAttention(nn.Module):
  """Multi-head self-attention of normalised tokens, but for the last layer.

  With "l2" one projection serves as query and key: only tied weights make L2
  attention Lipschitz (Kim et al. 2021, theorem 3.2). Each projection of all
  heads together is one D x D matrix to the spectral normalisation.

  Attributes:
    num_heads: must divide D.
    kind: "l2" or "dot".
    conv: whether query, key and value are 3x3 convolutions over the tokens.
    qk_gain: gain of the query and key projections at init.
    spectral_norm: "isn", "sn" or "none".
    num_patches: of the tokens of an image, if they are packed for
      `fused_attention`.
    mesh: TPU devices to attend on by `fused_attention`, and to project on by
      `fused_rows`; None is the plain form.
    dtype: of the computation; logits and softmax are float32.
  """

  num_heads: int
  kind: str
  conv: bool
  qk_gain: float = 1.0
  spectral_norm: str = "none"
  num_patches: int = 0
  mesh: Any = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, rows, shared):
    """Maps [B, N, D], or packed tokens, and their norm's weights.

    Args:
      x: the tokens, to be normalised by `modulated_norm`.
      rows: weights of the norm; see `LayerNorm` and `SelfModulatedLayerNorm`.
      shared: likewise.

    Returns:
      (x; the attended values, of its shape; weights of the dense layer that
      comes next).
    """
    width = x.shape[-1]
    common = dict(spectral_norm=self.spectral_norm, dtype=self.dtype)

    def projection(name, gain=1.0, use_bias=True):
      layer = TokenConv if self.conv else Dense
      return layer(width, use_bias, gain=gain, name=name, **common)

    # A bias that shifts all keys alike cancels in the softmax: its gradient is
    # rounding noise, which Adam would blow up to steps of full size.
    if self.kind == "l2":
      layers = [projection("query", self.qk_gain, use_bias=False)]
    else:
      layers = [
        projection("query", self.qk_gain),
        projection("key", self.qk_gain, use_bias=False),
      ]
    layers.append(projection("value"))
    apply = functools.partial(
      fused_rows.apply, dtype=self.dtype, mesh=self.mesh
    )
    if self.conv:
      y = apply(modulated_norm, x, rows, shared)
      projected = [layer(y) for layer in layers]
    else:
      layers = [layer.weights(width) for layer in layers]
      x, *projected = apply(_project, x, rows, {**shared, "layers": layers})
    if self.mesh is None:
      y = self._attend(*projected)
    else:
      y = fused_attention.attend(
        *projected,
        num_patches=self.num_patches,
        num_heads=self.num_heads,
        kind=self.kind,
        mesh=self.mesh,
      )
    return x, y, Dense(width, name="out", **common).weights(width)

  def _attend(self, *inputs):
    """Attends to queries, keys, if they are not tied, and values."""
    batch, num_tokens, width = inputs[0].shape

    def split(x):
      # Heads become part of the batch: [B * H, N, d].
      x = x.reshape(batch, num_tokens, self.num_heads, -1)
      return x.swapaxes(1, 2).reshape(batch * self.num_heads, num_tokens, -1)

    inputs = [split(x) for x in inputs]
    queries, keys, values = inputs[0], inputs[-2], inputs[-1]
    weights = attention_weights(queries, keys, self.kind)
    # Computed only where a caller asks for "intermediates".
    self.sow("intermediates", "attention_entropy", relative_entropy(weights))
    shape = (batch, self.num_heads, num_tokens, num_tokens)
    self.sow("intermediates", "attention_weights", weights.reshape(shape))
    y = jnp.einsum("bnm,bmd->bnd", weights.astype(self.dtype), values)
    y = y.reshape(batch, self.num_heads, num_tokens, -1)
    return y.swapaxes(1, 2).reshape(batch, num_tokens, width)


class TransformerBlock(nn.Module):
  """A pre-norm block: h' = MSA(norm(h)) + h, then MLP(norm(h')) + h'.

  Both skips come from the tensor before its normalisation: taken after it,
  no identity path would lead through the network.

  Attributes:
    norm: class of the normalisation layers, LayerNorm or
      SelfModulatedLayerNorm.
    mlp_dim: hidden width of the MLP, whose activation is the tanh GELU.
    attention: keyword arguments of MultiHeadAttention, but for the rest.
    spectral_norm: of every dense layer.
    mesh: see MultiHeadAttention.
    dtype: of the computation.
  """

  norm: Any
  mlp_dim: int
  attention: Any
  spectral_norm: str = "none"
  mesh: Any = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, h, *w):
    """Maps h [B, N, D] to [B, N, D]; `w` are arguments for the norms."""
    width = h.shape[-1]
    common = dict(spectral_norm=self.spectral_norm, dtype=self.dtype)
    norm = self.norm(self.dtype, name="norm_attention")
    attention = MultiHeadAttention(
      **self.attention, **common, mesh=self.mesh, name="attention"
    )
    h, attended, out = attention(h, *norm.weights(width, *w))
    norm = self.norm(self.dtype, name="norm_mlp")
    rows, shared = norm.weights(width, *w)
    mlp = (
      Dense(self.mlp_dim, name="mlp_in", **common).weights(width),
      Dense(width, name="mlp_out", **common).weights(self.mlp_dim),
    )
    return fused_rows.apply(
      _mlp,
      h,
      {**rows, "attended": attended},
      {**shared, "out": out, "mlp": mlp},
      dtype=self.dtype,
      mesh=self.mesh,
    )


def _project(layer, x, scale, shift, layers):
  y = modulated_norm(layer, x, scale, shift)
  # With x, whose gradients from here and from the skip are then summed where
  # they are computed; a sum of two arrays takes as long as a kernel.
  return [x, *(layer(y, *weights) for weights in layers)]


def _mlp(layer, h, attended, scale, shift, out, mlp):
  h = h + layer(attended, *out)
  y = modulated_norm(layer, h, scale, shift)
  mlp_in, mlp_out = mlp
  return h + layer(jax.nn.gelu(layer(y, *mlp_in)), *mlp_out)
