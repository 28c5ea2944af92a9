import functools
import json

import jax
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import data, metrics, peer, sample, train, turns
from tests import runs
from tests.tiny import tiny_config
from vitgan_jax import sample as sample_lib
from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics import features

CONTESTANTS = ("torch", "torch_compile")


@pytest.fixture
def rounds(monkeypatch):
  """Collects the medians that `turns.median_seconds` returns."""
  medians = []
  function = turns.median_seconds

  def record(*args):
    result = function(*args)
    medians.append(result[0])
    return result

  monkeypatch.setattr(turns, "median_seconds", record)
  return medians


@pytest.fixture
def quick_torch(monkeypatch):
  """Tracing alone in place of a C++ compiler's minutes, and one thread.

  Processes that share the cores would wait for one another's threads.
  """
  torch = pytest.importorskip("torch")
  monkeypatch.setattr(peer.os, "cpu_count", lambda: 1)
  monkeypatch.setattr(
    torch, "compile", functools.partial(torch.compile, backend="eager")
  )


def assert_peers_agree(figures, unit, count, medians):
  """Asserts that rounded figures are those of the measured medians."""
  ours, *theirs = medians
  assert len(theirs) == len(CONTESTANTS)
  for name, taken in zip(CONTESTANTS, theirs):
    np.testing.assert_allclose(
      [figures[f"{name}_{unit}"], figures[f"{name}_ratio"]],
      [count / taken, taken / ours],
      atol=0.051,
      rtol=1e-3,
    )


def test_turns_are_medians_of_at_least_three_rounds(monkeypatch):
  clock = iter([0, 1, 1, 11, 20, 22, 22, 32, 40, 49, 49, 59])
  monkeypatch.setattr(turns.time, "perf_counter", lambda: float(next(clock)))
  calls = []
  functions = [lambda: calls.append("a"), lambda: calls.append("b")]
  assert turns.median_seconds(functions, 12.0) == ([2.0, 10.0], 3)
  # The first of all are not measured, nor the first in each turn.
  assert calls == ["a", "b"] + ["a", "a", "b", "b"] * 3


@pytest.mark.slow
def test_training_is_measured_beside_torch(rounds, quick_torch, monkeypatch):
  compiled = []
  # Tracing the step takes longer than all the rest.
  monkeypatch.setattr(
    peer,
    "compile_function",
    lambda is_compiled: compiled.append(is_compiled) or (lambda f: f),
  )
  config = tiny_config(steps_per_call=2)
  (figures,) = train.run(config, seconds=0.0)
  (medians,) = rounds
  assert figures["calls"] == 3
  np.testing.assert_allclose(
    [figures["step_ms"], figures["images_per_sec"]],
    [1000 * medians[0] / 2, 2 * config.batch_size / medians[0]],
    atol=0.051,  # figures are rounded
  )
  assert figures["compile_seconds"] > 0
  assert compiled == [False, True]
  assert figures["device"] == f"{len(jax.devices())} x cpu"
  assert_peers_agree(figures, "images_per_sec", 2 * config.batch_size, medians)


@pytest.mark.slow
def test_sampling_is_measured_beside_torch(rounds, quick_torch, monkeypatch):
  monkeypatch.setattr(sample_lib, "BATCH_SIZE", 2)
  monkeypatch.setattr(sample, "BATCH_SIZE", 2)
  (figures,) = sample.run(tiny_config(), seconds=0.0)
  (medians,) = rounds
  batch_size = 2 * len(jax.devices())
  assert figures["batch_size"] == batch_size
  np.testing.assert_allclose(
    figures["samples_per_sec"], batch_size / medians[0], atol=0.051
  )
  assert_peers_agree(figures, "samples_per_sec", batch_size, medians)


def test_what_torch_lacks_is_said_and_ours_is_measured(monkeypatch):
  def no_contestants(config):
    return peer.contestants(config, make=None)

  find_spec = peer.importlib.util.find_spec
  if find_spec("torch"):
    for field, value in (
      ("generator.latent_injection", "add"),
      ("loss.r1_gamma", 0.5),
      ("loss.gp_weight", 10.0),
      ("loss.drift_weight", 1e-3),
      ("loss.path_length_weight", 2.0),
      ("loss.bcr_anchor", "augmented"),
      ("ada.target", 0.6),
      ("d_optimizer.freeze", "embedding"),
    ):
      functions, note = no_contestants(tiny_config({field: value}))
      assert functions == {} and f"config.{field}={value!r}" in note["torch"]
  monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None)
  assert no_contestants(tiny_config()) == ({}, {"torch": "not installed"})
  figures = peer.figures("images_per_sec", 8, 0.5, {})
  assert set(figures.values()) == {None}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_torch_computes_in_the_dtype_of_the_config(dtype):
  torch = pytest.importorskip("torch")
  products = []

  def make(unused_compiled):
    x = torch.ones(2, 2)
    return lambda: products.append(x @ x)

  functions, _ = peer.contestants(tiny_config({"dtype": dtype}), make)
  functions["torch"]()
  assert products[-1].dtype == getattr(torch, dtype)


def test_torch_that_does_not_compile_has_no_figure():
  pytest.importorskip("torch")

  def make(compiled):
    def fail():
      raise RuntimeError("no C++ compiler")

    return fail if compiled else lambda: None

  functions, _ = peer.contestants(tiny_config(), make)
  assert list(functions) == ["torch"]
  figures = peer.figures("images_per_sec", 8, 0.5, {"torch": 0.25})
  assert figures == {
    "torch_images_per_sec": 32.0,
    "torch_ratio": 0.5,
    "torch_compile_images_per_sec": None,
    "torch_compile_ratio": None,
  }


def test_bad_config_is_refused():
  with pytest.raises(ConfigError, match="batch_size"):
    train.run(tiny_config(batch_size=0), seconds=0.0)


@pytest.mark.slow
def test_reading_is_measured_at_three_sizes(monkeypatch):
  monkeypatch.setattr(data, "_NUM_IMAGES", 256)
  monkeypatch.setattr(data, "_SHUFFLE_BUFFER", 256)
  results = data.run(seconds=0.05)
  assert [figures["image_size"] for figures in results] == [32, 64, 128]
  for figures in results:
    np.testing.assert_allclose(
      figures["ratio"],
      figures["host_images_per_sec"] / figures["tf_data_images_per_sec"],
      atol=0.06,
    )
    assert figures["device_images_per_sec"] > 0
    assert 0 < figures["first_batch_seconds"] < 60
  assert 10 < results[1]["resident_mb_of_3m_images"] < 1000


@pytest.mark.slow  # Inception
def test_metrics_are_measured_beside_torch_fidelity(monkeypatch):
  from tests import fidelity  # late: where torch is missing, it skips

  assert fidelity.torch
  monkeypatch.setattr(metrics, "NUM_IMAGES", 1000)  # the least that KID takes
  monkeypatch.setattr(metrics, "NUM_FEATURES", 64)
  monkeypatch.setattr(features, "BATCH_SIZE", 1)
  (figures,) = metrics.run(seconds=0.0)
  np.testing.assert_allclose(
    figures["features_ratio"],
    figures["features_per_sec"] / figures["torch_fidelity_features_per_sec"],
    atol=0.02,
  )
  np.testing.assert_allclose(
    figures["estimated_total_seconds"],
    2 * 1000 / figures["features_per_sec"] + figures["metrics_seconds"],
    rtol=0.02,
  )


def test_metrics_without_torch_fidelity_say_what_to_install(monkeypatch):
  def fail(name):
    raise ImportError

  monkeypatch.setattr(metrics.fidelity, "load", fail)
  with pytest.raises(ConfigError, match="--no-deps"):
    metrics.run(seconds=0.0)


def test_lists_of_figures_are_printed_as_tables():
  assert command._lines([]) == ["none"]
  assert command._lines(["while.1", "while.2"]) == ["while.1", "while.2"]
  rows = [{"kind": "all-reduce", "count": 2}, {"kind": "copy", "count": 1234}]
  assert command._lines(rows) == [
    "kind        count",
    "all-reduce  2",
    "copy        1234",
  ]


def test_command_prints_one_line_of_json(monkeypatch):
  def run(config, seconds):
    yield {"image_size": config.data.image_size, "seconds": seconds}

  monkeypatch.setattr(train, "run", run)
  code, output, errors = runs.call(
    "benchmarks",
    "train",
    "--config=configs/digits.py:smoke",
    "--seconds=3",
    "--json",
    cwd=runs.ROOT,
  )
  assert (code, errors) == (0, "")
  assert json.loads(output) == [{"image_size": 16, "seconds": 3.0}]


@pytest.mark.parametrize("name", ["train", "speed"])
def test_command_says_how_to_call_it(name, tmp_path):
  code, _, errors = runs.call("benchmarks", name, cwd=tmp_path)
  assert code == 78 and errors.startswith("error: usage: ")
