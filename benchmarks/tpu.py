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

Model FLOPs are those of the same program for the images of one chip in plain
JAX, without rematerialisation: all matrix products and convolutions, forward
and backward (`flops.model_flops`). The networks' layers, attention and decoder
are nearly all of them; the augmentation and the power iteration are less than a
thousandth. A step with R1 or R2 is one that takes them, in the cycles, too.
Inception computes in float32, which takes the MXU several passes; its MFU, too,
is of the peak in bfloat16.
"""

import functools
import importlib.util
import math
import os
import pathlib
import re
import sys
import tempfile
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
import jax.numpy as jnp

from benchmarks import fidelity, hlo
from benchmarks.flops import model_flops
from vitgan_jax import config as config_lib
from vitgan_jax import partitioning, sample
from vitgan_jax.errors import ConfigError
from vitgan_jax.gan_step import make_train_steps
from vitgan_jax.metrics import features, inception, torch_files
from vitgan_jax.models import networks
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


class Program(NamedTuple):
  """One jitted program.

  Attributes:
    name: as it is printed.
    function: under `jax.jit`.
    args: pytrees of `jax.ShapeDtypeStruct`s.
    dtype: in which it computes.
    images_per_chip: that a call takes.
    implementations: see `networks.with_kernels`.
  """

  name: str
  function: Any
  args: tuple
  dtype: str
  images_per_chip: int
  implementations: list = []


# As Google publishes them, a GB of memory being 2**30 bytes, and the compiler's
# own quarter of one among them. The clock is the peak over the FLOPs of a
# cycle: 2 x 128 x 128 for each of the 4 MXUs of a core, two cores on v5p.
# Of v6e it is an assumption that they are 4 MXUs of 256 x 256: with the 2 of
# some of its documents a matrix product would take the compiler's estimate
# below the time at peak.
CHIPS = {
  "v5e": Chip(197e12, 1.5e9, 819e9, 16 * 2**30),
  "v5p": Chip(459e12, 1.75e9, 2765e9, 95 * 2**30),
  "v6e": Chip(918e12, 1.75e9, 1640e9, 32 * 2**30),
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
    config = for_chips(config, batch_per_chip * len(devices))
    mesh = partitioning.create_mesh(devices, config.fsdp)
    chip = CHIPS[topology.split(":")[0]]
    for program, plain in zip(
      programs(config, mesh), plain_programs(config, batch_per_chip)
    ):
      name, images = program.name, program.images_per_chip
      print(f"Compiling for {topology}: {name}", file=sys.stderr, flush=True)
      try:
        compiled = program.function.lower(*program.args).compile()
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
        "dtype": program.dtype,
        "images_per_chip": images,
        "implementations": program.implementations,
        **summarise(text, _bundles(dump, text), chip),
      }
      seconds = figures["estimated_ms"] / 1e3
      rate = images * len(devices) / seconds
      figures["estimated_images_per_sec"] = round(rate, 1)
      flops = model_flops(plain.function, *plain.args)
      figures["model_tflop_per_chip"] = round(flops / 1e12, 4)
      figures["estimated_mfu"] = round(flops / seconds / chip.flops, 4)
      if name == "training step":
        hours = config.total_kimg * 1e3 / rate / 3600
        figures["estimated_hours_of_the_run"] = round(hours, 2)
        figures["estimated_chip_hours_of_the_run"] = round(
          hours * len(devices), 2
        )
      yield figures | _memory(compiled, chip)


def for_chips(config, batch_size):
  """Returns a config's copy in bfloat16, checked, with another batch."""
  config = config.copy_and_resolve_references()
  config.update(dtype="bfloat16", batch_size=batch_size, steps_per_call=1)
  config_lib.validate(config)
  return config


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


def programs(config, mesh):
  """Yields each Program for the devices of a mesh."""
  size = config.data.image_size

  def images(*shape, axis=0, dtype=jnp.uint8):
    sharding = partitioning.batch_sharding(mesh, axis)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def replicated(x):
    sharding = partitioning.replicated(mesh)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  nets, implementations = networks.with_kernels(
    networks.build(config), mesh, config.batch_size, config.accumulation
  )
  state = state_shapes(config, nets, mesh)
  shape = (1, config.d_steps, config.batch_size)
  batch = {"images": images(*shape, size, size, 3, axis=2), "labels": None}
  if config.data.num_classes:
    batch["labels"] = images(*shape, axis=2, dtype=jnp.int32)
  number = replicated(jnp.zeros((), jnp.int32))
  yield Program(
    "training step",
    make_train_steps(config, nets, mesh),
    (state, batch, number),
    config.dtype,
    config_lib.images_per_step(config) // mesh.size,
    implementations,
  )
  yield Program(
    "sampler",
    sample.make_sampler(nets, mesh),
    (state.g_ema_variables, number, number),
    config.dtype,
    sample.BATCH_SIZE,
  )
  params = _inception_params()
  if params is None:
    print("No Inception: it needs torch and torch-fidelity", file=sys.stderr)
    return
  yield Program(
    "Inception",
    features.make_extract(inception.apply, mesh),
    (
      jax.tree.map(replicated, params),
      images(features.BATCH_SIZE * mesh.size, size, size, 3),
    ),
    "float32",
    features.BATCH_SIZE,
  )


def plain_programs(config, batch_size):
  """Yields the same in plain JAX, on one device, with nothing to save memory.

  Args:
    config: of the programs.
    batch_size: of the training step.
  """
  config = config.copy_and_resolve_references()
  config.update(
    batch_size=batch_size,
    accumulation=1,
    remat=False,
    fsdp=1,
    implementation="xla",
  )
  return programs(config, partitioning.create_mesh(jax.devices("cpu")[:1]))


@functools.cache
def _inception_params():
  """Returns Inception's parameters, random, or None without torch-fidelity."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "weights.pth"
    try:
      fidelity.write_random_inception(path)
    except ImportError:
      return None
    return inception.from_state_dict(torch_files.read_state_dict(path))


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
