import shutil

import pytest

from tests import runs
from vitgan_jax import cli
from vitgan_jax import config as config_lib
from vitgan_jax.config import ConfigError


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
  ["vitgan_jax.main", "vitgan_jax.visualize", "vitgan_jax.demo", "benchmarks"],
)
def test_help_shows_examples_and_flags(name, tmp_path):
  _, output, _ = runs.call(name, "--help", cwd=tmp_path)
  assert f"python -m {name}" in output
  assert "--workdir" in output or "--config" in output


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
