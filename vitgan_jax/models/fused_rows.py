"""Functions of rows, as one Pallas TPU kernel each, forward and backward.

Between the attentions all that a transformer does is done to each token, a row,
by itself: norms, dense layers, activations, skips. Such a function is written
once, of plain JAX operations, and `apply` runs it in one of two ways:

- on any device, as it stands;
- on TPUs, as one kernel that takes some rows at a time through the whole of it,
  with all weights and all that lies between its inputs and its outputs in VMEM;
  backward, the kernel computes the function again and differentiates it by
  `jax.vjp`. XLA, which sees a matrix product at a time, writes what lies
  between, the hidden layer of an MLP say, to memory and reads it again.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import PartitionSpec

_VMEM_BYTES = 100 * 2**20  # of a program, of 128 MB
_REGISTER_ROWS = 16  # of bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def dense(x, kernel, bias, dtype, result_dtype):
  """Returns `x @ kernel + bias`, [R, out].

  Gradients of kernel and bias are float32 whatever the dtypes: they are sums
  over all rows, and then over all devices.

  Args:
    x: [R, in].
    kernel: [in, out], float32.
    bias: [out] or [1, out], float32, or None.
    dtype: of the factors of the matrix products.
    result_dtype: of their sums, and so of the result and of the gradient of x.
  """
  y = _dot(x, kernel, 1, 0, dtype, result_dtype)
  return y if bias is None else y + bias.astype(y.dtype)


def _dense_forward(x, kernel, bias, dtype, result_dtype):
  return dense(x, kernel, bias, dtype, result_dtype), (x, kernel, bias)


def _dense_backward(dtype, result_dtype, inputs, dy):
  x, kernel, bias = inputs
  dx = _dot(dy, kernel, 1, 1, dtype, result_dtype).astype(x.dtype)
  d_kernel = _dot(x, dy, 0, 0, dtype, jnp.float32)
  if bias is None:
    return dx, d_kernel, None
  d_bias = jnp.sum(dy.astype(jnp.float32), axis=0)
  return dx, d_kernel, d_bias.reshape(bias.shape)


dense.defvjp(_dense_forward, _dense_backward)


def _dot(a, b, a_axis, b_axis, dtype, result_dtype):
  dimensions = (((a_axis,), (b_axis,)), ((), ()))
  return lax.dot_general(
    a.astype(dtype),
    b.astype(dtype),
    dimensions,
    preferred_element_type=result_dtype,
  )


class _Function(NamedTuple):
  """A function of rows with what does not change from call to call."""

  function: Any
  dtype: Any
  interpret: bool

  @property
  def name(self):
    return self.function.__name__.strip("_")

  def __call__(self, tiled, shared):
    """Returns the function of one tile; float32 between matrix products."""
    layer = functools.partial(dense, dtype=self.dtype, result_dtype=jnp.float32)
    x, rows = tiled
    y = self.function(layer, x, **rows, **shared)
    return jax.tree.map(lambda y: y.astype(jnp.float32), y)


def apply(
  function,
  x,
  rows,
  shared,
  *,
  dtype,
  mesh=None,
  max_rows=512,
  interpret=False,
):
  """Applies a function of rows.

  As a kernel it has no second derivative, gradient penalties take the plain
  way, and a first one under `jax.jit` only.

  Args:
    function: called as `function(layer, x, **rows, **shared)`, where `layer` is
      `dense` without its dtypes; returns a pytree of arrays of rows.
    x: [..., R, D].
    rows: {name: [..., D']}, other arrays of rows; fewer than x has, if one of
      them goes with several.
    shared: {name: pytree of float32 arrays}, what all rows share.
    dtype: of the results, and of the factors of matrix products.
    mesh: TPU devices among which the rows are divided, for the kernel; None is
      the plain way. It is taken as well where the kernel would not fit.
    max_rows: at a time, in the kernel: more make it faster and its code longer.
    interpret: runs the kernel as ordinary operations, on any device.

  Returns:
    The pytree of arrays [..., R', D''], where R' is R if the function returns
    as many rows as x has.
  """
  leading = x.shape[:-2]
  tiled = jax.tree.map(_as_rows, (x, rows))
  num_tiles = mesh and _num_tiles(tiled, shared, mesh.size, max_rows)
  if not num_tiles:
    layer = functools.partial(dense, dtype=dtype, result_dtype=dtype)
    x, rows = tiled
    y = function(layer, x, **rows, **shared)
  else:
    fused = _Function(function, dtype, interpret)

    def local(tiled, shared):
      tiles = jax.tree.map(
        lambda x: x.reshape(num_tiles, -1, x.shape[-1]), tiled
      )
      # Registers have two dimensions.
      shared = jax.tree.map(jnp.atleast_2d, shared)
      return jax.tree.map(_as_rows, _apply(fused, tiles, shared))

    spec = PartitionSpec(mesh.axis_names)
    y = jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(spec, PartitionSpec()),
      out_specs=spec,
      check_vma=False,
    )(tiled, shared)
  return jax.tree.map(
    lambda y: y.astype(dtype).reshape(*leading, -1, y.shape[-1]), y
  )


def _as_rows(x):
  return x.reshape(-1, x.shape[-1])


def _num_tiles(tiled, shared, num_devices, max_rows):
  """Returns into how many tiles the rows of a device fall; None if into none.

  All arrays of rows must fall into as many.
  """
  num_rows = len(tiled[0]) // num_devices
  divisor = math.gcd(*(len(x) for x in jax.tree.leaves(tiled)))
  if divisor % num_devices:
    return None
  divisor //= num_devices
  shared = jax.tree.leaves(shared)
  # Weights, once; their gradients, twice; and about eight arrays between
  # inputs and outputs.
  width = max(x.shape[-1] for x in (tiled[0], *shared))
  memory = _VMEM_BYTES - 3 * 4 * sum(x.size for x in shared)
  max_rows = min(max_rows, memory // (8 * 4 * width))
  for num_tiles in range(1, divisor + 1):
    if divisor % num_tiles == 0 and num_rows // num_tiles <= max_rows:
      size = num_rows // num_tiles
      return num_tiles if size and size % _REGISTER_ROWS == 0 else None
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(fused, tiled, shared):
  """Applies a _Function to tiles [tiles, rows, D]."""

  def kernel(tiled, shared, y):
    _write(y, fused(_tile(tiled), _whole(shared)))

  tile = jax.eval_shape(lambda t, s: fused(_tile(t), s), tiled, shared)
  shapes = jax.tree.map(
    lambda y: jax.ShapeDtypeStruct((len(tiled[0]), *y.shape), fused.dtype), tile
  )
  return _call(fused, kernel, fused.name, (tiled, shared), (shapes,))[0]


def _apply_forward(fused, tiled, shared):
  is_trained = any(x.perturbed for x in jax.tree.leaves(shared))
  tiled, shared = jax.tree.map(lambda x: x.value, (tiled, shared))
  # Whether the gradient of what is shared is asked for must be static.
  residuals = (tiled, shared, () if is_trained else None)
  return _apply(fused, tiled, shared), residuals


def _apply_backward(fused, residuals, dy):
  tiled, shared, is_trained = residuals
  dy = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype) if _is_zero(x) else x,
    dy,
    is_leaf=_is_zero,
  )
  shapes = _shapes_of(tiled)
  if is_trained is None:

    def kernel(tiled, shared, dy, d_tiled):
      shared = _whole(shared)
      _, vjp = jax.vjp(lambda tiled: fused(tiled, shared), _tile(tiled))
      _write(d_tiled, *vjp(_tile(dy, jnp.float32)))

    name = f"{fused.name}_backward_of_rows"
    return *_call(fused, kernel, name, (tiled, shared, dy), (shapes,)), None

  def kernel(tiled, shared, dy, d_tiled, d_shared):
    _, vjp = jax.vjp(fused, _tile(tiled), _whole(shared))
    rows_gradient, shared_gradient = vjp(_tile(dy, jnp.float32))
    _write(d_tiled, rows_gradient)

    @pl.when(pl.program_id(0) == 0)
    def _():
      for ref in jax.tree.leaves(d_shared):
        ref[...] = jnp.zeros_like(ref)

    for ref, x in zip(*map(jax.tree.leaves, (d_shared, shared_gradient))):
      ref[...] += x

  shapes = (shapes, _shapes_of(shared))
  name = f"{fused.name}_backward"
  return tuple(_call(fused, kernel, name, (tiled, shared, dy), shapes))


_apply.defvjp(_apply_forward, _apply_backward, symbolic_zeros=True)


def _call(fused, kernel, name, inputs, output_shapes):
  """Calls a kernel once for each tile.

  Args:
    fused: the _Function.
    kernel: called with references to inputs and outputs.
    name: of the kernel.
    inputs: (tiled, shared, *tiled).
    output_shapes: (of tiled, of shared if there are such).

  Returns:
    The outputs.
  """

  def specs(is_shared, tree):
    def spec(x):
      if is_shared:  # one block, that stays in VMEM
        return pl.BlockSpec(x.shape, lambda i: (0,) * len(x.shape))
      return pl.BlockSpec((1, *x.shape[1:]), lambda i: (i, 0, 0))

    return jax.tree.map(spec, tree)

  return pl.pallas_call(
    kernel,
    grid=(len(inputs[0][0]),),
    in_specs=[specs(i == 1, x) for i, x in enumerate(inputs)],
    out_specs=[specs(i == 1, x) for i, x in enumerate(output_shapes)],
    out_shape=output_shapes,
    compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_VMEM_BYTES),
    interpret=fused.interpret,
    name=name,
  )(*inputs)


def _tile(refs, dtype=None):
  """Reads the tile of a program from a pytree of arrays or references."""
  return jax.tree.map(lambda ref: ref[0].astype(dtype or ref.dtype), refs)


def _whole(refs):
  return jax.tree.map(lambda ref: ref[...], refs)


def _write(refs, tile):
  for ref, x in zip(jax.tree.leaves(refs), jax.tree.leaves(tile)):
    ref[0] = x.astype(ref.dtype)


def _shapes_of(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _is_zero(x):
  return isinstance(x, SymbolicZero)
