"""Images from a trained generator: batches, grids and folders of PNGs.

Samples always come from the moving average of the generator.
"""

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
from tqdm import tqdm

from vitgan_jax import checkpoint, partitioning, pictures, processes
from vitgan_jax import config as config_lib
from vitgan_jax.gan_step import draw_latents
from vitgan_jax.models import networks
from vitgan_jax.pixels import to_uint8

BATCH_SIZE = 64  # per device
_NUM_MEAN_LATENTS = 10_000  # as in StyleGAN


def make_sampler(nets, mesh):
  """Returns `sampler(variables, seed, start, truncation)`, of one batch.

  Sample i of a seed is the same image whatever batch it is drawn in; with
  classes it is of class i modulo their number. A batch is uint8
  [BATCH_SIZE * devices, S, S, 3]: the samples from `start` on.

  `variables` are those of the averaged generator. `truncation` is None or (psi,
  mean_w): w is drawn nearer to its mean (Karras et al. 2019, B). At psi 1 it
  stays as it is, to the last bit; at 0 it is the mean for all; see `mean_w`.
  Whatever the numbers, one program draws them.
  """
  if nets.implementation == "pallas":
    # Other devices than those of the run may not have them.
    nets = nets._replace(implementation="auto")
  nets, _ = networks.with_kernels(nets, mesh, BATCH_SIZE * mesh.size)
  generator = nets.generator
  batch_size = BATCH_SIZE * mesh.size

  def draw(variables, seed, numbers, truncation):
    key = jax.random.key(seed)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)
    latents = draw_latents(keys, generator.latent_dim)
    noise_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    labels = labels_of(generator, numbers)
    return _draw(generator, variables, latents, labels, noise_keys, truncation)

  whole, split = PartitionSpec(), PartitionSpec(partitioning.BATCH_AXES)
  draw = jax.shard_map(
    draw,
    mesh=mesh,
    in_specs=(whole, whole, split, whole),
    out_specs=split,
    check_vma=False,  # see `partitioning.gradient`
  )

  def sampler(variables, seed, start, truncation=None):
    numbers = start + jnp.arange(batch_size)
    return draw(variables, jnp.asarray(seed), numbers, truncation)

  return jax.jit(sampler, out_shardings=partitioning.replicated(mesh))


def make_interpolator(nets, mesh, rows=8, columns=8):
  """Returns `interpolate(variables, seed, truncation)`, of pairs of latents.

  The images are uint8 [rows, columns, S, S, 3]: each row goes along the great
  circle from one latent to another. See `make_sampler` for the arguments.
  """
  generator = networks.plain(nets.generator)

  def interpolate(variables, seed, truncation=None):
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
    labels = labels_of(generator, row)
    images = _draw(generator, variables, latents, labels, keys, truncation)
    return images.reshape(rows, columns, *images.shape[1:])

  return jax.jit(interpolate, out_shardings=partitioning.replicated(mesh))


def mean_w(nets, variables):
  """Returns the mean of w [...] over latents, for truncation.

  It is the one that the generator keeps, or that of some latents.
  """
  if (kept := variables.get("averages", {}).get("w_avg")) is not None:
    return kept
  generator = networks.plain(nets.generator)

  @jax.jit
  def mean(variables):
    shape = (_NUM_MEAN_LATENTS, generator.latent_dim)
    latents = jax.random.normal(jax.random.key(0), shape)
    labels = labels_of(generator, jnp.arange(len(latents)))
    w = generator.apply(variables, latents, labels, method=_mapping)
    return jnp.mean(w, axis=0)

  return mean(variables)


def labels_of(generator, numbers):
  """Returns the class of each numbered sample; None without classes."""
  if not generator.num_classes:
    return None
  return jnp.asarray(numbers % generator.num_classes, jnp.int32)


def _mapping(generator, latents, labels):
  return generator.mapping(latents, labels)


def _draw(generator, variables, latents, labels, keys, truncation):
  """Returns uint8 images of latents; see `make_sampler`."""

  def synthesize(generator):
    w = generator.mapping(latents, labels)
    if truncation is not None:
      psi, mean = truncation
      w = psi * w + (1.0 - psi) * mean
    return generator.synthesize(w, keys)

  return to_uint8(generator.apply(variables, method=synthesize))


def sample_images(sampler, variables, seed, num_samples):
  """Yields the samples 0 to num_samples - 1 of a seed, in batches.

  Args:
    sampler: of `make_sampler`.
    variables: of the averaged generator.
    seed: of the latents.
    num_samples: how many; the last batch is drawn whole and cut, so that
      nothing is compiled for it.

  Yields:
    uint8 numpy arrays [n, S, S, 3].
  """
  start = 0
  while start < num_samples:
    batch = np.asarray(sampler(variables, seed, start))[: num_samples - start]
    yield batch
    start += len(batch)


def check_seed(seed):
  """Raises a ConfigError if a --seed is out of range."""
  if not 0 <= seed < 2**31:
    raise config_lib.ConfigError(f"--seed={seed} must be from 0 to 2**31 - 1")


def sample(workdir, num_samples, seed, output):
  """Writes `grid.png` and `000000.png`, ... from a workdir's last checkpoint.

  Args:
    workdir: of a training run.
    num_samples: how many images; the first 64 of them are on the grid.
    seed: of the latents; the same seed gives the same images.
    output: a new or empty folder.

  Raises:
    ConfigError: if a number is out of range, there is no checkpoint, or the
      output folder is not empty.
  """
  output = epath.Path(output)
  if num_samples < 1:
    raise config_lib.ConfigError(
      f"--num_samples={num_samples} must be at least 1"
    )
  check_seed(seed)
  with processes.raise_together():
    if processes.is_primary() and output.exists():
      if not output.is_dir() or any(output.iterdir()):
        raise config_lib.ConfigError(
          f"--output={output} is there and not empty; choose a new folder"
        )
  _, nets, mesh, state = checkpoint.load_run(workdir)
  if processes.is_primary():
    output.mkdir(parents=True, exist_ok=True)
  sampler = make_sampler(nets, mesh)
  batches = sample_images(sampler, state.g_ema_variables, seed, num_samples)
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
        if len(first) < 64:
          first.append(image)
        progress.update()
  grid = pictures.image_grid(np.stack(first))
  pictures.write_png(output / "grid.png", grid, min_side=512)
  print(f"{num_samples} samples of step {int(state.step)} are in {output}")
