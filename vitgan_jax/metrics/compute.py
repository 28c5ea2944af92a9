"""All metrics of a set of generated images, under their full names."""

from vitgan_jax.config import ConfigError
from vitgan_jax.metrics import (
  fid,
  inception_score,
  kid,
  precision_recall,
  statistics,
)


def scores(network, real, fake, long=False):
  """Computes all metrics of a set of generated images.

  Names end in the number of generated images, as in "fid50k". Those by another
  network than Inception carry its name, as in "fd_efficientnet2k": they are no
  FID, and compare only with one another.

  Args:
    network: name of the FeatureNetwork; what stands before its first hyphen
      goes into the metrics' names.
    real: `reference.Reference`.
    fake: `Features` of the generated images, [N, F] and [N, C].
    long: whether to add what takes a minute: the 95% interval of the Fréchet
      distance, and its limit at infinitely many images where N allows.

  Returns:
    A dict of floats. The first is the Fréchet distance.

  Raises:
    ConfigError: if there are too few images.
  """
  network = network.split("-")[0]
  count = count_name(len(fake.features))
  is_inception = network == "inception"
  infix = "" if is_inception else f"_{network}"
  frechet = ("fid" if is_inception else "fd") + infix
  kernel = ("kid" if is_inception else "kd") + infix
  moments = statistics.from_features(fake.features)
  distance = fid.frechet_distance(real.statistics, moments)
  values = {f"{frechet}{count}": distance}
  if long:
    low, high = fid.bootstrap_interval(real.statistics, fake.features)
    values |= {f"{frechet}{count}_low": low, f"{frechet}{count}_high": high}
    if fid.can_extrapolate(*fake.features.shape):
      limit = fid.extrapolate(real.statistics, fake.features)
      values[f"{frechet}_inf"] = limit
  if is_inception:  # the classes of the other are not those of the score
    mean, deviation = inception_score.inception_score(fake.logits)
    values |= {f"is{count}": mean, f"is{count}_std": deviation}
  mean, deviation = kid.kernel_distance(real.features, fake.features)
  values |= {f"{kernel}{count}": mean, f"{kernel}{count}_std": deviation}
  manifolds = precision_recall.precision_recall(real.features, fake.features)
  return values | {f"{k}{infix}{count}": v for k, v in manifolds.items()}


def check_count(network, kind, num):
  """Raises a ConfigError if images are too few for `scores`; costs nothing.

  Args:
    network: FeatureNetwork.
    kind: "real" or "generated".
    num: how many there are.
  """
  # Of the Fréchet distance and of the kernel distance; others need fewer.
  needed = max(fid.least_images(network.num_features), kid.SUBSET_SIZE)
  if num < needed:
    raise ConfigError(
      f"{num:,} {kind} images are too few for the scores by the features of "
      f"{network.name}: take at least {needed:,}"
    )


def count_name(count):
  """Returns "50k" for 50,000, and "1497" for 1,497."""
  return f"{count}" if count % 1000 else f"{count // 1000}k"


def table(values, note):
  """Returns `scores` as lines for people, with a note below."""
  lines = [f"  {key:<34}{value:.5g}" for key, value in values.items()]
  lines.append(f"  {note}")
  if any(key.startswith("fd_") for key in values):
    lines.append(
      "  fd_... is no FID. For FID: --features=inception, whose weights are "
      "downloaded or given as --inception_weights=FILE"
    )
  return "\n".join(lines)
