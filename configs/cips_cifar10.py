"""CIPS' generator with StyleGAN2's discriminator, on CIFAR-10 at 32 x 32.

    python -m vitgan_jax.main --config=configs/cips_cifar10.py

Objective and optimiser are those of its authors, who publish nothing at this
size.
"""

from configs import common


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = common.apply_argument(common.get_config(), "g=cips,d=stylegan2")
  config.batch_size = 32
  config.loss.bcr_weight = 0.0
  config.loss.r1_gamma = 10.0
  config.augment.probability = 0.0
  config.ema.half_life_kimg = 10.0
  return common.apply_argument(config, arg)
