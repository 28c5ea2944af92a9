import contextlib
import errno
import os
import runpy
import shutil
import subprocess
import sys

from absl import app
import jax
import pytest
import setuptools

from tests import runs
from vitgan_jax import cli
from vitgan_jax import config as config_lib
from vitgan_jax.errors import ConfigError


def test_words_that_are_no_flags_are_refused():
  cli.no_arguments([])
  with pytest.raises(ConfigError, match="not a flag: workdir=a b"):
    cli.no_arguments(["workdir=a", "b"])


@pytest.mark.parametrize(
  "name, arguments, words",
  [
    ("benchmarks", [], "usage"),
    ("benchmarks", ["trian", "--config=x.py"], "x.py"),
    ("vitgan_jax.visualize", ["--workdir=nowhere"], "nowhere is not a"),
    ("vitgan_jax.judge_digits", ["--workdir=nowhere"], "nowhere is not a"),
    ("vitgan_jax.judge_digits", ["--wrokdir=nowhere"], "wrokdir"),
  ],
)
def test_every_command_answers_bad_input_in_one_line(
  name, arguments, words, tmp_path
):
  code, _, errors = runs.call(name, *arguments, cwd=tmp_path)
  assert code == cli.EXIT_FINAL
  (line,) = errors.splitlines()
  assert line.startswith("error: ") and words in line
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "name, flag",
  [
    ("vitgan_jax.main", "workdir"),
    ("vitgan_jax.main", "output"),
    ("vitgan_jax.main", "inception_weights"),
    ("vitgan_jax.data.prepare", "data_dir"),
    ("vitgan_jax.visualize", "workdir"),
    ("vitgan_jax.judge_digits", "workdir"),
    ("vitgan_jax.demo", "workdir"),
    ("vitgan_jax.project", "output"),
    ("vitgan_jax.film", "output"),
    ("vitgan_jax.export", "output"),
    ("vitgan_jax.metrics.score", "inception_weights"),
    ("launch.units", "workdir"),
    ("launch.local", "sweep"),
  ],
)
def test_every_path_is_expanded_and_not_empty(
  name, flag, tmp_path, monkeypatch
):
  code, _, errors = runs.call(name, f"--{flag}=", cwd=tmp_path)
  assert code == cli.EXIT_FINAL
  assert errors.startswith(f"error: flag --{flag}=: the path is empty")
  monkeypatch.setenv("HOME", "")
  code, _, errors = runs.call(name, f"--{flag}=~/x", cwd=tmp_path)
  assert code == cli.EXIT_FINAL
  assert errors.startswith(f"error: flag --{flag}=~/x: there is no home folder")
  assert not list(tmp_path.iterdir())


def test_home_folder_is_put_into_flags(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  shutil.copy(runs.ROOT / "configs" / "digits.py", tmp_path)
  code, output, errors = runs.call(
    "launch.units", "--config=~/digits.py:smoke", "--workdir=~/x", cwd=tmp_path
  )
  assert code == 0, errors
  assert f"--config={tmp_path}/digits.py:smoke" in output
  assert f"--workdir={tmp_path}/x" in output and "~" not in output


@pytest.mark.parametrize(
  "name",
  [
    "vitgan_jax.main",
    "vitgan_jax.visualize",
    "vitgan_jax.demo",
    "vitgan_jax.project",
    "vitgan_jax.film",
    "vitgan_jax.export",
    "benchmarks",
  ],
)
def test_help_shows_examples_and_flags(name, tmp_path):
  _, output, _ = runs.call(name, "--help", cwd=tmp_path)
  assert f"python -m {name}" in output
  assert "\n  --workdir: " in output or name == "benchmarks"


def test_process_shows_its_help(tmp_path):
  _, output, _ = runs.run_main("--help", cwd=tmp_path)
  assert "python -m vitgan_jax.main --config=configs/digits.py" in output


def test_interrupted_command_is_one_line_and_may_be_started_again(
  tmp_path, monkeypatch
):
  def interrupt(unused_workdir):
    raise KeyboardInterrupt

  monkeypatch.setattr(config_lib, "load", interrupt)
  result = runs.call("vitgan_jax.judge_digits", cwd=tmp_path)
  assert result == (cli.EXIT_FAILED, "", "error: interrupted\n")


def run_printing_to(stream, monkeypatch, main):
  """Runs a function as a command that prints to a stream of the system."""
  monkeypatch.setattr(app, "run", lambda run, flags_parser: run(["command"]))
  with contextlib.redirect_stdout(stream):
    cli.run(lambda unused_arguments: main())


def test_letters_that_a_terminal_does_not_have_are_escaped(
  tmp_path, monkeypatch
):
  with open(tmp_path / "ascii", "w", encoding="ascii") as file:
    run_printing_to(file, monkeypatch, lambda: print("Fréchet in bücher/"))
  text = (tmp_path / "ascii").read_text("ascii")
  assert text == "Fr\\xe9chet in b\\xfccher/\n"


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_command_outlives_who_reads_what_it_prints(kind, monkeypatch):
  reader, writer = os.pipe() if kind == "pipe" else os.openpty()
  os.close(reader)
  done = []

  def main():
    for _ in range(1000):
      print("a line" * 100, flush=True)
    done.append(True)

  with open(writer, "w") as file:
    run_printing_to(file, monkeypatch, main)
  assert done


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only on Linux")
def test_text_that_a_full_disk_does_not_take_is_told_of(monkeypatch, capsys):
  with open("/dev/full", "w") as file, pytest.raises(SystemExit) as end:
    run_printing_to(file, monkeypatch, lambda: print("scores"))
  assert end.value.code == cli.EXIT_FAILED
  line = "error: what it printed is not whole: No space left on device\n"
  assert capsys.readouterr().err == line


@pytest.mark.parametrize(
  "error, code, line",
  [
    (OSError(errno.ENOSPC, "No space left on device", "a"), 78, "a: No space"),
    (PermissionError(errno.EACCES, "Permission denied", "a"), 78, "a: Perm"),
    (OSError(errno.EIO, "Input/output error"), 1, "Input/output error"),
  ],
)
def test_fault_of_the_disk_is_one_line(error, code, line, monkeypatch, capsys):
  def main():
    raise error

  with pytest.raises(SystemExit) as end:
    run_printing_to(sys.stdout, monkeypatch, main)
  assert end.value.code == code
  errors = capsys.readouterr().err
  assert errors.startswith(f"error: {line}") and errors.count("\n") == 1


def test_fault_of_our_own_is_raised(monkeypatch):
  for error in (OSError("no image"), RuntimeError("a"), AssertionError()):

    def main(error=error):
      raise error

    with pytest.raises(type(error)) as raised:
      run_printing_to(sys.stdout, monkeypatch, main)
    assert raised.value is error


def test_platform_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
  program = (
    "import jax; from vitgan_jax import cli; cli.run(lambda _: jax.{}())"
  )
  code, output, errors = runs.run_main(
    cwd=tmp_path,
    program=("-c", program.format("devices")),
    JAX_PLATFORMS="abacus",
  )
  assert (code, output, errors.count("\n")) == (cli.EXIT_FINAL, "", 1)
  assert errors.startswith("error: no device for JAX_PLATFORMS='abacus': ")

  def devices():  # as JAX does for "cuda" without its plugin
    raise AssertionError

  monkeypatch.setattr(jax, "devices", devices)
  with pytest.raises(SystemExit) as end:
    run_printing_to(sys.stdout, monkeypatch, jax.devices)
  assert end.value.code == cli.EXIT_FINAL
  assert "nothing of that name is installed" in capsys.readouterr().err


def test_commands_run_again_and_again_in_ipython(tmp_path):
  pytest.importorskip("IPython", reason="pip install -e '.[test]'")
  config = f"--config={runs.ROOT}/configs/digits.py:smoke"
  lines = [
    f"%run -m launch.units -- {config} --config.seed=3",
    f"%run -m launch.units -- {config} --workdir=here",
    "%run -m launch.units -- --wrokdir=here",
    "%run -m launch.units -- --help",
    "print('the end')",
  ]
  process = subprocess.run(
    [sys.executable, "-m", "IPython", "--quick", "-c", "\n".join(lines)],
    cwd=tmp_path,
    env={
      **os.environ,
      "PYTHONPATH": str(runs.ROOT),
      "IPYTHONDIR": str(tmp_path),
    },
    capture_output=True,
    text=True,
  )
  output = process.stdout
  assert output.count("--workdir=runs/digits-smoke --config.seed=3\n") == 1
  assert output.count("--workdir=here\n") == 1  # and no seed
  assert "error: Unknown command line flag 'wrokdir'" in process.stderr
  assert "Lists the work units of a sweep" in output
  assert output.endswith("the end\n")
  for word in ("Traceback", "SystemExit", "Duplicate"):
    assert word not in output + process.stderr, process.stderr


def test_configs_come_with_the_package_and_are_found_from_anywhere(
  tmp_path, monkeypatch
):
  made = {}
  monkeypatch.setattr(setuptools, "setup", made.update)
  monkeypatch.chdir(runs.ROOT)
  runpy.run_path("setup.py")
  assert {"configs", "vitgan_jax", "vitgan_jax.data"} <= set(made["packages"])
  for flag in (
    ["--config=configs/digits.py:smoke"],
    ["--config", "configs/digits.py"],
  ):
    code, output, errors = runs.call("launch.units", *flag, cwd=tmp_path)
    assert (code, errors) == (0, "")
    assert f"--config={runs.ROOT}/configs/digits.py" in output
  # The user's own comes first.
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "digits.py").write_text("1 / 0")
  code, _, errors = runs.call("launch.units", *flag, cwd=tmp_path)
  assert code == cli.EXIT_FINAL and "division by zero" in errors
