"""Multi-head attention: the paper's formula, and the same as a TPU kernel.

XLA gives one image's heads, matrices of 65 x 64, a tenth of the matrix unit,
and writes scores and softmax to memory in between. Here one program takes some
heads of a group of images, goes through the images one by one, and keeps all in
VMEM; backward, it computes the scores again.

Tokens come as `pack` lays them out: a group of images, all their patches, then
all their class tokens. The plain form has groups of one image. The kernel has
larger ones: with 65 tokens an image, no layout of [B, N, D] has images that
begin at a multiple of 8 rows, as the chip wants them, but this one has, without
padding.
"""

import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from vitgan_jax.kernels import UnsupportedError

GROUP_SIZE = 16  # images; as many bfloat16 rows fill a register
_LANES = 128
_UNROLL = 4  # images: while one waits for the matrix unit, another computes
_VMEM_BYTES = 32 * 2**20  # of a program; the compiler's default is 16 MB
# Backward, of three inputs, their gradients and that of the output, each twice:
# while one is computed with, the next one is read.
_NUM_BLOCKS = 2 * 7


def group_size(implementation):
  """Returns how many images `pack` puts together."""
  return 1 if implementation == "xla" else GROUP_SIZE


def group_images(x, group):
  """Puts tokens of `group` images together: [B, N, D] to [B / group, ., D].

  Raises:
    UnsupportedError: if the images do not fall into groups.
  """
  if len(x) % group:
    raise UnsupportedError(f"{len(x)} images are not a multiple of {group}")
  return x.reshape(-1, group * x.shape[1], x.shape[-1])


def pack(patches, extra, group):
  """Puts tokens of `group` images together: all patches, then all extras.

  Args:
    patches: [B, N, D].
    extra: [B, 1, D], class tokens.
    group: divides B.

  Returns:
    [B / group, group * (N + 1), D].

  Raises:
    UnsupportedError: if the images do not fall into groups.
  """
  parts = [group_images(x, group) for x in (patches, extra)]
  return jnp.concatenate(parts, axis=1)


def unpack(tokens, num_patches, group):
  """Undoes `pack`: returns (patches [B, N, D], extra [B, 1, D])."""
  width = tokens.shape[-1]
  # Slices: where one part is not needed, the other's gradient is but padded.
  patches = tokens[:, : group * num_patches]
  extra = tokens[:, group * num_patches :]
  return patches.reshape(-1, num_patches, width), extra.reshape(-1, 1, width)


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


def split_heads(x, num_heads):
  """Makes heads a part of the batch: [B, N, D] to [B * H, N, D / H]."""
  batch, num_tokens, width = x.shape
  x = x.reshape(batch, num_tokens, num_heads, -1).swapaxes(1, 2)
  return x.reshape(batch * num_heads, num_tokens, width // num_heads)


def attend(
  queries,
  keys,
  values,
  *,
  num_patches,
  num_heads,
  kind,
  implementation="xla",
):
  """Returns multi-head attention in the shape of the queries.

  Args:
    queries: [B, N, D]; with a kernel, [B / GROUP_SIZE, R, D], see `pack`, or
      [B, num_patches, D], whose rows are those already.
    keys: likewise. Where they are tied to the queries, the same array: the
      kernel then reads it once.
    values: likewise.
    num_patches: tokens of an image, without the extra one.
    num_heads: divides D.
    kind: "l2" or "dot"; the kernel knows no others.
    implementation: "xla", "pallas" or "interpret". The kernel has no second
      derivative: gradient penalties take the plain form.

  Raises:
    UnsupportedError: if no kernel fits.
  """
  if implementation == "xla":
    return _attend_plainly(queries, keys, values, num_heads, kind)
  inputs = (queries, values) if keys is queries else (queries, keys, values)
  if queries.shape[1] == num_patches:
    inputs = tuple(group_images(x, GROUP_SIZE) for x in inputs)
  head_dim = queries.shape[-1] // num_heads
  _check(kind, num_patches, queries.shape[-1], head_dim, queries.dtype)
  is_interpreted = implementation == "interpret"
  y = _attend(inputs, num_patches, head_dim, kind, is_interpreted)
  return y.reshape(queries.shape)


def _attend_plainly(queries, keys, values, num_heads, kind):
  batch, num_tokens, width = queries.shape
  queries, keys, values = (
    split_heads(x, num_heads) for x in (queries, keys, values)
  )
  weights = attention_weights(queries, keys, kind)
  y = jnp.einsum("bnm,bmd->bnd", weights.astype(values.dtype), values)
  y = y.reshape(batch, num_heads, num_tokens, -1).swapaxes(1, 2)
  return y.reshape(batch, num_tokens, width)


def _check(kind, num_patches, width, head_dim, dtype):
  """Raises an UnsupportedError unless the kernel takes a group of images."""
  if kind not in ("l2", "dot"):
    raise UnsupportedError(f"{kind!r} attention has no kernel")
  if num_patches % GROUP_SIZE:
    raise UnsupportedError(
      f"{num_patches} tokens an image are not a multiple of {GROUP_SIZE}"
    )
  block = GROUP_SIZE * num_patches * _lanes(width, head_dim) * dtype.itemsize
  if _NUM_BLOCKS * block > 0.75 * _VMEM_BYTES:
    raise UnsupportedError(
      f"{num_patches} tokens an image do not fit the chip's memory"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _attend(inputs, *static):
  return _call(_forward_kernel, 1, inputs, *static)[0]


def _attend_forward(inputs, *static):
  return _attend(inputs, *static), inputs


def _attend_backward(*args):
  *static, inputs, dy = args
  gradients = _call(_backward_kernel, len(inputs), (*inputs, dy), *static)
  return (tuple(gradients),)


_attend.defvjp(_attend_forward, _attend_backward)


def _call(kernel, num_outputs, inputs, num_patches, head_dim, kind, interpret):
  groups, num_rows, width = inputs[0].shape
  has_extra = num_rows > GROUP_SIZE * num_patches
  num_tokens = num_patches + has_extra
  lanes = _lanes(width, head_dim)
  block = pl.BlockSpec((1, num_rows, lanes), lambda i, j: (i, 0, j))
  # Forward two products of N x N x D for each image, backward five.
  num_products = 2 if num_outputs == 1 else 5
  batch = groups * GROUP_SIZE
  shape = jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype)
  num_bytes = shape.size * shape.dtype.itemsize
  return pl.pallas_call(
    functools.partial(
      kernel, num_patches=num_patches, head_dim=head_dim, kind=kind
    ),
    grid=(groups, width // lanes),
    in_specs=[block] * len(inputs),
    out_specs=[block] * num_outputs,
    out_shape=[shape] * num_outputs,
    cost_estimate=pl.CostEstimate(
      flops=2 * num_products * batch * num_tokens**2 * width,
      bytes_accessed=num_bytes * (len(inputs) + num_outputs),
      transcendentals=batch * num_tokens**2 * (width // head_dim),
    ),
    compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_VMEM_BYTES),
    interpret=interpret,
    name="attention" if num_outputs == 1 else "attention_backward",
  )(*inputs)


def _forward_kernel(*refs, num_patches, head_dim, kind):
  """Attends in one group; refs of the inputs and the output."""
  *input_refs, output_ref = refs

  def attend_image(i):
    is_key = _is_key(refs[0], i, num_patches)
    inputs = [_load(ref, i, num_patches) for ref in input_refs]
    queries, keys, values = inputs[0], inputs[-2], inputs[-1]
    y = 0.0
    for head in _heads(refs[0], head_dim):
      head_keys = jnp.where(head, keys, 0)
      weights = _weights(queries, head_keys, head_dim, kind, is_key)
      head_values = jnp.where(head, values, 0)
      y += _product(weights.astype(values.dtype), head_values, 0, 0)
    _store(output_ref, y, i, num_patches)

  _for_each_image(attend_image)


def _backward_kernel(*refs, num_patches, head_dim, kind):
  """Differentiates one group; refs of the inputs, dy, and their gradients."""
  num_inputs = len(refs) // 2
  slope = (2.0 if kind == "l2" else 1.0) / math.sqrt(head_dim)

  def differentiate_image(i):
    is_key = _is_key(refs[0], i, num_patches)
    *inputs, dy = [_load(ref, i, num_patches) for ref in refs[: num_inputs + 1]]
    queries, keys, values = inputs[0], inputs[-2], inputs[-1]
    if is_key is not None:  # nor are the others' extra tokens queries
      dy = jnp.where(is_key, dy, 0)
    d_queries = d_keys = d_values = 0.0
    for head in _heads(refs[0], head_dim):
      head_keys = jnp.where(head, keys, 0)
      weights = _weights(queries, head_keys, head_dim, kind, is_key)
      head_dy = jnp.where(head, dy, 0)
      d_weights = _product(values, head_dy, 1, 1)
      mean = jnp.sum(weights * d_weights, axis=0, keepdims=True)
      d_logits = weights * (d_weights - mean) * slope
      d_values += _product(weights.astype(dy.dtype), head_dy, 1, 0)
      if kind == "l2":  # through -||k||^2
        d_keys -= head_keys * jnp.sum(d_logits, axis=1, keepdims=True)
      d_logits = d_logits.astype(keys.dtype)
      d_queries += _product(d_logits, head_keys, 0, 0)
      d_keys += _product(d_logits, jnp.where(head, queries, 0), 1, 0)
    gradients = [d_queries, d_keys, d_values]
    if num_inputs == 2:
      gradients = [d_queries + d_keys, d_values]
    for ref, gradient in zip(refs[num_inputs + 1 :], gradients):
      _store(ref, gradient, i, num_patches)

  _for_each_image(differentiate_image)


def _for_each_image(function):
  """Calls a function with 0 to GROUP_SIZE - 1."""

  def body(i, carry):
    for j in range(_UNROLL):
      function(i * _UNROLL + j)
    return carry

  lax.fori_loop(0, GROUP_SIZE // _UNROLL, body, 0)


def _weights(queries, head_keys, head_dim, kind, is_key):
  """Returns attention weights of a head, float32 [keys, queries].

  Keys come first: sums over them are then sums over rows, which are cheap.
  """
  logits = _product(head_keys, queries, 1, 1)
  if kind == "l2":
    squares = jnp.square(head_keys.astype(jnp.float32))
    logits = 2.0 * logits - jnp.sum(squares, axis=1, keepdims=True)
  logits = logits / math.sqrt(head_dim)
  if is_key is not None:
    logits = jnp.where(is_key, logits, -jnp.inf)
  weights = jnp.exp(logits - jnp.max(logits, axis=0, keepdims=True))
  return weights * (1.0 / jnp.sum(weights, axis=0, keepdims=True))


def _product(a, b, a_axis, b_axis):
  dimensions = (((a_axis,), (b_axis,)), ((), ()))
  return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _lanes(width, head_dim):
  """Returns how many numbers of each token a program takes.

  Heads that fill whole registers, or else all of them.
  """
  lanes = math.lcm(head_dim, _LANES)
  return width if width % lanes else lanes


def _heads(ref, head_dim):
  """Returns a mask [1, lanes] for each head of a program.

  A head of 64 is half a register. Zeros in the other half cost nothing; to move
  it would.
  """
  lanes = ref.shape[-1]
  lane = lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
  return [
    (lane >= start) & (lane < start + head_dim)
    for start in range(0, lanes, head_dim)
  ]


def _load(ref, i, num_patches):
  """Returns patches of image i, and the extra tokens of its whole group."""
  start = pl.multiple_of(i * num_patches, num_patches)
  tokens = ref[0, pl.ds(start, num_patches)]
  if ref.shape[1] == GROUP_SIZE * num_patches:
    return tokens
  extra = ref[0, pl.ds(GROUP_SIZE * num_patches, GROUP_SIZE)]
  return jnp.concatenate([tokens, extra], axis=0)


def _store(ref, tokens, i, num_patches):
  """Writes what belongs to image i of what `_load` returned."""
  tokens = tokens.astype(ref.dtype)
  start = pl.multiple_of(i * num_patches, num_patches)
  ref[0, pl.ds(start, num_patches)] = tokens[:num_patches]
  if ref.shape[1] > GROUP_SIZE * num_patches:
    extra = (0, pl.ds(GROUP_SIZE * num_patches, GROUP_SIZE))
    row = lax.broadcasted_iota(jnp.int32, (GROUP_SIZE, 1), 0)
    ref[extra] = jnp.where(row == i, tokens[num_patches:], ref[extra])


def _is_key(ref, i, num_patches):
  """Returns which of what `_load` returns are of image i, [tokens, 1]."""
  if ref.shape[1] == GROUP_SIZE * num_patches:
    return None
  shape = (num_patches + GROUP_SIZE, 1)
  row = lax.broadcasted_iota(jnp.int32, shape, 0)
  return (row < num_patches) | (row == num_patches + i)
