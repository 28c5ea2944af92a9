"""Functions of rows, as one Pallas TPU kernel each, forward and backward.

Between the attentions all that a transformer does is done to each token, a row,
by itself: norms, dense layers, activations, skips. Such a function is written
once, of plain JAX operations, and `apply_rows` runs it in one of two ways:

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
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from vitgan_jax.kernels import UnsupportedError

_VMEM_BYTES = 100 * 2**20  # of a program, of 128 MB
_REGISTER_ROWS = 16  # of bfloat16


def apply_rows(
  function,
  x,
  *others,
  implementation="xla",
  max_rows=512,
  unit=1,
  split=None,
  **shared,
):
  """Applies a function of rows.

  A kernel takes the rows of one device: a batch that several share is split by
  `jax.shard_map(check_vma=False)`, inside of `jax.jit`. It has no second
  derivative: gradient penalties take the plain form.

  Args:
    function: called as `function(x, *others, **shared)`, of arrays of two
      dimensions; returns a pytree of arrays of rows. It computes in the type
      of x, which in the kernel is float32: see `layers.Linear`.
    x: [..., R, D].
    *others: pytrees of arrays [..., R', D'] that go along with the rows of x:
      fewer than x has, where one of theirs goes with several; a single one goes
      with all.
    implementation: "xla", "pallas" or "interpret".
    max_rows: at a time, in the kernel: more make it faster and its code longer.
    unit: rows that belong together: a kernel takes a whole number of units, and
      one at least.
    split: (name, n): what the rows of shared[name] give are columns of the
      result, side by side, and a kernel takes n of them: its code has them all,
      one after the other.
    **shared: pytrees of float32 arrays that all rows share.

  Returns:
    The pytree of arrays [..., R'', D''] of x's type, where R'' is R if the
    function returns as many rows as x has.

  Raises:
    UnsupportedError: if no kernel fits.
  """
  rows, others = jax.tree.map(_as_rows, (x, others))
  if implementation == "xla":
    y = function(rows, *others, **shared)
  elif split is not None and len(shared[split[0]]) > split[1]:
    name, size = split
    parts = [
      shared[name][i : i + size] for i in range(0, len(shared[name]), size)
    ]
    columns = [
      apply_rows(
        function,
        rows,
        *others,
        implementation=implementation,
        max_rows=max_rows,
        unit=unit,
        **{**shared, name: part},
      )
      for part in parts
    ]
    y = jax.tree.map(lambda *y: jnp.concatenate(y, axis=-1), *columns)
  else:
    is_interpreted = implementation == "interpret"
    y = _run(function, rows, others, shared, max_rows, unit, is_interpreted)
  return jax.tree.map(
    lambda y: y.astype(x.dtype).reshape(*x.shape[:-2], -1, y.shape[-1]), y
  )


class _Function(NamedTuple):
  """A function of rows with what does not change from call to call."""

  function: Any
  others: Any  # structure of the pytree
  is_shared: tuple  # of each of its leaves, whether all rows share it
  interpret: bool

  @property
  def name(self):
    return self.function.__name__.strip("_")

  def __call__(self, tiled, shared):
    """Returns the function of one tile, float32."""
    x, *tiled_leaves = tiled
    shared_leaves, shared = shared
    leaves = [iter(tiled_leaves), iter(shared_leaves)]
    others = jax.tree.unflatten(
      self.others, [next(leaves[is_shared]) for is_shared in self.is_shared]
    )
    y = self.function(x, *others, **shared)
    return jax.tree.map(lambda y: y.astype(jnp.float32), y)


def _run(function, x, others, shared, max_rows, unit, interpret):
  """Runs a function of rows as a kernel; see `apply_rows`."""
  leaves, structure = jax.tree.flatten(others)
  is_shared = tuple(len(leaf) == 1 for leaf in leaves)
  tiled = [x, *(y for y, s in zip(leaves, is_shared) if not s)]
  shared = [y for y, s in zip(leaves, is_shared) if s], shared
  num_tiles = _num_tiles(tiled, shared, max_rows, unit)
  tiles = [y.reshape(num_tiles, -1, y.shape[-1]) for y in tiled]
  # Registers have two dimensions.
  shared = jax.tree.map(jnp.atleast_2d, shared)
  fused = _Function(function, structure, is_shared, interpret)
  return jax.tree.map(_as_rows, _apply(fused, tiles, shared))


def _as_rows(x):
  return x.reshape(-1, x.shape[-1])


def _num_tiles(tiled, shared, max_rows, unit=1):
  """Returns into how many tiles the rows fall.

  All arrays of rows must fall into as many.

  Raises:
    UnsupportedError: if they fall into none.
  """
  num_rows = len(tiled[0])
  divisor = math.gcd(*(len(x) for x in tiled))
  shared = jax.tree.leaves(shared)
  # Of float32 numbers: weights, once; their gradients, twice; rows that come in
  # or their gradients, three times; and about eight arrays between.
  memory = _VMEM_BYTES // 4 - 3 * sum(x.size for x in shared)
  between = max((x.shape[-1] for x in shared), default=tiled[0].shape[-1])
  row = 3 * sum(x.shape[-1] for x in tiled) + 8 * between
  max_rows = min(max(max_rows, unit), memory // row)
  multiple = math.lcm(unit, _REGISTER_ROWS)
  for num_tiles in range(1, divisor + 1):
    size = num_rows // num_tiles
    if size <= max_rows and not (divisor % num_tiles or size % multiple):
      return num_tiles
  raise UnsupportedError(
    f"{num_rows} rows fall into no tiles of at most {max_rows} rows, in "
    f"multiples of {multiple}"
    if max_rows >= multiple
    else "the weights do not fit the chip's memory"
    if max_rows < _REGISTER_ROWS
    else f"{unit} rows that belong together do not fit the chip's memory"
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(fused, tiled, shared):
  """Applies a _Function to tiles [tiles, rows, D]."""

  def kernel(tiled, shared, y):
    _write(y, fused(_tile(tiled), _whole(shared)))

  tile = jax.eval_shape(lambda t, s: fused(_tile(t), s), tiled, shared)
  shapes = jax.tree.map(
    lambda y: jax.ShapeDtypeStruct((len(tiled[0]), *y.shape), tiled[0].dtype),
    tile,
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
    lambda x: jnp.zeros_like(x) if isinstance(x, SymbolicZero) else x, dy
  )
  shapes = _shapes_of(tiled)
  if is_trained is None:

    def kernel(tiled, shared, dy, d_tiled):
      shared = _whole(shared)
      _, vjp = jax.vjp(lambda tiled: fused(tiled, shared), _tile(tiled))
      _write(d_tiled, *vjp(_tile(dy)))

    name = f"{fused.name}_backward_of_rows"
    return *_call(fused, kernel, name, (tiled, shared, dy), (shapes,)), None

  def kernel(tiled, shared, dy, d_tiled, d_shared):
    _, vjp = jax.vjp(fused, _tile(tiled), _whole(shared))
    rows_gradient, shared_gradient = vjp(_tile(dy))
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


def _tile(refs):
  """Reads the tile of a program from a pytree of arrays or references."""
  return jax.tree.map(lambda ref: ref[0].astype(jnp.float32), refs)


def _whole(refs):
  return jax.tree.map(lambda ref: ref[...], refs)


def _write(refs, tile):
  for ref, x in zip(jax.tree.leaves(refs), jax.tree.leaves(tile)):
    ref[0] = x.astype(ref.dtype)


def _shapes_of(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
