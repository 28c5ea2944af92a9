"""Pixels as they are stored, uint8, and as networks have them, float32."""

import jax.numpy as jnp


def to_float(images):
  """Maps uint8 to float32 in [-1, 1]."""
  return images.astype(jnp.float32) * (2.0 / 255.0) - 1.0


def to_uint8(images):
  """Clips images in [-1, 1] and rounds them to uint8."""
  return jnp.rint((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)
