import io
import json
import shutil

import numpy as np
import pytest
import scipy.linalg

from tests import datasets, runs, toy_features
from tests.datasets import data_config, encode, noise
from vitgan_jax.data import prepare
from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics import (
  features,
  fid,
  inception,
  score,
  statistics,
  torch_files,
)
from vitgan_jax.metrics.feature_network import FeatureNetwork


def smooth(num_images, seed):
  """Returns images [N, 8, 8, 3] that differ in their colours."""
  colours = noise(num_images, 2, 2, 3, seed=seed)
  return colours.repeat(4, axis=1).repeat(4, axis=2)


def files_of(images):
  return {f"{i:06d}.png": encode(image) for i, image in enumerate(images)}


def write(kind, path, images):
  """Writes images in one of the forms that can be scored; returns the path."""
  if kind == "npz":
    np.savez(path / "images.npz", images)
    return path / "images.npz"
  if kind == "zip":
    return datasets.write_zip(path / "images.zip", files_of(images))
  folder = datasets.write_folder(path / "images", files_of(images))
  if kind == "prepared":
    return prepare.prepare(data_config(path, "folder", path=str(folder)))
  return folder


@pytest.mark.parametrize("kind", ["folder", "zip", "npz", "prepared"])
def test_images_are_read_from_each_form(tmp_path, kind):
  images = smooth(12, seed=0)
  loaded = score.load_images(write(kind, tmp_path, images))
  np.testing.assert_array_equal(loaded[:], images)


def test_what_sampling_writes_beside_images_and_hidden_files_are_left_out(
  tmp_path,
):
  images = smooth(3, seed=0)
  files = files_of(images) | {"grid.png": encode(noise(30, 30, 3))}
  files |= {".hidden": b"", "dataset.json": b"{}"}
  folder = datasets.write_folder(tmp_path / "x", files)
  np.testing.assert_array_equal(score.load_images(folder), images)


def test_images_are_known_by_their_content_whatever_their_names(tmp_path):
  images = smooth(3, seed=0)
  files = dict(zip(["a.jfif", "b", "c.bmp"], files_of(images).values()))
  folder = datasets.write_folder(tmp_path / "x", files)
  np.testing.assert_array_equal(score.load_images(folder), images)
  # As the published samples of ADM, with a class each.
  np.savez(tmp_path / "adm.npz", images, np.arange(3))
  shutil.copy(tmp_path / "adm.npz", tmp_path / "adm.zip")
  np.save(tmp_path / "one.npy", images)
  for name in ("adm.npz", "adm.zip", "one.npy"):
    loaded = score.load_images(tmp_path / name)
    np.testing.assert_array_equal(loaded, images)


def test_what_a_zip_holds_beside_images_is_named(tmp_path, capsys):
  images = smooth(2, seed=0)
  files = files_of(images) | {"LICENSE.txt": b"free"}
  path = datasets.write_zip(tmp_path / "x.zip", files)
  np.testing.assert_array_equal(score.load_images(path), images)
  assert "1 no image (LICENSE.txt, ...)" in capsys.readouterr().err


def savez(*args, **arrays):
  file = io.BytesIO()
  np.savez(file, *args, **arrays)
  return file.getvalue()


@pytest.mark.parametrize(
  "name, files, message",
  [
    ("missing", {}, "no folder or zip at"),
    ("x", {"readme.txt": b"text"} | files_of(smooth(2, 0)), "readme.txt"),
    ("x", {"sub/.keep": b""}, "no images in"),
    ("x", {"grid.png": encode(noise(8, 8, 3))}, "beside grid.png"),
    ("x", {"1.png": b"\x00", "2.bin": b"data"}, "2.bin, which is no image"),
    ("x", {"1.png": b"text"}, "1.png is no image"),
    (
      "x",
      {"1.png": encode(noise(8, 8, 3)), "2.png": encode(noise(8, 6, 3))},
      "1.png has 8 x 8 pixels, 2.png 6 x 8",
    ),
    ("x/1.npz", {"1.npz": b"text"}, "one array"),
    ("x/1.npz", {"1.npz": savez(a=noise(2, 2), b=noise(2, 2))}, "one array"),
    ("x/1.npz", {"1.npz": savez(a=np.zeros((2, 8, 8, 3)))}, "float64"),
    ("x/1.npz", {"1.npz": savez(a=noise(2, 8, 8))}, "[N, H, W, 3]"),
    ("x/none.npz", {}, "one array"),
    ("x/1.npz", {"1.npz": b""}, "one array of images, and does not open"),
    ("x/1.npz", {"1.npz": savez(noise(9, 8, 8, 3))[:900]}, "does not open"),
    ("x/1.npz", {"1.npz": savez(*noise(2, 2, 8, 8, 3))}, "arr_1 uint8"),
    ("x/1.npz", {"1.npz": savez(noise(0, 8, 8, 3))}, "uint8 [0, 8, 8, 3]"),
    ("x/1.npz", {"1.npz": savez()}, "it has no array"),
    ("x/1.npz", {"1.npz": savez(np.array([None]))}, "does not open"),
    ("x/1.npz", {"1.npz": savez(mu=np.ones(3), sigma=np.eye(2))}, "mu [F]"),
    (
      "x/1.npz",
      {"1.npz": savez(mu=np.full(1, np.nan), sigma=np.eye(1))},
      "finite",
    ),
    ("x/1.txt", {"1.txt": b"text"}, "neither a folder nor"),
  ],
)
def test_what_cannot_be_scored_is_one_clear_line(
  tmp_path, name, files, message
):
  datasets.write_folder(tmp_path / "x", files)
  with pytest.raises(ConfigError) as error:
    score.load_images(tmp_path / name)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_scores_are_those_of_the_features():
  real, fake = smooth(1200, seed=0), smooth(1100, seed=1) // 2
  result = score.score(real, fake, toy_features.tiny())
  expected = fid.frechet_distance(
    *(
      statistics.from_features(toy_features.features_of(images))
      for images in (real, fake)
    )
  )
  np.testing.assert_allclose(result["fd_tiny1100"], expected, rtol=1e-5)
  assert 0 < result["precision_tiny1100"] < 1


def test_same_images_are_at_no_distance():
  images = smooth(1000, seed=0)
  result = score.score(images, images, toy_features.tiny())
  assert abs(result["fd_tiny1k"]) < 1e-6
  assert result["precision_tiny1k"] == result["recall_tiny1k"] == 1
  assert result["coverage_tiny1k"] == 1


def test_command_prints_a_table_or_json(tmp_path, monkeypatch):
  monkeypatch.setattr(
    features, "load_network", lambda name, weights: toy_features.tiny()
  )
  write("npz", tmp_path, smooth(1000, seed=0))
  write("folder", tmp_path, smooth(1000, seed=1))
  command = ("vitgan_jax.metrics.score", "images.npz", "images")
  code, table, errors = runs.call(*command, cwd=tmp_path)
  assert code == 0, errors
  assert "fd_tiny1k" in table and "images.npz" in table
  _, output, _ = runs.call(*command, "--json", cwd=tmp_path)
  record = json.loads(output)
  assert record["real"] == "images.npz" and record["num_fake"] == 1000
  assert record["network_sha256"] == "0" * 64
  assert f"{record['fd_tiny1k']:.5g}" in table


def frechet(a, b):
  """Returns the Fréchet distance of features [N, F], by a matrix root."""
  mean = a.mean(0) - b.mean(0)
  a, b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
  return mean @ mean + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)


@pytest.mark.parametrize(
  "real, fake, name",
  [
    ("moments", "images", "fd_tiny1k"),
    ("images", "moments", "fd_tiny"),
    ("moments", "moments", "frechet_distance"),
  ],
)
def test_mean_and_covariance_give_the_frechet_distance_alone(
  real, fake, name, tmp_path, monkeypatch
):
  networks_asked_for = []

  def load_network(name, weights):
    networks_asked_for.append(name)
    return toy_features.tiny()

  monkeypatch.setattr(features, "load_network", load_network)
  seen = []
  for i, kind in enumerate((real, fake)):
    images = smooth(1000, seed=i) // (i + 1)
    seen.append(toy_features.features_of(images))
    arrays = {"arr_0": images}
    if kind == "moments":
      mean, cov = seen[i].mean(0), np.cov(seen[i], rowvar=False)
      arrays = {"mu": mean, "sigma": cov}
    np.savez(tmp_path / f"{i}.npz", **arrays)
  command = ("vitgan_jax.metrics.score", "0.npz", "1.npz")
  code, output, errors = runs.call(*command, "--json", cwd=tmp_path)
  assert code == 0, errors
  record = json.loads(output)
  np.testing.assert_allclose(record[name], frechet(*seen), rtol=1e-4)
  assert not {k for k in record if k.startswith(("precision", "is", "kd"))}
  _, table, _ = runs.call(*command, cwd=tmp_path)
  assert name in table and "the Fréchet distance alone" in table
  assert bool(networks_asked_for) == ("images" in (real, fake))


def test_mean_and_covariance_of_another_network_are_refused(tmp_path):
  moments = statistics.from_moments(np.zeros(2048), np.eye(2048))
  with pytest.raises(ConfigError, match="same network"):
    score.score(moments, smooth(1000, seed=0), toy_features.tiny())


@pytest.mark.parametrize("arguments", [[], ["one"], ["a", "b", "c"]])
def test_wrong_call_is_an_error_that_says_how(arguments):
  with pytest.raises(ConfigError, match=r"usage: .* REAL FAKE"):
    score.main(arguments)


@pytest.mark.slow  # Inception on 8,600 images
def test_all_metrics_of_images_agree_with_torch_fidelity(tmp_path):
  from tests import fidelity  # late: where torch is missing, it skips

  path = tmp_path / "weights.pth"
  fidelity.write_random_inception(path)
  state_dict = torch_files.read_state_dict(path)
  network = FeatureNetwork(
    "inception",
    "",
    2048,
    inception.from_state_dict(state_dict),
    inception.apply,
  )
  real, fake = smooth(2150, seed=0), smooth(2150, seed=1) // 2
  ours = score.score(real, fake, network)

  theirs_network = fidelity.inception(path)

  def theirs_of(images):
    parts = []
    for i in range(0, len(images), 16):
      part = np.ascontiguousarray(images[i : i + 16].transpose(0, 3, 1, 2))
      with fidelity.torch.no_grad():
        parts.append(theirs_network(fidelity.torch.from_numpy(part)))
    pooled, logits, _ = map(fidelity.torch.cat, zip(*parts))
    return pooled, logits

  real_features, _ = theirs_of(real)
  # The order of the images decides which are in a split or a subset.
  order = features.order(fake, len(fake))
  fake_features, fake_logits = (x[order] for x in theirs_of(fake))
  real_features = real_features[features.order(real, len(real))]
  theirs = fidelity.scores(real_features, fake_features, fake_logits)
  names = {
    "fid2150": "frechet_inception_distance",
    "kid2150": "kernel_inception_distance_mean",
    "is2150": "inception_score_mean",
    "precision2150": "precision",
    "recall2150": "recall",
  }
  for name, their_name in names.items():
    np.testing.assert_allclose(
      ours[name],
      theirs[their_name],
      rtol=1e-3,  # features agree to 1e-6; a neighbour may turn on that
      err_msg=name,
    )
  assert ours["fid2150"] > 0.01 and 0 < ours["precision2150"] < 1
