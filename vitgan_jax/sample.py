"""Images from a trained generator: batches, grids and folders of PNGs.

Samples always come from the moving average of the generator.
"""

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from vitgan_jax import checkpoint, partitioning, pictures, processes
from vitgan_jax import config as config_lib
from vitgan_jax.train_state import build_models

BATCH_SIZE = 64  # per device
_NUM_MEAN_LATENTS = 10_000  # as in StyleGAN


def make_sampler(config, mesh):
  """Returns `sampler(g_params, seed, start, truncation)`, of one batch.

  Sample i of a seed is the same image whatever batch it is drawn in. A batch
  is uint8 [BATCH_SIZE * devices, S, S, 3]: the samples from `start` on.

  `truncation` is None or (psi, mean_w): see `Generator.truncated` and
  `mean_w`. Whatever the numbers, one program draws them.
  """
  generator, _ = build_models(config, mesh)
  batch_size = BATCH_SIZE * mesh.size

  def sampler(g_params, seed, start, truncation=None):
    key = jax.random.key(seed)
    latents = jax.vmap(
      lambda i: jax.random.normal(
        jax.random.fold_in(key, i), (config.generator.latent_dim,)
      )
    )(start + jnp.arange(batch_size))
    latents = jax.lax.with_sharding_constraint(
      latents, partitioning.batch_sharding(mesh)
    )
    return _draw(generator, g_params, latents, truncation)

  return jax.jit(sampler, out_shardings=partitioning.replicated(mesh))


def make_interpolator(config, mesh, rows=8, columns=8):
  """Returns `interpolate(g_params, seed, truncation)`, of pairs of latents.

  The images are uint8 [rows, columns, S, S, 3]: each row goes along the great
  circle from one latent to another. For `truncation` see `make_sampler`.
  """
  generator, _ = build_models(config)

  def interpolate(g_params, seed, truncation=None):
    shape = (2, rows, 1, config.generator.latent_dim)
    begin, end = jax.random.normal(jax.random.key(seed), shape)
    norms = jnp.linalg.norm(begin, axis=-1) * jnp.linalg.norm(end, axis=-1)
    angle = jnp.arccos(jnp.sum(begin * end, -1) / norms)[..., None]
    share = jnp.linspace(0.0, 1.0, columns)[:, None]
    latents = (
      jnp.sin((1 - share) * angle) * begin + jnp.sin(share * angle) * end
    )
    latents = (latents / jnp.sin(angle)).reshape(rows * columns, -1)
    images = _draw(generator, g_params, latents, truncation)
    return images.reshape(rows, columns, *images.shape[1:])

  return jax.jit(interpolate, out_shardings=partitioning.replicated(mesh))


def mean_w(config, g_params):
  """Returns the mean of w [latent_dim] over latents, for truncation."""
  generator, _ = build_models(config)
  shape = (_NUM_MEAN_LATENTS, config.generator.latent_dim)

  @jax.jit
  def mean(g_params):
    latents = jax.random.normal(jax.random.key(0), shape)
    w = generator.apply(
      {"params": g_params}, latents, method=lambda g, z: g.mapping(z)
    )
    return jnp.mean(w, axis=0)

  return mean(g_params)


def _draw(generator, g_params, latents, truncation):
  variables = {"params": g_params}
  if truncation is None:
    images = generator.apply(variables, latents)
  else:
    images = generator.apply(
      variables, latents, *truncation, method="truncated"
    )
  return to_uint8(images)


def sample_images(sampler, g_params, seed, num_samples):
  """Yields the samples 0 to num_samples - 1 of a seed, in batches.

  Args:
    sampler: of `make_sampler`.
    g_params: of the generator.
    seed: of the latents.
    num_samples: how many; the last batch is drawn whole and cut, so that
      nothing is compiled for it.

  Yields:
    uint8 numpy arrays [n, S, S, 3].
  """
  start = 0
  while start < num_samples:
    batch = np.asarray(sampler(g_params, seed, start))[: num_samples - start]
    yield batch
    start += len(batch)


def to_uint8(images):
  """Clips images in [-1, 1] and rounds them to uint8."""
  return jnp.rint((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


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
  config, mesh, state = checkpoint.load_run(workdir)
  if processes.is_primary():
    output.mkdir(parents=True, exist_ok=True)
  sampler = make_sampler(config, mesh)
  batches = sample_images(sampler, state.g_ema_params, seed, num_samples)
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
