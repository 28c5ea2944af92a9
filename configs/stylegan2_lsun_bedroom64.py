"""StyleGAN2 on LSUN bedroom, 64 x 64.

    python -m vitgan_jax.main --config=configs/stylegan2_lsun_bedroom64.py

The networks and the training of configs/stylegan2_celeba64.py, the images of
configs/lsun_bedroom64.py. As the baseline of ViTGAN's paper it has FID 2.33
there. Not yet trained here.
"""

from configs import common, lsun_bedroom64, stylegan2_celeba64


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = stylegan2_celeba64.get_config()
  config.data = lsun_bedroom64.get_config().data
  return common.apply_argument(config, arg)
