"""Runs every test on eight CPU devices, compiled for speed of compilation."""

import os

# Read when JAX starts its backend. Optimised code runs these toy sizes no
# faster, and takes twice as long to compile.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
)

import jax

jax.config.update("jax_num_cpu_devices", 8)
