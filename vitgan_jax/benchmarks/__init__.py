"""What `python -m vitgan_jax.benchmark` measures, one module each."""
