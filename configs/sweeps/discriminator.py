"""The paper's table of discriminators: ViTGAN's with one thing changed in each.

python -m launch.local --config=configs/cifar10.py \
    --sweep=configs/sweeps/discriminator.py

has it in the paper's size, --config=configs/cifar16.py in one of which a run of
600 thousand images takes a quarter of an hour of a core. `r1` has the weight
that the paper's plain ViT has, `weak_r1` that of the plain ViT of systems.py.
"""

RUNS = {
  "vitgan": {"discriminator.spectral_norm": "isn"},
  # Consistency compares augmented images with others: it goes, too.
  "no_augmentation": {"augment.probability": 0.0, "loss.bcr_weight": 0.0},
  "dot": {"discriminator.attention": "dot", "discriminator.qk_gain": 1.0},
  "spectral_norm": {"discriminator.spectral_norm": "sn"},
  "r1": {"discriminator.spectral_norm": "none", "loss.r1_gamma": 10.0},
  "weak_r1": {"discriminator.spectral_norm": "none", "loss.r1_gamma": 0.1},
  "no_norm": {"discriminator.spectral_norm": "none"},
  "no_overlap": {"discriminator.overlap": 0},
  "conv_qkv": {"discriminator.conv_qkv": True},
}


def sweep(add):
  """Adds a work unit for each discriminator."""
  for name, changes in RUNS.items():
    add(changes, name=name)
