"""One training step: discriminator updates, then a generator update.

Everything here is pure. A batch is a dict of

  images: uint8 [B, S, S, 3], real ones.
  labels: int32 [B], their classes, or None without classes; the generated
    images of a batch have the same ones.
  keys: [B], a key for each image: all that is drawn at random for it comes from
    there, so that one device and many, one part and many, see the same numbers.

The losses compute on the share of a batch that `partitioning.gradient` gives
them.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import optax

from vitgan_jax import compilation, diff_augment, losses, partitioning
from vitgan_jax import train_state as train_state_lib
from vitgan_jax.models import networks
from vitgan_jax.pixels import to_float

LOGIT_EMA_DECAY = 0.99  # LeCam, Tseng et al. 2021
PATH_LENGTH_DECAY = 0.99  # StyleGAN2, Karras et al. 2020, of turns


def d_loss(d_params, batch, state, *, config, nets):
  """Returns the discriminator's loss.

  Args:
    d_params: what it is differentiated for.
    batch: see above.
    state: GANState; its `d_params` are not used.
    config: of `configs/`.
    nets: `networks.Networks`.

  Returns:
    (loss, (metrics, the discriminator's model_state after this call)).
  """
  keys = split_keys(batch["keys"], 9)
  z_keys, flip_keys, real_keys, fake_keys, g_keys, d_keys, noise_keys = keys[:7]
  labels = batch["labels"]
  augment = augmentation(config, state)
  real_images = _real_images(config, batch["images"], flip_keys)
  latents = draw_latents(z_keys, nets.generator.latent_dim)
  fake_images, _ = _run(
    nets.generator, state.g_variables, latents, labels, g_keys
  )
  as_shown = functools.partial(as_levels, nets.discriminator)
  real_levels, fake_levels = as_shown(real_images), as_shown(fake_images)
  # The one call in a step that updates what the discriminator keeps.
  shown = [augment(real_keys, real_levels), augment(fake_keys, fake_levels)]
  if config.loss.bcr_weight:
    others = [real_levels, fake_levels]
    if config.loss.bcr_anchor == "augmented":
      others = list(map(augment, keys[7:], others))
    shown += others
  variables = {"params": d_params, **state.d_model_state}
  logits, model_state = _discriminate(
    nets.discriminator, variables, shown, labels, d_keys, update=True
  )
  real_logits, fake_logits = logits[:2]
  d_adversarial, _ = losses.ADVERSARIAL_LOSSES[config.loss.adversarial]
  loss = d_adversarial(real_logits, fake_logits)
  metrics = {
    "loss/d": loss,
    "scores/real": jnp.mean(real_logits),
    "scores/fake": jnp.mean(fake_logits),
  }

  if config.ada.target:
    metrics["ada/overfitting"] = jnp.mean(jnp.sign(real_logits))
    metrics["ada/probability"] = state.augment_probability

  penalties = {}
  if config.loss.bcr_weight:
    penalties["bcr"] = losses.balanced_consistency(
      logits[2], real_logits
    ) + losses.balanced_consistency(logits[3], fake_logits)
  if config.loss.lecam_weight:
    penalties["lecam"] = jnp.where(
      state.step >= config.loss.lecam_from_step,
      losses.lecam(real_logits, fake_logits, state.logit_ema),
      0.0,
    )

  # Slopes are those at the image itself, through its levels and augmentation,
  # with the draws inside the discriminator that the image of that place had.
  def discriminate(place, keys, discriminator, images):
    return _discriminate(
      discriminator,
      {**variables, **model_state},
      [augment(keys, as_shown(images))],
      labels,
      d_keys,
      place=place,
    )[0][0]

  for place, (name, images, augment_keys) in enumerate(
    (("r1", real_images, real_keys), ("r2", fake_levels, fake_keys))
  ):
    if config.loss[f"{name}_gamma"]:
      penalties[name] = _gradient_penalty(
        config,
        state.step,
        nets.discriminator,
        functools.partial(discriminate, place, augment_keys),
        images,
        # A discriminator that keeps nothing would give them again.
        None if model_state else logits[place],
        noise_keys,
      )
  if config.loss.gp_weight:
    share_keys, augment_keys = split_keys(noise_keys, 2)
    penalties["gp"] = losses.interpolate_penalty(
      functools.partial(
        discriminate, 0, augment_keys, networks.plain(nets.discriminator)
      ),
      real_levels,
      fake_levels,
      jax.vmap(jax.random.uniform)(share_keys),
    )
  if config.loss.drift_weight:
    # Holds Wasserstein's logits near 0, in TransGAN's form: (E D(x))^2, of the
    # images of all devices; of a micro-batch, where there are some.
    mean = lax.pmean(jnp.mean(real_logits), partitioning.BATCH_AXES)
    penalties["drift"] = jnp.square(mean)
  weights = {
    "bcr": config.loss.bcr_weight,
    "gp": config.loss.gp_weight,
    "drift": config.loss.drift_weight,
    "lecam": config.loss.lecam_weight,
    "r1": config.loss.r1_gamma,
    "r2": config.loss.r2_gamma,
  }
  return _add_penalties(loss, metrics, penalties, weights, model_state)


def g_loss(g_params, batch, state, *, config, nets):
  """Returns the generator's loss; see `d_loss`.

  Returns:
    (loss, (metrics, the generator's model_state after this call)).
  """
  keys = split_keys(batch["keys"], 7)
  z_keys, flip_keys, real_keys, fake_keys, g_keys, d_keys, noise_keys = keys
  variables = {"params": g_params, **state.g_model_state}
  labels = batch["labels"]
  augment = augmentation(config, state)
  latents = draw_latents(z_keys, nets.generator.latent_dim)
  fake_images, model_state = _run(
    nets.generator, variables, latents, labels, g_keys, update=True
  )
  discriminate = functools.partial(
    _discriminate,
    nets.discriminator,
    state.d_variables,
    labels=labels,
    keys=d_keys,
  )
  fake_images = as_levels(nets.discriminator, fake_images)
  (fake_logits,), _ = discriminate(images=[augment(fake_keys, fake_images)])
  real_logits = None
  if config.loss.adversarial == "rpgan":  # the one that compares pairs
    real_images = _real_images(config, batch["images"], flip_keys)
    real_images = as_levels(nets.discriminator, real_images)
    (real_logits,), _ = discriminate(images=[augment(real_keys, real_images)])
  _, g_adversarial = losses.ADVERSARIAL_LOSSES[config.loss.adversarial]
  loss = g_adversarial(real_logits, fake_logits)
  metrics, penalties = {"loss/g": loss}, {}
  if config.loss.path_length_weight:
    penalties["path_length"], metrics["path_length/mean"] = _path_length(
      config,
      state,
      functools.partial(nets.generator.apply, variables),
      (latents, labels, g_keys),
      noise_keys,
    )
  weights = {"path_length": config.loss.path_length_weight}
  return _add_penalties(loss, metrics, penalties, weights, model_state)


def d_step(state, batch, *, config, nets, mesh):
  """Updates the discriminator; returns (state, metrics)."""
  gradients, (metrics, model_state) = partitioning.gradient(
    functools.partial(d_loss, config=config, nets=nets),
    state.d_params,
    batch,
    state.without_optimizers(),
    mesh=mesh,
    num_parts=config.accumulation,
  )
  _, optimizer = train_state_lib.build_optimizers(config)
  updates, opt_state = optimizer.update(
    gradients, state.d_opt_state, state.d_params
  )
  metrics["gradients/d"] = optax.tree.norm(gradients)
  logit_ema = {
    name: LOGIT_EMA_DECAY * average
    + (1.0 - LOGIT_EMA_DECAY) * metrics[f"scores/{name}"]
    for name, average in state.logit_ema.items()
  }
  if config.ada.target:
    probability = next_probability(
      config, state.augment_probability, metrics["ada/overfitting"]
    )
    state = state.replace(augment_probability=probability)
  state = state.replace(
    d_params=optax.apply_updates(state.d_params, updates),
    d_model_state=model_state,
    d_opt_state=opt_state,
    logit_ema=logit_ema,
  )
  return state, metrics


def g_step(state, batch, *, config, nets, mesh):
  """Updates the generator and its average; returns (state, metrics)."""
  gradients, (metrics, model_state) = partitioning.gradient(
    functools.partial(g_loss, config=config, nets=nets),
    state.g_params,
    batch,
    state.without_optimizers(),
    mesh=mesh,
    num_parts=config.accumulation,
  )
  optimizer, _ = train_state_lib.build_optimizers(config)
  updates, opt_state = optimizer.update(
    gradients, state.g_opt_state, state.g_params
  )
  metrics["gradients/g"] = optax.tree.norm(gradients)
  if config.loss.path_length_weight:
    average = train_state_lib.update_ema(
      state.path_length, metrics["path_length/mean"], PATH_LENGTH_DECAY
    )
    state = state.replace(path_length=average)
  state = state.replace(
    g_params=optax.apply_updates(state.g_params, updates),
    g_model_state=model_state,
    g_opt_state=opt_state,
  )
  return train_state_lib.update_average(state, config), metrics


def train_step(state, batch, key, *, config, nets, mesh):
  """Takes `config.d_steps` steps of the discriminator and one of the generator.

  Args:
    state: GANState.
    batch: see above, without keys, of arrays [d_steps, B, ...]; the generator
      takes the last one.
    key: of the step.
    config: of `configs/`.
    nets: `networks.Networks`.
    mesh: of `partitioning.create_mesh`.

  Returns:
    (state, metrics): float32 scalars, the discriminator's means over its steps.
  """
  options = dict(config=config, nets=nets, mesh=mesh)
  d_batches, g_batch = with_keys(batch, key, config)
  state, d_metrics = lax.scan(
    functools.partial(d_step, **options), state, d_batches
  )
  state, g_metrics = g_step(state, g_batch, **options)
  metrics = {**jax.tree.map(jnp.mean, d_metrics), **g_metrics}
  return state.replace(step=state.step + 1), metrics


def with_keys(batch, key, config):
  """Returns the discriminator's batches and the generator's; see `train_step`.

  Of arrays [d_steps, B, ...] and [B, ...], with a key for each image.
  """
  shape = (config.d_steps + 1, config.batch_size)
  *d_keys, g_keys = jax.random.split(key, shape)
  last = jax.tree.map(lambda x: x[-1], batch)
  return {**batch, "keys": jnp.stack(d_keys)}, {**last, "keys": g_keys}


@compilation.once_per_config
def make_train_steps(config, nets, mesh):
  """Returns the jitted `train_steps(state, batch, step)`, n steps in one call.

  A step that leaves a number that is not finite is not taken, as
  `config.on_nonfinite` says: "skip" goes on to the next one, and else the state
  stays as it was before, however many calls are on their way.

  Takes the state, which is donated; the batch of `train_step`, of arrays
  [n, d_steps, B, ...]; and the step that it begins with. Returns the state and
  the metrics, means over the n steps; with "skip" over those that were taken,
  with `steps/skipped`, how many were not.
  """
  skips = config.on_nonfinite == "skip"

  def body(state, inputs):
    batch, step = inputs
    key = jax.random.fold_in(state.key, step)
    after, metrics = train_step(
      state, batch, key, config=config, nets=nets, mesh=mesh
    )
    # Finite parameters stay so, if their gradients and what goes with them are.
    is_finite = all_finite((metrics, after.g_model_state, after.d_model_state))
    is_taken = is_finite & (state.step == step)
    before = state.replace(step=state.step + 1) if skips else state
    # A condition passes one of them on; a choice by number would copy both.
    state = lax.cond(is_taken, lambda: after, lambda: before)
    return state, (metrics, is_finite)

  def train_steps(state, batch, step):
    count = jax.tree.leaves(batch)[0].shape[0]
    state, (metrics, is_finite) = lax.scan(
      body, state, (batch, step + jnp.arange(count))
    )
    means = jax.tree.map(jnp.mean, metrics)
    if skips:
      means = jax.tree.map(lambda x: jnp.mean(x, where=is_finite), metrics)
      means["steps/skipped"] = jnp.sum(~is_finite)
    return state, means

  state_shardings = train_state_lib.state_shardings(config, nets, mesh)
  replicated = partitioning.replicated(mesh)
  batch_sharding = partitioning.batch_sharding(mesh, axis=2)
  return jax.jit(
    train_steps,
    in_shardings=(state_shardings, batch_sharding, replicated),
    out_shardings=(state_shardings, replicated),
    donate_argnums=0,
  )


def all_finite(tree):
  """Tells whether all numbers of a pytree are finite."""
  leaves = jax.tree.leaves(tree)
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def augmentation(config, state):
  """Returns `augment(keys, images)`, of batches, as it is at a state."""
  strengths = dict(config.augment)
  if config.ada.target:
    strengths["probability"] = state.augment_probability
  return jax.vmap(functools.partial(diff_augment.augment, **strengths))


def next_probability(config, probability, overfitting):
  """Returns the probability of augmentation after a step of the discriminator.

  It rises while the discriminator is too sure of real images, and falls else
  (Karras et al. 2020, ADA, section 3.1; they look at every fourth step).

  Args:
    config: of `configs/`.
    probability: of this step.
    overfitting: the mean sign of the logits of real images, their r_t.
  """
  change = config.batch_size / (1000.0 * config.ada.kimg)
  change *= jnp.sign(overfitting - config.ada.target)
  return jnp.clip(probability + change, 0.0, 1.0)


def split_keys(keys, count):
  """Splits the key of each image: keys [B] to `count` of them."""
  return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


def draw_latents(keys, latent_dim):
  """Draws a latent [latent_dim] for each of the keys [B]."""
  return jax.vmap(lambda key: jax.random.normal(key, (latent_dim,)))(keys)


def random_flip(key, image):
  """Mirrors an image [S, S, C] left to right with probability 1/2."""
  return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def as_levels(discriminator, images):
  """Returns images in the levels that a discriminator compares.

  Args:
    discriminator: Linen module; without `num_levels` it takes one.
    images: [B, S, S, 3 * levels], the last of which is the image itself. One
      level is repeated; of too many the last ones stay.
  """
  channels = 3 * getattr(discriminator, "num_levels", 1)
  images = images[..., -channels:]
  return jnp.tile(images, channels // images.shape[-1])


def _real_images(config, images, flip_keys):
  """Returns uint8 images as the networks have them, mirrored at random."""
  images = to_float(images)
  if config.data.flip:
    images = jax.vmap(random_flip)(flip_keys, images)
  return images


def _run(network, variables, inputs, labels, keys, update=False):
  """Calls a network as in training.

  The power iteration of spectral normalisation goes on in a call that updates,
  and nowhere else. Batch statistics are those of the batch in any call.

  Returns:
    (outputs, model_state); where it does not update, that of the variables.
  """
  model_state = {k: v for k, v in variables.items() if k != "params"}
  mutable = [k for k in model_state if update or k != "spectral"]
  outputs, updates = network.apply(
    variables, inputs, labels, keys, train=True, mutable=mutable
  )
  return outputs, {**model_state, **updates} if update else model_state


def _discriminate(
  discriminator, variables, images, labels, keys, update=False, place=0
):
  """Discriminates several batches of images in one call.

  Args:
    discriminator: Linen module.
    variables: its own.
    images: k arrays [B, S, S, 3].
    labels: [B] or None, the same for each of them.
    keys: [B].
    update: see `_run`.
    place: of the first array; what is drawn inside depends on it.

  Returns:
    (k logits [B], model_state).
  """
  count = len(images)
  if labels is not None:
    labels = jnp.tile(labels, count)
  logits, model_state = _run(
    discriminator,
    variables,
    jnp.concatenate(images),
    labels,
    split_keys(keys, place + count)[place:].reshape(-1),
    update,
  )
  return jnp.split(logits, count), model_state


def gradient_penalty_every(config):
  """Returns how many steps there are from one gradient penalty to the next."""
  default = 1 if config.loss.adversarial == "rpgan" else 16
  return config.loss.gradient_penalty_every or default


def _gradient_penalty(
  config, step, discriminator, discriminate, images, logits, keys
):
  """Returns the gradient penalty of every k-th step, k times as strong.

  Args:
    config: of `configs/`.
    step: of the training.
    discriminator: Linen module.
    discriminate: (discriminator, images) to logits.
    images: [B, S, S, 3], where the slope is taken.
    logits: [B], what they are discriminated as, or None where not known.
    keys: [B], of the noise of the approximate one.
  """
  every = gradient_penalty_every(config)

  def penalty():
    if config.loss.gradient_penalty == "exact":
      # A kernel has no second derivative.
      plain = networks.plain(discriminator)
      return losses.gradient_penalty(
        functools.partial(discriminate, plain), images
      )
    draw = functools.partial(jax.random.normal, shape=images.shape[1:])
    apply = functools.partial(discriminate, discriminator)
    known = apply(images) if logits is None else logits
    return losses.approximate_gradient_penalty(
      apply, images, known, jax.vmap(draw)(keys)
    )

  return every * lax.cond(step % every == 0, penalty, lambda: jnp.zeros(()))


def _path_length(config, state, apply, inputs, noise_keys):
  """Regularises path length at every k-th step, k times as strongly.

  Args:
    config: of `configs/`.
    state: GANState.
    apply: of the generator, with its variables.
    inputs: latents, labels and keys of its images.
    noise_keys: [B], of the directions in the space of images.

  Returns:
    (penalty, mean length); at other steps 0 and the average of the lengths.
  """
  every = config.loss.path_length_every

  def regularise():
    def synthesize(w):
      return apply(w, inputs[-1], True, method="synthesize")

    w = apply(*inputs, True, method="styles")
    shape = jax.eval_shape(synthesize, w).shape[1:]
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(noise_keys)
    lengths = losses.path_lengths(synthesize, w, noise)
    penalty = losses.path_length_penalty(lengths, state.path_length)
    return every * penalty, jnp.mean(lengths)

  return lax.cond(
    state.step % every == 0,
    regularise,
    lambda: (jnp.zeros(()), state.path_length),
  )


def _add_penalties(loss, metrics, penalties, weights, model_state):
  """Returns (loss with its penalties, (metrics with them, model_state))."""
  loss += sum(weights[name] * value for name, value in penalties.items())
  metrics |= {f"penalty/{name}": value for name, value in penalties.items()}
  return loss, (metrics, model_state)
