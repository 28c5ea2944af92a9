"""ViTGAN on CIFAR-10, 32 x 32.

Paper: ViTGAN: Training GANs with Vision Transformers (arXiv 2107.04589).
Reported there: FID 6.66, IS 9.30 (first version). Not yet trained here.

    python -m vitgan_jax.main --config=configs/cifar10.py

From the paper: patch 4, 4 + 4 blocks of width 384 with 6 heads and MLPs of
1536, Adam(0, 0.99) at 2e-3 for both networks, batch 128, DiffAugment with
probability 0.8, balanced consistency of weight 10, and 51.2 M images (the
length of the authors' runs).

Chosen here, where the paper is silent:
  overlap: 2 pixels, half a patch; text and appendix agree on it at this size.
  ema: half-life 500 kimg, at most 5 % of the images seen.
  augment: translation 1/8, cutout 1/2, brightness 0.5, saturation 1, contrast
    0.5 (DiffAugment's own); scaling by 0.8 to 1.2.
  discriminator.qk_gain: 0.4. Attention entropy at init, as a share of log N, on
    noise of several scales, first block to last:
      gain 0.3: 0.97 to 0.98;  0.4: 0.88 to 0.93;  0.5: 0.69 to 0.78;
      0.6: 0.41 to 0.54;  1.0: 0.02: each token sees itself alone, and the
      spectral normalisation keeps it so.
  position_scale, fourier_scale: 3 radians per half image or half patch.

G has 11.4 M parameters, D 6.7 M; with `conv_qkv` 25.5 M and 16.2 M.
"""

from configs import common


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  return common.apply_argument(common.get_config(), arg)
