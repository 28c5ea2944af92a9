"""ViTGAN on LSUN bedroom, 64 x 64.

Paper: ViTGAN: Training GANs with Vision Transformers (arXiv 2107.04589). Not
yet trained here.

    python -m vitgan_jax.main --config=configs/lsun_bedroom64.py

The model and the training of configs/celeba64.py; images are cropped to their
largest centred square.

TFDS prepares LSUN with tensorflow-io, which does not load beside recent
versions of TensorFlow: prepare `lsun/bedroom` where it does, and give its
folder as --config.data.data_dir.
"""

from configs import celeba64, common


def get_config(arg=""):
  """Returns the config; `arg` may be "smoke"."""
  config = celeba64.get_config()
  config.data.dataset = "lsun/bedroom"
  return common.apply_argument(config, arg)
