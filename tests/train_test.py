import errno
import os
import re
import shutil
import signal
from unittest import mock

import jax
import numpy as np
from PIL import Image
import pytest

from configs import digits
from tests import checkpoint_test, monitor_test, runs, tiny
from vitgan_jax import (
  checkpoint,
  files,
  partitioning,
  pictures,
  replay,
  sample,
  train,
)
from vitgan_jax import config as config_lib
from vitgan_jax.data import pipeline, prepare
from vitgan_jax.errors import ConfigError
from vitgan_jax.models import networks


def restore(workdir, step):
  config = config_lib.load(workdir)
  nets, mesh = networks.build(config), partitioning.create_mesh()
  with checkpoint.create_manager(workdir) as manager:
    return checkpoint.restore(manager, config, nets, mesh, step)


def before_call(monkeypatch, number, action):
  """Has the nth call of all, or each with None, get `action(state)`."""
  make_train_steps = train.make_train_steps
  calls = 0

  def make(config, nets, mesh):
    train_steps = make_train_steps(config, nets, mesh)

    def wrapped(state, batch, step):
      nonlocal calls
      calls += 1
      state = action(state) if number in (None, calls) else state
      return train_steps(state, batch, step)

    return wrapped

  monkeypatch.setattr(train, "make_train_steps", make)


def losses(run):
  return {
    line["step"]: (line["loss/d"], line["loss/g"])
    for line in monitor_test.read_lines(run.workdir)
    if "loss/d" in line
  }


def test_run_leaves_its_files(digits_run):
  names = {path.name for path in digits_run.workdir.iterdir()}
  events = {name for name in names if name.startswith("events.out.tfevents")}
  assert len(events) == 1
  assert names - events == {
    ".lock",
    "config.json",
    "checkpoints",
    "samples",
    "grid.png",
    "metrics.jsonl",
  }
  assert config_lib.load(digits_run.workdir) == digits_run.config
  assert runs.saved_steps(digits_run.workdir) == [4, 8]
  samples = sorted(p.name for p in (digits_run.workdir / "samples").iterdir())
  assert samples == ["00000004.png", "00000008.png"]


def test_returned_state_is_the_last_checkpoint(digits_run):
  assert int(digits_run.state.step) == 8
  tiny.assert_bit_equal(restore(digits_run.workdir, 8), digits_run.state)


def test_every_part_of_the_state_is_trained(digits_run):
  middle = tiny.leaves_by_name(tiny.to_host(restore(digits_run.workdir, 4)))
  last = tiny.leaves_by_name(tiny.to_host(digits_run.state))
  del last[
    "d_model_state/spectral/head_out/norm/u"
  ]  # one output, and so one number
  for name, leaf in last.items():
    # Path length is for StyleGAN2, the probability for adaptive augmentation.
    unused = ("key", "path_length", "augment_probability")
    constant = name in unused or name.endswith("/sigma_init")
    assert constant == np.array_equal(leaf, middle[name]), name


def test_grids_show_the_same_latents_of_the_averaged_generator(digits_run):
  mesh = partitioning.create_mesh()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sample, "BATCH_SIZE", 2)
    sampler = sample.make_sampler(networks.build(digits_run.config), mesh)
    grids = []
    for step in (4, 8):
      state = restore(digits_run.workdir, step)
      images = np.asarray(sampler(state.g_ema_variables, 0, 0))
      grids.append(pictures.image_grid(images))
  assert grids[1].shape == (67, 67, 3)  # 4 x 4 of 16, and gaps of 1
  _, in_tensorboard = monitor_test.read_events(digits_run.workdir)
  for step, grid in zip((4, 8), grids):
    np.testing.assert_array_equal(in_tensorboard["samples"][step], grid)
    with Image.open(digits_run.workdir / f"samples/{step:08d}.png") as image:
      pixels = np.asarray(image)
    assert pixels.shape == (536, 536, 3)  # enlarged to at least 512
    np.testing.assert_array_equal(pixels[::8, ::8], grid)
  last = digits_run.workdir / "samples" / "00000008.png"
  latest = digits_run.workdir / "grid.png"
  assert latest.read_bytes() == last.read_bytes()


def test_run_prints_its_parameters_data_and_end(digits_run):
  output = digits_run.output
  for name, params in (
    ("Generator", digits_run.state.g_params),
    ("Discriminator", digits_run.state.d_params),
  ):
    overview = output.split(f"{name}:\n")[1].split("Total:")[0]
    for leaf in tiny.leaves_by_name(params):
      assert f"| {leaf} " in overview
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert f"Total: {total:,} " in output
  assert re.search(
    r"Starting: 1,497 images of sklearn_digits at 16 px, batch 8 on 8 cpu",
    output,
  )
  assert output.endswith(
    f"Done. The last samples are in {digits_run.workdir}/grid.png\n"
  )


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
  """A run that SIGTERM stops in its first call, and that then goes on."""
  workdir = tmp_path_factory.mktemp("interrupted") / "run"
  with pytest.MonkeyPatch.context() as patch:

    def terminate(state):
      os.kill(os.getpid(), signal.SIGTERM)
      return state

    before_call(patch, 1, terminate)
    first = runs.train_quietly(digits.get_config("smoke"), workdir)
  steps = runs.saved_steps(workdir)
  second = runs.train_quietly(digits.get_config("smoke"), workdir)
  return first, steps, second


def test_programs_of_a_run_are_traced_once(tmp_path):
  traced = []

  def listen(event, seconds, fun_name="", **unused_kwargs):
    # One that is known already takes no time.
    if event == "/jax/core/compile/jaxpr_trace_duration" and seconds > 1e-3:
      traced.append(fun_name)

  config = digits.get_config("smoke")
  config.num_sample_images = 20  # batches of 16 and of 4
  sample._make_sampler.cache_clear()  # that of other tests has the same
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    run = runs.train_quietly(config, tmp_path / "run")
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert int(run.state.step) == 4 * config.steps_per_call
  for name in ("train_steps", "sampler", "diagnostics", "create_train_state"):
    assert traced.count(name) == 1, name


@pytest.mark.slow
def test_profile_shows_whole_calls_and_changes_no_number(digits_run, tmp_path):
  config = digits.get_config("smoke")
  config.profile = True
  run = runs.train_quietly(config, tmp_path / "run")
  tiny.assert_bit_equal(run.state, digits_run.state)
  assert losses(run) == losses(digits_run)
  (path,) = run.workdir.glob("plugins/profile/*/*.xplane.pb")
  assert f"The profile is in {run.workdir}/plugins/profile\n" in run.output
  names, steps = set(), set()
  for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
    for line in plane.lines:
      for event in line.events:
        names.add(event.name)
        if event.name == "train":
          steps.add(dict(event.stats)["step_num"])
  assert steps == {4, 6}  # the last two calls of four
  assert any("jit_train_steps" in name for name in names)
  assert not any("backend_compile" in name for name in names)


def test_signal_saves_and_stops(interrupted):
  first, steps, _ = interrupted
  assert int(first.state.step) == 2 and steps == [2]
  assert "Stopping: saving first" in first.output
  assert first.output.endswith("Stopped. The same command goes on from here.\n")
  assert (first.workdir / "samples" / "00000002.png").exists()


def test_run_that_goes_on_equals_one_that_never_stopped(
  interrupted, digits_run
):
  _, _, second = interrupted
  assert "Resuming at step 2" in second.output
  assert runs.saved_steps(second.workdir) == [2, 4, 8]
  for step in (4, 8):
    tiny.assert_bit_equal(
      restore(second.workdir, step), restore(digits_run.workdir, step)
    )
  tiny.assert_bit_equal(second.state, digits_run.state)


def test_run_that_goes_on_logs_what_one_that_never_stopped_does(
  interrupted, digits_run
):
  assert losses(interrupted[2]) == losses(digits_run)


def test_log_is_whole_up_to_a_checkpoint(tmp_path, monkeypatch):
  save, logged = checkpoint.save, {}

  def save_and_look(manager, state, data_state):
    records = files.read_records(tmp_path / "run" / "metrics.jsonl")
    steps = [record["step"] for record in records if "loss/d" in record]
    logged[int(state.step)] = steps  # what a kill, from here on, leaves
    save(manager, state, data_state)

  monkeypatch.setattr(checkpoint, "save", save_and_look)
  runs.train_quietly(digits.get_config("smoke"), tmp_path / "run")
  assert logged == {4: [2, 4], 8: [2, 4, 6, 8]}


def test_finished_run_is_left_as_it_is(digits_run, tmp_path):
  workdir = shutil.copytree(digits_run.workdir, tmp_path / "run")
  before = runs.snapshot(workdir)
  again = runs.train_quietly(digits.get_config("smoke"), workdir)
  tiny.assert_bit_equal(again.state, digits_run.state)
  after = {
    path: content
    for path, content in runs.snapshot(workdir).items()
    if path in before or not path.startswith("events.")
  }
  before[".lock"] = after[".lock"]  # says since when
  assert after == before


def test_run_goes_on_from_what_a_crash_left_whole(digits_run, tmp_path, capsys):
  workdir = shutil.copytree(digits_run.workdir, tmp_path / "run")
  checkpoint_test.cut(workdir / "checkpoints" / "8")
  for name in ("config.json", "metrics.jsonl"):
    content = (workdir / name).read_bytes()
    (workdir / name).write_bytes(content[:-20])
  run = runs.train_quietly(digits.get_config("smoke"), workdir)
  assert "Resuming at step 4" in run.output
  tiny.assert_bit_equal(run.state, digits_run.state)
  tiny.assert_bit_equal(restore(workdir, 8), digits_run.state)
  assert (workdir / "checkpoints" / "8.damaged" / "state").is_dir()
  assert config_lib.load(workdir) == digits_run.config
  assert not list(workdir.glob("*.partial"))
  assert (workdir / "config.json.damaged").exists()
  lines = files.read_records(workdir / "metrics.jsonl", files.METRICS)
  assert [x["step"] for x in lines if "loss/d" in x][-2:] == [6, 8]
  errors = capsys.readouterr().err.splitlines()
  told = [x for x in errors if "damaged" in x or "midst of a line" in x]
  assert len(told) == 4 and all(str(workdir) in line for line in told)


def too_large(state):
  """Returns a state whose generator overflows within its block."""
  params = jax.tree.map(lambda x: x, state.g_params)
  params["block0"]["mlp_in"]["bias"] += np.float32(3e38)
  return state.replace(g_params=params)


def going_on(digits_run, folder, policy="stop"):
  """Returns the config and a workdir of the run, which has half of it to go."""
  config = digits.get_config("smoke")
  config.update(total_kimg=0.128, on_nonfinite=policy)
  return config, shutil.copytree(digits_run.workdir, folder / "run")


@pytest.fixture(scope="module")
def diverged(digits_run, tmp_path_factory):
  """(workdir, error) of a run that a number ends in the call from step 10."""
  config, workdir = going_on(digits_run, tmp_path_factory.mktemp("diverged"))
  with pytest.MonkeyPatch.context() as patch:
    before_call(patch, 2, too_large)
    with pytest.raises(train.TrainingDivergedError) as error:
      runs.train_quietly(config, workdir)
  return workdir, str(error.value)


def test_number_that_is_not_finite_ends_the_run_before_it_is_saved(
  digits_run, diverged
):
  workdir, error = diverged
  assert "is nan at step 10, which was not taken" in error
  assert "\n" not in error and f"--mode=replay --workdir={workdir}" in error
  assert runs.saved_steps(workdir) == [4, 8]
  tiny.assert_bit_equal(restore(workdir, 8), digits_run.state)


def test_step_that_was_not_taken_is_replayed(diverged):
  workdir, _ = diverged
  # The state before it, and not what later calls would have made of that.
  assert runs.saved_steps(replay.folder(workdir)) == [10]
  code, output, errors = runs.call(
    "vitgan_jax.main",
    "--mode=replay",
    f"--workdir={workdir}",
    cwd=workdir.parent,
  )
  assert code == 0, errors
  assert output.splitlines()[1].startswith(
    "update 1 of the discriminator: modules return: Generator/block0"
  ), output
  assert "update 1 of the discriminator: losses: loss/d: 1 of 1" in output


def test_run_without_such_a_step_has_nothing_to_replay(digits_run, tmp_path):
  code, output, errors = runs.call(
    "vitgan_jax.main",
    "--mode=replay",
    f"--workdir={digits_run.workdir}",
    cwd=tmp_path,
  )
  assert code == os.EX_CONFIG and not output
  assert "has no step to replay" in errors and errors.count("\n") == 1


@pytest.mark.slow
def test_run_goes_back_and_on_with_other_keys(
  digits_run, tmp_path, monkeypatch, capsys
):
  config, workdir = going_on(digits_run, tmp_path, "rewind")
  before_call(monkeypatch, 2, too_large)
  run = runs.train_quietly(config, workdir)
  assert "Back to the last checkpoint, with other random numbers: 1 of" in (
    capsys.readouterr().err
  )
  assert int(run.state.step) == 16
  assert run.state.key == jax.random.fold_in(digits_run.state.key, 1)


@pytest.mark.slow  # the one before, and a step of its own, show most
def test_run_whose_numbers_go_bad_again_and_again_ends(
  digits_run, tmp_path, monkeypatch, capsys
):
  config, workdir = going_on(digits_run, tmp_path, "rewind")
  monkeypatch.setattr(train, "_MAX_REWINDS", 1)
  before_call(monkeypatch, None, too_large)
  with pytest.raises(train.TrainingDivergedError, match="at step 8"):
    runs.train_quietly(config, workdir)
  assert capsys.readouterr().err.count("Back to the last checkpoint") == 1


@pytest.mark.slow  # the one before, and a step of its own, show most
def test_run_that_would_skip_all_ends(digits_run, tmp_path, monkeypatch):
  config, workdir = going_on(digits_run, tmp_path, "skip")
  before_call(monkeypatch, 2, too_large)
  with pytest.raises(train.TrainingDivergedError, match="is nan at step 1"):
    runs.train_quietly(config, workdir)
  assert runs.saved_steps(workdir) == [4, 8]


def test_run_goes_on_without_pictures_that_cannot_be_written(
  tmp_path, monkeypatch, capsys
):
  def write_png(*unused_args, **unused_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")

  config = digits.get_config("smoke")
  prepare.prepare(config.data)  # which draws a contact sheet
  monkeypatch.setattr(pictures, "write_png", write_png)
  run = runs.train_quietly(config, tmp_path / "run")
  assert runs.saved_steps(run.workdir) == [4, 8]
  assert not list(run.workdir.rglob("*.png"))
  errors = capsys.readouterr().err
  assert errors.count("The run goes on without samples: ") == 1
  # What was measured on them is logged all the same.
  logged = [
    x for x in monitor_test.read_lines(run.workdir) if "borders/step_ratio" in x
  ]
  assert [x["step"] for x in logged] == [4, 8]


def test_run_does_not_go_on_with_other_images(digits_run, tmp_path):
  config = digits.get_config("smoke")
  config.total_kimg = 0.128
  config.data.split = "train[1:]"  # other images...
  other = prepare.prepare(config.data)
  config.data.split = "train"
  config.data.data_dir = str(tmp_path / "data")  # ... under the same name
  shutil.copytree(other, prepare.prepared_path(config.data))
  workdir = shutil.copytree(digits_run.workdir, tmp_path / "run")
  with pytest.raises(ConfigError, match=r"1,497 images.*1,496"):
    runs.train_quietly(config, workdir)
  assert runs.saved_steps(workdir) == [4, 8]


def test_second_run_in_a_workdir_is_refused(digits_run, tmp_path):
  config = digits.get_config("smoke")
  config.total_kimg = 0.128
  workdir = shutil.copytree(digits_run.workdir, tmp_path / "run")
  before = (workdir / "config.json").read_bytes()
  with files.hold(workdir, "--workdir"):
    with pytest.raises(ConfigError, match="in use by process"):
      runs.train_quietly(config, workdir)
  assert (workdir / "config.json").read_bytes() == before
  assert runs.saved_steps(workdir) == [4, 8]


def test_step_gets_its_batches_with_their_labels(tmp_path, monkeypatch):
  config = digits.get_config("smoke")
  config.update(d_steps=3, data=dict(num_classes=10))
  batches = []

  def make(config, nets, mesh):
    def train_steps(state, batch, unused_step):
      batches.append(jax.device_get(batch))
      return state, {}

    return train_steps

  monkeypatch.setattr(train, "make_train_steps", make)
  monkeypatch.setattr(train, "SampleWriter", mock.MagicMock())
  runs.train_quietly(config, tmp_path / "run")
  images = pipeline.load_images(config.data)
  classes = dict(zip(map(np.ndarray.tobytes, images[:]), images.labels()))
  assert len(classes) == len(images)  # no image is there twice
  seen = set()
  assert len(batches) == 2  # of 2 steps, of 3 times 8 images
  for batch in batches:
    assert batch["images"].shape == (2, 3, 8, 16, 16, 3)
    for index in np.ndindex(2, 3, 8):
      image = batch["images"][index].tobytes()
      assert batch["labels"][index] == classes[image]
      seen.add(image)
  assert len(seen) == 2 * 2 * 3 * 8


def test_run_says_what_computes_its_networks(digits_run):
  line = "Computed by generator: xla; discriminator: xla\n"
  assert line in digits_run.output


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_metric_that_is_not_finite_is_named(value):
  assert train._check_finite({"loss/d": np.float32(2)}) == {"loss/d": 2.0}
  with pytest.raises(train.TrainingDivergedError, match="loss/g"):
    train._check_finite({"loss/d": 1.0, "loss/g": np.float32(value)})


@pytest.mark.parametrize("every_kimg", [0.016, 0.02, 0.05, 1.0])
def test_every_multiple_is_passed_once(every_kimg):
  config = tiny.tiny_config(batch_size=8, steps_per_call=2)
  ends = range(2, 1000, 2)
  passed = [end for end in ends if train._passes(config, end, every_kimg)]
  images = 1000 * every_kimg
  expected = []
  next_multiple = images
  for end in ends:
    if end * 8 >= next_multiple:
      expected.append(end)
      next_multiple = (end * 8 // images + 1) * images
  assert passed == expected


def failing(data):
  raise ConfigError("no data")


@pytest.mark.parametrize(
  "fields, match",
  [
    ({"batch_size": 12}, "must be a multiple of the 8 devices"),
    (
      {"accumulation": 4, "batch_size": 16},
      "batch_size=16 .* the 8 devices times config.accumulation=4",
    ),
    ({"generator.num_heads": 3}, "must divide"),
    ({"data.dataset": "fails"}, "no data"),
    ({"data.split": "train[:5]"}, "has 5 images .*batch_size=8"),
    ({"data.num_classes": 5}, "num_classes=5 must be 0 or the 10 classes of"),
    ({"implementation": "pallas"}, "'pallas' is for TPUs"),
  ],
)
def test_run_that_cannot_start_leaves_no_workdir(
  tmp_path, monkeypatch, fields, match
):
  config = digits.get_config("smoke")
  config.update_from_flattened_dict(fields)
  if config.data.dataset == "fails":
    monkeypatch.setattr(pipeline, "load_images", failing)
  with pytest.raises(ConfigError, match=match):
    train.train_and_evaluate(config, tmp_path / "run")
  assert not list(tmp_path.iterdir())
