import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests import runs
from tests.tiny import tiny_config
from vitgan_jax import config as config_lib
from vitgan_jax.benchmarks import data, metrics, train
from vitgan_jax.metrics import features


def test_figures_agree_with_one_another(monkeypatch):
  ticks = []
  clock = train.time.perf_counter

  def record():
    ticks.append(clock())
    return ticks[-1]

  monkeypatch.setattr(train.time, "perf_counter", record)
  config = tiny_config(steps_per_call=2)
  (figures,) = train.run(config, seconds=0.0)
  compilation, *calls = np.diff(ticks)[::2]
  assert figures["calls"] == len(calls) == 3
  np.testing.assert_allclose(
    [figures["compile_seconds"], figures["step_ms"]],
    [compilation, 1000 * np.median(calls) / 2],
    atol=0.006,  # figures are rounded
  )
  np.testing.assert_allclose(
    figures["images_per_sec"],
    config.batch_size / (figures["step_ms"] / 1000),
    rtol=1e-2,
  )
  assert figures["device"] == f"{len(jax.devices())} x cpu"


def test_bad_config_is_refused():
  with pytest.raises(config_lib.ConfigError, match="batch_size"):
    train.run(tiny_config(batch_size=0), seconds=0.0)


def test_reading_is_measured_at_three_sizes(monkeypatch):
  monkeypatch.setattr(data, "_NUM_IMAGES", 256)
  monkeypatch.setattr(data, "_SHUFFLE_BUFFER", 256)
  results = data.run(config=None, seconds=0.05)
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


@pytest.mark.slow  # Inception, and metrics of 2,048 features
def test_metrics_are_measured_beside_torch_fidelity(monkeypatch):
  from tests import fidelity  # late: where torch is missing, it skips

  assert fidelity.torch
  monkeypatch.setattr(metrics, "NUM_IMAGES", 2100)
  monkeypatch.setattr(features, "BATCH_SIZE", 1)
  (figures,) = metrics.run(config=None, seconds=0.0)
  np.testing.assert_allclose(
    figures["features_ratio"],
    figures["features_per_sec"] / figures["torch_fidelity_features_per_sec"],
    atol=0.02,
  )
  np.testing.assert_allclose(
    figures["estimated_total_seconds"],
    2 * 2100 / figures["features_per_sec"] + figures["metrics_seconds"],
    rtol=0.02,
  )


def test_metrics_without_torch_fidelity_say_what_to_install(monkeypatch):
  def fail(name):
    raise ImportError

  monkeypatch.setattr(metrics.fidelity, "load", fail)
  with pytest.raises(config_lib.ConfigError, match="--no-deps"):
    metrics.run(config=None, seconds=0.0)


def test_command_prints_one_line_of_json_or_says_how_to_call_it(tmp_path):
  def run(*arguments):
    return subprocess.run(
      [sys.executable, "-m", "vitgan_jax.benchmark", *arguments],
      cwd=runs.ROOT,
      capture_output=True,
      text=True,
      timeout=300,
    )

  result = run(
    "train", "--config=configs/digits.py:smoke", "--seconds=0", "--json"
  )
  assert result.returncode == 0, result.stderr
  (figures,) = json.loads(result.stdout)
  assert figures["image_size"] == 16
  for arguments in ([], ["train"], ["speed"], ["data", "train"]):
    result = run(*arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: usage: ")
