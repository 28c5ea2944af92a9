"""Class-conditional ViTGAN on CIFAR-10, 32 x 32.

    python -m vitgan_jax.main --config=configs/cifar10_cond.py

As configs/cifar10.py, with the ten classes: in the mapping network beside the
latent (Karras et al. 2020, ADA code), and as a projection on the
discriminator's class token (Miyato and Koyama 2018). The paper has no
conditional model. Not yet trained here.

G has 11.5 M parameters, D 6.7 M. The grids of samples have a class a row.
"""

from configs import cifar10, common


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = cifar10.get_config()
  config.data.num_classes = 10
  config.num_sample_images = 100  # ten rows of ten
  return common.apply_argument(config, arg)
