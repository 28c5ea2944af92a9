"""Improved spectral normalisation (ViTGAN, section 3.2) as Linen state.

The kernel W of a layer is replaced by `sigma(W_init) * W / sigma(W)`, where
`sigma` is the largest singular value. The power-iteration vector `u` and the
constant `sigma_init` live in the variable collection `spectral`, so both are
in every checkpoint: a resumed run that took sigma_init anew would normalise to
another norm.
"""

import functools

from flax import linen as nn
from jax import lax
import jax.numpy as jnp


def _unit(x):
  return x * lax.rsqrt(jnp.sum(x * x) + 1e-12)


def _product(a, b):
  # Default precision on a TPU would round both to bfloat16.
  return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def power_iteration(matrix, u):
  """Returns `u` [out], closer to the first right singular vector of a matrix.

  Args:
    matrix: [in, out], float32.
    u: [out], the estimate to start from.
  """
  return _unit(_product(matrix.T, _unit(_product(matrix, u))))


def leading_singular(matrix):
  """Returns (u, sigma) of a matrix [in, out], exact to float32.

  By the eigenvectors of the smaller Gram matrix: it compiles several times as
  fast as an SVD, and a cold u would under-estimate sigma by up to a third.
  """
  is_wide = matrix.shape[0] < matrix.shape[1]
  tall = matrix.T if is_wide else matrix
  eigenvalues, eigenvectors = jnp.linalg.eigh(_product(tall.T, tall))
  leading = eigenvectors[:, -1]
  u = _unit(_product(matrix.T, leading)) if is_wide else leading
  return u, jnp.sqrt(eigenvalues[-1])


def spectral_sigma(matrix, u):
  """Returns the largest singular value of a matrix, as `u` shows it.

  The gradient flows through `matrix` only: v and u count as constants (Miyato
  et al. 2018, equation 12), which makes it `outer(v, u)`.

  Args:
    matrix: [in, out], float32.
    u: [out], about its first right singular vector.
  """
  u = lax.stop_gradient(u)
  v = lax.stop_gradient(_unit(_product(matrix, u)))
  return jnp.vdot(v, _product(matrix, u))


class SpectralNorm(nn.Module):
  """Normalises one kernel; owns its `u` and `sigma_init`.

  `u` takes one step of power iteration in each call in which the collection
  `spectral` is mutable, and is read-only in every other call. The
  discriminator's step makes it mutable in exactly one call.

  Attributes:
    kind: "isn" (target norm sigma(W_init)), "sn" (target norm 1) or "none".
  """

  kind: str

  @nn.compact
  def __call__(self, kernel):
    """Returns the normalised kernel, of the shape [..., in, out] it came in."""
    if self.kind == "none":
      return kernel
    matrix = kernel.reshape(-1, kernel.shape[-1]).astype(jnp.float32)
    leading = functools.cache(lambda: leading_singular(matrix))
    u = self.variable("spectral", "u", lambda: leading()[0])
    sigma_init = self.variable("spectral", "sigma_init", lambda: leading()[1])
    if self.is_mutable_collection("spectral") and not self.is_initializing():
      u.value = power_iteration(lax.stop_gradient(matrix), u.value)
    target = {"isn": sigma_init.value, "sn": 1.0}[self.kind]
    sigma = spectral_sigma(matrix, u.value)
    self.sow("intermediates", "sigma_growth", sigma / sigma_init.value)
    rank = jnp.sum(jnp.square(matrix)) / jnp.square(sigma)
    self.sow("intermediates", "stable_rank", rank / min(matrix.shape))
    return kernel * (target / sigma)
