"""What is prepared: encoded images, wherever they come from."""

from collections.abc import Callable, Iterator
import dataclasses
import pathlib
import re

from vitgan_jax.data import archives
from vitgan_jax.errors import ConfigError

_PART = re.compile(r"([\w-]+)(?:\[(-?[\d.]*)%?:(-?[\d.]*)%?\])?")


@dataclasses.dataclass(frozen=True)
class Source:
  """The encoded images of a dataset, in a fixed order.

  Attributes:
    name: of the dataset, with its version.
    path: where its files are.
    licence: what it says of the use of the images.
    sizes: {split: number of images}.
    read: function of (split, start, stop) that yields these images of a split:
      the name, the bytes and the class (or None) of each. Threads call it.
    classes: their names, or None.
    unused: {kind: names} of what is there and no image of it.
  """

  name: str
  path: str | pathlib.Path
  licence: str
  sizes: dict[str, int]
  read: Callable[[str, int, int], Iterator[tuple[str, bytes, int | None]]]
  classes: list[str] | None = None
  unused: dict[str, list[str]] = dataclasses.field(default_factory=dict)

  def parts(self, splits):
    """Returns what a text like "train[:90%]+test" means.

    Args:
      splits: names of splits, each with or without its part in images or per
        cent; or "all".

    Returns:
      [(split, start, stop)], as `read` takes them.

    Raises:
      ConfigError: if that is no image, or no such text.
    """
    names = "+".join(self.sizes) if splits == "all" else splits
    try:
      parts = [self._part(name) for name in names.split("+")]
    except (AttributeError, KeyError, ValueError):
      parts = []
    if not count(parts):
      raise ConfigError(
        f"config.data.split={splits!r} has no images in {self.name}; it has "
        f"{', '.join(self.sizes)} and parts like 'train[:90%]'"
      )
    return parts

  def _part(self, text):
    name, *bounds = _PART.fullmatch(text.strip()).groups()
    size = self.sizes[name]

    def position(bound, default):
      if not bound:
        return default
      value = round(float(bound) * size / 100) if "%" in text else int(bound)
      if abs(value) > size:
        raise ValueError(f"{text}: there are {size} images")
      return value + size if value < 0 else value

    start, stop = position(bounds[0], 0), position(bounds[1], size)
    return name, start, max(start, stop)


def count(parts):
  """Returns the number of images in the parts of `Source.parts`."""
  return sum(stop - start for _, start, stop in parts)


def of_archives(name, path, licence, splits, classes=None, labels=None):
  """Returns the Source of images in archives.

  Args:
    name: of the dataset.
    path: where it is.
    licence: of the images.
    splits: {split: (archive, indices [N])}; see `archives.open_archive`.
    classes: their names, or None.
    labels: the class of each image of each archive, or None.
  """

  def read(split, start, stop):
    archive, indices = splits[split]
    for i in indices[start:stop]:
      label = None if labels is None else int(labels[i])
      yield archives.shown(archive.names[i]), archive.read(i), label

  sizes = {split: len(indices) for split, (_, indices) in splits.items()}
  unused = {
    kind: [archives.shown(x) for x in names]
    for archive, _ in splits.values()
    for kind, names in archive.unused.items()
  }
  return Source(f"{name}/1.0.0", path, licence, sizes, read, classes, unused)
