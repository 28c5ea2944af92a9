"""What all commands share: flags, quiet logs, and one line for bad input."""

import os
import pathlib
import re
import sys

from absl import app, flags, logging

from vitgan_jax.config import ConfigError


def run(main):
  """Runs `main(arguments)` of a command with what is left beside its flags.

  A wrong flag, a config that does not load, and a ConfigError of `main` end the
  process with one line on standard error and exit code 1.
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
      sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # while training, a run saves and ends by itself
      sys.exit("error: interrupted")

  app.run(guarded, flags_parser=_parse_flags)


def no_arguments(arguments):
  """Raises a ConfigError if a command that takes flags alone got a word."""
  if arguments:
    raise ConfigError(f"not a flag: {' '.join(arguments)}; see --help")


def config_stem(path):
  """Returns "digits-smoke" for configs/digits.py:smoke, to name folders."""
  file, *argument = path.split(":")
  return "-".join([pathlib.Path(file).stem, *argument])


def _parse_flags(argv):
  try:
    arguments = flags.FLAGS(argv)
    if "config" in flags.FLAGS and flags.FLAGS.config is not None:
      flags.FLAGS.config.keys()  # a file that does not load is reported here
  except (AttributeError, KeyError) as error:  # an override of no field
    field = re.sub(r"[\\'\"]", "", re.sub(r"\\n|\n", ". ", str(error)))
    sys.exit(f"error: no such field in the config: {field}")
  except Exception as error:  # whatever else a config file raises
    # A message may end in a whole traceback: the cause is in its last line.
    reason = [line for line in str(error).splitlines() if line.strip()][-1]
    sys.exit(f"error: {reason.strip()}; see --help")
  return arguments
