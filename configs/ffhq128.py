r"""ViTGAN on FFHQ, 128 x 128.

    python -m vitgan_jax.main --config=configs/ffhq128.py \
      --config.data.path=DIR_OR_ZIP

The images of configs/ffhq64.py (the thumbnails have this size), the networks
of configs/lsun_bedroom128.py: 256 tokens in the generator, 64 in the
discriminator. Not yet trained here.
"""

from configs import common, ffhq64, lsun_bedroom128


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = lsun_bedroom128.get_config()
  config.data = ffhq64.get_config().data
  config.data.image_size = 128
  return common.apply_argument(config, arg)
