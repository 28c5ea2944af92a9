"""The systems that the paper compares, and those that came with and after them.

    python -m launch.local --config=configs/cifar16.py \
      --sweep=configs/sweeps/systems.py

has each in a size that two cores carry, --config=configs/cifar10.py in its own.
Images, augmentation and the average of the generator are those of the config;
networks, objective and rates are each system's, as in its own config, but for
BigGAN, TransGAN and GAT, whose rates and steps of the discriminator are for
runs of some hundred thousand images, and Vanilla-ViT, whose R1 is smaller and
whose patches are as many as at 32 px: docs/lab_book.md.
"""

from configs.common import BEHIND_BIGGAN


def _rates(rate, **others):
  """Returns fields of both optimisers."""
  return {
    f"{optimizer}.{field}": value
    for optimizer in ("g_optimizer", "d_optimizer")
    for field, value in {"learning_rate": rate, **others}.items()
  }


def _kinds(generator, discriminator):
  return {"generator.kind": generator, "discriminator.kind": discriminator}


_VITGAN_BIGGAN = {"discriminator.kind": "biggan", **BEHIND_BIGGAN}
_CONV_BIGGAN = {**_VITGAN_BIGGAN, "generator.patch_decoder": "conv"}
_VITGAN = {"loss.bcr_weight": 1.0, **_rates(4e-3)}

SYSTEMS = {
  "vitgan": _VITGAN,
  "vitgan_cond": {**_VITGAN, "data.num_classes": 10},
  # At 16 px and width 64, patches that fit into a token: docs/lab_book.md.
  "vitgan_fine": {
    **_VITGAN,
    "discriminator.patch_size": 2,
    "discriminator.overlap": 1,
  },
  "vanilla_vit": {
    "generator.latent_injection": "add",
    "generator.patch_decoder": "linear",
    "generator.patch_size": 2,
    "discriminator.attention": "dot",
    "discriminator.qk_gain": 1.0,
    "discriminator.spectral_norm": "none",
    "discriminator.patch_size": 2,
    "discriminator.overlap": 0,
    "loss.bcr_weight": 1.0,
    "loss.r1_gamma": 0.1,
  },
  # With StyleGAN2's objective. That of its authors, R1 at each step and two
  # augmented views (configs/hybrid_cifar10.py), takes several times as long.
  "hybrid": {
    "discriminator.kind": "stylegan2",
    "generator.patch_decoder": "conv",
    "loss.bcr_weight": 0.0,
    "loss.r1_gamma": 0.01,
  },
  "vitgan_biggan": _VITGAN_BIGGAN,
  "vitgan_conv_biggan": _CONV_BIGGAN,
  # 0.39 M parameters in all; configs/cifar16.py:fast
  "vitgan_fast": {
    **_CONV_BIGGAN,
    "generator.decoder_dim": 44,
    "discriminator.channels": (32, 64, 64),
  },
  "stylegan2": {
    **_kinds("stylegan2", "stylegan2"),
    "loss.bcr_weight": 0.0,
    "loss.r1_gamma": 0.01,
    **_rates(2.5e-3),
  },
  "cips": {
    **_kinds("cips", "stylegan2"),
    "loss.bcr_weight": 0.0,
    "loss.r1_gamma": 0.1,
    **_rates(2e-3),
  },
  "ganformer": {
    **_kinds("ganformer", "stylegan2"),
    "loss.bcr_weight": 0.0,
    "loss.r1_gamma": 0.01,
    **_rates(2e-3),
  },
  "biggan": {
    **_kinds("biggan", "biggan"),
    "data.num_classes": 10,
    **BEHIND_BIGGAN,
    "g_optimizer.learning_rate": 4e-4,
    "g_optimizer.b2": 0.999,
  },
  "transgan": {
    **_kinds("transgan", "transgan"),
    "d_steps": 2,
    "loss.adversarial": "wasserstein",
    "loss.bcr_weight": 0.0,
    "loss.gp_weight": 10.0,
    "loss.drift_weight": 1e-3,
    **_rates(5e-4, clip_norm=5.0),
    "d_optimizer.learning_rate": 1e-3,
  },
  "gat": {
    **_kinds("gat", "gat"),
    "d_steps": 2,
    "loss.adversarial": "rpgan",
    "loss.bcr_weight": 0.0,
    "loss.r1_gamma": 0.1,
    "loss.r2_gamma": 0.1,
    "loss.gradient_penalty": "approximate",
    **_rates(1e-3, clip_norm=1.0),
  },
}

# CIFAR-10 at 32 px. "seen": in its source; others are as later papers and
# digests list them.
_PAPER = "ViTGAN paper, 50,000 samples"
PUBLISHED = {
  "vitgan": f"FID 6.66, IS 9.30 (first version); 4.92, 9.69 (ICLR); {_PAPER}",
  "vanilla_vit": f"FID 12.7, IS 8.40; {_PAPER}",
  "hybrid": f"FID 4.57, IS 9.89; {_PAPER}",
  "stylegan2": f"FID 5.60 to 5.79, IS 9.41; {_PAPER}. FID 9.89, IS 9.40 with "
  "DiffAugment, by its authors, 10,000 samples against the test split (seen); "
  "2.92, 9.83 as tuned by StyleGAN2-ADA, 50,000 samples",
  "biggan": "FID 8.70, IS 9.16 with DiffAugment, by its authors, 10,000 "
  "samples against the test split (seen)",
  "transgan": "FID 9.26, IS 9.02, 50,000 samples (seen)",
}


def sweep(add):
  """Adds a work unit for each system."""
  for name, changes in SYSTEMS.items():
    add(changes, name=name)
