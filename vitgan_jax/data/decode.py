"""One image: from the bytes of a file to a square of RGB."""

import io
import warnings

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError

FORMATS = (
  "PNG JPEG WEBP AVIF BMP DDS GIF ICO JPEG2000 PCX PPM PSD QOI SGI TGA TIFF"
).split()
FILTER = Image.Resampling.LANCZOS

# Pillow's own bounds are for what strangers send: large photographs and long
# comments are none of that. It warns of broken tags in good pictures.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")

_ORIENTATION = 0x0112  # tag of EXIF, whose values are
_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


def is_image(file):
  """Tells whether an open file is an image of FORMATS, by its content."""
  try:
    with Image.open(file, formats=FORMATS):
      return True
  except Exception:  # Pillow raises many kinds
    return False


def decode(encoded, max_pixels=2**30):
  """Decodes an image of one of FORMATS and of any colour mode.

  Grey becomes three equal channels; 16 bits become 8; colours of an ICC profile
  become those of sRGB; what is transparent is laid over white; a photo is
  turned as its EXIF tag says. Of several frames the first counts.

  Args:
    encoded: the bytes of the file.
    max_pixels: an image of more is an error; each takes three bytes, or six.

  Returns:
    A PIL image of mode RGB.

  Raises:
    Exception: Pillow raises many kinds for a file that is damaged.
  """
  if not encoded:
    raise ValueError("empty, or it cannot be read")
  try:
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
  except UnidentifiedImageError:  # its message is an address in memory
    raise ValueError("no image that Pillow reads") from None
  if image.width * image.height > max_pixels:
    raise ValueError(
      f"{image.width} x {image.height} are more than {max_pixels:,} pixels "
      "(config.data.max_pixels)"
    )
  transparent = image.info.get("transparency")
  if isinstance(transparent, tuple) and "16B" in str(image.tile):
    # Pillow takes the high bytes of 16 bits, but not of this colour.
    image.info["transparency"] = tuple(x >> 8 for x in transparent)
  image.load()
  turn, profile = _turn(image), image.info.get("icc_profile")
  if image.mode.startswith("I"):
    image = _to_eight_bits(image, transparent)
  if image.has_transparency_data:
    image = image.convert("RGBA")
  elif image.mode not in ("L", "CMYK"):
    image = image.convert("RGB")
  if profile:
    image = _to_srgb(image, profile)
  if image.mode == "RGBA":
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  image = image.convert("RGB")
  return image if turn is None else image.transpose(turn)


def _turn(image):
  """Returns what turns a photo upright, or None."""
  try:
    return _TURNS.get(image.getexif().get(_ORIENTATION))
  except Exception:  # a good picture may have broken tags
    return None


def _to_eight_bits(image, transparent):
  """Returns grey of 16 bits as one of 8, or with alpha; convert() clips it."""
  values = np.asarray(image)
  if values.min() < 0 or values.max() > 65_535:
    raise ValueError("grey values are not of 16 bits")
  grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
  result = Image.fromarray(grey)
  if transparent is not None:
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    result.putalpha(Image.fromarray(alpha))
  return result


def _to_srgb(image, profile):
  """Returns an image L, RGB, RGBA or CMYK in sRGB, as L becomes RGB."""
  try:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if "srgb" in ImageCms.getProfileDescription(profile).lower():
      return image
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    srgb = ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, profile, srgb, outputMode=mode)
  except (ImageCms.PyCMSError, OSError):  # broken, or of another mode
    return image


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
