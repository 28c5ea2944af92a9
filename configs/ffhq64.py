r"""ViTGAN on FFHQ, 64 x 64.

    python -m vitgan_jax.main --config=configs/ffhq64.py \
      --config.data.path=DIR_OR_ZIP

The path holds the PNGs of FFHQ, the thumbnails of 128 pixels or the images of
1024, as https://github.com/NVlabs/ffhq-dataset has them. The paper does not
report FFHQ; the model and the training are those of configs/celeba64.py.
"""

from configs import celeba64, common


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = celeba64.get_config()
  config.data.dataset = "ffhq"
  config.data.crop = ()
  return common.apply_argument(config, arg)
