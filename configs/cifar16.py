r"""ViTGAN on CIFAR-10, 16 x 16: photographs that two CPU cores can learn.

    python -m vitgan_jax.main --config=configs/cifar16.py

takes them from TFDS. Of another copy, a folder or zip of its images:

    python -m vitgan_jax.main --config=configs/cifar16.py \
      --config.data.dataset=folder --config.data.path=DIR_OR_ZIP

The networks and the objective of configs/digits.py, mirrored images; about
1,000 images/s on two cores. configs/cifar10.py is the paper's, at 32 x 32, with
balanced consistency of weight 10 and stronger augmentation.

    --config=configs/cifar16.py:fast

is what learned best in as much time, that of configs/cifar10_fast.py with 44
channels in its decoder and half as many at its discriminator's 16 x 16 pixels,
0.39 M parameters in all: about 560 images/s.

    --config=configs/cifar16.py:fine

is the best whose discriminator is the paper's: 64 tokens of 4 x 4 pixels, which
fit into its width, where 16 tokens of 8 x 8 do not, and take three times as
long; both rates are 4e-3. docs/lab_book.md has what was measured of both.

Other networks have the size of their `:tiny` here: --config=configs/cifar16.py:
g=biggan,d=biggan. configs/sweeps/systems.py trains all systems.
"""

from configs import common


def get_config(arg=""):
  """Returns the config.

  Args:
    arg: "fast" or "fine", as above, beside the words of
      `common.apply_argument`.
  """
  words = arg.split(",")
  config = common.get_config()
  common.lighten(config)
  if "fast" in words:
    common.quicken(config)
  config = common.apply_argument(config, f"tiny,{arg}", ("fast", "fine"))
  if "fast" in words:
    if config.generator.kind == "vitgan":
      config.generator.decoder_dim = 44
    if config.discriminator.kind == "biggan":
      config.discriminator.channels = (32, 64, 64)
  if "fine" in words:
    config.g_optimizer.learning_rate = 4e-3
    config.d_optimizer.learning_rate = 4e-3
    if config.discriminator.kind == "vitgan":
      config.discriminator.update(patch_size=2, overlap=1)
  return common.apply_argument(config, "smoke" if "smoke" in words else "")
