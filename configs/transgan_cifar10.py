"""TransGAN on CIFAR-10 at 32 x 32, as its authors released it.

    python -m vitgan_jax.main --config=configs/transgan_cifar10.py

WGAN-GP, four steps of the discriminator for one of the generator, half a
million of the latter. They give the generator a batch of 128, twice the
discriminator's; here both have 64. Their average counts the images of one in
four steps: its half-life of 500 kimg is 2,000 here. The discriminator's patch
embeddings start with a deviation of 0.02 here, within Xavier's limits there.
"""

from configs import common


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = common.apply_argument(common.get_config(), "g=transgan,d=transgan")
  config.batch_size = 64
  config.d_steps = 4
  config.loss.adversarial = "wasserstein"
  config.loss.bcr_weight = 0.0
  config.loss.gp_weight = 10.0
  config.loss.drift_weight = 1e-3
  config.augment.translation = 0.2
  config.augment.scaling = 0.0
  config.augment.probability = 1.0
  for optimizer in (config.g_optimizer, config.d_optimizer):
    optimizer.learning_rate = 1e-4
    optimizer.clip_norm = 5.0
  config.total_kimg = 128_000.0
  config.ema.half_life_kimg = 2_000.0
  config.ema.ramp_up = 0.4
  return common.apply_argument(config, arg)
