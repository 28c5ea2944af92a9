r"""StyleGAN2 on FFHQ, 64 x 64.

    python -m vitgan_jax.main --config=configs/stylegan2_ffhq64.py \
      --config.data.path=DIR_OR_ZIP

The networks and the training of configs/stylegan2_celeba64.py, the images of
configs/ffhq64.py. Not yet trained here.
"""

from configs import common, ffhq64, stylegan2_celeba64


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = stylegan2_celeba64.get_config()
  config.data = ffhq64.get_config().data
  return common.apply_argument(config, arg)
