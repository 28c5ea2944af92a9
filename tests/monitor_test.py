import errno
import io
import json
import os
import re
import sys
import types
from unittest import mock

import jax
import numpy as np
from PIL import Image
import pytest
from tensorboard.backend.event_processing.event_accumulator import (
  EventAccumulator,
)

from tests import tiny
from vitgan_jax import events, files, monitor
from vitgan_jax.errors import ConfigError


@pytest.fixture
def clock(monkeypatch):
  """A clock that the test sets."""

  class Clock:
    now = 1000.0

  monkeypatch.setattr(monitor.time, "monotonic", lambda: Clock.now)
  return Clock


def test_progress_line_has_rate_and_time_left(clock, capsys):
  config = tiny.tiny_config(batch_size=8, total_kimg=80.0)
  progress = monitor.Progress(config, first_step=0, total_steps=10_000)
  assert progress.report(100, {"loss/g": 0.5}) == {"kimg": 0.8}
  clock.now += 4.0
  scalars = progress.report(300, {"loss/g": 0.25, "loss/d": 1.23456})
  # 200 steps in 4 s are 400 images/s; 9,700 steps are left.
  assert scalars == {"kimg": 2.4, "images_per_sec": 400.0}
  first, second = capsys.readouterr().out.splitlines()
  assert first == "0.8/80 kimg  loss/g 0.500"
  assert second == (
    "2.4/80 kimg  400 images/s  ETA 0:03:14  loss/d 1.235  loss/g 0.250"
  )


def test_rate_is_of_the_steps_since_the_last_line(clock, capsys):
  config = tiny.tiny_config(batch_size=8, total_kimg=80.0)
  progress = monitor.Progress(config, first_step=0, total_steps=10_000)
  rates = []
  for step, seconds in [(100, 60.0), (200, 4.0), (300, 2.0)]:
    clock.now += seconds
    rates.append(progress.report(step, {}).get("images_per_sec"))
  assert rates == [None, 200.0, 400.0]  # the first call compiles
  assert capsys.readouterr().out.count("ETA") == 2


def test_line_comes_each_minute_without_being_logged(clock, capsys):
  config = tiny.tiny_config(batch_size=8, total_kimg=80.0)
  progress = monitor.Progress(config, first_step=0, total_steps=10_000)
  due = []
  for step in range(100, 600, 100):
    clock.now += 40.0
    due.append(progress.is_due())
    if due[-1]:
      progress.report(step, {}, is_logged=False)
  assert due == [False, True, False, True, False]
  assert capsys.readouterr().out == (
    "1.6/80 kimg\n3.2/80 kimg  20 images/s  ETA 1:04:00\n"
  )
  # The rate that is logged is that of all steps since the first line.
  clock.now += 20.0
  rate = progress.report(600, {})["images_per_sec"]
  assert rate == pytest.approx(400 * 8 / 140)


def test_resumed_run_reports_its_own_rate(clock, capsys):
  config = tiny.tiny_config(batch_size=8, total_kimg=80.0)
  progress = monitor.Progress(config, first_step=5000, total_steps=10_000)
  assert "images_per_sec" not in progress.report(5100, {})
  clock.now += 1.0
  assert progress.report(5200, {})["images_per_sec"] == 800.0
  assert "41.6/80 kimg" in capsys.readouterr().out


def read_lines(workdir):
  """Returns the scalars of metrics.jsonl, read strictly."""

  def refuse(constant):
    raise ValueError(f"{constant} is not JSON")

  return [
    json.loads(line, parse_constant=refuse)
    for line in (workdir / "metrics.jsonl").read_text().splitlines()
  ]


def read_events(workdir):
  """Returns ({tag: {step: scalar}}, {tag: {step: pixels}}) of TensorBoard."""
  accumulator = EventAccumulator(str(workdir), size_guidance={"images": 0})
  accumulator.Reload()
  scalars = {
    tag: {event.step: event.value for event in accumulator.Scalars(tag)}
    for tag in accumulator.Tags()["scalars"]
  }
  images = {
    tag: {
      event.step: np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
      for event in accumulator.Images(tag)
    }
    for tag in accumulator.Tags()["images"]
  }
  return scalars, images


def test_scalars_and_images_are_in_both_files(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
  with monitor.MetricWriter(tmp_path) as writer:
    writer.write(2, {"loss/d": 0.5})
    writer.write(4, {"loss/d": 0.25, "loss/g": 1.5}, {"samples": image})
  assert read_lines(tmp_path) == [
    {"step": 2, "loss/d": 0.5},
    {"step": 4, "loss/d": 0.25, "loss/g": 1.5},
  ]
  scalars, images = read_events(tmp_path)
  assert scalars == {"loss/d": {2: 0.5, 4: 0.25}, "loss/g": {4: 1.5}}
  assert images.keys() == {"samples"}
  np.testing.assert_array_equal(images["samples"][4], image)


def test_resumed_writer_adds_its_lines(tmp_path):
  for step in (2, 4):
    with monitor.MetricWriter(tmp_path) as writer:
      writer.write(step, {"loss/d": float(step)})
  assert [line["step"] for line in read_lines(tmp_path)] == [2, 4]
  assert read_events(tmp_path)[0] == {"loss/d": {2: 2.0, 4: 4.0}}


def test_only_the_first_process_writes_and_prints(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with monitor.MetricWriter(tmp_path) as writer:
    image = np.zeros((2, 2, 3), np.uint8)
    writer.write(2, {"loss/d": 0.5}, {"samples": image})
  progress = monitor.Progress(tiny.tiny_config(), 0, 8)
  progress.report(2, {"loss/d": 0.5})
  assert not list(tmp_path.iterdir())
  assert not capsys.readouterr().out


def test_run_shows_its_losses_and_diagnostics(digits_run):
  lines = read_lines(digits_run.workdir)
  by_step = {}
  for line in lines:
    by_step.setdefault(line["step"], {}).update(line)
  assert sorted(by_step) == [2, 4, 6, 8]
  for step, line in by_step.items():
    names = {"loss/d", "loss/g", "scores/real", "scores/fake", "penalty/bcr"}
    assert names <= line.keys()
    assert line["kimg"] == step * 8 / 1000
  for step in (4, 8):
    assert {
      "attention/entropy_min",
      "attention/entropy_mean",
      "attention/g_entropy_min",
      "attention/g_entropy_mean",
      "borders/step_ratio",
      "borders/step_ratio_real",
      "sigma/growth_max",
      "diversity/std_over_latents",
      "diversity/std_of_mean_image",
    } <= by_step[step].keys()
  scalars, _ = read_events(digits_run.workdir)
  for line in lines:
    for name in line.keys() - {"step"}:
      assert scalars[name][line["step"]] == pytest.approx(line[name], rel=1e-6)


def test_run_shows_its_progress(digits_run):
  lines = [x for x in digits_run.output.splitlines() if "kimg  " in x]
  assert [line.split()[0] for line in lines] == [
    f"{kimg}/0.064" for kimg in ("0.016", "0.032", "0.048", "0.064")
  ]
  for line in lines[1:]:
    assert re.search(r"  \d+ images/s  ETA \d+:\d\d:\d\d  gradients/d ", line)


def test_run_shows_samples_and_the_insides_of_its_discriminator(digits_run):
  _, images = read_events(digits_run.workdir)
  assert images.keys() == {"samples", "attention", "sigma"}
  for pictures in images.values():
    assert sorted(pictures) == [4, 8]
    assert all(picture.std() > 1 for picture in pictures.values())
  # Eight rows of an image and the map of its one block.
  assert images["attention"][8].shape == (8 * 68 - 4, 2 * 68 - 4, 3)
  assert not list(digits_run.workdir.glob("*.partial"))


def full_disk(*unused_args, **unused_kwargs):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_fault_of_a_bucket_ends_no_run(tmp_path, monkeypatch, capsys):
  """Those of TensorFlow, which writes gs:// paths, are no OSError."""

  class OpError(Exception):
    pass

  errors = types.SimpleNamespace(OpError=OpError)
  monkeypatch.setitem(
    sys.modules, "tensorflow", types.SimpleNamespace(errors=errors)
  )

  def fail(*unused_args):
    raise OpError("no such bucket\nand a long trace")

  monkeypatch.setattr(monitor, "EventWriter", mock.Mock())
  monkeypatch.setattr(files, "append_record", fail)
  with monitor.MetricWriter(tmp_path) as writer:
    writer.write(2, {"loss/d": 0.5})
  assert capsys.readouterr().err == (
    "The run goes on without metrics.jsonl: no such bucket\n"
  )
  with pytest.raises(ConfigError, match=r"into --workdir=x: no such bucket$"):
    with files.writing_into("x", "--workdir"):
      fail()


def test_run_goes_on_without_what_cannot_be_written(
  tmp_path, monkeypatch, capsys
):
  (tmp_path / "metrics.jsonl").mkdir()  # in the way
  with monitor.MetricWriter(tmp_path) as writer:
    writer.write(2, {"loss/d": 0.5})
    with monkeypatch.context() as patch:
      patch.setattr(events.EventWriter, "write", full_disk)
      for step in (4, 6):
        writer.write(step, {"loss/d": 0.5})
    (tmp_path / "metrics.jsonl").rmdir()
    writer.write(8, {"loss/d": 0.5})
  lines = sorted(capsys.readouterr().err.splitlines())  # each is told of once
  assert [line.split(":")[0] for line in lines] == [
    "The run goes on without TensorBoard's events",
    "The run goes on without metrics.jsonl",
  ]
  assert "No space left on device" in lines[0]
  # When there is room again, there are curves again.
  assert read_lines(tmp_path) == [{"step": 8, "loss/d": 0.5}]
  assert read_events(tmp_path)[0] == {"loss/d": {2: 0.5, 8: 0.5}}


@pytest.mark.slow  # on a busy machine the service may write late
def test_weights_and_biases_gets_what_tensorboard_does(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  image = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
  config = tiny.tiny_config(wandb="faces")
  for step in (2, 4):  # the second one goes on
    with monitor.MetricWriter(tmp_path, config) as writer:
      writer.write(step, {"loss/d": step + 0.125}, {"samples": image})
  runs = sorted(tmp_path.glob("wandb/offline-run-*"))
  identity = (tmp_path / "wandb_id").read_text()
  records = b"".join(
    (run / f"run-{identity}.wandb").read_bytes() for run in runs
  )
  for words in (
    [b"faces", b"loss/d", b"2.125", b"4.125", tmp_path.name.encode()]
    + [b"d_optimizer", b"mlp_dim"]  # of the config
  ):
    assert words in records, words
  pngs = [
    np.asarray(Image.open(path)) for path in tmp_path.glob("wandb/*/**/*.png")
  ]
  assert pngs and all(np.array_equal(png, image) for png in pngs)
  assert len(read_lines(tmp_path)) == 2  # as without it


@pytest.mark.parametrize("is_missing", [True, False])
def test_run_goes_on_without_weights_and_biases_and_says_so_once(
  is_missing, tmp_path, monkeypatch, capsys
):
  calls = []

  def init(**unused):
    calls.append(1)
    raise RuntimeError("no api key\nfor this host")

  wandb = types.SimpleNamespace(init=init, Settings=dict)
  monkeypatch.setitem(sys.modules, "wandb", None if is_missing else wandb)
  config = tiny.tiny_config(wandb="faces")
  with monitor.MetricWriter(tmp_path, config) as writer:
    for step in (2, 4, 6):
      writer.write(step, {"loss/d": 0.5})
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("The run goes on without Weights & Biases: ")
  if is_missing:
    assert line.endswith("pip install -e '.[wandb]'")
  else:
    assert line.endswith("no api key for this host") and len(calls) == 1
  assert [x["step"] for x in read_lines(tmp_path)] == [2, 4, 6]


def test_nothing_is_asked_of_weights_and_biases_unless_it_is_wanted(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(monitor, "WandbWriter", None)
  with monitor.MetricWriter(tmp_path, tiny.tiny_config()) as writer:
    writer.write(2, {"loss/d": 0.5})
  assert not list(tmp_path.glob("wandb*"))
