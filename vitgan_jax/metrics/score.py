r"""Scores one set of images against another.

  python -m vitgan_jax.metrics.score REAL FAKE
  python -m vitgan_jax.metrics.score real.npz samples/ --features=efficientnet

Each is a folder or zip of images of one size, an .npz or .npy file with one
array uint8 [N, H, W, 3], beside labels or not, or a folder that
`python -m vitgan_jax.data.prepare` made. All metrics are printed, with FAKE as
the generated images; the Fréchet and kernel distances do not depend on which
is which. Of an .npz file with `mu` and `sigma` it is the Fréchet distance.
"""

import json
import pathlib
import zipfile

from absl import flags
import numpy as np
from tqdm import tqdm

from vitgan_jax import cli, files, partitioning
from vitgan_jax.data import archives, decode, pipeline
from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics import compute, features, fid, reference, statistics


def load_images(path):
  """Returns the images of a path, uint8 [N, H, W, 3].

  Returns `Statistics` for an .npz file that has no images, but `mu` and
  `sigma`, the mean [F] and the covariance [F, F] of features, as pytorch-fid
  and the evaluation of ADM (Dhariwal and Nichol 2021) keep them.

  Raises:
    ConfigError: if they are not images, or not of one size.
  """
  path = pathlib.Path(files.expand(path))
  if (path / "card.json").exists():
    return pipeline.PreparedImages(path)
  if path.suffix == ".npz" or _has_arrays(path):
    return _load_arrays(path)
  archive = archives.open_archive(path)
  for kind, names in archive.unused.items():
    names = [x for x in names if x.rpartition("/")[2] != archives.LABELS]
    if kind == "no image" and path.is_dir() and names:
      raise ConfigError(
        f"{path} holds {archives.shown(names[0])}, which is no image: a folder "
        "to be scored has images alone"
      )
    if kind not in ("hidden", "grid of samples") and names:
      first = archives.shown(names[0])
      files.tell(f"Not used of {path}: {len(names):,} {kind} ({first}, ...)")
  names = [archives.shown(name) for name in archive.names]
  # A grid.png is of `--mode=sample`, without its samples.
  used = [i for i, x in enumerate(names) if x.rpartition("/")[2] != "grid.png"]
  if not used:
    raise ConfigError(f"no images in {path}, beside grid.png")
  images = None
  for row, i in enumerate(tqdm(used, f"Reading {path}")):
    try:
      image = np.asarray(decode.decode(archive.read(i)))
    except Exception as error:  # Pillow raises many kinds for a damaged one
      raise ConfigError(f"{path}: {names[i]} is no image: {error}") from error
    if images is None:
      images = np.empty((len(used), *image.shape), np.uint8)
    if image.shape != images.shape[1:]:
      raise ConfigError(
        f"{path} has images of several sizes: {names[used[0]]} has "
        f"{images.shape[2]} x {images.shape[1]} pixels, {names[i]} "
        f"{image.shape[1]} x {image.shape[0]}; bring them to one size first"
      )
    images[row] = image
  return images


def _has_arrays(path):
  """Tells whether a file is NumPy's, whatever its name."""
  if not path.is_file():
    return False
  with open(path, "rb") as file:
    is_array = file.read(6) == b"\x93NUMPY"
  if is_array or not zipfile.is_zipfile(path):
    return is_array
  with zipfile.ZipFile(path) as archive:
    return any(name.endswith(".npy") for name in archive.namelist())


def _load_arrays(path):
  """Returns the images or the `Statistics` of an .npz or .npy file."""
  try:
    with open(path, "rb") as file:
      loaded = np.load(file)
      if isinstance(loaded, np.ndarray):
        loaded = {path.name: loaded}
      arrays = {k: v for k, v in loaded.items() if isinstance(v, np.ndarray)}
  except Exception as error:  # many kinds for a damaged one
    raise ConfigError(
      f"{path} must be an .npz file with one array of images, and does not "
      f"open: {' '.join(str(error).split())}"
    ) from error
  found = [x for x in arrays.values() if _is_images(x)]
  if len(found) == 1:  # beside labels, for one
    return found[0]
  mean, cov = arrays.get("mu"), arrays.get("sigma")
  if mean is not None and cov is not None:
    if mean.ndim == 1 and cov.shape == 2 * mean.shape:
      mean, cov = np.float64(mean), np.float64(cov)
      if np.isfinite(mean).all() and np.isfinite(cov).all():
        return statistics.from_moments(mean, cov)
  shapes = [f"{k} {v.dtype} {list(v.shape)}" for k, v in arrays.items()]
  raise ConfigError(
    f"{path} must be an .npz file with one array of images, uint8 "
    "[N, H, W, 3], or with mu [F] and sigma [F, F], finite; it has "
    f"{', '.join(shapes) or 'no array'}"
  )


def _is_images(array):
  return (
    array.dtype == np.uint8
    and array.ndim == 4
    and array.shape[3] == 3
    and array.size > 0
  )


def score(real, fake, network):
  """Returns all metrics of images, a dict; see `compute.scores`.

  Of `Statistics` it is the Fréchet distance alone.

  Args:
    real: uint8 [N, H, W, 3], or Statistics.
    fake: uint8 [M, H, W, 3], or Statistics.
    network: FeatureNetwork; None will do for two Statistics.

  Raises:
    ConfigError: if there are too few images.
  """
  if network is None:
    return {"frechet_distance": fid.frechet_distance(real, fake)}
  for kind, images in (("real", real), ("generated", fake)):
    if not _is_statistics(images):
      compute.check_count(network, kind, len(images))
  extractor = features.Extractor(network, partitioning.create_mesh())
  moments_of_real, moments_of_fake = map(_is_statistics, (real, fake))
  if not moments_of_real:
    real = reference.compute(extractor, real, len(real))
  if not moments_of_fake:
    fake = features.concatenate(
      features.of_images(extractor, fake, len(fake), "generated")
    )
  if moments_of_real:
    count, fake = len(fake.features), statistics.from_features(fake.features)
  elif moments_of_fake:
    count, real = None, real.statistics
  else:
    return compute.scores(network.name, real, fake, long=True)
  name = compute.frechet_name(network.name, count)
  return {name: fid.frechet_distance(real, fake)}


def _is_statistics(x):
  return isinstance(x, statistics.Statistics)


def main(arguments):
  """Prints the scores of two sets of images."""
  if len(arguments) != 2:
    raise ConfigError(
      "usage: python -m vitgan_jax.metrics.score REAL FAKE [--features=...] "
      "[--inception_weights=FILE] [--json]; see --help"
    )
  sets = list(map(load_images, arguments))  # wrong ones need no weights
  network = None
  if not all(map(_is_statistics, sets)):
    network = features.load_network(
      flags.FLAGS.features, flags.FLAGS.inception_weights
    )
  results = score(*sets, network)
  num_real, num_fake = (None if _is_statistics(x) else len(x) for x in sets)
  name = network.name if network else "an unknown network"
  if flags.FLAGS.json:
    results |= {"real": arguments[0], "fake": arguments[1]}
    results |= {"num_real": num_real, "num_fake": num_fake, "network": name}
    if network:
      results["network_sha256"] = network.sha256
    print(json.dumps(results))
    return
  real, fake = (
    f"{num:,} images of {path}" if num else f"mean and covariance in {path}"
    for num, path in zip((num_real, num_fake), arguments)
  )
  print(compute.table(results, f"{fake} against {real}; features of {name}"))
  if any(map(_is_statistics, sets)):
    print(
      "  Mean and covariance give the Fréchet distance alone. It compares sets "
      "only where one network, with one way to resize, saw both."
    )


if __name__ == "__main__":
  flags.DEFINE_enum(
    "features",
    "inception",
    features.NETWORKS,
    "Network of the metrics. FID is by inception; efficientnet needs no "
    "download.",
  )
  cli.define_path(
    "inception_weights",
    None,
    "pt_inception-2015-12-05-6726825d.pth; default ~/.cache/vitgan_jax, into "
    "which it is downloaded.",
  )
  flags.DEFINE_bool("json", False, "Print one line of JSON instead.")
  cli.run(main)
