"""Draft."""

from configs import common


def get_config(arg=""):
  """Returns the demo's config; `arg` may be "smoke"."""
  config = common.get_config()
  config.total_kimg = 300.0
  config.batch_size = 32
  config.steps_per_call = 20
  config.data.dataset = "sklearn_digits"
  config.data.image_size = 16
  config.data.flip = False
  config.generator.width = 64
  config.generator.depth = 2
  config.generator.num_heads = 4
  config.generator.mlp_dim = 256
  config.generator.latent_dim = 64
  config.generator.mapping_depth = 4
  config.generator.decoder_dim = 64
  config.discriminator.width = 64
  config.discriminator.depth = 2
  config.discriminator.num_heads = 4
  config.discriminator.mlp_dim = 256
  config.log_every_kimg = 5.0
  config.sample_every_kimg = 25.0
  config.checkpoint_every_kimg = 50.0
  return common.apply_argument(config, arg)
