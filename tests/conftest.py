"""Runs every test on eight CPU devices, compiled for speed of compilation."""

import atexit
import contextlib
import gc
import os
import signal
import sys
import tempfile

# Read when JAX starts its backend. Optimised code runs these toy sizes no
# faster, and takes twice as long to compile; fusions by MLIR take half as long
# again.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
  ]
)
# A background job of a script has it ignored, and so would all that tests start
# and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)
# What tests download, prepare and compile, away from the user's own.
_FOLDER = tempfile.TemporaryDirectory(prefix="vitgan_jax_tests_")
atexit.register(_FOLDER.cleanup)
os.environ["TFDS_DATA_DIR"] = os.path.join(_FOLDER.name, "datasets")
# Programs that several tests run, here, in other processes of pytest and in
# subprocesses, are compiled once. With a limit, JAX locks the folder: nobody
# reads what another is writing.
if "PYTEST_XDIST_WORKER" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(
    _FOLDER.name, "programs"
  )
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**34)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
# Of each operation, the line that it is from: all lines that led to it take a
# tenth of the time.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"

# The CUDA build of torch brings triton, whose LLVM crashes beside that of JAX.
sys.modules.setdefault("triton", None)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)


def pytest_collection_finish():
  """Hides all that is imported from the garbage collector.

  Half a million objects, which it would go through each time that a run looks
  for memory to give back: a fifth of the time of the tests that train.
  """
  gc.collect()
  gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish():
  """Shows it again: what is imported at the end may ask who refers to it."""
  gc.unfreeze()


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
  """A finished run of configs/digits.py:smoke; nothing is written into it."""
  from configs import digits
  from tests import runs  # late: it imports the whole package

  workdir = tmp_path_factory.mktemp("digits") / "run"
  return runs.train_quietly(digits.get_config("smoke"), workdir)


@pytest.fixture
def heard():
  """Signals that came to the handlers of before, which are not pytest's.

  Nor ignored, as nohup has that of a terminal that closes.
  """
  caught = []
  with contextlib.ExitStack() as stack:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
      before = signal.signal(signum, lambda signum, _: caught.append(signum))
      stack.callback(signal.signal, signum, before)
    yield caught
