"""torch-fidelity; tests that import this are skipped where it is missing."""

import pytest

from vitgan_jax.benchmarks import fidelity

torch = pytest.importorskip("torch")
try:
  fidelity.load("metric_fid")
except ImportError:
  pytest.skip("torch-fidelity is missing", allow_module_level=True)

load = fidelity.load
inception = fidelity.inception
write_random_inception = fidelity.write_random_inception
