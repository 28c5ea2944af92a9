"""One training step: a discriminator update, then a generator update.

Everything here is pure: (state, real images, key) to (state, metrics). Random
numbers are drawn with their global shape inside the step, so that one device
and many see the same ones.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import optax

from vitgan_jax import diff_augment, losses, partitioning
from vitgan_jax import train_state as train_state_lib

LOGIT_EMA_DECAY = 0.99  # LeCam, Tseng et al. 2021


def make_train_step(config, mesh):
  """Returns `train_step(state, real_images, key)` for a config and a mesh.

  `real_images` are uint8 [B, S, S, 3]; the metrics are float32 scalars.
  """
  generator, discriminator = train_state_lib.build_models(config, mesh)
  _, twice_differentiable = train_state_lib.build_models(config)
  g_optimizer, d_optimizer = train_state_lib.build_optimisers(config)
  d_adversarial, g_adversarial = losses.ADVERSARIAL_LOSSES[
    config.loss.adversarial
  ]
  transform = diff_augment.apply

  def draw_latents(key):
    shape = (config.batch_size, config.generator.latent_dim)
    return lax.with_sharding_constraint(
      jax.random.normal(key, shape), partitioning.batch_sharding(mesh)
    )

  def draw_augmentation(key):
    return diff_augment.draw(
      key, config.batch_size, config.data.image_size, **config.augment
    )

  def generate(g_params, latents):
    return generator.apply({"params": g_params}, latents)

  gradient_of = functools.partial(_gradient, config.accumulation, mesh)

  def d_step(state, real_images, key):
    z_key, real_key, fake_key = jax.random.split(key, 3)
    batch = (
      draw_latents(z_key),
      real_images,
      draw_augmentation(real_key),
      draw_augmentation(fake_key),
    )

    def loss_fn(d_params, batch):
      latents, real_images, real_draws, fake_draws = batch
      fake_images = generate(state.g_params, latents)
      real_augmented = transform(real_draws, real_images)
      fake_augmented = transform(fake_draws, fake_images)
      variables = {"params": d_params, "spectral": state.d_spectral}
      batches = [real_augmented, fake_augmented]
      if config.loss.bcr_weight:
        batches += [real_images, fake_images]
      # The one call in a step that writes u; all batches share it.
      logits, spectral = _apply_to_all(discriminator, variables, batches)
      real_logits, fake_logits = logits[:2]
      loss = d_adversarial(real_logits, fake_logits)
      metrics = {
        "loss/d": loss,
        "scores/real": jnp.mean(real_logits),
        "scores/fake": jnp.mean(fake_logits),
      }

      def add(name, weight, penalty):
        nonlocal loss
        metrics[f"penalty/{name}"] = penalty
        loss += weight * penalty

      if config.loss.bcr_weight:
        consistency = losses.balanced_consistency(
          logits[2], real_logits
        ) + losses.balanced_consistency(logits[3], fake_logits)
        add("bcr", config.loss.bcr_weight, consistency)
      if config.loss.lecam_weight:
        add(
          "lecam",
          config.loss.lecam_weight,
          losses.lecam(real_logits, fake_logits, state.logit_ema),
        )
      for name, gamma, images in (
        ("r1", config.loss.r1_gamma, real_augmented),
        ("r2", config.loss.r2_gamma, fake_augmented),
      ):
        if gamma:
          discriminate = functools.partial(
            twice_differentiable.apply, {**variables, "spectral": spectral}
          )
          every = config.loss.gradient_penalty_every
          # Taken every few steps, and then times as many, it is as strong.
          penalty = every * lax.cond(
            state.step % every == 0,
            functools.partial(losses.gradient_penalty, discriminate),
            lambda unused_images: jnp.zeros(()),
            images,
          )
          add(name, gamma, penalty)
      return loss, (metrics, spectral)

    gradients, (metrics, spectral) = gradient_of(loss_fn, state.d_params, batch)
    updates, opt_state = d_optimizer.update(
      gradients, state.d_opt_state, state.d_params
    )
    logit_ema = {
      name: LOGIT_EMA_DECAY * average
      + (1.0 - LOGIT_EMA_DECAY) * metrics[f"scores/{name}"]
      for name, average in state.logit_ema.items()
    }
    state = state.replace(
      d_params=optax.apply_updates(state.d_params, updates),
      d_spectral=spectral,
      d_opt_state=opt_state,
      logit_ema=logit_ema,
    )
    return state, metrics

  def g_step(state, real_images, key):
    z_key, real_key, fake_key = jax.random.split(key, 3)
    variables = {"params": state.d_params, "spectral": state.d_spectral}

    batch = (draw_latents(z_key), draw_augmentation(fake_key))
    if config.loss.adversarial == "rpgan":  # the one that compares pairs
      batch += (real_images, draw_augmentation(real_key))

    def loss_fn(g_params, batch):
      latents, fake_draws, *real = batch
      fake_images = transform(fake_draws, generate(g_params, latents))
      fake_logits = discriminator.apply(variables, fake_images)
      real_logits = None
      if real:
        real_images, real_draws = real
        real_logits = discriminator.apply(
          variables, transform(real_draws, real_images)
        )
      loss = g_adversarial(real_logits, fake_logits)
      return loss, ({"loss/g": loss}, None)

    gradients, (metrics, _) = gradient_of(loss_fn, state.g_params, batch)
    updates, opt_state = g_optimizer.update(
      gradients, state.g_opt_state, state.g_params
    )
    g_params = optax.apply_updates(state.g_params, updates)
    decay = train_state_lib.ema_decay(
      state.step * config.batch_size,
      config.batch_size,
      config.ema.half_life_kimg,
      config.ema.ramp_up,
    )
    state = state.replace(
      g_params=g_params,
      g_ema_params=train_state_lib.update_ema(
        state.g_ema_params, g_params, decay
      ),
      g_opt_state=opt_state,
    )
    return state, metrics

  def train_step(state, real_images, key):
    flip_key, d_key, g_key = jax.random.split(key, 3)
    real_images = to_float(real_images)
    if config.data.flip:
      real_images = random_flip(flip_key, real_images)
    state, d_metrics = d_step(state, real_images, d_key)
    state, g_metrics = g_step(state, real_images, g_key)
    return state.replace(step=state.step + 1), {**d_metrics, **g_metrics}

  return train_step


def make_train_steps(config, mesh):
  """Returns the jitted `train_steps(state, real_images)`, n steps in one call.

  `real_images` are uint8 [n, B, S, S, 3]; the metrics are means over the n
  steps. The state is donated.
  """
  train_step = make_train_step(config, mesh)

  def body(state, real_images):
    key = jax.random.fold_in(state.key, state.step)
    return train_step(state, real_images, key)

  def train_steps(state, real_images):
    state, metrics = lax.scan(body, state, real_images)
    return state, jax.tree.map(jnp.mean, metrics)

  state_shardings = train_state_lib.state_shardings(config, mesh)
  return jax.jit(
    train_steps,
    in_shardings=(state_shardings, partitioning.batch_sharding(mesh, axis=1)),
    out_shardings=(state_shardings, partitioning.replicated(mesh)),
    donate_argnums=0,
  )


def to_float(images):
  """Maps uint8 to float32 in [-1, 1]."""
  return images.astype(jnp.float32) * (2.0 / 255.0) - 1.0


def random_flip(key, images):
  """Mirrors each image [B, S, S, C] left to right with probability 1/2."""
  flipped = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
  return jnp.where(flipped, images[:, :, ::-1], images)


def _gradient(num_parts, mesh, loss_fn, params, batch):
  """Differentiates a loss, one part of the batch after the other.

  All losses and penalties of a step are means over images, or over pairs of
  them, and so are their sums: means over equal parts are those of the whole.

  Args:
    num_parts: how many micro-batches.
    mesh: of the devices that share the batch.
    loss_fn: (params, batch) to (loss, (metrics, rest)); `rest` is of the
      parameters alone, the same for all images.
    params: pytree.
    batch: pytree of arrays [B, ...].

  Returns:
    (gradients, (metrics, rest)).
  """
  gradient_fn = jax.grad(loss_fn, has_aux=True)
  if num_parts == 1:
    return gradient_fn(params, batch)

  def split(x):
    # Part k has the images k, k + num_parts, ...: none leaves its device.
    x = x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1)
    sharding = partitioning.batch_sharding(mesh, axis=1)
    return lax.with_sharding_constraint(x, sharding)

  def add(carry, part):
    (gradients, metrics), _ = carry
    new_gradients, (new_metrics, rest) = gradient_fn(params, part)
    sums = jax.tree.map(
      jnp.add, (gradients, metrics), (new_gradients, new_metrics)
    )
    return (sums, rest), None

  parts = jax.tree.map(split, batch)
  gradients, (metrics, rest) = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(gradient_fn, params, jax.tree.map(lambda x: x[0], parts)),
  )
  (sums, rest), _ = lax.scan(add, ((gradients, metrics), rest), parts)
  gradients, metrics = jax.tree.map(lambda x: x / num_parts, sums)
  return gradients, (metrics, rest)


def _apply_to_all(discriminator, variables, batches):
  """Discriminates several batches [B, ...] in one pass that updates u.

  Returns:
    A list of logits [B], one for each batch, and the collection `spectral`.
  """
  # Stacked behind the batch axis: side by side along it, the images of each
  # device would have to move to another.
  images = jnp.stack(batches, axis=1)
  images = images.reshape(-1, *images.shape[2:])
  logits, updates = discriminator.apply(variables, images, mutable=["spectral"])
  # Without spectral normalisation there is no such collection.
  spectral = updates.get("spectral", {})
  return list(logits.reshape(-1, len(batches)).T), spectral
