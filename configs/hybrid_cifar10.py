"""ViTGAN's generator with StyleGAN2's discriminator on CIFAR-10, 32 x 32.

Paper: ViTGAN: Training GANs with Vision Transformers (arXiv 2107.04589), whose
best system it is: FID 4.57, IS 9.89 there, and the only one that its authors
have released. Not yet trained here.

    python -m vitgan_jax.main --config=configs/hybrid_cifar10.py

From the authors' code: the convolutional decoder, which they recommend
(--config.generator.patch_decoder=implicit is the other one); the discriminator
of 128 to 512 channels; batch 64, rates of 1e-3 that grow over the first 3,000
steps; R1 of 0.1 at each step, consistency of weight 1 between two augmented
views; an average of half-life 1,000 kimg; 51.2 M images.

Other here: their average is a copy of the generator for its first 1,000 kimg,
ours ramps up; cutout has the probability of all transformations, 0.8, theirs
0.3; their blocks take the skip from the normalised tensor, normalise G's
kernels by their norm at init, and use SiLU.

G has 17.0 M parameters, D 13.9 M.
"""

from configs import common


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = common.apply_argument(common.get_config(), "d=stylegan2")
  config.batch_size = 64

  config.generator.patch_decoder = "conv"
  config.discriminator.base_channels = 4096

  for optimizer in (config.g_optimizer, config.d_optimizer):
    optimizer.learning_rate = 1e-3
    optimizer.warmup_kimg = 192.0
  config.loss.bcr_weight = 1.0
  config.loss.bcr_anchor = "augmented"
  config.loss.r1_gamma = 0.1
  config.loss.gradient_penalty_every = 1

  config.augment.scaling = 0.0
  config.ema.half_life_kimg = 1_000.0
  return common.apply_argument(config, arg)
