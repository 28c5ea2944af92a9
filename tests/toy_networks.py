"""A generator and a discriminator that no other file of the project knows.

The generator takes classes and drops out; the discriminator keeps statistics of
its batches.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from vitgan_jax.errors import check_fields
from vitgan_jax.models.kinds import Kind
from vitgan_jax.partitioning import BATCH_AXES


class Generator(nn.Module):
  image_size: int
  num_classes: int
  latent_dim: int
  dropout: float
  remat: bool = False
  dtype: Any = jnp.float32

  @staticmethod
  def check(fields, image_size, where):
    check_fields(fields, where, positive=("latent_dim",), shares=("dropout",))

  @nn.nowrap
  def mapping(self, latents, labels=None):
    one_hot = jax.nn.one_hot(labels, self.num_classes)
    return jnp.concatenate([latents, one_hot], axis=-1)

  @nn.compact
  def synthesize(self, w, keys=None, train=False):
    h = nn.relu(nn.Dense(16, name="hidden")(w))
    if train:
      kept = jax.vmap(
        lambda k: jax.random.bernoulli(k, 1 - self.dropout, (16,))
      )
      h = h * kept(keys)
    pixels = nn.Dense(3 * self.image_size**2, name="pixels")(h)
    return pixels.reshape(-1, self.image_size, self.image_size, 3)

  def __call__(self, latents, labels=None, keys=None, train=False):
    return self.synthesize(self.mapping(latents, labels), keys, train)


class Discriminator(nn.Module):
  image_size: int
  num_classes: int
  width: int
  remat: bool = False
  dtype: Any = jnp.float32

  @staticmethod
  def check(fields, image_size, where):
    check_fields(fields, where, positive=("width",))

  @nn.compact
  def __call__(self, images, labels=None, keys=None, train=False):
    x = nn.Dense(self.width)(images.reshape(len(images), -1))
    x = nn.BatchNorm(not train, momentum=0.9, axis_name=BATCH_AXES)(x)
    x = nn.relu(x) * nn.Embed(self.num_classes, self.width)(labels)
    return nn.Dense(1)(x)[:, 0]


GENERATOR = Kind(
  "tests.toy_networks:Generator",
  dict(latent_dim=8, dropout=0.1),
  dict(latent_dim=4),
)
DISCRIMINATOR = Kind(
  "tests.toy_networks:Discriminator", dict(width=32), dict(width=16)
)
