r"""Finds the latents of given images.

  python -m vitgan_jax.project --workdir=runs/faces --images=photos \
    --output=runs/projected

--images is a folder, a zip, or files with commas between. Of cat.jpg --output
gets cat.jpg.npz, with its w; cat.jpg.png, the image beside its projection; and
a line of distances.jsonl. The same command again goes on where it stopped.

--space=w+ gives each layer of the generator a w of its own: nearer to the
image, farther from what the generator would draw.
"""

import functools
import hashlib
import math
import pathlib
from typing import NamedTuple
import zipfile

from absl import flags
import numpy as np
from PIL import Image
from tqdm import tqdm

from vitgan_jax import cli, files, pictures
from vitgan_jax import config as config_lib
from vitgan_jax.errors import ConfigError

SPACES = ("w", "w+")
BATCH_SIZE = 8
# Of StyleGAN2's projector (Karras et al. 2020, appendix D).
LEARNING_RATE = 0.1
_RAMP_UP, _RAMP_DOWN = 0.05, 0.25  # shares of the steps
_NOISE, _NOISE_SHARE = 0.05, 0.75  # the latter of the steps has any

_RECORDS = "distances.jsonl"
_IDENTITY = ("image", "sha256", "class")
_GRID = "projections.png"
_NUM_ON_GRID = 32
_NUM_IN_TABLE = 20
_SIDE = 256  # least pixels of an image on a picture


class Target(NamedTuple):
  """An image to be projected.

  Attributes:
    name: of its file.
    pixels: uint8 [S, S, 3].
    label: its class, or None.
  """

  name: str
  pixels: np.ndarray
  label: int | None

  def digest(self):
    """Returns the SHA-256 of the pixels, in hexadecimal."""
    return hashlib.sha256(self.pixels.tobytes()).hexdigest()

  def identity(self):
    """Returns by which its record is known: the values of `_IDENTITY`."""
    return self.name, self.digest(), self.label


def read_targets(paths, workdir, classes=None):
  """Returns the Targets of files, or of a folder or zip of images.

  Each is the largest centred square of an image, in the size of the run's. One
  that cannot be read is told of and left out.

  Args:
    paths: of files, or a single one of a folder, a zip or an LMDB.
    workdir: of the run.
    classes: names or numbers of the run's classes, as texts; image i is of
      number i modulo how many they are. None is that of the image, by
      dataset.json or its folder.

  Raises:
    ConfigError: if there are no images, two of a name, or no classes that the
      run has.
  """
  from vitgan_jax import sample
  from vitgan_jax.data import decode

  config = config_lib.load(workdir)
  names, encoded, labels = _read(paths)
  given = sample.find_classes_of(workdir, classes)
  if config.data.num_classes and given is None:
    if labels is None:
      raise ConfigError(
        f"{workdir} has classes, and --images={','.join(paths)} does not say "
        "which ones its images are of: give --classes"
      )
    known = sorted(set(labels))
    try:
      numbers = dict(zip(known, sample.find_classes_of(workdir, known)))
    except ConfigError as error:
      raise ConfigError(
        f"the classes of the images are not those of the run: {error}; or give "
        "--classes"
      ) from error
    given = np.array([numbers[label] for label in labels])
  targets = []
  for i, (name, read) in enumerate(zip(names, encoded)):
    try:
      image = decode.decode(read(), config.data.max_pixels)
      pixels = decode.crop_and_resize(image, config.data.image_size)
    except Exception as error:  # Pillow raises many kinds
      files.tell(f"Left out: {name}: {error}")
      continue
    label = None if given is None else int(given[i % len(given)])
    targets.append(Target(name, pixels, label))
  if not targets:
    raise ConfigError(
      f"no image of --images={','.join(paths)} can be read: give a folder, a "
      "zip, or files that Pillow reads"
    )
  return targets


def _read(paths):
  """Returns the names, functions that read, and class names or None."""
  from vitgan_jax.data import archives

  paths = [pathlib.Path(files.expand(path)) for path in paths]
  for path in paths:
    if not path.exists():
      raise ConfigError(
        f"no folder, zip or image at --images={path}: give its path"
      )
  if len(paths) == 1 and (paths[0].is_dir() or zipfile.is_zipfile(paths[0])):
    archive = archives.open_archive(paths[0])
    names = list(map(archives.shown, archive.names))
    readers = [lambda i=i: archive.read(i) for i in range(len(names))]
    classes, labels = archive.class_labels()
    return names, readers, classes and [classes[i] for i in labels]
  names = [path.name for path in paths]
  if twice := {name for name in names if names.count(name) > 1}:
    raise ConfigError(
      f"--images has {min(twice)} twice, and what is written goes by the names "
      "of files: give them in two commands, or a folder"
    )
  return names, [path.read_bytes for path in paths], None


def make_projector(nets, variables, network, space, num_steps):
  """Returns `(start, step, finish)`, of a batch of B images.

  start(targets) -> state, of uint8 [B, S, S, 3].
  step(state, i, targets, labels, keys) -> the next state.
  finish(state, targets, labels) -> (w [B, ...], or in "w+" [B, L, ...]; images
    uint8 [B, S, S, 3]; {"pixels", "features"}, each [B]).

  Of each image, Adam minimises the mean squared difference of pixels in
  [-1, 1] plus that of features, as a share of the features' own mean square.
  It starts at the mean w, of the image's class; to w comes noise, which
  vanishes until three quarters of the steps; the learning rate rises first and
  falls at the end. Steps and noise are in units of the standard deviation of
  w. Karras et al. 2020, appendix D; but features are those of the metrics, and
  the generator draws no noise, so that none is optimised.

  Without a mapping network it is the latent that is sought.

  Args:
    nets: Networks.
    variables: of the averaged generator.
    network: FeatureNetwork; differentiable.
    space: one of `SPACES`.
    num_steps: how many steps there will be.

  Raises:
    ConfigError: if the layers of this generator have one w.
  """
  import jax
  import jax.numpy as jnp
  import optax

  from vitgan_jax import latent_space, sample
  from vitgan_jax.models import networks
  from vitgan_jax.pixels import to_float, to_uint8

  generator = networks.plain(nets.generator)
  num_styles = getattr(generator, "num_styles", 1)
  if space == "w+" and num_styles == 1:
    raise ConfigError(
      "--space=w+ is for generators whose layers can each take a w of their "
      "own, and those of this run cannot: give --space=w"
    )
  is_mapped = latent_space.has_mapping_network(nets, variables)
  if is_mapped:
    mean = sample.mean_w(nets, variables)
    sigma = np.sqrt(np.mean(latent_space.deviations(nets, variables) ** 2))
  else:
    mean, sigma = jnp.zeros(generator.latent_dim), 1.0
  of_classes = is_mapped and generator.num_classes
  shape = mean.shape[1:] if of_classes else mean.shape
  if space == "w+":
    shape = (num_styles, *shape)
  params = jax.device_put(network.params)

  def rate(i):
    done = i / num_steps
    down = 0.5 - 0.5 * jnp.cos(jnp.pi * jnp.minimum(1, (1 - done) / _RAMP_DOWN))
    return LEARNING_RATE * down * jnp.minimum(1, done / _RAMP_UP)

  adam = optax.adam(rate)

  def w_of(x, labels):
    centre = mean[labels] if of_classes else mean
    if of_classes and space == "w+":
      centre = centre[:, None]
    return centre + sigma * x

  def draw(variables, w, labels):
    if not is_mapped:
      w = generator.apply(variables, w, labels, method=sample.mapping)
    images = generator.apply(variables, w, method="synthesize")
    return jnp.clip(images, -1.0, 1.0)  # as they are written

  def distances(params, images, targets, wanted):
    found = network.apply(params, (images + 1.0) * 127.5).features
    error = jnp.sum((found - wanted) ** 2, axis=-1)
    pixels = (images - to_float(targets)) ** 2
    return {
      "pixels": jnp.mean(pixels, axis=(1, 2, 3)),
      "features": error / jnp.sum(wanted**2, axis=-1),
    }

  @jax.jit
  def start(params, targets):
    x = jnp.zeros((len(targets), *shape))
    return x, adam.init(x), network.apply(params, targets).features

  @jax.jit
  def step(variables, params, state, i, targets, labels, keys):
    x, moments, wanted = state
    left = jnp.maximum(0.0, 1.0 - i / num_steps / _NOISE_SHARE)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    # In units of the deviation of all coordinates together, as there.
    noise = noise * _NOISE * math.sqrt(shape[-1]) * left**2

    def loss(x):
      images = draw(variables, w_of(x + noise, labels), labels)
      found = distances(params, images, targets, wanted)
      return sum(jnp.sum(x) for x in found.values())  # each image by itself

    updates, moments = adam.update(jax.grad(loss)(x), moments)
    return optax.apply_updates(x, updates), moments, wanted

  @jax.jit
  def finish(variables, params, state, targets, labels):
    x, _, wanted = state
    w = w_of(x, labels)
    images = draw(variables, w, labels)
    found = distances(params, images, targets, wanted)
    return w, to_uint8(images), found

  # The arrays of the networks are arguments, or the programs would hold them.
  return (
    functools.partial(start, params),
    functools.partial(step, variables, params),
    functools.partial(finish, variables, params),
  )


def project(
  workdir, paths, output, space="w", num_steps=500, seed=0, classes=None
):
  """Projects images; prints a table of how near they came.

  Args:
    workdir: of a training run.
    paths: of the images; see `read_targets`.
    output: folder of the results; what is finished there is not done again.
    space: one of `SPACES`.
    num_steps: of Adam.
    seed: of the noise.
    classes: see `read_targets`.

  Returns:
    The records of the images, those of `distances.jsonl`.

  Raises:
    ConfigError: if something of these cannot be, or the folder has projections
      by other ones.
  """
  from vitgan_jax import sample

  if not paths or output is None:
    raise ConfigError(
      "--images=FOLDER_ZIP_OR_FILES and --output=FOLDER are required; see "
      "--help"
    )
  if num_steps < 1:
    raise ConfigError(f"--num_steps={num_steps} must be at least 1")
  sample.check_seed(seed)
  output = files.local(output, "--output")
  folder = pathlib.Path(files.expand(paths[0]))
  if folder.is_dir() and output.resolve().is_relative_to(folder.resolve()):
    raise ConfigError(
      f"--output={output} is within --images={folder}, and would be taken for "
      "images the next time: choose another folder"
    )
  targets = read_targets(paths, workdir, classes)

  import jax

  from vitgan_jax import checkpoint
  from vitgan_jax.metrics import features

  _, nets, _, state = checkpoint.load_run(workdir, jax.local_devices()[:1])
  settings = {
    "step": int(state.step),
    "space": space,
    "num_steps": num_steps,
    "seed": seed,
  }
  records = _finished(output, settings)
  left = [x for x in targets if x.identity() not in records]
  if left:
    network = features.load_network("efficientnet")
    variables = state.g_ema_variables
    projector = make_projector(nets, variables, network, space, num_steps)
    files.check_writable(output, "--output", "; give another --output")
    for target, w, image, distances in _projections(
      projector, left, num_steps, seed
    ):
      _write(output, target, w, image)
      identity = dict(zip(_IDENTITY, target.identity()))
      record = identity | settings | distances
      files.append_record(output / _RECORDS, record)
  records = _finished(output, settings)
  records = [records[x.identity()] for x in targets]
  _write_grid(output, targets[:_NUM_ON_GRID])
  print(table(records))
  print(
    f"{len(records)} projections at step {settings['step']} are in {output}"
  )
  return records


def _finished(output, settings):
  """Returns {identity: record} of what is finished in a folder.

  Raises:
    ConfigError: if it was made by other settings.
  """
  finished = {}
  for record in files.read_records(
    output / _RECORDS, dict.fromkeys([*_IDENTITY, *settings], object)
  ):
    for name, value in settings.items():
      if record[name] != value:
        raise ConfigError(
          f"--output={output} has projections with {name}={record[name]}, and "
          f"this one has {name}={value}: choose a new folder"
        )
    paths = [output / f"{record['image']}{x}" for x in (".npz", ".png")]
    if all(path.exists() for path in paths):
      finished[tuple(record[x] for x in _IDENTITY)] = record
  return finished


def _projections(projector, targets, num_steps, seed):
  """Yields (target, w, image, distances) of targets, batch after batch."""
  import jax

  from vitgan_jax import sample

  start, step, finish = projector
  batches = [
    targets[i : i + BATCH_SIZE] for i in range(0, len(targets), BATCH_SIZE)
  ]
  with tqdm(
    total=len(batches) * num_steps, desc="Projecting", unit=" steps"
  ) as progress:
    for batch in batches:
      pixels = np.stack([target.pixels for target in batch])
      labels = None
      if batch[0].label is not None:
        labels = np.array([target.label for target in batch])
      # The noise of an image is its own, whatever others there are.
      numbers = [int(target.digest()[:8], 16) for target in batch]
      keys, _ = sample.keys_of(seed, np.array(numbers, np.uint32))
      state = start(pixels)
      *_, before = finish(state, pixels, labels)
      for i in range(num_steps):
        state = step(state, i, pixels, labels, keys)
        jax.block_until_ready(state)
        progress.update()
      w, images, after = jax.device_get(finish(state, pixels, labels))
      for i, target in enumerate(batch):
        distances = {}
        for name in after:
          distances[f"{name}_at_mean"] = float(before[name][i])
          distances[name] = float(after[name][i])
        yield target, w[i], images[i], distances


def _write(output, target, w, image):
  """Writes w and the picture of a projection."""
  arrays = {"w": w} if target.label is None else {"w": w, "label": target.label}
  path = output / f"{target.name}.npz"
  path.parent.mkdir(parents=True, exist_ok=True)
  with files.whole(path) as partial, partial.open("wb") as file:
    np.savez(file, **arrays)
  with files.whole(path.with_suffix(".png")) as partial:
    pair = pictures.image_grid(np.stack([target.pixels, image]), columns=2)
    pictures.write_png(partial, pair, _SIDE)


def _write_grid(output, targets):
  """Draws the first projections, each beside its image, on one picture."""
  size = len(targets[0].pixels)
  cells = []
  for target in targets:
    with Image.open(output / f"{target.name}.png") as picture:
      pair = np.asarray(picture)
    factor = len(pair) // size
    pair = pair[::factor, ::factor]
    cells += [target.pixels, pair[:, -size:]]
  columns = 2 * min(4, len(targets))
  with files.whole(output / _GRID) as partial:
    grid = pictures.image_grid(np.stack(cells), columns)
    pictures.write_png(partial, grid, 2 * _SIDE)


def table(records):
  """Returns the distances of projections as a Markdown table.

  The first ones, and the mean of all; before, of the mean w, and after.
  """
  lines = [
    "| image | pixels: mean w | projection | features: mean w | projection |",
    "|---|---|---|---|---|",
  ]
  names = ("pixels_at_mean", "pixels", "features_at_mean", "features")
  mean = {name: np.mean([x[name] for x in records]) for name in names}
  shown = records[:_NUM_IN_TABLE]
  for record in [*shown, {"image": f"mean of {len(records)}", **mean}]:
    values = " | ".join(f"{record[name]:.4f}" for name in names)
    lines.append(f"| {record['image']} | {values} |")
  return "\n".join(lines)


def main(arguments):
  """Projects --images."""
  cli.no_arguments(arguments)
  project(
    flags.FLAGS.workdir,
    flags.FLAGS.images,
    flags.FLAGS.output,
    flags.FLAGS.space,
    flags.FLAGS.num_steps,
    flags.FLAGS.seed,
    flags.FLAGS.classes,
  )


if __name__ == "__main__":
  cli.define_path("workdir", "runs/digits", "Folder of the run.")
  flags.DEFINE_list(
    "images", None, "A folder or zip of images, or files with commas between."
  )
  cli.define_path("output", None, "Folder of the projections.")
  flags.DEFINE_enum(
    "space",
    "w",
    SPACES,
    "What is sought: one w for all layers, or, w+, one for each. Without a "
    "mapping network w is the latent.",
  )
  flags.DEFINE_integer("num_steps", 500, "Steps of Adam; StyleGAN2 takes 1000.")
  flags.DEFINE_integer("seed", 0, "Of the noise.")
  flags.DEFINE_list(
    "classes",
    None,
    "Of a run with classes, their names or numbers: image i is of number i "
    "modulo how many they are. Default those of the images.",
  )
  cli.run(main)
