"""Generators that were trained: opened, sampled from, kept as plain arrays.

An export is a folder with config.json, classes.json if the run has classes, and
generator.safetensors: all variables of the averaged generator, by names as
"params/block0/attention/out/kernel". Nothing in it is code.
"""

import functools

from etils import epath
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from vitgan_jax import checkpoint, files, partitioning, sample
from vitgan_jax import config as config_lib
from vitgan_jax.errors import ConfigError, DamagedError
from vitgan_jax.models import networks
from vitgan_jax.train_state import create_train_state

WEIGHTS = "generator.safetensors"


class TrainedGenerator:
  """The moving average of a generator, and what is known of it.

  Attributes:
    config: of its run.
    class_names: of its classes; [] if it has none, or none are known.
    step: training steps that it has seen.
    generator: Linen module.
    variables: of the module, a pytree of arrays.
  """

  def __init__(self, config, class_names, step, variables):
    """Compiles nothing yet; the arguments are as the attributes."""
    self.config = config
    self.class_names = class_names
    self.step = step
    self.variables = variables
    self._nets = networks.build(config)
    self.generator = networks.plain(self._nets.generator)

  def sample(self, num_samples, seed=0, truncation=1.0, classes=None):
    """Returns samples, uint8 numpy [num_samples, S, S, 3].

    Sample i of a seed is that of `--mode=sample`, however many you ask for.

    Args:
      num_samples: how many.
      seed: of the latents, from 0 to 2**31 - 1.
      truncation: psi, the share of w's distance from its mean that is left; 1
        is as trained.
      classes: numbers of classes, or names; sample i is of number i modulo how
        many they are. None is all in turn.

    Raises:
      ConfigError: if a number is out of range, or there is no such class.
    """
    sample.check_samples(num_samples, seed)
    if classes is not None:
      classes = sample.find_classes(
        classes, self.config.data.num_classes, self.class_names
      )
    towards = None if truncation == 1.0 else (truncation, self.mean_w)
    batches = sample.sample_images(
      self._sampler, self.variables, seed, num_samples, classes, towards
    )
    return np.concatenate(list(batches))

  def mapping(self, latents, labels=None):
    """Maps latents [B, latent_dim] and classes [B] to w, which has no noise."""
    return self._mapping(self.variables, latents, labels)

  def synthesize(self, w, keys=None):
    """Maps w to float32 images [B, S, S, 3], about [-1, 1].

    Args:
      w: of `mapping`, [B, ...], or between two of them.
      keys: [B], random keys of the noise; None adds none.
    """
    return self._synthesize(self.variables, w, keys)

  @functools.cached_property
  def mean_w(self):
    """The mean of w [...]; with classes of each of them, [classes, ...]."""
    return sample.mean_w(self._nets, self.variables)

  @functools.cached_property
  def _sampler(self):
    mesh = partitioning.create_mesh(jax.local_devices())
    return sample.make_sampler(self._nets, mesh)

  @functools.cached_property
  def _mapping(self):
    return jax.jit(
      functools.partial(self.generator.apply, method=sample.mapping)
    )

  @functools.cached_property
  def _synthesize(self):
    return jax.jit(functools.partial(self.generator.apply, method="synthesize"))


def is_export(path):
  """Tells whether a folder is an export, not a run."""
  return (epath.Path(path) / WEIGHTS).exists()


def load(path):
  """Returns the TrainedGenerator of a run or of an export.

  Raises:
    ConfigError: if the folder is neither, or is damaged.
  """
  path = epath.Path(files.expand(path))
  if is_export(path):
    return _load_export(path)
  has_config = config_lib.config_path(path).exists()
  if has_config and not (path / "checkpoints").exists():
    raise ConfigError(
      f"{path} has neither checkpoints nor {WEIGHTS}: give the folder of a "
      "run, or of an export with --format=safetensors"
    )
  run = checkpoint.load_run(path)
  return TrainedGenerator(
    run.config,
    config_lib.class_names(path),
    int(run.state.step),
    run.state.g_ema_variables,
  )


def _load_export(folder):
  if fault := files.fault_of(folder):
    raise DamagedError(f"{folder} is damaged: {fault}. Export the run again")
  config = config_lib.load(folder)
  try:
    tensors = safetensors.numpy.load((folder / WEIGHTS).read_bytes())
    step = int(tensors.pop("step"))
  except Exception as error:  # safetensors and NumPy raise many kinds
    raise DamagedError(
      f"{folder / WEIGHTS} holds no generator. Export the run again"
    ) from error
  nets = networks.build(config)
  shapes = jax.eval_shape(lambda: create_train_state(config, nets))
  expected = traverse_util.flatten_dict(shapes.g_ema_variables, sep="/")
  different = sorted(
    name
    for name in expected.keys() | tensors.keys()
    if name not in expected
    or name not in tensors
    or expected[name].shape != tensors[name].shape
  )
  if different:
    raise ConfigError(
      f"{folder / WEIGHTS} and its config.json are of different networks, as "
      f"in {different[0]}: export the run again"
    )
  variables = {
    name: jnp.asarray(x, expected[name].dtype) for name, x in tensors.items()
  }
  return TrainedGenerator(
    config,
    config_lib.class_names(folder),
    step,
    traverse_util.unflatten_dict(variables, sep="/"),
  )


def save(folder, trained, dtype):
  """Writes generator.safetensors.

  Args:
    folder: epath.Path.
    trained: TrainedGenerator.
    dtype: of the numbers in the file, "float32" or "float16".
  """
  variables = traverse_util.flatten_dict(
    jax.device_get(trained.variables), sep="/"
  )
  tensors = {
    name: np.asarray(x, dtype, order="C") for name, x in variables.items()
  }
  tensors["step"] = np.array(trained.step, np.int64)
  (folder / WEIGHTS).write_bytes(safetensors.numpy.save(tensors))
