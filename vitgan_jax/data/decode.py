"""One image: from the bytes of a file to a square of RGB."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP")
FILTER = Image.Resampling.LANCZOS


def decode(encoded):
  """Decodes a PNG, JPEG or WebP of any colour mode.

  Grey becomes three equal channels; 16 bits are rounded to 8; what is
  transparent is laid over white; a photo is turned as its EXIF tag says.

  Args:
    encoded: the bytes of the file.

  Returns:
    A PIL image of mode RGB.

  Raises:
    Exception: Pillow raises many kinds for a file that is damaged.
  """
  try:
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
  except UnidentifiedImageError:  # its message is an address in memory
    raise ValueError(f"no {', '.join(FORMATS)}") from None
  image = ImageOps.exif_transpose(image)
  if image.mode.startswith("I"):
    # 16-bit grey: convert() would clip it at 255.
    values = np.asarray(image).astype(np.uint32)
    image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  return image.convert("RGB")


def crop_and_resize(image, size, crop=()):
  """Cuts a square out of an image and resizes it, antialiased (Lanczos).

  Args:
    image: a PIL image of mode RGB.
    size: S.
    crop: left, top, right and bottom of the square, in pixels; empty for the
      largest centred one.

  Returns:
    uint8 [S, S, 3].

  Raises:
    ValueError: if the image does not hold the whole square.
  """
  width, height = image.size
  if not crop:
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    crop = (left, top, left + side, top + side)
  if crop[2] > width or crop[3] > height:
    raise ValueError(f"{width} x {height} pixels do not hold {tuple(crop)}")
  # Cut first: given a box, Pillow's filter reads pixels from outside of it.
  image = image.crop(crop)
  if image.size != (size, size):
    image = image.resize((size, size), FILTER)
  return np.asarray(image)
