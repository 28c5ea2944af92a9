"""Latents to w: what stands before a generator's synthesis."""

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from vitgan_jax.models.layers import Dense, leaky_relu


def normalise_second_moment(x):
  """Scales each row of x [B, W] to a mean square of 1."""
  return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-8)


class MappingNetwork(nn.Module):
  """Normalises z and maps it to w by an MLP with equalized learning rate.

  Every layer ends in a leaky ReLU with gain sqrt(2). Without the gain w shrinks
  from layer to layer, the images hardly depend on z, and training ends at one
  image for all latents. A class is embedded, normalised, and stands beside z
  (Karras et al. 2020, ADA code).

  Attributes:
    width: of z and w.
    depth: number of layers.
    lr_multiplier: their relative learning rate.
    num_classes: 0 is none.
  """

  width: int
  depth: int
  lr_multiplier: float
  num_classes: int = 0

  @nn.compact
  def __call__(self, latents, labels=None):
    """Maps z [B, width], labels [B], or both, to w [B, width], float32."""
    inputs = [] if latents is None else [latents]
    if self.num_classes:
      one_hot = jax.nn.one_hot(labels, self.num_classes)
      inputs.append(Dense(self.width, name="class_embedding")(one_hot))
    w = jnp.concatenate([normalise_second_moment(x) for x in inputs], axis=-1)
    for i in range(self.depth):
      layer = Dense(
        self.width, lr_multiplier=self.lr_multiplier, name=f"dense{i}"
      )
      w = leaky_relu(layer(w))
    return w


class LatentGenerator(nn.Module):
  """A generator of two parts, `mapping` and `synthesize`, as all are."""

  def __call__(self, latents, labels=None, keys=None, train=False):
    """Maps latents [B, latent_dim] to images; see `synthesize`."""
    return self.synthesize(self.mapping(latents, labels), keys, train)


class MappedGenerator(LatentGenerator):
  """A generator whose `mapping` is a `MappingNetwork`.

  Of the class's own attributes it takes `latent_dim`, `mapping_depth`,
  `mapping_lr_multiplier` and `num_classes`.
  """

  def setup(self):
    """Makes what is used by itself; `synthesize` makes the rest."""
    self.mapping = MappingNetwork(
      self.latent_dim,
      self.mapping_depth,
      self.mapping_lr_multiplier,
      self.num_classes,
    )
