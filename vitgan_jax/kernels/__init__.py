"""Functions that TPUs run as one kernel, each beside its plain form.

`implementation` chooses: "xla" is the plain form, on any device; "pallas" the
kernel, on TPUs; "interpret" the kernel as ordinary operations, on any device.
"""

IMPLEMENTATIONS = ("xla", "pallas", "interpret")


class UnsupportedError(ValueError):
  """A kernel cannot take these shapes; says why, as part of a sentence."""
