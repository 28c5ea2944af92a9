"""The demo: a small ViTGAN on scikit-learn's handwritten digits, 16 x 16.

    make demo

or

    python -m vitgan_jax.main --config=configs/digits.py:fast

1,497 digits of 8 x 8 pixels, enlarged. The result is in results/digits and in
the README; what was tried in docs/lab_book.md.

    --config=configs/digits.py

has the paper's discriminator and decoder, where the demo has those of
configs/cifar10_fast.py in small: digits that are as easy to read, and less
varied.

The generator draws grey images, as the digits are: else a trace of colour that
no eye sees is most of what tells samples from them. A grey patch of 8 x 8
pixels is 64 numbers, which fit into a token of the paper's discriminator, as
those of photographs do not.

Other networks have the size of their `:tiny` here: `:g=biggan,d=biggan`.
"""

from configs import common


def get_config(arg=""):
  """Returns the config.

  Args:
    arg: "fast", as above, beside the words of `common.apply_argument`.
  """
  words = arg.split(",")
  config = common.get_config()
  common.lighten(config)
  if "fast" in words:
    common.quicken(config)
  config = common.apply_argument(config, f"tiny,{arg}", ("fast",))

  config.data.dataset = "sklearn_digits"
  config.data.flip = False  # a mirrored digit is none

  if config.generator.kind == "vitgan":
    config.generator.grey = True
  if "fast" in words:
    config.batch_size = 8
    config.total_kimg = 300.0
    if config.generator.kind == "vitgan":
      config.generator.decoder_dim = 44
    if config.discriminator.kind == "biggan":
      config.discriminator.channels = (16, 32, 32)
  else:
    config.batch_size = 16
    config.total_kimg = 460.0
    config.g_optimizer.learning_rate = 4e-3
    config.d_optimizer.learning_rate = 4e-3

  config.evaluation.num_samples = 2_000
  config.sample_every_kimg = 40.0
  return common.apply_argument(config, "smoke" if "smoke" in words else "")
