"""Tests of the discriminator as a whole."""

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose
import pytest

from tests.reference import dense, gelu, leaves, normal, standardise
from vitgan_jax.models import kinds
from vitgan_jax.models.discriminator import Discriminator
from vitgan_jax.models.layers import LayerNorm
from vitgan_jax.models.transformer import TransformerBlock

SMALL = dict(
  image_size=8,
  patch_size=4,
  overlap=2,
  width=16,
  depth=1,
  num_heads=2,
  mlp_dim=24,
)


def make_discriminator(**overrides):
  """Returns the default discriminator with other fields."""
  fields = kinds.DISCRIMINATORS["vitgan"].fields
  return Discriminator(**{**fields, "num_classes": 0, **overrides})


def init(module, *args):
  """Returns variables with noise on all parameters, also on zeros."""
  variables = jax.jit(module.init)(jax.random.key(0), *args)
  params = jax.tree.map(
    lambda p: np.asarray(p) + normal(*p.shape), variables["params"]
  )
  return {**variables, "params": params}


def reference_tokens(params, images, overlap, position_scale):
  """Returns [patches + positions ; class token] of 8 x 8 images, P = 4."""
  border = (overlap, overlap)
  padded = np.pad(images, [(0, 0), border, border, (0, 0)])
  tokens = []
  for i, j in np.ndindex(2, 2):
    window = padded[
      :, 4 * i : 4 * (i + 1) + 2 * overlap, 4 * j : 4 * (j + 1) + 2 * overlap
    ]
    patch = window.reshape(len(images), -1)
    centre = np.array([i - 0.5, j - 0.5])
    frequencies = position_scale * params["positions"]["frequencies"]
    tokens.append(
      dense(params["embedding"], patch)
      + np.sin(centre @ frequencies + params["positions"]["phase"])
    )
  tokens.append(np.broadcast_to(params["class_token"][0], (len(images), 16)))
  return np.stack(tokens, axis=1)


LABELS = np.array([4, 0, 4])


@pytest.mark.parametrize(
  "overlap, labels, pooling",
  [
    (0, None, "token"),
    (2, None, "token"),
    (4, None, "token"),
    (2, LABELS, "token"),
    (2, None, "mean"),
    (2, LABELS, "mean"),
  ],
)
def test_discriminator_matches_its_parts(overlap, labels, pooling):
  discriminator = make_discriminator(
    **{**SMALL, "overlap": overlap},
    num_classes=0 if labels is None else 5,
    spectral_norm="none",
    position_scale=2.0,
    pooling=pooling,
  )
  images = normal(3, 8, 8, 3)
  variables = init(discriminator, images, labels)
  params = variables["params"]
  block = TransformerBlock(
    LayerNorm,
    24,
    dict(
      num_heads=2,
      num_patches=4,
      kind="l2",
      conv=False,
    ),
  )
  tokens = reference_tokens(params, images, overlap, 2.0)
  h = jax.jit(block.apply)({"params": params["block0"]}, tokens)
  norm = params["norm_out"]
  of_tokens = []
  for i in [4] if pooling == "token" else range(4):
    token = standardise(np.asarray(h[:, i])) * norm["scale"] + norm["bias"]
    y = dense(params["head_out"], gelu(dense(params["head_in"], token)))
    of_tokens.append(y[:, 0])
    if labels is not None:
      embedding = 0.1 * params["class_embedding"]["kernel"][labels]
      of_tokens[-1] += np.sum(embedding * token, axis=-1) / np.sqrt(16)
  expected = np.mean(of_tokens, axis=0)
  logits = jax.jit(discriminator.apply)(variables, images, labels)
  assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_classes", [10, 1000])
def test_class_moves_the_logit_by_about_a_tenth_from_the_start(num_classes):
  """The improved spectral norm keeps the scale that the init has."""
  discriminator = make_discriminator(**SMALL, num_classes=num_classes)
  labels = np.arange(num_classes)
  images = np.broadcast_to(normal(1, 8, 8, 3), (num_classes, 8, 8, 3))
  logits, _ = jax.jit(discriminator.init_with_output)(
    jax.random.key(0), images, labels
  )
  assert 0.05 < np.std(logits) < 0.2


@pytest.mark.parametrize("spectral_norm", ["isn", "sn", "none"])
@pytest.mark.parametrize("conv_qkv", [False, True])
@pytest.mark.parametrize("attention", ["l2", "dot"])
def test_every_switch_traces_to_logits(attention, conv_qkv, spectral_norm):
  discriminator = make_discriminator(
    **SMALL, attention=attention, conv_qkv=conv_qkv, spectral_norm=spectral_norm
  )
  logits, variables = jax.eval_shape(
    discriminator.init_with_output, jax.random.key(0), normal(3, 8, 8, 3)
  )
  assert logits.shape == (3,)
  assert logits.dtype == jnp.float32
  params = traverse_util.flatten_dict(variables["params"])
  kernels = {path[:-1] for path in params if path[-1] == "kernel"}
  # Embedding, head (2), MLP (2), output, value and the query, and the key.
  assert len(kernels) == (8 if attention == "l2" else 9)
  # Every kernel is normalised, and nothing else.
  expected = {
    (*path, "norm", name) for path in kernels for name in ("u", "sigma_init")
  }
  if spectral_norm == "none":
    expected = set()
  collection = variables.get("spectral", {})
  assert set(traverse_util.flatten_dict(collection)) == expected


@pytest.fixture(scope="module")
def small():
  """Returns (discriminator, variables, images) of the toy size."""
  discriminator, images = make_discriminator(**SMALL), normal(4, 8, 8, 3)
  return discriminator, init(discriminator, images), images


@pytest.mark.parametrize("shift", [100.0, -100.0])
def test_logits_are_not_squashed(small, shift):
  discriminator, variables, images = small
  params = variables["params"]
  head = {**params["head_out"], "bias": params["head_out"]["bias"] + shift}
  shifted = {**variables, "params": {**params, "head_out": head}}
  apply = jax.jit(discriminator.apply)
  expected = apply(variables, images) + shift
  assert_allclose(apply(shifted, images), expected, rtol=1e-6)


def test_second_call_makes_no_parameters(small):
  discriminator, variables, images = small
  _, state = jax.eval_shape(
    lambda v: discriminator.apply(v, images, mutable=True), variables
  )
  for collection in ("params", "spectral"):
    names = leaves(variables[collection]).keys()
    assert leaves(state[collection]).keys() == names


def test_every_parameter_is_trained(small):
  discriminator, variables, images = small

  @jax.jit
  @jax.grad
  def gradient(params):
    return jnp.mean(
      discriminator.apply({**variables, "params": params}, images) ** 2
    )

  for name, leaf in leaves(gradient(variables["params"])).items():
    assert np.any(leaf != 0), name


def test_bfloat16_logits_are_close_to_float32_ones(small):
  discriminator, variables, images = small
  bfloat16 = discriminator.clone(dtype=jnp.bfloat16)
  shapes = jax.eval_shape(bfloat16.init, jax.random.key(0), images)
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  expected = jax.jit(discriminator.apply)(variables, images)
  logits = jax.jit(bfloat16.apply)(variables, images)
  assert logits.dtype == jnp.float32
  # The last layer is float32 too: its output is not a bfloat16 number.
  assert np.all(logits != logits.astype(jnp.bfloat16))
  # Some twenty roundings by 2**-9 one after the other.
  assert_allclose(logits, expected, rtol=0.02)


@pytest.mark.parametrize(
  "attention, qk_gain, lowest, highest",
  [
    # By default neither is uniform, 1, nor each token's own, 0.
    ("l2", 0.0, 0.5, 0.98),
    ("dot", 0.0, 0.5, 0.98),
    # At gain 1 and 64 dimensions a head, L2 attention is the identity, and
    # spectral normalisation keeps the scale that makes it so. Dot-product
    # attention with the gain of L2 is uniform.
    ("l2", 1.0, 0.0, 0.05),
    ("dot", 0.4, 0.99, 1.0),
  ],
)
def test_attention_entropy_at_init(attention, qk_gain, lowest, highest):
  fields = kinds.DISCRIMINATORS["vitgan"].fields
  discriminator = make_discriminator(
    image_size=32,
    depth=2,
    mlp_dim=64,
    attention=attention,
    qk_gain=qk_gain,
    spectral_norm="none",  # at init "isn" is this, but for seconds of SVD
  )
  assert fields["width"] // fields["num_heads"] == 64
  images = np.random.default_rng(0).uniform(-1, 1, (1, 32, 32, 3))

  @jax.jit
  def entropies(key):
    _, state = discriminator.init_with_output(
      key, images, mutable=["params", "intermediates"]
    )
    return [
      value
      for path, value in jax.tree.leaves_with_path(state["intermediates"])
      if jax.tree_util.DictKey("attention_entropy") in path
    ]

  for layer in jax.tree.leaves(entropies(jax.random.key(0))):
    assert lowest < layer < highest
