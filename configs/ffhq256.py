r"""ViTGAN on FFHQ, 256 x 256.

    python -m vitgan_jax.main --config=configs/ffhq256.py \
      --config.data.path=DIR_OR_ZIP

The paper stops at 128; here the patches stay, and the tokens are four times as
many: 1,024 of 8 x 8 pixels in the generator, 256 of 16 x 16 that overlap by 8
in the discriminator. Attention takes a fifth of the generator's arithmetic at
this length, so all of it is global. The path holds FFHQ's images of 1,024. Not
yet trained here.
"""

from configs import common, ffhq128


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = ffhq128.get_config()
  config.data.image_size = 256
  return common.apply_argument(config, arg)
