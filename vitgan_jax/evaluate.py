"""Scores the checkpoints of a run, and keeps the best."""

import contextlib
import time

from etils import epath
import numpy as np
from tqdm import tqdm

from vitgan_jax import (
  checkpoint,
  compilation,
  files,
  partitioning,
  pictures,
  processes,
  sample,
)
from vitgan_jax import config as config_lib
from vitgan_jax.data import pipeline
from vitgan_jax.errors import (
  ConfigError,
  DamagedError,
  storage_errors,
  storage_fault,
)
from vitgan_jax.events import EventWriter
from vitgan_jax.metrics import compute, features, neighbours, reference
from vitgan_jax.models import networks

_POLL_SECONDS = 10.0
_SCORES = "scores.jsonl"
_NUM_ROWS = 12  # samples on the picture of their nearest real images
_NUM_NEIGHBOURS = 7  # real images beside each


class Evaluator:
  """Scores generators of one config, by one protocol."""

  def __init__(self, nets, images, mesh, network, num_samples, seed):
    """Loads or computes the features of the real images.

    They must be as many as `compute.check_count` wants.

    Args:
      nets: Networks of the run.
      images: PreparedImages, those of its dataset.
      mesh: the devices.
      network: FeatureNetwork.
      num_samples: how many images to generate for a score.
      seed: of their latents.
    """
    self.images = images
    self._num_samples = num_samples
    self._seed = seed
    self._extractor = features.Extractor(network, mesh)
    self._sampler = sample.make_sampler(nets, mesh)
    self._labels = sample.labels_of(nets.generator, np.arange(num_samples))
    # KID takes 1,000 of either, however few are generated.
    num_kept = max(num_samples, 1000)
    self.reference = reference.load(self._extractor, self.images, num_kept)
    card = self.images.card
    self.protocol = {
      "network": network.name,
      "network_sha256": network.sha256,
      "num_fake": num_samples,
      "num_real": len(self.images),
      "generator": "moving average",
      "seed": seed,
      "images_sha256": self.images.fingerprint,
      **{k: card[k] for k in ("dataset", "split", "image_size", "filter")},
      "crop": str(card["crop"]),
    }

  def features_of(self, variables):
    """Returns `Features` of a generator's samples, and the first of them."""
    batches, first = [], None
    with tqdm(
      total=self._num_samples,
      desc="Features of samples",
      unit=" images",
      disable=not processes.is_primary(),
      leave=False,
    ) as progress:
      start = 0  # not progress.n: a bar that is not shown does not count
      while start < self._num_samples:
        images = self._sampler(variables, self._seed, start)
        if first is None:
          first = np.asarray(images[:_NUM_ROWS])
        batch = self._extractor(images)
        left = self._num_samples - start
        batches.append(features.Features(*(x[:left] for x in batch)))
        progress.update(len(batches[-1].features))
        start += len(images)
    return features.concatenate(batches), first[: self._num_samples]

  def score(self, config, state, fake, long=False):
    """Returns the record of a score: all numbers, and how they came about.

    Args:
      config: of the run.
      state: GANState.
      fake: of `features_of`, of the state's averaged generator.
      long: see `compute.scores`; and whether to score each class by itself.

    Returns:
      A dict for JSON, in the first process; None in others.
    """
    with processes.raise_together():
      if processes.is_primary():
        return self._score(config, state, fake, long)
    return None

  def _score(self, config, state, fake, long):
    step = int(state.step)
    record = {
      "step": step,
      "kimg": config_lib.kimg(config, step),
      "scores": compute.scores(
        self.protocol["network"], self.reference, fake, long
      ),
      "protocol": self.protocol,
    }
    if "classes" in self.images.card:
      classes = self.images.card["classes"]
      labels = self.images.labels()[self.reference.indices]
      shares = neighbours.class_shares(
        fake.features, self.reference.features, labels, len(classes)
      )
      record["class_share"] = dict(zip(classes, shares.round(6).tolist()))
      if self._labels is not None and long:
        real = self.reference.features, labels
        asked = fake.features, np.asarray(self._labels)
        record["class_agreement"] = compute.class_agreement(
          real, asked, len(classes)
        )
        record["class_scores"], record["class_scores_skipped"] = (
          compute.class_scores(self.protocol["network"], real, asked, classes)
        )
    return record

  def with_neighbours(self, fake_images, fake):
    """Returns samples, each with its nearest real images, a row each.

    What the network finds nearest shows whether samples copy the dataset. It
    looks among those images of which it kept the features.

    Args:
      fake_images: uint8 [R, S, S, 3], of `features_of`.
      fake: `Features` of these and others.

    Returns:
      uint8 [R, 1 + neighbours, S, S, 3].
    """
    real = self.reference
    nearest = neighbours.nearest(
      fake.features[: len(fake_images)], real.features, _NUM_NEIGHBOURS
    )
    real_images = self.images[real.indices[nearest]]
    return np.concatenate([fake_images[:, None], real_images], axis=1)


def read_records(workdir):
  """Returns the records in scores.jsonl of a workdir, oldest first."""
  path = epath.Path(workdir) / _SCORES
  return files.read_records(path, files.SCORES)


def find_record(workdir, step, protocol):
  """Returns the last record of a step by a protocol; None if there is none."""
  for record in reversed(read_records(workdir)):
    if record["step"] == step and record["protocol"] == protocol:
      return record
  return None


def is_best(workdir, record):
  """Says whether a record is the best of a run, in all processes.

  It is if its first score, the Fréchet distance, is the lowest of those by the
  same protocol, among them that of the one that is kept; or if that one is
  damaged, or there is none.

  Args:
    workdir: of the run.
    record: of `Evaluator.score`; None in processes but the first.
  """
  best = False
  if processes.is_primary():
    first = next(iter(record["scores"]))
    kept = checkpoint.whole_steps(epath.Path(workdir) / "best")
    others = [
      other
      for other in read_records(workdir)
      if other["protocol"] == record["protocol"]
    ]
    best = not kept or (
      not kept.isdisjoint(other["step"] for other in others)
      and all(
        record["scores"][first] < other["scores"].get(first, np.inf)
        for other in others
      )
    )
  return processes.broadcast_from_first(best)


def keep(workdir, record, best, config, state, data_state):
  """Adds a record to scores.jsonl, and keeps the state if it is the best.

  That is in the folder `best`, which is itself a workdir.

  Args:
    workdir: of the run.
    record: of `Evaluator.score`; None in processes but the first.
    best: of `is_best`.
    config: of the run.
    state: GANState that was scored.
    data_state: what belongs to it; see `checkpoint.save`.

  Raises:
    ConfigError: if the workdir cannot be written into.
  """
  workdir = epath.Path(workdir)
  with contextlib.ExitStack() as held:
    with processes.raise_together():
      if processes.is_primary():
        files.check_writable(workdir, "--workdir")
        # Another evaluation may keep what it found at the same time.
        held.enter_context(
          files.hold(workdir, "--workdir", ".scores.lock", wait=True)
        )
    best = best and is_best(workdir, record)  # still, after what others kept
    with processes.raise_together():
      if best and processes.is_primary():
        names = config_lib.class_names(workdir)
        config_lib.claim_workdir(config, workdir / "best", names)
    if best:
      with checkpoint.create_manager(workdir / "best") as manager:
        checkpoint.save(manager, state, data_state)
        checkpoint.wait(manager)
        for step in manager.all_steps():
          if step != int(state.step):
            manager.delete(step)
    if processes.is_primary():
      # Last: what is recorded is not scored, nor kept, again.
      files.append_record(workdir / _SCORES, record)


def evaluate(
  workdir,
  which="last",
  network=None,
  inception_weights="",
  num_samples=None,
  seed=0,
  machine=None,
  real=None,
):
  """Scores checkpoints of a run.

  For each: prints a table, adds a line to scores.jsonl and scalars to
  TensorBoard, draws pictures of nearest real neighbours and of interpolations
  between latents in the folder `evaluation`, and keeps the best one in `best`.
  What was scored by the same protocol before is not scored again.

  Args:
    workdir: of the run.
    which: "last", "all", "watch" (all, and each new one until the run has
      reached its end), or a step.
    network: one of `features.NETWORKS`, or None for the config's.
    inception_weights: file of Inception's weights; see `inception.load`.
    num_samples: how many images to generate, or None for the config's.
    seed: of their latents.
    machine: a config that says where the data and compiled programs are on this
      machine; nothing else of it counts. None is as the run has it.
    real: folder of a prepared dataset to score against; None is the run's.

  Raises:
    ConfigError: if there is no such checkpoint, or it cannot be scored.
  """
  if which not in ("last", "all", "watch") and not which.isdecimal():
    raise ConfigError(
      f"--checkpoint={which!r} must be last, all, watch or a step"
    )
  config = config_lib.load(workdir)
  if machine is not None:
    config = config_lib.with_machine_fields(config, machine)
  if num_samples is None:
    num_samples = config.evaluation.num_samples
  sample.check_samples(num_samples, seed)
  compilation.use_cache(config.compilation_cache)
  network = network or config.evaluation.features
  with processes.raise_together():
    network = features.load_network(network, inception_weights)
  compute.check_count(network, "generated", num_samples)
  nets = networks.build(config)
  mesh = partitioning.create_mesh()
  evaluator, lost = None, {}
  interpolate = sample.make_interpolator(nets, mesh)
  with checkpoint.open_manager(workdir) as manager:
    for step in _steps(manager, which, config_lib.total_steps(config)):
      try:
        if step is None:
          state, data_state = checkpoint.restore_last(
            manager, config, nets, mesh
          )
          step = int(state.step)
        else:
          state = checkpoint.restore(manager, config, nets, mesh, step)
          data_state = checkpoint.restore_data_state(manager, step)
      except (OSError, ConfigError) as error:
        if which == "watch" and step not in manager.all_steps(read=True):
          print(f"Step {step} was deleted before it was scored", flush=True)
        elif which in ("all", "watch") and isinstance(error, DamagedError):
          files.tell(f"Passed over: {error}")
        else:
          raise
        continue
      if evaluator is None:  # late: there may be no checkpoint
        with processes.raise_together():
          names = config_lib.class_names(workdir)
          images = _real_images(config, real, names)
        compute.check_count(network, "real", len(images))
        evaluator = Evaluator(nets, images, mesh, network, num_samples, seed)
      done = find_record(workdir, step, evaluator.protocol)
      if processes.broadcast_from_first(bool(done)):
        if done:
          report(done, is_best=False)  # of an earlier evaluation
        continue
      # All processes take part; the first writes.
      fake, first = evaluator.features_of(state.g_ema_variables)
      between = interpolate(state.g_ema_variables, seed)
      record = evaluator.score(config, state, fake, long=True)
      best = is_best(workdir, record)
      if processes.is_primary():
        report(record, best)
      try:
        keep(workdir, record, best, config, state, data_state)
        if processes.is_primary():
          neighbours_of = evaluator.with_neighbours(first, fake)
          _draw(workdir, step, "neighbours", neighbours_of)
          _draw(workdir, step, "interpolation", np.asarray(between))
          _write_scalars(workdir, record)
      except (*storage_errors(), ConfigError) as error:
        lost[step] = error
  if lost:
    steps = ", ".join(map(str, lost))
    raise ConfigError(
      f"the scores of step {steps}, above, are not kept: "
      f"{storage_fault(lost.popitem()[1])}"
    )


def _real_images(config, folder, class_names):
  """Returns the PreparedImages of a folder; None is the run's dataset.

  Raises:
    ConfigError: if there are none, or of another size than the run's, or of
      other classes.
  """
  if folder is None:
    return pipeline.load_images(config.data)
  if not (epath.Path(folder) / "card.json").exists():
    raise ConfigError(
      f"--reference={folder} is no prepared dataset: it has no card.json. "
      "`python -m vitgan_jax.data.prepare` makes one, and prints its folder"
    )
  images = pipeline.PreparedImages(epath.Path(folder))
  size = images.card["image_size"]
  if size != config.data.image_size:
    raise ConfigError(
      f"--reference={folder} has images of {size} px, and the run makes "
      f"{config.data.image_size} px: prepare them at this size"
    )
  classes = images.card.get("classes", [])
  if config.data.num_classes and class_names and classes != class_names:
    raise ConfigError(
      f"--reference={folder} has other classes than the run, or in another "
      f"order: {', '.join(classes[:20]) or 'none'}; the run has "
      f"{', '.join(class_names[:20])}"
    )
  return images


def _steps(manager, which, total_steps):
  """Yields the steps to score."""
  if which == "last":
    yield None  # the last that is whole
  elif which == "all":
    yield from sorted(manager.all_steps())
  elif which == "watch":
    seen = set()
    while total_steps not in seen:
      new = sorted(set(manager.all_steps(read=True)) - seen)
      for step in new:
        seen.add(step)
        yield step
      if not new:
        time.sleep(_POLL_SECONDS)
  else:
    yield int(which)


def report(record, is_best):
  """Prints a record as a table."""
  note = files.describe_protocol(record["protocol"])
  verdict = ", the best so far" if is_best else ""
  print(f"Scores of step {record['step']}, {record['kimg']:g} kimg{verdict}:")
  print(compute.table(record["scores"], note))
  if "class_share" in record:
    shares = [f"{k} {v:.1%}" for k, v in record["class_share"].items()]
    print("  classes, by nearest real images: " + ", ".join(shares[:20]))
  if agreement := record.get("class_agreement"):
    print(
      f"  {'samples taken for their class':<34}{agreement['fake']:<10.3f}by a "
      f"linear classifier, right on {agreement['real']:.3f} of real images; "
      f"chance {agreement['chance']:.3f}"
    )
  for name, values in record.get("class_scores", {}).items():
    key = next(iter(values))
    counts = f"{values['num_fake']:,} samples, {values['num_real']:,} real"
    print(f"  {f'{key} of {name}':<34}{values[key]:<10.5g}{counts}")
  if skipped := record.get("class_scores_skipped"):
    print(f"  not scored by class: {skipped}")
  print(end="", flush=True)


def _draw(workdir, step, name, rows):
  """Writes images [R, C, S, S, 3] as a picture."""
  folder = epath.Path(workdir) / "evaluation"
  folder.mkdir(exist_ok=True)
  images = rows.reshape(-1, *rows.shape[2:])
  grid = pictures.image_grid(images, columns=rows.shape[1])
  pictures.write_png(folder / f"{step:08d}-{name}.png", grid, min_side=512)


def _write_scalars(workdir, record):
  # In a folder of its own: a training run may be writing into the other.
  writer = EventWriter(epath.Path(workdir) / "evaluation")
  writer.write(record["step"], record["scores"], {})
  writer.close()
