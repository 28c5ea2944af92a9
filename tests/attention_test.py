"""The kernel, interpreted on a CPU, against the plain form of attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitgan_jax import partitioning
from vitgan_jax.models import attention, fused_attention, fused_rows
from vitgan_jax.models.discriminator import Discriminator
from vitgan_jax.models.generator import Generator

BATCH = 2 * fused_attention.GROUP_SIZE
NETWORK = dict(
  image_size=16,
  patch_size=4,
  width=48,
  depth=1,
  num_heads=3,
  mlp_dim=32,
  conv_qkv=False,
  position_scale=2.0,
)


@pytest.fixture
def interpreted(monkeypatch):
  """Has kernels run on a CPU; returns the kinds of `attend`'s calls."""
  attend, apply, calls = fused_attention.attend, fused_rows.apply, []

  def interpret(*args, **kwargs):
    calls.append(kwargs["kind"])
    return attend(*args, **kwargs, interpret=True)

  monkeypatch.setattr(fused_attention, "attend", interpret)
  monkeypatch.setattr(
    fused_rows, "apply", functools.partial(apply, interpret=True)
  )
  return calls


def mesh_of(num_devices):
  return partitioning.create_mesh(jax.devices()[:num_devices])


def plain(*inputs, num_heads, kind):
  """Attends head by head to [B, N, D]."""
  y = []
  for head in zip(*(jnp.split(x, num_heads, axis=-1) for x in inputs)):
    q, k, v = head[0], head[-2], head[-1]
    y.append(attention.attention_weights(q, k, kind).astype(v.dtype) @ v)
  return jnp.concatenate(y, axis=-1)


def pack(tokens, num_patches):
  extra = tokens[:, :-num_patches]
  return fused_attention.pack(
    tokens[:, -num_patches:], extra if extra.size else None
  )


def unpack(rows, num_patches):
  patches, extra = fused_attention.unpack(rows, num_patches)
  return jnp.concatenate([patches] if extra is None else [extra, patches], 1)


@pytest.mark.parametrize("num_extra", [0, 1])
def test_unpacked_rows_are_the_tokens(num_extra):
  tokens = jax.random.normal(jax.random.key(0), (BATCH, 4 + num_extra, 3))
  rows = pack(tokens, 4)
  np.testing.assert_array_equal(unpack(rows, 4), tokens)
  # Image 17 is the second of the second group.
  np.testing.assert_array_equal(rows[1, 4:8], tokens[17, num_extra:])
  if num_extra:
    np.testing.assert_array_equal(rows[1, 16 * 4 + 1], tokens[17, 0])


@pytest.mark.parametrize("kind", ["l2", "dot"])
@pytest.mark.parametrize("num_extra", [0, 1])
# Heads of half a register, of a whole one, and a width that fills none.
@pytest.mark.parametrize("width, num_heads", [(256, 4), (128, 1), (48, 3)])
def test_kernel_is_plain_attention_with_its_gradient(
  kind, num_extra, width, num_heads
):
  num_patches = 16
  shape = (4, BATCH, num_patches + num_extra, width)
  *inputs, dy = jax.random.normal(jax.random.key(1), shape)
  if kind == "l2":  # of unit variance, each token would see itself alone
    inputs = [0.4 * inputs[0], inputs[-1]]
  expected, vjp = jax.vjp(
    lambda *x: plain(*x, num_heads=num_heads, kind=kind), *inputs
  )

  def kernel(*inputs):
    y = fused_attention.attend(
      *(pack(x, num_patches) for x in inputs),
      num_patches=num_patches,
      num_heads=num_heads,
      kind=kind,
      mesh=mesh_of(2),
      interpret=True,
    )
    return unpack(y, num_patches)

  actual, kernel_vjp = jax.vjp(kernel, *inputs)
  # Sums of up to 256 float32 products of size one, in another order.
  np.testing.assert_allclose(actual, expected, atol=2e-5)
  for gradient, other in zip(kernel_vjp(dy), vjp(dy)):
    assert np.std(other) > 0.01
    np.testing.assert_allclose(gradient, other, atol=5e-5)


def test_tokens_of_the_grid_alone_need_no_packing():
  inputs = jax.random.normal(jax.random.key(2), (3, BATCH, 16, 48))
  common = dict(num_patches=16, num_heads=3, kind="dot", mesh=mesh_of(1))
  y = fused_attention.attend(*inputs, **common, interpret=True)
  np.testing.assert_allclose(
    y, plain(*inputs, num_heads=3, kind="dot"), atol=1e-5
  )


def test_bfloat16_is_as_near_to_float32_as_the_plain_form():
  inputs = 0.4 * jax.random.normal(jax.random.key(3), (2, BATCH, 16, 128))
  exact = plain(*inputs, num_heads=2, kind="l2")
  rounded = inputs.astype(jnp.bfloat16)
  y = fused_attention.attend(
    *rounded,
    num_patches=16,
    num_heads=2,
    kind="l2",
    mesh=mesh_of(1),
    interpret=True,
  )
  error = np.abs(y.astype(jnp.float32) - exact).max()
  plain_error = np.abs(
    plain(*rounded, num_heads=2, kind="l2").astype(jnp.float32) - exact
  )
  assert y.dtype == jnp.bfloat16
  assert 0 < error < 1.5 * plain_error.max()


def test_discriminator_with_the_kernel_is_the_plain_one(interpreted):
  fields = dict(
    **NETWORK, overlap=2, attention="l2", qk_gain=0.4, spectral_norm="isn"
  )
  images = jax.random.normal(jax.random.key(4), (BATCH, 16, 16, 3))
  network = Discriminator(**fields)
  variables = network.init(jax.random.key(5), images[:1])
  fused = Discriminator(**fields, mesh=mesh_of(2))
  assert_same(network, fused, variables, images)
  assert interpreted == ["l2"] * NETWORK["depth"]


@pytest.mark.parametrize("injection, num_calls", [("sln", 1), ("token", 0)])
def test_generator_with_the_kernel_is_the_plain_one(
  interpreted, injection, num_calls
):
  fields = dict(
    **NETWORK,
    latent_dim=8,
    mapping_depth=1,
    mapping_lr_multiplier=1.0,
    latent_injection=injection,
    attention="dot",
    patch_decoder="linear",
    decoder_dim=8,
    fourier_scale=2.0,
  )
  latents = jax.random.normal(jax.random.key(6), (BATCH, 8))
  network = Generator(**fields)
  variables = network.init(jax.random.key(7), latents[:1])
  assert_same(network, Generator(**fields, mesh=mesh_of(2)), variables, latents)
  assert interpreted == ["dot"] * num_calls


def assert_same(network, fused, variables, inputs):
  """Checks outputs and gradients of all parameters."""

  def loss(module, params):
    y = module.apply({**variables, "params": params}, inputs)
    return jnp.sum(jnp.sin(y)), y

  results = [
    jax.jit(jax.grad(lambda p, m=module: loss(m, p), has_aux=True))(
      variables["params"]
    )
    for module in (network, fused)
  ]
  (expected, y), (gradients, fused_y) = results
  np.testing.assert_allclose(fused_y, y, atol=1e-5)
  for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected)):
    # Sums over images and tokens in another order.
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize(
  "change, expected",
  [
    ({}, True),
    ({"num_patches": 256}, True),
    ({"dtype": jnp.float32}, True),
    ({"num_patches": 1024, "dtype": jnp.float32}, False),  # too much memory
    ({"num_patches": 36}, False),  # rows that do not fill registers
    ({"batch": BATCH + 16}, False),  # one and a half groups a device
    ({"mesh": None}, False),
  ],
)
def test_kernel_is_called_where_it_fits(change, expected):
  shape = dict(
    mesh=mesh_of(2),
    batch=BATCH,
    num_patches=64,
    width=384,
    num_heads=6,
    dtype=jnp.bfloat16,
  )
  assert fused_attention.can_attend(**{**shape, **change}) == expected


def test_batch_that_does_not_fall_into_groups_is_attended_plainly(interpreted):
  fields = dict(
    **NETWORK, overlap=2, attention="l2", qk_gain=0.4, spectral_norm="isn"
  )
  images = jnp.zeros((BATCH - 1, 16, 16, 3))
  network = Discriminator(**fields, mesh=mesh_of(1))
  jax.eval_shape(network.init, jax.random.key(0), images)
  assert not interpreted
