"""Images from a trained generator: batches, grids and folders of PNGs.

Samples always come from the moving average of the generator.
"""

import functools
import json

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
from tqdm import tqdm

from vitgan_jax import checkpoint, files, partitioning, pictures, processes
from vitgan_jax import config as config_lib
from vitgan_jax.errors import ConfigError
from vitgan_jax.gan_step import draw_latents
from vitgan_jax.models import networks
from vitgan_jax.pixels import to_uint8

BATCH_SIZE = 64  # per device
_NUM_MEAN_LATENTS = 10_000  # as in StyleGAN
_NUM_CLASS_LATENTS = 1_000  # for the mean of each class
_NUM_ON_GRID = 64


def make_sampler(nets, mesh):
  """Returns `sampler(variables, seed, start, truncation, classes, shift)`.

  Sample i of a seed is the same image whatever batch it is drawn in. A batch is
  uint8 [BATCH_SIZE * devices, S, S, 3]: the samples from `start` on.

  `variables` are those of the averaged generator. `truncation` is None or (psi,
  mean_w): w is drawn nearer to its mean (Karras et al. 2019, B), which is that
  of the sample's class. At psi 1 it stays as it is, to the last bit; at 0 it is
  the mean for all; see `mean_w`. `classes`, of a generator that has some, are
  as `labels_of` takes them. `shift` is None, or [W], added to each w. Whatever
  the numbers, one program draws them.
  """
  return _make_sampler(nets, mesh, BATCH_SIZE * mesh.size)


@functools.lru_cache(maxsize=4)  # grids and scores of a run have one program
def _make_sampler(nets, mesh, batch_size):
  if nets.implementation == "pallas":
    # Other devices than those of the run may not have them.
    nets = nets._replace(implementation="auto")
  nets, _ = networks.with_kernels(nets, mesh, batch_size)
  generator = nets.generator

  def draw(variables, seed, numbers, labels, truncation, shift):
    keys, noise_keys = keys_of(seed, numbers)
    latents = draw_latents(keys, generator.latent_dim)
    return _draw(
      generator, variables, latents, labels, noise_keys, truncation, shift
    )

  whole, split = PartitionSpec(), PartitionSpec(partitioning.BATCH_AXES)
  draw = jax.shard_map(
    draw,
    mesh=mesh,
    in_specs=(whole, whole, split, split, whole, whole),
    out_specs=split,
    check_vma=False,  # see `partitioning.gradient`
  )

  def sampler(
    variables, seed, start, truncation=None, classes=None, shift=None
  ):
    numbers = start + jnp.arange(batch_size)
    labels = labels_of(generator, numbers, classes)
    seed = jnp.asarray(seed)
    return draw(variables, seed, numbers, labels, truncation, shift)

  return jax.jit(sampler, out_shardings=partitioning.replicated(mesh))


def make_interpolator(nets, mesh, rows=8, columns=8):
  """Returns `interpolate(variables, seed, truncation, classes, shift)`.

  Its images are uint8 [rows, columns, S, S, 3]: each row goes along the great
  circle from one latent to another, in the class that a sample of its number
  has. See `make_sampler` for the arguments.
  """
  generator = networks.plain(nets.generator)

  def interpolate(variables, seed, truncation=None, classes=None, shift=None):
    key = jax.random.key(seed)
    shape = (2, rows, 1, generator.latent_dim)
    begin, end = jax.random.normal(key, shape)
    norms = jnp.linalg.norm(begin, axis=-1) * jnp.linalg.norm(end, axis=-1)
    angle = jnp.arccos(jnp.sum(begin * end, -1) / norms)[..., None]
    share = jnp.linspace(0.0, 1.0, columns)[:, None]
    latents = (
      jnp.sin((1 - share) * angle) * begin + jnp.sin(share * angle) * end
    )
    latents = (latents / jnp.sin(angle)).reshape(rows * columns, -1)
    row = jnp.arange(rows).repeat(columns)
    # What else is random is the same along a row.
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(row)
    labels = labels_of(generator, row, classes)
    images = _draw(
      generator, variables, latents, labels, keys, truncation, shift
    )
    return images.reshape(rows, columns, *images.shape[1:])

  return jax.jit(interpolate, out_shardings=partitioning.replicated(mesh))


def mean_w(nets, variables):
  """Returns the mean of w [...] over latents, for truncation.

  It is the one that the generator keeps, or that of some latents; with classes
  that of each of them, [num_classes, ...].
  """
  kept = variables.get("averages", {}).get("w_avg")
  if kept is not None and not nets.generator.num_classes:
    return kept
  generator = networks.plain(nets.generator)
  num_classes = generator.num_classes
  num_latents = _NUM_CLASS_LATENTS if num_classes else _NUM_MEAN_LATENTS

  @jax.jit
  def mean(variables):
    shape = (num_latents, generator.latent_dim)
    latents = jax.random.normal(jax.random.key(0), shape)

    def of_class(label):
      labels = None if label is None else jnp.full(num_latents, label)
      w = generator.apply(variables, latents, labels, method=mapping)
      return jnp.mean(w, axis=0)

    # One class after the other: all w of a thousand would not fit.
    return (
      jax.lax.map(of_class, jnp.arange(num_classes))
      if num_classes
      else of_class(None)
    )

  return mean(variables)


def keys_of(seed, numbers):
  """Returns the keys of numbered samples [B]: of latents, and of noise."""
  key = jax.random.key(seed)
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)
  return keys, jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)


def labels_of(generator, numbers, classes=None):
  """Returns the class of each numbered sample, int32; None without classes.

  Args:
    generator: whose samples they are.
    numbers: of the samples, any shape.
    classes: [K], of which sample i has number i modulo K; None is all in turn.
  """
  if not generator.num_classes:
    return None
  if classes is None:
    classes = jnp.arange(generator.num_classes)
  return jnp.asarray(classes, jnp.int32)[numbers % len(classes)]


def grid_classes(generator, count):
  """Returns the classes [K] for a grid of `count` samples; None without.

  All of them, if each gets four samples or more; else the first ones, for as
  many rows as columns. `pictures.class_grid` gives each a row.
  """
  if not generator.num_classes:
    return None
  all_fit = 4 * generator.num_classes <= count
  square = min(generator.num_classes, int(np.ceil(np.sqrt(count))))
  return np.arange(generator.num_classes if all_fit else square)


def truncate(w, labels, truncation):
  """Returns w [B, ...] nearer to their mean; see `make_sampler`."""
  if truncation is None:
    return w
  psi, mean = truncation
  return psi * w + (1.0 - psi) * (mean if labels is None else mean[labels])


def mapping(generator, latents, labels=None):
  """Maps latents [B, latent_dim] and classes [B] to w [B, ...].

  As a `method` of `apply`: what a module makes in its setup has no name outside
  of a call.
  """
  return generator.mapping(latents, labels)


def draw_images(
  generator, variables, latents, labels, keys, truncation, shift=None
):
  """Returns float32 images of latents, as the generator makes them.

  Args:
    generator: Linen module.
    variables: its own.
    latents: [B, latent_dim].
    labels: [B], or None without classes.
    keys: [B], of the noise; None adds none.
    truncation: see `make_sampler`.
    shift: likewise.

  Returns:
    [B, S, S, 3], about [-1, 1].
  """

  def synthesize(generator):
    w = truncate(generator.mapping(latents, labels), labels, truncation)
    return generator.synthesize(w if shift is None else w + shift, keys)

  return generator.apply(variables, method=synthesize)


def _draw(*arguments):
  """Returns `draw_images` as uint8."""
  return to_uint8(draw_images(*arguments))


def sample_images(
  sampler, variables, seed, num_samples, classes=None, truncation=None
):
  """Yields the samples 0 to num_samples - 1 of a seed, in batches.

  Args:
    sampler: of `make_sampler`.
    variables: of the averaged generator.
    seed: of the latents.
    num_samples: how many; the last batch is drawn whole and cut, so that
      nothing is compiled for it.
    classes: see `labels_of`.
    truncation: see `make_sampler`.

  Yields:
    uint8 numpy arrays [n, S, S, 3].
  """
  start = 0
  while start < num_samples:
    batch = np.asarray(sampler(variables, seed, start, truncation, classes))
    batch = batch[: num_samples - start]
    yield batch
    start += len(batch)


def check_seed(seed):
  """Raises a ConfigError if a --seed is out of range."""
  if not 0 <= seed < 2**31:
    raise ConfigError(f"--seed={seed} must be from 0 to 2**31 - 1")


def check_samples(num_samples, seed):
  """Raises a ConfigError if no samples are asked for, or of no seed."""
  if num_samples < 1:
    raise ConfigError(f"--num_samples={num_samples} must be at least 1")
  check_seed(seed)


def find_classes(words, num_classes, names):
  """Returns the class [K] of each word of --classes; None is None.

  Args:
    words: names of classes or their numbers; a text that is both is a name.
    num_classes: of the run; 0 is none.
    names: of its classes; [] if none are known.

  Raises:
    ConfigError: if the run has no classes, or not that one.
  """
  if words is None:
    return None
  given = f"--classes={','.join(map(str, words))}"
  if not num_classes:
    raise ConfigError(
      f"{given} is for a run with classes, and this one was trained without "
      "(config.data.num_classes=0): leave it out"
    )
  # Some classes are named by numbers, as those of a dataset.json may be.
  known = {str(i): i for i in range(num_classes)}
  known |= {name: i for i, name in enumerate(names)}
  known |= {i: i for i in range(num_classes)}
  unknown = [word for word in words if word not in known]
  if unknown or not words:
    some = f" or a name: {', '.join(names[:20])}" + ", ..." * (len(names) > 20)
    raise ConfigError(
      f"{given} has {f'no class {unknown[0]!r}' if unknown else 'no class'}: "
      f"give numbers from 0 to {num_classes - 1}{some if names else ''}"
    )
  return np.array([known[word] for word in words])


def find_classes_of(workdir, words):
  """Returns `find_classes` of a run."""
  num_classes = config_lib.load(workdir).data.num_classes
  return find_classes(words, num_classes, config_lib.class_names(workdir))


def sample(workdir, num_samples, seed, output, classes=None):
  """Writes `grid.png` and `000000.png`, ... from a workdir's last checkpoint.

  Those of a run with classes come with `dataset.json`, which has them as
  StyleGAN's tool writes them, {"labels": [["000000.png", 3], ...]}: a dataset
  with labels.

  Args:
    workdir: of a training run.
    num_samples: how many images; the first 64 of them are on the grid.
    seed: of the latents; the same seed gives the same images.
    output: a new or empty folder.
    classes: names or numbers of classes, as texts; sample i is of number i
      modulo how many they are. None is all in turn.

  Raises:
    ConfigError: if a number is out of range, there is no checkpoint or no such
      class, or the output folder is not empty.
  """
  output = epath.Path(output)
  check_samples(num_samples, seed)
  with processes.raise_together():
    if processes.is_primary():
      files.check_new(output)
    classes = find_classes_of(workdir, classes)
  _, nets, mesh, state = checkpoint.load_run(workdir)
  with processes.raise_together():
    if processes.is_primary():
      files.check_writable(output, "--output", "; give another --output")
  sampler = make_sampler(nets, mesh)
  batches = sample_images(
    sampler, state.g_ema_variables, seed, num_samples, classes
  )
  first = []
  # All processes take part in drawing; one writes.
  if not processes.is_primary():
    for _ in batches:
      pass
    return
  with tqdm(total=num_samples, desc="Sampling", unit=" images") as progress:
    for batch in batches:
      for image in batch:
        pictures.write_png(output / f"{progress.n:06d}.png", image)
        if len(first) < _NUM_ON_GRID:
          first.append(image)
        progress.update()
  labels = labels_of(nets.generator, np.arange(num_samples), classes)
  grid = pictures.class_grid(np.stack(first), labels)
  pictures.write_png(output / "grid.png", grid, min_side=512)
  if labels is not None:
    numbered = enumerate(np.asarray(labels).tolist())
    listed = [[f"{i:06d}.png", label] for i, label in numbered]
    (output / "dataset.json").write_text(json.dumps({"labels": listed}))
  print(f"{num_samples} samples of step {int(state.step)} are in {output}")
