"""GAT, size S, on CIFAR-10 at 32 x 32.

    python -m vitgan_jax.main --config=configs/gat_cifar10.py

Objective and optimiser are those of Hyun et al. 2025, whose own experiments are
on ImageNet. The learning rate falls with the width; another width wants another
rate: 2e-4 * 768 / width. Networks that two cores carry, on CIFAR-10 at 16 px:

    python -m vitgan_jax.main --config=configs/gat_cifar10.py:tiny
"""

from configs import common


def get_config(arg=""):
  """Returns the config.

  Args:
    arg: "tiny" for 16 px and two cores, beside the words of
      `common.apply_argument`.
  """
  words = arg.split(",")
  config = common.get_config()
  config = common.apply_argument(config, "g=gat,d=gat")
  config.batch_size = 512
  config.loss.adversarial = "rpgan"
  config.loss.bcr_weight = 0.0
  config.loss.r1_gamma = 0.1
  config.loss.r2_gamma = 0.1
  config.loss.gradient_penalty = "approximate"
  config.augment.scaling = 0.0
  config.ema.half_life_kimg = 355.0  # 0.999 a step
  if "tiny" in words:
    words.remove("tiny")
    config.batch_size = 64
    config.steps_per_call = 20
    config.total_kimg = 1_500.0
    config.data.image_size = 16
    for network in (config.generator, config.discriminator):
      network.update(patch_size=4, width=64, depth=4, num_heads=4)
    config.log_every_kimg = 5.0
    config.sample_every_kimg = 50.0
    config.checkpoint_every_kimg = 50.0
    config.evaluation.features = "efficientnet"
  for optimizer in (config.g_optimizer, config.d_optimizer):
    optimizer.learning_rate = 2e-4 * 768 / config.generator.width
    optimizer.clip_norm = 1.0
  return common.apply_argument(config, ",".join(words))
