import concurrent.futures
import contextlib
import io
import json
import shutil
from unittest import mock

import jax
import numpy as np
from PIL import Image
import pytest
import scipy.linalg

from configs import digits
from tests import checkpoint_test, monitor_test, runs, tiny, toy_features
from vitgan_jax import checkpoint, evaluate, partitioning, sample
from vitgan_jax import config as config_lib
from vitgan_jax.data import pipeline, prepare
from vitgan_jax.errors import ConfigError, DamagedError
from vitgan_jax.metrics import features, fid, reference, score, statistics

NUM_SAMPLES = 1000


@pytest.fixture(autouse=True, scope="module")
def tiny_network():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      features, "load_network", lambda name, weights="": toy_features.tiny()
    )
    yield


def evaluate_quietly(workdir, *args, num_samples=NUM_SAMPLES, **kwargs):
  """Evaluates a workdir; returns what it printed."""
  output = io.StringIO()
  with contextlib.redirect_stdout(output):
    evaluate.evaluate(workdir, *args, num_samples=num_samples, **kwargs)
  return output.getvalue()


@pytest.fixture
def workdir(digits_run, tmp_path):
  return shutil.copytree(digits_run.workdir, tmp_path / "run")


@pytest.fixture(scope="module")
def evaluated(digits_run, tmp_path_factory):
  """A workdir of which all checkpoints are scored, and what was printed."""
  path = tmp_path_factory.mktemp("evaluated") / "run"
  shutil.copytree(digits_run.workdir, path)
  return path, evaluate_quietly(path, "all")


def test_score_is_that_of_the_images_that_sampling_writes(evaluated, tmp_path):
  workdir, _ = evaluated
  sample.sample(workdir, NUM_SAMPLES, 0, tmp_path / "samples")
  fake = toy_features.features_of(score.load_images(tmp_path / "samples"))
  real = toy_features.features_of(
    pipeline.load_images(config_lib.load(workdir).data)[:]
  )
  a, b = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
  root = scipy.linalg.sqrtm(a @ b).real
  expected = np.sum((real.mean(0) - fake.mean(0)) ** 2) + np.trace(
    a + b - 2 * root
  )
  record = evaluate.read_records(workdir)[-1]
  assert record["step"] == 8
  np.testing.assert_allclose(
    record["scores"]["fd_tiny1k"],
    expected,
    rtol=1e-4,  # features are float32
  )


def test_record_has_the_whole_protocol(evaluated):
  workdir, _ = evaluated
  record = evaluate.read_records(workdir)[0]
  images = pipeline.load_images(config_lib.load(workdir).data)
  assert record["step"] == 4 and record["kimg"] == 0.032
  assert record["protocol"] == {
    "network": "tiny-1",
    "network_sha256": "0" * 64,
    "num_fake": NUM_SAMPLES,
    "num_real": 1497,
    "generator": "moving average",
    "seed": 0,
    "images_sha256": images.fingerprint,
    "dataset": "sklearn_digits/1.0.0",
    "split": "train",
    "image_size": 16,
    "filter": "lanczos, antialiased",
    "crop": "largest centred square",
  }
  assert list(record["class_share"]) == [str(i) for i in range(10)]
  np.testing.assert_allclose(sum(record["class_share"].values()), 1, atol=1e-4)
  for line in (workdir / "scores.jsonl").read_text().splitlines():
    json.loads(line)


def test_scores_are_printed_written_and_drawn(evaluated):
  workdir, output = evaluated
  records = evaluate.read_records(workdir)
  assert [record["step"] for record in records] == [4, 8]
  assert "Scores of step 4, 0.032 kimg, the best so far:" in output
  line = "1,000 samples of seed 0 against the 1,497 images of sklearn_digits"
  assert line in output
  scalars, _ = monitor_test.read_events(workdir / "evaluation")
  for record in records:
    np.testing.assert_allclose(
      scalars["fd_tiny1k"][record["step"]],
      record["scores"]["fd_tiny1k"],
      rtol=1e-6,
    )
  for step in (4, 8):
    with Image.open(workdir / f"evaluation/{step:08d}-neighbours.png") as grid:
      assert grid.size == (8 * 17 * 4 - 4, 12 * 17 * 4 - 4)
    name = f"evaluation/{step:08d}-interpolation.png"
    with Image.open(workdir / name) as grid:
      assert grid.size == (8 * 17 * 4 - 4, 8 * 17 * 4 - 4)


def test_best_is_a_workdir_of_the_lowest_score(evaluated, tmp_path):
  workdir, _ = evaluated
  records = evaluate.read_records(workdir)
  best = min(records, key=lambda record: record["scores"]["fd_tiny1k"])
  config = config_lib.load(workdir / "best")
  assert config == config_lib.load(workdir)
  _, nets, mesh, state = checkpoint.load_run(workdir / "best")
  assert int(state.step) == best["step"]
  with checkpoint.open_manager(workdir) as manager:
    expected = checkpoint.restore(manager, config, nets, mesh, best["step"])
  tiny.assert_bit_equal(state, expected)
  sample.sample(workdir / "best", 1, 0, tmp_path / "samples")


def record_of(step, value, seed=0):
  return {
    "step": step,
    "scores": {"fid1k": value, "other": -value},
    "protocol": {"seed": seed},
  }


@pytest.fixture
def keep(digits_run, tmp_path):
  """Returns `keep(record)`: (whether it is the best, the steps of the best)."""

  def keep_record(record):
    state = digits_run.state.replace(step=np.int32(record["step"]))
    is_best = evaluate.is_best(tmp_path, record)
    evaluate.keep(
      tmp_path, record, is_best, digits_run.config, state, {"next_image": 0}
    )
    with checkpoint.open_manager(tmp_path / "best") as manager:
      return is_best, manager.all_steps()

  return keep_record


def test_best_is_the_lowest_of_one_protocol(keep, tmp_path):
  assert keep(record_of(5, 3.0)) == (True, [5])
  assert keep(record_of(6, 3.0)) == (False, [5])
  assert keep(record_of(7, 2.0)) == (True, [7])
  assert keep(record_of(2, 1.0)) == (True, [2])  # an earlier step
  assert keep(record_of(9, 1.5)) == (False, [2])
  # By another protocol nothing is known of the one that is kept.
  assert keep(record_of(9, 0.5, seed=1)) == (False, [2])
  assert keep(record_of(2, 0.7, seed=1)) == (False, [2])
  assert keep(record_of(10, 0.6, seed=1)) == (False, [2])
  assert keep(record_of(11, 0.4, seed=1)) == (True, [11])
  assert len(evaluate.read_records(tmp_path)) == 9


def test_two_evaluations_may_keep_their_best_at_once(tmp_path):
  def keep(step):
    state = checkpoint_test.small_state(step)
    record = record_of(step, float(step))
    evaluate.keep(tmp_path, record, True, checkpoint_test.CONFIG, state, {})

  with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(keep, (3, 5)))
  keep(7)  # it was the best before the others kept theirs
  assert checkpoint.whole_steps(tmp_path / "best") == {3}
  assert {x["step"] for x in evaluate.read_records(tmp_path)} == {3, 5, 7}


def test_what_was_scored_is_not_scored_again(evaluated, tmp_path, monkeypatch):
  workdir = shutil.copytree(evaluated[0], tmp_path / "run")
  before = runs.snapshot(workdir)
  monkeypatch.setattr(evaluate.Evaluator, "features_of", None)
  output = evaluate_quietly(workdir, "all")
  assert "fd_tiny1k" in output
  assert runs.snapshot(workdir) == before


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [1, 2])
def test_any_number_of_devices_gives_the_same_scores(
  evaluated, workdir, num_devices, monkeypatch
):
  mesh = partitioning.create_mesh(jax.devices()[:num_devices])
  monkeypatch.setattr(partitioning, "create_mesh", lambda fsdp=1: mesh)
  evaluate_quietly(workdir, "8")
  expected = evaluate.read_records(evaluated[0])[1]["scores"]
  (record,) = evaluate.read_records(workdir)
  for name, value in record["scores"].items():
    # The samples differ by round-off, which turns a pixel here and there.
    np.testing.assert_allclose(
      value, expected[name], rtol=2e-3, atol=2e-3, err_msg=name
    )


@pytest.mark.slow
def test_other_seed_and_count_are_other_protocols(evaluated, tmp_path):
  workdir = shutil.copytree(evaluated[0], tmp_path / "run")
  evaluate_quietly(workdir, seed=1)
  evaluate_quietly(workdir, num_samples=1001)
  _, before, seed, count = evaluate.read_records(workdir)
  assert before["step"] == seed["step"] == count["step"] == 8
  assert before["scores"].keys() == seed["scores"].keys()
  assert before["scores"] != seed["scores"]
  assert next(iter(count["scores"])) == "fd_tiny1001"


@pytest.mark.slow
def test_watching_scores_what_appears_until_the_end_of_the_run(
  digits_run, workdir, monkeypatch
):
  shutil.move(workdir / "checkpoints" / "8", workdir / "8")  # to come
  waits = []

  def sleep(seconds):
    waits.append(seconds)
    if len(waits) == 2:
      shutil.move(workdir / "8", workdir / "checkpoints" / "8")
    assert len(waits) < 9

  monkeypatch.setattr(evaluate.time, "sleep", sleep)
  evaluate_quietly(workdir, "watch")
  assert len(waits) == 2
  assert [r["step"] for r in evaluate.read_records(workdir)] == [4, 8]


def test_watching_passes_over_what_the_run_deleted(workdir, monkeypatch):
  restore = checkpoint.restore

  def deleting(manager, config, nets, mesh, step):
    if step == 4:
      shutil.rmtree(workdir / "checkpoints" / "4")
    return restore(manager, config, nets, mesh, step)

  monkeypatch.setattr(checkpoint, "restore", deleting)
  output = evaluate_quietly(workdir, "watch")
  assert "Step 4 was deleted" in output
  assert [r["step"] for r in evaluate.read_records(workdir)] == [8]


def test_what_a_crash_left_of_files_is_passed_over(evaluated, tmp_path, capsys):
  workdir = shutil.copytree(evaluated[0], tmp_path / "run")
  line, _ = (workdir / "scores.jsonl").read_bytes().splitlines(True)
  (workdir / "scores.jsonl").write_bytes(line + line[:-9])
  checkpoint_test.cut(workdir / "checkpoints" / "8")
  before = runs.snapshot(workdir / "checkpoints")
  with pytest.raises(DamagedError, match="checkpoint 8"):
    evaluate_quietly(workdir, "8")
  for which in ("all", "last"):
    output = evaluate_quietly(workdir, which)
    assert "Scores of step 4" in output
  assert "Passed over: checkpoint 8" in capsys.readouterr().err
  assert runs.snapshot(workdir / "checkpoints") == before
  assert len(evaluate.read_records(workdir)) == 1  # it was not scored again


def test_best_that_is_damaged_gives_way_to_the_next(keep, digits_run, tmp_path):
  assert keep(record_of(5, 3.0)) == (True, [5])
  checkpoint_test.cut(tmp_path / "best" / "checkpoints" / "5")
  (tmp_path / "best" / "config.json").write_text("{")
  with pytest.raises(DamagedError, match="is damaged: it holds no"):
    checkpoint.load_run(tmp_path / "best")
  assert keep(record_of(6, 4.0)) == (True, [6])
  run = checkpoint.load_run(tmp_path / "best")
  assert int(run.state.step) == 6 and run.config == digits_run.config


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"which": "first"}, "last, all, watch or a step"),
    ({"which": "5²"}, "last, all, watch or a step"),
    ({"which": "5"}, "no checkpoint of step 5"),
    ({"num_samples": 0}, "--num_samples=0"),
    ({"num_samples": 999}, "999 generated images are too few.*least 1,000"),
    ({"seed": -1}, "--seed=-1"),
  ],
)
def test_bad_arguments_are_errors_before_anything_is_computed(
  workdir, arguments, message, monkeypatch
):
  monkeypatch.setattr(reference, "load", None)
  with pytest.raises(ConfigError, match=message) as error:
    evaluate_quietly(workdir, **arguments)
  assert "\n" not in str(error.value)
  assert not (workdir / "scores.jsonl").exists()
  assert not (workdir / "best").exists()


@pytest.mark.slow
def test_data_may_have_moved(workdir, tmp_path):
  config = digits.get_config("smoke")
  old = prepare.prepare(config.data)
  config.data.data_dir = str(tmp_path / "data")
  shutil.copytree(old, prepare.prepared_path(config.data))
  evaluate_quietly(workdir, machine=config)
  assert (tmp_path / "data" / "vitgan_jax" / "references").is_dir()


@pytest.mark.slow
def test_other_real_images_are_another_protocol(evaluated, tmp_path):
  workdir = shutil.copytree(evaluated[0], tmp_path / "run")
  before = evaluate.read_records(workdir)
  data = digits.get_config("smoke").data
  data.split = "train[:1200]"
  held_out = prepare.prepare(data)
  table = evaluate_quietly(workdir, real=held_out)
  assert "against the 1,200 images of sklearn_digits" in table
  *old, new = evaluate.read_records(workdir)
  assert old == before
  assert new["protocol"]["split"] == "train[:1200]"
  sample.sample(workdir, NUM_SAMPLES, 0, tmp_path / "samples")
  real, fake = (
    statistics.from_features(toy_features.features_of(images))
    for images in (
      pipeline.PreparedImages(held_out)[:],
      score.load_images(tmp_path / "samples"),
    )
  )
  distance = fid.frechet_distance(real, fake)
  assert next(iter(new["scores"].values())) == pytest.approx(distance, rel=1e-4)


def test_reference_that_does_not_fit_is_an_error(workdir, tmp_path):
  for folder, message in ((tmp_path, "no card.json"), (None, "of 8 px")):
    data = digits.get_config("smoke").data
    data.image_size = 8
    with pytest.raises(ConfigError, match=message):
      evaluate_quietly(workdir, real=folder or prepare.prepare(data))
  assert not (workdir / "scores.jsonl").exists()


def test_reference_of_other_classes_is_refused(tmp_path, monkeypatch):
  (tmp_path / "card.json").touch()
  config = digits.get_config()
  config.data.num_classes = 3
  card = {"image_size": 16, "classes": ["b", "a", "c"]}
  monkeypatch.setattr(
    pipeline, "PreparedImages", lambda path: mock.Mock(card=card)
  )
  evaluate._real_images(config, tmp_path, [])  # none are known
  evaluate._real_images(config, tmp_path, card["classes"])
  with pytest.raises(ConfigError, match="order: b, a, c; the run has a, b, c"):
    evaluate._real_images(config, tmp_path, ["a", "b", "c"])


def test_workdir_without_checkpoints_is_an_error(workdir):
  shutil.rmtree(workdir / "checkpoints")
  with pytest.raises(ConfigError, match="no checkpoint"):
    evaluate_quietly(workdir)


def test_training_scores_itself(tmp_path, evaluated):
  config = digits.get_config("smoke")
  config.evaluation.every_kimg = 0.032
  config.evaluation.num_samples = NUM_SAMPLES
  run = runs.train_quietly(config, tmp_path / "run")
  records = evaluate.read_records(run.workdir)
  assert [record["step"] for record in records] == [4, 8]
  # As `--mode=evaluate` did, but for what takes long.
  for record, other in zip(records, evaluate.read_records(evaluated[0])):
    assert record["protocol"] == other["protocol"]
    for name, value in record["scores"].items():
      np.testing.assert_allclose(
        value, other["scores"][name], rtol=2e-3, atol=2e-3, err_msg=name
      )
  assert "Scores of step 8" in run.output
  logged = [
    json.loads(line)
    for line in (run.workdir / "metrics.jsonl").read_text().splitlines()
  ]
  assert [x["step"] for x in logged if "fd_tiny1k" in x] == [4, 8]
  assert (run.workdir / "best" / "config.json").exists()
  # As a kill between a checkpoint and its score leaves it.
  path = run.workdir / "scores.jsonl"
  whole = path.read_text()
  path.write_text(whole.splitlines(keepends=True)[0])
  for _ in range(2):  # but once
    runs.train_quietly(config, run.workdir)
    assert path.read_text() == whole


@pytest.mark.slow
def test_scores_that_cannot_be_kept_are_printed_all_the_same(workdir, capsys):
  (workdir / "best").write_text("in the way")
  with pytest.raises(ConfigError) as error:
    evaluate.evaluate(workdir, "all", num_samples=NUM_SAMPLES)
  output = capsys.readouterr().out
  assert output.count("fd_tiny1k ") == 2
  assert "the scores of step 4, 8, above, are not kept: " in str(error.value)
  assert not (workdir / "scores.jsonl").exists()
