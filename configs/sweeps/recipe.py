"""What was tried of the recipe for 16 px; docs/lab_book.md has the results.

python -m launch.local --config=configs/cifar16.py \
    --sweep=configs/sweeps/recipe.py --workdir=runs/recipe \
    --config.data.dataset=folder --config.data.path=TRAIN.zip \
    --config.total_kimg=400
"""

from configs.sweeps.systems import SYSTEMS

NO_CONSISTENCY = {"loss.bcr_weight": 0.0}
COSINE = {"g_optimizer.decay": "cosine", "d_optimizer.decay": "cosine"}
FASTER = {"g_optimizer.learning_rate": 4e-3, "d_optimizer.learning_rate": 4e-3}

FINE = {"discriminator.patch_size": 2, "discriminator.overlap": 1}
NO_OVERLAP = {"discriminator.overlap": 0}
POOLED = {"discriminator.pooling": "mean"}
CONSISTENCY = {"loss.bcr_weight": 1.0}
SMALL_BATCH = {"batch_size": 16}
DEEP = {"generator.depth": 4, "discriminator.depth": 4}
PLAIN = {
  "discriminator.attention": "dot",
  "discriminator.qk_gain": 1.0,
  "discriminator.spectral_norm": "none",
}
R1 = {"loss.r1_gamma": 0.1}
RPGAN = R1 | {
  "loss.adversarial": "rpgan",
  "loss.r2_gamma": 0.1,
  "loss.gradient_penalty": "approximate",
}

RUNS = {
  "base": CONSISTENCY,
  "no_consistency": NO_CONSISTENCY,
  "cosine": NO_CONSISTENCY | COSINE,
  "no_augmentation": NO_CONSISTENCY | COSINE | {"augment.probability": 0.0},
  "rate_4e-3": NO_CONSISTENCY | FASTER,
  "strong_augmentation": NO_CONSISTENCY
  | {
    "augment.brightness": 0.5,
    "augment.saturation": 1.0,
    "augment.contrast": 0.5,
    "augment.cutout": 0.5,
  },
  "consistency_4e-3": CONSISTENCY | FASTER,
  "no_overlap": CONSISTENCY | FASTER | NO_OVERLAP,
  "no_overlap_consistency_10": FASTER | NO_OVERLAP | {"loss.bcr_weight": 10.0},
  "no_overlap_two_steps": NO_CONSISTENCY | FASTER | NO_OVERLAP | {"d_steps": 2},
  "no_overlap_pooled": CONSISTENCY | FASTER | NO_OVERLAP | POOLED,
  "no_overlap_deep": CONSISTENCY | FASTER | NO_OVERLAP | DEEP,
  "fine_discriminator": CONSISTENCY | FASTER | FINE,
  "fine_pooled": CONSISTENCY | FASTER | FINE | POOLED,
  "fine_no_consistency": NO_CONSISTENCY | FASTER | FINE,
  "fine_batch_16": CONSISTENCY | FASTER | FINE | SMALL_BATCH,
  "fine_batch_16_no_consistency": NO_CONSISTENCY | FASTER | FINE | SMALL_BATCH,
  "fine_generator": CONSISTENCY
  | FASTER
  | FINE
  | SMALL_BATCH
  | {"generator.patch_size": 2},
  "fine_discriminator_conv": CONSISTENCY
  | FASTER
  | FINE
  | {"generator.patch_decoder": "conv"},
  "hybrid": SYSTEMS["hybrid"],
  "rpgan": NO_CONSISTENCY | PLAIN | RPGAN,
  "fine_r1": NO_CONSISTENCY | FINE | PLAIN | R1,
  "fine_rpgan": NO_CONSISTENCY | FINE | PLAIN | RPGAN,
  "rpgan_consistency": CONSISTENCY | FASTER | {"loss.adversarial": "rpgan"},
}


def sweep(add):
  """Adds a work unit for each run."""
  for name, changes in RUNS.items():
    add(changes, name=name)
