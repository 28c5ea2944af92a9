import jax
import numpy as np
import pytest

from configs import digits
from vitgan_jax import latent_space, sample
from vitgan_jax.models import networks


def build(kind, num_classes=0):
  """Returns the networks and variables of a generator in its smoke size."""
  config = digits.get_config(f"smoke,g={kind}")
  config.data.num_classes = num_classes
  nets = networks.build(config)
  latents = np.ones((2, nets.generator.latent_dim), np.float32)
  labels = np.zeros(2, int) if num_classes else None
  variables = jax.jit(nets.generator.init)(jax.random.key(0), latents, labels)
  return nets, variables


@pytest.mark.parametrize(
  "kind, num_classes, expected",
  [
    ("vitgan", 0, True),
    ("gat", 3, True),
    ("ganformer", 0, True),
    ("biggan", 3, False),
  ],
)
def test_mapping_networks_are_told_from_their_absence(
  kind, num_classes, expected
):
  nets, variables = build(kind, num_classes)
  assert latent_space.has_mapping_network(nets, variables) == expected


def test_directions_are_those_of_an_svd(digits_run, monkeypatch):
  monkeypatch.setattr(latent_space, "_NUM_LATENTS", 2000)
  nets = networks.build(digits_run.config)
  variables = jax.device_get(digits_run.state.g_ema_variables)
  found = latent_space.directions(nets, variables, 5)
  # The same latents, through the network one layer after the other.
  z = np.asarray(jax.random.normal(jax.random.key(0), (2000, 32)), np.float64)
  w = z / np.sqrt((z**2).mean(axis=1, keepdims=True))
  params, multiplier = variables["params"]["mapping"], 0.01
  for i in range(2):
    layer = jax.tree.map(np.float64, params[f"dense{i}"])
    scale = multiplier / np.sqrt(w.shape[1])
    w = w @ (layer["kernel"] * scale) + layer["bias"] * multiplier
    w = np.sqrt(2) * np.where(w > 0, w, 0.2 * w)
  _, values, vectors = np.linalg.svd(w - w.mean(axis=0), full_matrices=False)
  expected = vectors[:5] * values[:5, None] / np.sqrt(len(w) - 1)
  lengths = np.linalg.norm(expected, axis=1)
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), lengths, rtol=1e-3)
  cosines = np.abs((found * expected).sum(axis=1)) / lengths**2
  np.testing.assert_allclose(cosines, 1, atol=1e-3)


def test_directions_of_several_latents_are_those_of_all_together(monkeypatch):
  monkeypatch.setattr(latent_space, "_NUM_LATENTS", 500)
  nets, variables = build("ganformer")
  w = latent_space.deviations(nets, variables)
  found = latent_space.directions(nets, variables, 3)
  assert found.shape == (3, *w.shape[1:]) == (3, 4, 8)
  covariance = np.cov(w.reshape(500, -1), rowvar=False)
  variances = np.linalg.eigvalsh(covariance)[::-1]
  squares = (found.reshape(3, -1) ** 2).sum(axis=1)
  np.testing.assert_allclose(squares, variances[:3], rtol=1e-4)


def test_deviations_are_from_the_mean_of_the_class(monkeypatch):
  monkeypatch.setattr(latent_space, "_NUM_LATENTS", 3000)
  nets, variables = build("vitgan", 3)
  found = latent_space.deviations(nets, variables)
  means = [found[i::3].mean(axis=0) for i in range(3)]
  # The mean was that of a thousand other latents.
  assert np.abs(means).max() < 0.2 * found.std()
  classes = sample.mean_w(nets, variables)
  assert np.abs(classes[0] - classes[1]).max() > 0.4 * found.std()


def test_loops_close_and_keep_the_length_of_latents():
  latents = latent_space.loops(0, 40, 3, 64, sigma=4)
  assert latents.shape == (40, 3, 64)
  np.testing.assert_allclose((latents**2).sum(axis=-1), 64, rtol=1e-5)
  steps = np.linalg.norm(latents - np.roll(latents, 1, axis=0), axis=-1)
  # The step from the last to the first is as the others.
  assert steps.min() > 0 and steps[0].max() < 2 * np.median(steps)
  # Half a round away it is another latent.
  far = (latents[0] * latents[20]).sum(axis=-1) / 64
  assert np.abs(far).max() < 0.7
