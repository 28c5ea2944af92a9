r"""Scores one set of images against another.

  python -m vitgan_jax.metrics.score REAL FAKE
  python -m vitgan_jax.metrics.score real.npz samples/ --features=efficientnet

Each is a folder or zip of PNG, JPEG or WebP images of one size, an .npz file
with one array uint8 [N, H, W, 3], or a folder that
`python -m vitgan_jax.data.prepare` made. All metrics are printed, with FAKE as
the generated images; the Fréchet and kernel distances do not depend on which
is which.
"""

import json
import pathlib

from absl import flags
import numpy as np
from tqdm import tqdm

from vitgan_jax import cli, partitioning
from vitgan_jax.config import ConfigError
from vitgan_jax.data import archives, decode, pipeline
from vitgan_jax.metrics import compute, features, reference


def load_images(path):
  """Returns the images of a path, uint8 [N, H, W, 3].

  Raises:
    ConfigError: if they are not images, or not of one size.
  """
  path = pathlib.Path(path).expanduser()
  if (path / "card.json").exists():
    return pipeline.PreparedImages(path)
  if path.suffix == ".npz":
    return _load_npz(path)
  if path.is_dir():
    _check_files(path)
  archive = archives.open_archive(path)
  images, first = None, None
  for i, name in enumerate(tqdm(archive.names, f"Reading {path}")):
    if pathlib.PurePosixPath(name).name == "grid.png":
      continue  # of `--mode=sample`, beside the samples
    try:
      image = np.asarray(decode.decode(archive.read(i)))
    except Exception as error:  # Pillow raises many kinds for a damaged one
      raise ConfigError(f"{path}: {name} is no image: {error}") from error
    if images is None:
      images = np.empty((len(archive.names), *image.shape), np.uint8)
      first, count = name, 0
    if image.shape != images.shape[1:]:
      raise ConfigError(
        f"{path} has images of several sizes: {first} has "
        f"{images.shape[2]} x {images.shape[1]} pixels, {name} "
        f"{image.shape[1]} x {image.shape[0]}; bring them to one size first"
      )
    images[count] = image
    count += 1
  return images[:count]


def _check_files(path):
  """Raises a ConfigError if a folder holds other files than images."""
  for file in sorted(path.rglob("*")):
    hidden = file.name.startswith(".")
    if (
      file.is_file()
      and not hidden
      and (file.suffix.lower() not in archives.SUFFIXES)
    ):
      raise ConfigError(
        f"{path} holds {file.relative_to(path)}, which is no image: a folder "
        f"to be scored has {', '.join(archives.SUFFIXES)} files alone"
      )


def _load_npz(path):
  try:
    with np.load(path) as arrays:
      (images,) = arrays.values()
  except (OSError, ValueError) as error:
    raise ConfigError(
      f"{path} must be an .npz file with one array: {error}"
    ) from error
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
    raise ConfigError(
      f"{path} holds {images.dtype} {list(images.shape)}; images must be "
      "uint8 [N, H, W, 3]"
    )
  return images


def score(real_images, fake_images, network):
  """Returns all metrics of images, a dict; see `compute.scores`.

  Args:
    real_images: uint8 [N, H, W, 3].
    fake_images: uint8 [M, H, W, 3].
    network: FeatureNetwork.

  Raises:
    ConfigError: if there are too few images.
  """
  compute.check_count(network, "real", len(real_images))
  compute.check_count(network, "generated", len(fake_images))
  extractor = features.Extractor(network, partitioning.create_mesh())
  real = reference.compute(extractor, real_images, len(real_images))
  progress = tqdm(
    features.of_images(extractor, fake_images, len(fake_images)),
    "Features of the generated images",
    total=-(-len(fake_images) // extractor.batch_size),
    unit=" batches",
  )
  fake = features.concatenate(progress)
  return compute.scores(network.name, real, fake, long=True)


def main(arguments):
  """Prints the scores of two sets of images."""
  if len(arguments) != 2:
    raise ConfigError(
      "usage: python -m vitgan_jax.metrics.score REAL FAKE [--features=...] "
      "[--inception_weights=FILE] [--json]; see --help"
    )
  network = features.load_network(
    flags.FLAGS.features, flags.FLAGS.inception_weights
  )
  real, fake = map(load_images, arguments)
  results = score(real, fake, network)
  if flags.FLAGS.json:
    sources = {"real": arguments[0], "fake": arguments[1]}
    counts = {"num_real": len(real), "num_fake": len(fake)}
    protocol = {"network": network.name, "network_sha256": network.sha256}
    print(json.dumps(results | sources | counts | protocol))
    return
  note = (
    f"{len(fake):,} images of {arguments[1]} against the {len(real):,} of "
    f"{arguments[0]}; features of {network.name}"
  )
  print(compute.table(results, note))


if __name__ == "__main__":
  flags.DEFINE_enum(
    "features",
    "inception",
    features.NETWORKS,
    "Network of the metrics. FID is by inception; efficientnet needs no "
    "download.",
  )
  flags.DEFINE_string(
    "inception_weights",
    "",
    "pt_inception-2015-12-05-6726825d.pth; default ~/.cache/vitgan_jax, into "
    "which it is downloaded.",
  )
  flags.DEFINE_bool("json", False, "Print one line of JSON instead.")
  cli.run(main)
