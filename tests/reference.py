"""What several tests build on: random arrays, parameters, numpy layers."""

from flax import traverse_util
import jax
import numpy as np


def normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=shape).astype(np.float32)


def init_params(module, *args):
  """Returns parameters with noise on all, also on those that start at zero."""
  params = jax.jit(module.init)(jax.random.key(0), *args)["params"]
  return jax.tree.map(lambda p: np.asarray(p) + normal(*p.shape), params)


def apply(module, params, *args):
  return jax.jit(module.apply)({"params": params}, *args)


def standardise(x):
  variance = x.var(-1, keepdims=True)
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-6)


def dense(params, x, gain=1.0, lr_multiplier=1.0):
  """Returns what a dense layer of equalized learning rate makes of x."""
  scale = gain * lr_multiplier / np.sqrt(len(params["kernel"]))
  return x @ params["kernel"] * scale + params.get("bias", 0.0) * lr_multiplier


def gelu(x):
  return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def attention_weights(queries, keys, kind):
  """Returns attention weights [B, N, M], one float64 logit at a time."""
  queries, keys = np.asarray(queries, float), np.asarray(keys, float)
  logits = np.empty((*queries.shape[:2], keys.shape[1]))
  for b, i, j in np.ndindex(logits.shape):
    q, k = queries[b, i], keys[b, j]
    similarity = -np.sum((q - k) ** 2) if kind == "l2" else np.sum(q * k)
    logits[b, i, j] = similarity / np.sqrt(len(q))
  weights = np.exp(logits)
  return weights / weights.sum(axis=-1, keepdims=True)


def assert_close(actual, expected, atol):
  """Asserts that two pytrees are close, and no leaf of them constant."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    assert np.std(b) > 0.01
    np.testing.assert_allclose(a, b, atol=atol)


def leaves(tree):
  return traverse_util.flatten_dict(tree, sep="/")
