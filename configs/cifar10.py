"""CIFAR-10."""

from configs import common


def get_config(arg=""):
  """Returns the config; `arg` may be "smoke"."""
  return common.apply_argument(common.get_config(), arg)
