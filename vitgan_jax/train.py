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
  replay,
  transfer,
)
from vitgan_jax import config as config_lib
from vitgan_jax.data import pipeline
from vitgan_jax.errors import ConfigError
from vitgan_jax.gan_step import make_train_steps
from vitgan_jax.metrics import compute, features
from vitgan_jax.models import networks
from vitgan_jax.monitor import (
  MetricWriter,
  Profiler,
  Progress,
  SampleWriter,
)

_NUM_LOOKED_AT = 64
_MAX_LOOKED_AT = 256
_MAX_REWINDS = 5  # of one process: numbers that go bad more often are no chance


class TrainingDivergedError(RuntimeError):
  """A step left a number that is not finite; the message is one line."""


def train_and_evaluate(config, workdir):
  """Trains a model, or goes on from the last checkpoint in the workdir.

  Writes into the workdir: config.json, classes.json (names of classes, if the
  networks get them), checkpoints/, samples/*.png, of which grid.png is the
  newest, a line of scalars a log in metrics.jsonl, TensorBoard events, with
  config.evaluation.every_kimg scores.jsonl and best/, a profile if
  config.profile, and in nonfinite/ the state before a step that could not be
  taken. With many processes the workdir is one that all of them see.

  Args:
    config: of `configs/`.
    workdir: folder of the run.

  Returns:
    The last GANState.

  Raises:
    ConfigError: if the config, the data or the workdir cannot be used, or
      another process trains in the workdir.
    TrainingDivergedError: if a number is not finite, and config.on_nonfinite
      does not go on; all checkpoints are from before it.
  """
  for rewinds in range(_MAX_REWINDS + 1):
    try:
      return _train(config, workdir, rewinds)
    except TrainingDivergedError as error:
      if config.on_nonfinite != "rewind" or rewinds == _MAX_REWINDS:
        raise
      if processes.is_primary():
        files.tell(
          f"{error}. Back to the last checkpoint, with other random numbers: "
          f"{rewinds + 1} of at most {_MAX_REWINDS} times"
        )


def _train(config, workdir, rewinds):
  """Trains to the end, with keys of its own after `rewinds` > 0."""
  config_lib.validate(config)
  compilation.use_cache(config.compilation_cache)
  mesh = partitioning.create_mesh(fsdp=config.fsdp)
  factors = {
    "accumulation": config.accumulation,
    "discriminator.group_size": config.discriminator.get("group_size", 1),
  }
  if config.batch_size % (mesh.size * math.prod(factors.values())):
    times = [f" times config.{k}={v}" for k, v in factors.items() if v > 1]
    raise ConfigError(
      f"config.batch_size={config.batch_size} must be a multiple of the "
      f"{mesh.size} devices{''.join(times)}"
    )
  with processes.raise_together():  # each host prepares its own copy
    images = pipeline.load_images(config.data)
  labels = images.labels() if config.data.num_classes else None
  if len(images) - config.data.held_out < config.batch_size:
    raise ConfigError(
      f"{config.data.dataset} has {len(images)} images in "
      f"{config.data.split!r}, fewer than config.batch_size="
      f"{config.batch_size} and config.data.held_out={config.data.held_out}: "
      "give more images or a smaller batch"
    )
  # What is looked at; without images that are held out, of those trained on.
  looked_at = slice(_NUM_LOOKED_AT)
  if config.data.held_out:
    held_out = pipeline.held_out_indices(len(images), config.data.held_out)
    # In one batch, which has to fit into a device's memory.
    looked_at = held_out[:: -(-len(held_out) // _MAX_LOOKED_AT)]
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
    config.data.held_out,
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
    if rewinds:
      state = state.replace(key=jax.random.fold_in(state.key, rewinds))
    if is_primary:
      _print_overview(config, workdir, state, images, mesh, first_step)
      print("Computed by", "; ".join(implementations), flush=True)
      if taken:
        print(taken, flush=True)
    writer = stack.enter_context(MetricWriter(workdir, config))
    profiler = stack.enter_context(Profiler(config, workdir))
    samples = SampleWriter(
      config,
      workdir,
      nets,
      mesh,
      images[looked_at],
      None if labels is None else labels[looked_at],
      writer,
    )
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
    try:
      for step, batch in pipeline.prefetch(load, calls):
        profiler.before_call(state)
        with contextlib.ExitStack() as call:
          if step == first_step:
            call.enter_context(files.waiting("compiling the training step"))
          call.enter_context(
            jax.profiler.StepTraceAnnotation("train", step_num=step)
          )
          state, metrics = train_steps(state, batch, step)
        if step == first_step:
          processes.release_memory()
        if pending:
          _finish_call(config, progress, writer, *pending)
        step += config.steps_per_call
        pending = (step, metrics)
        # Asked once: a signal may come at any time.
        stopping = stop.requested(step, config.steps_per_call)
        if stopping and is_primary:
          print("Stopping: saving first", flush=True)
        last = step >= total_steps or stopping
        draws, saves, scores = (
          _passes(config, step, every)
          for every in (
            config.sample_every_kimg,
            config.checkpoint_every_kimg,
            config.evaluation.every_kimg if evaluator else math.inf,
          )
        )
        if last or draws or saves or scores:
          # What is kept must be worth it, and to go on from it logs no more.
          metrics = _finish_call(config, progress, writer, *pending, last)
          pending = None
        if last or draws:
          with files.waiting("drawing samples"):
            samples.write(step, state, metrics)
        if last or saves:
          with files.waiting("saving a checkpoint"):
            checkpoint.save(manager, state, batches.state_at(step))
        if scores:
          _evaluate(
            evaluator, config, workdir, state, batches.state_at(step), writer
          )
        if draws or saves or scores:
          processes.release_memory()
        if stopping:
          break
    except TrainingDivergedError as error:
      # The calls that were on their way since left the state as it was.
      _keep_nonfinite(workdir, state, batches)
      raise TrainingDivergedError(
        f"{error} at step {int(state.step)}, which was not taken: all "
        "checkpoints are from before it. Lower the learning rates; "
        f"--mode=replay --workdir={workdir} tells where it came from"
      ) from error
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
        raise ConfigError(
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
  """Checks one call's metrics; logs and shows them where it is time to.

  Returns:
    Them, floats.

  Raises:
    TrainingDivergedError: if one is not finite.
  """
  metrics = _check_finite(metrics)
  if skipped := int(metrics.get("steps/skipped", 0)):
    files.tell(
      f"Skipped {skipped} of the {config.steps_per_call} steps before step "
      f"{step}: a number was not finite"
    )
  is_logged = last or _passes(config, step, config.log_every_kimg)
  if is_logged or progress.is_due():
    shown = progress.report(step, metrics, is_logged)
    if is_logged:
      writer.write(step, metrics | shown)
  return metrics


def _check_finite(metrics):
  """Returns the metrics as floats.

  Raises:
    TrainingDivergedError: if one is not finite.
  """
  metrics = {key: float(value) for key, value in metrics.items()}
  for key, value in metrics.items():
    if not np.isfinite(value):
      raise TrainingDivergedError(f"{key} is {value}")
  return metrics


def _keep_nonfinite(workdir, state, batches):
  """Keeps the state before a step that was not taken, and its data's place."""
  with checkpoint.create_manager(replay.folder(workdir), keep=1) as manager:
    checkpoint.save(manager, state, batches.state_at(int(state.step)))


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
