import shlex
import subprocess

import pytest

from configs import cifar10
from launch import units
from tests import runs
from vitgan_jax.errors import ConfigError

SWEEPS = sorted((runs.ROOT / "configs" / "sweeps").glob("[a-z]*.py"))


def make(sweep=None, overrides=None, workdir=None, path="configs/cifar10.py"):
  config = cifar10.get_config()
  overrides = overrides or {}
  config.update_from_flattened_dict(overrides)
  return units.make_units(path, config, overrides, sweep, workdir)


def written(folder, text):
  path = folder / "sweep.py"
  path.write_text(f"def sweep(add):\n  {text}\n")
  return str(path)


def test_without_a_sweep_it_is_the_run_of_main():
  (unit,) = make(path="configs/cifar10.py:smoke")
  assert unit.name == "cifar10-smoke"
  assert unit.workdir == "runs/cifar10-smoke"
  assert unit.arguments == (
    "--config=configs/cifar10.py:smoke",
    "--workdir=runs/cifar10-smoke",
  )


def test_each_unit_has_its_name_folder_and_fields(tmp_path):
  text = (
    "[add({'seed': s, 'discriminator.attention': a, 'batch_size': 64})"
    " for s in (1, 2) for a in ('l2', 'dot')]"
  )
  made = make(written(tmp_path, text), {"total_kimg": 5.0}, "runs/x")
  assert [unit.name for unit in made] == [
    "seed=1,attention=l2",
    "seed=1,attention=dot",
    "seed=2,attention=l2",
    "seed=2,attention=dot",
  ]
  assert made[1].workdir == "runs/x/seed=1,attention=dot"
  assert made[1].arguments[2:] == (
    "--config.total_kimg=5.0",
    "--config.seed=1",
    "--config.discriminator.attention=dot",
    "--config.batch_size=64",
  )


def test_another_kind_of_network_comes_with_its_own_fields(tmp_path):
  text = (
    "[add({'discriminator.kind': 'biggan', 'discriminator.num_halvings': n})"
    " for n in (1, 2)]"
  )
  sweep = written(tmp_path, text)
  made = make(sweep, {"seed": 3}, path="configs/cifar10.py:smoke")
  assert [unit.name for unit in made] == ["num_halvings=1", "num_halvings=2"]
  assert made[1].arguments[::2] == (
    "--config=configs/cifar10.py:smoke,d=biggan",
    "--config.seed=3",
  )
  assert made[1].arguments[3] == "--config.discriminator.num_halvings=2"
  with pytest.raises(ConfigError, match='"width" does not exist'):
    make(sweep, {"discriminator.width": 32})


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_gives_units_of_its_own(path):
  made = make(str(path))
  assert len(made) == len({unit.workdir for unit in made}) >= 4
  assert all(
    unit.workdir == f"runs/cifar10-{path.stem}/{unit.name}" for unit in made
  )


def test_names_are_safe_and_commands_quoted(tmp_path):
  hostile = "a b$(touch pwned);'\""
  sweep = written(tmp_path, f"add({{'data.path': {hostile!r}}})")
  (unit,) = make(sweep, workdir=hostile)
  assert unit.name == "path=a_b__touch_pwned____"
  assert shlex.split(unit.command)[3:] == list(unit.arguments)
  assert f"--config.data.path={hostile}" in unit.arguments
  seen = subprocess.run(
    ["sh", "-c", unit.command.replace("python -m", "printf '%s\\n'", 1)],
    capture_output=True,
    text=True,
    cwd=tmp_path,
  ).stdout.splitlines()
  assert seen[1:] == list(unit.arguments)
  assert [path.name for path in tmp_path.iterdir()] == ["sweep.py"]


@pytest.mark.parametrize(
  "text, words",
  [
    ("add({'sed': 1})", "sed"),
    ("add({'g_optimizer.nix': 1})", "nix"),
    ("add({'seed': 'one'})", "seed"),
    ("add({'g_optimizer.b1': 2.0})", "must be in"),
    ("add({'total_kimg': 1.0})", "leave --config.total_kimg out"),
    ("add({'generator.kind': 'nix'})", "must be one of vitgan"),
    ("add({'generator.kind': 'cips', 'generator.depth': 1})", "depth"),
    ("add({'seed': 1}); add({'seed': 1})", "two work units of the name"),
    ("add({})", "without a change"),
    ("pass", "adds no work unit"),
    ("1 / 0", "ZeroDivisionError"),
    ("{}['seed']", "cannot be read: KeyError: 'seed'"),
  ],
)
def test_a_sweep_that_cannot_be_run_is_refused(text, words, tmp_path):
  with pytest.raises(ConfigError, match=words):
    make(written(tmp_path, text), {"total_kimg": 5.0})


def test_a_file_without_a_sweep_is_refused(tmp_path):
  (tmp_path / "sweep.py").write_text("")
  with pytest.raises(ConfigError, match="no function sweep"):
    make(str(tmp_path / "sweep.py"))
  with pytest.raises(ConfigError, match="cannot be read"):
    make(str(tmp_path / "missing.py"))


def test_the_command_line_prints_a_line_for_each_unit():
  _, output, _ = runs.call(
    "launch.units",
    "--config=configs/digits.py:smoke",
    "--sweep=configs/sweeps/seeds.py",
    "--config.data.crop=(0, 0, 8, 8)",
    "--workdir=gs://bucket/a b",
    cwd=runs.ROOT,
  )
  lines = output.splitlines()
  assert len(lines) == 5
  name, workdir, command = lines[3].split("\t")
  assert (name, workdir) == ("seed=3", "gs://bucket/a b/seed=3")
  # main reads from it what was meant
  arguments = shlex.split(command)
  assert arguments[:3] == ["python", "-m", "vitgan_jax.main"]
  assert f"--workdir={workdir}" in arguments
  assert "--config.data.crop=(0, 0, 8, 8)" in arguments
  assert "--config.seed=3" in arguments


def test_the_command_line_answers_bad_input_in_one_line():
  for arguments, words in (
    ([], "--config=configs/<name>.py is required"),
    (["--config=configs/digits.py", "--config.seed=-1"], "seed"),
    (["--config=configs/digits.py", "--sweep=no.py"], "no.py"),
  ):
    assert words in runs.refusal("launch.units", *arguments, cwd=runs.ROOT)
