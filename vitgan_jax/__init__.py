"""ViTGAN: Training GANs with Vision Transformers (arXiv 2107.04589) in JAX."""

__version__ = "0.1.0"


def load(path):
  """Opens a run, or what `vitgan_jax.export` made of one, to sample from it.

  Args:
    path: folder of a run, or of an export in the format safetensors.

  Returns:
    A `trained.TrainedGenerator`, the moving average of the run's generator:
    `load("runs/digits").sample(64)` is uint8 [64, 16, 16, 3].

  Raises:
    vitgan_jax.errors.ConfigError: if it is neither, or is damaged.
  """
  from vitgan_jax import trained  # late: the package itself imports nothing

  return trained.load(path)
