"""ViTGAN's generator behind BigGAN's discriminator on CIFAR-10, 32 x 32.

    python -m vitgan_jax.main --config=configs/cifar10_fast.py

What learned best from as many images of all that was tried at 16 px
(configs/cifar16.py:fast; docs/lab_book.md). configs/cifar10.py is the paper's.
The paper's discriminator is replaced: after as many images the generator is
more varied behind this one, and the paper's tells nothing apart before the
convolutional decoder.

From the authors' code: the convolutional decoder. From BigGAN's, as it is for
CIFAR-10: the discriminator and its hinge loss.

Chosen here, as in the small runs: two discriminator steps of 8e-4 for one of
the generator of 2e-3, no consistency; translation, cutout of a quarter,
brightness of 0.2 and nothing else for augmentation.
"""

from configs import common


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = common.get_config()
  common.lighten(config)
  common.quicken(config)
  return common.apply_argument(config, arg)
