import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import cost, hlo, tpu
from benchmarks.flops import model_flops
from configs import cifar10, digits
from tests import runs
from vitgan_jax import cli, partitioning
from vitgan_jax.errors import ConfigError
from vitgan_jax.models import networks
from vitgan_jax.train_state import state_shapes

_needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="there is no libtpu"
)

_HLO = """HloModule jit_f, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %inside = f32[8]{0} negate(%p), backend_config={"estimated_cycles":"9"}
}

%inner_condition (c: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %c = (s32[], f32[8]{0:T(128)}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%inner_body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[], f32[8]{0:T(128)}) parameter(0)
  %f = f32[8]{0} fusion(%b), kind=kLoop, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"1000"}}
  ROOT %k.2 = (s32[], f32[8]{0}) custom-call(%f, /*index=1*/%f), \
custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{\
"body":"TUz=","cost_estimate":{"flops":"197000000","bytes_accessed":"1"}}}
}

%outer_condition (c2: (s32[], f32[8])) -> pred[] {
  %c2 = (s32[], f32[8]{0}) parameter(0)
  ROOT %p2 = pred[] get-tuple-element(%c2), index=0
}

%outer_body (b2: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b2 = (s32[], f32[8]{0}) parameter(0)
  ROOT %inner = (s32[], f32[8]{0}) while(%b2), condition=%inner_condition, \
body=%inner_body
}

%cheap (q: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} copy(%q), backend_config={"estimated_cycles":"10"}
}

%dear (q2: f32[8]) -> f32[8] {
  ROOT %d = f32[8]{0} copy(%q2), backend_config={"estimated_cycles":"40000"}
}

%async (q3: f32[8]) -> f32[8] {
  ROOT %s = f32[8]{0} copy(%q3), backend_config={"estimated_cycles":"200000"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0)
  %outer = (s32[], f32[8]{0}) while(%x), condition=%outer_condition, \
body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
  %choice = f32[8]{0} conditional(%x, %x, %x), \
branch_computations={%cheap, %dear}, metadata={op_name="jit(f)/cond"}
  %start = ((f32[8]{0}), f32[8]{0}, u32[]) async-start(%x), calls=%async
  %done = f32[8]{0} async-done(%start)
  %ar = (f32[8]{0}, bf16[2,3]{1,0:T(8,128)(2,1)S(1)}) \
all-reduce-start(%x, %x), to_apply=%fused, \
backend_config={"estimated_cycles":"3000000"}
  ROOT %end = f32[8]{0} all-reduce-done(%ar)
}
"""

_BUNDLES = """
= control target key start
LB: loop body
     0   :  { %s1 = smov 0 } /* entry bundle: tpu_custom_call */
   0x1 LB: > { %s2 = sphi %s1, %s4 } /* Start region 90 :: Start region 29 */
   0x2   : > { %p8 = scmp.lt.s32.totalorder %s2, 65 }
   0x3   : > { %16 = sbr.rel (%p8) target = $region32 }
   0x4 LB: >> { %s3 = sadd.s32 1, %s5 } /* Start region 79 :: Start region 7 */
   0x5   : >> { %p7 = scmp.ge.s32.totalorder %s3, 8 /* loop exit test */ }
   0x6   : >> { %24 = sbr.rel (!%p7) target = $region79 }
   0x7   : > { %p10 = scmp.ge.s32.totalorder %s4, 10 /* loop exit test */ }
   0x8   :  { %12 = sbr.rel (!%p10) target = $region90 }
"""


def _total(module):
  executions = module.executions(lambda x: x.cycles or 0)
  return sum(x.times * (x.instruction.cycles or 0) for x in executions)


def test_cycles_are_summed_over_loops_branches_and_transfers():
  module = hlo.Module(_HLO)
  assert _total(module) == 3 * 5 * 1000 + 40000 + 200000 + 3000000
  assert module.unknown_loops == []
  module = hlo.Module(_HLO.replace("known_trip_count", "unknown"))
  assert _total(module) == 5 * 1000 + 40000 + 200000 + 3000000
  assert module.unknown_loops == ["outer"]
  with pytest.raises(ValueError, match="entry"):
    hlo.Module(_HLO.replace("ENTRY ", ""))


@pytest.mark.parametrize(
  "text, size",
  [
    ("f32[]{:T(128)}", 4),
    ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", 12),
    ("(s32[4]{0}, /*index=1*/pred[5], u8[7])", 28),
  ],
)
def test_bytes_of_a_type(text, size):
  assert hlo.type_bytes(text) == size


def test_bundles_are_counted_through_the_loops_of_a_kernel():
  assert hlo.bundles(_BUNDLES) == 2 + 10 * 4 + 10 * 8 * 3
  assert hlo.bundles(_BUNDLES.replace("%s4, 10", "%s4, %s9")) is None
  assert hlo.bundles("") is None


def test_a_kernel_is_charged_its_roofline_or_its_bundles():
  others = 3 * 5 * 1000 + 40000 + 200000 + 3000000
  chip = tpu.CHIPS["v5e"]
  figures = tpu.summarise(_HLO, {}, chip)
  (kernel,) = figures["pallas_kernels"]
  assert kernel["calls"] == 15
  assert kernel["roofline_cycles_a_call"] == 1500  # 197 MFLOP at the peak
  assert "roofline only" in kernel["bundles_a_call"]
  assert figures["estimated_cycles"] == others + 15 * 1500
  figures = tpu.summarise(_HLO, {"k.2": 7000}, chip)
  assert figures["of_them_charged_to_kernels"] == 15 * 7000
  assert figures["estimated_cycles"] == others + 15 * 7000
  np.testing.assert_allclose(
    figures["estimated_ms"], (others + 15 * 7000) / 1.5e6, rtol=1e-3
  )
  assert figures["estimated_top_operations"][0]["name"] == "ar"
  assert figures["collectives_without_estimate"] == [
    {"kind": "all-reduce", "count": 1, "bytes": 64, "inside_loops": 0}
  ]


def test_flops_of_a_step_are_those_of_its_passes():
  config = cifar10.get_config()
  config.implementation = "pallas"  # that of the TPUs, not of these programs
  step = next(tpu.plain_programs(config, batch_size=128))
  # Worked out for these networks, in FLOPs of a forward pass for one image:
  # each pass with the gradients of all weights is three, with that of its input
  # two. The generator has one without gradients and one with, the discriminator
  # four of images and augmented ones, and that of the generator's update.
  generator, discriminator = 1_299_775_488, 879_139_584
  # The last block takes the class token alone through all but its attention.
  discriminator -= 2 * 64 * (384 * 384 + 2 * 384 * 1536)
  formula = 128 * ((1 + 3) * generator + (4 * 3 + 2) * discriminator)
  # It has a gradient of images that nothing needs, and lacks some of attention,
  # where the gradient of the input is two products for each one forward.
  np.testing.assert_allclose(
    model_flops(step.function, *step.args), formula, rtol=1e-3
  )


def test_a_step_takes_a_batch_for_each_step_of_the_discriminator():
  config = digits.get_config("smoke")
  flops = []
  for d_steps in (1, 2, 3):
    config.d_steps = d_steps
    step = next(tpu.plain_programs(config, batch_size=8))
    assert step.images_per_chip == 8 * d_steps
    flops.append(model_flops(step.function, *step.args))
  assert flops[0] < flops[1] and flops[2] - flops[1] == flops[1] - flops[0]


def test_what_comes_rarely_costs_its_share():
  def flops(weight, every):
    config = digits.get_config("smoke")
    config.loss.update(r1_gamma=weight, gradient_penalty_every=every)
    return cost._mean_flops(config)

  without, with_r1 = flops(0.0, 1), flops(1.0, 1)
  assert with_r1 > 1.2 * without
  np.testing.assert_allclose(
    flops(1.0, 4), without + (with_r1 - without) / 4, rtol=1e-6
  )


# Inception at its own size takes many minutes: one test does without it, as
# where torch-fidelity is missing, the other takes the least of images.
_WITHOUT_INCEPTION = """
import runpy, sys
sys.modules["torch_fidelity"] = None
runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)
"""
_SMALL_INCEPTION = """
import runpy
from vitgan_jax.metrics import features, inception
inception.IMAGE_SIZE, features.BATCH_SIZE = 75, 1
runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)
"""


def _run(program, name, *arguments):
  environment = {
    key: value
    for key, value in os.environ.items()
    if key not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
  }
  return subprocess.run(
    [sys.executable, "-c", program, name, *arguments, "--json"],
    cwd=runs.ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=1500,
  )


def _check(result, names, peak):
  """Returns the figures of the training step."""
  assert result.returncode == 0, result.stderr
  (line,) = result.stdout.splitlines()
  programs = json.loads(line)
  assert [figures["program"] for figures in programs] == names
  for figures in programs:
    assert figures["loops_of_unknown_length_taken_once"] == []
    assert figures["estimated_cycles"] > 1e4
    assert 0 < figures["estimated_mfu"] < peak
    assert 0 < figures["estimated_hbm_peak_gb"] < 16
    assert figures["estimated_hbm_headroom_gb"] > 0
    shares = [x["share"] for x in figures["estimated_top_operations"]]
    assert len(shares) == 10 and shares == sorted(shares, reverse=True)
  step = programs[0]
  np.testing.assert_allclose(
    step["estimated_images_per_sec"],
    8 * step["images_per_chip"] / step["estimated_ms"] * 1000,
    rtol=1e-3,
  )
  (reduction,) = step["collectives_without_estimate"]
  assert reduction["kind"] == "all-reduce"
  # The gradients of each network, and metrics that did not join them.
  assert 1 <= reduction["count"] <= 3
  assert reduction["inside_loops"] == 0
  return step


@_needs_libtpu
def test_step_compiles_for_a_slice():
  result = _run(
    _WITHOUT_INCEPTION,
    "tpu",
    "--config=configs/digits.py:smoke",
    "--batch_per_chip=16",
  )
  step = _check(result, ["training step", "sampler"], peak=0.5)
  # One block in each network. The discriminator is called twice, the second
  # time without a gradient of its weights; the generator too, the first time
  # without any gradient.
  kernels = {}
  for kernel in step["pallas_kernels"]:
    name = kernel["name"]
    kernels[name] = kernels.get(name, 0) + kernel["calls"]
    assert kernel["bundles_a_call"] > 100
  assert kernels == {
    "embed": 2,
    "embed_backward": 1,
    "embed_backward_of_rows": 1,
    **{name: 4 for name in ("project", "attention", "mlp")},
    **{name: 2 for name in ("project_backward", "mlp_backward")},
    **{f"{name}_backward_of_rows": 1 for name in ("project", "mlp")},
    "attention_backward": 3,
    "normalise": 2,
    "normalise_backward_of_rows": 1,
    "modulated_pixels": 2,
    "modulated_pixels_backward": 1,
  }
  assert "torch-fidelity" in result.stderr


@_needs_libtpu
@pytest.mark.slow  # minutes of compilation
def test_wide_networks_and_inception_compile_for_a_slice():
  result = _run(
    _SMALL_INCEPTION,
    "tpu",
    "--config=configs/cifar10.py",
    # The other blocks have the same kernels.
    "--config.generator.depth=1",
    "--config.discriminator.depth=1",
  )
  step = _check(result, ["training step", "sampler", "Inception"], peak=1.0)
  assert step["estimated_mfu"] > 0.35
  peak = step["estimated_ms"] / 1e3 * tpu.CHIPS["v5e"].flops
  np.testing.assert_allclose(
    step["estimated_mfu"], step["model_tflop_per_chip"] * 1e12 / peak, rtol=1e-3
  )


@_needs_libtpu
@pytest.mark.slow  # a minute of compilation
def test_cost_of_a_run(tmp_path, monkeypatch):
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  arguments = "--config=configs/digits.py:smoke", "--topology=v5e:2x2"
  result = _run(_WITHOUT_INCEPTION, "cost", *arguments, "--batch_per_chip=16")
  assert result.returncode == 0, result.stderr
  ((figures,),) = map(json.loads, result.stdout.splitlines())
  assert not list(tmp_path.iterdir())  # of the compiler that was stopped, too
  config = digits.get_config("smoke")
  nets = networks.build(config)
  state = state_shapes(config, nets, partitioning.create_mesh(fsdp=1))
  for name, params in (("g", state.g_params), ("d", state.d_params)):
    leaves = jax.tree.leaves(params)
    assert figures[f"{name}_parameters"] == sum(x.size for x in leaves)
  # At the least the state is there, and at the most as much again for each
  # image as its activations can be.
  least = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / 1e9
  assert least < figures["estimated_hbm_gb"] < 10 * least + 0.1
  seconds = figures["mean_model_tflop_per_chip"] * 1e12 / (0.4 * 197e12)
  np.testing.assert_allclose(
    figures["estimated_chip_hours_of_the_run"],
    config.total_kimg * 1000 / 16 * seconds / 3600,
    atol=1e-4,
  )


@_needs_libtpu
@pytest.mark.slow  # a minute of compilation
def test_cost_of_what_does_not_fit():
  result = _run(
    _WITHOUT_INCEPTION,
    "cost",
    "--config=configs/digits.py:smoke",
    "--topology=v5e:2x2",
    "--batch_per_chip=4194304",
  )
  assert result.returncode == cli.EXIT_FINAL
  assert "does not compile for v5e:2x2: training step" in result.stderr
  assert "Ran out of memory on HBM" in result.stderr


@_needs_libtpu
@pytest.mark.parametrize("topology", ["v5e", "v5e:3by3", "v9:2x4"])
def test_bad_topology_is_refused(topology, monkeypatch):
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  with pytest.raises(ConfigError, match=r"--topology=.*v5p:2x2x1"):
    tpu._devices(topology)


def test_missing_compiler_is_said(monkeypatch):
  monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r"pip install -e '\.\[tpu\]'"):
    tpu._devices("v5e:2x4")
