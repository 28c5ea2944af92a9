import numpy as np
from PIL import Image
import pytest

from tests.datasets import encode, noise
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


def test_photo_is_turned_upright():
  image = noise(4, 6, 3)
  exif = Image.Exif()
  exif[0x0112] = 6  # orientation: to be turned a quarter clockwise
  turned = as_array(encode(image, "PNG", exif=exif))
  np.testing.assert_array_equal(turned, np.rot90(image, -1))


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
