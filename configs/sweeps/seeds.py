"""The same run with five seeds: what differs between them is chance."""


def sweep(add):
  """Adds a work unit for each seed."""
  for seed in range(5):
    add({"seed": seed})
