import json
import subprocess
import sys

from etils import epath
from flax import traverse_util
import jax
import numpy as np
from PIL import Image
import pytest

from configs import digits
from tests import runs, tiny
import vitgan_jax
from vitgan_jax import config as config_lib
from vitgan_jax import export, files, partitioning, sample, trained
from vitgan_jax.errors import ConfigError, DamagedError
from vitgan_jax.models import networks
from vitgan_jax.train_state import create_train_state


def untrained(config, names=()):
  """Returns a TrainedGenerator at init, of a config that is not locked."""
  nets = networks.build(config)
  state = jax.jit(lambda: create_train_state(config, nets))()
  return trained.TrainedGenerator(
    config, list(names), 0, jax.device_get(state.g_ema_variables)
  )


@pytest.fixture(scope="module")
def exported(digits_run, tmp_path_factory):
  """An export of the digits run; nothing is written into it."""
  folder = tmp_path_factory.mktemp("exported") / "digits"
  export.export(digits_run.workdir, folder, "safetensors")
  return folder


@pytest.fixture(scope="module")
def of_run(digits_run):
  return vitgan_jax.load(digits_run.workdir)


def test_package_imports_nothing_before_it_is_used():
  program = "import sys, vitgan_jax; print({'jax', 'numpy'} & set(sys.modules))"
  output = subprocess.run(
    [sys.executable, "-c", program], cwd=runs.ROOT, capture_output=True
  )
  assert output.stdout == b"set()\n"


def test_export_has_the_averaged_generator_bit_for_bit(exported, digits_run):
  opened = vitgan_jax.load(exported)
  tiny.assert_bit_equal(opened.variables, digits_run.state.g_ema_variables)
  assert opened.step == digits_run.state.step == 8
  fields = json.loads((exported / "config.json").read_text())
  kept = {"compilation_cache": ""}
  assert fields == json.loads(digits_run.config.to_json()) | kept


def test_run_and_export_give_the_samples_of_the_sampler(
  exported, of_run, digits_run
):
  nets = networks.build(digits_run.config)
  sampler = sample.make_sampler(nets, partitioning.create_mesh())
  expected = sampler(digits_run.state.g_ema_variables, 3, 0)[:5]
  for opened in (of_run, vitgan_jax.load(exported)):
    images = opened.sample(5, seed=3)
    assert type(images) is np.ndarray
    np.testing.assert_array_equal(images, expected)


def test_mapping_and_synthesis_are_the_generator(of_run):
  latents = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
  images = of_run.synthesize(of_run.mapping(latents))
  expected = jax.jit(of_run.generator.apply)(of_run.variables, latents)
  np.testing.assert_allclose(images, expected, atol=1e-5)


def test_truncation_draws_samples_together(of_run):
  spread = [
    of_run.sample(8, truncation=psi).std(axis=0).mean() for psi in (1, 0.5, 0)
  ]
  assert spread[0] > spread[1] > spread[2] == 0


def test_classes_are_asked_for_by_name_or_number():
  config = digits.get_config("smoke")
  config.data.num_classes = 3
  generator = untrained(config, ["a", "b", "c"])
  images = generator.sample(6)
  np.testing.assert_array_equal(
    generator.sample(6, classes=["a", 1, "2"]), images
  )
  with pytest.raises(ConfigError, match="no class 'd'"):
    generator.sample(1, classes=["d"])


@pytest.mark.parametrize("kind", ["stylegan2", "biggan"])
def test_numbers_and_collections_beside_parameters_survive(kind, tmp_path):
  config = digits.get_config(f"smoke,g={kind}")
  if kind == "biggan":  # 16 px
    config.generator.channels = (8, 8, 8)
  generator = untrained(config)
  generator.variables = jax.tree.map(
    lambda x: x + np.float32(0.1), generator.variables
  )
  assert generator.variables.keys() > {"params"}
  config_lib.claim_workdir(config, tmp_path)
  trained.save(epath.Path(tmp_path), generator, "float32")
  files.write_checksums(epath.Path(tmp_path), list(tmp_path.iterdir()))
  opened = vitgan_jax.load(tmp_path)
  tiny.assert_bit_equal(opened.variables, generator.variables)


def test_half_precision_is_half_as_large_and_as_near_as_it_can_be(
  exported, digits_run, tmp_path
):
  export.export(digits_run.workdir, tmp_path / "x", "safetensors", "float16")
  sizes = [
    (folder / trained.WEIGHTS).stat().st_size
    for folder in (exported, tmp_path / "x")
  ]
  assert sizes[1] < 0.6 * sizes[0]
  variables = tiny.leaves_by_name(vitgan_jax.load(tmp_path / "x").variables)
  original = tiny.leaves_by_name(digits_run.state.g_ema_variables)
  for name, x in variables.items():
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, np.float16(original[name]))


def other_network(folder):
  fields = json.loads((folder / "config.json").read_text())
  fields["generator"]["width"] = 64
  (folder / "config.json").write_text(json.dumps(fields))
  (folder / "checksums.json").write_text("{}")


def other_format(folder):
  (folder / trained.WEIGHTS).write_bytes(b"weights")
  files.write_checksums(folder, [folder / trained.WEIGHTS])


def flip(folder):
  data = bytearray((folder / trained.WEIGHTS).read_bytes())
  data[-100] ^= 1
  (folder / trained.WEIGHTS).write_bytes(data)


@pytest.mark.parametrize(
  "harm, kind, words",
  [
    (flip, DamagedError, "safetensors is not what was written"),
    (
      lambda x: (x / trained.WEIGHTS).write_bytes(b""),
      DamagedError,
      "safetensors is not what was written",
    ),
    (
      lambda x: (x / "config.json").unlink(),
      DamagedError,
      "config.json is missing",
    ),
    (
      lambda x: (x / "checksums.json").unlink(),
      DamagedError,
      "checksums.json is missing",
    ),
    (
      lambda x: (x / trained.WEIGHTS).unlink(),
      ConfigError,
      "neither checkpoints nor generator.safetensors",
    ),
    (other_network, ConfigError, "of different networks"),
    (other_format, DamagedError, "holds no generator"),
  ],
)
def test_what_is_damaged_is_told_in_one_line(
  harm, kind, words, exported, tmp_path
):
  for path in exported.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  harm(tmp_path)
  with pytest.raises(kind, match=words) as error:
    vitgan_jax.load(tmp_path)
  assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_folder_that_is_neither_is_told_in_one_line(tmp_path):
  with pytest.raises(ConfigError, match="is not a workdir of a run"):
    vitgan_jax.load(tmp_path)


@pytest.mark.parametrize(
  "arguments, words",
  [({"num_samples": 0}, "num_samples"), ({"seed": -1}, "seed")],
)
def test_number_out_of_range_is_an_error(arguments, words, of_run):
  with pytest.raises(ConfigError, match=words):
    of_run.sample(**{"num_samples": 1, **arguments})


def test_file_is_plain_safetensors(exported):
  from safetensors import numpy

  tensors = numpy.load_file(exported / trained.WEIGHTS)
  names = traverse_util.flatten_dict(
    vitgan_jax.load(exported).variables, sep="/"
  )
  assert tensors.keys() == names.keys() | {"step"}


EXPORTS = sorted((runs.ROOT / "results").glob("*/generator.safetensors"))


def test_there_are_generators_that_come_along():
  assert len(EXPORTS) >= 4


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.parent.name)
def test_generator_that_comes_along_opens(path):
  generator = vitgan_jax.load(path.parent)
  config = generator.config
  assert generator.step * config.batch_size * config.d_steps > 320_000
  num_classes = config.data.num_classes
  assert len(generator.class_names) == num_classes
  latents = np.ones((1, generator.generator.latent_dim), np.float32)
  w = generator.mapping(latents, np.zeros(1, int) if num_classes else None)
  assert np.isfinite(generator.synthesize(w)).all()


def test_generator_that_comes_along_draws_its_grid():
  folder = runs.ROOT / "results" / "cifar16-vitgan"
  generator = vitgan_jax.load(folder)
  with Image.open(folder / "grid.png") as image:
    first = np.asarray(image)[: 4 * 16 : 4, : 4 * 16 : 4]  # enlarged by four
  key = jax.random.fold_in(jax.random.key(0), 0)
  latents = jax.random.normal(key, (1, generator.generator.latent_dim))
  image = generator.synthesize(generator.mapping(latents))[0]
  drawn = np.clip(image, -1, 1) * 127.5 + 127.5
  assert np.abs(first - drawn).max() < 2  # its weights are of half precision
