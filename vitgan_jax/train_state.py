"""The training state, its creation, the optimisers and the moving average."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vitgan_jax import partitioning
from vitgan_jax.models.discriminator import Discriminator
from vitgan_jax.models.generator import Generator


@flax.struct.dataclass
class GANState:
  """All that a run needs to go on; one pytree, saved whole.

  Attributes:
    step: training steps done, int32.
    key: the base key; step t uses `fold_in(key, t)`.
    g_params: of the generator as it trains.
    g_ema_params: their moving average; samples and metrics use these.
    d_params: of the discriminator.
    d_spectral: its collection `spectral`: u and sigma_init of every layer.
    g_opt_state: of the generator's optimiser.
    d_opt_state: of the discriminator's.
    logit_ema: moving averages of the logits on real and fake images (LeCam).
  """

  step: jax.Array
  key: jax.Array
  g_params: Any
  g_ema_params: Any
  d_params: Any
  d_spectral: Any
  g_opt_state: Any
  d_opt_state: Any
  logit_ema: Any


def build_models(config, mesh=None):
  """Returns (generator, discriminator), as the config describes them.

  Args:
    config: of `configs/`.
    mesh: the devices that share a batch. If they are TPU cores, attention is
      that of `fused_attention`, which has no second derivative and shows no
      attention weights; None is the plain form.
  """
  if mesh is not None and mesh.devices.flat[0].platform != "tpu":
    mesh = None
  common = dict(
    image_size=config.data.image_size,
    remat=config.remat,
    dtype=jnp.dtype(config.dtype),
  )
  return (
    Generator(**config.generator, **common),
    Discriminator(**config.discriminator, **common),
  )


def build_optimisers(config):
  """Returns the optax transformations (generator's, discriminator's)."""
  adam = config.optimizer
  return tuple(
    optax.adam(rate, b1=adam.b1, b2=adam.b2, eps=adam.eps)
    for rate in (adam.g_learning_rate, adam.d_learning_rate)
  )


def create_train_state(config):
  """Returns the GANState of step 0, a function of `config.seed`."""
  generator, discriminator = build_models(config)
  g_optimizer, d_optimizer = build_optimisers(config)
  g_key, d_key, base_key = jax.random.split(jax.random.key(config.seed), 3)
  latents = jnp.zeros((1, config.generator.latent_dim))
  size = config.data.image_size
  g_params = generator.init(g_key, latents)["params"]
  d_variables = discriminator.init(d_key, jnp.zeros((1, size, size, 3)))
  d_params = d_variables["params"]
  return GANState(
    step=jnp.zeros((), jnp.int32),
    key=base_key,
    g_params=g_params,
    # A copy: donated buffers must not appear twice in one state.
    g_ema_params=jax.tree.map(jnp.copy, g_params),
    d_params=d_params,
    d_spectral=d_variables.get("spectral", {}),
    g_opt_state=g_optimizer.init(g_params),
    d_opt_state=d_optimizer.init(d_params),
    logit_ema={"real": jnp.zeros(()), "fake": jnp.zeros(())},
  )


def state_shapes(config, mesh):
  """Returns the GANState of `jax.ShapeDtypeStruct`s, with their shardings."""
  shapes = jax.eval_shape(lambda: create_train_state(config))
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    shapes,
    partitioning.state_shardings(mesh, shapes),
  )


def state_shardings(config, mesh):
  """Returns the shardings of a GANState; see `partitioning.state_shardings`."""
  return jax.tree.map(lambda x: x.sharding, state_shapes(config, mesh))


def init_train_state(config, mesh):
  """Returns the GANState of step 0 on the devices of a mesh."""
  return jax.jit(
    functools.partial(create_train_state, config),
    out_shardings=state_shardings(config, mesh),
  )()


def ema_decay(images_seen, batch_size, half_life_kimg, ramp_up):
  """Returns the decay of the moving average for one step.

  A weight's share halves in `half_life_kimg` thousand images, or, early in a
  run, in `ramp_up` times the images seen so far (Karras et al. 2020, ADA code).

  Args:
    images_seen: before this step.
    batch_size: images a step.
    half_life_kimg: in thousands of images.
    ramp_up: longest half-life as a share of the images seen; 0 is no limit.
  """
  half_life = 1000.0 * half_life_kimg
  if ramp_up:
    half_life = jnp.minimum(half_life, ramp_up * images_seen)
  return 0.5 ** (batch_size / jnp.maximum(half_life, 1e-8))


def update_ema(average, params, decay):
  """Returns `decay * average + (1 - decay) * params`, leaf by leaf."""
  return jax.tree.map(lambda a, p: p + (a - p) * decay, average, params)
