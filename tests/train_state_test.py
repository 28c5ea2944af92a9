import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vitgan_jax import train_state


@pytest.fixture(scope="module")
def state():
  return train_state.create_train_state(tiny.tiny_config())


def test_state_is_a_function_of_the_seed(state):
  again = train_state.create_train_state(tiny.tiny_config())
  tiny.assert_bit_equal(again, state)


@pytest.mark.parametrize("field", ["g_params", "d_params", "key"])
def test_another_seed_gives_another_state(state, field):
  other = train_state.create_train_state(tiny.tiny_config(seed=1))
  leaves, others = (
    tiny.leaves_by_name(tiny.to_host(getattr(s, field))) for s in (state, other)
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
  tiny.assert_bit_equal(state.g_ema_params, state.g_params)
  assert state.logit_ema == {"real": 0.0, "fake": 0.0}


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
  assert {n for n in names if n.startswith("d_spectral/")} == {
    f"d_spectral/{layer}/norm/{variable}"
    for layer in layers
    for variable in ("u", "sigma_init")
  }


def test_without_spectral_normalisation_the_collection_is_empty():
  config = tiny.tiny_config({"discriminator.spectral_norm": "none"})
  state = jax.eval_shape(lambda: train_state.create_train_state(config))
  assert not jax.tree.leaves(state.d_spectral)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_float32_whatever_the_computation_is(dtype):
  config = tiny.tiny_config(dtype=dtype)
  state = jax.eval_shape(lambda: train_state.create_train_state(config))
  for name, leaf in tiny.leaves_by_name(state).items():
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
      assert leaf.dtype == jnp.float32, name
  for model in train_state.build_models(config):
    assert model.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("which, rate", [(0, 0.03), (1, 0.005)])
@pytest.mark.parametrize("b1", [0.0, 0.5])
def test_optimisers_are_adam_with_the_configs_numbers(which, rate, b1):
  b2, eps = 0.99, 1e-3  # an eps that can be seen
  config = tiny.tiny_config(
    {
      "optimizer.g_learning_rate": 0.03,
      "optimizer.d_learning_rate": 0.005,
      "optimizer.b1": b1,
      "optimizer.b2": b2,
      "optimizer.eps": eps,
    }
  )
  optimizer = train_state.build_optimisers(config)[which]
  rng = np.random.default_rng(0)
  x = rng.normal(size=5)
  params = jnp.asarray(x, jnp.float32)
  opt_state = optimizer.init(params)
  m, v = np.zeros(5), np.zeros(5)
  for t in range(1, 4):
    gradient = rng.normal(size=5) * 10.0 ** np.arange(-3, 2)
    m = b1 * m + (1 - b1) * gradient
    v = b2 * v + (1 - b2) * gradient**2
    x -= rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    updates, opt_state = optimizer.update(
      jnp.asarray(gradient, jnp.float32), opt_state, params
    )
    params += updates
    np.testing.assert_allclose(params, x, rtol=2e-6)


def test_default_optimiser_is_the_papers():
  adam = tiny.tiny_config().optimizer
  assert (adam.b1, adam.b2) == (0.0, 0.99)
  assert adam.g_learning_rate == adam.d_learning_rate == 2e-3


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
