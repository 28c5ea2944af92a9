"""CelebA 64."""

from configs import common


def get_config(arg=""):
  """Returns the config; `arg` may be "smoke"."""
  config = common.get_config()
  config.data.dataset = "celeb_a"
  config.data.image_size = 64
  config.generator.patch_size = 8
  config.generator.depth = 6
  config.discriminator.patch_size = 8
  config.discriminator.overlap = 4
  config.discriminator.depth = 6
  return common.apply_argument(config, arg)
