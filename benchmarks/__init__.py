"""What `python -m benchmarks` measures, one module each; not installed."""
