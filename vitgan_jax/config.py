"""Checks, names, saves and loads a run's config."""

import json

from etils import epath
import ml_collections

# Where a machine keeps things: nothing of the run itself.
MACHINE_FIELDS = ("compilation_cache", "data.data_dir", "data.path")

# What the same run may be given anew when it resumes.
_MAY_CHANGE = (
  *MACHINE_FIELDS,
  "total_kimg",
  # These give the same numbers, up to the order of float32 sums.
  "accumulation",
  "remat",
  "fsdp",
  "log_every_kimg",
  "sample_every_kimg",
  "num_sample_images",
  "checkpoint_every_kimg",
  "keep_checkpoints",
  "profile",
  "evaluation.features",
  "evaluation.num_samples",
  "evaluation.every_kimg",
)

_CHOICES = {
  "dtype": ("float32", "bfloat16"),
  "generator.latent_injection": ("sln", "add", "token"),
  "generator.attention": ("dot", "l2"),
  "generator.patch_decoder": ("implicit", "implicit_concat", "linear", "conv"),
  "discriminator.attention": ("l2", "dot"),
  "discriminator.spectral_norm": ("isn", "sn", "none"),
  "evaluation.features": ("inception", "efficientnet"),
}

_POSITIVE = (
  "batch_size",
  "total_kimg",
  "steps_per_call",
  "accumulation",
  "fsdp",
  "data.image_size",
  *(
    f"{network}.{field}"
    for network in ("generator", "discriminator")
    for field in ("patch_size", "width", "depth", "num_heads", "mlp_dim")
  ),
  "generator.latent_dim",
  "generator.mapping_lr_multiplier",
  "generator.decoder_dim",
  "discriminator.qk_gain",
  "optimizer.g_learning_rate",
  "optimizer.d_learning_rate",
  "loss.gradient_penalty_every",
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
  "generator.mapping_depth",
  "discriminator.overlap",
  "loss.bcr_weight",
  "loss.r1_gamma",
  "loss.r2_gamma",
  "loss.lecam_weight",
  "augment.brightness",
  "augment.saturation",
  "augment.contrast",
  "ema.ramp_up",
  "evaluation.every_kimg",
)

_SHARES = (
  "augment.probability",
  "augment.translation",
  "augment.scaling",
  "augment.cutout",
  "optimizer.b1",
  "optimizer.b2",
)


class ConfigError(ValueError):
  """Something that the user can put right; shown as one line."""


def validate(config):
  """Checks the values of a config.

  Raises:
    ConfigError: says which field is wrong, and what is allowed.
  """
  from vitgan_jax.losses import ADVERSARIAL_LOSSES  # late: it imports JAX

  values = flatten(config)
  choices_of = {**_CHOICES, "loss.adversarial": tuple(ADVERSARIAL_LOSSES)}
  for field, choices in choices_of.items():
    if values[field] not in choices:
      raise ConfigError(
        f"config.{field}={values[field]!r} must be one of {', '.join(choices)}"
      )
  for field in _POSITIVE:
    if not 0 < values[field] < float("inf"):
      raise ConfigError(
        f"config.{field}={values[field]} must be positive and finite"
      )
  for field in _SHARES:
    if not 0 <= values[field] <= 1:
      raise ConfigError(f"config.{field}={values[field]} must be in [0, 1]")
  for field in _NOT_NEGATIVE:
    if values[field] < 0:
      raise ConfigError(f"config.{field}={values[field]} must not be negative")
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
  size = config.data.image_size
  for name in ("generator", "discriminator"):
    network = config[name]
    if size % network.patch_size:
      raise ConfigError(
        f"config.{name}.patch_size={network.patch_size} must divide "
        f"config.data.image_size={size}"
      )
    if network.width % network.num_heads:
      raise ConfigError(
        f"config.{name}.num_heads={network.num_heads} must divide "
        f"config.{name}.width={network.width}"
      )
  patch_size = config.generator.patch_size
  is_power_of_two = patch_size & (patch_size - 1) == 0
  if config.generator.patch_decoder == "conv" and not is_power_of_two:
    raise ConfigError(
      f"config.generator.patch_size={patch_size} must be a power of two for "
      "patch_decoder='conv', which doubles the resolution"
    )


def flatten(config):
  """Returns a dict from dotted field names to values."""
  values = {}
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      values.update({f"{key}.{k}": v for k, v in flatten(value).items()})
    else:
      values[key] = value
  return values


def total_steps(config):
  """Returns the training steps of a run: `total_kimg`, rounded up to calls."""
  images_per_call = config.batch_size * config.steps_per_call
  calls = -(-int(config.total_kimg * 1000) // images_per_call)
  return calls * config.steps_per_call


def config_path(workdir):
  """Returns where a workdir keeps its config."""
  return epath.Path(workdir) / "config.json"


def load(workdir):
  """Returns the config that made a workdir.

  Raises:
    ConfigError: if the folder has none, or none that can be read.
  """
  path = config_path(workdir)
  if not path.exists():
    raise ConfigError(
      f"{workdir} is not a workdir of a run: it has no {path.name}. Give the "
      "folder of a training run as --workdir"
    )
  try:
    values = json.loads(path.read_text(), object_hook=_with_tuples)
  except ValueError:
    values = None
  if not isinstance(values, dict):
    raise ConfigError(f"{path} is damaged: it holds no config")
  config = ml_collections.ConfigDict(values).lock()
  fields = {*_CHOICES, *_POSITIVE, *_NOT_NEGATIVE, *_SHARES, *_MAY_CHANGE}
  missing = sorted(fields - flatten(config).keys())
  if missing:
    raise ConfigError(
      f"{path} lacks {', '.join(missing)}: another version of vitgan_jax made "
      "it; train anew, or with that version"
    )
  return config


def with_machine_fields(config, other):
  """Returns a config that looks for data and programs where another does."""
  values = flatten(other)
  config = config.copy_and_resolve_references().unlock()
  config.update_from_flattened_dict({f: values[f] for f in MACHINE_FIELDS})
  return config.lock()


def _with_tuples(values):
  # JSON knows only lists.
  return {k: tuple(v) if type(v) is list else v for k, v in values.items()}


def claim_workdir(config, workdir):
  """Writes the config into a new workdir, or checks it against the one there.

  Raises:
    ConfigError: if another config made the workdir, where nothing is written
      then, or if it cannot be written into.
  """
  path = config_path(workdir)
  if path.exists():
    old, new = flatten(load(workdir)), flatten(config)
    differences = [
      f"{field} is {old.get(field)!r} there and {new.get(field)!r} here"
      for field in sorted(old.keys() | new.keys())
      if old.get(field) != new.get(field) and field not in _MAY_CHANGE
    ]
    if differences:
      raise ConfigError(
        f"{workdir} was made by another config: {'; '.join(differences)}. "
        "Choose another --workdir, or give the old values to resume"
      )
  partial = path.with_suffix(".partial")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(config.to_json(indent=2, sort_keys=True) + "\n")
    partial.replace(path)
  except OSError as error:
    raise ConfigError(
      f"cannot write into --workdir={workdir}: {error.strerror or error}"
    ) from error
