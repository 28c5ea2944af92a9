"""GAT, size S, on CIFAR-10 at 32 x 32.

    python -m vitgan_jax.main --config=configs/gat_cifar10.py

Objective and optimiser are those of Hyun et al. 2025, whose own experiments are
on ImageNet; augmentation is by coins of 0.8, where theirs always moves images
and cuts squares out. The learning rate falls with the width; another width
wants another rate: 2e-4 * 768 / width. Networks that two cores carry, on
CIFAR-10 at 16 px:

    python -m vitgan_jax.main --config=configs/gat_cifar10.py:tiny
"""

from configs import common


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = common.apply_argument(common.get_config(), "g=gat,d=gat")
  config.batch_size = 512
  config.loss.adversarial = "rpgan"
  config.loss.bcr_weight = 0.0
  config.loss.r1_gamma = 0.1
  config.loss.r2_gamma = 0.1
  config.loss.gradient_penalty = "approximate"
  config.augment.scaling = 0.0
  return finish(common.apply_argument(config, arg))


def finish(config):
  """Sets what follows from widths and batch; returns the config."""
  # 0.999 a step
  config.ema.half_life_kimg = round(0.693 * config.batch_size, 1)
  for network, optimizer in (
    (config.generator, config.g_optimizer),
    (config.discriminator, config.d_optimizer),
  ):
    if network.kind == "gat":
      optimizer.learning_rate = 2e-4 * 768 / network.width
    optimizer.clip_norm = 1.0
  return config
