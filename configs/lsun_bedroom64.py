"""LSUN bedroom 64."""

from configs import celeba64, common


def get_config(arg=""):
  """Returns the config; `arg` may be "smoke"."""
  config = celeba64.get_config()
  config.data.dataset = "lsun/bedroom"
  return common.apply_argument(config, arg)
