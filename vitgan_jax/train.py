"""The training loop: reads batches, runs steps, and keeps what they made."""

import contextlib
import math

from clu import parameter_overview
import jax
import numpy as np

from vitgan_jax import (
  checkpoint,
  compilation,
  evaluate,
  files,
  partitioning,
  processes,
  transfer,
)
from vitgan_jax import config as config_lib
from vitgan_jax.data import pipeline
from vitgan_jax.gan_step import make_train_steps
from vitgan_jax.metrics import compute, features
from vitgan_jax.models import networks
from vitgan_jax.monitor import (
  MetricWriter,
  Profiler,
  Progress,
  SampleWriter,
)


class TrainingDivergedError(RuntimeError):
  """A loss is not a finite number; the message is one line."""


def train_and_evaluate(config, workdir):
  """Trains a model, or goes on from the last checkpoint in the workdir.

  Writes into the workdir: config.json, classes.json (names of classes, if the
  networks get them), checkpoints/, samples/*.png, a line of scalars a log in
  metrics.jsonl, TensorBoard events, and a profile if config.profile. With many
  processes the workdir is one that all of them see.

  Args:
    config: of `configs/`.
    workdir: folder of the run.

  Returns:
    The last GANState.

  Raises:
    ConfigError: if the config, the data or the workdir cannot be used, or
      another process trains in the workdir.
    TrainingDivergedError: if a loss is not finite; the last checkpoint stays.
  """
  config_lib.validate(config)
  compilation.use_cache(config.compilation_cache)
  mesh = partitioning.create_mesh(fsdp=config.fsdp)
  factors = {
    "accumulation": config.accumulation,
    "discriminator.group_size": config.discriminator.get("group_size", 1),
  }
  if config.batch_size % (mesh.size * math.prod(factors.values())):
    times = [f" times config.{k}={v}" for k, v in factors.items() if v > 1]
    raise config_lib.ConfigError(
      f"config.batch_size={config.batch_size} must be a multiple of the "
      f"{mesh.size} devices{''.join(times)}"
    )
  with processes.raise_together():  # each host prepares its own copy
    images = pipeline.load_images(config.data)
  labels = images.labels() if config.data.num_classes else None
  if len(images) < config.batch_size:
    raise config_lib.ConfigError(
      f"{config.data.dataset} has {len(images)} images in "
      f"{config.data.split!r}, fewer than config.batch_size="
      f"{config.batch_size}: give more images or a smaller batch"
    )
  network = _feature_network(config, images)
  nets, implementations = networks.with_kernels(
    networks.build(config), mesh, config.batch_size, config.accumulation
  )
  state, taken = None, ""
  if not checkpoint.has_any(workdir):
    state, taken = transfer.initial_state(config, nets, mesh)
  names = images.card["classes"] if config.data.num_classes else ()
  batches = pipeline.ShuffledBatches(
    images,
    config_lib.images_per_step(config),
    config.seed,
    jax.process_index(),
    jax.process_count(),
  )
  is_primary = processes.is_primary()
  with contextlib.ExitStack() as stack:
    stack.enter_context(_claimed_workdir(config, workdir, names))
    stop = stack.enter_context(processes.StopSignal())
    manager = stack.enter_context(
      checkpoint.create_manager(workdir, config.keep_checkpoints)
    )
    first_step = 0
    if state is None:
      state, data_state = checkpoint.restore_last(
        manager, config, nets, mesh, set_aside=True
      )
      first_step = batches.step_of(data_state)
    if is_primary:
      _print_overview(config, workdir, state, images, mesh, first_step)
      print("Computed by", "; ".join(implementations), flush=True)
      if taken:
        print(taken, flush=True)
    writer = stack.enter_context(MetricWriter(workdir, config))
    profiler = stack.enter_context(Profiler(config, workdir))
    samples = SampleWriter(config, workdir, nets, mesh, images, writer)
    evaluator = network and evaluate.Evaluator(
      nets, images, mesh, network, config.evaluation.num_samples, seed=0
    )
    train_steps = make_train_steps(config, nets, mesh)
    total_steps = config_lib.total_steps(config)
    progress = Progress(config, first_step, total_steps)

    def load(step):
      steps = range(step, step + config.steps_per_call)
      indices = np.stack([batches.indices(step) for step in steps])
      indices = indices.reshape(len(steps), config.d_steps, -1)
      batch = {"images": images[indices], "labels": None}
      if labels is not None:
        batch["labels"] = labels[indices]
      return step, partitioning.global_batch(mesh, batch, axis=2)

    if (
      first_step
      and evaluator
      and _passes(config, first_step, config.evaluation.every_kimg)
    ):
      # The run may have been killed between this checkpoint and its score.
      done = evaluate.find_record(workdir, first_step, evaluator.protocol)
      if not processes.broadcast_from_first(bool(done)):
        data_state = batches.state_at(first_step)
        _evaluate(evaluator, config, workdir, state, data_state, writer)
    calls = range(first_step, total_steps, config.steps_per_call)
    pending = None  # metrics of the last call: fetched while the next one runs
    for step, batch in pipeline.prefetch(load, calls):
      profiler.before_call(state)
      with jax.profiler.StepTraceAnnotation("train", step_num=step):
        state, metrics = train_steps(state, batch)
      if pending:
        _finish_call(config, progress, writer, *pending)
      step += config.steps_per_call
      pending = (step, metrics)
      # Asked once: a signal may come at any time.
      stopping = stop.requested(step, config.steps_per_call)
      if stopping and is_primary:
        print("Stopping: saving first", flush=True)
      last = step >= total_steps or stopping
      if last or _passes(config, step, config.sample_every_kimg):
        samples.write(step, state)
      if last or _passes(config, step, config.checkpoint_every_kimg):
        # It must be worth resuming, and what goes on from it logs this no more.
        _finish_call(config, progress, writer, *pending, last)
        pending = None
        checkpoint.save(manager, state, batches.state_at(step))
      if evaluator and _passes(config, step, config.evaluation.every_kimg):
        _check_finite(step, metrics)
        _evaluate(
          evaluator, config, workdir, state, batches.state_at(step), writer
        )
      if stopping:
        break
  if is_primary:
    if int(state.step) < total_steps:
      print("Stopped. The same command goes on from here.")
    else:
      print(f"Done. The last samples are in {samples.latest}")
  return state


@contextlib.contextmanager
def _claimed_workdir(config, workdir, names):
  """Has the first process claim the workdir, and hold it until the end.

  Raises:
    ConfigError: in all processes, if it cannot, or if one does not see it.
  """
  with contextlib.ExitStack() as held:
    with processes.raise_together():
      if processes.is_primary():
        config_lib.check_workdir(config, workdir)  # before a lock is made
        held.enter_context(files.hold(workdir, "--workdir"))
        config_lib.claim_workdir(config, workdir, names)
    with processes.raise_together():
      if config_lib.load(workdir) != config:
        raise config_lib.ConfigError(
          f"--workdir={workdir} must be one folder that all processes see"
        )
    yield


def _feature_network(config, images):
  """Returns the FeatureNetwork of scores while training, or None without.

  Raises:
    ConfigError: if it cannot be had, or images are too few for its scores.
  """
  if not config.evaluation.every_kimg:
    return None
  with processes.raise_together():
    network = features.load_network(config.evaluation.features)
  compute.check_count(network, "real", len(images))
  compute.check_count(network, "generated", config.evaluation.num_samples)
  return network


def _evaluate(evaluator, config, workdir, state, data_state, writer):
  fake, _ = evaluator.features_of(state.g_ema_variables)
  record = evaluator.score(config, state, fake)
  is_best = evaluate.is_best(workdir, record)
  if processes.is_primary():
    evaluate.report(record, is_best)
    writer.write(record["step"], record["scores"])
  with writer.spared("scores"):
    evaluate.keep(workdir, record, is_best, config, state, data_state)


def _passes(config, step, every_kimg):
  """Says whether the call that ended at `step` passed a multiple of kimg."""
  images = step * config_lib.images_per_step(config)
  before = images - config.steps_per_call * config_lib.images_per_step(config)
  every = every_kimg * 1000
  return images // every > before // every


def _finish_call(config, progress, writer, step, metrics, last=False):
  """Checks one call's metrics; logs them where it is time to."""
  metrics = _check_finite(step, metrics)
  if last or _passes(config, step, config.log_every_kimg):
    metrics |= progress.report(step, metrics)
    writer.write(step, metrics)


def _check_finite(step, metrics):
  """Returns the metrics as floats.

  Raises:
    TrainingDivergedError: if one is not finite.
  """
  metrics = {key: float(value) for key, value in metrics.items()}
  for key, value in metrics.items():
    if not np.isfinite(value):
      raise TrainingDivergedError(
        f"{key} is {value} before step {step}. Lower the learning rates, or "
        "look at the last scalars; all checkpoints are from before this"
      )
  return metrics


def _print_overview(config, workdir, state, images, mesh, first_step):
  for name, params in (
    ("Generator", state.g_params),
    ("Discriminator", state.d_params),
  ):
    print(f"{name}:")
    print(
      parameter_overview.get_parameter_overview(params, include_stats=False)
    )
  begin = f"Resuming at step {first_step}" if first_step else "Starting"
  print(
    f"{begin}: {len(images):,} images of {config.data.dataset} at "
    f"{config.data.image_size} px, batch {config.batch_size} on {mesh.size} "
    f"{jax.devices()[0].platform} device(s) of {jax.process_count()} "
    f"process(es), workdir {workdir}",
    flush=True,
  )
