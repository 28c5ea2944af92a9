import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from configs import digits
from tests import datasets, runs, toy_features
from vitgan_jax import config as config_lib
from vitgan_jax import latent_space, partitioning, project, sample
from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics import features
from vitgan_jax.metrics.feature_network import Features
from vitgan_jax.models import networks as network_table


@pytest.fixture(autouse=True)
def tiny_features(monkeypatch):
  """Has features be the means of 16 squares: smooth, and soon compiled."""
  network = toy_features.tiny()._replace(params=(), apply=_means)
  monkeypatch.setattr(features, "load_network", lambda name: network)
  monkeypatch.setattr(latent_space, "_NUM_LATENTS", 1000)


def _means(params, images, xp=jnp):
  count, size = images.shape[:2]
  x = images.reshape(count, 4, size // 4, 4, size // 4, 3)
  return Features(xp.mean(x, axis=(2, 4)).reshape(count, -1) / 255, None)


@pytest.fixture(scope="module")
def samples(digits_run, tmp_path_factory):
  """Returns a folder of three samples of the run, and those, uint8."""
  folder = tmp_path_factory.mktemp("samples")
  nets = network_table.build(digits_run.config)
  sampler = sample.make_sampler(nets, partitioning.create_mesh())
  images = np.asarray(sampler(digits_run.state.g_ema_variables, 7, 0))[:3]
  pngs = {f"{i}.png": datasets.encode(x) for i, x in enumerate(images)}
  return datasets.write_folder(folder, pngs), images


def synthesize(run, w):
  """Returns what the generator makes of w [B, ...], in [-1, 1], float64."""
  generator = network_table.build(run.config).generator
  variables = jax.device_get(run.state.g_ema_variables)
  images = generator.apply(variables, w, method="synthesize")
  return np.clip(np.asarray(images, np.float64), -1, 1)


def run_it(run, images, output, **arguments):
  arguments = {"num_steps": 150, **arguments}
  return project.project(run.workdir, [str(images)], output, **arguments)


@pytest.mark.parametrize(
  "space, shape",
  [("w", (32,)), pytest.param("w+", (2, 32), marks=pytest.mark.slow)],
)
def test_own_samples_are_found_again(
  space, shape, digits_run, samples, tmp_path, capsys
):
  folder, images = samples
  records = run_it(digits_run, folder, tmp_path / "out", space=space)
  assert [x["image"] for x in records] == [f"{i}.png" for i in range(3)]
  paths = [tmp_path / "out" / f"{i}.png" for i in range(3)]
  w = np.stack([np.load(f"{path}.npz")["w"] for path in paths])
  assert w.shape == (3, *shape)
  found, wanted = synthesize(digits_run, w), images / 127.5 - 1
  expected = np.mean((found - wanted) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(
    [x["pixels"] for x in records], expected, rtol=1e-3, atol=1e-7
  )
  of_found, of_wanted = (
    _means((), x, np).features for x in ((found + 1) * 127.5, images)
  )
  expected = ((of_found - of_wanted) ** 2).sum(1) / (of_wanted**2).sum(1)
  np.testing.assert_allclose(
    [x["features"] for x in records], expected, rtol=1e-2, atol=1e-7
  )
  for name in ("pixels", "features"):
    before = np.mean([x[f"{name}_at_mean"] for x in records])
    assert np.mean([x[name] for x in records]) < 0.1 * before, name
  # The picture has the image on the left, and what w makes on the right.
  picture = np.asarray(Image.open(f"{paths[2]}.png")).astype(int)
  assert picture.shape == (256, 33 * 16, 3)
  left, right = picture[::16, ::16][:, :16], picture[::16, ::16][:, 17:]
  np.testing.assert_array_equal(left, images[2])
  assert np.abs(right - (found[2] + 1) * 127.5).max() <= 1
  grid = np.asarray(Image.open(tmp_path / "out" / "projections.png"))
  small = grid[:: len(grid) // 16, :: len(grid) // 16]
  np.testing.assert_array_equal(small[:, 34:50], images[1])  # the third cell
  table = capsys.readouterr().out
  assert f"| 2.png | {records[2]['pixels_at_mean']:.4f} |" in table
  mean = np.mean([x["features"] for x in records])
  assert "| mean of 3 |" in table and f"{mean:.4f} |" in table


@pytest.mark.slow
def test_what_is_finished_is_kept_and_the_rest_is_as_without_a_stop(
  digits_run, samples, tmp_path, monkeypatch
):
  monkeypatch.setattr(project, "BATCH_SIZE", 1)
  folder, _ = samples
  common = {"num_steps": 3, "seed": 1}
  whole = run_it(digits_run, folder, tmp_path / "whole", **common)
  append, calls = project.files.append_record, []

  def killed(path, record):
    if len(calls) == 1:  # w of the second is written
      raise KeyboardInterrupt
    calls.append(record)
    append(path, record)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(project.files, "append_record", killed)
    run_it(digits_run, folder, tmp_path / "out", **common)
  first = {
    path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()
  }
  resumed = run_it(digits_run, folder, tmp_path / "out", **common)
  for a, b in zip(resumed, whole, strict=True):
    assert a.keys() == b.keys() and a["image"] == b["image"]
    np.testing.assert_allclose(a["pixels"], b["pixels"], rtol=1e-4)
  for i in range(3):
    w = [np.load(tmp_path / x / f"{i}.png.npz")["w"] for x in ("out", "whole")]
    np.testing.assert_allclose(*w, rtol=1e-4, atol=1e-5)
    path = tmp_path / "out" / f"{i}.png.npz"
    assert (first.get(path.name) == path.stat().st_mtime_ns) == (i < 1)
  before = runs.snapshot(tmp_path)
  monkeypatch.setattr(project, "make_projector", None)  # nothing is left to do
  assert run_it(digits_run, folder, tmp_path / "out", **common) == resumed
  assert runs.snapshot(tmp_path) == before
  with pytest.raises(ConfigError, match=r"has projections with seed=1.*seed=2"):
    run_it(digits_run, folder, tmp_path / "out", num_steps=3, seed=2)


def projected(arguments, size, labels):
  """Returns w, images and the distances before and after 20 steps to noise."""
  start, step, finish = project.make_projector(*arguments, "w", 20)
  targets = datasets.noise(2, size, size, 3)
  state, keys = start(targets), jax.random.split(jax.random.key(0), 2)
  _, _, before = finish(state, targets, labels)
  for i in range(20):
    state = step(state, i, targets, labels, keys)
  w, images, after = finish(state, targets, labels)
  return w, images, before, after


@pytest.mark.slow
@pytest.mark.parametrize("kind, length", [("biggan", 16), ("transgan", 32)])
def test_without_a_mapping_network_the_latent_is_sought(kind, length):
  config = digits.get_config(f"smoke,g={kind}")
  config.data.num_classes = 3 if kind == "biggan" else 0
  config.data.image_size = 32
  nets = network_table.build(config)
  labels = np.array([0, 2]) if kind == "biggan" else None
  z = jax.random.normal(jax.random.key(0), (2, length))
  variables = jax.jit(nets.generator.init)(jax.random.key(1), z, labels)
  arguments = (nets, variables, toy_features.tiny())
  w, images, before, after = projected(arguments, 32, labels)
  assert w.shape == (2, length)
  expected = nets.generator.apply(
    variables, w, labels
  )  # in the class asked for
  expected = np.clip(np.asarray(expected), -1, 1) * 127.5 + 127.5
  assert np.abs(images - expected).max() <= 1
  assert sum(after.values()).sum() < sum(before.values()).sum()
  with pytest.raises(ConfigError, match="--space=w"):
    project.make_projector(*arguments, "w+", 20)


@pytest.mark.slow
def test_several_latents_of_an_image_are_sought_together():
  config = digits.get_config("smoke,g=ganformer")
  config.data.image_size = 8
  nets = network_table.build(config)
  z = np.ones((2, nets.generator.latent_dim), np.float32)
  variables = jax.jit(nets.generator.init)(jax.random.key(1), z)
  arguments = (nets, variables, toy_features.tiny())
  w, _, before, after = projected(arguments, 8, None)
  assert w.shape == (2, 4, 8)
  assert sum(after.values()).sum() < sum(before.values()).sum()


def labelled_run(tmp_path):
  """Returns a workdir, without checkpoints, of a run with three classes."""
  config = digits.get_config("smoke")
  config.data.num_classes = 3
  config_lib.claim_workdir(config, tmp_path / "run", ["cat", "dog", "owl"])
  return tmp_path / "run"


def test_classes_are_those_of_the_images_or_those_that_are_given(tmp_path):
  run = labelled_run(tmp_path)
  png = datasets.encode(datasets.noise(16, 16, 3))
  listed = [["a.png", 2], ["b.png", 0], ["c.png", 2]]
  by_number = {name: png for name, _ in listed}
  by_number["dataset.json"] = json.dumps({"labels": listed}).encode()
  by_name = {"owl/a.png": png, "cat/b.png": png}
  for name, content, expected in [
    ("by_number", by_number, {"a.png": 2, "b.png": 0, "c.png": 2}),
    ("by_name", by_name, {"cat/b.png": 0, "owl/a.png": 2}),
  ]:
    path = datasets.write_zip(tmp_path / f"{name}.zip", content)
    targets = project.read_targets([path], run)
    assert {x.name: x.label for x in targets} == expected
    targets = project.read_targets([path], run, ["dog", "0"])
    assert [x.label for x in targets] == [1, 0, 1][: len(expected)]


def test_images_become_centred_squares_and_broken_ones_are_left_out(
  digits_run, tmp_path, capsys
):
  image = datasets.noise(16, 20, 3)
  datasets.write_folder(
    tmp_path, {"a.png": datasets.encode(image), "b.png": b"no image"}
  )
  paths = [str(tmp_path / x) for x in ("a.png", "b.png")]
  (target,) = project.read_targets(paths, digits_run.workdir)
  np.testing.assert_array_equal(target.pixels, image[:, 2:18])
  assert "Left out: b.png" in capsys.readouterr().err


def test_what_cannot_be_is_told_in_one_line(digits_run, samples, tmp_path):
  folder, _ = samples
  (tmp_path / "empty").mkdir()
  twice = tmp_path / "0.png"
  twice.write_bytes((folder / "0.png").read_bytes())
  labelled = labelled_run(tmp_path)
  before = runs.snapshot(tmp_path)
  for flags, words in [
    ({"images": None}, "--images=FOLDER_ZIP_OR_FILES"),
    ({"images": "nowhere"}, "at --images=nowhere"),
    ({"images": tmp_path / "empty"}, "no images in"),
    ({"images": f"{twice},{folder}/0.png"}, "has 0.png twice"),
    ({"images": labelled / "config.json"}, "can be read"),
    ({"workdir": "nowhere"}, "not a workdir"),
    ({"workdir": labelled}, "has classes"),
    ({"workdir": labelled, "classes": "cow"}, "no class 'cow'"),
    ({"classes": "cow"}, "trained without"),
    ({"num_steps": 0}, "--num_steps=0 must be"),
    ({"seed": -1}, "--seed=-1 must be"),
    ({"space": "z"}, "--space"),
    ({"output": folder / "out"}, "is within --images="),
  ]:
    flags = {
      "workdir": digits_run.workdir,
      "images": folder,
      "output": tmp_path / "out",
    } | flags
    code, _, errors = runs.call(
      "vitgan_jax.project",
      *(f"--{k}={v}" for k, v in flags.items() if v is not None),
      cwd=tmp_path,
    )
    line = errors.splitlines()[-1]
    assert code == 78 and line.startswith("error: ") and words in line, errors
    assert runs.snapshot(tmp_path) == before


@pytest.mark.slow
def test_gradients_go_through_the_network_that_is_installed():
  from vitgan_jax.metrics import efficientnet

  network = efficientnet.load()
  image = 255 * jax.random.uniform(jax.random.key(0), (1, 16, 16, 3))

  @jax.jit
  def value(image):
    return (network.apply(network.params, image).features ** 2).mean()

  slope = jax.jit(jax.grad(value))(image)
  # Along another direction the difference may be lost in float32.
  length = np.linalg.norm(slope)
  step = 2.0 * slope / length
  difference = (value(image + step) - value(image - step)) / 4.0
  assert length > 0
  np.testing.assert_allclose(length, difference, rtol=0.05)
