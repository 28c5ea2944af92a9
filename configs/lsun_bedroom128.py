"""ViTGAN on LSUN bedroom, 128 x 128.

Paper: ViTGAN: Training GANs with Vision Transformers (its ICLR 2022 version
has this size). Not yet trained here.

    python -m vitgan_jax.main --config=configs/lsun_bedroom128.py

Our reading of the paper: 8 blocks of 256 tokens (patches of 8) in the
generator, 4 blocks of 64 tokens (patches of 16 that overlap by 8) in the
discriminator. The rest is as in configs/lsun_bedroom64.py.

G has 20.8 M parameters, D 7.8 M.
"""

from configs import common, lsun_bedroom64


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = lsun_bedroom64.get_config()
  config.data.image_size = 128
  config.generator.depth = 8
  config.discriminator.patch_size = 16
  config.discriminator.overlap = 8
  config.discriminator.depth = 4
  return common.apply_argument(config, arg)
