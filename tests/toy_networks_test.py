"""Networks that the table gets from outside go the whole way of a run."""

import contextlib
import io
import json
import shutil
import sys
from unittest import mock

import jax
import numpy as np
from PIL import Image
import pytest
import scipy.linalg

from configs import digits
from tests import datasets, monitor_test, runs, tiny, toy_features, toy_networks
from vitgan_jax import (
  checkpoint,
  demo,
  evaluate,
  gan_step,
  partitioning,
  sample,
  train_state,
  visualize,
)
from vitgan_jax import config as config_lib
from vitgan_jax.data import pipeline
from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics import features, score
from vitgan_jax.models import kinds, networks

NUM_SAMPLES = 1000
STATISTICS = "batch_stats/BatchNorm_0/mean"


@pytest.fixture(scope="module", autouse=True)
def table():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(kinds.GENERATORS, "toy", toy_networks.GENERATOR)
    patch.setitem(kinds.DISCRIMINATORS, "toy", toy_networks.DISCRIMINATOR)
    yield


def toy_config(**overrides):
  config = digits.get_config("smoke,g=toy,d=toy")
  assert config.generator.latent_dim == 4 and config.discriminator.width == 16
  config.data.num_classes = 10
  config.update_from_flattened_dict(overrides)
  return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run that was stopped after half of its steps, and went on."""
  workdir = tmp_path_factory.mktemp("toy") / "run"
  runs.train_quietly(toy_config(total_kimg=0.032), workdir)
  return runs.train_quietly(toy_config(), workdir)


def test_run_stopped_and_resumed_is_that_of_one_go(run, tmp_path):
  assert "Resuming at step 4:" in run.output
  assert "generator: xla (this kind has no kernels)" in run.output
  whole = runs.train_quietly(toy_config(), tmp_path / "run")
  tiny.assert_bit_equal(run.state, whole.state)
  statistics = tiny.leaves_by_name(run.state.d_model_state)[STATISTICS]
  assert np.all(statistics != 0)


@pytest.fixture(scope="module")
def scored(run):
  """What the evaluation of the run printed."""
  with (
    pytest.MonkeyPatch.context() as patch,
    contextlib.redirect_stdout(io.StringIO()) as output,
  ):
    patch.setattr(
      features, "load_network", lambda name, weights="": toy_features.tiny()
    )
    evaluate.evaluate(run.workdir, num_samples=NUM_SAMPLES)
  return output.getvalue()


def test_run_can_be_opened_scored_and_drawn(run, scored):
  opened = checkpoint.load_run(run.workdir)
  tiny.assert_bit_equal(opened.state, run.state)
  assert "Scores of step 8" in scored
  # There is no attention to draw, and no spectral normalisation.
  assert [path.name for path in visualize.draw(run.workdir)] == ["curves.png"]
  scalars = (run.workdir / "metrics.jsonl").read_text().splitlines()
  names = set().union(*map(json.loads, scalars))
  assert "diversity/std_over_latents" in names
  assert not any(name.startswith(("attention", "sigma")) for name in names)


def test_samples_are_of_the_classes_in_turn_and_without_dropout(run):
  _, nets, mesh, state = checkpoint.load_run(run.workdir)
  images = np.asarray(
    sample.make_sampler(nets, mesh)(state.g_ema_variables, 0, 0)
  )
  for i in (3, 11):
    expected = draw_in_numpy(state, i, i % 10)
    np.testing.assert_allclose(images[i], expected, atol=0.51)


def draw_in_numpy(state, i, label):
  """Returns sample i of seed 0, of a class, not rounded."""
  params = tiny.to_host(state.g_ema_params)
  key = jax.random.fold_in(jax.random.key(0), i)
  w = np.concatenate([jax.random.normal(key, (4,)), np.eye(10)[label]])
  h = np.maximum(w @ params["hidden"]["kernel"] + params["hidden"]["bias"], 0)
  pixels = h @ params["pixels"]["kernel"] + params["pixels"]["bias"]
  return (np.clip(pixels, -1, 1).reshape(16, 16, 3) + 1) * 127.5


def cells_of(grid, columns):
  """Returns the images [N, 16, 16, 3] of a grid without enlargement."""
  rows = [grid[i : i + 16] for i in range(0, len(grid), 17)]
  return np.stack(
    [row[:, 17 * j : 17 * j + 16] for row in rows for j in range(columns)]
  )


def test_grids_of_the_run_have_a_class_a_row(run):
  _, images = monitor_test.read_events(run.workdir)
  cells = cells_of(images["samples"][8], 4)
  assert len(cells) == 16
  # Four of the first four classes, which come in turn.
  for place, cell in enumerate(cells):
    label, column = divmod(place, 4)
    expected = draw_in_numpy(run.state, 4 * column + label, label)
    np.testing.assert_allclose(cell, expected, atol=0.51)


def test_nearest_images_and_interpolations_have_a_class_a_row(run, scored):
  folder = run.workdir / "evaluation"
  with Image.open(folder / "00000008-neighbours.png") as image:
    first = cells_of(np.asarray(image)[::4, ::4], 8)[::8]
  for i, cell in enumerate(first):
    expected = draw_in_numpy(run.state, i, i % 10)
    np.testing.assert_allclose(cell, expected, atol=0.51)


@pytest.fixture(scope="module")
def named(run, tmp_path_factory):
  """A copy of the run whose classes have names that are no numbers."""
  workdir = tmp_path_factory.mktemp("named") / "run"
  shutil.copytree(run.workdir, workdir)
  names = [f"digit {i}" for i in range(9)] + ["0"]
  (workdir / "classes.json").write_text(json.dumps(names))
  return workdir


@pytest.mark.parametrize("workdir", ["run", "run/best"])
def test_workdirs_know_the_names_of_the_classes(run, scored, workdir):
  names = config_lib.class_names(run.workdir.parent / workdir)
  assert names == [str(i) for i in range(10)]


def test_samples_of_classes_are_a_dataset_with_labels(
  run, named, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  code, _, errors = runs.call(
    "vitgan_jax.main",
    "--mode=sample",
    f"--workdir={named}",
    "--num_samples=7",
    "--classes=digit 5,3,0",  # 0 is the name of the last
    "--output=samples",
    cwd=tmp_path,
  )
  assert code == 0, errors
  expected = [5, 3, 9, 5, 3, 9, 5]
  listed = json.loads((tmp_path / "samples" / "dataset.json").read_text())
  assert listed == {
    "labels": [[f"{i:06d}.png", label] for i, label in enumerate(expected)]
  }
  data = datasets.data_config(tmp_path, "folder", path="samples", image_size=16)
  prepared = pipeline.load_images(data)
  assert prepared.card["classes"] == ["3", "5", "9"]
  np.testing.assert_array_equal(prepared.labels(), [1, 0, 2, 1, 0, 2, 1])
  for i, label in enumerate(expected):
    expected_image = draw_in_numpy(run.state, i, label)
    np.testing.assert_allclose(prepared[i], expected_image, atol=0.51)
  # A class a row, in the order that was asked for; the last cells are black.
  with Image.open(tmp_path / "samples" / "grid.png") as image:
    cells = cells_of(np.asarray(image)[::11, ::11], 3)
  for place, i in enumerate([0, 3, 6, 1, 4, None, 2, 5, None]):
    shown = np.zeros_like(prepared[0]) if i is None else prepared[i]
    np.testing.assert_array_equal(cells[place], shown)


@pytest.mark.parametrize(
  "words, message",
  [
    ("cat", "no class 'cat': give numbers from 0 to 9 or a name: digit 0, "),
    ("3,10", "no class '10': give numbers from 0 to 9"),
    ("-1", "no class '-1'"),
    ("", "has no class: give"),
  ],
)
def test_class_that_the_run_has_not_is_one_line(
  named, tmp_path, words, message
):
  arguments = ["--mode=sample", f"--workdir={named}", f"--classes={words}"]
  code, _, errors = runs.call("vitgan_jax.main", *arguments, cwd=tmp_path)
  (line,) = errors.splitlines()
  assert code == 78 and line.startswith("error: ") and message in line
  assert not (named / "samples_seed0").exists()


def test_each_class_is_scored_by_itself(run, scored, tmp_path):
  (record,) = evaluate.read_records(run.workdir)
  sample.sample(run.workdir, NUM_SAMPLES, 0, tmp_path / "samples")
  fake = toy_features.features_of(score.load_images(tmp_path / "samples"))
  images = pipeline.load_images(run.config.data)
  # The real images that are looked at: as many, in a random order.
  kept = features.order(images, NUM_SAMPLES)
  real = toy_features.features_of(images[kept])
  labels = images.labels()[kept]
  assert list(record["class_scores"]) == [str(i) for i in range(10)]
  assert record["class_scores_skipped"] == ""
  assert 0 <= record["class_agreement"]["fake"] <= 1
  for c in (0, 7):
    values = record["class_scores"][str(c)]
    x, y = real[labels == c], fake[c::10]
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b).real
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a + b - 2 * root)
    assert values == {
      "fd_tiny": pytest.approx(expected, rel=1e-3),
      "num_fake": 100,
      "num_real": len(x),
    }
    assert f"  fd_tiny of {c}" in scored
    assert f"100 samples, {len(x)} real" in scored


@pytest.fixture(scope="module")
def page_pictures(named):
  return demo.Pictures(named)


def test_page_shows_one_class_or_a_class_a_row(run, page_pictures):
  grid, _ = page_pictures.draw(0, 1.0)
  cells = cells_of(grid, 7)
  for place, i in [(0, 0), (6, 60), (7, 1), (28, 4), (34, None)]:
    expected = 0 if i is None else draw_in_numpy(run.state, i, i % 10)
    np.testing.assert_allclose(cells[place], expected, atol=0.51)
  grid, strip = page_pictures.draw(0, 1.0, 4)
  for i, cell in enumerate(cells_of(grid, 8)):
    expected = draw_in_numpy(run.state, i, 4)
    np.testing.assert_allclose(cell, expected, atol=0.51)
  assert not np.array_equal(strip, page_pictures.draw(0, 1.0, 5)[1])
  # At psi 0 all of a class are one image, and classes differ.
  grid, _ = page_pictures.draw(0, 0.0)
  means = {cell.tobytes() for cell in cells_of(grid, 7) if cell.any()}
  assert len(means) == 10
  assert page_pictures._sampler._cache_size() == 1


def test_page_has_a_choice_of_classes(page_pictures, tmp_path, monkeypatch):
  gradio = mock.MagicMock()  # the real one is for `demo_test`
  monkeypatch.setitem(sys.modules, "gradio", gradio)
  demo.build_page(page_pictures, "toy", tmp_path)
  names = page_pictures.class_names
  (choices,) = gradio.Dropdown.call_args.args
  assert [name for name, _ in choices] == ["All, a row each", *names]
  assert gradio.Dropdown.call_args.kwargs["value"] == choices[0][1]
  draw = gradio.on.call_args.args[1]
  assert len(gradio.on.call_args.kwargs["inputs"]) == 3
  for label, (_, value) in zip([None, 0, 1], choices):
    path, *_ = draw(0, 1.0, value)
    with Image.open(path) as image:
      grid = np.asarray(image)
    expected, _ = page_pictures.draw(0, 1.0, label)
    factor = len(grid) // len(expected)
    np.testing.assert_array_equal(grid[::factor, ::factor], expected)


def step(num_devices, fsdp=1, **overrides):
  """Returns the state and the metrics after a step."""
  config = toy_config(**overrides)
  nets = networks.build(config)
  mesh = partitioning.create_mesh(jax.devices()[:num_devices], fsdp)
  state = train_state.init_train_state(config, nets, mesh)
  labels = np.arange(8, dtype=np.int32).reshape(1, 1, 8)
  images = tiny.random_images(config, 1, 1)
  return gan_step.make_train_steps(config, nets, mesh)(
    state,
    partitioning.global_batch(
      mesh, {"images": images, "labels": labels}, axis=2
    ),
    0,
  )


@pytest.mark.parametrize("num_devices, fsdp", [(8, 1), (8, 4)])
def test_devices_compute_what_one_does(num_devices, fsdp, monkeypatch):
  monkeypatch.setattr(partitioning, "MIN_SHARDED_SIZE", 64)
  state, metrics = step(1)
  other, other_metrics = step(num_devices, fsdp)
  kernel = other.d_params["Dense_0"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // fsdp
  for name, value in metrics.items():
    np.testing.assert_allclose(other_metrics[name], value, rtol=1e-4, atol=1e-5)
  # Without momentum the first moment of Adam is the gradient.
  expected, actual = (
    tiny.leaves_by_name(
      tiny.to_host((s.d_model_state, s.d_opt_state[0].mu, s.g_opt_state[0].mu))
    )
    for s in (state, other)
  )
  for name, value in expected.items():
    np.testing.assert_allclose(
      actual[name], value, rtol=1e-4, atol=1e-5, err_msg=name
    )


def test_micro_batches_have_statistics_of_their_own():
  state, metrics = step(2, accumulation=2)
  assert all(np.isfinite(value) for value in metrics.values())
  assert np.all(tiny.leaves_by_name(state.d_model_state)[STATISTICS] != 0)


def test_field_out_of_range_is_named():
  config = toy_config(**{"generator.dropout": 1.5})
  with pytest.raises(ConfigError, match=r"generator\.dropout=1.5"):
    config_lib.validate(config)
