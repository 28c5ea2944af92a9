import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vitgan_jax import diff_augment, gan_step, partitioning, train_state
from vitgan_jax.models import networks

torch = pytest.importorskip("torch")
from benchmarks import torch_train, torch_vitgan  # noqa: E402

KEY = jax.random.key(3)
STEP = 5  # of the state: enters Adam's bias corrections and the average's decay


@functools.cache
def config():
  return tiny.tiny_config(
    {
      "data.image_size": 16,
      "discriminator.overlap": 1,
      "augment.probability": 0.6,
      "loss.bcr_weight": 2.0,
      "ema.ramp_up": 0.5,
      "g_optimizer.b1": 0.5,
      "d_optimizer.b1": 0.5,
      "d_optimizer.learning_rate": 1e-3,
    }
  )


@functools.cache
def nets():
  return networks.build(config())


@functools.cache
def mesh():
  return partitioning.create_mesh(jax.devices()[:1])


@functools.cache
def state():
  """A GANState whose zeros and ones have moved, as in the midst of a run."""
  rng = np.random.default_rng(0)

  def move(path, x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    noise = rng.normal(size=x.shape).astype(np.float32)
    name = path[-1].key
    if name == "u":
      u = x + 0.3 * noise / np.sqrt(x.size)
      return u / jnp.linalg.norm(u)
    return x * (1.2 if name == "sigma_init" else 1.0) + 0.3 * noise

  def adam(x):
    inner, *rest = x
    # Gradients of these networks are about as large; far from zero, where a
    # step is the sign of a gradient and so that of its rounding error.
    nu = jax.tree.map(
      lambda v: jnp.asarray(rng.uniform(0.5, 2.0, v.shape), jnp.float32) * 1e-4,
      inner.nu,
    )
    mu = jax.tree.map(
      lambda m: jnp.asarray(rng.normal(size=m.shape), jnp.float32) * 1e-3,
      inner.mu,
    )
    return (inner._replace(count=jnp.int32(STEP), mu=mu, nu=nu), *rest)

  fresh = train_state.init_train_state(config(), nets(), mesh())
  names = ("g_params", "g_ema_params", "d_params", "d_model_state")
  return fresh.replace(
    step=jnp.int32(STEP),
    g_opt_state=adam(fresh.g_opt_state),
    d_opt_state=adam(fresh.d_opt_state),
    **{
      name: jax.tree_util.tree_map_with_path(move, getattr(fresh, name))
      for name in names
    },
  )


def to_torch(tree):
  return jax.tree.map(lambda x: torch.from_numpy(np.array(x)), tree)


def load_moments(optimizer, module, opt_state):
  adam = opt_state[0]
  means, squares = map(torch_vitgan.state_dict_of, (adam.mu, adam.nu))
  for name, parameter in module.named_parameters():
    optimizer.state[parameter] = {
      "step": torch.tensor(float(adam.count)),
      "exp_avg": means[name],
      "exp_avg_sq": squares[name],
    }


@pytest.fixture
def trainer():
  trainer = torch_train.Trainer(config(), state())
  for name in "gd":
    optimizer = getattr(trainer, f"{name}_optimizer")
    module = {"g": trainer.generator, "d": trainer.discriminator}[name]
    load_moments(optimizer, module, getattr(state(), f"{name}_opt_state"))
  return trainer


def test_generator_makes_the_same_images(trainer):
  latents = jax.random.normal(KEY, (4, config().generator.latent_dim))
  expected = jax.jit(nets().generator.apply)(state().g_variables, latents)
  assert np.std(expected) > 0.1
  with torch.no_grad():
    actual = trainer.generator(to_torch(latents)).permute(0, 2, 3, 1).numpy()
  # Rounding of float32, over some dozens of layers.
  np.testing.assert_allclose(actual, expected, atol=2e-5 * np.std(expected))


def test_discriminator_gives_the_same_logits(trainer):
  images = tiny.random_images(config()) / np.float32(127.5) - 1
  expected = jax.jit(nets().discriminator.apply)(state().d_variables, images)
  assert np.std(expected) > 0.1
  with torch.no_grad():
    actual = trainer.discriminator.eval()(to_torch(images).permute(0, 3, 1, 2))
  np.testing.assert_allclose(actual, expected, atol=2e-5)


def draws_of_step(d_keys, g_keys):
  """Draws as `train_step` does; see there, and the losses, for the keys."""
  c = config()

  def latents(keys):
    return gan_step.draw_latents(keys, c.generator.latent_dim)

  def augmentation(keys):
    draw = functools.partial(
      diff_augment.draw, size=c.data.image_size, **c.augment
    )
    draws = jax.vmap(draw)(keys)
    draws["color"] = [x[:, None, None, None] for x in draws["color"]]
    zoom, offset = draws["geometry"]
    return {**draws, "geometry": (zoom[:, None], offset)}

  z, flip, real, fake, _, _ = gan_step.split_keys(d_keys, 6)
  g_z, _, _, g_fake, _, _ = gan_step.split_keys(g_keys, 6)
  return (
    jax.vmap(jax.random.bernoulli)(flip)[:, None, None, None],
    (latents(z), augmentation(real), augmentation(fake)),
    (latents(g_z), augmentation(g_fake)),
  )


def assert_close(module, expected, before, share):
  """Asserts equality up to a share of the longest way that a weight went."""
  actual = module.state_dict()
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    moved = float((value - before[name]).abs().max())
    # A u of one number is 1 or -1.
    stays = ("sigma_init", "head_out.u")
    assert moved > 0 or name.endswith(stays), name
    np.testing.assert_allclose(
      actual[name], value, atol=share * moved, rtol=1e-6, err_msg=name
    )


def test_training_step_is_the_same(trainer):
  images = tiny.random_images(config())
  step = jax.jit(
    functools.partial(
      gan_step.train_step, config=config(), nets=nets(), mesh=mesh()
    )
  )
  batch = {"images": images[None], "labels": None}
  after, expected = step(
    *jax.device_put((state(), batch, KEY), partitioning.replicated(mesh()))
  )
  keys = jax.random.split(KEY, (2, config().batch_size))
  draws = to_torch(jax.jit(draws_of_step)(*keys))
  metrics = trainer.step(torch.from_numpy(images), draws)
  # Of the gradients the moments of Adam speak, below.
  expected = {k: v for k, v in expected.items() if "gradients/" not in k}
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(
      metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name
    )
  convert = torch_vitgan.state_dict_of
  before = state()
  for module, name in (
    (trainer.generator, "g_variables"),
    (trainer.generator_ema, "g_ema_variables"),
    (trainer.discriminator, "d_variables"),
  ):
    new, old = getattr(after, name), getattr(before, name)
    assert_close(module, convert(**new), convert(**old), share=1e-2)
