import json
import re
import sys

import jax
import numpy as np
import pytest

from configs import cifar16, digits
from tests import runs
from tests.trained_test import untrained
from vitgan_jax import config as config_lib
from vitgan_jax import export, sample, trained
from vitgan_jax.errors import ConfigError
from vitgan_jax.models import kinds, networks


def generator_of(kind, num_classes=0):
  """Returns a TrainedGenerator of random variables, none as at init."""
  config = digits.get_config(f"smoke,g={kind}")
  config.data.num_classes = num_classes
  generator = untrained(config)
  rng = np.random.default_rng(0)
  generator.variables = jax.tree.map(
    lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32),
    generator.variables,
  )
  return generator


def latents_of(generator, count):
  rng = np.random.default_rng(count)
  latents = rng.normal(size=(count, generator.generator.latent_dim))
  labels = np.arange(count, dtype=np.int32)[::-1] % 3
  has_classes = generator.generator.num_classes
  return latents.astype(np.float32), [labels] if has_classes else []


def apply(generator, latents, labels, keys=None):
  return np.asarray(
    jax.jit(generator.generator.apply)(
      generator.variables, latents, *labels or [None], keys
    )
  )


@pytest.mark.parametrize("kind, num_classes", [("vitgan", 0), ("stylegan2", 3)])
def test_program_of_jax_is_the_generator_in_any_batch(kind, num_classes):
  generator = generator_of(kind, num_classes)
  program = jax.export.deserialize(export.to_stablehlo(generator))
  assert program.platforms == ("cpu", "cuda", "tpu")
  for count in (1, 5):
    latents, labels = latents_of(generator, count)
    # The keys that sample i of a seed has.
    keys = [jax.random.fold_in(jax.random.key(7), i) for i in range(count)]
    keys = jax.numpy.stack([jax.random.fold_in(key, 1) for key in keys])
    expected = apply(generator, latents, labels, keys)
    images = program.call(latents, *labels, np.float32(1), np.uint32(7))
    assert images.dtype == np.float32
    np.testing.assert_allclose(images, expected, atol=1e-5 * expected.std())
    if kind == "stylegan2":  # it has noise
      others = program.call(latents, *labels, np.float32(1), np.uint32(8))
      assert np.abs(images - others).mean() > 0.01


@pytest.mark.parametrize("kind", kinds.GENERATORS)
def test_every_generator_can_be_traced_for_any_batch(kind):
  config = cifar16.get_config(f"g={kind}")
  if kind == "biggan":
    config.generator.attention_resolution = 8
  generator = networks.build(config).generator
  (batch,) = jax.export.symbolic_shape("b")
  one, many = (
    jax.ShapeDtypeStruct((count, generator.latent_dim), np.float32)
    for count in (1, batch)
  )
  variables = jax.eval_shape(generator.init, jax.random.key(0), one)
  images = jax.eval_shape(generator.apply, variables, many)
  assert images.shape == (batch, 16, 16, 3)


def test_truncation_of_a_program_is_that_of_samples():
  generator = generator_of("vitgan", 3)
  program = jax.export.deserialize(export.to_stablehlo(generator))
  latents, labels = latents_of(generator, 4)
  images = program.call(latents, *labels, np.float32(0.5), np.uint32(0))
  expected = sample.draw_images(
    generator.generator,
    generator.variables,
    latents,
    jax.numpy.asarray(labels[0]),
    None,
    (0.5, generator.mean_w),
  )
  np.testing.assert_allclose(images, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of jax2onnx
@pytest.mark.parametrize(
  "kind, num_classes",
  [("vitgan", 0), ("vitgan", 3), ("stylegan2", 3), ("cips", 0)]
  + [("biggan", 3), ("gat", 3)],
)
def test_onnx_model_is_the_generator_in_any_batch(kind, num_classes):
  onnxruntime = pytest.importorskip("onnxruntime")
  pytest.importorskip("jax2onnx")
  generator = generator_of(kind, num_classes)
  platform_dependent = jax.lax.platform_dependent
  session = onnxruntime.InferenceSession(export.to_onnx(generator))
  assert jax.lax.platform_dependent is platform_dependent
  names = [x.name for x in session.get_inputs()]
  assert names == ["latents", *["labels"] * bool(num_classes), "truncation"]
  for count in (1, 5):
    latents, labels = latents_of(generator, count)
    inputs = [latents, *labels, np.array(1, np.float32)]
    (images,) = session.run(["images"], dict(zip(names, inputs)))
    expected = apply(generator, latents, labels)
    np.testing.assert_allclose(images, expected, atol=1e-4 * expected.std())
  inputs[-1] = np.array(0, np.float32)
  (images,) = session.run(["images"], dict(zip(names, inputs)))
  assert np.ptp(images.reshape(5, -1)[:: 5 if num_classes else 1], 0).max() < (
    1e-4 * expected.std()
  )


@pytest.mark.parametrize(
  "file_format",
  [
    "safetensors",
    "stablehlo",
    pytest.param(
      "onnx",
      marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore")],
    ),
  ],
)
def test_card_says_what_it_is_and_its_program_runs(
  file_format, digits_run, tmp_path, monkeypatch
):
  if file_format == "onnx":
    pytest.importorskip("jax2onnx")
  before = runs.snapshot(digits_run.workdir)
  code, output, errors = runs.call(
    "vitgan_jax.export",
    f"--workdir={digits_run.workdir}",
    "--output=a/digits",
    f"--format={file_format}",
    "--data_license=BSD 3-Clause",
    cwd=tmp_path,
  )
  assert code == 0 and not errors
  assert output.endswith("The generator is in a/digits\n")
  assert runs.snapshot(digits_run.workdir) == before
  folder = tmp_path / "a" / "digits"
  assert list(folder.parent.iterdir()) == [folder]
  assert {path.name for path in folder.iterdir()} == {
    f"generator.{file_format}",
    "README.md",
    "checksums.json",
    "config.json",
    "grid.png",
  }
  card = (folder / "README.md").read_text()
  for words in (
    "pipeline_tag: unconditional-image-generation\ntags: [gan, jax]",
    "sklearn_digits, train, 16 x 16 pixels",
    "Licence of the images: BSD 3-Clause",
    "Trained for: 0.064 kimg (thousands of real images), 8 steps",
    "Seed: 0",
    "Not scored",
  ):
    assert words in card
  (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
  monkeypatch.chdir(folder)
  variables = {}
  exec(program, variables)
  images = variables["images"]
  assert images.shape == (16, 16, 16, 3) and images.dtype == np.uint8
  assert images.std(axis=0).mean() > 0


def test_card_of_classes_has_their_names_and_a_program_that_runs(
  tmp_path, monkeypatch
):
  generator = generator_of("vitgan", 3)
  generator.class_names = ["a", "b", "c"]
  card = export._card(tmp_path, generator, "stablehlo", "")
  assert "Classes: a, b, c" in card
  assert "unconditional" not in card and "class-conditional" in card
  assert "Licence of the images: unknown" in card
  (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
  (tmp_path / "generator.stablehlo").write_bytes(export.to_stablehlo(generator))
  monkeypatch.chdir(tmp_path)
  variables = {}
  exec(program, variables)
  assert variables["images"].shape == (16, 16, 16, 3)


def test_card_has_the_scores_of_its_step_with_their_protocol(tmp_path):
  generator = generator_of("vitgan")
  records = [
    {"step": step, "scores": {"fid2k": 7.0 + step}, "protocol": {"num": step}}
    for step in (0, 5)
  ]
  lines = "\n".join(map(json.dumps, records))
  (tmp_path / "scores.jsonl").write_text(lines)
  for folder in (tmp_path, tmp_path / "best"):
    card = export._card(folder, generator, "safetensors", "")
    assert "| fid2k | 7 |" in card and '`{"num": 0}`' in card
    assert "| fid2k | 12 |" not in card and "Not scored" not in card


def test_folders_of_this_machine_are_not_exported():
  config = digits.get_config("smoke")
  config.data.data_dir = config.data.path = "/home/me/private"
  config.init_from = "/home/me/faces"
  exported = config_lib.without_paths(config)
  assert "/home/me" not in exported.to_json()
  assert exported.init_from == "faces"
  assert config.data.data_dir == "/home/me/private"


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--output=new"], "--workdir is required"),
    (["--workdir=nothing"], "--output is required"),
    (["--workdir=nothing", "--output=new"], "is not a workdir of a run"),
    (["--workdir=nothing", "--output=file"], "--output=file is there"),
    (
      ["--workdir=x", "--output=new", "--format=onnx", "--dtype=float16"],
      "--dtype is for --format=safetensors",
    ),
    (["--format=pickle"], "safetensors"),
  ],
)
def test_bad_input_is_one_line_and_makes_nothing(flags, words, tmp_path):
  (tmp_path / "file").write_text("mine")
  before = runs.snapshot(tmp_path)
  assert words in runs.refusal("vitgan_jax.export", *flags, cwd=tmp_path)
  assert runs.snapshot(tmp_path) == before


def test_missing_package_is_told_with_what_installs_it(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "jax2onnx", None)
  with pytest.raises(ConfigError, match=r"pip install -e '\.\[onnx\]'"):
    export.export(tmp_path, tmp_path / "new", "onnx")
  assert not list(tmp_path.iterdir())


def test_export_that_fails_leaves_nothing(digits_run, tmp_path, monkeypatch):
  def save(folder, *unused):
    (folder / trained.WEIGHTS).write_bytes(b"half")
    raise OSError("No space left on device")

  monkeypatch.setattr(trained, "save", save)
  with pytest.raises(OSError, match="No space"):
    export.export(digits_run.workdir, tmp_path / "new", "safetensors")
  assert not list(tmp_path.iterdir())
