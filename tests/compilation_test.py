import os
import re
import shutil
import subprocess
import sys

import jax
import pytest

from tests import monitor_test, runs, tiny
from vitgan_jax import compilation, evaluate, sample, train
from vitgan_jax import config as config_lib


def start_twice(programs, *arguments, cwd):
  """Starts a command twice; asserts that the second compiles no `programs`."""
  expected = [(set(), programs), (programs, set())]
  folders = []
  for i in range(2):
    code, _, errors = runs.run_main(
      *(argument.format(i=i) for argument in arguments),
      cwd=cwd,
      HOME=str(cwd),
      JAX_COMPILATION_CACHE_DIR="",  # not that of the tests
      JAX_COMPILATION_CACHE_MAX_SIZE="-1",
      JAX_DEBUG_LOG_MODULES="jax._src.compiler",
    )
    assert code == 0, errors
    hits, misses = (
      set(re.findall(rf"compilation cache {word} for '(\w+)'", errors, re.I))
      for word in ("hit", "miss")
    )
    assert (hits & programs, misses & programs) == expected[i]
    folders.append(runs.snapshot(cwd / ".cache" / "vitgan_jax" / "programs"))
  before, after = folders
  assert {name.split("-")[0] for name in before} >= programs
  assert {name: after[name] for name in before} == before


@pytest.mark.slow
def test_second_start_does_not_compile_the_sampler(digits_run, tmp_path):
  shutil.copytree(digits_run.workdir, tmp_path / "run")
  start_twice(
    {"jit_sampler"},
    "--mode=sample",
    "--workdir=run",
    "--num_samples=3",
    "--output=samples{i}",
    cwd=tmp_path,
  )
  first, second = (runs.snapshot(tmp_path / f"samples{i}") for i in range(2))
  assert "000000.png" in first and first == second


@pytest.mark.slow
def test_second_start_does_not_compile_the_training(tmp_path):
  start_twice(
    {
      "jit_create_train_state",
      "jit_train_steps",
      "jit_sampler",
      "jit_diagnostics",
    },
    f"--config={runs.ROOT}/configs/digits.py:smoke",
    "--workdir=run{i}",
    cwd=tmp_path,
  )
  first, second = (
    [
      {k: v for k, v in line.items() if k != "images_per_sec"}
      for line in monitor_test.read_lines(tmp_path / f"run{i}")
    ]
    for i in range(2)
  )
  assert "loss/d" in first[0] and first == second


@pytest.fixture
def no_folder():
  """JAX as it is where the user names no folder."""
  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
  )
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update("jax_compilation_cache_dir", None)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.usefixtures("no_folder")
def test_folder_is_made_and_used(tmp_path, capsys):
  compilation.use_cache(str(tmp_path / "new" / "programs"))
  assert jax.config.jax_compilation_cache_dir == f"{tmp_path}/new/programs"
  assert jax.config.jax_persistent_cache_min_compile_time_secs < 0.3
  assert list(runs.snapshot(tmp_path)) == ["new", "new/programs"]
  assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("no_folder")
def test_no_folder_is_no_cache(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  compilation.use_cache("")
  assert jax.config.jax_compilation_cache_dir is None
  assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_folder")
@pytest.mark.parametrize("folder", ["file", "file/programs"])
def test_folder_that_cannot_be_used_is_told_of_and_left(
  folder, tmp_path, capsys
):
  (tmp_path / "file").write_text("mine")
  compilation.use_cache(str(tmp_path / folder))
  assert jax.config.jax_compilation_cache_dir is None
  assert runs.snapshot(tmp_path) == {"file": b"mine"}
  _, errors = capsys.readouterr()
  assert f"config.compilation_cache={tmp_path}/{folder}" in errors
  assert errors.count("\n") == 1


def test_folder_of_the_environment_stays(tmp_path):
  before = jax.config.jax_compilation_cache_dir
  assert before
  compilation.use_cache(str(tmp_path / "new"))
  assert jax.config.jax_compilation_cache_dir == before
  assert not list(tmp_path.iterdir())


_DAMAGES = """
import pathlib, random, sys, warnings
import jax
import numpy as np
from vitgan_jax import compilation

folder = pathlib.Path(sys.argv[1])
compilation.use_cache(str(folder))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
x = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)

def compute():
  jax.clear_caches()  # those in memory
  return np.asarray(jax.jit(lambda x: jax.numpy.tanh(x @ x).sum(0))(x))

expected = compute()
(path,) = folder.glob("jit__lambda*-cache")
content, rng, seen = path.read_bytes(), random.Random(0), 0
for i in range(100):
  damaged = bytearray(content)
  place = rng.randrange(len(content))
  damaged[place] ^= 1 << rng.randrange(8)
  path.write_bytes(damaged[:place] if i % 10 == 0 else damaged)
  with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    np.testing.assert_array_equal(compute(), expected)
  # Not of a bit that fills the last byte of what is compressed.
  seen += any("Error reading persistent" in str(x.message) for x in told)
print(seen)
"""


def test_damaged_program_is_compiled_anew(tmp_path):
  result = subprocess.run(
    [sys.executable, "-c", _DAMAGES, tmp_path / "programs"],
    cwd=runs.ROOT,
    env={k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 0, result.stderr
  assert 95 < int(result.stdout) <= 100


def test_functions_are_made_once_for_each_config():
  made = []

  @compilation.once_per_config
  def make(config, nets, mesh):
    made.append((config.batch_size, nets, mesh))
    return lambda: config.batch_size

  first = make(tiny.tiny_config(), "nets", "mesh")
  config = tiny.tiny_config()
  assert make(config, "nets", "mesh") is first
  before, config.batch_size = config.batch_size, 3
  assert make(config, "nets", "mesh") is not first
  assert make(tiny.tiny_config(), "others", "mesh") is not first
  config.batch_size = 5  # no matter to what was made
  assert first() == before and made == [
    (before, "nets", "mesh"),
    (3, "nets", "mesh"),
    (before, "others", "mesh"),
  ]


class _UsedError(Exception):
  pass


@pytest.mark.parametrize("mode", ["train", "sample", "evaluate"])
def test_every_mode_uses_the_folder_of_its_config(mode, tmp_path, monkeypatch):
  def use(folder):
    raise _UsedError(folder)

  monkeypatch.setattr(compilation, "use_cache", use)
  config = tiny.tiny_config(compilation_cache="here")
  workdir = tmp_path / "run"
  config_lib.claim_workdir(config, workdir)
  with pytest.raises(_UsedError, match=r"^here$"):
    if mode == "train":
      train.train_and_evaluate(config, workdir)
    elif mode == "sample":
      sample.sample(workdir, 1, 0, tmp_path / "new")
    else:
      evaluate.evaluate(workdir)
