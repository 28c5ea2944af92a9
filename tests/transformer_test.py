"""Tests of the transformer block and its attention, against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pytest

from tests.reference import (
  apply,
  attention_weights,
  dense,
  gelu,
  init_params,
  normal,
  standardise,
)
from vitgan_jax.kernels import UnsupportedError
from vitgan_jax.models.layers import LayerNorm, Norm, SelfModulatedLayerNorm
from vitgan_jax.models.transformer import (
  MultiHeadAttention,
  TransformerBlock,
  relative_entropy,
)


@pytest.mark.parametrize(
  "row, expected",
  [
    ([0.25] * 4, 1.0),
    ([0.5, 0.5, 0.0, 0.0], 0.5),
    ([0.0, 1.0, 0.0, 0.0], 0.0),
  ],
)
def test_relative_entropy_of_known_rows(row, expected):
  assert_allclose(relative_entropy(jnp.array(row)), expected, atol=1e-6)


def test_relative_entropy_is_the_mean_over_rows():
  rows = jnp.array([[[0.25] * 4, [0.0, 0.0, 0.0, 1.0]]])
  assert_allclose(relative_entropy(rows), 0.5, atol=1e-6)


def reference_attention(params, x, num_heads, kind, qk_gain=1.0):
  """Returns (output, attention weights) of one head after the other."""
  head_dim = x.shape[-1] // num_heads
  outputs, weights = [], []
  for head in range(num_heads):
    columns = slice(head * head_dim, (head + 1) * head_dim)
    queries = dense(params["query"], x, qk_gain)[..., columns]
    keys = queries
    if kind == "dot":
      keys = dense(params["key"], x, qk_gain)[..., columns]
    weights.append(attention_weights(queries, keys, kind))
    outputs.append(weights[-1] @ dense(params["value"], x)[..., columns])
  return dense(params["out"], np.concatenate(outputs, axis=-1)), weights


NORM = Norm(np.ones((1, 6)), np.zeros((1, 6)))  # without a scale or a shift
make_attention = functools.partial(
  MultiHeadAttention, num_heads=2, num_patches=4, kind="dot", conv=False
)


@pytest.mark.parametrize("kind", ["l2", "dot"])
def test_multi_head_attention_matches_loop_over_heads(kind):
  x = normal(2, 5, 6)
  module = make_attention(num_heads=3, kind=kind, qk_gain=0.5)
  params = init_params(module, x, NORM)
  (h, y, out), state = module.apply(
    {"params": params}, x, NORM, mutable="intermediates"
  )
  assert_array_equal(h, x)
  y = np.stack([out(tokens) for tokens in y])
  expected, weights = reference_attention(
    params, standardise(x), 3, kind, qk_gain=0.5
  )
  assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  sown = {name: y for name, (y,) in state["intermediates"].items()}
  assert_allclose(
    sown["attention_weights"], np.stack(weights, 1), rtol=1e-4, atol=1e-5
  )
  entropy = -np.sum(weights * np.log(weights), axis=-1).mean() / np.log(5)
  assert_allclose(sown["attention_entropy"], entropy, rtol=1e-4)


def test_kernel_shows_no_attention_weights():
  module = make_attention(num_patches=16, implementation="interpret")
  x = normal(16, 16, 6)
  variables = jax.eval_shape(module.init, jax.random.key(0), x, NORM)
  _, state = jax.eval_shape(
    lambda v: module.apply(v, x, NORM, mutable="intermediates"), variables
  )
  assert not state


def test_convolutional_projections_have_no_kernel():
  module = make_attention(conv=True, implementation="interpret")
  with pytest.raises(UnsupportedError, match="convolutional projections"):
    jax.eval_shape(module.init, jax.random.key(0), normal(16, 16, 6), NORM)


@pytest.mark.parametrize("conv", [False, True])
def test_only_l2_attention_ties_query_and_key(conv):
  def parameters(kind):
    module = make_attention(kind=kind, conv=conv)
    variables = jax.eval_shape(
      module.init, jax.random.key(0), normal(1, 4, 6), NORM
    )
    return set(variables["params"])

  assert parameters("l2") == {"query", "value", "out"}
  assert parameters("dot") == {"query", "key", "value", "out"}


def test_convolution_that_sees_only_its_centre_is_the_dense_projection():
  x, width = normal(2, 5, 6), 6  # a 2 x 2 grid and an extra token
  modules = [make_attention(conv=conv) for conv in (False, True)]
  params = init_params(modules[0], x, NORM)
  conv_params = dict(params)
  for name in ("query", "key", "value"):
    kernel = np.zeros((3, 3, width, width), np.float32)
    # The scales are 1 / sqrt(width) and 1 / sqrt(9 width).
    kernel[1, 1] = 3.0 * params[name]["kernel"]
    conv_params[name] = {**params[name], "kernel": kernel}
  _, expected, _ = apply(modules[0], params, x, NORM)
  _, y, _ = apply(modules[1], conv_params, x, NORM)
  assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def reference_norm(params, h, w=None):
  if w is None:
    return standardise(h) * params["scale"] + params["bias"]
  modulation = dense(params["modulation"], w)[:, None]
  gamma, beta = np.split(modulation, 2, axis=-1)
  return gamma * standardise(h) + beta


def reference_block(params, h, *w):
  y = reference_norm(params["norm_attention"], h, *w)
  h = h + reference_attention(params["attention"], y, 2, "l2")[0]
  y = dense(params["mlp_in"], reference_norm(params["norm_mlp"], h, *w))
  return h + dense(params["mlp_out"], gelu(y))


NORMS = pytest.mark.parametrize(
  "norm, w", [(LayerNorm, ()), (SelfModulatedLayerNorm, (normal(2, 3),))]
)
make_block = functools.partial(
  TransformerBlock,
  mlp_dim=10,
  attention=dict(
    num_heads=2, num_patches=4, kind="l2", conv=False, qk_gain=1.0
  ),
)


@NORMS
def test_block_matches_numpy(norm, w):
  h = 3.0 + 2.0 * normal(2, 5, 6)
  params = init_params(make_block(norm), h, *w)
  expected = reference_block(params, h, *w)
  y = apply(make_block(norm), params, h, *w)
  assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@NORMS
def test_block_without_its_branches_is_the_identity(norm, w):
  h = 3.0 + 2.0 * normal(2, 5, 6)
  params = init_params(make_block(norm), h, *w)
  for layer in (params["attention"]["out"], params["mlp_out"]):
    layer.update(jax.tree.map(np.zeros_like, layer))
  assert_array_equal(apply(make_block(norm), params, h, *w), h)


def test_block_adds_its_mlp_branch():
  h = normal(2, 5, 6)
  params = init_params(make_block(LayerNorm), h)
  before = apply(make_block(LayerNorm), params, h)
  params["mlp_out"]["bias"] += 1.0
  after = apply(make_block(LayerNorm), params, h)
  assert_allclose(after - before, 1.0, rtol=1e-5)
