import functools
import hashlib
import http.server
import importlib
import pathlib
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.flops import model_flops
from tests import fidelity
from vitgan_jax import partitioning
from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics import inception, torch_files

torch = fidelity.torch

# Of float32 sums over some thousand products, relative to the largest value.
TOLERANCE = 1e-5


def images(num, height=32, width=32):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (num, height, width, 3), np.uint8)


def to_torch(array):
  return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def difference(actual, expected):
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape
  return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def random_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("inception") / "random.pth"
  fidelity.write_random_inception(path, legacy=True)
  return path


@pytest.fixture(scope="module")
def params(random_file):
  return inception.from_state_dict(torch_files.read_state_dict(random_file))


@pytest.fixture(scope="module")
def reference(random_file):
  """The outputs of torch-fidelity for eight images, by name."""
  network = fidelity.inception(random_file)
  outputs = {}

  def record(name, unused_module, unused_inputs, output):
    outputs[name] = output.numpy().transpose(0, 2, 3, 1)

  for name, module in network.named_children():
    if name.startswith(("Mixed", "MaxPool")):
      module.register_forward_hook(functools.partial(record, name))
  with torch.no_grad():
    features = network(to_torch(images(8)))
  names = ("features", "logits_unbiased", "logits")
  return outputs | {n: f.numpy() for n, f in zip(names, features)}


def test_every_block_agrees_with_torch_fidelity(params, reference):
  ours = jax.jit(inception.activations)(params, images(8)[:2])
  assert len(ours) == 13
  for name, activation in ours.items():
    assert activation.dtype == jnp.float32
    assert np.std(reference[name]) > 0.1, name
    assert difference(activation, reference[name][:2]) < TOLERANCE, name


def test_outputs_agree_with_the_batch_over_all_devices(params, reference):
  mesh = partitioning.create_mesh()
  batch = partitioning.global_batch(mesh, images(8))
  replicated = jax.device_put(params, partitioning.replicated(mesh))
  apply = jax.jit(inception.apply).lower(replicated, batch).compile()
  features, logits = apply(replicated, batch)
  assert difference(features, reference["features"]) < TOLERANCE
  assert difference(logits, reference["logits_unbiased"]) < TOLERANCE
  assert difference(logits, reference["logits"]) > 100 * TOLERANCE
  assert {s.data.shape for s in features.addressable_shards} == {(1, 2048)}
  assert "all-gather" not in apply.as_text()


def test_products_are_float32_on_every_device(params):
  program = jax.jit(inception.apply).lower(params, images(1)).as_text()
  assert "HIGHEST" in program and "DEFAULT" not in program


def test_flops_are_those_of_torch(params, random_file):
  flop_counter = importlib.import_module("torch.utils.flop_counter")
  network = fidelity.inception(random_file)
  with flop_counter.FlopCounterMode(display=False) as counter:
    network(to_torch(images(1)))
  # Ours computes the borders that two convolutions are without; see there.
  np.testing.assert_allclose(
    model_flops(inception.apply, params, images(1)),
    counter.get_total_flops(),
    rtol=0.02,
  )


@pytest.mark.parametrize(
  "size", [(32, 32), (64, 64), (400, 400), (48, 80), (299, 299)]
)
def test_resize_is_that_of_tensorflow_1(size):
  x = images(2, *size)
  compat = fidelity.load("interpolate_compat_tensorflow")
  expected = compat.interpolate_bilinear_2d_like_tensorflow1x(
    to_torch(x).float(), (299, 299), align_corners=False
  )
  expected = expected.numpy().transpose(0, 2, 3, 1)
  actual = jax.jit(inception.resize)(x)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torchvision
def test_network_is_that_of_pytorch_fid(params, random_file):
  theirs = fidelity.load_pytorch_fid("inception")
  with (
    mock.patch.object(
      theirs,
      "load_state_dict_from_url",
      lambda *unused, **options: torch.load(random_file),
    ),
  ):
    # Its resize has half-pixel centres, unlike TensorFlow's: left out.
    network = theirs.InceptionV3(resize_input=False, normalize_input=False)
  x = images(2, 299, 299)
  normalised = (to_torch(x).float() - 128) / 128
  with torch.no_grad():
    (expected,) = network.eval()(normalised)
  actual, _ = jax.jit(inception.apply)(params, x)
  assert difference(actual, expected[:, :, 0, 0]) < TOLERANCE


def half_pixel_resize(x):
  shape = (x.shape[0], 299, 299, 3)
  return jax.image.resize(x.astype(jnp.float32), shape, "bilinear")


def padded_average_pool(x):
  return inception._pool(inception._pad(x, 0.0), jnp.add, 1) / 9.0


@pytest.mark.parametrize(
  "function, mistake",
  [("resize", half_pixel_resize), ("_average_pool", padded_average_pool)],
)
def test_comparison_sees_usual_mistakes(
  function, mistake, params, reference, monkeypatch
):
  monkeypatch.setattr(inception, function, mistake)
  # A function of its own: jit would return the program without the mistake.
  first_block = jax.jit(lambda *xs: inception.activations(*xs)["Mixed_5b"])
  wrong = first_block(params, images(8)[:2])
  assert difference(wrong, reference["Mixed_5b"][:2]) > 1000 * TOLERANCE


def test_last_block_must_pool_by_maximum(params, reference):
  block = functools.partial(inception._block_e, pool_by_maximum=False)
  wrong = jax.jit(block)(params["Mixed_7c"], reference["Mixed_7b"])
  assert difference(wrong, reference["Mixed_7c"]) > 1000 * TOLERANCE


@pytest.mark.parametrize("legacy", [True, False])
def test_reads_what_torch_wrote(legacy, tmp_path):
  base = torch.arange(24.0)
  tensors = {
    "transposed": base.reshape(2, 3, 4).permute(2, 0, 1),
    "part": base[5:9],
    "scalar": torch.tensor(7),
  }
  path = tmp_path / "weights.pth"
  torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
  arrays = torch_files.read_state_dict(path)
  assert list(arrays) == list(tensors)
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(arrays[name], tensor.numpy(), strict=True)


@pytest.mark.parametrize("legacy", [True, False])
def test_files_that_name_other_functions_are_refused(legacy, tmp_path):
  path = tmp_path / "weights.pth"
  value = {"path": pathlib.PurePosixPath("x")}
  torch.save(value, path, _use_new_zipfile_serialization=not legacy)
  with pytest.raises(ConfigError, match="PurePosixPath"):
    torch_files.read_state_dict(path)


@pytest.mark.parametrize("legacy", [True, False])
def test_damaged_files_are_errors_of_one_line(legacy, tmp_path):
  path = tmp_path / "weights.pth"
  tensors = {"a": torch.ones(3)}
  torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
  content = path.read_bytes()
  # At the end are the numbers, of 4 bytes each.
  for size in [
    *range(0, len(content), 7),
    *range(len(content) - 12, len(content)),
  ]:
    path.write_bytes(content[:size])
    with pytest.raises(ConfigError, match="holds no weights") as error:
      torch_files.read_state_dict(path)
    assert "\n" not in str(error.value)


def assert_helpful(error):
  message = str(error.value)
  assert "\n" not in message
  assert inception.URL in message and "--inception_weights=FILE" in message


def test_missing_and_other_files_are_refused(tmp_path):
  path = tmp_path / "weights.pth"
  with pytest.raises(ConfigError, match="No such file") as error:
    inception.load(path)
  assert_helpful(error)
  with pytest.raises(ConfigError, match="Is a directory") as error:
    inception.load(tmp_path)
  assert_helpful(error)
  path.write_bytes(b"other weights")
  with pytest.raises(ConfigError, match=inception.SHA256) as error:
    inception.load(path)
  assert_helpful(error)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *unused_args):
    pass


@pytest.fixture
def download(random_file, tmp_path, monkeypatch):
  """A server of the random file as if it were the published; its cache."""
  handler = functools.partial(QuietHandler, directory=random_file.parent)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    url = f"http://127.0.0.1:{server.server_port}/{random_file.name}"
    digest = hashlib.sha256(random_file.read_bytes()).hexdigest()
    monkeypatch.setattr(inception, "URL", url)
    monkeypatch.setattr(inception, "SHA256", digest)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield tmp_path / ".cache" / "vitgan_jax"
    server.shutdown()
    thread.join()


def test_weights_are_downloaded_once(download, params, monkeypatch):
  network = inception.load()
  assert network.sha256 == inception.SHA256
  jax.tree.map(np.testing.assert_array_equal, network.params, params)
  assert [p.name for p in download.iterdir()] == ["random.pth"]
  monkeypatch.setattr(inception, "_download", None)
  assert inception.load().sha256 == network.sha256


def test_failed_downloads_leave_nothing(download, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(inception, "SHA256", "0" * 64)
    with pytest.raises(ConfigError, match="sha256") as error:
      inception.load()
    assert_helpful(error)
  monkeypatch.setattr(inception, "URL", inception.URL + ".gone")
  with pytest.raises(ConfigError, match=r"cannot download .* 404") as error:
    inception.load()
  assert_helpful(error)
  monkeypatch.setattr(inception, "URL", "http://127.0.0.1:9/weights.pth")
  with pytest.raises(ConfigError, match="cannot download") as error:
    inception.load()
  assert_helpful(error)
  assert list(download.iterdir()) == []


def test_cache_that_cannot_be_made_is_reported(download):
  download.parent.write_text("a file where the folder must be")
  with pytest.raises(ConfigError, match="cannot download") as error:
    inception.load()
  assert_helpful(error)
