"""Class-conditional BigGAN on CIFAR-10 at 32 x 32.

    python -m vitgan_jax.main --config=configs/biggan_cifar10.py

As the authors' PyTorch code has it, and with flips; of their batch of 50, eight
devices can share 48. Without classes:
--config.data.num_classes=0. At 64 x 64, on another dataset:
--config.generator.channels="(1024, 1024, 512, 256, 128)"
--config.discriminator.channels="(64, 128, 256, 512, 1024)"
--config.discriminator.num_halvings=4, and, for both networks,
kernel_init=orthogonal and attention_resolution=32.
"""

from configs import common


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = common.apply_argument(common.get_config(), "g=biggan,d=biggan")
  config.batch_size = 48
  config.d_steps = 4
  config.total_kimg = 25_000.0  # 500 epochs
  config.steps_per_call = 10
  config.data.num_classes = 10
  config.loss.adversarial = "hinge"
  config.loss.bcr_weight = 0.0
  config.augment.probability = 0.0
  for optimizer in (config.g_optimizer, config.d_optimizer):
    optimizer.learning_rate = 2e-4
    optimizer.b2 = 0.999
  config.ema.half_life_kimg = 1_331.0  # 0.9999 a step, of 4 batches
  return common.apply_argument(config, arg)
