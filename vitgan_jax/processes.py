"""Many processes that train or evaluate together, one on each host."""

import contextlib
import ctypes
import gc
import os
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils
import numpy as np

from vitgan_jax import files
from vitgan_jax.errors import ConfigError

_MESSAGE_BYTES = 1024
_CONNECT_SECONDS = 300
_FOR_OTHERS = "waiting for the other processes"


def initialize(
  detect, coordinator_address, num_processes, process_id, preemptible
):
  """Joins the processes of a run; before any other call of JAX.

  Does nothing unless it is asked to detect, or to connect. Where the others do
  not answer, or cannot be joined, the process ends with one line and exit code
  1: another start may find them.

  Args:
    detect: whether to ask the cluster who the others are: Cloud TPU, GKE,
      Slurm or MPI.
    coordinator_address: "host:port" of the first process, or None.
    num_processes: how many there are, or None.
    process_id: which one this is, from 0, or None.
    preemptible: whether SIGTERM to one is to be seen by all; then it ends
      none, see `StopSignal`.

  Raises:
    ConfigError: if the flags do not go together, or no processes are found.
  """
  flags = {
    "--coordinator_address": coordinator_address,
    "--num_processes": num_processes,
    "--process_id": process_id,
  }
  missing = [name for name, value in flags.items() if value is None]
  if len(missing) == len(flags):
    if not detect:
      return
    flags_of_jax = {}
  else:
    if missing or detect:
      raise ConfigError(
        f"{', '.join(flags)} must be given all together, without "
        "--distributed, which finds them out"
      )
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdigit():
      raise ConfigError(
        f"--coordinator_address={coordinator_address} must be HOST:PORT"
      )
    if not 0 <= process_id < num_processes:
      raise ConfigError(
        f"--process_id={process_id} must be from 0 to --num_processes - 1, and "
        f"--num_processes is {num_processes}"
      )
    flags_of_jax = dict(
      coordinator_address=coordinator_address,
      num_processes=num_processes,
      process_id=process_id,
      # Not those of a cluster, either.
      cluster_detection_method="deactivate",
    )
  jax.config.update("jax_enable_preemption_service", preemptible)
  # JAX aborts the process when its time is up, with a dump of all threads.
  alarm = threading.Timer(_CONNECT_SECONDS, _give_up)
  alarm.daemon = True
  alarm.start()
  try:
    with files.waiting(_FOR_OTHERS):
      jax.distributed.initialize(
        initialization_timeout=2 * _CONNECT_SECONDS, **flags_of_jax
      )
  except ValueError as error:
    raise ConfigError(
      "--distributed found no cluster (Cloud TPU, GKE, Slurm, MPI) around this "
      "process: give --coordinator_address, --num_processes and --process_id"
    ) from error
  except RuntimeError as error:  # the port is taken, for one
    sys.exit(
      f"error: cannot join the other processes: {str(error).splitlines()[0]}"
    )
  finally:
    alarm.cancel()


def _give_up():
  print(
    f"error: the processes did not find each other in {_CONNECT_SECONDS} s: "
    "start all of them within that time, with the first one's address as "
    "--coordinator_address, on a port that the network lets through",
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


def release_memory():
  """Gives memory that nothing needs any more back to the system.

  Python finds objects that refer to each other in a circle, as those that JAX
  makes for each call, once there are a quarter more objects than before: of the
  half a million of a run, after hours. The C library of Linux keeps what each
  thread frees for that thread: after compilation that is most of what a process
  holds, and it grows with the threads that write checkpoints.
  """
  gc.collect()
  libc = ctypes.CDLL(None) if sys.platform == "linux" else None
  if hasattr(libc, "malloc_trim"):  # not in every C library
    libc.malloc_trim(ctypes.c_size_t(0))


def is_primary():
  """Says whether this is the process that writes what one must write."""
  return jax.process_index() == 0


@contextlib.contextmanager
def raise_together():
  """Leaves the block when all processes have; an error of one is one of all.

  Without it, a process that ends would leave the others waiting for it in
  their next computation.

  Raises:
    ConfigError: that of the block, in this or in another process.
  """
  error = None
  try:
    yield
  except ConfigError as raised:
    error = raised
  if jax.process_count() > 1:
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    encoded = str(error or "").encode()[:_MESSAGE_BYTES]
    message[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    with files.waiting(_FOR_OTHERS):
      messages = multihost_utils.process_allgather(message)
    for i, other in enumerate(messages):
      if error is None and other.any():
        text = other.tobytes().rstrip(b"\0").decode(errors="ignore")
        raise ConfigError(f"process {i}: {text}")
  if error is not None:
    raise error


def broadcast_from_first(decision):
  """Returns the first process's yes or no: others may have other disks."""
  return bool(multihost_utils.broadcast_one_to_all(np.int32(decision)))


class StopSignal:
  """Turns the first SIGINT, SIGTERM or SIGHUP into a request to save and stop.

  The second one does what it did before; but SIGHUP, of which a terminal that
  closes may send several. A signal that is ignored stays so: SIGINT is in what
  a shell script runs in the background, SIGHUP under nohup.

  Where processes run together, SIGTERM to any of them is a request to all: JAX
  catches it, and passes it on.
  """

  def __init__(self):
    self._requested = False
    self._together = jax.distributed.is_initialized()

  def requested(self, step, steps_per_call):
    """Says whether to stop: at the same step in all processes.

    Args:
      step: steps done; each process calls this once after each call.
      steps_per_call: by how many steps the calls are apart.
    """
    if not self._together:
      return self._requested
    # JAX stops all at the first number that none of them has come to, and Orbax
    # asks for steps as well: so each step is asked for.
    asked = [
      multihost_utils.reached_preemption_sync_point(s + 1)
      for s in range(step - steps_per_call, step)
    ]
    return any(asked)

  def _request(self, signum, unused_frame):
    self._requested = True
    if signum != signal.SIGHUP:
      signal.signal(signum, self._before[signum])  # the second one is final
    if self._together:
      os.kill(os.getpid(), signal.SIGTERM)

  def __enter__(self):
    caught = [signal.SIGINT, signal.SIGHUP]
    caught += [signal.SIGTERM] * (not self._together)
    self._before = {
      signum: signal.signal(signum, self._request)
      for signum in caught
      if signal.getsignal(signum) != signal.SIG_IGN
    }
    return self

  def __exit__(self, *unused_exception):
    for signum, handler in self._before.items():
      signal.signal(signum, handler)
