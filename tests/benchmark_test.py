import jax
import numpy as np
import pytest

from tests.tiny import tiny_config
from vitgan_jax import benchmark
from vitgan_jax import config as config_lib


def test_figures_agree_with_one_another(monkeypatch):
  ticks = []
  clock = benchmark.time.perf_counter

  def record():
    ticks.append(clock())
    return ticks[-1]

  monkeypatch.setattr(benchmark.time, "perf_counter", record)
  config = tiny_config(steps_per_call=2)
  figures = benchmark.benchmark_train(config, seconds=0.0)
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
    benchmark.benchmark_train(tiny_config(batch_size=0), seconds=0.0)
