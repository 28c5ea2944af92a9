"""torch-fidelity; tests that import this are skipped where it is missing."""

import importlib
import importlib.util
from unittest import mock

import pytest

from benchmarks import fidelity

torch = pytest.importorskip("torch")
try:
  fidelity.load("metric_fid")
except ImportError:
  pytest.skip("torch-fidelity is missing", allow_module_level=True)

load = fidelity.load
inception = fidelity.inception
scores = fidelity.scores
write_random_inception = fidelity.write_random_inception


def load_pytorch_fid(name):
  """Returns pytorch_fid.<name>, such as "inception".

  The published torchvision is a CUDA build: on a CPU its operators do not load,
  and it registers fakes for them nevertheless. Networks need neither.
  """
  for package in ("pytorch_fid", "torchvision"):
    if importlib.util.find_spec(package) is None:
      pytest.skip(f"{package} is missing")
  with mock.patch.object(
    torch.library, "register_fake", lambda *unused: lambda function: function
  ):
    return importlib.import_module(f"pytorch_fid.{name}")
