"""The transformer block of both networks, and its attention."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitgan_jax.errors import ConfigError, check_fields
from vitgan_jax.kernels import UnsupportedError
from vitgan_jax.kernels import attention as attention_kernel
from vitgan_jax.kernels.rows import apply_rows
from vitgan_jax.models.layers import Dense, TokenConv, normalise

# At 1, with heads of 64, L2 attention starts as the identity: each token is
# nearest to itself. Dot-product attention starts as the uniform one at 0.4.
QK_GAINS = {"l2": 0.4, "dot": 1.0}


def check_transformer(fields, image_size, where):
  """Checks what both networks' parts of a config have in common.

  Args:
    fields: of a network.
    image_size: pixels along a side.
    where: comes before a field's name in messages.

  Raises:
    ConfigError: says which field is wrong, and what is allowed.
  """
  check_fields(
    fields,
    where,
    choices={"attention": ("dot", "l2")},
    positive=("patch_size", "width", "depth", "num_heads", "mlp_dim"),
    not_negative=("qk_gain",),
  )
  check_grid(fields, image_size, where)


def check_grid(fields, image_size, where):
  """Raises a ConfigError unless patches tile the image, and heads the width."""
  if image_size % fields.patch_size:
    raise ConfigError(
      f"{where}patch_size={fields.patch_size} must divide "
      f"config.data.image_size={image_size}"
    )
  if fields.width % fields.num_heads:
    raise ConfigError(
      f"{where}num_heads={fields.num_heads} must divide "
      f"{where}width={fields.width}"
    )


def project(h, norm, layers):
  """Returns h and its projections by `layers` after `norm`: rows [R, D].

  With h, whose gradients from here and from the skip are then summed where
  they are computed; a sum of two arrays takes as long as a kernel.
  """
  y = norm(h)
  return h, *(layer(y) for layer in layers)


def mlp(h, attended, norm, out, mlp_in, mlp_out):
  """Returns the rest of a block after its attention, of rows [R, D]."""
  h = h + out(attended)
  return h + mlp_out(jax.nn.gelu(mlp_in(norm(h))))


def relative_entropy(weights):
  """Returns the mean entropy of attention rows [..., M] over its maximum log M.

  1 is attention to all tokens alike, 0 to a single one.
  """
  entropy = -jnp.sum(weights * jnp.log(weights + 1e-12), axis=-1)
  return jnp.mean(entropy) / np.log(weights.shape[-1])


def attend(module, queries, keys, values, kind):
  """Returns `kernels.attention.attend`, by the fields of the layer `module`.

  The plain form shows it where a caller asks for intermediates.
  """
  plain = module.implementation == "xla"
  if plain and module.is_mutable_collection("intermediates"):
    weights = attention_kernel.attention_weights(
      attention_kernel.split_heads(queries, module.num_heads),
      attention_kernel.split_heads(keys, module.num_heads),
      kind,
    )
    module.sow("intermediates", "attention_entropy", relative_entropy(weights))
    weights = weights.reshape(-1, module.num_heads, *weights.shape[1:])
    module.sow("intermediates", "attention_weights", weights)
  return attention_kernel.attend(
    queries,
    keys,
    values,
    num_patches=module.num_patches,
    num_heads=module.num_heads,
    kind=kind,
    implementation=module.implementation,
  )


class MultiHeadAttention(nn.Module):
  """Multi-head self-attention of normalised tokens, but for the last layer.

  With "l2" one projection serves as query and key: tied weights are necessary
  for L2 attention to be Lipschitz (Kim et al. 2021, theorem 3.2). Each
  projection of all heads together is one D x D matrix to the spectral
  normalisation.

  Attributes:
    num_heads: must divide D.
    num_patches: tokens of an image, without a class or latent token.
    kind: "l2" or "dot".
    conv: whether query, key and value are 3x3 convolutions over the tokens.
    qk_gain: gain of the query and key projections at init; 0 is the kind's
      own, of `QK_GAINS`.
    spectral_norm: "isn", "sn" or "none".
    implementation: of `kernels`: "xla", "pallas" or "interpret".
    dtype: of the computation; logits and softmax are float32.
  """

  num_heads: int
  num_patches: int
  kind: str
  conv: bool
  qk_gain: float = 0.0
  spectral_norm: str = "none"
  implementation: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, h, norm):
    """Attends.

    Args:
      h: tokens [B, N, D], or packed ones, see `kernels.attention.pack`.
      norm: `layers.Norm`, by which they are normalised first.

    Returns:
      (h; the attended values, of its shape; the layer that comes next).
    """
    width = h.shape[-1]
    common = dict(spectral_norm=self.spectral_norm, dtype=self.dtype)

    def projection(name, gain=1.0, use_bias=True):
      layer = TokenConv if self.conv else Dense
      return layer(width, use_bias, gain=gain, name=name, **common)

    qk_gain = self.qk_gain or QK_GAINS[self.kind]
    # A bias that shifts all keys alike cancels in the softmax: its gradient is
    # rounding noise, which Adam would blow up to steps of full size.
    if self.kind == "l2":
      layers = [projection("query", qk_gain, use_bias=False)]
    else:
      layers = [
        projection("query", qk_gain),
        projection("key", qk_gain, use_bias=False),
      ]
    layers.append(projection("value"))
    if self.conv:
      if self.implementation != "xla":
        raise UnsupportedError("convolutional projections have no kernel")
      y = apply_rows(normalise, h, norm)
      projected = [layer(y) for layer in layers]
    else:
      layers = [layer.weights(width) for layer in layers]
      h, *projected = apply_rows(
        project, h, norm, layers=layers, implementation=self.implementation
      )
    queries, keys, values = projected[0], projected[-2], projected[-1]
    attended = attend(self, queries, keys, values, self.kind)
    return h, attended, Dense(width, name="out", **common).weights(width)


class TransformerBlock(nn.Module):
  """A pre-norm block: h' = MSA(norm(h)) + h, then MLP(norm(h')) + h'.

  Both skips come from the tensor before its normalisation: taken after it,
  no identity path would lead through the network.

  Attributes:
    norm: makes a normalisation layer, `layers.LayerNorm` or
      `layers.SelfModulatedLayerNorm`, of a name.
    mlp_dim: hidden width of the MLP, whose activation is the tanh GELU.
    attention: keyword arguments of MultiHeadAttention, but for the rest.
    select: takes the tokens that are asked for from all of them; nothing after
      the attention is computed for others. None is all of them.
    spectral_norm: of every dense layer.
    implementation: see MultiHeadAttention.
    dtype: of the computation.
  """

  norm: Any
  mlp_dim: int
  attention: Any
  select: Any = None
  spectral_norm: str = "none"
  implementation: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, h, *w):
    """Maps h [B, N, D] to [B, N, D], or what `select` leaves of it.

    `w` are arguments for the norms.
    """
    width = h.shape[-1]
    common = dict(spectral_norm=self.spectral_norm, dtype=self.dtype)
    attention = MultiHeadAttention(
      **self.attention,
      **common,
      implementation=self.implementation,
      name="attention",
    )
    norm = self.norm(name="norm_attention").weights(width, *w)
    h, attended, out = attention(h, norm)
    if self.select is not None:
      h, attended = self.select(h), self.select(attended)
    return apply_rows(
      mlp,
      h,
      attended,
      self.norm(name="norm_mlp").weights(width, *w),
      out=out,
      mlp_in=Dense(self.mlp_dim, name="mlp_in", **common).weights(width),
      mlp_out=Dense(width, name="mlp_out", **common).weights(self.mlp_dim),
      implementation=self.implementation,
    )
