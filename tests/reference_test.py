import os
import subprocess
import sys

import numpy as np
import pytest

from tests import datasets, runs, toy_features
from tests.datasets import data_config, encode, noise
from vitgan_jax import partitioning
from vitgan_jax.data import pipeline
from vitgan_jax.metrics import features, reference


@pytest.fixture
def images(tmp_path):
  files = {f"{i:02d}.png": encode(noise(8, 8, 3, seed=i)) for i in range(50)}
  datasets.write_folder(tmp_path / "images", files)
  data = data_config(tmp_path, "folder", path=str(tmp_path / "images"))
  return pipeline.load_images(data)


def extractor(**fields):
  return features.Extractor(
    toy_features.tiny(**fields), partitioning.create_mesh()
  )


@pytest.mark.parametrize("count", [50, 20])
def test_moments_are_of_all_images_and_features_of_some(images, count):
  result = reference.compute(extractor(), images, count)
  expected = toy_features.features_of(images[:])
  assert result.statistics.num == 50
  np.testing.assert_allclose(
    result.statistics.mean, expected.mean(0), atol=1e-6
  )
  np.testing.assert_allclose(
    result.statistics.cov, np.cov(expected, rowvar=False), atol=1e-6
  )
  assert len(set(result.indices.tolist())) == len(result.features) == count
  np.testing.assert_allclose(
    result.features, expected[result.indices], atol=1e-5
  )


def test_reference_is_computed_once_for_each_network_and_count(
  images, monkeypatch
):
  computed = []
  compute = reference.compute
  monkeypatch.setattr(
    reference,
    "compute",
    lambda *args: computed.append(args[2]) or compute(*args),
  )
  first = reference.load(extractor(), images, 20)
  again = reference.load(extractor(), images, 20)
  assert computed == [20]
  np.testing.assert_array_equal(again.features, first.features)
  np.testing.assert_array_equal(again.indices, first.indices)
  assert again.statistics.num == 50
  np.testing.assert_array_equal(again.statistics.cov, first.statistics.cov)
  reference.load(extractor(), images, 99)  # there are 50
  reference.load(extractor(), images, 50)
  reference.load(extractor(name="other-1"), images, 20)
  reference.load(extractor(sha256="1" * 64), images, 20)
  assert computed == [20, 50, 20, 20]


@pytest.mark.parametrize("size", [0, 1000, -100])
def test_reference_that_is_damaged_is_computed_anew(images, size):
  first = reference.load(extractor(), images, 20)
  (path,) = (images.path.parent / "references").iterdir()
  path.write_bytes(path.read_bytes()[:size])
  again = reference.load(extractor(), images, 20)
  np.testing.assert_array_equal(again.features, first.features)
  with np.load(path) as arrays:  # it is whole again
    np.testing.assert_array_equal(arrays["features"], first.features)


def test_no_flipped_bit_of_a_reference_gets_into_the_scores(
  images, monkeypatch
):
  first = reference.load(extractor(), images, 20)
  (path,) = (images.path.parent / "references").iterdir()
  content, rng = path.read_bytes(), np.random.default_rng(0)
  computed = []
  monkeypatch.setattr(
    reference, "compute", lambda *args: computed.append(args) or first
  )
  for _ in range(100):
    damaged = bytearray(content)
    damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(damaged)
    again = reference.load(extractor(), images, 20)
    assert again.statistics.num == first.statistics.num
    for found, expected in (
      (again.statistics.mean, first.statistics.mean),
      (again.statistics.scatter, first.statistics.scatter),
      (again.features, first.features),
      (again.indices, first.indices),
    ):
      np.testing.assert_array_equal(found, expected)
  assert 50 < len(computed) <= 100  # a date in the zip file harms nothing


def test_reference_of_other_images_is_another(images, tmp_path):
  reference.load(extractor(), images, 20)
  (tmp_path / "images" / "07.png").unlink()
  data = data_config(tmp_path, "folder", path=str(tmp_path / "images"))
  other = reference.load(extractor(), pipeline.load_images(data), 20)
  assert other.statistics.num == 49


_PROGRAM = """
import pathlib, sys
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 2)
process, port, path, output = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
from tests import toy_features
from vitgan_jax import partitioning
from vitgan_jax.data import pipeline
from vitgan_jax.metrics import features, reference
features.BATCH_SIZE = 4
images = pipeline.PreparedImages(pathlib.Path(path))
extractor = features.Extractor(toy_features.tiny(), partitioning.create_mesh())
for _ in range(2):  # computed, then read by the first process alone
  result = reference.load(extractor, images, 30)
assert (result is None) == (process == "1")
if result:
  np.savez(output, cov=result.statistics.cov, features=result.features)
"""


def test_two_processes_get_the_numbers_of_one(images, tmp_path):
  expected = reference.compute(extractor(), images, 30)
  environment = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
  with runs.free_port() as port:
    processes = [
      subprocess.Popen(
        [
          *(sys.executable, "-c", _PROGRAM, str(process), str(port)),
          *(images.path, tmp_path / "result.npz"),
        ],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
      )
      for process in range(2)
    ]
  for process in processes:
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
  with np.load(tmp_path / "result.npz") as result:
    np.testing.assert_allclose(
      result["cov"], expected.statistics.cov, atol=1e-6
    )
    np.testing.assert_allclose(result["features"], expected.features, atol=1e-6)


def test_reference_that_cannot_be_kept_is_used(images, capsys):
  (images.path.parent / "references").write_text("in the way")
  result = reference.load(extractor(), images, 20)
  assert result.statistics.num == 50 and len(result.features) == 20
  _, errors = capsys.readouterr()
  (line,) = [x for x in errors.splitlines() if "are not kept: " in x]
  assert "references" in line
