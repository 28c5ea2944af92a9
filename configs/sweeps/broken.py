"""Runs that are broken on purpose, for the watchdog: docs/training.md.

python -m launch.local --config=configs/cifar16.py \
    --sweep=configs/sweeps/broken.py --workdir=runs/broken \
    --config.total_kimg=40 --config.sample_every_kimg=2
"""

RUNS = {
  "healthy": {"loss.bcr_weight": 1.0},
  "blind": {"d_optimizer.learning_rate": 1e-6},
  "won": {"g_optimizer.learning_rate": 1e-6, "augment.probability": 0.0},
  "patches": {"g_optimizer.learning_rate": 0.1},
  "attention": {
    "discriminator.attention": "dot",
    "discriminator.spectral_norm": "none",
    "discriminator.qk_gain": 30.0,
  },
  "sigma": {"d_optimizer.learning_rate": 0.3},
  "exploding": {
    "discriminator.spectral_norm": "none",
    "loss.adversarial": "hinge",
    "loss.bcr_weight": 0.0,
    "d_optimizer.learning_rate": 0.1,
    "g_optimizer.learning_rate": 0.05,
  },
}


def sweep(add):
  """Adds a work unit for each run."""
  for name, changes in RUNS.items():
    add(changes, name=name)
