import contextlib
import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.losses_test import REFERENCE as ADVERSARIAL_REFERENCE
from vitgan_jax import (
  gan_step,
  monitor,
  partitioning,
  train_state,
)
from vitgan_jax.models import networks
from vitgan_jax.pixels import to_float

# What a step computes can be known from outside in these: no random draws.
PLAIN = tiny.NO_AUGMENTATION | {"data.flip": False, "loss.bcr_weight": 0.0}
CONFIGS = {
  "default": {
    "ema.half_life_kimg": 0.016,  # one step of two batches
    "ema.ramp_up": 0.0,
    "d_optimizer.learning_rate": 1e-3,
    "d_steps": 2,
  },
  "pairs": PLAIN
  | {
    "data.num_classes": 3,
    "loss.adversarial": "rpgan",
    "loss.r1_gamma": 2.0,
    "loss.r2_gamma": 0.5,
    "loss.gradient_penalty_every": 4,
    "loss.lecam_weight": 0.3,
    "loss.lecam_from_step": 4,
  },
  # A square that hides all of every image, for sure.
  "hidden": PLAIN
  | {
    "data.flip": True,
    "loss.adversarial": "hinge",
    "loss.bcr_weight": 10.0,
    "loss.r1_gamma": 1.0,
    "loss.gradient_penalty_every": 1,
    "augment.probability": 1.0,
    "augment.cutout": 2.0,
  },
}
KEYS = jax.random.split(jax.random.key(7), 8)
IMAGES = tiny.random_images(tiny.tiny_config())
LABELS = np.array([2, 0, 1, 1, 0, 2, 2, 1], np.int32)
COLOR = np.array([0.5, -0.25, 0.1])  # of what `known_state` generates


@functools.cache
def setting(name, num_devices=1, **changes):
  """Returns what the functions of a step need beside their arrays."""
  config = tiny.tiny_config(CONFIGS[name], **changes)
  mesh = partitioning.create_mesh(jax.devices()[:num_devices])
  return dict(config=config, nets=networks.build(config), mesh=mesh)


def config_of(name):
  return setting(name)["config"]


def labels_of(name):
  return LABELS if config_of(name).data.num_classes else None


def batch_of(name, images=IMAGES):
  return {"images": images, "labels": labels_of(name), "keys": KEYS}


@functools.cache
def compiled(step, name, num_devices=1, **changes):
  """Returns a jitted `step(state, batch)`."""
  options = setting(name, num_devices, **changes)
  jitted = jax.jit(functools.partial(step, **options))
  replicated = partitioning.replicated(options["mesh"])
  split = partitioning.batch_sharding(options["mesh"])
  # Inputs that are on no mesh yet would be compiled for apart from outputs.
  return lambda state, batch: jitted(
    jax.device_put(state, replicated), jax.device_put(batch, split)
  )


def run(name, state, batch, *where, **changes):
  """Trains D once, then G; returns (state, metrics)."""
  metrics = {}
  for step in (gan_step.d_step, gan_step.g_step):
    state, new = compiled(step, name, *where, **changes)(state, batch)
    metrics |= new
  return state, metrics


@functools.cache
def state_of(name):
  if name == "hidden":  # its networks are the default ones
    name = "default"
  return train_state.init_train_state(**setting(name))


@functools.cache
def known_state(name, step=4):
  """A state whose generator makes images of one COLOR and whose u are random.

  As exact as they are made, one power iteration would hardly show.
  """
  state, rng = state_of(name), np.random.default_rng(0)

  def random_u(path, x):
    if path[-1].key == "u":
      x = rng.normal(size=x.shape).astype(np.float32)
      x /= np.linalg.norm(x)
    return x

  g_params = jax.tree.map(lambda x: x, state.g_params)  # new dicts
  rgb = g_params["decoder"]["rgb"]
  rgb["kernel"] = jnp.zeros_like(rgb["kernel"])
  rgb["bias"] = jnp.asarray(COLOR, jnp.float32)
  return state.replace(
    step=jnp.int32(step),
    g_params=g_params,
    d_model_state=jax.tree_util.tree_map_with_path(
      random_u, state.d_model_state
    ),
    logit_ema={"real": jnp.float32(0.3), "fake": jnp.float32(-0.2)},
  )


@functools.cache
def discriminator_functions(name):
  """Returns jitted logits(params, model_state, images) and their slopes."""
  discriminator = setting(name)["nets"].discriminator

  def logits(params, model_state, x):
    variables = {"params": params, **model_state}
    return discriminator.apply(variables, x, labels_of(name))

  slopes = jax.grad(lambda *args: jnp.sum(logits(*args)), argnums=2)
  return jax.jit(logits), jax.jit(slopes)


def discriminate(name, params, model_state, x):
  x = np.broadcast_to(x, (8, 8, 8, 3)).astype(np.float32)
  logits = discriminator_functions(name)[0](params, model_state, x)
  return np.asarray(logits, np.float64)


def half_squared_slope(name, params, model_state, x):
  x = np.broadcast_to(x, (8, 8, 8, 3)).astype(np.float32)
  slopes = discriminator_functions(name)[1](params, model_state, x)
  return 0.5 * np.mean(np.sum(np.square(slopes, dtype=np.float64), (1, 2, 3)))


def reference_d(name, params, before, after, images):
  """Returns (loss with penalties, metrics) of D, in numpy.

  Args:
    name: of the config.
    params: of D.
    before: a `known_state`.
    after: the state after it, whose u all of D's calls have.
    images: uint8, without a random flip.
  """
  config, model_state = config_of(name), after.d_model_state
  d = functools.partial(discriminate, name, params, model_state)
  real, fake = images / 127.5 - 1.0, COLOR
  shown_real, shown_fake = (0.0, 0.0) if name == "hidden" else (real, fake)
  real_logits, fake_logits = d(shown_real), d(shown_fake)
  loss = ADVERSARIAL_REFERENCE[config.loss.adversarial][0](
    real_logits, fake_logits
  )
  metrics = {
    "loss/d": loss,
    "scores/real": np.mean(real_logits),
    "scores/fake": np.mean(fake_logits),
  }
  if name == "hidden":
    metrics["penalty/bcr"] = np.mean((d(real) - real_logits) ** 2) + np.mean(
      (d(fake) - fake_logits) ** 2
    )
    loss += 10.0 * metrics["penalty/bcr"]
    # The slope at the image itself, of which D sees nothing.
    metrics["penalty/r1"] = 0.0
  if name == "pairs":
    metrics["penalty/lecam"] = np.mean(
      np.maximum(real_logits + 0.2, 0) ** 2
    ) + np.mean(np.maximum(0.3 - fake_logits, 0) ** 2)
    loss += 0.3 * metrics["penalty/lecam"]
    is_turn = before.step % 4 == 0
    slope = functools.partial(half_squared_slope, name, params, model_state)
    # Lazy: four times as much every fourth step.
    metrics["penalty/r1"] = 4 * slope(real) if is_turn else 0.0
    metrics["penalty/r2"] = 4 * slope(fake) if is_turn else 0.0
    loss += 2.0 * metrics["penalty/r1"] + 0.5 * metrics["penalty/r2"]
  return loss, metrics


def reference_g(name, color, state, images):
  """Returns the loss of a G that makes one color."""
  shown_real, shown_fake = images / 127.5 - 1.0, color
  if name == "hidden":
    shown_fake = 0.0
  loss_fn = ADVERSARIAL_REFERENCE[config_of(name).loss.adversarial][1]
  return loss_fn(
    *(
      discriminate(name, state.d_params, state.d_model_state, x)
      for x in (shown_real, shown_fake)
    )
  )


def mirror_symmetric(images):
  """Returns images that the random flip leaves alone."""
  return np.concatenate([images[:, :, :4], images[:, :, 3::-1]], axis=2)


def gradients(state):
  """Returns the last gradients (G's, D's): with b1 = 0 they are Adam's mu."""
  return state.g_opt_state[0].mu, state.d_opt_state[0].mu


TURNS = [("pairs", 4), ("pairs", 5), ("hidden", 4)]


@pytest.mark.parametrize("name, turn", TURNS)
def test_metrics_match_numpy(name, turn):
  images = mirror_symmetric(IMAGES)
  before = known_state(name, turn)
  after, metrics = run(name, before, batch_of(name, images))
  _, expected = reference_d(name, before.d_params, before, after, images)
  expected["loss/g"] = reference_g(name, COLOR, after, images)
  for network, gradient in zip("gd", gradients(after)):
    expected[f"gradients/{network}"] = norm(gradient)
  assert metrics.keys() == expected.keys()
  for key, value in expected.items():
    assert metrics[key].dtype == jnp.float32 and metrics[key].shape == ()
    # Logits have an absolute error of 1e-6 in float32.
    np.testing.assert_allclose(
      metrics[key], value, rtol=2e-5, atol=2e-6, err_msg=key
    )


def norm(tree):
  return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))


@pytest.mark.parametrize("name, turn", TURNS)
def test_d_trains_on_the_sum_of_its_losses(name, turn):
  # The slope of the loss along its gradient is the norm of the gradient.
  images = mirror_symmetric(IMAGES)
  before = known_state(name, turn)
  after, _ = run(name, before, batch_of(name, images))
  gradient = gradients(after)[1]
  h = 0.01 / norm(gradient)
  above, below = (
    reference_d(
      name,
      jax.tree.map(lambda p, g, s=s: p + s * g, before.d_params, gradient),
      before,
      after,
      images,
    )[0]
    for s in (h, -h)
  )
  np.testing.assert_allclose(
    (above - below) / 0.02,
    norm(gradient),
    # Central differences of float32 logits: 1e-6 / 0.02, and the curvature.
    rtol=2e-3,
    atol=1e-4,
  )


def test_g_trains_on_its_loss():
  before = known_state("pairs")
  after, _ = run("pairs", before, batch_of("pairs"))
  gradient = gradients(after)[0]["decoder"]["rgb"]["bias"]
  h = 0.02
  differences = [
    (
      reference_g("pairs", COLOR + step, after, IMAGES)
      - reference_g("pairs", COLOR - step, after, IMAGES)
    )
    / (2 * h)
    for step in h * np.eye(3)
  ]
  # Central differences of float32 logits: 1e-6 / 0.04.
  np.testing.assert_allclose(gradient, differences, rtol=2e-3, atol=5e-5)


def test_neither_network_is_trained_on_images_that_are_not_augmented():
  # The square hides all images, so that G can have no gradient, and without
  # the consistency D sees nothing but grey: see `reference_d`.
  after, _ = run("hidden", known_state("hidden"), batch_of("hidden"))
  for name, leaf in tiny.leaves_by_name(gradients(after)[0]).items():
    np.testing.assert_array_equal(leaf, 0.0, err_msg=name)


class Grey(nn.Module):
  """Generates images of mid-grey."""

  latent_dim: int = 1

  @nn.compact
  def __call__(self, latents, labels, keys, train):
    return jnp.zeros((len(latents), 2, 2, 3))


class Brightness(nn.Module):
  """A discriminator whose logit is the mean of an image."""

  @nn.compact
  def __call__(self, images, labels, keys, train):
    return jnp.mean(images, axis=(1, 2, 3))


class TwoLevels(nn.Module):
  """A discriminator whose logit is one level's sum and twice the other's."""

  num_levels: int = 2

  @nn.compact
  def __call__(self, images, labels, keys, train):
    coarse, fine = jnp.split(jnp.sum(images, axis=(1, 2)), 2, axis=-1)
    return jnp.sum(coarse + 2.0 * fine, axis=-1)


class Noisy(nn.Module):
  """A discriminator whose logit is the mean of an image, and a draw.

  One that keeps a count adds what it has counted.
  """

  keeps: bool = False

  @nn.compact
  def __call__(self, images, labels, keys, train):
    logits = jnp.mean(images, axis=(1, 2, 3)) + jax.vmap(jax.random.normal)(
      keys
    )
    if not self.keeps:
      return logits
    count = self.variable("spectral", "count", jnp.zeros, ())
    if self.is_mutable_collection("spectral"):
      count.value += 1.0
      return logits
    return logits + count.value


@pytest.mark.parametrize("keeps", [False, True])
def test_approximate_slope_is_of_one_and_the_same_draw(keeps):
  """Of others, or of another state, a hundredth would be lost in the noise."""
  config = tiny.tiny_config(
    PLAIN
    | {
      "loss.r1_gamma": 1.0,
      "loss.r2_gamma": 1.0,
      "loss.gradient_penalty": "approximate",
    }
  )
  batch = toy_batch(
    np.zeros((4096, 2, 2, 3), np.uint8),
    jax.random.split(jax.random.key(0), 4096),
  )
  kept = {"spectral": {"count": jnp.zeros(())}} if keeps else {}
  _, (metrics, _) = gan_step.d_loss(
    {},
    batch,
    bare_state().replace(d_model_state=kept),
    config=config,
    nets=networks.Networks(Grey(), Noisy(keeps), "xla"),
  )
  expected = gan_step.gradient_penalty_every(config) * 0.5 / 12
  for name in ("r1", "r2"):
    np.testing.assert_allclose(metrics[f"penalty/{name}"], expected, rtol=0.1)


class Scaled(nn.Module):
  """A discriminator whose logit is the mean of an image, times a parameter."""

  @nn.compact
  def __call__(self, images, labels, keys, train):
    scale = self.param("scale", nn.initializers.ones, ())
    return scale * jnp.mean(images, axis=(1, 2, 3))


def toy_batch(images, keys=KEYS):
  return {"images": images, "labels": None, "keys": keys}


def bare_state():
  """Returns a state of networks without parameters."""
  empty = {x.name: {} for x in dataclasses.fields(train_state.GANState)}
  return train_state.GANState(**empty | {"step": jnp.zeros((), jnp.int32)})


def test_slope_is_at_the_image_itself_of_which_the_levels_are_copies():
  config = tiny.tiny_config(PLAIN | {"loss.r1_gamma": 1.0})
  nets = networks.Networks(Grey(), TwoLevels(), "xla")
  batch = toy_batch(np.zeros((8, 2, 2, 3), np.uint8))
  _, (metrics, _) = gan_step.d_loss(
    {}, batch, bare_state(), config=config, nets=nets
  )
  every = gan_step.gradient_penalty_every(config)
  # Each of the 12 numbers of an image counts once and twice.
  np.testing.assert_allclose(
    metrics["penalty/r1"], every * 0.5 * 12 * (1 + 2) ** 2
  )


def test_drift_is_of_the_images_of_all_devices():
  config = tiny.tiny_config(
    PLAIN | {"loss.adversarial": "hinge", "loss.drift_weight": 3.0}
  )
  images = np.random.default_rng(0).integers(0, 256, (8, 2, 2, 3), np.uint8)
  nets = networks.Networks(Grey(), Scaled(), "xla")
  gradient = functools.partial(
    partitioning.gradient,
    functools.partial(gan_step.d_loss, config=config, nets=nets),
    mesh=partitioning.create_mesh(jax.devices()[:4]),
  )
  gradients, (metrics, _) = jax.jit(gradient)(
    {"scale": jnp.ones(())}, toy_batch(images), bare_state()
  )
  mean = np.mean(images / 127.5 - 1.0)
  np.testing.assert_allclose(metrics["penalty/drift"], mean**2, rtol=1e-4)
  # All logits are within the margins of the hinge loss.
  np.testing.assert_allclose(
    gradients["scale"], -mean + 3.0 * 2.0 * mean**2, rtol=1e-4
  )


@pytest.mark.parametrize("anchor, views", [("clean", 1), ("augmented", 2)])
def test_consistency_is_to_the_clean_image_or_to_another_view(anchor, views):
  config = tiny.tiny_config(
    PLAIN
    | {
      "loss.bcr_weight": 1.0,
      "loss.bcr_anchor": anchor,
      "augment.probability": 1.0,
      "augment.brightness": 0.5,
    }
  )
  batch = toy_batch(
    np.zeros((4096, 2, 2, 3), np.uint8),
    jax.random.split(jax.random.key(0), 4096),
  )
  nets = networks.Networks(Grey(), Brightness(), "xla")
  _, (metrics, _) = gan_step.d_loss(
    {}, batch, bare_state(), config=config, nets=nets
  )
  # Each view has a variance of 0.5**2 / 3, for real images and for others.
  np.testing.assert_allclose(
    metrics["penalty/bcr"], 2 * views * 0.5**2 / 3, rtol=0.05
  )


def test_probability_of_augmentation_is_that_of_a_simulation():
  config = tiny.tiny_config({"ada.target": 0.6, "ada.kimg": 0.1})
  rng = np.random.default_rng(0)
  probability, expected = jnp.zeros(()), 0.0
  seen = set()
  for overfitting in [*[1.0] * 20, *rng.uniform(0.2, 1, 200), *[-1.0] * 30]:
    probability = gan_step.next_probability(config, probability, overfitting)
    # 8 images of 100 are a step of 0.08.
    expected += 0.08 if overfitting > 0.6 else -0.08
    expected = min(max(expected, 0.0), 1.0)
    np.testing.assert_allclose(probability, expected, atol=1e-5)
    seen.add(round(expected, 2))
  assert {0.0, 1.0} < seen and expected == 0.0


def test_discriminator_steers_the_augmentation():
  config = tiny.tiny_config(
    PLAIN | {"ada.target": 0.6, "ada.kimg": 0.2, "augment.brightness": 0.1}
  )
  nets = networks.Networks(Grey(), Brightness(), "xla")
  mesh = partitioning.create_mesh(jax.devices()[:2])
  step = jax.jit(
    functools.partial(gan_step.d_step, config=config, nets=nets, mesh=mesh)
  )
  _, optimizer = train_state.build_optimizers(config)
  state = bare_state().replace(
    augment_probability=jnp.float32(0.2), d_opt_state=optimizer.init({})
  )
  # All real images are above 0, or none.
  for white, sign, moved in ((255, 1.0, 0.24), (0, -1.0, 0.16)):
    images = np.full((8, 2, 2, 3), white, np.uint8)
    after, metrics = step(state, toy_batch(images))
    assert metrics["ada/overfitting"] == sign
    np.testing.assert_allclose(metrics["ada/probability"], 0.2)
    np.testing.assert_allclose(after.augment_probability, moved, rtol=1e-6)


def test_images_are_generated_from_the_latents_and_labels():
  state = state_of("pairs")
  _, metrics = run("pairs", state, batch_of("pairs"))
  generate = jax.jit(setting("pairs")["nets"].generator.apply)
  latents = np.stack(
    [jax.random.normal(jax.random.split(key, 6)[0], 16) for key in KEYS]
  )

  def score(labels):
    images = generate(state.g_variables, latents, labels)
    return np.mean(
      discriminate("pairs", state.d_params, state.d_model_state, images)
    )

  np.testing.assert_allclose(metrics["scores/fake"], score(LABELS), atol=5e-6)
  assert abs(score(LABELS) - score(np.roll(LABELS, 1))) > 1e-4


@pytest.mark.parametrize("name", ["default", "pairs"])
def test_every_parameter_is_trained(name):
  # From step 4 on LeCam counts: without it D's last bias cancels in pairs.
  before = state_of(name).replace(step=jnp.int32(4))
  after, _ = run(name, before, batch_of(name))
  for network, gradient in zip("gd", gradients(after)):
    before_params, after_params = (
      tiny.leaves_by_name(getattr(s, f"{network}_params"))
      for s in (before, after)
    )
    for leaf, value in tiny.leaves_by_name(gradient).items():
      # Rounding would leave 1e-8.
      assert np.max(np.abs(value)) > 1e-6, (network, leaf)
      assert np.any(after_params[leaf] != before_params[leaf]), (network, leaf)
    if name == "pairs":  # and every class
      layers = gradient["mapping"] if network == "g" else gradient
      rows = layers["class_embedding"]["kernel"]
      assert rows.shape == (3, 16) and np.all(np.any(rows, axis=1))


def test_a_step_is_one_adam_update_of_each_network():
  config, state = config_of("default"), state_of("default")
  after, _ = run("default", state, batch_of("default"))
  for network, gradient in zip("gd", gradients(after)):
    opt_state = getattr(after, f"{network}_opt_state")[0]
    assert opt_state.count == 1
    rate = config[f"{network}_optimizer"].learning_rate
    new, old, gradient, nu = (
      tiny.leaves_by_name(tiny.to_host(tree))
      for tree in (
        getattr(after, f"{network}_params"),
        getattr(state, f"{network}_params"),
        gradient,
        opt_state.nu,
      )
    )
    for name, g in gradient.items():
      g = g.astype(np.float64)
      np.testing.assert_allclose(nu[name], 0.01 * g**2, rtol=1e-5, atol=1e-38)
      np.testing.assert_allclose(
        new[name],
        old[name] - rate * g / (np.abs(g) + 1e-8),
        rtol=2e-7,  # float32, of parameters of about 1 ...
        atol=1e-5 * rate,  # ... and of the update
        err_msg=name,
      )


def iterate_u(state):
  """Returns {name: u [out]} after one power iteration in float64."""
  kernels = tiny.leaves_by_name(tiny.to_host(state.d_params))
  result = {}
  for name, u in spectral(state).items():
    if name.endswith("/u"):
      kernel = kernels[name.removesuffix("norm/u") + "kernel"]
      matrix = kernel.reshape(-1, u.size).astype(np.float64)
      u = matrix.T @ (matrix @ u)
      result[name] = u / np.linalg.norm(u)
  return result


def spectral(state):
  return tiny.leaves_by_name(tiny.to_host(state.d_model_state["spectral"]))


@pytest.mark.parametrize("name", ["pairs", "hidden"])
def test_u_takes_one_power_iteration_a_d_step(name):
  before = known_state(name)
  after, _ = run(name, before, batch_of(name))
  old, new = spectral(before), spectral(after)
  once = iterate_u(before)
  twice = iterate_u(before.replace(d_model_state=after.d_model_state))
  for leaf, value in new.items():
    if leaf.endswith("sigma_init"):
      np.testing.assert_array_equal(value, old[leaf], err_msg=leaf)
      continue
    np.testing.assert_allclose(value, once[leaf], atol=1e-6, err_msg=leaf)
    if value.size > 1:
      assert np.max(np.abs(twice[leaf] - value)) > 1e-2, leaf


@pytest.mark.parametrize(
  "name, decay",
  # A half-life of a step; and one of 0.05 * the 32 images seen: 1.6 images.
  [("default", 0.5), ("pairs", 0.5 ** (8 / 1.6))],
)
def test_average_moves_from_the_old_average_to_the_new_params(name, decay):
  before = known_state(name)
  old = jax.tree.map(lambda x: x + 1.0, before.g_params)
  after, _ = run(name, before.replace(g_ema_params=old), batch_of(name))
  old, new, params = (
    tiny.leaves_by_name(tiny.to_host(x))
    for x in (old, after.g_ema_params, after.g_params)
  )
  for leaf, value in new.items():
    np.testing.assert_allclose(
      value,
      decay * old[leaf] + (1 - decay) * params[leaf],
      rtol=1e-5,
      atol=1e-6,
      err_msg=leaf,
    )


def test_logit_averages_follow_the_scores():
  before = known_state("pairs")
  after, metrics = run("pairs", before, batch_of("pairs"))
  for name, old in before.logit_ema.items():
    np.testing.assert_allclose(
      after.logit_ema[name],
      0.99 * old + 0.01 * metrics[f"scores/{name}"],
      rtol=1e-6,
    )


def test_flip_mirrors_half_of_the_images():
  images = np.random.default_rng(0).normal(size=(4096, 2, 3, 3))
  images = images.astype(np.float32)
  keys = jax.random.split(jax.random.key(0), 4096)
  flipped = np.asarray(jax.vmap(gan_step.random_flip)(keys, images))
  same = np.all(flipped == images, axis=(1, 2, 3))
  mirrored = np.all(flipped == images[:, :, ::-1], axis=(1, 2, 3))
  assert np.all(same ^ mirrored)
  # Five standard deviations.
  np.testing.assert_allclose(np.mean(same), 0.5, atol=5 * 0.5 / 64)
  assert abs(np.corrcoef(same[1:], same[:-1])[0, 1]) < 5 / 64


@pytest.mark.parametrize(
  "name, metric, flips",
  [("pairs", "scores/real", False), ("hidden", "penalty/bcr", True)],
)
def test_real_images_are_flipped_where_the_config_says_so(name, metric, flips):
  before = known_state(name)
  after, metrics = run(name, before, batch_of(name))
  _, unflipped = reference_d(name, before.d_params, before, after, IMAGES)
  difference = np.abs(metrics[metric] - unflipped[metric])
  assert (difference > 1e-4) if flips else (difference < 1e-5)


def test_draws_of_an_image_do_not_depend_on_its_place():
  order = np.array([3, 6, 0, 7, 1, 4, 2, 5])
  batch = batch_of("default")
  permuted = {**batch, "images": IMAGES[order], "keys": KEYS[order]}
  other_keys = {**batch, "keys": KEYS[order]}
  state = state_of("default")
  metrics, same, other = (
    run("default", state, x)[1] for x in (batch, permuted, other_keys)
  )
  for name in ("loss/d", "penalty/bcr", "scores/real", "scores/fake"):
    np.testing.assert_allclose(same[name], metrics[name], atol=5e-6)
  assert abs(other["scores/real"] - metrics["scores/real"]) > 1e-4


def test_images_span_minus_one_to_one():
  images = to_float(jnp.array([0, 51, 255], jnp.uint8))
  assert images.dtype == jnp.float32
  np.testing.assert_allclose(images, [-1.0, -0.6, 1.0], atol=1e-7)


GOLDEN = {
  "default": {
    "loss/d": 1.334296,
    "loss/g": 0.6503857,
    "penalty/bcr": 0.04962486,
    "scores/fake": 0.1023988,
    "scores/real": 0.2265075,
  },
  "pairs": {
    "loss/d": 0.6875128,
    "loss/g": 0.7032664,
    "penalty/lecam": 0.0,
    "penalty/r1": 0.05969658,
    "penalty/r2": 0.04079441,
    "scores/fake": 0.07660601,
    "scores/real": 0.08885634,
  },
  "hidden": {
    "loss/d": 2.0,
    "penalty/bcr": 0.02843894,
    "penalty/r1": 0.0,
    "scores/fake": 0.1856046,
    "scores/real": 0.1856046,
  },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_golden_metrics_of_the_first_step(name):
  _, metrics = run(name, state_of(name), batch_of(name))
  metrics = {key: float(value) for key, value in metrics.items()}
  if name == "hidden":
    # What is real and what generated looks alike to the discriminator. Some of
    # its gradients are rounding, of which Adam makes whole steps: others on
    # another CPU.
    del metrics["loss/g"]
  message = (
    "The first step of a run has changed. If it was meant to (another init, "
    "loss, augmentation, or order of the random draws), say so in the commit "
    f"and put these numbers into GOLDEN[{name!r}]: {metrics}. If not, it is a "
    "bug: no refactoring may move them."
  )
  tiny.assert_golden(metrics, GOLDEN.get(name, {}), message)


class ToyGenerator(nn.Module):
  """Shows a batch's statistics in all, and each key's noise in its image."""

  latent_dim: int = 4

  @nn.compact
  def __call__(self, latents, labels=None, keys=None, train=False):
    x = nn.BatchNorm(
      use_running_average=not train, axis_name=partitioning.BATCH_AXES
    )(nn.Dense(3)(latents))
    if keys is not None:
      x += jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    return jnp.broadcast_to(x[:, None, None], (len(x), 8, 8, 3))


class ToyDiscriminator(nn.Module):
  """Its logit is the mean of an image, and the noise of its key."""

  @nn.compact
  def __call__(self, images, labels=None, keys=None, train=False):
    logits = nn.Dense(1)(jnp.mean(images, axis=(1, 2)))[:, 0]
    if keys is not None:
      logits += jax.vmap(jax.random.normal)(keys)
    return logits


@functools.cache
def toys():
  """Returns a state of toy networks on two devices, and their steps."""
  nets = networks.Networks(ToyGenerator(), ToyDiscriminator(), "xla")
  options = setting("pairs", num_devices=2, d_steps=3) | {"nets": nets}
  steps = (gan_step.d_step, gan_step.g_step, gan_step.train_step)
  return train_state.init_train_state(**options), *(
    jax.jit(functools.partial(step, **options)) for step in steps
  )


def test_networks_of_other_kinds_keep_statistics_and_draw_from_the_keys():
  state, d_step, g_step, _ = toys()
  batch = batch_of("default")
  after_d, metrics = d_step(state, batch)
  after, _ = g_step(after_d, batch)
  z_keys, _, _, _, g_keys, d_keys = gan_step.split_keys(KEYS, 6)
  draw = jax.vmap(jax.random.normal, in_axes=(0, None))
  x = draw(z_keys, (4,)) @ state.g_params["Dense_0"]["kernel"]
  fake = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) + draw(g_keys, (3,))
  logits = fake @ state.d_params["Dense_0"]["kernel"][:, 0]
  logits += draw(gan_step.split_keys(d_keys, 2)[1], ())
  np.testing.assert_allclose(metrics["scores/fake"], logits.mean(), atol=1e-5)
  # Statistics are those of both devices, and move in the generator's own step.
  tiny.assert_bit_equal(after_d.g_model_state, state.g_model_state)
  mean = after.g_model_state["batch_stats"]["BatchNorm_0"]["mean"]
  np.testing.assert_allclose(mean, 0.01 * x.mean(0), atol=1e-6)


def test_g_takes_the_last_batch_of_a_step():
  state, d_step, g_step, train_step = toys()
  images = tiny.random_images(config_of("pairs"), 3)
  key = jax.random.key(0)
  *d_keys, g_keys = jax.random.split(key, (4, 8))
  after, metrics = train_step(state, {"images": images, "labels": None}, key)
  for x, keys in zip(images, d_keys):
    state, _ = d_step(state, toy_batch(x, keys))
  # The relativistic loss of G compares with real images.
  losses = [g_step(state, toy_batch(x, g_keys))[1]["loss/g"] for x in images]
  np.testing.assert_allclose(metrics["loss/g"], losses[-1], rtol=1e-6)
  assert np.all(np.abs(np.array(losses[:-1]) - losses[-1]) > 1e-4)
  assert after.step == 1


@functools.cache
def train_steps(num_devices, fsdp=1, **changes):
  config = tiny.tiny_config(CONFIGS["default"], **changes)
  nets = networks.build(config)
  mesh = partitioning.create_mesh(jax.devices()[:num_devices], fsdp)
  train_steps = gan_step.make_train_steps(config, nets, mesh)
  shardings = train_state.state_shardings(config, nets, mesh)

  def run(state, *batches):
    """Returns the state and the metrics after calls of two steps each."""
    state = jax.device_put(jax.tree.map(jnp.copy, state), shardings)
    metrics = []
    for images in batches:
      batch = {"images": images, "labels": None}
      state, call_metrics = train_steps(
        state,
        partitioning.global_batch(mesh, batch, axis=2),
        int(state.step),
      )
      metrics.append(tiny.to_host(call_metrics))
    return state, metrics

  return run


# 3 calls of 2 steps of 2 batches for D.
BATCHES = tiny.random_images(tiny.tiny_config(), 3, 2, 2)


def test_train_steps_are_steps_of_d_and_one_of_g_in_turn():
  state = state_of("default")
  after, (means,) = train_steps(1)(state, BATCHES[0])
  d_step, g_step = (
    compiled(step, "default") for step in (gan_step.d_step, gan_step.g_step)
  )
  metrics = []
  for t, batches in enumerate(BATCHES[0]):
    key = jax.random.fold_in(state.key, t)
    *d_keys, g_keys = jax.random.split(key, (3, 8))
    batches = [{"images": images, "labels": None} for images in batches]
    for batch, keys in zip(batches, d_keys):
      state, d_metrics = d_step(state, {**batch, "keys": keys})
      metrics.append(d_metrics)
    state, g_metrics = g_step(state, {**batches[-1], "keys": g_keys})
    metrics.append(g_metrics)
    state = state.replace(step=state.step + 1)
  tiny.assert_bit_equal(after, state)
  for name, value in means.items():
    by_hand = [m[name] for m in metrics if name in m]
    assert len(by_hand) == (2 if name.endswith("/g") else 4)
    np.testing.assert_allclose(value, np.mean(by_hand), rtol=1e-6, atol=1e-7)


def test_run_resumed_from_host_memory_is_bit_for_bit_the_same():
  state = state_of("default")
  whole, metrics = train_steps(1)(state, *BATCHES)
  half, _ = train_steps(1)(state, *BATCHES[:1])
  saved = tiny.to_host(half)
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(saved))
  resumed = tiny.from_host(saved, like=half)
  resumed, resumed_metrics = train_steps(1)(resumed, *BATCHES[1:])
  assert resumed.step == 6
  tiny.assert_bit_equal(resumed, whole)
  tiny.assert_bit_equal(resumed_metrics, metrics[1:])


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_step_that_is_not_finite_is_not_taken(policy, monkeypatch):
  def train_step(state, batch, unused_key, **unused_options):
    bad = batch["images"][0, 0, 0, 0, 0] == 255
    params = jax.tree.map(lambda x: x + 1.0, state.d_params)
    state = state.replace(step=state.step + 1, d_params=params)
    return state, {"loss/d": jnp.where(bad, jnp.inf, state.step)}

  monkeypatch.setattr(gan_step, "train_step", train_step)
  train_steps = gan_step.make_train_steps(
    **setting("default", on_nonfinite=policy)
  )
  images = np.zeros((4, *BATCHES[0].shape[1:]), np.uint8)
  images[1] = 255  # the second of four steps
  batch = {"images": images, "labels": None}
  state = jax.tree.map(jnp.copy, state_of("default"))
  before = tiny.leaves_by_name(tiny.to_host(state.d_params))
  state, metrics = train_steps(state, batch, 0)
  assert state.step == {"stop": 1, "skip": 4}[policy]
  for name, leaf in tiny.leaves_by_name(state.d_params).items():
    moved = {"stop": 1, "skip": 3}[policy]
    np.testing.assert_allclose(leaf, before[name] + moved, rtol=1e-6)
  if policy == "skip":
    assert metrics["steps/skipped"] == 1
    np.testing.assert_allclose(metrics["loss/d"], (1 + 3 + 4) / 3)
  # Calls that were on their way leave a state that stopped as it is.
  state, _ = train_steps(state, batch, 4)
  assert state.step == {"stop": 1, "skip": 8}[policy]


def test_every_step_draws_anew():
  state = state_of("default")
  _, (first,) = train_steps(1)(state, BATCHES[0])
  later = state.replace(step=jnp.int32(2))
  _, (second,) = train_steps(1)(later, BATCHES[0])
  assert all(first[key] != second[key] for key in first)


@pytest.mark.slow  # shared state, and parts on two devices, show the same
@pytest.mark.parametrize("num_devices", [2, 8])
def test_many_devices_compute_what_one_does(num_devices):
  one, many = (
    train_steps(n)(state_of("default"), BATCHES[0]) for n in (1, num_devices)
  )
  for leaf in jax.tree.leaves(many[0]):
    assert len(leaf.sharding.device_set) == num_devices
    assert leaf.sharding.is_fully_replicated
  assert_same(many, one)


@pytest.mark.parametrize(
  "name, num_devices, changes",
  [
    ("pairs", 2, dict(accumulation=2)),
    pytest.param("default", 2, dict(accumulation=4), marks=pytest.mark.slow),
    pytest.param("pairs", 1, dict(remat=True), marks=pytest.mark.slow),
  ],
)
def test_parts_devices_and_remat_leave_the_step_as_it_is(
  name, num_devices, changes
):
  state, batch = state_of(name), batch_of(name)
  assert_same(
    run(name, state, batch, num_devices, **changes), run(name, state, batch)
  )


@pytest.mark.slow
def test_shared_state_and_remat_leave_the_steps_as_they_are(monkeypatch):
  monkeypatch.setattr(partitioning, "MIN_SHARDED_SIZE", 64)
  config, nets = config_of("default"), setting("default")["nets"]
  mesh = partitioning.create_mesh(fsdp=4)
  plain, state = (
    state_of("default"),
    train_state.init_train_state(config, nets, mesh),
  )
  # Drawn alike, but for the last bits, which a program of another layout rounds
  # otherwise; u and sigma_init are computed, in another order of sums.
  for network in ("g_params", "d_params"):
    new, old = (
      tiny.leaves_by_name(tiny.to_host(getattr(x, network)))
      for x in (state, plain)
    )
    for name, leaf in old.items():
      np.testing.assert_array_max_ulp(new[name], leaf, 8)
  after = train_steps(8, fsdp=4, remat=True)(state, BATCHES[0])
  old, new = tiny.leaves_by_name(state), tiny.leaves_by_name(after[0])
  for name in ("g_params", "g_ema_params", "g_opt_state/0/nu", "d_params"):
    block = name + "/block0/mlp_in/kernel"
    kernel = new[block]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    assert kernel.sharding.is_equivalent_to(old[block].sharding, kernel.ndim)
  assert_same(after, train_steps(1)(plain, BATCHES[0]))


def assert_same(actual, expected):
  """Compares (state, metrics) that were summed in another order."""
  for new, old in zip(*map(jax.tree.leaves, (actual[1], expected[1]))):
    np.testing.assert_allclose(new, old, rtol=1e-5, atol=2e-6)
  assert_close_but_for_order(actual[0], expected[0])
  for key in ("d_model_state", "logit_ema"):
    new, old = (
      tiny.leaves_by_name(tiny.to_host(getattr(after, key)))
      for after, _ in (actual, expected)
    )
    for name, leaf in old.items():
      np.testing.assert_allclose(new[name], leaf, atol=2e-6, err_msg=name)


def assert_close_but_for_order(actual, expected):
  """Compares gradients and parameters after sums in another order.

  With b1 = 0 Adam divides by about |g|, and so makes much of the rounding of
  the smallest gradients, even of their sign. Parameters may differ by a
  hundredth of an update where the gradient is clear of its own tolerance, and
  by two updates elsewhere.
  """
  for network, *trees in zip("gd", gradients(actual), gradients(expected)):
    rate = config_of("default")[f"{network}_optimizer"].learning_rate
    trees += [getattr(s, f"{network}_params") for s in (actual, expected)]
    trees = [tiny.leaves_by_name(tiny.to_host(tree)) for tree in trees]
    for name in trees[0]:
      g, expected_g, p, expected_p = (tree[name] for tree in trees)
      np.testing.assert_allclose(
        g, expected_g, atol=1e-5 * np.max(np.abs(expected_g)), err_msg=name
      )
      is_clear = np.abs(expected_g) > 1e-3 * np.max(np.abs(expected_g))
      updates = np.where(is_clear, 0.01, 2.0)
      excess = np.abs(p - expected_p) - 2e-7 * np.abs(expected_p)
      assert np.all(excess <= updates * rate), name


def test_state_and_metrics_stay_float32_under_bfloat16():
  state, batch = state_of("pairs"), batch_of("pairs")
  batch = jax.tree.map(lambda x: x[None], batch)  # one D step
  keys = batch.pop("keys")
  options = setting("pairs", dtype="bfloat16")
  step = functools.partial(gan_step.train_step, **options)
  after, metrics = jax.eval_shape(step, state, batch, keys[0, 0])
  assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(
    lambda x: x.dtype, state
  )
  assert all(x.dtype == jnp.float32 for x in metrics.values())


def test_bfloat16_reaches_neither_logits_nor_sigma():
  state = state_of("default")
  discriminator = setting("default", dtype="bfloat16")["nets"].discriminator
  images = to_float(IMAGES)
  logits, updates = jax.jit(
    functools.partial(discriminator.apply, mutable=["spectral"])
  )(state.d_variables, images)
  assert logits.dtype == jnp.float32
  # Rounded to bfloat16, all would have the last 16 bits zero.
  assert np.any(np.asarray(logits).view(np.uint32) & 0xFFFF)
  error = logits - discriminate(
    "hidden", state.d_params, state.d_model_state, images
  )
  assert 0 < np.max(np.abs(error)) < 0.02  # the layers do round: 2**-8 each
  new_u = tiny.leaves_by_name(updates["spectral"])
  for name, expected in iterate_u(state).items():
    np.testing.assert_allclose(new_u[name], expected, atol=1e-6, err_msg=name)


def test_samples_are_drawn_from_the_moving_average(tmp_path):
  state, options = state_of("default"), setting("default")
  config = tiny.tiny_config(num_sample_images=4)
  grids = []

  class Writer:
    spared = staticmethod(contextlib.nullcontext)

    def write(self, step, scalars, images):
      assert np.isfinite(list(scalars.values())).all()
      grids.append(images["samples"])

  writer = monitor.SampleWriter(
    config, tmp_path, options["nets"], options["mesh"], IMAGES, None, Writer()
  )
  metrics = {"gradients/d": 1.0, "gradients/g": 1.0}
  zeros = jax.tree.map(jnp.zeros_like, state.g_params)
  for g_params, g_ema_params in (
    (state.g_params, state.g_params),
    (zeros, state.g_params),
    (state.g_params, zeros),
  ):
    state = state.replace(g_params=g_params, g_ema_params=g_ema_params)
    writer.write(0, state, metrics)
  both, averaged, raw = grids
  np.testing.assert_array_equal(averaged, both)
  assert np.std(raw) == 0.0 and np.std(averaged) > 0.0
