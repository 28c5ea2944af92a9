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


def gelu(x):
  return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def leaves(tree):
  return traverse_util.flatten_dict(tree, sep="/")
