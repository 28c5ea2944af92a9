"""ViTGAN: Training GANs with Vision Transformers (arXiv 2107.04589) in JAX."""

__version__ = "0.1.0"
