"""Adversarial losses and penalties.

All losses take logits [B], float32, without an activation, and return scalars.
Pairs are `(discriminator loss, generator loss)`.
"""

import jax
import jax.numpy as jnp


def non_saturating_d(real_logits, fake_logits):
  """-log sigmoid(D(x)) - log(1 - sigmoid(D(G(z)))) (Goodfellow et al. 2014)."""
  # softplus(-l) = -log sigmoid(l), softplus(l) = -log(1 - sigmoid(l))
  return jnp.mean(jax.nn.softplus(-real_logits)) + jnp.mean(
    jax.nn.softplus(fake_logits)
  )


def non_saturating_g(unused_real_logits, fake_logits):
  """-log sigmoid(D(G(z)))."""
  return jnp.mean(jax.nn.softplus(-fake_logits))


def hinge_d(real_logits, fake_logits):
  """max(0, 1 - D(x)) + max(0, 1 + D(G(z))) (Lim and Ye 2017)."""
  return jnp.mean(jax.nn.relu(1.0 - real_logits)) + jnp.mean(
    jax.nn.relu(1.0 + fake_logits)
  )


def wasserstein_d(real_logits, fake_logits):
  """D(G(z)) - D(x) (Arjovsky et al. 2017); the norm must bound D's slope."""
  return jnp.mean(fake_logits) - jnp.mean(real_logits)


def wasserstein_g(unused_real_logits, fake_logits):
  """-D(G(z)), the generator's side of hinge and Wasserstein."""
  return -jnp.mean(fake_logits)


def relativistic_d(real_logits, fake_logits):
  """-log sigmoid(D(x) - D(G(z))), in pairs (Jolicoeur-Martineau 2019)."""
  return jnp.mean(jax.nn.softplus(fake_logits - real_logits))


def relativistic_g(real_logits, fake_logits):
  """-log sigmoid(D(G(z)) - D(x)), in pairs."""
  return jnp.mean(jax.nn.softplus(real_logits - fake_logits))


ADVERSARIAL_LOSSES = {
  "non_saturating": (non_saturating_d, non_saturating_g),
  "hinge": (hinge_d, wasserstein_g),
  "wasserstein": (wasserstein_d, wasserstein_g),
  "rpgan": (relativistic_d, relativistic_g),
}


def balanced_consistency(logits, augmented_logits):
  """mean((D(x) - D(T(x)))^2), of real or of fake images (Zhao et al. 2021).

  The authors' code has another T(x) in place of x.
  """
  return jnp.mean(jnp.square(logits - augmented_logits))


def gradient_penalty(discriminate, images):
  """0.5 * mean ||grad_x D(x)||^2 (Mescheder et al. 2018).

  R1 on real images, R2 on generated ones.

  Args:
    discriminate: maps images [B, S, S, 3] to logits [B].
    images: where the slope is taken.
  """
  gradients = jax.grad(lambda x: jnp.sum(discriminate(x)))(images)
  return 0.5 * jnp.mean(jnp.sum(jnp.square(gradients), axis=(1, 2, 3)))


def interpolate_penalty(discriminate, real_images, fake_images, shares):
  """E (||grad_x D(x)|| - 1)^2 between images, WGAN-GP (Gulrajani et al. 2017).

  Args:
    discriminate: maps images [B, S, S, 3] to logits [B].
    real_images: [B, S, S, 3].
    fake_images: likewise.
    shares: [B], of the real image in that where the slope is taken.
  """
  shares = shares[:, None, None, None]
  images = shares * real_images + (1.0 - shares) * fake_images
  gradients = jax.grad(lambda x: jnp.sum(discriminate(x)))(images)
  squares = jnp.sum(jnp.square(gradients), axis=(1, 2, 3))
  # The root has no slope at 0.
  norms = jnp.sqrt(squares + 1e-12)
  return jnp.mean(jnp.square(norms - 1.0))


def approximate_gradient_penalty(discriminate, images, logits, noise):
  """0.5 * mean ((D(x + s n) - D(x)) / s)^2, s = 0.01 (Hyun et al. 2025).

  Its mean over n ~ N(0, I) is `gradient_penalty`, to first order; it needs no
  second derivative.

  Args:
    discriminate: maps images [B, S, S, 3] to logits [B].
    images: where the slope is taken.
    logits: D(x), `discriminate(images)`, which the loss has already.
    noise: n, of the images' shape.
  """
  step = 0.01
  change = discriminate(images + step * noise) - logits
  return 0.5 * jnp.mean(jnp.square(change / step))


def path_lengths(synthesize, w, noise):
  """Returns ||J_w^T y||, [B] (Karras et al. 2020, section 3.2).

  Args:
    synthesize: maps w to images [B, S, S, 3].
    w: [B, L, W], of each layer; the square of a length is the mean over layers.
    noise: y ~ N(0, I), of the images' shape.
  """
  side = noise.shape[1]
  slopes = jax.grad(lambda w: jnp.sum(synthesize(w) * noise) / side)(w)
  return jnp.sqrt(jnp.mean(jnp.sum(jnp.square(slopes), axis=2), axis=1))


def path_length_penalty(lengths, average):
  """E (||J_w^T y|| - a)^2, a their moving average (Karras et al. 2020)."""
  return jnp.mean(jnp.square(lengths - average))


def lecam(real_logits, fake_logits, logit_ema):
  """E max(0, D(x) - a_fake)^2 + E max(0, a_real - D(G(z)))^2.

  Tseng et al. 2021, equation 3, with the rectifiers of their code.

  Args:
    real_logits: [B].
    fake_logits: [B].
    logit_ema: {"real": a_real, "fake": a_fake}, moving averages of the logits.
  """
  return jnp.mean(
    jnp.square(jax.nn.relu(real_logits - logit_ema["fake"]))
  ) + jnp.mean(jnp.square(jax.nn.relu(logit_ema["real"] - fake_logits)))
