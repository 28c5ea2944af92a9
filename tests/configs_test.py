import contextlib
import functools
import importlib
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import configs
from configs import celeba64
from configs.sweeps import systems
from tests import tiny
from vitgan_jax import config as config_lib
from vitgan_jax import partitioning
from vitgan_jax.errors import ConfigError
from vitgan_jax.gan_step import train_step
from vitgan_jax.models import kinds, networks
from vitgan_jax.train_state import create_train_state

# Parameters of the generator and of the discriminator. A new config gets its
# entries here; a change of an old one belongs in its docstring too.
NUM_PARAMETERS = {
  "biggan_cifar10": (4_304_387, 4_207_361),
  "biggan_cifar10:smoke": (7_091, 2_169),
  "celeba64": (16_108_803, 10_203_265),
  "celeba64:smoke": (20_291, 33_345),
  "cips_cifar10": (8_936_469, 21_507_073),
  "cips_cifar10:smoke": (28_853, 21_345),
  "cifar10": (11_380_995, 6_729_601),
  "cifar10:smoke": (20_291, 14_913),
  "cifar10_fast": (16_985_479, 4_204_801),
  "cifar10_fast:smoke": (59_303, 2_089),
  "cifar10_cond": (11_532_675, 6_733_441),
  "cifar10_cond:smoke": (21_667, 15_233),
  "cifar16": (170_627, 108_481),
  "cifar16:fast": (251_291, 141_729),
  "cifar16:fast,smoke": (59_303, 2_089),
  "cifar16:fine": (170_627, 99_265),
  "cifar16:smoke": (20_291, 14_913),
  "digits": (170_627, 108_481),
  "digits:fast": (251_291, 35_793),
  "digits:fast,smoke": (59_303, 2_089),
  "ffhq64": (16_108_803, 10_203_265),
  "ffhq64:smoke": (20_291, 33_345),
  "ganformer_cifar10": (24_021_322, 21_507_073),
  "ganformer_cifar10:smoke": (29_650, 21_345),
  "gat_cifar10": (29_161_776, 21_321_217),
  "gat_cifar10:smoke": (41_076, 28_693),
  "ffhq128": (20_836_611, 7_835_521),
  "ffhq128:smoke": (20_291, 107_073),
  "ffhq256": (20_836_611, 7_835_521),
  "ffhq256:smoke": (20_291, 107_073),
  "gat_ffhq128": (29_438_976, 21_597_697),
  "gat_ffhq128:smoke": (50_580, 37_909),
  "gat_ffhq256": (29_438_976, 21_597_697),
  "gat_ffhq256:smoke": (50_580, 37_909),
  "folder": (16_108_803, 10_203_265),
  "folder:smoke": (20_291, 33_345),
  "digits:smoke": (20_291, 14_913),
  "imagenet64": (16_640_643, 10_587_265),
  "imagenet64:smoke": (53_347, 65_345),
  "hybrid_cifar10": (16_985_479, 13_918_849),
  "hybrid_cifar10:smoke": (59_303, 21_345),
  "lsun_bedroom128": (20_836_611, 7_835_521),
  "lsun_bedroom128:smoke": (20_291, 107_073),
  "transgan_cifar10": (83_312_495, 10_210_400),
  "transgan_cifar10:smoke": (211_037, 43_768),
  "lsun_bedroom64": (16_108_803, 10_203_265),
  "lsun_bedroom64:smoke": (20_291, 33_345),
  "stylegan2_cifar10": (19_947_539, 20_720_641),
  "stylegan2_cifar10:smoke": (24_627, 20_577),
  "stylegan2_celeba64": (27_032_600, 26_488_833),
  "stylegan2_celeba64:smoke": (30_904, 26_241),
  "stylegan2_ffhq64": (27_032_600, 26_488_833),
  "stylegan2_ffhq64:smoke": (30_904, 26_241),
  "stylegan2_lsun_bedroom64": (27_032_600, 26_488_833),
  "stylegan2_lsun_bedroom64:smoke": (30_904, 26_241),
  "vanilla_vit": (8_447_280, 7_265_665),
  "vanilla_vit:smoke": (13_424, 11_361),
}

# The same of each kind in the size of `:tiny`.
NUM_TINY_PARAMETERS = {
  "generator": {
    "vitgan": 170_627,
    "stylegan2": 177_454,
    "cips": 95_024,
    "biggan": 224_963,
    "ganformer": 213_672,
    "transgan": 258_947,
    "gat": 302_864,
  },
  "discriminator": {
    "vitgan": 108_481,
    "stylegan2": 211_041,
    "biggan": 190_913,
    "transgan": 134_572,
    "gat": 212_433,
  },
}

# Metrics of the first step of a config's `:smoke`, on random images.
GOLDEN = {
  "cips_cifar10": {
    "loss/d": 1.798627,
    "loss/g": 0.3655901,
    "penalty/r1": 0.009177389,
    "scores/fake": 0.891957,
    "scores/real": 0.3136479,
  },
  "biggan_cifar10": {
    "loss/d": 6.062314,
    "loss/g": 1.052166,
    "scores/fake": -0.551351,
    "scores/real": -4.103632,
  },
  "transgan_cifar10": {
    "loss/d": -0.005120105,
    "loss/g": -0.09774995,
    "penalty/drift": 0.008207682,
    "penalty/gp": 0.9674503,
    "scores/fake": 0.08542327,
    "scores/real": 0.09054337,
  },
  "ganformer_cifar10": {
    "loss/d": 1.883976,
    "loss/g": 0.5450696,
    "penalty/r1": 0.01667299,
    "scores/fake": 0.9949538,
    "scores/real": 0.3716674,
  },
  "gat_cifar10": {
    "loss/d": 1.143349,
    "loss/g": 2.134109,
    "penalty/r1": 0.2228374,
    "penalty/r2": 0.07178172,
    "scores/fake": 1.126164,
    "scores/real": 0.5712483,
  },
  "ffhq256": {
    "loss/d": 1.367932,
    "loss/g": 0.628637,
    "penalty/bcr": 0.1619942,
    "scores/fake": 0.1901414,
    "scores/real": 0.2756569,
  },
  "gat_ffhq128": {
    "loss/d": 0.8062086,
    "loss/g": 1.362949,
    "penalty/r1": 0.01941154,
    "penalty/r2": 0.01103419,
    "scores/fake": 0.6884646,
    "scores/real": 0.566828,
  },
  "gat_ffhq256": {
    "loss/d": 0.7341765,
    "loss/g": 1.562487,
    "penalty/r1": 0.02418688,
    "penalty/r2": 0.007399303,
    "scores/fake": 1.019961,
    "scores/real": 1.197715,
  },
  "celeba64": {
    "loss/d": 1.311621,
    "loss/g": 0.7652363,
    "penalty/bcr": 0.06634193,
    "scores/fake": 0.05871205,
    "scores/real": 0.2292373,
  },
  "cifar10": {
    "loss/d": 1.433621,
    "loss/g": 0.5606445,
    "penalty/bcr": 0.06897292,
    "scores/fake": 0.2984905,
    "scores/real": 0.2478141,
  },
  "cifar10_fast": {
    "loss/d": 8.107463,
    "loss/g": 11.91233,
    "scores/fake": -12.81242,
    "scores/real": -5.197183,
  },
  "cifar10_cond": {
    "loss/d": 1.464341,
    "loss/g": 0.6141058,
    "penalty/bcr": 0.07023879,
    "scores/fake": 0.328314,
    "scores/real": 0.2189226,
  },
  "cifar16": {
    "loss/d": 1.519074,
    "loss/g": 0.6425339,
    "penalty/bcr": 0.1242413,
    "scores/fake": 0.2123805,
    "scores/real": -0.0183038,
  },
  "digits": {
    "loss/d": 1.440368,
    "loss/g": 0.7042272,
    "penalty/bcr": 0.04999802,
    "scores/fake": 0.1260931,
    "scores/real": 0.02538721,
  },
  "imagenet64": {
    "loss/d": 1.30182,
    "loss/g": 0.7222967,
    "penalty/bcr": 0.06434453,
    "scores/fake": 0.007592688,
    "scores/real": 0.1968256,
  },
  "hybrid_cifar10": {
    "loss/d": 1.560956,
    "loss/g": 0.42834,
    "penalty/bcr": 0.1456028,
    "penalty/r1": 0.0009107775,
    "scores/fake": 0.5407027,
    "scores/real": 0.3502625,
  },
  "lsun_bedroom128": {
    "loss/d": 1.365484,
    "loss/g": 0.6407501,
    "penalty/bcr": 0.159026,
    "scores/fake": 0.1679541,
    "scores/real": 0.2516685,
  },
  "stylegan2_cifar10": {
    "loss/d": 1.389905,
    "loss/g": 0.816027,
    "penalty/r1": 0.03402038,
    "scores/fake": -0.1369108,
    "scores/real": -0.1276578,
  },
  "stylegan2_celeba64": {
    "loss/d": 1.200496,
    "loss/g": 1.601176,
    "path_length/mean": 1.290395,
    "penalty/path_length": 7.422031,
    "penalty/r1": 0.01005188,
    "scores/fake": -0.6437147,
    "scores/real": -0.09317875,
  },
  "vanilla_vit": {
    "loss/d": 1.45403,
    "loss/g": 0.5160784,
    "penalty/bcr": 0.08298185,
    "penalty/r1": 0.1533521,
    "scores/fake": 0.4233095,
    "scores/real": 0.3830568,
  },
}
# These share the model and the training of celeba64.
for name in ("ffhq64", "folder", "lsun_bedroom64"):
  GOLDEN[name] = GOLDEN["celeba64"]
GOLDEN["ffhq128"] = GOLDEN["lsun_bedroom128"]
for name in ("ffhq64", "lsun_bedroom64"):
  GOLDEN[f"stylegan2_{name}"] = GOLDEN["stylegan2_celeba64"]

MODULES = sorted(
  path.stem
  for path in pathlib.Path(configs.__file__).parent.glob("*.py")
  if path.stem not in ("__init__", "common")
)


def get_config(name):
  module, _, argument = name.partition(":")
  return importlib.import_module(f"configs.{module}").get_config(argument)


def train_state_of(config):
  """Returns the GANState of step 0, traced; it is not computed."""
  return jax.eval_shape(
    lambda: create_train_state(config, networks.build(config))
  )


def step_of(config, mesh):
  return functools.partial(
    train_step, config=config, nets=networks.build(config), mesh=mesh
  )


def labels_of(config, shape):
  """Returns classes int32 [*shape], or None without classes."""
  if not config.data.num_classes:
    return None
  numbers = np.arange(math.prod(shape), dtype=np.int32)
  return (numbers % config.data.num_classes).reshape(shape)


def num_parameters(params):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def test_every_config_has_its_parameters_pinned():
  names = {name for m in MODULES for name in (m, f"{m}:smoke")}
  forms = {"cifar16:fast", "cifar16:fine", "digits:fast"}
  forms |= {"cifar16:fast,smoke", "digits:fast,smoke"}
  assert names | forms == NUM_PARAMETERS.keys()


@pytest.mark.parametrize("name", sorted(NUM_PARAMETERS))
def test_config_is_valid_and_its_networks_have_their_parameters(name):
  config = get_config(name)
  config_lib.validate(config)
  state = train_state_of(config)
  assert NUM_PARAMETERS[name] == (
    num_parameters(state.g_params),
    num_parameters(state.d_params),
  )


@pytest.mark.parametrize(
  "network, kind",
  [
    (network, kind)
    for network in kinds.TABLES
    for kind in kinds.TABLES[network]
  ],
)
def test_every_kind_has_a_size_for_two_cores(network, kind):
  config = get_config(f"cifar16:{network[0]}={kind}")
  assert config.data.image_size == 16
  config_lib.validate(config)
  params = getattr(train_state_of(config), f"{network[0]}_params")
  assert num_parameters(params) == NUM_TINY_PARAMETERS[network].get(kind)
  assert num_parameters(params) < 310_000


def test_patches_of_the_fine_recipe_and_of_digits_fit_into_the_width():
  """Overlapping patches of the discriminator, which a linear map takes in."""
  for name, fits in (
    ("cifar16", False),
    ("cifar16:fine", True),
    ("digits", True),
  ):
    config = get_config(name)
    fields = config.discriminator
    side = fields.patch_size + 2 * fields.overlap
    colours = 1 if config.generator.grey else 3
    assert (colours * side**2 <= fields.width) == fits
  other = get_config("cifar16:d=stylegan2,fine")
  assert other.discriminator == get_config("cifar16:d=stylegan2").discriminator
  assert other.g_optimizer.learning_rate == 4e-3


def test_fast_recipe_is_the_row_that_was_measured():
  """At 32 px and of digits, too, it has that objective and augmentation."""
  fast, measured = get_config("cifar16:fast"), get_config("cifar16:d=biggan")
  measured.update_from_flattened_dict(systems.SYSTEMS["vitgan_fast"])
  assert fast == measured
  for name in ("cifar10_fast", "digits:fast"):
    config = get_config(name)
    for part in ("loss", "augment", "g_optimizer", "d_optimizer", "d_steps"):
      assert config[part] == fast[part]
  other = get_config("cifar16:fast,g=stylegan2")
  assert other.generator == get_config("cifar16:g=stylegan2").generator
  assert other.discriminator == fast.discriminator


@pytest.mark.slow  # the smaller one runs for its golden metrics
@pytest.mark.parametrize("module", MODULES)
def test_training_step_traces_and_keeps_the_state_in_shape(module):
  config = get_config(module)
  state = train_state_of(config)
  size = config.data.image_size
  shape = (config.d_steps, config.batch_size, size, size, 3)
  next_state, metrics = jax.eval_shape(
    step_of(config, partitioning.create_mesh()),
    state,
    {
      "images": jax.ShapeDtypeStruct(shape, jnp.uint8),
      "labels": labels_of(config, shape[:2]),
    },
    state.key,
  )
  assert jax.tree.map(lambda x: (x.shape, x.dtype), next_state) == (
    jax.tree.map(lambda x: (x.shape, x.dtype), state)
  )
  assert {"loss/d", "loss/g", "scores/real", "scores/fake"} <= metrics.keys()


def test_generator_of_64_pixels_with_convolutions_is_the_published_size():
  config = celeba64.get_config()
  config.generator.conv_qkv = True
  state = train_state_of(config)
  assert num_parameters(state.g_params) == pytest.approx(37.3e6, rel=0.03)


@pytest.mark.parametrize("module", MODULES)
def test_smoke_is_the_same_experiment_within_64_images(module):
  config, smoke = get_config(module), get_config(f"{module}:smoke")
  assert config_lib.total_steps(smoke) * smoke.batch_size <= 64
  assert smoke.data == config.data
  old, new = config_lib.flatten(config), config_lib.flatten(smoke)
  assert old.keys() == new.keys()
  for field, value in old.items():
    # A switch of the model or of the objective is not a matter of size.
    assert not isinstance(value, str | bool) or new[field] == value, field


@pytest.mark.parametrize("module", MODULES)
def test_other_kinds_of_networks_are_taken_or_refused_in_a_line(module):
  """Where their sizes do not fit the images, or they take no classes."""
  taken = 0
  for network, table in kinds.TABLES.items():
    for kind in table:
      for size in ("", "tiny,", "smoke,"):
        config = get_config(f"{module}:{size}{network[0]}={kind}")
        assert config[network].kind == kind
        with contextlib.suppress(ConfigError):
          config_lib.validate(config)
          taken += 1
  assert taken > 10  # path length is for StyleGAN2 alone


def test_rate_of_gat_is_that_of_its_width():
  for arg, rate in (
    ("gat_cifar10", 4e-4),
    ("gat_cifar10:tiny", 2.4e-3),
    ("gat_cifar10:smoke", 4.8e-3),
    ("gat_ffhq128:tiny", 2.4e-3),
    ("gat_ffhq256", 4e-4),
  ):
    config = get_config(arg)
    assert config.g_optimizer.learning_rate == pytest.approx(rate)
    assert config.d_optimizer.learning_rate == pytest.approx(rate)
    decay = 0.5 ** (config.batch_size / (1000 * config.ema.half_life_kimg))
    if "smoke" not in arg:
      assert decay == pytest.approx(0.999, abs=1e-4)
  assert get_config("gat_ffhq128:tiny").generator.patch_size == 4


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("word", ["huge", "g", "g=", "x=vitgan"])
def test_unknown_argument_is_an_error(module, word):
  own = {"cifar16": "fast, fine, ", "digits": "fast, "}.get(module, "")
  with pytest.raises(
    ValueError, match=f"'{word}' must be one of tiny, smoke, {own}g="
  ):
    get_config(f"{module}:smoke,{word}")


@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_unknown_kind_is_an_error_that_names_the_known(network):
  with pytest.raises(
    ConfigError, match=f"{network}.kind='other' .* one of vitgan"
  ):
    get_config(f"digits:{network[0]}=other")


def test_kind_that_a_config_has_is_left_as_the_config_has_it():
  assert get_config("digits:g=vitgan,d=vitgan") == get_config("digits")
  assert get_config("digits:d=vitgan,smoke") == get_config("digits:smoke")


@pytest.fixture
def other_kind(monkeypatch):
  kind = kinds.Kind(
    "module:Class",
    {"latent_dim": 8, "depth": 3},
    smoke={"depth": 1},
    tiny={"depth": 2},
  )
  monkeypatch.setitem(kinds.GENERATORS, "other", kind)


@pytest.mark.usefixtures("other_kind")
def test_another_kind_has_its_own_fields_and_all_else_stays():
  config, other = get_config("cifar10"), get_config("cifar10:g=other")
  assert other.generator.to_dict() == {
    "kind": "other",
    "latent_dim": 8,
    "depth": 3,
  }
  with pytest.raises(AttributeError):
    other.generator.width = 1
  for arg, depth in (
    ("cifar10:smoke,g=other", 1),
    ("cifar10:tiny,g=other", 2),
    ("digits:g=other", 2),
    ("digits:smoke,g=other", 1),
  ):
    fields = get_config(arg).generator
    assert (fields.latent_dim, fields.depth) == (8, depth)
  with config.unlocked(), other.unlocked():
    del config.generator, other.generator
  assert other == config


@pytest.mark.usefixtures("other_kind")
def test_another_kind_with_fields_of_this_one_is_an_error_that_helps():
  config = get_config("digits")
  config.generator.kind = "other"
  with pytest.raises(ConfigError) as error:
    config_lib.validate(config)
  assert "generator.width" in str(error.value)
  assert "--config=FILE.py:g=other" in str(error.value)


@pytest.mark.parametrize("name", sorted(NUM_PARAMETERS))
def test_unknown_field_is_an_error(name):
  config = get_config(name)
  with pytest.raises(AttributeError):
    config.batchsize = 1
  with pytest.raises(AttributeError):
    config.generator.widht = 1


@pytest.mark.parametrize("module", MODULES)
def test_docstring_gives_the_command_that_runs_the_config(module):
  docstring = importlib.import_module(f"configs.{module}").__doc__
  assert f"vitgan_jax.main --config=configs/{module}.py" in docstring


@pytest.mark.parametrize("module", MODULES)
def test_logs_samples_and_checkpoints_come_within_the_run(module):
  for argument in ("", ":smoke"):
    config = get_config(module + argument)
    for what in ("log", "sample", "checkpoint"):
      assert config[f"{what}_every_kimg"] <= config.total_kimg


@pytest.mark.parametrize(
  "module",
  [
    pytest.param(
      module,
      # A program takes seconds to compile.
      marks=[pytest.mark.slow] * (module != "cifar10"),
    )
    for module in MODULES
  ],
)
def test_golden_metrics_of_the_first_step(module):
  config = get_config(f"{module}:smoke")
  size = config.data.image_size
  images = np.random.default_rng(0).integers(
    0, 256, (config.d_steps, config.batch_size, size, size, 3), np.uint8
  )
  step = step_of(config, partitioning.create_mesh(jax.devices()[:1]))
  state = jax.jit(lambda: create_train_state(config, networks.build(config)))()
  batch = {"images": images, "labels": labels_of(config, images.shape[:2])}
  _, metrics = jax.jit(step)(state, batch, jax.random.key(0))
  metrics = {key: float(f"{value:.7g}") for key, value in metrics.items()}
  message = (
    f"The first step of configs/{module}.py:smoke has changed. If it was meant "
    "to, say so in the commit and in the config's docstring, and put these "
    f"numbers into GOLDEN[{module!r}]: {metrics}. If not, it is a bug."
  )
  tiny.assert_golden(metrics, GOLDEN.get(module, {}), message)
