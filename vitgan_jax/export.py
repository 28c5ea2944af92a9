r"""Writes the averaged generator of a run for use elsewhere.

  python -m vitgan_jax.export --workdir=runs/digits --output=exports/digits

makes a folder with generator.safetensors, the weights as plain arrays, which
vitgan_jax.load opens; with --format=stablehlo a program that JAX runs without
this package, on a CPU, a GPU or a TPU; with --format=onnx one for ONNX Runtime,
also in a browser. Beside it are config.json, a model card (README.md) and
samples (grid.png).

ONNX needs more packages: pip install -e '.[onnx]', then pip install --no-deps
jax2onnx, which asks for an older Orbax than ours and does not use it.
"""

import contextlib
import json

from absl import flags
from etils import epath

from vitgan_jax import cli
from vitgan_jax.errors import ConfigError, import_extra

_OPSET = 21  # of ONNX; browsers lag behind
_GRID = 64  # samples on grid.png
_PLATFORMS = ("cpu", "cuda", "tpu")


def export(workdir, output, file_format, dtype="float32", data_license=""):
  """Exports the averaged generator of a run's last checkpoint.

  Args:
    workdir: of the run.
    output: a new or empty folder, which appears when it is whole.
    file_format: "safetensors", "stablehlo" or "onnx".
    dtype: of the numbers in generator.safetensors, "float32" or "float16".
    data_license: of the images that the run saw, for the card; "" is unknown.

  Raises:
    ConfigError: if there is no such run, the output cannot be written, or
      packages for ONNX are missing.
  """
  # Late: --help and a wrong flag need not wait for JAX.
  import numpy as np

  from vitgan_jax import config as config_lib
  from vitgan_jax import files, pictures, sample, trained

  output = epath.Path(output)
  files.check_new(output)
  if file_format == "onnx":
    _import_jax2onnx()  # before the run is loaded
  generator = trained.load(workdir)
  with files.new_folder(output) as folder:
    print(f"Exporting step {generator.step} of {workdir}", flush=True)
    config = config_lib.without_paths(generator.config)
    config_lib.claim_workdir(config, folder, generator.class_names)
    if file_format == "safetensors":
      trained.save(folder, generator, dtype)
    elif file_format == "stablehlo":
      (folder / "generator.stablehlo").write_bytes(to_stablehlo(generator))
    else:
      (folder / "generator.onnx").write_bytes(to_onnx(generator))
    files.write_checksums(folder, list(folder.iterdir()))
    classes = sample.grid_classes(generator.generator, _GRID)
    labels = sample.labels_of(generator.generator, np.arange(_GRID), classes)
    images = generator.sample(_GRID, classes=classes)
    grid = pictures.class_grid(images, labels)
    pictures.write_png(folder / "grid.png", grid, min_side=512)
    card = _card(workdir, generator, file_format, data_license)
    (folder / "README.md").write_text(card)
  print(f"The generator is in {output}")


def to_stablehlo(trained):
  """Returns a program of JAX, serialised, for a batch of any size.

  It is `images = call(latents, truncation, seed)`, or `call(latents, labels,
  truncation, seed)` of a generator with classes: latents are float32 [B,
  latent_dim], labels int32 [B], truncation a float32 (1 is as trained), seed a
  uint32, of the noise, and images float32 [B, S, S, 3], about [-1, 1]. Image i
  has the noise that sample i of the seed has.

  Args:
    trained: `trained.TrainedGenerator`.
  """
  import jax
  import jax.export
  import jax.numpy as jnp

  from vitgan_jax import sample

  draw = _drawing(trained)

  def call(latents, *others):
    *labels, truncation, seed = others
    _, keys = sample.keys_of(seed, jnp.arange(latents.shape[0]))
    return draw(latents, labels, keys, truncation)

  (batch,) = jax.export.symbolic_shape("b")
  inputs = [*_inputs(trained, batch), jax.ShapeDtypeStruct((), jnp.uint32)]
  # All are arguments of the program, used or not.
  program = jax.jit(call, keep_unused=True)
  return jax.export.export(program, platforms=_PLATFORMS)(*inputs).serialize()


def to_onnx(trained):
  """Returns an ONNX model, serialised, for a batch of any size.

  Its inputs are those of `to_stablehlo`, without the seed: it adds no noise.

  Args:
    trained: `trained.TrainedGenerator`.
  """
  jax2onnx = _import_jax2onnx()
  draw = _drawing(trained)

  def call(latents, *others):
    *labels, truncation = others
    return draw(latents, labels, None, truncation)

  names = ["latents", *_labels(trained), "truncation"]
  with _one_platform():
    model = jax2onnx.to_onnx(
      call,
      _inputs(trained, "B"),
      model_name="generator",
      opset=_OPSET,
      input_names=names,
      output_names=["images"],
    )
  # Shapes within, some of which jax2onnx has wrong; runtimes find them out.
  del model.graph.value_info[:]
  return model.SerializeToString()


def _import_jax2onnx():
  remedy = "pip install -e '.[onnx]', then pip install --no-deps jax2onnx"
  return import_extra("jax2onnx", "ONNX", remedy)


def _labels(trained):
  """Returns ["labels"], or [] without classes."""
  return ["labels"] if trained.generator.num_classes else []


def _inputs(trained, batch):
  """Returns `jax.ShapeDtypeStruct`s of latents, labels and truncation."""
  import jax
  import jax.numpy as jnp

  latents = jax.ShapeDtypeStruct(
    (batch, trained.generator.latent_dim), jnp.float32
  )
  labels = [jax.ShapeDtypeStruct((batch,), jnp.int32) for _ in _labels(trained)]
  return [latents, *labels, jax.ShapeDtypeStruct((), jnp.float32)]


def _drawing(trained):
  """Returns `draw(latents, labels, keys, truncation)`, images in float32."""
  import jax.numpy as jnp

  from vitgan_jax import sample

  # What saves memory going backward has no place in a program.
  generator = trained.generator.clone(dtype=jnp.float32, remat=False)
  mean_w = trained.mean_w  # a constant of the program

  def draw(latents, labels, keys, truncation):
    return sample.draw_images(
      generator,
      trained.variables,
      latents,
      labels[0] if labels else None,
      keys,
      (truncation, mean_w),
    )

  return draw


@contextlib.contextmanager
def _one_platform():
  """Has what JAX computes in a way for each platform be as on most of them.

  jax2onnx does not know the operation that asks for the platform.
  """
  from jax import lax

  original = lax.platform_dependent
  lax.platform_dependent = lambda *args, default, **_: default(*args)
  try:
    yield
  finally:
    lax.platform_dependent = original


def _scores(workdir, step):
  """Returns the records of a run's scores at a step, oldest first."""
  from vitgan_jax import evaluate

  folder = epath.Path(workdir)
  records = evaluate.read_records(folder)
  if folder.name == "best":  # which its run scored
    records = evaluate.read_records(folder.parent) + records
  return [record for record in records if record["step"] == step]


_HOW_TO = {
  "safetensors": """\
```python
import vitgan_jax

generator = vitgan_jax.load(".")  # this folder
images = generator.sample(16, seed=0, truncation=0.7)  # uint8 [16, S, S, 3]
```

The variables are in `generator.safetensors`, by their names in Flax with "/"
between the parts.
""",
  "stablehlo": """\
```python
from jax import export
import numpy as np

with open("generator.stablehlo", "rb") as file:
  program = export.deserialize(file.read())
latents = np.random.default_rng(0).normal(size=(16, {latent_dim}))
images = program.call(
  latents.astype("float32"), {labels}np.float32(0.7), np.uint32(0)
)
images = np.clip(np.rint((images + 1) * 127.5), 0, 255).astype("uint8")
```

The arguments are the latents, {classes}the truncation (1 is as trained)
and the seed of the noise; the batch has any size. It runs on CPUs, GPUs and
TPUs, without vitgan_jax.
""",
  "onnx": """\
```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("generator.onnx")
latents = np.random.default_rng(0).normal(size=(16, {latent_dim}))
inputs = [latents.astype("float32"), {labels}np.array(0.7, "float32")]
names = [x.name for x in session.get_inputs()]
images = session.run(None, dict(zip(names, inputs)))[0]
images = np.clip(np.rint((images + 1) * 127.5), 0, 255).astype("uint8")
```

The inputs are the latents, {classes}and the truncation (1 is as trained);
the batch has any size. Noise within the network, of the kinds that have some,
is left out.
""",
}


def _card(workdir, trained, file_format, data_license):
  """Returns the text of README.md, a model card."""
  from vitgan_jax import __version__
  from vitgan_jax import config as config_lib

  config = trained.config
  num_classes = config.data.num_classes
  kimg = config_lib.kimg(config, trained.step)
  facts = {
    "Generator": f"{config.generator.kind}, trained against "
    f"{config.discriminator.kind}; its moving average",
    "Images": f"{config.data.dataset}, {config.data.split}, "
    f"{config.data.image_size} x {config.data.image_size} pixels",
    "Licence of the images": data_license or "unknown",
    "Classes": ", ".join(trained.class_names[:20])
    + ", ..." * (len(trained.class_names) > 20)
    or str(num_classes or "none"),
    "Trained for": f"{kimg:g} kimg (thousands of real images), {trained.step} "
    "steps",
    "Started from": epath.Path(config.init_from).name or "nothing",
    "Seed": config.seed,
    "Made by": f"vitgan_jax {__version__}; all settings are in config.json",
  }
  lines = [
    "---",
    "library_name: vitgan_jax",
    # Hugging Face has no name for the task of a generator with classes.
    *["pipeline_tag: unconditional-image-generation"] * (not num_classes),
    f"tags: [gan, jax{', class-conditional' * bool(num_classes)}]",
    "---",
    "",
    f"# {config.data.dataset}, {config.data.image_size} px, "
    f"{config.generator.kind}",
    "",
    "![Samples](grid.png)",
    "",
    *(f"- {name}: {value}" for name, value in facts.items()),
    "",
    "## Use",
    "",
    _HOW_TO[file_format].format(
      latent_dim=trained.generator.latent_dim,
      labels=f'np.arange(16, dtype="int32") % {num_classes}, '
      * bool(num_classes),
      classes="the classes, " * bool(num_classes),
    ),
    "## Scores",
    "",
  ]
  records = _scores(workdir, trained.step)
  for record in records:
    lines += ["| score | value |", "|---|---|"]
    lines += [f"| {k} | {v:.5g} |" for k, v in record["scores"].items()]
    lines += ["", f"Protocol: `{json.dumps(record['protocol'])}`", ""]
  return "\n".join(lines + ["Not scored."] * (not records)).rstrip() + "\n"


def main(arguments):
  """Exports what the flags say."""
  cli.no_arguments(arguments)
  values = flags.FLAGS
  if values.workdir is None or values.output is None:
    missing = "workdir" if values.workdir is None else "output"
    raise ConfigError(f"--{missing} is required; see --help")
  if values["dtype"].present and values.format != "safetensors":
    raise ConfigError(
      f"--dtype is for --format=safetensors, not for --format={values.format}"
    )
  export(
    values.workdir,
    values.output,
    values.format,
    values.dtype,
    values.data_license,
  )


if __name__ == "__main__":
  cli.define_path("workdir", None, "Folder of the run.")
  cli.define_path("output", None, "New folder for the export.")
  flags.DEFINE_enum(
    "format",
    "safetensors",
    ["safetensors", "stablehlo", "onnx"],
    "What to write: weights, a program of JAX, or one of ONNX.",
  )
  flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "float16"],
    "Of the weights in generator.safetensors; float16 is half as large.",
  )
  flags.DEFINE_string(
    "data_license",
    "",
    "Licence of the images that the run was trained on, for the card; the "
    "default is unknown.",
  )
  cli.run(main)
