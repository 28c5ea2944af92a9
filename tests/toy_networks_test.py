"""Networks that the table gets from outside go the whole way of a run."""

import contextlib
import io
import json

import jax
import numpy as np
import pytest

from configs import digits
from tests import networks as feature_networks
from tests import runs, tiny, toy_networks
from vitgan_jax import (
  checkpoint,
  evaluate,
  gan_step,
  partitioning,
  sample,
  train_state,
  visualize,
)
from vitgan_jax import config as config_lib
from vitgan_jax.metrics import features
from vitgan_jax.models import networks

STATISTICS = "batch_stats/BatchNorm_0/mean"


@pytest.fixture(scope="module", autouse=True)
def table():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(networks.GENERATORS, "toy", toy_networks.GENERATOR)
    patch.setitem(networks.DISCRIMINATORS, "toy", toy_networks.DISCRIMINATOR)
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


def test_run_can_be_opened_sampled_scored_and_drawn(run, tmp_path, monkeypatch):
  opened = checkpoint.load_run(run.workdir)
  tiny.assert_bit_equal(opened.state, run.state)
  monkeypatch.setattr(
    features,
    "load_network",
    lambda name, weights="": feature_networks.tiny(),
  )
  with contextlib.redirect_stdout(io.StringIO()) as output:
    sample.sample(run.workdir, 20, 0, tmp_path / "samples")
    evaluate.evaluate(run.workdir, num_samples=1000)
  assert len(list((tmp_path / "samples").iterdir())) == 21
  assert "Scores of step 8" in output.getvalue()
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
  keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(12)]
  params = tiny.to_host(state.g_ema_params)
  for i in (3, 11):
    z = np.asarray(jax.random.normal(keys[i], (4,)))
    w = np.concatenate([z, np.eye(10)[i % 10]])
    h = np.maximum(w @ params["hidden"]["kernel"] + params["hidden"]["bias"], 0)
    pixels = h @ params["pixels"]["kernel"] + params["pixels"]["bias"]
    expected = (np.clip(pixels, -1, 1).reshape(16, 16, 3) + 1) * 127.5
    np.testing.assert_allclose(images[i], expected, atol=0.51)


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
  with pytest.raises(config_lib.ConfigError, match=r"generator\.dropout=1.5"):
    config_lib.validate(config)
