"""Checks, names, saves and loads a run's config."""

import json
import re

from etils import epath
import ml_collections

from vitgan_jax import files
from vitgan_jax.errors import ConfigError, DamagedError, check_fields
from vitgan_jax.kernels import IMPLEMENTATIONS
from vitgan_jax.models import kinds, networks

# Where a machine keeps things: nothing of the run itself.
MACHINE_FIELDS = ("compilation_cache", "data.data_dir", "data.path")

# What the same run may be given anew when it resumes.
MAY_CHANGE = (
  *MACHINE_FIELDS,
  "total_kimg",
  # These give the same numbers, up to the order of float32 sums; but for batch
  # statistics and averages of w, which are those of a micro-batch.
  "accumulation",
  "remat",
  "fsdp",
  "implementation",
  "log_every_kimg",
  "sample_every_kimg",
  "num_sample_images",
  "checkpoint_every_kimg",
  "keep_checkpoints",
  "on_nonfinite",
  "profile",
  "wandb",
  "evaluation.features",
  "evaluation.num_samples",
  "evaluation.every_kimg",
)

# Fields that came later, and what stands for them in a run from before.
_LATER = {
  "init_from": "",
  "init_networks": "both",
  "g_optimizer.freeze": "",
  "d_optimizer.freeze": "",
  "wandb": "",
  "on_nonfinite": "stop",
  "data.held_out": 0,
}

_CHOICES = {
  "init_networks": ("both", "generator", "discriminator"),
  "on_nonfinite": ("stop", "skip", "rewind"),
  "dtype": ("float32", "bfloat16"),
  "implementation": ("auto", *IMPLEMENTATIONS),
  "loss.adversarial": ("non_saturating", "hinge", "wasserstein", "rpgan"),
  "loss.bcr_anchor": ("clean", "augmented"),
  "loss.gradient_penalty": ("exact", "approximate"),
  "evaluation.features": ("inception", "efficientnet"),
}

_POSITIVE = (
  "ada.kimg",
  "batch_size",
  "total_kimg",
  "steps_per_call",
  "d_steps",
  "accumulation",
  "fsdp",
  "data.image_size",
  "data.max_pixels",
  "loss.path_length_every",
  "ema.half_life_kimg",
  "evaluation.num_samples",
  "log_every_kimg",
  "sample_every_kimg",
  "num_sample_images",
  "checkpoint_every_kimg",
  "keep_checkpoints",
)

_NOT_NEGATIVE = (
  "seed",
  "data.num_classes",
  "data.held_out",
  "loss.bcr_weight",
  "loss.gradient_penalty_every",
  "loss.lecam_from_step",
  "loss.r1_gamma",
  "loss.r2_gamma",
  "loss.gp_weight",
  "loss.drift_weight",
  "loss.lecam_weight",
  "loss.path_length_weight",
  "augment.brightness",
  "augment.saturation",
  "augment.contrast",
  "ema.ramp_up",
  "evaluation.every_kimg",
)

_SHARES = (
  "ada.target",
  "augment.probability",
  "augment.translation",
  "augment.scaling",
  "augment.cutout",
)
_OPTIMIZERS = ("g_optimizer", "d_optimizer")
_OPTIMIZER_FIELDS = {
  "choices": {
    "name": ("adam", "adamw"),
    "decay": ("constant", "cosine"),
  },
  "positive": ("learning_rate",),
  "not_negative": ("eps", "weight_decay", "warmup_kimg", "clip_norm"),
  "shares": ("b1", "b2"),
}


def validate(config):
  """Checks the values of a config.

  Raises:
    ConfigError: says which field is wrong, and what is allowed.
  """
  try:
    _validate(config)
  except ConfigError:
    raise
  except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
    reason = " ".join(str(error).split())
    raise ConfigError(
      f"a field of the config is of a wrong type or size: {reason}"
    ) from error


def _validate(config):
  check_fields(
    flatten(config),
    "config.",
    choices=_CHOICES,
    positive=_POSITIVE,
    not_negative=_NOT_NEGATIVE,
    shares=_SHARES,
  )
  for name in _OPTIMIZERS:
    check_fields(config[name], f"config.{name}.", **_OPTIMIZER_FIELDS)
    try:
      re.compile(config[name].freeze)
    except re.error as error:
      raise ConfigError(
        f"config.{name}.freeze={config[name].freeze!r} must be a regular "
        f"expression: {error}"
      ) from error
  if config.batch_size % config.accumulation:
    raise ConfigError(
      f"config.accumulation={config.accumulation} must divide "
      f"config.batch_size={config.batch_size}"
    )
  crop = config.data.crop
  if crop and not (
    len(crop) == 4
    and min(crop) >= 0
    and crop[2] - crop[0] == crop[3] - crop[1] > 0
  ):
    raise ConfigError(
      f"config.data.crop={tuple(crop)} must be empty or the left, top, right "
      "and bottom of a square in pixels, as (25, 57, 153, 185)"
    )
  networks.check(config)


def flatten(config):
  """Returns a dict from dotted field names to values, of a config or a dict."""
  values = {}
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict | dict):
      values.update({f"{key}.{k}": v for k, v in flatten(value).items()})
    else:
      values[key] = value
  return values


def images_per_step(config):
  """Returns the real images of a training step: those of its d_steps."""
  return config.batch_size * config.d_steps


def kimg(config, step):
  """Returns the thousands of real images that a run has seen at a step."""
  return step * images_per_step(config) / 1000


def total_steps(config):
  """Returns the training steps of a run: `total_kimg`, rounded up to calls."""
  images_per_call = images_per_step(config) * config.steps_per_call
  calls = -(-int(config.total_kimg * 1000) // images_per_call)
  return calls * config.steps_per_call


def config_path(workdir):
  """Returns where a workdir keeps its config."""
  return epath.Path(workdir) / "config.json"


def later_fields(values):
  """Returns {name: value} of what a run from before some field was has not.

  Args:
    values: of its config, as `flatten` returns them.
  """
  later = _LATER | kinds.later_fields(values)
  return {name: x for name, x in later.items() if name not in values}


def load(workdir):
  """Returns the config that made a workdir.

  Raises:
    ConfigError: if the folder has none, or one of another version.
    DamagedError: if it has one that cannot be read.
  """
  path = config_path(workdir)
  if not path.exists():
    raise ConfigError(
      f"{workdir} is not a workdir of a run: it has no {path.name}. Give the "
      "folder of a training run as --workdir"
    )
  try:
    values = files.parse_json(path.read_text(), object_hook=_with_tuples)
    config = ml_collections.ConfigDict(values)
    config.update_from_flattened_dict(later_fields(flatten(config)))
    config.lock()
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise DamagedError(
      f"{path} is damaged: it holds no config. To resume the run, with its own "
      "--config, writes it anew"
    ) from error
  fields = {*_CHOICES, *_POSITIVE, *_NOT_NEGATIVE, *_SHARES, *MAY_CHANGE}
  for name in _OPTIMIZERS:
    fields |= {f"{name}.{x}" for xs in _OPTIMIZER_FIELDS.values() for x in xs}
  different = sorted(fields - flatten(config).keys())
  for network in kinds.TABLES:
    different += kinds.different_fields(config, network)
  if different:
    raise ConfigError(
      f"{path} and this version of vitgan_jax differ in the fields "
      f"{', '.join(different)}: another version made it; train anew, or with "
      "that version"
    )
  try:
    validate(config)
  except ConfigError as error:
    raise ConfigError(f"{path} holds a wrong value: {error}") from error
  return config


def with_machine_fields(config, other):
  """Returns a config that looks for data and programs where another does."""
  values = flatten(other)
  config = config.copy_and_resolve_references().unlock()
  config.update_from_flattened_dict({f: values[f] for f in MACHINE_FIELDS})
  return config.lock()


def without_paths(config):
  """Returns a config without folders of the machine that it was made on.

  It may be one of another version. What the run started from keeps its name.
  """
  config = config.copy_and_resolve_references().unlock()
  values = dict.fromkeys(MACHINE_FIELDS, "")
  values["init_from"] = epath.Path(config.get("init_from", "")).name
  known = flatten(config)
  config.update_from_flattened_dict(
    {field: value for field, value in values.items() if field in known}
  )
  return config.lock()


def _with_tuples(values):
  # JSON knows only lists.
  return {k: tuple(v) if type(v) is list else v for k, v in values.items()}


def _names_path(workdir):
  return epath.Path(workdir) / "classes.json"


def class_names(workdir):
  """Returns the names of a run's classes; [] if it has none, or none known."""
  path = _names_path(workdir)
  try:
    names = files.parse_json(path.read_text()) if path.exists() else []
  except ValueError:
    names = None
  if files.has_form(names, [str]):
    return names
  files.tell(f"{path} is damaged: classes are known by number alone")
  return []


def check_workdir(config, workdir):
  """Sees whether a run of a config can have a workdir, or go on in it.

  Returns:
    False if the config there is damaged, and cannot be compared.

  Raises:
    ConfigError: if another config made it.
  """
  if not config_path(workdir).exists():
    return True
  try:
    old = flatten(load(workdir))
  except DamagedError:
    return False
  new = flatten(config)
  differences = [
    f"{field} is {old.get(field)!r} there and {new.get(field)!r} here"
    for field in sorted(old.keys() | new.keys())
    if old.get(field) != new.get(field) and field not in MAY_CHANGE
  ]
  if differences:
    raise ConfigError(
      f"{workdir} was made by another config: {'; '.join(differences)}. "
      "Choose another --workdir, or give the old values to resume"
    )
  return True


def claim_workdir(config, workdir, names=()):
  """Writes the config into a new workdir, or checks it against the one there.

  One that is damaged is set aside.

  Args:
    config: of the run.
    workdir: its folder.
    names: of its classes, kept for `class_names`.

  Raises:
    ConfigError: if another config made the workdir, where nothing is written
      then, or if it cannot be written into.
  """
  path = config_path(workdir)
  if not check_workdir(config, workdir):
    aside = path.with_name(f"{path.name}.damaged")
    path.replace(aside)
    files.tell(f"{path} is damaged: set aside as {aside.name}, written anew")
  texts = {path: config.to_json(indent=2, sort_keys=True) + "\n"}
  if names:
    texts[_names_path(workdir)] = json.dumps(names)
  with files.writing_into(workdir, "--workdir"):
    path.parent.mkdir(parents=True, exist_ok=True)
    for whole_path, text in texts.items():
      with files.whole(whole_path) as partial:
        partial.write_text(text)
