"""What the TPU compiler expects of a slice of TPUs, without one.

The training step, the sampler and the metric network are compiled for a
topology; the step with a batch of `--batch_per_chip` images on each chip, and
both of ours in bfloat16, whatever the config says of these two. Nothing runs:
each figure is an estimate of the compiler, or follows from one.

Cycles are the sum of the compiler's `estimated_cycles` over all instructions
that execute. Not in the sum, as it has no estimate for them: collectives, whose
bytes are listed, and transfers that overlap with computation. A Pallas kernel
has none either, and is charged the larger of two lower bounds: its roofline
(bytes of operands and results over the bandwidth, or the FLOPs that it declares
over the peak), and one cycle for each instruction bundle of its final schedule.
On v5p a chip is one device with two cores that share each operation: the
cycles are those of the clock, not summed over cores; a kernel's bundles are
those of one core.

Model FLOPs count multiplications and additions of the batch in dense layers,
convolutions, attention and decoder: 2 per multiply-add. With `g` and `d` of one
forward pass, a backward pass for all gradients is 2 g or 2 d, and one for the
gradient of the input alone is d. A step with k batches before D, four with
balanced consistency and two without, is

  D's update: g + 3 k d;    G's update: 3 g + 2 d (+ d with "rpgan").

R1 and R2, the optimisers and what does not grow with the batch are left out.
Those of Inception are what XLA counts of its forward pass. It computes in
float32, which takes the MXU several passes; its MFU, too, is of the peak in
bfloat16.
"""

import importlib.util
import math
import os
import pathlib
import re
import sys
import tempfile
from typing import NamedTuple

import jax
from jax.experimental import topologies
import jax.numpy as jnp

from benchmarks import fidelity, hlo
from vitgan_jax import config as config_lib
from vitgan_jax import partitioning, sample
from vitgan_jax.config import ConfigError
from vitgan_jax.gan_step import make_train_steps
from vitgan_jax.metrics import features, inception, weights
from vitgan_jax.train_state import state_shapes


class Chip(NamedTuple):
  """One chip.

  Attributes:
    flops: peak in bfloat16, per second.
    clock: cycles per second.
    bandwidth: of its memory, bytes per second.
    memory: bytes.
  """

  flops: float
  clock: float
  bandwidth: float
  memory: float


# As Google publishes them, but for the clock, which is the peak over the FLOPs
# of a cycle: 2 x 128 x 128 for each of the 4 MXUs of a core, two cores on v5p.
# Of v6e it is an assumption that they are 4 MXUs of 256 x 256: with the 2 of
# some of its documents a matrix product would take the compiler's estimate
# below the time at peak.
CHIPS = {
  "v5e": Chip(197e12, 1.5e9, 819e9, 16e9),
  "v5p": Chip(459e12, 1.75e9, 2765e9, 95e9),
  "v6e": Chip(918e12, 1.75e9, 1640e9, 32e9),
}
_TOP = 10  # operations that are listed


def run(config, topology, batch_per_chip):
  """Yields the figures of each program, a dict, as it is compiled.

  Args:
    config: of `configs/`.
    topology: as "v5e:2x4".
    batch_per_chip: images of a training step on each chip.

  Raises:
    ConfigError: if libtpu is missing, the topology is none, or a program does
      not compile for it.
  """
  with tempfile.TemporaryDirectory() as dump:
    # Read when libtpu is loaded, by the first topology.
    os.environ["LIBTPU_INIT_ARGS"] = (
      f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
      "--xla_jf_dump_llo_pass_label_regex=final_bundles"
    )
    # What comes from a cache leaves no dump.
    jax.config.update("jax_enable_compilation_cache", False)
    devices = _devices(topology)
    config = config.copy_and_resolve_references()
    config.update(
      dtype="bfloat16",
      batch_size=batch_per_chip * len(devices),
      steps_per_call=1,
    )
    config_lib.validate(config)
    mesh = partitioning.create_mesh(devices, config.fsdp)
    chip = CHIPS[topology.split(":")[0]]
    for name, lower, dtype, images, flops in _programs(
      config, mesh, batch_per_chip
    ):
      print(f"Compiling for {topology}: {name}", file=sys.stderr, flush=True)
      try:
        compiled = lower().compile()
      except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
          f"does not compile for {topology}: {name}: {reason}"
        ) from error
      text = compiled.as_text()
      figures = {
        "program": name,
        "source": "the TPU compiler's estimates: nothing was measured",
        "topology": f"{topology}, {len(devices)} chips",
        "dtype": dtype,
        "images_per_chip": images,
        **summarise(text, _bundles(dump, text), chip),
      }
      seconds = figures["estimated_ms"] / 1e3
      rate = images * len(devices) / seconds
      figures["estimated_images_per_sec"] = round(rate, 1)
      figures["model_tflop_per_chip"] = round(images * flops / 1e12, 4)
      figures["estimated_mfu"] = round(images * flops / seconds / chip.flops, 4)
      if name == "training step":
        hours = config.total_kimg * 1e3 / rate / 3600
        figures["estimated_hours_of_the_run"] = round(hours, 2)
        figures["estimated_chip_hours_of_the_run"] = round(
          hours * len(devices), 2
        )
      yield figures | _memory(compiled, chip)


def _devices(topology):
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      "`benchmarks tpu` needs the TPU compiler: pip install -e '.[tpu]'"
    )
  try:
    if topology.split(":")[0] not in CHIPS:
      raise ValueError(f"the chips known here are {', '.join(CHIPS)}")
    return topologies.get_topology_desc(
      platform="tpu", topology_name=topology
    ).devices
  except (ValueError, jax.errors.JaxRuntimeError) as error:
    raise ConfigError(
      f"--topology={topology} is none, as v5e:2x4, v5p:2x2x1 or v6e:4x4 are: "
      f"{str(error).splitlines()[0]}"
    ) from error


def _programs(config, mesh, batch_per_chip):
  """Yields (name, how to lower it, dtype, images a chip, FLOPs of an image)."""
  state = state_shapes(config, mesh)
  size = config.data.image_size

  def images(*shape, axis=0):
    sharding = partitioning.batch_sharding(mesh, axis)
    return jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding)

  def replicated(x):
    sharding = partitioning.replicated(mesh)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  batch = images(1, config.batch_size, size, size, 3, axis=1)
  yield (
    "training step",
    lambda: make_train_steps(config, mesh).lower(state, batch),
    config.dtype,
    batch_per_chip,
    step_flops(config),
  )
  number = replicated(jnp.zeros((), jnp.int32))
  yield (
    "sampler",
    lambda: sample.make_sampler(config, mesh).lower(
      state.g_ema_params, number, number
    ),
    config.dtype,
    sample.BATCH_SIZE,
    generator_flops(config),
  )
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "weights.pth"
    try:
      fidelity.write_random_inception(path)
    except ImportError:
      print("No Inception: it needs torch and torch-fidelity", file=sys.stderr)
      return
    params = inception.from_state_dict(weights.read_state_dict(path))
  batch = images(features.BATCH_SIZE * mesh.size, size, size, 3)
  yield (
    "Inception",
    lambda: features.make_extract(inception.apply, mesh).lower(
      jax.tree.map(replicated, params), batch
    ),
    "float32",
    features.BATCH_SIZE,
    inception_flops(params, size),
  )


def summarise(text, bundles, chip):
  """Returns the figures of one program that its HLO gives, per chip.

  Args:
    text: scheduled HLO.
    bundles: {instruction's name: bundles that it executes, or None}.
    chip: a Chip.
  """
  module = hlo.Module(text)
  # Of equal kernels the compiler makes, and dumps, one.
  known = {}
  for computation in module.computations.values():
    for x in computation.values():
      if x.is_kernel and bundles.get(x.name):
        key = _kernel_key(x)
        known[key] = max(known.get(key, 0), bundles[x.name])

  def roofline(kernel):
    size = kernel.operand_bytes + hlo.type_bytes(kernel.type)
    seconds = max(
      size / chip.bandwidth, kernel.cost.get("flops", 0) / chip.flops
    )
    return math.ceil(seconds * chip.clock)

  def cycles(x):
    if x.is_kernel:
      return max(roofline(x), known.get(_kernel_key(x), 0))
    return x.cycles or 0

  executions = module.executions(cycles)
  charged = [(x.times * cycles(x.instruction), x) for x in executions]
  charged.sort(key=lambda pair: -pair[0])
  total = sum(charge for charge, _ in charged)
  kernels, collectives = {}, {}
  for charge, x in charged:
    instruction = x.instruction
    if instruction.is_kernel:
      key = _kernel_key(instruction)
      kernel = kernels.setdefault(
        key,
        {
          "name": key[0],
          "calls": 0,
          "cycles": 0,
          "roofline_cycles_a_call": roofline(instruction),
          "bundles_a_call": known.get(key, "not to be read: roofline only"),
        },
      )
      kernel["calls"] += x.times
      kernel["cycles"] += charge
    kind = instruction.opcode.removesuffix("-start")
    if kind in hlo.COLLECTIVES:
      sums = collectives.setdefault(
        kind, {"kind": kind, "count": 0, "bytes": 0, "inside_loops": 0}
      )
      sums["count"] += x.times
      sums["bytes"] += x.times * instruction.operand_bytes
      sums["inside_loops"] += x.times * (x.loops > 0)
  return {
    "estimated_cycles": total,
    "of_them_charged_to_kernels": sum(k["cycles"] for k in kernels.values()),
    "estimated_ms": round(1e3 * total / chip.clock, 4),
    "loops_of_unknown_length_taken_once": module.unknown_loops,
    "estimated_top_operations": [
      {
        "cycles": charge,
        "share": round(charge / total, 4),
        "times": x.times,
        "name": x.instruction.name,
        "op_name": x.instruction.op_name,
      }
      for charge, x in charged[:_TOP]
    ],
    "pallas_kernels": list(kernels.values()),
    "collectives_without_estimate": list(collectives.values()),
  }


def _kernel_key(kernel):
  return (
    re.sub(r"(\.\d+|\.clone)+$", "", kernel.name),
    kernel.type,
    kernel.operand_bytes,
    *kernel.cost.items(),
  )


def _bundles(folder, text):
  """Returns {kernel: its bundles, or None} of a program, and empties a dump."""
  kernels = re.findall(r"%(\S+) = .*\"tpu_custom_call\"", text)
  found = {}
  for path in pathlib.Path(folder).iterdir():
    name = re.fullmatch(r"\d+-(.+)-\d+-final_bundles\.txt", path.name)
    if name and name[1] in kernels:
      found[name[1]] = hlo.bundles(path.read_text())
    path.unlink()
  return found


def _memory(compiled, chip):
  """Returns the memory of a program, in GB a chip."""
  sizes = compiled.memory_analysis()
  peak = sizes.peak_memory_in_bytes
  return {
    "estimated_hbm_arguments_gb": round(sizes.argument_size_in_bytes / 1e9, 4),
    "estimated_hbm_temporaries_gb": round(sizes.temp_size_in_bytes / 1e9, 4),
    "estimated_hbm_peak_gb": round(peak / 1e9, 4),
    "estimated_hbm_headroom_gb": round((chip.memory - peak) / 1e9, 4),
  }


def step_flops(config):
  """Returns the model FLOPs of a training step for one image; see above."""
  g, d = generator_flops(config), discriminator_flops(config)
  batches = 4 if config.loss.bcr_weight else 2
  pairs = config.loss.adversarial == "rpgan"
  return (g + 3 * batches * d) + (3 * g + (2 + pairs) * d)


def generator_flops(config):
  """Returns the FLOPs of the generator's forward pass for one image."""
  c = config.generator
  patches = (config.data.image_size // c.patch_size) ** 2
  tokens = patches + (c.latent_injection == "token")
  total = c.mapping_depth * c.latent_dim**2
  if c.latent_injection == "sln":  # scale and shift of 2 norms a block, and 1
    total += (2 * c.depth + 1) * c.latent_dim * 2 * c.width
  else:
    total += c.latent_dim * c.width
  total += c.depth * _block(c, patches, tokens)
  pixels, hidden = c.patch_size**2, c.decoder_dim
  if c.patch_decoder == "implicit":  # styles, hidden layer, demodulation, RGB
    per_patch = (
      2 * c.width * hidden + (pixels + 1) * hidden**2 + pixels * hidden * 3
    )
  elif c.patch_decoder == "implicit_concat":
    per_patch = c.width * hidden + pixels * hidden * 3
  elif c.patch_decoder == "linear":
    per_patch = c.width * pixels * 3
  else:
    return 2 * (total + _conv_decoder(c, patches))
  return 2 * (total + patches * per_patch)


def discriminator_flops(config):
  """Returns the FLOPs of the discriminator's forward pass for one image."""
  c = config.discriminator
  patches = (config.data.image_size // c.patch_size) ** 2
  embedding = patches * (c.patch_size + 2 * c.overlap) ** 2 * 3 * c.width
  head = c.width**2 + c.width
  return 2 * (embedding + c.depth * _block(c, patches, patches + 1) + head)


def inception_flops(params, size):
  """Returns the FLOPs of Inception's forward pass for an image [size, size, 3].

  XLA counts elementwise operations too, and no products with padding.
  """
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
  return jax.jit(inception.apply).lower(params, image).cost_analysis()["flops"]


def _block(c, patches, tokens):
  """Returns the multiply-adds of a transformer block."""
  projections = 2 if c.attention == "l2" else 3  # query and key are tied
  extra = 8 * patches if c.conv_qkv else 0  # 3x3 convolutions, over patches
  return (
    projections * (tokens + extra) * c.width**2
    + tokens * c.width**2
    + 2 * tokens**2 * c.width
    + 2 * tokens * c.width * c.mlp_dim
  )


def _conv_decoder(c, positions):
  """Returns the multiply-adds of the convolutional decoder."""
  total, channels = 0, c.width
  for octave in range(int(math.log2(c.patch_size))):
    positions *= 4
    for _ in range(2):
      outputs = max(c.decoder_dim >> octave, 8)
      total += 9 * positions * channels * outputs
      total += c.latent_dim * channels + channels * outputs
      channels = outputs
  return total + 3 * positions * channels
