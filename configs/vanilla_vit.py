"""A GAN of plain vision transformers on CIFAR-10: the baseline of ViTGAN.

Paper: ViTGAN: Training GANs with Vision Transformers (arXiv 2107.04589), whose
Vanilla-ViT it is. Reported there: FID 12.7, IS 8.40. Not yet trained here.

    python -m vitgan_jax.main --config=configs/vanilla_vit.py

configs/cifar10.py without what the paper adds. G: w is added to the position
embeddings (figure 2a), and a linear layer makes the pixels of a patch. D: dot
attention, patches that do not overlap, and R1 of gamma 10 in place of spectral
normalisation. DiffAugment and balanced consistency are the same, as in the
paper, for fairness.

G has 8.4 M parameters, D 7.3 M, whose query and key are not tied.
"""

from configs import common


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = common.get_config()
  config.generator.latent_injection = "add"
  config.generator.patch_decoder = "linear"
  config.discriminator.attention = "dot"
  config.discriminator.spectral_norm = "none"
  config.discriminator.overlap = 0
  config.loss.r1_gamma = 10.0
  return common.apply_argument(config, arg)
