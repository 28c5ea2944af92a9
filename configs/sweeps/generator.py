"""The paper's table of generators: how w comes in, and how a patch is drawn.

python -m launch.local --config=configs/cifar10.py \
    --sweep=configs/sweeps/generator.py

has it in the paper's size, --config=configs/cifar16.py:fast
--config.generator.decoder_dim=64 in one that two cores carry, behind a
discriminator that tells decoders apart. The authors' convolutional decoder
comes on top.
"""


def sweep(add):
  """Adds a work unit for each generator."""
  for injection in ("add", "token", "sln"):
    for decoder in ("linear", "implicit"):
      changes = {
        "generator.latent_injection": injection,
        "generator.patch_decoder": decoder,
      }
      add(changes, name=f"{injection}_{decoder}")
  add({"generator.patch_decoder": "conv"}, name="sln_conv")
