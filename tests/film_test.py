import re
import shutil
import subprocess
import sys

import imageio_ffmpeg
import jax
import numpy as np
from PIL import Image
import pytest

from configs import digits
from tests import datasets, runs
from vitgan_jax import film, latent_space, sample
from vitgan_jax.errors import ConfigError
from vitgan_jax.models import networks


def read(path):
  """Returns the frames [F, H, W, 3] of a film, and the seconds of each."""
  if path.suffix == ".mp4":
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    said = done.stderr.decode()
    assert "h264" in said and "yuv420p" in said
    width, height = map(
      int, re.search(r"yuv420p.*?, (\d+)x(\d+)", said).groups()
    )
    frames = np.frombuffer(done.stdout, np.uint8)
    fps = float(re.search(r"([\d.]+) fps", said)[1])
    return frames.reshape(-1, height, width, 3), 1 / fps
  frames = []
  with Image.open(path) as image:
    for i in range(getattr(image, "n_frames", 1)):
      image.seek(i)
      frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames), image.info.get("duration", 0) / 1000


def cells(frame, rows, columns, size=16):
  """Returns the images of a grid [rows, columns, S, S, 3], not enlarged."""
  pitch = size + size // 16
  factor = frame.shape[0] // (rows * pitch - size // 16)
  small = frame[::factor, ::factor]
  return np.stack(
    [
      [
        small[i * pitch : i * pitch + size, j * pitch : j * pitch + size]
        for j in range(columns)
      ]
      for i in range(rows)
    ]
  )


def moving(num_frames=12, size=34):
  """Returns frames of a grey ramp that goes around, of an odd size."""
  ramp = np.abs(np.arange(size) - size // 2) * 4
  return [
    np.broadcast_to(
      np.roll(ramp, i * size // num_frames)[None, :, None], (35, size, 3)
    ).astype(np.uint8)
    for i in range(num_frames)
  ]


@pytest.mark.parametrize(
  "suffix, fps, seconds",
  [(".mp4", 24, 1 / 24), (".webp", 30, 0.033), (".gif", 30, 0.03)],
)
def test_every_format_gives_the_frames_back(suffix, fps, seconds, tmp_path):
  path = tmp_path / f"film{suffix}"
  frames = moving()
  film.write(path, iter(frames), len(frames), fps)
  found, duration = read(path)
  assert duration == pytest.approx(seconds, rel=0.01)
  factor = 16  # 34 pixels to 512 at least
  assert found.shape == (12, 35 * factor, 34 * factor, 3)
  difference = found[:, ::factor, ::factor].astype(int) - np.stack(frames)
  assert np.abs(difference).mean() < 6
  assert [x.name for x in tmp_path.iterdir()] == [path.name]


def test_a_film_that_fails_leaves_nothing(tmp_path):
  def broken():
    yield from moving()[:3]
    raise KeyboardInterrupt

  for suffix in film.SUFFIXES:
    with pytest.raises(KeyboardInterrupt):
      film.write(tmp_path / f"film{suffix}", broken(), 12, 30)
  assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def painter(digits_run):
  return film.Painter(digits_run.workdir, 3, 6, truncation=0.7)


def test_latents_are_drawn_as_samples_are(painter, digits_run):
  latents = latent_space.loops(0, 3, 6, 32, 4)
  frames = np.stack(list(film.of_latents(painter, latents, 3)))
  generator = networks.build(digits_run.config).generator
  variables = jax.device_get(digits_run.state.g_ema_variables)
  mean = sample.mean_w(networks.build(digits_run.config), variables)

  def expected(z):
    w = generator.apply(variables, z, None, method=sample.mapping)
    w = 0.7 * w + 0.3 * mean
    images = generator.apply(variables, w, method="synthesize")
    return np.clip(np.asarray(images) * 127.5 + 127.5, 0, 255)

  for frame, z in zip(frames, latents, strict=True):
    found = cells(frame, 2, 3).reshape(6, 16, 16, 3)
    assert np.abs(found - expected(z)).max() <= 1


def test_a_walk_ends_where_it_began(painter):
  latents = latent_space.loops(1, 24, 6, 32, 4)
  frames = np.stack(list(film.of_latents(painter, latents, 3))).astype(float)
  steps = np.abs(frames - np.roll(frames, 1, axis=0)).mean(axis=(1, 2, 3))
  assert 0 < steps[0] < 2 * np.median(steps)
  assert np.abs(frames[0] - frames[12]).mean() > 2 * steps[0]


def test_directions_move_by_two_deviations_to_either_side(painter):
  latents = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
  directions = 0.1 * np.random.default_rng(1).normal(size=(2, 32))
  frames = list(film.of_directions(painter, latents, directions, 4))
  w = painter.w_of(latents)
  for frame, sigma in zip(frames, (0, 2, 0, -2), strict=True):
    found = cells(frame, 2, 6)
    for row, direction in zip(found, directions):
      expected = painter.paint(np.float32(w + sigma * direction))
      assert np.abs(row.astype(int) - expected).max() <= 1


def test_mixed_images_have_layers_of_row_and_column(digits_run):
  painter = film.Painter(digits_run.workdir, 0, 5)
  latents = np.random.default_rng(0).normal(size=(1, 5, 32)).astype(np.float32)
  (frame,) = film.of_mixing(painter, latents, 2, 3)
  found = cells(frame, 3, 4).astype(int)
  w = painter.w_of(latents[0])
  images = painter.paint(w).astype(int)
  assert not found[0, 0].any()
  assert np.abs(found[1:, 0] - images[:2]).max() <= 1
  assert np.abs(found[0, 1:] - images[2:]).max() <= 1
  for i in range(2):
    for j in range(3):
      # One block, and what follows: two layers.
      both = np.stack([w[i], w[2 + j]])[None]
      assert np.abs(found[i + 1, j + 1] - painter.paint(both)[0]).max() <= 1


def test_training_is_shown_with_its_kimg(digits_run, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  (workdir / "samples").mkdir(parents=True)
  shutil.copy(digits_run.workdir / "config.json", workdir)
  grids = datasets.noise(3, 64, 64, 3)
  for step, grid in zip((900, 10000, 2000), grids):
    (workdir / "samples" / f"{step:08d}.png").write_bytes(datasets.encode(grid))
  (workdir / "samples" / "00003000.png").write_bytes(b"torn")
  texts = []
  captioned = film.captioned

  def noted(image, text):
    texts.append(text)
    return captioned(image, text)

  monkeypatch.setattr(film, "captioned", noted)
  frames = list(film.of_training(workdir, 6))
  images_per_step = digits_run.config.batch_size
  expected = [(900, grids[0]), (2000, grids[2]), (10000, grids[1])]
  for i, frame in enumerate(frames):
    step, grid = expected[i // 2]
    assert texts[i] == f"{step * images_per_step / 1000:,.0f} kimg"
    np.testing.assert_array_equal(frame[:64], grid)
    assert frame[64:].max() > 200  # the letters
  assert (frames[0][64:] != frames[2][64:]).any()
  # A resumed run may draw more samples: frames are all of the last one's size.
  (workdir / "samples" / "00000100.png").write_bytes(
    datasets.encode(datasets.noise(32, 32, 3))
  )
  sizes = {frame.shape for frame in film.of_training(workdir, 8)}
  assert sizes == {frames[0].shape}


def test_the_command_writes_each_kind(digits_run, tmp_path):
  for flags, shape in [
    (("--of=latents", "--rows=2", "--columns=3"), (2, 3)),
    (("--of=directions", "--rows=3", "--columns=2"), (3, 2)),
    (("--of=mixing", "--rows=2", "--columns=2"), (3, 3)),
    (("--of=training",), None),
  ]:
    code, output, errors = runs.call(
      "vitgan_jax.film",
      f"--workdir={digits_run.workdir}",
      "--output=film.webp",
      "--seconds=0.4",
      "--fps=10",
      *flags,
      cwd=tmp_path,
    )
    assert code == 0 and "film.webp has 4 frames" in output, errors
    frames, _ = read(tmp_path / "film.webp")
    if shape:
      pixels = [17 * n - 1 for n in shape]
      factor = -(-512 // min(pixels))
      even = tuple(n * factor + n * factor % 2 for n in pixels)
      assert frames.shape[1:3] == even and len(frames) == 4
  code, output, _ = runs.call(
    "vitgan_jax.film",
    f"--workdir={digits_run.workdir}",
    "--output=still.png",
    "--of=mixing",
    cwd=tmp_path,
  )
  assert code == 0 and "1 frames" in output
  assert read(tmp_path / "still.png")[0].shape[0] == 1


def test_what_cannot_be_is_told_in_one_line(digits_run, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
  before = runs.snapshot(tmp_path)
  for flags, words in [
    ({"output": None}, "--output=FILE.mp4"),
    ({}, "pip install -e '.[film]'"),
    ({"output": "film.avi"}, "must end in .mp4, .webp, .gif"),
    ({"output": "film.png"}, "must end in .mp4, .webp, .gif"),
    ({"output": "film.gif", "fps": 60}, "--fps=60 is too fast"),
    ({"output": "film.gif", "fps": 0}, "--fps"),
    ({"output": "film.gif", "truncation": 2}, "--truncation"),
    ({"output": "film.gif", "workdir": "nowhere"}, "not a workdir"),
    ({"output": "film.gif", "classes": "cat"}, "trained without"),
    ({"output": "film.gif", "seed": -1}, "--seed=-1"),
    ({"output": "film.gif", "of": "training", "rows": 2}, "--rows is not for"),
    (
      {"output": "film.gif", "of": "directions", "rows": 33},
      "must be 32 at most",
    ),
  ]:
    flags = {"workdir": digits_run.workdir, "output": "film.mp4"} | flags
    assert words in runs.refusal(
      "vitgan_jax.film",
      *(f"--{k}={v}" for k, v in flags.items() if v is not None),
      cwd=tmp_path,
    )
    assert runs.snapshot(tmp_path) == before


def test_generators_without_styles_or_a_mapping_network_are_refused():
  config = digits.get_config("smoke,g=transgan")
  painter = film.Painter.__new__(film.Painter)  # untrained
  painter.nets = networks.build(config)
  painter.generator = painter.nets.generator
  latents = np.zeros((2, 32), np.float32)
  painter.variables = jax.jit(painter.generator.init)(
    jax.random.key(0), latents
  )
  for of, words in [
    ("mixing", "w of their own"),
    ("directions", "with a mapping network"),
  ]:
    with pytest.raises(ConfigError, match=f"--of={of}.*{words}"):
      film._frames(painter, of, 2, 30, 2, 2, 0)
