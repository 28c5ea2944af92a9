"""StyleGAN2 on CelebA, 64 x 64: config F of its paper.

Paper: Analyzing and Improving the Image Quality of StyleGAN (arXiv 1912.04958).
As the baseline of ViTGAN's paper it has FID 3.39 there. Not yet trained here.

    python -m vitgan_jax.main --config=configs/stylegan2_celeba64.py

From config F: 512 channels at all resolutions (as many as make 256 at 64 px:
--config.generator.base_channels=16384 and the same of the discriminator), eight
mapping layers, style mixing, Adam(0, 0.99) at 2e-3, batch 32, path length of
weight 2 at every fourth step, R1 at every 16th, an average of half-life 10
kimg, 25 M images.

Other here: the gamma of R1 is what StyleGAN2-ADA chooses for the size and the
batch, 0.0002 * 64^2 / 32; its own 10 is for 1,024 px. DiffAugment's colour,
translation and cutout, as in ViTGAN's paper, for fairness. Images and their
crop are those of configs/celeba64.py.

G has 27.0 M parameters, D 26.5 M.
"""

from configs import celeba64, common


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = common.apply_argument(
    celeba64.get_config(), "g=stylegan2,d=stylegan2"
  )
  config.batch_size = 32
  config.total_kimg = 25_000.0
  config.loss.bcr_weight = 0.0
  config.loss.r1_gamma = 0.0256
  config.loss.path_length_weight = 2.0
  config.augment.probability = 1.0
  config.augment.scaling = 0.0
  config.ema.half_life_kimg = 10.0
  return common.apply_argument(config, arg)
