import shutil
import signal

import pytest

from tests import runs
from vitgan_jax import cli, train
from vitgan_jax import config as config_lib

DIGITS = f"--config={runs.ROOT}/configs/digits.py:smoke"

# What the user got wrong, and words of the answer. `run` is the workdir of a
# finished run of DIGITS, and the only thing in the current folder.
BAD_INPUT = {
  "unknown field": ([DIGITS, "--config.batchsize=8"], ["batchsize"]),
  "unknown field of a part": (
    [DIGITS, "--config.generator.widht=8"],
    ["widht", "width"],
  ),
  "wrong type": (
    [DIGITS, "--config.batch_size=many"],
    ["config.batch_size", "many"],
  ),
  "missing config file": (["--config=missing.py"], ["missing.py"]),
  "unknown config argument": (
    [DIGITS.replace("smoke", "huge")],
    ["huge", "tiny, smoke"],
  ),
  "unknown kind of network": (
    [f"{DIGITS},g=other"],
    ["error: config.generator.kind='other' must be one of vitgan"],
  ),
  "kernels that these devices do not have": (
    [DIGITS, "--config.implementation=pallas"],
    ["config.implementation='pallas'", "cpu"],
  ),
  "no config": ([], ["--config"]),
  "unknown flag": ([DIGITS, "--wrokdir=new"], ["wrokdir"]),
  "unknown mode": (["--mode=paint"], ["paint", "train", "sample"]),
  "word without a flag": ([DIGITS, "workdir=new"], ["workdir=new"]),
  "patch that does not divide the image": (
    [DIGITS, "--config.data.image_size=18"],
    ["config.generator.patch_size=4", "config.data.image_size=18"],
  ),
  "heads that do not divide the width": (
    [DIGITS, "--config.discriminator.num_heads=3"],
    ["config.discriminator.num_heads=3", "config.discriminator.width=32"],
  ),
  "batch that the devices do not divide": (
    [DIGITS, "--config.batch_size=12"],
    ["config.batch_size=12", "8 devices"],
  ),
  "negative seed": ([DIGITS, "--config.seed=-1"], ["config.seed=-1"]),
  "workdir of another config": (
    [DIGITS, "--config.seed=3", "--workdir=run"],
    ["run was made by another config", "seed is 0 there and 3 here"],
  ),
  "workdir in a file": (
    [DIGITS, "--workdir=run/config.json"],
    ["run/config.json"],
  ),
  "a process without a number": (
    ["--mode=sample", "--workdir=run", "--coordinator_address=localhost:1"],
    ["--num_processes", "--process_id", "all together"],
  ),
  "state that the devices cannot share": (
    [DIGITS, "--config.fsdp=3"],
    ["config.fsdp=3", "devices, 8"],
  ),
  "micro-batches that the devices do not divide": (
    [DIGITS, "--config.accumulation=2"],
    ["config.batch_size=8", "8 devices times config.accumulation=2"],
  ),
  "samples without a workdir": (["--mode=sample"], ["--workdir"]),
  "seed of the latents for training": (
    [DIGITS, "--seed=3"],
    ["--seed is for --mode=evaluate and --mode=sample", "--mode=train"],
  ),
  "checkpoint for sampling": (
    ["--mode=sample", "--workdir=run", "--checkpoint=2"],
    ["--checkpoint is for --mode=evaluate,", "--mode=sample"],
  ),
  "field of the run for evaluation": (
    [
      "--mode=evaluate",
      DIGITS,
      "--config.data.path=here",
      "--config.evaluation.num_samples=7",
    ],
    ["--config.evaluation.num_samples is for --mode=train", "from the run"],
  ),
  "field of the run for sampling": (
    ["--mode=sample", DIGITS, "--config.data.path=here"],
    ["--config.data.path is for --mode=train", "from the run"],
  ),
  "classes of a run without any": (
    ["--mode=sample", "--workdir=run", "--classes=3,5"],
    ["--classes=3,5 is for a run with classes", "num_classes=0"],
  ),
  "classes for training": (
    [DIGITS, "--classes=3"],
    ["--classes is for --mode=sample, not for --mode=train"],
  ),
  "samples of no run": (
    ["--mode=sample", "--workdir=elsewhere"],
    ["elsewhere", "not a workdir"],
  ),
  "samples of no checkpoint": (
    ["--mode=sample", "--workdir=new"],
    ["no checkpoint in", "new/checkpoints"],
  ),
  "samples into a folder in use": (
    ["--mode=sample", "--workdir=run", "--output=run/samples"],
    ["run/samples", "not empty"],
  ),
}


@pytest.fixture(scope="module")
def folder(digits_run, tmp_path_factory):
  """A folder to stand in, with a finished run and one that did not begin."""
  path = tmp_path_factory.mktemp("folder")
  shutil.copytree(digits_run.workdir, path / "run")
  config_lib.claim_workdir(digits_run.config, path / "new")
  return path


@pytest.mark.parametrize("mistake", BAD_INPUT)
def test_bad_input_is_one_line_and_changes_nothing(mistake, folder, tmp_path):
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  before = runs.snapshot(tmp_path)
  arguments, words = BAD_INPUT[mistake]
  code, _, errors = runs.call("vitgan_jax.main", *arguments, cwd=tmp_path)
  assert code == cli.EXIT_FINAL
  (line,) = [x for x in errors.splitlines() if x.startswith("error:")]
  assert all(word in line for word in words), line
  assert runs.snapshot(tmp_path) == before


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--wrokdir=new"], "wrokdir"),
    (
      ["--mode=sample", "--workdir=run", "--distributed"],
      "--distributed found no cluster",
    ),
  ],
)
def test_process_with_bad_input_ends_with_one_line_and_78(
  arguments, words, tmp_path
):
  code, output, errors = runs.run_main(*arguments, cwd=tmp_path)
  assert (code, output) == (78, "")
  (line,) = [x for x in errors.splitlines() if x.startswith("error:")]
  assert words in line and "Traceback" not in errors
  assert not list(tmp_path.iterdir())


def test_run_that_diverges_is_one_line_and_not_for_a_restart(
  tmp_path, monkeypatch
):
  def diverge(config, workdir):
    raise train.TrainingDivergedError("loss/d is nan")

  monkeypatch.setattr(train, "train_and_evaluate", diverge)
  result = runs.call("vitgan_jax.main", DIGITS, cwd=tmp_path)
  assert result == (cli.EXIT_FINAL, "", "error: loss/d is nan\n")


def test_command_trains_until_it_is_interrupted_and_its_run_goes_on(tmp_path):
  with runs.start_main(
    DIGITS, "--config.total_kimg=1000", cwd=tmp_path
  ) as process:
    for line in process.stdout:
      if "kimg  " in line:  # the first call is done
        process.send_signal(signal.SIGINT)
        break
    output, errors = process.communicate(timeout=300)
  assert process.returncode == cli.EXIT_STOPPED, errors
  assert "Traceback" not in errors
  assert output.endswith("Stopped. The same command goes on from here.\n")
  workdir = tmp_path / "runs" / "digits-smoke"  # by default
  step = runs.saved_steps(workdir)[-1]
  assert (workdir / "samples" / f"{step:08d}.png").exists()

  config = config_lib.load(workdir)
  assert config.total_kimg == 1000
  config.total_kimg = (step + 2) * config.batch_size / 1000
  run = runs.train_quietly(config, workdir)
  assert f"Resuming at step {step}:" in run.output
  assert int(run.state.step) == step + 2
