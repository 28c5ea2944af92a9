"""Five learning rates around the paper's, alike for both networks.

The paper has 2e-3 (appendix); with D held back by balanced consistency and
spectral normalisation, which rate is best depends on batch and image size.
"""


def sweep(add):
  """Adds a work unit for each rate."""
  for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3):
    add(
      {"g_optimizer.learning_rate": rate, "d_optimizer.learning_rate": rate},
      name=f"learning_rate={rate:g}",
    )
