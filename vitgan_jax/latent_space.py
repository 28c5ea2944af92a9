"""Where the w of a generator are: how far from their mean, and which way.

What projections begin with, what films go along, and the page's directions.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage
from sklearn.decomposition import PCA

from vitgan_jax import sample
from vitgan_jax.models import networks

_NUM_LATENTS = 10_000  # as in StyleGAN


def has_mapping_network(nets, variables):
  """Tells whether w is another thing than the latent, beside the class."""
  latents = jax.random.normal(jax.random.key(0), (2, nets.generator.latent_dim))
  w = nets.generator.apply(
    variables, latents, _labels(nets.generator, 2), method=sample.mapping
  )
  return w.ndim > 2 or not np.array_equal(w[:, : latents.shape[1]], latents)


def deviations(nets, variables):
  """Returns how far w of some latents are from their mean, numpy [N, ...].

  With classes, which come in turn, each from the mean of its own.

  Args:
    nets: Networks.
    variables: of the averaged generator.
  """
  generator = networks.plain(nets.generator)
  labels = _labels(generator, _NUM_LATENTS)

  @jax.jit
  def draw(variables, mean):
    shape = (_NUM_LATENTS, generator.latent_dim)
    latents = jax.random.normal(jax.random.key(0), shape)
    w = generator.apply(variables, latents, labels, method=sample.mapping)
    return w - (mean if labels is None else mean[labels])

  return np.asarray(draw(variables, sample.mean_w(nets, variables)))


def directions(nets, variables, count):
  """Returns the principal directions of w [count, ...] (GANSpace).

  The first is that along which w varies most; each is as long as one standard
  deviation. Härkönen et al. 2020, section 2.2.

  Args:
    nets: Networks, whose generator has a mapping network.
    variables: of the averaged generator.
    count: how many; the numbers in a w, if those are fewer.
  """
  w = deviations(nets, variables)
  flat = w.reshape(len(w), -1)
  pca = PCA(min(count, flat.shape[1]), svd_solver="covariance_eigh").fit(flat)
  found = pca.components_ * np.sqrt(pca.explained_variance_)[:, None]
  return found.reshape(-1, *w.shape[1:])


def loops(seed, num_frames, count, latent_dim, sigma):
  """Returns latents that come back to where they began, [frames, count, Z].

  White noise in time, smoothed by a Gaussian that goes around the end, as in
  the videos of Karras et al. 2018; then each of length sqrt(Z), as most latents
  are.

  Args:
    seed: of the noise.
    num_frames: of a round.
    count: how many go around, each by itself.
    latent_dim: Z.
    sigma: of the Gaussian, in frames; at most an eighth of the round is taken,
      or a short one would hardly move.
  """
  noise = np.random.default_rng(seed).normal(
    size=(num_frames, count, latent_dim)
  )
  sigma = min(sigma, num_frames / 8)
  latents = ndimage.gaussian_filter1d(noise, sigma, axis=0, mode="wrap")
  latents /= np.sqrt(np.mean(latents**2, axis=-1, keepdims=True))
  return latents.astype(np.float32)


def _labels(generator, count):
  return sample.labels_of(generator, jnp.arange(count))
