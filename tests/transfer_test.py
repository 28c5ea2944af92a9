import json
import shutil

import jax
import numpy as np
import pytest

from configs import digits
from tests import runs, tiny
from vitgan_jax import checkpoint, export, partitioning, transfer
from vitgan_jax import config as config_lib
from vitgan_jax.errors import ConfigError
from vitgan_jax.models import networks
from vitgan_jax.train_state import create_train_state, init_train_state


def config_from(source, **overrides):
  config = digits.get_config("smoke")
  config.init_from = str(source)
  config.update_from_flattened_dict(overrides)
  return config


def start(config):
  """Returns (state, line, the state without init_from)."""
  nets = networks.build(config)
  mesh = partitioning.create_mesh()
  state, line = transfer.initial_state(config, nets, mesh)
  return state, line, init_train_state(config, nets, mesh)


def assert_parts(state, expected, parts):
  for part in parts:
    tiny.assert_bit_equal(getattr(state, part), getattr(expected, part))


_G = ["g_params", "g_model_state", "g_ema_params", "g_ema_model_state"]
_D = ["d_params", "d_model_state"]
_REST = ["step", "key", "g_opt_state", "d_opt_state", "logit_ema"]


@pytest.mark.parametrize(
  "which, taken, own",
  [
    ("both", _G + _D, []),
    ("generator", _G, _D),
    ("discriminator", _D, _G),
  ],
)
def test_networks_are_taken_whole_and_the_rest_starts_anew(
  which, taken, own, digits_run
):
  config = config_from(digits_run.workdir, init_networks=which, seed=5)
  state, line, initial = start(config)
  assert_parts(state, digits_run.state, taken)
  assert_parts(state, initial, own + _REST)
  assert "as at init" not in line and "step 8" in line
  pointers = [
    x.unsafe_buffer_pointer()
    for x in jax.tree.leaves((state.g_params, state.g_ema_params))
    for x in [x.addressable_shards[0].data]
  ]
  assert len(set(pointers)) == len(pointers)


def test_generator_starts_from_an_export_at_its_average(digits_run, tmp_path):
  export.export(digits_run.workdir, tmp_path / "x", "safetensors")
  config = config_from(tmp_path / "x", init_networks="generator")
  state, _, _ = start(config)
  tiny.assert_bit_equal(state.g_variables, digits_run.state.g_ema_variables)
  tiny.assert_bit_equal(state.g_ema_variables, state.g_variables)
  with pytest.raises(ConfigError, match="an export, which has no discrim"):
    start(config_from(tmp_path / "x"))


def test_classes_and_sizes_that_are_new_start_as_in_any_run(digits_run):
  config = config_from(
    digits_run.workdir, **{"data.num_classes": 3, "data.image_size": 32}
  )
  state, line, initial = start(config)
  source = tiny.leaves_by_name(tiny.to_host(digits_run.state))
  actual, initial = (
    tiny.leaves_by_name(tiny.to_host(x)) for x in (state, initial)
  )
  kept = set()
  for name, x in actual.items():
    if not name.startswith(tuple(_G + _D)):
      continue
    if name in source and source[name].shape == x.shape:
      expected = source[name]
    else:
      expected = initial[name]
      kept.add(name)
    np.testing.assert_array_equal(x, expected, err_msg=name)
  kept = {x for x in kept if x.startswith(("g_params", "d_params"))}
  # The class beside z makes the first layer wider, too.
  assert {x.removeprefix("g_params/") for x in kept} >= {
    "mapping/class_embedding/kernel",
    "mapping/dense0/kernel",
  }
  for name in kept:
    network = {"g": "generator", "d": "discriminator"}[name[0]]
    assert f"{network}/{name.partition('/')[2]}" in line


def test_state_of_a_layer_that_is_not_taken_is_not_either(digits_run):
  config = config_from(digits_run.workdir, **{"discriminator.mlp_dim": 32})
  state, _, initial = start(config)
  spectral = [x.d_model_state["spectral"] for x in (state, initial)]
  taken = digits_run.state.d_model_state["spectral"]
  # Of both layers sigma_init is a number; the shape of neither kernel fits.
  for layer in ("mlp_in", "mlp_out"):
    actual, expected = (x["block0"][layer] for x in spectral)
    tiny.assert_bit_equal(actual, expected)
  tiny.assert_bit_equal(
    spectral[0]["block0"]["attention"], taken["block0"]["attention"]
  )


def test_network_of_another_kind_is_refused(digits_run):
  config = digits.get_config("smoke,g=stylegan2")
  config.init_from = str(digits_run.workdir)
  with pytest.raises(ConfigError, match="generator of kind 'vitgan'") as error:
    start(config)
  assert "\n" not in str(error.value)
  config.init_networks = "discriminator"  # which is of the same kind
  assert_parts(start(config)[0], digits_run.state, _D)


def test_nothing_that_fits_is_an_error():
  config = config_from("x", init_networks="discriminator")
  nets = networks.build(config)
  shapes = jax.eval_shape(lambda: create_train_state(config, nets))
  source = {"d": {"params": {"other": np.zeros(2)}}}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      transfer, "_open", lambda _: (config, 1, {"discriminator": source})
    )
    with pytest.raises(ConfigError, match="no parameter of the discriminator"):
      transfer._take(config, shapes)


def test_run_whose_source_is_not_there_leaves_no_workdir(tmp_path):
  config = config_from(tmp_path / "nothing")
  with pytest.raises(ConfigError, match=r"config\.init_from: .*nothing"):
    runs.train_quietly(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


FROZEN = "embedding|block0/|positions"


@pytest.fixture(scope="module")
def fine_tuned(digits_run, tmp_path_factory):
  """A run from a copy of the digits run, which was moved away after a half."""
  folder = tmp_path_factory.mktemp("fine_tuned")
  source = shutil.copytree(digits_run.workdir, folder / "source")
  overrides = {"seed": 3, "d_optimizer.freeze": FROZEN, "ema.ramp_up": 0.0}
  whole = runs.train_quietly(config_from(source, **overrides), folder / "whole")
  config = config_from(source, **overrides, total_kimg=0.032)
  runs.train_quietly(config, folder / "halves")
  source.rename(folder / "moved")
  config.total_kimg = 0.064
  return whole, runs.train_quietly(config, folder / "halves")


@pytest.mark.slow
def test_run_goes_on_without_its_source_as_if_it_had_not_stopped(fine_tuned):
  whole, halves = fine_tuned
  tiny.assert_bit_equal(halves.state, whole.state)
  assert "Taken from" in whole.output and "step 8: generator" in whole.output
  assert "Taken from" not in halves.output
  assert "Resuming at step 4" in halves.output


@pytest.mark.slow
def test_frozen_parameters_stay_and_all_others_move(fine_tuned, digits_run):
  whole, _ = fine_tuned
  before = tiny.leaves_by_name(tiny.to_host(digits_run.state.d_params))
  after = tiny.leaves_by_name(tiny.to_host(whole.state.d_params))
  names = FROZEN.split("|")
  assert all(any(x.startswith(name) for x in after) for name in names)
  for name, x in after.items():
    stays = name.startswith(tuple(names))
    assert np.array_equal(x, before[name]) == stays, name
  # Nor have they moments.
  moments = tiny.leaves_by_name(whole.state.d_opt_state)
  assert not any("block0" in name for name in moments)
  assert any("head" in name for name in moments)


@pytest.mark.parametrize(
  "kind, pattern",
  [
    ("vitgan", "embedding|block0/"),
    ("stylegan2", "from_rgb|block16/"),
    ("biggan", "block0/"),
    ("gat", "block0/"),
  ],
)
def test_layers_of_any_kind_are_frozen_by_name(kind, pattern):
  config = digits.get_config(f"smoke,d={kind}")
  nets = networks.build(config)

  def trained():
    """Returns the names of the parameters that have moments."""
    state = jax.eval_shape(lambda: create_train_state(config, nets))
    names = tiny.leaves_by_name(state.d_opt_state)
    return {x.partition("/mu/")[2] for x in names if "/mu/" in x}

  everything = trained()
  config.d_optimizer.freeze = pattern
  frozen = {x for x in everything if x.startswith(tuple(pattern.split("|")))}
  assert frozen and trained() == everything - frozen
  config.d_optimizer.freeze = "nothing"
  with pytest.raises(ConfigError, match="fits none: their names") as error:
    trained()
  assert pattern.split("|")[0].rstrip("/") in str(error.value)


def test_all_parameters_frozen_or_no_expression_is_an_error(tmp_path):
  config = digits.get_config("smoke")
  config.d_optimizer.freeze = ""
  config.g_optimizer.freeze = "."
  with pytest.raises(ConfigError, match="fits all"):
    runs.train_quietly(config, tmp_path / "run")
  config.g_optimizer.freeze = "("
  with pytest.raises(ConfigError, match="must be a regular expression"):
    config_lib.validate(config)
  assert not (tmp_path / "run").exists()


def test_run_from_before_these_fields_is_one_without_them(tmp_path):
  config = tiny.tiny_config()
  config_lib.claim_workdir(config, tmp_path)
  path = tmp_path / "config.json"
  values = json.loads(path.read_text())
  for name in ("init_from", "init_networks"):
    del values[name]
  del values["g_optimizer"]["freeze"], values["d_optimizer"]["freeze"]
  path.write_text(json.dumps(values))
  assert config_lib.load(tmp_path) == config
  config_lib.claim_workdir(config, tmp_path)
  assert not checkpoint.has_any(tmp_path)
