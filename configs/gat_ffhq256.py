r"""GAT, size S, on FFHQ, 256 x 256.

    python -m vitgan_jax.main --config=configs/gat_ffhq256.py \
      --config.data.path=DIR_OR_ZIP

configs/gat_cifar10.py on the images of configs/ffhq256.py, with patches of 8,
so 1,024 tokens in either network, and batches of 128. Hyun et al. 2025 make 256
pixels in the latent space of an autoencoder, 32 x 32 there. Not yet trained
here.
"""

from configs import ffhq256, gat_ffhq128


def get_config(arg=""):
  """Returns the config; for `arg` see `common.apply_argument`."""
  return gat_ffhq128.on(ffhq256.get_config().data, 128, arg)
