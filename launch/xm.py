r"""Runs one config, or a sweep, under XManager: a work unit a run.

  make install .venv/tools/xmanager/installed
  .venv/tools/xmanager/bin/xmanager launch launch/xm.py -- \
    --config=configs/digits.py --sweep=configs/sweeps/seeds.py --jobs=2

trains on this machine, in the environment of `make install`. On Google Cloud,
in the container of launch/Dockerfile, for TPUs or, as a100=8, for GPUs:

  ... launch/xm.py -- --config=configs/celeba64.py --executor=vertex \
    --accelerator=tpu_v3=8 --workdir=/gcs/BUCKET/runs/celeba64

Watch: what the units print comes with their names before it; on Google Cloud,
in its console. Stop: Ctrl-C, upon which each local unit saves; the same command
goes on from there. Delete: the folders of the runs.
"""

import asyncio
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile

from absl import flags
from xmanager import xm, xm_local

_ROOT = pathlib.Path(__file__).resolve().parent.parent

# What launch.units is given; it runs where the package is installed, and
# checks them. Fields of the config are flags as soon as one is set.
_OF_UNITS = {
  "config": "Config file, e.g. configs/digits.py; add :smoke to shrink.",
  "sweep": "File of a sweep, e.g. configs/sweeps/seeds.py.",
  "workdir": "Folder of the run, or of a sweep's runs, a folder each.",
  **{
    argument[2:].partition("=")[0]: "A field of the config."
    for argument in sys.argv
    if argument.startswith("--config.")
  },
}
for _name, _help in _OF_UNITS.items():
  flags.DEFINE_string(_name, None, _help)
_EXECUTOR = flags.DEFINE_enum(
  "executor", "local", ["local", "vertex", "kubernetes"], "Where to run."
)
_ACCELERATOR = flags.DEFINE_string(
  "accelerator",
  None,
  "Of each unit on Google Cloud, as XManager names them: a100=8, tpu_v3=8.",
)
_JOBS = flags.DEFINE_integer(
  "jobs", 1, "Work units at the same time on this machine.", lower_bound=1
)
_PYTHON = flags.DEFINE_string(
  "python",
  str(_ROOT / ".venv" / "bin" / "python"),
  "Where vitgan_jax is installed.",
)
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "Only print the commands.")


def _refuse(message):
  """Ends the process as `cli.fail`, which is in the other environment."""
  print(f"error: {message}", file=sys.stderr)
  sys.exit(os.EX_CONFIG)


def _list_units():
  """Returns (name, arguments of `python`) of each work unit.

  JAX is in the other environment, which checks the config.
  """
  arguments = [
    f"--{name}={flags.FLAGS[name].value}"
    for name in _OF_UNITS
    if flags.FLAGS[name].present
  ]
  listed = subprocess.run(
    [_PYTHON.value, "-m", "launch.units", *arguments],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  if listed.returncode:
    sys.exit(listed.returncode)
  lines = [line.split("\t") for line in listed.stdout.splitlines()]
  return [(name, shlex.split(command)[1:]) for name, _, command in lines]


def _write_dockerfile(folder, kind):
  """Returns the path of launch/Dockerfile for a kind of accelerator.

  XManager gives a build no arguments, so the default of this one is changed.
  """
  text = (_ROOT / "launch" / "Dockerfile").read_text()
  if not kind.startswith("tpu"):
    text = text.replace("\nARG ACCELERATOR=tpu\n", "\nARG ACCELERATOR=cuda\n")
  path = pathlib.Path(folder) / "Dockerfile"
  path.write_text(text)
  return str(path)


def _executor_and_package(folder):
  """Returns what runs the units, and what they run in.

  Args:
    folder: of files that are needed until that is built.
  """
  if _EXECUTOR.value == "local":
    return xm_local.Local(), xm.binary(
      executor_spec=xm_local.Local.Spec(), path=_PYTHON.value
    )
  if _ACCELERATOR.value is None:
    _refuse(f"--executor={_EXECUTOR.value} needs --accelerator, as a100=8")
  kind, _, count = _ACCELERATOR.value.partition("=")
  try:
    requirements = xm.JobRequirements(**{kind: int(count)})
  except (KeyError, ValueError) as error:
    _refuse(f"--accelerator={_ACCELERATOR.value} must be as a100=8: {error}")
  executor_class = {
    "vertex": xm_local.Vertex,
    "kubernetes": xm_local.Kubernetes,
  }[_EXECUTOR.value]
  return executor_class(requirements=requirements), xm.dockerfile_container(
    executor_spec=executor_class.Spec(),
    path=str(_ROOT),
    dockerfile=_write_dockerfile(folder, kind),
  )


async def _run(work, executor, packageable):
  """Adds the units to an experiment; returns the names of those that failed."""
  slots = asyncio.Semaphore(_JOBS.value)
  failed = []
  title = os.path.basename(_ROOT)
  try:
    async with xm_local.create_experiment(title) as experiment:
      [executable] = experiment.package([packageable])

      async def run(name, arguments):
        job = xm.Job(executable, executor, name=name, args=arguments)
        async with slots:
          unit = await experiment.add(job)
          if _EXECUTOR.value == "local":
            try:
              await unit.wait_until_complete()
            except xm.ExperimentUnitError:
              failed.append(name)

      await asyncio.gather(*[run(name, arguments) for name, arguments in work])
  except RuntimeError:  # the experiment tells of failed units once more
    if not failed:
      raise
  return failed


def main(arguments):
  """Runs what the flags ask for; exits with 1 if a unit failed."""
  if arguments[1:]:
    _refuse(f"not a flag: {' '.join(arguments[1:])}; see --help")
  work = _list_units()
  if _DRY_RUN.value:
    for _, command in work:
      print(shlex.join([_PYTHON.value, *command]))
    return
  with tempfile.TemporaryDirectory() as folder:
    failed = asyncio.run(_run(work, *_executor_and_package(folder)))
  if failed:
    sys.exit(
      f"error: {len(failed)} of {len(work)} work units failed: "
      f"{', '.join(failed)}; the same command goes on from there"
    )
