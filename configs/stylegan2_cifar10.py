"""StyleGAN2 on CIFAR-10, 32 x 32, as tuned for StyleGAN2-ADA.

Paper: Training Generative Adversarial Networks with Limited Data (arXiv
2006.06676). Reported there, with adaptive augmentation: FID 2.92, IS 9.83. Not
yet trained here.

    python -m vitgan_jax.main --config=configs/stylegan2_cifar10.py

From its `cifar` settings: 512 channels at all resolutions, two mapping layers,
a discriminator without residual branches, groups of 32 in minibatch deviation,
Adam(0, 0.99) at 2.5e-3, batch 64, R1 of 0.01 at every 16th step, neither path
length nor style mixing, an average of half-life 500 kimg, 100 M images.

Other here: augmentation. In place of ADA's, which adapts, are DiffAugment's
colour and cutout, which gave StyleGAN2 FID 9.89 on CIFAR-10 (10,000 images,
test split; 11.07 without). What a device has of a batch must be a multiple of
the group: more than two devices want a larger batch, or
--config.discriminator.group_size=8.

configs/stylegan2_celeba64.py is config F of its paper, at 64 x 64; on any other
images it is --config=configs/NAME.py:g=stylegan2,d=stylegan2, under that
config's training and R1 of 0.1.

G has 19.9 M parameters, D 20.7 M.
"""

from configs import common


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = common.apply_argument(common.get_config(), "g=stylegan2,d=stylegan2")
  config.batch_size = 64
  config.total_kimg = 100_000.0

  config.generator.mapping_depth = 2
  config.generator.style_mixing = 0.0
  config.discriminator.architecture = "orig"
  config.discriminator.group_size = 32

  config.g_optimizer.learning_rate = 2.5e-3
  config.d_optimizer.learning_rate = 2.5e-3
  config.loss.bcr_weight = 0.0
  config.loss.r1_gamma = 0.01

  config.augment.probability = 1.0
  config.augment.translation = 0.0
  config.augment.scaling = 0.0
  return common.apply_argument(config, arg)
