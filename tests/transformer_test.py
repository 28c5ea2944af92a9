"""Tests of attention and of the transformer block, against loops in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pytest
from vitgan_jax.models.attention import (
  MultiHeadAttention,
  TransformerBlock,
  attention_weights,
  relative_entropy,
)

from tests.reference import apply, gelu, init_params, normal, standardise
from vitgan_jax.models.layers import LayerNorm, SelfModulatedLayerNorm


def naive_weights(queries, keys, kind):
  """Returns attention weights [B, N, M], one float64 logit at a time."""
  queries, keys = np.asarray(queries, float), np.asarray(keys, float)
  logits = np.empty((*queries.shape[:2], keys.shape[1]))
  for b, i, j in np.ndindex(logits.shape):
    q, k = queries[b, i], keys[b, j]
    similarity = -np.sum((q - k) ** 2) if kind == "l2" else np.sum(q * k)
    logits[b, i, j] = similarity / np.sqrt(len(q))
  weights = np.exp(logits)
  return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("kind", ["l2", "dot"])
def test_weights_match_loops(kind):
  queries, keys = normal(2, 5, 8), normal(2, 6, 8, seed=1)
  weights = attention_weights(queries, keys, kind)
  expected = naive_weights(queries, keys, kind)
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
  expected = naive_weights(tokens[:1], tokens[1:], kind)
  assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)


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


def dense(params, x, gain=1.0):
  kernel = params["kernel"]
  return x @ kernel * gain / np.sqrt(len(kernel)) + params.get("bias", 0.0)


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
    weights.append(naive_weights(queries, keys, kind))
    outputs.append(weights[-1] @ dense(params["value"], x)[..., columns])
  return dense(params["out"], np.concatenate(outputs, axis=-1)), weights


# Of width 6, without a scale or a shift.
NORM = ({}, {"scale": np.ones((1, 6)), "shift": np.zeros((1, 6))})


@pytest.mark.parametrize("kind", ["l2", "dot"])
def test_multi_head_attention_matches_loop_over_heads(kind):
  x = normal(2, 5, 6)
  module = MultiHeadAttention(num_heads=3, kind=kind, conv=False, qk_gain=0.5)
  params = init_params(module, x, *NORM)
  (_, y, out), state = module.apply(
    {"params": params}, x, *NORM, mutable="intermediates"
  )
  y = y @ out[0] + out[1]
  expected, weights = reference_attention(
    params, standardise(x), 3, kind, qk_gain=0.5
  )
  assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  entropy = -np.sum(weights * np.log(weights), axis=-1).mean() / np.log(5)
  (sown,) = state["intermediates"]["attention_entropy"]
  assert_allclose(sown, entropy, rtol=1e-4)


@pytest.mark.parametrize("conv", [False, True])
def test_only_l2_attention_ties_query_and_key(conv):
  def parameters(kind):
    module = MultiHeadAttention(num_heads=2, kind=kind, conv=conv)
    variables = jax.eval_shape(
      module.init, jax.random.key(0), normal(1, 4, 6), *NORM
    )
    return set(variables["params"])

  assert parameters("l2") == {"query", "value", "out"}
  assert parameters("dot") == {"query", "key", "value", "out"}


def test_convolution_that_sees_only_its_centre_is_the_dense_projection():
  x, width = normal(2, 5, 6), 6  # a 2 x 2 grid and a leading token
  modules = [
    MultiHeadAttention(num_heads=2, kind="dot", conv=conv)
    for conv in (False, True)
  ]
  params = init_params(modules[0], x, *NORM)
  conv_params = dict(params)
  for name in ("query", "key", "value"):
    kernel = np.zeros((3, 3, width, width), np.float32)
    # The scales are 1 / sqrt(width) and 1 / sqrt(9 width).
    kernel[1, 1] = 3.0 * params[name]["kernel"]
    conv_params[name] = {**params[name], "kernel": kernel}
  _, expected, _ = apply(modules[0], params, x, *NORM)
  _, y, _ = apply(modules[1], conv_params, x, *NORM)
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
  attention=dict(num_heads=2, kind="l2", conv=False),
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
