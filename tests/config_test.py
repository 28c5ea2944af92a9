import json
import math

import ml_collections
import pytest

from tests import runs, tiny
from vitgan_jax import config as config_lib
from vitgan_jax import files
from vitgan_jax.errors import ConfigError
from vitgan_jax.models import kinds

CHOICES = {
  "dtype": ["float32", "bfloat16"],
  "implementation": ["auto", "xla", "pallas", "interpret"],
  "generator.kind": ["vitgan"],  # others have other fields
  "generator.latent_injection": ["sln", "add", "token"],
  "generator.attention": ["dot", "l2"],
  "generator.patch_decoder": ["implicit", "implicit_concat", "linear", "conv"],
  "discriminator.kind": ["vitgan"],
  "discriminator.attention": ["l2", "dot"],
  "discriminator.spectral_norm": ["isn", "sn", "none"],
  "g_optimizer.name": ["adam", "adamw"],
  "d_optimizer.decay": ["constant", "cosine"],
  "loss.adversarial": ["non_saturating", "hinge", "wasserstein", "rpgan"],
  "loss.bcr_anchor": ["clean", "augmented"],
}


@pytest.mark.parametrize(
  "field, value", [(f, v) for f, values in CHOICES.items() for v in values]
)
def test_every_choice_is_valid(field, value):
  config_lib.validate(tiny.tiny_config({field: value}))


@pytest.mark.parametrize("field", CHOICES)
def test_another_choice_is_an_error_that_names_the_field(field):
  with pytest.raises(ConfigError, match=f"config.{field}='other'") as error:
    config_lib.validate(tiny.tiny_config({field: "other"}))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "field, value",
  [
    ("batch_size", 0),
    ("batch_size", -8),
    ("total_kimg", 0.0),
    ("total_kimg", math.nan),
    ("total_kimg", math.inf),
    ("steps_per_call", 0),
    ("accumulation", 0),
    ("accumulation", 3),  # of a batch of 8
    ("fsdp", 0),
    ("fsdp", -1),
    ("seed", -1),
    ("data.image_size", 0),
    ("generator.width", 0),
    ("generator.depth", 0),
    ("generator.num_heads", -1),
    ("generator.patch_size", 0),
    ("discriminator.mlp_dim", 0),
    ("discriminator.overlap", -1),
    ("generator.mapping_depth", -1),
    ("generator.latent_dim", 0),
    ("discriminator.qk_gain", -1.0),
    ("d_steps", 0),
    ("data.num_classes", -1),
    ("g_optimizer.learning_rate", 0.0),
    ("d_optimizer.learning_rate", -1e-3),
    ("g_optimizer.b2", 1.5),
    ("d_optimizer.clip_norm", -1.0),
    ("g_optimizer.warmup_kimg", math.inf),
    ("augment.probability", -0.1),
    ("augment.cutout", 1.1),
    ("ema.half_life_kimg", 0.0),
    ("checkpoint_every_kimg", 0.0),
    ("keep_checkpoints", 0),
  ],
)
def test_value_out_of_range_is_an_error_that_names_the_field(field, value):
  with pytest.raises(ConfigError, match=f"config.{field}=") as error:
    config_lib.validate(tiny.tiny_config({field: value}))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("crop", [(), (0, 0, 5, 5), (25, 57, 153, 185)])
def test_crop_is_empty_or_a_square(crop):
  config_lib.validate(tiny.tiny_config({"data.crop": crop}))


@pytest.mark.parametrize(
  "crop", [(1,), (0, 0, 5), (0, 0, 5, 6), (5, 5, 5, 5), (-1, 0, 4, 5), (9,) * 5]
)
def test_crop_that_is_no_square_is_an_error(crop):
  config = tiny.tiny_config()
  with config.unlocked():
    config.data.crop = crop
  with pytest.raises(ConfigError, match=r"config\.data\.crop="):
    config_lib.validate(config)


@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_patch_must_divide_the_image(network):
  config = tiny.tiny_config({f"{network}.patch_size": 3})
  with pytest.raises(ConfigError) as error:
    config_lib.validate(config)
  assert f"config.{network}.patch_size=3" in str(error.value)
  assert "config.data.image_size=8" in str(error.value)


@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_heads_must_divide_the_width(network):
  config = tiny.tiny_config({f"{network}.num_heads": 5})
  with pytest.raises(ConfigError) as error:
    config_lib.validate(config)
  assert f"config.{network}.num_heads=5" in str(error.value)
  assert f"config.{network}.width=16" in str(error.value)


def test_convolutional_decoder_needs_a_power_of_two():
  fields = {
    "data.image_size": 24,
    "generator.patch_size": 6,
    "discriminator.patch_size": 6,
  }
  config_lib.validate(tiny.tiny_config(fields))
  config = tiny.tiny_config({**fields, "generator.patch_decoder": "conv"})
  with pytest.raises(ConfigError, match="power of two"):
    config_lib.validate(config)


@pytest.mark.parametrize("total_kimg", [0.001, 0.064, 0.065, 1.0])
@pytest.mark.parametrize("steps_per_call", [1, 3])
@pytest.mark.parametrize("d_steps", [1, 2])
def test_total_steps_are_the_fewest_whole_calls(
  total_kimg, steps_per_call, d_steps
):
  config = tiny.tiny_config(
    total_kimg=total_kimg, steps_per_call=steps_per_call, d_steps=d_steps
  )
  steps = steps_per_call
  while steps * d_steps * config.batch_size < total_kimg * 1000:
    steps += steps_per_call
  assert config_lib.total_steps(config) == steps


def test_flatten_has_every_field_by_its_dotted_name():
  config = ml_collections.ConfigDict({"a": 1, "b": {"c": 2, "d": {"e": "x"}}})
  assert config_lib.flatten(config) == {"a": 1, "b.c": 2, "b.d.e": "x"}


def test_workdir_returns_the_config_that_made_it(tmp_path):
  config = tiny.tiny_config()
  config_lib.claim_workdir(config, tmp_path / "a" / "run")
  loaded = config_lib.load(tmp_path / "a" / "run")
  assert loaded == config
  assert list(runs.snapshot(tmp_path / "a" / "run")) == ["config.json"]
  with pytest.raises(AttributeError):
    loaded.batchsize = 1


def test_types_survive_the_file(tmp_path):
  config = tiny.tiny_config()
  config_lib.claim_workdir(config, tmp_path)
  loaded = config_lib.flatten(config_lib.load(tmp_path))
  for field, value in config_lib.flatten(config).items():
    assert type(loaded[field]) is type(value), field


def test_same_config_may_claim_its_workdir_again(tmp_path):
  config_lib.claim_workdir(tiny.tiny_config(), tmp_path)
  before = runs.snapshot(tmp_path)
  config_lib.claim_workdir(tiny.tiny_config(), tmp_path)
  assert runs.snapshot(tmp_path) == before


@pytest.mark.parametrize(
  "field, value",
  [
    ("total_kimg", 1.0),
    ("data.data_dir", "elsewhere"),
    ("accumulation", 2),
    ("remat", True),
    ("fsdp", 2),
    ("implementation", "xla"),
    ("compilation_cache", ""),
    ("profile", True),
  ],
)
def test_what_keeps_the_mathematics_may_change(tmp_path, field, value):
  config_lib.claim_workdir(tiny.tiny_config(), tmp_path)
  config_lib.claim_workdir(tiny.tiny_config({field: value}), tmp_path)
  assert config_lib.flatten(config_lib.load(tmp_path))[field] == value


def test_another_config_is_refused_and_the_workdir_left_alone(tmp_path):
  config_lib.claim_workdir(tiny.tiny_config(), tmp_path)
  before = runs.snapshot(tmp_path)
  config = tiny.tiny_config({"seed": 7, "generator.depth": 9})
  with pytest.raises(ConfigError) as error:
    config_lib.claim_workdir(config, tmp_path)
  assert "seed is 0 there and 7 here" in str(error.value)
  assert "generator.depth is 1 there and 9 here" in str(error.value)
  assert "\n" not in str(error.value)
  assert runs.snapshot(tmp_path) == before


def test_workdir_of_an_older_version_is_refused(tmp_path):
  config_lib.claim_workdir(tiny.tiny_config(), tmp_path)
  path = config_lib.config_path(tmp_path)
  fields = json.loads(path.read_text())
  del fields["seed"]
  path.write_text(json.dumps(fields))
  with pytest.raises(ConfigError, match="seed"):
    config_lib.claim_workdir(tiny.tiny_config(), tmp_path)


@pytest.mark.parametrize("content", [None, "{", '["a", "list"]', ""])
def test_folder_without_a_readable_config_is_an_error(tmp_path, content):
  if content is not None:
    (tmp_path / "config.json").write_text(content)
  before = runs.snapshot(tmp_path)
  with pytest.raises(ConfigError, match=str(tmp_path)) as error:
    config_lib.load(tmp_path)
  assert "\n" not in str(error.value)
  assert runs.snapshot(tmp_path) == before


@pytest.mark.parametrize(
  "content", ["", '["cat", "do', '{"cat": 1}', "[1, 2]", "[" * 100_000]
)
def test_names_of_classes_that_are_damaged_are_told_of(
  content, tmp_path, capsys
):
  assert config_lib.class_names(tmp_path) == []
  config_lib.claim_workdir(tiny.tiny_config(), tmp_path, ["cat", "dog"])
  assert config_lib.class_names(tmp_path) == ["cat", "dog"]
  (tmp_path / "classes.json").write_text(content)
  files.tell.cache_clear()
  assert config_lib.class_names(tmp_path) == []
  (line,) = capsys.readouterr().err.splitlines()
  assert "classes.json is damaged" in line


@pytest.mark.parametrize(
  "field, value",
  [
    ("d_optimizer", 3),
    ("generator", [1]),
    ("generator.kind", ["vitgan"]),
    ("batch_size", "eight"),
    ("data.crop", [0, None, 8, 8]),
    ("loss.bcr_weight", None),
  ],
)
def test_field_of_another_type_is_an_error_of_one_line(tmp_path, field, value):
  config = tiny.tiny_config()
  config_lib.claim_workdir(config, tmp_path)
  values = json.loads((tmp_path / "config.json").read_text())
  *parents, name = field.split(".")
  inner = values[parents[0]] if parents else values
  inner[name] = value
  (tmp_path / "config.json").write_text(json.dumps(values))
  with pytest.raises(ConfigError) as error:
    config_lib.load(tmp_path)
  assert "\n" not in str(error.value)


def test_crop_of_no_numbers_is_an_error():
  config = tiny.tiny_config({"data.crop": ("a", 1, 2, 3)})
  with pytest.raises(ConfigError, match="wrong type or size"):
    config_lib.validate(config)


@pytest.mark.parametrize("workdir", ["file", "file/run"])
def test_workdir_that_cannot_be_made_is_an_error(tmp_path, workdir):
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match="file"):
    config_lib.claim_workdir(tiny.tiny_config(), tmp_path / workdir)
  assert (tmp_path / "file").read_text() == ""


def test_machine_fields_of_another_config_change_nothing_else():
  config = tiny.tiny_config()
  other = tiny.tiny_config(
    {"data.data_dir": "elsewhere", "evaluation.num_samples": 7, "seed": 5}
  )
  changed = config_lib.with_machine_fields(config, other)
  assert changed.data.data_dir == "elsewhere"
  assert changed.evaluation.num_samples == config.evaluation.num_samples != 7
  assert changed.seed == config.seed
  assert config.data.data_dir == ""


def test_config_of_another_version_is_an_error_that_names_the_fields(tmp_path):
  config = tiny.tiny_config()
  config_lib.claim_workdir(config, tmp_path)
  path = tmp_path / "config.json"
  values = json.loads(path.read_text())
  del values["evaluation"], values["loss"]["r1_gamma"], values["discriminator"]
  del values["g_optimizer"]["decay"], values["generator"]["width"]
  values["generator"]["breadth"] = 16
  path.write_text(json.dumps(values))
  with pytest.raises(ConfigError) as error:
    config_lib.load(tmp_path)
  message = str(error.value)
  for field in (
    "evaluation.num_samples",
    "g_optimizer.decay",
    "loss.r1_gamma",
    "discriminator.kind",
    "generator.breadth",
    "generator.width",
  ):
    assert field in message
  assert "another version made it" in message
  assert "\n" not in message


def test_message_is_one_line_whatever_it_quotes():
  kind = ml_collections.ConfigDict({"a": 1, "b": 2})
  with pytest.raises(ConfigError, match="kind=a: 1 b: 2") as error:
    kinds.kind_of("discriminator", kind)
  assert len(str(error.value).splitlines()) == 1
