"""ViTGAN on CelebA, 64 x 64.

Paper: ViTGAN: Training GANs with Vision Transformers (arXiv 2107.04589).
Reported there: FID 3.74. Not yet trained here.

    python -m vitgan_jax.main --config=configs/celeba64.py

As configs/cifar10.py, with patches of 8 that overlap by 4 pixels and 6 + 6
blocks, as in the paper. Images are the 162,770 aligned ones of the training
split, of 178 x 218 pixels.

The crop is the square of 128 pixels around (89, 121), from left 25 and top 57
to right 153 and bottom 185, as for ProGAN, resized with a Lanczos filter. The
paper does not say which it took; figures for other crops cannot be compared.
Others in use, as --config.data.crop: (19, 39, 159, 179), the centred 140;
(9, 29, 169, 189), the centred 160; (), the centred 178.

Attention entropy of the discriminator at init (qk_gain 0.4): 0.89 to 0.97 of
log N, first block to last.

G has 16.1 M parameters, D 10.2 M; with `conv_qkv` 37.3 M and 24.4 M. As 38 M
are published for the generator of ViTGAN-64, its figures are probably with
convolutional query, key and value.
"""

from configs import common


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = common.get_config()
  config.data.dataset = "celeb_a"
  config.data.image_size = 64
  config.data.crop = (25, 57, 153, 185)
  config.generator.patch_size = 8
  config.generator.depth = 6
  config.discriminator.patch_size = 8
  config.discriminator.overlap = 4
  config.discriminator.depth = 6
  return common.apply_argument(config, arg)
