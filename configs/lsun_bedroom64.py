"""ViTGAN on LSUN bedroom, 64 x 64.

Paper: ViTGAN: Training GANs with Vision Transformers (arXiv 2107.04589). Not
yet trained here.

    python -m vitgan_jax.main --config=configs/lsun_bedroom64.py

The model and the training of configs/celeba64.py; images are cropped to their
largest centred square. Any other category: --config.data.dataset=lsun/tower.

The LMDB that is published (43 GB) is downloaded, unless bedroom_train_lmdb or
bedroom_train_lmdb.zip is in <data_dir>/downloads/manual, or given as
--config.data.path.
"""

from configs import celeba64, common


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = celeba64.get_config()
  config.data.dataset = "lsun/bedroom"
  config.data.crop = ()
  return common.apply_argument(config, arg)
