"""Defaults of every experiment: the paper's, at its smallest image size.

An experiment's `get_config(arg)` starts from `get_config()` here and changes
what is its own. `--config=configs/NAME.py:smoke` shrinks it to seconds.
"""

import ml_collections

from vitgan_jax.models import kinds


def get_config():
  """Returns the hyper-parameters of ViTGAN at 32 x 32 pixels."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.batch_size = 128  # images a step, over all devices
  config.total_kimg = 51_200.0  # length of the run, thousands of real images
  config.steps_per_call = 16  # steps in one call of the host
  # Micro-batches that a step's batch is taken in, one after the other: less
  # memory for the same step
  config.accumulation = 1
  config.remat = False  # compute the blocks anew going backward: less memory
  config.fsdp = 1  # devices that share one copy of the state; divides theirs
  # "xla"; "pallas", kernels for TPUs; or "auto", kernels where they can be had
  config.implementation = "auto"
  config.dtype = "float32"  # of the computation: "float32" or "bfloat16"

  # Transfer learning: a run or an export to take the networks from, where names
  # and shapes agree; "" is none. With ema.ramp_up=0 the average is kept, too
  config.init_from = ""
  config.init_networks = "both"  # or "generator" or "discriminator" alone

  config.data = ml_collections.ConfigDict()
  # A TFDS name, or one of those that are read in place: "folder", "ffhq",
  # "lsun/bedroom" or another category, and "celeb_a" of its zip alone
  config.data.dataset = "cifar10"
  config.data.path = ""  # where the files of the latter are; a folder or a zip
  config.data.split = "train"  # or a part of it, as "train[:90%]"
  config.data.image_size = 32
  config.data.max_pixels = 2**30  # of a file; 3 GB of memory for each core
  # left, top, right, bottom; () is the largest centred square
  config.data.crop = ()
  config.data.num_classes = 0  # of the labels that the networks get; 0 is none
  # Images, spread over all, that are not trained on: for the measures of D
  config.data.held_out = 0
  config.data.flip = True  # mirror real images at random
  config.data.data_dir = ""  # where datasets live; "" is TFDS's own folder

  config.generator = ml_collections.ConfigDict(
    kinds.fields_of("generator", "vitgan")
  )
  config.discriminator = ml_collections.ConfigDict(
    kinds.fields_of("discriminator", "vitgan")
  )

  config.g_optimizer = ml_collections.ConfigDict()
  config.g_optimizer.name = "adam"  # "adam" or "adamw"
  config.g_optimizer.learning_rate = 2e-3
  config.g_optimizer.b1 = 0.0
  config.g_optimizer.b2 = 0.99
  config.g_optimizer.eps = 1e-8
  config.g_optimizer.weight_decay = 0.0  # of "adamw"
  config.g_optimizer.warmup_kimg = 0.0  # the rate grows linearly from 0
  config.g_optimizer.decay = "constant"  # or "cosine", to 0 at total_kimg
  config.g_optimizer.clip_norm = 0.0  # of all gradients together; 0 is off
  # Parameters that stay as they are: a regular expression of how their names
  # begin, as "from_rgb|block32/" (FreezeD, Mo et al. 2020); "" is none
  config.g_optimizer.freeze = ""
  config.d_optimizer = config.g_optimizer.copy_and_resolve_references()
  config.d_steps = 1  # discriminator updates, of a batch each, a training step

  config.loss = ml_collections.ConfigDict()
  # "non_saturating", "hinge", "wasserstein" or "rpgan"
  config.loss.adversarial = "non_saturating"
  config.loss.bcr_weight = 10.0
  # What D's answer to an augmented image is drawn to: that to the "clean" image
  # or that to it "augmented" in another way, as in the authors' code
  config.loss.bcr_anchor = "clean"
  config.loss.r1_gamma = 0.0
  config.loss.r2_gamma = 0.0
  config.loss.gradient_penalty = "exact"  # or "approximate", by differences
  # Steps from one R1 and R2 to the next; 0 is 1 for "rpgan", 16 for others
  config.loss.gradient_penalty_every = 0
  config.loss.gp_weight = 0.0  # of the penalty between images, WGAN-GP
  config.loss.drift_weight = 0.0  # of (mean D(x))^2 of real images
  config.loss.lecam_weight = 0.0
  config.loss.lecam_from_step = 1_000  # its averages of logits start at 0
  config.loss.path_length_weight = 0.0  # of a generator with styles
  config.loss.path_length_every = 4  # steps from one to the next

  config.augment = ml_collections.ConfigDict()
  config.augment.probability = 0.8
  config.augment.brightness = 0.5
  config.augment.saturation = 1.0
  config.augment.contrast = 0.5
  config.augment.translation = 0.125
  config.augment.scaling = 0.2
  config.augment.cutout = 0.5

  # Adaptive augmentation: the probability above starts at 0, and is steered
  config.ada = ml_collections.ConfigDict()
  config.ada.target = 0.0  # mean sign of real images' logits; 0 is off, ADA 0.6
  config.ada.kimg = 500.0  # in which it could go from 0 to 1

  config.ema = ml_collections.ConfigDict()
  config.ema.half_life_kimg = 500.0
  config.ema.ramp_up = 0.05  # half-life at most this share of the images seen

  config.evaluation = ml_collections.ConfigDict()
  # "inception" (FID and others) or "efficientnet" (no FID, but no download)
  config.evaluation.features = "inception"
  config.evaluation.num_samples = 10_000
  config.evaluation.every_kimg = 0.0  # scores in the training run; 0 is never

  # What follows a step that leaves a number that is not finite, and which is
  # never taken: "stop", and keep what --mode=replay needs; "skip", on with the
  # next one; "rewind", on from the last checkpoint with other random numbers
  config.on_nonfinite = "stop"

  config.log_every_kimg = 50.0
  config.sample_every_kimg = 500.0
  config.num_sample_images = 64  # on the grids of the training run
  config.checkpoint_every_kimg = 1_000.0
  config.keep_checkpoints = 3
  # Folder of compiled programs, for a quick next start; "" is none
  config.compilation_cache = "~/.cache/vitgan_jax/programs"
  # Project at Weights & Biases that gets what TensorBoard does; "" is none
  config.wandb = ""
  config.profile = False  # record three calls for TensorBoard's profile tab
  # Locked: a misspelt field is an error, here as on the command line.
  return config.lock()


def apply_argument(config, arg, own_words=()):
  """Returns the config as `--config=FILE.py:arg` asks for it.

  Args:
    config: of an experiment.
    arg: words with commas between, in any order: "g=KIND" and "d=KIND" for
      another generator or discriminator of `kinds`, with its defaults and
      the losses that it cannot do without; "tiny" for 16 pixels and networks
      that two cores carry; "smoke" for the same networks and data in a size
      that trains, samples and saves within seconds. "" is the experiment
      itself.
    own_words: others, which the experiment itself sees to.

  Raises:
    ValueError: for any other word.
  """
  networks = {"g": "generator", "d": "discriminator"}
  sizes = {"tiny": _shrink_to_learn, "smoke": _shrink_to_try}
  words = [word for word in arg.split(",") if word]
  known = (*sizes, *own_words)
  for word in words:
    key, _, kind = word.partition("=")
    if word not in known and (key not in networks or not kind):
      raise ValueError(
        f"config argument {word!r} must be one of {', '.join(known)}, g=KIND, "
        "d=KIND"
      )
    if kind and kind != config[networks[key]].kind:
      with config.unlocked():
        config[networks[key]] = kinds.fields_of(networks[key], kind)
        config.loss.update(kinds.kind_of(networks[key], kind).loss)
  for word, shrink in sizes.items():
    if word in words:
      for network in kinds.TABLES:
        kind = kinds.kind_of(network, config[network].kind)
        config[network].update(getattr(kind, word))
      shrink(config)
  return config


def lighten(config):
  """Sets the consistency and the augmentation that small runs learn with."""
  config.loss.bcr_weight = 1.0
  config.augment.update(
    brightness=0.2, saturation=0.0, contrast=0.0, scaling=0.0, cutout=0.25
  )


# What goes with BigGAN's discriminator in runs of some hundred thousand images
BEHIND_BIGGAN = {
  "d_steps": 2,
  "loss.adversarial": "hinge",
  "loss.bcr_weight": 0.0,
  "d_optimizer.learning_rate": 8e-4,
  "d_optimizer.b2": 0.999,
}


def quicken(config):
  """Takes what learns best from as many images: docs/lab_book.md.

  The convolutional decoder, and BigGAN's discriminator with its objective.
  """
  apply_argument(config, "d=biggan")
  config.generator.patch_decoder = "conv"
  config.update_from_flattened_dict(BEHIND_BIGGAN)


def _shrink_to_learn(config):
  config.batch_size = 32
  config.steps_per_call = 20
  config.total_kimg = 1_500.0
  config.data.image_size = 16
  config.evaluation.features = "efficientnet"
  config.log_every_kimg = 5.0
  config.sample_every_kimg = 50.0
  config.checkpoint_every_kimg = 50.0


def _shrink_to_try(config):
  config.batch_size = 8
  config.steps_per_call = 2
  config.total_kimg = 0.064
  config.log_every_kimg = 0.016
  config.sample_every_kimg = 0.032
  config.num_sample_images = 16
  config.checkpoint_every_kimg = 0.032
