import numpy as np
from PIL import Image
import pytest

from vitgan_jax import pictures


@pytest.mark.parametrize(
  "num_images, rows, columns",
  [
    (1, 1, 1),
    (2, 1, 2),
    (3, 2, 2),
    (5, 2, 3),
    (7, 3, 3),
    (16, 4, 4),
    (64, 8, 8),
  ],
)
@pytest.mark.parametrize("size, gap", [(4, 0), (16, 1), (32, 2)])
def test_grid_has_the_images_in_rows(num_images, rows, columns, size, gap):
  rng = np.random.default_rng(0)
  images = rng.integers(1, 256, (num_images, size, size, 3), dtype=np.uint8)
  pitch = size + gap
  expected = np.zeros((rows * pitch - gap, columns * pitch - gap, 3), np.uint8)
  for i, image in enumerate(images):
    for y in range(size):
      for x in range(size):
        row, column = divmod(i, columns)
        expected[row * pitch + y, column * pitch + x] = image[y, x]
  grid = pictures.image_grid(images)
  assert grid.dtype == np.uint8
  np.testing.assert_array_equal(grid, expected)


@pytest.mark.parametrize("min_side, factor", [(0, 1), (4, 1), (5, 2), (12, 3)])
def test_png_is_enlarged_by_whole_pixels(tmp_path, min_side, factor):
  image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
  pictures.write_png(tmp_path / "image.png", image, min_side)
  with Image.open(tmp_path / "image.png") as written:
    pixels = np.asarray(written)
  np.testing.assert_array_equal(
    pixels, np.kron(image, np.ones((factor, factor, 1), np.uint8))
  )


def test_number_of_columns_can_be_given():
  images = np.random.default_rng(0).integers(
    0, 256, (6, 4, 4, 3), dtype=np.uint8
  )
  grid = pictures.image_grid(images, columns=2)
  assert grid.shape == (12, 8, 3)  # gaps of a sixteenth of 4 pixels are none
  np.testing.assert_array_equal(grid[4:8, :4], images[2])


def test_each_class_has_rows_of_its_own():
  # Seven images of 16 pixels: each is of one colour, its number.
  images = np.arange(1, 8, dtype=np.uint8).repeat(16 * 16 * 3)
  images = images.reshape(7, 16, 16, 3)
  grid = pictures.class_grid(images, [5, 2, 5, 5, 2, 5, 9, 0, 0])
  # Three columns, as a square has.
  np.testing.assert_array_equal(
    grid[8::17, 8::17, 0], [[1, 3, 4], [6, 0, 0], [2, 5, 0], [7, 0, 0]]
  )
  two_of_each = pictures.class_grid(images[:4], [1, 0, 1, 0])
  np.testing.assert_array_equal(two_of_each[8::17, 8::17, 0], [[1, 3], [2, 4]])


@pytest.mark.parametrize("labels", [None, [0, 1, 2, 3, 4, 5, 5]])
def test_images_without_a_class_in_common_are_laid_out_in_order(labels):
  images = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), np.uint8)
  np.testing.assert_array_equal(
    pictures.class_grid(images, labels), pictures.image_grid(images)
  )
