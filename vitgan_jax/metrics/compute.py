"""All metrics of a set of generated images, under their full names."""

import numpy as np

from vitgan_jax.errors import ConfigError
from vitgan_jax.metrics import (
  fid,
  inception_score,
  kid,
  precision_recall,
  statistics,
)

_MAX_CLASSES = 20  # to be scored: each may take seconds
_MIN_CLASS_IMAGES = 50  # of either kind


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
  count = count_name(len(fake.features))
  frechet = frechet_name(network)
  is_inception = frechet == "fid"
  infix = frechet.removeprefix("fid").removeprefix("fd")
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


def frechet_name(network, count=None):
  """Returns "fid50k" of Inception, "fd_efficientnet50k" of another network."""
  network = network.split("-")[0]
  name = "fid" if network == "inception" else f"fd_{network}"
  return name if count is None else name + count_name(count)


def class_scores(network, real, fake, classes):
  """Computes the Fréchet distance of each class (intra-FID).

  It is biased upwards, the more so the fewer images there are, and compares
  only at equal numbers of these (Miyato and Koyama 2018).

  Args:
    network: as `scores` takes it.
    real: (features [N, F], their classes [N], from 0).
    fake: (features [M, F], their classes [M]).
    classes: names of all.

  Returns:
    {name: {"fid" or the other network's: distance, "num_fake", "num_real"}} of
    the first 20 classes that have 50 images or more of either kind; and what
    was left out and why, "" if nothing.
  """
  name = frechet_name(network)
  counts = [np.bincount(x[1], minlength=len(classes)) for x in (fake, real)]
  enough = np.flatnonzero(np.minimum(*counts) >= _MIN_CLASS_IMAGES).tolist()
  values = {}
  for c in enough[:_MAX_CLASSES]:
    distance = fid.frechet_distance_of_few(
      *(features[labels == c] for features, labels in (real, fake))
    )
    values[classes[c]] = {
      name: distance,
      "num_fake": int(counts[0][c]),
      "num_real": int(counts[1][c]),
    }
  skipped = []
  if few := len(classes) - len(enough):
    skipped.append(
      f"{few:,} classes with fewer than {_MIN_CLASS_IMAGES} samples or real "
      "images looked at (more of both: --num_samples)"
    )
  if more := len(enough) - len(values):
    skipped.append(f"{more:,} classes after the first {_MAX_CLASSES}")
  return values, "; ".join(skipped)


def class_agreement(real, fake, num_classes):
  """Computes how many generated images a classifier takes for their class.

  It is a linear one, of features: linear discriminant analysis, its covariance
  shrunk as Ledoit and Wolf (2004) have it.

  Args:
    real: (features [N, F], their classes [N]), what it is fitted to.
    fake: (features [M, F], the classes that were asked for [M]).
    num_classes: how many there are.

  Returns:
    {"fake", "real": shares that are classified as they should be, "chance":
    that of the largest class}; None where a class has fewer than 50 real images
    or there is one alone. Each fifth of the real images is classified by the
    others.
  """
  features, labels = real
  counts = np.bincount(labels, minlength=num_classes)
  if len(counts) < 2 or counts.min() < _MIN_CLASS_IMAGES:
    return None
  # Late: it takes a second to import.
  from sklearn import discriminant_analysis, model_selection

  classifier = discriminant_analysis.LinearDiscriminantAnalysis(
    solver="lsqr", shrinkage="auto"
  )
  found = model_selection.cross_val_predict(classifier, features, labels, cv=5)
  fake_features, asked = fake
  classifier.fit(features, labels)
  return {
    "fake": float(np.mean(classifier.predict(fake_features) == asked)),
    "real": float(np.mean(found == labels)),
    "chance": float(counts.max() / counts.sum()),
  }


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
