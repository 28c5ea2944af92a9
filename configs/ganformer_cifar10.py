"""GANformer's generator with StyleGAN2's discriminator, on CIFAR-10 at 32 x 32.

    python -m vitgan_jax.main --config=configs/ganformer_cifar10.py

Paper: Generative Adversarial Transformers (arXiv 2103.01209), whose authors
publish nothing at this size. From their code: 16 latents of 32 numbers and a
global one, residual blocks, attention at all resolutions, batch 32, Adam(0,
0.99) at 2e-3, R1 at every 16th step, an average of half-life 10 kimg.

Other here: simplex attention, without the centroids of their duplex one;
neither path length nor style mixing; gamma of R1, and augmentation, as in
configs/stylegan2_cifar10.py, as theirs are for large images.

G has 24.0 M parameters, D 21.5 M.
"""

from configs import common


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = common.apply_argument(common.get_config(), "g=ganformer,d=stylegan2")
  config.batch_size = 32
  config.total_kimg = 25_000.0
  config.loss.bcr_weight = 0.0
  config.loss.r1_gamma = 0.01
  config.augment.probability = 1.0
  config.augment.translation = 0.0
  config.augment.scaling = 0.0
  config.ema.half_life_kimg = 10.0
  return common.apply_argument(config, arg)
