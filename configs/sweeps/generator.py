"""The paper's table of generators: how w comes in, and how a patch is drawn.

python -m launch.local --config=configs/cifar10.py \
    --sweep=configs/sweeps/generator.py

has it in the paper's size, --config=configs/cifar16.py
--config.discriminator.overlap=0 in one of which a run of 600 thousand images
takes a quarter of an hour of a core, behind the discriminator that
discriminator.py found best there. The authors' convolutional decoder comes on
top.
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
