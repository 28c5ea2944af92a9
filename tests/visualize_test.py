import json

from matplotlib import pyplot as plt
import numpy as np
from PIL import Image

from vitgan_jax import visualize


def test_curves_show_the_last_value_logged_for_a_step(
  digits_run, tmp_path, monkeypatch
):
  (tmp_path / "config.json").write_text(
    (digits_run.workdir / "config.json").read_text()
  )
  log = [(250, 9.0), (500, 7.0), (250, 1.0), (750, 2.0)]
  (tmp_path / "metrics.jsonl").write_text(
    "".join(json.dumps({"step": s, "loss/d": v}) + "\n" for s, v in log)
  )
  figures = []
  monkeypatch.setattr(plt, "close", figures.append)
  path = visualize.draw_curves(tmp_path)
  line = figures[0].axes[0].lines[0]
  # Steps of 8 images each, in thousands of images.
  np.testing.assert_array_equal(
    line.get_xydata(), [[2.0, 1.0], [4.0, 7.0], [6.0, 2.0]]
  )
  assert line.get_label() == "d"
  assert np.asarray(Image.open(path)).std() > 0


def test_curves_of_a_run_have_every_scalar(digits_run, tmp_path, monkeypatch):
  for name in ("config.json", "metrics.jsonl"):
    (tmp_path / name).write_bytes((digits_run.workdir / name).read_bytes())
  figures = []
  monkeypatch.setattr(plt, "close", figures.append)
  visualize.draw_curves(tmp_path)
  lines = [line for axis in figures[0].axes for line in axis.lines]
  assert len(lines) == 8 and all(len(line.get_xdata()) for line in lines)
