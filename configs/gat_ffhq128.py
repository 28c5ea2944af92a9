r"""GAT, size S, on FFHQ, 128 x 128.

    python -m vitgan_jax.main --config=configs/gat_ffhq128.py \
      --config.data.path=DIR_OR_ZIP

configs/gat_cifar10.py on the images of configs/ffhq128.py, with patches of 8,
so 256 tokens in either network, and batches of 256. Hyun et al. 2025 make 256
pixels in the latent space of an autoencoder, 32 x 32 there. Not yet trained
here.
"""

from configs import common, ffhq128, gat_cifar10


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  return on(ffhq128.get_config().data, 256, arg)


def on(data, batch_size, arg):
  """Returns the config on other images, with patches of 8."""
  config = gat_cifar10.get_config()
  config.batch_size = batch_size
  config.data = data
  config = common.apply_argument(config, arg)
  for network in (config.generator, config.discriminator):
    # In the size of `:smoke`, too; that of `:tiny` has smaller images.
    if network.kind == "gat" and config.data.image_size > 16:
      network.patch_size = 8
  return gat_cifar10.finish(config)
