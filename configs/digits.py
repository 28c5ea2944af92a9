"""The demo: a small ViTGAN on scikit-learn's handwritten digits, 16 x 16.

    make demo

or

    python -m vitgan_jax.main --config=configs/digits.py

1,497 digits of 8 x 8 pixels, enlarged; two CPU cores, about 900 images/s. The
result is in results/digits and in the README.

What was tried, one run of seed 0 each: mean confidence of a support vector
machine in 1,000 samples, relative to real digits. Its probabilities (Platt) are
stricter than those of the classifier that judges the demo.

  D's rate  bCR  other                                     120   150   300   450
  --------  ---  ---------------------------------------  ----  ----  ----  kimg
  1e-3      1                                             0.73  0.76  0.84
  1e-3      0.3                                           0.70  0.74
  1e-3      1    width 96, batch 64; half as fast         0.72  0.76  0.89
  2e-3      1    this config                              0.81  0.82  0.87  0.88
  2e-3      1    width 96; half as fast                   0.82  0.83
  2e-3      3                                             0.76
  2e-3      1    no cutout, no brightness                 0.78
  2e-3      1    cutout and contrast 0.5, brightness 0.5,
                 scaling 0.2                              0.74
  4e-3      1    behind at 59 kimg (0.71, not 0.74), ended
"""

from configs import common


def get_config(arg=""):
  """Returns the demo's config; `arg` may be "smoke"."""
  config = common.apply_argument(common.get_config(), "tiny")
  config.total_kimg = 450.0

  config.data.dataset = "sklearn_digits"
  config.data.flip = False  # a mirrored digit is none

  config.loss.bcr_weight = 1.0

  config.augment.brightness = 0.2
  config.augment.saturation = 0.0
  config.augment.contrast = 0.0
  config.augment.scaling = 0.0
  config.augment.cutout = 0.25

  config.evaluation.num_samples = 2_000
  config.sample_every_kimg = 25.0
  return common.apply_argument(config, arg)
