"""What all commands share: flags, quiet logs, and one line for bad input."""

import os
import pathlib
import re
import sys

from absl import app, flags, logging

from vitgan_jax import files
from vitgan_jax.config import ConfigError

# How a command ends, beside 0; what restarts runs goes by these. A failure
# that another start may not meet, as a crash or a host that does not answer:
EXIT_FAILED = 1
# Bad input, or a run that diverged: 78. The same command would end so again.
EXIT_FINAL = os.EX_CONFIG


def run(main):
  """Runs `main(arguments)` of a command with what is left beside its flags.

  A wrong flag, a config that does not load, and a ConfigError of `main` end the
  process with one line on standard error and `EXIT_FINAL`.
  """
  # TensorFlow only reads datasets and writes events here: keep it quiet.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

  def guarded(argv):
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.ERROR)  # TensorFlow warns of itself
    try:
      main(argv[1:])
    except ConfigError as error:
      fail(error)
    except KeyboardInterrupt:  # while training, a run saves and ends by itself
      fail("interrupted", EXIT_FAILED)

  app.run(guarded, flags_parser=_parse_flags)


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


def _parse_flags(argv):
  try:
    # Of ml_collections, whose parser leaves "~" as it is.
    config = re.compile("(--?config=)(~.*)", re.DOTALL)
    argv = [
      found[1] + files.expand(found[2]) if (found := config.fullmatch(x)) else x
      for x in argv
    ]
    arguments = flags.FLAGS(argv)
    if "config" in flags.FLAGS and flags.FLAGS.config is not None:
      flags.FLAGS.config.keys()  # a file that does not load is reported here
  except (AttributeError, KeyError) as error:  # an override of no field
    field = re.sub(r"[\\'\"]", "", re.sub(r"\\n|\n", ". ", str(error)))
    fail(f"no such field in the config: {field}")
  except Exception as error:  # whatever else a config file raises
    # A message may end in a whole traceback: the cause is in its last line.
    reason = [line for line in str(error).splitlines() if line.strip()][-1]
    reason = re.sub(r"^(\w+\.)*\w*Error: ", "", reason.strip())
    fail(f"{reason}; see --help")
  return arguments
