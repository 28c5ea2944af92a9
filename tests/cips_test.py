import jax
import numpy as np
import pytest
import torch
from torch.nn import functional

from configs import cips_cifar10
from vitgan_jax.errors import ConfigError
from vitgan_jax.models import cips, networks

SIZE, FEATURES, LATENT = 8, 6, 5
GENERATOR = cips.Generator(
  image_size=SIZE,
  num_classes=0,
  latent_dim=LATENT,
  mapping_depth=2,
  mapping_lr_multiplier=0.01,
  base_channels=32,  # 6 channels at 4 px, 4 at 8
  max_channels=FEATURES,
)
W = np.random.default_rng(0).normal(size=(3, LATENT)).astype(np.float32)


def equalized(p, x):
  fan_in = len(p["kernel"])
  y = x @ torch.tensor(p["kernel"]) / fan_in**0.5
  return y + torch.tensor(p["bias"])


def lrelu(x):
  return functional.leaky_relu(x, 0.2) * 2**0.5


def layer(p, x, w, noise):
  """One kernel for each image, demodulated as it stands."""
  kernel = torch.tensor(p["conv"]["kernel"])[0, 0] / x.shape[-1] ** 0.5
  kernels = equalized(p["style"], w)[:, :, None] * kernel
  kernels = kernels / torch.sqrt(torch.sum(kernels**2, 1, keepdim=True) + 1e-8)
  y = torch.einsum("bhwi,bio->bhwo", x, kernels)
  y = y + float(p["noise_scale"]) * torch.tensor(noise)
  return lrelu(y + torch.tensor(p["conv"]["bias"]))


def torch_images(p, w, noise):
  w = torch.tensor(w)
  axis = torch.linspace(-1, 1, SIZE)
  x = axis.expand(SIZE, SIZE)
  coordinates = torch.stack([x, x.T], dim=-1)
  waves = torch.sin(
    coordinates @ torch.tensor(p["frequencies"]) + torch.tensor(p["phase"])
  )
  x = torch.cat([waves, torch.tensor(p["embedding"])], dim=-1)
  x = layer(p["layer0"], x.expand(3, -1, -1, -1), w, noise[0])
  images = 0.0
  for i in (1, 3):
    x = layer(p[f"layer{i}"], x, w, noise[i])
    x = layer(p[f"layer{i + 1}"], x, w, noise[i + 1])
    rgb = p[f"rgb{i + 1}"]
    style = equalized(rgb["style"], w)[:, None, None]
    images = images + equalized(rgb["rgb"], x * style)
  return images.numpy()


@pytest.mark.parametrize("is_noisy", [False, True])
def test_generator_equals_its_torch_twin(is_noisy, monkeypatch):
  shapes = jax.eval_shape(GENERATOR.init, jax.random.key(0), W)["params"]
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: rng.normal(0.2, 0.7, x.shape).astype(np.float32), shapes
  )
  assert params["layer4"]["conv"]["kernel"].shape == (1, 1, 4, 4)
  noise = np.zeros((5, 3, SIZE, SIZE, 1), np.float32)
  if is_noisy:
    noise = rng.normal(size=noise.shape).astype(np.float32)
  monkeypatch.setattr(cips, "draw_noise", lambda keys, sizes: list(noise))
  images = jax.jit(
    lambda params: GENERATOR.apply({"params": params}, W, method="synthesize")
  )(params)
  expected = torch_images(params, W, noise)
  np.testing.assert_allclose(
    images, expected, rtol=1e-4, atol=1e-4 * np.std(expected)
  )


def test_pixels_do_not_see_one_another():
  variables = jax.jit(GENERATOR.init)(jax.random.key(0), W)

  def image(embedding):
    params = {**variables["params"], "embedding": embedding}
    return GENERATOR.apply({"params": params}, W[:1], method="synthesize")[0]

  embedding = variables["params"]["embedding"]
  changed = embedding.at[2, 5].add(1.0)
  where = np.any(jax.jit(image)(changed) != jax.jit(image)(embedding), axis=-1)
  assert np.argwhere(where).tolist() == [[2, 5]]


@pytest.mark.parametrize("size, millions", [(32, 8.94), (64, 11.82)])
def test_parameters_are_those_of_the_released_code(size, millions):
  config = cips_cifar10.get_config()
  config.data.image_size = size
  generator = networks.build(config).generator
  latents = np.zeros((1, 512), np.float32)
  shapes = jax.eval_shape(generator.init, jax.random.key(0), latents)
  count = sum(x.size for x in jax.tree.leaves(shapes["params"]))
  assert round(count / 1e6, 2) == millions


def test_sizes_that_cannot_be_are_refused():
  config = cips_cifar10.get_config("smoke")
  config.data.image_size = 24
  with pytest.raises(ConfigError, match="kind='cips' doubles from 4 pixels"):
    networks.check(config)
