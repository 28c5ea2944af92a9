"""Functions of rows as kernels, interpreted, against their plain form."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from tests.reference import assert_close, normal
from vitgan_jax import partitioning
from vitgan_jax.kernels import UnsupportedError, rows
from vitgan_jax.kernels.rows import apply_rows
from vitgan_jax.models.layers import Linear

WIDTH, HIDDEN = 8, 24


def mlp(x, shift, first, second):
  """Takes one shift for several rows, and has two results."""
  y = x.reshape(len(shift), -1, WIDTH) + shift[:, None]
  y = jnp.tanh(first(y.reshape(x.shape)))
  return {"y": x + second(y), "square": y * y}


def weights(dtype=jnp.float32):
  return {
    "first": Linear(0.3 * normal(WIDTH, HIDDEN), normal(HIDDEN), dtype),
    "second": Linear(0.3 * normal(HIDDEN, WIDTH, seed=1), None, dtype),
  }


def apply(x, shift, weights, **options):
  return apply_rows(mlp, x, shift, **weights, **options)


interpret = functools.partial(apply, implementation="interpret")


def value_and_gradients(function, *args):
  """Returns f(*args) and the gradients of a weighted sum of it."""
  y, vjp = jax.vjp(jax.jit(function), *args)
  return y, vjp(jax.tree.map(lambda y: normal(*y.shape, seed=3), y))


# In one tile, in four, and in four that share their shift.
@pytest.mark.parametrize("num_shifts, max_rows", [(8, 512), (8, 32), (1, 32)])
def test_kernel_is_the_function_with_its_gradients(num_shifts, max_rows):
  args = normal(8, 16, WIDTH), normal(num_shifts, WIDTH, seed=2), weights()
  expected, gradients = value_and_gradients(apply, *args)
  assert expected["square"].shape == (8, 16, HIDDEN)
  y, kernel_gradients = value_and_gradients(
    functools.partial(interpret, max_rows=max_rows), *args
  )
  assert_close(y, expected, 1e-5)
  # Sums over 128 rows in another order.
  assert_close(kernel_gradients, gradients, 1e-4)


def test_kernel_takes_the_share_of_a_device():
  mesh = partitioning.create_mesh(jax.devices()[:2])
  args = normal(8, 16, WIDTH), normal(8, WIDTH, seed=2), weights()
  split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
  on_two = jax.shard_map(
    interpret,
    mesh=mesh,
    in_specs=(split, split, whole),
    out_specs=split,
    check_vma=False,
  )
  y, gradients = value_and_gradients(on_two, *args)
  expected, plain_gradients = value_and_gradients(apply, *args)
  assert_close(y, expected, 1e-5)
  assert_close(gradients, plain_gradients, 1e-4)


def pixels(x, colours, layer):
  return jnp.concatenate([layer(x * colour) for colour in colours], axis=-1)


def test_split_changes_the_number_of_kernels_alone():
  args = normal(2, 16, WIDTH), normal(5, WIDTH), weights()["first"]

  def run(x, colours, layer, split=None):
    return apply_rows(
      pixels,
      x,
      colours=colours,
      layer=layer,
      split=split,
      implementation="interpret",
    )

  in_parts = functools.partial(run, split=("colours", 2))
  assert str(jax.make_jaxpr(in_parts)(*args)).count("pallas_call[") == 3
  assert_close(
    value_and_gradients(in_parts, *args), value_and_gradients(run, *args), 1e-4
  )


def test_what_is_shared_has_a_gradient_only_if_it_is_asked_for():
  args = normal(2, 16, WIDTH), normal(2, WIDTH, seed=2), weights()

  def loss(*args):
    # Of one result alone: the other's gradient is a symbolic zero.
    return jnp.sum(jnp.sin(interpret(*args)["y"]))

  def names(argnums):
    text = str(jax.make_jaxpr(jax.grad(loss, argnums))(*args))
    return set(re.findall(r"mlp_backward\w*", text))

  assert names((0, 1)) == {"mlp_backward_of_rows"}
  assert names((0, 1, 2)) == {"mlp_backward"}
  alone = jax.jit(jax.grad(loss, (0, 1)))(*args)
  together = jax.jit(jax.grad(loss, (0, 1, 2)))(*args)
  assert_close(alone, together[:2], 1e-6)


def test_bfloat16_is_as_near_to_float32_as_the_plain_form():
  args = normal(4, 16, WIDTH), normal(4, WIDTH, seed=2)
  exact = apply(*args, weights())["y"]
  args = *(jnp.asarray(x, jnp.bfloat16) for x in args), weights(jnp.bfloat16)
  errors = []
  for function in (apply, interpret):
    y = jax.jit(function)(*args)["y"]
    assert y.dtype == jnp.bfloat16
    errors.append(np.abs(y.astype(jnp.float32) - exact).max())
  assert 0 < errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize(
  "num_rows, num_shifts, num_weights, num_tiles",
  [
    (2048, 2048, 1, 4),  # of 512 rows
    (2048, 4, 1, 4),
    (2080, 2080, 1, 5),  # of 416 rows
    (1040, 1040, 1, 5),  # of 208 rows: 260 would fill no registers
    (2048, 2048, 8000, 16),  # more weights: fewer rows
  ],
)
def test_tiles_are_as_few_as_fit(num_rows, num_shifts, num_weights, num_tiles):
  tiled = [np.zeros((num_rows, 384)), np.zeros((num_shifts, 384))]
  shared = {"w": jax.ShapeDtypeStruct((num_weights, 1024), jnp.float32)}
  assert rows._num_tiles(tiled, shared, 512) == num_tiles


@pytest.mark.parametrize(
  "num_rows, num_shifts, hidden, reason",
  [
    (2048, 2, 8, "2048 rows fall into no tiles of at most 512 rows"),
    (24, 24, 8, "24 rows fall into no tiles .* in multiples of 16"),
    (2048, 2048, 10**6, "the weights do not fit the chip's memory"),
  ],
)
def test_rows_that_no_kernel_takes_are_refused(
  num_rows, num_shifts, hidden, reason
):
  shapes = jax.eval_shape(
    lambda: (
      jnp.zeros((num_rows, WIDTH)),
      jnp.zeros((num_shifts, WIDTH)),
      {
        "first": Linear(jnp.zeros((WIDTH, hidden)), None),
        "second": Linear(jnp.zeros((hidden, WIDTH)), None),
      },
    )
  )
  with pytest.raises(UnsupportedError, match=reason):
    jax.eval_shape(interpret, *shapes)
