"""torch-fidelity, to be measured against, without torchvision.

torchvision draws a CUDA build of torch; of torch-fidelity only the reading of
datasets needs it.
"""

import importlib
import importlib.util
import sys
import types
from unittest import mock


def load(name):
  """Returns torch_fidelity.<name>, such as "metric_kid".

  Raises:
    ImportError: if torch or torch-fidelity is not installed.
  """
  if "torch_fidelity" not in sys.modules:
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None or importlib.util.find_spec("torch") is None:
      raise ImportError("torch and torch-fidelity are needed")
    # The package without its __init__, which imports everything.
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["torch_fidelity"] = package
    sys.modules["torch_fidelity.utils"] = mock.MagicMock()
  return importlib.import_module(f"torch_fidelity.{name}")


def inception(path):
  """Returns the extractor of a file of weights: pool3 and both logits."""
  return load("feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
    "inception-v3-compat",
    ["2048", "logits_unbiased", "logits"],
    feature_extractor_weights_path=str(path),
  )


def scores(real, fake, logits):
  """Returns all metrics that it has, a dict; logits in the order given.

  Args:
    real: features [N, F], as the others of numpy or torch.
    fake: features [M, F].
    logits: [M, C], of the generated images.
  """
  import torch

  real, fake, logits = map(torch.as_tensor, (real, fake, logits))
  fid = load("metric_fid")
  return {
    **fid.fid_statistics_to_metric(
      fid.fid_features_to_statistics(real),
      fid.fid_features_to_statistics(fake),
      verbose=False,
    ),
    **load("metric_kid").kid_features_to_metric(fake, real, verbose=False),
    **load("metric_isc").isc_features_to_metric(logits, shuffle=False),
    **load("metric_prc").prc_features_to_metric(
      fake.double(), real.double(), verbose=False
    ),
  }


def write_random_inception(path, legacy=False):
  """Writes weights that neither blow up nor extinguish the activations.

  Args:
    path: of the file.
    legacy: whether in the format that torch had before version 1.6.
  """
  import torch

  with (
    mock.patch.object(torch, "load"),
    mock.patch.object(torch.nn.Module, "load_state_dict"),
  ):
    state_dict = inception(path).state_dict()
  generator = torch.Generator().manual_seed(0)
  for name, value in state_dict.items():
    if name.endswith(("conv.weight", "fc.weight")):
      value.normal_(0.0, (2.0 / value[0].numel()) ** 0.5, generator=generator)
    elif name.endswith(("bn.weight", "running_var")):
      value.uniform_(0.5, 1.5, generator=generator)
    elif value.is_floating_point():
      value.normal_(0.0, 0.1, generator=generator)
  torch.save(state_dict, path, _use_new_zipfile_serialization=not legacy)
