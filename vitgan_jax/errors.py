"""What goes wrong that the user can put right, and how it is said."""

import errno
import importlib
import os
import sys

# Of the system: what another start would meet again.
_LASTING = [
  os.strerror(getattr(errno, name))
  for name in "ENOSPC EDQUOT EROFS EACCES EPERM ENOTDIR EISDIR EFBIG".split()
]


class ConfigError(ValueError):
  """Something that the user can put right; shown as one line."""


class DamagedError(ConfigError):
  """A file is not what was written."""


def import_extra(package, what, remedy):
  """Returns a package that not every installation has.

  Args:
    package: its name in Python.
    what: needs it, for the message.
    remedy: what to do, for the message.

  Raises:
    ConfigError: if it cannot be imported.
  """
  try:
    return importlib.import_module(package)
  except ImportError as error:
    raise ConfigError(
      f"{what} needs {package}, which cannot be imported ({error}): {remedy}"
    ) from error


def lasting_fault(error):
  """Returns why a disk or a path cannot be used, as a full one; else "".

  Args:
    error: an OSError, or what a library made of one.
  """
  return next((text for text in _LASTING if text in str(error)), "")


def storage_errors():
  """Returns the kinds of errors of a disk or a bucket, for `except`.

  A gs:// path is TensorFlow's, whose errors are no OSError.
  """
  errors = getattr(sys.modules.get("tensorflow"), "errors", None)
  return (OSError, errors.OpError) if errors else (OSError,)


def storage_fault(error):
  """Returns in a few words what one of the `storage_errors` says."""
  reason = getattr(error, "strerror", None) or str(error)
  return reason.strip().split("\n")[0] or type(error).__name__


def check_fields(
  values, where, *, choices=None, positive=(), not_negative=(), shares=()
):
  """Checks some fields of a config, or of a part of it.

  Args:
    values: {field: value}.
    where: comes before a field's name in messages, as "config.generator.".
    choices: {field: its allowed values}.
    positive: fields that must be positive and finite.
    not_negative: fields that must be at least 0 and finite.
    shares: fields that must be in [0, 1].

  Raises:
    ConfigError: says which field is wrong, and what is allowed.
  """
  for field, allowed in (choices or {}).items():
    if values[field] not in allowed:
      raise ConfigError(
        f"{where}{field}={values[field]!r} must be one of {', '.join(allowed)}"
      )
  for field in positive:
    if not 0 < values[field] < float("inf"):
      raise ConfigError(
        f"{where}{field}={values[field]} must be positive and finite"
      )
  for field in not_negative:
    if not 0 <= values[field] < float("inf"):
      raise ConfigError(
        f"{where}{field}={values[field]} must not be negative or infinite"
      )
  for field in shares:
    if not 0 <= values[field] <= 1:
      raise ConfigError(f"{where}{field}={values[field]} must be in [0, 1]")
