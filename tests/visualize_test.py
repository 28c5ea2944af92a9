import json
import shutil

import numpy as np
from PIL import Image
import pytest

from tests import runs
from vitgan_jax import config as config_lib
from vitgan_jax import visualize
from vitgan_jax.data import pipeline
from vitgan_jax.errors import ConfigError


@pytest.fixture
def figures(monkeypatch):
  """Returns the list of the figures that are drawn."""
  made = []

  class Figure(visualize.Figure):
    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      made.append(self)

  monkeypatch.setattr(visualize, "Figure", Figure)
  return made


def test_curves_show_the_last_value_logged_for_a_step(
  digits_run, tmp_path, figures
):
  (tmp_path / "config.json").write_text(
    (digits_run.workdir / "config.json").read_text()
  )
  log = [(250, 9.0), (500, 7.0), (250, 1.0), (750, 2.0)]
  (tmp_path / "metrics.jsonl").write_text(
    "".join(json.dumps({"step": s, "loss/d": v}) + "\n" for s, v in log)
  )
  path = visualize.draw_curves(tmp_path)
  line = figures[0].axes[0].lines[0]
  # Steps of 8 images each, in thousands of images.
  np.testing.assert_array_equal(
    line.get_xydata(), [[2.0, 1.0], [4.0, 7.0], [6.0, 2.0]]
  )
  # What a network does not have has neither a panel nor a name.
  (axis,) = (axis for axis in figures[0].axes if axis.axison)
  (name,) = axis.get_legend().get_texts()
  assert (axis.get_title(), name.get_text()) == ("Losses", "d")
  assert np.asarray(Image.open(path)).std() > 0


def test_curves_of_a_run_have_every_scalar(digits_run, tmp_path, figures):
  for name in ("config.json", "metrics.jsonl"):
    (tmp_path / name).write_bytes((digits_run.workdir / name).read_bytes())
  visualize.draw_curves(tmp_path)
  lines = [line for axis in figures[0].axes for line in axis.lines]
  assert len(lines) == 16 and all(len(line.get_xdata()) for line in lines)


def test_attention_picture_is_bright_where_the_map_is():
  images = np.full((2, 16, 16, 3), 100, np.uint8)
  maps = np.zeros((2, 3, 4, 4), np.float32)
  maps[0, :, 0, 0] = 0.5
  maps[1, 2] = [[0, 0, 0, 0.01]] * 4
  maps[1, :2, 1, 2] = 1.0
  picture = visualize.attention_picture(images, maps)
  # Two rows of the image and three maps, each of 64 pixels and a gap of 4.
  assert picture.shape == (132, 268, 3) and picture.dtype == np.uint8
  cells = [
    [picture[68 * i : 68 * i + 64, 68 * j : 68 * j + 64] for j in range(4)]
    for i in range(2)
  ]
  for row in cells:
    assert (row[0] == 100).all()
  dark = 0.4 * 100 + 0.6 * np.array([0, 0, 4])  # ends of the colour map
  bright = 0.4 * 100 + 0.6 * np.array([252, 255, 164])
  for cell, where in [
    (cells[0][1], np.s_[:16, :16]),
    (cells[0][3], np.s_[:16, :16]),
    (cells[1][2], np.s_[16:32, 32:48]),
    (cells[1][3], np.s_[:, 48:]),  # relative to its own most
  ]:
    expected = np.tile(dark, (64, 64, 1))
    expected[where] = bright
    np.testing.assert_allclose(cell, expected, atol=1.5)


def test_sigma_picture_has_every_kernel_with_numbers_in_order(figures):
  growth = {
    "head_out": 1.5,
    "block10/mlp_in": 0.5,
    "block9/mlp_out": 2.0,
    "embedding": 1.0,
  }
  picture = visualize.sigma_picture(growth)
  assert picture.dtype == np.uint8 and picture.shape[2] == 3
  axis = figures[0].axes[0]
  names = [label.get_text() for label in axis.get_yticklabels()]
  assert names == ["block9/mlp_out", "block10/mlp_in", "embedding", "head_out"]
  assert axis.yaxis_inverted()
  widths = [bar.get_width() for bar in axis.patches]
  assert widths == [2.0, 0.5, 1.0, 1.5]
  assert picture.std() > 10


def test_all_pictures_are_drawn_from_the_workdir_alone(
  digits_run, tmp_path, monkeypatch
):
  monkeypatch.setattr(pipeline, "load_images", None)  # without the dataset
  workdir = shutil.copytree(digits_run.workdir, tmp_path / "run")
  before = set(runs.snapshot(workdir))
  paths = visualize.draw(workdir)
  names = ["curves.png", "attention.png", "sigma.png"]
  assert [path.name for path in paths] == names
  assert set(runs.snapshot(workdir)) - before == set(names)
  for path in paths:
    assert np.asarray(Image.open(path)).std() > 0


def test_best_which_has_no_log_gets_the_other_pictures(digits_run, tmp_path):
  workdir = shutil.copytree(digits_run.workdir, tmp_path / "best")
  (workdir / "metrics.jsonl").unlink()
  shutil.rmtree(workdir / "checkpoints" / "8" / "data")  # 4 is taken
  names = [path.name for path in visualize.draw(workdir)]
  assert names == ["attention.png", "sigma.png"]


def test_run_with_nothing_to_draw_is_an_error(digits_run, tmp_path):
  config_lib.claim_workdir(digits_run.config, tmp_path)
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(ConfigError, match="nothing to draw in"):
    visualize.draw(tmp_path)
  assert not (tmp_path / "curves.png").exists()


def test_folder_that_cannot_be_written_is_an_error_before_it_is_drawn(
  digits_run, tmp_path, monkeypatch
):
  (tmp_path / "file").write_text("mine")
  monkeypatch.setattr(visualize, "draw_curves", None)
  with pytest.raises(ConfigError, match=r"--output=.*Not a directory"):
    visualize.draw(digits_run.workdir, tmp_path / "file" / "new")


def test_before_the_first_checkpoint_curves_are_drawn(digits_run, tmp_path):
  for name in ("config.json", "metrics.jsonl"):
    shutil.copy(digits_run.workdir / name, tmp_path)
  (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 1, "loss')  # a torn line
  assert [path.name for path in visualize.draw(tmp_path)] == ["curves.png"]
  folder = tmp_path / "new" / "folder"
  (curves,) = visualize.draw(tmp_path, folder)
  assert curves == folder / "curves.png"
  assert curves.read_bytes() == (tmp_path / "curves.png").read_bytes()
