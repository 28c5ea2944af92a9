"""Attention against loops in numpy, and its kernel, interpreted, against it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pytest

from tests import reference
from tests.reference import assert_close, normal
from vitgan_jax.kernels import UnsupportedError, attention
from vitgan_jax.kernels.attention import GROUP_SIZE, attend, attention_weights

BATCH = 2 * GROUP_SIZE
NUM_PATCHES = 16


@pytest.mark.parametrize("kind", ["l2", "dot"])
def test_weights_match_loops(kind):
  queries, keys = normal(2, 5, 8), normal(2, 6, 8, seed=1)
  weights = attention_weights(queries, keys, kind)
  expected = reference.attention_weights(queries, keys, kind)
  assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)


def test_l2_attention_is_strongest_to_the_nearest_token():
  tokens = normal(1, 20, 4)
  tokens[:, 10:] = tokens[:, :10] + 0.01 * normal(1, 10, 4, seed=1)
  weights = attention_weights(tokens, tokens, "l2")[0]
  assert_array_equal(np.argmax(weights, axis=-1), np.arange(20))
  nearest = np.argsort(weights, axis=-1)[:, -2]
  assert_array_equal(nearest, (np.arange(20) + 10) % 20)


@pytest.mark.parametrize("kind", ["l2", "dot"])
def test_logits_are_float32_under_bfloat16(kind):
  # Tokens far from the origin and near to each other: q . k is about 1,000,
  # where bfloat16 numbers lie 4 apart, and the logits differ by less than 10.
  rng = np.random.default_rng(0)
  tokens = 4.0 + rng.integers(-32, 33, size=(2, 6, 64)) / 32
  tokens = jnp.asarray(tokens, jnp.bfloat16)
  weights = attention_weights(tokens[:1], tokens[1:], kind)
  assert weights.dtype == jnp.float32
  expected = reference.attention_weights(tokens[:1], tokens[1:], kind)
  assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["l2", "dot"])
def test_heads_attend_each_by_itself(kind):
  queries, keys, values = normal(3, 2, 5, 6)
  y = attend(queries, keys, values, num_patches=5, num_heads=3, kind=kind)
  for head in (slice(0, 2), slice(2, 4), slice(4, 6)):
    weights = reference.attention_weights(
      queries[..., head], keys[..., head], kind
    )
    assert_allclose(y[..., head], weights @ values[..., head], atol=1e-5)


def test_group_has_all_patches_and_then_all_extras():
  patches, extra = normal(BATCH, 4, 3), normal(BATCH, 1, 3, seed=1)
  tokens = attention.pack(patches, extra, GROUP_SIZE)
  # Image 17 is the second of the second group.
  assert_array_equal(tokens[1, 4:8], patches[17])
  assert_array_equal(tokens[1, 16 * 4 + 1], extra[17, 0])
  # In a group of its own it is its patches and then its extra.
  tokens = attention.pack(patches, extra, 1)
  assert_array_equal(tokens, np.concatenate([patches, extra], axis=1))


@pytest.mark.parametrize("group", [1, GROUP_SIZE])
def test_unpacked_tokens_are_those_that_were_packed(group):
  patches, extra = normal(BATCH, 4, 3), normal(BATCH, 1, 3, seed=1)
  unpacked = attention.unpack(attention.pack(patches, extra, group), 4, group)
  assert_array_equal(unpacked[0], patches)
  assert_array_equal(unpacked[1], extra)


def attend_plainly(*inputs, **options):
  # Tied keys are the same array as the queries.
  return attend(
    inputs[0], inputs[-2], inputs[-1], num_patches=NUM_PATCHES, **options
  )


def attend_by_kernel(*inputs, **options):
  """Maps tokens [B, N, D], packed on the way if they have an extra one."""
  is_packed = inputs[0].shape[1] > NUM_PATCHES
  if is_packed:
    inputs = [attention.pack(x[:, :-1], x[:, -1:], GROUP_SIZE) for x in inputs]
  y = attend_plainly(*inputs, **options, implementation="interpret")
  if is_packed:
    y = jnp.concatenate(attention.unpack(y, NUM_PATCHES, GROUP_SIZE), axis=1)
  return y


def value_and_gradients(function, inputs, dy, **options):
  @jax.jit
  def run(*inputs):
    y, vjp = jax.vjp(functools.partial(function, **options), *inputs)
    return y, vjp(dy)

  return run(*inputs)


@pytest.mark.parametrize("kind, num_inputs", [("l2", 2), ("dot", 3)])
@pytest.mark.parametrize("num_extra", [0, 1])
# Heads of half a register, of a whole one, and a width that fills none.
@pytest.mark.parametrize("width, num_heads", [(256, 4), (128, 1), (48, 3)])
def test_kernel_is_plain_attention_with_its_gradients(
  kind, num_inputs, num_extra, width, num_heads
):
  shape = (num_inputs + 1, BATCH, NUM_PATCHES + num_extra, width)
  *inputs, dy = normal(*shape)
  if kind == "l2":  # of unit variance, each token would see itself alone
    inputs[0] *= 0.4
  args = inputs, dy
  options = dict(num_heads=num_heads, kind=kind)
  y, gradients = value_and_gradients(attend_by_kernel, *args, **options)
  expected, plain = value_and_gradients(attend_plainly, *args, **options)
  # Sums of up to 256 float32 products of size one, in another order.
  assert_close(y, expected, 2e-5)
  assert_close(gradients, plain, 5e-5)


def test_kernel_knows_l2_attention_to_other_keys_than_the_queries():
  queries, keys, values, dy = normal(4, BATCH, NUM_PATCHES, 48)
  args = (0.4 * queries, 0.4 * keys, values), dy
  options = dict(num_heads=3, kind="l2")
  actual = value_and_gradients(attend_by_kernel, *args, **options)
  expected = value_and_gradients(attend_plainly, *args, **options)
  assert_close(actual, expected, 5e-5)


def test_bfloat16_is_as_near_to_float32_as_the_plain_form():
  inputs = 0.4 * normal(2, BATCH, NUM_PATCHES, 128)
  options = dict(num_heads=2, kind="l2")
  exact = attend_plainly(*inputs, **options)
  errors = []
  for function in (attend_plainly, attend_by_kernel):
    y = function(*jnp.asarray(inputs, jnp.bfloat16), **options)
    assert y.dtype == jnp.bfloat16
    errors.append(np.abs(y.astype(jnp.float32) - exact).max())
  assert 0 < errors[1] < 1.5 * errors[0]


def attend_shapes(batch, num_patches, dtype):
  """Traces attention of ViT-S's width by the kernel."""
  tokens = jax.ShapeDtypeStruct((batch, num_patches, 384), dtype)
  return jax.eval_shape(
    functools.partial(
      attend,
      num_patches=num_patches,
      num_heads=6,
      kind="dot",
      implementation="interpret",
    ),
    *[tokens] * 3,
  )


@pytest.mark.parametrize(
  "num_patches, dtype", [(256, jnp.bfloat16), (64, jnp.float32)]
)
def test_kernel_takes_images_of_many_patches(num_patches, dtype):
  shape = attend_shapes(BATCH, num_patches, dtype).shape
  assert shape == (BATCH, num_patches, 384)


@pytest.mark.parametrize(
  "batch, num_patches, reason",
  [
    (BATCH - 1, 64, "31 images are not a multiple of 16"),
    (BATCH, 36, "36 tokens an image are not a multiple of 16"),
    (BATCH, 1024, "1024 tokens an image do not fit the chip's memory"),
  ],
)
def test_images_that_the_kernel_does_not_take_are_refused(
  batch, num_patches, reason
):
  with pytest.raises(UnsupportedError, match=reason):
    attend_shapes(batch, num_patches, jnp.bfloat16)
