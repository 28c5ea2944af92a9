r"""ViTGAN on your own images.

    python -m vitgan_jax.main --config=configs/folder.py \
      --config.data.path=DIR_OR_ZIP --config.data.image_size=64

Images of any kind, size and colour mode, at any depth. They are cropped to the
largest centred square and resized. Class folders are kept as labels;
`--config.data.num_classes=N`, as many as they are, gives them to both networks.

The model is that of configs/celeba64.py. Patches are an eighth of the image, so
that 64 tokens cover it at every size that is a multiple of 8, as it should be.
`data.flip` mirrors images at random: turn it off where left and right matter,
as in writing.
"""

from configs import celeba64, common


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  config = celeba64.get_config()
  config.data.dataset = "folder"
  config.data.crop = ()
  with config.unlocked():
    image_size = config.data.get_ref("image_size")
    config.generator.patch_size = image_size // 8
    config.discriminator.patch_size = image_size // 8
    config.discriminator.overlap = image_size // 16
  return common.apply_argument(config, arg)
