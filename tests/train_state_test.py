import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vitgan_jax import partitioning, train_state
from vitgan_jax.models import networks


def state_shapes(config):
  return train_state.state_shapes(
    config, networks.build(config), partitioning.create_mesh()
  )


@functools.cache
def state_of_seed(seed):
  config = tiny.tiny_config(seed=seed)
  mesh = partitioning.create_mesh(jax.devices()[:1])
  return train_state.init_train_state(config, networks.build(config), mesh)


@pytest.fixture(scope="module")
def state():
  return state_of_seed(0)


def test_state_is_a_function_of_the_seed(state):
  tiny.assert_bit_equal(state_of_seed.__wrapped__(0), state)


def test_another_seed_gives_another_state(state):
  leaves, others = (
    tiny.leaves_by_name(tiny.to_host((s.key, s.g_params, s.d_params)))
    for s in (state, state_of_seed(1))
  )
  for name, leaf in leaves.items():
    constant_at_init = name.endswith("bias") or name.endswith("scale")
    assert constant_at_init or np.any(leaf != others[name]), name


def test_networks_do_not_share_their_random_numbers(state):
  g, d = (
    tiny.to_host(params["block0"]["mlp_in"]["kernel"])
    for params in (state.g_params, state.d_params)
  )
  assert g.shape == d.shape
  # Five standard errors of the correlation of 512 pairs.
  assert abs(np.corrcoef(g.ravel(), d.ravel())[0, 1]) < 5 / np.sqrt(g.size)


def test_run_starts_at_step_zero_with_the_average_at_the_generator(state):
  assert state.step == 0 and state.step.dtype == jnp.int32
  tiny.assert_bit_equal(state.g_ema_variables, state.g_variables)
  assert state.logit_ema == {"real": 0.0, "fake": 0.0}
  assert state.path_length == 0.0


def test_no_two_leaves_share_a_buffer(state):
  # The state is donated: an array that is in it twice could not be.
  arrays = [
    jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    else x
    for x in jax.tree.leaves(state)
  ]
  pointers = [x.unsafe_buffer_pointer() for x in arrays]
  assert len(set(pointers)) == len(pointers)


def test_every_d_kernel_has_its_spectral_variables_in_the_state(state):
  names = tiny.leaves_by_name(state).keys()
  layers = [
    name.removeprefix("d_params/").removesuffix("/kernel")
    for name in names
    if name.startswith("d_params/") and name.endswith("/kernel")
  ]
  assert len(layers) == 8  # embedding, tied q/k, value, out, MLP 2, head 2
  assert {n for n in names if n.startswith("d_model_state/")} == {
    f"d_model_state/spectral/{layer}/norm/{variable}"
    for layer in layers
    for variable in ("u", "sigma_init")
  }


def test_a_network_that_keeps_nothing_has_no_model_state(state):
  config = tiny.tiny_config({"discriminator.spectral_norm": "none"})
  assert state_shapes(config).d_model_state == {} == state.g_model_state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_float32_whatever_the_computation_is(dtype):
  config = tiny.tiny_config(dtype=dtype)
  for name, leaf in tiny.leaves_by_name(state_shapes(config)).items():
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
      assert leaf.dtype == jnp.float32, name
  for network in networks.build(config)[:2]:
    assert network.dtype == jnp.dtype(dtype)


def optimizers(g=None, d=None, **fields):
  """Returns (G's, D's) of a config with the given fields of each."""
  return train_state.build_optimizers(
    tiny.tiny_config(
      {f"g_optimizer.{name}": value for name, value in (g or {}).items()}
      | {f"d_optimizer.{name}": value for name, value in (d or {}).items()},
      **fields,
    )
  )


def parameters_over(optimizer, x, gradients):
  """Returns x [N] after each update by the gradients [T, N]."""
  params = jnp.asarray(x, jnp.float32)
  opt_state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  result = []
  for gradient in gradients:
    updates, opt_state = update(
      jnp.asarray(gradient, jnp.float32), opt_state, params
    )
    params += updates
    result.append(params)
  return np.array(result)


@pytest.mark.parametrize("which, rate", [(0, 0.03), (1, 0.005)])
@pytest.mark.parametrize(
  "name, b1, decay", [("adam", 0.0, 0.0), ("adam", 0.5, 0.0), ("adamw", 0.5, 2)]
)
def test_optimizers_are_those_of_the_config(which, rate, name, b1, decay):
  b2, eps = 0.99, 1e-3  # an eps that can be seen
  fields = dict(name=name, b1=b1, b2=b2, eps=eps, weight_decay=2.0)
  optimizer = optimizers(
    g=fields | {"learning_rate": 0.03}, d=fields | {"learning_rate": 0.005}
  )[which]
  rng = np.random.default_rng(0)
  x = rng.normal(size=5)
  gradients = rng.normal(size=(3, 5)) * 10.0 ** np.arange(-3, 2)
  actual = parameters_over(optimizer, x, gradients)
  m, v = np.zeros(5), np.zeros(5)
  for t, gradient in enumerate(gradients, start=1):
    m = b1 * m + (1 - b1) * gradient
    v = b2 * v + (1 - b2) * gradient**2
    adam = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    x -= rate * (adam + decay * x)
    np.testing.assert_allclose(actual[t - 1], x, rtol=2e-6)


def test_default_optimizers_are_the_papers():
  config = tiny.tiny_config()
  for adam in (config.g_optimizer, config.d_optimizer):
    assert (adam.name, adam.learning_rate) == ("adam", 2e-3)
    assert (adam.b1, adam.b2, adam.decay) == (0.0, 0.99, "constant")
    assert adam.warmup_kimg == adam.clip_norm == 0.0


def rates(optimizer, count):
  """Returns the learning rates of the first updates.

  Where all gradients are 1, each update of Adam is the rate itself.
  """
  x = parameters_over(optimizer, np.zeros(1), np.ones((count, 1)))[:, 0]
  return -np.diff(x, prepend=0.0)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_rate_warms_up_and_decays_by_the_images_of_an_update(warmup, decay):
  # G sees 8 images of each of two D steps in an update, D 8: of 192 images G
  # makes 12 updates, and D 24.
  fields = dict(learning_rate=0.5, decay=decay, warmup_kimg=warmup * 0.016)
  both = optimizers(g=fields, d=fields, d_steps=2, total_kimg=0.192)
  for optimizer, times in zip(both, (1, 2)):
    updates = np.arange(12 * times)
    start, end = warmup * times, 12 * times
    expected = np.full(end, 0.5)
    if decay == "cosine":
      expected *= (1 + np.cos(np.pi * (updates - start) / (end - start))) / 2
    if warmup:
      expected = np.where(updates < start, 0.5 * updates / start, expected)
    np.testing.assert_allclose(rates(optimizer, end), expected, atol=2e-6)


def test_gradients_are_clipped_by_their_norm_together():
  params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
  rng = np.random.default_rng(0)
  gradients = [
    {"a": scale * rng.normal(size=2), "b": scale * rng.normal(size=3)}
    for scale in (10.0, 0.01, 3.0)
  ]
  clipped, plain = (
    optimizers(d=dict(clip_norm=norm, b1=0.5, eps=1.0))[1]
    for norm in (0.25, 0.0)
  )
  states = clipped.init(params), plain.init(params)
  for gradient in gradients:
    norm = np.sqrt(sum(np.sum(x**2) for x in gradient.values()))
    by_hand = jax.tree.map(lambda x, n=norm: x * min(1, 0.25 / n), gradient)
    actual, first = clipped.update(
      jax.tree.map(jnp.float32, gradient), states[0], params
    )
    expected, second = plain.update(
      jax.tree.map(jnp.float32, by_hand), states[1], params
    )
    states = first, second
    for name in params:
      np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5)
  # The generator's own is off.
  assert optimizers(d=dict(clip_norm=0.25))[0].init(params)[0].count == 0


def test_average_of_the_start_halves_in_one_half_life():
  batch_size, half_life_kimg = 50, 2.0
  average, params = {"x": jnp.ones(3)}, {"x": jnp.zeros(3)}
  for step in range(40):  # 40 batches of 50 are 2,000 images
    decay = train_state.ema_decay(
      step * batch_size, batch_size, half_life_kimg, ramp_up=0
    )
    average = train_state.update_ema(average, params, decay)
  np.testing.assert_allclose(average["x"], 0.5, rtol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.999, 1.0])
def test_average_moves_by_one_minus_the_decay(decay):
  rng = np.random.default_rng(0)
  a, p = rng.normal(size=(2, 7)).astype(np.float32)
  average = train_state.update_ema({"x": a}, {"x": p}, decay)
  np.testing.assert_allclose(
    average["x"], decay * a + (1 - decay) * p, rtol=1e-5, atol=1e-7
  )


def test_average_takes_in_the_collections_that_are_averages():
  config = tiny.tiny_config(
    {"ema.half_life_kimg": 0.016, "ema.ramp_up": 0.0}, d_steps=2
  )
  state = state_of_seed(0).replace(
    g_params={"x": 3.0},
    g_ema_params={"x": 1.0},
    g_model_state={"batch_stats": {"mean": 5.0}, "spectral": {"u": 7.0}},
    g_ema_model_state={"batch_stats": {"mean": 1.0}, "spectral": {"u": 2.0}},
  )
  after = train_state.update_average(state, config)
  # Two D steps of 8 images are one half-life. The u belong to the parameters.
  assert after.g_ema_params == {"x": 2.0}
  assert after.g_ema_model_state == {
    "batch_stats": {"mean": 3.0},
    "spectral": {"u": 7.0},
  }


@pytest.mark.parametrize("images_seen", [128, 12_800, 400_000, 10_000_000])
def test_half_life_ramps_up_with_the_images_seen(images_seen):
  decay = train_state.ema_decay(
    jnp.int32(images_seen), 128, half_life_kimg=20.0, ramp_up=0.05
  )
  half_life = min(20_000, 0.05 * images_seen)
  # float32, where the exponent is up to 20.
  np.testing.assert_allclose(decay, 0.5 ** (128 / half_life), rtol=2e-6)


def test_ramp_up_begins_at_the_generator_itself():
  decay = train_state.ema_decay(jnp.int32(0), 128, 20.0, ramp_up=0.05)
  np.testing.assert_array_equal(decay, 0.0)
