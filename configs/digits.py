"""The demo: a small ViTGAN on scikit-learn's handwritten digits, 16 x 16.

    make demo

or

    python -m vitgan_jax.main --config=configs/digits.py

1,497 digits of 8 x 8 pixels, enlarged. The result is in results/digits and in
the README; what was tried in docs/lab_book.md.

Its generator draws grey images, as the digits are: else a trace of colour that
no eye sees is most of what tells samples from them. Its discriminator's patches
fit into its width, as those of configs/cifar16.py:fine.
"""

from configs import common


def get_config(arg=""):
  """Returns the demo's config; `arg` may be "smoke"."""
  config = common.apply_argument(common.get_config(), "tiny")
  config.total_kimg = 180.0
  config.batch_size = 16

  config.data.dataset = "sklearn_digits"
  config.data.flip = False  # a mirrored digit is none

  config.generator.grey = True
  common.lighten(config)
  common.refine(config)

  config.evaluation.num_samples = 2_000
  config.sample_every_kimg = 20.0
  config = common.apply_argument(config, arg)
  if "smoke" in arg and config.discriminator.kind == "vitgan":
    config.discriminator.patch_size = 4  # a quarter of the tokens, for seconds
    config.discriminator.overlap = 2
  return config
