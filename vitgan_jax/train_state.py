"""The training state, its creation, the optimisers and the moving average."""

import functools
import re
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vitgan_jax import compilation, partitioning
from vitgan_jax import config as config_lib
from vitgan_jax.errors import ConfigError
from vitgan_jax.models import networks
from vitgan_jax.pictures import natural_key

# Of what a generator keeps, these follow its average; all else belongs to the
# parameters of the moment, as the vectors of spectral normalisation do.
AVERAGED_COLLECTIONS = ("batch_stats", "averages")


@flax.struct.dataclass
class GANState:
  """All that a run needs to go on; one pytree, saved whole.

  Attributes:
    step: training steps done, int32.
    key: the base key; step t uses `fold_in(key, t)`.
    g_params: of the generator as it trains.
    g_model_state: its other variable collections, {} if it has none.
    g_ema_params: moving average of g_params; samples and metrics use these.
    g_ema_model_state: what belongs to them.
    d_params: of the discriminator.
    d_model_state: its other collections: `spectral`, u and sigma_init of every
      layer, in ViTGAN's.
    g_opt_state: of the generator's optimiser.
    d_opt_state: of the discriminator's.
    logit_ema: moving averages of the logits on real and fake images (LeCam).
    path_length: moving average of the path lengths (StyleGAN2).
    augment_probability: of each transformation, where ADA steers it.
  """

  step: jax.Array
  key: jax.Array
  g_params: Any
  g_model_state: Any
  g_ema_params: Any
  g_ema_model_state: Any
  d_params: Any
  d_model_state: Any
  g_opt_state: Any
  d_opt_state: Any
  logit_ema: Any
  path_length: Any
  augment_probability: Any

  @property
  def g_variables(self):
    """Those of the generator as it trains."""
    return {"params": self.g_params, **self.g_model_state}

  @property
  def g_ema_variables(self):
    """Those of the averaged generator."""
    return {"params": self.g_ema_params, **self.g_ema_model_state}

  @property
  def d_variables(self):
    """Those of the discriminator."""
    return {"params": self.d_params, **self.d_model_state}

  def without_optimizers(self):
    """Returns what losses need."""
    return self.replace(g_opt_state=None, d_opt_state=None)


def build_optimizers(config):
  """Returns the optax transformations (generator's, discriminator's)."""
  return (
    _optimizer(config, "g_optimizer", config_lib.images_per_step(config)),
    _optimizer(config, "d_optimizer", config.batch_size),
  )


def _optimizer(config, name, images_per_update):
  fields = config[name]
  rate = _learning_rate(config, fields, images_per_update)
  adam = dict(b1=fields.b1, b2=fields.b2, eps=fields.eps)
  if fields.name == "adamw":
    optimizer = optax.adamw(rate, **adam, weight_decay=fields.weight_decay)
  else:
    optimizer = optax.adam(rate, **adam)
  if fields.clip_norm:
    optimizer = optax.chain(
      optax.clip_by_global_norm(fields.clip_norm), optimizer
    )
  if fields.freeze:
    optimizer = optax.partition(
      {True: optax.set_to_zero(), False: optimizer},
      functools.partial(is_frozen, fields.freeze, f"config.{name}.freeze"),
    )
  return optimizer


def is_frozen(pattern, where, params):
  """Returns for each parameter whether it stays as it is.

  Args:
    pattern: regular expression of how the names of those begin, as
      "embedding|block0/".
    where: the field that has it, for messages.
    params: pytree of a network's.

  Raises:
    ConfigError: if it fits no parameters, or all.
  """
  frozen = jax.tree_util.tree_map_with_path(
    lambda path, _: bool(
      re.match(pattern, jax.tree_util.keystr(path, simple=True, separator="/"))
    ),
    params,
  )
  count = sum(jax.tree.leaves(frozen))
  if not 0 < count < len(jax.tree.leaves(frozen)):
    raise ConfigError(
      f"{where}={pattern!r} must fit some parameters, and fits "
      f"{'all' if count else 'none'}: their names begin with "
      f"{', '.join(sorted(params, key=natural_key))}"
    )
  return frozen


def _learning_rate(config, fields, images_per_update):
  """Returns a number, or a schedule: updates done to a number."""
  warmup = int(fields.warmup_kimg * 1000) // images_per_update
  if fields.decay == "cosine":
    total = int(config.total_kimg * 1000) // images_per_update
    return optax.warmup_cosine_decay_schedule(
      0.0 if warmup else fields.learning_rate,
      fields.learning_rate,
      warmup,
      max(total, warmup + 1),
    )
  if warmup:
    return optax.warmup_constant_schedule(0.0, fields.learning_rate, warmup)
  return fields.learning_rate


def create_train_state(config, nets):
  """Returns the GANState of step 0, a function of `config.seed`."""
  g_optimizer, d_optimizer = build_optimizers(config)
  g_key, d_key, base_key = jax.random.split(jax.random.key(config.seed), 3)
  size = config.data.image_size
  labels = jnp.zeros(1, jnp.int32) if config.data.num_classes else None
  g_params, g_model_state = _init(
    nets.generator, g_key, jnp.zeros((1, nets.generator.latent_dim)), labels
  )
  d_params, d_model_state = _init(
    nets.discriminator, d_key, jnp.zeros((1, size, size, 3)), labels
  )
  return GANState(
    step=jnp.zeros((), jnp.int32),
    key=base_key,
    g_params=g_params,
    g_model_state=g_model_state,
    # Copies: donated buffers must not appear twice in one state.
    g_ema_params=jax.tree.map(jnp.copy, g_params),
    g_ema_model_state=jax.tree.map(jnp.copy, g_model_state),
    d_params=d_params,
    d_model_state=d_model_state,
    g_opt_state=g_optimizer.init(g_params),
    d_opt_state=d_optimizer.init(d_params),
    logit_ema={"real": jnp.zeros(()), "fake": jnp.zeros(())},
    path_length=jnp.zeros(()),
    augment_probability=jnp.zeros(()),
  )


def _init(network, key, inputs, labels):
  """Returns (params, model_state) of a network."""
  model_state = dict(networks.plain(network).init(key, inputs, labels))
  return model_state.pop("params"), model_state


@compilation.once_per_config
def _creation(config, nets, mesh):
  """Returns the GANState's shapes, and a jitted function that makes it."""
  # One function for both, which is traced once.
  create = functools.partial(create_train_state, config, nets)
  shapes = jax.eval_shape(create)
  shardings = partitioning.state_shardings(mesh, shapes)
  shapes = jax.tree.map(
    lambda x, sharding: x.update(sharding=sharding), shapes, shardings
  )
  return shapes, jax.jit(create, out_shardings=shardings)


def state_shapes(config, nets, mesh):
  """Returns the GANState of `jax.ShapeDtypeStruct`s, with their shardings."""
  shapes, _ = _creation(config, nets, mesh)
  return shapes


def state_shardings(config, nets, mesh):
  """Returns the shardings of a GANState; see `partitioning.state_shardings`."""
  return jax.tree.map(lambda x: x.sharding, state_shapes(config, nets, mesh))


def init_train_state(config, nets, mesh):
  """Returns the GANState of step 0 on the devices of a mesh."""
  _, create = _creation(config, nets, mesh)
  return create()


def ema_decay(images_seen, images_per_step, half_life_kimg, ramp_up):
  """Returns the decay of the moving average for one step.

  A weight's share halves in `half_life_kimg` thousand images, or, early in a
  run, in `ramp_up` times the images seen so far (Karras et al. 2020, ADA code).

  Args:
    images_seen: before this step.
    images_per_step: of all the discriminator's steps.
    half_life_kimg: in thousands of images.
    ramp_up: longest half-life as a share of the images seen; 0 is no limit.
  """
  half_life = 1000.0 * half_life_kimg
  if ramp_up:
    half_life = jnp.minimum(half_life, ramp_up * images_seen)
  return 0.5 ** (images_per_step / jnp.maximum(half_life, 1e-8))


def update_average(state, config):
  """Returns the state after the average followed the generator for one step."""
  images_per_step = config_lib.images_per_step(config)
  decay = ema_decay(
    state.step * images_per_step,
    images_per_step,
    config.ema.half_life_kimg,
    config.ema.ramp_up,
  )
  return state.replace(
    g_ema_params=update_ema(state.g_ema_params, state.g_params, decay),
    g_ema_model_state={
      name: update_ema(state.g_ema_model_state[name], collection, decay)
      if name in AVERAGED_COLLECTIONS
      else collection
      for name, collection in state.g_model_state.items()
    },
  )


def update_ema(average, params, decay):
  """Returns `decay * average + (1 - decay) * params`, leaf by leaf."""
  return jax.tree.map(lambda a, p: p + (a - p) * decay, average, params)
