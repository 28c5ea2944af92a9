"""What a benchmark needs of PyTorch to be measured beside it, if it is there.

The contestants are `torch` (eager) and `torch_compile`, on the device of JAX, a
CPU or a GPU; `torch.autocast` gives them the dtype of the config.
"""

import importlib.util
import os
import sys

from absl import logging
import jax

from vitgan_jax.errors import ConfigError


def contestants(config, make):
  """Makes what is to be timed; each is called once, which compiles it.

  Args:
    config: of `configs/`.
    make: from whether to compile to a function without arguments; it makes
      tensors and modules on the default device of torch.

  Returns:
    ({name: function}, {"torch": version, or why there are no contestants}).
    The compiled one is missing where it does not compile.
  """
  if importlib.util.find_spec("torch") is None:
    return {}, {"torch": "not installed"}
  device = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
  if device == "cpu":
    # No use for it there, and its LLVM crashes beside that of JAX.
    sys.modules.setdefault("triton", None)
  import torch

  from benchmarks import torch_vitgan

  if device is None or (device == "cuda" and not torch.cuda.is_available()):
    return {}, {"torch": f"not on this device: {jax.default_backend()}"}
  try:
    torch_vitgan.check(config)
  except ConfigError as error:
    return {}, {"torch": str(error)}
  torch.set_default_device(device)
  torch.set_num_threads(os.cpu_count())
  # TF32 on a GPU, which is the default of XLA.
  torch.set_float32_matmul_precision("high")

  def waited_for(function):
    def call():
      is_bfloat16 = config.dtype == "bfloat16"
      with torch.autocast(device, torch.bfloat16, enabled=is_bfloat16):
        function()
      if device == "cuda":
        torch.cuda.synchronize()

    return call

  functions = {
    "torch": waited_for(make(False)),
    "torch_compile": waited_for(make(True)),
  }
  try:
    functions["torch_compile"]()
  except Exception as error:  # of any kind: no C++ compiler, no headers, a bug
    logging.warning("torch.compile failed: %s", error)
    del functions["torch_compile"]
  return functions, {"torch": torch.__version__}


def compile_function(compiled):
  """Returns `torch.compile`, or what leaves a function as it is."""
  import torch

  return torch.compile if compiled else lambda function: function


def figures(unit, count, our_seconds, their_seconds):
  """Returns the speed of each contestant and how many times as fast ours is.

  Args:
    unit: of the figures' names, "images_per_sec".
    count: of images in one call.
    our_seconds: of a call.
    their_seconds: {name: seconds}, of `contestants`; all are None if empty.
  """
  result = {}
  for name in ("torch", "torch_compile"):
    taken = their_seconds.get(name)
    result[f"{name}_{unit}"] = taken and round(count / taken, 1)
    result[f"{name}_ratio"] = taken and round(taken / our_seconds, 2)
  return result
