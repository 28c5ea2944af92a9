"""What all commands share: flags, quiet logs, and one line for bad input."""

import builtins
import contextlib
import errno
import io
import os
import pathlib
import re
import signal
import sys

from absl import app, flags, logging

from vitgan_jax import files
from vitgan_jax.errors import (
  ConfigError,
  lasting_fault,
  storage_errors,
  storage_fault,
)

# What `define_path` defines is its caller's, in --help too.
flags.disclaim_key_flags()

# How a command ends, beside 0; what restarts runs goes by these. A failure
# that another start may not meet, as a crash or a host that does not answer:
EXIT_FAILED = 1
# Bad input, or a run that diverged: 78. The same command would end so again.
EXIT_FINAL = os.EX_CONFIG
# A run that a signal stopped before its end, and that has saved: 143.
EXIT_STOPPED = 128 + signal.SIGTERM


def run(main):
  """Runs `main(arguments)` of a command with what is left beside its flags.

  A wrong flag, a config that does not load, a ConfigError of `main`, a fault of
  the disk or no device for JAX end the process with one line on standard error.
  What nobody reads any more, as of `| head -1`, ends nothing.
  """
  # TensorFlow only reads datasets and writes events here: keep it quiet.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  output, errors = map(_sturdy, (sys.stdout, sys.stderr))

  def guarded(argv):
    if not flags.FLAGS["verbosity"].present:
      # TensorFlow warns of itself, and Orbax tells of each thread of a failed
      # save with a trace: what is an error is raised, too.
      logging.set_verbosity(logging.FATAL)
    try:
      main(argv[1:])
    except ConfigError as error:
      fail(error)
    except storage_errors() as error:
      if getattr(error, "errno", 0) is None:  # not of the system
        raise
      name = getattr(error, "filename", None)
      code = EXIT_FINAL if lasting_fault(error) else EXIT_FAILED
      fail(f"{name}: " * bool(name) + storage_fault(error), code)
    except (AssertionError, RuntimeError):  # JAX raises either
      if not (reason := _missing_device()):
        raise
      fail(reason)
    except KeyboardInterrupt:  # while training, a run saves and ends by itself
      fail("interrupted", EXIT_FAILED)
    if isinstance(output, _Sturdy) and (fault := output.fault()):
      fail(f"what it printed is not whole: {fault.strerror}", EXIT_FAILED)

  try:
    with (
      contextlib.redirect_stdout(output),
      contextlib.redirect_stderr(errors),
    ):
      app.run(guarded, flags_parser=_parse_flags)
  except SystemExit:
    # A notebook's `%run` shows it as an error of ours.
    if not hasattr(builtins, "__IPYTHON__"):
      raise
  finally:
    _forget_flags()


class _Raw(io.FileIO):
  """A file descriptor; what cannot be written to it is dropped.

  Attributes:
    fault: OSError of the last write that failed; None where nobody reads any
      more, as a pipe or a terminal that is gone.
  """

  fault = None

  def write(self, data):
    """Writes all of the bytes, or none."""
    try:
      return super().write(data)
    except OSError as error:
      if error.errno not in (errno.EPIPE, errno.EIO):
        self.fault = error
      return len(data)


class _Sturdy(io.TextIOWrapper):
  """A text stream to which any text can be printed, at any time.

  A run outlives who reads what it prints. Letters that a terminal does not have
  are escaped.
  """

  def __init__(self, stream):
    """Writes to where another stream does."""
    stream.flush()
    self._raw = _Raw(stream.fileno(), "w", closefd=False)
    super().__init__(
      io.BufferedWriter(self._raw),
      stream.encoding,
      "backslashreplace",
      # The latter where Python shall not buffer, as by -u.
      line_buffering=stream.line_buffering or stream.write_through,
    )

  def fault(self):
    """Returns the OSError for which some text was lost, or None."""
    self.flush()
    return self._raw.fault


def _sturdy(stream):
  # Those of a notebook or of pytest have no descriptor of their own.
  return _Sturdy(stream) if type(stream) is io.TextIOWrapper else stream


def _forget_flags():
  """Lets a command run again in this process, as by `%run` of IPython."""
  for name in list(flags.FLAGS):
    module = flags.FLAGS.find_module_defining_flag(name, "")
    if module in (sys.argv[0], "launch.units") or name.startswith("config."):
      delattr(flags.FLAGS, name)


def _missing_device():
  """Returns a line on why JAX has no device; "" if it has one."""
  jax = sys.modules.get("jax")
  try:
    if jax:
      jax.devices()
  except (AssertionError, RuntimeError) as error:
    reason = str(error).split("\n")[0] or "nothing of that name is installed"
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return (
      f"no device for JAX_PLATFORMS={platforms!r}: {reason}. Leave it out, or "
      "install the accelerator's JAX (README, Start)"
    )
  return ""


def fail(message, code=EXIT_FINAL):
  """Ends the process with one line on standard error."""
  print(f"error: {message}", file=sys.stderr)
  sys.exit(code)


def no_arguments(arguments):
  """Raises a ConfigError if a command that takes flags alone got a word."""
  if arguments:
    raise ConfigError(f"not a flag: {' '.join(arguments)}; see --help")


def config_stem(path):
  """Returns "digits-smoke" for configs/digits.py:smoke, to name folders."""
  file, *argument = path.split(":")
  return "-".join([pathlib.Path(file).stem, *argument])


class _PathParser(flags.ArgumentParser):
  syntactic_help = "a path; ~ is the home folder"

  def parse(self, argument):
    return files.expand(argument)

  def flag_type(self):
    return "path"


def define_path(name, default, text):
  """Defines a flag of a path, which is expanded and not empty."""
  serializer = flags.ArgumentSerializer()
  return flags.DEFINE(_PathParser(), name, default, text, serializer=serializer)


def _found(argument):
  """Returns --config=FILE, or a word of a command line, with the file's place.

  The "~" that ml_collections would leave as it is becomes the home folder, and
  configs/NAME.py, where there is none, what came with the package.
  """
  match = re.fullmatch("(--?config=)(~.*)", argument, re.DOTALL)
  if match:
    return match[1] + files.expand(match[2])
  match = re.fullmatch(r"(--?config=)?(configs/\w+\.py)(:.*)?", argument)
  if match and not os.path.exists(match[2]):
    path = pathlib.Path(__file__).parent.parent / match[2]
    if path.exists():
      return f"{match[1] or ''}{path}{match[3] or ''}"
  return argument


def _parse_flags(argv):
  try:
    arguments = flags.FLAGS([*map(_found, argv)])
    if "config" in flags.FLAGS and flags.FLAGS.config is not None:
      flags.FLAGS.config.keys()  # a file that does not load is reported here
  except (AttributeError, KeyError) as error:  # an override of no field
    field = re.sub(r"[\\'\"]", "", re.sub(r"\\n|\n", ". ", str(error)))
    fail(f"no such field in the config: {field}")
  except Exception as error:  # whatever else a config file raises
    # A message may end in a whole traceback: the cause is in its last line.
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = lines[-1] if lines else type(error).__name__
    reason = re.sub(r"^(\w+\.)*\w*Error: ", "", reason.strip())
    fail(f"{reason}; see --help")
  return arguments
