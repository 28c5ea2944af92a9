import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vitgan_jax import losses
from vitgan_jax.models import networks

# Far beyond (0, 1), where an activation on the logits could not go unnoticed.
REAL = np.array([-20.0, -1.5, -0.2, 0.0, 0.7, 3.0, 15.0, 1.0])
FAKE = np.array([4.0, -2.5, 0.0, 0.3, -18.0, 1.0, -0.4, 22.0])


def log_sigmoid(x):
  return -np.log1p(np.exp(-x))


REFERENCE = {
  "non_saturating": (
    lambda r, f: -np.mean(log_sigmoid(r)) - np.mean(log_sigmoid(-f)),
    lambda r, f: -np.mean(log_sigmoid(f)),
  ),
  "hinge": (
    lambda r, f: np.mean(np.maximum(0, 1 - r)) + np.mean(np.maximum(0, 1 + f)),
    lambda r, f: -np.mean(f),
  ),
  "wasserstein": (
    lambda r, f: np.mean(f) - np.mean(r),
    lambda r, f: -np.mean(f),
  ),
  "rpgan": (
    lambda r, f: -np.mean(log_sigmoid(r - f)),
    lambda r, f: -np.mean(log_sigmoid(f - r)),
  ),
}


def as_float32(*arrays):
  return [jnp.asarray(x, jnp.float32) for x in arrays]


def test_every_adversarial_loss_has_a_reference():
  assert losses.ADVERSARIAL_LOSSES.keys() == REFERENCE.keys()


@pytest.mark.parametrize("side", [0, 1], ids=["d", "g"])
@pytest.mark.parametrize("name", losses.ADVERSARIAL_LOSSES)
def test_adversarial_loss_matches_float64_formula(name, side):
  actual = losses.ADVERSARIAL_LOSSES[name][side](*as_float32(REAL, FAKE))
  assert actual.shape == ()
  np.testing.assert_allclose(
    actual, REFERENCE[name][side](REAL, FAKE), rtol=1e-6
  )


@pytest.mark.parametrize("side", [0, 1], ids=["d", "g"])
@pytest.mark.parametrize("name", ["non_saturating", "rpgan"])
def test_logistic_losses_stay_finite_where_sigmoid_underflows(name, side):
  loss_fn = losses.ADVERSARIAL_LOSSES[name][side]
  # The worst mistake of both players: log sigmoid(-200) is -inf in float32
  # unless it is computed as -softplus(200).
  worst = as_float32(np.full(4, 200.0), np.full(4, -200.0))[
    :: 1 if side else -1
  ]
  value, gradients = jax.value_and_grad(loss_fn, argnums=1)(*worst)
  assert value >= 200.0 and np.isfinite(value)
  np.testing.assert_allclose(np.abs(gradients), 0.25)  # slope 1, mean of 4


def test_relativistic_loss_compares_pairs_not_means():
  real, fake = as_float32([5.0, -5.0], [5.0, -5.0])
  np.testing.assert_allclose(
    losses.relativistic_d(real, fake), np.log(2.0), rtol=1e-6
  )
  assert losses.relativistic_d(real, fake[::-1]) > 2.0


def test_balanced_consistency_is_the_mean_squared_difference():
  np.testing.assert_allclose(
    losses.balanced_consistency(*as_float32(REAL, FAKE)),
    np.mean((REAL - FAKE) ** 2),
    rtol=1e-6,
  )


def test_lecam_pulls_each_side_to_the_average_of_the_other():
  logit_ema = {"real": 0.1, "fake": -0.1}
  above, below = REAL + 0.1, 0.1 - FAKE
  assert np.any(above < 0) and np.any(below < 0)  # these are left alone
  np.testing.assert_allclose(
    losses.lecam(*as_float32(REAL, FAKE), logit_ema),
    np.mean(np.maximum(above, 0) ** 2) + np.mean(np.maximum(below, 0) ** 2),
    rtol=1e-6,
  )


def test_approximate_gradient_penalty_is_the_exact_one_in_the_mean():
  rng = np.random.default_rng(0)
  slope = rng.normal(size=(2, 2, 3)).astype(np.float32)
  images = np.zeros((40_000, 2, 2, 3), np.float32)
  noise = rng.normal(size=images.shape).astype(np.float32)

  def discriminate(x):
    return jnp.sum(slope * x, axis=(1, 2, 3)) + 1.0

  approximate = losses.approximate_gradient_penalty(
    discriminate, images, discriminate(images), noise
  )
  # The standard error of a mean square of n normal numbers is sqrt(2 / n) of
  # it: 0.7 %; the tolerance is four of them.
  np.testing.assert_allclose(
    approximate, losses.gradient_penalty(discriminate, images), rtol=0.03
  )


def finite_difference_penalty(discriminate, images, h):
  """Half the mean squared norm of central differences, pixel by pixel."""
  images = np.asarray(images)
  offsets = h * np.eye(images[0].size).reshape(-1, *images.shape[1:])
  squared_norms = []
  for image in images:
    above = np.asarray(discriminate(image + offsets), np.float64)
    below = np.asarray(discriminate(image - offsets), np.float64)
    squared_norms.append(np.sum(((above - below) / (2 * h)) ** 2))
  return 0.5 * np.mean(squared_norms)


def test_interpolate_penalty_matches_finite_differences():
  rng = np.random.default_rng(0)
  real, fake = rng.normal(size=(2, 3, 2, 2, 3))
  weights = 0.5 * rng.normal(size=(2, 2, 3))
  shares = np.array([0.0, 0.3, 1.0])

  def discriminate(x, numpy=np):
    return numpy.sum(numpy.sin(x) * weights, axis=(1, 2, 3))

  expected = 0.0
  for image, other, share in zip(real, fake, shares):
    where = share * image + (1 - share) * other
    offsets = 1e-5 * np.eye(12).reshape(12, 2, 2, 3)
    slope = discriminate(where + offsets) - discriminate(where - offsets)
    expected += (np.linalg.norm(slope / 2e-5) - 1) ** 2 / 3
  assert expected > 0.01
  penalty = losses.interpolate_penalty(
    lambda x: discriminate(x, jnp), *as_float32(real, fake, shares)
  )
  np.testing.assert_allclose(penalty, expected, rtol=1e-4)


def test_interpolate_penalty_has_a_slope_where_the_discriminator_is_flat():
  images = jnp.zeros((2, 2, 2, 3))
  slope = jax.grad(
    lambda a: losses.interpolate_penalty(
      lambda x: a * jnp.sum(x, axis=(1, 2, 3)), images, images, jnp.zeros(2)
    )
  )(0.0)
  assert np.isfinite(slope)


def test_gradient_penalty_matches_finite_differences_of_a_function():
  images = np.random.default_rng(0).normal(size=(3, 2, 2, 3))
  weights = np.random.default_rng(1).normal(size=(2, 2, 3))

  def discriminate(x, numpy=np):
    return numpy.sum(numpy.sin(x) * weights, axis=(1, 2, 3))

  np.testing.assert_allclose(
    losses.gradient_penalty(
      lambda x: discriminate(x, jnp), jnp.asarray(images, jnp.float32)
    ),
    finite_difference_penalty(discriminate, images, 1e-5),
    rtol=1e-5,
  )


@pytest.mark.slow  # the other shows the formula
def test_gradient_penalty_matches_finite_differences_of_the_discriminator():
  discriminator = networks.build(tiny.tiny_config()).discriminator
  images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3))
  images = images.astype(np.float32)
  variables = jax.jit(discriminator.init)(jax.random.key(0), images)
  discriminate = jax.jit(lambda x: discriminator.apply(variables, x))
  np.testing.assert_allclose(
    jax.jit(lambda x: losses.gradient_penalty(discriminate, x))(images),
    finite_difference_penalty(discriminate, images, 0.02),
    # Central differences in float32: rounding of the logits, 1e-7, over a
    # step of 0.02, against slopes of about 1e-2; and the third derivative.
    rtol=2e-3,
  )


def test_path_lengths_match_finite_differences():
  rng = np.random.default_rng(0)
  w, noise = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5, 5, 3))
  maps = rng.normal(size=(3, 4, 5 * 5 * 3))

  def synthesize(w, numpy=np):
    pixels = numpy.sin(numpy.einsum("blw,lwp->bp", w, maps))
    return pixels.reshape(noise.shape)

  squares = np.zeros((2, 3))
  for layer, i in np.ndindex(3, 4):
    step = np.zeros_like(w)
    step[:, layer, i] = 1e-5
    change = (synthesize(w + step) - synthesize(w - step)) / 2e-5
    squares[:, layer] += (np.sum(change * noise, axis=(1, 2, 3)) / 5) ** 2
  lengths = losses.path_lengths(
    lambda w: synthesize(w, jnp), *as_float32(w, noise)
  )
  expected = np.sqrt(np.mean(squares, axis=1))
  np.testing.assert_allclose(lengths, expected, rtol=1e-4)
  np.testing.assert_allclose(
    losses.path_length_penalty(lengths, 0.7),
    np.mean((expected - 0.7) ** 2),
    rtol=1e-4,
  )
