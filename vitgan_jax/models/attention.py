"""Dot-product and tied L2 attention, and the transformer block of both nets."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitgan_jax.models import fused_attention
from vitgan_jax.models.layers import Dense, TokenConv


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
  """Multi-head self-attention.

  With "l2" one projection serves as query and key: only tied weights make L2
  attention Lipschitz (Kim et al. 2021, theorem 3.2). Each projection of all
  heads together is one D x D matrix to the spectral normalisation.

  Attributes:
    num_heads: must divide D.
    kind: "l2" or "dot".
    conv: whether query, key and value are 3x3 convolutions over the tokens.
    qk_gain: gain of the query and key projections at init.
    spectral_norm: "isn", "sn" or "none".
    num_patches: if not 0, `fused_attention` attends; so many tokens are
      patches, and if there are others, they are packed as it says.
    mesh: the devices of the kernel.
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
  def __call__(self, x):
    """Maps [B, N, D] to [B, N, D], or packed tokens to packed tokens."""
    batch, num_tokens, width = x.shape
    common = dict(spectral_norm=self.spectral_norm, dtype=self.dtype)

    def project(name, gain=1.0, use_bias=True):
      layer = TokenConv if self.conv else Dense
      y = layer(width, use_bias, gain=gain, name=name, **common)(x)
      if self.num_patches:
        return y
      # Heads become part of the batch: [B * H, N, d].
      y = y.reshape(batch, num_tokens, self.num_heads, -1)
      return y.swapaxes(1, 2).reshape(batch * self.num_heads, num_tokens, -1)

    # A bias that shifts all keys alike cancels in the softmax: its gradient is
    # rounding noise, which Adam would blow up to steps of full size.
    if self.kind == "l2":
      queries = keys = project("query", self.qk_gain, use_bias=False)
    else:
      queries = project("query", self.qk_gain)
      keys = project("key", self.qk_gain, use_bias=False)
    values = project("value")
    if self.num_patches:
      y = fused_attention.attend(
        queries,
        keys,
        values,
        num_patches=self.num_patches,
        num_heads=self.num_heads,
        kind=self.kind,
        mesh=self.mesh,
      )
      return Dense(width, name="out", **common)(y)
    weights = attention_weights(queries, keys, self.kind)
    self.sow("intermediates", "attention_entropy", relative_entropy(weights))
    y = jnp.einsum("bnm,bmd->bnd", weights.astype(self.dtype), values)
    y = y.reshape(batch, self.num_heads, num_tokens, -1)
    y = y.swapaxes(1, 2).reshape(batch, num_tokens, width)
    return Dense(width, name="out", **common)(y)


class TransformerBlock(nn.Module):
  """A pre-norm block: h' = MSA(norm(h)) + h, then MLP(norm(h')) + h'.

  Both skips come from the tensor before its normalisation: taken after it,
  no identity path would lead through the network.

  Attributes:
    norm: class of the normalisation layers, called as `norm(dtype)(h, *w)`.
    mlp_dim: hidden width of the MLP, whose activation is the tanh GELU.
    attention: keyword arguments of MultiHeadAttention, but for the next two.
    spectral_norm: of every dense layer.
    dtype: of the computation.
  """

  norm: Any
  mlp_dim: int
  attention: Any
  spectral_norm: str = "none"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, h, *w):
    """Maps h [B, N, D] to [B, N, D]; `w` are arguments for the norms."""
    common = dict(spectral_norm=self.spectral_norm, dtype=self.dtype)
    y = self.norm(self.dtype, name="norm_attention")(h, *w)
    h = h + MultiHeadAttention(**self.attention, **common, name="attention")(y)
    y = self.norm(self.dtype, name="norm_mlp")(h, *w)
    y = Dense(self.mlp_dim, name="mlp_in", **common)(y)
    y = Dense(h.shape[-1], name="mlp_out", **common)(jax.nn.gelu(y))
    return h + y
