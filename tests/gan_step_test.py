import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.losses_test import REFERENCE as ADVERSARIAL_REFERENCE
from vitgan_jax import gan_step, monitor, partitioning, train_state

KEY = jax.random.key(7)

# What a step computes can be known from outside in these: no random draws.
PLAIN = tiny.NO_AUGMENTATION | {"data.flip": False, "loss.bcr_weight": 0.0}
CONFIGS = {
  "default": {
    "ema.half_life_kimg": 0.016,  # two steps
    "ema.ramp_up": 0.0,
    "optimizer.d_learning_rate": 1e-3,
  },
  "penalties": PLAIN
  | {
    "loss.r1_gamma": 2.0,
    "loss.r2_gamma": 0.5,
    "loss.gradient_penalty_every": 4,
    "loss.lecam_weight": 0.3,
  },
  "rpgan": PLAIN | {"loss.adversarial": "rpgan"},
  "hinge": PLAIN | {"loss.adversarial": "hinge", "data.flip": True},
  # A square that hides all of every image, for sure.
  "hidden": PLAIN
  | {
    "loss.bcr_weight": 10.0,
    "augment.probability": 1.0,
    "augment.cutout": 2.0,
  },
}
COLOR = np.array([0.5, -0.25, 0.1])  # of what `known_state` generates


@functools.cache
def config_of(name):
  return tiny.tiny_config(CONFIGS[name])


@functools.cache
def train_step(name):
  mesh = partitioning.create_mesh(jax.devices()[:1])
  step = jax.jit(gan_step.make_train_step(config_of(name), mesh))
  # Inputs that are on no mesh yet would be compiled for apart from outputs.
  replicated = partitioning.replicated(mesh)
  return lambda *args: step(*jax.device_put(args, replicated))


@pytest.fixture(scope="module")
def images():
  return tiny.random_images(tiny.tiny_config())


@pytest.fixture(scope="module")
def state():
  return train_state.create_train_state(tiny.tiny_config())


@pytest.fixture(scope="module")
def known_state(state):
  """A state whose generator makes images of one COLOR and whose u are exact."""

  def exact_u(path, u):
    if path[-1].key == "u":
      kernel = state.d_params
      for key in path[:-2]:
        kernel = kernel[key.key]
      matrix = np.asarray(kernel["kernel"]).reshape(-1, u.size)
      u = np.linalg.svd(matrix)[2][0].astype(np.float32)
    return u

  g_params = jax.tree.map(lambda x: x, state.g_params)  # new dicts
  rgb = g_params["decoder"]["rgb"]
  rgb["kernel"] = jnp.zeros_like(rgb["kernel"])
  rgb["bias"] = jnp.asarray(COLOR, jnp.float32)
  return state.replace(
    step=jnp.int32(4),
    g_params=g_params,
    d_spectral=jax.tree_util.tree_map_with_path(exact_u, state.d_spectral),
    logit_ema={"real": jnp.float32(0.3), "fake": jnp.float32(-0.2)},
  )


@functools.cache
def discriminator_functions():
  """Returns jitted logits(params, spectral, images) and their slopes."""
  _, discriminator = train_state.build_models(tiny.tiny_config())

  def logits(params, spectral, x):
    return discriminator.apply({"params": params, "spectral": spectral}, x)

  slopes = jax.grad(lambda *args: jnp.sum(logits(*args)), argnums=2)
  return jax.jit(logits), jax.jit(slopes)


def discriminate(params, spectral, x):
  x = np.broadcast_to(x, (8, 8, 8, 3)).astype(np.float32)
  logits = discriminator_functions()[0](params, spectral, x)
  return np.asarray(logits, np.float64)


def half_squared_slope(params, spectral, x):
  x = np.broadcast_to(x, (8, 8, 8, 3)).astype(np.float32)
  slopes = discriminator_functions()[1](params, spectral, x)
  return 0.5 * np.mean(np.sum(np.square(slopes, dtype=np.float64), (1, 2, 3)))


def reference_d(name, params, state, images):
  """Returns (loss with penalties, metrics) of D on `known_state`, in numpy."""
  config = config_of(name)
  d = functools.partial(discriminate, params, state.d_spectral)
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
  if name == "penalties":
    metrics["penalty/lecam"] = np.mean((real_logits + 0.2) ** 2) + np.mean(
      (fake_logits - 0.3) ** 2
    )
    loss += 0.3 * metrics["penalty/lecam"]
    is_turn = state.step % 4 == 0
    slope = functools.partial(half_squared_slope, params, state.d_spectral)
    # Lazy: four times as much every fourth step.
    metrics["penalty/r1"] = 4 * slope(real) if is_turn else 0.0
    metrics["penalty/r2"] = 4 * slope(fake) if is_turn else 0.0
    loss += 2.0 * metrics["penalty/r1"] + 0.5 * metrics["penalty/r2"]
  return loss, metrics


def reference_g(name, color, after, images):
  """Returns the loss of a G that makes one color, against the updated D."""
  shown_real, shown_fake = images / 127.5 - 1.0, color
  if name == "hidden":
    shown_fake = 0.0
  loss_fn = ADVERSARIAL_REFERENCE[config_of(name).loss.adversarial][1]
  return loss_fn(
    *(
      discriminate(after.d_params, after.d_spectral, x)
      for x in (shown_real, shown_fake)
    )
  )


def mirror_symmetric(images):
  """Returns images that the random flip leaves alone."""
  return np.concatenate([images[:, :, :4], images[:, :, 3::-1]], axis=2)


def gradients(state):
  """Returns the last gradients (G's, D's): with b1 = 0 they are Adam's mu."""
  return state.g_opt_state[0].mu, state.d_opt_state[0].mu


@pytest.mark.parametrize(
  "name, turn",
  [
    ("penalties", 4),
    ("penalties", 5),
    ("rpgan", 4),
    ("hinge", 4),
    ("hidden", 4),
  ],
)
def test_metrics_match_numpy(name, turn, known_state, images):
  images = mirror_symmetric(images)
  before = known_state.replace(step=jnp.int32(turn))
  after, metrics = train_step(name)(before, images, KEY)
  _, expected = reference_d(name, before.d_params, before, images)
  expected["loss/g"] = reference_g(name, COLOR, after, images)
  assert metrics.keys() == expected.keys()
  for key, value in expected.items():
    assert metrics[key].dtype == jnp.float32 and metrics[key].shape == ()
    # Logits have an absolute error of 1e-6 in float32.
    np.testing.assert_allclose(
      metrics[key], value, rtol=2e-5, atol=2e-6, err_msg=key
    )


def norm(tree):
  return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))


@pytest.mark.parametrize(
  "name, turn",
  [("penalties", 4), ("penalties", 5), ("rpgan", 4), ("hidden", 4)],
)
def test_d_trains_on_the_sum_of_its_losses(name, turn, known_state, images):
  # The slope of the loss along its gradient is the norm of the gradient.
  before = known_state.replace(step=jnp.int32(turn))
  after, _ = train_step(name)(before, images, KEY)
  gradient = gradients(after)[1]
  h = 0.01 / norm(gradient)
  above, below = (
    reference_d(
      name,
      jax.tree.map(lambda p, g, s=s: p + s * g, before.d_params, gradient),
      before,
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


@pytest.mark.parametrize("name", ["penalties", "rpgan", "hinge"])
def test_g_trains_on_its_loss_against_the_updated_d(name, known_state, images):
  images = mirror_symmetric(images)
  after, _ = train_step(name)(known_state, images, KEY)
  gradient = gradients(after)[0]["decoder"]["rgb"]["bias"]
  h = 0.02
  differences = [
    (
      reference_g(name, COLOR + step, after, images)
      - reference_g(name, COLOR - step, after, images)
    )
    / (2 * h)
    for step in h * np.eye(3)
  ]
  # Central differences of float32 logits: 1e-6 / 0.04.
  np.testing.assert_allclose(gradient, differences, rtol=2e-3, atol=5e-5)


def test_neither_network_is_trained_on_images_that_are_not_augmented(
  known_state, images
):
  # The square hides all images, so that G can have no gradient, and without
  # the consistency D sees nothing but grey: see `reference_d`.
  after, _ = train_step("hidden")(known_state, images, KEY)
  for name, leaf in tiny.leaves_by_name(gradients(after)[0]).items():
    np.testing.assert_array_equal(leaf, 0.0, err_msg=name)


def test_every_parameter_is_trained(state, images):
  after, _ = train_step("default")(state, images, KEY)
  for network, gradient in zip("gd", gradients(after)):
    before_params, after_params = (
      tiny.leaves_by_name(getattr(s, f"{network}_params"))
      for s in (state, after)
    )
    for name, leaf in tiny.leaves_by_name(gradient).items():
      # Rounding would leave 1e-8.
      assert np.max(np.abs(leaf)) > 1e-6, (network, name)
      assert np.any(after_params[name] != before_params[name]), (network, name)


def test_a_step_is_one_adam_update_of_each_network(state, images):
  config = config_of("default")
  after, _ = train_step("default")(state, images, KEY)
  for network, gradient in zip("gd", gradients(after)):
    opt_state = getattr(after, f"{network}_opt_state")[0]
    assert opt_state.count == 1
    rate = config.optimizer[f"{network}_learning_rate"]
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
  for name, u in tiny.leaves_by_name(tiny.to_host(state.d_spectral)).items():
    if name.endswith("/u"):
      kernel = kernels[name.removesuffix("norm/u") + "kernel"]
      matrix = kernel.reshape(-1, u.size).astype(np.float64)
      u = matrix.T @ (matrix @ u)
      result[name] = u / np.linalg.norm(u)
  return result


@pytest.mark.parametrize("name", ["default", "penalties", "rpgan"])
def test_u_takes_one_power_iteration_a_step(name, state, images):
  rng = np.random.default_rng(0)

  def random_u(path, x):
    if path[-1].key == "u":
      x = rng.normal(size=x.shape).astype(np.float32)
      x /= np.linalg.norm(x)
    return x

  before = state.replace(
    # As exact as they are made, one iteration would hardly show.
    d_spectral=jax.tree_util.tree_map_with_path(random_u, state.d_spectral)
  )
  after, _ = train_step(name)(before, images, KEY)
  old, new = (
    tiny.leaves_by_name(tiny.to_host(s.d_spectral)) for s in (before, after)
  )
  once = iterate_u(before)
  twice = iterate_u(before.replace(d_spectral=after.d_spectral))
  for leaf, value in new.items():
    if leaf.endswith("sigma_init"):
      np.testing.assert_array_equal(value, old[leaf], err_msg=leaf)
      continue
    np.testing.assert_allclose(value, once[leaf], atol=1e-6, err_msg=leaf)
    if value.size > 1:
      assert np.max(np.abs(twice[leaf] - value)) > 1e-2, leaf


@pytest.mark.parametrize(
  "name, decay",
  # A half-life of 16 images; and one of 0.05 * the 32 seen: 1.6 images.
  [("default", 0.5 ** (8 / 16)), ("penalties", 0.5 ** (8 / 1.6))],
)
def test_average_moves_from_the_old_average_to_the_new_params(
  name, decay, known_state, images
):
  old = jax.tree.map(lambda x: x + 1.0, known_state.g_params)
  after, _ = train_step(name)(
    known_state.replace(g_ema_params=old), images, KEY
  )
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


def test_logit_averages_follow_the_scores(known_state, images):
  after, metrics = train_step("penalties")(known_state, images, KEY)
  for name, old in known_state.logit_ema.items():
    np.testing.assert_allclose(
      after.logit_ema[name],
      0.99 * old + 0.01 * metrics[f"scores/{name}"],
      rtol=1e-6,
    )


def test_flip_mirrors_half_of_the_images():
  images = np.random.default_rng(0).normal(size=(4096, 2, 3, 3))
  flipped = np.asarray(gan_step.random_flip(KEY, images.astype(np.float32)))
  images = images.astype(np.float32)
  same = np.all(flipped == images, axis=(1, 2, 3))
  mirrored = np.all(flipped == images[:, :, ::-1], axis=(1, 2, 3))
  assert np.all(same ^ mirrored)
  # Five standard deviations.
  np.testing.assert_allclose(np.mean(same), 0.5, atol=5 * 0.5 / 64)
  assert abs(np.corrcoef(same[1:], same[:-1])[0, 1]) < 5 / 64


@pytest.mark.parametrize("name, flips", [("rpgan", False), ("hinge", True)])
def test_real_images_are_flipped_where_the_config_says_so(
  name, flips, known_state, images
):
  _, metrics = train_step(name)(known_state, images, KEY)
  unflipped = reference_d(name, known_state.d_params, known_state, images)[1]
  difference = np.abs(metrics["scores/real"] - unflipped["scores/real"])
  assert (difference > 1e-4) if flips else (difference < 1e-5)


def test_images_span_minus_one_to_one():
  images = gan_step.to_float(jnp.array([0, 51, 255], jnp.uint8))
  assert images.dtype == jnp.float32
  np.testing.assert_allclose(images, [-1.0, -0.6, 1.0], atol=1e-7)


GOLDEN = {
  "default": {
    "loss/d": 1.46814,
    "loss/g": 0.6849694,
    "penalty/bcr": 0.08450165,
    "scores/fake": 0.1541541,
    "scores/real": 0.005759756,
  },
  "penalties": {
    "loss/d": 1.32492,
    "loss/g": 0.7196549,
    "penalty/lecam": 0.02453721,
    "penalty/r1": 0.06217844,
    "penalty/r2": 0.02717538,
    "scores/fake": -0.05596343,
    "scores/real": 0.07291094,
  },
  "rpgan": {
    "loss/d": 0.6328973,
    "loss/g": 0.7676988,
    "scores/fake": -0.05596343,
    "scores/real": 0.07291094,
  },
  "hinge": {
    "loss/d": 1.946384,
    "loss/g": 0.05831379,
    "scores/fake": -0.05596343,
    "scores/real": -0.002347248,
  },
}


@pytest.mark.parametrize("name", ["default", "penalties", "rpgan", "hinge"])
def test_golden_metrics_of_the_first_step(name, state, images):
  _, metrics = train_step(name)(state, images, KEY)
  metrics = {key: float(value) for key, value in metrics.items()}
  message = (
    "The first step of a run has changed. If it was meant to (another init, "
    "loss, augmentation, or order of the random draws), say so in the commit "
    f"and put these numbers into GOLDEN[{name!r}]: {metrics}. If not, it is a "
    "bug: no refactoring may move them."
  )
  tiny.assert_golden(metrics, GOLDEN.get(name, {}), message)


@functools.cache
def train_steps(num_devices):
  mesh = partitioning.create_mesh(jax.devices()[:num_devices])
  train_steps = gan_step.make_train_steps(config_of("default"), mesh)

  def run(state, *batches):
    """Returns the state and the metrics after calls of two steps each."""
    state = jax.device_put(
      jax.tree.map(jnp.copy, state), partitioning.replicated(mesh)
    )
    metrics = []
    for batch in batches:
      state, call_metrics = train_steps(
        state, partitioning.global_batch(mesh, batch, axis=1)
      )
      metrics.append(tiny.to_host(call_metrics))
    return state, metrics

  return run


@pytest.fixture(scope="module")
def batches():
  return tiny.random_images(tiny.tiny_config(), 3, 2)  # 3 calls of 2 steps


def test_scan_of_steps_equals_single_steps(state, batches):
  scanned, (scanned_metrics,) = train_steps(1)(state, batches[0])
  metrics = []
  for t, batch in enumerate(batches[0]):
    key = jax.random.fold_in(state.key, t)
    state, step_metrics = train_step("default")(state, batch, key)
    metrics.append(step_metrics)
  tiny.assert_bit_equal(scanned, state)
  for key, value in scanned_metrics.items():
    np.testing.assert_allclose(
      value, np.mean([m[key] for m in metrics]), rtol=1e-6
    )


def test_run_resumed_from_host_memory_is_bit_for_bit_the_same(state, batches):
  whole, metrics = train_steps(1)(state, *batches)
  half, _ = train_steps(1)(state, *batches[:1])
  saved = tiny.to_host(half)
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(saved))
  resumed = tiny.from_host(saved, like=half)
  resumed, resumed_metrics = train_steps(1)(resumed, *batches[1:])
  assert resumed.step == 6
  tiny.assert_bit_equal(resumed, whole)
  tiny.assert_bit_equal(resumed_metrics, metrics[1:])


def test_every_step_draws_anew(state, batches):
  _, (first,) = train_steps(1)(state, batches[0])
  later = state.replace(step=jnp.int32(2))
  _, (second,) = train_steps(1)(later, batches[0])
  assert all(first[key] != second[key] for key in first)


@pytest.mark.parametrize(
  "num_devices", [pytest.param(2, marks=pytest.mark.slow), 8]
)
def test_many_devices_compute_what_one_does(num_devices, state, batches):
  one, (one_metrics,) = train_steps(1)(state, batches[0])
  many, (many_metrics,) = train_steps(num_devices)(state, batches[0])
  for leaf in jax.tree.leaves(many):
    assert len(leaf.sharding.device_set) == num_devices
    assert leaf.sharding.is_fully_replicated
  for key, value in one_metrics.items():
    np.testing.assert_allclose(
      many_metrics[key], value, rtol=1e-5, atol=2e-6, err_msg=key
    )
  assert_close_but_for_order(many, one)


def assert_same_step(actual, expected):
  """Compares (state, metrics) after one step, summed in another order."""
  for key, value in expected[1].items():
    np.testing.assert_allclose(
      actual[1][key], value, rtol=1e-5, atol=2e-6, err_msg=key
    )
  assert_close_but_for_order(actual[0], expected[0])
  for key in ("d_spectral", "logit_ema"):
    new, old = (
      tiny.leaves_by_name(tiny.to_host(getattr(after, key)))
      for after, _ in (actual, expected)
    )
    for name, leaf in old.items():
      np.testing.assert_allclose(new[name], leaf, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
  "name, num_parts, num_devices",
  [
    ("default", 4, 2),
    pytest.param("penalties", 2, 1, marks=pytest.mark.slow),
    ("rpgan", 2, 1),
  ],
)
def test_step_in_micro_batches_is_that_of_the_whole_batch(
  name, num_parts, num_devices, state, images
):
  config = tiny.tiny_config(CONFIGS[name], accumulation=num_parts)
  mesh = partitioning.create_mesh(jax.devices()[:num_devices])
  step = jax.jit(gan_step.make_train_step(config, mesh))
  args = jax.device_put((state, images, KEY), partitioning.replicated(mesh))
  assert_same_step(step(*args), train_step(name)(state, images, KEY))


def test_micro_batches_stay_on_their_devices():
  mesh = partitioning.create_mesh(jax.devices()[:4])
  x = partitioning.global_batch(mesh, np.arange(32.0))
  part = jax.jit(
    lambda x: gan_step._gradient(
      4, mesh, lambda p, x: (p * x.sum(), ({}, x)), 1.0, x
    )
  )
  compiled = part.lower(x).compile()
  assert "all-reduce" in compiled.as_text()  # of the gradient
  for operation in ("all-gather", "all-to-all", "collective-permute"):
    assert operation not in compiled.as_text()
  gradient, (_, last) = part(x)
  assert gradient == 32 * 31 / 2 / 4
  np.testing.assert_array_equal(last, np.arange(3, 32, 4))


def test_rematerialised_step_is_the_same(state, images):
  assert_same_step(
    _remat_step()(state, images, KEY), train_step("default")(state, images, KEY)
  )


def _remat_step():
  config = tiny.tiny_config(CONFIGS["default"], remat=True)
  mesh = partitioning.create_mesh(jax.devices()[:1])
  step = gan_step.make_train_step(config, mesh)
  replicated = partitioning.replicated(mesh)
  return lambda *args: jax.jit(step)(*jax.device_put(args, replicated))


def test_state_that_devices_share_is_trained_as_one_that_each_has(
  batches, monkeypatch
):
  monkeypatch.setattr(partitioning, "MIN_SHARDED_SIZE", 64)
  config = config_of("default")
  mesh = partitioning.create_mesh(fsdp=4)
  state = train_state.init_train_state(config, mesh)
  one_device = partitioning.create_mesh(jax.devices()[:1])
  plain = train_state.init_train_state(config, one_device)
  # u and sigma_init are computed, in another order of sums.
  for network in ("g_params", "d_params"):
    tiny.assert_bit_equal(getattr(state, network), getattr(plain, network))
  old = {k: x.sharding for k, x in tiny.leaves_by_name(state).items()}
  train_steps_shared = gan_step.make_train_steps(config, mesh)
  after, metrics = train_steps_shared(
    state, partitioning.global_batch(mesh, batches[0], axis=1)
  )
  shared = tiny.leaves_by_name(after)
  for name in ("g_params", "g_ema_params", "g_opt_state/0/nu", "d_params"):
    block = name + "/block0/mlp_in/kernel"
    kernel = shared[block]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    assert kernel.sharding.is_equivalent_to(old[block], kernel.ndim)
  expected = train_steps(1)(plain, batches[0])
  for key, value in expected[1][0].items():
    np.testing.assert_allclose(
      metrics[key], value, rtol=1e-5, atol=2e-6, err_msg=key
    )
  assert_close_but_for_order(after, expected[0])


def assert_close_but_for_order(actual, expected):
  """Compares gradients and parameters after sums in another order.

  With b1 = 0 Adam divides by about |g|, and so makes much of the rounding of
  the smallest gradients, even of their sign. Parameters may differ by a
  hundredth of an update where the gradient is clear of its own tolerance, and
  by two updates elsewhere.
  """
  for network, *trees in zip("gd", gradients(actual), gradients(expected)):
    rate = config_of("default").optimizer[f"{network}_learning_rate"]
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


def test_state_and_metrics_stay_float32_under_bfloat16(state, images):
  config = tiny.tiny_config(CONFIGS["penalties"], dtype="bfloat16")
  mesh = partitioning.create_mesh(jax.devices()[:1])
  step = gan_step.make_train_step(config, mesh)
  after, metrics = jax.eval_shape(step, state, images, KEY)
  assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(
    lambda x: x.dtype, state
  )
  assert all(x.dtype == jnp.float32 for x in metrics.values())


def test_bfloat16_reaches_neither_logits_nor_sigma(state, images):
  config = tiny.tiny_config(dtype="bfloat16")
  _, discriminator = train_state.build_models(config)
  variables = {"params": state.d_params, "spectral": state.d_spectral}
  floats = np.asarray(gan_step.to_float(images))
  logits, updates = jax.jit(
    functools.partial(discriminator.apply, mutable=["spectral"])
  )(variables, floats)
  assert logits.dtype == jnp.float32
  # Rounded to bfloat16, all would have the last 16 bits zero.
  assert np.any(np.asarray(logits).view(np.uint32) & 0xFFFF)
  error = logits - discriminate(state.d_params, state.d_spectral, floats)
  assert 0 < np.max(np.abs(error)) < 0.02  # the layers do round: 2**-8 each
  new_u = tiny.leaves_by_name(updates["spectral"])
  for name, expected in iterate_u(state).items():
    np.testing.assert_allclose(new_u[name], expected, atol=1e-6, err_msg=name)


def test_samples_are_drawn_from_the_moving_average(state, images, tmp_path):
  config = tiny.tiny_config(num_sample_images=4)
  grids = []

  class Writer:
    def write(self, step, scalars, images):
      assert np.isfinite(list(scalars.values())).all()
      grids.append(images["samples"])

  mesh = partitioning.create_mesh(jax.devices()[:1])
  writer = monitor.SampleWriter(config, tmp_path, mesh, images, Writer())
  zeros = jax.tree.map(jnp.zeros_like, state.g_params)
  for g_params, g_ema_params in (
    (state.g_params, state.g_params),
    (zeros, state.g_params),
    (state.g_params, zeros),
  ):
    writer.write(0, state.replace(g_params=g_params, g_ema_params=g_ema_params))
  both, averaged, raw = grids
  np.testing.assert_array_equal(averaged, both)
  assert np.std(raw) == 0.0 and np.std(averaged) > 0.0
