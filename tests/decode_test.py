import io
import struct
import zlib

import numpy as np
from PIL import Image, PngImagePlugin
import pytest

from tests.datasets import encode, noise, swapped_profile
from vitgan_jax.data import decode


def as_array(encoded):
  return np.asarray(decode.decode(encoded))


@pytest.mark.parametrize(
  "kind, options", [("PNG", {}), ("WEBP", {"lossless": True})]
)
def test_colours_come_back(kind, options):
  image = noise(6, 5, 3)
  np.testing.assert_array_equal(as_array(encode(image, kind, **options)), image)


def test_jpeg_comes_back_nearly():
  image = np.asarray(Image.fromarray(noise(4, 4, 3)).resize((32, 32)))
  error = as_array(
    encode(image, "JPEG", quality=100, subsampling=0)
  ) - image.astype(int)
  assert np.abs(error).max() <= 4  # rounding of YCbCr and of the transform


def test_grey_becomes_three_equal_channels():
  image = noise(6, 5)
  decoded = as_array(encode(image))
  for channel in range(3):
    np.testing.assert_array_equal(decoded[..., channel], image)


def test_sixteen_bits_are_rounded_to_eight():
  values = np.array([[0, 127, 128, 129, 385, 386, 30_000, 65_535]], np.uint16)
  expected = np.rint(values / 65_535 * 255)
  np.testing.assert_array_equal(as_array(encode(values))[..., 0], expected)


def test_two_levels_become_black_and_white():
  image = Image.fromarray(noise(4, 4) > 127)
  assert image.mode == "1"
  expected = 255 * np.asarray(image)
  np.testing.assert_array_equal(as_array(encode(image))[..., 1], expected)


def test_palette_is_looked_up():
  image = Image.fromarray(noise(2, 3, 3)).convert("P")
  expected = np.asarray(image.convert("RGB"))
  np.testing.assert_array_equal(as_array(encode(image)), expected)


def test_what_is_transparent_becomes_white():
  image = noise(4, 4, 4)
  image[0, :, 3], image[1, :, 3] = 0, 255
  decoded = as_array(encode(image))
  alpha = image[..., 3:] / 255
  blended = alpha * image[..., :3] + (1 - alpha) * 255
  np.testing.assert_array_equal(decoded[0], 255)
  np.testing.assert_array_equal(decoded[1], image[1, :, :3])
  np.testing.assert_allclose(decoded, blended, atol=1)


def test_grey_with_alpha_and_palette_with_a_transparent_colour():
  image = noise(3, 3, 2)
  image[..., 1] = 0
  assert np.all(as_array(encode(Image.fromarray(image, "LA"))) == 255)
  palette = Image.new("P", (2, 2))
  palette.putpalette([10, 20, 30, 40, 50, 60])
  palette.putpixel((1, 1), 1)
  decoded = as_array(encode(palette, transparency=1))
  np.testing.assert_array_equal(decoded[0, 0], [10, 20, 30])
  np.testing.assert_array_equal(decoded[1, 1], [255, 255, 255])


def png(colour_type, values, *chunks, size=None):
  """Returns a PNG of 16 bits that Pillow would not write.

  Args:
    colour_type: 0 is grey, 2 RGB.
    values: uint16 [H, W] or [H, W, 3].
    *chunks: (name, content) to be put before the pixels.
    size: width and height that are stated, if they are not those of the values.
  """
  height, width = values.shape[:2]
  rows = values.astype(">u2").reshape(height, -1)
  header = struct.pack(
    ">II5B", *(size or (width, height)), 16, colour_type, 0, 0, 0
  )
  pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
  result = b"\x89PNG\r\n\x1a\n"
  for name, content in [
    (b"IHDR", header),
    *chunks,
    (b"IDAT", pixels),
    (b"IEND", b""),
  ]:
    checksum = zlib.crc32(name + content)
    result += struct.pack(">I", len(content)) + name + content
    result += struct.pack(">I", checksum)
  return result


def test_transparent_colour_of_sixteen_bits_becomes_white():
  values = np.array([[0, 1000, 30_000, 65_535]], np.uint16)
  transparent = (b"tRNS", struct.pack(">H", 0))
  decoded = as_array(png(0, values, transparent))
  np.testing.assert_array_equal(decoded[0, :, 0], [255, 4, 117, 255])
  colours = np.stack([values, values, values + 1], axis=-1)
  transparent = (b"tRNS", struct.pack(">HHH", 1000, 1000, 1001))
  decoded = as_array(png(2, colours, transparent))
  np.testing.assert_array_equal(decoded[0, :3, 0], [0, 255, 117])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_colours_of_a_profile_become_those_of_srgb(kind):
  image = noise(5, 6, 3)
  decoded = as_array(encode(image, kind, icc_profile=swapped_profile()))
  error = decoded.astype(int) - image[..., ::-1]
  assert np.abs(error).max() <= 2
  with_alpha = np.dstack([image, np.where(image[..., 0] > 127, 255, 0)])
  decoded = as_array(
    encode(with_alpha.astype(np.uint8), kind, icc_profile=swapped_profile())
  )
  expected = np.where(image[..., :1] > 127, image[..., ::-1], 255)
  assert np.abs(decoded.astype(int) - expected).max() <= 2


def test_profile_of_srgb_or_of_no_use_changes_nothing():
  image = noise(5, 6, 3)
  # Profiles of sRGB differ in their last digits: their name is looked at.
  for profile in (swapped_profile("sRGB"), b"broken", swapped_profile()[:300]):
    decoded = as_array(encode(image, icc_profile=profile))
    np.testing.assert_array_equal(decoded, image)
  grey = as_array(encode(image[..., 0], icc_profile=swapped_profile()))
  np.testing.assert_array_equal(grey[..., 0], image[..., 0])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_broken_exif_does_not_matter(kind):
  image = np.asarray(Image.fromarray(noise(4, 6, 3)).resize((48, 32)))
  exif = Image.Exif()
  exif[0x0112], exif[0x010E] = 6, "description"
  whole, rng = exif.tobytes(), np.random.default_rng(0)
  for i in range(60):
    broken = np.frombuffer(whole[: i + 6], np.uint8).copy()
    if i % 2:
      broken = np.frombuffer(whole, np.uint8).copy()
      broken[rng.integers(6, len(whole), 4)] = rng.integers(0, 256, 4)
    decoded = as_array(encode(image, kind, exif=broken.tobytes()))
    assert decoded.shape in ((32, 48, 3), (48, 32, 3))


def test_long_texts_do_not_matter():
  info = PngImagePlugin.PngInfo()
  info.add_itxt("XML:com.adobe.xmp", "x" * 3_000_000)
  info.add_text("comment", "y" * 3_000_000, zip=True)
  image = noise(4, 4, 3)
  np.testing.assert_array_equal(as_array(encode(image, pnginfo=info)), image)


def test_large_image_is_one_up_to_the_bound():
  header = png(0, np.zeros((1, 1)), size=(15_000, 15_000))
  assert decode.is_image(io.BytesIO(header))
  decode.decode(encode(noise(5, 4)), max_pixels=20)
  with pytest.raises(ValueError, match=r"3 x 7 .* 20 pixels .*max_pixels"):
    decode.decode(encode(noise(7, 3)), max_pixels=20)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_photo_is_turned_upright(kind, orientation):
  image = noise(4, 6, 3)
  exif = Image.Exif()
  exif[0x0112] = orientation
  turned = as_array(encode(image, kind, exif=exif))
  # Of EXIF: where row 0 and column 0 of what is stored belong.
  expected = {
    1: image,
    2: image[:, ::-1],
    3: image[::-1, ::-1],
    4: image[::-1],
    5: image.swapaxes(0, 1),
    6: np.rot90(image, -1),
    7: image[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90(image),
  }[orientation]
  np.testing.assert_array_equal(turned, expected)


@pytest.mark.parametrize(
  "content", [b"", b"text", encode(noise(9, 9, 3))[:200]]
)
def test_damaged_file_raises_the_same_message_each_time(content):
  messages = set()
  for _ in range(2):
    with pytest.raises(Exception) as error:
      decode.decode(content)
    messages.add(str(error.value))
  assert len(messages) == 1


@pytest.mark.parametrize(
  "shape, box",  # left, top, right, bottom
  [
    ((40, 40), (0, 0, 40, 40)),
    ((218, 178), (0, 20, 178, 198)),
    ((30, 77), (23, 0, 53, 30)),
    ((33, 20), (0, 6, 20, 26)),
  ],
)
@pytest.mark.parametrize("size", [8, 16, 64])
def test_centred_square_is_cut_out_then_resized(shape, box, size):
  image = Image.fromarray(noise(*shape, 3))
  expected = image.crop(box).resize((size, size), Image.Resampling.LANCZOS)
  np.testing.assert_array_equal(
    decode.crop_and_resize(image, size), np.asarray(expected)
  )


def test_image_of_the_right_height_is_only_cropped():
  image = noise(32, 40, 3)
  np.testing.assert_array_equal(
    decode.crop_and_resize(Image.fromarray(image), 32), image[:, 4:36]
  )


def test_crop_box_is_left_top_right_bottom():
  image = noise(20, 30, 3)
  square = decode.crop_and_resize(Image.fromarray(image), 8, (12, 5, 20, 13))
  np.testing.assert_array_equal(square, image[5:13, 12:20])


def test_what_lies_outside_the_square_does_not_matter():
  image = noise(64, 40, 3)
  other = noise(64, 40, 3, seed=1)
  other[12:52] = image[12:52]
  np.testing.assert_array_equal(
    decode.crop_and_resize(Image.fromarray(image), 16),
    decode.crop_and_resize(Image.fromarray(other), 16),
  )


def test_shrinking_is_antialiased():
  # Stripes of one pixel average to grey: skipping pixels would keep them.
  image = np.zeros((64, 64, 3), np.uint8)
  image[:, ::2] = 255
  small = decode.crop_and_resize(Image.fromarray(image), 8)
  assert np.abs(small.astype(int) - 127).max() < 20


@pytest.mark.parametrize("crop", [(0, 0, 11, 11), (5, 0, 15, 10)])
def test_image_smaller_than_the_crop_is_refused(crop):
  with pytest.raises(ValueError, match="10 x 10"):
    decode.crop_and_resize(Image.fromarray(noise(10, 10, 3)), 8, crop)
