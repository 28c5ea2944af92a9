r"""ViTGAN on CIFAR-10, 16 x 16: photographs that two CPU cores can learn.

    python -m vitgan_jax.main --config=configs/cifar16.py

takes them from TFDS. Of another copy, a folder or zip of its images:

    python -m vitgan_jax.main --config=configs/cifar16.py \
      --config.data.dataset=folder --config.data.path=DIR_OR_ZIP

The networks and the objective of configs/digits.py, mirrored images; about
1,000 images/s on two cores. configs/cifar10.py is the paper's, at 32 x 32, with
balanced consistency of weight 10 and stronger augmentation.

Other networks have the size of their `:tiny` here: --config=configs/cifar16.py:
g=biggan,d=biggan. configs/sweeps/systems.py trains all systems.
"""

from configs import common, digits


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = digits.get_config()
  config.data.dataset = "cifar10"
  config.data.flip = True
  config.evaluation.num_samples = 10_000
  return common.apply_argument(config, f"tiny,{arg}")
